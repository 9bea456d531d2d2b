"""What the token kernels share: a warp's lanes over K, activations of one token, sums over a warp, and the recurrence.

A lane has K / 32 neighbouring channels of whatever has channels. Sums over channels are sums over lanes, of many values at
once: at every exchange a lane keeps half of the values and sends the other half, so that n values take some n exchanges
and not 5 n. A value's sum has the same order whatever n is, so kernels of other tiles have the same bits.
"""

import os

import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32, Int64, Uint32

WARP = 32
SCALE, LOWER_BOUND, L2NORM, L2NORM_EPS, SIGMOID, BETA_RANGE, LINEAR_ABOVE = range(7)  # of the array of options
OPTIONS = 8
TYPES = {"float32": cutlass.Float32, "bfloat16": cutlass.BFloat16}


def token_inputs(rows, STATE, TOKEN):
    """The axes and dtypes of what kernels of tokens take, and of o; ``rows`` are the axes before the heads."""
    token = [(f"{rows} H K", TOKEN)] * 2 + [(f"{rows} HV V", TOKEN), (f"{rows} HV K", TOKEN), (f"{rows} HV", TOKEN)]
    gate = [("RA HV", "float32"), ("RB HV K", "float32")]
    return [*token, *gate, ("P HV V K", STATE), ("N", "int32"), (str(OPTIONS), "float32")], token[2]


def select(condition, x, y):
    return type(y)(cutlass.select_(condition, x, y))


def shuffled(x, offset):
    return cute.arch.shuffle_sync_bfly(x, offset=offset)


