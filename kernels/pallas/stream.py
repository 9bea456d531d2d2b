"""A ring of tiles: the state pool comes to shared memory by TMA, is changed there, and is sent back.

A CTA owns a ring of ``stages`` tiles and walks over its share of all tiles: while it works on one, the TMA unit fetches the
next ones and empties the previous ones, so that the memory system always has requests from every multiprocessor, and no
thread waits for it with its hands empty. What else a tile needs is 100 times smaller and is loaded into registers one tile
ahead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

THREADS = "cta"  # the grid's axis
WARPS, WARP = 4, 32
VECTOR_BYTES = 16  # what a thread moves between shared memory and registers at once
ROW_CHUNK = 64  # the columns that the lanes of one row cover at once: K is 64 or 128


class Tile(NamedTuple):
    """How the work is divided: ``rows`` of a head's state a tile, and what a multiprocessor holds at once.

    The ring of each of the ``ctas`` has ``stages`` tiles; a tile's memory is filled again ``lag`` tiles after the
    tile was sent off, so ``stages - lag`` tiles are on their way in, and up to ``lag`` on their way out.
    """

    rows: int
    stages: int
    ctas: int
    lag: int


def layout(dtype: Any) -> Any:
    """The registers' layout of a tile [rows, K]: 16 bytes a lane, 64 columns of a row across lanes, rows across warps.

    Every access to shared memory is then 128 consecutive bytes for each quarter of a warp, free of bank conflicts, and a
    row's sum is a few additions in a thread and a butterfly across 8 or 16 lanes: the same order for every tile size.
    """
    vector = VECTOR_BYTES // jnp.dtype(dtype).itemsize
    rows = WARP * vector // ROW_CHUNK  # at once by a warp
    return plgpu.Layout.TILED(
        plgpu.Tiling(((WARPS * rows, ROW_CHUNK), (rows, ROW_CHUNK), (vector,))),
        warp_dims=(-5,),
        lane_dims=(-3, -2),
        vector_dim=-1,
    )


def load(ref: Any, how: Any) -> jax.Array:
    """A small array of global memory in the layout ``how``."""
    index = () if jax.__version_info__ >= (0, 11) else ((),)  # JAX 0.10 wants an index, JAX 0.11 none
    return plgpu.load(ref, *index, layout=how, optimized=False)


def down_rows(x: jax.Array, tile: jax.Array) -> jax.Array:
    """[K] as a row under every row of the tile."""
    return lax.broadcast_in_dim(x, tile.shape, (1,))


def across_columns(x: jax.Array, tile: jax.Array) -> jax.Array:
    """[rows] along every column of the tile."""
    return lax.broadcast_in_dim(x, tile.shape, (0,))


class Place(NamedTuple):
    """Where a tile lies: row of the batch, value head, and first row of the head's state."""

    n: jax.Array
    hv: jax.Array
    v: jax.Array


def stream(
    state: Any,
    slots: Any,
    ring: Any,
    ready: Any,
    tile: Tile,
    heads: int,
    *,
    prefetch: Callable[[Place], Any],
    update: Callable[[jax.Array, jax.Array, Any], jax.Array],
    send: Callable[[Place, jax.Array, jax.Array], None],
) -> None:
    """Runs ``update`` on every tile of the live rows, in place.

    Args:
      state: the pool [P, HV, V, K], in global memory; ``slots`` the slot of every row, or None where row n has slot n.
      ring: [stages, rows, K] in shared memory, and ``ready``, a barrier for each stage.
      heads: rows of the batch times value heads.
      prefetch: what ``update`` needs of global memory, as registers; called one tile ahead, for padded rows too.
      update: ``(state tile in float32, stage, what was prefetched) -> new tile``, for tiles of live rows.
      send: ``(place, stage, live)`` starts further copies to global memory; called for every tile.
    """
    _, value_heads, v_dim, _ = state.shape
    tiles_of_head = v_dim // tile.rows
    ctas = jnp.int32(lax.axis_size(THREADS))
    cta = lax.axis_index(THREADS)
    count = lax.div(heads * tiles_of_head - cta + (ctas - 1), ctas)
    ahead = tile.stages - tile.lag
    registers = layout(state.dtype)

    def place(step: jax.Array) -> Place:
        # Neighbouring tiles to neighbouring CTAs: what is in flight at one time is one stretch of memory.
        index = cta + jnp.minimum(step, count - 1) * ctas
        head = lax.div(index, jnp.int32(tiles_of_head))
        v = lax.rem(index, jnp.int32(tiles_of_head)) * tile.rows
        return Place(lax.div(head, jnp.int32(value_heads)), lax.rem(head, jnp.int32(value_heads)), v)

    def at(slot: jax.Array, where: Place) -> Any:
        return state.at[slot, where.hv, pl.ds(where.v, tile.rows)]

    def fetch(step: jax.Array, slot: jax.Array, where: Place) -> None:
        @pl.when((slot >= 0) & (step < count))
        def _():
            stage = lax.rem(step, jnp.int32(tile.stages))
            plgpu.copy_gmem_to_smem(at(slot, where), ring.at[stage], ready.at[stage])

    first = [place(jnp.int32(step)) for step in range(ahead)]
    coming = [slot_of(slots, state, where.n) for where in first]
    for step, (slot, where) in enumerate(zip(coming, first, strict=True)):
        fetch(jnp.int32(step), slot, where)

    def body(step: jax.Array, carry: Any) -> Any:
        (slot, *coming), small = carry
        where, far = place(step), place(step + ahead)
        stage = lax.rem(step, jnp.int32(tile.stages))
        # Asked for before anything is waited for; used at the end of this step, and in the next.
        coming = [*coming, slot_of(slots, state, far.n)]
        next_small = prefetch(place(step + 1))
        live = slot >= 0

        @pl.when(live)
        def _():
            plgpu.barrier_wait(ready.at[stage])
            s = plgpu.layout_cast(ring[stage], registers).astype(jnp.float32)
            ring[stage] = update(s, stage, small).astype(ring.dtype)

        plgpu.commit_smem()

        @pl.when(live)
        def _():
            plgpu.copy_smem_to_gmem(ring.at[stage], at(slot, where), commit_group=False)

        send(where, stage, live)
        plgpu.commit_smem_to_gmem_group()  # one a step, an empty one too: the wait below counts them
        plgpu.wait_smem_to_gmem(tile.lag, wait_read_only=True)
        fetch(step + ahead, coming[-1], far)
        return coming, next_small

    lax.fori_loop(0, count, body, (coming, prefetch(first[0])))
    plgpu.wait_smem_to_gmem(0)


def slot_of(slots: Any, state: Any, n: jax.Array) -> jax.Array:
    """The pool slot of row n, -1 for padding."""
    if slots is None:
        return n
    slot = slots[n]
    return jnp.where((slot >= 0) & (slot < state.shape[0]), slot, -1)
