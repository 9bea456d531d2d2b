"""``python -m benchmarks.report FOLDER``: from the GPU suites' JSON files the tables gpu.md and the plot gpu.png."""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import record, report_chunk, report_q8_0, report_verify
from benchmarks.cells import HEADS, POOLS, Cell

Rows = dict[tuple[Cell, str], dict[str, Any]]
FULL_CARD = 4096  # rows times value heads from which on the card is full, and bandwidth is what counts
PEER_SUITES = ("decode-peers", "mtp-peers", "verify-peers", "chunk-peers")
SUITES = ("decode", "mtp", "verify", "loop", "chunk", "q8_0", *PEER_SUITES)
PEERS = {"sglang": "SGLang", "fla": "FLA"}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("folder", type=pathlib.Path, nargs="?", default=record.RESULTS)
    folder = parser.parse_args().folder
    named = ((name, folder / f"{name}-gpu.json") for name in SUITES)
    records = {name: json.loads(path.read_text()) for name, path in named if path.exists()}
    if not records:
        raise SystemExit(
            f"no *-gpu.json in {folder}; python -m benchmarks chunk-gpu decode mtp verify q8_0 loop writes them"
        )
    (folder / "gpu.md").write_text(markdown(records))
    plot(records, folder / "gpu.png")
    print(f"wrote {folder / 'gpu.md'} and gpu.png")


def markdown(records: dict[str, dict[str, Any]]) -> str:
    """The page of all tables; a suite that was not run is left out."""
    ours, peers = _ours(records), _peers(records)
    bandwidth = _bandwidth(records)
    sections = ["# On a GPU\n", *(_about(name, records[name]) for name in sorted(records))]
    if bandwidth:
        sections.append(
            "- bandwidth measured: " + ", ".join(f"{k.replace('_', '-')} {v:.2f} TB/s" for k, v in bandwidth.items())
        )
    sections.append(f"\n{_NOTES}\n\n## Targets\n\n{_targets(ours, peers, bandwidth, records)}")
    sections += report_chunk.section(records)
    sections += _decode_tables(ours, peers, bandwidth)
    sections += _chain_tables(ours, peers)
    sections += report_verify.section(records) + report_q8_0.section(records)
    if "loop" in records:
        columns = {"flags": "XLA flags", "n": "N", "us": "us a step", "kernel_us": "kernels, us a step"}
        columns |= {"ratio": "loop / kernels"}
        sections.append(
            "\n## Decode loop, 64 steps of 16 layers, H=HV=32, K=V=128\n\n" + _table(records["loop"]["rows"], columns)
        )
    return "\n".join(sections) + "\n"


_NOTES = """Times are microseconds of one call, end to end in a program of many calls on rotating slots: for kda_jax one
jitted program, for the peers a CUDA graph. "kernel" is the profiler's time of the kernels alone. bfloat16 inputs, K = V,
lower-bound gate, L2 norm and beta's sigmoid in the kernel. A ratio is the peer's time over ours. RMW is the share of the
measured read-modify-write bandwidth, by the states' bytes only."""


def _ours(records: dict[str, dict[str, Any]]) -> Rows:
    """The fastest implementation of each shape, with the times of all of them."""
    found: Rows = {}
    for row in (row for suite in ("decode", "mtp") for row in records.get(suite, {}).get("rows", []) if "us" in row):
        key = _cell(row), row["variant"]
        times = found.get(key, {}).get("times", {}) | {row["implementation"]: row["us"]}
        fastest = row if row["us"] == min(times.values()) else found[key]
        found[key] = fastest | {"times": times}
    return found


def _peers(records: dict[str, dict[str, Any]]) -> dict[str, Rows]:
    found = [records[suite]["rows"] for suite in ("decode-peers", "mtp-peers") if suite in records]
    rows = [row for suite in found for row in suite if "us" in row]
    return {peer: {(_cell(row), row["variant"]): row for row in rows if row["peer"] == peer} for peer in PEERS}


def _bandwidth(records: dict[str, dict[str, Any]]) -> dict[str, float]:
    return next((records[suite]["bandwidth"] for suite in PEER_SUITES if suite in records), {})


def _cell(row: dict[str, Any]) -> Cell:
    return Cell(**{name: row[name] for name in Cell.__dataclass_fields__})


def _about(name: str, said: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in said["versions"].items())
    return f"- {name}: {said['device']}; {versions}; commit {said['commit'][:12] or '?'}; {said['date']}"


def _table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """With the microseconds to one decimal, and without the columns that no row has."""
    used = {key: name for key, name in columns.items() if any(key in row for row in rows)}
    rounded = [{k: f"{v:.1f}" if k.endswith("us") and isinstance(v, float) else v for k, v in row.items()} for row in rows]
    return record.table(rounded, used)


