"""What every result says of itself, and tables. Without JAX, for the peers' process (benchmarks.peers) uses it too."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

RESULTS = pathlib.Path(__file__).parent / "results"


def stamp(distributions: Iterable[str]) -> dict[str, Any]:
    """Versions of those of ``distributions`` that are installed, commit and date."""
    return {
        "versions": _versions(distributions) | {"python": platform.python_version()},
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _versions(distributions: Iterable[str]) -> dict[str, str]:
    versions = {}
    for name in distributions:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _commit() -> str:
    """The commit of the code, or KDA_JAX_COMMIT: a GPU host may hold a copy of the tree without its history."""
    if given := os.environ.get("KDA_JAX_COMMIT"):
        return given
    git = ["git", "-C", str(pathlib.Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout.strip()
    return commit + ("+changes" if changed else "")


def write(name: str, record: dict[str, Any], folder: pathlib.Path) -> pathlib.Path:
    """Writes ``NAME.json``, a row a line, and says where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    head = json.dumps({key: value for key, value in record.items() if key != "rows"}, indent=1)
    rows = ",\n  ".join(json.dumps(row) for row in record["rows"])
    path.write_text(f'{head[:-2]},\n "rows": [\n  {rows}\n ]\n}}\n')
    return path


def table(rows: list[dict[str, Any]], columns: dict[str, str]) -> str:
    """A Markdown table; ``columns`` maps a row's key to its heading."""

    def cell(value: Any) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    lines = [list(columns.values()), ["---"] * len(columns)]
    lines += [[cell(row.get(key, "")) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
