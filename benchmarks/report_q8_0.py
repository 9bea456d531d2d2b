"""The part of the report for q8_0: its operations beside the same work done without them, and the targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from benchmarks import record
from benchmarks.cells import Projection

Row = dict[str, Any]
Target = tuple[str, list[tuple[float, str]], Callable[..., Any]]  # what, values and where, min or max is the worst

LARGE = 16e6  # bytes of a weight that counts for the share
COLUMNS = {
    "variant": "call",
    "shape": "shape",
    "us": "us",
    "share": "share",
    "bfloat16 dot": "jnp.dot / ours",
    "two of matmul": "two calls / ours",
    "matmul, then XLA": "unfused / ours",
    "matmul": "ours / matmul",
    "xla": "xla / ours",
}
_NOTES = """One call of a jitted program that makes its calls in turn, on weights of their own, which together exceed the L2
cache several times; bfloat16 activations. A share is of the bandwidth at which XLA adds up 4 GiB in the same run, by the
bytes of the weight. jnp.dot has a bfloat16 weight. A ratio is of times."""


def section(records: dict[str, Row]) -> list[str]:
    rows = _compared(records)
    used = {key: name for key, name in COLUMNS.items() if any(key in row for row in rows)}
    return [f"\n## q8_0\n\n{_NOTES}\n\n{record.table(rows, used)}"] if rows else []


def targets(records: dict[str, Row]) -> list[Target]:
    rows = _compared(records)

    def values(call: str, what: str, *tokens: int, least: float = 0) -> list[tuple[float, str]]:
        of_call = [row for row in rows if row["variant"] == call and row["n"] in tokens and row["weight_bytes"] >= least]
        return [(row[what], row["shape"]) for row in of_call if what in row]

    found: list[Target] = [
        ("q8_0.matmul, N = 1, 16 MB and more: share of read bandwidth", values("matmul", "share", 1, least=LARGE), min),
        ("q8_0.matmul, N = 1 and 4: bfloat16 jnp.dot / ours", values("matmul", "bfloat16 dot", 1, 4), min),
        ("q8_0.matmul_pair, N = 1: two calls / ours", values("matmul_pair", "two of matmul", 1), min),
        ("q8_0.matmul_hc_expand, N = 1: ours / matmul", values("matmul_hc_expand", "matmul", 1), max),
    ]
    return [target for target in found if target[1]]


def _compared(records: dict[str, Row]) -> list[Row]:
    """Rows of the operations, each with ratios to the others of its shape."""
    found: dict[Projection, dict[str, Row]] = {}
    for row in records.get("q8_0", {}).get("rows", []):
        if "us" in row:
            fields = {name: row[name] for name in Projection.__dataclass_fields__}
            cell = Projection(**fields | {"outputs": tuple(row["outputs"])})
            slow = row["implementation"] == "xla" and row["variant"] == cell.operation
            found.setdefault(cell, {})["xla" if slow else row["variant"]] = row
    rows = []
    for cell, variants in found.items():
        if mine := variants.get(cell.operation):
            row = mine | {name: other["us"] / mine["us"] for name, other in variants.items() if other is not mine}
            plain = found.get(dataclasses.replace(cell, operation="matmul", lanes=0), {}).get("matmul")
            if plain and cell.operation == "matmul_hc_expand":
                row["matmul"] = mine["us"] / plain["us"]
            rows.append(row)
    return rows
