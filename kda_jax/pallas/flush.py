"""flush on Pallas; flush_layers is the same launch over the slots of all layers."""

from __future__ import annotations

import jax

from kda_jax._operands import FlushOperands, FlushSpec
from kda_jax.kernels.pallas import flush as kernels
from kda_jax.kernels.pallas.stream import Tile
from kda_jax.pallas.launch import launch, smem

TILE = Tile(rows=32, stages=3, ctas=3)


def flush(args: FlushOperands, spec: FlushSpec, *, tile: Tile = TILE) -> tuple[jax.Array, ...]:
    n, t, value_heads, v_dim = args.u.shape
    if args.state.size == 0 or n == 0 or t == 0:  # nothing is accepted, or no slot is live
        return (args.state,)
    k_dim = args.k.shape[3]
    vectors = ((v_dim, args.u), (k_dim, args.k), (k_dim, args.g))
    return launch(
        kernels.flush,
        args,
        (),
        tuple(smem((tile.stages, t, size), x.dtype) for size, x in vectors),
        heads=n * value_heads,
        tile=tile,
        copies=1 + len(vectors) * t,
    )