def _groups(ours: Rows, *variants: str) -> Iterable[tuple[str, list[Cell]]]:
    """The cells with ``variants``, by everything but N and T."""
    groups: dict[str, list[Cell]] = {}
    for cell, variant in ours:
        if variant in variants:
            title = f"K=V={cell.dim}, H={cell.heads}, HV={cell.value_heads}, {cell.pool} pool"
            groups.setdefault(title, []).append(cell)
    return groups.items()


def _rmw(row: dict[str, Any], bandwidth: dict[str, float]) -> float | None:
    return row["state_bytes"] / row["us"] / 1e6 / bandwidth["read_modify_write"] if bandwidth else None


def _other_pool(ours: Rows, cell: Cell, variant: str) -> float | None:
    """How much faster the bfloat16 pool of this shape is than its float32 one."""
    times = [ours.get((Cell(**cell.row() | {"pool": pool}), variant), {}).get("us", 0.0) for pool in ("float32", "bfloat16")]
    return times[0] / times[1] if all(times) else None


def _decode_tables(ours: Rows, peers: dict[str, Rows], bandwidth: dict[str, float]) -> list[str]:
    columns = {"n": "N", "triton_us": "Triton us", "cute_us": "CuTe us", "kernel_us": "faster one's kernel us"}
    columns |= {"sglang_us": "SGLang us", "fla_us": "FLA us"}
    columns |= {"ratio": "faster peer / ours", "rmw": "RMW", "bf16": "float32 / bfloat16"}
    sections = ["\n## Decode, T=1"] if any(variant == "decode" for _, variant in ours) else []
    for title, cells in _groups(ours, "decode"):
        rows = []
        for cell in cells:
            mine = ours[cell, "decode"]
            theirs = {peer: rows[cell, "decode"]["us"] for peer, rows in peers.items() if (cell, "decode") in rows}
            row = {"n": cell.n, "rmw": _rmw(mine, bandwidth)} | _times(mine)
            row |= {"kernel_us": mine.get("kernel_us")} | {f"{peer}_us": us for peer, us in theirs.items()}
            row |= {"ratio": min(theirs.values()) / mine["us"] if theirs else None}
            row |= {"bf16": _other_pool(ours, cell, "decode") if cell.pool == "bfloat16" else None}
            rows.append({key: value for key, value in row.items() if value is not None})
        sections.append(f"\n{title}\n\n{_table(rows, columns)}")
    return sections


def _chain_tables(ours: Rows, peers: dict[str, Rows]) -> list[str]:
    sections = []
    for variant, what in {"all": "all accepted", "half": "half accepted"}.items():
        groups = list(_groups(ours, variant))
        title = (
            f"\n## A speculative step, {what}: us of the fastest (T and C verify + flush on Triton and CuTe, TP and CP "
            "decode_mtp in its paged form; kernel us; SGLang's verify + commit / ours)"
        )
        sections += [title] if groups else []
        for title, cells in groups:
            rows: dict[int, dict[str, Any]] = {}
            for cell in cells:
                row = rows.setdefault(cell.n, {"n": cell.n})
                row[f"T{cell.tokens}"] = _chain(_fastest(ours, cell, variant), peers["sglang"].get((cell, variant)))
            columns = {"n": "N"} | {f"T{t}": f"T={t}" for t in sorted({cell.tokens for cell in cells})}
            sections.append(f"\n{title}\n\n{record.table(list(rows.values()), columns)}")
    columns = {"cell": "shape", "triton_us": "Triton us", "cute_us": "CuTe us", "kernel_us": "faster one's kernel us"}
    columns |= {"commit": "measured at another commit"}
    for variant, title in {"decode_mtp": "decode_mtp", "paged": "decode_mtp, paged form"}.items():
        rows_ = [{"cell": str(cell)} | row | _times(row) for (cell, which), row in ours.items() if which == variant]
        sections += [f"\n## {title}\n\n" + _table(rows_, columns)] if rows_ else []
    return sections


def _fastest(ours: Rows, cell: Cell, variant: str) -> dict[str, Any]:
    """A step by verify and flush, or by decode_mtp in its paged form, which takes as long whatever is accepted."""
    ways = [ours[key] for key in ((cell, variant), (cell, "paged")) if key in ours]
    return min(ways, key=lambda row: row["us"])


def _times(row: dict[str, Any]) -> dict[str, float]:
    return {f"{name}_us": us for name, us in row["times"].items()}


def _chain(mine: dict[str, Any], theirs: dict[str, Any] | None) -> str:
    kernel = f"{mine['kernel_us']:.1f}" if "kernel_us" in mine else "-"
    way = mine["implementation"][0].upper() + ("P" if mine["variant"] == "paged" else "")
    said = [way, kernel] + ([f"{theirs['us'] / mine['us']:.2f}"] if theirs else [])
    return f"{mine['us']:.1f} ({'; '.join(said)})"


