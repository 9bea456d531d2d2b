"""What crosses a primitive: operands, static specs, and the conventions that every implementation keeps.

* A row is padding where its slot index lies outside [0, P): its outputs are zero and it touches no slot.
* Arithmetic and accumulation are in float32 (float64 where an operand is float64).
* The gate's constants stand in :mod:`kda_jax._gates`, the L2 norm's epsilon here.
* An implementation that serves such calls, but not on this machine as it is, raises Unavailable while it is lowered.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

L2NORM_EPS = 1e-6


class Unavailable(RuntimeError):
    """An implementation that serves such calls, but whose package, library or compiled kernel is not on this machine.

    The text says what to do about it.
    """


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static options of a token operation, part of the compiled program."""

    gate: str | None  # None, "softplus" or "lower_bound"
    lower_bound: float | None
    qk_l2norm: bool
    beta_sigmoid: bool
    allow_neg_eigval: bool
    scale: float
    implementation: str | None


@dataclasses.dataclass(frozen=True)
class ChunkSpec(Spec):
    chunk_size: int
    states_dtype: str | None = None  # if given, the forward pass also returns the state at the start of every chunk
    save_intermediates: bool = False  # then it returns what Prepared names as well


@dataclasses.dataclass(frozen=True)
class VerifySpec(Spec):
    with_update: bool


@dataclasses.dataclass(frozen=True)
class FlushSpec:
    implementation: str | None


# The axes of the operands, as in the documentation. A gate parameter has one more axis in front once it was vmapped.
DECODE_AXES = {
    "q": "N H K",
    "k": "N H K",
    "v": "N HV V",
    "g": "N HV K",
    "beta": "N HV",
    "A_log": "HV",
    "dt_bias": "HV K",
    "state": "P HV V K",
    "state_indices": "N",
}
DRAFT_AXES = DECODE_AXES | {"q": "N T H K", "k": "N T H K", "v": "N T HV V", "g": "N T HV K", "beta": "N T HV"}
PAGED_AXES = DRAFT_AXES | {"state_indices": "N T", "num_accepted": "N"}
CHUNK_AXES = {
    "q": "B T H K",
    "k": "B T H K",
    "v": "B T HV V",
    "g": "B T HV K",
    "beta": "B T HV",
    "A_log": "HV",
    "dt_bias": "HV K",
    "initial_state": "S HV V K",  # S is B, or B times the N sequences packed in each row
    "cu_seqlens": "B N+1",
}
PREPARED_AXES = {  # L and M are the tokens of a chunk
    "k_in": "B C HV L K",
    "k_out": "B C HV L K",
    "q_in": "B C HV L K",
    "A_qk": "B C HV L M",
    "A_kk": "B C HV L M",
    "solve": "B C HV L M",
    "rows": "B C HV R L",
    "decay": "B C HV K",
}
CHUNK_BACKWARD_AXES = CHUNK_AXES | {"states": "B C HV V K", "do": "B T HV V", "dstate": "S HV V K"} | PREPARED_AXES
FLUSH_AXES = {
    "u": "N T HV V",
    "k": "N T H K",
    "g": "N T HV K",
    "state": "P HV V K",
    "state_indices": "N",
    "num_accepted": "N",
}


class PoolOperands(NamedTuple):
    """decode, decode_mtp and verify."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array
    A_log: jax.Array | None
    dt_bias: jax.Array | None
    state: jax.Array
    state_indices: jax.Array | None


class PagedOperands(NamedTuple):
    """decode_mtp in its paged form."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array
    A_log: jax.Array | None
    dt_bias: jax.Array | None
    state: jax.Array
    state_indices: jax.Array
    num_accepted: jax.Array


class ChunkOperands(NamedTuple):
    """The forward pass of chunk."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array
    A_log: jax.Array | None
    dt_bias: jax.Array | None
    initial_state: jax.Array | None
    cu_seqlens: jax.Array | None


class Prepared(NamedTuple):
    """What depends on one chunk alone, as the GPU kernels leave it; docs/mathematics.md names the quantities."""

    k_in: jax.Array  # float16, as all but the last two
    k_out: jax.Array
    q_in: jax.Array
    A_qk: jax.Array
    A_kk: jax.Array
    solve: jax.Array
    rows: jax.Array  # float32: beta, and what k and q are multiplied with
    decay: jax.Array  # float32


class ChunkBackwardOperands(NamedTuple):
    """The backward pass of chunk: the forward operands, its chunk-boundary states, the two cotangents, what was saved."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array
    A_log: jax.Array | None
    dt_bias: jax.Array | None
    initial_state: jax.Array | None
    cu_seqlens: jax.Array | None
    states: jax.Array
    do: jax.Array
    dstate: jax.Array
    k_in: jax.Array | None = None
    k_out: jax.Array | None = None
    q_in: jax.Array | None = None
    A_qk: jax.Array | None = None
    A_kk: jax.Array | None = None
    solve: jax.Array | None = None
    rows: jax.Array | None = None
    decay: jax.Array | None = None

    @property
    def prepared(self) -> Prepared | None:
        """What the forward pass saved; None where it is to be computed again."""
        return None if self.k_in is None else Prepared(*(getattr(self, name) for name in Prepared._fields))


class FlushOperands(NamedTuple):
    u: jax.Array
    k: jax.Array
    g: jax.Array
    state: jax.Array
    state_indices: jax.Array | None
    num_accepted: jax.Array


def arithmetic_dtype(args: Any) -> jnp.dtype:
    """float32, or float64 where an operand is float64."""
    floating = (x.dtype for x in args if x is not None and jnp.issubdtype(x.dtype, jnp.floating))
    return jnp.result_type(jnp.float32, *floating)


def single_chunk(tokens: int) -> int:
    """The length of the one chunk that holds all tokens: the next power of two."""
    return 1 << max(tokens - 1, 0).bit_length()


def chunk_length(tokens: int, chunk_size: int) -> int:
    """The tokens of a chunk: ``chunk_size``, or less where the whole sequence is shorter."""
    return min(chunk_size, single_chunk(tokens))


def num_chunks(tokens: int, chunk_size: int, sequences: int | None = None) -> int:
    """The chunks of one row of ``tokens``; with ``sequences`` packed in it, enough for any lengths of them."""
    length = chunk_length(tokens, chunk_size)
    if sequences is None:
        return -(-tokens // length)
    return min(tokens, tokens // length + sequences)


def prepared_dtype(name: str) -> Any:
    return jnp.float32 if name in ("rows", "decay") else jnp.float16


def prepared_sizes(chunk_size: int) -> dict[str, int]:
    """The axes of Prepared that no operand has."""
    return {"L": chunk_size, "M": chunk_size, "R": 3}


def prepared_shapes(args: Any, chunks: int, chunk_size: int) -> list[jax.ShapeDtypeStruct]:
    """Of Prepared's fields, for the operands of either pass."""
    batch, _, value_heads, k_dim = args.g.shape
    sizes = {"B": batch, "C": chunks, "HV": value_heads, "K": k_dim} | prepared_sizes(chunk_size)
    return [
        jax.ShapeDtypeStruct(tuple(sizes[axis] for axis in axes.split()), prepared_dtype(name))
        for name, axes in PREPARED_AXES.items()
    ]
