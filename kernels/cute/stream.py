"""The ring that states go through: tiles come into shared memory and leave it by bulk copies, one behind the other.

A program has neighbouring tiles. Its last warp carries: it requests tiles as far ahead as places are free, and stores each
when the warps that worked on it say so. The others, in groups that take turns, wait for a tile with ``arrived``, work on it
in place, a lane on the same numbers that it reads, and hand it over with ``leave``. So nothing that a group waits for,
a tile's operands or its own arithmetic, keeps a copy waiting. Rows without a slot are neither loaded nor stored.
"""

import dataclasses
from typing import Any

import cutlass
import cutlass.cute as cute
from cutlass import Int32
from cutlass.cute.nvgpu import cpasync

from .token import TYPES, WARP, wide

GROUPS = 2
WARPS = 4  # of a group
STORING = 2  # stores that may be under way while more is requested
TILE_BYTES = 16384
RING_BYTES = 6 * TILE_BYTES
AT_ONCE = 2  # rings that fit into a multiprocessor's shared memory
PROGRAMS = AT_ONCE * 132  # as many as an H200 has at once


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is known of a ring when it is compiled. ``most`` rows of a tile are a warp's."""

    K: int
    V: int
    STATE: str
    most: int

    @property
    def rows(self):
        return min(self.V, self.most * WARPS, TILE_BYTES // (self.K * TYPES[self.STATE].width // 8))

    @property
    def tile_bytes(self):
        return self.rows * self.K * TYPES[self.STATE].width // 8

    @property
    def stages(self):
        return RING_BYTES // self.tile_bytes

    @property
    def shared_bytes(self):
        return self.stages * (self.tile_bytes + 2 * 8)


def launch_options(heads, shape):
    """Of as many (row, value head) pairs."""
    tiles = heads * (shape.V // shape.rows)
    return {
        "grid": [cutlass.min(tiles, Int32(PROGRAMS)), 1, 1],
        "block": [(GROUPS * WARPS + 1) * WARP, 1, 1],
        "min_blocks_per_mp": AT_ONCE,
        "preferred_smem_carveout": 100,  # percent; left out, the DSL would ask a device
    }


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile lies: a row's value head, and part of the head's rows."""

    n: Any
    hv: Any
    part: Any


class Ring:
    """``where``: the slot of a row, and whether there is one."""

    def __init__(self, state, heads, where, shape):
        dtype, rows, K, V = TYPES[shape.STATE], shape.rows, shape.K, shape.V
        each = K // WARP
        self.own, self.parts, self.stages, self.bytes = rows // WARPS, V // rows, shape.stages, shape.tile_bytes
        self.heads, self.value_heads, self.where = heads, state.shape[1], where
        thread, _, _ = cute.arch.thread_idx()
        self.thread, self.lane = thread, thread % WARP
        self.group, self.warp = thread // (WARPS * WARP), thread // WARP % WARPS
        self.carries = thread >= GROUPS * WARPS * WARP
        program, _, _ = cute.arch.block_idx()
        programs, _, _ = cute.arch.grid_dim()
        each_has, more = heads * self.parts // programs, heads * self.parts % programs
        self.first = program * each_has + cutlass.min(program, more)
        self.count = each_has + Int32(program < more)
        memory = cutlass.utils.SmemAllocator()
        self.places = memory.allocate_tensor(dtype, cute.make_layout((self.stages, rows * K), stride=(rows * K, 1)), 128)
        self.full, self.done = (memory.allocate_array(cutlass.Int64, self.stages) for _ in range(2))
        self.by_lane = cute.make_tensor(
            self.places.iterator, cute.make_layout((self.stages, rows, WARP, each), stride=(rows * K, K, each, 1))
        )
        tiles = (state.shape[0], self.value_heads, self.parts, rows * K)
        strides = (wide(self.value_heads, V * K), V * K, rows * K, 1)
        self.pool = cute.make_tensor(state.iterator, cute.make_layout(tiles, stride=strides))
        bits = self.bytes * 8
        self.load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), dtype, num_bits_per_copy=bits)
        self.store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), dtype, num_bits_per_copy=bits)
        start(self)


# Functions, not methods: the DSL takes a call of a method for a change of its object.
def head_of(ring, i):
    """Of the program's i-th tile."""
    return (ring.first + i) // ring.parts


def tile_of(ring, i):
    """The program's i-th."""
    head = head_of(ring, i)
    return Tile(head // ring.value_heads, head % ring.value_heads, (ring.first + i) % ring.parts)


def count_of_group(ring):
    """The tiles i = group, group + GROUPS, ... that a group has."""
    return (ring.count - ring.group + GROUPS - 1) // GROUPS


def next_head(ring, head):
    """The one whose tiles a group has after those of ``head``, or the last of all."""
    return cutlass.min(head + max(1, GROUPS // ring.parts), ring.heads - 1)


def slot_of(ring, n):
    return ring.where(n)


def row_of(ring, i, j):
    """A lane's part of the j-th row that its warp has of tile i."""
    return ring.by_lane[i % ring.stages, ring.warp * ring.own + j, ring.lane, None]


@cute.jit
def start(ring: cutlass.Constexpr):
    if ring.thread == 0:
        for stage in cutlass.range_constexpr(ring.stages):
            cute.arch.mbarrier_init(ring.full + stage, 1)
            cute.arch.mbarrier_init(ring.done + stage, WARPS)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()


@cute.jit
def request(ring: cutlass.Constexpr, i):
    tile = tile_of(ring, i)
    slot, live = slot_of(ring, tile.n)
    arrives = ring.full + i % ring.stages
    if live:
        cute.arch.mbarrier_arrive_and_expect_tx(arrives, ring.bytes)
        cute.copy(ring.load, ring.pool[slot, tile.hv, tile.part, None], ring.places[i % ring.stages, None], mbar_ptr=arrives)
    else:
        cute.arch.mbarrier_arrive(arrives)


@cute.jit
def carry(ring: cutlass.Constexpr):
    """What the last warp does, all of it in one lane."""
    if ring.lane == 0:
        for i in cutlass.range(cutlass.min(ring.count, ring.stages - STORING)):
            request(ring, i)
        for i in cutlass.range(ring.count):
            cute.arch.mbarrier_wait(ring.done + i % ring.stages, i // ring.stages % 2)
            tile = tile_of(ring, i)
            slot, live = slot_of(ring, tile.n)
            if live:
                cute.copy(ring.store, ring.places[i % ring.stages, None], ring.pool[slot, tile.hv, tile.part, None])
            cute.arch.cp_async_bulk_commit_group()
            later = i + ring.stages - STORING
            if later < ring.count:
                cute.arch.cp_async_bulk_wait_group(STORING, read=True)  # the tile of that place has left it
                request(ring, later)
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def arrived(ring: cutlass.Constexpr, i):
    cute.arch.mbarrier_wait(ring.full + i % ring.stages, i // ring.stages % 2)


@cute.jit
def leave(ring: cutlass.Constexpr, i):
    cute.arch.fence_proxy("async.shared", space="cta")
    cute.arch.sync_warp()
    if ring.lane == 0:
        cute.arch.mbarrier_arrive(ring.done + i % ring.stages)
