"""chunk, first launch: what depends on one chunk alone, for all chunks at once.

Bound: memory. A chunk and value head reads q, k, g (48 KB in bfloat16 at K = 128, q and k shared by a group) and writes
64 KB; its products, about 14 MFLOP on tensor cores, would take less. What it has to be kept from is being
bound by instructions: two decays at the edges of a block of tokens serve most products, and products with them are float16.

Decay stands between two tokens, so that the products A_qk and A_kk are no plain matrix products. Halving the chunk six
times, each pair of tokens is on opposite sides of one middle, and its decay is a factor of either side: six products, of
each of which the pairs of that level are kept. The four levels within blocks of 16 tokens need no other warp. For
all the rest a token's decay up to it from its block's start, or behind it to its block's end, is multiplied
by decays of whole blocks. Sums of log decays are matrix products too, with matrices of zeros and ones. The inverse of
I + beta A_kk is built up over the same blocks.
"""

import triton
import triton.language as tl

from .chunk_tile import C, chunk_of, gate_rate, load_log2_decay


@triton.jit
def prepare(q, k, g, beta, A_log, dt_bias, bounds, picks, edges, tokens_end, chunks_end,
            k_in, k_out, q_in, A_qk, A_kk, solve, rows, decay,
            H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr,
            GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
            LOWER_BOUND: tl.constexpr, L2NORM_EPS: tl.constexpr, BETA_RANGE: tl.constexpr,
            WITH_A_KK: tl.constexpr):  # fmt: skip
    """One program a chunk and value head.

    Keys and queries are divided by their norms, or without the norm by a power of two of their size; the factors go to
    ``rows``, and what follows is in terms of the divided ones (docs/mathematics.md).
    """
    program = tl.program_id(0)
    item = program // HV
    hv = program % HV
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    if begin < end:
        t = natural(C)
        i = tl.arange(0, C)[None, :]
        token = row * -tokens_end + begin + t
        valid = begin + t < end
        head_qk = (token * H + hv // (HV // H))[:, None] * K
        head_g = (token * HV + hv)[:, None] * K
        q_factor, _q_size = factor(q, head_qk, valid, K, BK, L2NORM_EPS)
        k_factor, k_size = factor(k, head_qk, valid, K, BK, L2NORM_EPS)
        b = tl.load(beta + token * HV + hv, mask=valid, other=0.0).to(tl.float32)
        if BETA_RANGE is not None:
            b = tl.where(valid, BETA_RANGE * tl.sigmoid(b), 0.0)
        b *= k_size * k_size

        rate = 0.0
        if GATE is not None:
            rate = gate_rate(A_log + row * A_LOG_STRIDE + hv)

        small_t = tl.arange(0, 16)[None, :, None]
        small_i = tl.arange(0, 16)[None, None, :]
        block = tl.arange(0, 4)[:, None, None]
        j = tl.arange(0, C)[None, None, :] // 16  # a column's block: which columns a product is for is known to the compiler
        edge = edges + (block * 16 + small_t) * C + tl.arange(0, C)[None, None, :]
        first_edges, second_edges = tl.load(edge), tl.load(edge + C * C)
        pick = picks + block * 0 + small_t * 16 + small_i
        until = tl.load(pick), tl.load(pick + 256), tl.load(pick + 512), tl.load(pick + 768)
        up_to, behind = tl.load(pick + 1024), tl.load(pick + 1280)

        products_q = tl.zeros([4, 16, C], tl.float32)
        products_k = tl.zeros([4, 16, C], tl.float32)
        small_q = tl.zeros([4, 16, 16], tl.float32)
        small_k = tl.zeros([4, 16, 16], tl.float32)
        dots = tl.zeros([C], tl.float32)
        tile = program.to(tl.int64) * C
        for part in tl.range(K // BK):
            offsets_k = part * BK + tl.arange(0, BK)[None, :]
            b_q = tl.load(q + head_qk + offsets_k, mask=valid[:, None], other=0.0).to(tl.float32) * q_factor[:, None]
            b_k = tl.load(k + head_qk + offsets_k, mask=valid[:, None], other=0.0).to(tl.float32) * k_factor[:, None]
            dots += tl.sum(b_q * b_k, axis=1)
            b_q, b_k = in_blocks(b_q.to(tl.float16)), in_blocks(b_k.to(tl.float16))
            bias = dt_bias + row * DT_BIAS_STRIDE + hv * K + offsets_k
            b_g = load_log2_decay(g + head_g + offsets_k, valid[:, None], rate, bias, GATE, HAS_BIAS, LOWER_BOUND)
            b_g = in_blocks(b_g)
            for level in tl.static_range(4):
                e = tl.exp2(tl.dot(until[level], b_g)).to(tl.float16)
                rows_q, rows_k = b_q * e, b_k * e
                columns = tl.permute(rows_k, (0, 2, 1))
                small_pairs = opposite(small_t, small_i, level)
                small_q = tl.where(small_pairs, tl.dot(rows_q, columns, small_q), small_q)
                small_k = tl.where(small_pairs, tl.dot(rows_k, columns, small_k), small_k)

            up = tl.exp2(tl.dot(up_to, b_g))
            _first_up, last_up = halves_of(up)
            up = up.to(tl.float16)
            up_q, up_k = b_q * up, b_k * up
            down_k = b_k * tl.exp2(tl.dot(behind, b_g)).to(tl.float16)
            all_g = of_all(b_g)
            before, after = halves_of(tl.exp2(tl.dot(first_edges, all_g)))
            from_1, from_2 = halves_of(tl.exp2(tl.dot(second_edges, all_g)))
            # No product takes the last block's keys. They are made zero for LLVM, which otherwise pairs float16 numbers of
            # two tokens instead of two channels, here and in all levels, and takes a hundred instructions to turn them.
            columns = tl.permute(of_all(down_k * tl.where(block < 3, 1.0, 0.0).to(tl.float16)), (0, 2, 1))
            products_q = tl.where(j == 2, tl.dot(up_q, columns, products_q), products_q)
            products_k = tl.where(j == 2, tl.dot(up_k, columns, products_k), products_k)
            products_q = tl.where(j == 1, tl.dot(scaled(up_q, from_2), columns, products_q), products_q)
            products_k = tl.where(j == 1, tl.dot(scaled(up_k, from_2), columns, products_k), products_k)
            products_q = tl.where(j == 0, tl.dot(scaled(up_q, from_1), columns, products_q), products_q)
            products_k = tl.where(j == 0, tl.dot(scaled(up_k, from_1), columns, products_k), products_k)

            place = (tile + t[:, None]) * K + offsets_k
            tl.store(k_in + place, out_of_blocks(scaled(up_k, before)))
            tl.store(q_in + place, out_of_blocks(scaled(up_q, before)))
            tl.store(k_out + place, out_of_blocks(scaled(down_k, after)))
            at = program.to(tl.int64) * K + part * BK + channels(BK)[None, None, :]
            lone = (block == 3) & (tl.arange(0, 8)[None, :, None] == 7)
            tl.store(decay + at + tl.zeros([4, 8, BK], tl.int32), last_up * before, mask=lone)

        below = tl.arange(0, C)[:, None] // 16 > i // 16
        products_q = tl.where(below, unblocked(products_q), block_diagonal(small_q))
        products_k = tl.where(below, unblocked(products_k), 0.0)
        t = tl.arange(0, C)
        b, dots = in_order(b), in_order(dots)
        products_q += tl.where(t[:, None] == i, dots[:, None], 0.0)
        inverse = unit_lower_inverse(blocks(b[:, None]) * small_k, b[:, None] * products_k)
        products_k += block_diagonal(small_k)
        place = (tile + t[:, None]) * C + i
        tl.store(A_qk + place, products_q.to(tl.float16))
        if WITH_A_KK:
            tl.store(A_kk + place, products_k.to(tl.float16))
        tl.store(solve + place, inverse.to(tl.float16))
        place = 3 * tile + t
        tl.store(rows + place, b)
        place = 3 * tile + natural(C)
        tl.store(rows + place + C, k_factor)
        tl.store(rows + place + 2 * C, q_factor)


@triton.jit
def blocks(x):
    """[C, D] as [4, 16, D]: a warp's 16 rows a block, whose products need no other warp."""
    return tl.reshape(x, [4, 16, x.shape[1]])


@triton.jit
def unblocked(x):
    return tl.reshape(x, [C, x.shape[2]])


@triton.jit
def block_diagonal(x):
    """[4, 16, 16] as the blocks on the diagonal of [C, C]."""
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    rows = tl.broadcast_to(tl.reshape(x, [C, 1, 16]), [C, 4, 16])
    return tl.where(t // 16 == i // 16, tl.reshape(rows, [C, C]), 0.0)


@triton.jit
def natural(END: tl.constexpr):
    """The token of each row as loaded: in rows and channels as loaded, a thread's 16 bytes are what it has in a product.

    A thread loads 8 channels of two tokens (BK = 32), and mma.sync has it hold 2 of every 8 channels of tokens 8 apart. So
    ``in_blocks`` reorders tokens and channels without moving anything between threads, and ``out_of_blocks`` back.
    """
    r = tl.arange(0, END)
    return r // 8 % 4 * 16 + r // 32 * 8 + r % 8


@triton.jit
def in_order(x):
    """x [C] of rows as loaded, by token."""
    return tl.reshape(tl.permute(tl.reshape(x, [2, 4, 8]), (1, 0, 2)), [C])


@triton.jit
def in_blocks(x):
    """x [C, BK] as loaded, as [4, 16, BK]: blocks of 16 tokens in order, channels in the order of ``channels``."""
    x = tl.reshape(x, [2, 4, 8, 4, x.shape[1] // 8, 2])
    return tl.reshape(tl.permute(x, (1, 0, 2, 4, 3, 5)), [4, 16, x.shape[3] * x.shape[4] * 2])


@triton.jit
def out_of_blocks(x):
    x = tl.reshape(x, [4, 2, 8, x.shape[2] // 8, 4, 2])
    return tl.reshape(tl.permute(x, (1, 0, 2, 4, 3, 5)), [C, x.shape[3] * x.shape[4] * 2])


@triton.jit
def channels(BK: tl.constexpr):
    """Which channel a column of ``in_blocks`` is."""
    c = tl.arange(0, BK)
    return c // 2 % 4 * (BK // 4) + c // 8 * 2 + c % 2


@triton.jit
def opposite(t, i, LOG_LEVEL):
    """Whether t and i are an upper and a lower token of one block of 2^(LOG_LEVEL + 1) tokens."""
    return ((t ^ i) >> LOG_LEVEL == 1) & (t > i)


@triton.jit
def halves_of(x):
    """The first and the last 8 of every 16 rows of x [4, 16, BK], each [4, 8, BK]."""
    return tl.split(tl.permute(tl.reshape(x, [4, 2, 8, x.shape[2]]), (0, 2, 3, 1)))


@triton.jit
def of_all(x):
    """x [4, 16, BK], of which a warp has its own block's rows, as [4, C, BK], of which it has the rows of all.

    So products are batches of the shape that mma.sync takes. As wgmma they wait for MEMBAR and FENCE before each, and their
    accumulators hold the blocks above the diagonal too.
    """
    return tl.broadcast_to(tl.reshape(x, [1, C, x.shape[2]]), [4, C, x.shape[2]])


@triton.jit
def scaled(x, e):
    """x [4, 16, BK] times e [4, 8, BK], which serves either half of a block's rows."""
    x = tl.reshape(x, [4, 2, 8, x.shape[2]])
    return tl.reshape(x * e.to(tl.float16)[:, None], [4, 16, x.shape[3]])


@triton.jit
def factor(x, head, valid, K: tl.constexpr, BK: tl.constexpr, L2NORM_EPS: tl.constexpr):
    """What a row of x [C, K] is multiplied with, and the size that this takes from it: one where the norm is wanted."""
    found = tl.zeros([C, BK], tl.float32)
    for part in tl.static_range(K // BK):
        b_x = tl.load(x + head + part * BK + tl.arange(0, BK)[None, :], mask=valid[:, None], other=0.0).to(tl.float32)
        if L2NORM_EPS is not None:
            found += b_x * b_x
        else:
            found = tl.maximum(found, tl.abs(b_x))
    if L2NORM_EPS is not None:
        inverse = tl.rsqrt(tl.sum(found, axis=1) + L2NORM_EPS)
        size = tl.full([C], 1.0, tl.float32)
    else:
        # Not below 2^-10 of the chunk's largest: what is multiplied with the size in turn must not outgrow other tokens'.
        power = tl.max(found, axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        largest = tl.max(power, axis=0)
        largest = tl.where(largest == 0, 0x3F800000, tl.minimum(tl.maximum(largest, 0x24800000), 0x5F800000))
        power = tl.minimum(tl.maximum(power, largest - (10 << 23)), largest)
        size = power.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
    return inverse, size


@triton.jit
def unit_lower_inverse(small, large):
    """(I + a)^-1 [C, C] of a strictly lower triangular a: its blocks of 16 tokens on the diagonal [4, 16, 16], and the rest.

    Blocks double: [[P, 0], [X, Q]] has -Q^-1 X P^-1 in its inverse.
    """
    t = tl.arange(0, 16)[None, :, None]
    i = tl.arange(0, 16)[None, None, :]
    inverse = tl.where(t == i, 1.0, tl.where(opposite(t, i, 0), -small, 0.0))
    for level in tl.static_range(1, 4):
        inverse = doubled(inverse, tl.where(opposite(t, i, level), small, 0.0))
    inverse = block_diagonal(inverse)
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    for level in tl.range(4, 6):
        inverse = doubled(inverse, tl.where(opposite(t, i, level), large, 0.0))
    return inverse


@triton.jit
def doubled(inverse, cross):
    half = inverse.to(tl.float16)
    return inverse - tl.dot(tl.dot(half, cross.to(tl.float16)).to(tl.float16), half)
