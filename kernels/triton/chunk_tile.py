"""What the kernels of chunk share: where a chunk's tokens lie, log decays, and half-precision operands.

A chunk is 64 tokens. Operands of products are float16: the keys' and queries' side of every product is at most 1 in size,
and what multiplies it is scaled by powers of two, a row at a time. So products keep 11 bits at bfloat16's speed.
"""

import triton
import triton.language as tl

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
def power_scale(largest, EXPONENT: tl.constexpr):
    """The power of two that takes ``largest`` to 2^EXPONENT or up to twice that, and what undoes it."""
    power = tl.maximum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 0x1F800000)
    up = (0x7F000000 - power + (EXPONENT << 23)).to(tl.float32, bitcast=True)
    return up, (power - (EXPONENT << 23)).to(tl.float32, bitcast=True)
