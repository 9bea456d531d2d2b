"""flush: the state of every row advanced over its accepted tokens, in place.

Bound: memory, as decode: 2 V K numbers of state to T (2 V + K) of the update. So programs are small, take states in the
order of their addresses, and make two round trips: for where the state is and, not waiting for that, for the tokens, into
shared memory; then for all of their state at once, into registers. While it is under way each thread goes backwards over the
tokens in one channel, for the decay from each to the last accepted one. With it on the keys, what the tokens add is one
product on tensor cores, [V, T] x [T, K], eight tokens at a time, factors taken as sums of two TF32 numbers: the work is the
same whatever was accepted. A product may have its columns in any order, so a lane loads 16 bytes side by side of where its
sums will be. Rows that accepted nothing, and padded ones, are neither loaded nor stored.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, TFloat32

from .product import add, atom, halves, zeros
from .token import TYPES, WARP, exp, held, loaded, select, slot_of, wide, write

ROWS = 16  # of the state to a warp, and to a product
EIGHT = 8  # tokens of a product
# By the pool's dtype and whether tokens may be more than eight: programs of 128 threads on a multiprocessor.
AT_ONCE = {("bfloat16", False): 7, ("bfloat16", True): 2, ("float32", False): 4, ("float32", True): 2}


def operands(K, V, STATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    state = ("P HV V K", STATE)
    update = [("N T HV V", "float32"), ("N T H K", "float32"), ("N T HV K", "float32")]
    return [*update, state, ("N", "int32"), ("N", "int32")], [state], {3: 0}


def pitch(K):
    """From the keys of two tokens to those of the next two: lanes of a request then meet in no bank."""
    return 2 * K + 8


def u_pitch(K):
    """From a token's u to the next one's, of the K / 2 rows that a program has."""
    return K // 2 + 4


def shared_bytes(K, V, STATE):
    return (EIGHT * (u_pitch(K) + 2 * K + pitch(K)) + K) * 4


@cute.jit
def launch(
    stream: cuda.CUstream,
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr,
):  # fmt: skip
    if u.shape[1] <= EIGHT:
        enqueue(stream, (u, k, g, state, slots, accepted), K, V, STATE, False)
    else:
        enqueue(stream, (u, k, g, state, slots, accepted), K, V, STATE, True)


def enqueue(stream, arrays, K, V, STATE, MANY):
    u = arrays[0]
    flush(*arrays, K, V, STATE, MANY).launch(
        grid=[u.shape[0] * u.shape[2] * (V // (K // WARP * ROWS)), 1, 1],
        block=[K, 1, 1],
        min_blocks_per_mp=AT_ONCE[STATE, MANY] * (128 // K),
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )


def packed(x, shape):
    """``x``, whose numbers are fewer than 2^31 and lie in one piece, as an array of another shape."""
    strides, size = [], 1
    for extent in reversed(shape):
        strides.insert(0, size)
        size = extent * size
    return cute.make_tensor(x.iterator, cute.make_layout(shape, stride=tuple(strides)))


def request(arrays, tokens, n, t, heads, part, PARTS, thread):
    """Eight tokens from t on, into shared memory, 16 bytes a thread at once."""
    mode = cute.nvgpu.cpasync.LoadCacheMode.GLOBAL
    load = cute.make_copy_atom(cute.nvgpu.cpasync.CopyG2SOp(mode), Float32, num_bits_per_copy=128)
    THREADS = tokens[1].shape[1]
    parts = (part, PARTS), (0, 1), (0, 1)  # of u what the program's rows want
    for x, to, head, (which, count) in zip(arrays, tokens, heads, parts, strict=True):
        COUNT = to.shape[1] // 4  # of threads to a token
        pieces = packed(x, (*x.shape[:3], count, COUNT, 4))
        places = cute.make_tensor(to.iterator, cute.make_layout((EIGHT, COUNT, 4), stride=(to.layout.stride[0], 4, 1)))
        for first in range(0, EIGHT, THREADS // COUNT):
            i, piece = first + thread // COUNT, thread % COUNT
            there = cutlass.min(t + i, x.shape[1] - 1)
            cute.copy(load, pieces[n, there, head, which, piece, None], places[i, piece, None])
    cute.arch.cp_async_commit_group()


def share(tokens, left, keys, decays, thread, row, column):
    """Of eight tokens, the first ``left`` accepted: writes what all warps want of them, returns a lane's factors of u."""
    u, k, g = tokens
    after, found = Float32(0.0), []  # the log decay from a token to the last accepted one
    for i in reversed(range(EIGHT)):
        found.insert(0, select(i < left, k[i, thread] * exp(after), Float32(0.0)))
        after = after + select(i < left, g[i, thread], Float32(0.0))
    for part, some in enumerate(halves(found, TFloat32)):
        pairs = cute.make_tensor(some.iterator, cute.make_layout((EIGHT // 2, 2), stride=(2, 1)))
        for pair in range(EIGHT // 2):
            cute.autovec_copy(pairs[pair, None], keys[part, pair, thread, None])
    decays[thread] = exp(after)
    pairs = cute.make_tensor(u.iterator, cute.make_layout((EIGHT, u.shape[1] // 2, 2), stride=(u.layout.stride[0], 2, 1)))
    known = []
    for e in range(2):
        known += [select(2 * column + e < left, x, Float32(0.0)) for x in loaded(pairs[2 * column + e, row // 2, None])]
    return halves(known, TFloat32)


def advanced(rows, x, updates, keys, decays, line, column):
    """A lane's part of two rows, of load x, over eight tokens."""
    product = atom(TFloat32)
    decay = loaded(decays[x, column, None])
    new = [[None] * len(decay) for _ in range(2)]
    for quad in range(len(decay) // 4):
        rights = []
        for part in range(2):
            own = cute.make_rmem_tensor(cute.make_layout(4), TFloat32)  # two columns of two tokens
            cute.autovec_copy(keys[part, column, x, line // 2, quad, line % 2, None], own)
            rights.append(cute.make_tensor(own.iterator, cute.make_layout((2, 2), stride=(2, 1))))
        for s in range(2):
            added = zeros(4)
            add(product, added, updates, [own[s, None] for own in rights])
            for i in range(2):
                for e in range(2):
                    c = quad * 4 + 2 * e + s
                    new[i][c] = rows[i, x, c].to(Float32) * decay[c] + added[2 * i + e]
    return new


@cute.kernel
def flush(
    u: cute.Tensor, k: cute.Tensor, g: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, accepted: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, MANY: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    lane, warp = thread % WARP, thread // WARP
    line, column = lane // 4, lane % 4  # of a product's fragments
    value_heads, PARTS = u.shape[2], V // (K // WARP * ROWS)
    part, hv, n = program % PARTS, program // PARTS % value_heads, program // PARTS // value_heads
    h = hv * k.shape[2] // value_heads
    row = warp * ROWS + 2 * line  # the first of a lane's two, which are side by side
    slot, live = slot_of(slots, state.shape[0], n)
    taken = cutlass.min(accepted[n], u.shape[1])
    cute.arch.sync_warp()  # or the assembler would turn the order of requests around, here and below

    memory = cutlass.utils.SmemAllocator()
    layouts = [cute.make_layout((EIGHT, K // 2), stride=(u_pitch(K), 1))] + [cute.make_layout((EIGHT, K), stride=(K, 1))] * 2
    tokens = [memory.allocate_tensor(Float32, layout, 128) for layout in layouts]
    SIDE = 128 // TYPES[STATE].width
    LOADS = K // (4 * SIDE)
    shape = state.shape[0], value_heads, V, LOADS, 4, SIDE
    strides = wide(value_heads, V * K), V * K, K, 4 * SIDE, SIDE, 1
    places = cute.make_tensor(state.iterator, cute.make_layout(shape, stride=strides))
    shape, strides = (2, EIGHT // 2, K, 2), (EIGHT // 2 * pitch(K), pitch(K), 2, 1)  # halves, pairs of tokens
    keys = memory.allocate_tensor(TFloat32, cute.make_layout(shape, stride=strides), 128)
    shape, strides = (2, EIGHT // 2, LOADS, 4, SIDE // 4, 2, 4), (*strides[:2], 8 * SIDE, 2 * SIDE, 8, 4, 1)
    keys_fragments = cute.make_tensor(keys.iterator, cute.make_layout(shape, stride=strides))
    decays = memory.allocate_tensor(Float32, cute.make_layout(K), 128)
    decays_fragments = cute.make_tensor(decays.iterator, cute.make_layout((LOADS, 4, SIDE), stride=(4 * SIDE, SIDE, 1)))

    where = (hv, h, hv), part, PARTS
    if cutlass.const_expr(not MANY):
        request((u, k, g), tokens, n, 0, *where, thread)
    if live & (taken > 0):
        first = part * (K // 2) + row
        own = cute.make_layout((2, LOADS, SIDE), stride=(LOADS * SIDE, SIDE, 1))
        raw = cute.make_rmem_tensor(own, TYPES[STATE])
        for x in cutlass.range_constexpr(LOADS):
            for i in cutlass.range_constexpr(2):
                cute.autovec_copy(places[slot, hv, first + i, x, column, None], raw[i, x, None])
        cute.arch.sync_warp()
        if cutlass.const_expr(not MANY):
            cute.arch.cp_async_wait_group(0)
            cute.arch.sync_threads()
            updates = share(tokens, taken, keys, decays, thread, row, column)
            cute.arch.sync_threads()
            for x in cutlass.range_constexpr(LOADS):
                for i, new in enumerate(advanced(raw, x, updates, keys_fragments, decays_fragments, line, column)):
                    write(new, places[slot, hv, first + i, x, column, None])
                cute.arch.sync_warp()  # or the assembler would start all loads' work at once, which takes more registers
        else:
            rows = cute.make_rmem_tensor(own, Float32)
            for x in cutlass.range_constexpr(LOADS):
                for i in cutlass.range_constexpr(2):
                    write(held(raw[i, x, None]), rows[i, x, None])
            for t in cutlass.range(0, taken, EIGHT):
                request((u, k, g), tokens, n, t, *where, thread)
                cute.arch.cp_async_wait_group(0)
                cute.arch.sync_threads()
                updates = share(tokens, taken - t, keys, decays, thread, row, column)
                cute.arch.sync_threads()
                for x in cutlass.range_constexpr(LOADS):
                    for i, new in enumerate(advanced(rows, x, updates, keys_fragments, decays_fragments, line, column)):
                        write(new, rows[i, x, None])
                    cute.arch.sync_warp()
            for x in cutlass.range_constexpr(LOADS):
                for i in cutlass.range_constexpr(2):
                    write(held(rows[i, x, None]), places[slot, hv, first + i, x, column, None])
    cute.arch.cp_async_wait_group(0)  # also where nothing was done with what was requested
