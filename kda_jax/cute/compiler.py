"""Compiles kernels with nvidia-cutlass-dsl, without a GPU, in processes of their own.

``python -m kda_jax.cute.compiler FOLDER`` compiles what standard input lists into FOLDER. A process of its own because the
DSL reads the architecture from the environment and keeps state, and because this may be asked for in the middle of a
program's lowering.
"""

from __future__ import annotations

import concurrent.futures
import importlib
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from kda_jax.cute import artifact, elf
from kda_jax.cute.artifact import Artifact, Kernel

PACKAGE = "nvidia-cutlass-dsl"
TARGET = "kda_cute"  # of a program that only carries the object here


class CompilationError(RuntimeError):
    """The compiler's own words."""


def compile_all(kernels: Sequence[Kernel], processes: int = 1) -> list[Artifact]:
    """Raises CompilationError if one of them is refused."""
    shares = [
        share
        for arch in sorted({kernel.arch for kernel in kernels})
        for i in range(processes)
        if (share := [kernel for kernel in kernels if kernel.arch == arch][i::processes])
    ]
    with (
        tempfile.TemporaryDirectory(prefix="kda-cute-") as folder,
        concurrent.futures.ThreadPoolExecutor(processes) as pool,
    ):
        list(pool.map(lambda share: _compile_apart(share, folder), shares))
        found = [artifact.read(kernel, pathlib.Path(folder)) for kernel in kernels]
    return [x for x in found if x is not None]


def _compile_apart(kernels: Sequence[Kernel], folder: str) -> None:
    """In a process of its own; all are for one architecture."""
    done = subprocess.run(
        [sys.executable, "-m", "kda_jax.cute.compiler", folder],
        input=json.dumps([[kernel.name, kernel.choices, kernel.arch, kernel.host] for kernel in kernels]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"CUTE_DSL_ARCH": kernels[0].arch, "JAX_PLATFORMS": "cpu"},
    )
    if done.returncode:
        raise CompilationError(f"{', '.join(map(str, kernels))}: exit status {done.returncode}\n{done.stdout[-4000:]}")


def compile_here(kernel: Kernel) -> Artifact:
    """In this process, whose CUTE_DSL_ARCH must be the kernel's."""
    import cutlass.jax
    import jax

    module = importlib.import_module(f"kda_jax.kernels.cute.{kernel.name}")
    choices = dict(kernel.choices)
    inputs, outputs, aliases = module.operands(**choices)
    scope = jax.export.SymbolicScope()

    def shaped(operand: tuple[str, str]) -> jax.ShapeDtypeStruct:
        axes, dtype = operand
        sizes = ", ".join(str(choices.get(axis, axis.lower())) for axis in axes.split())
        return jax.ShapeDtypeStruct(jax.export.symbolic_shape(sizes, scope=scope), dtype)

    def specified(operand: tuple[str, str]) -> Any:
        # XLA promises 16 bytes for a program's parameters, and no more.
        divisors = tuple(choices.get(axis) for axis in operand[0].split())
        return cutlass.jax.TensorSpec(ptr_assumed_align=16, divisibility=divisors)

    call = cutlass.jax.cutlass_call(
        module.launch,
        output_shape_dtype=[*map(shaped, outputs)],
        input_spec=[*map(specified, inputs)],
        output_spec=[*map(specified, outputs)],
        input_output_aliases=aliases,
        ffi_call_target=TARGET,
        compile_key=kernel,
        **choices,
    )
    exported = jax.export.export(
        jax.jit(call), platforms=["cuda"], disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)]
    )(*map(shaped, inputs))
    built = _module_of(exported.mlir_module())
    figures = elf.figures(built) | {"dsl": importlib.metadata.version(PACKAGE), "shared": module.shared_bytes(**choices)}
    return Artifact(kernel, built, figures)


def _module_of(text: str) -> bytes:
    """What the program's call of the kernel is given; other custom calls check its symbolic sizes."""
    from jax.extend.mlir import ir
    from jax.interpreters import mlir

    def walk(operation: Any) -> Any:
        for region in operation.regions:
            for block in region.blocks:
                for inner in block.operations:
                    yield inner
                    yield from walk(inner)

    with mlir.make_ir_context():
        calls = (x for x in walk(ir.Module.parse(text).operation) if x.operation.name == "stablehlo.custom_call")
        (call,) = (x for x in calls if ir.StringAttr(x.attributes["call_target_name"]).value == TARGET)
        return ir.StringAttr(ir.DictAttr(call.attributes["mhlo.backend_config"])["module"]).value_bytes


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    for name, choices, arch, host in json.load(sys.stdin):
        kernel = Kernel(name, tuple((key, value) for key, value in choices), arch, host)
        artifact.write(compile_here(kernel), folder)


if __name__ == "__main__":
    main()
