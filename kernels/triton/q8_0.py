"""matmul, matmul_pair and matmul_hc_expand: products of few tokens with weights in Q8_0, one launch each.

Bound: memory, 8.5 bits a weight, which arrive when enough of them are under way on every multiprocessor all the time. So a
program has R whole rows in flight, of up to 8192 inputs: every thread a block of each row, requested straight into registers
and, for few tokens, before anything else. A thread quantises x for its own block alone and waits for no other's; that serves
TURNS times R rows, and with EAGER the next turn's rows are under way while one's are multiplied. Threads meet in the sums
only. Tiles are such that all programs run at once, in as few turns. More tokens than BN are more programs, which read the
weights again, from L2.

Bits: sums within a block are of integers. Block b is added to running sum b % SUMS of its row, in the blocks' order; then
sum l and sum l + 16, l and l + 8, and so on to one. So no tile, nor how threads share it, shows in a result. Products and
sums are rounded as they are written: kernels are compiled without fusing multiplies into adds.
"""

import triton
import triton.language as tl

BLOCK: tl.constexpr = tl.constexpr(32)
WORDS: tl.constexpr = tl.constexpr(8)  # of a block: four values in an int32
SUMS: tl.constexpr = tl.constexpr(32)
MOST_EACH: tl.constexpr = tl.constexpr(8)  # blocks that a sum gets at a time: 256 threads' blocks
LEAST_SCALE: tl.constexpr = tl.constexpr(2.0**-125)
BELOW_HALF: tl.constexpr = tl.constexpr(0x3EFFFFFF)  # the float32 before 0.5
SIGN: tl.constexpr = tl.constexpr(-(2**31))  # of a word's number


