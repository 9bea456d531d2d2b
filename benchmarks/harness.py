"""Timing, the record of where it was taken, and the table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

RESULTS = pathlib.Path(__file__).parent / "results"


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
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy", "kda-jax")}
    here = pathlib.Path(__file__).parent
    git = ["git", "-C", str(here)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return {
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "versions": versions | {"python": platform.python_version()},
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def write(suite: str, rows: list[dict[str, Any]], folder: pathlib.Path) -> pathlib.Path:
    """Writes ``SUITE-PLATFORM.json`` and says where."""
    record = environment() | {"rows": rows}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{suite}-{record['platform']}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table; ``columns`` maps a row's key to its heading."""

    def cell(value: Any) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row.get(key, "")) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cpu_name() -> str:
    """The processor's name and the number of cores this process may use, as far as the system tells."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{names[0] if names else platform.processor()}, {cores} cores"
