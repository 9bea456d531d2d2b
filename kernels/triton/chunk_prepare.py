"""chunk, first launch: what depends on one chunk alone, for all chunks at once.

Bound: memory. A chunk and value head reads q, k, g (48 KB in bfloat16 at K = 128, q and k shared by a group) and writes 64 KB;
its products, about 25 MFLOP on tensor cores, take as long at half their peak.

Decay stands between two tokens, so that the products A_qk and A_kk are no plain matrix products. Halving the chunk six times, each
pair of tokens is on opposite sides of one middle, and its decay is a factor of either side (see ``until``): six products, of
each of which the pairs of that level are kept. The sums of log decays up to a middle are matrix products too, with
matrices of zeros and ones. The inverse of I + beta A_kk is built up over the same blocks.
"""

import triton
import triton.language as tl

from .chunk_tile import C, chunk_of, crosses, halves, load_log_decay, sums, until


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
        whole = head_qk + tl.arange(0, K)[None, :]
        q_factor, q_size = factor(tl.load(q + whole, mask=valid[:, None], other=0.0), L2NORM_EPS)
        k_factor, k_size = factor(tl.load(k + whole, mask=valid[:, None], other=0.0), L2NORM_EPS)
        b = tl.load(beta + token * HV + hv, mask=valid, other=0.0).to(tl.float32)
        if BETA_RANGE is not None:
            b = tl.where(valid, BETA_RANGE * tl.sigmoid(b), 0.0)
        b *= k_size * k_size

        products_q = tl.zeros([C, C], tl.float32)
        products_k = tl.zeros([C, C], tl.float32)
        tile = program.to(tl.int64) * C
        for part in tl.range(K // BK):
            offsets_k = part * BK + tl.arange(0, BK)[None, :]
            b_q = tl.load(q + head_qk + offsets_k, mask=valid[:, None], other=0.0).to(tl.float32) * q_factor[:, None]
            b_k = tl.load(k + head_qk + offsets_k, mask=valid[:, None], other=0.0).to(tl.float32) * k_factor[:, None]
            b_g = load_log_decay(g, (token * HV + hv)[:, None] * K + offsets_k, valid[:, None], row, hv, offsets_k, A_log,
                                 dt_bias, GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE,
                                 K)  # fmt: skip
            high, low = halves(b_g)
            products_q += tl.where(t[:, None] == i, tl.sum(b_q * b_k, axis=1)[:, None], 0.0)
            for log_level in tl.range(6):
                e = tl.exp2(sums(high, low, until(1 << log_level)))
                e_k = (b_k * e).to(tl.float16)
                e_q = (b_q * e).to(tl.float16)
                columns = tl.trans(e_k)
                pairs = crosses(1 << log_level)
                products_k += tl.where(pairs, tl.dot(e_k, columns), 0.0)
                products_q += tl.where(pairs, tl.dot(e_q, columns), 0.0)
            place = (tile + t[:, None]) * K + offsets_k
            e = tl.exp2(sums(high, low, t[:, None] >= i))
            tl.store(k_in + place, (b_k * e).to(tl.float16))
            tl.store(q_in + place, (b_q * e).to(tl.float16))
            tl.store(k_out + place, (b_k * tl.exp2(sums(high, low, until(64)))).to(tl.float16))
            tl.store(decay + program.to(tl.int64) * K + offsets_k, tl.exp2(tl.sum(b_g, axis=0))[None, :])

        place = (tile + t[:, None]) * C + i
        tl.store(A_qk + place, products_q.to(tl.float16))
        if WITH_A_KK:
            tl.store(A_kk + place, products_k.to(tl.float16))
        tl.store(solve + place, unit_lower_inverse(b[:, None] * products_k).to(tl.float16))
        place = 3 * tile + t
        tl.store(rows + place, b)
        tl.store(rows + place + C, 1 / k_size)
        tl.store(rows + place + 2 * C, q_size)


@triton.jit
def factor(x, L2NORM_EPS: tl.constexpr):
    """What a row of x [C, K] is multiplied with, and the size that this takes from it: one where the norm is wanted."""
    x = x.to(tl.float32)
    if L2NORM_EPS is not None:
        inverse = tl.rsqrt(tl.sum(x * x, axis=1) + L2NORM_EPS)
        size = tl.full([C], 1.0, tl.float32)
    else:
        power = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
        power = tl.where(power == 0, 0x3F800000, tl.minimum(tl.maximum(power, 0x1F800000), 0x5F800000))
        size = power.to(tl.float32, bitcast=True)
        inverse = (0x7F000000 - power).to(tl.float32, bitcast=True)
    return inverse, size


@triton.jit
def unit_lower_inverse(a):
    """(I + a)^-1 [C, C] of a strictly lower triangular a; blocks double: [[P, 0], [X, Q]] has -Q^-1 X P^-1 in its inverse."""
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    inverse = tl.where(t == i, 1.0, tl.where(crosses(1), -a, 0.0))
    for log_level in tl.range(1, 6):
        cross = tl.where(crosses(1 << log_level), a, 0.0).to(tl.float16)
        half = inverse.to(tl.float16)
        inverse -= tl.dot(tl.dot(half, cross).to(tl.float16), half)
    return inverse
