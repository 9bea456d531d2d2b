"""``python -m benchmarks``: times the operations, prints tables and writes JSON.

chunk and serving time named shapes on any backend. chunk-gpu, decode, mtp, verify, q8_0 and loop time the GPU kernels
over a grid of shapes; beside them stand ``python -m benchmarks.peers`` (other projects' kernels) and
``python -m benchmarks.report`` (tables, plot).
"""

from __future__ import annotations

import argparse
import pathlib

from benchmarks import chunk, chunk_gpu, decode, gpu, harness, loop, mtp, q8_0, record, serving, verify

NAMED = {"chunk": chunk, "serving": serving}
# loop first: its processes want the GPU's memory; then chunk-gpu, whose first compilation is to be the process' first
ON_GPU = {"loop": loop, "chunk-gpu": chunk_gpu, "decode": decode, "mtp": mtp, "verify": verify, "q8_0": q8_0}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*NAMED, *ON_GPU]
    parser.add_argument("suites", nargs="*", default=list(NAMED), help=f"of {', '.join(names)} (default: chunk serving)")
    parser.add_argument("--shapes", nargs="+", default=["cpu"], help="named shapes of kda_jax.testing.cases.SHAPES")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--cells", choices=("full", "targets", "quick", "tiny"), default="full", help="how many shapes of the grid"
    )
    parser.add_argument(
        "--implementation",
        help="which one is timed on a GPU (default: triton and cute; chunk-gpu: triton and xla; q8_0: triton; loop: "
        "what None finds)",
    )
    parser.add_argument("--output", type=pathlib.Path, default=record.RESULTS, help="folder for the JSON files")
    args = parser.parse_args()
    if unknown := set(args.suites) - set(names):
        parser.error(f"no suite {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for name in (name for name in NAMED if name in args.suites):
        _report(name, NAMED[name].run(args.shapes, args.repeats), NAMED[name].COLUMNS, args.output)
    if chosen := [name for name in ON_GPU if name in args.suites]:
        if "loop" in chosen:  # before this process takes the GPU
            rows = loop.run(args.cells, args.implementation)
        gpu.require(args.cells)
        for name in chosen:
            if name != "loop":
                rows = ON_GPU[name].run(args.cells, args.implementation)
            _report(name, rows, ON_GPU[name].COLUMNS, args.output, {"implementation": args.implementation})


def _report(name: str, rows: list, columns: dict[str, str], folder: pathlib.Path, said: dict | None = None) -> None:
    print(f"\n## {name}\n\n{record.table(rows, columns)}\n")
    print(f"wrote {harness.write(name, rows, folder, said)}", flush=True)


if __name__ == "__main__":
    main()
