"""verify of 9 to 16 draft tokens: as verify.py, with two eights of everything.

Warps of tokens (draft_long.py) do two heads at once, each two warps, one for each eight. They hold their tokens and what the
eights have to do with each other in shared memory, which leaves room for what one head's tokens read from the state: so
that is free again as soon as the first product has read it.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, TFloat32

from .draft import EIGHT, after, keys_of_warp, placed, request_keys, write_keys
from .draft_long import EIGHTS, HEADS, READ_DONE, READ_FREE, SOLVE_DONE, SOLVE_FREE, TOKENS, Kept, drafts
from .product import MISSING, READ, STEP, answer, ask, halves, request_state, rows_of_state, zeros
from .token import (
    TYPES,
    WARP,
    from_lane,
    in_pieces,
    in_words,
    loaded,
    select,
    slot_of,
    wide,
    within,
    write,
)

TILES = 4  # eights of the state's rows to a warp
AT_ONCE = {("bfloat16", 128): 2, ("float32", 128): 1, ("bfloat16", 64): 2, ("float32", 64): 2}  # for registers' sake
SHARED = 228 << 10  # bytes of a multiprocessor, and
OF_PROGRAM = 1 << 10  # what a program takes beside its own


def warps_of(V, STATE):
    """Of products and of tokens."""
    return V // (TILES * EIGHT), HEADS * EIGHTS


def at_once(K, V, STATE, TOKEN):
    """Programs on a multiprocessor."""
    return min(AT_ONCE[STATE, K], SHARED // (shared_bytes(K, V, STATE, TOKEN) + OF_PROGRAM))


def shared_bytes(K, V, STATE, TOKEN):
    products, _ = warps_of(V, STATE)
    reads = 2 * EIGHTS * (K // STEP) * READ * 2
    of_tokens = 4 * HEADS * (2 * EIGHTS * EIGHT * TOKENS + 3 * TOKENS)
    missing = 4 * TOKENS * products * MISSING
    return V * K * TYPES[STATE].width // 8 + products * 8 + reads + of_tokens + missing + Kept.bytes(K, TOKEN)


@cute.kernel
def verify_long(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    u: cute.Tensor, k_out: cute.Tensor, g_out: cute.Tensor, group: Int32, inverse: Int64, by_row: cute.FastDivmodDivisorV2,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, UPDATE: cutlass.Constexpr,
):  # fmt: skip
    S = TILES
    WARPS, DRAFTERS = warps_of(V, STATE)
    ALL = (WARPS + EIGHTS) * WARP  # threads that have to do with a head
    program, programs, warp, lane = placed(WARPS, DRAFTERS)
    line, column = lane // 4, lane % 4  # of a product's fragments
    n_rows, tokens, value_heads, pool = v.shape[0], v.shape[1], v.shape[2], state.shape[0]

    memory = cutlass.utils.SmemAllocator()
    rows, arrived, fragments = rows_of_state(memory, K, STATE, S, WARPS)
    _, PART = rows.shape  # of a state, to a warp
    *_, SIDE = fragments.shape
    STEPS = SIDE // 4
    strides = wide(value_heads, V * K), PART, 1
    parts = cute.make_tensor(state.iterator, cute.make_layout((pool, value_heads * WARPS, PART), stride=strides))
    # What tokens read, as left factors: halves, eights, steps; two channels of a key, of a query, two more of both.
    size = EIGHTS * (K // STEP) * READ
    reads = memory.allocate_tensor(BFloat16, cute.make_layout(2 * size), 128)
    strides_of_reads = size, (K // STEP) * READ, READ
    reads_fragments = cute.make_tensor(
        reads.iterator, cute.make_layout((2, EIGHTS, K // STEP, WARP, 8), stride=(*strides_of_reads, 8, 1))
    )
    each = 2 * (K // WARP)  # of a lane that writes them
    shape, strides = (2, EIGHTS, K // STEP, EIGHT, 4, 8 // each, each), (*strides_of_reads, 32, 8, each, 1)
    reads_lanes = cute.make_tensor(reads.iterator, cute.make_layout(shape, stride=strides))
    # The [T, T] matrices, as left factors: eights of columns, rows, a lane's two columns, and what makes u and outputs.
    shape, strides = (HEADS, EIGHTS, TOKENS, 4, 2, 2), (16 * TOKENS * EIGHTS, 16 * TOKENS, 16, 4, 2, 1)
    solved = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    shape, strides = (HEADS, EIGHTS, EIGHTS, WARP, 4), (16 * TOKENS * EIGHTS, 16 * TOKENS, 128, 4, 1)
    solved_fragments = cute.make_tensor(solved.iterator, cute.make_layout(shape, stride=strides))
    # What S k, S q and v - S k are multiplied by.
    shape, strides = (HEADS, 3, TOKENS), (3 * TOKENS, TOKENS, 1)
    of_tokens = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    kept = Kept(memory, K, TOKEN, solved, of_tokens)
    # A lane has 2 S numbers of one of every eight tokens' v, u and o, which are as many pieces of each array: one index.
    pieces, words = n_rows * tokens * value_heads * 4 * WARPS, 2 * S * v.element_type.width // 32
    o_rows, u_rows = (in_pieces(x, (), pieces * 2 * S, 2 * S) for x in (o, u))
    v_rows = in_pieces(in_words(v), (), pieces * words, words)
    of_token, of_lane = value_heads * 4 * WARPS, 4 * warp + column
    values = cute.make_rmem_tensor(cute.make_layout((EIGHTS, words), stride=(words, 1)), v_rows.element_type)
    # v - S k of 16 rows, which goes from lanes of a token to lanes of a row.
    shape, strides = (WARPS, EIGHTS, EIGHT, EIGHT, 2), (EIGHTS * EIGHT * MISSING, EIGHT * MISSING, MISSING, 2, 1)
    missing = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    total = n_rows * value_heads
    if warp >= WARPS:
        four = lane * each // 8
        step, place = four // (4 * STEPS) * STEPS + four % STEPS, four % (4 * STEPS) // STEPS
        first, step_by = program + (warp - WARPS) // EIGHTS * programs, HEADS * programs
        drafts(
            q, k, g, beta, A_log, dt_bias, slots, options, g_out,
            reads_lanes[None, None, step, None, place, lane % (8 // each), None], kept,
            Int32(first // by_row), Int32(first % by_row), Int32(step_by // by_row), Int32(step_by % by_row), inverse,
            warp - WARPS, lane, pool, GATE, UPDATE, WARPS,
        )  # fmt: skip
    else:
        n, hv = Int32(program // by_row), Int32(program % by_row)
        step_n, step_hv = Int32(programs // by_row), Int32(programs % by_row)
        slot, live = slot_of(slots, pool, n)
        if lane == 0:
            cute.arch.mbarrier_init(arrived + warp, 1)
            cute.arch.mbarrier_init_fence()
        request_state(parts[slot, hv * WARPS + warp, None], rows[warp, None], arrived + warp, lane)
        turn, coming = Int32(0), Int32(0)
        for head in cutlass.range(program, total, programs):
            if turn % WARP == 0:  # the slots of the next 32 heads, one a lane, so that none is waited for
                coming = slots[cutlass.min(Int32((head + (lane + 1) * programs) // by_row), n_rows - 1)]
            team = turn % HEADS
            cute.arch.barrier(barrier_id=READ_DONE + team, number_of_threads=ALL)
            cute.arch.mbarrier_wait(arrived + warp, turn % 2)

            found = [[zeros(4) for _ in range(S)] for _ in range(EIGHTS)]
            mine = fragments[warp, line // 2, None, line % 2, None, column, None]
            ask(mine, [reads_fragments[None, eight, None, lane, None] for eight in range(EIGHTS)], found, STATE)
            next_n, next_hv = after(n, hv, step_n, step_hv, value_heads)
            next_slot, next_live = within(pool, from_lane(coming, turn % WARP))
            if head + programs < total:
                request_state(parts[next_slot, next_hv * WARPS + warp, None], rows[warp, None], arrived + warp, lane)
                cute.arch.barrier_arrive(barrier_id=READ_FREE + (turn + 1) % HEADS, number_of_threads=ALL)
            # Not the next head's, which would take registers.
            request_values(v_rows, values, n * tokens, hv * 4 * WARPS + of_lane, of_token, line, tokens)
            cute.arch.barrier(barrier_id=SOLVE_DONE + team, number_of_threads=ALL)

            lefts = [
                [
                    halves(loaded(solved_fragments[team, earlier, eight, lane, None]), TFloat32)
                    for earlier in range(eight + 1)
                ]
                for eight in range(EIGHTS)
            ]
            v_of_eights, between = [values[eight, None] for eight in range(EIGHTS)], missing[warp, None, None, None, None]
            answer(found, v_of_eights, of_tokens[team, None, None], lefts, between, tokens, line, column)
            if cutlass.const_expr(UPDATE):
                h = Int32(Int64(hv) * inverse >> 32)
                if hv == h * group:
                    keys = keys_of_warp(k, TOKENS, K, WARPS)
                    request_keys(k, keys, n, h, warp, lane, WARPS)
                    write_keys(keys, k_out, of_tokens[team, 0, None], n, h, live, warp, lane, K, WARPS)
            if head + HEADS * programs < total:
                cute.arch.barrier_arrive(barrier_id=SOLVE_FREE + team, number_of_threads=ALL)
            for eight in cutlass.range_constexpr(EIGHTS):
                t = eight * EIGHT + line
                piece = (n * tokens + t) * of_token + hv * 4 * WARPS + of_lane
                if t < tokens:
                    own = [select(live, found[eight][s][2 + e], Float32(0.0)) for s in range(S) for e in range(2)]
                    write(own, o_rows[piece, None])
                    if cutlass.const_expr(UPDATE):
                        own = [select(live, found[eight][s][e], Float32(0.0)) for s in range(S) for e in range(2)]
                        write(own, u_rows[piece, None])
            n, hv, live, turn = next_n, next_hv, next_live, turn + 1


def request_values(v_rows, values, first, place, of_token, line, tokens):
    for eight in range(values.shape[0]):
        t = cutlass.min(eight * EIGHT + line, tokens - 1)
        cute.autovec_copy(v_rows[(first + t) * of_token + place, None], values[eight, None])
