"""chunk's backward pass, last launch: the gradients of all chunks at once, given the states at their two ends.

Bound: the products, about 50 MFLOP a chunk and value head on tensor cores, and what is between them; it reads 0.2 MB a chunk and
value head (at K = V = 128 in bfloat16), most of it the two states. A program takes the value heads of a group one after the
other, so that the gradients of their q and k are summed in registers: no atomics, one order of summation.

Decay is differentiated through its logarithm: every exponential's gradient goes, times the exponential, to the log decay
it was made from. A pair of tokens adds to the later's prefix sum and takes from the earlier's; what a token's own log decay
gets is the sum over all prefix sums that it is in.
"""

import triton
import triton.language as tl

from .chunk_prepare import factor
from .chunk_tile import C, blocks, chunk_of, crosses, halves, load_log_decay, sums, unblocked, until


@triton.jit
def gradients(q, k, v, g, beta, A_log, dt_bias, cu_seqlens, bounds, do, states, dstates, dsolved, k_in, A_kk, solve, rows,
              decay, sequences_end, tokens_end, chunks_end,
              dq, dk, dv, dg, dbeta, dA_log, ddt_bias,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr,
              GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
              LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr,
              BETA_RANGE: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """One program a chunk and q/k head. dA_log and ddt_bias are a chunk's share, to be summed over the chunks."""
    program = tl.program_id(0)
    item = program // H
    h = program % H
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    t = tl.arange(0, C)
    i = tl.arange(0, C)[None, :]
    GROUP: tl.constexpr = HV // H
    PARTS_K: tl.constexpr = K // C
    PARTS_V: tl.constexpr = V // C
    if PACKED:
        behind = tl.load(cu_seqlens + row * (1 - sequences_end) - sequences_end) + (item % -chunks_end) * C + t
        zero_behind(row * -tokens_end + behind, behind < -tokens_end, h, dq, dk, dv, dg, dbeta, H, HV, K, V)
    if begin >= end:  # a chunk left over
        for of_group in tl.range(GROUP):
            tile = (item * HV + h * GROUP + of_group).to(tl.int64)
            if GATE is not None:
                tl.store(dA_log + tile, 0.0)
                if HAS_BIAS:
                    tl.store(ddt_bias + tile * K + tl.arange(0, K), tl.zeros([K], tl.float32))
        return
    token = row * -tokens_end + begin + t
    valid = begin + t < end
    place_qk = (token * H + h)[:, None] * K + i
    q_factor, q_rest = factor(tl.load(q + (token * H + h)[:, None] * K + tl.arange(0, K)[None, :], mask=valid[:, None],
                                      other=0.0), L2NORM_EPS)  # fmt: skip
    k_factor, k_rest = factor(tl.load(k + (token * H + h)[:, None] * K + tl.arange(0, K)[None, :], mask=valid[:, None],
                                      other=0.0), L2NORM_EPS)  # fmt: skip
    sum_dq, sum_dk = (), ()
    for part in tl.static_range(PARTS_K):
        sum_dq = sum_dq + (tl.zeros([C, C], tl.float32),)
        sum_dk = sum_dk + (tl.zeros([C, C], tl.float32),)

    for of_group in tl.range(GROUP):
        hv = h * GROUP + of_group
        tile = (item * HV + hv).to(tl.int64)
        b_beta = tl.load(rows + tile * 3 * C + t)
        place_c = tile * C * C + t[:, None] * C + i
        b_solve = tl.load(solve + place_c).to(tl.bfloat16)
        dA_qk = tl.zeros([C, C], tl.float32)
        dA_kk = tl.zeros([C, C], tl.float32)
        b_dbeta = tl.zeros([C], tl.float32)
        all_do, all_dr, all_u = (), (), ()
        for part_v in tl.static_range(PARTS_V):
            place_v = (token * HV + hv)[:, None] * V + part_v * C + i
            b_v = tl.load(v + place_v, mask=valid[:, None], other=0.0).to(tl.float32)
            b_do = tl.load(do + place_v, mask=valid[:, None], other=0.0).to(tl.float32) * SCALE
            b_dsolved = tl.load(dsolved + (tile * C + t[:, None]) * V + part_v * C + i)
            b_dr = b_dsolved.to(tl.float32) * b_beta[:, None]
            reads = tl.zeros([C, C], tl.float32)
            for part in tl.static_range(PARTS_K):
                b_k_in = tl.load(k_in + (tile * C + t[:, None]) * K + part * C + i).to(tl.bfloat16)
                s = tl.load(states + (tile * V + part_v * C + t[:, None]) * K + part * C + i).to(tl.bfloat16)
                reads = tl.dot(b_k_in, tl.trans(s), reads)
            if L2NORM_EPS is None:
                v_factor = tl.load(rows + (tile * 3 + 1) * C + t)[:, None]
                b_v *= v_factor
                b_do *= tl.load(rows + (tile * 3 + 2) * C + t)[:, None]
                tl.store(dv + place_v, (b_dr * v_factor).to(dv.dtype.element_ty), mask=valid[:, None])
            else:
                tl.store(dv + place_v, b_dr.to(dv.dtype.element_ty), mask=valid[:, None])
            r = b_v - reads
            b_dbeta += tl.sum(b_dsolved.to(tl.float32) * r, axis=1)
            u = tl.dot(b_solve, (b_beta[:, None] * r).to(tl.bfloat16)).to(tl.bfloat16)
            b_do = b_do.to(tl.bfloat16)
            dA_qk = tl.dot(b_do, tl.trans(u), dA_qk)
            dA_kk = tl.dot(b_dsolved, tl.trans(u), dA_kk)
            all_do, all_dr, all_u = all_do + (b_do,), all_dr + (b_dr.to(tl.bfloat16),), all_u + (u,)
        dA_qk = tl.where(t[:, None] >= i, dA_qk, 0.0)
        dA_kk = tl.where(t[:, None] > i, -dA_kk, 0.0)
        b_dbeta += tl.sum(dA_kk * tl.load(A_kk + place_c).to(tl.float32), axis=1)
        dA_kk *= b_beta[:, None]
        store_dbeta(dbeta, beta, b_dbeta, token * HV + hv, valid, k_rest, BETA_RANGE)

        of_same = tl.sum(tl.where(t[:, None] == i, dA_qk, 0.0), axis=1)[:, None]
        b_dA_log = 0.0
        new_dq, new_dk = (), ()
        for part in tl.static_range(PARTS_K):
            b_q = tl.load(q + place_qk + part * C, mask=valid[:, None], other=0.0).to(tl.float32) * q_factor[:, None]
            b_k = tl.load(k + place_qk + part * C, mask=valid[:, None], other=0.0).to(tl.float32) * k_factor[:, None]
            place_g = (token * HV + hv)[:, None] * K + part * C + i
            high, low = halves(load_log_decay(g, place_g, valid[:, None], row, hv, part * C + i, A_log, dt_bias, GATE, HAS_BIAS,
                                              A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, K))  # fmt: skip
            # Through the states at the chunk's ends.
            d_q = tl.zeros([C, C], tl.float32)
            d_later = tl.zeros([C, C], tl.float32)  # of k as the later token of a pair
            d_earlier = tl.zeros([C, C], tl.float32)
            d_decay = tl.zeros([C], tl.float32)
            for part_v in tl.static_range(PARTS_V):
                place_s = (tile * V + part_v * C + t[:, None]) * K + part * C + i
                s = tl.load(states + place_s).to(tl.bfloat16)
                ds = tl.load(dstates + place_s).to(tl.bfloat16)
                d_q = tl.dot(all_do[part_v], s, d_q)
                d_later = tl.dot(all_dr[part_v], s, d_later)
                d_earlier = tl.dot(all_u[part_v], ds, d_earlier)
                d_decay += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=0)
            e = tl.exp2(sums(high, low, (t[:, None] >= i).to(tl.float16)))
            d_q *= e
            d_later *= -e
            d_earlier *= tl.exp2(sums(high, low, until(t[:, None], i, 6).to(tl.float16)))
            of_last = tl.sum(b_k * d_earlier, axis=0) + d_decay * tl.load(decay + tile * K + part * C + t)
            # Through pairs of tokens within the chunk.
            for level in tl.range(6):
                e = tl.exp2(sums(high, low, until(t[:, None], i, level).to(tl.float16)))
                pairs = crosses(t[:, None], i, level)
                pair_q = tl.where(pairs, dA_qk, 0.0).to(tl.bfloat16)
                pair_k = tl.where(pairs, dA_kk, 0.0).to(tl.bfloat16)
                e_q = (b_q * e).to(tl.bfloat16)
                e_k = (b_k * e).to(tl.bfloat16)
                d_q += tl.dot(pair_q, e_k) * e
                d_later += tl.dot(pair_k, e_k) * e
                d_earlier += tl.dot(tl.trans(pair_k), e_k, tl.dot(tl.trans(pair_q), e_q)) * e
            d_prefix = b_q * d_q + b_k * (d_later - d_earlier)
            high_prefix = d_prefix.to(tl.bfloat16)
            low_prefix = (d_prefix - high_prefix.to(tl.float32)).to(tl.bfloat16)
            b_dg = sums(high_prefix, low_prefix, tl.where(t[:, None] <= i, 1.0, 0.0).to(tl.bfloat16)) + of_last[None, :]
            b_dA_log += store_dg(dg, g, ddt_bias, b_dg, place_g, valid, row, tile, hv, part * C + tl.arange(0, C), A_log,
                                 dt_bias, GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE,
                                 K)  # fmt: skip
            new_dq = new_dq + (sum_dq[part] + d_q + of_same * b_k,)
            new_dk = new_dk + (sum_dk[part] + d_later + d_earlier + of_same * b_q,)
        sum_dq, sum_dk = new_dq, new_dk
        if GATE is not None:
            tl.store(dA_log + tile, b_dA_log)

    store_unnormed(dq, q, sum_dq, q_factor, place_qk, valid, L2NORM_EPS, PARTS_K)
    store_unnormed(dk, k, sum_dk, k_factor, place_qk, valid, L2NORM_EPS, PARTS_K)


