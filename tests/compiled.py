"""Compiles every Triton kernel for sm_90 without a GPU and prints, as JSON, what the exported programs hold.

A process of its own: in the tests' own process kernels are made for Triton's interpreter.
"""

import json
import pathlib
import re
import subprocess
import tempfile
import zlib

import jax
import jax.export
import jax.numpy as jnp
import triton
from jax.extend.mlir import ir
from jax.interpreters import mlir

import kda_jax as kda

TARGET = "triton_kernel_call_ffi"
PTXAS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


def array(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def tokens(dim, *lead):
    q = array(*lead, 2, dim)
    return q, q, array(*lead, 4, dim), array(*lead, 4, dim), array(*lead, 4)


def options(dim):
    gate = kda.Softplus(jnp.zeros(4), jnp.zeros((4, dim)))
    return {"gate": gate, "qk_l2norm": True, "beta_sigmoid": True, "implementation": "triton"}


def calls(dim, pool_dtype, n=3):
    """Name, function of (pool, ...), its arguments, whether it writes the pool."""
    pool, slots, counts = array(7, 4, dim, dim, dtype=pool_dtype), array(n, dtype="int32"), array(n, dtype="int32")

    def with_tokens(call):
        return lambda pool, slots, *xs: call(*xs, pool, state_indices=slots, **options(dim))

    def paged(pool, slots, counts, *xs):
        return kda.decode_mtp(*xs, pool, state_indices=slots, num_accepted=counts, **options(dim))

    def update(t, *lead):
        sizes = ((4, dim), (2, dim), (4, dim))
        return kda.Update(*(array(*lead, n, t, *size, dtype="float32") for size in sizes))

    def flush(call):
        return lambda pool, update, counts, slots: call(pool, update, counts, state_indices=slots, implementation="triton")

    yield "decode", with_tokens(kda.decode), (pool, slots, *tokens(dim, n)), True
    yield "decode_mtp", with_tokens(kda.decode_mtp), (pool, slots, *tokens(dim, n, 4)), False
    yield "decode_mtp_paged", paged, (pool, array(n, 4, dtype="int32"), counts, *tokens(dim, n, 4)), True
    for t in (1, 2, 4, 6, 16):
        yield f"verify-{t}", with_tokens(kda.verify), (pool, slots, *tokens(dim, n, t)), False
    for t in (2, 6):
        yield f"flush-{t}", flush(kda.flush), (pool, update(t), counts, slots), True
    layers = array(3, *pool.shape, dtype=pool_dtype)
    yield "flush_layers", flush(kda.flush_layers), (layers, update(4, 3), counts, slots), True
    vmapped = jax.vmap(with_tokens(kda.decode))
    stacked = jax.tree.map(lambda x: array(2, *x.shape, dtype=x.dtype), (pool, slots, *tokens(dim, n)))
    yield "vmap-decode", vmapped, stacked, True


def operations(operation):
    """All operations inside, at any depth."""
    for region in operation.regions:
        for block in region:
            for op in block:
                yield op.operation
                yield from operations(op.operation)


def custom_calls(operation):
    for op in operations(operation):
        if op.name == "stablehlo.custom_call" and TARGET in str(op.attributes["call_target_name"]):
            yield op


def inspect(function, args, donated):
    exported = jax.export.export(
        jax.jit(function, donate_argnums=0 if donated else ()),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TARGET)],
    )(*args)
    text, found = exported.mlir_module(), []
    with mlir.make_ir_context():
        for op in custom_calls(ir.Module.parse(text).operation):
            config = ir.DictAttr(
                op.attributes["mhlo.backend_config" if "mhlo.backend_config" in op.attributes else "backend_config"]
            )
            program = zlib.decompress(ir.StringAttr(config["opaque"]).value_bytes)
            ptx = program[program.index(b".version") :]
            ptx = ptx[: ptx.index(b"\n}\n") + 3]
            aliases = op.attributes["output_operand_aliases"] if "output_operand_aliases" in op.attributes else ()  # noqa: SIM401
            found.append({"name": ir.StringAttr(config["name"]).value, "ptx": ptx.decode(), "aliases": len(aliases)})
    donates = "tf.aliasing_output" in text or "jax.buffer_donor" in text
    return {"kernels": found, "donated": donates, "text_copies": text.count("stablehlo.copy"), "text": text}


def assemble(ptx):
    """Registers and bytes spilled."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        architecture = re.search(r"\.target (\w+)", ptx).group(1)
        command = [PTXAS, "-v", f"-arch={architecture}", path, "-o", path.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    registers = int(re.search(r"Used (\d+) registers", done.stderr).group(1))
    return {"registers": registers, "spilled": int(re.search(r"(\d+) bytes spill stores", done.stderr).group(1))}


def main():
    report = {}
    with kda.cuda_target("9.0"):
        for dim in (64, 128):
            for pool_dtype in ("float32", "bfloat16"):
                for name, function, args, writes in calls(dim, pool_dtype):
                    found = inspect(function, args, writes)
                    del found["text"]
                    for kernel in found["kernels"]:
                        kernel |= assemble(kernel.pop("ptx"))
                    report[f"{name} {pool_dtype} {dim}"] = found | {"writes": writes}
        batches = {}
        for n in (1, 5, 64):
            for name, function, args, writes in calls(64, "float32", n):
                if name in ("decode", "verify-2", "verify-4", "flush-2"):
                    ptx = [kernel["ptx"] for kernel in inspect(function, args, writes)["kernels"]]
                    batches.setdefault(name, []).append(ptx)
        report["one binary"] = {name: all(ptx == some[0] for ptx in some) for name, some in batches.items()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
