"""The Triton kernels of kda.q8_0, run on CPU by Triton's interpreter: values, and bits as they are written down."""

import os

import jax
import numpy as np
import pytest

from kda_jax._q8_0_operands import MatmulHcExpandOperands, MatmulOperands, MatmulPairOperands, MatmulSpec

from .common import assert_equal
from .quantised import check_special_numbers, check_written_order, draw, expanded, lanes, weight, written_out

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("kernels are compiled in this process; tests/test_gpu_q8_0.py runs them", allow_module_level=True)

from kda_jax.triton import q8_0 as calls

from . import interpreter

OUT, OUT1 = 21, 3  # a tile of rows and a part of one; less than one
SPEC = MatmulSpec("triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(calls, "COMPILED", False)
    # The interpreter's time is programs: larger ones, in two turns or three.
    tiles = {n: tuple(tile._replace(rows=16, threads=32) for tile in some) for n, some in calls.TILES.items()}
    monkeypatch.setattr(calls, "TILES", tiles)
    monkeypatch.setattr(calls, "MULTIPROCESSORS", 1)
    with interpreter.installed(monkeypatch, calls):
        yield


def matmul(x, w):
    return calls.matmul(MatmulOperands(x, w.scales, w.values), SPEC)[0]


def matmul_pair(x, w0, w1):
    return calls.matmul_pair(MatmulPairOperands(x, w0.scales, w0.values, w1.scales, w1.values), SPEC)


def matmul_hc_expand(x, w, residual, post, comb, add=None):
    return calls.matmul_hc_expand(MatmulHcExpandOperands(x, w.scales, w.values, residual, post, comb, add), SPEC)[0]


@pytest.mark.parametrize(("n", "inputs"), [(1, 32), (3, 100), (2, 1100), (5, 2052), (2, 9000)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_bits_are_those_of_the_documented_order(n, inputs, dtype):
    """One block and a part of one, a block of some running sums or more of each, rows in pieces; tokens of two tiles."""
    check_written_order(matmul, matmul_pair, matmul_hc_expand, n, inputs, dtype, (OUT, OUT1))


@pytest.mark.parametrize("count", range(1, 9))
def test_lane_counts_with_and_without_add(count):
    x, w, some = draw(3, 64), weight(OUT, 64), lanes(3, count, out=OUT)
    if count % 2:
        some.pop("add")
    assert_equal(matmul_hc_expand(x, w, **some), expanded(matmul(x, w), **some))


def test_dtypes_of_the_results():
    x, w, some = draw(2, 96, dtype="float16"), weight(OUT), lanes(2, out=OUT)
    some["residual"] = some["residual"].astype("bfloat16")
    assert_equal(matmul_hc_expand(x, w, **some), expanded(matmul(x, w), **some))
    assert matmul(x, w).dtype == "float16"


def test_a_tokens_bits_depend_on_the_token_alone():
    x, w, some = draw(9, 1100), weight(OUT, 1100), lanes(9, out=OUT)
    everything = matmul(x, w), matmul_hc_expand(x, w, **some)
    for rows in ([8], [3, 2], list(range(6))):
        few = {name: a[rows] for name, a in some.items()}
        assert_equal((matmul(x[rows], w), matmul_hc_expand(x[rows], w, **few)), tuple(a[rows] for a in everything))
    x[1:] *= 1e5
    x[2] = np.nan
    assert_equal(matmul(x, w)[0], everything[0][0])


def test_special_numbers():
    check_special_numbers(matmul, OUT)


def test_rounding_is_half_away_from_zero():
    """Numbers at ties and next to them, one a block: with 127 there a number is its own quotient."""
    ties = np.arange(127, dtype=np.float32) + np.float32(0.5)
    some = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(127))])
    x = np.zeros((2, len(some), 32), np.float32)
    x[:, :, 0], x[0, :, 1], x[1, :, 1] = 127, some, -some
    x = x.reshape(2, -1)[:, : 32 * 256], x.reshape(2, -1)[:, -32 * 256 :]
    for part in x:
        w = weight(3, part.shape[1])
        assert_equal(matmul(part, w), written_out(part, w))


@pytest.mark.parametrize("mapped", [(True, True), (True, False), (False, True)], ids=str)
def test_groups_of_tokens_with_weights_of_their_own(mapped):
    """As a vmapped call has them, one weight mapped and the other not too."""
    x, some = draw(6, 96), lanes(6, out=OUT)
    own = [[weight(out, seed=seed) for seed in (0, 1)] for out in (OUT, OUT1)]
    used = [two if is_mapped else two[:1] * 2 for two, is_mapped in zip(own, mapped, strict=True)]
    given = [jax.tree.map(lambda *a: np.stack(a), *two) if two[0] is not two[1] else two[0] for two in used]
    apart = [matmul_pair(x[3 * i : 3 * i + 3], used[0][i], used[1][i]) for i in range(2)]
    y0, y1 = (np.concatenate(a) for a in zip(*apart, strict=True))
    assert_equal(matmul_pair(x, *given), (y0, y1))
    assert_equal((matmul(x, given[0]), matmul_hc_expand(x, given[0], **some)), (y0, expanded(y0, **some)))
