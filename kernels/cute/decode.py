"""decode: one token on one row's state, in place.

Bound: memory. A (row, value head) moves its state twice, 128 KiB in float32. So tiles of the state, which lie in one piece,
go through a ring in shared memory: while some are computed with, the next ones are loaded and the last ones stored. What is
small beside the state, a head's token, is requested one head ahead.

Both sums over K, with k and with q, are of the decayed state, so that they are one pass: o = S q + u (k . q).
"""

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32

from . import stream
from .token import (
    TYPES,
    WARP,
    activated,
    by_lane,
    exp,
    held,
    loaded,
    log_decays,
    own_row,
    select,
    slot_of,
    step,
    token_inputs,
    write,
)


def operands(K, V, STATE, GATE, TOKEN):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N", STATE, TOKEN)
    return inputs, [o, inputs[7]], {7: 1}


def shape_of(K, V, STATE):
    return stream.Shape(K, V, STATE, most=16)  # so that a warp's sums of two kinds are a sum a lane


def shared_bytes(K, V, STATE, GATE, TOKEN):
    return shape_of(K, V, STATE).shared_bytes


@cute.jit
def launch(
    stream_: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr,
):  # fmt: skip
    decode(q, k, v, g, beta, A_log, dt_bias, state, slots, options, o, K, V, STATE, GATE, TOKEN).launch(
        **stream.launch_options(v.shape[0] * v.shape[1], shape_of(K, V, STATE)), stream=stream_
    )


def request(head, value_heads, lane, token, A_log, bias_lanes, beta, of_lane, bias, numbers):
    """A head's token, into a lane's registers."""
    n, hv = head // value_heads, head % value_heads
    h = hv // (value_heads // token[0].shape[1])
    for x, to, i in zip(token, of_lane, (h, h, hv), strict=True):
        cute.autovec_copy(x[n, i, lane, None], to)
    # Gate parameters that all rows share have one row.
    cute.autovec_copy(bias_lanes[cutlass.min(n, bias_lanes.shape[0] - 1), hv, lane, None], bias)
    numbers[0] = beta[n, hv].to(Float32)
    numbers[1] = A_log[cutlass.min(n, A_log.shape[0] - 1), hv]


@cute.kernel
def decode(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr,
):  # fmt: skip
    n_rows, heads, value_heads = v.shape[0], q.shape[1], v.shape[1]
    where = functools.partial(slot_of, slots, state.shape[0])
    ring = stream.Ring(state, n_rows * value_heads, where, shape_of(K, V, STATE))
    lane, OWN, each = ring.lane, ring.own, K // WARP
    PIECE = min(OWN, 8) if OWN * K < 2048 else 4  # rows of the state in a lane's registers at once
    if ring.carries:
        stream.carry(ring)
    else:
        token = [by_lane(q, (n_rows, heads), K), by_lane(k, (n_rows, heads), K), by_lane(g, (n_rows, value_heads), K)]
        bias_lanes = by_lane(dt_bias, (dt_bias.shape[0], value_heads), K)
        of_lane = [cute.make_rmem_tensor(cute.make_layout(each), TYPES[TOKEN]) for _ in range(3)]
        bias = cute.make_rmem_tensor(cute.make_layout(each), Float32)
        numbers = cute.make_rmem_tensor(cute.make_layout(2), Float32)  # beta, A_log
        decay, b_q, b_k = (cute.make_rmem_tensor(cute.make_layout(each), Float32) for _ in range(3))
        found = cute.make_rmem_tensor(cute.make_layout(2), Float32)  # beta, k . q

        before = Int32(-1)
        first = cutlass.min(stream.head_of(ring, ring.group), ring.heads - 1)
        request(first, value_heads, lane, token, A_log, bias_lanes, beta, of_lane, bias, numbers)
        for mine in cutlass.range(stream.count_of_group(ring)):
            i = ring.group + mine * stream.GROUPS
            tile, head = stream.tile_of(ring, i), stream.head_of(ring, i)
            first = (tile.part * stream.WARPS + ring.warp) * OWN + own_row(lane, PIECE)
            b_v = [v[tile.n, tile.hv, first + piece].to(Float32) for piece in range(0, OWN, PIECE)]
            if head != before:
                before = head
                raw_q, raw_k, raw_g = (held(x) for x in of_lane)
                found_q, found_k, found[0], found[1] = activated(raw_q, raw_k, numbers[0], options)
                log_decay = log_decays(raw_g, numbers[1], held(bias), options, GATE)
                for e in cutlass.range_constexpr(each):
                    b_q[e], b_k[e], decay[e] = found_q[e], found_k[e], exp(log_decay[e])
                following = stream.next_head(ring, head)
                request(following, value_heads, lane, token, A_log, bias_lanes, beta, of_lane, bias, numbers)

            _, live = slot_of(slots, state.shape[0], tile.n)
            stream.arrived(ring, i)
            for piece in cutlass.range_constexpr(OWN // PIECE):
                places = [stream.row_of(ring, i, piece * PIECE + j) for j in range(PIECE)]
                rows = [loaded(place) for place in places]
                rows, b_o = step(rows, held(decay), held(b_q), held(b_k), found[1], found[0], b_v[piece], lane)
                for row, place in zip(rows, places, strict=True):
                    write(row, place)
                if (lane >= 16) & (lane % (16 // PIECE) == 0):
                    o[tile.n, tile.hv, first + piece * PIECE] = select(live, b_o, Float32(0.0)).to(o.element_type)
            stream.leave(ring, i)
