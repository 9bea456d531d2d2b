"""``python -m kda_jax.cute build``: compiles every kernel that may be asked for, without a GPU, into a store."""

from __future__ import annotations

import argparse
import json
import os
import pathlib

from kda_jax.cute import artifact, compiler, decode, flush, store, verify
from kda_jax.cute.artifact import DamagedArtifactError, Kernel
from kda_jax.cute.call import ARCHITECTURES

FAMILIES = (decode, flush, verify)
MANIFEST = "manifest.json"


def every_kernel(architectures: list[str], names: list[str] | None = None) -> list[Kernel]:
    return [
        Kernel(family.KERNEL, tuple(choices.items()), arch)
        for arch in architectures
        for family in FAMILIES
        if names is None or family.KERNEL in names
        for choices in family.every_choice()
    ]


def build(kernels: list[Kernel], folder: pathlib.Path, processes: int) -> list[Kernel]:
    """Compiles what the folder has not, writes the manifest of all, and returns what was compiled."""
    missing = [kernel for kernel in kernels if not _there(kernel, folder)]
    for made in compiler.compile_all(missing, processes):
        artifact.write(made, folder)
    found = [artifact.read(kernel, folder) for kernel in kernels]
    manifest = [{"file": made.kernel.filename} | made.manifest for made in found if made is not None]
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return missing


def _there(kernel: Kernel, folder: pathlib.Path) -> bool:
    try:
        return artifact.read(kernel, folder) is not None
    except DamagedArtifactError as error:
        print(f"compiling anew: {error}")
        return False


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m kda_jax.cute", description=__doc__)
    command = parser.add_subparsers(dest="command", required=True).add_parser("build", help="compile into a store")
    known = sorted(ARCHITECTURES.values())
    command.add_argument("--arch", nargs="+", choices=known, default=known)
    command.add_argument("--kernels", nargs="+", choices=[family.KERNEL for family in FAMILIES])
    command.add_argument("--output", type=pathlib.Path, default=store.PACKAGED, help="the store's folder")
    command.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    kernels = every_kernel(args.arch, args.kernels)
    made = build(kernels, args.output, args.processes)
    print(f"{args.output}: {len(kernels)} kernels, {len(made)} of them compiled now")


if __name__ == "__main__":
    main()
