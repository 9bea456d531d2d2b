"""decode_mtp: T tokens on one row's state, keeping the state after each.

Bound: memory, the T states written, in large batches; in small ones the latency of a token after the other. A warp holds its
rows of the state in registers from token to token and writes them from there, 512 bytes at once with K = 128 in float32;
the next token's operands are requested before this one's work. Many rows a warp share the token's own arithmetic; few
make more warps: ROWS is a choice, which changes no bit, as sums have one order. Between tokens the state is rounded to the
pool's dtype, as between calls of decode, whose step this is.

Two forms: the states as an output of their own, or, PAGED, each in a slot of the pool. In the second form T = 1 is decode,
without a ring: what batches take of which a ring would see one tile.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32

from .token import (
    TYPES,
    WARP,
    activated,
    by_lane,
    exp,
    held,
    loaded,
    log_decays,
    numbers_of,
    own_row,
    select,
    slot_of,
    state_by_lane,
    step,
    token_inputs,
    wide,
    within,
    write,
)

WARPS = 4


def operands(K, V, STATE, GATE, TOKEN, ROWS, PAGED):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N T", STATE, TOKEN)
    if not PAGED:
        return inputs, [o, ("N T HV V K", STATE)], {}
    inputs[8] = ("N T", "int32")
    return [*inputs, ("N", "int32")], [o, inputs[7]], {7: 1}


def shared_bytes(K, V, STATE, GATE, TOKEN, ROWS, PAGED):
    return 0


@cute.jit
def launch(
    stream: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, *others: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, ROWS: cutlass.Constexpr, PAGED: cutlass.Constexpr,
):  # fmt: skip
    # Without pages no count is read.
    accepted, o, states = (*others, state) if PAGED else (slots, *others)
    programs = v.shape[0] * v.shape[2] * (V // (ROWS * WARPS))
    # Not told how many programs are to share a multiprocessor, the assembler keeps too few registers and spills.
    decode_mtp(
        q, k, v, g, beta, A_log, dt_bias, state, slots, options, accepted, o, states, K, V, STATE, GATE, TOKEN, ROWS, PAGED
    ).launch(grid=[programs, 1, 1], block=[WARPS * WARP, 1, 1], min_blocks_per_mp=1, stream=stream)


@cute.kernel
def decode_mtp(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, accepted: cute.Tensor,
    o: cute.Tensor, states: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, ROWS: cutlass.Constexpr, PAGED: cutlass.Constexpr,
):  # fmt: skip
    """The outputs and states of a padded row are zero; PAGED, it writes no slot."""
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    lane, warp = thread % WARP, thread // WARP
    n_rows, tokens, value_heads, heads, pool = v.shape[0], v.shape[1], v.shape[2], q.shape[2], state.shape[0]
    PARTS = V // (ROWS * WARPS)
    part, hv, n = program % PARTS, program // PARTS % value_heads, program // PARTS // value_heads
    h = hv // (value_heads // heads)
    first = (part * WARPS + warp) * ROWS
    # Where the state is, then the first token, then the state: so the token does not wait for the slot, too.
    if cutlass.const_expr(PAGED):
        count, where = accepted[n], slots[n, 0]
    else:
        slot, live = slot_of(slots, pool, n)
    q_lanes, k_lanes = by_lane(q, (n_rows, tokens, heads), K), by_lane(k, (n_rows, tokens, heads), K)
    g_lanes = by_lane(g, (n_rows, tokens, value_heads), K)
    bias_lanes = by_lane(dt_bias, (dt_bias.shape[0], value_heads), K)
    each = K // WARP
    # Gate parameters that all rows share have one row.
    rate = A_log[cutlass.min(n, A_log.shape[0] - 1), hv]
    bias = loaded(bias_lanes[cutlass.min(n, dt_bias.shape[0] - 1), hv, lane, None])
    chosen = numbers_of(options)

    row = first + own_row(lane, ROWS)
    of_lane = [cute.make_rmem_tensor(cute.make_layout(each), TYPES[TOKEN]) for _ in range(3)]
    firsts = q_lanes[n, 0, h, lane, None], k_lanes[n, 0, h, lane, None], g_lanes[n, 0, hv, lane, None]
    for x, to in zip(firsts, of_lane, strict=True):
        cute.autovec_copy(x, to)
    next_beta, next_v = beta[n, 0, hv], v[n, 0, hv, row]
    if cutlass.const_expr(PAGED):
        if tokens > 1:
            where = slots[n, cutlass.min(cutlass.max(count, 1), tokens) - 1]
        slot, live = within(pool, where)
        live = live & (count > 0) & (count <= tokens)  # another count makes padding
    state_lanes = state_by_lane(state, K, V)
    if cutlass.const_expr(PAGED):
        states_lanes = state_lanes
    else:
        strides = wide(tokens * value_heads, V * K), wide(value_heads, V * K), V * K, K, each, 1
        shape = n_rows, tokens, value_heads, V, WARP, each
        states_lanes = cute.make_tensor(states.iterator, cute.make_layout(shape, stride=strides))
    s = cute.make_rmem_tensor(cute.make_layout((ROWS, each), stride=(each, 1)), TYPES[STATE])
    cute.arch.sync_warp()  # or the assembler would turn the order around
    for j in cutlass.range_constexpr(ROWS):
        cute.autovec_copy(state_lanes[slot, hv, first + j, lane, None], s[j, None])
    for t in cutlass.range(tokens):
        b_q, b_k, b_g = (held(x) for x in of_lane)
        b_beta, b_v = next_beta.to(Float32), next_v.to(Float32)
        later = cutlass.min(t + 1, tokens - 1)
        cute.autovec_copy(q_lanes[n, later, h, lane, None], of_lane[0])
        cute.autovec_copy(k_lanes[n, later, h, lane, None], of_lane[1])
        cute.autovec_copy(g_lanes[n, later, hv, lane, None], of_lane[2])
        next_beta, next_v = beta[n, later, hv], v[n, later, hv, row]

        decay = [exp(x) for x in log_decays(b_g, rate, bias, chosen, GATE)]
        b_q, b_k, b_beta, kq = activated(b_q, b_k, b_beta, chosen)
        rows = [[s[j, e].to(Float32) for e in range(each)] for j in range(ROWS)]
        rows, b_o = step(rows, decay, b_q, b_k, kq, b_beta, b_v, lane)
        for j in cutlass.range_constexpr(ROWS):
            write([select(live, x, Float32(0.0)) for x in rows[j]], s[j, None])
        if cutlass.const_expr(PAGED):
            to, there = within(pool, slots[n, t])
            if live & there:
                for j in cutlass.range_constexpr(ROWS):
                    cute.autovec_copy(s[j, None], states_lanes[to, hv, first + j, lane, None])
        else:
            for j in cutlass.range_constexpr(ROWS):
                cute.autovec_copy(s[j, None], states_lanes[n, t, hv, first + j, lane, None])
        if (lane >= 16) & (lane % (16 // ROWS) == 0):
            o[n, t, hv, row] = select(live, b_o, Float32(0.0)).to(o.element_type)
