"""chunk's backward pass, last launch: the gradients of q, k and g, for all chunks at once.

Bound: memory, 0.2 MB a chunk and value head at K = 128, with some 20 MFLOP; what it has to be kept from is being bound by
what stands between the products: their latency, barriers, and registers kept in memory. So tiles are held channels by
tokens, [K, T]: then every product over tokens has on its left what was just computed, in the registers that it is in, and
on its right one of a few [T, T] matrices, which come from memory. T = 32 tokens are half a chunk: nearly all of a half
fits into half of the registers, so that two programs share a multiprocessor and one computes while the other waits. They
are of four warps rather than eight: fewer have to wait for each other. A program has all channels of a head, and takes
the value heads of a group one after the other, so that the gradients of their q and k are summed in registers: no atomics,
one order.

Decay is differentiated through its logarithm: the gradient of an exponential, times the exponential, belongs to every log
decay in its exponent. These are sums of numbers over tokens, never differences of sums, so that no digits cancel.
"""

import triton
import triton.language as tl

from .chunk_tile import C, chunk_of, gate_rate, load_log2_decay

T = tl.constexpr(32)


@triton.jit
def gradients(q, k, g, A_log, dt_bias, dq_in, dk_in, dk_out, halves, dA_qk, dA_kk, scales, rows, picks, pairs,
              cu_seqlens, bounds, sequences_end, tokens_end, chunks_end, dq, dk, dg,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, PACKED: tl.constexpr,
              GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
              LOWER_BOUND: tl.constexpr, L2NORM_EPS: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program a half chunk and q/k head."""
    program = tl.program_id(0)
    late = program % 2
    item = program // (2 * H)
    h = program // 2 % H
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    t = tl.arange(0, T)
    channels = tl.arange(0, K)
    GROUP: tl.constexpr = HV // H
    if PACKED:  # tokens behind the row's last sequence, half a chunk's worth a program
        rest = tl.load(cu_seqlens + row * (1 - sequences_end) - sequences_end) + (item % -chunks_end) * C + late * T + t
        store_zeros(row * -tokens_end + rest, rest < -tokens_end, h, dq, dk, dg, H, HV, K)
    begin += late * T
    if begin < end:
        token = row * -tokens_end + begin
        valid = begin + t < end
        other = T - 2 * T * late  # from a token of this half to that of the other half
        other_valid = begin + other + t < end
        first = (token * H + h) * K
        place = t[None, :] * (H * K) + channels[:, None]
        factors = rows + (item * HV + h * GROUP).to(tl.int64) * 3 * C + late * T
        b_q = divided(q + first, place, valid, factors + 2 * C + t)
        b_k = divided(k + first, place, valid, factors + C + t)
        sum_dq = tl.zeros([K, T], tl.float32)
        sum_dk = tl.zeros([K, T], tl.float32)
        square = t[:, None] * T + t[None, :]
        for of_group in tl.range(GROUP):
            hv = h * GROUP + of_group
            tile = (item * HV + hv).to(tl.int64)
            first_g = (token * HV + hv) * K
            place_g = t[None, :] * (HV * K) + channels[:, None]
            rate = 0.0
            if GATE is not None:
                rate = gate_rate(A_log + row * A_LOG_STRIDE + hv)
            bias = dt_bias + row * DT_BIAS_STRIDE + hv * K + channels[:, None]
            b_g = load_log2_decay(g + first_g + place_g, valid[None, :], rate, bias, GATE, HAS_BIAS, LOWER_BOUND)
            other_g = load_log2_decay(g + first_g + other * HV * K + place_g, other_valid[None, :], rate, bias, GATE,
                                      HAS_BIAS, LOWER_BOUND)  # fmt: skip
            other_decay = tl.exp2(tl.sum(other_g.to(tl.float32), axis=1) * 0.00390625)

            # Through pairs of tokens of this half, in what dA_qk and dA_kk count: of each with itself, then level by level
            # as in ``prepare``.
            down = tl.load(scales + tile)
            own_qk = dA_qk + tile * C * C + late * T * (C + 1)
            own_kk = dA_kk + tile * C * C + late * T * (C + 1)
            place_c = t[:, None] * C + t[None, :]
            of_same = tl.load(own_qk + t * (C + 1))[None, :]
            sum_dq = sum_dq * (1 / down) + (of_same * b_k).to(tl.float32)
            sum_dk = sum_dk * (1 / down) + (of_same * b_q).to(tl.float32)
            b_dg = tl.zeros([K, T], tl.float32)
            for level in tl.range(5, num_stages=STAGES):
                pick = tl.load(picks + level * T * T + square)
                pair = tl.load(pairs + level * T * T + square)
                pairs_qk = tl.load(own_qk + place_c) * pair
                pairs_kk = tl.load(own_kk + place_c) * pair
                e = tl.exp2(tl.dot(b_g, tl.trans(pick))).to(tl.float16)
                e_q, e_k = b_q * e, b_k * e
                of_q = tl.dot(e_k, tl.trans(pairs_qk))
                of_g = e_q * of_q.to(tl.float16)
                sum_dq += of_q * e
                of_k = tl.dot(e_q, pairs_qk, tl.dot(e_k, pairs_kk))
                of_g += e_k * of_k.to(tl.float16)
                sum_dk += of_k * e
                b_dg = tl.dot(of_g, pick, b_dg)

            # Through pairs of a token of either half.
            first_other = first + other * H * K
            pairs_kk = tl.load(own_kk + other * C + place_c)
            other_k = divided(k + first_other, place, other_valid, factors + C + other + t)
            if late == 1:
                pick = tl.load(picks + 6 * T * T + square)
                before_k = other_k * tl.exp2(tl.dot(other_g, tl.trans(pick))).to(tl.float16)
                pick = tl.load(picks + 5 * T * T + square)
                until = tl.exp2(tl.dot(b_g, tl.trans(pick)))
                of_q = tl.dot(before_k, tl.load(own_qk + other + t[:, None] + t[None, :] * C)) * until
                sum_dq += of_q
                of_k = tl.dot(before_k, pairs_kk) * until
                sum_dk += of_k
                b_dg = tl.dot(b_q * of_q.to(tl.float16) + b_k * of_k.to(tl.float16), pick, b_dg)
            else:
                pick = tl.load(picks + 5 * T * T + square)
                other_e = tl.exp2(tl.dot(other_g, tl.trans(pick))).to(tl.float16)
                other_q = divided(q + first_other, place, other_valid, factors + 2 * C + other + t)
                pairs_qk = tl.load(own_qk + other * C + place_c)
                of_k = tl.dot(other_q * other_e, pairs_qk, tl.dot(other_k * other_e, pairs_kk))
                pick = tl.load(picks + 6 * T * T + square)
                of_k *= tl.exp2(tl.dot(b_g, tl.trans(pick)))
                sum_dk += of_k
                b_dg = tl.dot(b_k * of_k.to(tl.float16), pick, b_dg)

            # Through the states at the chunk's ends.
            b_dg *= down * 256
            first_in = (tile * C + late * T) * K
            place_in = t[None, :] * K + channels[:, None]
            pick = tl.load(picks + 5 * T * T + square)
            e = tl.exp2(tl.dot(b_g, tl.trans(pick))) * tl.where(late == 1, other_decay, 1.0)[:, None]
            of_q = tl.load(dq_in + first_in + place_in).to(tl.float32) * e
            sum_dq = sum_dq * down + of_q
            of_k = tl.load(dk_in + first_in + place_in).to(tl.float32) * e
            sum_dk = sum_dk * down + of_k
            b_dg = tl.dot((b_q * of_q + b_k * of_k).to(tl.bfloat16), ones(t[:, None] >= t[None, :]), b_dg)
            pick = tl.load(picks + 6 * T * T + square)
            e = tl.exp2(tl.dot(b_g, tl.trans(pick))) * tl.where(late == 1, 1.0, other_decay)[:, None]
            of_k = tl.load(dk_out + first_in + place_in).to(tl.float32) * e
            sum_dk += of_k
            b_dg = tl.dot((b_k * of_k).to(tl.bfloat16), ones(t[:, None] < t[None, :]), b_dg)
            b_dg += tl.load(halves + (tile * 2 + late) * K + channels)[:, None]
            b_dg = gate_gradient(b_dg, g + first_g + place_g, bias, valid[None, :], rate, GATE, HAS_BIAS, LOWER_BOUND)
            tl.store(dg + first_g + place_g, b_dg.to(dg.dtype.element_ty), mask=valid[None, :])
        store_undivided(dq + first, sum_dq, b_q, factors + 2 * C + t, place, valid, L2NORM_EPS)
        store_undivided(dk + first, sum_dk, b_k, factors + C + t, place, valid, L2NORM_EPS)


@triton.jit
def divided(x, place, valid, factors):
    """Rows of q or k as ``prepare`` divides them, [K, T]."""
    b_x = tl.load(x + place, mask=valid[None, :], other=0.0).to(tl.float32)
    return (b_x * tl.load(factors)[None, :]).to(tl.float16)


@triton.jit
def store_undivided(dx, sum_dx, b_x, factors, place, valid, L2NORM_EPS: tl.constexpr):
    """The gradient of rows of q or k from that of the rows that ``divided`` made of them."""
    if L2NORM_EPS is not None:
        sum_dx -= b_x * tl.sum(sum_dx * b_x, axis=0)[None, :]
    tl.store(dx + place, (sum_dx * tl.load(factors)[None, :]).to(dx.dtype.element_ty), mask=valid[None, :])


@triton.jit
def ones(picks):
    return tl.where(picks, 1.0, 0.0).to(tl.bfloat16)


@triton.jit
def gate_gradient(b_dg, g, bias, valid, rate, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, LOWER_BOUND: tl.constexpr):
    """The gradient of the gate's input from that of the log decay, in the natural base."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    if GATE is not None:
        # Read a second time: held since the first it would cost registers.
        x = tl.load(g, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias).to(tl.float32)
        if GATE == "softplus":
            root = tl.rsqrt(1 + tl.exp2(x * -LOG2_E))
            b_dg *= root * root * -rate
        else:  # of a sigmoid s = 1 / (1 + z), which is z s^2
            exponent = x * (rate * -LOG2_E)
            z = tl.exp2(tl.minimum(exponent, 60.0))
            root = tl.rsqrt(1 + z)
            root *= root
            b_dg *= tl.where(exponent < 60, z * root * root * (rate * LOWER_BOUND), 0.0)  # zero: x may be any size
    return b_dg


@triton.jit
def store_zeros(token, behind, h, dq, dk, dg, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    channels = tl.arange(0, K)[:, None]
    GROUP: tl.constexpr = HV // H
    place = ((token * H + h) * K)[None, :] + channels
    tl.store(dq + place, tl.zeros([K, T], dq.dtype.element_ty), mask=behind[None, :])
    tl.store(dk + place, tl.zeros([K, T], dk.dtype.element_ty), mask=behind[None, :])
    for of_group in tl.range(GROUP):
        place = ((token * HV + h * GROUP + of_group) * K)[None, :] + channels
        tl.store(dg + place, tl.zeros([K, T], dg.dtype.element_ty), mask=behind[None, :])
