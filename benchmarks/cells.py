"""The shapes that the GPU suites time, and the bytes they move. Without JAX or torch: both processes read it."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (2, 3, 4, 6)
VERIFIED_TOKENS = (1, 2, 4, 6, 8, 16)
HEADS = ((32, 32), (64, 64), (16, 32))
POOLS = {"float32": 4, "bfloat16": 2}
LOWER_BOUND = -5.0
GATES = ("lower_bound", "softplus")  # of chunk; the other suites have the first

# A timed program makes so many calls, on slots of their own, that their states exceed the L2 cache (60 MB) several
# times, as the layers of a model do; more calls than the most would cost more in compilation than they tell.
TOUCHED_BYTES = 200e6
WEIGHTS_BYTES = 130e6  # an H200's L2 cache has 50 MB
LEAST_CALLS, MOST_CALLS = 4, 128


@dataclasses.dataclass(frozen=True)
class Cell:
    """One shape: N rows of T tokens, bfloat16 inputs, K = V = ``dim``, a pool of ``pool``."""

    dim: int
    heads: int
    value_heads: int
    pool: str
    n: int
    tokens: int = 1

    def __str__(self) -> str:
        return f"K={self.dim} H={self.heads} HV={self.value_heads} {self.pool} N={self.n} T={self.tokens}"

    @property
    def states(self) -> int:
        """The bytes of the N rows' states, once."""
        return self.n * self.value_heads * self.dim**2 * POOLS[self.pool]

    @property
    def calls(self) -> int:
        if self.dim < 64:  # a trial on a CPU
            return LEAST_CALLS
        return min(MOST_CALLS, max(LEAST_CALLS, math.ceil(TOUCHED_BYTES / self.states)))

    @property
    def tokens_in_out(self) -> int:
        """The bytes of q, k (H heads), v, g, beta and o (HV heads), of the slots, and of the gate's parameters."""
        rows = self.n * self.tokens
        bf16 = rows * (2 * self.heads * self.dim + self.value_heads * (3 * self.dim + 1))
        return 2 * bf16 + 4 * self.n + 4 * self.value_heads * (1 + self.dim)

    def update(self, tokens: int) -> int:
        """The bytes of ``tokens`` tokens of the Update: float32 u and g with HV heads, k with H."""
        return 4 * self.n * tokens * self.dim * (2 * self.value_heads + self.heads)

    def decode_bytes(self) -> dict[str, int]:
        return {"state_bytes": 2 * self.states, "other_bytes": self.tokens_in_out}

    def chain_bytes(self, accepted: int) -> dict[str, int]:
        """verify reads the states and writes the update; flush reads and writes the states and reads what was accepted."""
        other = self.tokens_in_out + self.update(self.tokens) + self.update(accepted) + 8 * self.n
        return {"state_bytes": 3 * self.states, "other_bytes": other}

    def row(self) -> dict[str, Any]:
        """What identifies the cell in a result."""
        return dataclasses.asdict(self)