@triton.jit
def fours(x):
    """[..., 4] as four of [...]."""
    even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def pack(a, b, c, d, COMPILED: tl.constexpr):
    """Four values as one word; without assembly for the interpreter, which has none."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "{.reg .b32 t; cvt.pack.sat.s8.s32.b32 t, $4, $3, 0; cvt.pack.sat.s8.s32.b32 $0, $2, $1, t;}",
            "=r,r,r,r,r",
            [a, b, c, d],
            tl.int32,
            is_pure=True,
            pack=1,
        )
    return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24


@triton.jit
def dot_words(a, b, c, COMPILED: tl.constexpr):
    """c and the products of four pairs of values."""
    if COMPILED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], tl.int32, is_pure=True, pack=1
        )
    for bits in tl.static_range(0, 32, 8):
        c += ((a << bits) >> 24) * ((b << bits) >> 24)
    return c


@triton.jit
def magnitude(x):
    """The largest of the last axis, as integers: so magnitudes of floats keep their order, and NaN is the largest."""
    return tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1)


@triton.jit
def words(x, COMPILED: tl.constexpr):
    """[B, 4] or [B, 8] as one or two words [B] of four values, rounded with ties away from zero."""
    # A tie and BELOW_HALF add up to the next integer, rounded; what lies below a tie stays below.
    sign = x.to(tl.int32, bitcast=True) & SIGN
    x = (x + (sign | BELOW_HALF).to(tl.float32, bitcast=True)).to(tl.int32)
    if x.shape[1] == 4:
        x0, x1, x2, x3 = fours(x)
        found = (pack(x0, x1, x2, x3, COMPILED),)
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], 4, 2]))
        x0, x2, x4, x6 = fours(even)
        x1, x3, x5, x7 = fours(odd)
        found = (pack(x0, x1, x2, x3, COMPILED), pack(x4, x5, x6, x7, COMPILED))
    return found


@triton.jit
def quantize(parts, COMPILED: tl.constexpr):
    """Blocks, in parts [B, 4] or [B, 8], as scales [B] and WORDS words [B], as _q8_0_format.quantize_blocks does."""
    largest = magnitude(parts[0].to(tl.float32))
    for i in tl.static_range(1, len(parts)):
        largest = tl.maximum(largest, magnitude(parts[i].to(tl.float32)))
    largest = largest.to(tl.float32, bitcast=True)
    scales = tl.div_rn(largest, tl.full(largest.shape, 127.0, tl.float32))
    scales = tl.where(scales < LEAST_SCALE, 0.0, scales)
    reciprocals = tl.where(scales == 0, 0.0, tl.div_rn(tl.full(scales.shape, 1.0, tl.float32), scales))
    found = (scales,)
    for i in tl.static_range(len(parts)):
        found = found + words(parts[i].to(tl.float32) * reciprocals[:, None], COMPILED)
    return found


@triton.jit
def tokens_blocks(x, blocks, start, end, IN: tl.constexpr, BN: tl.constexpr, COMPILED: tl.constexpr):
    """These blocks of BN tokens from start on, quantised. The last token stands for those past it, and if all blocks are
    whole the last block for those past it. Not a row's only block: ptxas 12.8 goes wrong where all threads read one."""
    PART: tl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth  # 16 bytes: a vector of a thread
    WHOLE: tl.constexpr = BLOCK * (IN // BLOCK) == IN and IN > BLOCK
    if WHOLE:
        blocks = tl.minimum(blocks, IN // BLOCK - 1)
    inputs = blocks[:, None] * BLOCK + tl.arange(0, PART)[None, :]
    raw, found = (), ()
    for n in tl.static_range(BN):
        near = x + tl.minimum(start + n, end - 1).to(tl.int64) * IN + inputs
        parts = ()
        for i in tl.static_range(0, 32, PART):
            parts = parts + (tl.load(near + i) if WHOLE else tl.load(near + i, mask=inputs + i < IN, other=0.0),)
        raw = raw + (parts,)
    for n in tl.static_range(BN):
        found = found + (quantize(raw[n], COMPILED),)
    return found


@triton.jit
def rows_blocks(scales, values, blocks, first, last, IN: tl.constexpr, R: tl.constexpr):
    """Requests these blocks of R rows from first on: scales [B, R], and values as halves of blocks [B, R, 4], a vector of a
    thread each. The last block and row stand for those past them."""
    BLOCKS: tl.constexpr = (IN + BLOCK - 1) // BLOCK
    blocks = tl.minimum(blocks, BLOCKS - 1)
    rows = tl.minimum(first + tl.arange(0, R), last)
    near = blocks[:, None, None] * WORDS + tl.arange(0, 4)[None, None, :]
    at = values.to(tl.pointer_type(tl.int32)) + rows[None, :, None] * (IN // 4) + near
    if BLOCK * (IN // BLOCK) == IN:
        low, high = tl.load(at), tl.load(at + 4)
    else:
        low = tl.load(at, mask=near < IN // 4, other=0)
        high = tl.load(at + 4, mask=near + 4 < IN // 4, other=0)
    return tl.load(scales + blocks[:, None] + rows[None, :] * BLOCKS), low, high


@triton.jit
def products(x, scales, w, COMPILED: tl.constexpr):
    """A token's blocks times those of rows: [B, R]."""
    exact = tl.zeros(scales.shape, tl.int32)
    for i in tl.static_range(WORDS):
        exact = dot_words(x[1 + i][:, None], w[i], exact, COMPILED)
    return exact.to(tl.float32) * (x[0][:, None] * scales)


@triton.jit
def added(sums, xs, rows, used, EACH: tl.constexpr, COMPILED: tl.constexpr):
    """sums [R * BN, SUMS] and the products of a thread's blocks, of which the first ``used`` count."""
    scales, low, high = rows
    w, scales = fours(low) + fours(high), scales.to(tl.float32)
    terms = products(xs[0], scales, w, COMPILED)
    if len(xs) == 2:
        terms = tl.join(terms, products(xs[1], scales, w, COMPILED))
    if len(xs) == 4:
        even, odd = products(xs[1], scales, w, COMPILED), products(xs[2], scales, w, COMPILED)
        terms = tl.join(tl.join(terms, odd), tl.join(even, products(xs[3], scales, w, COMPILED)))
    terms = tl.reshape(terms, [EACH * SUMS, sums.shape[0]])
    terms = tl.where(tl.arange(0, EACH * SUMS)[:, None] < used, terms, 0.0)
    terms = tl.permute(tl.reshape(terms, [EACH, SUMS, sums.shape[0]]), (2, 1, 0))
    return in_order(sums, terms, EACH)


@triton.jit
def in_order(total, x, COUNT: tl.constexpr):
    """total and the last axis of x, added from the first to the last."""
    if COUNT == 1:
        total += tl.reshape(x, total.shape)
    elif COUNT == 2:
        a, b = tl.split(x)
        total = (total + a) + b
    elif COUNT == 4:
        a, b, c, d = fours(x)
        total = (((total + a) + b) + c) + d
    else:
        even, odd = tl.split(tl.reshape(x, [x.shape[0], x.shape[1], 4, 2]))
        a, c, e, g = fours(even)
        b, d, f, h = fours(odd)
        total = (((((((total + a) + b) + c) + d) + e) + f) + g) + h
    return total


@triton.jit
def folded(sums):
    """[R * BN, SUMS] added up, one half to the other: level by level, so that the compiler has no say in the order."""
    for level in tl.static_range(5):
        sums = tl.sum(tl.reshape(sums, [sums.shape[0], 2, SUMS >> (level + 1)]), axis=1)
    return tl.reshape(sums, [sums.shape[0]])


@triton.jit
def place(tokens_end, OUT: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr, ALONE: tl.constexpr):
    """This program's group, its first token, where the group's tokens end, and tile of rows. tokens_end is -N of a group.

    Tiles of tokens vary fastest, so that programs in flight read the same rows of a weight. ALONE: there is one, undivided.
    """
    tiles = 1 if ALONE else tl.cdiv(-tokens_end, BN)
    program = tl.program_id(0) // tiles
    group = program // tl.cdiv(OUT, BO)
    start = -group * tokens_end + tl.program_id(0) % tiles * BN
    return group, start, -(group + 1) * tokens_end, program % tl.cdiv(OUT, BO)


@triton.jit
def ahead(lanes, token, end, row, OUT: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr):
    """Requests for places [R * BN] of all lanes post, comb and residual by source, [LANES, R * BN] each; add, if any."""
    residual, post, comb, add = lanes
    n = tl.minimum(token, end - 1).to(tl.int64)[None, :]
    row = tl.minimum(row, OUT - 1)[None, :]
    dst = tl.minimum(tl.arange(0, LANES), L - 1)[:, None]
    b_comb, b_residual, b_add = (), (), ()
    for src in tl.static_range(L):
        b_comb = b_comb + (tl.load(comb + (n * L + src) * L + dst).to(tl.float32),)
        b_residual = b_residual + (tl.load(residual + (n * L + src) * OUT + row).to(tl.float32),)
    for i in tl.static_range(len(add)):
        b_add = b_add + (tl.load(add[i] + n * OUT + row).to(tl.float32),)
    return tl.load(post + n * L + dst).to(tl.float32), b_comb, b_residual, b_add


@triton.jit
def finish(sums, wanted, token, end, row, x, y, OUT: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr,
           COMPILED: tl.constexpr):  # fmt: skip
    """Rounds the products at places [R * BN] and writes them, expanded if there are lanes."""
    b = folded(sums)
    mask = (token < end) & (row < OUT)
    if L == 0:
        tl.store(y + token.to(tl.int64) * OUT + row, b.to(y.dtype.element_ty), mask=mask)
    else:
        post, comb, residual, add = wanted
        b = b.to(x.dtype.element_ty).to(tl.float32)[None, :]
        for i in tl.static_range(len(add)):
            b += add[i]
        b *= post
        for src in tl.static_range(L):
            b += comb[src] * residual[src]
        lanes = tl.arange(0, LANES)[:, None]
        at = y + (token.to(tl.int64)[None, :] * L + lanes) * OUT + row[None, :]
        tl.store(at, b.to(y.dtype.element_ty), mask=mask[None, :] & (lanes < L))


@triton.jit
def turned(x, xs, rows, token, end, row, y, lanes, BLOCKS: tl.constexpr, EACH: tl.constexpr, OUT: tl.constexpr,
           L: tl.constexpr, LANES: tl.constexpr, COMPILED: tl.constexpr):  # fmt: skip
    """A turn: whole rows times the tokens."""
    wanted = None
    if L > 0:
        wanted = ahead(lanes, token, end, row, OUT, L, LANES)
    sums = added(tl.zeros([row.shape[0], SUMS], tl.float32), xs, rows, BLOCKS, EACH, COMPILED)
    finish(sums, wanted, token, end, row, x, y, OUT, L, LANES, COMPILED)


@triton.jit
def multiply(x, scales, values, weight, start, end, tile, y, lanes, IN: tl.constexpr, OUT: tl.constexpr, L: tl.constexpr,
             LANES: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, TURNS: tl.constexpr, EAGER: tl.constexpr,
             COMPILED: tl.constexpr):  # fmt: skip
    """A tile of R * TURNS rows of one of the weights, and BN tokens. y is [N, OUT], with lanes [N, L, OUT]."""
    BLOCKS: tl.constexpr = (IN + BLOCK - 1) // BLOCK
    EACH: tl.constexpr = min(triton.next_power_of_2((BLOCKS + SUMS - 1) // SUMS), MOST_EACH)
    SPAN: tl.constexpr = EACH * SUMS  # blocks, one a thread
    first = (weight * OUT + tile * R * TURNS).to(tl.int64)
    scales += first * BLOCKS
    values += first * IN
    last = OUT - 1 - tile * R * TURNS
    blocks = tl.arange(0, SPAN)
    places = tl.arange(0, R * BN)
    token = start + places % BN
    row = tile * R * TURNS + places // BN
    if BLOCKS <= SPAN:
        if EAGER:
            rows = rows_blocks(scales, values, blocks, 0, last, IN, R)
        xs = tokens_blocks(x, blocks, start, end, IN, BN, COMPILED)
        if EAGER:
            for turn in tl.static_range(TURNS):
                now = rows
                if turn + 1 < TURNS:
                    rows = rows_blocks(scales, values, blocks, (turn + 1) * R, last, IN, R)
                turned(x, xs, now, token, end, row + turn * R, y, lanes, BLOCKS, EACH, OUT, L, LANES, COMPILED)
        else:
            for turn in tl.range(TURNS):
                now = rows_blocks(scales, values, blocks, turn * R, last, IN, R)
                turned(x, xs, now, token, end, row + turn * R, y, lanes, BLOCKS, EACH, OUT, L, LANES, COMPILED)
    else:  # Longer rows, piece by piece, in one turn.
        tl.static_assert(TURNS == 1)
        wanted = None
        if L > 0:
            wanted = ahead(lanes, token, end, row, OUT, L, LANES)
        sums = tl.zeros([R * BN, SUMS], tl.float32)
        for begin in tl.range(0, BLOCKS, SPAN):
            rows = rows_blocks(scales, values, begin + blocks, 0, last, IN, R)
            xs = tokens_blocks(x, begin + blocks, start, end, IN, BN, COMPILED)
            sums = added(sums, xs, rows, BLOCKS - begin, EACH, COMPILED)
        finish(sums, wanted, token, end, row, x, y, OUT, L, LANES, COMPILED)


@triton.jit
def matmul(x, scales, values, tokens_end, y,
           IN: tl.constexpr, OUT: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, TURNS: tl.constexpr, EAGER: tl.constexpr,
           ALONE: tl.constexpr, COMPILED: tl.constexpr):  # fmt: skip
    group, start, end, tile = place(tokens_end, OUT, BN, R * TURNS, ALONE)
    multiply(x, scales, values, group, start, end, tile, y, None, IN, OUT, 0, 0, BN, R, TURNS, EAGER, COMPILED)


@triton.jit
def matmul_pair(x, scales0, values0, scales1, values1, tokens_end, y0, y1,
                IN: tl.constexpr, OUT0: tl.constexpr, OUT1: tl.constexpr, SHARED0: tl.constexpr, SHARED1: tl.constexpr,
                BN: tl.constexpr, R: tl.constexpr, TURNS: tl.constexpr, EAGER: tl.constexpr, ALONE: tl.constexpr,
                COMPILED: tl.constexpr):  # fmt: skip
    """A tile of rows is of one weight or of the other; a shared weight has one group, whatever the other has."""
    BO: tl.constexpr = R * TURNS
    TILES0: tl.constexpr = (OUT0 + BO - 1) // BO
    TILES1: tl.constexpr = (OUT1 + BO - 1) // BO
    group, start, end, tile = place(tokens_end, (TILES0 + TILES1) * BO, BN, BO, ALONE)
    if tile < TILES0:
        weight = group * (not SHARED0)
        multiply(x, scales0, values0, weight, start, end, tile, y0, None, IN, OUT0, 0, 0, BN, R, TURNS, EAGER, COMPILED)
    else:
        weight = group * (not SHARED1)
        tile -= TILES0
        multiply(x, scales1, values1, weight, start, end, tile, y1, None, IN, OUT1, 0, 0, BN, R, TURNS, EAGER, COMPILED)


@triton.jit
def matmul_hc_expand(x, scales, values, residual, post, comb, add, tokens_end, out,
                     IN: tl.constexpr, OUT: tl.constexpr, L: tl.constexpr, LANES: tl.constexpr, HAS_ADD: tl.constexpr,
                     BN: tl.constexpr, R: tl.constexpr, TURNS: tl.constexpr, EAGER: tl.constexpr, ALONE: tl.constexpr,
                     COMPILED: tl.constexpr):  # fmt: skip
    """A program has its rows of all lanes, LANES of them, L rounded up to a power of two."""
    group, start, end, tile = place(tokens_end, OUT, BN, R * TURNS, ALONE)
    lanes = residual, post, comb, (add,) if HAS_ADD else ()  # an array or none
    multiply(x, scales, values, group, start, end, tile, out, lanes, IN, OUT, L, LANES, BN, R, TURNS, EAGER, COMPILED)
