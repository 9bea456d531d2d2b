"""jit, control flow, export and donation; and the promises of equality bit for bit."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kda_jax as kda
from kda_jax.testing import cases

from .common import (
    CHUNK,
    CHUNK_GRAD,
    CHUNK_PACKED,
    DECODE,
    DECODE_MTP_PAGED,
    FLAGS,
    FLUSH,
    SERVING,
    Call,
    arrays,
    assert_close,
    assert_equal,
    equations,
    over_calls,
    rows,
    xla_on_cpu,
)

# jit


@over_calls()
def test_primitive_stands_in_the_jaxpr(call: Call):
    jaxpr = jax.make_jaxpr(call)(call.draw(0))
    assert len(list(equations(jaxpr, call.primitive))) == 1
    assert not jaxpr.effects


@over_calls()
def test_jit_equals_eager(call: Call):
    drawn = call.draw(0)
    assert_close(jax.jit(call)(drawn), call(drawn), 1e-6)


@over_calls(CHUNK_PACKED, CHUNK_GRAD, DECODE, DECODE_MTP_PAGED, FLUSH)
def test_without_jit(call: Call):
    """Under jax.disable_jit, as one debugs, the implementation runs in Python."""
    drawn = call.draw(0)
    with jax.disable_jit():
        results = call(drawn)
    assert_close(results, jax.jit(call)(drawn), 1e-6)


@over_calls(CHUNK_PACKED, DECODE, DECODE_MTP_PAGED, FLUSH)
def test_integers_are_traced(call: Call):
    """Other offsets, slots and counts of accepted tokens run the program that is there."""
    run = jax.jit(call)
    for seed in range(3):
        drawn = call.draw(seed)
        assert_close(run(drawn), call(drawn), 1e-6)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.numpy_rank_promotion("raise"),
        lambda: jax.numpy_dtype_promotion("strict"),
        lambda: jax.enable_x64(True),
        lambda: jax.debug_nans(True),
    ],
    ids=["rank-promotion", "dtype-promotion", "x64", "debug-nans"],
)
@over_calls(CHUNK_PACKED, CHUNK_GRAD, DECODE, DECODE_MTP_PAGED, FLUSH)
def test_strict_settings_of_the_user(call: Call, setting):
    """They change neither results nor dtypes."""
    drawn = call.draw(0)
    reference = jax.jit(call)(drawn)
    with setting():
        results = jax.jit(lambda drawn: call(drawn))(drawn)
    assert [x.dtype for x in jax.tree.leaves(results)] == [x.dtype for x in jax.tree.leaves(reference)]
    assert_close(results, reference, 1e-6)


# Control flow


def _decode_inputs():
    """A sequence as decode reads it: tokens first."""
    drawn = arrays(cases.Case("steps", tokens=6, value_heads=4, k_dim=8, v_dim=8), "chunk")
    state, gate = drawn.pop("initial_state"), drawn.pop("gate")
    return {name: jnp.moveaxis(x, 1, 0) for name, x in drawn.items()}, state, gate


def test_decode_in_scan_and_while_loop():
    tokens, state, gate = _decode_inputs()
    count = len(tokens["q"])

    def step(state, token):
        o, state = kda.decode(**token, state=state, gate=gate, **FLAGS)
        return state, o

    def body(carry):
        t, state, outputs = carry
        state, o = step(state, rows(tokens, t))
        return t + 1, state, outputs.at[t].set(o)

    outputs, looped = [], state
    for t in range(count):
        looped, o = step(looped, rows(tokens, t))
        outputs.append(o)
    reference = looped, jnp.stack(outputs)
    assert_close(jax.lax.scan(step, state, tokens), reference, 1e-6)
    carry = jnp.int32(0), state, jnp.zeros_like(tokens["v"])
    assert_close(jax.lax.while_loop(lambda carry: carry[0] < count, body, carry)[1:], reference, 1e-6)


def test_speculative_serving_in_while_loop():
    """verify and flush inside a loop that ends when enough tokens are accepted; how many is known only at run time."""
    drawn = arrays(cases.Case("serve", batch=1, tokens=16, k_dim=8, v_dim=8), "draft")
    state, gate = drawn.pop("state"), drawn.pop("gate")

    @jax.jit
    def serve(tokens, state, accepted):
        def body(carry):
            position, step, state = carry
            draft = {name: jax.lax.dynamic_slice_in_dim(x, position, 4, axis=1) for name, x in tokens.items()}
            _, update = kda.verify(**draft, state=state, gate=gate, **FLAGS)
            m = accepted[step % 3]
            return position + m, step + 1, kda.flush(state, update, m)

        return jax.lax.while_loop(lambda carry: carry[0] < 12, body, (0, 0, state))

    for accepted in ([1, 4, 2], [4, 0, 3], [2, 2, 2]):
        position, _, served = serve(drawn, state, jnp.asarray(accepted))
        taken = {name: x[:, :position] for name, x in drawn.items()}
        _, reference = kda.chunk(**taken, initial_state=state, gate=gate, **FLAGS)
        assert_close(served, reference, 1e-5)
    assert serve._cache_size() == 1


# Export


@over_calls()
def test_export(call: Call):
    """Through bytes and back: gates go in as pytrees, Updates come out and go in."""
    drawn = call.draw(0)
    exported = jax.export.export(jax.jit(call))(drawn)
    again = jax.export.deserialize(exported.serialize())
    assert_equal(again.call(drawn), jax.jit(call)(drawn))


@pytest.mark.parametrize("lower_bound", [-3, -3.0, np.float32(-3)], ids=["int", "float", "float32"])
def test_export_of_a_bounded_gate(lower_bound):
    """Its bound is part of the pytree's structure, whatever type of number it was given as."""
    drawn = DECODE.draw(0)
    drawn["gate"] = kda.LowerBound(drawn["gate"].A_log, lower_bound=lower_bound)
    again = jax.export.deserialize(jax.export.export(jax.jit(DECODE))(drawn).serialize())
    assert_equal(again.call(drawn), jax.jit(DECODE)(drawn))


