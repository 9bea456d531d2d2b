"""Products with Q8_0 weights in plain JAX.

A token's bits are to depend on nothing but the token. So whatever rounds is written element by element in a fixed order:
the sums over blocks as a scan, those over lanes one after the other. The sum within a block is of integers and exact.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kda_jax._q8_0_format import BLOCK, blocks, quantize_blocks
from kda_jax._q8_0_operands import MatmulHcExpandOperands, MatmulOperands, MatmulPairOperands, MatmulSpec


def matmul(args: MatmulOperands, spec: MatmulSpec) -> tuple[jax.Array]:
    return (_product(quantize_blocks(blocks(args.x)), args.scales, args.values).astype(args.x.dtype),)


def matmul_pair(args: MatmulPairOperands, spec: MatmulSpec) -> tuple[jax.Array, jax.Array]:
    x = quantize_blocks(blocks(args.x))
    y0, y1 = _product(x, args.scales0, args.values0), _product(x, args.scales1, args.values1)
    return y0.astype(args.x.dtype), y1.astype(args.x.dtype)


def matmul_hc_expand(args: MatmulHcExpandOperands, spec: MatmulSpec) -> tuple[jax.Array]:
    (b,) = matmul(MatmulOperands(args.x, args.scales, args.values), spec)
    return (hc_expand(b, args.residual, args.post, args.comb, args.add),)


def hc_expand(b: jax.Array, residual: jax.Array, post: jax.Array, comb: jax.Array, add: jax.Array | None) -> jax.Array:
    """``(b + add) post`` and then, lane after lane, ``+ comb[src] residual[src]``: [N, L, D] in residual's dtype."""
    b, post, comb, lanes = (a.astype(jnp.float32) for a in (b, post, comb, residual))
    if add is not None:
        b = b + add.astype(jnp.float32)
    out = _rounded(b[:, None, :] * post[:, :, None])
    for src in range(lanes.shape[1]):
        out = out + _rounded(comb[:, src, :, None] * lanes[:, src, None, :])
    return out.astype(residual.dtype)


def _product(x: tuple[jax.Array, jax.Array], scales: jax.Array, values: jax.Array) -> jax.Array:
    """[N, OUT] float32: the blocks' products added one after the other, from the first block on."""
    x_scales, x_values = x
    scales, values = (a if a.ndim == 3 else a[None] for a in (scales, values))  # groups of rows, each with its weight
    groups, out, inputs = values.shape
    grouped = groups, len(x_scales) // groups
    x_scales, x_values = (a.reshape(*grouped, *a.shape[1:]) for a in (x_scales, x_values))
    values = jnp.pad(values, ((0, 0), (0, 0), (0, -inputs % BLOCK)))

    def add_block(total: jax.Array, block: jax.Array) -> tuple[jax.Array, None]:
        x_block = lax.dynamic_index_in_dim(x_values, block, axis=2, keepdims=False)
        w_block = lax.dynamic_slice_in_dim(values, block * BLOCK, BLOCK, axis=2)
        exact = jnp.einsum("gni,goi->gno", x_block, w_block, preferred_element_type=jnp.int32).astype(jnp.float32)
        x_scale, w_scale = (
            lax.dynamic_index_in_dim(a, block, axis=2, keepdims=False).astype(jnp.float32) for a in (x_scales, scales)
        )
        return total + _rounded(exact * (x_scale[:, :, None] * w_scale[:, None, :])), None

    total = jnp.zeros((*grouped, out), jnp.float32)
    total, _ = lax.scan(add_block, total, jnp.arange(scales.shape[2]))
    return total.reshape(-1, out)


def _rounded(product: jax.Array) -> jax.Array:
    """The product as float32 has it. Compilers contract a product and the sum after it into one rounding, or do not, as
    they happen to fuse; they do not through a choice."""
    return jnp.where(product == product, product, jnp.nan)
