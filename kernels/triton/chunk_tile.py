"""What the kernels of chunk share: where a chunk's tokens lie, sums of log decays, and half-precision operands.

A chunk is 64 tokens. Operands of products are float16: the keys' and queries' side of every product is at most 1 in size, and
what multiplies it is scaled by powers of two, a row at a time. So products keep 11 bits at bfloat16's speed.
"""

import triton
import triton.language as tl

from .token import log_decay

C = tl.constexpr(64)


@triton.jit
def sequence_of(head, tokens_end, chunks_end, cu_seqlens, first_chunks, sequences_end, HV: tl.constexpr,
                PACKED: tl.constexpr):  # fmt: skip
    """Of sequence ``head // HV``: its row, its first and its last chunk (exclusive), its first and its last token."""
    sequence = head // HV
    if PACKED:
        row = sequence // -sequences_end
        place = sequence + row  # there is one offset more than there are sequences
        first, last = tl.load(first_chunks + place), tl.load(first_chunks + place + 1)
        begin, end = tl.load(cu_seqlens + place), tl.load(cu_seqlens + place + 1)
    else:
        row = sequence
        first, last = 0, -chunks_end
        begin, end = 0, -tokens_end
    return row.to(tl.int64), first, last, begin, end


@triton.jit
def chunk_of(item, tokens_end, chunks_end, bounds, PACKED: tl.constexpr):
    """Of chunk ``item`` of all rows: its row, its first and its last token (exclusive); none where it is left over."""
    row = item // -chunks_end
    if PACKED:
        begin, end = tl.load(bounds + 2 * item), tl.load(bounds + 2 * item + 1)
    else:
        begin = (item % -chunks_end) * C
        end = tl.minimum(begin + C, -tokens_end)
    return row.to(tl.int64), begin, end


