"""kda.decode on a GPU, one token a row."""

from __future__ import annotations

from typing import Any

import jax

import kda_jax as kda
from benchmarks import gpu
from benchmarks.cells import Cell, cells

COLUMNS = {
    "dim": "K = V",
    "heads": "H",
    "value_heads": "HV",
    "pool": "pool",
    "n": "N",
    "implementation": "implementation",
    "us": "us",
    "kernel_us": "kernel us",
    "tb_s": "TB/s of state",
}


def run(size: str, implementation: str | None) -> list[dict[str, Any]]:
    found = []
    for name in (implementation,) if implementation else gpu.IMPLEMENTATIONS:
        programs = [_program(cell, name) for cell in cells("decode", size)]
        rows = gpu.time_all(programs, lambda cell: {"decode": ()})
        for program, row in zip(programs, rows, strict=True):
            row |= {"implementation": name} | program.cell.decode_bytes()
            if "us" in row:
                row["tb_s"] = row["state_bytes"] / row["us"] / 1e6
        found += rows
    return found


def _program(cell: Cell, implementation: str) -> gpu.Program:
    # Jitted on its own so that it is traced and lowered once; XLA inlines it.
    @jax.jit
    def step(pool, slots, q, k, v, g, beta, A_log, dt_bias):
        options = gpu.options(A_log, dt_bias, implementation)
        return kda.decode(q, k, v, g, beta, pool, state_indices=slots, **options)

    def function(pool, *inputs):
        outputs = []
        for slots in gpu.slots(cell):
            o, pool = step(pool, slots, *inputs)
            outputs.append(o)
        # A kernel writes its output whether it is used or not; XLA leaves out what it need not compute. Results to return
        # have a new address in every run, for which the graph would have to be updated.
        return (pool, outputs) if implementation == "xla" else pool

    return gpu.Program(cell, function, gpu.tokens(cell, cell.n))
