"""Timing on a GPU: programs of many calls, end to end and kernel by kernel."""

from __future__ import annotations

import concurrent.futures
import functools
import glob
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import kda_jax as kda
from benchmarks.cells import LOWER_BOUND, Cell

IMPLEMENTATIONS = ("triton", "cute")  # that are timed, each where None might pick it
OPTIONS = {"qk_l2norm": True, "beta_sigmoid": True}
# A round starts on an idle GPU, which costs up to a millisecond: long rounds, so that it does not count.
ROUNDS, ROUND_SECONDS = 3, 0.08


def require(size: str) -> None:
    if size != "tiny" and jax.default_backend() != "gpu":
        raise SystemExit(
            f"This suite times GPU kernels, and JAX sees {jax.default_backend()} only. "
            "To see it run on a CPU: --cells tiny --implementation xla"
        )


@functools.cache
def _numbers() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1 << 24) + (1 << 14), dtype=np.float32).astype(jnp.bfloat16)


def normal(*shape: int, start: int, dtype: Any = None) -> np.ndarray:
    """Random numbers, from one store of them: drawing each cell's anew would take longer than timing it."""
    numbers = _numbers()[start : start + math.prod(shape)].reshape(shape)
    return numbers if dtype is None else numbers.astype(dtype)


def tokens(cell: Cell, *lead: int) -> tuple[np.ndarray, ...]:
    """q, k, v, g, beta with the first axes ``lead``, and the gate's A_log and dt_bias."""
    heads = [(cell.heads, cell.dim)] * 2 + [(cell.value_heads, cell.dim)] * 2 + [(cell.value_heads,)]
    drawn = [normal(*lead, *shape, start=1000 * i) for i, shape in enumerate(heads)]
    A_log = normal(cell.value_heads, start=7000, dtype=np.float32) / 2
    return *drawn, A_log, normal(cell.value_heads, cell.dim, start=8000, dtype=np.float32)


def options(A_log: Any, dt_bias: Any, implementation: str | None) -> dict[str, Any]:
    return OPTIONS | {"gate": kda.LowerBound(A_log, dt_bias, LOWER_BOUND), "implementation": implementation}


def slots(cell: Cell) -> list[np.ndarray]:
    """Each call's slots: together the whole pool, so that no call finds its states in the cache."""
    return [np.arange(i * cell.n, (i + 1) * cell.n, dtype=np.int32) for i in range(cell.calls)]


class Program(NamedTuple):
    """``cell.calls`` calls of an operation as one function ``(pool, *inputs) -> pool or (pool, more)``, the pool donated; it
    has ``slots_of_row`` slots for each row of each call."""

    cell: Cell
    function: Callable[..., Any]
    inputs: tuple[Any, ...]
    slots_of_row: int = 1


class Executable(NamedTuple):
    program: Program
    run: Callable[..., Any]
    fill: Callable[..., jax.Array]
    temp_bytes: int  # a copied pool would show here


P = TypeVar("P")
E = TypeVar("E")


def compiled(programs: Sequence[P], compile_one: Callable[[P], E | Exception]) -> list[E | Exception]:
    """All programs, several at a time; one that fails is in the list as what it raised."""
    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        first = list(pool.map(compile_one, programs))
    # Once more, alone, for compilers that mind company.
    return [
        compile_one(program) if isinstance(done, Exception) else done for program, done in zip(programs, first, strict=True)
    ]


def _compiled(program: Program) -> Executable | Exception:
    cell = program.cell
    slots = cell.calls * cell.n * program.slots_of_row
    pool = jax.ShapeDtypeStruct((slots, cell.value_heads, cell.dim, cell.dim), jnp.dtype(cell.pool))
    try:
        run = jax.jit(program.function, donate_argnums=0).lower(pool, *program.inputs).compile()
        memory = run.memory_analysis()
        return Executable(program, run, _filler(pool), memory.temp_size_in_bytes if memory else 0)
    except Exception as error:  # whatever a compiler raises; the other cells are still worth timing
        return error


