"""Which implementation serves: the table, the reasons where a forced one cannot, and the target's part in it."""

import importlib
import importlib.util
import warnings

import jax
import jax.export
import jax.numpy as jnp
import pytest

import kda_jax as kda
from kda_jax import _dispatch
from kda_jax._operands import Unavailable
from kda_jax.cute import verify
from kda_jax.cute.call import ARCHITECTURES

from .common import CHUNK, DECODE, DECODE_MTP, DECODE_MTP_PAGED, FLAGS, SERVING, TRITON, VERIFY, on_cute, over_calls

ANYTHING = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (TRITON, "mosaic_gpu_v2")]

pytest.importorskip("jax_triton")


def exported(call, arrays, capability="9.0"):
    """The text of the program for CUDA."""
    with kda.cuda_target(capability):
        run = jax.jit(lambda arrays: call(arrays))
        return jax.export.export(run, platforms=["cuda"], disabled_checks=ANYTHING)(arrays).mlir_module()


@pytest.fixture
def asked(monkeypatch):
    """The rows that lowering picked, each served by xla in its place."""
    found = []
    functions = {row.operation: row.function for row in _dispatch.TABLE if row.implementation == "xla"}

    def note(row):
        module, name = functions[row.operation].split(":")
        function = getattr(importlib.import_module(module), name)

        def serve(operands, spec):
            found.append(row.implementation)
            return function(operands, spec)

        return serve

    monkeypatch.setattr(_dispatch, "_load", note)
    return found


@pytest.mark.parametrize("row", _dispatch.TABLE, ids=lambda row: f"{row.operation}-{row.implementation}")
def test_rows_name_functions_and_runs(row):
    assert callable(_dispatch._load(row))
    assert row.measured.startswith("benchmarks/results/")
    assert row.implementation in _dispatch.IMPLEMENTATIONS


def test_every_operation_ends_in_xla_that_needs_nothing():
    last = {row.operation: row for row in _dispatch.TABLE}
    assert all(row.implementation == "xla" and row.needs == _dispatch.Needs() for row in last.values())


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what None does on a CPU")
def test_on_cpu_it_is_xla_without_a_word(asked):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda arrays: DECODE(arrays))(DECODE.draw(0, k_dim=64, v_dim=64))
    assert asked == ["xla"]


@pytest.mark.parametrize(
    ("call", "changes", "capability", "expected"),
    [
        *((call, {}, "9.0", "cute") for call in SERVING),
        *((call, {"v_dim": 128}, "9.0", "triton") for call in SERVING),
        *((call, {}, "10.0", "triton") for call in SERVING),  # where CuTe's kernels never ran
        (DECODE, {}, "8.0", "triton"),
        (DECODE, {}, "12.0", "triton"),
        (DECODE, {}, "7.5", "xla"),
        (DECODE, {"k_dim": 32}, "9.0", "xla"),
        (DECODE, {"state_dtype": "bfloat16", "v_dim": 128}, "9.0", "triton"),  # never pallas, whose bits are others
        (VERIFY, {"tokens": 16}, "9.0", "cute"),
        (VERIFY, {"tokens": 17}, "9.0", "xla"),
    ],
    ids=str,
)
def test_none_takes_the_best_that_serves(asked, call, changes, capability, expected):
    exported(call, call.draw(0, **{"k_dim": 64, "v_dim": 64} | changes), capability)
    assert asked == [expected]


def test_decode_and_decode_mtp_take_the_same():
    """Of None's rows: the states of one have the bits of the other."""
    ranked = [
        [(row.implementation, row.needs, row.unproven) for row in _dispatch._rows(call.primitive, None)]
        for call in (DECODE, DECODE_MTP, DECODE_MTP_PAGED)
    ]
    assert ranked[0] == ranked[1] == ranked[2]


@over_calls(*map(on_cute, SERVING))
@pytest.mark.parametrize("capability", ["9.0", "10.0"])
def test_cute_serves_by_name(asked, call, capability):
    exported(call, call.draw(0, k_dim=64), capability)
    assert asked == ["cute"]


