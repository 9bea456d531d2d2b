"""The decode loop end to end: 64 steps over 16 layers in one lax.fori_loop, against the time of its kernels."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import kda_jax as kda
from benchmarks import gpu
from benchmarks.cells import Cell

COLUMNS = {
    "flags": "XLA flags",
    "n": "N",
    "steps": "steps",
    "layers": "layers",
    "us": "us a step",
    "kernel_us": "kernel us a step",
    "ratio": "loop / kernels",
}
# XLA records custom calls into command buffers (CUDA graphs) by default. It reads its flags once a process, so each set is
# timed in one of its own.
SETS = {
    "default": "",
    "no command buffers": "--xla_gpu_enable_command_buffer=",
    "loops in command buffers": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL",
}


def run(size: str, implementation: str | None) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name, flags in SETS.items():
        # Without flags of the caller's, and not taking memory ahead, for a parent may hold most of it.
        env = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
        command = [sys.executable, "-m", "benchmarks.loop", "--cells", size, "--implementation", str(implementation)]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            rows.append({"flags": name, "xla_flags": flags, "error": f"exit {done.returncode}"})
            continue
        measured = json.loads(done.stdout.splitlines()[-1])
        rows += [{"flags": name, "xla_flags": flags} | row for row in measured]
    # The kernels are the same under all flags; a trace of a loop inside a command buffer does not show them.
    alone = {row["n"]: row["kernel_us"] for row in rows if row["flags"] == "default" and "kernel_us" in row}
    for row in rows:
        if row.get("n") in alone:
            row |= {"kernel_us": alone[row["n"]], "ratio": row["us"] / alone[row["n"]]}
    return rows


def _measure(size: str, implementation: str | None) -> list[dict[str, Any]]:
    gpu.require(size)
    tiny = size == "tiny"
    steps, layers = (4, 2) if tiny else (64, 16)
    shape = (16, 1, 2) if tiny else (128, 32, 32)
    cells = [Cell(*shape, "float32", n) for n in ((1, 2) if tiny else (1, 8, 64))]
    rows, starts = [], []
    for cell in cells:
        begin = _start(cell, steps, layers, implementation)
        starts.append(begin)
        us = gpu.microseconds(*begin()) / steps
        rows.append(cell.row() | {"steps": steps, "layers": layers, "us": us} | cell.decode_bytes())
    for row, times in zip(rows, gpu.kernels(starts), strict=True):
        if times:
            # What XLA adds (the counter, copies) is in the numerator only.
            own = sum(us for name, us in times.items() if "decode" in name) or sum(times.values())
            own /= steps
            row["kernel_us"] = own
            row["kernels"] = {name: us / steps for name, us in times.items()}
    return rows


def _start(cell: Cell, steps: int, layers: int, implementation: str | None) -> Any:
    """Returns what draws the pools, one a layer, and gives one loop over them as a function of the pools."""

    def function(pools, q, k, v, g, beta, A_log, dt_bias):
        options = gpu.options(A_log, dt_bias, implementation)

        def step(_, carry):
            pools, _ = carry
            done = [kda.decode(q, k, v, g, beta, pool, **options) for pool in pools]
            return tuple(pool for _, pool in done), done[-1][0]

        return lax.fori_loop(0, steps, step, (pools, jnp.zeros_like(v)))

    state = cell.value_heads, cell.dim, cell.dim
    inputs = jax.device_put(gpu.tokens(cell, cell.n))
    looped = jax.jit(function, donate_argnums=0)

    def start() -> Any:
        drawn = jax.device_put(gpu.normal(*state, start=9000, dtype=jnp.dtype(cell.pool)))
        pools = tuple(jnp.tile(drawn, (cell.n, 1, 1, 1)) for _ in range(layers))
        return pools, lambda pools: looped(pools, *inputs)[0]

    return start


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--cells", default="full")
    parser.add_argument("--implementation", default="None")
    args = parser.parse_args()
    print(json.dumps(_measure(args.cells, None if args.implementation == "None" else args.implementation)))
