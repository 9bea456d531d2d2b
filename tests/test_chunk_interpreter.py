"""chunk's Triton kernels, run on CPU by Triton's interpreter: outputs, states and gradients against the oracle.

Memory that no launch wrote is NaN here, as is what surrounds every array: nothing unwritten goes into a result unseen.
"""

import dataclasses
import itertools
import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from kda_jax._operands import ChunkBackwardOperands, ChunkOperands, ChunkSpec
from kda_jax.testing import cases, oracle
from kda_jax.testing.cases import Case

from .common import (
    assert_close,
    assert_equal,
    assert_equal_grads,
    assert_grads_close,
    at_kernel_dims,
    chunk_kernel_tolerance,
    spec_options,
)

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled in this process; tests/test_gpu_chunk.py runs them", allow_module_level=True)

from kda_jax.triton import chunk, chunk_backward

from . import interpreter

CHUNK = 64
TOKENS = ("q", "k", "v", "g", "beta")
WRT = (*TOKENS, "A_log", "dt_bias", "initial_state")
BASE = Case("base", batch=1, tokens=70, heads=1, value_heads=1, k_dim=64, v_dim=64, dtype="bfloat16")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    with interpreter.installed(monkeypatch, chunk, chunk_backward):
        yield


class Call(NamedTuple):
    """A training step: operands and spec of the forward pass, and the options as the oracle takes them."""

    operands: ChunkOperands
    spec: ChunkSpec
    options: dict[str, Any]

    def replace(self, **arrays):
        return self._replace(operands=self.operands._replace(**arrays))


class Step(NamedTuple):
    o: np.ndarray
    state: np.ndarray
    states: np.ndarray  # at the start of every chunk
    grads: dict[str, np.ndarray]


def draw(case, seed=0):
    inputs = cases.draw(case, layout="chunk", seed=seed)
    parameters = (None, None) if inputs.gate is None else (inputs.gate.A_log, inputs.gate.dt_bias)
    offsets = None if case.cu_seqlens is None else np.asarray([case.cu_seqlens], np.int32)
    options = spec_options(case, inputs.gate)
    kept = "float32" if case.dtype == "float32" else "bfloat16"  # as kda.chunk has it
    spec = ChunkSpec(**options, chunk_size=CHUNK, states_dtype=kept)
    return Call(ChunkOperands(*inputs.arrays, *parameters, inputs.state, offsets), spec, inputs.options)


def cotangents(call, seed=1):
    """Of o and of the final states."""
    rng = np.random.default_rng(seed)
    q, _, v, *_, state, offsets = call.operands
    if state is None:
        sequences = len(v) if offsets is None else offsets[:, 1:].size
        state = np.zeros((sequences, *v.shape[2:], q.shape[-1]), np.float32)
    return tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in (v, state))


def step(call, do, dstate):
    """Both passes on the kernels; the gate's gradients a row."""
    operands, spec, _ = call
    o, state, states, *saved = chunk.forward(operands, spec)
    grads = chunk_backward.backward(ChunkBackwardOperands(*operands, states, do, dstate, *saved), spec)
    names = [name for name in WRT if getattr(operands, name) is not None]
    return Step(o, state, states, dict(zip(names, map(np.asarray, grads), strict=True)))


def by_oracle(call, do, dstate):
    *tokens, _, _, state, offsets = call.operands
    options = call.options | {"initial_state": state, "cu_seqlens": None if offsets is None else offsets[0]}
    o, last = oracle.chunk(*tokens, **options)
    grads = oracle.chunk_grad(*tokens, do, dstate, **options)
    return Step(o, last, states_kept(call), {name: grads[name] for name in WRT if getattr(call.operands, name) is not None})


def states_kept(call):
    """The states after 0, 64, ... tokens of each sequence [B, C, HV, V, K], by walks of that many tokens."""
    *tokens, _, _, state, offsets = call.operands
    spans = [(0, tokens[0].shape[1])] if offsets is None else itertools.pairwise(offsets[0].tolist())
    found = []
    for n, (begin, end) in enumerate(spans):
        start = state if state is None or offsets is None else state[n : n + 1]
        for until in range(begin, end, CHUNK):
            walk = (x[:, begin:until] for x in tokens)
            found.append(oracle.chunk(*walk, **call.options, initial_state=start)[1])
    return np.stack(found, axis=1)