def _targets(ours: Rows, peers: dict[str, Rows], bandwidth: dict[str, float], records: dict[str, dict[str, Any]]) -> str:
    """For each target the worst shape, over K = V = 128."""
    found: dict[str, list[tuple[float, str]]] = {}

    def add(what: str, value: float | None, where: str) -> None:
        if value is not None:
            found.setdefault(what, []).append((value, where))

    for (cell, variant), mine in ours.items():
        if cell.dim != 128:
            continue
        where, full = str(cell), cell.n * cell.value_heads >= FULL_CARD
        theirs = [rows[cell, variant]["us"] for rows in peers.values() if (cell, variant) in rows]
        name = {"decode": "decode: faster peer / ours", "all": "chain, all accepted: SGLang / ours"}
        name |= {"half": "chain, half accepted: SGLang / ours"}
        if theirs and variant in name:
            add(f"{name[variant]}, {cell.pool} pool", min(theirs) / _fastest(ours, cell, variant)["us"], where)
        if full and variant in ("decode", "all", "half"):
            if cell.pool == "float32":
                add(f"{variant}: share of RMW bandwidth, N HV >= {FULL_CARD}, float32", _rmw(mine, bandwidth), where)
            else:
                add(f"{variant}: float32 / bfloat16 pool, N HV >= {FULL_CARD}", _other_pool(ours, cell, variant), where)
    parts = report_chunk, report_verify, report_q8_0
    rows = [_worst(*target) for part in parts for target in part.targets(records)]
    rows += [_worst(what, values, min) for what, values in found.items()]
    loops = [
        (row["ratio"], f"{row['flags']}, N={row['n']}")
        for row in records.get("loop", {}).get("rows", [])
        if "ratio" in row and row["n"] >= 8
    ]
    for flags in dict.fromkeys(where.split(", N=")[0] for _, where in loops):
        some = [pair for pair in loops if pair[1].startswith(f"{flags}, N=")]
        rows.append(_worst(f"loop / kernels, N >= 8, flags: {flags}", some, max))
    columns = {"what": "what", "worst": "worst", "where": "there", "median": "median", "shapes": "shapes"}
    return record.table(rows, columns)


def _worst(what: str, values: list[tuple[float, str]], pick: Callable[..., tuple[float, str]]) -> dict[str, Any]:
    worst, where = pick(values)
    median = sorted(value for value, _ in values)[len(values) // 2]
    return {"what": what, "worst": worst, "where": where, "median": median, "shapes": len(values)}


def plot(records: dict[str, dict[str, Any]], path: pathlib.Path) -> None:
    """Decode's time over N, and how much faster the chain is than SGLang's, at H = HV = 32 and K = V = 128."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ours, peers = _ours(records), _peers(records)
    figure, axes = plt.subplots(1, len(POOLS) + 1, figsize=(15, 4.5), constrained_layout=True)
    for axis, pool in zip(axes, POOLS, strict=False):
        lines = {"kda_jax": ours} | {PEERS[peer]: rows for peer, rows in peers.items()}
        for name, rows in lines.items():
            _line(axis, name, [(cell.n, row["us"]) for cell, row in _chosen(rows, "decode", pool)])
        if bandwidth := _bandwidth(records):
            tb_s = bandwidth["read_modify_write"]
            floor = [(cell.n, 2 * cell.states / tb_s / 1e6) for cell, _ in _chosen(ours, "decode", pool)]
            _line(axis, "read-modify-write", floor, "k--")
        axis.set(xscale="log", yscale="log", xlabel="N", ylabel="us a call", title=f"decode, {pool} pool")
    for tokens in sorted({cell.tokens for cell, variant in ours if variant == "all"}):
        theirs = peers["sglang"]
        points = [
            (cell.n, theirs[cell, "all"]["us"] / _fastest(ours, cell, "all")["us"])
            for cell, _ in _chosen(ours, "all", "float32")
            if cell.tokens == tokens and (cell, "all") in theirs
        ]
        _line(axes[-1], f"T={tokens}", points)
    axes[-1].axhline(1, color="k", linestyle="--")
    axes[-1].set(xscale="log", xlabel="N", ylabel="SGLang / kda_jax", title="a speculative step, all accepted, float32 pool")
    for axis in axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.suptitle(f"H=HV=32, K=V=128, {next(iter(records.values()))['device']}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _chosen(rows: Rows, variant: str, pool: str) -> list[tuple[Cell, dict[str, Any]]]:
    return [
        (cell, row)
        for (cell, which), row in rows.items()
        if which == variant and cell.pool == pool and cell.dim == 128 and (cell.heads, cell.value_heads) == HEADS[0]
    ]


def _line(axis: Any, name: str, points: Sequence[tuple[float, float]], style: str = "o-") -> None:
    if points:
        axis.plot(*zip(*sorted(points), strict=True), style, label=name, markersize=4)


if __name__ == "__main__":
    main()
