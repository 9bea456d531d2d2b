"""The arithmetic of the CuTe token kernels, a warp's lanes as the elements of NumPy arrays, against the oracle."""

import itertools

import numpy as np
import pytest

from kda_jax import _gates
from kda_jax._operands import L2NORM_EPS
from kda_jax.testing import cases, oracle

from .common import assert_close

pytest.importorskip("cutlass")

from kda_jax.kernels.cute import token

LANES = np.arange(32)
GATES = None, "softplus", "lower_bound"


@pytest.fixture(autouse=True)
def lanes(monkeypatch):
    """What the functions do to a lane's number, done to those of all."""
    monkeypatch.setattr(token, "select", np.where)
    monkeypatch.setattr(token, "shuffled", lambda x, offset: x[LANES ^ offset])
    monkeypatch.setattr(token, "from_lane", lambda x, lane: np.broadcast_to(x[lane], 32))
    monkeypatch.setattr(token, "Float32", np.float32)
    monkeypatch.setattr(token, "exp", np.exp)
    monkeypatch.setattr(token, "inverse", np.reciprocal)
    monkeypatch.setattr(token.cute.arch, "fmin", np.minimum)
    monkeypatch.setattr(token.cute.arch, "lane_idx", lambda: LANES)
    monkeypatch.setattr(token.cute, "math", type("math", (), {"log": np.log, "rsqrt": lambda x: 1 / np.sqrt(x)}))


def lanes_of(x):
    """[K] as K / 32 numbers of every lane."""
    return list(x.astype(np.float32).reshape(32, -1).T)


@pytest.mark.parametrize("count", [1, 2, 16, 32])
def test_sums_are_where_holder_says(count):
    """And have the same bits however many there are."""
    values = list(np.random.default_rng(count).standard_normal((count, 32)).astype(np.float32))
    found = token.sums(values, LANES)
    assert_close(found[[token.holder(j, count) for j in range(count)]], np.sum(values, axis=1, dtype=float), 1e-6)
    for j, x in enumerate(values):
        np.testing.assert_array_equal(token.sums([x], LANES), found[token.holder(j, count)])


@pytest.mark.parametrize(("gate", "k_dim"), itertools.product(GATES, (64, 128)))
@pytest.mark.parametrize("flags", [True, False])
def test_a_step_of_activated_tokens_is_the_oracle_s(gate, k_dim, flags):
    case = cases.Case(
        "step", batch=1, tokens=1, heads=1, value_heads=1, k_dim=k_dim, v_dim=8, gate=gate, qk_l2norm=flags,
        beta_sigmoid=flags, allow_neg_eigval=flags,
    )  # fmt: skip
    drawn = cases.draw(case, layout="chunk")
    q, k, v, g, beta = (np.asarray(x)[0, 0, 0] for x in drawn.arrays)
    state = np.asarray(drawn.state, np.float32)
    options = np.zeros(token.OPTIONS, np.float32)
    options[token.SCALE] = drawn.options.get("scale") or k_dim**-0.5
    options[token.LOWER_BOUND] = getattr(drawn.gate, "lower_bound", 0.0)
    options[token.L2NORM], options[token.L2NORM_EPS] = flags, L2NORM_EPS
    options[token.SIGMOID], options[token.BETA_RANGE] = flags, 2.0 if flags else 1.0
    options[token.LINEAR_ABOVE] = _gates.SOFTPLUS_LINEAR_ABOVE

    A_log, bias = (0.0, np.zeros(k_dim)) if gate is None else (drawn.gate.A_log[0], drawn.gate.dt_bias[0])
    log_decay = token.log_decays(lanes_of(g), np.float32(A_log), lanes_of(bias), options, gate or "none")
    b_q, b_k, b_beta, kq = token.activated(lanes_of(q), lanes_of(k), np.full(32, beta, np.float32), options)
    of_channels = [np.stack(x, axis=-1).reshape(k_dim).astype(float) for x in (b_q, b_k, log_decay)]
    b_q, b_k, decay = *of_channels[:2], np.exp(of_channels[2])
    assert_close(kq, np.full(32, b_q @ b_k), 1e-5)
    decayed = state[0, 0] * decay
    u = b_beta[0] * (v - decayed @ b_k)

    expected_o, expected = oracle.chunk(*drawn.arrays, **drawn.options, initial_state=state)
    assert_close(decayed + np.outer(u, b_k), expected[0, 0], 1e-5)
    assert_close(decayed @ b_q + u * kq[0], expected_o[0, 0, 0], 2e-5)