def check(call, given=None):
    """A training step against the oracle."""
    operands = call.operands
    given = cotangents(call) if given is None else given
    found, expected = step(call, *given), by_oracle(call, *given)
    limits = chunk_kernel_tolerance(operands.v.dtype.name, found.state.dtype.name)
    assert found.o.dtype == operands.v.dtype
    assert found.state.dtype == (np.float32 if operands.initial_state is None else operands.initial_state.dtype)
    assert_close(found.o, expected.o, limits.output)
    assert_close(found.state, expected.state, limits.state)
    assert_close(found.states[:, : expected.states.shape[1]], expected.states, limits.output)  # rounded as o is
    for name, x in found.grads.items():
        assert x.dtype == getattr(operands, name).dtype, name
    grads = {name: x.sum(axis=0) if name in ("A_log", "dt_bias") else x for name, x in found.grads.items()}
    assert_grads_close(grads, expected.grads, limits.gradient, operands.g, call.options["gate"])
    return found, expected


def small(some):
    """Every dtype, one q/k head, and one row in most."""
    dtypes = "bfloat16", "float32", "float16"
    for i, case in enumerate(at_kernel_dims(some)):
        batch = 1 if i % 5 else case.batch
        dtype = dtypes[i % 3] if case.dtype == "float32" else case.dtype
        yield dataclasses.replace(case, batch=batch, heads=1, value_heads=case.value_heads // case.heads, dtype=dtype)


GATES = ("lower_bound", None, "softplus")
CASES = (
    *(case for case in cases.CHUNK_CASES if case.chunk_size == CHUNK),
    *(Case(f"tokens-{t}", tokens=t, gate=GATES[i % 3]) for i, t in enumerate((1, 63, 64, 65, 150))),
    Case("packed-one", batch=1, tokens=64, cu_seqlens=(0, 0, 0, 64, 64), gate="lower_bound"),
    Case("packed-crowd", batch=1, tokens=20, cu_seqlens=(*range(0, 20, 2), *[19] * 30, 20)),
)


@pytest.mark.parametrize("case", small(CASES), ids=str)
def test_case(case):
    check(draw(case))


def test_each_operand_of_its_own_dtype():
    """As in training: decays, betas and the gate's bias in float32 beside half precision."""
    call = draw(dataclasses.replace(BASE, dtype="float32", value_heads=2))
    own = {"bfloat16": ("q", "v", "A_log", "initial_state"), "float16": ("k", "beta")}
    arrays = {name: getattr(call.operands, name).astype(jnp.dtype(dtype)) for dtype, names in own.items() for name in names}
    gate = dataclasses.replace(call.options["gate"], A_log=arrays["A_log"])
    check(call.replace(**arrays)._replace(options=call.options | {"gate": gate}))


@pytest.mark.parametrize(("heads", "group"), [(2, 1), (2, 2), (1, 4)])
def test_a_value_head_is_the_same_alone(heads, group):
    """GVA is no other arithmetic: a call with a group's q and k repeated to each value head gives the same bits, so HV == H
    does too. dq and dk are the sums over the group."""
    call = draw(dataclasses.replace(BASE, heads=heads, value_heads=heads * group, v_dim=128, gate="lower_bound"))
    given = cotangents(call)
    found = check(call, given)[0]
    parts = {name: [] for name in ("q", "k")}
    for hv in range(heads * group):
        of_head = {name: getattr(call.operands, name)[:, :, hv // group, None] for name in ("q", "k")}
        of_head |= {name: getattr(call.operands, name)[:, :, hv, None] for name in ("v", "g", "beta")}
        of_head |= {name: getattr(call.operands, name)[hv, None] for name in ("A_log", "dt_bias")}
        alone = call.replace(**of_head, initial_state=call.operands.initial_state[:, hv, None])
        alone = step(alone, given[0][:, :, hv, None], given[1][:, hv, None])
        assert_equal(alone.o, found.o[:, :, hv, None])
        assert_equal((alone.state, alone.states[:, :, 0]), (found.state[:, hv, None], found.states[:, :, hv]))
        for name, some in parts.items():
            some.append(alone.grads.pop(name))
        axes = {"v": 2, "g": 2, "beta": 2, "A_log": 1, "dt_bias": 1, "initial_state": 1}
        assert_equal_grads(alone.grads, {name: np.take(found.grads[name], [hv], axis) for name, axis in axes.items()})
    for name, some in parts.items():
        total = np.concatenate(some, axis=2).reshape(*found.grads[name].shape[:3], group, -1).astype(np.float64).sum(axis=3)
        assert_close(found.grads[name], total, chunk_kernel_tolerance("bfloat16").gradient)
        if group == 1:
            assert_equal(np.concatenate(some, axis=2), found.grads[name])


def chosen(call, name, *values):
    """An operand's entries, each one of ``values``."""
    x = getattr(call.operands, name)
    return {name: np.random.default_rng(2).choice(np.asarray(values, np.float32), x.shape)}


LOG_DECAYS = {"200": (0, -200), "1e30": (0, -1e30), "lowest": (-3e38,), "all": (0, -1e-3, -0.3, -88, -200, -1e30, -3e38)}


@pytest.mark.parametrize("values", LOG_DECAYS.values(), ids=LOG_DECAYS)
def test_log_decays_side_by_side(values):
    """Channels and tokens that forget everything next to ones that forget nothing."""
    call = draw(dataclasses.replace(BASE, tokens=150, gate=None))
    check(call.replace(**chosen(call, "g", *values)))


@pytest.mark.parametrize("gate", ["softplus", "lower_bound"])
@pytest.mark.parametrize("values", [(0, 200, -200), (0, 3e38, -3e38, 1e4, -1e4)], ids=str)
def test_gate_inputs_side_by_side(gate, values):
    call = draw(dataclasses.replace(BASE, k_dim=128, gate=gate))
    check(call.replace(**chosen(call, "g", *values)))


TOO_FAR_APART = pytest.mark.xfail(reason="without the norm, a query 1e8 times smaller than others of its chunk reads zero")


@pytest.mark.parametrize(
    ("name", "size", "norm"),
    [
        *((name, size, True) for name in "qk" for size in (0, 1e-30, 1e-5, 1e15)),
        *(("q", size, False) for size in (0, 1e-6, 1e6)),
        *(("k", size, False) for size in (0, 1e-30, 1e-8, 1e-5)),
        *(pytest.param("q", size, False, marks=TOO_FAR_APART) for size in (1e-15, 1e15)),
    ],
)
def test_sizes_side_by_side(name, size, norm):
    """Queries or keys of another size among ordinary ones: neither cost the others digits.

    Sizes are of queries and keys of norm one or, where they are divided by their norms, sqrt(K); below 1e-19 they are none.
    """
    call = draw(dataclasses.replace(BASE, qk_l2norm=norm))
    other = np.random.default_rng(3).random(70) < 0.5
    x = getattr(call.operands, name)
    scaled = (x.astype(np.float32) * np.where(other, np.float32(size), 1)[:, None, None]).astype(x.dtype)
    found, expected = check(call.replace(**{name: scaled}))
    limits = chunk_kernel_tolerance("bfloat16")
    for some in (other, ~other) if size > 1e-19 else (~other,):
        assert_close(found.o[:, some], expected.o[:, some], limits.output)
        assert_close(found.grads[name][:, some], expected.grads[name][:, some], limits.gradient)


def test_a_large_key():
    """Without the norm, one of norm 16: the products that pass through it grow by its square."""
    call = draw(dataclasses.replace(BASE, qk_l2norm=False))
    call.operands.k[0, 20] *= 16
    check(call)


@pytest.mark.parametrize("power", [-60, 60])
def test_powers_of_two_go_through(power):
    """Results are linear in values and states, gradients in cotangents: to the bit, whatever the size."""
    call = draw(BASE)
    given = cotangents(call)
    found = step(call, *given)

    def scaled(x):
        return (x.astype(np.float32) * np.float32(2.0**power)).astype(x.dtype)

    assert_equal(step(call, *map(scaled, given)).grads, {name: scaled(x) for name, x in found.grads.items()})
    larger = call.replace(v=scaled(call.operands.v), initial_state=scaled(call.operands.initial_state))
    found_larger = step(larger, *given)
    assert_equal(found_larger[:3], tuple(map(scaled, found[:3])))
    for name in ("v", "initial_state"):
        assert_equal(found_larger.grads[name], found.grads[name])
    for name in ("q", "k", "g", "beta", "A_log", "dt_bias"):
        assert_equal(found_larger.grads[name], scaled(found.grads[name]))


PACKED = dataclasses.replace(BASE, tokens=200, cu_seqlens=(0, 33, 33, 130, 131, 131, 170))


@pytest.mark.parametrize("filling", [7.0, np.nan])
def test_what_lies_behind_the_last_sequence(filling):
    """It goes nowhere, and its outputs and gradients are zero."""
    call = draw(PACKED)
    do, dstate = cotangents(call)
    found = step(call, do, dstate)
    end = PACKED.cu_seqlens[-1]
    filled = {name: getattr(call.operands, name).copy() for name in TOKENS}
    for x in (do, *filled.values()):
        x[:, end:] = filling
    assert_equal(step(call.replace(**filled), do, dstate), found)
    assert not found.o[:, end:].any()
    assert not any(found.grads[name][:, end:].any() for name in TOKENS)


def test_nothing_but_padding():
    """Only sequences of no token: their states stay, and all gradients are zero."""
    call = draw(dataclasses.replace(BASE, tokens=5, cu_seqlens=(0, 0, 0)))
    do, dstate = cotangents(call)
    found = step(call, do, dstate)
    assert_equal((found.state, found.grads.pop("initial_state")), (call.operands.initial_state, dstate))
    assert not found.o.any()
    assert not any(x.any() for x in found.grads.values())


def test_a_sequence_is_the_same_alone():
    """Bit for bit, packed among others or a row of its own; one of no token keeps its state."""
    call = draw(PACKED)
    do, dstate = cotangents(call)
    found = step(call, do, dstate)
    for n, (begin, end) in enumerate(itertools.pairwise(PACKED.cu_seqlens)):
        if begin == end:
            assert_equal(found.state[n], call.operands.initial_state[n])
            assert_equal(found.grads["initial_state"][n], dstate[n])
            continue
        tokens = {name: getattr(call.operands, name)[:, begin:end] for name in TOKENS}
        alone = call.replace(**tokens, cu_seqlens=None, initial_state=call.operands.initial_state[n : n + 1])
        alone = step(alone, do[:, begin:end], dstate[n : n + 1])
        assert_equal((alone.o, alone.state), (found.o[:, begin:end], found.state[n : n + 1]))
        for name in TOKENS:
            assert_equal(alone.grads[name], found.grads[name][:, begin:end])
        assert_equal(alone.grads["initial_state"], found.grads["initial_state"][n : n + 1])


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "unpacked"])
def test_a_row_is_the_same_alone(packed, shared):
    """Rows as vmap makes them, each packed in its own way and with gate parameters of its own."""
    offsets = ((0, 33, 33, 70), (0, 0, 64, 65), (0, 1, 2, 3)) if packed else (None,) * 3
    rows = [draw(dataclasses.replace(BASE, cu_seqlens=some), seed) for seed, some in enumerate(offsets)]
    if shared:
        rows = [row.replace(A_log=rows[0].operands.A_log, dt_bias=rows[0].operands.dt_bias) for row in rows]
    arrays = {}
    for name in ChunkOperands._fields:
        some = [getattr(row.operands, name) for row in rows]
        if name in ("A_log", "dt_bias"):
            arrays[name] = some[0] if shared else np.stack(some)
        elif some[0] is not None:
            arrays[name] = np.concatenate(some)
    given = [cotangents(row, seed) for seed, row in enumerate(rows)]
    together = step(rows[0].replace(**arrays), *map(np.concatenate, zip(*given, strict=True)))
    alone = [step(row, *of_row) for row, of_row in zip(rows, given, strict=True)]
    assert_equal(together.o, np.concatenate([x.o for x in alone]))
    assert_equal(together.state, np.concatenate([x.state for x in alone]))
    of_rows = {name: np.concatenate([some.grads[name] for some in alone]) for name in together.grads}
    assert_equal_grads(together.grads, of_rows)


@pytest.mark.parametrize("offsets", [None, (0, 33, 33, 70)], ids=["unpacked", "packed"])
def test_what_is_kept_between_the_passes_changes_nothing(offsets):
    """Intermediates saved are those computed again; inference keeps no states."""
    call = draw(dataclasses.replace(BASE, cu_seqlens=offsets))
    given = cotangents(call)
    found = step(call, *given)
    assert_equal(step(call._replace(spec=dataclasses.replace(call.spec, save_intermediates=True)), *given), found)
    assert_equal(chunk.forward(call.operands, dataclasses.replace(call.spec, states_dtype=None)), found[:2])


def test_no_initial_state_is_one_of_zeros():
    call = draw(BASE).replace(initial_state=np.zeros((1, 1, 64, 64), np.float32))
    given = cotangents(call)
    found = step(call, *given)
    absent = step(call.replace(initial_state=None), *given)
    assert_equal(absent[:3], found[:3])
    assert_equal(absent.grads, {name: x for name, x in found.grads.items() if name != "initial_state"})


@pytest.mark.parametrize("offsets", [None, (0, 33, 33, 70)], ids=["unpacked", "packed"])
def test_wide_tiles_change_no_bit(offsets, monkeypatch):
    """What a large batch is computed with, which shows in nothing but time."""
    call = draw(dataclasses.replace(BASE, v_dim=128, cu_seqlens=offsets))
    given = cotangents(call)
    found = step(call, *given)
    monkeypatch.setitem(chunk.MULTIPROCESSORS, None, 0)
    assert chunk.chain_tile(chunk.FORWARD, 1, 128) == chunk.WIDE
    assert_equal(step(call, *given), found)
