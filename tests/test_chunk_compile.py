"""chunk's Triton kernels compiled for sm_90 without a GPU, by tests/compiled_chunk.py in a process of its own."""

import pytest

from .common import reported_by

pytest.importorskip("triton")
pytest.importorskip("jax_triton")

FORWARD = ["prepare", "forward"]
BACKWARD = ["backward", "cotangents", "state_cotangents", "gradients"]
GRADIENT = [*FORWARD, "prepare", *BACKWARD]
DIMS = "64 64", "128 128", "64 128", "128 64"
KERNELS = (
    {f"forward {dims}": FORWARD for dims in DIMS}
    | {f"gradient {dims}": GRADIENT for dims in DIMS}
    | dict.fromkeys(
        ["no-group", "crowded", "lower-bound", "log-decay", "raw", "packed", "float32", "vmap", "vmap-packed"], GRADIENT
    )
    | {"saved": [*FORWARD, *BACKWARD]}
)
# Bytes that a thread keeps in memory for want of registers, at most, in any of the calls; none in kernels that are not here.
SPILLS = {"prepare": 40, "forward": 160, "backward": 244, "cotangents": 112, "state_cotangents": 348, "gradients": 1160}
calls = pytest.mark.parametrize("call", KERNELS)


@pytest.fixture(scope="module")
def report():
    return reported_by("compiled_chunk.py")


@calls
def test_program_holds_the_kernels(report, call):
    """Each once, vmapped too; what does not depend on the state is computed again in the backward pass, or saved."""
    assert [kernel["name"].removeprefix("kda_") for kernel in report[call]["kernels"]] == KERNELS[call]


@calls
def test_spills_are_within_what_is_documented(report, call):
    spilled = [(kernel["name"].removeprefix("kda_"), kernel["spilled"]) for kernel in report[call]["kernels"]]
    assert [(name, n) for name, n in spilled if n > SPILLS.get(name, 0)] == []


@pytest.mark.parametrize("capability", ["8.6", "10.0"])
def test_kernels_are_compiled_for_other_gpus(report, capability):
    """8.6 has 99 KiB of shared memory a program: loads are requested less far ahead."""
    assert [kernel["name"].removeprefix("kda_") for kernel in report[capability]["kernels"]] == GRADIENT


def test_queries_and_keys_are_not_repeated_to_value_heads(report):
    """No array in their dtype has the size that they would have then, in forward and backward pass."""
    found = {call: report[call]["repeated"] for call in report if "repeated" in report[call]}
    assert found.pop("repeating") != []
    assert len(found) >= 6
    assert set(map(tuple, found.values())) == {()}


@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_one_binary_serves_every_length_and_number_of_sequences(report, layout):
    binaries = report["binaries"][layout]
    assert len(binaries) >= 3
    assert all(some == binaries[0] for some in binaries)
