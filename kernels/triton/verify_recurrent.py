"""verify for few tokens: the recurrence itself, on a state that stays in registers and is never written.

Bound: memory, the state read once; each token costs a row of the state two reductions over K, which for few tokens hide
behind it. One launch, where the token-parallel form needs two. The step is decode's, the state rounded to the pool's
dtype after every token.
"""

import triton
import triton.language as tl

from .token import load_token, place, slot_of, step


@triton.jit
def verify(q, k, v, g, beta, A_log, dt_bias, state, slots, pool_end, u, k_out, g_out, o,
           T: tl.constexpr, WITH_UPDATE: tl.constexpr,
           H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
           HAS_SLOTS: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
           A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
           SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr, BETA_RANGE: tl.constexpr,
           SCALE: tl.constexpr):  # fmt: skip
    """``u``, ``k_out`` and ``g_out`` are the Update's arrays, unused without it."""
    n, hv, offsets_v = place(HV, V, BV)
    slot, live = slot_of(slots, n, pool_end, HAS_SLOTS)
    offsets_k = tl.arange(0, K)
    tile = ((slot * HV + hv) * V + offsets_v)[:, None] * K + offsets_k[None, :]
    s = tl.load(state + tile, mask=live, other=0.0)
    # All tokens are requested before any is stored: a load may not move ahead of a store.
    queries, keys, values, decays, betas = (), (), (), (), ()
    for t in tl.static_range(T):
        token = n * T + t
        values = values + (tl.load(v + (token * HV + hv) * V + offsets_v).to(tl.float32),)
        b_q, b_k, b_g, b_beta = load_token(
            q, k, g, beta, A_log, dt_bias, token, n, hv, H, HV, K, GATE, HAS_BIAS, A_LOG_STRIDE,
            DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE, SCALE)  # fmt: skip
        queries, keys, decays, betas = queries + (b_q,), keys + (b_k,), decays + (b_g,), betas + (b_beta,)
    # k and g belong to all tiles of a head, k to all value heads of a group: one of them writes.
    writes_g = tl.program_id(0) % (V // BV) == 0
    writes_k = writes_g & (hv % (HV // H) == 0)
    for t in tl.static_range(T):
        new, b_u, b_o = step(s.to(tl.float32), queries[t], keys[t], values[t], decays[t], betas[t])
        s = new.to(state.dtype.element_ty)
        token = n * T + t
        rows = (token * HV + hv) * V + offsets_v
        tl.store(o + rows, tl.where(live, b_o, 0).to(o.dtype.element_ty))
        if WITH_UPDATE:
            tl.store(u + rows, tl.where(live, b_u, 0))
            tl.store(g_out + (token * HV + hv) * K + offsets_k, tl.where(live, decays[t], 0), mask=writes_g)
            tl.store(k_out + (token * H + hv // (HV // H)) * K + offsets_k, tl.where(live, keys[t], 0), mask=writes_k)
