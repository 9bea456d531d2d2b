"""Every operation over all of its shared cases against the float64 oracle, and the forms that must agree with each other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kda_jax as kda
from kda_jax.testing import cases, oracle, tolerance

from .common import CHUNK, DECODE, FLUSH, VERIFY, Call, assert_close, assert_equal, over, over_calls, rows, stack


def draw(case, layout):
    """q, k, v, g, beta, the state, the options and the tolerance of a case."""
    drawn = cases.draw(case, layout=layout)
    return drawn.arrays, drawn.state, drawn.options, tolerance(case.dtype, case.state_dtype)


def check(results, reference, limits, dtypes):
    """An output and a state against the oracle's, in the dtypes promised."""
    assert [str(x.dtype) for x in results] == list(dtypes)
    for x, y, limit in zip(results, reference, (limits.output, limits.state), strict=True):
        assert_close(x, y, limit)


@over(cases.CHUNK_CASES)
def test_chunk(case):
    tokens, state, options, limits = draw(case, "chunk")
    options |= {"initial_state": state, "cu_seqlens": case.cu_seqlens}
    results = kda.chunk(*tokens, **options, chunk_size=case.chunk_size)
    check(results, oracle.chunk(*tokens, **options), limits, (case.dtype, case.state_dtype))


@over(cases.DECODE_CASES)
def test_decode(case):
    tokens, state, options, limits = draw(case, "decode")
    options |= {"state_indices": case.slots}
    results = kda.decode(*tokens, state, **options)
    check(results, oracle.decode(*tokens, state, **options), limits, (case.dtype, case.state_dtype))


@over(cases.DRAFT_CASES)
def test_decode_mtp(case):
    tokens, state, options, limits = draw(case, "draft")
    options |= {"state_indices": case.slots}
    results = kda.decode_mtp(*tokens, state, **options)
    check(results, oracle.decode_mtp(*tokens, state, **options), limits, (case.dtype, case.state_dtype))


@over(cases.DRAFT_CASES)
def test_decode_mtp_paged(case):
    """Slots in random order, every number of accepted tokens, one write slot outside; what is read may be written."""
    rng = np.random.default_rng(1)
    count = case.batch * case.tokens
    case = dataclasses.replace(case, pool_size=count + 2)
    tokens, state, options, limits = draw(case, "draft")
    slots = rng.permutation(count + 2)[:count].reshape(case.batch, case.tokens)
    accepted = np.arange(case.batch) % case.tokens + 1
    slots[0, 1:2] = -3  # row 0 starts from its first slot
    options |= {"state_indices": slots, "num_accepted": accepted}
    results = kda.decode_mtp(*tokens, state, **options)
    check(results, oracle.decode_mtp(*tokens, state, **options), limits, (case.dtype, case.state_dtype))


@pytest.mark.parametrize("accepted", [(2, 0, 4), (-1, 1, 3), (1, 3, 100)], ids=str)
def test_decode_mtp_paged_takes_accepted_counts_outside_1_to_t_as_padding(accepted):
    case = cases.Case("paged", batch=3, tokens=3, pool_size=9)
    tokens, state, options, limits = draw(case, "draft")
    options |= {"state_indices": np.arange(9)[::-1].reshape(3, 3)}
    run = jax.jit(lambda accepted: kda.decode_mtp(*tokens, state, **options, num_accepted=accepted))
    results, reference = run(jnp.asarray(accepted)), oracle.decode_mtp(*tokens, state, **options, num_accepted=accepted)
    check(results, reference, limits, (case.dtype, case.state_dtype))
    padded = [not 1 <= m <= 3 for m in accepted]
    assert not results[0][np.asarray(padded)].any()
    assert_equal(results[1][options["state_indices"][padded]], state[options["state_indices"][padded]])


@over(cases.DRAFT_CASES)
def test_verify_and_flush(case):
    """The outputs, with and without the update, and the state after 0 to T accepted tokens."""
    tokens, state, options, limits = draw(case, "draft")
    indices = {"state_indices": case.slots}
    o, update = kda.verify(*tokens, state, **options, **indices)
    accepted = (np.arange(case.batch) + case.tokens) % (case.tokens + 1)
    flushed = kda.flush(state, update, accepted, **indices)
    reference = (
        oracle.verify(*tokens, state, **options, **indices),
        oracle.verify_flush(*tokens, state, accepted, **options, **indices),
    )
    check((o, flushed), reference, limits, (case.dtype, case.state_dtype))
    assert {str(x.dtype) for x in jax.tree.leaves(update)} == {"float32"}


