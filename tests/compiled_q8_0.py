"""Compiles the Triton kernels of q8_0 for sm_90 without a GPU and prints, as JSON, what the exported programs hold.

A process of its own, as compiled.py.
"""

import functools
import json

import jax
from compiled import array, assemble, inspect

import kda_jax as kda
from kda_jax import q8_0
from kda_jax._q8_0_format import num_blocks

INSTRUCTIONS = ("dp4a", "ld.global.v4", "fma.", "div.full", "ftz")


def weight(inputs, out, *lead):
    return q8_0.Weight(array(*lead, out, num_blocks(inputs), dtype="float16"), array(*lead, out, inputs, dtype="int8"))


def arguments(name, n, inputs=7168, out=1536, lanes=4):
    x, w = array(n, inputs), weight(inputs, out)
    if name == "matmul_pair":
        return x, w, weight(inputs, 576)
    if name == "matmul_hc_expand":
        return x, w, array(n, lanes, out), array(n, lanes), array(n, lanes, lanes), array(n, out)
    return x, w


def calls():
    """Name, function and its arguments: the operations at numbers of tokens, then other shapes and a mapped weight."""
    for name in ("matmul", "matmul_pair", "matmul_hc_expand"):
        call = functools.partial(getattr(q8_0, name), implementation="triton")
        for n in (1, 2, 4, 64):
            yield f"{name} {n}", call, arguments(name, n)
        yield f"{name} part-of-a-block", call, arguments(name, 3, 100, 37)
    without_add = arguments("matmul_hc_expand", 2)[:-1]
    yield "matmul_hc_expand without-add", functools.partial(q8_0.matmul_hc_expand, implementation="triton"), without_add
    yield "matmul one-block", functools.partial(q8_0.matmul, implementation="triton"), arguments("matmul", 2, 32, 37)
    yield "matmul long-rows", functools.partial(q8_0.matmul, implementation="triton"), arguments("matmul", 1, 18432, 7168)
    yield "matmul large", functools.partial(q8_0.matmul, implementation="triton"), arguments("matmul", 4, 7168, 7168)
    yield "matmul_hc_expand 8-lanes", call, arguments("matmul_hc_expand", 4, 2048, 4096, 8)
    vmapped = jax.vmap(functools.partial(q8_0.matmul, implementation="triton"))
    yield "matmul vmap", vmapped, (array(2, 4, 7168), weight(7168, 1536, 2))


def main():
    report = {}
    with kda.cuda_target("9.0"):
        for name, function, args in calls():
            found = inspect(function, args, False)
            for kernel in found["kernels"]:
                ptx = kernel.pop("ptx")
                kernel |= assemble(ptx) | {text: ptx.count(text) for text in INSTRUCTIONS}
            report[name] = {"kernels": found["kernels"], "text_copies": found["text_copies"]}
        report["default"] = {
            name: [
                [kernel["name"] for kernel in inspect(getattr(q8_0, name), arguments(name, 3, inputs, 37), False)["kernels"]]
                for inputs in (96, 30)
            ]
            for name in ("matmul", "matmul_pair", "matmul_hc_expand")
        }
        call = functools.partial(q8_0.matmul, implementation="triton")
        of = [inspect(call, arguments("matmul", n), False)["kernels"][0]["ptx"] for n in (9, 13, 16)]
        report["one binary"] = len(set(of)) == 1
    for capability in ("8.0", "8.6", "10.0"):  # 8.6 has the least shared memory
        with kda.cuda_target(capability):
            found = [inspect(function, args, False)["kernels"] for name, function, args in calls() if name.endswith(" 4")]
            report[capability] = [kernel["name"] for (kernel,) in found]
    print(json.dumps(report))


if __name__ == "__main__":
    main()