@triton.jit
def store_unnormed(dx, x, sums_dx, x_factor, place, valid, L2NORM_EPS: tl.constexpr, PARTS: tl.constexpr):
    """The gradient of a row of q or k from that of the row times its factor."""
    along = tl.zeros([C], tl.float32)
    if L2NORM_EPS is not None:
        for part in tl.static_range(PARTS):
            b_x = tl.load(x + place + part * C, mask=valid[:, None], other=0.0).to(tl.float32)
            along += tl.sum(sums_dx[part] * b_x, axis=1) * x_factor * x_factor
    for part in tl.static_range(PARTS):
        b_x = tl.load(x + place + part * C, mask=valid[:, None], other=0.0).to(tl.float32)
        b_dx = (sums_dx[part] - b_x * along[:, None]) * x_factor[:, None]
        tl.store(dx + place + part * C, b_dx.to(dx.dtype.element_ty), mask=valid[:, None])


@triton.jit
def store_dbeta(dbeta, beta, b_dbeta, place, valid, k_size, BETA_RANGE: tl.constexpr):
    """The gradient of what was given for beta, from that of beta times the square of the key's size."""
    b_dbeta *= k_size * k_size
    if BETA_RANGE is not None:
        b = tl.sigmoid(tl.load(beta + place, mask=valid, other=0.0).to(tl.float32))
        b_dbeta *= BETA_RANGE * b * (1 - b)
    tl.store(dbeta + place, b_dbeta.to(dbeta.dtype.element_ty), mask=valid)


