"""Products on tensor cores of numbers in a lane's registers, float32 numbers taken as sums of two with fewer bits.

Of the fragments of a product of 16 rows and 8 columns lane 4 i + j has in the left factor rows i and i + 8, in the right one
column i, and in the sums rows i and i + 8 of columns 2 j and 2 j + 1.
"""

import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, TFloat32, Uint32
from cutlass._mlir.dialects import llvm, nvvm

from .token import TYPES, held, load_as, loaded, of_words, select, write

EIGHT = 8  # tokens of a product, their keys and queries its rows
STEP = 16  # channels that an instruction sums over
# Numbers in shared memory so that lanes meet in few banks: from one step's left factors of eight tokens to the next's, and
READ = 2 * STEP * EIGHT + 32
MISSING = 2 * 8 + 8  # from a token's v - S k of 16 rows to the next one's
KEPT = {BFloat16: 8, TFloat32: 11}  # bits of a number, the leading one included
EVICT_FIRST = 0x12F0000000000000  # a policy of the L2 cache, as createpolicy makes it for all of what is read
SHARED_OF_CLUSTER = 7  # an address space


def atom(dtype):
    """Sums over 16 numbers of two bytes, or over 8 of TF32."""
    warp = cute.nvgpu.warp
    operation = warp.MmaTF32Op((16, 8, 8)) if dtype is TFloat32 else warp.MmaF16BF16Op(dtype, Float32, (16, 8, 16))
    return cute.make_mma_atom(operation)


def registers(values, dtype):
    own = cute.make_rmem_tensor(cute.make_layout(len(values)), dtype)
    for i, x in enumerate(values):
        own[i] = x
    return own


def zeros(count):
    return registers([Float32(0.0)] * count, Float32)


def halves(values, dtype):
    """As sums of two numbers of fewer bits: the first rounded, as integers are, which takes no conversion, and the rest."""
    dropped = 24 - KEPT[dtype]
    nearest = [x.bitcast(Uint32) + Uint32(1 << dropped - 1) for x in values]
    cut = [x & Uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF) for x in nearest]
    rest = [x - y.bitcast(Float32) for x, y in zip(values, cut, strict=True)]
    if dtype is TFloat32:  # a product takes no more bits of a number than it has
        words, rest = cut, registers([x.bitcast(Uint32) for x in rest], Uint32)
    else:
        words = [(x >> Uint32(16)) | y for x, y in zip(nearest[::2], cut[1::2], strict=True)]
        rest = registers([x.to(dtype) for x in rest], dtype)
    return [recast(x, dtype, len(values)) for x in (registers(words, Uint32), rest)]


def thirds(values):
    """As sums of three bfloat16 numbers, of eight bits each, which is exact; two numbers to a word."""
    parts = []
    for _ in range(3):
        cut = [x.bitcast(Uint32) & Uint32(0xFFFF0000) for x in values]
        values = [x - y.bitcast(Float32) for x, y in zip(values, cut, strict=True)]
        parts.append([(x >> Uint32(16)) | y for x, y in zip(cut[::2], cut[1::2], strict=True)])
    return parts


def recast(x, dtype, count):
    return cute.make_tensor(cute.recast_ptr(x.iterator, dtype=dtype), cute.make_layout(count))


def add(product, to, lefts, rights):
    """Adds the product of sums of one or two numbers, without that of the two lower ones."""
    for left, right in ((0, 0), (0, 1), (1, 0)):
        if left < len(lefts) and right < len(rights):
            cute.mma_atom_call(product, to, lefts[left], rights[right], to)


@cute.jit
def request_state(part, to, arrived, lane):
    """A warp's part, when all its lanes are done with what is there. States are read once: let them not drive out tokens,
    outputs and the update."""
    cute.arch.sync_warp()
    if lane == 0:
        size = cute.size(to) * to.element_type.width // 8
        cute.arch.mbarrier_arrive_and_expect_tx(arrived, size)
        request_bulk(part, to, arrived, size)


