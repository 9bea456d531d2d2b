"""chunk's Triton kernels, run on CPU by Triton's interpreter: outputs, states and gradients against the oracle.

Memory that no launch wrote is NaN here, as is what surrounds every array: nothing unwritten goes into a result unseen.
"""

import dataclasses
import itertools
import os
from typing import Any, NamedTuple

import numpy as np
import pytest

from kda_jax._operands import ChunkBackwardOperands, ChunkOperands, ChunkSpec
from kda_jax.testing import cases, oracle
from kda_jax.testing.cases import Case

from .common import assert_close, assert_equal, chunk_kernel_tolerance

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled in this process; tests/test_gpu_chunk.py runs them", allow_module_level=True)

from kda_jax.triton import chunk as chunk_calls

from . import interpreter

CHUNK = 64
TOKENS = ("q", "k", "v", "g", "beta")
WRT = (*TOKENS, "A_log", "dt_bias", "initial_state")
DIMS = (64, 64), (128, 128), (64, 128), (128, 64)  # K, V


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    with interpreter.installed(monkeypatch, chunk_calls):
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


def draw(case, **changes):
    case = dataclasses.replace(case, **changes)
    inputs = cases.draw(case, layout="chunk")
    parameters = (None, None) if inputs.gate is None else (inputs.gate.A_log, inputs.gate.dt_bias)
    offsets = None if case.cu_seqlens is None else np.asarray([case.cu_seqlens], np.int32)
    operands = ChunkOperands(*inputs.arrays, *parameters, inputs.state, offsets)
    options = interpreter.spec_options(case, inputs.gate)
    kept = "float32" if case.dtype == "float32" else "bfloat16"  # as kda.chunk has it
    return Call(operands, ChunkSpec(**options, chunk_size=CHUNK, states_dtype=kept), inputs.options)


def cotangents(call):
    rng = np.random.default_rng(1)
    v, state = call.operands.v, call.operands.initial_state
    value_heads, v_dim, k_dim = *v.shape[2:], call.operands.k.shape[-1]
    if state is None:
        sequences = v.shape[0] if call.operands.cu_seqlens is None else call.operands.cu_seqlens[:, 1:].size
        state = np.zeros((sequences, value_heads, v_dim, k_dim), np.float32)
    return tuple(rng.standard_normal(x.shape).astype(x.dtype) for x in (v, state))


def step(call, do, dstate):
    """Both passes on the kernels. Gradients of parameters that rows share are summed over rows, as kda.chunk does."""
    operands, spec, _ = call
    o, state, states = chunk_calls.forward(operands, spec)
    grads = chunk_calls.backward(ChunkBackwardOperands(*operands, states, do, dstate), spec)
    grads = dict(zip([name for name in WRT if getattr(operands, name) is not None], map(np.asarray, grads), strict=True))
    for name, x in grads.items():
        given = getattr(operands, name)
        assert x.dtype == given.dtype, name
        grads[name] = x.sum(axis=0) if x.ndim > given.ndim else x
    return Step(o, state, states, grads)


def by_oracle(call, do, dstate):
    tokens, state = call.operands[:5], call.operands.initial_state
    offsets = None if call.operands.cu_seqlens is None else call.operands.cu_seqlens[0]
    options = call.options | {"initial_state": state, "cu_seqlens": offsets}
    o, last = oracle.chunk(*tokens, **options)
    grads = oracle.chunk_grad(*tokens, do, dstate, **options)
    return Step(o, last, states_kept(call), {name: grads[name] for name in WRT if getattr(call.operands, name) is not None})


def states_kept(call):
    """The states after 0, 64, ... tokens of each sequence, [B, C, HV, V, K]: walks of that many tokens."""
    tokens, state, offsets = call.operands[:5], call.operands.initial_state, call.operands.cu_seqlens
    if offsets is None:
        walks = [(slice(None), 0, end) for end in range(0, tokens[2].shape[1], CHUNK)]
    else:
        spans = enumerate(itertools.pairwise(offsets[0].tolist()))
        walks = [(slice(n, n + 1), begin, end) for n, span in spans for begin, end in [(span[0], e) for e in range(*span, CHUNK)]]
    found = []
    for of, begin, end in walks:
        start = None if state is None else state[of]
        found.append(oracle.chunk(*(x[:, begin:end] for x in tokens), **call.options, initial_state=start)[1])
    return np.stack(found, axis=1)


