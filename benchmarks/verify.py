"""kda.verify alone on a GPU, without the update: what a draft's outputs cost when the state stays as it is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import kda_jax as kda
from benchmarks import gpu
from benchmarks.cells import Cell, cells

COLUMNS = {
    "value_heads": "H = HV",
    "pool": "pool",
    "n": "N",
    "tokens": "T",
    "implementation": "implementation",
    "us": "us",
    "kernel_us": "kernel us",
    "tb_s": "TB/s of state",
}


def run(size: str, implementation: str | None) -> list[dict[str, Any]]:
    chosen = cells("verify", size)
    rows = []
    for name in (implementation,) if implementation else gpu.IMPLEMENTATIONS:
        timed = gpu.time_all([_program(cell, name) for cell in chosen], lambda cell: {"verify": ()})
        for cell, row in zip(chosen, timed, strict=True):
            row |= {"implementation": name, "state_bytes": cell.states, "other_bytes": cell.tokens_in_out}
            if "us" in row:
                row["tb_s"] = cell.states / row["us"] / 1e6
        rows += timed
    return rows


def _program(cell: Cell, implementation: str) -> gpu.Program:
    @jax.jit
    def step(pool, slots, q, k, v, g, beta, A_log, dt_bias):
        options = gpu.options(A_log, dt_bias, implementation)
        o, _ = kda.verify(q, k, v, g, beta, pool, state_indices=slots, with_update=False, **options)
        return o

    def function(pool, *inputs):
        outputs = [step(pool, slots, *inputs) for slots in gpu.slots(cell)]
        if implementation == "xla":
            return pool, outputs
        return pool, jnp.stack([o[0, 0, 0, 0] for o in outputs])

    return gpu.Program(cell, function, gpu.tokens(cell, cell.n, cell.tokens))
