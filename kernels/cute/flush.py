"""flush: the state of every row advanced over its accepted tokens, in place.

Bound: memory, as decode: 2 V K numbers of state to T (2 V + K) of the update. So programs are small, take states in the
order of their addresses, and make two round trips: for where the state is and, not waiting for that, for the tokens; then
for all of their state at once. Both come into shared memory by bulk copies, which hold no registers. While the state is
under way a warp goes backwards over the tokens, from the last accepted one, with the decay since each, and sums what they
add to its rows; the state then takes one multiplication and addition a number, and is stored from registers. Rows that
accepted nothing, and padded ones, are neither loaded nor stored.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64
from cutlass.cute.nvgpu import cpasync

from .token import (
    TYPES,
    WARP,
    exp,
    from_lane,
    fused,
    in_pieces,
    loaded,
    multiprocessors,
    wide,
    within,
    write,
)

WARPS = 4  # of a program, which share its tokens
ROWS = {"bfloat16": 16, "float32": 8}  # of a warp
AT_ONCE = {"bfloat16": 5, "float32": 8}  # programs on a multiprocessor
TOKENS = 8  # in shared memory at once
# Where all programs have a place at once even if they are of half as many rows, they are, and take registers: a warp that is
# nearly alone waits for each token. A row has the same bits either way.
FEW_AT_ONCE, FEW_TOKENS = 4, 4  # programs on a multiprocessor, tokens that are requested from shared memory together


def operands(K, V, STATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    state = ("P HV V K", STATE)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")]
    return [*update, state, ("N", "int32"), ("N", "int32")], [state], {3: 0}


def shared_bytes(K, V, STATE):
    rows = WARPS * ROWS[STATE]
    return rows * K * TYPES[STATE].width // 8 + TOKENS * (rows + 2 * K) * 4 + (WARPS + 1) * 8


@cute.jit
def launch(
    stream: cuda.CUstream,
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr,
):  # fmt: skip
    arrays, choices, few = (u, k, g, state, slots, accepted), (K, V, STATE), ROWS[STATE] // 2
    if u.shape[0] * u.shape[2] * (V // (WARPS * few)) <= FEW_AT_ONCE * multiprocessors():
        enqueue(stream, arrays, choices, few, FEW_TOKENS, FEW_AT_ONCE)
    else:
        enqueue(stream, arrays, choices, ROWS[STATE], 1, AT_ONCE[STATE])


def enqueue(stream, arrays, choices, rows, together, at_once):
    u, k, *_ = arrays
    _, V, _ = choices
    value_heads = u.shape[2]
    programs = value_heads * (V // (WARPS * rows))  # of a row
    divisors = cute.FastDivmodDivisorV2(programs), cute.FastDivmodDivisorV2(value_heads // k.shape[2])
    flush(*arrays, *divisors, *choices, rows, together).launch(
        grid=[u.shape[0] * programs, 1, 1],
        block=[WARPS * WARP, 1, 1],
        min_blocks_per_mp=at_once,
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )


@cute.jit
def request(sources: cutlass.Constexpr, places: cutlass.Constexpr, arrives, first, thread):
    """Up to TOKENS from ``first`` on: an array by a warp of its own, a token of it by a lane."""
    count = cutlass.min(sources[0].shape[0] - first, TOKENS)
    if thread == 0:
        cute.arch.mbarrier_arrive_and_expect_tx(arrives, count * sum(x.shape[1] * 4 for x in places))
    for i, (x, to) in enumerate(zip(sources, places, strict=True)):
        if (thread // WARP == i % WARPS) & (thread % WARP < count):
            load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), Float32, num_bits_per_copy=to.shape[1] * 32)
            cute.copy(load, x[first + thread % WARP, None], to[thread % WARP, None], mbar_ptr=arrives)


def precede(added, after, u, k, g):
    """Adds what a token does to a lane's part of its rows; ``after`` is the log decay from it to the last accepted one."""
    key, log = loaded(k), loaded(g)
    for e in range(len(key)):
        key[e] = key[e] * exp(after[e])
        after[e] = after[e] + log[e]
    for four in range(u.shape[0]):
        for i, x in enumerate(loaded(u[four, None])):
            row = [added[four * 4 + i, e] for e in range(len(key))]
            for e, y in enumerate(fused([x] * len(key), key, row)):
                added[four * 4 + i, e] = y


