"""decode and decode_mtp on Triton."""

from __future__ import annotations

import jax

from kda_jax._operands import PagedOperands, PoolOperands, Spec
from kda_jax.kernels.triton import decode as decode_kernels
from kda_jax.kernels.triton import decode_mtp as decode_mtp_kernels
from kda_jax.triton.launch import STATE, Tile, launch_tiles, like, pool_end, token_constants, token_inputs

# One tile for all three: decode_mtp equals decode bit for bit because its sums have the same order.
TILES = {"float32": Tile(rows=4, warps=1), "bfloat16": Tile(rows=16, warps=1)}


def decode(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    n, value_heads, _ = args.v.shape
    return launch_tiles(
        decode_kernels.decode,
        (*token_inputs(args), pool_end(args.state)),
        like(args.v, args.state),
        heads=n * value_heads,
        tile=TILES[args.state.dtype.name].of_128(args.state),
        in_place={STATE: 1},
        HAS_SLOTS=args.state_indices is not None,
        **token_constants(args, spec),
    )


def decode_mtp(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    n, t, value_heads, _ = args.v.shape
    states = jax.ShapeDtypeStruct((n, t, *args.state.shape[1:]), args.state.dtype)
    return launch_tiles(
        decode_mtp_kernels.decode_mtp,
        (*token_inputs(args), pool_end(args.state)),
        (*like(args.v), states),
        heads=n * value_heads,
        tile=TILES[args.state.dtype.name].of_128(args.state),
        HAS_SLOTS=args.state_indices is not None,
        T=t,
        **token_constants(args, spec),
    )


def decode_mtp_paged(args: PagedOperands, spec: Spec) -> tuple[jax.Array, ...]:
    n, t, value_heads, _ = args.v.shape
    return launch_tiles(
        decode_mtp_kernels.decode_mtp_paged,
        (*token_inputs(args), args.num_accepted, pool_end(args.state)),
        like(args.v, args.state),
        heads=n * value_heads,
        tile=TILES[args.state.dtype.name].of_128(args.state),
        in_place={STATE: 1},
        T=t,
        **token_constants(args, spec),
    )
