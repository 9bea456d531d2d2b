"""The Triton kernels of kda.q8_0 on a GPU: ``pytest -m gpu``. Values, bits and special numbers, as in the interpreter."""

from functools import partial

import jax
import numpy as np
import pytest

from kda_jax import q8_0

from .common import assert_equal, on_a_gpu, stack
from .quantised import check_decoding, check_special_numbers, check_written_order, draw, expanded, lanes, weight

pytestmark = on_a_gpu

OUT, OUT1 = 1000, 37  # whole tiles of rows and a part of one
matmul, matmul_pair, matmul_hc_expand = (
    jax.jit(partial(getattr(q8_0, name), implementation="triton")) for name in ("matmul", "matmul_pair", "matmul_hc_expand")
)


SHAPES = [(1, 32), (2, 64), (2, 2048), (3, 100), (8, 1056), (64, 1100), (1, 7168), (64, 4096), (5, 9000)]


@pytest.mark.parametrize(("n", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_and_bits_are_those_of_the_documented_order(n, inputs, dtype):
    check_written_order(matmul, matmul_pair, matmul_hc_expand, n, inputs, dtype, (OUT, OUT1))


@pytest.mark.parametrize("count", range(1, 9))
def test_lane_counts_without_add(count):
    x, w, some = draw(5, 96), weight(OUT), lanes(5, count, out=OUT)
    some.pop("add")
    assert_equal(matmul_hc_expand(x, w, **some), expanded(np.asarray(matmul(x, w)), **some))


def test_a_tokens_bits_depend_on_the_token_alone():
    x, w, some = draw(64, 2048), weight(OUT, 2048), lanes(64, out=OUT)
    everything = matmul(x, w), matmul_hc_expand(x, w, **some)
    for n in (1, 2, 3, 4, 5, 31):
        few = {name: a[64 - n :] for name, a in some.items()}
        alone = matmul(x[64 - n :], w), matmul_hc_expand(x[64 - n :], w, **few)
        assert_equal(alone, tuple(a[64 - n :] for a in everything))


def test_special_numbers():
    check_special_numbers(matmul, OUT)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, 0, None), (0, None, 0), (None, 0, None)], ids=str)
def test_vmap(axes):
    arrays = [(draw(6, 96, seed=i), weight(OUT, seed=i), weight(OUT1, seed=i)) for i in range(3)]
    chosen = [[arrays[i if axis == 0 else 0][at] for at, axis in enumerate(axes)] for i in range(3)]
    given = [stack([one[at] for one in chosen]) if axis == 0 else chosen[0][at] for at, axis in enumerate(axes)]
    assert_equal(jax.vmap(matmul_pair, in_axes=axes)(*given), stack([matmul_pair(*one) for one in chosen]))


def test_4096_tokens_decoded_fused_and_unfused_are_the_same_bytes():
    check_decoding("triton")