@over(cases.DRAFT_CASES, "gva", "bf16", "padded")
def test_verify_without_update(case):
    tokens, state, options, _ = draw(case, "draft")
    o, update = kda.verify(*tokens, state, **options, state_indices=case.slots)
    assert_equal(kda.verify(*tokens, state, **options, state_indices=case.slots, with_update=False), (o, None))
    assert (update.u.shape, update.k.shape, update.g.shape) == (tokens[2].shape, tokens[1].shape, tokens[3].shape)


@over(cases.DRAFT_CASES, "gva", "padded", "bf16-pool")
def test_flush_counts(case):
    """One count for all rows is that count for each, and no accepted token leaves the pool bit for bit."""
    tokens, state, options, _ = draw(case, "draft")
    indices = {"state_indices": case.slots}
    _, update = kda.verify(*tokens, state, **options, **indices)
    each = kda.flush(state, update, np.full(case.batch, 2), **indices)
    assert_equal(kda.flush(state, update, 2, **indices), each)
    assert_equal(kda.flush(state, update, jnp.int32(2), **indices), each)
    assert_equal(kda.flush(state, update, 0, **indices), state)


@pytest.mark.parametrize("indices", [True, False], ids=["indices", "no-indices"])
def test_flush_layers_is_the_loop_over_layers(indices):
    layers = [FLUSH.draw(seed) for seed in range(3)]
    shared = {name: layers[0][name] for name in ("num_accepted", "state_indices")}
    if not indices:
        shared["state_indices"] = None
        layers = [layer | {"state": layer["state"][:3]} for layer in layers]
    loop = [kda.flush(layer["state"], layer["update"], **shared) for layer in layers]
    states, updates = (stack([layer[name] for layer in layers]) for name in ("state", "update"))
    assert_equal(kda.flush_layers(states, updates, **shared), jnp.stack(loop))


@over_calls(CHUNK, DECODE, VERIFY)
def test_gva_equals_repeated_heads(call: Call):
    """A call with H heads is the call with q and k repeated to HV heads; HV == H is no path of its own."""
    grouped = call.draw(0)
    group = grouped["v"].shape[-2] // grouped["k"].shape[-2]
    repeated = grouped | {name: jnp.repeat(grouped[name], group, axis=-2) for name in ("q", "k")}
    o, state = call(grouped)
    if call is VERIFY:
        state = dataclasses.replace(state, k=jnp.repeat(state.k, group, axis=-2))
    assert_close(call(repeated), (o, state), 1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("gate", ["softplus", "lower_bound"])
def test_gate_parameters_of_another_dtype(gate, dtype):
    """Parameters may be stored in half precision; the arithmetic stays in float32."""
    case = cases.Case("parameters", gate=gate)
    tokens, state, options, limits = draw(case, "decode")
    options["gate"] = jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), options["gate"])
    results = kda.decode(*tokens, state, **options)
    check(results, oracle.decode(*tokens, state, **options), limits, (case.dtype, case.state_dtype))


@pytest.mark.parametrize("gate", [None, "softplus", "lower_bound"])
def test_float64(gate):
    """Under x64 every operation computes in float64 when its inputs are float64."""
    with jax.enable_x64(True):
        case = cases.Case("x64", tokens=70, value_heads=4, dtype="float64", state_dtype="float64", gate=gate)
        limits = tolerance("float64")
        tokens, state, options, _ = draw(case, "chunk")
        results = kda.chunk(*tokens, initial_state=state, **options)
        check(results, oracle.chunk(*tokens, initial_state=state, **options), limits, ("float64",) * 2)
        draft = dataclasses.replace(case, tokens=4)
        tokens, state, options, _ = draw(draft, "draft")
        o, update = kda.verify(*tokens, state, **options)
        reference = oracle.verify(*tokens, state, **options), oracle.verify_flush(*tokens, state, 3, **options)
        check((o, kda.flush(state, update, 3)), reference, limits, ("float64",) * 2)
        token = rows(tokens, (slice(None), 0))
        results, reference = kda.decode(*token, state, **options), oracle.decode(*token, state, **options)
        check(results, reference, limits, ("float64",) * 2)
