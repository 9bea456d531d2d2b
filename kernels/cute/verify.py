"""verify: T draft tokens against one row's state, which is read once and never written.

Bound: memory, V K numbers of state a (row, value head), as long as what T adds is small. So all that tokens ask of the
state is one product on tensor cores, [V, K] x [K, 2 T]: the reads by k_t exp(G_t) and by q_t exp(G_t). A program has one
value head of a row. It requests the state first, straight into the registers that the product wants it in: a product may
sum over K in any order, so a lane takes 16 bytes side by side for channels that the instruction has apart. While the state
is under way the warps share the tokens: activations, decays as ordered products, so that no exponent is positive, and the
T^2 dots of keys and queries with earlier keys. Then a thread has a row of the state: T numbers u, each from those before.

Halves: x as the sum of two bfloat16 numbers, to 2^-17 of it. A float32 state is taken in halves, too.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32

from .token import (
    OPTIONS,
    TYPES,
    WARP,
    activated,
    by_lane,
    dot,
    exp,
    loaded,
    log_decays,
    select,
    slot_of,
    total,
    wide,
    write,
)

TOKENS = 16  # at most
ROWS = 32  # of the state to a warp, two tiles of the product
PITCH = 2 * TOKENS + 2  # floats from a row's sums to the next row's, so that no two rows meet in a bank


def operands(K, V, STATE, GATE, UPDATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    token = [("N T H K", "bfloat16")] * 2
    token += [("N T HV V", "bfloat16"), ("N T HV K", "bfloat16"), ("N T HV", "bfloat16")]
    gate = [("RA HV", "float32"), ("RB HV K", "float32")]
    inputs = [*token, *gate, ("P HV V K", STATE), ("N", "int32"), (str(OPTIONS), "float32")]
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")] if UPDATE else []
    return inputs, [("N T HV V", "bfloat16"), *update], {}


def shared_bytes(K, V, STATE, GATE, UPDATE):
    of_tokens = max(3 * TOKENS * K, V * PITCH) * 4
    reads = 2 * 2 * TOKENS * pitch_of(K, STATE) * 2
    return of_tokens + reads + 2 * TOKENS * TOKENS * 4 + TOKENS * 4 + TOKENS * V * 2


def pitch_of(K, STATE):
    """From one read to the next: lanes of a request then meet in no bank."""
    return K + (16 if STATE == "float32" else 32)


@cute.jit
def launch(
    stream: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    *update: cute.Tensor, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    UPDATE: cutlass.Constexpr,
):  # fmt: skip
    # Three arrays that are not written stand for those that are not wanted.
    u, k_out, g_out = update if UPDATE else (v, k, g)
    verify(q, k, v, g, beta, A_log, dt_bias, state, slots, options, o, u, k_out, g_out, K, V, STATE, GATE, UPDATE).launch(
        grid=[v.shape[0] * v.shape[2], 1, 1], block=[V // ROWS * WARP, 1, 1], stream=stream
    )


def halves(values):
    high = [x.to(BFloat16) for x in values]
    return high, [(x - y.to(Float32)).to(BFloat16) for x, y in zip(values, high, strict=True)]


def fragment(values):
    held = cute.make_rmem_tensor(cute.make_layout(len(values)), BFloat16)
    for i, x in enumerate(values):
        held[i] = x
    return held


@cute.kernel
def verify(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    u: cute.Tensor, k_out: cute.Tensor, g_out: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    UPDATE: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    lane, warp = thread % WARP, thread // WARP
    WARPS = V // ROWS
    n_rows, tokens, value_heads, heads, pool = v.shape[0], v.shape[1], v.shape[2], q.shape[2], state.shape[0]
    hv, n = program % value_heads, program // value_heads
    group = value_heads // heads
    h = hv // group
    slot, live = slot_of(slots, pool, n)

    # The state: of four neighbouring lanes each has SIDE numbers side by side, which are STEPS of the product's K.
    SIDE = 4 if STATE == "float32" else 8
    STEPS = SIDE // 4
    LOADS = K // (4 * SIDE)
    fragments = cute.make_tensor(
        state.iterator,
        cute.make_layout(
            (pool, value_heads, V, LOADS, 4, SIDE), stride=(wide(value_heads, V * K), V * K, K, 4 * SIDE, SIDE, 1)
        ),
    )
    held = cute.make_rmem_tensor(
        cute.make_layout((2, 2, LOADS, SIDE), stride=(2 * LOADS * SIDE, LOADS * SIDE, SIDE, 1)), TYPES[STATE]
    )
    for m in cutlass.range_constexpr(2):
        for half in cutlass.range_constexpr(2):
            row = warp * ROWS + m * 16 + half * 8 + lane // 4
            for x in cutlass.range_constexpr(LOADS):
                cute.autovec_copy(fragments[slot, hv, row, x, lane % 4, None], held[m, half, x, None])

    memory = cutlass.utils.SmemAllocator()
    of_tokens = memory.allocate_tensor(Float32, cute.make_layout(max(3 * TOKENS * K, V * PITCH)), 128)
    by_token = by_lane(of_tokens, (3, TOKENS), K)  # keys, queries, decays
    answers = cute.make_tensor(of_tokens.iterator, cute.make_layout((V, TOKENS, 2), stride=(PITCH, 2, 1)))  # afterwards
    PITCH_READS = pitch_of(K, STATE)
    reads = memory.allocate_tensor(BFloat16, cute.make_layout(2 * 2 * TOKENS * PITCH_READS), 128)
    reads_lanes = cute.make_tensor(
        reads.iterator,
        cute.make_layout((2, 2 * TOKENS, WARP, K // WARP), stride=(2 * TOKENS * PITCH_READS, PITCH_READS, K // WARP, 1)),
    )
    reads_fragments = cute.make_tensor(
        reads.iterator,
        cute.make_layout((2, 2 * TOKENS, LOADS, 4, SIDE), stride=(2 * TOKENS * PITCH_READS, PITCH_READS, 4 * SIDE, SIDE, 1)),
    )
    links = memory.allocate_tensor(Float32, cute.make_layout((2, TOKENS, TOKENS), stride=(TOKENS * TOKENS, TOKENS, 1)), 16)
    betas = memory.allocate_tensor(Float32, cute.make_layout(TOKENS), 16)
    values = memory.allocate_tensor(BFloat16, cute.make_layout((TOKENS, V), stride=(V, 1)), 16)

    q_lanes, k_lanes = by_lane(q, (n_rows, tokens, heads), K), by_lane(k, (n_rows, tokens, heads), K)
    g_lanes = by_lane(g, (n_rows, tokens, value_heads), K)
    rate = A_log[cutlass.min(n, A_log.shape[0] - 1), hv]
    bias = loaded(by_lane(dt_bias, (dt_bias.shape[0], value_heads), K)[cutlass.min(n, dt_bias.shape[0] - 1), hv, lane, None])
    for t in cutlass.range(tokens, unroll=4):
        values[t, thread] = v[n, t, hv, thread]
    for mine in cutlass.range((tokens - warp + WARPS - 1) // WARPS, unroll=2):
        t = warp + mine * WARPS
        log_decay = log_decays(loaded(g_lanes[n, t, hv, lane, None]), rate, bias, options, GATE)
        b_q, b_k, b_beta, kq = activated(
            loaded(q_lanes[n, t, h, lane, None]), loaded(k_lanes[n, t, h, lane, None]), beta[n, t, hv].to(Float32), options
        )
        write(b_k, by_token[0, t, lane, None])
        write(b_q, by_token[1, t, lane, None])
        write([exp(x) for x in log_decay], by_token[2, t, lane, None])
        betas[t] = b_beta
        links[1, t, t] = kq
        if cutlass.const_expr(UPDATE):
            write(
                [select(live, x, Float32(0.0)) for x in log_decay],
                by_lane(g_out, (n_rows, tokens, value_heads), K)[n, t, hv, lane, None],
            )
            if hv % group == 0:
                write(
                    [select(live, x, Float32(0.0)) for x in b_k],
                    by_lane(k_out, (n_rows, tokens, heads), K)[n, t, h, lane, None],
                )
    cute.arch.sync_threads()

    # The reads, with the decays from the state to each token; and each token's links to those behind it.
    start = cute.make_rmem_tensor(cute.make_layout(K // WARP), Float32)
    start.fill(1.0)
    for t in cutlass.range(tokens):
        decay = loaded(by_token[2, t, lane, None])
        for e in cutlass.range_constexpr(K // WARP):
            start[e] = start[e] * decay[e]
        if t % WARPS == warp:
            for kind in cutlass.range_constexpr(2):
                high, low = halves([x * start[e] for e, x in enumerate(loaded(by_token[kind, t, lane, None]))])
                write(high, reads_lanes[0, 2 * t + kind, lane, None])
                write(low, reads_lanes[1, 2 * t + kind, lane, None])
    key = cute.make_rmem_tensor(cute.make_layout(K // WARP), Float32)
    for mine in cutlass.range((tokens - warp + WARPS - 1) // WARPS):
        i = warp + mine * WARPS
        write(loaded(by_token[0, i, lane, None]), key)
        for t in cutlass.range(i + 1, tokens, unroll=2):
            decayed = [key[e] * x for e, x in enumerate(loaded(by_token[2, t, lane, None]))]
            write(decayed, key)
            links[0, t, i] = total(dot(loaded(by_token[0, t, lane, None]), decayed))
            links[1, t, i] = total(dot(loaded(by_token[1, t, lane, None]), decayed))
    cute.arch.sync_threads()

    atom = cute.make_mma_atom(cute.nvgpu.warp.MmaF16BF16Op(BFloat16, Float32, (16, 8, 16)))
    for columns in cutlass.range((tokens + 3) // 4):
        sums = [cute.make_rmem_tensor(cute.make_layout(4), Float32) for _ in range(2)]
        for m in cutlass.range_constexpr(2):
            sums[m].fill(0.0)
        for x in cutlass.range_constexpr(LOADS):
            both = [cute.make_rmem_tensor(cute.make_layout(SIDE), BFloat16) for _ in range(2)]
            for part in cutlass.range_constexpr(2):
                cute.autovec_copy(reads_fragments[part, columns * 8 + lane // 4, x, lane % 4, None], both[part])
            for s in cutlass.range_constexpr(STEPS):
                high, low = (fragment([y[s * 4 + e] for e in range(4)]) for y in both)
                for m in cutlass.range_constexpr(2):
                    # Two numbers of a row, two of the row eight below; then their neighbours.
                    order = [(half, s * 4 + pair * 2 + e) for pair in range(2) for half in range(2) for e in range(2)]
                    mine = [held[m, half, x, e] for half, e in order]
                    if cutlass.const_expr(STATE == "float32"):
                        mine_high, mine_low = halves(mine)
                        products = [(mine_high, high), (mine_high, low), (mine_low, high)]
                    else:
                        products = [(mine, high), (mine, low)]
                    for left, right in products:
                        cute.mma_atom_call(atom, sums[m], fragment(left), right, sums[m])
        for m in cutlass.range_constexpr(2):
            for half in cutlass.range_constexpr(2):
                row = warp * ROWS + m * 16 + half * 8 + lane // 4
                for kind in cutlass.range_constexpr(2):
                    answers[row, columns * 4 + lane % 4, kind] = sums[m][half * 2 + kind]
    cute.arch.sync_threads()

    for t in cutlass.range(tokens):
        b_u = values[t, thread].to(Float32) - answers[thread, t, 0]
        b_o = answers[thread, t, 1]
        for i in cutlass.range(t, unroll=4):
            earlier = answers[thread, i, 0]  # its u by now
            b_u = b_u - links[0, t, i] * earlier
            b_o = b_o + links[1, t, i] * earlier
        b_u = b_u * betas[t]
        b_o = b_o + links[1, t, t] * b_u
        answers[thread, t, 0] = b_u
        o[n, t, hv, thread] = select(live, b_o, Float32(0.0)).to(o.element_type)
        if cutlass.const_expr(UPDATE):
            u[n, t, hv, thread] = select(live, b_u, Float32(0.0))
