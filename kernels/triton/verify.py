"""verify: T draft tokens as one chunk against one row's state, which is read and never written.

Bound: memory, the state read once, if the arithmetic stays small. Token by token, each row of the state would cost two
reductions over K a token; here all reads of the state, by k_t exp(G_t) and by q_t exp(G_t), are one product
[BV, K] x [K, 2 T] on tensor cores. What is the same for all rows of a head's state is done once, by a first launch
(``prepare``): activations, decays, and the T^2 dots of keys and queries with earlier keys. Decays are ordered products, step
by step: no exponent is positive, nothing overflows. The second launch is left with the product and a triangular solve on T
vectors of BV.
"""

import triton
import triton.language as tl

from .token import load_token, place, slot_of


@triton.jit
def halves(x):
    """x as a sum of two bfloat16 numbers, to 2^-17 of it."""
    high = x.to(tl.bfloat16)
    return high, (x - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def prepare(q, k, g, beta, A_log, dt_bias, slots, pool_end, k_out, g_out, reads_high, reads_low, links,
            T: tl.constexpr, WITH_UPDATE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
            HAS_SLOTS: tl.constexpr, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
            A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
            SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr, BETA_RANGE: tl.constexpr,
            SCALE: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """One program a row and value head.

    reads [N, HV, 2 T, K]: what the state is multiplied with, k_t exp(G_t) then q_t exp(G_t), in halves.
    links [N, HV, 2, T, T]: at [0, t, i] what u_t takes from u_i, beta_t where i = t; at [1, t, i] what o_t takes from u_i.
    """
    program = tl.program_id(0)
    n, hv = (program // HV).to(tl.int64), program % HV
    live = True
    if HAS_SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
        live = (slot >= 0) & (slot + pool_end < 0)
    offsets_k = tl.arange(0, K)
    head = n * HV + hv
    # All tokens are requested before anything is stored: a load may not move ahead of a store.
    queries, keys, gates, betas = (), (), (), ()
    for t in tl.static_range(T):
        b_q, b_k, b_g, b_beta = load_token(
            q, k, g, beta, A_log, dt_bias, n * T + t, n, hv, H, HV, K, GATE, HAS_BIAS, A_LOG_STRIDE,
            DT_BIAS_STRIDE, LOWER_BOUND, SOFTPLUS_LINEAR_ABOVE, L2NORM_EPS, BETA_RANGE, SCALE)  # fmt: skip
        queries, keys, gates, betas = queries + (b_q,), keys + (b_k,), gates + (b_g,), betas + (b_beta,)
    start = tl.full([K], 1.0, tl.float32)  # the decay from the state to token t
    decayed = ()  # the keys so far, decayed to token t
    for t in tl.static_range(T):
        b_q, b_k, b_g, b_beta = queries[t], keys[t], gates[t], betas[t]
        token = n * T + t
        if WITH_UPDATE:
            tl.store(g_out + (token * HV + hv) * K + offsets_k, tl.where(live, b_g, 0))
            # k belongs to all value heads of a group: one of them writes.
            k_head = (token * H + hv // (HV // H)) * K
            tl.store(k_out + k_head + offsets_k, tl.where(live, b_k, 0), mask=hv % (HV // H) == 0)
        decay = tl.exp(b_g)
        start *= decay
        row = (head * 2 * T + t) * K + offsets_k
        high, low = halves(b_k * start)
        tl.store(reads_high + row, high)
        tl.store(reads_low + row, low)
        high, low = halves(b_q * start)
        tl.store(reads_high + row + T * K, high)
        tl.store(reads_low + row + T * K, low)
        link = links + (head * 2 * T + t) * T
        still = ()
        for i in tl.static_range(t):
            key = decayed[i] * decay
            still = still + (key,)
            tl.store(link + i, b_beta * tl.sum(key * b_k))
            tl.store(link + T * T + i, tl.sum(key * b_q))
        decayed = still + (b_k,)
        tl.store(link + t, b_beta)
        tl.store(link + T * T + t, tl.sum(b_k * b_q))


@triton.jit
def verify(v, state, slots, reads_high, reads_low, links, pool_end, u, o,
           T: tl.constexpr, TP: tl.constexpr, WITH_UPDATE: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
           V: tl.constexpr, BV: tl.constexpr, HAS_SLOTS: tl.constexpr):  # fmt: skip
    """TP is 2 T padded to what a product takes; ``u`` is the Update's, unused without it."""
    n, hv, offsets_v = place(HV, V, BV)
    slot, live = slot_of(slots, n, pool_end, HAS_SLOTS)
    offsets_k = tl.arange(0, K)
    tile = ((slot * HV + hv) * V + offsets_v)[:, None] * K + offsets_k[None, :]
    s = tl.load(state + tile, mask=live, other=0.0)

    rows = tl.arange(0, TP)[:, None]
    columns = tl.arange(0, TP)[None, :]
    head = n * HV + hv
    x = head * 2 * T * K + rows * K + offsets_k[None, :]
    x_high = tl.trans(tl.load(reads_high + x, mask=rows < 2 * T, other=0.0))
    x_low = tl.trans(tl.load(reads_low + x, mask=rows < 2 * T, other=0.0))
    heads = ((n * T + columns) * HV + hv) * V + offsets_v[:, None]  # where each token's v, o and u are
    values = tl.load(v + heads, mask=columns < T, other=0.0).to(tl.float32)

    # The products of the halves but the smallest; a bfloat16 state is exact in one half.
    if s.dtype == tl.bfloat16:
        product = tl.dot(s, x_low)
        product = tl.dot(s, x_high, product)
    else:
        s_high, s_low = halves(s)
        product = tl.dot(s_low, x_high)
        product = tl.dot(s_high, x_low, product)
        product = tl.dot(s_high, x_high, product)

    rest = values - product
    link = links + head * 2 * T * T
    updates = ()
    all_u = tl.zeros([BV, TP], tl.float32)
    all_o = tl.zeros([BV, TP], tl.float32)
    for t in tl.static_range(T):
        b_u = tl.load(link + t * T + t) * tl.sum(tl.where(columns == t, rest, 0.0), axis=1)
        for i in tl.static_range(t):
            b_u -= tl.load(link + t * T + i) * updates[i]
        updates = updates + (b_u,)
        all_u = tl.where(columns == t, b_u[:, None], all_u)
        b_o = tl.sum(tl.where(columns == T + t, product, 0.0), axis=1)
        for i in tl.static_range(t + 1):
            b_o += tl.load(link + (T + t) * T + i) * updates[i]
        all_o = tl.where(columns == t, b_o[:, None], all_o)
    if WITH_UPDATE:
        tl.store(u + heads, tl.where(live, all_u, 0.0), mask=columns < T)
    tl.store(o + heads, tl.where(live, all_o, 0.0).to(o.dtype.element_ty), mask=columns < T)
