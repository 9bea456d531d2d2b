"""Timing on any backend, and the record of where it was taken."""

from __future__ import annotations

import os
import pathlib
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import kda_jax as kda
from benchmarks import record


def interleaved(functions: Mapping[str, Callable[..., Any]], *args: Any, repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each function, compiled and warm, taken in turns so that noise falls on all alike."""
    compiled = {name: jax.jit(function).lower(*args).compile() for name, function in functions.items()}
    for function in compiled.values():
        jax.block_until_ready(function(*args))
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for _ in range(repeats):
        for name, function in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*args))
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(seconds: list[float]) -> dict[str, float]:
    return {"median_ms": float(np.median(seconds)) * 1e3, "min_ms": min(seconds) * 1e3, "repeats": len(seconds)}


def environment() -> dict[str, Any]:
    """Device, versions, commit and date of a run."""
    device = jax.devices()[0]
    stamp = record.stamp(("jax", "jaxlib", "numpy", "jax-triton", "triton"))
    stamp["versions"]["kda-jax"] = kda.__version__
    name = _cpu_name() if device.platform == "cpu" else device.device_kind
    return {"device": name, "platform": device.platform} | stamp


def write(suite: str, rows: list[dict[str, Any]], folder: pathlib.Path, said: dict[str, Any] | None = None) -> pathlib.Path:
    """Writes ``SUITE-PLATFORM.json``, the platform said once, with what else there is to say of the run, and says where."""
    about = environment() | (said or {})
    name = suite if suite.endswith(f"-{about['platform']}") else f"{suite}-{about['platform']}"
    return record.write(name, about | {"rows": rows}, folder)


def _cpu_name() -> str:
    """The processor's name and the number of cores this process may use, as far as the system tells."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"