def check(call, case, given=None):
    """One training step against the oracle."""
    given = cotangents(call) if given is None else given
    limits = chunk_kernel_tolerance(case)
    found, expected = step(call, *given), by_oracle(call, *given)
    assert (found.o.dtype, found.state.dtype) == (case.dtype, case.state_dtype)
    import os
    if os.environ.get("SHOW"):
        e=oracle.error
        print(case.name, "%.2g %.2g %.2g"%(e(found.o,expected.o), e(found.state,expected.state), e(found.states[:, : expected.states.shape[1]],expected.states)), {n: float("%.2g"%e(found.grads[n],expected.grads[n])) for n in found.grads})
        if "A_log" in found.grads: print("     A_log/size %.2g"% (np.linalg.norm(found.grads["A_log"]-expected.grads["A_log"])/np.linalg.norm(summands_of_A_log(call, expected.grads["g"])),))
        return found
    assert_close(found.o, expected.o, limits.output)
    assert_close(found.state, expected.state, limits.state)
    assert_close(found.states[:, : expected.states.shape[1]], expected.states, limits.output)
    assert_close(found.grads, expected.grads, limits.gradient)
    return found

def summands_of_A_log(call, dg):
    _, slope, by_A_log = oracle._gate(np.asarray(call.operands.g, np.float64), call.options["gate"])
    return np.divide(dg*by_A_log, slope, where=slope != 0, out=np.zeros_like(slope))


BASE = Case("base", batch=1, tokens=70, heads=1, value_heads=1, k_dim=64, v_dim=64, dtype="bfloat16")

SHARED = [c for c in cases.CHUNK_CASES if c.chunk_size == CHUNK]


def mix(call, name, values, seed=2):
    x = getattr(call.operands, name)
    return np.random.default_rng(seed).choice(np.asarray(values, np.float32), x.shape)

@pytest.mark.parametrize("dims", [(64,64),(128,64)])
@pytest.mark.parametrize("values", [(0,-200,-1e30),(0,-1e-3,-3e38,-0.3),(0,-3e38),(-3e38,),(-100,-60,-80),(-1e-5,-120),(-0.7,-88)])
def test_log(values,dims):
    case = dataclasses.replace(BASE, name=str(values), gate=None, tokens=150, k_dim=dims[0],v_dim=dims[1])
    call = draw(case)
    check(call.replace(g=mix(call,"g",values)), case)

@pytest.mark.parametrize("gate", ["softplus","lower_bound"])
@pytest.mark.parametrize("values", [(0,-200,200),(0,1e30,-1e30),(0,3e38,-3e38),(1e4,-10.,-20.)])
def test_raw(values,gate):
    case = dataclasses.replace(BASE, name=gate+str(values), gate=gate, tokens=150)
    call = draw(case)
    check(call.replace(g=mix(call,"g",values)), case)

@pytest.mark.parametrize("dtype", ["bfloat16","float32"])
@pytest.mark.parametrize("norm", [0,1])
@pytest.mark.parametrize("which", ["q","k","qk"])
@pytest.mark.parametrize("sizes", [(0,1.),(1e-30,1,),(1e-5,1),(1,4),(1,16),(1,64),(1,1e30)])
def test_sizes(sizes,norm,which,dtype):
    case = dataclasses.replace(BASE, name=f"{which}{sizes}{norm}{dtype}", qk_l2norm=bool(norm), tokens=70,dtype=dtype)
    call = draw(case)
    size = np.random.default_rng(3).choice(np.float32(sizes), (1,70,1,1))
    if max(sizes)>1:
        size[:]=min(sizes); size[0,20]=max(sizes)
    check(call.replace(**{n: (getattr(call.operands,n).astype("float32")*size).astype(call.operands.q.dtype) for n in which}), case)