@cute.kernel
def flush(
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    programs: cute.FastDivmodDivisorV2, group: cute.FastDivmodDivisorV2,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, OWN: cutlass.Constexpr,
    TOGETHER: cutlass.Constexpr,
):  # fmt: skip
    """With ``OWN`` rows to a warp, which takes ``TOGETHER`` tokens at a time."""
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    lane, warp = thread % WARP, thread // WARP
    EACH, PARTS = K // WARP, V // (WARPS * OWN)
    n, rest = Int32(program // programs), Int32(program % programs)
    hv, part = rest // PARTS, rest % PARTS
    h = Int32(hv // group)
    where, count = Int32(0), Int32(0)
    if lane == 0:  # a load that all lanes shared the assembler would wait for before it requests the tokens
        where, count = slots[n], accepted[n]

    memory = cutlass.utils.SmemAllocator()
    rows = memory.allocate_tensor(TYPES[STATE], cute.make_layout((WARPS, OWN * K), stride=(OWN * K, 1)), 128)
    sizes = WARPS * OWN, K, K
    places = [memory.allocate_tensor(Float32, cute.make_layout((TOKENS, x), stride=(x, 1)), 128) for x in sizes]
    state_here = memory.allocate_array(Int64, WARPS + 1)  # each warp's part of it
    tokens_here = state_here + WARPS
    if thread == 0:
        for i in cutlass.range_constexpr(WARPS + 1):
            cute.arch.mbarrier_init(state_here + i, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()

    lead = u.shape[0], u.shape[1]
    of_u = in_pieces(u, (*lead, u.shape[2]), V, WARPS * OWN)[n, None, hv, part, None]
    of_k = in_pieces(k, (*lead, k.shape[2]), K, K)[n, None, h, 0, None]
    of_g = in_pieces(g, (*lead, u.shape[2]), K, K)[n, None, hv, 0, None]
    sources = of_u, of_k, of_g
    loops = cutlass.max((u.shape[1] + TOKENS - 1) // TOKENS, 1)
    request(sources, places, tokens_here, (loops - 1) * TOKENS, thread)
    slot, live = within(state.shape[0], from_lane(where, 0))
    taken = cutlass.min(from_lane(count, 0), u.shape[1])
    live = live & (taken > 0)
    shape, strides = (state.shape[0], u.shape[2], V // OWN), (wide(u.shape[2], V * K), V * K, OWN * K)
    tiles = cute.make_tensor(state.iterator, cute.make_layout((*shape, OWN * K), stride=(*strides, 1)))
    by_row = cute.make_layout((*shape, OWN, WARP, EACH), stride=(*strides, K, EACH, 1))
    pool = cute.make_tensor(state.iterator, by_row)
    tile = part * WARPS + warp
    if live & (lane == 0):
        bits = OWN * K * TYPES[STATE].width
        load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), TYPES[STATE], num_bits_per_copy=bits)
        cute.arch.mbarrier_arrive_and_expect_tx(state_here + warp, bits // 8)
        cute.copy(load, tiles[slot, hv, tile, None], rows[warp, None], mbar_ptr=state_here + warp)

    by_lane = cute.make_layout((TOKENS, WARP, EACH), stride=(K, EACH, 1))
    keys, logs = (cute.make_tensor(x.iterator, by_lane) for x in places[1:])
    by_rows = cute.make_layout((TOKENS, WARPS, OWN // 4, 4), stride=(WARPS * OWN, OWN, 4, 1))
    updates = cute.make_tensor(places[0].iterator, by_rows)
    added = cute.make_rmem_tensor(cute.make_layout((OWN, EACH), stride=(EACH, 1)), Float32)
    after = cute.make_rmem_tensor(cute.make_layout(EACH), Float32)
    added.fill(0.0)
    after.fill(0.0)
    for i in cutlass.range(loops, unroll=1):
        cute.arch.mbarrier_wait(tokens_here, i % 2)
        first = (loops - 1 - i) * TOKENS
        here = cutlass.min(taken - first, TOKENS)
        for j in cutlass.range(here, unroll=TOGETHER):
            token = here - 1 - j
            precede(added, after, updates[token, warp, None, None], keys[token, lane, None], logs[token, lane, None])
        if first > 0:
            cute.arch.sync_threads()
            request(sources, places, tokens_here, first - TOKENS, thread)
    if live:
        decay = [exp(after[e]) for e in range(EACH)]
        raw = cute.make_tensor(rows.iterator, cute.make_layout((WARPS, OWN, WARP, EACH), stride=(OWN * K, K, EACH, 1)))
        cute.arch.mbarrier_wait(state_here + warp, 0)
        for i in cutlass.range_constexpr(OWN):
            row = loaded(raw[warp, i, lane, None])
            write(fused(row, decay, [added[i, e] for e in range(EACH)]), pool[slot, hv, tile, i, lane, None])
