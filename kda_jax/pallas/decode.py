"""decode on Pallas."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kda_jax import _gates
from kda_jax._operands import L2NORM_EPS, PoolOperands, Spec
from kda_jax.kernels.pallas import decode as kernels
from kda_jax.kernels.pallas.stream import Tile
from kda_jax.pallas.launch import launch, smem

TILE = Tile(rows=32, stages=4, ctas=3)


def decode(args: PoolOperands, spec: Spec, *, tile: Tile = TILE) -> tuple[jax.Array, ...]:
    n, value_heads, _ = args.v.shape
    if args.state.size == 0 or n == 0:  # no slot is live
        return jnp.zeros(args.v.shape, args.v.dtype), args.state
    options = kernels.Options(
        gate=spec.gate,
        lower_bound=spec.lower_bound,
        linear_above=_gates.SOFTPLUS_LINEAR_ABOVE,
        l2norm_eps=L2NORM_EPS if spec.qk_l2norm else None,
        beta_range=(2.0 if spec.allow_neg_eigval else 1.0) if spec.beta_sigmoid else None,
        scale=spec.scale,
    )
    return launch(
        kernels.decode,
        args,
        (jax.ShapeDtypeStruct(args.v.shape, args.v.dtype),),
        (smem((tile.stages, tile.rows), args.v.dtype),),
        heads=n * value_heads,
        tile=tile,
        options=options,
    )
