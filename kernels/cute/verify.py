"""verify: T draft tokens against one row's state, which is read once and never written.

Bound: memory, V K numbers of state a (row, value head), as long as what T adds is small. So all that tokens ask of the
state is one product on tensor cores, S [k_t exp(G_t) | q_t exp(G_t)], [V, K] x [K, 2 T]. A program has one value head of a
row, a warp 16 or 32 rows of its state. It requests them first, into shared memory, a lane what it will want in its
registers: a product may sum over K in any order, so a lane takes 16 bytes side by side for channels that the instruction
has apart, and need not wait for what other lanes requested.

While the state is under way the warps share what has to do with tokens alone: activations, decays as ordered products, so
that no exponent is positive, the T^2 dots of keys and queries with earlier keys, and from these the two [T, T] matrices
that turn v - S k into u and into what u adds to the outputs. So when the state is there, three products follow each other in
a warp's registers, whatever T is; the sums of one are the factors of the next.

Precision: factors of the first product are taken as sums of two bfloat16 numbers, to 2^-17; of the others as sums of two
TF32 numbers.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, TFloat32

from .product import add, atom, halves, registers, zeros
from .token import (
    TYPES,
    WARP,
    activated,
    by_lane,
    dot,
    exp,
    held,
    holder,
    loaded,
    log_decays,
    numbers_of,
    select,
    slot_of,
    sums,
    token_inputs,
    wide,
    write,
)

TOKENS = 8, 16  # at most; a kernel for few has fewer registers and less shared memory
EIGHT = 8  # tokens of a product
ROWS = 16  # of the state to a product
TOGETHER = 2  # tokens whose dots are summed at once
# By the pool's dtype and the tokens at most: products of a warp side by side, and programs on a multiprocessor.
TILES = {("bfloat16", 8): 2, ("bfloat16", 16): 1, ("float32", 8): 1, ("float32", 16): 1}
AT_ONCE = {("bfloat16", 8): 4, ("bfloat16", 16): 2, ("float32", 8): 2, ("float32", 16): 2}
PITCH = {8: 8, 16: 24}  # floats from a row of a [T, T] matrix to the next, so that lanes of a request meet in no bank


def operands(K, V, STATE, GATE, TOKEN, UPDATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N T", STATE, TOKEN)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")] if UPDATE else []
    return inputs, [o, *update], {}


def shared_bytes(K, V, STATE, GATE, TOKEN, UPDATE):
    most = max(TOKENS)
    matrices = 2 * most * (most + PITCH[most]) * 4
    state = V * K * TYPES[STATE].width // 8
    return state + 3 * most * K * 4 + 2 * 2 * most * read_pitch(K, STATE) * 2 + matrices + most * 4


def read_pitch(K, STATE):
    """From one read to the next: lanes of a request then meet in no bank."""
    return K + (16 if STATE == "float32" else 32)


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
        enqueue(stream, arrays, K, V, STATE, GATE, UPDATE, TOKENS[0])
    else:
        enqueue(stream, arrays, K, V, STATE, GATE, UPDATE, TOKENS[1])


def enqueue(stream, arrays, K, V, STATE, GATE, UPDATE, MOST):
    v = arrays[2]
    verify(*arrays, K, V, STATE, GATE, UPDATE, MOST).launch(
        grid=[v.shape[0] * v.shape[2], 1, 1],
        block=[V // (TILES[STATE, MOST] * ROWS) * WARP, 1, 1],
        min_blocks_per_mp=AT_ONCE[STATE, MOST] * (128 // V),
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )


def request(of_lane, token, beta, n, t, h, hv, lane):
    """A token's q, k and g into a lane's registers, and its beta."""
    for x, to, head in zip(token, of_lane, (h, h, hv), strict=True):
        cute.autovec_copy(x[n, t, head, lane, None], to)
    return beta[n, t, hv].to(Float32)


@cute.kernel
def verify(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    u: cute.Tensor, k_out: cute.Tensor, g_out: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    UPDATE: cutlass.Constexpr, TOKENS: cutlass.Constexpr,
):  # fmt: skip
    """For up to TOKENS tokens."""
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    lane, warp = thread % WARP, thread // WARP
    line, column = lane // 4, lane % 4  # of a product's fragments
    M = TILES[STATE, TOKENS]
    WARPS = V // (M * ROWS)
    n_rows, tokens, value_heads, heads, pool = v.shape[0], v.shape[1], v.shape[2], q.shape[2], state.shape[0]
    hv, n = program % value_heads, program // value_heads
    group = value_heads // heads
    h = hv // group
    slot, live = slot_of(slots, pool, n)

    # The state: of four neighbouring lanes each has SIDE numbers side by side, which are STEPS of the product's K. The
    # product's rows i and i + 8 are rows of the state side by side, so that outputs leave in pairs.
    SIDE = 4 if STATE == "float32" else 8
    STEPS = SIDE // 4
    LOADS = K // (4 * SIDE)
    EIGHTS = TOKENS // EIGHT
    firsts = [(warp * M + m) * ROWS + 2 * line for m in range(M)]
    shape = pool, value_heads, V, LOADS, 4, SIDE
    strides = wide(value_heads, V * K), V * K, K, 4 * SIDE, SIDE, 1
    fragments = cute.make_tensor(state.iterator, cute.make_layout(shape, stride=strides))
    memory = cutlass.utils.SmemAllocator()
    THREADS = WARPS * WARP
    shape = M, 2, LOADS, THREADS, SIDE
    strides = 2 * LOADS * THREADS * SIDE, LOADS * THREADS * SIDE, THREADS * SIDE, SIDE, 1
    rows = memory.allocate_tensor(TYPES[STATE], cute.make_layout(shape, stride=strides), 128)
    load = cute.make_copy_atom(
        cute.nvgpu.cpasync.CopyG2SOp(cute.nvgpu.LoadCacheMode.GLOBAL), TYPES[STATE], num_bits_per_copy=128
    )
    by_token = by_lane(  # keys, queries, decays
        memory.allocate_tensor(Float32, cute.make_layout(3 * TOKENS * K), 128), (3, TOKENS), K
    )
    READ = read_pitch(K, STATE)
    reads = memory.allocate_tensor(BFloat16, cute.make_layout(2 * 2 * TOKENS * READ), 128)
    strides = 2 * TOKENS * READ, TOKENS * READ, READ  # halves, keys and queries, tokens
    reads_lanes = cute.make_tensor(
        reads.iterator, cute.make_layout((2, 2, TOKENS, WARP, K // WARP), stride=(*strides, K // WARP, 1))
    )
    reads_fragments = cute.make_tensor(
        reads.iterator, cute.make_layout((2, 2, TOKENS, LOADS, 4, SIDE), stride=(*strides, 4 * SIDE, SIDE, 1))
    )
    square = cute.make_layout((2, TOKENS, TOKENS), stride=(TOKENS * TOKENS, TOKENS, 1))
    links = memory.allocate_tensor(Float32, square, 16)  # of keys and of queries with earlier keys
    square = cute.make_layout((2, TOKENS, TOKENS // 2, 2), stride=(TOKENS * PITCH[TOKENS], PITCH[TOKENS], 2, 1))
    solved = memory.allocate_tensor(Float32, square, 16)  # what u is of v - S k, and what the outputs are of it
    betas = memory.allocate_tensor(Float32, cute.make_layout(TOKENS), 16)

    # What a lane has of v, u and o: two rows of a product, and two of every eight tokens.
    pairs = (n_rows, tokens, value_heads, V // 2, 2), (tokens * value_heads * V, value_heads * V, V, 2, 1)
    v_pairs, o_pairs, u_pairs = (
        cute.make_tensor(x.iterator, cute.make_layout(pairs[0], stride=pairs[1])) for x in (v, o, u)
    )
    q_lanes, k_lanes = by_lane(q, (n_rows, tokens, heads), K), by_lane(k, (n_rows, tokens, heads), K)
    g_lanes = by_lane(g, (n_rows, tokens, value_heads), K)
    rate = A_log[cutlass.min(n, A_log.shape[0] - 1), hv]
    bias = loaded(by_lane(dt_bias, (dt_bias.shape[0], value_heads), K)[cutlass.min(n, dt_bias.shape[0] - 1), hv, lane, None])
    chosen = numbers_of(options)
    # A warp's first token is requested before the state, since that has to wait for the slot.
    of_lane = [cute.make_rmem_tensor(cute.make_layout(K // WARP), q.element_type) for _ in range(3)]
    b_beta = request(of_lane, (q_lanes, k_lanes, g_lanes), beta, n, cutlass.min(warp, tokens - 1), h, hv, lane)
    cute.arch.sync_warp()  # or the assembler would turn the order around
    for x in cutlass.range_constexpr(LOADS):
        for m in cutlass.range_constexpr(M):
            for half in cutlass.range_constexpr(2):
                cute.copy(load, fragments[slot, hv, firsts[m] + half, x, column, None], rows[m, half, x, thread, None])
    cute.arch.cp_async_commit_group()

    for mine in cutlass.range((tokens - warp + WARPS - 1) // WARPS):
        t = warp + mine * WARPS
        if mine > 0:
            b_beta = request(of_lane, (q_lanes, k_lanes, g_lanes), beta, n, t, h, hv, lane)
        log_decay = log_decays(held(of_lane[2]), rate, bias, chosen, GATE)
        b_q, b_k, activated_beta, kq = activated(held(of_lane[0]), held(of_lane[1]), b_beta, chosen)
        write(b_k, by_token[0, t, lane, None])
        write(b_q, by_token[1, t, lane, None])
        write([exp(x) for x in log_decay], by_token[2, t, lane, None])
        betas[t] = activated_beta
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
    values = cute.make_rmem_tensor(cute.make_layout((M, EIGHTS, 2, 2), stride=(4 * EIGHTS, 4, 2, 1)), v.element_type)
    for m in cutlass.range_constexpr(M):
        for eight in cutlass.range_constexpr(EIGHTS):
            for e in cutlass.range_constexpr(2):
                t = cutlass.min(eight * EIGHT + 2 * column + e, tokens - 1)
                cute.autovec_copy(v_pairs[n, t, hv, firsts[m] // 2, None], values[m, eight, e, None])
    cute.arch.sync_threads()

    # The links of a token to those behind it; and what it reads, with the decays from the state to it.
    decayed = cute.make_rmem_tensor(cute.make_layout(K // WARP), Float32)
    for mine in cutlass.range((tokens - warp + WARPS - 1) // WARPS):
        i = warp + mine * WARPS
        write(loaded(by_token[0, i, lane, None]), decayed)
        for some in cutlass.range((tokens - 1 - i + TOGETHER - 1) // TOGETHER):
            later = i + 1 + some * TOGETHER
            dots = []
            for s in cutlass.range_constexpr(TOGETHER):
                t = cutlass.min(later + s, tokens - 1)
                key = [decayed[e] * x for e, x in enumerate(loaded(by_token[2, t, lane, None]))]
                write(key, decayed)
                dots += [dot(loaded(by_token[kind, t, lane, None]), key) for kind in range(2)]
            found = sums(dots, lane)
            which = lane // holder(1, 2 * TOGETHER)
            if (lane % holder(1, 2 * TOGETHER) == 0) & (later + which // 2 < tokens):
                links[which % 2, later + which // 2, i] = found
        decayed.fill(1.0)
        for t in cutlass.range(i + 1, unroll=4):
            write([decayed[e] * x for e, x in enumerate(loaded(by_token[2, t, lane, None]))], decayed)
        for kind in cutlass.range_constexpr(2):
            read = [x * decayed[e] for e, x in enumerate(loaded(by_token[kind, i, lane, None]))]
            for part, some in enumerate(halves(read, BFloat16)):
                cute.autovec_copy(some, reads_lanes[part, kind, i, lane, None])
    cute.arch.sync_threads()

    if (warp == WARPS - 1) & (lane < TOKENS):
        solve(links, betas, solved, tokens, lane, TOKENS)

    # S k and S q, of eight tokens each.
    product = atom(BFloat16)
    found = [[[zeros(4) for _ in range(2)] for _ in range(EIGHTS)] for _ in range(M)]
    cute.arch.cp_async_wait_group(0)  # a thread waits for no other's
    for x in cutlass.range_constexpr(LOADS):
        lefts = []
        for m in cutlass.range_constexpr(M):
            mine = cute.make_rmem_tensor(cute.make_layout((2, SIDE), stride=(SIDE, 1)), TYPES[STATE])
            for half in cutlass.range_constexpr(2):
                cute.autovec_copy(rows[m, half, x, thread, None], mine[half, None])
            lefts.append(factors(mine, STEPS, STATE))
        for eight in cutlass.range_constexpr(EIGHTS):
            for kind in cutlass.range_constexpr(2):
                rights = of_reads(reads_fragments, kind, eight * EIGHT + line, x, column, STEPS)
                for m in cutlass.range_constexpr(M):
                    for s in cutlass.range_constexpr(STEPS):
                        add(product, found[m][eight][kind], lefts[m][s], rights[s])
    cute.arch.sync_threads()

    # From v - S k to u and o. A row's sums of two tokens are where the next product wants its factors.
    product = atom(TFloat32)
    for m in cutlass.range_constexpr(M):
        lefts = []
        for eight in cutlass.range_constexpr(EIGHTS):
            missing = []
            for e in cutlass.range_constexpr(2):
                known = eight * EIGHT + 2 * column + e < tokens
                for i in cutlass.range_constexpr(2):
                    x = values[m, eight, e, i].to(Float32) - found[m][eight][0][2 * i + e]
                    missing.append(select(known, x, Float32(0.0)))
            lefts.append(halves(missing, TFloat32))
        for eight in cutlass.range_constexpr(EIGHTS):
            b_u, b_o = zeros(4), found[m][eight][1]
            for earlier in cutlass.range_constexpr(eight + 1):
                for to, matrix in ((b_u, 0), (b_o, 1))[0 if UPDATE else 1 :]:
                    rights = loaded(solved[matrix, eight * EIGHT + line, earlier * EIGHT // 2 + column, None])
                    add(product, to, lefts[earlier], halves(rights, TFloat32))
            for e in cutlass.range_constexpr(2):
                t = eight * EIGHT + 2 * column + e
                if t < tokens:
                    place = n, t, hv, firsts[m] // 2, None
                    write([select(live, b_o[2 * i + e], Float32(0.0)) for i in range(2)], o_pairs[place])
                    if cutlass.const_expr(UPDATE):
                        write([select(live, b_u[2 * i + e], Float32(0.0)) for i in range(2)], u_pairs[place])


def factors(mine, STEPS, STATE):
    """A lane's two rows of a load as left factors: two numbers of a row, two of the next; then their neighbours."""
    steps = [[mine[i, s * 4 + pair * 2 + e] for pair in range(2) for i in range(2) for e in range(2)] for s in range(STEPS)]
    return [halves(x, BFloat16) if STATE == "float32" else [registers(x, BFloat16)] for x in steps]