def test_cute_rows_need_what_the_kernels_do():
    assert _dispatch._CUTE.compute_capabilities == tuple(ARCHITECTURES)
    assert set(_dispatch._UNPROVEN) < set(ARCHITECTURES)
    assert _dispatch._CUTE_VERIFY.max_tokens == verify.MAX_TOKENS


@pytest.mark.parametrize(
    ("changes", "chunk_size", "capability", "expected"),
    [
        ({}, 64, "9.0", "triton"),
        ({"dtype": "bfloat16", "state_dtype": "bfloat16", "tokens": 1}, 64, "8.0", "triton"),
        ({}, 64, "7.5", "xla"),
        ({}, 32, "9.0", "xla"),
        ({"v_dim": 32}, 64, "9.0", "xla"),
    ],
)
def test_both_passes_of_chunk_take_the_same(asked, changes, chunk_size, capability, expected):
    """What the forward pass saved is for its own backward pass."""

    def run(arrays):
        return kda.chunk(**arrays, **FLAGS, chunk_size=chunk_size)

    def train(arrays):
        return jax.grad(lambda arrays: sum(jnp.sum(x.astype(jnp.float32)) for x in run(arrays)))(arrays)

    arrays = CHUNK.draw(0, **{"k_dim": 64, "v_dim": 64} | changes)
    exported(run, arrays, capability)
    assert asked == [expected]
    exported(train, arrays, capability)
    assert asked == [expected] * 3


def test_targets_are_part_of_the_cache_key(asked):
    """One jitted function, exported for several targets."""
    run = jax.jit(lambda arrays: DECODE(arrays))
    arrays = DECODE.draw(0, k_dim=64, v_dim=64)
    for capability in ("9.0", "8.0", "7.0", "9.0"):
        with kda.cuda_target(capability):
            jax.export.export(run, platforms=["cuda"])(arrays)
    assert asked[:3] == ["cute", "triton", "xla"]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="this machine's own GPU would be the target")
def test_without_a_target_a_cuda_program_is_xla(asked):
    arrays = DECODE.draw(0, k_dim=64, v_dim=64)
    jax.export.export(jax.jit(lambda arrays: DECODE(arrays)), platforms=["cuda"])(arrays)
    assert asked == ["xla"]


def test_a_program_for_several_platforms(asked):
    arrays = DECODE.draw(0, k_dim=64, v_dim=64)
    with kda.cuda_target("9.0"):
        program = jax.export.export(jax.jit(lambda arrays: DECODE(arrays)), platforms=["cpu", "cuda"])(arrays)
    assert sorted(asked) == ["cute", "xla"]
    assert jax.tree.map(jnp.shape, program.call(arrays)) == jax.tree.map(jnp.shape, DECODE(arrays))


def forced(implementation, **changes):
    arrays = DECODE.draw(0, **{"k_dim": 64, "v_dim": 64} | changes)
    return lambda: kda.decode(**arrays, implementation=implementation)


@pytest.mark.parametrize(
    ("changes", "implementation", "reason"),
    [
        ({"k_dim": 32}, "triton", r"head dimension K is 32; it must be one of \(64, 128\)"),
        ({"v_dim": 96}, "triton", r"head dimension V is 96; it must be one of \(64, 128\)"),
        ({}, "pallas", r"state has dtype float32; it must be one of \('bfloat16',\)"),
        ({"v_dim": 128}, "cute", "head dimensions K and V are 64 and 128; they must be equal"),
    ],
)
@pytest.mark.parametrize("jit", [False, True])
def test_a_forced_one_says_why_it_cannot(changes, implementation, reason, jit):
    run = forced(implementation, **changes)
    with pytest.raises(NotImplementedError, match=f"^kda.decode: implementation is '{implementation}', which .*{reason}"):
        jax.eval_shape(run) if jit else run()


@pytest.mark.parametrize(
    ("changes", "chunk_size", "reason"),
    [
        ({}, 32, "chunk_size is 32; it must be 64"),
        ({"k_dim": 32}, 64, r"head dimension K is 32; it must be one of \(64, 128\)"),
    ],
)
def test_forced_for_chunk(changes, chunk_size, reason):
    arrays = CHUNK.draw(0, **{"k_dim": 64, "v_dim": 64} | changes)
    with pytest.raises(NotImplementedError, match=f"^kda.chunk: implementation is 'triton', which .*{reason}"):
        kda.chunk(**arrays, **FLAGS, chunk_size=chunk_size, implementation="triton")


