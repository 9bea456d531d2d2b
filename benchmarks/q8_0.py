"""kda.q8_0 on a GPU: products of few tokens, beside what a program would have without them.

Each program makes its calls on weights in turn, one after the other as a model's layers do: an optimization barrier has a
call wait for the last one's results, so that XLA neither merges calls nor runs them side by side. It does so many times, in
a loop: handing the weights over takes Python a microsecond or two each, and from run to run XLA may have to update its graph
of the calls. Of every result it keeps one number.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import gpu
from benchmarks.cells import Projection, projections
from kda_jax import q8_0
from kda_jax.xla.q8_0 import hc_expand

COLUMNS = {
    "shape": "shape",
    "variant": "what",
    "implementation": "implementation",
    "us": "us",
    "tb_s": "TB/s of weights",
    "share": "share of read bandwidth",
    "error": "error",
}
XLA_SHAPES, XLA_TOKENS = ((2048, (4096,)), (4096, (4096,))), (1, 4, 64)  # enough to see that it is not for speed
CALLS, PASSES = 128, 4  # or more calls of a pass, and passes of a program
READ_BYTES, READ_WIDTHS = 4 << 30, (1 << 12, 1 << 14, 1 << 16)


class Program(NamedTuple):
    cell: Projection
    variant: str
    implementation: str

    @property
    def turns(self) -> tuple[int, int]:
        """How many each weight has in a pass, and the passes; one where speed is not the matter."""
        if jax.default_backend() != "gpu" or (self.implementation == "xla" and self.variant == self.cell.operation):
            return 1, 1
        return -(-CALLS // self.cell.weights), PASSES


class Executable(NamedTuple):
    run: Callable[..., Any]
    temp_bytes: int


def run(size: str, implementation: str | None) -> list[dict[str, Any]]:
    programs = _programs(size, implementation)
    read = read_bandwidth(READ_BYTES if jax.default_backend() == "gpu" else 1 << 20)
    rows: list[dict[str, Any]] = [{"variant": "read", "implementation": "xla", "tb_s": read}]
    for program, executable in zip(programs, gpu.compiled(programs, _compiled), strict=True):
        cell = program.cell
        calls = cell.weights * math.prod(program.turns)
        row: dict[str, Any] = {"shape": str(cell), **cell.row(), "variant": program.variant, "calls": calls}
        row |= {"implementation": program.implementation, "weight_bytes": _weight_bytes(program)}
        rows.append(row)
        try:
            if isinstance(executable, Exception):
                raise executable
            row["us"] = gpu.microseconds(None, _step(program, executable)) / calls
            row["tb_s"] = row["weight_bytes"] / row["us"] / 1e6
            row |= {"share": row["tb_s"] / read, "temp_bytes": executable.temp_bytes}
        except Exception as error:  # the other cells are still worth timing
            row["error"] = repr(error)[:300]
            print(f"{program}: {error!r}", file=sys.stderr)
    return rows


def _programs(size: str, implementation: str | None) -> list[Program]:
    """Each operation, and the same work done without it."""
    served, programs = implementation or "triton", []
    for cell in projections(size):
        programs.append(Program(cell, cell.operation, served))
        if cell.operation == "matmul_pair":
            programs.append(Program(cell, "two of matmul", served))
        elif cell.operation == "matmul_hc_expand":
            programs.append(Program(cell, "matmul, then XLA", served))
        else:
            programs.append(Program(cell, "bfloat16 dot", "xla"))
            if served != "xla" and (cell.inputs, cell.outputs) in XLA_SHAPES and cell.n in XLA_TOKENS:
                programs.append(Program(cell, "matmul", "xla"))
    return programs


def read_bandwidth(size: int) -> float:
    """TB/s at which XLA adds up the rows of ``size`` bytes of float32, the best of some lengths of a row."""
    add = jax.jit(lambda x: x.sum(axis=1))

    def microseconds(width: int) -> float:
        x = lax.broadcasted_iota(jnp.float32, (size // 4 // width, width), 1)
        return gpu.microseconds(None, lambda _: add(x))

    return size / min(map(microseconds, READ_WIDTHS)) / 1e6


def _call(program: Program) -> Callable[..., Any]:
    """What is timed: ``(x, weights, lanes) -> results``, where lanes are residual, post, comb and no add, or nothing."""
    _, variant, implementation = program
    matmul, matmul_pair, matmul_hc_expand = (
        functools.partial(getattr(q8_0, name), implementation=implementation)
        for name in ("matmul", "matmul_pair", "matmul_hc_expand")
    )
    return {
        "matmul": lambda x, weights, lanes: matmul(x, *weights),
        "bfloat16 dot": lambda x, weights, lanes: jnp.dot(x, weights[0].T),
        "matmul_pair": lambda x, weights, lanes: matmul_pair(x, *weights),
        "two of matmul": lambda x, weights, lanes: _in_turn(matmul, x, weights),
        "matmul_hc_expand": lambda x, weights, lanes: matmul_hc_expand(x, *weights, *lanes),
        "matmul, then XLA": lambda x, weights, lanes: hc_expand(matmul(x, *weights), *lanes),
    }[variant]


def _in_turn(function: Callable[..., Any], x: jax.Array, others: tuple[Any, ...]) -> tuple[Any, ...]:
    """``function(x, other)`` of each of ``others``, none before the last one's result is there."""
    results: list[Any] = []
    for other in others:
        if results:
            x, results[-1] = lax.optimization_barrier((x, results[-1]))
        results.append(function(x, other))
    return tuple(results)


