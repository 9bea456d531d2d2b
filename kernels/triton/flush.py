"""flush: the state of every row advanced over its accepted tokens, in place.

Bound: memory, as decode. The update's T vectors of u, k and g are requested together with the state tile, those of
rejected tokens masked, so that one round trip to memory serves every number of accepted tokens. The decays are taken on
vectors of K, which leaves T + 1 operations an element of the state. Rows that accepted nothing, and padded ones, end at
once.
"""

import triton
import triton.language as tl

from .token import outer, place


@triton.jit
def flush(u, k, g, state, slots, accepted, pool_end, new_state,
          T: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
          HAS_SLOTS: tl.constexpr):  # fmt: skip
    n, hv, offsets_v = place(HV, V, BV)
    taken = tl.load(accepted + n)
    slot = n
    live = taken > 0
    if HAS_SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
        live = live & (slot >= 0) & (slot + pool_end < 0)
    if live:
        offsets_k = tl.arange(0, K)
        tile = ((slot * HV + hv) * V + offsets_v)[:, None] * K + offsets_k[None, :]
        s = tl.load(state + tile)
        after = tl.zeros([K], tl.float32)  # the log decay from token t to the last accepted one
        keys, updates = (), ()
        for t in tl.static_range(T - 1, -1, -1):
            token = n * T + t
            b_u = tl.load(u + (token * HV + hv) * V + offsets_v, mask=t < taken, other=0.0)
            b_k = tl.load(k + (token * H + hv // (HV // H)) * K + offsets_k, mask=t < taken, other=0.0)
            b_g = tl.load(g + (token * HV + hv) * K + offsets_k, mask=t < taken, other=0.0)
            keys = keys + (b_k * tl.exp(after),)
            updates = updates + (b_u,)
            after += b_g
        new = s.to(tl.float32) * tl.exp(after)[None, :]
        for i in tl.static_range(T):
            new = outer(new, updates[i], keys[i])
        tl.store(new_state + tile, new.to(new_state.dtype.element_ty))
