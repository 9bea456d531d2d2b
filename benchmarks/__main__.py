"""``python -m benchmarks``: times the operations on named shapes, prints a table and writes JSON."""

from __future__ import annotations

import argparse
import pathlib

from benchmarks import chunk, harness, serving

SUITES = {"chunk": chunk, "serving": serving}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("suites", nargs="*", default=list(SUITES), help=f"which of {', '.join(SUITES)} (default: all)")
    parser.add_argument("--shapes", nargs="+", default=["cpu"], help="named shapes of kda_jax.testing.cases.SHAPES")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--output", type=pathlib.Path, default=harness.RESULTS, help="folder for the JSON files")
    args = parser.parse_args()
    for name in args.suites:
        suite = SUITES[name]
        rows = suite.run(args.shapes, args.repeats)
        print(f"\n## {name}\n\n{harness.table(rows, suite.COLUMNS)}\n")
        print(f"wrote {harness.write(name, rows, args.output)}")


if __name__ == "__main__":
    main()
