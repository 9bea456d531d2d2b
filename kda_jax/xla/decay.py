"""The two recursions behind the chunkwise form: products with pairwise decay, and the unit-triangular inverse.

Both halve the chunk log2(C) times and treat the halves of one level as a batch of blocks, so that each level is one
batched matrix product. Neither forms a C x C x K tensor.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b`` in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def matmul_t(a: jax.Array, b: jax.Array) -> jax.Array:
    """``a @ b^T`` in full precision."""
    return jnp.einsum("...ik,...jk->...ij", a, b, precision=lax.Precision.HIGHEST)


def decayed_products(
    rows: tuple[jax.Array, ...], k: jax.Array, g: jax.Array
) -> tuple[tuple[jax.Array, ...], jax.Array, jax.Array]:
    """For each x of ``rows``, ``A[t, i] = sum_d x_t[d] k_i[d] exp(g_{i+1}[d] + ... + g_t[d])`` for i <= t, else 0.

    The exponent of a pair is split where its level of the recursion splits the chunk: into a sum of g from the middle up
    to t and one from i + 1 up to the middle. Both are sums of numbers <= 0 taken in order, so nothing overflows, and no
    large sums are subtracted from each other, so huge and tiny gates mix without loss.

    Args:
      rows: arrays ``[..., C, K]`` (queries, keys), which share their columns.
      k: ``[..., C, K]``.
      g: ``[..., C, K]``, log decays; C a power of two.

    Returns:
      A ``[..., C, C]`` for each of rows; the inclusive prefix sums of g and its exclusive suffix sums ``[..., C, K]``.
    """
    a, prefix, suffix = _decayed_products(tuple(x[..., None, :, :] for x in rows), k[..., None, :, :], g[..., None, :, :])
    return tuple(x[..., 0, :, :] for x in a), prefix[..., 0, :, :], suffix[..., 0, :, :]


def _decayed_products(rows, k, g):
    """decayed_products for n blocks at a time, [..., n, C, K]."""
    if g.shape[-2] == 1:
        return tuple(matmul_t(x, k) for x in rows), g, jnp.zeros_like(g)
    a, prefix, suffix = _decayed_products(tuple(map(_halve, rows)), _halve(k), _halve(g))
    since_middle, until_middle = jnp.exp(_pair(prefix)[1]), jnp.exp(_pair(suffix)[0])
    columns = _pair(_halve(k))[0] * until_middle
    cross = (matmul_t(_pair(_halve(x))[1] * since_middle, columns) for x in rows)
    a = tuple(_lower_block(*_pair(x), block) for x, block in zip(a, cross, strict=True))
    upper_total, lower_total = _pair(prefix[..., -1:, :])
    return a, _join(prefix, 1, upper_total), _join(suffix, 0, lower_total)


def unit_lower_inverse(a: jax.Array) -> jax.Array:
    """``(I + a)^-1`` ``[..., C, C]`` for strictly lower triangular ``a``, C a power of two; only what lies below the
    diagonal of ``a`` is read.

    ``[[P, 0], [X, Q]]^-1 = [[P^-1, 0], [-Q^-1 X P^-1, Q^-1]]`` with all diagonal blocks of one size inverted as one batch.
    """
    return _unit_lower_inverse(a[..., None, :, :])[..., 0, :, :]


def _unit_lower_inverse(a):
    """unit_lower_inverse for n blocks at a time, [..., n, C, C]."""
    c = a.shape[-1]
    if c == 1:
        return jnp.ones_like(a)
    half = c // 2
    diagonal = jnp.stack([a[..., :half, :half], a[..., half:, half:]], axis=-3)
    upper, lower = _pair(_unit_lower_inverse(diagonal.reshape(*a.shape[:-3], -1, half, half)))
    return _lower_block(upper, lower, -matmul(lower, matmul(a[..., half:, :half], upper)))


def _halve(x: jax.Array) -> jax.Array:
    """n blocks as 2n of half the length."""
    *lead, n, c, d = x.shape
    return x.reshape(*lead, 2 * n, c // 2, d)


def _pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The upper and the lower of every two blocks."""
    *lead, n, c, d = x.shape
    x = x.reshape(*lead, n // 2, 2, c, d)
    return x[..., 0, :, :], x[..., 1, :, :]


def _join(sums: jax.Array, half: int, other: jax.Array) -> jax.Array:
    """Sums over n blocks as sums over n / 2: the given half of each pair gains the other half's total.

    A select where a concatenation would do: XLA's CPU backend vectorises it.
    """
    *lead, n, c, d = sums.shape
    gains = (jnp.arange(2) == half)[:, None, None]
    joined = sums.reshape(*lead, n // 2, 2, c, d) + jnp.where(gains, other[..., None, :, :], 0)
    return joined.reshape(*lead, n // 2, 2 * c, d)


def _lower_block(upper: jax.Array, lower: jax.Array, cross: jax.Array) -> jax.Array:
    """[[upper, 0], [cross, lower]]."""
    top = jnp.concatenate([upper, jnp.zeros_like(cross)], axis=-1)
    return jnp.concatenate([top, jnp.concatenate([cross, lower], axis=-1)], axis=-2)