def accepted(tokens: int) -> dict[str, int]:
    """The acceptance counts that are timed."""
    return {"all": tokens, "half": tokens // 2}


def cells(suite: str, size: str) -> list[Cell]:
    """The cells of "decode", "mtp" or "verify": "full", "targets" (named by them), "quick" (a trial), "tiny" (for a CPU)."""
    tokens = {"mtp": TOKENS, "verify": VERIFIED_TOKENS}.get(suite, (1,))
    if size == "tiny":
        return [Cell(16, 1, 2, pool, n, t) for pool in POOLS for n in (1, 2) for t in tokens[:2]]
    if size == "quick":
        return [Cell(128, 32, 32, pool, n, t) for pool in POOLS for n in (1, 8, 128) for t in tokens[:3:2]]
    if suite == "verify" or size == "targets":
        sizes = [(n, 32) for n in (1, 8, 32, 128)] + [(128, 64)]
        return [Cell(128, heads, heads, pool, n, t) for pool in POOLS for n, heads in sizes for t in tokens]
    grid = [Cell(128, *heads, pool, n, t) for heads in HEADS for pool in POOLS for n in BATCHES for t in tokens]
    # K = V = 64 is there to be seen, not mapped.
    return grid + [Cell(64, 32, 32, pool, n, t) for pool in POOLS for n in (1, 8, 64, 256) for t in tokens[::2]]


VARIANTS = ("forward + backward", "forward")  # of chunk; the first is compiled first


@dataclasses.dataclass(frozen=True)
class Sequences:
    """One shape of chunk: B rows of T tokens, or one row in which sequences of ``lengths`` lie packed; K = V = ``dim``."""

    heads: int
    value_heads: int
    batch: int
    tokens: int
    lengths: tuple[int, ...] = ()
    gate: str = GATES[0]
    dim: int = 128

    def __str__(self) -> str:
        alike = len(self.lengths) > 1 and len(set(self.lengths)) == 1
        lengths = f"{len(self.lengths)} x {self.lengths[0]}" if alike else " + ".join(map(str, self.lengths))
        shape = f"B={self.batch} T={self.tokens} H={self.heads} HV={self.value_heads} {self.gate}"
        return f"{shape}, packed {lengths}" if lengths else shape

    @property
    def offsets(self) -> list[int]:
        return list(itertools.accumulate(self.lengths, initial=0))

    def row(self) -> dict[str, Any]:
        """What identifies the cell in a result."""
        return dataclasses.asdict(self)


def sequences(size: str) -> list[Sequences]:
    """The cells of "chunk-gpu", sizes as in :func:`cells`."""
    if size == "tiny":
        return [Sequences(1, 2, 2, 40, gate=GATES[0], dim=16), Sequences(1, 2, 1, 40, (0, 17, 23), GATES[1], 16)]
    mixed = (1300, 547, 2048, 963, 271, 3063)
    if size == "quick":
        return [
            Sequences(64, 64, 1, 8192),
            Sequences(16, 32, 2, 4096, gate="softplus"),
            Sequences(64, 64, 1, 8192, mixed),
        ]
    shapes: list[tuple[Any, ...]] = [(heads, heads, 1, 8192) for heads in (32, 64, 96)]
    shapes += [(32, 32, 8, 2048), (16, 32, 2, 4096), (16, 64, 2, 4096)]
    shapes += [(64, 64, 1, 8192, lengths) for lengths in ((1024,) * 8, mixed)]
    return [dataclasses.replace(Sequences(*shape), gate=gate) for shape in shapes for gate in GATES]


@dataclasses.dataclass(frozen=True)
class Projection:
    """One call of an operation of q8_0: N tokens of IN inputs through a weight, or two, of so many outputs."""

    operation: str
    n: int
    inputs: int
    outputs: tuple[int, ...]
    lanes: int = 0  # of matmul_hc_expand

    def __str__(self) -> str:
        return f"{self.inputs} -> {' and '.join(map(str, self.outputs))}, N={self.n}"

    @property
    def weight_bytes(self) -> int:
        """int8 values and a float16 scale a block of 32."""
        return sum(self.outputs) * (self.inputs + 2 * -(-self.inputs // 32))

    @property
    def weights(self) -> int:
        """How many, so that none is in the L2 cache when its turn comes."""
        return max(2, math.ceil(WEIGHTS_BYTES / self.weight_bytes)) if self.inputs >= 1024 else 2  # or a trial on a CPU

    def row(self) -> dict[str, Any]:
        """What identifies the cell in a result."""
        return dataclasses.asdict(self)


PAIR = (7168, (1536, 576))  # the down projections that a latent attention layer begins with
EXPANDED = (2048, (4096,))


def projections(size: str) -> list[Projection]:
    """The cells of "q8_0", sizes as in :func:`cells`."""
    if size == "tiny":
        pair, expanded = (64, (48, 9)), (64, (40,))
        shapes, tokens = [expanded], [1, 2]
    else:
        pair, expanded = PAIR, EXPANDED
        shapes, tokens = [(7168, (1536,)), (7168, (576,)), expanded, (4096, (4096,))], [1, 4]
    if size == "full":
        shapes += [(7168, (7168,)), (8192, (8192,))]
        tokens = [1, 2, 4, 8, 16, 64]
    found = [Projection("matmul", n, *shape) for shape in shapes for n in tokens]
    found += [Projection("matmul_pair", n, *pair) for n in tokens]
    return found + [Projection("matmul_hc_expand", n, *expanded, lanes=4) for n in tokens]
