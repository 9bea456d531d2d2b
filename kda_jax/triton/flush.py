"""flush on Triton; flush_layers is the same launch over the slots of all layers."""

from __future__ import annotations

import jax

from kda_jax._operands import FlushOperands, FlushSpec
from kda_jax.kernels.triton import flush as kernels
from kda_jax.triton.launch import Tile, launch_tiles, like, pool_end

TILES = {"float32": Tile(rows=8, warps=1), "bfloat16": Tile(rows=16, warps=1)}
STATE = FlushOperands._fields.index("state")


def flush(args: FlushOperands, spec: FlushSpec) -> tuple[jax.Array, ...]:
    n, t, value_heads, v_dim = args.u.shape
    slots = args.num_accepted if args.state_indices is None else args.state_indices  # not read when absent
    return launch_tiles(
        kernels.flush,
        (args.u, args.k, args.g, args.state, slots, args.num_accepted, pool_end(args.state)),
        like(args.state),
        heads=n * value_heads,
        tile=TILES[args.state.dtype.name].of_128(args.state),
        in_place={STATE: 0},
        HAS_SLOTS=args.state_indices is not None,
        T=t,
        H=args.k.shape[2],
        HV=value_heads,
        K=args.k.shape[3],
        V=v_dim,
    )
