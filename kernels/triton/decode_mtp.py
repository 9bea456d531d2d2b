"""decode_mtp: T tokens on one row's state, keeping the state after each.

Bound: memory, the T states written. The state stays in registers from token to token, and the next token's operands are
requested before this one's work. Between tokens the state is rounded to the pool's dtype, as between calls of decode,
whose step this inlines: the bits are the same.
"""

import triton
import triton.language as tl

from .token import load_token, place, slot_of, step


@triton.jit
def decode_mtp(q, k, v, g, beta, A_log, dt_bias, state, slots, pool_end, o, states,
               T: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
               HAS_SLOTS: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
               A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
               SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr, BETA_RANGE: tl.constexpr,
               SCALE: tl.constexpr):  # fmt: skip
    """The states go to an array of their own, ``states`` [N, T, HV, V, K]; those of a padded row are zero."""
    n, hv, offsets_v = place(HV, V, BV)
    slot, live = slot_of(slots, n, pool_end, HAS_SLOTS)
    offsets_k = tl.arange(0, K)
    tile = ((slot * HV + hv) * V + offsets_v)[:, None] * K + offsets_k[None, :]
    s = tl.load(state + tile, mask=live, other=0.0)
    b_q, b_k, b_g, b_beta = load_token(
        q, k, g, beta, A_log, dt_bias, n * T, n, hv, H, HV, K, GATE, HAS_BIAS, A_LOG_STRIDE,
        DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE, SCALE)  # fmt: skip
    for t in range(T):
        token = n * T + t
        rows = (token * HV + hv) * V + offsets_v
        b_v = tl.load(v + rows).to(tl.float32)
        next_q, next_k, next_g, next_beta = load_token(
            q, k, g, beta, A_log, dt_bias, n * T + tl.minimum(t + 1, T - 1), n, hv, H, HV, K, GATE,
            HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE,
            SCALE)  # fmt: skip
        new, _, b_o = step(s.to(tl.float32), b_q, b_k, b_v, b_g, b_beta)
        s = new.to(state.dtype.element_ty)
        tl.store(states + rows[:, None] * K + offsets_k[None, :], tl.where(live, s, 0))
        tl.store(o + rows, tl.where(live, b_o, 0).to(o.dtype.element_ty))
        b_q, b_k, b_g, b_beta = next_q, next_k, next_g, next_beta


@triton.jit
def decode_mtp_paged(q, k, v, g, beta, A_log, dt_bias, state, slots, accepted, pool_end, o, new_state,
                     T: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
                     BV: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
                     A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
                     SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr, BETA_RANGE: tl.constexpr,
                     SCALE: tl.constexpr):  # fmt: skip
    """Starts from slot ``slots[n, accepted[n] - 1]`` and leaves the state after token t in slot ``slots[n, t]``.

    The row's own slots are read before they are written, and by this program alone.
    """
    n, hv, offsets_v = place(HV, V, BV)
    last = tl.load(accepted + n).to(tl.int64) - 1
    live = (last >= 0) & (last < T)
    slot = tl.load(slots + n * T + last, mask=live, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot + pool_end < 0)
    tile = (hv * V + offsets_v)[:, None] * K + tl.arange(0, K)[None, :]
    s = tl.load(state + slot * HV * V * K + tile, mask=live, other=0.0)
    b_q, b_k, b_g, b_beta = load_token(
        q, k, g, beta, A_log, dt_bias, n * T, n, hv, H, HV, K, GATE, HAS_BIAS, A_LOG_STRIDE,
        DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE, SCALE)  # fmt: skip
    for t in range(T):
        token = n * T + t
        write = tl.load(slots + token).to(tl.int64)
        rows = (token * HV + hv) * V + offsets_v
        b_v = tl.load(v + rows).to(tl.float32)
        next_q, next_k, next_g, next_beta = load_token(
            q, k, g, beta, A_log, dt_bias, n * T + tl.minimum(t + 1, T - 1), n, hv, H, HV, K, GATE,
            HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE,
            SCALE)  # fmt: skip
        new, _, b_o = step(s.to(tl.float32), b_q, b_k, b_v, b_g, b_beta)
        s = new.to(state.dtype.element_ty)
        stored = live & (write >= 0) & (write + pool_end < 0)
        tl.store(new_state + write * HV * V * K + tile, s, mask=stored)
        tl.store(o + rows, tl.where(live, b_o, 0).to(o.dtype.element_ty))
        b_q, b_k, b_g, b_beta = next_q, next_k, next_g, next_beta
