"""chunk's backward pass, last launch: the gradients of q, k and g, for all chunks at once.

Bound: memory, 0.24 MB a chunk and value head at K = V = 128, with some 20 MFLOP; what it has to be kept from is being bound by
what stands between the products. So tiles are held channels by tokens, [K, H]: then every product over tokens has on its left
what was just computed, in the registers that it is in, and on its right one of a few [H, H] matrices, which come from memory.
H = 32 tokens are half a chunk, for then all of this fits into registers. A program has all channels of a head, and takes the
value heads of a group one after the other, so that the gradients of their q and k are summed in registers: no atomics, one
order of summation.

Decay is differentiated through its logarithm: the gradient of an exponential, times the exponential, belongs to every log
decay in its exponent. These are sums of numbers over tokens, never differences of sums, so that no digits cancel.
"""

import triton
import triton.language as tl

from .chunk_tile import C, chunk_of, load_log_decay

HALF = tl.constexpr(32)


@triton.jit
def gradients(q, k, g, A_log, dt_bias, do, states, dstates, dsolved, u, dA_qk, dA_kk, scales, rows, decay, picks, pairs,
              cu_seqlens, bounds, sequences_end, tokens_end, chunks_end, dq, dk, dg, dA_log, ddt_bias,
              H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr,
              GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
              LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr,
              SCALE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program a chunk and q/k head. dA_log and ddt_bias [B, NC, HV, K] are a chunk's share, to be summed."""
    program = tl.program_id(0)
    item = program // H
    h = program % H
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    channels = tl.arange(0, K)
    GROUP: tl.constexpr = HV // H
    if PACKED:  # tokens behind the row's last sequence, a chunk's worth a program
        behind = tl.load(cu_seqlens + row * (1 - sequences_end) - sequences_end) + (item % -chunks_end) * C + tl.arange(0, C)
        store_zeros(row * -tokens_end + behind, behind < -tokens_end, h, dq, dk, dg, H, HV, K)
    if begin < end:
        t = tl.arange(0, HALF)
        token = row * -tokens_end + begin + t
        early, late = begin + t < end, begin + HALF + t < end
        place = ((token * H + h) * K)[None, :] + channels[:, None]
        first_rows = rows + (item * HV + h * GROUP).to(tl.int64) * 3 * C + t
        q_early, q_early_factor = normed(q, place, early, first_rows + 2 * C, True, L2NORM_EPS)
        k_early, k_early_factor = normed(k, place, early, first_rows + C, False, L2NORM_EPS)
        late_place = place + HALF * H * K
        q_late, q_late_factor = normed(q, late_place, late, first_rows + 2 * C + HALF, True, L2NORM_EPS)
        k_late, k_late_factor = normed(k, late_place, late, first_rows + C + HALF, False, L2NORM_EPS)
        dq_early = tl.zeros([K, HALF], tl.float32)
        dk_early = tl.zeros([K, HALF], tl.float32)
        dq_late = tl.zeros([K, HALF], tl.float32)
        dk_late = tl.zeros([K, HALF], tl.float32)
        square = t[:, None] * HALF + t[None, :]
        pick_until = tl.trans(tl.load(picks + 5 * HALF * HALF + square))
        pick_behind = tl.trans(tl.load(picks + 6 * HALF * HALF + square))
        sum_until = ones(t[:, None] >= t[None, :])
        sum_behind = ones(t[:, None] < t[None, :])
        for of_group in tl.range(GROUP):
            hv = h * GROUP + of_group
            tile = (item * HV + hv).to(tl.int64)
            place_g = ((token * HV + hv) * K)[None, :] + channels[:, None]
            b_g = load_log_decay(g, place_g, early[None, :], row, hv, channels[:, None], A_log, dt_bias, GATE, HAS_BIAS,
                                 A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, K)  # fmt: skip
            decay_early = tl.exp2(tl.sum(b_g, axis=1))[:, None]
            # Times 2^8, which the entries of ``picks`` undo, so that small log decays stay normal numbers.
            g_early = (b_g * 256).to(tl.float16)
            b_g = load_log_decay(g, place_g + HALF * HV * K, late[None, :], row, hv, channels[:, None], A_log, dt_bias, GATE,
                                 HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, K)  # fmt: skip
            decay_late = tl.exp2(tl.sum(b_g, axis=1))[:, None]
            g_late = (b_g * 256).to(tl.float16)

            # Through the states at the chunk's ends.
            read_early = tl.zeros([K, HALF], tl.float32)
            read_late = tl.zeros([K, HALF], tl.float32)
            later_early = tl.zeros([K, HALF], tl.float32)
            later_late = tl.zeros([K, HALF], tl.float32)
            written_early = tl.zeros([K, HALF], tl.float32)
            written_late = tl.zeros([K, HALF], tl.float32)
            through = tl.zeros([K], tl.float32)
            for part in tl.range(V // C):
                place_s = (tile * V + part * C + tl.arange(0, C)[:, None]) * K + channels[None, :]
                of_v = part * C + tl.arange(0, C)[None, :]
                place_u = (tile * C + t[:, None]) * V + of_v
                place_v = (token * HV + hv)[:, None] * V + of_v
                s = tl.load(states + place_s).to(tl.bfloat16)
                b_do = tl.load(do + place_v, mask=early[:, None], other=0.0).to(tl.bfloat16)
                read_early = tl.dot(tl.trans(s), tl.trans(b_do), read_early)
                b_do = tl.load(do + place_v + HALF * HV * V, mask=late[:, None], other=0.0).to(tl.bfloat16)
                read_late = tl.dot(tl.trans(s), tl.trans(b_do), read_late)
                later_early = tl.dot(tl.trans(s), tl.trans(tl.load(dsolved + place_u)), later_early)
                later_late = tl.dot(tl.trans(s), tl.trans(tl.load(dsolved + place_u + HALF * V)), later_late)
                ds = tl.load(dstates + place_s).to(tl.bfloat16)
                written_early = tl.dot(tl.trans(ds), tl.trans(tl.load(u + place_u)), written_early)
                written_late = tl.dot(tl.trans(ds), tl.trans(tl.load(u + place_u + HALF * V)), written_late)
                through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=0)
            own_rows = rows + tile * 3 * C + t
            scale_early = tl.full([HALF], SCALE, tl.float32)
            scale_late = tl.full([HALF], SCALE, tl.float32)
            if L2NORM_EPS is None:
                scale_early *= tl.load(own_rows + 2 * C)
                scale_late *= tl.load(own_rows + 2 * C + HALF)
            until = tl.exp2(tl.dot(g_early, pick_until))
            read_early *= until * scale_early[None, :]
            later_early *= until * -tl.load(own_rows)[None, :]
            until_late = tl.exp2(tl.dot(g_late, pick_until))
            until = until_late * decay_early
            read_late *= until * scale_late[None, :]
            later_late *= until * -tl.load(own_rows + HALF)[None, :]
            behind_early = tl.exp2(tl.dot(g_early, pick_behind))
            written_early *= behind_early * decay_late
            written_late *= tl.exp2(tl.dot(g_late, pick_behind))
            reads = q_late * read_late + k_late * later_late
            whole = tl.sum(reads, axis=1) + through * tl.load(decay + tile * K + channels)
            dg_late = tl.dot(reads.to(tl.bfloat16), sum_until)
            reads = q_early * read_early + k_early * later_early
            dg_early = tl.dot(reads.to(tl.bfloat16), sum_until) + whole[:, None]
            writes = k_early * written_early
            whole = tl.sum(writes, axis=1) + through * tl.load(decay + tile * K + channels)
            dg_early = tl.dot(writes.to(tl.bfloat16), sum_behind, dg_early)
            dg_late = tl.dot((k_late * written_late).to(tl.bfloat16), sum_behind, dg_late) + whole[:, None]

            # Through pairs of tokens within the chunk, in what dA_qk and dA_kk count. First a token of either half.
            down = tl.load(scales + tile)
            up = 1 / down
            place_c = tile * C * C + t[:, None] * C + t[None, :]
            diagonal = dA_qk + tile * C * C + t * (C + 1)
            of_same = tl.load(diagonal).to(tl.float32)[None, :]
            dq_early = (dq_early + read_early) * up + of_same * k_early
            dk_early = (dk_early + later_early + written_early) * up + of_same * q_early
            of_same = tl.load(diagonal + HALF * (C + 1)).to(tl.float32)[None, :]
            dq_late = (dq_late + read_late) * up + of_same * k_late
            dk_late = (dk_late + later_late + written_late) * up + of_same * q_late
            dg_early *= up * 0.00390625
            dg_late *= up * 0.00390625

            pairs_qk = tl.load(dA_qk + place_c + HALF * C)
            pairs_kk = tl.load(dA_kk + place_c + HALF * C)
            half = behind_early.to(tl.float16)
            e_k = k_early * half
            of_q = tl.dot(e_k, tl.trans(pairs_qk))
            of_k = tl.dot(e_k, tl.trans(pairs_kk))
            dq_late += of_q * until_late
            dk_late += of_k * until_late
            late_half = until_late.to(tl.float16)
            e_q, later_k = q_late * late_half, k_late * late_half
            dg_late = tl.dot((e_q * of_q + later_k * of_k).to(tl.float16), tl.trans(pick_until), dg_late)
            of_k = tl.dot(e_q, pairs_qk, tl.dot(later_k, pairs_kk))
            dk_early += of_k * behind_early
            dg_early = tl.dot((e_k * of_k).to(tl.float16), tl.trans(pick_behind), dg_early)

            dq_early, dk_early, dg_early = within_half(dq_early, dk_early, dg_early, q_early, k_early, g_early, dA_qk, dA_kk,
                                                       place_c, picks, pairs, square, STAGES)  # fmt: skip
            dq_late, dk_late, dg_late = within_half(dq_late, dk_late, dg_late, q_late, k_late, g_late, dA_qk, dA_kk,
                                                    place_c + HALF * (C + 1), picks, pairs, square, STAGES)  # fmt: skip
            dq_early *= down
            dk_early *= down
            dq_late *= down
            dk_late *= down
            of_A, of_bias = store_dg(dg, g, dg_early * (down * 256), place_g, early[None, :], row, hv, A_log, dt_bias, GATE,
                                     HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE,
                                     K)  # fmt: skip
            more_of_A, more_of_bias = store_dg(dg, g, dg_late * (down * 256), place_g + HALF * HV * K, late[None, :], row, hv,
                                               A_log, dt_bias, GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND,
                                               SOFTPLUS_LINEAR_ABOVE, K)  # fmt: skip
            if GATE is not None:
                tl.store(dA_log + tile * K + channels, of_A + more_of_A)
            if HAS_BIAS:
                tl.store(ddt_bias + tile * K + channels, of_bias + more_of_bias)
        store_unnormed(dq, dq_early, q_early, q_early_factor, place, early, L2NORM_EPS)
        store_unnormed(dk, dk_early, k_early, k_early_factor, place, early, L2NORM_EPS)
        store_unnormed(dq, dq_late, q_late, q_late_factor, late_place, late, L2NORM_EPS)
        store_unnormed(dk, dk_late, k_late, k_late_factor, late_place, late, L2NORM_EPS)
    elif GATE is not None:  # a chunk left over
        for of_group in tl.range(GROUP):
            place = (item * HV + h * GROUP + of_group).to(tl.int64) * K + channels
            tl.store(dA_log + place, tl.zeros([K], tl.float32))
            if HAS_BIAS:
                tl.store(ddt_bias + place, tl.zeros([K], tl.float32))


@triton.jit
def normed(x, place, valid, factors, DIVIDE: tl.constexpr, L2NORM_EPS: tl.constexpr):
    """Rows of q or k as ``prepare`` divides them, [K, HALF], and what that multiplies them with."""
    b_x = tl.load(x + place, mask=valid[None, :], other=0.0).to(tl.float32)
    if L2NORM_EPS is not None:
        factor = tl.rsqrt(tl.sum(b_x * b_x, axis=0) + L2NORM_EPS)
    else:
        factor = tl.load(factors)
        if DIVIDE:
            factor = 1 / factor
    return (b_x * factor[None, :]).to(tl.float16), factor


@triton.jit
def within_half(sum_dq, sum_dk, b_dg, b_q, b_k, b_g, dA_qk, dA_kk, place_c, picks, pairs, square, STAGES: tl.constexpr):
    """Adds what comes through pairs of tokens of one half of the chunk, level by level as in ``prepare``."""
    for level in tl.range(5, num_stages=STAGES):
        pick = tl.load(picks + level * HALF * HALF + square)
        pair = tl.load(pairs + level * HALF * HALF + square)
        pairs_qk = tl.load(dA_qk + place_c) * pair
        pairs_kk = tl.load(dA_kk + place_c) * pair
        e = tl.exp2(tl.dot(b_g, tl.trans(pick)))
        half = e.to(tl.float16)
        e_q, e_k = b_q * half, b_k * half
        of_q = tl.dot(e_k, tl.trans(pairs_qk))
        of_k = tl.dot(e_q, pairs_qk, tl.dot(e_k, pairs_kk))
        b_dg = tl.dot((e_q * of_q + e_k * of_k).to(tl.float16), pick, b_dg)
        sum_dq += of_q * e
        sum_dk += of_k * e
    return sum_dq, sum_dk, b_dg


@triton.jit
def store_unnormed(dx, sum_dx, b_x, factor, place, valid, L2NORM_EPS: tl.constexpr):
    """The gradient of rows of q or k from that of the rows that ``normed`` made of them."""
    if L2NORM_EPS is not None:
        sum_dx -= b_x * tl.sum(sum_dx * b_x, axis=0)[None, :]
    tl.store(dx + place, (sum_dx * factor[None, :]).to(dx.dtype.element_ty), mask=valid[None, :])


@triton.jit
def ones(picks):
    return tl.where(picks, 1.0, 0.0).to(tl.bfloat16)


@triton.jit
def store_dg(dg, g, b_dg, place, valid, row, hv, A_log, dt_bias, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
             A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
             SOFTPLUS_LINEAR_ABOVE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Stores the gradient of the gate's input, from that of the log decays; returns its parameters', a channel."""
    channels = tl.arange(0, K)
    of_A = tl.zeros([K], tl.float32)
    of_bias = tl.zeros([K], tl.float32)
    if GATE is not None:
        # Read a second time: held since the first it would cost registers.
        x = tl.load(g + place, mask=valid, other=0.0, eviction_policy="evict_first").to(tl.float32)
        rate = tl.exp(tl.load(A_log + row * A_LOG_STRIDE + hv).to(tl.float32))
        if HAS_BIAS:
            x += tl.load(dt_bias + row * DT_BIAS_STRIDE + hv * K + channels).to(tl.float32)[:, None]
        b_dg = tl.where(valid, b_dg, 0.0)
        if GATE == "softplus":
            b_dg *= -rate
            softplus = tl.where(x > SOFTPLUS_LINEAR_ABOVE, x, tl.log(1 + tl.exp(tl.minimum(x, SOFTPLUS_LINEAR_ABOVE))))
            of_A = tl.sum(b_dg * softplus, axis=1)
            b_dg *= tl.sigmoid(x)
        else:
            s = tl.sigmoid(rate * x)
            b_dg *= LOWER_BOUND * rate * s * (1 - s)
            of_A = tl.sum(b_dg * x, axis=1)
        if HAS_BIAS:
            of_bias = tl.sum(b_dg, axis=1)
    tl.store(dg + place, b_dg.to(dg.dtype.element_ty), mask=valid)
    return of_A, of_bias


@triton.jit
def store_zeros(token, behind, h, dq, dk, dg, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr):
    channels = tl.arange(0, K)[:, None]
    GROUP: tl.constexpr = HV // H
    place = ((token * H + h) * K)[None, :] + channels
    tl.store(dq + place, tl.zeros([K, C], dq.dtype.element_ty), mask=behind[None, :])
    tl.store(dk + place, tl.zeros([K, C], dk.dtype.element_ty), mask=behind[None, :])
    for of_group in tl.range(GROUP):
        place = ((token * HV + h * GROUP + of_group) * K)[None, :] + channels
        tl.store(dg + place, tl.zeros([K, C], dg.dtype.element_ty), mask=behind[None, :])
