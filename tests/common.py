"""What the test files share: comparisons, cases by name, and every operation as a function of one dict of arrays."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

import kda_jax as kda
from kda_jax import _target
from kda_jax._operands import PoolOperands, Unavailable
from kda_jax.cute import runtime, store
from kda_jax.cute.call import ARCHITECTURES
from kda_jax.testing import cases, oracle, tolerance
from kda_jax.testing.cases import Case
from kda_jax.testing.tolerances import Tolerance

FLAGS = {"qk_l2norm": True, "beta_sigmoid": True}
ROWS = Case("rows", batch=3, tokens=4, value_heads=4, k_dim=8, v_dim=16, pool_size=7)
# Two chunks and a part of one.
SEQUENCES = Case("sequences", batch=3, tokens=40, value_heads=4, k_dim=8, v_dim=16)


# XLA picks its GPU reductions by shape; what is promised to the bit, and in place, is promised of xla on CPU.
xla_on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="bits and copies of xla on CPU")


# chunk's kernels multiply in half precision whatever the dtype of the inputs: values keep 11 bits of each factor, as with
# TF32, gradients the 8 bits of bfloat16, as with bfloat16 inputs.
CHUNK_KERNELS_FLOAT32 = Tolerance(output=1e-3, state=1e-3, gradient=1e-2)


def chunk_kernel_tolerance(dtype: str, state_dtype: str = "float32") -> Tolerance:
    """How far chunk's kernels may be from the oracle."""
    limits = CHUNK_KERNELS_FLOAT32 if dtype == "float32" else tolerance(dtype)
    if state_dtype == "bfloat16":  # the final state is rounded to the initial one's dtype, once
        limits = limits._replace(state=tolerance(dtype, state_dtype).state)
    return limits


def over(some: Sequence[Case], *names: str) -> pytest.MarkDecorator:
    """Parametrises ``case`` over the shared cases, or over those named."""
    by_name = {case.name: case for case in some}
    return pytest.mark.parametrize("case", [by_name[name] for name in names] or some, ids=str)


def _pairs(out: Any, reference: Any) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    assert jax.tree.structure(out) == jax.tree.structure(reference)
    for (path, x), y in zip(jax.tree.leaves_with_path(out), jax.tree.leaves(reference), strict=True):
        x, y, where = np.asarray(x), np.asarray(y), jax.tree_util.keystr(path)
        assert x.shape == y.shape, where
        yield where, x, y


def assert_close(out: Any, reference: Any, limit: float) -> None:
    """``||out - reference|| <= limit ||reference||``, leaf by leaf; what float32 has no normal number for counts as zero."""
    for where, x, y in _pairs(out, reference):
        error = oracle.error(x, np.where(np.abs(y) < np.finfo(np.float32).tiny, 0, y))
        assert error <= limit, f"{where}: error {error:.1e} above {limit:.0e}"


