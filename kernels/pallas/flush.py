"""flush: the state of every row advanced over its accepted tokens, in place.

Bound: memory, as decode. The accepted tokens' u, k and g come to shared memory with the state's tile; where fewer than T
were accepted the last of them is copied again in place of the rejected ones, which costs no memory traffic. Rows that
accepted nothing, and padded ones, are passed over.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .stream import Place, Tile, across_columns, bring_vector, down_rows, layout, load, slot_of, stream


def flush(args: Any, ring: Any, us: Any, ks: Any, gs: Any, ready: Any, *, tile: Tile) -> None:
    """``args`` are references to flush's operands by name; ``us`` is [stages, T, V], ``ks`` and ``gs`` [stages, T, K]."""
    n, t_dim, value_heads, _ = args.u.shape
    group = value_heads // args.k.shape[2]
    columns, rows = (layout(args.state.dtype).reduce(axis) for axis in (0, 1))

    def row(n: jax.Array) -> tuple[jax.Array, jax.Array]:
        accepted = jnp.minimum(args.num_accepted[n], t_dim)
        return jnp.where(accepted > 0, slot_of(args.state_indices, args.state, n), -1), accepted

    def bring(where: Place, stage: jax.Array, row: tuple[jax.Array, ...]) -> None:
        n, hv, _ = where
        for t in range(t_dim):
            token = jnp.minimum(t, row[1] - 1)
            copies = (
                (args.u.at[n, token, hv], us),  # a head's, not a tile's: a tile's may be too few bytes to be aligned
                (args.k.at[n, token, lax.div(hv, jnp.int32(group))], ks),
                (args.g.at[n, token, hv], gs),
            )
            for there, here in copies:
                bring_vector(there, here.at[stage, t], ready.at[stage])

    def update(s: jax.Array, where: Place, stage: jax.Array, row: tuple[jax.Array, ...], _: Any) -> jax.Array:
        def token(t: jax.Array, s: jax.Array) -> jax.Array:
            u = load(us.at[stage, t, pl.ds(where.v, tile.rows)], rows)
            k, g = load(ks.at[stage, t], columns), load(gs.at[stage, t], columns)
            u, k, g = (x.astype(jnp.float32) for x in (u, k, g))
            return s * down_rows(jnp.exp(g), s) + across_columns(u, s) * down_rows(k, s)

        return lax.fori_loop(0, row[1], token, s)

    stream(args.state, ring, ready, tile, n * value_heads, row=row, update=update, bring=bring)