@triton.jit
def store_dg(dg, g, ddt_bias, b_dg, place, valid, row, tile, hv, offsets_k, A_log, dt_bias, GATE: tl.constexpr,
             HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
             LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """The gradients of the gate's input and its bias from that of the log decays; returns that of A_log."""
    b_dA_log = 0.0
    if GATE is not None:
        x = tl.load(g + place, mask=valid[:, None], other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(A_log + row * A_LOG_STRIDE + hv).to(tl.float32))
        if HAS_BIAS:
            x += tl.load(dt_bias + row * DT_BIAS_STRIDE + hv * K + offsets_k).to(tl.float32)[None, :]
        b_dg = tl.where(valid[:, None], b_dg, 0.0)
        if GATE == "softplus":
            b_dg *= -rate
            softplus = tl.where(x > SOFTPLUS_LINEAR_ABOVE, x, tl.log(1 + tl.exp(tl.minimum(x, SOFTPLUS_LINEAR_ABOVE))))
            b_dA_log = tl.sum(b_dg * softplus)
            b_dg *= tl.sigmoid(x)
        else:
            s = tl.sigmoid(rate * x)
            b_dg *= LOWER_BOUND * rate * s * (1 - s)
            b_dA_log = tl.sum(b_dg * x)
        if HAS_BIAS:
            tl.store(ddt_bias + tile * K + offsets_k, tl.sum(b_dg, axis=0))
    tl.store(dg + place, b_dg.to(dg.dtype.element_ty), mask=valid[:, None])
    return b_dA_log


@triton.jit
def zero_behind(token, behind, h, dq, dk, dv, dg, dbeta, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
                V: tl.constexpr):  # fmt: skip
    """Zero gradients for a chunk's worth of the tokens behind a row's last sequence."""
    offsets_k, offsets_v = tl.arange(0, K)[None, :], tl.arange(0, V)[None, :]
    mask = behind[:, None]
    zero = tl.zeros([C, K], tl.float32)
    tl.store(dq + (token * H + h)[:, None] * K + offsets_k, zero.to(dq.dtype.element_ty), mask=mask)
    tl.store(dk + (token * H + h)[:, None] * K + offsets_k, zero.to(dk.dtype.element_ty), mask=mask)
    for of_group in tl.range(HV // H):
        place = token * HV + h * (HV // H) + of_group
        tl.store(dg + place[:, None] * K + offsets_k, zero.to(dg.dtype.element_ty), mask=mask)
        tl.store(dv + place[:, None] * V + offsets_v, tl.zeros([C, V], dv.dtype.element_ty), mask=mask)
        tl.store(dbeta + place, tl.zeros([C], dbeta.dtype.element_ty), mask=behind)
