"""Compiles chunk's Triton kernels for sm_90 without a GPU and prints, as JSON, what the exported programs hold.

A process of its own, as compiled.py.
"""

import functools
import json
import math

import jax
import jax.numpy as jnp
from compiled import array, assemble, inspect, operations
from jax.extend.mlir import ir
from jax.interpreters import mlir

import kda_jax as kda

HEADS, VALUE_HEADS = 2, 4
GATES = {"softplus": kda.Softplus, "lower_bound": kda.LowerBound}
assembled = functools.cache(assemble)


def arguments(k_dim, v_dim, *, heads=HEADS, batch=1, tokens=500, dtype="bfloat16", gate="softplus", sequences=None):
    """The arrays of a call. Decays are float32, so that what has the size of g and the dtype of q is a repeated q or k."""
    lead = batch, tokens
    q, v = array(*lead, heads, k_dim, dtype=dtype), array(*lead, VALUE_HEADS, v_dim, dtype=dtype)
    g, beta = array(*lead, VALUE_HEADS, k_dim, dtype="float32"), array(*lead, VALUE_HEADS, dtype=dtype)
    state = array(sequences or batch, VALUE_HEADS, v_dim, k_dim, dtype="float32")
    named = {"q": q, "k": q, "v": v, "g": g, "beta": beta, "initial_state": state}
    if gate is not None:
        parameters = array(VALUE_HEADS, dtype="float32"), array(VALUE_HEADS, k_dim, dtype="float32")
        named["gate"] = GATES[gate](*parameters)
    return named | ({} if sequences is None else {"cu_seqlens": array(sequences + 1, dtype="int32")})


def forward(named, qk_l2norm=True, **options):
    return kda.chunk(**named, qk_l2norm=qk_l2norm, beta_sigmoid=True, **options)


def gradient(named, **options):
    def loss(wrt):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in forward(named | wrt, **options))

    return jax.grad(loss)({name: x for name, x in named.items() if name != "cu_seqlens"})


def repeating(named):
    """What the kernels spare: to see that ``repeated`` would find it."""
    return forward(named | {name: jnp.repeat(named[name], VALUE_HEADS // HEADS, axis=2) for name in ("q", "k")})


def calls():
    """Name, function and its arguments: all head dimensions, then the options that make other kernels."""
    for k_dim, v_dim in ((64, 64), (128, 128), (64, 128), (128, 64)):
        yield f"forward {k_dim} {v_dim}", forward, arguments(k_dim, v_dim)
        yield f"gradient {k_dim} {v_dim}", gradient, arguments(k_dim, v_dim)
    yield "no-group", gradient, arguments(128, 128, heads=VALUE_HEADS)
    yield "crowded", gradient, arguments(128, 128, heads=VALUE_HEADS, batch=40)
    yield "lower-bound", gradient, arguments(128, 128, gate="lower_bound")
    yield "log-decay", gradient, arguments(128, 128, gate=None)
    yield "raw", functools.partial(gradient, qk_l2norm=False), arguments(128, 128)
    yield "float32", gradient, arguments(128, 128, dtype="float32")
    yield "packed", gradient, arguments(128, 64, sequences=5)
    yield "saved", functools.partial(gradient, save_intermediates=True), arguments(128, 64)
    for name, sequences in (("vmap", None), ("vmap-packed", 5)):
        one = arguments(128, 64, sequences=sequences)
        mapped = {key: array(3, *x.shape, dtype=x.dtype) for key, x in one.items() if key != "gate"}
        yield name, jax.vmap(gradient, in_axes=({"gate": None} | dict.fromkeys(mapped, 0),)), one | mapped
    yield "repeating", repeating, arguments(64, 128)


SIZES = (
    *({"tokens": tokens, "batch": batch} for tokens, batch in ((500, 1), (1000, 1), (1024, 1), (1, 4))),
    *({"tokens": tokens, "sequences": sequences} for tokens, sequences in ((500, 2), (1024, 2), (500, 16))),
)


def repeated(text, named):
    """What has as many elements, in their dtype, as q and k repeated to the value heads."""
    size, element = math.prod(named["g"].shape), {"bfloat16": "bf16"}[named["q"].dtype.name]
    found = set()
    with mlir.make_ir_context():
        for op in operations(ir.Module.parse(text).operation):
            for value in (*op.operands, *op.results):
                shape, _, dtype = str(value.type).removeprefix("tensor<").removesuffix(">").rpartition("x")
                if dtype == element and math.prod(map(int, shape.split("x"))) == size:
                    found.add(f"{op.name} {value.type}")
    return sorted(found)


def assembled_all(found):
    return [{"name": kernel["name"]} | assembled(kernel["ptx"]) for kernel in found["kernels"]]


def main():
    report = {}
    with kda.cuda_target("9.0"):
        for name, function, named in calls():
            found = inspect(function, (named,), False)
            report[name] = {"kernels": assembled_all(found)}
            if named["g"].shape != named["v"].shape:
                report[name]["repeated"] = repeated(found["text"], named)
        report["binaries"] = {}
        for sizes in SIZES:
            found = inspect(gradient, (arguments(128, 64, **sizes),), False)
            of = report["binaries"].setdefault("packed" if "sequences" in sizes else "rows", [])
            of.append([hash(kernel["ptx"]) for kernel in found["kernels"]])
    for capability in ("8.6", "10.0"):  # 8.6 has the least shared memory
        with kda.cuda_target(capability):
            found = inspect(gradient, (arguments(128, 128, batch=40),), False)
            report[capability] = {"kernels": [{"name": kernel["name"]} for kernel in found["kernels"]]}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
