"""What verify needs of a draft's tokens alone: what they read from the state, and the [T, T] matrices between them.

Here for up to eight tokens, in draft_long.py for more. One or two warps do it, each some of the channels; a lane has two
neighbouring ones. It goes through the tokens once, in order, with everything in registers: the decay from the state to a
token, and each earlier key with the decay from its token, as running products, so that no exponent is positive. The
T (T + 2) dots of queries and keys are summed over the warp's lanes many at once. Queries and keys are those given: what
normalises and scales them is a number a token, and multiplies what comes of them.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64

from .product import EIGHT, halves
from .token import (
    BETA_RANGE,
    L2NORM,
    L2NORM_EPS,
    SCALE,
    SIGMOID,
    WARP,
    by_lane,
    dot,
    exp,
    held,
    holder,
    in_pieces,
    in_words,
    loaded,
    log_decays,
    multiprocessors,
    numbers_of,
    of_words,
    select,
    sigmoid,
    sums,
    within,
    write,
)

AT_MOST = 16  # dots that are summed at once
# Barriers, but for the first each of two heads: what is written of a head's tokens, and read.
DOTS_DONE, READ_DONE, SOLVE_DONE, FREE = 1, 2, 4, 6


def placed(WARPS, DRAFTERS):
    """Which program of how many this is, which warp, and which lane. The last warps do tokens: in programs that share a
    multiprocessor different ones, so that its four schedulers share the work."""
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    programs, _, _ = cute.arch.grid_dim()
    lane, turned = thread % WARP, thread // WARP + DRAFTERS * (program // multiprocessors())
    return program, programs, cute.arch.make_warp_uniform(turned % (WARPS + DRAFTERS)), lane


def ways_of(K):
    """Warps that share the channels: two channels to a lane, which make a word of bfloat16."""
    return K // (2 * WARP)


def count(tokens):
    """Dots among ``tokens`` tokens, an even number."""
    return tokens * (tokens + 2)


# Tokens come in pairs. The dots of a pair: those of its first token's key and query with each earlier key, those of the
# second token's, then three of the tokens themselves: q q, k k, q k.
def link_at(t, i):
    """Where k_t . k_i is; q_t . k_i follows it."""
    return count(t - t % 2) + t % 2 * 2 * (t - 1) + 2 * i


def own_at(t):
    """Where q_t . q_t is; ``t`` may be a run-time number."""
    first = t - t % 2
    return first * (first + 2) + 4 * first + 2 + t % 2 * 3


def after(n, hv, step_n, step_hv, value_heads):
    """The row and value head that a program takes after these."""
    hv = hv + step_hv
    more = Int32(hv >= value_heads)
    return n + step_n + more, hv - more * value_heads


@cute.jit
def drafts(
    q: cute.Tensor, k: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor, dt_bias: cute.Tensor,
    slots: cute.Tensor, options: cute.Tensor, g_out: cute.Tensor, reads: cute.Tensor, dots: cute.Tensor, solved: cute.Tensor,
    factors: cute.Tensor, n, hv, step_n, step_hv, inverse, way, lane, pool, decays,
    K: cutlass.Constexpr, GATE: cutlass.Constexpr, UPDATE: cutlass.Constexpr, WARPS: cutlass.Constexpr,
):  # fmt: skip
    """What a warp of tokens does: its channels of each of the program's heads; and every so many heads the matrices. It
    writes log decays to the update of the first ``decays`` tokens."""
    n_rows, tokens, value_heads, WAYS = q.shape[0], q.shape[1], g.shape[2], ways_of(K)
    each = K // WARP // WAYS
    words = each * q.element_type.width // 32
    raw = cute.make_rmem_tensor(cute.make_layout((EIGHT, 3, words), stride=(3 * words, words, 1)), in_words(q).element_type)
    gate = cute.make_rmem_tensor(cute.make_layout(1 + each), Float32)  # A_log, dt_bias
    turn, where = Int32(0), Int32(0)
    if cutlass.const_expr(UPDATE):
        where = slots[n]
    request_tokens(q, k, g, A_log, dt_bias, raw, gate, n, hv, inverse, way, lane, K)
    chosen = numbers_of(options)
    while n < n_rows:
        buffer = turn % 2
        b_beta = beta[n, cutlass.min(lane, tokens - 1), hv]
        if turn > 1:
            cute.arch.barrier(barrier_id=FREE + buffer, number_of_threads=(WARPS + WAYS) * WARP)
        g_out_lanes = None
        if cutlass.const_expr(UPDATE):
            lanes = by_lane(g_out, (n_rows, tokens, value_heads, WAYS), K // WAYS)
            g_out_lanes = lanes[n, None, hv, way, lane, None]
        to = reads[buffer, None, None, None]
        prepare(raw, gate, chosen, tokens, lane, to, dots[buffer, way, None], g_out_lanes, where, pool, decays, GATE)
        cute.arch.barrier_arrive(barrier_id=READ_DONE + buffer, number_of_threads=(WARPS + WAYS) * WARP)
        n, hv = after(n, hv, step_n, step_hv, value_heads)
        if n < n_rows:
            if cutlass.const_expr(UPDATE):
                where = slots[n]
            request_tokens(q, k, g, A_log, dt_bias, raw, gate, n, hv, inverse, way, lane, K)
        if cutlass.const_expr(WAYS > 1):
            cute.arch.barrier(barrier_id=DOTS_DONE, number_of_threads=WAYS * WARP)
        else:
            cute.arch.sync_warp()
        if turn % WAYS == way:
            solve(
                dots[buffer, None, None], b_beta.to(Float32), chosen, tokens, lane,
                solved[buffer, None, None, None, None], factors[buffer, None, None],
            )  # fmt: skip
            cute.arch.barrier_arrive(barrier_id=SOLVE_DONE + buffer, number_of_threads=(WARPS + 1) * WARP)
        turn = turn + 1


@cute.jit
def request_tokens(
    q: cute.Tensor, k: cute.Tensor, g: cute.Tensor, A_log: cute.Tensor, dt_bias: cute.Tensor, raw: cute.Tensor,
    gate: cute.Tensor, n, hv, inverse, way, lane, K: cutlass.Constexpr,
):  # fmt: skip
    """A lane's channels of a row's tokens and of its gate's parameters, into registers."""
    n_rows, tokens, heads, value_heads, WAYS = q.shape[0], q.shape[1], q.shape[2], g.shape[2], ways_of(K)
    h = Int32(Int64(hv) * inverse >> 32)
    words = raw.shape[2]
    of_query, of_value = ((n_rows, tokens, count, WAYS) for count in (heads, value_heads))
    lanes = [
        in_pieces(in_words(x), lead, words * WARP, words)[n, None, head, way, lane, None]
        for x, lead, head in ((q, of_query, h), (k, of_query, h), (g, of_value, hv))
    ]
    # Gate parameters that all rows share have one row.
    gate[0] = A_log[cutlass.min(n, A_log.shape[0] - 1), hv]
    bias = by_lane(dt_bias, (dt_bias.shape[0], value_heads, WAYS), K // WAYS)
    given = loaded(bias[cutlass.min(n, dt_bias.shape[0] - 1), hv, way, lane, None])
    for e, x in enumerate(given):
        gate[1 + e] = x
    for first in cutlass.range_constexpr(0, EIGHT, 2):
        if first < tokens:
            for t in cutlass.range_constexpr(first, first + 2):
                for i, x in enumerate(lanes):
                    cute.autovec_copy(x[cutlass.min(t, tokens - 1), None], raw[t, i, None])


@cute.jit
def prepare(raw: cute.Tensor, gate: cute.Tensor, options, tokens, lane, reads: cute.Tensor, dots: cute.Tensor, g_out,
            where, pool, decays, GATE: cutlass.Constexpr):  # fmt: skip
    """A warp's part: of ``raw`` [T, 3, channels] q, k and g of a lane, writes ``reads`` and sums of ``dots``."""
    each = cute.size(gate) - 1
    rate, *bias = held(gate)
    from_state = cute.make_rmem_tensor(cute.make_layout(each), Float32)
    keys = cute.make_rmem_tensor(cute.make_layout((EIGHT, each), stride=(each, 1)), Float32)
    from_state.fill(1.0)
    for first in cutlass.range_constexpr(0, EIGHT, 2):
        if first < tokens:
            links, own, at = [], [], count(first)
            for t in cutlass.range_constexpr(first, first + 2):
                q, k, g = (of_words(raw[t, x, None]) for x in range(3))
                log_decay = log_decays(g, rate, bias, options, GATE)
                if cutlass.const_expr(g_out is not None):
                    _, live = within(pool, where)  # here, where the slot's arrival need not be waited for
                    if t < decays:
                        write([select(live, x, Float32(0.0)) for x in log_decay], g_out[t, None])
                decay = [exp(x) for x in log_decay]
                write([x * y for x, y in zip(held(from_state), decay, strict=True)], from_state)
                read = [x * from_state[e] for token in (k, q) for e, x in enumerate(token)]
                for part, some in enumerate(halves(read, BFloat16)):
                    cute.autovec_copy(some, reads[part, t, None])
                links, at = dots_of(t, k, q, decay, keys, links, own, lane, dots, at)
            store_sums(links + own, lane, dots, at)


def dots_of(t, k, q, decay, keys, links, own, lane, dots, at):
    """Adds a token's to ``links`` and ``own``, and its key to ``keys``, which decay on the way. What is left to sum."""
    for i in range(t):
        key = [x * y for x, y in zip(held(keys[i, None]), decay, strict=True)]
        write(key, keys[i, None])
        links = [*links, dot(k, key), dot(q, key)]
        links, at = store_full(links, lane, dots, at)
    write(k, keys[t, None])
    own += [dot(q, q), dot(k, k), dot(q, k)]
    return links, at


def store_full(values, lane, dots, first):
    """Sums of AT_MOST values, if there are as many: more at once would take registers."""
    if len(values) < AT_MOST:
        return values, first
    store_sums(values, lane, dots, first)
    return [], first + AT_MOST


def store_sums(values, lane, dots, first):
    """Sums over the warp; as many at once as a power of two allows."""
    while values:
        at_once = min(WARP, 1 << len(values).bit_length() - 1)
        some, values = values[:at_once], values[at_once:]
        store_some(sums(some, lane), lane, dots, first, at_once)
        first += at_once


@cute.jit
def store_some(value, lane, dots: cute.Tensor, first, at_once: cutlass.Constexpr):
    each = holder(1, at_once)
    if lane % each == 0:
        dots[first + lane // each] = value


@cute.jit
def solve(dots: cute.Tensor, beta, options, tokens, lane, solved: cute.Tensor, factors: cute.Tensor):
    """The [T, T] matrices that turn v - S k into u and into what u adds to the outputs; the tokens' factors of S k and S q.

    u_t = beta_t (x_t - sum_i<t k_t.k_i u_i), x a unit vector in each lane: its column. Zero beyond the tokens.
    """
    even = (tokens + 1) // 2 * 2
    for part in cutlass.range(count(even) // WARP + 1, unroll=1):
        at = part * WARP + lane
        if at < count(EIGHT):
            found = dots[0, at]
            for way in cutlass.range_constexpr(1, dots.shape[0]):
                found = found + dots[way, at]
            dots[0, at] = found
    cute.arch.sync_warp()
    if lane < EIGHT:
        at = own_at(lane)
        write_factors(dots[0, at], dots[0, at + 1], beta, options, factors, lane)
    cute.arch.sync_warp()
    if lane < EIGHT:
        keys = []  # what u has of them, each with its key's factor
        for t in cutlass.range_constexpr(EIGHT):
            own, added, key = Float32(0.0), Float32(0.0), Float32(0.0)
            if t < tokens:
                of_k, of_q, b_beta = (factors[x, t] for x in range(3))
                for i in cutlass.range_constexpr(t):
                    own = own + dots[0, link_at(t, i)] * keys[i]
                    added = added + dots[0, link_at(t, i) + 1] * keys[i]
                own = b_beta * (select(lane == t, Float32(1.0), Float32(0.0)) - of_k * own)
                key = of_k * own
                added = of_q * (added + dots[0, own_at(t) + 2] * key)
            keys.append(key)
            write([own, added], solved[t, lane % 4, lane // 4, None])


def write_factors(qq, kk, beta, options, factors, t):
    """What S k, S q and v - S k of token ``t`` are multiplied by."""
    normed = options[L2NORM] != 0.0
    of_q = select(normed, cute.math.rsqrt(qq + options[L2NORM_EPS]), Float32(1.0)) * options[SCALE]
    of_k = select(normed, cute.math.rsqrt(kk + options[L2NORM_EPS]), Float32(1.0))
    factors[0, t] = of_k
    factors[1, t] = of_q
    factors[2, t] = select(options[SIGMOID] != 0.0, options[BETA_RANGE] * sigmoid(beta), beta)


def keys_of_warp(k, most, K, WARPS):
    """What one of ``WARPS`` warps holds of up to ``most`` keys."""
    words = K // WARP * k.element_type.width // 32
    layout = cute.make_layout((max(most // WARPS, 1), words), stride=(words, 1))
    return cute.make_rmem_tensor(layout, in_words(k).element_type)


@cute.jit
def request_keys(k: cute.Tensor, keys: cute.Tensor, n, h, warp, lane, WARPS: cutlass.Constexpr):
    count, words = keys.shape
    lanes = in_pieces(in_words(k), k.shape[:3], words * WARP, words)
    for i in cutlass.range_constexpr(count):
        t = warp + i * WARPS
        if t < k.shape[1]:
            cute.autovec_copy(lanes[n, t, h, lane, None], keys[i, None])


@cute.jit
def write_keys(
    keys: cute.Tensor, k_out: cute.Tensor, factors: cute.Tensor, n, h, live, warp, lane, K: cutlass.Constexpr,
    WARPS: cutlass.Constexpr,
):  # fmt: skip
    """The keys as the update has them, with their factors."""
    lanes = by_lane(k_out, k_out.shape[:3], K)
    for i in cutlass.range_constexpr(keys.shape[0]):
        t = warp + i * WARPS
        if t < k_out.shape[1]:
            key = [select(live, factors[t] * x, Float32(0.0)) for x in of_words(keys[i, None])]
            write(key, lanes[n, t, h, lane, None])
