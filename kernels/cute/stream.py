"""The ring that states go through: tiles come into shared memory and leave it by bulk copies, one behind the other.

A program has every so-many-th tile. ``Ring`` requests the first tiles; a kernel then waits for each with ``arrived``,
works on it in place, a lane on the same numbers that it reads, and hands it over with ``leave``, which stores it and
requests a later one into the place of the tile before, once that has been stored. Rows without a slot are neither loaded
nor stored.
"""

import dataclasses
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from .token import TYPES, WARP, wide

WARPS = 4
STAGES = 4
TILE_BYTES = 16384
PROGRAMS = 3 * 132  # as many as an H200 has at once: three rings fit into a multiprocessor's shared memory


def rows_of(K, V, STATE):
    """Rows of the state to a tile. A warp takes at most 16, so that its sums of two kinds are a sum a lane."""
    return min(V, 16 * WARPS, TILE_BYTES // (K * TYPES[STATE].width // 8))


def shared_bytes(K, V, STATE):
    return STAGES * (rows_of(K, V, STATE) * K * TYPES[STATE].width // 8 + 8)


def launch_options(heads, K, V, STATE):
    """Of as many (row, value head) pairs."""
    tiles = heads * (V // rows_of(K, V, STATE))
    return {"grid": [cutlass.min(tiles, Int32(PROGRAMS)), 1, 1], "block": [WARPS * WARP, 1, 1]}


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile lies: row, value head, part of the head's rows."""

    n: Any
    hv: Any
    part: Any


class Ring:
    """``slot_of``: the slot of a row, and whether there is one."""

    def __init__(self, state, heads, slot_of, K, V, STATE):
        dtype, rows = TYPES[STATE], rows_of(K, V, STATE)
        each = K // WARP
        self.dtype, self.own = dtype, rows // WARPS
        self.parts, self.value_heads, self.where = V // rows, state.shape[1], slot_of
        thread, _, _ = cute.arch.thread_idx()
        self.thread, self.lane, self.warp = thread, thread % WARP, thread // WARP
        self.program, _, _ = cute.arch.block_idx()
        self.programs, _, _ = cute.arch.grid_dim()
        self.count = (heads * self.parts - self.program + self.programs - 1) // self.programs
        memory = cutlass.utils.SmemAllocator()
        self.places = memory.allocate_tensor(dtype, cute.make_layout((STAGES, rows * K), stride=(rows * K, 1)), 128)
        self.full = memory.allocate_array(cutlass.Int64, STAGES)
        self.by_lane = cute.make_tensor(
            self.places.iterator, cute.make_layout((STAGES, rows, WARP, each), stride=(rows * K, K, each, 1))
        )
        shape = (state.shape[0], self.value_heads, self.parts, rows * K)
        strides = (wide(self.value_heads, V * K), V * K, rows * K, 1)
        self.pool = cute.make_tensor(state.iterator, cute.make_layout(shape, stride=strides))
        bits = rows * K * dtype.width
        self.bytes = bits // 8
        self.load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), dtype, num_bits_per_copy=bits)
        self.store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), dtype, num_bits_per_copy=bits)
        start(self)


# Functions, not methods: the DSL takes a call of a method for a change of its object.
def tile_of(ring, i):
    """The program's i-th."""
    index = ring.program + i * ring.programs
    head = index // ring.parts
    return Tile(head // ring.value_heads, head % ring.value_heads, index % ring.parts)


def slot_of(ring, n):
    return ring.where(n)


def row_of(ring, i, j):
    """A lane's part of the j-th row that its warp has of tile i."""
    return ring.by_lane[i % STAGES, ring.warp * ring.own + j, ring.lane, None]


@cute.jit
def start(ring: cutlass.Constexpr):
    if ring.thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(ring.full + stage, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()
    if ring.thread == 0:
        for i in cutlass.range_constexpr(STAGES - 1):
            if i < ring.count:
                request(ring, i)


@cute.jit
def request(ring: cutlass.Constexpr, i):
    tile = tile_of(ring, i)
    slot, live = slot_of(ring, tile.n)
    arrives = ring.full + i % STAGES
    if live:
        cute.arch.mbarrier_arrive_and_expect_tx(arrives, ring.bytes)
        cute.copy(ring.load, ring.pool[slot, tile.hv, tile.part, None], ring.places[i % STAGES, None], mbar_ptr=arrives)
    else:
        cute.arch.mbarrier_arrive(arrives)


@cute.jit
def arrived(ring: cutlass.Constexpr, i):
    cute.arch.mbarrier_wait(ring.full + i % STAGES, i // STAGES % 2)


@cute.jit
def leave(ring: cutlass.Constexpr, i):
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_threads()
    if ring.thread == 0:
        tile = tile_of(ring, i)
        slot, live = slot_of(ring, tile.n)
        if live:
            cute.copy(ring.store, ring.places[i % STAGES, None], ring.pool[slot, tile.hv, tile.part, None])
        cute.arch.cp_async_bulk_commit_group()
        later = i + STAGES - 1
        if later < ring.count:
            cute.arch.cp_async_bulk_wait_group(1, read=True)  # the tile before has left its place
            request(ring, later)


@cute.jit
def finish(ring: cutlass.Constexpr):
    if ring.thread == 0:
        cute.arch.cp_async_bulk_wait_group(0, read=True)
