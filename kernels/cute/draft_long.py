"""What verify needs of the tokens of a draft of 9 to 16: two eights, each a warp's work.

A lane has a few neighbouring channels. The tokens come through shared memory, those of a warp's next head while it still
works on this one; what a lane requests only that lane reads. Decays come first, then the dots, as in draft.py and as if the
state were there at the start of each eight, then what tokens read from the state, for which there is room for one head.

What the later tokens have to do with the earlier keys is a product on tensor cores: of what they would read from a state at
the end of the first eight and of the keys with the decay up to there, so no exponent is positive here either.

Nothing of tokens beyond the draft's is zeroed: what comes of them are rows of matrices that nobody reads.
"""

import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, TFloat32, Uint32
from cutlass.cute.nvgpu import cpasync

from .draft import EIGHT, after, count, dots_of, link_at, own_at, store_sums, write_factors
from .product import add, atom, halves, zeros
from .token import (
    TYPES,
    WARP,
    by_lane,
    exp,
    held,
    in_pieces,
    in_words,
    load_as,
    loaded,
    log_decays,
    numbers_of,
    of_words,
    select,
    within,
    write,
)

TOKENS = 16  # at most
EIGHTS = TOKENS // EIGHT
HEADS = 2  # of a program that are worked on at once, each by two warps
COUNT = count(EIGHT)  # dots
# Barriers, one for each of these heads: what is written of it and has been read; and what the first eight leaves.
READ_DONE, READ_FREE, SOLVE_DONE, SOLVE_FREE, DECAY_DONE, KEYS_DONE = range(1, 13, HEADS)
# So that lanes meet in few banks: words between rows of tokens, which are left factors at last, and of keys, and
ROW_GAP, KEY_GAP = 16, 8
COLUMN = 2 * EIGHT + 4  # numbers of a column of what earlier tokens add


