"""flush: the state of every row advanced over its accepted tokens, in place.

Bound: memory, as decode, whose ring it uses: 2 V K numbers of state to T (2 V + K) of the update. The accepted tokens are
gone through backwards while the state is under way: what they add to it is summed in registers, each key with the decay
from its token to the last accepted one. When the state arrives it takes one product and one sum an element, whatever T
is. Rows that accepted nothing, and padded ones, are neither loaded nor stored.
"""

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32

from . import stream
from .token import WARP, by_lane, exp, loaded, slot_of, write

UNROLL = 3  # tokens requested together; more would cost registers that keep three programs at a time


def operands(K, V, STATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    state = ("P HV V K", STATE)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")]
    return [*update, state, ("N", "int32"), ("N", "int32")], [state], {3: 0}


def shared_bytes(K, V, STATE):
    return stream.shared_bytes(K, V, STATE)


@cute.jit
def launch(
    stream_: cuda.CUstream,
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr,
):  # fmt: skip
    flush(u, k, g, state, slots, accepted, K, V, STATE).launch(
        **stream.launch_options(u.shape[0] * u.shape[2], K, V, STATE), stream=stream_
    )


def accepting(slots, pool, accepted, n):
    """The slot of row n, and whether there is one and something to be done with it."""
    slot, live = slot_of(slots, pool, n)
    return slot, live & (accepted[n] > 0)


@cute.kernel
def flush(
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr,
):  # fmt: skip
    n_rows, tokens, value_heads, heads = u.shape[0], u.shape[1], u.shape[2], k.shape[2]
    where = functools.partial(accepting, slots, state.shape[0], accepted)
    ring = stream.Ring(state, n_rows * value_heads, where, K, V, STATE)
    OWN, each = ring.own, K // WARP
    k_lanes = by_lane(k, (n_rows, tokens, heads), K)
    g_lanes = by_lane(g, (n_rows, tokens, value_heads), K)
    u_rows = cute.make_tensor(
        u.iterator,
        cute.make_layout(
            (n_rows, tokens, value_heads, V // OWN, OWN),
            stride=(tokens * value_heads * V, value_heads * V, V, OWN, 1),
        ),
    )
    after = cute.make_rmem_tensor(cute.make_layout(each), Float32)  # log decay, from a token to the last accepted one
    added = cute.make_rmem_tensor(cute.make_layout((OWN, each)), Float32)
    for i in cutlass.range(ring.count):
        tile = stream.tile_of(ring, i)
        n, hv = tile.n, tile.hv
        taken = cutlass.min(accepted[n], tokens)
        after.fill(0.0)
        added.fill(0.0)
        for back in cutlass.range(taken, unroll=UNROLL):
            t = taken - 1 - back
            keys = loaded(k_lanes[n, t, hv // (value_heads // heads), ring.lane, None])
            decays = loaded(g_lanes[n, t, hv, ring.lane, None])
            updates = loaded(u_rows[n, t, hv, tile.part * stream.WARPS + ring.warp, None])
            for e in cutlass.range_constexpr(each):
                key = keys[e] * exp(after[e])
                after[e] = after[e] + decays[e]
                for j in cutlass.range_constexpr(OWN):
                    added[j, e] = added[j, e] + updates[j] * key

        stream.arrived(ring, i)
        decay = [exp(after[e]) for e in range(each)]
        for j in cutlass.range_constexpr(OWN):
            row = stream.row_of(ring, i, j)
            write([x * y + added[j, e] for e, (x, y) in enumerate(zip(loaded(row), decay, strict=True))], row)
        stream.leave(ring, i)
    stream.finish(ring)