def chunk_step(drawn: dict[str, Any], cotangents: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Both outputs of chunk and, from their cotangents, its gradients in all that ``drawn`` holds, by name."""
    offsets = {"cu_seqlens": drawn.pop("cu_seqlens")} if "cu_seqlens" in (drawn := dict(drawn)) else {}
    out, pull = jax.vjp(lambda wrt: kda.chunk(**wrt, **offsets, **options), drawn)
    (grads,) = pull(cotangents)
    gate = grads.pop("gate", None)
    parameters = {} if gate is None else {"A_log": gate.A_log, "dt_bias": gate.dt_bias}
    return out, grads | {name: x for name, x in parameters.items() if x is not None}


def chunk_step_by_oracle(drawn: dict[str, Any], cotangents: Any, **options: Any) -> tuple[Any, dict[str, Any]]:
    drawn = jax.tree.map(np.asarray, drawn)
    tokens = [drawn[name] for name in ("q", "k", "v", "g", "beta")]
    options |= {name: drawn.get(name) for name in ("gate", "initial_state", "cu_seqlens")}
    grads = oracle.chunk_grad(*tokens, *cotangents, **options)
    return oracle.chunk(*tokens, **options), grads


def assert_grads_close(grads: dict[str, Any], reference: dict[str, Any], limit: float, g: Any, gate: Any) -> None:
    """Gradients of chunk by name, as ``assert_close``; that of A_log against the size of its terms, within twice the limit.

    It is a sum over all tokens and channels of terms of either sign, which may by chance be next to nothing. Were errors of
    the terms independent, each within the limit of its term, they would add up to the limit of the terms' norm. Of a
    norm of many errors the limit is far from the usual one; of one number or a few it is not, so they get twice that.
    """
    others = sorted(grads.keys() - {"A_log"})
    assert_close({name: grads[name] for name in others}, {name: reference[name] for name in others}, limit)
    if "A_log" in grads:
        _, slope, by_A_log = oracle._gate(np.asarray(g, np.float64), gate)
        terms = np.divide(reference["g"] * by_A_log, slope, where=slope != 0, out=np.zeros_like(slope))
        size = np.linalg.norm(terms)
        error = np.linalg.norm(np.asarray(grads["A_log"], np.float64) - reference["A_log"])
        assert error <= 2 * limit * size, f"A_log: error {error:.1e} above {2 * limit:.0e} of its terms, {size:.1e}"


def assert_equal(out: Any, reference: Any) -> None:
    """Equality bit for bit, leaf by leaf."""
    for where, x, y in _pairs(out, reference):
        assert x.dtype == y.dtype, where
        bits = f"u{x.dtype.itemsize}"
        np.testing.assert_array_equal(x.view(bits), y.view(bits), where)


def assert_equal_grads(grads: dict[str, Any], reference: dict[str, Any]) -> None:
    """As ``assert_equal``; those of the gate's parameters are sums that XLA takes, in an order that depends on the shape."""
    of_gate = grads.keys() & {"A_log", "dt_bias"}
    assert_close({name: grads[name] for name in of_gate}, {name: reference[name] for name in of_gate}, 1e-4)
    assert_equal(*({name: x for name, x in some.items() if name not in of_gate} for some in (grads, reference)))


def equations(jaxpr: Any, name: str) -> Iterator[Any]:
    """The equations of the primitive ``name``, in nested jaxprs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == name:
            yield equation
        for nested in jaxprs_in_params(equation.params):
            yield from equations(nested, name)


on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU that JAX can use"),
]


def reported_by(script: str) -> Any:
    """What a script of this folder prints last, as JSON, from a process of its own without a GPU."""
    path = pathlib.Path(__file__).with_name(script)
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, path], env=env | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def cute_is_missing() -> str | None:
    """Why no CuTe kernel can run here, or None."""
    if _target.compute_capability() not in ARCHITECTURES:
        return "needs a GPU of compute capability 9.0 or 10.0"
    try:
        runtime.load(runtime.find())
    except Unavailable as error:
        return str(error)
    if not store.can_compile() and not any(folder.is_dir() for folder in store.folders()):
        return "there is neither a store of CuTe kernels nor their compiler"
    return None


TRITON = "triton_kernel_call_ffi"
KERNELS = TRITON, "mosaic_gpu_v2", runtime.TARGET


def compiled_text(function: Callable[..., Any], *args: Any, **options: Any) -> str:
    return jax.jit(function, **options).lower(*args).compile().as_text()


def kernels(function: Callable[..., Any], *args: Any, targets: Sequence[str] = KERNELS, **options: Any) -> int:
    """How many kernels the compiled program calls."""
    text = compiled_text(function, *args, **options)
    return sum(text.count(f'custom_call_target="{target}"') for target in targets)


def at_kernel_dims(some: Sequence[Case]) -> list[Case]:
    """The cases at head dimensions that the kernels serve, 64 and 128 in all four pairs."""
    dims = [(64, 64), (128, 128), (64, 128), (128, 64)]
    return [dataclasses.replace(case, k_dim=dims[i % 4][0], v_dim=dims[i % 4][1]) for i, case in enumerate(some)]


def spec_options(case: Case, gate: Any) -> dict[str, Any]:
    """The options of a case as a spec takes them."""
    return {
        "gate": case.gate,
        "lower_bound": getattr(gate, "lower_bound", None),
        "qk_l2norm": case.qk_l2norm,
        "beta_sigmoid": case.beta_sigmoid,
        "allow_neg_eigval": case.allow_neg_eigval,
        "scale": case.k_dim**-0.5 if case.scale is None else case.scale,
        "implementation": None,
    }


def drawn_operands(case: Case, layout: str, slots: np.ndarray | None) -> tuple[PoolOperands, dict[str, Any], Any, Any, Any]:
    """The operands, the options as a spec takes them; then what the oracle takes, and how far a result may be from its."""
    inputs = cases.draw(case, layout=layout)
    gate = inputs.gate
    parameters = (None, None) if gate is None else (gate.A_log, gate.dt_bias)
    slots = None if slots is None else slots[: case.batch]
    operands = PoolOperands(*inputs.arrays, *parameters, inputs.state, slots)
    options = inputs.options | {"state_indices": slots}
    return (
        operands,
        spec_options(case, gate),
        (*inputs.arrays, inputs.state),
        options,
        tolerance(case.dtype, case.state_dtype),
    )


def check(results: Any, reference: Any, limits: Tolerance) -> None:
    """Outputs and a state."""
    for x, y, limit in zip(results, reference, (limits.output, limits.state), strict=True):
        assert_close(np.asarray(x, np.float64), y, limit)


def rows(tree: Any, index: Any) -> Any:
    """``x[index]`` of every leaf."""
    return jax.tree.map(lambda x: x[index], tree)


def stack(trees: Sequence[Any], axis: int = 0) -> Any:
    """Trees of arrays as one, along a new axis."""
    return jax.tree.map(lambda *xs: jnp.stack(xs, axis), *trees)


def arrays(case: Case, layout: str, seed: int = 0) -> dict[str, Any]:
    """The arrays of a case under the names that the operations take them by, the gate among them."""
    drawn = cases.draw(case, layout=layout, seed=seed)
    named = dict(zip(("q", "k", "v", "g", "beta"), drawn.arrays, strict=True)) | {"gate": drawn.gate}
    if drawn.state is not None:
        named["initial_state" if layout == "chunk" else "state"] = drawn.state
    return jax.tree.map(jnp.asarray, named)


@dataclasses.dataclass(frozen=True)
class Call:
    """An operation as a function of one dict of arrays, with a way to draw them: what transformations are tested on."""

    name: str
    primitive: str
    run: Callable[..., Any]
    draw: Callable[..., dict[str, Any]]  # from a seed and changes to the case

    def __call__(self, arrays: dict[str, Any]) -> Any:
        return self.run(**arrays)

    def __str__(self) -> str:
        return self.name


def chunk(save_intermediates: bool = False, **arrays: Any) -> Any:
    return kda.chunk(**arrays, **FLAGS, chunk_size=16, save_intermediates=save_intermediates)


def chunk_grad(save_intermediates: bool = False, **arrays: Any) -> Any:
    """The gradients of one scalar of both outputs in all the arrays."""

    def loss(arrays):
        o, state = chunk(save_intermediates, **arrays)
        return jnp.sum(o * o) + jnp.sum(jnp.sin(state))

    return jax.grad(loss)(arrays)


def decode(**arrays: Any) -> Any:
    return kda.decode(**arrays, **FLAGS)


def decode_mtp(**arrays: Any) -> Any:
    return kda.decode_mtp(**arrays, **FLAGS)


def verify(**arrays: Any) -> Any:
    return kda.verify(**arrays, **FLAGS)


def _rows(layout: str, gate: str, seed: int, **changes: Any) -> dict[str, Any]:
    case = dataclasses.replace(ROWS, gate=gate, **changes)
    return arrays(case, layout, seed) | _slots(case, seed, case.batch)


def _sequences(seed: int, **changes: Any) -> dict[str, Any]:
    return arrays(dataclasses.replace(SEQUENCES, **changes), "chunk", seed)


def _packed(seed: int, **changes: Any) -> dict[str, Any]:
    """Three sequences, each of any length from none on, and padding behind them."""
    inner = np.sort(np.random.default_rng(seed).integers(0, SEQUENCES.tokens, 3))
    offsets = jnp.asarray([0, *inner], jnp.int32)
    return _sequences(seed, batch=1, cu_seqlens=(0, 0, 0, 0), **changes) | {"cu_seqlens": offsets}


def _paged(seed: int, **changes: Any) -> dict[str, Any]:
    case = dataclasses.replace(ROWS, tokens=2, **changes)
    accepted = {"num_accepted": _counts(seed, 1, case.tokens, case.batch)}
    return arrays(case, "draft", seed) | _slots(case, seed, case.batch, case.tokens) | accepted


def _flush(seed: int, **changes: Any) -> dict[str, Any]:
    drawn = _rows("draft", "softplus", seed, **changes)
    update = kda.Update(drawn["v"], drawn["k"], -jnp.abs(drawn["g"]))
    accepted = _counts(seed, 0, drawn["v"].shape[1], drawn["v"].shape[0])
    return {name: drawn[name] for name in ("state", "state_indices")} | {"update": update, "num_accepted": accepted}


def _slots(case: Case, seed: int, *shape: int) -> dict[str, Any]:
    """Distinct slots, the second row's outside the pool."""
    slots = np.random.default_rng(seed).permutation(case.pool_size)[: np.prod(shape)].reshape(shape)
    slots[1] = -1
    return {"state_indices": jnp.asarray(slots, jnp.int32)}


def _counts(seed: int, least: int, most: int, rows: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(least, most + 1, rows), jnp.int32)


CHUNK = Call("chunk", "kda_chunk_fwd", chunk, _sequences)
CHUNK_PACKED = Call("chunk-packed", "kda_chunk_fwd", chunk, _packed)
CHUNK_GRAD = Call("chunk-grad", "kda_chunk_bwd", chunk_grad, _sequences)
CHUNK_GRAD_SAVED = Call("chunk-grad-saved", "kda_chunk_bwd", partial(chunk_grad, save_intermediates=True), _sequences)
DECODE = Call("decode", "kda_decode", decode, partial(_rows, "decode", "softplus"))
DECODE_MTP = Call("decode_mtp", "kda_decode_mtp", decode_mtp, partial(_rows, "draft", "lower_bound"))
DECODE_MTP_PAGED = Call("decode_mtp-paged", "kda_decode_mtp_paged", decode_mtp, _paged)
VERIFY = Call("verify", "kda_verify", verify, partial(_rows, "draft", "lower_bound"))
FLUSH = Call("flush", "kda_flush", kda.flush, _flush)

WITH_TOKENS = (DECODE, DECODE_MTP, DECODE_MTP_PAGED, VERIFY)
SERVING = (*WITH_TOKENS, FLUSH)
CALLS = (CHUNK, CHUNK_PACKED, CHUNK_GRAD, *SERVING)


def on_triton(call: Call) -> Call:
    """The call by name."""
    return dataclasses.replace(call, name=f"{call.name}-triton", run=partial(call.run, implementation="triton"))


def on_cute(call: Call) -> Call:
    """The call by name, with V = K whatever V is asked for: the kernels serve no other."""

    def draw(seed: int, **changes: Any) -> dict[str, Any]:
        return call.draw(seed, **changes | {"v_dim": changes["k_dim"]})

    return dataclasses.replace(call, name=f"{call.name}-cute", run=partial(call.run, implementation="cute"), draw=draw)


def over_calls(*calls: Call) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", calls or CALLS, ids=str)
