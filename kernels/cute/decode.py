"""decode: one token on one row's state, in place.

Bound: memory. A (row, value head) moves its state twice, 128 KiB in float32. So tiles of the state, which lie in one piece,
go through a ring in shared memory: while one tile is computed with, the next ones are loaded and the last one is stored.
A program goes from tile to tile; three of them share a multiprocessor. What is small beside the state, the token's operands,
each tile loads for itself while its state is under way.

Both sums over K, with k and with q, are of the decayed state, so that they are one pass: o = S q + u (k . q).
"""

import functools

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32

from . import stream
from .token import OPTIONS, activated, by_lane, exp, loaded, log_decays, own_row, select, slot_of, step, write


def operands(K, V, STATE, GATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    token = [("N H K", "bfloat16")] * 2 + [("N HV V", "bfloat16"), ("N HV K", "bfloat16"), ("N HV", "bfloat16")]
    gate = [("RA HV", "float32"), ("RB HV K", "float32")]
    state = ("P HV V K", STATE)
    inputs = [*token, *gate, state, ("N", "int32"), (str(OPTIONS), "float32")]
    return inputs, [("N HV V", "bfloat16"), state], {7: 1}


def shared_bytes(K, V, STATE, GATE):
    return stream.shared_bytes(K, V, STATE)


@cute.jit
def launch(
    stream_: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
):  # fmt: skip
    decode(q, k, v, g, beta, A_log, dt_bias, state, slots, options, o, K, V, STATE, GATE).launch(
        **stream.launch_options(v.shape[0] * v.shape[1], K, V, STATE), stream=stream_
    )


@cute.kernel
def decode(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
):  # fmt: skip
    n_rows, heads, value_heads = v.shape[0], q.shape[1], v.shape[1]
    ring = stream.Ring(state, n_rows * value_heads, functools.partial(slot_of, slots, state.shape[0]), K, V, STATE)
    lane, OWN = ring.lane, ring.own
    q_lanes, k_lanes = by_lane(q, (n_rows, heads), K), by_lane(k, (n_rows, heads), K)
    g_lanes = by_lane(g, (n_rows, value_heads), K)
    bias_lanes = by_lane(dt_bias, (dt_bias.shape[0], value_heads), K)
    for i in cutlass.range(ring.count):
        tile = stream.tile_of(ring, i)
        n, hv = tile.n, tile.hv
        h = hv // (value_heads // heads)
        # Gate parameters that all rows share have one row.
        n_A, n_bias = cutlass.min(n, A_log.shape[0] - 1), cutlass.min(n, dt_bias.shape[0] - 1)
        log_decay = log_decays(
            loaded(g_lanes[n, hv, lane, None]), A_log[n_A, hv], loaded(bias_lanes[n_bias, hv, lane, None]), options, GATE
        )
        b_q, b_k, b_beta, kq = activated(
            loaded(q_lanes[n, h, lane, None]), loaded(k_lanes[n, h, lane, None]), beta[n, hv].to(Float32), options
        )
        row = (tile.part * stream.WARPS + ring.warp) * OWN + own_row(lane, OWN)
        b_v = v[n, hv, row].to(Float32)

        stream.arrived(ring, i)
        rows = [loaded(stream.row_of(ring, i, j)) for j in range(OWN)]
        rows, b_o = step(rows, [exp(x) for x in log_decay], b_q, b_k, kq, b_beta, b_v, lane)
        for j in cutlass.range_constexpr(OWN):
            write(rows[j], stream.row_of(ring, i, j))
        _, live = slot_of(slots, state.shape[0], n)
        if (lane >= 16) & (lane % (16 // OWN) == 0):
            o[n, hv, row] = select(live, b_o, Float32(0.0)).to(o.element_type)
        stream.leave(ring, i)
    stream.finish(ring)
