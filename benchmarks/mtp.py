"""The speculative chain on a GPU, kda.verify and kda.flush; beside it kda.decode_mtp on small batches, and in its paged
form, which leaves nothing to flush but writes every token's state."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import kda_jax as kda
from benchmarks import gpu
from benchmarks.cells import Cell, accepted, cells

MOST_PAGED = 4  # tokens: with more of them the states written cost more than all of verify and flush

COLUMNS = {
    "dim": "K = V",
    "heads": "H",
    "value_heads": "HV",
    "pool": "pool",
    "n": "N",
    "tokens": "T",
    "variant": "accepted",
    "implementation": "implementation",
    "us": "us",
    "kernel_us": "kernel us",
}


def run(size: str, implementation: str | None) -> list[dict[str, Any]]:
    names = (implementation,) if implementation else gpu.IMPLEMENTATIONS
    return [row | {"implementation": name} for name in names for row in _run(size, name)]


def _run(size: str, implementation: str) -> list[dict[str, Any]]:
    chosen = cells("mtp", size)
    chains = gpu.time_all([_chain(cell, implementation) for cell in chosen], _counts)
    for row in chains:
        cell = Cell(**{key: row[key] for key in chosen[0].row()})
        row |= cell.chain_bytes(accepted(cell.tokens)[row["variant"]])
    small = [cell for cell in chosen if cell.n <= 8 and cell.tokens in (2, 4) and cell.heads == cell.value_heads == 32]
    strict = gpu.time_all([_strict(cell, implementation) for cell in small], lambda cell: {"decode_mtp": ()})
    short = [cell for cell in chosen if cell.tokens <= MOST_PAGED]
    paged = gpu.time_all([_paged(cell, implementation) for cell in short], lambda cell: {"paged": ()})
    for cell, row in zip(small + short, strict + paged, strict=True):
        row |= {"state_bytes": (1 + cell.tokens) * cell.states, "other_bytes": cell.tokens_in_out}
    return chains + strict + paged


def _counts(cell: Cell) -> dict[str, tuple[Any, ...]]:
    """The counts are data: all and half accepted are one program."""
    return {name: (np.full(cell.n, m, np.int32),) for name, m in accepted(cell.tokens).items()}


def _first(outputs: list[jax.Array]) -> jax.Array:
    return jnp.stack([o[(0,) * o.ndim] for o in outputs])


def _chain(cell: Cell, implementation: str) -> gpu.Program:
    """All calls' verify, then all calls' flush, as a model's layers run, with a stand-in for the sampler between."""

    @jax.jit
    def verify(pool, slots, q, k, v, g, beta, A_log, dt_bias):
        options = gpu.options(A_log, dt_bias, implementation)
        return kda.verify(q, k, v, g, beta, pool, state_indices=slots, **options)

    @jax.jit
    def flush(pool, slots, update, num_accepted):
        return kda.flush(pool, update, num_accepted, state_indices=slots, implementation=implementation)

    def function(pool, *inputs):
        *drawn, num_accepted = inputs
        verified = [verify(pool, slots, *drawn) for slots in gpu.slots(cell)]
        # The counts depend on every output, so no flush can come, in place, before a verify has read the pool.
        num_accepted = jnp.where(jnp.max(_first([o for o, _ in verified])) > 1e30, 0, num_accepted)
        for slots, (_, update) in zip(gpu.slots(cell), verified, strict=True):
            pool = flush(pool, slots, update, num_accepted)
        return (pool, [o for o, _ in verified]) if implementation == "xla" else pool

    return gpu.Program(cell, function, (*gpu.tokens(cell, cell.n, cell.tokens), np.zeros(cell.n, np.int32)))


def _strict(cell: Cell, implementation: str) -> gpu.Program:
    @jax.jit
    def step(pool, slots, q, k, v, g, beta, A_log, dt_bias):
        options = gpu.options(A_log, dt_bias, implementation)
        return kda.decode_mtp(q, k, v, g, beta, pool, state_indices=slots, **options)

    def function(pool, *inputs):
        both = [step(pool, slots, *inputs) for slots in gpu.slots(cell)]
        return pool, (both if implementation == "xla" else _first([o for o, _ in both]))

    return gpu.Program(cell, function, gpu.tokens(cell, cell.n, cell.tokens))


def _paged(cell: Cell, implementation: str) -> gpu.Program:
    """Each row starts from the slot of the last token that was accepted, the last of all, and has a slot for every token."""

    @jax.jit
    def step(pool, slots, q, k, v, g, beta, A_log, dt_bias):
        options = gpu.options(A_log, dt_bias, implementation)
        return kda.decode_mtp(q, k, v, g, beta, pool, state_indices=slots, num_accepted=cell.tokens, **options)

    def function(pool, *inputs):
        outputs = []
        for slots in gpu.slots(cell):
            o, pool = step(pool, slots[:, None] * cell.tokens + np.arange(cell.tokens, dtype=np.int32), *inputs)
            outputs.append(o)
        return (pool, outputs) if implementation == "xla" else pool

    return gpu.Program(cell, function, gpu.tokens(cell, cell.n, cell.tokens), slots_of_row=cell.tokens)
