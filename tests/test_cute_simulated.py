"""Every CuTe kernel's body, run on the CPU thread by thread, against the oracle, by the callers that a GPU has."""

import dataclasses

import numpy as np
import pytest

from kda_jax._operands import FlushOperands, FlushSpec, PagedOperands, Spec, VerifySpec
from kda_jax.cute import decode as decode_calls
from kda_jax.cute import flush as flush_calls
from kda_jax.cute import verify as verify_calls
from kda_jax.testing import oracle
from kda_jax.testing.cases import Case

from .common import assert_equal, check, drawn_operands

pytest.importorskip("greenlet")

from . import simt

SMALL = Case(
    "softplus", batch=2, heads=1, value_heads=2, k_dim=64, v_dim=64, pool_size=4, dtype="bfloat16", state_dtype="float32"
)
SLOTS = np.asarray([3, -1, 0], np.int32)


@pytest.fixture(autouse=True)
def simulated(monkeypatch):
    for caller in (decode_calls, verify_calls, flush_calls):
        monkeypatch.setattr(caller, "call", simt.call)


def variants(*names, **changes):
    """The options and dtypes, each at least once, on a small shape; or those of some names."""
    some = {
        "softplus": {},
        "lower-bound": {"gate": "lower_bound", "state_dtype": "bfloat16"},
        "raw": {"gate": None, "qk_l2norm": False, "beta_sigmoid": False, "dtype": "float16"},
        "neg-eigval": {"allow_neg_eigval": True, "scale": 0.5, "dt_bias": False, "dtype": "float32", "batch": 1},
        "128": {"k_dim": 128, "v_dim": 128, "batch": 1, "gate": "lower_bound"},
        "128-bf16": {"k_dim": 128, "v_dim": 128, "batch": 1, "value_heads": 3, "state_dtype": "bfloat16"},
        "g-minus-200": {"gate": None, "g_value": -200.0, "batch": 1},
        "g-zero": {"gate": None, "g_value": 0.0, "batch": 1},
    }
    made = [dataclasses.replace(SMALL, name=name, **(changes | some[name])) for name in names or some]
    return pytest.mark.parametrize("case", made, ids=str)


@variants()
def test_decode(case):
    operands, spec, arrays, options, limits = drawn_operands(case, "decode", SLOTS)
    check(decode_calls.decode(operands, Spec(**spec)), oracle.decode(*arrays, **options), limits)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
def test_decode_mtp(state_dtype):
    """Strict: bit for bit as calls of decode."""
    case = dataclasses.replace(SMALL, tokens=3, state_dtype=state_dtype)
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", SLOTS)
    results = decode_calls.decode_mtp(operands, Spec(**spec))
    check(results, oracle.decode_mtp(*arrays, **options), limits)
    state = operands.state
    for t in range(3):
        token = operands._replace(**{name: getattr(operands, name)[:, t] for name in ("q", "k", "v", "g", "beta")})
        o, state = decode_calls.decode(token._replace(state=state), Spec(**spec))
        assert_equal(o, results[0][:, t])
        assert_equal(state[SLOTS[0]], results[1][0, t])


def test_decode_mtp_paged():
    slots = np.asarray([[3, 0], [2, -1], [-7, 1]], np.int32)  # the second row keeps one state, the last is padding
    accepted = np.asarray([2, 1, 1], np.int32)
    case = dataclasses.replace(SMALL, batch=3, tokens=2)
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", slots)
    results = decode_calls.decode_mtp_paged(PagedOperands(*operands, accepted), Spec(**spec))
    check(results, oracle.decode_mtp(*arrays, **options, num_accepted=accepted), limits)
    outside = np.asarray([0, 3, -1], np.int32)
    o, state = decode_calls.decode_mtp_paged(PagedOperands(*operands, outside), Spec(**spec))
    assert not o.any()
    assert_equal(state, operands.state)


def check_verify_and_flush(case, slots=SLOTS):
    operands, spec, arrays, options, limits = drawn_operands(case, "draft", slots)
    o, *update = verify_calls.verify(operands, VerifySpec(**spec, with_update=True))
    assert_equal(verify_calls.verify(operands, VerifySpec(**spec, with_update=False)), (o,))
    padded = np.zeros(case.batch, bool) if slots is None else slots[: case.batch] < 0
    assert not any(x[padded].any() for x in (o, *update))
    accepted = np.asarray([case.tokens, 1, 0], np.int32)[: case.batch]
    flushed = FlushOperands(*update, operands.state, operands.state_indices, accepted)
    (state,) = flush_calls.flush(flushed, FlushSpec(None))
    check((o, state), (oracle.verify(*arrays, **options), oracle.verify_flush(*arrays, accepted, **options)), limits)


@variants(tokens=3)
def test_verify_and_flush(case):
    check_verify_and_flush(case)


@variants("neg-eigval", "128-bf16", "g-minus-200", "g-zero", tokens=13)
def test_verify_and_flush_of_two_eights(case):
    check_verify_and_flush(dataclasses.replace(case, batch=1))


