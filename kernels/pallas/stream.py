"""What the streaming kernels share: tiles of the state pool brought to shared memory by TMA, changed there, and sent back.

Bound: memory, every byte of the state read once and written once. A CTA owns a ring of ``stages`` tiles and walks over
its share of all tiles: while it works on one, the TMA unit fetches the next ones and empties the previous ones, so
that the memory system always has requests from every multiprocessor, and no thread waits for it with its hands empty. What
else a tile needs is 100 times smaller and is loaded into registers one tile ahead.
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
    lag: int = 1


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
    """A small array in the layout ``how``, from global memory or, where the layout may not suit its banks, from shared."""
    index = () if jax.__version_info__ >= (0, 11) else ((),)  # JAX 0.10 wants an index, JAX 0.11 none
    return plgpu.load(ref, *index, layout=how, optimized=False)


def bring_vector(there: Any, here: Any, ready: Any) -> None:
    """Starts the copy of a contiguous array to shared memory; with the promise it needs no tensor descriptor."""
    plgpu.copy_gmem_to_smem(there, here, ready, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


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
    ring: Any,
    ready: Any,
    tile: Tile,
    heads: int,
    *,
    row: Callable[[jax.Array], tuple[jax.Array, ...]],
    update: Callable[[jax.Array, Place, jax.Array, tuple[jax.Array, ...], Any], jax.Array],
    prefetch: Callable[[Place], Any] = lambda where: (),
    bring: Callable[[Place, jax.Array, tuple[jax.Array, ...]], None] | None = None,
    send: Callable[[Place, jax.Array, jax.Array], None] | None = None,
) -> None:
    """Runs ``update`` on every tile of the live rows, in place.

    Args:
      state: the pool [P, HV, V, K], in global memory.
      ring: [stages, rows, K] in shared memory, and ``ready``, a barrier for each stage.
      heads: rows of the batch times value heads.
      row: what there is to know of a row of the batch; first its slot, -1 where there is nothing to do.
      update: ``(state tile in float32, place, stage, row, what was prefetched) -> new tile``, for tiles of live rows.
      prefetch: what ``update`` needs of global memory, as registers; called one tile ahead, for dead rows too.
      bring: ``(place, stage, row)`` starts further copies to shared memory that arrive at ``ready``; for live rows.
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

    def fetch(step: jax.Array, what: tuple[jax.Array, ...], where: Place) -> None:
        @pl.when((what[0] >= 0) & (step < count))
        def _():
            stage = lax.rem(step, jnp.int32(tile.stages))
            plgpu.copy_gmem_to_smem(at(what[0], where), ring.at[stage], ready.at[stage])
            if bring is not None:
                bring(where, stage, what)

    first = [place(jnp.int32(step)) for step in range(ahead)]
    coming = [row(where.n) for where in first]
    for step, (what, where) in enumerate(zip(coming, first, strict=True)):
        fetch(jnp.int32(step), what, where)

    def body(step: jax.Array, carry: Any) -> Any:
        (what, *coming), small = carry
        where, far = place(step), place(step + ahead)
        stage = lax.rem(step, jnp.int32(tile.stages))
        # Asked for before anything is waited for; used at the end of this step, and in the next.
        coming = [*coming, row(far.n)]
        next_small = prefetch(place(step + 1))
        live = what[0] >= 0

        @pl.when(live)
        def _():
            plgpu.barrier_wait(ready.at[stage])
            s = plgpu.layout_cast(ring[stage], registers).astype(jnp.float32)
            ring[stage] = update(s, where, stage, what, small).astype(ring.dtype)

        plgpu.commit_smem()

        @pl.when(live)
        def _():
            plgpu.copy_smem_to_gmem(ring.at[stage], at(what[0], where), commit_group=False)

        if send is not None:
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
