"""What the token kernels share: one token's operands with their activations, and one step of the recurrence.

A program works on one row n, one value head hv and BV rows of its state. Products and sums are written out as they are
to be rounded (kernels are compiled without fusing multiplies into adds), so that the step has the same bits in every
kernel that inlines it.
"""

import triton
import triton.language as tl


@triton.jit
def place(HV: tl.constexpr, V: tl.constexpr, BV: tl.constexpr):
    """The row, the value head and the offsets of the state's rows that this program works on.

    The head varies faster than the row, and a head's tiles fastest, so that programs in flight read neighbouring memory.
    """
    program = tl.program_id(0)
    tile = program % (V // BV)
    head = program // (V // BV)
    return (head // HV).to(tl.int64), head % HV, tile * BV + tl.arange(0, BV)


@triton.jit
def slot_of(slots, n, pool_end, HAS_SLOTS: tl.constexpr):
    """The slot of row n and whether it lies in the pool; without indices row n is slot n."""
    if HAS_SLOTS:
        slot = tl.load(slots + n).to(tl.int64)
        live = (slot >= 0) & (slot + pool_end < 0)
    else:
        slot = n
        live = True
    return slot, live


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, exact in the last bits where 1 + x rounds (Higham, Accuracy and Stability, 1.14.1)."""
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / tl.where(u == 1, 1.0, u - 1)))


@triton.jit
def log_decay(x, n, hv, offsets_k, A_log, dt_bias, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr,
              DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr,
              K: tl.constexpr):  # fmt: skip
    """The log decay [K] of the gate's raw input; the strides are zero where all rows share the parameters."""
    if GATE is not None:
        rate = tl.exp(tl.load(A_log + n * A_LOG_STRIDE + hv).to(tl.float32))
        if HAS_BIAS:
            x += tl.load(dt_bias + n * DT_BIAS_STRIDE + hv * K + offsets_k).to(tl.float32)
        if GATE == "softplus":
            x = -rate * tl.where(x > SOFTPLUS_LINEAR_ABOVE, x, log1p(tl.exp(tl.minimum(x, SOFTPLUS_LINEAR_ABOVE))))
        else:
            x = LOWER_BOUND * tl.sigmoid(rate * x)
    return x


@triton.jit
def l2norm(x, EPS: tl.constexpr):
    return x * tl.rsqrt(tl.sum(x * x) + EPS)


@triton.jit
def load_token(q, k, g, beta, A_log, dt_bias, token, n, hv, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
               GATE: tl.constexpr, HAS_BIAS: tl.constexpr, A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr,
               LOWER_BOUND: tl.constexpr, SOFTPLUS_LINEAR_ABOVE: tl.constexpr, L2NORM_EPS: tl.constexpr,
               BETA_RANGE: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """q (scaled) [K], k [K], g (log decay) [K] and beta of one token, in float32.

    L2NORM_EPS is None without the norm; BETA_RANGE is None where beta is no logit, else the sigmoid's factor.
    """
    offsets_k = tl.arange(0, K)
    qk = (token * H + hv // (HV // H)) * K + offsets_k
    value_head = token * HV + hv
    b_q = tl.load(q + qk).to(tl.float32)
    b_k = tl.load(k + qk).to(tl.float32)
    b_g = tl.load(g + value_head * K + offsets_k).to(tl.float32)
    b_beta = tl.load(beta + value_head).to(tl.float32)
    b_g = log_decay(b_g, n, hv, offsets_k, A_log, dt_bias, GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND,
                    SOFTPLUS_LINEAR_ABOVE, K)  # fmt: skip
    if L2NORM_EPS is not None:
        b_q = l2norm(b_q, L2NORM_EPS)
        b_k = l2norm(b_k, L2NORM_EPS)
    if BETA_RANGE is not None:
        b_beta = BETA_RANGE * tl.sigmoid(b_beta)
    return b_q * SCALE, b_k, b_g, b_beta


@triton.jit
def outer(s, u, k):
    """s + u k^T, each element one fused multiply-add."""
    return tl.fma(u[:, None] + tl.zeros_like(s), k[None, :] + tl.zeros_like(s), s)


@triton.jit
def step(s, q, k, v, g, beta):
    """One token of the recurrence on BV rows of the state: the new rows [BV, K], u [BV] and the output [BV]."""
    s = s * tl.exp(g)[None, :]
    u = beta * (v - tl.sum(s * k[None, :], axis=1))
    s = outer(s, u, k)
    return s, u, tl.sum(s * q[None, :], axis=1)
