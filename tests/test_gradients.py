"""The derivative of kda.chunk against the oracle's and against finite differences, and the errors of what has none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kda_jax as kda
from kda_jax.testing import cases, oracle, tolerance

from .common import (
    CHUNK,
    CHUNK_GRAD,
    CHUNK_GRAD_SAVED,
    DECODE,
    DECODE_MTP,
    DECODE_MTP_PAGED,
    FLUSH,
    VERIFY,
    Call,
    assert_close,
    assert_equal,
    over,
    over_calls,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def _draw(case):
    """What chunk is differentiated in, by name, and its other options."""
    drawn = cases.draw(case, layout="chunk")
    wrt = dict(zip(("q", "k", "v", "g", "beta"), drawn.arrays, strict=True))
    if drawn.state is not None:
        wrt["initial_state"] = drawn.state
    gate = drawn.options.pop("gate")
    if gate is not None:
        wrt |= {"A_log": gate.A_log} | ({} if gate.dt_bias is None else {"dt_bias": gate.dt_bias})
    return wrt, gate, drawn.options | {"cu_seqlens": case.cu_seqlens, "chunk_size": case.chunk_size}


def _function(chunk, gate, options):
    """``chunk`` of a dict of everything that it is differentiable in."""

    def run(wrt):
        wrt = dict(wrt)
        parameters = {name: wrt.pop(name) for name in ("A_log", "dt_bias") if name in wrt}
        bound = {"lower_bound": gate.lower_bound} if isinstance(gate, kda.LowerBound) else {}
        return chunk(**wrt, **options, gate=type(gate)(**parameters, **bound) if gate is not None else None)

    return run


def _cotangents(out, seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), out)


def _oracle_grad(wrt, gate, options, cotangents):
    tokens = [wrt[name] for name in ("q", "k", "v", "g", "beta")]
    options = options | {"gate": gate, "initial_state": wrt.get("initial_state")}
    grads = oracle.chunk_grad(*tokens, *cotangents, **options)
    return {name: grads[name] for name in wrt}


CASES = over(
    cases.CHUNK_CASES,
    *("softplus", "lower-bound", "log-decay", "raw", "neg-eigval", "gva-rectangular", "bf16", "fp16", "g-minus-200"),
    *("one-token", "small-chunks", "no-initial-state", "packed-empty", "packed-tail"),
)


@CASES
def test_chunk_grad(case):
    wrt, gate, options = _draw(case)
    out, pull = jax.vjp(_function(kda.chunk, gate, options), wrt)
    cotangents = _cotangents(out)
    (grads,) = pull(cotangents)
    assert {name: x.dtype for name, x in grads.items()} == {name: x.dtype for name, x in wrt.items()}
    assert_close(grads, _oracle_grad(wrt, gate, options, cotangents), tolerance(case.dtype).gradient)


@pytest.mark.parametrize("used", [0, 1], ids=["o", "state"])
@over(cases.CHUNK_CASES, "softplus")
def test_cotangent_of_one_output(case, used):
    wrt, gate, options = _draw(case)
    run = _function(kda.chunk, gate, options)
    out = jax.eval_shape(run, wrt)
    cotangents = [c if i == used else np.zeros_like(c) for i, c in enumerate(_cotangents(out))]
    grads = jax.grad(lambda wrt: jnp.sum(run(wrt)[used] * cotangents[used]))(wrt)
    assert_close(grads, _oracle_grad(wrt, gate, options, cotangents), tolerance(case.dtype).gradient)


@over(cases.CHUNK_CASES, "softplus", "lower-bound", "raw", "neg-eigval", "gva", "packed-empty")
def test_finite_differences(case):
    """Central differences of the float64 oracle along a random direction in each argument: for the oracle's derivative,
    and for the library's."""
    wrt, gate, options = _draw(case)
    wrt = {name: np.asarray(x, np.float64) for name, x in wrt.items()}
    reference = _function(oracle.chunk, gate, options)
    cotangents = _cotangents(reference(wrt))
    by_oracle = _oracle_grad(wrt, gate, options, cotangents)
    float32 = jax.tree.map(np.float32, (wrt, cotangents))
    _, pull = jax.vjp(_function(kda.chunk, gate, options), float32[0])
    (by_library,) = pull(float32[1])

    def scalar(name, x):
        return sum(np.vdot(out, cotangent) for out, cotangent in zip(reference(wrt | {name: x}), cotangents, strict=True))

    rng = np.random.default_rng(2)
    for name, x in wrt.items():
        # Mostly along the gradient, so that the slope is not a small difference of large terms.
        direction = by_oracle[name] / np.linalg.norm(by_oracle[name])
        direction = direction + rng.standard_normal(x.shape) / np.sqrt(x.size)
        step = 1e-5
        slope = (scalar(name, x + step * direction) - scalar(name, x - step * direction)) / (2 * step)
        np.testing.assert_allclose(np.vdot(by_oracle[name], direction), slope, rtol=1e-6, err_msg=name)
        np.testing.assert_allclose(np.vdot(np.float64(by_library[name]), direction), slope, rtol=1e-4, err_msg=name)