def of_reads(reads, kind, token, x, column, STEPS):
    """A token's read of a load's channels as right factors."""
    parts = []
    for part in range(2):
        some = cute.make_rmem_tensor(cute.make_layout(4 * STEPS), BFloat16)
        cute.autovec_copy(reads[part, kind, token, x, column, None], some)
        parts.append(some)
    return [[registers([some[s * 4 + e] for e in range(4)], BFloat16) for some in parts] for s in range(STEPS)]


@cute.jit
def solve(links: cute.Tensor, betas: cute.Tensor, solved: cute.Tensor, tokens, column, TOKENS: cutlass.Constexpr):
    """A lane's column of the two [T, T] matrices, zero outside them: u_t = beta_t (x_t - sum_i<t links_ti u_i), x a unit."""
    of_u = []
    for t in cutlass.range_constexpr(TOKENS):
        own, added = Float32(0.0), Float32(0.0)
        if t < tokens:
            own = select(column == t, Float32(1.0), Float32(0.0))
            for i in cutlass.range_constexpr(t):
                own = own - links[0, t, i] * of_u[i]
            own = own * betas[t]
            added = links[1, t, t] * own
            for i in cutlass.range_constexpr(t):
                added = added + links[1, t, i] * of_u[i]
        of_u.append(own)
        solved[0, t, column // 2, column % 2] = own
        solved[1, t, column // 2, column % 2] = added
