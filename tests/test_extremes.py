"""Hostile gates and long sequences: finite always, and right where the numbers have any meaning."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kda_jax as kda
from kda_jax.testing import cases, oracle

from .common import FLAGS, assert_close

CASE = cases.Case("extreme", batch=1, tokens=100, gate=None)


def _constant(value):
    return lambda g: np.full_like(g, value)


def _mixed(huge, small):
    """Channels and tokens that forget everything next to ones that forget next to nothing."""
    return lambda g: np.where(np.random.default_rng(1).random(g.shape) < 0.2, huge, small).astype(g.dtype)


LOG_DECAYS = {
    "zero": _constant(0.0),
    "minus-200": _constant(-200.0),
    "mixed": _mixed(-1e4, -1e-3),
    "lowest": _constant(-3e38),
    "lowest-mixed": _mixed(-3e38, -1e-3),
}
RAW_INPUTS = {
    "plus-200": _constant(200.0),
    "minus-200": _constant(-200.0),
    "10000": _constant(1e4),
    "both": _mixed(200.0, -200.0),
}
HOSTILE = [
    *(pytest.param(None, make, id=f"log-decay-{name}") for name, make in LOG_DECAYS.items()),
    *(pytest.param("softplus", make, id=f"softplus-{name}") for name, make in RAW_INPUTS.items()),
    *(pytest.param("lower_bound", make, id=f"lower-bound-{name}") for name, make in RAW_INPUTS.items()),
]


def _draw(kind, make, layout):
    drawn = cases.draw(CASE, layout=layout)
    q, k, v, g, beta = drawn.arrays
    A_log = np.asarray([-0.5, 0.5], np.float32)
    gate = {None: None, "softplus": kda.Softplus(A_log), "lower_bound": kda.LowerBound(A_log)}[kind]
    return (q, k, v, make(g), beta), drawn.state, FLAGS | {"gate": gate}


@pytest.mark.parametrize(("kind", "make"), HOSTILE)
def test_chunk_and_its_gradients(kind, make):
    tokens, state, options = _draw(kind, make, "chunk")

    def run(tokens, state, gate):
        return kda.chunk(*tokens, **options | {"gate": gate}, initial_state=state)

    out, pull = jax.vjp(run, tokens, state, options["gate"])
    assert_close(out, oracle.chunk(*tokens, **options, initial_state=state), 1e-5)
    cotangents = jax.tree.map(jnp.ones_like, out)
    grads, dstate, dgate = pull(cotangents)
    grads = dict(zip(("q", "k", "v", "g", "beta"), grads, strict=True)) | {"initial_state": dstate}
    if dgate is not None:
        grads["A_log"] = dgate.A_log
    reference = oracle.chunk_grad(*tokens, *cotangents, **options, initial_state=state)
    assert_close(grads, {name: reference[name] for name in grads}, 1e-4)


@pytest.mark.parametrize(("kind", "make"), HOSTILE)
def test_verify_and_flush(kind, make):
    tokens, state, options = _draw(kind, make, "draft")
    tokens = tuple(x[:, :8] for x in tokens)
    o, update = kda.verify(*tokens, state, **options)
    assert_close(o, oracle.verify(*tokens, state, **options), 1e-5)
    for accepted in (3, 8):
        flushed = kda.flush(state, update, accepted)
        assert_close(flushed, oracle.verify_flush(*tokens, state, accepted, **options), 1e-5)


@pytest.mark.parametrize(("kind", "make"), HOSTILE)
def test_decode_mtp(kind, make):
    tokens, state, options = _draw(kind, make, "draft")
    tokens = tuple(x[:, :8] for x in tokens)
    assert_close(kda.decode_mtp(*tokens, state, **options), oracle.decode_mtp(*tokens, state, **options), 1e-5)


LONG = cases.Case("long", batch=1, tokens=32_768, heads=1, value_heads=1, gate=None)


def _saturated(g):
    return np.full_like(g, 50.0), kda.LowerBound(np.zeros(1, np.float32), None, -5.0)


def _slow(g):
    return np.full_like(g, -1e-3), None


@pytest.mark.parametrize("make", [_saturated, _slow])
def test_long_sequence(make):
    """32,768 tokens: no drift, whether everything is forgotten at once or hardly at all."""
    drawn = cases.draw(LONG, layout="chunk")
    q, k, v, g, beta = drawn.arrays
    g, gate = make(g)
    tokens, options = (q, k, v, g, beta), FLAGS | {"gate": gate, "initial_state": drawn.state}
    out, pull = jax.vjp(lambda *tokens: kda.chunk(*tokens, **options), *tokens)
    assert_close(out, oracle.chunk(*tokens, **options), 1e-5)
    cotangents = jax.tree.map(jnp.ones_like, out)
    reference = oracle.chunk_grad(*tokens, *cotangents, **options)
    for name, grad in zip(("q", "k", "v", "g", "beta"), pull(cotangents), strict=True):
        assert_close(grad, reference[name], 1e-4)


def test_long_decode():
    """2,048 decode steps in a scan stay within the tolerance of one."""
    drawn = cases.draw(cases.Case("steps", tokens=2048, value_heads=4, gate=None), layout="chunk")
    q, k, v, g, beta = drawn.arrays
    tokens = q, k, v, g / 100, beta

    def step(state, token):
        o, state = kda.decode(*token, state, **FLAGS)
        return state, o

    state, o = jax.lax.scan(step, jnp.asarray(drawn.state), tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    assert_close((jnp.moveaxis(o, 0, 1), state), oracle.chunk(*tokens, **FLAGS, initial_state=drawn.state), 1e-5)
