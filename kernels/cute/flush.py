"""flush: the state of every row advanced over its accepted tokens, in place.

Bound: memory, as decode: 2 V K numbers of state to T (2 V + K) of the update. The accepted tokens are gone through
backwards while the state is under way: what they add to it is summed in registers, each key with the decay from its token
to the last accepted one. When the state arrives it takes one product and one sum an element, whatever T is. Rows that
accepted nothing, and padded ones, are neither loaded nor stored.

Two forms with the same bits. STREAM: through decode's ring. Otherwise, for batches of which a ring would see one tile, each
warp loads its own few rows into registers.
"""

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32

from . import stream
from .token import TYPES, WARP, by_lane, exp, loaded, slot_of, state_by_lane, write

UNROLL = 2  # tokens requested together
ROWS = 4  # of the state to a warp, where there is no ring
WARPS = 4


def operands(K, V, STATE, STREAM):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    state = ("P HV V K", STATE)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")]
    return [*update, state, ("N", "int32"), ("N", "int32")], [state], {3: 0}


def shape_of(K, V, STATE):
    return stream.Shape(K, V, STATE, most=4)  # what is added to a warp's rows has to stay in registers


def shared_bytes(K, V, STATE, STREAM):
    return shape_of(K, V, STATE).shared_bytes if STREAM else 0


@cute.jit
def launch(
    stream_: cuda.CUstream,
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, STREAM: cutlass.Constexpr,
):  # fmt: skip
    heads = u.shape[0] * u.shape[2]
    if cutlass.const_expr(STREAM):
        flush_streaming(u, k, g, state, slots, accepted, K, V, STATE).launch(
            **stream.launch_options(heads, shape_of(K, V, STATE)), stream=stream_
        )
    else:
        flush(u, k, g, state, slots, accepted, K, V, STATE).launch(
            grid=[heads * (V // (ROWS * WARPS)), 1, 1], block=[WARPS * WARP, 1, 1], stream=stream_
        )


def accepting(slots, pool, accepted, n):
    """The slot of row n, and whether there is one and something to be done with it."""
    slot, live = slot_of(slots, pool, n)
    return slot, live & (accepted[n] > 0)


@cute.jit
def add_tokens(
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, taken, n, hv, first, lane, after: cute.Tensor, added: cute.Tensor
):
    """Into ``added`` what the tokens add to the rows from ``first`` on, into ``after`` the log decay over all of them."""
    n_rows, tokens, value_heads, heads = u.shape[0], u.shape[1], u.shape[2], k.shape[2]
    own, each = added.shape
    k_lanes = by_lane(k, (n_rows, tokens, heads), WARP * each)
    g_lanes = by_lane(g, (n_rows, tokens, value_heads), WARP * each)
    of_rows = cute.make_layout(
        (n_rows, tokens, value_heads, u.shape[3] // own, own),
        stride=(tokens * value_heads * u.shape[3], value_heads * u.shape[3], u.shape[3], own, 1),
    )
    u_rows = cute.make_tensor(u.iterator, of_rows)
    after.fill(0.0)
    added.fill(0.0)
    for back in cutlass.range(taken, unroll=UNROLL):
        t = taken - 1 - back
        keys = loaded(k_lanes[n, t, hv // (value_heads // heads), lane, None])
        decays = loaded(g_lanes[n, t, hv, lane, None])
        updates = loaded(u_rows[n, t, hv, first // own, None])
        for e in cutlass.range_constexpr(each):
            key = keys[e] * exp(after[e])
            after[e] = after[e] + decays[e]
            for j in cutlass.range_constexpr(own):
                added[j, e] = added[j, e] + updates[j] * key


def advanced(row, after, added, j):
    return [x * exp(after[e]) + added[j, e] for e, x in enumerate(row)]


@cute.kernel
def flush_streaming(
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr,
):  # fmt: skip
    where = functools.partial(accepting, slots, state.shape[0], accepted)
    ring = stream.Ring(state, u.shape[0] * u.shape[2], where, shape_of(K, V, STATE))
    if ring.carries:
        stream.carry(ring)
    else:
        after = cute.make_rmem_tensor(cute.make_layout(K // WARP), Float32)
        added = cute.make_rmem_tensor(cute.make_layout((ring.own, K // WARP)), Float32)
        for mine in cutlass.range(stream.count_of_group(ring)):
            i = ring.group + mine * stream.GROUPS
            tile = stream.tile_of(ring, i)
            taken = cutlass.min(accepted[tile.n], u.shape[1])
            first = (tile.part * stream.WARPS + ring.warp) * ring.own
            add_tokens(u, k, g, taken, tile.n, tile.hv, first, ring.lane, after, added)
            stream.arrived(ring, i)
            for j in cutlass.range_constexpr(ring.own):
                row = stream.row_of(ring, i, j)
                write(advanced(loaded(row), after, added, j), row)
            stream.leave(ring, i)


@cute.kernel
def flush(
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    lane, warp = thread % WARP, thread // WARP
    value_heads, PARTS, each = u.shape[2], V // (ROWS * WARPS), K // WARP
    part, hv, n = program % PARTS, program // PARTS % value_heads, program // PARTS // value_heads
    first = (part * WARPS + warp) * ROWS
    slot, live = accepting(slots, state.shape[0], accepted, n)
    if live:
        lanes = state_by_lane(state, K, V)
        rows = cute.make_rmem_tensor(cute.make_layout((ROWS, each), stride=(each, 1)), TYPES[STATE])
        for j in cutlass.range_constexpr(ROWS):
            cute.autovec_copy(lanes[slot, hv, first + j, lane, None], rows[j, None])
        after = cute.make_rmem_tensor(cute.make_layout(each), Float32)
        added = cute.make_rmem_tensor(cute.make_layout((ROWS, each)), Float32)
        add_tokens(u, k, g, cutlass.min(accepted[n], u.shape[1]), n, hv, first, lane, after, added)
        for j in cutlass.range_constexpr(ROWS):
            row = [rows[j, e].to(Float32) for e in range(each)]
            write(advanced(row, after, added, j), lanes[slot, hv, first + j, lane, None])
