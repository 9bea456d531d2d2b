"""kda.chunk against token-by-token scans: forward, and forward with backward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import kda_jax as kda
from benchmarks import baselines, harness
from kda_jax.testing import cases

COLUMNS = {"shape": "shape", "name": "what", "median_ms": "median ms", "min_ms": "min ms", "speedup": "chunk is faster by"}


def run(names: list[str], repeats: int) -> list[dict[str, Any]]:
    return [row for name in names for row in _run(name, cases.SHAPES["chunk"][name], repeats)]


def _run(name: str, shape: cases.Shape, repeats: int) -> list[dict[str, Any]]:
    # Log decays and weights as the bare recurrence takes them, so that every contestant does the same work.
    case = shape.case(name, gate=None, qk_l2norm=False, beta_sigmoid=False)
    args = tuple(map(jnp.asarray, cases.draw(case, layout="chunk").arrays))
    forward: dict[str, Callable[..., Any]] = {
        "chunk": functools.partial(kda.chunk, implementation="xla"),
        "scan, products and sums": baselines.scan_sums,
        "scan, einsum": baselines.scan_einsum,
        "scan of kda.decode": baselines.scan_decode,
    }
    rows = _rows(name, "forward", harness.interleaved(forward, *args, repeats=repeats))

    def trained(function):
        return jax.grad(lambda *args: jnp.sum(function(*args)[0]), argnums=tuple(range(5)))

    both = {what: trained(forward[what]) for what in ("chunk", "scan, einsum")}
    return rows + _rows(name, "forward + backward", harness.interleaved(both, *args, repeats=repeats))


def _rows(shape: str, direction: str, seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    times = {what: harness.summary(s) for what, s in seconds.items()}
    chunk = times["chunk"]["median_ms"]
    return [
        {"shape": shape, "name": f"{what} ({direction})"} | time | {"speedup": time["median_ms"] / chunk}
        for what, time in times.items()
    ]
