"""Every Triton kernel lowered and compiled for sm_90 without a GPU, by tests/compiled.py in a process of its own."""

import pytest

from .common import reported_by

pytest.importorskip("triton")
pytest.importorskip("jax_triton")

KERNELS = {
    "decode": 1,
    "decode_mtp": 1,
    "decode_mtp_paged": 1,
    "verify-1": 1,
    "verify-4": 2,
    "verify-6": 2,
    "verify-16": 2,
    "flush-2": 1,
    "flush-6": 1,
    "flush_layers": 1,
    "vmap-decode": 1,
}
calls = pytest.mark.parametrize("call", KERNELS)
dims = pytest.mark.parametrize("dim", [64, 128])
pools = pytest.mark.parametrize("pool", ["float32", "bfloat16"])


@pytest.fixture(scope="module")
def report():
    return reported_by("compiled.py")


@dims
@pools
@calls
def test_program_holds_the_kernels(report, call, pool, dim):
    """One custom call, vmapped or for all layers too; two where verify is token-parallel."""
    found = report[f"{call} {pool} {dim}"]
    assert len(found["kernels"]) == KERNELS[call]
    assert all(kernel["name"].startswith("kda_") for kernel in found["kernels"])


@dims
@pools
@calls
def test_nothing_is_spilled(report, call, pool, dim):
    assert [kernel["spilled"] for kernel in report[f"{call} {pool} {dim}"]["kernels"]] == [0] * KERNELS[call]


@dims
@pools
@calls
def test_a_written_pool_is_aliased(report, call, pool, dim):
    """The custom call writes where it read, the donated argument is the output, and nothing is copied between."""
    found = report[f"{call} {pool} {dim}"]
    assert [kernel["aliases"] for kernel in found["kernels"]] == [int(found["writes"])] * KERNELS[call]
    assert found["donated"] == found["writes"]
    assert found["text_copies"] == 0


@pytest.mark.parametrize("pool", ["float32", "bfloat16"])
def test_two_tokens_take_the_form_that_is_faster(report, pool):
    assert len(report[f"verify-2 {pool} 128"]["kernels"]) == (1 if pool == "float32" else 2)


def test_one_binary_serves_every_batch_size(report):
    assert report["one binary"] == dict.fromkeys(["decode", "verify-2", "verify-4", "flush-2"], True)