def _function(program: Program) -> Callable[..., Any]:
    """All calls as ``(x, weights, lanes) -> the sum of a number of each result``."""
    one = jax.jit(_call(program))  # traced once
    turns, passes = program.turns

    def calls(x: jax.Array, weights: Any, lanes: Any) -> jax.Array:
        def one_pass(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, total = carry
            results = _in_turn(lambda x, each: one(x, each, lanes), x, weights * turns)
            total += jnp.stack([leaf.ravel()[0] for leaf in jax.tree.leaves(results)]).astype(jnp.float32).sum()
            return lax.optimization_barrier((x, total))

        return lax.fori_loop(0, passes, one_pass, (x, jnp.float32(0)))[1]

    return calls


@functools.partial(jax.jit, static_argnums=(1, 2))
def _weight(seed: Any, shape: tuple[int, int], quantised: bool) -> Any:
    w = jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16)
    return q8_0.quantize(w) if quantised else w


def _inputs(program: Program) -> tuple[Any, ...]:
    """x, the weights of each call, and the lanes; all activations bfloat16."""
    cell, quantised = program.cell, program.variant != "bfloat16 dot"
    weights = [tuple(_weight(i, (out, cell.inputs), quantised) for out in cell.outputs) for i in range(cell.weights)]
    x, n, lanes = gpu.normal(cell.n, cell.inputs, start=0), cell.n, cell.lanes
    shapes = [(n, lanes, *cell.outputs), (n, lanes), (n, lanes, lanes)]
    return x, weights, (*(gpu.normal(*shape, start=1 << 20) for shape in shapes), None) if lanes else ()


def _weight_bytes(program: Program) -> int:
    cell = program.cell
    return 2 * cell.inputs * sum(cell.outputs) if program.variant == "bfloat16 dot" else cell.weight_bytes


def _compiled(program: Program) -> Executable | Exception:
    try:
        run = jax.jit(_function(program)).lower(*jax.eval_shape(lambda: _inputs(program))).compile()
        memory = run.memory_analysis()
        return Executable(run, memory.temp_size_in_bytes if memory else 0)
    except Exception as error:  # whatever a compiler raises; the other cells are still worth timing
        return error


def _step(program: Program, executable: Executable) -> Callable[[Any], Any]:
    inputs = jax.device_put(_inputs(program))
    return lambda _: executable.run(*inputs)