def test_padding_behind_packed_sequences_has_zero_gradient():
    """Whatever it holds: it reaches no output and no gradient either."""
    case = next(case for case in cases.CHUNK_CASES if case.name == "packed-tail")
    wrt, gate, options = _draw(case)
    end = case.cu_seqlens[-1]

    def run(wrt):
        out, pull = jax.vjp(_function(kda.chunk, gate, options), wrt)
        return out, pull(_cotangents(out))[0]

    out, grads = run(wrt)
    for name in ("q", "k", "v", "g", "beta"):
        assert not grads[name][:, end:].any(), name
        assert grads[name][:, :end].any(), name
    assert not out[0][:, end:].any()
    filled = {name: np.array(wrt[name]) for name in ("q", "k", "v", "g", "beta")}
    for x in filled.values():
        x[:, end:] = np.nan
    assert_equal(run(wrt | filled), (out, grads))


def test_remat():
    """Under jax.checkpoint the forward pass runs again in the backward pass; the gradient is the same."""
    arrays = CHUNK.draw(0)

    def loss(arrays, run):
        o, state = run(arrays)
        return jnp.sum(o * o) + jnp.sum(jnp.sin(state))

    assert_close(jax.grad(loss)(arrays, jax.checkpoint(CHUNK)), CHUNK_GRAD(arrays), 1e-6)


def test_saved_intermediates_change_nothing():
    """With xla, whose backward pass has no use for them, to the bit."""
    arrays = CHUNK.draw(0)
    assert_equal(CHUNK_GRAD_SAVED(arrays), CHUNK_GRAD(arrays))


ONCE = r"kda\.chunk: .*first reverse-mode derivative only"


def _total(tree):
    return sum(jnp.sum(x) for x in jax.tree.leaves(tree))


def test_second_derivative_raises():
    arrays = CHUNK.draw(0)
    with pytest.raises(NotImplementedError, match=ONCE):
        jax.grad(lambda arrays: _total(CHUNK_GRAD(arrays)))(arrays)
    with pytest.raises(NotImplementedError, match=ONCE):
        jax.jvp(CHUNK_GRAD, (arrays,), (arrays,))
    with pytest.raises(NotImplementedError, match=ONCE):
        jax.hessian(lambda v: _total(CHUNK(arrays | {"v": v})))(arrays["v"])


def test_forward_mode_raises():
    """JAX itself refuses forward mode through a custom_vjp."""
    arrays = CHUNK.draw(0)
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(CHUNK, (arrays,), (arrays,))


@over_calls(DECODE, DECODE_MTP, DECODE_MTP_PAGED, VERIFY, FLUSH)
def test_serving_operations_name_chunk(call: Call):
    arrays = call.draw(0)
    with pytest.raises(NotImplementedError, match=r"kda\..*train with kda\.chunk"):
        jax.grad(lambda state: _total(call(arrays | {"state": state})))(arrays["state"])