def sums(values, lane):
    """Sums over the warp of up to 32 values, a power of two: value j is in the lanes from ``holder(j, len(values))`` on."""
    for offset in (16, 8, 4, 2, 1):
        if len(values) == 1:
            values = [values[0] + shuffled(values[0], offset)]
        else:
            upper = (lane & offset) != 0
            lower_half, upper_half = values[: len(values) // 2], values[len(values) // 2 :]
            values = [
                select(upper, y, x) + shuffled(select(upper, x, y), offset)
                for x, y in zip(lower_half, upper_half, strict=True)
            ]
    return values[0]


def holder(j, count):
    return j * (WARP // count)


def from_lane(x, lane):
    return cute.arch.shuffle_sync(x, lane)


def wide(n, size):
    """n * size as a stride of arrays of 2^31 numbers and more, in pieces of ``size`` that stay aligned."""
    return cute.assume(Int64(n) * size, divby=size)


def in_pieces(x, lead, channels, each):
    """``x`` [..., K] as [..., K / each, each], rows of whatever lies before K; its numbers are fewer than 2^31."""
    strides, size = [], channels
    for n in reversed(lead):
        strides.insert(0, size)
        size = size * n
    return cute.make_tensor(x.iterator, cute.make_layout((*lead, channels // each, each), stride=(*strides, each, 1)))


def in_words(x):
    """What a lane holds of an array from request to use as 32-bit words: halves of them would be taken apart on arrival."""
    return (
        x if x.element_type is Float32 else cute.make_tensor(cute.recast_ptr(x.iterator, dtype=Uint32), cute.make_layout(1))
    )


def of_words(x):
    words = [x[i] for i in range(cute.size(x))]
    return words if x.element_type is Float32 else of_pairs(words)


def by_lane(x, lead, channels):
    """``x`` [..., K] as [..., 32, K / 32]."""
    return in_pieces(x, lead, channels, channels // WARP)


def loaded(x):
    """A lane's numbers, in float32."""
    own = cute.make_rmem_tensor(x.layout, x.element_type)
    cute.autovec_copy(x, own)
    return held(own)


def load_as(x):
    """A lane's numbers as they are, side by side."""
    own = cute.make_rmem_tensor(cute.make_layout(x.shape[0]), x.element_type)
    cute.autovec_copy(x, own)
    return own


def state_by_lane(state, K, V):
    """A pool [P, HV, V, K] as [P, HV, V, 32, K / 32], of 2^31 numbers and more."""
    pool, value_heads, each = state.shape[0], state.shape[1], K // WARP
    strides = (wide(value_heads, V * K), V * K, K, each, 1)
    return cute.make_tensor(state.iterator, cute.make_layout((pool, value_heads, V, WARP, each), stride=strides))


def numbers_of(options):
    """The array of options, requested at once."""
    return loaded(cute.make_tensor(options.iterator, cute.make_layout(OPTIONS)))


def held(x):
    """What a lane holds in registers, in float32."""
    count = cute.size(x)
    if x.element_type is cutlass.BFloat16 and count % 2 == 0:
        words = cute.make_tensor(cute.recast_ptr(x.iterator, dtype=Uint32), cute.make_layout(count // 2))
        return of_pairs([words[i] for i in range(count // 2)])
    return [x[i].to(Float32) for i in range(count)]


def of_pairs(words):
    """Pairs of bfloat16 numbers in float32: an instruction for each, where a conversion takes two."""
    pairs = [(x << Uint32(16), x & Uint32(0xFFFF0000)) for x in words]
    return [x.bitcast(Float32) for pair in pairs for x in pair]


def write(values, x):
    own = cute.make_rmem_tensor(x.layout, x.element_type)
    for i, value in enumerate(values):
        own[i] = value.to(x.element_type)
    cute.autovec_copy(own, x)


def for_blackwell():
    """Whether that is what is compiled for."""
    return os.environ.get("CUTE_DSL_ARCH", "").startswith("sm_100")


def multiprocessors():
    """Of a B200 or an H200."""
    return 148 if for_blackwell() else 132


def in_pairs(single, packed, *operands):
    """``single`` of each of a lane's numbers; ``packed`` of two neighbours at once, to the same bits, where the GPU that is
    compiled for has instructions for that. No sum may take a packed product: the assembler would fuse them."""
    if not for_blackwell():
        return [single(*numbers) for numbers in zip(*operands, strict=True)]
    pairs = zip(*(zip(x[::2], x[1::2], strict=True) for x in operands), strict=True)
    return [x for pair in pairs for x in packed(*pair)]


def fused(x, y, z):
    return in_pairs(cute.math.fma, cute.arch.fma_packed_f32x2, x, y, z)


def exp(x):
    return cute.arch.exp2(x * 1.4426950408889634)


def inverse(x):
    """Within an ulp, of what is neither 0 nor that small; the exact one would branch."""
    return cute.arch.rcp_approx(x)


def sigmoid(x):
    return inverse(1.0 + exp(-x))


def log1p(x):
    """For x >= 0, exact in the last bits where 1 + x rounds (Higham, Accuracy and Stability, 1.14.1)."""
    u = 1.0 + x
    exact = u == 1.0
    return select(exact, x, cute.math.log(u) * (x * inverse(select(exact, Float32(1.0), u - 1.0))))


def log_decays(g, A_log, dt_bias, options, GATE):
    """What the gate makes of its inputs."""
    if GATE == "none":
        return g
    rate = exp(A_log)
    x = [x + bias for x, bias in zip(g, dt_bias, strict=True)]
    if GATE == "softplus":
        above = options[LINEAR_ABOVE]
        return [-rate * select(y > above, y, log1p(exp(cute.arch.fmin(y, above)))) for y in x]
    return [options[LOWER_BOUND] * sigmoid(rate * y) for y in x]


def activated(q, k, beta, options):
    """q, normalised and scaled; k, normalised; beta; and the dot of both. Options are numbers: one binary serves all."""
    pairs = (q, q), (k, k), (q, k), (k, k)  # four, as sums takes a power of two
    found = sums([dot(x, y) for x, y in pairs], cute.arch.lane_idx())
    qq, kk, qk = (from_lane(found, holder(j, len(pairs))) for j in range(3))
    normed = options[L2NORM] != 0.0
    of_q = select(normed, cute.math.rsqrt(qq + options[L2NORM_EPS]), Float32(1.0)) * options[SCALE]
    of_k = select(normed, cute.math.rsqrt(kk + options[L2NORM_EPS]), Float32(1.0))
    beta = select(options[SIGMOID] != 0.0, options[BETA_RANGE] * sigmoid(beta), beta)
    return [x * of_q for x in q], [x * of_k for x in k], beta, qk * of_q * of_k


def dot(x, y):
    found = x[0] * y[0]
    for a, b in zip(x[1:], y[1:], strict=True):
        found = found + a * b
    return found


def slot_of(slots, pool, n):
    """The slot of row n, or 0, and whether it lies in the pool."""
    return within(pool, slots[n])


def within(pool, slot):
    live = (slot >= 0) & (slot < pool)
    return select(live, slot, Int32(0)), live
