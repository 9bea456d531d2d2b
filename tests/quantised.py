"""What the tests of q8_0 draw: activations, weights, the lanes of a residual stream; and what the kernels' bits must be."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kda_jax import q8_0
from kda_jax.testing import oracle_q8_0, tolerance
from kda_jax.xla.q8_0 import hc_expand

from .common import assert_close, assert_equal

OUT, OUT1, LANES = 7, 3, 4


def draw(*shape, seed=0, dtype="float32"):
    """A NumPy array, so that what tests do with it is compiled by nobody."""
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def weight(out=OUT, inputs=96, seed=1):
    return q8_0.quantize(draw(out, inputs, seed=seed))


def lanes(n, lanes=LANES, out=OUT, dtype="float32", seed=2):
    """residual, post, comb and add, by name."""
    shapes = {"residual": (n, lanes, out), "post": (n, lanes), "comb": (n, lanes, lanes), "add": (n, out)}
    return {name: draw(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}


def written_out(x, w):
    """matmul in NumPy's float32, in the kernels' order."""
    scales, values = oracle_q8_0.quantize(x)
    w_values = oracle_q8_0._blocks(np.asarray(w.values, np.float64))
    sums = np.zeros((len(values), len(w_values), 32), np.float32)
    for block in range(values.shape[1]):
        exact = (values[:, block] @ w_values[:, block].T).astype(np.float32)
        sums[:, :, block % 32] += exact * np.outer(scales[:, block], np.asarray(w.scales, np.float32)[:, block])
    for half in (16, 8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half:]
    return sums[..., 0]


def expanded(b, residual, post, comb, add=None):
    """The hyper-connection in NumPy's float32, in the documented order."""
    dtype, count = residual.dtype, residual.shape[1]
    b, residual, post, comb = (a.astype("float32") for a in (b, residual, post, comb))
    b = b if add is None else b + add.astype("float32")
    out = b[:, None, :] * post[:, :, None]
    for src in range(count):
        out = out + comb[:, src, :, None] * residual[:, src, None, :]
    return out.astype(dtype)


def check_decoding(implementation):
    """4,096 tokens of a small model decoded with the fused calls and with single products are the same bytes.

    Two lanes of a residual stream, fed by the token before; a difference in one bit would be carried on.
    """
    down, gate, up, head = weight(64, 32), weight(48, 32, seed=5), weight(32, 64, seed=6), weight(256, 48, seed=7)
    embedding, post, comb = draw(256, 32), draw(1, 2) ** 2, draw(1, 2, 2, seed=3) / 2
    matmul, matmul_pair, matmul_hc_expand = (
        partial(call, implementation=implementation) for call in (q8_0.matmul, q8_0.matmul_pair, q8_0.matmul_hc_expand)
    )

    def fused(x, stream):
        hidden, gated = matmul_pair(x, down, gate)
        return matmul_hc_expand(jnp.tanh(hidden), up, stream, post, comb, add=x), gated

    def unfused(x, stream):
        hidden, gated = matmul(x, down), matmul(x, gate)
        return hc_expand(matmul(jnp.tanh(hidden), up), stream, post, comb, x), gated

    def decode(layer, token, stream):
        def step(carry, key):
            token, stream = carry
            x = jnp.take(embedding, token, axis=0) + jnp.tanh(stream[:, 0])
            stream, gated = layer(x, stream)
            token = jax.random.categorical(key, matmul(jnp.tanh(gated), head))
            return (token, stream), (token, stream)

        return lax.scan(step, (token, stream), jax.random.split(jax.random.key(0), 4096))[1]

    start = jnp.zeros(1, int), jnp.zeros((1, 2, 32))
    tokens, streams = jax.jit(partial(decode, fused))(*start)
    assert_equal(jax.jit(partial(decode, unfused))(*start), (tokens, streams))
    assert len(np.unique(tokens)) > 100
    assert jnp.isfinite(streams).all()


def check_written_order(matmul, matmul_pair, matmul_hc_expand, n, inputs, dtype, outs) -> None:
    """A kernel's three operations: values near the oracle's, bits of the documented order, the pair's as two products'."""
    x, w0, w1 = draw(n, inputs, dtype=dtype), weight(outs[0], inputs), weight(outs[1], inputs)
    some = lanes(n, out=outs[0], dtype=dtype)
    y0, y1 = matmul_pair(x, w0, w1)
    out = matmul_hc_expand(x, w0, **some)
    reference = oracle_q8_0.matmul(x, w0), oracle_q8_0.matmul(x, w1), oracle_q8_0.matmul_hc_expand(x, w0, **some)
    assert_close((y0, y1, out), reference, tolerance(dtype).output)
    b0, b1 = written_out(x, w0).astype(dtype), written_out(x, w1).astype(dtype)
    assert_equal((y0, y1, matmul(x, w0), matmul(x, w1)), (b0, b1, b0, b1))
    assert_equal(out, expanded(b0, **some))


def check_special_numbers(matmul, out):
    """As with xla: zero and tiny tokens give zero; what is not finite shows in its row."""
    x = draw(5, 96)
    x[0], x[1], x[2, 40], x[3, 50] = 0, 1e-39, np.nan, np.inf
    y = np.asarray(matmul(x, weight(out)))
    assert not y[:2].any()
    assert np.isnan(y[2:4]).all()
    assert_equal(y[4:], matmul(x[4:], weight(out)))