def request_bulk(part, to, arrived, size):
    """As cute.copy with CopyBulkG2SOp, which drops the policy it is given."""
    nvvm.cp_async_bulk_shared_cluster_global(
        dst_mem=llvm.addrspacecast(llvm.PointerType.get(SHARED_OF_CLUSTER), to.iterator.llvm_ptr),
        src_mem=part.iterator.llvm_ptr,
        mbar=arrived.llvm_ptr,
        size=Int32(size).ir_value(),
        l2_cache_hint=Int64(EVICT_FIRST).ir_value(),
    )


def factors(mine, STEPS, STATE):
    """A lane's numbers of a row of the state, of each step, as right factors."""
    own = cute.make_rmem_tensor(cute.make_layout((STEPS, 4), stride=(4, 1)), TYPES[STATE])
    cute.autovec_copy(mine, cute.make_tensor(own.iterator, cute.make_layout(4 * STEPS)))
    steps = [own[s, None] for s in range(STEPS)]
    return [halves(held(x), BFloat16) if STATE == "float32" else [x] for x in steps]


def ask(mine, reads, found, STATE):
    """Adds S k and S q to ``found``, S sums to each eight of tokens. ``mine`` [S, loads, SIDE] are a lane's rows of
    the state, ``reads`` what each eight's tokens read, [halves, steps, 8]."""
    product = atom(BFloat16)
    S, LOADS, SIDE = mine.shape
    STEPS = SIDE // 4
    for x in range(LOADS):
        rights = [factors(mine[s, x, None], STEPS, STATE) for s in range(S)]
        for step in range(STEPS):
            for read, sums in zip(reads, found, strict=True):
                lefts = [load_as(read[part, x * STEPS + step, None]) for part in range(2)]
                for s in range(S):
                    add(product, sums[s], lefts, rights[s][step])


def answer(found, values, factors_of, lefts, missing, tokens, line, column):
    """Makes u and o of S k and S q in ``found``. ``values`` are v of each eight of tokens; ``factors_of`` [2, T] multiply
    S k and S q; ``lefts`` are the [T, T] matrices, of an eight's rows the columns up to its own. v - S k of 16 rows goes by
    way of ``missing`` from lanes of a token to lanes of a row."""
    product = atom(TFloat32)
    for pair in range(0, len(found[0]), 2):
        those = range(pair, min(pair + 2, len(found[0])))
        for eight, sums in enumerate(found):
            t = eight * EIGHT + line
            of_k, of_q = (factors_of[i, t] for i in range(2))
            b_v = of_words(values[eight])
            for e in range(2):
                some = []
                for s in those:
                    x = b_v[2 * s + e] - of_k * sums[s][e]
                    some.append(select(t < tokens, x, Float32(0.0)))
                    sums[s][e] = Float32(0.0)
                    sums[s][2 + e] = of_q * sums[s][2 + e]
                write(some, missing[eight, line, 2 * column + e, None])
        cute.arch.sync_warp()
        for earlier in range(len(found)):
            both = [loaded(missing[earlier, column + 4 * half, line, None]) for half in range(2)]
            for i, s in enumerate(those):
                right = halves([x[i] for x in both], TFloat32)
                for eight in range(earlier, len(found)):
                    add(product, found[eight][s], lefts[eight][earlier], right)
        cute.arch.sync_warp()


def rows_of_state(memory, K, STATE, S, WARPS):
    """Shared memory for a state: to a warp S eights of rows, and the barrier that they have arrived at; the rows as right
    factors, SIDE numbers of each side by side to a lane.

    Of four neighbouring lanes each has SIDE numbers side by side, which belong to SIDE // 4 steps of the product. Rows are
    dealt out so that of the sums a lane has those of 2 S rows side by side.
    """
    SIDE, PART = 4 if STATE == "float32" else 8, S * 8 * K
    rows = memory.allocate_tensor(TYPES[STATE], cute.make_layout((WARPS, PART), stride=(PART, 1)), 128)
    shape, strides = (WARPS, 4, S, 2, K // (4 * SIDE), 4, SIDE), (PART, 2 * S * K, 2 * K, K, 4 * SIDE, SIDE, 1)
    fragments = cute.make_tensor(rows.iterator, cute.make_layout(shape, stride=strides))
    return rows, memory.allocate_array(Int64, WARPS), fragments
