"""Every Triton kernel's body, run on CPU by Triton's interpreter, against the oracle; guarded memory shows stray writes."""

import dataclasses
import os

import numpy as np
import pytest

from kda_jax._operands import FlushOperands, FlushSpec, PagedOperands, Spec, VerifySpec
from kda_jax.testing import oracle
from kda_jax.testing.cases import Case

from .common import assert_close, assert_equal, check, drawn_operands

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled in this process; tests/test_gpu.py runs them", allow_module_level=True)

from kda_jax.triton import decode as decode_calls
from kda_jax.triton import flush as flush_calls
from kda_jax.triton import verify as verify_calls

from . import interpreter


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    with interpreter.installed(monkeypatch, decode_calls, verify_calls, flush_calls):
        yield


SMALL = Case("softplus", batch=3, heads=1, value_heads=2, k_dim=64, v_dim=64, pool_size=5)
SLOTS = np.asarray([3, -1, 2], np.int32)


def variants(**changes):
    """The options and dtypes, each at least once, on a small shape."""
    some = {
        "softplus": {},
        "no-bias": {"dt_bias": False, "heads": 2},
        "lower-bound": {"gate": "lower_bound", "dtype": "bfloat16"},
        "log-decay": {"gate": None, "state_dtype": "bfloat16"},
        "raw": {"gate": None, "qk_l2norm": False, "beta_sigmoid": False, "dtype": "float16"},
        "neg-eigval": {"allow_neg_eigval": True, "scale": 0.5},
        "k-128": {"k_dim": 128, "batch": 1, "gate": "lower_bound"},
        "v-128": {"v_dim": 128, "batch": 1, "state_dtype": "bfloat16", "dtype": "bfloat16"},
        "g-minus-200": {"gate": None, "g_value": -200.0},
        "g-zero": {"gate": None, "g_value": 0.0},
    }
    made = [dataclasses.replace(SMALL, name=name, **(changes | options)) for name, options in some.items()]
    return pytest.mark.parametrize("case", made, ids=str)


@variants()
def test_decode(case):
    operands, spec, arrays, options, limits = drawn_operands(case, "decode", SLOTS)
    check(decode_calls.decode(operands, Spec(**spec)), oracle.decode(*arrays, **options), limits)


@variants(tokens=3)
def test_decode_mtp(case):
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", SLOTS)
    results = decode_calls.decode_mtp(operands, Spec(**spec))
    check(results, oracle.decode_mtp(*arrays, **options), limits)
    state = operands.state
    for t in range(3):  # strict: as three calls of decode, bit for bit
        token = operands._replace(**{name: getattr(operands, name)[:, t] for name in ("q", "k", "v", "g", "beta")})
        o, state = decode_calls.decode(token._replace(state=state), Spec(**spec))
        assert_equal(o, results[0][:, t])
        live = SLOTS[: case.batch] >= 0
        assert_equal(state[SLOTS[: case.batch][live]], results[1][live, t])


@variants(tokens=2, pool_size=7)
def test_decode_mtp_paged(case):
    slots = np.asarray([[6, 0], [2, -1], [-7, 4]], np.int32)  # the second row keeps one state, the last is padding
    accepted = np.asarray([2, 1, 1], np.int32)
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", slots)
    paged = PagedOperands(*operands, accepted[: case.batch])
    results = decode_calls.decode_mtp_paged(paged, Spec(**spec))
    check(results, oracle.decode_mtp(*arrays, **options, num_accepted=accepted[: case.batch]), limits)
    for count in (0, 3):  # outside 1 to T: padding
        o, state = decode_calls.decode_mtp_paged(
            paged._replace(num_accepted=np.full(case.batch, count, np.int32)), Spec(**spec)
        )
        assert not o.any()
        assert_equal(state, operands.state)


@pytest.mark.parametrize("tokens", [1, 2, 4])
@variants()
def test_verify_and_flush(case, tokens):
    """Both forms of verify: which T takes which depends on the pool's dtype."""
    case = dataclasses.replace(case, tokens=tokens)
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", SLOTS)
    o, *update = verify_calls.verify(operands, VerifySpec(**spec, with_update=True))
    (alone,) = verify_calls.verify(operands, VerifySpec(**spec, with_update=False))
    assert_equal(alone, o)
    padded = SLOTS[: case.batch] < 0
    assert not any(x[padded].any() for x in (o, *update))
    accepted = np.asarray([tokens, 1, tokens // 2], np.int32)[: case.batch]
    (state,) = flush_calls.flush(FlushOperands(*update, operands.state, operands.state_indices, accepted), FlushSpec(None))
    reference = oracle.verify(*arrays, **options), oracle.verify_flush(*arrays, accepted, **options)
    check((o, state), reference, limits)


@pytest.mark.parametrize("tokens", [6, 16])
def test_verify_of_many_tokens(tokens):
    case = dataclasses.replace(SMALL, batch=1, tokens=tokens, heads=1, value_heads=1)
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", SLOTS)
    o, *update = verify_calls.verify(operands, VerifySpec(**spec, with_update=True))
    assert_close(np.asarray(o, np.float64), oracle.verify(*arrays, **options), limits.output)
    for m in range(0, tokens + 1, 5):
        flushed = FlushOperands(*update, operands.state, operands.state_indices, np.asarray([m], np.int32))
        (state,) = flush_calls.flush(flushed, FlushSpec(None))
        assert_close(state, oracle.verify_flush(*arrays, [m], **options), limits.state)
        if m == 0:
            assert_equal(state, operands.state)


@pytest.mark.parametrize("slots", [(-1, -5, 1 << 30), (2**31 - 1, -(2**31), 5), None], ids=str)
def test_padding_touches_nothing(slots):
    """Rows outside the pool, however far; and without indices row n is slot n."""
    slots = None if slots is None else np.asarray(slots, np.int32)
    case = dataclasses.replace(SMALL, tokens=2, pool_size=5 if slots is not None else None)
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", slots)
    o, *update = verify_calls.verify(operands, VerifySpec(**spec, with_update=True))
    accepted = np.asarray([2, 1, 2], np.int32)
    (state,) = flush_calls.flush(FlushOperands(*update, operands.state, slots, accepted), FlushSpec(None))
    first = operands._replace(**{name: getattr(operands, name)[:, 0] for name in ("q", "k", "v", "g", "beta")})
    one, pool = decode_calls.decode(first, Spec(**spec))
    if slots is None:
        check((o, state), (oracle.verify(*arrays, **options), oracle.verify_flush(*arrays, accepted, **options)), limits)
    else:
        assert not o.any()
        assert not one.any()
        assert_equal(state, operands.state)
        assert_equal(pool, operands.state)


def test_gate_parameters_of_each_row():
    """As they are once vmapped: [N, HV] and [N, HV, K], each on its own."""
    operands, spec, *_ = drawn_operands(SMALL, "decode", np.asarray([0, 1, 2], np.int32))
    o, state = decode_calls.decode(operands, Spec(**spec))
    rows = operands._replace(A_log=np.stack([operands.A_log] * 3), dt_bias=np.stack([operands.dt_bias] * 3))
    assert_equal(decode_calls.decode(rows, Spec(**spec)), (o, state))
    rows.A_log[1] += 1
    rows.dt_bias[2] -= 1
    changed, _ = decode_calls.decode(rows, Spec(**spec))
    assert [bool((changed[n] == o[n]).all()) for n in range(3)] == [True, False, False]
    mixed = rows._replace(dt_bias=operands.dt_bias)
    assert_equal(decode_calls.decode(mixed, Spec(**spec))[0][:2], changed[:2])
