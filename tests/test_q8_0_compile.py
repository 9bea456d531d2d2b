"""The Triton kernels of q8_0 compiled for sm_90 without a GPU, by tests/compiled_q8_0.py in a process of its own."""

import pytest

from .common import reported_by

pytest.importorskip("triton")
pytest.importorskip("jax_triton")

OPERATIONS = ("matmul", "matmul_pair", "matmul_hc_expand")
SHAPES = ("1", "2", "4", "64", "part-of-a-block")
CALLS = [*(f"{name} {shape}" for name in OPERATIONS for shape in SHAPES), "matmul_hc_expand 8-lanes", "matmul vmap"]
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
    """Nothing is contracted: products and sums are rounded as the kernels write them."""
    assert report[call]["kernels"][0]["fma.rn.f32"] == 0
    assert report[call]["kernels"][0]["dp4a"] > 0


@pytest.mark.parametrize("call", [call for call in CALLS if not call.endswith("block")])
def test_weights_are_requested_ahead_in_16_bytes(report, call):
    assert report[call]["kernels"][0]["cp.async.cg"] > 0


def test_one_binary_serves_many_numbers_of_tokens(report):
    assert report["one binary"]
