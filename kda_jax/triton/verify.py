"""verify on Triton, in two forms chosen by T alone, so that a row's bits do not depend on the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kda_jax._operands import PoolOperands, VerifySpec, single_chunk
from kda_jax.kernels.triton import verify as token_parallel_kernels
from kda_jax.kernels.triton import verify_recurrent as recurrent_kernels
from kda_jax.triton.launch import Tile, launch_tiles, like, pool_end, token_constants, token_inputs

# By the pool's dtype and T, where the recurrent form is the faster one for small batches and not much slower for large ones.
RECURRENT_TILES = {
    "float32": {1: Tile(rows=4, warps=1), 2: Tile(rows=4, warps=1), 3: Tile(rows=8, warps=1)},
    "bfloat16": {1: Tile(rows=16, warps=1)},
}
TILES = {"float32": Tile(rows=32, warps=2), "bfloat16": Tile(rows=64, warps=4)}
LEAST_COLUMNS = 8  # of a product on tensor cores


def verify(args: PoolOperands, spec: VerifySpec) -> tuple[jax.Array, ...]:
    constants = token_constants(args, spec) | {
        "T": args.v.shape[1],
        "HAS_SLOTS": args.state_indices is not None,
        "WITH_UPDATE": spec.with_update,
    }
    recurrent = args.v.shape[1] in RECURRENT_TILES[args.state.dtype.name]
    o, *update = (_recurrent if recurrent else _token_parallel)(args, constants)
    return (o, *update) if spec.with_update else (o,)


def _recurrent(args: PoolOperands, constants: dict[str, Any]) -> tuple[jax.Array, ...]:
    outputs, absent = _update_outputs(constants, args.v, args.k, args.g)
    *update, o = launch_tiles(
        recurrent_kernels.verify,
        (*token_inputs(args), pool_end(args.state), *absent),
        (*outputs, *like(args.v)),
        heads=args.v.shape[0] * args.v.shape[2],
        tile=RECURRENT_TILES[args.state.dtype.name][constants["T"]].of_128(args.state),
        fuse=True,
        **constants,
    )
    return o, *update


def _token_parallel(args: PoolOperands, constants: dict[str, Any]) -> tuple[jax.Array, ...]:
    n, t, value_heads, v_dim = args.v.shape
    q, k, _, g, beta, A_log, dt_bias, _, slots = token_inputs(args)
    reads = jax.ShapeDtypeStruct((n, value_heads, 2 * t, args.k.shape[-1]), jnp.bfloat16)
    links_shape = jax.ShapeDtypeStruct((n, value_heads, 2, t, t), jnp.float32)
    outputs, absent = _update_outputs(constants, args.k, args.g)
    *update_kg, reads_high, reads_low, links = launch_tiles(
        token_parallel_kernels.prepare,
        (q, k, g, beta, A_log, dt_bias, slots, pool_end(args.state), *absent),
        (*outputs, reads, reads, links_shape),
        heads=n * value_heads,
        # No rows to divide; the vectors of more tokens would not fit one warp's registers.
        tile=Tile(rows=v_dim, warps=1 if t <= 8 else 2),
        fuse=True,
        **constants,
    )
    outputs, absent = _update_outputs(constants, args.v)
    *update_u, o = launch_tiles(
        token_parallel_kernels.verify,
        (args.v, args.state, slots, reads_high, reads_low, links, pool_end(args.state), *absent),
        (*outputs, *like(args.v)),
        heads=n * value_heads,
        tile=TILES[args.state.dtype.name],
        fuse=True,
        TP=max(single_chunk(2 * t), LEAST_COLUMNS),
        **{name: constants[name] for name in ("T", "WITH_UPDATE", "HV", "K", "V", "HAS_SLOTS")},
    )
    return o, *update_u, *update_kg


def _update_outputs(constants: dict[str, Any], *like: jax.Array) -> tuple[Any, Any]:
    """The update's outputs shaped as ``like``, or the arrays that stand for them, untouched, where it is not wanted."""
    if constants["WITH_UPDATE"]:
        return tuple(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in like), ()
    return (), like