class Kept:
    """Shared memory of the warps of tokens."""

    def __init__(self, memory, K, TOKEN, solved, factors):
        self.K, self.solved, self.factors = K, solved, factors
        warps, self.each = HEADS * EIGHTS, K // WARP
        # Of a token, K words each: q and k, or q alone if that takes as much; g, then the decay; k if q is alone. The
        # later eight's lanes at last write what they read over the two first, which are then a product's left factors.
        self.planes = planes_of(TOKEN)
        self.pitch = K + ROW_GAP
        plane, words = EIGHT * self.pitch, self.each * TYPES[TOKEN].width // 32
        raw = memory.allocate_tensor(Float32, cute.make_layout(warps * self.planes * plane), 128)
        strides = self.planes * plane, self.pitch, self.each, 1
        word = Float32 if TOKEN == "float32" else Uint32
        base = cute.recast_ptr(raw.iterator, dtype=word)
        self.given = [  # q, k, g: warps, tokens, lanes, words
            cute.make_tensor(base + at, cute.make_layout((warps, EIGHT, WARP, words), stride=strides))
            for at in (0, 2 * plane if self.planes == 3 else words, plane)
        ]
        self.decays = cute.make_tensor(
            raw.iterator + plane, cute.make_layout((warps, EIGHT, WARP, self.each), stride=strides)
        )
        strides = 2 * self.planes * plane, 2 * plane, 2 * self.pitch
        base = cute.recast_ptr(raw.iterator, dtype=BFloat16)
        shape = warps, 2, EIGHT, WARP, 2 * self.each
        self.own_reads = cute.make_tensor(base, cute.make_layout(shape, stride=(*strides, 2 * self.each, 1)))
        shape = warps, 2, EIGHT, K // 4, 8
        self.own_fragments = cute.make_tensor(base, cute.make_layout(shape, stride=(*strides, 8, 1)))
        self.bias = memory.allocate_tensor(
            Float32, cute.make_layout((warps, WARP, self.each), stride=(K, self.each, 1)), 128
        )
        self.dots = memory.allocate_tensor(Float32, cute.make_layout((warps, COUNT), stride=(COUNT, 1)), 16)
        self.dots_by_four = in_pieces(self.dots, (warps,), COUNT, 4)
        # What a head's first eight leaves for the later one: its decay, its keys, and what they add to each column.
        strides = K, self.each, 1
        self.passed = memory.allocate_tensor(Float32, cute.make_layout((HEADS, WARP, self.each), stride=strides), 128)
        row = K + 2 * KEY_GAP
        keys = memory.allocate_tensor(BFloat16, cute.make_layout(HEADS * 2 * EIGHT * row), 128)
        strides = 2 * EIGHT * row, EIGHT * row, row
        self.keys, self.key_fragments = (
            cute.make_tensor(keys.iterator, cute.make_layout((HEADS, 2, EIGHT, K // some, some), stride=(*strides, some, 1)))
            for some in (self.each, 4)
        )
        shape, strides = (HEADS, EIGHT, EIGHT // 2, 2, 2), (EIGHT * COLUMN, COLUMN, 4, 2, 1)
        self.earlier = memory.allocate_tensor(Float32, cute.make_layout(shape, stride=strides), 16)

    @staticmethod
    def bytes(K, TOKEN):
        numbers = EIGHTS * (planes_of(TOKEN) * EIGHT * (K + ROW_GAP) + K + COUNT)
        return 4 * HEADS * (numbers + K + EIGHT * (K + 2 * KEY_GAP) + EIGHT * COLUMN)


def planes_of(TOKEN):
    return 3 if TOKEN == "float32" else 2


@cute.jit
def drafts(
    q: cute.Tensor, k: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor, dt_bias: cute.Tensor,
    slots: cute.Tensor, options: cute.Tensor, g_out: cute.Tensor, reads: cute.Tensor, kept: cutlass.Constexpr,
    n, hv, step_n, step_hv, inverse, warp, lane, pool,
    GATE: cutlass.Constexpr, UPDATE: cutlass.Constexpr, WARPS: cutlass.Constexpr,
):  # fmt: skip
    """What a warp of tokens does. ``n``, ``hv`` are its team's first head, ``step_n``, ``step_hv`` what the next one is."""
    K = kept.K
    n_rows, tokens, value_heads = q.shape[0], q.shape[1], g.shape[2]
    ALL, OURS = (WARPS + EIGHTS) * WARP, EIGHTS * WARP  # threads that a barrier is for
    team, eight = warp // EIGHTS, warp % EIGHTS
    first = eight * EIGHT
    here = cutlass.min(tokens - first, EIGHT)
    given = [x[warp, None, lane, None] for x in kept.given]
    decays, bias = kept.decays[warp, None, lane, None], kept.bias[warp, lane, None]
    dots = kept.dots[warp, None]
    chosen = numbers_of(options)
    sources = q, k, g, dt_bias
    turn, rate, where = Int32(0), Float32(0.0), Int32(0)
    if n < n_rows:
        if cutlass.const_expr(UPDATE):
            where = slots[n]
        rate = request(sources, A_log, given, bias, n, hv, inverse, first, here, lane, K, GATE)
    while n < n_rows:
        b_beta = beta[n, cutlass.min(first + lane % EIGHT, tokens - 1), hv]
        g_out_lanes, at = None, ((n * tokens + first) * value_heads + hv) * WARP + lane
        if cutlass.const_expr(UPDATE):
            g_out_lanes = in_pieces(g_out, (), n_rows * tokens * value_heads * K, kept.each)
        step = value_heads * WARP
        into = g_out_lanes, at, step, where, pool
        passed = find_decays(given[2], decays, rate, bias, chosen, here, *into, kept.each, GATE)
        to = reads[None, eight, None, None]
        keys = find_dots(given, decays, here, lane, dots)
        if turn > 0:
            cute.arch.barrier(barrier_id=SOLVE_FREE + team, number_of_threads=ALL)
        if eight == 0:
            for t in cutlass.range_constexpr(EIGHT):
                for part, some in enumerate(halves(held(keys[t, None]), BFloat16)):
                    cute.autovec_copy(some, kept.keys[team, part, t, lane, None])
        if (turn > 0) | (team > 0):
            cute.arch.barrier(barrier_id=READ_FREE + team, number_of_threads=ALL)
        own = cute.make_rmem_tensor(cute.make_layout(kept.each), Float32)
        own.fill(1.0)
        if eight == 0:
            cute.autovec_copy(passed, kept.passed[team, lane, None])
            cute.arch.barrier_arrive(barrier_id=DECAY_DONE + team, number_of_threads=OURS)
            find_reads(given, decays, here, [own], [to])
            cute.arch.barrier_arrive(barrier_id=READ_DONE + team, number_of_threads=ALL)
        else:
            cute.arch.barrier(barrier_id=DECAY_DONE + team, number_of_threads=OURS)
            cute.autovec_copy(kept.passed[team, lane, None], passed)
            find_reads(given, decays, here, [passed, own], [to, kept.own_reads[warp, None, None, lane, None]])
            cute.arch.barrier_arrive(barrier_id=READ_DONE + team, number_of_threads=ALL)
            cute.arch.sync_warp()
            cute.arch.barrier(barrier_id=KEYS_DONE + team, number_of_threads=OURS)
            find_earlier(kept, warp, team, lane)
        cute.arch.sync_warp()
        n, hv = after(n, hv, step_n, step_hv, value_heads)
        if cutlass.const_expr(UPDATE):
            where = slots[cutlass.min(n, n_rows - 1)]
        # The first eight's warp is waited for.
        if (n < n_rows) & (eight == EIGHTS - 1):
            rate = request(sources, A_log, given, bias, n, hv, inverse, first, here, lane, K, GATE)
        solve(kept.dots_by_four[warp, None, None], b_beta.to(Float32), chosen, here, lane, eight, team, kept)
        if eight == 0:
            cute.arch.barrier_arrive(barrier_id=KEYS_DONE + team, number_of_threads=OURS)
            if n < n_rows:
                rate = request(sources, A_log, given, bias, n, hv, inverse, first, here, lane, K, GATE)
        cute.arch.barrier_arrive(barrier_id=SOLVE_DONE + team, number_of_threads=ALL)
        cute.arch.sync_warp()  # before the next head's dots are written over these
        turn = turn + 1


@cute.jit
def request(sources: cutlass.Constexpr, A_log: cute.Tensor, given: cutlass.Constexpr, bias: cute.Tensor, n, hv, inverse,
            first, here, lane, K: cutlass.Constexpr, GATE: cutlass.Constexpr):  # fmt: skip
    """A lane's channels of a row's tokens and of its gate's parameters."""
    q, k, g, dt_bias = sources
    h = Int32(Int64(hv) * inverse >> 32)
    words, row = given[0].shape[1], n * q.shape[1] + first
    load = cute.make_copy_atom(cpasync.CopyG2SOp(), given[0].element_type, num_bits_per_copy=words * 32)
    q_lanes, k_lanes, g_lanes = (
        in_pieces(in_words(x), (), x.shape[0] * x.shape[1] * x.shape[2] * words * WARP, words) for x in (q, k, g)
    )
    of_query, of_value = ((row * x.shape[2] + head) * WARP + lane for x, head in ((q, h), (g, hv)))
    for t in cutlass.range(here, unroll=1):
        at = of_query + t * (q.shape[2] * WARP)
        cute.copy(load, q_lanes[at, None], given[0][t, None])
        cute.copy(load, k_lanes[at, None], given[1][t, None])
        cute.copy(load, g_lanes[of_value + t * (g.shape[2] * WARP), None], given[2][t, None])
    # Gate parameters that all rows share have one row.
    if cutlass.const_expr(GATE != "none"):
        biases = by_lane(dt_bias, dt_bias.shape[:2], K)
        load = cute.make_copy_atom(cpasync.CopyG2SOp(), Float32, num_bits_per_copy=K // WARP * 32)
        cute.copy(load, biases[cutlass.min(n, dt_bias.shape[0] - 1), hv, lane, None], bias)
    cute.arch.cp_async_commit_group()
    return A_log[cutlass.min(n, A_log.shape[0] - 1), hv]


@cute.jit
def find_decays(g: cute.Tensor, decays: cute.Tensor, rate, bias: cute.Tensor, options, here, g_out, at, step, where,
                pool, each: cutlass.Constexpr, GATE: cutlass.Constexpr):  # fmt: skip
    """Each token's, over its g; the product of all. If ``g_out`` is wanted a lane's of the first token are ``at``, and
    those of others ``step`` apart."""
    passed = cute.make_rmem_tensor(cute.make_layout(each), Float32)
    passed.fill(1.0)
    cute.arch.cp_async_wait_group(0)
    for pair in cutlass.range((here + 1) // 2, unroll=1):
        found, of_bias = [], loaded(bias)
        for x in cutlass.range_constexpr(2):
            found += of_words(load_as(g[2 * pair + x, None]))
        found = log_decays(found, rate, of_bias * 2, options, GATE)
        for x in cutlass.range_constexpr(2):
            t = 2 * pair + x
            log_decay = found[x * each : (x + 1) * each]
            if cutlass.const_expr(g_out is not None):
                _, live = within(pool, where)  # here, where the slot's arrival need not be waited for
                if t < here:
                    write([select(live, x, Float32(0.0)) for x in log_decay], g_out[at + t * step, None])
            decay = [exp(x) for x in log_decay]
            write(decay, decays[t, None])
            for e, y in enumerate(decay):
                passed[e] = passed[e] * y
    return passed


def keys_and_queries(given, t):
    """A lane's channels of a token, in float32."""
    found = []
    for x in given[:2]:
        found.append(of_words(load_as(x[t, None])))
    return found[1], found[0]


@cute.jit
def find_reads(given: cutlass.Constexpr, decays: cute.Tensor, here, passed: cutlass.Constexpr, to: cutlass.Constexpr):
    """``to`` [2, T, .]: what tokens ask of a state from which ``passed`` is the decay, as sums of two numbers; of as many
    states as there are of both. The last one may lie over what it is made of."""
    for pair in cutlass.range((here + 1) // 2, unroll=1):
        for x in cutlass.range_constexpr(2):
            t = 2 * pair + x
            both, decay = keys_and_queries(given, t), loaded(decays[t, None])
            for of_state, into in zip(passed, to, strict=True):
                for e, y in enumerate(decay):
                    of_state[e] = of_state[e] * y
                # Two channels of the key, two of the query.
                read = [y[e] * of_state[e] for two in range(0, len(decay), 2) for y in both for e in (two, two + 1)]
                for part, some in enumerate(halves(read, BFloat16)):
                    cute.autovec_copy(some, into[part, t, None])


@cute.jit
def find_dots(given: cutlass.Constexpr, decays: cute.Tensor, here, lane, dots: cute.Tensor):
    """Sums of ``dots``; each key with the decay from its token to the last of eight."""
    each = decays.shape[1]
    keys = cute.make_rmem_tensor(cute.make_layout((EIGHT, each), stride=(each, 1)), Float32)
    for first in cutlass.range_constexpr(0, EIGHT, 2):
        if first < here:
            links, own, at = [], [], count(first)
            for t in cutlass.range_constexpr(first, first + 2):
                k, q = keys_and_queries(given, t)
                links, at = dots_of(t, k, q, loaded(decays[t, None]), keys, links, own, lane, dots, at)
            store_sums(links + own, lane, dots, at)
    return keys


def find_earlier(kept, warp, team, lane):
    """What of each of the first eight's columns the later tokens' u and outputs have to add, without their factors."""
    line, column = lane // 4, lane % 4
    product = atom(BFloat16)
    found = [zeros(4) for _ in range(3)]  # products that need not wait for each other
    for step in range(kept.K // 16):
        lefts, rights = (
            [load_as(x[*place, line, 4 * step + column, None]) for place in places]
            for x, places in (
                (kept.own_fragments, [(warp, part) for part in range(2)]),
                (kept.key_fragments, [(team, part) for part in range(2)]),
            )
        )
        for to, (left, right) in zip(found, ((0, 0), (0, 1), (1, 0)), strict=True):
            cute.mma_atom_call(product, to, lefts[left], rights[right], to)
    x, y, z = found
    left = halves([x[i] + y[i] + z[i] for i in (0, 2, 1, 3)], TFloat32)
    # A lane's two keys are side by side: as sums may go over keys in any order, these are its two of a product.
    keys = [
        kept.factors[team, 0, 2 * column + e] * kept.solved[team, 0, 2 * column + e, line % 4, line // 4, 0]
        for e in range(2)
    ]
    to = zeros(4)
    add(atom(TFloat32), to, left, halves(keys, TFloat32))
    for e in range(2):
        write([to[e], to[2 + e]], kept.earlier[team, 2 * column + e, line // 2, line % 2, None])


@cute.jit
def solve(dots: cute.Tensor, beta, options, here, lane, eight, team, kept: cutlass.Constexpr):
    """The rows of eight tokens of the matrices that turn v - S k into u and into what u adds to the outputs; the tokens'
    factors of S k and S q. As draft.solve, with what the first eight adds to the later.
    """
    LATER = TOKENS - EIGHT
    factors, solved = kept.factors[team, None, None], kept.solved[team, None, None, None, None, None]
    rows = in_pieces(kept.factors, (HEADS, 3), TOKENS, 4)
    if lane < EIGHT:
        qq, kk = (dots[(own_at(lane) + x) // 4, (own_at(lane) + x) % 4] for x in range(2))
        write_factors(qq, kk, beta, options, factors, eight * EIGHT + lane)
    cute.arch.sync_warp()
    at = lane - LATER + eight * EIGHT  # the lane's column
    if (at >= 0) & (lane < TOKENS):
        keys = cute.make_rmem_tensor(cute.make_layout(EIGHT), Float32)  # what u has of them, each with its key's factor
        to = solved[at // EIGHT, None, at % 4, at % EIGHT // 4, None]
        for four in cutlass.range_constexpr(2):
            if four * 4 < here:
                of_k, of_q, of_u = (loaded(rows[team, x, eight * 2 + four, None]) for x in range(3))
                for t in cutlass.range_constexpr(four * 4, four * 4 + 4):
                    links = row_of(dots, link_at(t, 0), 2 * t)
                    before = loaded(kept.earlier[team, lane % EIGHT, t // 2, t % 2, None])
                    own, added = (select((eight > 0) & (lane < EIGHT), x, Float32(0.0)) for x in before)
                    for i in cutlass.range_constexpr(t):
                        own = own + links[2 * i] * keys[i]
                        added = added + links[2 * i + 1] * keys[i]
                    own = of_u[t % 4] * (select(lane == LATER + t, Float32(1.0), Float32(0.0)) - of_k[t % 4] * own)
                    key = of_k[t % 4] * own
                    keys[t] = key
                    (qk,) = row_of(dots, own_at(t) + 2, 1)
                    write([own, of_q[t % 4] * (added + qk * key)], to[eight * EIGHT + t, None])


def row_of(dots, first, count):
    """So many dots, four of them side by side at once."""
    found, at = [], first
    while at < first + count:
        if at % 4 == 0 and at + 4 <= first + count:
            found += loaded(dots[at // 4, None])
            at += 4
        else:
            found.append(dots[at // 4, at % 4])
            at += 1
    return found
