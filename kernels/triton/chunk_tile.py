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
def halves(x):
    """x as a sum of two float16 numbers, to 2^-22 of it."""
    high = x.to(tl.float16)
    return high, (x - high.to(tl.float32)).to(tl.float16)


@triton.jit
def sums(high, low, picks):
    """The sums [C, BK] of the rows of high + low [C, BK] that ``picks`` [C, C] names."""
    picks = picks.to(tl.float16)
    return tl.dot(picks, low, tl.dot(picks, high))


@triton.jit
def until(LEVEL):
    """[C, C]: from each token to the middle of its block of 2 LEVEL tokens; to the chunk's end where LEVEL is C.

    In the upper half these are the tokens from the middle up to and with itself, in the lower half those behind it up to the
    middle. For a pair of an upper and a lower token the two sums are the log decay between them, in two parts that are
    both sums of numbers <= 0: no exponent is positive, nothing large is subtracted.
    """
    t = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    middle = t // (2 * LEVEL) * (2 * LEVEL) + LEVEL
    return tl.where(t >= middle, (j >= middle) & (j <= t), (j > t) & (j < middle))


@triton.jit
def crosses(LEVEL):
    """[C, C]: the pairs of an upper and a lower token of one block of 2 LEVEL tokens."""
    t = tl.arange(0, C)[:, None]
    i = tl.arange(0, C)[None, :]
    return (t // (2 * LEVEL) == i // (2 * LEVEL)) & (t // LEVEL > i // LEVEL)


@triton.jit
def scaled(x, EXPONENT: tl.constexpr):
    """x [R, *] in float16, each row times the power of two that takes its largest to 2^EXPONENT, and what undoes it [R]."""
    power = tl.max(tl.abs(x), axis=1).to(tl.int32, bitcast=True) & 0x7F800000
    power = tl.maximum(power, 0x1F800000)
    up = (0x7F000000 - power + (EXPONENT << 23)).to(tl.float32, bitcast=True)
    down = (power - (EXPONENT << 23)).to(tl.float32, bitcast=True)
    return (x * up[:, None]).to(tl.float16), down
