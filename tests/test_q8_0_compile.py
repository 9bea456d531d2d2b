"""The Triton kernels of q8_0 compiled for sm_90 without a GPU, by tests/compiled_q8_0.py in a process of its own."""

from functools import partial

import jax
import jax.export
import pytest

import kda_jax as kda
from kda_jax import q8_0

from .common import reported_by
from .quantised import OUT, draw, lanes, weight

pytest.importorskip("triton")
pytest.importorskip("jax_triton")

OPERATIONS = ("matmul", "matmul_pair", "matmul_hc_expand")
SHAPES = ("1", "2", "4", "64", "part-of-a-block")
OTHERS = ["matmul one-block", "matmul long-rows", "matmul large", "matmul_hc_expand 8-lanes", "matmul vmap"]
CALLS = [*(f"{name} {shape}" for name in OPERATIONS for shape in SHAPES), *OTHERS]
calls = pytest.mark.parametrize("call", CALLS)


@pytest.fixture(scope="module")
def report():
    return reported_by("compiled_q8_0.py")


@calls
def test_one_launch_that_spills_nothing(report, call):
    (kernel,) = report[call]["kernels"]
    assert kernel["name"] == f"kda_{call.split()[0]}"
    assert kernel["spilled"] == 0
    assert report[call]["text_copies"] == 0


@calls
def test_bits_are_left_alone(report, call):
    """Nothing is contracted, divided approximately or flushed to zero; and what the interpreter leaves out is there."""
    (kernel,) = report[call]["kernels"]
    assert [kernel[text] for text in ("fma.", "div.full", "ftz")] == [0, 0, 0]
    assert kernel["dp4a"] > 0


@pytest.mark.parametrize("call", [call for call in CALLS if not call.endswith("block")])
def test_weights_are_requested_in_16_bytes(report, call):
    assert report[call]["kernels"][0]["ld.global.v4"] > 0


@pytest.mark.parametrize("capability", ["8.0", "8.6", "10.0"])
def test_other_gpus(report, capability):
    assert report[capability] == [f"kda_{name}" for name in OPERATIONS]


def test_one_binary_serves_numbers_of_tokens_up_to_a_power_of_two(report):
    assert report["one binary"]


@pytest.mark.parametrize("name", OPERATIONS)
def test_they_serve_where_they_can(report, name):
    """And None takes xla elsewhere, while the name says why not."""
    assert report["default"][name] == [[f"kda_{name}"], []]

    def run(inputs=96, **options):
        w = weight(OUT, inputs)
        others = {"matmul": {}, "matmul_pair": {"w1": w}, "matmul_hc_expand": lanes(3)}[name]
        return getattr(q8_0, name)(draw(3, inputs), w, **others, **options)

    with pytest.raises(NotImplementedError, match=f"^q8_0.{name}: .* input size IN is 30; it must be a multiple of 4"):
        run(30, implementation="triton")
    with kda.cuda_target("7.5"), pytest.raises(NotImplementedError, match=f"^q8_0.{name}: .* 7.5; it must be 8.0 or more"):
        jax.export.export(jax.jit(partial(run, implementation="triton")), platforms=["cuda"])()
