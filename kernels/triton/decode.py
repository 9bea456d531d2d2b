"""decode: one token on one row's state, in place.

Bound: memory. A (row, value head) moves its state twice, 2 * V * K * 4 bytes with a float32 pool, against some
8 operations an element. So a program's whole tile is requested at once and held in registers (BV rows of K, 16 bytes
a thread and load), there are many programs a multiprocessor, and the token's operands, 100 times smaller, are
read again by each tile of a head.
"""

import triton
import triton.language as tl

from .token import load_token, place, slot_of, step


@triton.jit
def decode(q, k, v, g, beta, A_log, dt_bias, state, slots, pool_end, o, new_state,
           H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
           HAS_SLOTS: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
           A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
           SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr, BETA_RANGE: tl.constexpr,
           SCALE: tl.constexpr):  # fmt: skip
    """``new_state`` is ``state``: the pool is updated in place. ``pool_end`` is -P (see launch.py)."""
    n, hv, offsets_v = place(HV, V, BV)
    slot, live = slot_of(slots, n, pool_end, HAS_SLOTS)
    offsets_o = (n * HV + hv) * V + offsets_v
    if live:
        rows = (slot * HV + hv) * V + offsets_v
        tile = rows[:, None] * K + tl.arange(0, K)[None, :]
        s = tl.load(state + tile)
        b_v = tl.load(v + offsets_o).to(tl.float32)
        b_q, b_k, b_g, b_beta = load_token(
            q, k, g, beta, A_log, dt_bias, n, n, hv, H, HV, K, GATE, HAS_BIAS, A_LOG_STRIDE,
            DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE, SCALE)  # fmt: skip
        s, _, b_o = step(s.to(tl.float32), b_q, b_k, b_v, b_g, b_beta)
        tl.store(new_state + tile, s.to(new_state.dtype.element_ty))
        tl.store(o + offsets_o, b_o.to(o.dtype.element_ty))
    else:
        tl.store(o + offsets_o, tl.zeros([BV], o.dtype.element_ty))