@pytest.mark.parametrize("implementation", ["triton", "cute"])
def test_verify_of_too_many_tokens(implementation):
    arrays = VERIFY.draw(0, k_dim=64, v_dim=64, tokens=17)
    with pytest.raises(NotImplementedError, match="T is 17; it must be at most 16"):
        kda.verify(**arrays, implementation=implementation)


@pytest.mark.parametrize("implementation", ["triton", "cute"])
def test_pools_of_another_dtype(implementation):
    """kda's own checks let none but float64 come so far, and that only where it is enabled."""
    sizes = dict.fromkeys(("N", "P", "H", "HV"), 1) | {"K": 64, "V": 64}
    call = _dispatch.Call("kda_decode", sizes, {"q": "bfloat16", "state": "float16"}, None, None)
    with pytest.raises(NotImplementedError, match=r"state has dtype float16; it must be one of \('float32', 'bfloat16'\)"):
        _dispatch.check_call(implementation, call)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="a GPU would serve it")
@pytest.mark.parametrize("implementation", ["triton", "cute"])
def test_forced_on_a_cpu(implementation):
    with pytest.raises(NotImplementedError, match="platform without CUDA; it must be cuda"):
        forced(implementation)()


@pytest.mark.parametrize(
    ("implementation", "capability", "served"),
    [
        ("triton", "7.5", r"8\.0 or more"),
        ("cute", "8.0", r"one of 9\.0, 10\.0"),
        ("cute", "12.0", r"one of 9\.0, 10\.0"),
    ],
)
def test_forced_for_another_gpu(implementation, capability, served):
    with (
        kda.cuda_target(capability),
        pytest.raises(NotImplementedError, match=rf"compute capability is {capability}; it must be {served}$"),
    ):
        jax.export.export(jax.jit(forced(implementation)), platforms=["cuda"])()


def test_a_missing_package(asked, monkeypatch):
    """None falls back to xla with one warning; a forced name says what to install."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "jax_triton" else find(name, *rest))
    _dispatch._warn_of_unavailable.cache_clear()
    arrays = DECODE.draw(0, k_dim=64, v_dim=64)
    with pytest.warns(UserWarning, match=r"jax_triton is missing: pip install 'kda-jax\[triton\]'"):
        exported(DECODE, arrays, "8.0")
    exported(DECODE, arrays, "8.0")  # and no second warning, which would be an error
    assert asked == ["xla", "xla"]
    with kda.cuda_target("8.0"), pytest.raises(NotImplementedError, match="jax_triton is missing"):
        jax.export.export(jax.jit(forced("triton")), platforms=["cuda"])()


def test_what_is_not_on_this_machine_is_passed_over(asked, monkeypatch):
    """By None, to the next row with one warning a reason; a forced name passes on what to do about it."""

    def unavailable(operands, spec):
        raise Unavailable("it is not compiled: build a store")

    load = _dispatch._load
    monkeypatch.setattr(_dispatch, "_load", lambda row: unavailable if row.implementation == "cute" else load(row))
    _dispatch._warn_of_unavailable.cache_clear()
    first, *others = SERVING
    with pytest.warns(UserWarning, match="does without its cute kernels.*not compiled: build a store") as warned:
        exported(first, first.draw(0, k_dim=64, v_dim=64))
    assert len(warned) == 1
    for call in others:  # and no second warning, which would be an error
        exported(call, call.draw(0, k_dim=64, v_dim=64))
    assert asked == ["triton"] * len(SERVING)
    with kda.cuda_target("9.0"), pytest.raises(NotImplementedError, match=r"'cute', which .* build a store$"):
        jax.export.export(jax.jit(forced("cute")), platforms=["cuda"])()


@pytest.mark.parametrize("wrong", ["sm_90", "9", 90, None])
def test_a_target_that_is_none(wrong):
    with pytest.raises(ValueError, match=r'it must be "major\.minor"'), kda.cuda_target(wrong):
        pass
