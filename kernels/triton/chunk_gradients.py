"""chunk's backward pass, last launch: the gradients of q, k and g, for all chunks at once.

Bound: instructions and the products among them, about 40 MFLOP a chunk and value head on tensor cores; it reads 0.2 MB a chunk
and value head at K = V = 128, most of it the two states. A program takes the value heads of a group one after the other, so
that the gradients of their q and k are summed in registers: no atomics, one order of summation.

Decay is differentiated through its logarithm: the gradient of an exponential, times the exponential, belongs to every log
decay in its exponent. These are sums of numbers over tokens, never differences of sums, so that no digits cancel.
"""

import triton
import triton.language as tl

from .chunk_prepare import factor
from .chunk_tile import C, chunk_of, crosses, halves, load_log_decay, sums, until


@triton.jit
def gradients(q, k, g, A_log, dt_bias, do, states, dstates, dsolved, u, dA_qk, dA_kk, rows, decay, cu_seqlens, bounds,
              sequences_end, tokens_end, chunks_end, dq, dk, dg, dA_log, ddt_bias, unnormed,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr,
              GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
              LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr,
              SCALE: tl.constexpr):  # fmt: skip
    """One program a chunk and q/k head.

    dA_log [B, NC, HV, K] and ddt_bias [B, NC, HV, K] are a chunk's share, to be summed. ``unnormed`` holds the gradients of the
    normed q and k until all of their row is there.
    """
    program = tl.program_id(0)
    item = program // H
    h = program % H
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    t = tl.arange(0, C)
    i = tl.arange(0, C)[None, :]
    GROUP: tl.constexpr = HV // H
    if PACKED:  # tokens behind the row's last sequence, a chunk's worth a program
        behind = tl.load(cu_seqlens + row * (1 - sequences_end) - sequences_end) + (item % -chunks_end) * C + t
        store_zeros(row * -tokens_end + behind, behind < -tokens_end, h, dq, dk, dg, H, HV, K)
    if begin < end:
        token = row * -tokens_end + begin + t
        valid = (begin + t < end)[:, None]
        head_qk = (token * H + h)[:, None] * K
        place_qk = head_qk + i
        q_factor, _ = factor(q, head_qk, begin + t < end, K, C, L2NORM_EPS)
        k_factor, _ = factor(k, head_qk, begin + t < end, K, C, L2NORM_EPS)
        along_q = tl.zeros([C], tl.float32)
        along_k = tl.zeros([C], tl.float32)
        scratch = (program.to(tl.int64) * 2 * C + t[:, None]) * K + i
        for part in tl.range(K // C):
            b_q = (tl.load(q + place_qk + part * C, mask=valid, other=0.0).to(tl.float32) * q_factor[:, None]).to(tl.float16)
            b_k = (tl.load(k + place_qk + part * C, mask=valid, other=0.0).to(tl.float32) * k_factor[:, None]).to(tl.float16)
            sum_dq = tl.zeros([C, C], tl.float32)
            sum_dk = tl.zeros([C, C], tl.float32)
            for of_group in tl.range(GROUP):
                hv = h * GROUP + of_group
                tile = (item * HV + hv).to(tl.int64)
                place_g = (token * HV + hv)[:, None] * K + part * C + i
                high, low = halves(load_log_decay(g, place_g, valid, row, hv, part * C + i, A_log, dt_bias, GATE, HAS_BIAS,
                                                  A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE,
                                                  K))  # fmt: skip
                # Through the states at the chunk's ends.
                d_q = tl.zeros([C, C], tl.float32)
                d_later = tl.zeros([C, C], tl.float32)  # of k as the later token of a pair
                d_earlier = tl.zeros([C, C], tl.float32)
                through = tl.zeros([C], tl.float32)
                b_beta = tl.load(rows + tile * 3 * C + t)[:, None]
                for part_v in tl.range(V // C):
                    place_v = (token * HV + hv)[:, None] * V + part_v * C + i
                    place_u = (tile * C + t[:, None]) * V + part_v * C + i
                    place_s = (tile * V + part_v * C + t[:, None]) * K + part * C + i
                    b_do = tl.load(do + place_v, mask=valid, other=0.0).to(tl.float32) * SCALE
                    if L2NORM_EPS is None:
                        b_do *= tl.load(rows + (tile * 3 + 2) * C + t)[:, None]
                    s = tl.load(states + place_s).to(tl.bfloat16)
                    d_q = tl.dot(b_do.to(tl.bfloat16), s, d_q)
                    d_later = tl.dot((tl.load(dsolved + place_u).to(tl.float32) * -b_beta).to(tl.bfloat16), s, d_later)
                    ds = tl.load(dstates + place_s).to(tl.bfloat16)
                    d_earlier = tl.dot(tl.load(u + place_u), ds, d_earlier)
                    through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=0)
                through *= tl.load(decay + tile * K + part * C + t)
                e = tl.exp2(sums(high, low, (t[:, None] >= i).to(tl.float16)))
                d_q *= e
                d_later *= e
                e = tl.exp2(sums(high, low, until(t[:, None], i, 6).to(tl.float16)))
                d_earlier *= e
                reads = (b_q * d_q + b_k * d_later).to(tl.bfloat16)
                writes = (b_k * d_earlier).to(tl.bfloat16)
                b_dg = tl.dot(ones(t[:, None] <= i), reads, tl.dot(ones(t[:, None] > i), writes)) + through[None, :]

                # Through pairs of tokens within the chunk, level by level as in ``prepare``.
                place_c = tile * C * C + t[:, None] * C + i
                b_dA_qk = tl.load(dA_qk + place_c)
                b_dA_kk = tl.load(dA_kk + place_c)
                for level in tl.range(6):
                    e = tl.exp2(sums(high, low, until(t[:, None], i, level).to(tl.float16)))
                    e_q = (b_q * e).to(tl.bfloat16)
                    e_k = (b_k * e).to(tl.bfloat16)
                    pairs = crosses(t[:, None], i, level)
                    pairs_qk = tl.where(pairs, b_dA_qk, 0.0)
                    pairs_kk = tl.where(pairs, b_dA_kk, 0.0)
                    of_q = tl.dot(pairs_qk, e_k) * e
                    of_later = tl.dot(pairs_kk, e_k) * e
                    of_earlier = tl.dot(tl.trans(pairs_kk), e_k, tl.dot(tl.trans(pairs_qk), e_q)) * e
                    # A token is on one side only of a level's pairs.
                    of_decay = (b_q * of_q + b_k * (of_later + of_earlier)).to(tl.bfloat16)
                    b_dg = tl.dot(ones(until(i, t[:, None], level)), of_decay, b_dg)
                    d_q += of_q
                    d_later += of_later + of_earlier
                of_same = tl.sum(tl.where(t[:, None] == i, b_dA_qk.to(tl.float32), 0.0), axis=1)[:, None]
                sum_dq += d_q + of_same * b_k
                sum_dk += d_later + d_earlier + of_same * b_q
                store_dg(dg, g, dA_log, ddt_bias, b_dg, place_g, valid, row, hv, part * C + tl.arange(0, C), tile * K, A_log,
                         dt_bias, GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE,
                         K)  # fmt: skip
            if L2NORM_EPS is None:
                tl.store(dq + place_qk + part * C, (sum_dq * q_factor[:, None]).to(dq.dtype.element_ty), mask=valid)
                tl.store(dk + place_qk + part * C, (sum_dk * k_factor[:, None]).to(dk.dtype.element_ty), mask=valid)
            else:
                along_q += tl.sum(sum_dq * b_q, axis=1)
                along_k += tl.sum(sum_dk * b_k, axis=1)
                tl.store(unnormed + scratch + part * C, sum_dq)
                tl.store(unnormed + scratch + C * K + part * C, sum_dk)
        if L2NORM_EPS is not None:
            tl.debug_barrier()
            for part in tl.range(K // C):
                store_unnormed(dq, q, unnormed + scratch, place_qk, part * C, valid, q_factor[:, None], along_q[:, None])
                store_unnormed(dk, k, unnormed + scratch + C * K, place_qk, part * C, valid, k_factor[:, None],
                               along_k[:, None])  # fmt: skip
    elif GATE is not None:  # a chunk left over
        for of_group in tl.range(GROUP):
            place = (item * HV + h * GROUP + of_group).to(tl.int64) * K + tl.arange(0, K)
            tl.store(dA_log + place, tl.zeros([K], tl.float32))
            if HAS_BIAS:
                tl.store(ddt_bias + place, tl.zeros([K], tl.float32))


@triton.jit
def ones(picks):
    return tl.where(picks, 1.0, 0.0).to(tl.bfloat16)


@triton.jit
def store_unnormed(dx, x, unnormed, place, shift, valid, x_factor, along):
    """The gradient of a row of q or k from that of the row divided by its norm."""
    b_x = tl.load(x + place + shift, mask=valid, other=0.0).to(tl.float32) * x_factor
    b_dx = (tl.load(unnormed + shift) - b_x * along) * x_factor
    tl.store(dx + place + shift, b_dx.to(dx.dtype.element_ty), mask=valid)


@triton.jit
def store_dg(dg, g, dA_log, ddt_bias, b_dg, place, valid, row, hv, offsets_k, share, A_log, dt_bias, GATE: tl.constexpr,
             HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
             LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """The gradients of the gate's input and of its parameters from that of the log decays."""
    if GATE is not None:
        x = tl.load(g + place, mask=valid, other=0.0).to(tl.float32)
        rate = tl.exp(tl.load(A_log + row * A_LOG_STRIDE + hv).to(tl.float32))
        if HAS_BIAS:
            x += tl.load(dt_bias + row * DT_BIAS_STRIDE + hv * K + offsets_k).to(tl.float32)[None, :]
        b_dg = tl.where(valid, b_dg, 0.0)
        if GATE == "softplus":
            b_dg *= -rate
            softplus = tl.where(x > SOFTPLUS_LINEAR_ABOVE, x, tl.log(1 + tl.exp(tl.minimum(x, SOFTPLUS_LINEAR_ABOVE))))
            tl.store(dA_log + share + offsets_k, tl.sum(b_dg * softplus, axis=0))
            b_dg *= tl.sigmoid(x)
        else:
            s = tl.sigmoid(rate * x)
            b_dg *= LOWER_BOUND * rate * s * (1 - s)
            tl.store(dA_log + share + offsets_k, tl.sum(b_dg * x, axis=0))
        if HAS_BIAS:
            tl.store(ddt_bias + share + offsets_k, tl.sum(b_dg, axis=0))
    tl.store(dg + place, b_dg.to(dg.dtype.element_ty), mask=valid)


@triton.jit
def store_zeros(token, behind, h, dq, dk, dg, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    offsets_k = tl.arange(0, K)[None, :]
    zero = tl.zeros([C, K], tl.float32)
    tl.store(dq + (token * H + h)[:, None] * K + offsets_k, zero.to(dq.dtype.element_ty), mask=behind[:, None])
    tl.store(dk + (token * H + h)[:, None] * K + offsets_k, zero.to(dk.dtype.element_ty), mask=behind[:, None])
    for of_group in tl.range(HV // H):
        place = (token * HV + h * (HV // H) + of_group)[:, None] * K + offsets_k
        tl.store(dg + place, zero.to(dg.dtype.element_ty), mask=behind[:, None])
