"""verify: T draft tokens against one row's state, which is read once and never written.

Bound: memory, V K numbers of state a (row, value head), as long as what T adds is small. So all that tokens ask of the state
is one product on tensor cores, [k_t exp(G_t) ; q_t exp(G_t)] S^T, [2 T, K] x [K, V]. A program goes through several heads.
Some of its warps do what has to do with tokens alone (draft.py), up to a head ahead; the others have 8 to 64 rows each of
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

from . import verify_long
from .draft import (
    EIGHT,
    FREE,
    READ_DONE,
    SOLVE_DONE,
    after,
    count,
    drafts,
    keys_of_warp,
    placed,
    request_keys,
    ways_of,
    write_keys,
)
from .product import MISSING, READ, STEP, answer, ask, halves, request_state, rows_of_state, zeros
from .token import (
    TYPES,
    WARP,
    from_lane,
    in_pieces,
    in_words,
    loaded,
    multiprocessors,
    select,
    slot_of,
    token_inputs,
    wide,
    within,
    write,
)

TILES = {"bfloat16": 4, "float32": 2}  # by the pool's dtype: eights of the state's rows to a warp
# With more tokens the warps of products take turns at shared memory with those of tokens. Half as many, with twice the rows,
# read the tokens' factors half as often; one head alone takes longer, and so does writing the update. A row has the same
# bits either way.
WIDE_ABOVE = 4
# So few heads that most multiprocessors would have none: each goes to several programs, all of which do what has to do with
# its tokens. A row has the same bits here too.
FEW_PARTS = 4


def wide_too(K, UPDATE):
    """Whether there is a kernel with half as many warps."""
    return K == 128 and not UPDATE


def few_tiles(UPDATE):
    """Eights of rows to a warp of a few heads: the less a warp has to write, the more."""
    return 1 if UPDATE else 2


def operands(K, V, STATE, GATE, TOKEN, UPDATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N T", STATE, TOKEN)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")] if UPDATE else []
    return inputs, [o, *update], {}


def at_once(K, STATE, TOKEN):
    """Programs on a multiprocessor, as many as have the registers that they need."""
    if K == 64:
        return 4 if STATE == "bfloat16" else 3 - (TOKEN == "float32")
    return (3 if STATE == "bfloat16" else 2) - (TOKEN == "float32")


def shared_bytes(K, V, STATE, GATE, TOKEN, UPDATE):
    of_tokens = 2 * (ways_of(K) * count(EIGHT) + 2 * EIGHT * EIGHT + 3 * EIGHT)
    missing = EIGHT * V // (TILES[STATE] * EIGHT) * MISSING
    few = V * K * TYPES[STATE].width // 8 + 2 * 2 * (K // STEP) * READ * 2 + 4 * (of_tokens + missing)
    return max(few, verify_long.shared_bytes(K, V, STATE, TOKEN))


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
    value_heads = v.shape[2]
    group = value_heads // q.shape[2]
    # Of what programs would divide by: hv // group is hv * inverse >> 32, for as many heads as there are.
    inverse = ((Int64(1) << 32) + group - 1) // group
    by_row = cute.FastDivmodDivisorV2(value_heads)
    heads = v.shape[0] * value_heads
    if v.shape[1] <= EIGHT:
        programs, choices = at_once(K, STATE, TOKEN), (K, V, STATE, GATE, UPDATE)
        of_eight = stream, (*arrays, group, inverse, by_row), heads, choices
        if heads * FEW_PARTS <= multiprocessors():
            enqueue_of_eight(*of_eight, 1, few_tiles(UPDATE), FEW_PARTS)
        elif cutlass.const_expr(wide_too(K, UPDATE)):
            if (v.shape[1] > WIDE_ABOVE) & (heads > programs * multiprocessors()):
                enqueue_of_eight(*of_eight, programs, 2 * TILES[STATE])
            else:
                enqueue_of_eight(*of_eight, programs, TILES[STATE])
        else:
            enqueue_of_eight(*of_eight, programs, TILES[STATE])
    else:
        programs = verify_long.at_once(K, V, STATE, TOKEN)
        kernel = verify_long.verify_long(*arrays, group, inverse, by_row, K, V, STATE, GATE, TOKEN, UPDATE)
        enqueue(stream, kernel, programs, heads, sum(verify_long.warps_of(V, STATE)))


def enqueue_of_eight(stream, arrays, heads, choices, programs, tiles, parts=1):
    K, V, *_ = choices
    kernel = verify(*arrays, *choices, tiles, parts)
    enqueue(stream, kernel, programs, heads * parts, V // (tiles * EIGHT * parts) + ways_of(K))


def enqueue(stream, kernel, programs, parts, warps):
    kernel.launch(
        grid=[cutlass.min(parts, Int32(programs * multiprocessors())), 1, 1],
        block=[warps * WARP, 1, 1],
        min_blocks_per_mp=programs,
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )


@cute.kernel
def verify(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    u: cute.Tensor, k_out: cute.Tensor, g_out: cute.Tensor, group: Int32, inverse: Int64, by_row: cute.FastDivmodDivisorV2,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    UPDATE: cutlass.Constexpr, S: cutlass.Constexpr, PARTS: cutlass.Constexpr,
):  # fmt: skip
    """For up to eight tokens, with ``S`` eights of the state's rows to a warp, and a head to ``PARTS`` programs."""
    WARPS, WAYS = V // (S * EIGHT * PARTS), ways_of(K)
    program, programs, warp, lane = placed(WARPS, WAYS)
    part, program, programs = program % PARTS, program // PARTS, programs // PARTS
    rank, RANKS = part * WARPS + warp, PARTS * WARPS  # of a head's warps that have rows
    line, column = lane // 4, lane % 4  # of a product's fragments
    n_rows, tokens, value_heads, pool = v.shape[0], v.shape[1], v.shape[2], state.shape[0]

    memory = cutlass.utils.SmemAllocator()
    rows, arrived, fragments = rows_of_state(memory, K, STATE, S, WARPS)
    _, PART = rows.shape  # of a state, to a warp
    *_, SIDE = fragments.shape
    STEPS = SIDE // 4
    strides = wide(value_heads, V * K), V * K, PART, 1
    parts = cute.make_tensor(state.iterator, cute.make_layout((pool, value_heads, RANKS, PART), stride=strides))
    # What tokens read, of two heads, as left factors: halves, eights, steps; a lane's two channels of a key, of a query, ...
    size = (K // STEP) * READ
    reads = memory.allocate_tensor(BFloat16, cute.make_layout(2 * 2 * size), 128)
    strides = 2 * size, size, READ
    reads_fragments = cute.make_tensor(reads.iterator, cute.make_layout((2, 2, K // STEP, WARP, 8), stride=(*strides, 8, 1)))
    reads_words = cute.make_tensor(
        reads.iterator, cute.make_layout((2, 2, K // STEP, EIGHT, 4, 2, 4), stride=(*strides, 32, 8, 4, 1))
    )
    shape = 2, WAYS, count(EIGHT)
    dots = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=(WAYS * count(EIGHT), count(EIGHT), 1)), 16)
    # The [T, T] matrices, as left factors too: rows, a lane's two columns, and what makes u and outputs.
    shape, strides = (2, EIGHT, 4, 2, 2), (16 * EIGHT, 16, 4, 2, 1)
    solved = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    solved_fragments = cute.make_tensor(solved.iterator, cute.make_layout((2, WARP, 4), stride=(16 * EIGHT, 4, 1)))
    of_tokens = memory.allocate_tensor(Float32, cute.make_layout((2, 3, EIGHT), stride=(3 * EIGHT, EIGHT, 1)), 16)
    # A lane has one of the tokens' v, u and o.
    lead = n_rows, tokens, value_heads, RANKS
    o_rows, u_rows = (in_pieces(x, lead, S * EIGHT, 2 * S) for x in (o, u))
    words = 2 * S * v.element_type.width // 32
    v_rows = in_pieces(in_words(v), lead, 4 * words, words)
    values = cute.make_rmem_tensor(cute.make_layout(words), v_rows.element_type)
    # v - S k of 16 rows, which goes from lanes of a token to lanes of a row.
    shape, strides = (WARPS, 1, EIGHT, EIGHT, min(S, 2)), (EIGHT * MISSING, EIGHT * MISSING, MISSING, 2, 1)
    missing = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)
    total = n_rows * value_heads
    n, hv = Int32(program // by_row), Int32(program % by_row)
    step_n, step_hv = Int32(programs // by_row), Int32(programs % by_row)
    if warp >= WARPS:
        # Where a lane's two channels are among the fragments.
        word = (warp - WARPS) * WARP + lane
        step, place = word // (2 * SIDE) * STEPS + word % (SIDE // 2) // 2, word % (2 * SIDE) // (SIDE // 2)
        to = reads_words[None, None, step, None, place, word % 2, None]
        drafts(
            q, k, g, beta, A_log, dt_bias, slots, options, g_out, to, dots, solved, of_tokens, n, hv, step_n, step_hv,
            inverse, warp - WARPS, lane, pool, select(part == 0, tokens, Int32(0)), K, GATE, UPDATE, WARPS,
        )  # fmt: skip
    else:
        slot, live = slot_of(slots, pool, n)
        if lane == 0:
            cute.arch.mbarrier_init(arrived + warp, 1)
            cute.arch.mbarrier_init_fence()
        request_state(parts[slot, hv, rank, None], rows[warp, None], arrived + warp, lane)
        request_values(v_rows, values, n, hv, rank, line, column)
        keys = keys_of_warp(k, EIGHT, K, RANKS)
        turn, coming = Int32(0), Int32(0)
        for head in cutlass.range(program, total, programs):
            if turn % WARP == 0:  # the slots of the next 32 heads, one a lane, so that none is waited for
                coming = slots[cutlass.min(Int32((head + (lane + 1) * programs) // by_row), n_rows - 1)]
            buffer = turn % 2
            h = Int32(Int64(hv) * inverse >> 32)
            if cutlass.const_expr(UPDATE):  # noqa: SIM102
                if hv == h * group:
                    request_keys(k, keys, n, h, rank, lane, RANKS)
            cute.arch.barrier(barrier_id=READ_DONE + buffer, number_of_threads=(WARPS + WAYS) * WARP)
            cute.arch.mbarrier_wait(arrived + warp, buffer)

            found = [zeros(4) for _ in range(S)]
            mine = fragments[warp, line // 2, None, line % 2, None, column, None]
            ask(mine, [reads_fragments[buffer, None, None, lane, None]], [found], STATE)
            next_n, next_hv = after(n, hv, step_n, step_hv, value_heads)
            next_slot, next_live = within(pool, from_lane(coming, turn % WARP))
            if head + programs < total:
                request_state(parts[next_slot, next_hv, rank, None], rows[warp, None], arrived + warp, lane)
            cute.arch.barrier(barrier_id=SOLVE_DONE + buffer, number_of_threads=(WARPS + 1) * WARP)

            left = halves(loaded(solved_fragments[buffer, lane, None]), TFloat32)
            between = missing[warp, None, None, None, None]
            answer([found], [values], of_tokens[buffer, None, None], [[left]], between, tokens, line, column)
            if head + programs < total:
                request_values(v_rows, values, next_n, next_hv, rank, line, column)
            if cutlass.const_expr(UPDATE):  # noqa: SIM102
                if hv == h * group:
                    write_keys(keys, k_out, of_tokens[buffer, 0, None], n, h, live, rank, lane, K, RANKS)
            if head + 2 * programs < total:
                cute.arch.barrier_arrive(barrier_id=FREE + buffer, number_of_threads=(WARPS + WAYS) * WARP)
            if line < tokens:
                own = [select(live, found[s][2 + e], Float32(0.0)) for s in range(S) for e in range(2)]
                write(own, o_rows[n, line, hv, rank, column, None])
                if cutlass.const_expr(UPDATE):
                    own = [select(live, found[s][e], Float32(0.0)) for s in range(S) for e in range(2)]
                    write(own, u_rows[n, line, hv, rank, column, None])
            n, hv, live, turn = next_n, next_hv, next_live, turn + 1


def request_values(v_rows, values, n, hv, rank, line, column):
    cute.autovec_copy(v_rows[n, cutlass.min(line, v_rows.shape[1] - 1), hv, rank, column, None], values)