def test_export_with_its_derivative():
    drawn = CHUNK.draw(0)
    exported = jax.export.export(jax.jit(CHUNK))(drawn)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    out, pull = jax.vjp(CHUNK, drawn)
    assert_close(jax.vjp(again.call, drawn)[1](out), pull(out), 1e-6)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@over_calls()
def test_export_for_other_platforms(call: Call, platform):
    exported = jax.export.export(jax.jit(call), platforms=[platform])(call.draw(0))
    assert exported.platforms == (platform,)
    assert [x.shape for x in exported.out_avals] == [x.shape for x in jax.tree.leaves(jax.eval_shape(call, call.draw(0)))]


# Donation


@xla_on_cpu
@pytest.mark.parametrize(
    ("call", "indices"),
    [(DECODE, True), (DECODE, False), (DECODE_MTP_PAGED, True), (FLUSH, True), (FLUSH, False)],
    ids=lambda x: str(x) if isinstance(x, Call) else "indices" if x else "no-indices",
)
def test_donated_pool_is_updated_in_place(call: Call, indices):
    drawn = call.draw(0)
    if not indices:
        del drawn["state_indices"]
        drawn["state"] = drawn["state"][:3]
    pool = drawn.pop("state")
    reference = call(drawn | {"state": pool})
    step = jax.jit(lambda pool, drawn: call(drawn | {"state": pool}), donate_argnums=0)
    compiled = step.lower(pool, drawn).compile()
    text = compiled.as_text()
    assert "input_output_alias" in text
    assert compiled.memory_analysis().alias_size_in_bytes == pool.nbytes
    shape = ",".join(map(str, pool.shape))
    assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text)
    assert_close(compiled(pool, drawn), reference, 1e-6)
    assert pool.is_deleted()


# Bit for bit


@xla_on_cpu
@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gate", [None, "softplus", "lower_bound"])
def test_decode_mtp_is_strict(gate, dtype, state_dtype):
    """T tokens at once are T calls of decode, bit for bit."""
    shape = {"tokens": 5, "value_heads": 4, "k_dim": 64, "v_dim": 64}
    case = cases.Case("strict", **shape, gate=gate, dtype=dtype, state_dtype=state_dtype)
    drawn = arrays(case, "draft")
    state, gate = drawn.pop("state"), drawn.pop("gate")
    o, states = kda.decode_mtp(**drawn, state=state, gate=gate, **FLAGS)
    for t in range(case.tokens):
        token = rows(drawn, (slice(None), t))
        o_t, state = kda.decode(**token, state=state, gate=gate, **FLAGS)
        assert_equal((o[:, t], states[:, t]), (o_t, state))


@over_calls()
def test_two_runs_are_equal(call: Call):
    run, drawn = jax.jit(call), call.draw(0)
    assert_equal(run(drawn), run(drawn))


@xla_on_cpu
@over_calls(CHUNK, *SERVING)
def test_a_row_does_not_depend_on_its_batch(call: Call):
    """Row 0 alone, in other places, among other neighbours and next to padding (row 1)."""
    drawn = call.draw(0, batch=6, pool_size=13, k_dim=64, v_dim=64)

    def run(*order):
        taken = {name: x if name in ("state", "gate") else rows(x, np.asarray(order)) for name, x in drawn.items()}
        out = call(taken)
        place = order.index(0)
        if call not in (DECODE, DECODE_MTP_PAGED, FLUSH):
            return rows(out, place)
        *o, pool = [out] if call is FLUSH else out
        return *rows(o, place), pool[drawn["state_indices"][0]]

    alone = run(0)
    for order in ((0, 1), (2, 0, 3), (5, 4, 3, 2, 1, 0)):
        assert_equal(run(*order), alone)
