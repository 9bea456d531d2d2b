"""verify's part of the report: all implementations beside FlashInfer, and the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks import record
from benchmarks.cells import Cell

Row = dict[str, Any]
Target = tuple[str, list[tuple[float, str]], Callable[..., Any]]  # what, values and where, min or max is the worst

_NOTES = """Without the update. Times as above; a share is of the measured bandwidth, by the states' bytes, read once.
FlashInfer's kernel knows bfloat16 pools alone."""


def section(records: dict[str, Row]) -> list[str]:
    ours, theirs = _times(records, "verify"), _times(records, "verify-peers")
    rows = []
    for cell, us in ours.items():
        rows.append({"n": cell.n, "heads": cell.heads, "pool": cell.pool, "t": cell.tokens} | us | theirs.get(cell, {}))
        if cell in theirs:
            rows[-1]["ratio"] = theirs[cell]["flashinfer"] / min(us.values())
    columns = {"n": "N", "heads": "H = HV", "pool": "pool", "t": "T", "triton": "Triton, us", "cute": "CuTe, us"}
    columns |= {"flashinfer": "FlashInfer, us", "ratio": "FlashInfer / ours"}
    used = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    return [f"\n## verify alone\n\n{_NOTES}\n\n{record.table(rows, used)}"] if rows else []


def targets(records: dict[str, Row]) -> list[Target]:
    ours, theirs = _times(records, "verify"), _times(records, "verify-peers")
    found: list[Target] = []
    if ratios := [(theirs[cell]["flashinfer"] / min(us.values()), str(cell)) for cell, us in ours.items() if cell in theirs]:
        found.append(("verify alone, bfloat16 pool: FlashInfer / ours", ratios, min))
    growth = [
        (min(ours[more].values()) / min(us.values()), str(cell))
        for cell, us in ours.items()
        if cell.pool == "float32" and cell.tokens == 2 and (more := Cell(**cell.row() | {"tokens": 6})) in ours
    ]
    return found + ([("verify alone, float32 pool: T = 6 / T = 2", growth, max)] if growth else [])


def _times(records: dict[str, Row], suite: str) -> dict[Cell, dict[str, float]]:
    """Microseconds by cell, and by implementation or peer."""
    found: dict[Cell, dict[str, float]] = {}
    for row in records.get(suite, {}).get("rows", []):
        cell = Cell(**{name: row[name] for name in Cell.__dataclass_fields__})
        if "us" in row:
            found.setdefault(cell, {})[row["implementation"] if suite == "verify" else row["peer"]] = row["us"]
    return found
