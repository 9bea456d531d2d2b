"""chunk's part of the report: a table of all shapes, and the targets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.cells import VARIANTS, Sequences

BOTH, FORWARD = VARIANTS
Row = dict[str, Any]
Target = tuple[str, list[tuple[float, str]], Callable[..., Any]]  # what, values and where, min or max is the worst

COLUMNS = {"shape": "shape"}
for _what in (FORWARD, BOTH):
    COLUMNS |= {f"{_what} us": f"{_what}, us", f"{_what} fla": "FLA / ours", f"{_what} xla": "xla / ours"}
COLUMNS |= {"peak": "peak, GB", "fla_peak": "FLA's", "compile": "compiled in, s"}

_NOTES = """K = V = 128, bfloat16 inputs, L2 norm, beta's sigmoid and the gate in the kernel. Times are of one call, end to
end: a jitted program for kda_jax; for FLA's chunk_kda, tuned, the faster of CUDA graph and launches one by one. Ratios are
of times. Forward leaves the final states; forward + backward has the cotangent of o as an argument and gives o and the
gradients of q, k, v, g, beta, A_log and dt_bias. Peak is the memory of forward + backward, inputs and outputs counted: by
XLA's account of the compiled program, and by PyTorch's allocator. Compilation is of forward + backward; the first shape's is
the first of its process, the others shared the cores."""


class Shape(NamedTuple):
    """A shape's rows, by variant; an error stands where a time would."""

    cell: Sequences
    ours: dict[str, Row]
    xla: dict[str, Row]
    fla: dict[str, Row]

    def ratio(self, variant: str, peer: str) -> float | None:
        us = self.ours.get(variant, {}).get("us"), getattr(self, peer).get(variant, {}).get("us")
        return us[1] / us[0] if us[0] and us[1] else None


def section(records: dict[str, Row]) -> list[str]:
    found = shapes(records)
    rows = [_row(shape) for shape in found]
    used = {key: name for key, name in COLUMNS.items() if any(key in row for row in rows)}
    return [f"\n## chunk\n\n{_NOTES}\n\n{record.table(rows, used)}"] if found else []


def shapes(records: dict[str, Row]) -> list[Shape]:
    """All shapes of an implementation other than xla."""
    found: dict[Sequences, Shape] = {}
    for row in records.get("chunk", {}).get("rows", []):
        shape = found.setdefault(cell := _cell(row), Shape(cell, {}, {}, {}))
        (shape.xla if row["implementation"] == "xla" else shape.ours)[row["variant"]] = row
    for row in records.get("chunk-peers", {}).get("rows", []):
        if (cell := _cell(row)) in found:
            found[cell].fla[row["variant"]] = row
    return [shape for shape in found.values() if shape.ours]


def targets(records: dict[str, Row]) -> list[Target]:
    named: dict[str, list[tuple[float, str]]] = {}

    def add(what: str, value: float | None, cell: Sequences) -> None:
        if value is not None:
            named.setdefault(what, []).append((value, str(cell)))

    for shape in shapes(records):
        grouped = "HV > H" if shape.cell.value_heads > shape.cell.heads else "HV = H"
        for variant in (FORWARD, BOTH):
            add(f"chunk, {variant}, {grouped}: FLA / ours", shape.ratio(variant, "fla"), shape.cell)
            add(f"chunk, {variant}: xla / ours", shape.ratio(variant, "xla"), shape.cell)
        mine, theirs = (rows.get(BOTH, {}) for rows in (shape.ours, shape.fla))
        if "peak_bytes" in mine and "peak_bytes" in theirs:
            add("chunk, peak memory: FLA / ours", theirs["peak_bytes"] / mine["peak_bytes"], shape.cell)
        if mine.get("compiled_alone"):
            add("chunk, first compilation of forward + backward, s", mine.get("compile_s"), shape.cell)
    return [(what, values, max if what.endswith(", s") else min) for what, values in named.items()]


def _row(shape: Shape) -> Row:
    row: Row = {"shape": str(shape.cell)}
    for variant in (FORWARD, BOTH):
        mine = shape.ours.get(variant, {})
        row[f"{variant} us"] = f"{mine['us']:.0f}" if "us" in mine else "failed"
        for peer in ("fla", "xla"):
            if "us" in mine and variant in (rows := getattr(shape, peer)):
                row[f"{variant} {peer}"] = shape.ratio(variant, peer) or _reason(rows[variant])
    mine, theirs = (rows.get(BOTH, {}) for rows in (shape.ours, shape.fla))
    row |= {
        key: rows["peak_bytes"] / 1e9 for key, rows in {"peak": mine, "fla_peak": theirs}.items() if "peak_bytes" in rows
    }
    return row | ({"compile": mine["compile_s"]} if "compile_s" in mine else {})


def _reason(row: Row) -> str:
    return "out of memory" if "RESOURCE_EXHAUSTED" in row.get("error", "") else "failed"


def _cell(row: Row) -> Sequences:
    fields = {name: row[name] for name in Sequences.__dataclass_fields__}
    return Sequences(**fields | {"lengths": tuple(fields["lengths"])})
