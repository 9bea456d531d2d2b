"""chunk, first launch: what depends on one chunk alone, for all chunks at once.

Bound: memory. A chunk and value head reads q, k, g (48 KB in bfloat16 at K = 128, q and k shared by a group) and writes
64 KB; its products, about 25 MFLOP on tensor cores, take as long at half their peak. What it has to be kept from is being
bound by instructions: two decays at the edges of a block of tokens serve most products, and products with them are float16.

Decay stands between two tokens, so that the products A_qk and A_kk are no plain matrix products. Halving the chunk six
times, each pair of tokens is on opposite sides of one middle, and its decay is a factor of either side: six products, of
each of which the pairs of that level are kept. The four levels within blocks of 16 tokens need no other warp (see
``until``). For all the rest a token's decay up to it from its block's start, or behind it to its block's end, is multiplied
by decays of whole blocks. Sums of log decays are matrix products too, with matrices of zeros and ones. The inverse of
I + beta A_kk is built up over the same blocks.
"""

import triton
import triton.language as tl

from .chunk_tile import C, block_diagonal, blocks, chunk_of, crosses, halves, load_log2_decay, sums, unblocked, until


@triton.jit
def prepare(q, k, g, beta, A_log, dt_bias, bounds, tokens_end, chunks_end,
            k_in, k_out, q_in, A_qk, A_kk, solve, rows, decay,
            H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, PACKED: tl.constexpr,
            GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
            LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr,
            BETA_RANGE: tl.constexpr, WITH_A_KK: tl.constexpr):  # fmt: skip
    """One program a chunk and value head.

    Keys and queries are divided by their norms, or without the norm by a power of two of their size; the factors go to
    ``rows``, and what follows is in terms of the divided ones (docs/mathematics.md).
    """
    program = tl.program_id(0)
    item = program // HV
    hv = program % HV
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    if begin < end:
        t = tl.arange(0, C)
        i = tl.arange(0, C)[None, :]
        token = row * -tokens_end + begin + t
        valid = begin + t < end
        head_qk = (token * H + hv // (HV // H))[:, None] * K
        head_g = (token * HV + hv)[:, None] * K
        q_factor, _ = factor(q, head_qk, valid, K, BK, L2NORM_EPS)
        k_factor, k_size = factor(k, head_qk, valid, K, BK, L2NORM_EPS)
        b = tl.load(beta + token * HV + hv, mask=valid, other=0.0).to(tl.float32)
        if BETA_RANGE is not None:
            b = tl.where(valid, BETA_RANGE * tl.sigmoid(b), 0.0)
        b *= k_size * k_size

        small_t = tl.arange(0, 16)[None, :, None]
        small_i = tl.arange(0, 16)[None, None, :]
        block = tl.arange(0, 4)[:, None, None]
        others = (t // 16)[:, None]
        j = i // 16
        first = (t % 16 < 8)[:, None]
        ends = tl.where(first, j < others, j > others).to(tl.float16)
        middle = ((others == 0) & (j == 1)) | ((others == 3) & (j == 2))
        middle = (middle | (t % 16 >= 8)[:, None]).to(tl.float16)
        pairs = tl.where((others % 2 == 1) & (j == others - 1), 1.0, 0.0)

        products_q = tl.zeros([C, C], tl.float32)
        products_k = tl.zeros([C, C], tl.float32)
        small_q = tl.zeros([4, 16, 16], tl.float32)
        small_k = tl.zeros([4, 16, 16], tl.float32)
        dots = tl.zeros([C], tl.float32)
        tile = program.to(tl.int64) * C
        for part in tl.range(K // BK):
            offsets_k = part * BK + tl.arange(0, BK)[None, :]
            b_q = tl.load(q + head_qk + offsets_k, mask=valid[:, None], other=0.0).to(tl.float32) * q_factor[:, None]
            b_k = tl.load(k + head_qk + offsets_k, mask=valid[:, None], other=0.0).to(tl.float32) * k_factor[:, None]
            dots += tl.sum(b_q * b_k, axis=1)
            b_q, b_k = blocks(b_q.to(tl.float16)), blocks(b_k.to(tl.float16))
            b_g = load_log2_decay(g, head_g + offsets_k, valid[:, None], row, hv, offsets_k, A_log, dt_bias,
                                  GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, K)  # fmt: skip
            high, low = halves(b_g)
            small_high, small_low = blocks(high), blocks(low)
            for level in tl.static_range(4):
                e = decay_of(small_high, small_low, until(small_t, small_i, level))
                rows_q, rows_k = b_q * e, b_k * e
                small_pairs = crosses(small_t, small_i, level)
                small_q += tl.where(small_pairs, tl.dot(rows_q, tl.permute(rows_k, (0, 2, 1))), 0.0)
                small_k += tl.where(small_pairs, tl.dot(rows_k, tl.permute(rows_k, (0, 2, 1))), 0.0)

            e = decay_of(small_high, small_low, small_t >= small_i)
            up_q, up_k = b_q * e, b_k * e
            down_k = b_k * decay_of(small_high, small_low, small_t < small_i)
            columns = tl.trans(unblocked(down_k))
            products_q += pairs * tl.dot(unblocked(up_q), columns)
            products_k += pairs * tl.dot(unblocked(up_k), columns)
            before, after = of_blocks(tl.exp2(sums(high, low, ends)))
            mid, whole = of_blocks(tl.exp2(sums(high, low, middle)))
            e = tl.where(block >= 2, mid, 0.0)
            columns = tl.trans(scaled(down_k, tl.where(block < 2, mid, 0.0)))
            products_q = tl.dot(scaled(up_q, e), columns, products_q)
            products_k = tl.dot(scaled(up_k, e), columns, products_k)

            place = (tile + t[:, None]) * K + offsets_k
            tl.store(k_in + place, scaled(up_k, before))
            tl.store(q_in + place, scaled(up_q, before))
            tl.store(k_out + place, scaled(down_k, after))
            at = program.to(tl.int64) * K + part * BK + tl.arange(0, BK)[None, None, :]
            lone = (block == 0) & (tl.arange(0, 8)[None, :, None] == 0)
            tl.store(decay + at + tl.zeros([4, 8, BK], tl.int32), whole, mask=lone)

        small_q += tl.where(small_t == small_i, blocks(dots[:, None]), 0.0)
        products_q += block_diagonal(small_q)
        inverse = unit_lower_inverse(blocks(b[:, None]) * small_k, b[:, None] * products_k)
        products_k += block_diagonal(small_k)
        place = (tile + t[:, None]) * C + i
        tl.store(A_qk + place, products_q.to(tl.float16))
        if WITH_A_KK:
            tl.store(A_kk + place, products_k.to(tl.float16))
        tl.store(solve + place, inverse.to(tl.float16))
        place = 3 * tile + t
        tl.store(rows + place, b)
        tl.store(rows + place + C, k_factor)
        tl.store(rows + place + 2 * C, q_factor)


@triton.jit
def decay_of(high, low, picks):
    """The decay [4, 16, BK] over the tokens of each block of 16 that ``picks`` [1, 16, 16] names."""
    return tl.exp2(sums(high, low, tl.broadcast_to(picks.to(tl.float16), [4, 16, 16]))).to(tl.float16)


@triton.jit
def of_blocks(x):
    """[C, BK] of 4 blocks of two times 8 equal rows: either [4, 8, BK]."""
    x = tl.reshape(x, [4, 2, 8, x.shape[1]])
    return tl.split(tl.permute(x, (0, 2, 3, 1)))


@triton.jit
def scaled(x, e):
    """x [4, 16, BK] by blocks times e [4, 8, BK], as [C, BK]."""
    x = tl.reshape(x, [4, 2, 8, x.shape[2]])
    return tl.reshape(x * e.to(tl.float16)[:, None], [C, x.shape[3]])


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
        power = tl.max(found, axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.where(power == 0, 0x3F800000, tl.minimum(tl.maximum(power, 0x1F800000), 0x5F800000))
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
    inverse = tl.where(t == i, 1.0, tl.where(crosses(t, i, 0), -small, 0.0))
    for level in tl.static_range(1, 4):
        inverse = doubled(inverse, tl.where(crosses(t, i, level), small, 0.0))
    inverse = block_diagonal(inverse)
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    for level in tl.range(4, 6):
        inverse = doubled(inverse, tl.where(crosses(t, i, level), large, 0.0))
    return inverse


@triton.jit
def doubled(inverse, cross):
    half = inverse.to(tl.float16)
    return inverse - tl.dot(tl.dot(half, cross.to(tl.float16)).to(tl.float16), half)