@functools.cache
def _filler(pool: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    """Makes the pool on the device: the states of one slot, again and again."""
    slot = jax.ShapeDtypeStruct(pool.shape[1:], pool.dtype)
    return jax.jit(lambda slot: jnp.broadcast_to(slot, pool.shape)).lower(slot).compile()


def start(executable: Executable, *last: Any) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """A fresh pool, and one run of the program as a function of the pool; ``last`` replaces the last inputs."""
    program, run, fill, _ = executable
    size = program.cell.value_heads, program.cell.dim, program.cell.dim
    pool = fill(normal(*size, start=9000, dtype=jnp.dtype(program.cell.pool)))
    inputs = jax.device_put((*program.inputs[: len(program.inputs) - len(last)], *last))

    def step(pool: jax.Array) -> jax.Array:
        out = run(pool, *inputs)
        return out[0] if isinstance(out, tuple) else out

    return pool, step


def microseconds(carry: Any, step: Callable[[Any], Any], least: int = 3) -> float:
    """The time of one ``step``, the median of rounds of ``least`` or more runs, queued without waiting for each other."""

    def seconds(runs: int) -> float:
        nonlocal carry
        began = time.perf_counter()
        for _ in range(runs):
            carry = step(carry)
        jax.block_until_ready(carry)
        return (time.perf_counter() - began) / runs

    seconds(least)  # loads the kernels and records the graphs
    runs = max(least, math.ceil(ROUND_SECONDS / seconds(least)))
    return float(np.median([seconds(runs) for _ in range(ROUNDS)])) * 1e6


Start = Callable[[], tuple[Any, Callable[[Any], Any]]]  # what a step starts from, and the step


def kernels(starts: Sequence[Start]) -> list[dict[str, float]]:
    """For each of ``starts``, the microseconds of its kernels in one step, by name, from one trace of the profiler.

    While a trace is taken XLA launches kernel by kernel, whatever the flags: these are the kernels' own times, which the
    end-to-end ones are checked against. Empty where there is no GPU, or no trace of it.
    """
    if jax.default_backend() != "gpu":
        return [{} for _ in starts]
    try:
        with tempfile.TemporaryDirectory() as folder:
            return _by_window(_trace(starts, folder), len(starts))
    except Exception as error:  # the times end to end are still worth having
        print(f"no times of kernels: {error!r}", file=sys.stderr)
        return [{} for _ in starts]


def _trace(starts: Sequence[Start], folder: str) -> Any:
    settings = jax.profiler.ProfileOptions()
    settings.python_tracer_level = 0
    settings.host_tracer_level = 1
    with jax.profiler.trace(folder, profiler_options=settings):
        for i, begin in enumerate(starts):
            carry, step = begin()
            carry = jax.block_until_ready(step(carry))
            with jax.profiler.TraceAnnotation(f"cell {i}"):
                jax.block_until_ready(step(carry))
    (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
    return jax.profiler.ProfileData.from_file(path)


def _by_window(profile: Any, count: int) -> list[dict[str, float]]:
    """The kernels that started within each window; a window ends after its last kernel has."""
    planes = list(profile.planes)
    windows = {
        event.name: (event.start_ns, event.start_ns + event.duration_ns)
        for plane in planes
        if plane.name.startswith("/host:")
        for line in plane.lines
        for event in line.events
        if event.name.startswith("cell ")
    }
    events = sorted(
        (event.start_ns, event.duration_ns, event.name)
        for plane in planes
        if plane.name.startswith("/device:GPU")
        for line in plane.lines
        if line.name.startswith("Stream")  # the other lines show the same kernels grouped
        for event in line.events
    )
    starts = np.array([began for began, _, _ in events])
    found = []
    for i in range(count):
        first, last = np.searchsorted(starts, windows[f"cell {i}"])
        times: dict[str, float] = {}
        for _, duration, name in events[first:last]:
            times[name] = times.get(name, 0.0) + duration / 1e3
        found.append(times)
    return found


def time_all(programs: Sequence[Program], variants: Callable[[Cell], dict[str, tuple[Any, ...]]]) -> list[dict[str, Any]]:
    """Rows of every program: for each of the cell's ``variants`` (its name and its last inputs) the time of one call."""
    rows: list[dict[str, Any]] = []
    timed: list[tuple[dict[str, Any], Start]] = []
    for program, executable in zip(programs, compiled(programs, _compiled), strict=True):
        cell = program.cell
        for name, last in variants(cell).items():
            row: dict[str, Any] = cell.row() | {"variant": name, "calls": cell.calls}
            rows.append(row)
            try:
                if isinstance(executable, Exception):
                    raise executable
                begin = functools.partial(start, executable, *last)
                row |= {"us": microseconds(*begin()) / cell.calls, "temp_bytes": executable.temp_bytes}
                timed.append((row, begin))
            except Exception as error:  # the other cells are still worth timing
                row["error"] = repr(error)[:300]
                print(f"{cell}, {name}: {error!r}", file=sys.stderr)
    for (row, _), times in zip(timed, kernels([begin for _, begin in timed]), strict=True):
        if times:
            per_call = {name: us / row["calls"] for name, us in times.items()}
            row |= {"kernel_us": sum(per_call.values()), "kernels": per_call}
    return rows
