"""kda.chunk on a GPU: forward, and forward with backward, of each implementation in turn."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kda_jax as kda
from benchmarks import gpu
from benchmarks.cells import LOWER_BOUND, VARIANTS, Sequences, sequences

COLUMNS = {
    "shape": "shape",
    "implementation": "implementation",
    "variant": "what",
    "us": "us",
    "kernel_us": "kernel us",
    "peak_bytes": "peak, bytes",
    "compile_s": "compiled in, s",
    "error": "error",
}
IMPLEMENTATIONS = ("triton", "xla")


class Program(NamedTuple):
    cell: Sequences
    implementation: str
    variant: str


class Executable(NamedTuple):
    run: Callable[..., Any]
    said: dict[str, float]


def run(size: str, implementation: str | None) -> list[dict[str, Any]]:
    chosen = (implementation,) if implementation else IMPLEMENTATIONS
    programs = [Program(cell, name, variant) for cell in sequences(size) for name in chosen for variant in VARIANTS]
    # The first cell's are compiled one after the other, and the very first, forward and backward, by a process that has
    # compiled nothing. The others share the cores, so that their times are upper bounds.
    alone = len(chosen) * len(VARIANTS)
    compiled = [*map(_compiled, programs[:alone]), *gpu.compiled(programs[alone:], _compiled)]
    rows: list[dict[str, Any]] = []
    timed: list[tuple[dict[str, Any], gpu.Start]] = []
    for i, (program, executable) in enumerate(zip(programs, compiled, strict=True)):
        row: dict[str, Any] = {"shape": str(program.cell), **program.cell.row(), "variant": program.variant}
        row |= {"implementation": program.implementation, "compiled_alone": i < alone}
        rows.append(row)
        try:
            if isinstance(executable, Exception):
                raise executable
            row |= executable.said
            begin = functools.partial(_start, program, executable)
            row["us"] = gpu.microseconds(*begin(), least=1 if program.implementation == "xla" else 3)
            if program.implementation != "xla":
                timed.append((row, begin))
        except Exception as error:  # too little memory, say; the other cells are still worth timing
            row["error"] = repr(error)[:300]
            print(f"{program}: {error!r}", file=sys.stderr)
    for (row, _), times in zip(timed, gpu.kernels([begin for _, begin in timed]), strict=True):
        if times:
            row |= {"kernel_us": sum(times.values()), "kernels": times}
    return rows


def function(program: Program) -> Callable[..., Any]:
    """``(inputs, cu_seqlens, do) -> o, states``, or with backward ``-> o, gradients``: the cotangent of o is an argument."""
    cell, implementation, variant = program

    def forward(inputs, cu_seqlens, do=None):
        q, k, v, g, beta, A_log, dt_bias = inputs
        bounded = cell.gate == "lower_bound"
        gate = kda.LowerBound(A_log, dt_bias, LOWER_BOUND) if bounded else kda.Softplus(A_log, dt_bias)
        options: dict[str, Any] = gpu.OPTIONS | {"gate": gate, "implementation": implementation}
        return kda.chunk(q, k, v, g, beta, cu_seqlens=cu_seqlens, **options)

    def both(inputs, cu_seqlens, do):
        o, pull = jax.vjp(lambda inputs: forward(inputs, cu_seqlens)[0], inputs)
        return o, *pull(do)

    return forward if variant == "forward" else both


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _draw(lead: tuple[int, int], heads: int, value_heads: int, dim: int) -> tuple[Any, jax.Array]:
    """q, k, v, g, beta, A_log, dt_bias; and the cotangent of o."""
    shapes = [(heads, dim)] * 2 + [(value_heads, dim)] * 2 + [(value_heads,), (value_heads, dim)]
    keys = jax.random.split(jax.random.key(0), 8)
    *tokens, do = (jax.random.normal(key, lead + s, jnp.bfloat16) for key, s in zip(keys, shapes, strict=False))
    A_log = jax.random.normal(keys[6], (value_heads,)) / 2
    return (*tokens, A_log, jax.random.normal(keys[7], (value_heads, dim))), do


def _arguments(program: Program, draw: Callable[..., Any]) -> tuple[Any, ...]:
    cell = program.cell
    inputs, do = draw((cell.batch, cell.tokens), cell.heads, cell.value_heads, cell.dim)
    cu_seqlens = jnp.asarray(cell.offsets, jnp.int32) if cell.lengths else None
    return (inputs, cu_seqlens) if program.variant == "forward" else (inputs, cu_seqlens, do)


def _compiled(program: Program) -> Executable | Exception:
    shapes = _arguments(program, lambda *sizes: jax.eval_shape(lambda: _draw(*sizes)))
    try:
        began = time.perf_counter()
        run = jax.jit(function(program)).lower(*shapes).compile()
        said = {"compile_s": time.perf_counter() - began}
        if memory := run.memory_analysis():
            size = {what: getattr(memory, f"{what}_size_in_bytes") for what in ("argument", "output", "temp", "alias")}
            said["peak_bytes"] = size["argument"] + size["output"] + size["temp"] - size["alias"]
            said["temp_bytes"] = size["temp"]
        return Executable(run, said)
    except Exception as error:  # whatever a compiler raises; the other cells are still worth timing
        return error


def _start(program: Program, executable: Executable) -> tuple[Any, Callable[[Any], Any]]:
    arguments = _arguments(program, _draw)
    return None, lambda _: executable.run(*arguments)
