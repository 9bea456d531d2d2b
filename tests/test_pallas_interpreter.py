"""The Pallas kernel without a GPU: values and races under Mosaic GPU's interpreter, and the program lowered for CUDA."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from kda_jax.kernels.pallas import decode as kernel

import kda_jax as kda
from kda_jax import _decode
from kda_jax.pallas import decode as caller
from kda_jax.testing import cases, oracle, tolerance
from kda_jax.testing.cases import Case

from .common import DECODE, FLAGS, assert_close, assert_equal, stack

KERNEL = "mosaic_gpu_v2"
SLOTS = (6, -1, 2, 7, 0)  # the second and fourth row are padding
SMALL = Case("small", batch=5, value_heads=4, k_dim=64, v_dim=64, state_dtype="bfloat16", pool_size=7, slots=SLOTS)
CASES = [
    dataclasses.replace(SMALL, name=name, **changes)
    for name, changes in {
        "softplus": {},
        "lower-bound-bf16": {"gate": "lower_bound", "dtype": "bfloat16", "dt_bias": False},
        "log-decay-neg-eigval": {"gate": None, "allow_neg_eigval": True, "scale": 0.5},
        "raw-fp16": {"gate": None, "qk_l2norm": False, "beta_sigmoid": False, "dtype": "float16"},
        "no-indices": {"slots": None, "pool_size": 5},
        "all-padded": {"slots": (-1, -5, 100, 7, 1 << 30)},
        "two-tiles-a-head": {"v_dim": 128},
    }.items()
]


@pytest.fixture
def interpreter(monkeypatch):
    """Calls forced to "pallas" run on the CPU, interpreted; yields the interpreter, which saw the races."""
    interpreter = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call")
    params = pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret.params")
    if jax.__version_info__ < (0, 11):
        # JAX 0.10's interpreter has neither operation. Both only say which thread holds what, which it does not model.
        monkeypatch.setattr(kernel, "load", lambda ref, how: ref[...])
        monkeypatch.setattr(plgpu, "layout_cast", lambda x, how: x)
    monkeypatch.setattr(caller, "MULTIPROCESSORS", 1)  # two CTAs, so that each has more tiles than its ring
    # The interpreter's callbacks are effects, which the primitive's lowering has no place for: they run outside of it.
    run = jax.jit(lambda args, spec: caller.decode(args, spec), static_argnums=1)
    primitive = _decode.OPERATION.primitive
    monkeypatch.setattr(primitive, "impl", lambda *leaves, tree, spec: list(run(tree.unflatten(leaves), spec)))
    interpreter.reset_gpu_interpret_mode_state()
    with params.force_gpu_interpret_mode(params.InterpretGPUParams(detect_races=True)):
        yield interpreter
    interpreter.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, interpreter):
    drawn = cases.draw(case, layout="decode")
    options = drawn.options | {"state_indices": case.slots}
    o, state = kda.decode(*drawn.arrays, drawn.state, **options, implementation="pallas")
    reference = oracle.decode(*drawn.arrays, drawn.state, **options)
    limits = tolerance(case.dtype, case.state_dtype)
    assert_close(o, reference[0], limits.output)
    assert_close(state, reference[1], limits.state)
    if case.slots is not None:
        untouched = np.setdiff1d(np.arange(case.pool_size), case.slots)
        assert_equal(state[untouched], drawn.state[untouched])
        assert not np.asarray(o)[[not 0 <= slot < case.pool_size for slot in case.slots]].any()
    assert not interpreter.get_races().races_found


def test_vmap(interpreter):
    """Over all arrays, gate parameters too: every row then has its own."""
    instances = [draw(seed) for seed in range(2)]
    assert_equal(jax.vmap(pallas)(stack(instances)), stack([pallas(arrays) for arrays in instances]))
    assert not interpreter.get_races().races_found


def draw(seed=0, **changes):
    return DECODE.draw(seed, **{"value_heads": 2, "k_dim": 64, "v_dim": 64, "state_dtype": "bfloat16"} | changes)


def pallas(arrays):
    return kda.decode(**arrays, **FLAGS, implementation="pallas")


def program(call, *args, **jit):
    """What a call is lowered to for an H200."""
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(KERNEL)]
    with kda.cuda_target("9.0"):
        return jax.export.export(jax.jit(call, **jit), platforms=["cuda"], disabled_checks=unchecked)(*args).mlir_module()


def test_a_donated_pool_is_updated_in_place():
    """The pool is the same memory before and after the kernel, and before and after the program."""
    arrays = draw()
    state = arrays.pop("state")
    text = program(lambda state, arrays: pallas(arrays | {"state": state}), state, arrays, donate_argnums=0)
    (call,) = re.findall(rf"(%\w+):2 = stablehlo.custom_call @{KERNEL}\((.*?)\)", text)
    operand = call[1].split(", ").index("%arg0")
    assert f"output_operand_alias<output_tuple_indices = [1], operand_index = {operand}," in text
    assert "%arg0: tensor<7x2x64x64xbf16> {tf.aliasing_output = 1" in text
    assert f"return {call[0]}#0, {call[0]}#1 :" in text


@pytest.mark.parametrize("k_dim", [64, 128])
@pytest.mark.parametrize("v_dim", [64, 128])
def test_a_vmapped_call_is_one_call(k_dim, v_dim):
    instances = [draw(seed, k_dim=k_dim, v_dim=v_dim, dtype="bfloat16") for seed in range(2)]
    assert program(jax.vmap(pallas), stack(instances)).count(f"@{KERNEL}(") == 1


def test_shard_map():
    """Heads over devices: every device calls the kernel on its own."""
    arrays = draw(heads=8, value_heads=8)
    mesh = jax.make_mesh((8,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    axes = jax.tree.map(lambda x: jax.P(*("heads" if size == 8 else None for size in x.shape)), arrays)
    out = jax.P(None, "heads"), jax.P(None, "heads")
    text = program(jax.shard_map(pallas, mesh=mesh, in_specs=(axes,), out_specs=out), arrays)
    assert text.count(f"@{KERNEL}(") == 1


def test_a_float32_pool_is_refused():
    with pytest.raises(NotImplementedError, match=re.escape("state has dtype float32; it must be one of ('bfloat16',)")):
        pallas(draw(state_dtype="float32"))
