"""The serving operations: decode, and the MTP chain both ways, decode_mtp against verify + flush."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import kda_jax as kda
from benchmarks import harness
from kda_jax.testing import cases

COLUMNS = {"shape": "shape", "name": "what", "median_ms": "median ms", "min_ms": "min ms", "gb_s": "GB/s of state"}


def run(names: list[str], repeats: int) -> list[dict[str, Any]]:
    return [row for name in names for row in _run(name, repeats)]


def _run(name: str, repeats: int) -> list[dict[str, Any]]:
    rows = []
    for kind in ("decode", "draft"):
        shape = cases.SHAPES[kind][name]
        inputs = cases.draw(shape.case(name, gate="lower_bound"), layout=kind)
        args = (*map(jnp.asarray, inputs.arrays), jnp.asarray(inputs.state))
        state_bytes = args[-1].nbytes
        if kind == "decode":
            functions: dict[str, Callable[..., Any]] = {"decode": functools.partial(kda.decode, **inputs.options)}
            moved = {"decode": 2 * state_bytes}
        else:
            functions = {
                "decode_mtp": functools.partial(kda.decode_mtp, **inputs.options),
                "verify + flush": functools.partial(_verify_flush, accepted=shape.tokens, **inputs.options),
            }
            moved = {"decode_mtp": (1 + shape.tokens) * state_bytes, "verify + flush": 3 * state_bytes}
        for what, seconds in harness.interleaved(functions, *args, repeats=repeats).items():
            time = harness.summary(seconds)
            row = {"shape": f"{name} N={shape.batch} T={shape.tokens} HV={shape.value_heads}", "name": what} | time
            rows.append(row | {"state_bytes": moved[what], "gb_s": moved[what] / time["median_ms"] / 1e6})
    return rows


def _verify_flush(*args, accepted: int, **options):
    o, update = kda.verify(*args, **options)
    return o, kda.flush(args[-1], update, accepted)