@pytest.mark.parametrize("tokens", [1, 8, 9, 16])
def test_verify_of_so_many_tokens(tokens):
    """Eight are what verify has in one product and flush at once; and without indices row n is slot n."""
    case = dataclasses.replace(SMALL, batch=1, value_heads=1, pool_size=None, tokens=tokens)
    check_verify_and_flush(case, None)


@pytest.mark.parametrize(("tokens", "dim", "update"), [(3, 64, True), (9, 64, True), (5, 128, False)])
def test_verify_of_several_heads_to_a_program(monkeypatch, tokens, dim, update):
    """What is done with one head while the next one is under way; and of the last case fewer warps have more rows each."""
    case = dataclasses.replace(SMALL, batch=3, tokens=tokens, k_dim=dim, v_dim=dim, state_dtype="bfloat16")
    operands, spec, *_ = drawn_operands(case, "draft", np.asarray([1, 5, 0], np.int32))
    spec = VerifySpec(**spec, with_update=update)
    alone = verify_calls.verify(operands, spec)
    source = simt.module("verify")
    monkeypatch.setattr(source, "at_once", lambda *choices: 1)
    monkeypatch.setattr(source, "multiprocessors", lambda: 1)
    assert_equal(verify_calls.verify(operands, spec), alone)


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
def test_flush_of_many_heads(monkeypatch, state_dtype):
    """In programs of as many rows as on a GPU that is full of them; those of few heads have half as many: the same bits."""
    case = dataclasses.replace(SMALL, tokens=6, state_dtype=state_dtype)
    operands, spec, *_ = drawn_operands(case, "draft", SLOTS)
    _, *update = verify_calls.verify(operands, VerifySpec(**spec, with_update=True))
    flushed = FlushOperands(*update, operands.state, operands.state_indices, np.asarray([5, 6], np.int32))
    few = flush_calls.flush(flushed, FlushSpec(None))
    monkeypatch.setattr(simt.module("flush"), "multiprocessors", lambda: 0)
    assert_equal(flush_calls.flush(flushed, FlushSpec(None)), few)


@pytest.mark.parametrize("tokens", [4, 9])
def test_flush_does_not_read_what_was_not_accepted(tokens):
    """Tokens behind the accepted ones change no bit, whatever they hold and however many they are."""
    case = dataclasses.replace(SMALL, tokens=3, value_heads=1, state_dtype="bfloat16")
    operands, spec, *_ = drawn_operands(case, "draft", SLOTS)
    _, *update = verify_calls.verify(operands, VerifySpec(**spec, with_update=True))
    accepted = np.asarray([3, 0], np.int32)
    more = [np.concatenate([x, np.full((x.shape[0], tokens - 3, *x.shape[2:]), np.nan, x.dtype)], 1) for x in update]
    states = [
        flush_calls.flush(FlushOperands(*given, operands.state, operands.state_indices, accepted), FlushSpec(None))
        for given in (update, more)
    ]
    assert_equal(*states)


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
def test_numbers_taken_in_pairs_have_the_same_bits(monkeypatch, state_dtype):
    """As decode and flush take them on Blackwell."""
    case = dataclasses.replace(SMALL, batch=1, value_heads=1, tokens=2, state_dtype=state_dtype)
    operands, spec, *_ = drawn_operands(case, "decode", SLOTS)
    rng = np.random.default_rng(0)
    u, k, g = rng.standard_normal((3, 1, 2, 1, 64), np.float32)
    flushed = FlushOperands(u, k, -abs(g), operands.state, operands.state_indices, np.asarray([2], np.int32))

    def results(arch):
        monkeypatch.setenv("CUTE_DSL_ARCH", arch)
        return decode_calls.decode(operands, Spec(**spec)), flush_calls.flush(flushed, FlushSpec(None))

    assert_equal(results("sm_100a"), results("sm_90a"))


def test_gate_parameters_of_each_row():
    """As they are once vmapped: [N, HV] and [N, HV, K], each on its own."""
    operands, spec, *_ = drawn_operands(SMALL, "decode", np.asarray([0, 1], np.int32))
    o, state = decode_calls.decode(operands, Spec(**spec))
    rows = operands._replace(A_log=np.stack([operands.A_log] * 2), dt_bias=np.stack([operands.dt_bias] * 2))
    assert_equal(decode_calls.decode(rows, Spec(**spec)), (o, state))
    rows.A_log[1] += 1
    changed, _ = decode_calls.decode(rows, Spec(**spec))
    assert [bool((changed[n] == o[n]).all()) for n in range(2)] == [True, False]


def test_threads_that_wait_for_ever_are_found(monkeypatch):
    """So that a kernel that hangs a GPU fails here."""
    monkeypatch.setattr(simt.module("draft"), "SOLVE_DONE", 14)  # a barrier at which nobody waits
    operands, spec, *_ = drawn_operands(SMALL, "draft", SLOTS)
    with pytest.raises(AssertionError, match="wait for ever"):
        verify_calls.verify(operands, VerifySpec(**spec, with_update=False))
