"""matmul, matmul_pair and matmul_hc_expand: products of few tokens with weights in Q8_0, one launch each.

Bound: memory for one token, 8.5 bits and 3 instructions a weight. So a program takes BO rows of a weight, few, so that most
multiprocessors have some; a chunk of a row is 1 KiB of consecutive bytes, and chunks are requested ahead, STAGES in flight.
The tokens, small and in L2, are quantised again by every program, chunk by chunk, since a block's scale needs its own 32
numbers alone; BO rows and BN tokens share a chunk. Instructions are what bounds more tokens: 2 a weight and token for four.

Bits: sums within a block are of integers. Block b is added to running sum b % BB of a row, chunk after chunk; then the BB
sums are added in pairs of neighbours. So neither BN nor BO nor how threads share a tile shows in a result. Products and sums
are rounded as they are written: kernels are compiled without fusing multiplies into adds.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(32)
WORDS: tl.constexpr = tl.constexpr(8)  # of a block: four values in an int32
BB: tl.constexpr = tl.constexpr(32)  # blocks in a chunk, and running sums
LEAST_SCALE: tl.constexpr = tl.constexpr(2.0**-125)
BELOW_HALF: tl.constexpr = tl.constexpr(0x3EFFFFFF)  # the float32 before 0.5
SIGN: tl.constexpr = tl.constexpr(-(2**31))  # of a word's number
SIGNS: tl.constexpr = tl.constexpr(0x80808080 - 2**32)  # of its four values


@triton.jit
def quantize(x):
    """Blocks [BN, BB, 32] as scales [BN, BB] and words of four values [BN, BB, 8], as _q8_0_format.quantize_blocks does."""
    # As integers the magnitudes of floats have their order, and NaN is the largest.
    largest = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=2).to(tl.float32, bitcast=True)
    scales = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    scales = tl.where(scales < LEAST_SCALE, 0.0, scales)
    reciprocals = tl.where(scales == 0, 0.0, tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales))
    x *= reciprocals[:, :, None]
    # Ties away from zero: a tie and BELOW_HALF add up to the next integer, rounded; what lies below a tie stays below.
    sign = x.to(tl.int32, bitcast=True) & SIGN
    values = (x + (sign | BELOW_HALF).to(tl.float32, bitcast=True)).to(tl.int32)
    # A value is a signed byte: with 128 more in each they add up to a word without borrowing from one another.
    values = tl.reshape(values, [x.shape[0], BB, WORDS, 4])
    return scales, (tl.sum(values << 8 * tl.arange(0, 4), axis=3) + SIGNS) ^ SIGNS


@triton.jit
def dot_words(a, b, DP4A: tl.constexpr):
    """The sum of the products of four pairs of values; without DP4A for the interpreter, which has no assembly."""
    if DP4A:
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, 0;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1)
    total = (a >> 24) * (b >> 24)
    for bits in tl.static_range(8, 32, 8):
        total += ((a << bits) >> 24) * ((b << bits) >> 24)
    return total


@triton.jit
def place(tokens_end, OUT: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr):
    """This program's group, tokens [BN], where the group's tokens end, and tile of rows. tokens_end is -N of a group.

    Tiles of tokens vary fastest, so that programs in flight read the same rows of a weight.
    """
    tiles = tl.cdiv(-tokens_end, BN)
    program = tl.program_id(0) // tiles
    group = program // tl.cdiv(OUT, BO)
    tokens = -group * tokens_end + tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    return group, tokens, -(group + 1) * tokens_end, program % tl.cdiv(OUT, BO)


@triton.jit
def product(x, scales, values, weight, tokens, end, tile, IN: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr,
            STAGES: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """The tokens [BN] times BO rows of one of the weights. The last token and row stand for those past it."""
    BLOCKS: tl.constexpr = (IN + BLOCK - 1) // BLOCK
    first = (weight * OUT + tile * BO).to(tl.int64)
    rows = tl.minimum(tl.arange(0, BO), OUT - 1 - tile * BO)
    x += tl.minimum(tokens, end - 1).to(tl.int64)[:, None, None] * IN
    scales += first * BLOCKS + rows[None, :, None] * BLOCKS
    values = (values + first * IN).to(tl.pointer_type(tl.int32)) + rows[None, :, None, None] * (IN // 4)
    sums = tl.zeros([tokens.shape[0], BO, BB], tl.float32)
    for chunk in tl.range(0, BLOCKS, BB, num_stages=STAGES):
        blocks = chunk + tl.arange(0, BB)
        words = blocks[None, None, :, None] * WORDS + tl.arange(0, WORDS)[None, None, None, :]
        inputs = blocks[None, :, None] * BLOCK + tl.arange(0, BLOCK)[None, None, :]
        w_values = tl.load(values + words, mask=words < IN // 4, other=0)
        w_scales = tl.load(scales + blocks[None, None, :], mask=blocks[None, None, :] < BLOCKS, other=0.0).to(tl.float32)
        x_scales, x_values = quantize(tl.load(x + inputs, mask=inputs < IN, other=0.0).to(tl.float32))
        exact = tl.sum(dot_words(x_values[:, None, :, :], w_values, DP4A), axis=3).to(tl.float32)
        sums += exact * (x_scales[:, None, :] * w_scales)
    for level in tl.static_range(5):
        even, odd = tl.split(tl.reshape(sums, [tokens.shape[0], BO, BB >> (level + 1), 2]))
        sums = even + odd
    return tl.reshape(sums, [tokens.shape[0], BO])


@triton.jit
def multiply(x, scales, values, weight, tokens, end, tile, y, IN: tl.constexpr, OUT: tl.constexpr, BO: tl.constexpr,
             STAGES: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """A product, rounded and written to y [N, OUT]."""
    rows = tile * BO + tl.arange(0, BO)
    b_y = product(x, scales, values, weight, tokens, end, tile, IN, OUT, BO, STAGES, DP4A)
    mask = (tokens < end)[:, None] & (rows < OUT)[None, :]
    tl.store(y + tokens.to(tl.int64)[:, None] * OUT + rows[None, :], b_y.to(y.dtype.element_ty), mask=mask)


@triton.jit
def matmul(x, scales, values, tokens_end, y,
           IN: tl.constexpr, OUT: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, STAGES: tl.constexpr,
           DP4A: tl.constexpr):  # fmt: skip
    group, tokens, end, tile = place(tokens_end, OUT, BN, BO)
    multiply(x, scales, values, group, tokens, end, tile, y, IN, OUT, BO, STAGES, DP4A)


@triton.jit
def matmul_pair(x, scales0, values0, scales1, values1, tokens_end, y0, y1,
                IN: tl.constexpr, OUT0: tl.constexpr, OUT1: tl.constexpr, SHARED0: tl.constexpr, SHARED1: tl.constexpr,
                BN: tl.constexpr, BO: tl.constexpr, STAGES: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """A tile of rows is of one weight or of the other; a shared weight has one group, whatever the other has."""
    TILES0: tl.constexpr = (OUT0 + BO - 1) // BO
    TILES1: tl.constexpr = (OUT1 + BO - 1) // BO
    group, tokens, end, tile = place(tokens_end, (TILES0 + TILES1) * BO, BN, BO)
    if tile < TILES0:
        weight = group * (not SHARED0)
        multiply(x, scales0, values0, weight, tokens, end, tile, y0, IN, OUT0, BO, STAGES, DP4A)
    else:
        weight = group * (not SHARED1)
        multiply(x, scales1, values1, weight, tokens, end, tile - TILES0, y1, IN, OUT1, BO, STAGES, DP4A)


@triton.jit
def matmul_hc_expand(x, scales, values, residual, post, comb, add, tokens_end, out,
                     IN: tl.constexpr, OUT: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, HAS_ADD: tl.constexpr,
                     BN: tl.constexpr, BO: tl.constexpr, STAGES: tl.constexpr, DP4A: tl.constexpr):  # fmt: skip
    """A program has its rows of all lanes, LANES of them, L rounded up to a power of two; they are a tile's middle axis."""
    group, tokens, end, tile = place(tokens_end, OUT, BN, BO)
    n = tl.minimum(tokens, end - 1).to(tl.int64)[:, None, None]
    dst = tl.minimum(tl.arange(0, LANES), L - 1)[None, :, None]
    row = tl.minimum(tile * BO + tl.arange(0, BO), OUT - 1)[None, None, :]
    # Requested ahead of the product, behind which they would be waited for.
    b_post = tl.load(post + n * L + dst).to(tl.float32)
    b_comb, b_residual = (), ()
    for src in tl.static_range(L):
        b_comb = b_comb + (tl.load(comb + (n * L + src) * L + dst).to(tl.float32),)
        b_residual = b_residual + (tl.load(residual + (n * L + src) * OUT + row).to(tl.float32),)
    if HAS_ADD:
        b_add = tl.load(add + n * OUT + row).to(tl.float32)
    b = product(x, scales, values, group, tokens, end, tile, IN, OUT, BO, STAGES, DP4A)
    b = b.to(x.dtype.element_ty).to(tl.float32)[:, None, :]
    if HAS_ADD:
        b += b_add
    b_out = b * b_post
    for src in tl.static_range(L):
        b_out += b_comb[src] * b_residual[src]
    tokens = tokens[:, None, None]
    lanes, rows = tl.arange(0, LANES)[None, :, None], tile * BO + tl.arange(0, BO)[None, None, :]
    mask = (tokens < end) & (lanes < L) & (rows < OUT)
    tl.store(out + (tokens.to(tl.int64) * L + lanes) * OUT + rows, b_out.to(out.dtype.element_ty), mask=mask)
