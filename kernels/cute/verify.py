"""verify: T draft tokens against one row's state, which is read once and never written.

Bound: memory, V K numbers of state a (row, value head), as long as what T adds is small. So all that tokens ask of the state
is one product on tensor cores, [k_t exp(G_t) ; q_t exp(G_t)] S^T, [2 T, K] x [K, V]. A program goes through several heads.
Some of its warps do what has to do with tokens alone (draft.py), up to a head ahead; the others have 16 or 32 rows each of
the state, and two products that follow each other, whatever T is: of S k and S q, and of v - S k with the two [T, T]
matrices that make u and outputs of it. A product may sum over K in any order: so its factors are 16 bytes side by side of
the state, and no lane has to move them. A warp's rows come by one bulk copy, and the next head's are requested as soon as
these are read.

Precision: factors of the first product are taken as sums of two bfloat16 numbers, to 2^-17; of the other as sums of two TF32
numbers.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, TFloat32

from .draft import FREE, READ_DONE, SOLVE_DONE, after, count, drafts, ways_of, write_keys
from .product import add, atom, halves, zeros
from .token import (
    TYPES,
    WARP,
    from_lane,
    held,
    in_pieces,
    in_words,
    loaded,
    of_words,
    select,
    slot_of,
    token_inputs,
    wide,
    within,
    write,
)

TOKENS = 8, 16  # at most; a kernel for few has fewer registers and less shared memory
EIGHT = 8  # tokens of a product, and rows of the state
STEP = 16  # channels that an instruction sums over
# By the pool's dtype and the tokens at most: eights of the state's rows to a warp.
TILES = {("bfloat16", 8): 4, ("bfloat16", 16): 4, ("float32", 8): 2, ("float32", 16): 4}
AT_ONCE = {"bfloat16": 3, "float32": 2}  # programs of few tokens on a multiprocessor
MULTIPROCESSORS = 132  # of an H200
MISSING = 2 * EIGHT + 8  # numbers from a token's v - S k to the next one's: so lanes meet in few banks
READ = 2 * STEP * EIGHT + 32  # numbers from one step's left factors to the next: so lanes that write meet in no bank


def operands(K, V, STATE, GATE, TOKEN, UPDATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N T", STATE, TOKEN)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")] if UPDATE else []
    return inputs, [o, *update], {}


def at_once(V, STATE, TOKEN, UPDATE, MOST):
    """Programs on a multiprocessor; many tokens in registers leave room for few."""
    if min(TOKENS) == MOST:
        return AT_ONCE[STATE] * (128 // V)
    return 2 if V == 64 or (STATE, TOKEN, UPDATE) == ("bfloat16", "bfloat16", False) else 1


def shared_bytes(K, V, STATE, GATE, TOKEN, UPDATE):
    most = max(TOKENS)
    of_tokens = 2 * (ways_of(K) * count(most) + 2 * most * most + 3 * most)
    missing = most * V // (TILES[STATE, most] * EIGHT) * MISSING
    return V * K * TYPES[STATE].width // 8 + 2 * 2 * (most // EIGHT) * (K // STEP) * READ * 2 + 4 * (of_tokens + missing)


@cute.jit
def launch(
    stream: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    *update: cute.Tensor, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, UPDATE: cutlass.Constexpr,
):  # fmt: skip
    # Three arrays that are not written stand for those that are not wanted.
    u, k_out, g_out = update if UPDATE else (v, k, g)
    arrays = q, k, v, g, beta, A_log, dt_bias, state, slots, options, o, u, k_out, g_out
    if v.shape[1] <= TOKENS[0]:
        enqueue(stream, arrays, K, V, STATE, GATE, TOKEN, UPDATE, TOKENS[0])
    else:
        enqueue(stream, arrays, K, V, STATE, GATE, TOKEN, UPDATE, TOKENS[1])


def enqueue(stream, arrays, K, V, STATE, GATE, TOKEN, UPDATE, MOST):
    q, v = arrays[0], arrays[2]
    value_heads = v.shape[2]
    group = value_heads // q.shape[2]
    # Of what programs would divide by: hv // group is hv * inverse >> 32, for as many heads as there are.
    inverse = ((Int64(1) << 32) + group - 1) // group
    programs = at_once(V, STATE, TOKEN, UPDATE, MOST)
    verify(*arrays, group, inverse, K, V, STATE, GATE, UPDATE, MOST).launch(
        grid=[cutlass.min(v.shape[0] * value_heads, Int32(programs * MULTIPROCESSORS)), 1, 1],
        block=[(V // (TILES[STATE, MOST] * EIGHT) + ways_of(K)) * WARP, 1, 1],
        min_blocks_per_mp=programs,
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )


@cute.kernel
def verify(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    u: cute.Tensor, k_out: cute.Tensor, g_out: cute.Tensor, group: Int32, inverse: Int64,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    UPDATE: cutlass.Constexpr, TOKENS: cutlass.Constexpr,
):  # fmt: skip
    """For up to TOKENS tokens."""
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    programs, _, _ = cute.arch.grid_dim()
    lane = thread % WARP
    line, column = lane // 4, lane % 4  # of a product's fragments
    S = TILES[STATE, TOKENS]
    WARPS, EIGHTS, WAYS = V // (S * EIGHT), TOKENS // EIGHT, ways_of(K)
    n_rows, tokens, value_heads, pool = v.shape[0], v.shape[1], v.shape[2], state.shape[0]
    # Programs of a multiprocessor have their tokens done by different warps, so that its four schedulers share the work.
    turned = thread // WARP + WAYS * (program // MULTIPROCESSORS)
    warp = cute.arch.make_warp_uniform(turned % (WARPS + WAYS))

    # The state: of four neighbouring lanes each has SIDE numbers side by side, which belong to STEPS of the product. Rows
    # are dealt out so that of the sums a lane has those of 2 S rows side by side.
    SIDE = 4 if STATE == "float32" else 8
    STEPS = SIDE // 4
    LOADS = K // (4 * SIDE)
    PART = S * EIGHT * K  # of a state, to a warp
    strides = wide(value_heads, V * K), V * K, PART, 1
    parts = cute.make_tensor(state.iterator, cute.make_layout((pool, value_heads, WARPS, PART), stride=strides))
    memory = cutlass.utils.SmemAllocator()
    rows = memory.allocate_tensor(TYPES[STATE], cute.make_layout((WARPS, PART), stride=(PART, 1)), 128)
    shape, strides = (WARPS, EIGHT // 2, S, 2, LOADS, 4, SIDE), (PART, 2 * S * K, 2 * K, K, 4 * SIDE, SIDE, 1)
    fragments = cute.make_tensor(rows.iterator, cute.make_layout(shape, stride=strides))
    arrived = memory.allocate_array(Int64, WARPS)
    # What tokens read, of two heads, as left factors: halves, eights, steps; a lane's two channels of a key, of a query, ...
    size = EIGHTS * (K // STEP) * READ
    reads = memory.allocate_tensor(BFloat16, cute.make_layout(2 * 2 * size), 128)
    strides = 2 * size, size, (K // STEP) * READ, READ
    reads_fragments = cute.make_tensor(
        reads.iterator, cute.make_layout((2, 2, EIGHTS, K // STEP, WARP, 8), stride=(*strides, 8, 1))
    )
    reads_words = cute.make_tensor(
        reads.iterator, cute.make_layout((2, 2, EIGHTS, K // STEP, EIGHT, 4, 2, 4), stride=(*strides, 32, 8, 4, 1))
    )
    shape = 2, WAYS, count(TOKENS)
    dots = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=(WAYS * count(TOKENS), count(TOKENS), 1)), 16)
    # The [T, T] matrices, as left factors too: eights of columns, rows, a lane's two columns, and what makes u and outputs.
    shape, strides = (2, EIGHTS, TOKENS, 4, 2, 2), (16 * TOKENS * EIGHTS, 16 * TOKENS, 16, 4, 2, 1)
    solved = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    solved_fragments = cute.make_tensor(
        solved.iterator, cute.make_layout((2, EIGHTS, EIGHTS, WARP, 4), stride=(*strides[:2], 128, 4, 1))
    )
    of_tokens = memory.allocate_tensor(Float32, cute.make_layout((2, 3, TOKENS), stride=(3 * TOKENS, TOKENS, 1)), 16)
    # A lane has one of every eight tokens' v, u and o.
    lead = n_rows, tokens, value_heads, WARPS
    o_rows, u_rows = (in_pieces(x, lead, S * EIGHT, 2 * S) for x in (o, u))
    words = 2 * S * v.element_type.width // 32
    v_rows = in_pieces(in_words(v), lead, 4 * words, words)
    values = cute.make_rmem_tensor(cute.make_layout((EIGHTS, words), stride=(words, 1)), v_rows.element_type)
    # v - S k of 16 rows, which goes from lanes of a token to lanes of a row.
    shape, strides = (WARPS, EIGHTS, EIGHT, EIGHT, 2), (EIGHTS * EIGHT * MISSING, EIGHT * MISSING, MISSING, 2, 1)
    missing = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    total = n_rows * value_heads
    n, hv = program // value_heads, program % value_heads
    step_n, step_hv = programs // value_heads, programs % value_heads
    if warp >= WARPS:
        # Where a lane's two channels are among the fragments.
        word = (warp - WARPS) * WARP + lane
        step, place = word // (2 * SIDE) * STEPS + word % (SIDE // 2) // 2, word % (2 * SIDE) // (SIDE // 2)
        to = reads_words[None, None, None, step, None, place, word % 2, None]
        drafts(
            q, k, g, beta, A_log, dt_bias, slots, options, g_out, to, dots, solved, of_tokens, n, hv, step_n, step_hv,
            inverse, warp - WARPS, lane, pool, K, GATE, UPDATE, WARPS, TOKENS,
        )  # fmt: skip
    else:
        slot, live = slot_of(slots, pool, n)
        if lane == 0:
            cute.arch.mbarrier_init(arrived + warp, 1)
            cute.arch.mbarrier_init_fence()
        request_state(parts[slot, hv, warp, None], rows[warp, None], arrived + warp, lane)
        request_values(v_rows, values, n, hv, warp, line, column)
        turn, coming = Int32(0), Int32(0)
        for head in cutlass.range(program, total, programs):
            if turn % WARP == 0:  # the slots of the next 32 heads, one a lane, so that none is waited for
                coming = slots[cutlass.min((head + (lane + 1) * programs) // value_heads, n_rows - 1)]
            buffer = turn % 2
            cute.arch.barrier(barrier_id=READ_DONE + buffer, number_of_threads=(WARPS + WAYS) * WARP)
            cute.arch.mbarrier_wait(arrived + warp, buffer)

            # S k and S q, of eight tokens each.
            product = atom(BFloat16)
            found = [[zeros(4) for _ in range(S)] for _ in range(EIGHTS)]
            for x in cutlass.range_constexpr(LOADS):
                rights = [factors(fragments[warp, line // 2, s, line % 2, x, column, None], STEPS, STATE) for s in range(S)]
                for step in cutlass.range_constexpr(STEPS):
                    for eight in cutlass.range_constexpr(EIGHTS):
                        lefts = []
                        for part in cutlass.range_constexpr(2):
                            left = cute.make_rmem_tensor(cute.make_layout(8), BFloat16)
                            cute.autovec_copy(reads_fragments[buffer, part, eight, x * STEPS + step, lane, None], left)
                            lefts.append(left)
                        for s in cutlass.range_constexpr(S):
                            add(product, found[eight][s], lefts, rights[s][step])
            next_n, next_hv = after(n, hv, step_n, step_hv, value_heads)
            next_slot, next_live = within(pool, from_lane(coming, turn % WARP))
            if head + programs < total:
                request_state(parts[next_slot, next_hv, warp, None], rows[warp, None], arrived + warp, lane)
            cute.arch.barrier(barrier_id=SOLVE_DONE + buffer, number_of_threads=(WARPS + 1) * WARP)

            # From v - S k to u and o.
            product = atom(TFloat32)
            lefts = [
                [
                    halves(loaded(solved_fragments[buffer, earlier, eight, lane, None]), TFloat32)
                    for earlier in range(eight + 1)
                ]
                for eight in range(EIGHTS)
            ]
            for pair in cutlass.range_constexpr(0, S, 2):
                for eight in cutlass.range_constexpr(EIGHTS):
                    t = eight * EIGHT + line
                    of_k, of_q = (of_tokens[buffer, i, t] for i in range(2))
                    b_v = of_words(values[eight, None])
                    for e in cutlass.range_constexpr(2):
                        some = []
                        for s in cutlass.range_constexpr(pair, pair + 2):
                            x = b_v[2 * s + e] - of_k * found[eight][s][e]
                            some.append(select(t < tokens, x, Float32(0.0)))
                            found[eight][s][e] = Float32(0.0)
                            found[eight][s][2 + e] = of_q * found[eight][s][2 + e]
                        write(some, missing[warp, eight, line, 2 * column + e, None])
                cute.arch.sync_warp()
                for earlier in cutlass.range_constexpr(EIGHTS):
                    both = [loaded(missing[warp, earlier, column + 4 * half, line, None]) for half in range(2)]
                    for s in cutlass.range_constexpr(2):
                        right = halves([x[s] for x in both], TFloat32)
                        for eight in cutlass.range_constexpr(earlier, EIGHTS):
                            add(product, found[eight][pair + s], lefts[eight][earlier], right)
                cute.arch.sync_warp()
            if head + programs < total:
                request_values(v_rows, values, next_n, next_hv, warp, line, column)
            if cutlass.const_expr(UPDATE):
                h = Int32(Int64(hv) * inverse >> 32)
                if hv == h * group:
                    write_keys(k, k_out, of_tokens[buffer, 0, None], n, h, live, warp, lane, K, WARPS)
            if head + 2 * programs < total:
                cute.arch.barrier_arrive(barrier_id=FREE + buffer, number_of_threads=(WARPS + WAYS) * WARP)
            for eight in cutlass.range_constexpr(EIGHTS):
                t = eight * EIGHT + line
                if t < tokens:
                    own = [select(live, found[eight][s][2 + e], Float32(0.0)) for s in range(S) for e in range(2)]
                    write(own, o_rows[n, t, hv, warp, column, None])
                    if cutlass.const_expr(UPDATE):
                        own = [select(live, found[eight][s][e], Float32(0.0)) for s in range(S) for e in range(2)]
                        write(own, u_rows[n, t, hv, warp, column, None])
            n, hv, live, turn = next_n, next_hv, next_live, turn + 1


def request_values(v_rows, values, n, hv, warp, line, column):
    eights, _ = values.shape
    for eight in range(eights):
        t = cutlass.min(eight * EIGHT + line, v_rows.shape[1] - 1)
        cute.autovec_copy(v_rows[n, t, hv, warp, column, None], values[eight, None])


@cute.jit
def request_state(part, to, arrived, lane):
    """A warp's part, when all its lanes are done with what is there."""
    cute.arch.sync_warp()
    if lane == 0:
        bits = cute.size(to) * to.element_type.width
        load = cute.make_copy_atom(cute.nvgpu.cpasync.CopyBulkG2SOp(), to.element_type, num_bits_per_copy=bits)
        cute.arch.mbarrier_arrive_and_expect_tx(arrived, bits // 8)
        cute.copy(load, part, to, mbar_ptr=arrived)


def factors(mine, STEPS, STATE):
    """A lane's numbers of a row of the state, of each step, as right factors."""
    own = cute.make_rmem_tensor(cute.make_layout((STEPS, 4), stride=(4, 1)), TYPES[STATE])
    cute.autovec_copy(mine, cute.make_tensor(own.iterator, cute.make_layout(4 * STEPS)))
    steps = [own[s, None] for s in range(STEPS)]
    return [halves(held(x), BFloat16) if STATE == "float32" else [x] for x in steps]