@triton.jit
def load_log_decay(g, offsets, valid, row, hv, offsets_k, A_log, dt_bias, GATE: tl.constexpr, HAS_BIAS: tl.constexpr,
                   A_LOG_STRIDE: tl.constexpr, DT_BIAS_STRIDE: tl.constexpr, LOWER_BOUND: tl.constexpr,
                   SOFTPLUS_LINEAR_ABOVE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """Log decays [C, BK] in base 2, zero for what is no token, cut where a decay of one token is zero in float32."""
    x = tl.load(g + offsets, mask=valid, other=0.0).to(tl.float32)
    x = log_decay(x, row, hv, offsets_k, A_log, dt_bias, GATE, HAS_BIAS, A_LOG_STRIDE, DT_BIAS_STRIDE, LOWER_BOUND,
                  SOFTPLUS_LINEAR_ABOVE, K)  # fmt: skip
    return tl.where(valid, tl.maximum(x * 1.4426950408889634, -180.0), 0.0)


@triton.jit
def gate_rate(A_log):
    """exp(A_log), kept where its product with an infinite input is not undefined."""
    return tl.minimum(tl.maximum(tl.exp(tl.load(A_log).to(tl.float32)), 1e-30), 1e30)


@triton.jit
def load_log2_decay(g, valid, rate, dt_bias, GATE: tl.constexpr, HAS_BIAS: tl.constexpr, LOWER_BOUND: tl.constexpr):
    """Log decays [C, BK] in base 2 times 2^8 as float16, in few instructions. Matrices that sum them hold 2^-8.

    Their rounding, 2^-12 of a log decay x, changes a decay by x 2^x 2^-12 at most. Zero for what is no token; cut at -180,
    where a decay of one token is zero in float32.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    if GATE is None:
        x = tl.load(g, mask=valid, other=0.0).to(tl.float32) * (LOG2_E * 256)
    else:
        x = tl.load(g, mask=valid, other=float("-inf")).to(tl.float32)  # of which either gate makes zero
        if GATE == "softplus":
            if HAS_BIAS:
                x += tl.load(dt_bias).to(tl.float32)
            x = (rate * -256) * softplus_log2(x)
        else:
            # size sigmoid(x) = 1 / (1 / size + 2^(-x log2 e) / size)
            SIZE: tl.constexpr = -LOWER_BOUND * LOG2_E * 256
            slope = rate * -LOG2_E
            offset = -tl.log2(tl.full([1, 1], SIZE, tl.float32))
            if HAS_BIAS:
                offset += tl.load(dt_bias).to(tl.float32) * slope
            root = tl.rsqrt(1 / SIZE + tl.exp2(x * slope + offset))
            x = -root * root
    return tl.maximum(x, -180.0 * 256).to(tl.float16)


@triton.jit
def softplus_log2(x):
    """log2(1 + 2^(x log2 e)) to 3e-7 of it: for large x that is x log2 e to the last bit, with no case for it.

    With z = exp(-|x|) it is max(x, 0) log2 e + log2(1 + z), whose quotient by z is a polynomial on [0, 1], fitted
    for the least relative error.
    """
    LOG2_E: tl.constexpr = 1.4426950408889634
    z = tl.exp2(tl.abs(x) * -LOG2_E)
    p = 0.007548886351287365 * z - 0.04256587475538254
    p = p * z + 0.11285426467657089
    p = p * z - 0.19711732864379883
    p = p * z + 0.2756406366825104
    p = p * z - 0.35840827226638794
    p = p * z + 0.48069292306900024
    p = p * z - 0.7213401794433594
    p = p * z + 1.4426950216293335
    return tl.maximum(x, 0.0) * LOG2_E + p * z


@triton.jit
def halves(x):
    """x as a sum of two float16 numbers, to 2^-22 of it."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def sums(high, low, picks):
    """The sums [.., R, BK] of the rows of high + low [.., R, BK] that ``picks`` [.., R, R], zeros and ones, names."""
    return tl.dot(picks, low, tl.dot(picks, high))


@triton.jit
def until(t, j, LOG_LEVEL):
    """Whether token j is between token t and the middle of t's block of 2^(LOG_LEVEL + 1) tokens.

    In the upper half these are the tokens from the middle up to and with t, in the lower half those behind it up to the
    middle. For a pair of an upper and a lower token the two sums are the log decay between them, in two parts that are
    both sums of numbers <= 0: no exponent is positive, nothing large is subtracted.
    """
    half = t >> LOG_LEVEL
    upper = half % 2 == 1
    first = tl.where(upper, half << LOG_LEVEL, t + 1)
    last = tl.where(upper, t, ((half + 1) << LOG_LEVEL) - 1)
    return (j >= first) & (j <= last)


@triton.jit
def crosses(t, i, LOG_LEVEL):
    """Whether t and i are an upper and a lower token of one block of 2^(LOG_LEVEL + 1) tokens."""
    half = t >> LOG_LEVEL
    return tl.where(half % 2 == 1, half - 1, -1) == (i >> LOG_LEVEL)


@triton.jit
def blocks(x):
    """[C, D] as [4, 16, D]: a warp's 16 rows a block, whose products need no other warp."""
    return tl.reshape(x, [4, 16, x.shape[1]])


@triton.jit
def unblocked(x):
    return tl.reshape(x, [C, x.shape[2]])


@triton.jit
def block_diagonal(x):
    """[4, 16, 16] as the blocks on the diagonal of [C, C]."""
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    rows = tl.broadcast_to(tl.reshape(x, [C, 1, 16]), [C, 4, 16])
    return tl.where(t // 16 == i // 16, tl.reshape(rows, [C, C]), 0.0)


@triton.jit
def power_scale(largest, EXPONENT: tl.constexpr):
    """The power of two that takes ``largest`` to 2^EXPONENT or up to twice that, and what undoes it."""
    power = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x1F800000)
    up = (0x7F000000 - power + (EXPONENT << 23)).to(tl.float32, bitcast=True)
    return up, (power - (EXPONENT << 23)).to(tl.float32, bitcast=True)

