"""Properties that hold for any input, on inputs that hypothesis draws; shapes come from few values, for few compilations."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

import kda_jax as kda
from kda_jax.testing import cases

from .common import FLAGS, arrays, assert_close, assert_equal, rows

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = 32
SEEDS = st.integers(0, 2**16)
GATES = st.sampled_from([None, "softplus", "lower_bound"])


def _draw(layout, seed, **changes):
    """The arrays by name, the gate among them, with the flags of the call."""
    case = cases.Case("drawn", k_dim=8, v_dim=8, value_heads=4, **changes)
    return arrays(case, layout, seed) | FLAGS


def _cut(drawn, begin, end):
    """Some of the tokens."""
    return {name: x[:, begin:end] if name in ("q", "k", "v", "g", "beta") else x for name, x in drawn.items()}


@functools.partial(jax.jit, static_argnames=("qk_l2norm", "beta_sigmoid", "chunk_size"))
def _chunk(**given):
    return kda.chunk(**given)


@given(seed=SEEDS, gate=GATES, parts=st.sampled_from([(1, 15, 16), (16, 1, 15), (15, 1, 16), (16, 16)]))
def test_a_sequence_may_be_split_anywhere(seed, gate, parts):
    """Carrying the state from part to part gives the whole."""
    drawn = _draw("chunk", seed, tokens=TOKENS, gate=gate)
    outputs, begin, rest = [], 0, drawn
    for part in parts:
        o, state = _chunk(**_cut(rest, begin, begin + part))
        outputs.append(o)
        begin, rest = begin + part, rest | {"initial_state": state}
    assert_close((jnp.concatenate(outputs, axis=1), state), _chunk(**drawn), 1e-5)


@given(seed=SEEDS, gate=GATES, accepted=st.integers(0, 4))
def test_verify_then_flush_is_that_many_decode_steps(seed, gate, accepted):
    drawn = _draw("draft", seed, tokens=4, gate=gate)
    o, update = kda.verify(**drawn)
    state = drawn["state"]
    for t in range(accepted):
        token = {name: x[:, 0] if name in ("q", "k", "v", "g", "beta") else x for name, x in _cut(drawn, t, t + 1).items()}
        o_t, state = kda.decode(**token | {"state": state})
        assert_close(o[:, t], o_t, 1e-5)
    assert_close(kda.flush(drawn["state"], update, accepted), state, 1e-5)


@given(seed=SEEDS, order=st.permutations(range(5)), operation=st.sampled_from([kda.decode, kda.decode_mtp, kda.chunk]))
def test_permuting_the_batch_permutes_the_results(seed, order, operation):
    """Bit for bit."""
    layout = {kda.decode: "decode", kda.decode_mtp: "draft", kda.chunk: "chunk"}[operation]
    drawn = _draw(layout, seed, batch=5, tokens=4)
    order = np.asarray(order)
    permuted = {name: x[order] if isinstance(x, jax.Array) else x for name, x in drawn.items()}
    assert_equal(operation(**permuted), rows(operation(**drawn), order))


@given(seed=SEEDS)
def test_a_gate_constant_over_channels_is_the_gated_delta_rule(seed):
    """GDN, whose decay is one number a head: S = exp(g) S (I - beta k k^T) + beta v k^T, token by token."""
    drawn = _draw("chunk", seed, tokens=TOKENS, gate=None) | {"qk_l2norm": False, "beta_sigmoid": False}
    drawn["beta"], drawn["k"] = jax.nn.sigmoid(drawn["beta"]), drawn["k"] / 4
    g = np.float64(drawn["g"][..., :1])
    drawn["g"] = jnp.broadcast_to(drawn["g"][..., :1], drawn["g"].shape)
    q, k, v, beta, state = (np.float64(drawn[name]) for name in ("q", "k", "v", "beta", "initial_state"))
    q, k = (np.repeat(x, 2, axis=2)[..., None] for x in (q, k))  # columns
    outputs = []
    for t in range(TOKENS):
        b, kt = beta[:, t, :, None, None], k[:, t]
        erase = np.eye(8) - b * kt @ np.swapaxes(kt, -1, -2)
        state = np.exp(g[:, t, ..., None]) * state @ erase + b * v[:, t, ..., None] @ np.swapaxes(kt, -1, -2)
        outputs.append(8**-0.5 * (state @ q[:, t])[..., 0])
    assert_close(_chunk(**drawn), (np.stack(outputs, axis=1), state), 1e-5)


@given(seed=SEEDS, gate=GATES, lengths=st.sampled_from([(8, 8, 16), (0, 16, 16), (8, 8, 0), (32, 0, 0), (16, 0, 8)]))
def test_packed_sequences_are_separate_calls(seed, gate, lengths):
    drawn = _draw("chunk", seed, batch=1, tokens=TOKENS, gate=gate, cu_seqlens=(0, 0, 0, 0))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    o, states = _chunk(**drawn, cu_seqlens=jnp.asarray(offsets), chunk_size=16)
    for n, (begin, end) in enumerate(itertools.pairwise(offsets)):
        start = drawn["initial_state"][n : n + 1]
        if begin == end:
            assert_equal(states[n : n + 1], start)
            continue
        alone = _chunk(**_cut(drawn, begin, end) | {"initial_state": start})
        assert_close((o[:, begin:end], states[n : n + 1]), alone, 1e-5)
    assert not o[:, offsets[-1] :].any()


@given(seed=SEEDS, padded=st.lists(st.booleans(), min_size=5, max_size=5), outside=st.sampled_from([-1, -7, 8, 10**6]))
def test_padded_rows_touch_nothing(seed, padded, outside):
    """Their outputs are zero; every slot that no live row names stays bit for bit."""
    drawn = _draw("draft", seed, batch=5, tokens=2, pool_size=8)
    padded = np.asarray(padded)
    slots = np.random.default_rng(seed).permutation(8)[:5]
    slots = np.where(padded, outside, slots)
    untouched = np.setdiff1d(np.arange(8), slots)
    pool = drawn["state"]
    first = {name: x[:, 0] if name in ("q", "k", "v", "g", "beta") else x for name, x in drawn.items()}
    o, decoded = kda.decode(**first, state_indices=slots)
    _, update = kda.verify(**drawn, state_indices=slots)
    flushed = kda.flush(pool, update, 2, state_indices=slots)
    for out in (o, *jax.tree.leaves(update), kda.decode_mtp(**drawn, state_indices=slots)[1]):
        assert not out[padded].any()
        assert out[~padded].any(axis=tuple(range(1, out.ndim))).all()
    for written in (decoded, flushed):
        assert_equal(written[untouched], pool[untouched])
        assert (written[slots[~padded]] != pool[slots[~padded]]).any(axis=(1, 2, 3)).all()
