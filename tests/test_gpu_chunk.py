"""chunk's kernels on a GPU: ``pytest -m gpu``. Values and gradients, bits, launches, and what memory holds."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

import kda_jax as kda
from kda_jax.testing import cases
from kda_jax.testing.cases import Case

from .common import (
    FLAGS,
    arrays,
    assert_close,
    assert_equal,
    assert_equal_grads,
    assert_grads_close,
    at_kernel_dims,
    chunk_kernel_tolerance,
    chunk_step,
    chunk_step_by_oracle,
    compiled_text,
    kernels,
    on_a_gpu,
    rows,
    stack,
)

pytestmark = on_a_gpu

IMPLEMENTATION = "triton"
GATES = "softplus", "lower_bound", None
TOKENS = "q", "k", "v", "g", "beta"
BASE = Case("base", batch=2, tokens=200, heads=2, value_heads=4, k_dim=128, v_dim=64, dtype="bfloat16")


def draw(case, seed=0):
    """What chunk is differentiated in, and the offsets, by name; its options."""
    drawn = arrays(case, "chunk", seed)
    drawn = {name: x for name, x in drawn.items() if x is not None}
    if case.cu_seqlens is not None:
        drawn["cu_seqlens"] = jnp.asarray(case.cu_seqlens, jnp.int32)
    return drawn, {name: getattr(case, name) for name in ("qk_l2norm", "beta_sigmoid", "allow_neg_eigval", "scale")}


def cotangents_of(drawn, options, seed=1):
    rng = np.random.default_rng(seed)
    out = jax.eval_shape(functools.partial(kda.chunk, **options), **drawn)
    return tuple(jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in out)


@functools.partial(jax.jit, static_argnames=(*FLAGS, "allow_neg_eigval", "scale", "implementation", "save_intermediates"))
def step(drawn, cotangents, **options):
    return chunk_step(drawn, cotangents, **{"implementation": IMPLEMENTATION} | options)


def by_xla(drawn, cotangents, **options):
    """In float32, for what takes the oracle too long."""
    drawn, cotangents = jax.tree.map(lambda x: x.astype("float32") if x.dtype == "bfloat16" else x, (drawn, cotangents))
    return step(drawn, cotangents, **options, implementation="xla")


def check(case, reference=chunk_step_by_oracle, drawn=None):
    """Both passes against a reference."""
    drawn, options = draw(case)[0] if drawn is None else drawn, draw(case)[1]
    cotangents = cotangents_of(drawn, options)
    out, grads = step(drawn, cotangents, **options)
    expected_out, expected = reference(drawn, cotangents, **options)
    limits = chunk_kernel_tolerance(case.dtype, case.state_dtype)
    for x, y, limit in zip(out, expected_out, (limits.output, limits.state), strict=True):
        assert_close(x, y, limit)
    expected = {name: np.asarray(x, np.float64) for name, x in expected.items()}
    assert_grads_close(grads, expected, limits.gradient, drawn["g"], drawn.get("gate"))
    return out, grads


@pytest.mark.parametrize("case", at_kernel_dims([case for case in cases.CHUNK_CASES if case.chunk_size == 64]), ids=str)
def test_case(case):
    check(case)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("gate", GATES)
def test_dtypes(gate, dtype):
    check(dataclasses.replace(BASE, gate=gate, dtype=dtype))


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 500, 1000])
def test_lengths(tokens, group):
    case = Case("length", tokens=tokens, heads=4 // group, value_heads=4, dtype="bfloat16", gate=GATES[group % 3])
    (case,) = at_kernel_dims([case] * (tokens % 4 + 1))[-1:]  # each length at other head dimensions
    check(case)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("tokens", [4096, 32768])
def test_long_sequences(tokens, gate):
    """No drift, with and without fast forgetting: the end is as near as the whole."""
    heads = 2 if tokens == 4096 else 1
    case = Case("long", batch=1, tokens=tokens, heads=heads, value_heads=2 * heads, k_dim=128, v_dim=128, gate=gate)
    case = dataclasses.replace(case, dtype="bfloat16", g_value=-1e-3 if gate is None else None)
    out, grads = check(case, by_xla)
    drawn, options = draw(case)
    expected_out, expected = by_xla(drawn, cotangents_of(drawn, options), **options)
    limits = chunk_kernel_tolerance("bfloat16")
    assert_close(out[0][:, -256:], expected_out[0][:, -256:], limits.output)
    for name in TOKENS:
        assert_close(grads[name][:, :256], expected[name][:, :256], limits.gradient)


LENGTHS = (1, 0, 5000, 63, 64, 0, 0, 65, 1, 500, 129, 2000, 17, 0)
PACKED = dataclasses.replace(
    BASE, batch=1, tokens=sum(LENGTHS) + 100, cu_seqlens=(0, *itertools.accumulate(LENGTHS)), k_dim=64, v_dim=128
)


def test_packed_sequences():
    """Of no token to 5,000, and a tail that belongs to none, whose outputs and gradients are zero."""
    (o, state), grads = check(PACKED, by_xla)
    end = PACKED.cu_seqlens[-1]
    assert not o[:, end:].any()
    assert not any(grads[name][:, end:].any() for name in TOKENS)
    drawn, options = draw(PACKED)
    empty = np.asarray(LENGTHS) == 0
    assert_equal(state[empty], drawn["initial_state"][empty])
    assert_equal(grads["initial_state"][empty], cotangents_of(drawn, options)[1][empty])


@pytest.mark.parametrize("filling", [7.0, np.nan])
def test_what_lies_behind_the_last_sequence_goes_nowhere(filling):
    drawn, options = draw(dataclasses.replace(BASE, batch=1, cu_seqlens=(0, 33, 33, 130)))
    do, dstate = cotangents_of(drawn, options)
    found = step(drawn, (do, dstate), **options)
    filled = {name: drawn[name].at[:, 130:].set(filling) for name in TOKENS}
    assert_equal(step(drawn | filled, (do.at[:, 130:].set(filling), dstate), **options), found)


def test_a_sequence_is_the_same_alone():
    """Bit for bit, packed among others or alone."""
    drawn, options = draw(PACKED)
    do, dstate = cotangents_of(drawn, options)
    (o, state), grads = step(drawn, (do, dstate), **options)
    shared = {"gate": drawn["gate"]}
    for n, (begin, end) in enumerate(itertools.pairwise(PACKED.cu_seqlens)):
        if end - begin in (1, 63, 65, 500):
            one = {name: drawn[name][:, begin:end] for name in TOKENS} | {"initial_state": drawn["initial_state"][n, None]}
            alone, of_alone = step(one | shared, (do[:, begin:end], dstate[n, None]), **options)
            assert_equal(alone, (o[:, begin:end], state[n, None]))
            assert_equal({name: of_alone[name] for name in TOKENS}, {name: grads[name][:, begin:end] for name in TOKENS})
            assert_equal(of_alone["initial_state"], grads["initial_state"][n, None])


def test_a_row_is_the_same_alone():
    """Bit for bit, though a large batch has wider tiles."""
    drawn, options = draw(dataclasses.replace(BASE, batch=40, tokens=130, v_dim=128))
    cotangents = cotangents_of(drawn, options)
    out, grads = step(drawn, cotangents, **options)
    per_row = (*TOKENS, "initial_state")
    for row in (0, 39):
        of_row = functools.partial(jax.tree.map, lambda x, row=row: x[row, None])
        one = of_row({name: drawn[name] for name in per_row}) | {"gate": drawn["gate"]}
        alone, of_alone = step(one, of_row(cotangents), **options)
        assert_equal(alone, of_row(out))
        assert_equal({name: of_alone[name] for name in per_row}, of_row({name: grads[name] for name in per_row}))


def of_heads(x, group):
    """q and k repeated to the value heads of their groups."""
    return x | {name: jnp.repeat(x[name], group, axis=2) for name in ("q", "k")}


@pytest.mark.parametrize("tokens", [130, 1000])
def test_a_group_is_its_heads_repeated(tokens):
    """Bit for bit, but for the sums of dq and dk over the group."""
    drawn, options = draw(dataclasses.replace(BASE, tokens=tokens))
    cotangents = cotangents_of(drawn, options)
    out, grads = step(drawn, cotangents, **options)
    repeated_out, repeated = step(of_heads(drawn, 2), cotangents, **options)
    assert_equal(out, repeated_out)
    for name in ("q", "k"):
        x = repeated.pop(name).astype(jnp.float32)
        total = x.reshape(*x.shape[:2], 2, 2, x.shape[-1]).sum(axis=3)
        assert_close(grads.pop(name), total, chunk_kernel_tolerance("bfloat16").gradient)
    assert_equal_grads(grads, repeated)


def test_a_head_is_the_same_alone():
    """HV == H: bit for bit a call of one head for each."""
    drawn, options = draw(dataclasses.replace(BASE, heads=4))
    do, dstate = cotangents_of(drawn, options)
    (o, state), grads = step(drawn, (do, dstate), **options)
    for h in range(4):
        one = {name: drawn[name][:, :, h, None] for name in TOKENS} | {"initial_state": drawn["initial_state"][:, h, None]}
        one["gate"] = rows(drawn["gate"], slice(h, h + 1))
        alone, of_alone = step(one, (do[:, :, h, None], dstate[:, h, None]), **options)
        assert_equal(alone, (o[:, :, h, None], state[:, h, None]))
        assert_equal({name: of_alone[name] for name in TOKENS}, {name: grads[name][:, :, h, None] for name in TOKENS})


@pytest.mark.parametrize("case", [dataclasses.replace(BASE, tokens=2000), PACKED], ids=["unpacked", "packed"])
def test_two_runs_give_the_same_bits(case):
    drawn, options = draw(case)
    cotangents = cotangents_of(drawn, options)
    first = step(drawn, cotangents, **options)
    for _ in range(3):
        assert_equal(step(drawn, cotangents, **options), first)


def test_saved_intermediates_change_no_bit():
    """They spare the backward pass one launch."""
    drawn, options = draw(BASE)
    cotangents = cotangents_of(drawn, options)
    saved = functools.partial(step, **options, save_intermediates=True)
    again = functools.partial(step, **options)
    assert_equal(saved(drawn, cotangents), again(drawn, cotangents))
    assert kernels(saved, drawn, cotangents) == kernels(again, drawn, cotangents) - 1


@pytest.mark.parametrize("offsets", [None, (0, 33, 33, 130)], ids=["unpacked", "packed"])
def test_a_vmapped_call_is_one_call(offsets):
    """As many launches as one call has, and the bits of the loop."""
    case = dataclasses.replace(BASE, batch=1, cu_seqlens=offsets)
    some = [draw(case, seed) for seed in range(3)]
    options = some[0][1]
    given = [cotangents_of(drawn, options, seed) for seed, (drawn, _) in enumerate(some)]
    some = [drawn for drawn, _ in some]
    run = functools.partial(step, **options)
    assert kernels(run, some[0], given[0]) == kernels(jax.vmap(run), stack(some), stack(given)) >= 1
    out, grads = jax.vmap(run)(stack(some), stack(given))
    loop_out, loop = stack([run(*one) for one in zip(some, given, strict=True)])
    assert_equal(out, loop_out)
    assert_equal_grads(grads, loop)


def test_shard_map_needs_no_collective():
    """Rows and heads over the devices: each runs the operation on its own."""
    drawn, options = draw(BASE)
    do, dstate = cotangents_of(drawn, options)
    gate = drawn.pop("gate")
    of_tokens, of_states = PartitionSpec("rows", None, "heads"), PartitionSpec("rows", "heads")
    specs = {name: of_states if name == "initial_state" else of_tokens for name in drawn}
    of_gate = jax.tree.map(lambda _: PartitionSpec("heads"), gate)

    def run(drawn, gate, *cotangents):
        out, pull = jax.vjp(lambda wrt: kda.chunk(**wrt, gate=gate, **options, implementation=IMPLEMENTATION), drawn)
        return out, pull(cotangents)[0]

    mesh = Mesh(np.asarray(jax.devices()[:1]).reshape(1, 1), ("rows", "heads"))
    of_out = of_tokens, of_states
    mapped = jax.shard_map(run, mesh=mesh, in_specs=(specs, of_gate, *of_out), out_specs=(of_out, specs))
    text = compiled_text(mapped, drawn, gate, do, dstate)
    assert re.findall(r"\s(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(?:-start)?\(", text) == []
    assert_equal(jax.jit(mapped)(drawn, gate, do, dstate), jax.jit(run)(drawn, gate, do, dstate))


def test_a_training_step_repeats_no_query_or_key():
    """Nothing in their dtype has the size that they would have once repeated to the value heads. T is no whole number of
    chunks, g is float32, and V is not K: so nothing else has it either."""
    drawn, options = draw(dataclasses.replace(BASE, tokens=500))
    drawn["g"] = drawn["g"].astype(jnp.float32)
    size = math.prod(drawn["g"].shape)

    def train(drawn):
        o, state = kda.chunk(**drawn, **options, implementation=IMPLEMENTATION)
        return jnp.sum(o.astype(jnp.float32) ** 2) + jnp.sum(state**2)

    def repeated(function):
        shapes = re.findall(r"bf16\[([\d,]+)\]", compiled_text(jax.grad(function), drawn))
        return [shape for shape in shapes if math.prod(map(int, shape.split(","))) == size]

    assert repeated(train) == []
    assert repeated(lambda drawn: train(of_heads(drawn, 2))) != []  # or the search would find nothing ever


@pytest.mark.parametrize("gate", GATES)
def test_hostile_decays(gate):
    """Channels and tokens that forget everything next to ones that forget nothing."""
    values = [0, -1e-3, -0.3, -88, -200, -1e30, -3e38] if gate is None else [0, 200, -200, 1e4, -1e4, 1e30, -1e30]
    case = dataclasses.replace(BASE, gate=gate)
    drawn, _ = draw(case)
    g = np.random.default_rng(2).choice(np.asarray(values, np.float32), drawn["g"].shape)
    check(case, drawn=drawn | {"g": jnp.asarray(g)})


def test_none_takes_the_kernels_where_they_serve_and_xla_elsewhere():
    drawn, options = draw(BASE)

    def run(drawn, **changes):
        return kda.chunk(**drawn, **options, **changes)

    def train(drawn, **changes):
        return jax.grad(lambda drawn: sum(jnp.sum(x.astype(jnp.float32)) for x in run(drawn, **changes)))(drawn)

    for function in (run, train):
        named = kernels(functools.partial(function, implementation="triton"), drawn)
        assert kernels(function, drawn) == named >= 1
        assert kernels(functools.partial(function, chunk_size=32), drawn) == 0
        assert kernels(function, draw(dataclasses.replace(BASE, k_dim=32))[0]) == 0
    with pytest.raises(
        NotImplementedError, match=r"kda\.chunk: implementation is 'triton', .* chunk_size is 32; it must be 64"
    ):
        run(drawn, implementation="triton", chunk_size=32)
