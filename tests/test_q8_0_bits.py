"""kda.q8_0 is strict: a token's bits depend on the token alone, and fused calls have the bits of unfused ones."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kda_jax import q8_0
from kda_jax.testing import oracle_q8_0
from kda_jax.xla.q8_0 import hc_expand

from .common import assert_equal, xla_on_cpu
from .quantised import OUT, OUT1, check_decoding, draw, lanes, weight

pytestmark = xla_on_cpu


def written_out(x, w):
    """matmul in NumPy's float32, in the documented order."""
    scales, values = oracle_q8_0.quantize(x)
    w_values = oracle_q8_0._blocks(np.asarray(w.values, np.float64))
    total = np.zeros((len(values), len(w_values)), np.float32)
    for block in range(values.shape[1]):
        exact = (values[:, block] @ w_values[:, block].T).astype(np.float32)
        total += exact * np.outer(scales[:, block], np.asarray(w.scales, np.float32)[:, block])
    return total


def expanded(b, residual, post, comb, add):
    """The hyper-connection in the documented order, one operation after the other: in NumPy, or in jnp without jit."""
    residual, post, comb, add, b = (a.astype("float32") for a in (residual, post, comb, add, b))
    out = (b + add)[:, None, :] * post[:, :, None]
    for src in range(residual.shape[1]):
        out = out + comb[:, src, :, None] * residual[:, src, None, :]
    return out


@pytest.mark.parametrize(("n", "inputs"), [(1, 1000), (2, 32), (3, 100), (64, 1000)])
def test_bits_are_those_of_the_documented_order(n, inputs):
    x, w, some = draw(n, inputs), weight(65, inputs), lanes(n, out=65)
    b = written_out(x, w)
    np.testing.assert_array_equal(q8_0.matmul(x, w), b)
    np.testing.assert_array_equal(q8_0.matmul_hc_expand(x, w, **some), expanded(b, **some))


@pytest.mark.parametrize(("out", "inputs", "dtype"), [(OUT, 100, "bfloat16"), (1, 320, "float32"), (130, 1024, "float32")])
def test_a_tokens_bits_depend_on_the_token_alone(out, inputs, dtype):
    x, w, some = draw(64, inputs, dtype=dtype), weight(out, inputs), lanes(64, out=out, dtype=dtype)
    all_rows = np.asarray(q8_0.matmul(x, w)), np.asarray(q8_0.matmul_hc_expand(x, w, **some))
    for rows in ([63], [3, 2, 1], list(range(31))):
        few = {name: a[rows] for name, a in some.items()}
        alone = q8_0.matmul(x[rows], w), q8_0.matmul_hc_expand(x[rows], w, **few)
        assert_equal(alone, tuple(a[rows] for a in all_rows))
    x[1:] *= 1e5
    x[2] = np.nan
    assert_equal(q8_0.matmul(x, w)[0], all_rows[0][0])


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize(("inputs", "dtype"), [(32, "float32"), (100, "float32"), (96, "bfloat16")])
def test_fused_equals_unfused_bit_for_bit(n, inputs, dtype):
    x, w0, w1, some = draw(n, inputs, dtype=dtype), weight(OUT, inputs), weight(OUT1, inputs), lanes(n, dtype=dtype)
    singles = q8_0.matmul(x, w0), q8_0.matmul(x, w1)
    assert_equal(q8_0.matmul_pair(x, w0, w1), singles)
    out = expanded(np.asarray(singles[0]), **some).astype(dtype)
    fused = q8_0.matmul_hc_expand
    assert_equal((fused(x, w0, **some), jax.jit(hc_expand)(singles[0], **some)), (out, out))


def test_fused_equals_jnps_operations_one_by_one():
    x, w, some = draw(3, 100), weight(OUT, 100), jax.tree.map(jnp.asarray, lanes(3))
    fused = partial(q8_0.matmul_hc_expand, x, w, **some)
    assert_equal((fused(), jax.jit(fused)()), (expanded(q8_0.matmul(x, w), **some),) * 2)


def test_bits_inside_a_larger_program():
    """Whatever XLA fuses around the calls."""
    w0, w1, w2 = weight(64, 96), weight(OUT, 64), weight(OUT1, 64, seed=9)

    def step(x, some):
        hidden = q8_0.matmul(x * 2, w0)
        return q8_0.matmul_pair(hidden, w1, w2), q8_0.matmul_hc_expand(hidden, w1, **some)

    assert_equal(jax.jit(step)(draw(3, 96), lanes(3)), step(draw(3, 96), lanes(3)))


def test_4096_tokens_decoded_fused_and_unfused_are_the_same_bytes():
    check_decoding("xla")
