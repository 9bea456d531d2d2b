"""decode and decode_mtp: T tokens on one row's state, one after the other, in FORM

  decode            one token, the state in place;
  decode_mtp        the state after each token is an output;
  decode_mtp_paged  the state after each token goes into a slot of its own, and the first comes from one of these.

Bound: memory, V K numbers of state read and T times as many written; in small batches the latency of what follows each
other. Many small programs in the order of addresses, each with all its state requested at once, read and write fastest. So
a program is one warp with 16 rows of a bfloat16 state or 8 of a float32 one, 4 KiB, which come into shared memory and leave
it by one bulk copy. It requests the slot, then the token, which needs none, then the state, and does what has to do with
the token alone while the state is under way.

Neighbouring lanes have two rows, each lane 16 bytes side by side and as much again further on. If the pool is bfloat16 they
are four: as sums may go over K in any order, that is the left factor of a product on tensor cores as it is. The right one
is what the token asks of the state, S (d k) and S (d q) with d the decay, each number as a sum of three bfloat16 numbers,
which is exact. Splitting float32 numbers takes more instructions than the sums themselves: there a lane sums over its
channels, and eight have a row, so that those of a request meet in no bank. With u = beta (v - S (d k)) the output is
S (d q) + u (k . q) and the new state d S + u k. No bit depends on FORM.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Int64, Uint32
from cutlass.cute.nvgpu import cpasync

from .product import atom, recast, registers, thirds, zeros
from .token import (
    TYPES,
    WARP,
    activated,
    exp,
    held,
    in_pairs,
    in_pieces,
    loaded,
    log_decays,
    numbers_of,
    of_pairs,
    select,
    shuffled,
    slot_of,
    token_inputs,
    wide,
    within,
    write,
)

OWN = 2  # rows of a lane, side by side, so that outputs leave together
SIDE_BY_SIDE = 4  # words that a lane reads at once


def operands(K, V, STATE, GATE, TOKEN, FORM):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N" if FORM == "decode" else "N T", STATE, TOKEN)
    if FORM == "decode_mtp":
        return inputs, [o, ("N T HV V K", STATE)], {}
    if FORM == "decode_mtp_paged":
        inputs[8] = ("N T", "int32")
        inputs.append(("N", "int32"))
    return inputs, [o, inputs[7]], {7: 1}


def lanes_of(STATE):
    """Those that have the same rows."""
    return 4 if STATE == "bfloat16" else 8


def rows_of(STATE):
    """Of a program."""
    return WARP // lanes_of(STATE) * OWN


def places_of(FORM):
    """In shared memory, for a program's rows: a token's new state goes where that of the token before is not stored from."""
    return 1 if FORM == "decode" else 2


def at_once(FORM):
    """Programs on a multiprocessor."""
    return 28 if FORM == "decode" else 16


def words_of_row(K, STATE):
    return K * TYPES[STATE].width // 32


def parts_of(STATE):
    """A read of the state is as many rows of the pool's dtype."""
    return 3 if STATE == "bfloat16" else 1


def pitch_of(words):
    """From one row to the next: lanes of a request then meet in no bank."""
    return words + 16


def shared_bytes(K, V, STATE, GATE, TOKEN, FORM):
    words = words_of_row(K, STATE)
    return 4 * (places_of(FORM) * rows_of(STATE) * words + 2 * K + 2 * parts_of(STATE) * pitch_of(words)) + 8


@cute.jit
def launch(
    stream: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, *others: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, FORM: cutlass.Constexpr,
):  # fmt: skip
    # Where there are no counts none is read; where there is no output for states they go into the pool.
    accepted, *others = others if FORM == "decode_mtp_paged" else (slots, *others)
    o, states = others if FORM == "decode_mtp" else (*others, state)
    n_rows, value_heads, heads = v.shape[0], state.shape[1], q.shape[len(q.shape) - 2]
    programs = value_heads * (V // rows_of(STATE))  # of a row
    decode(
        q, k, v, g, beta, A_log, dt_bias, state, slots, options, accepted, o, states,
        cute.FastDivmodDivisorV2(programs), cute.FastDivmodDivisorV2(value_heads // heads),
        K, V, STATE, GATE, TOKEN, FORM,
    ).launch(
        grid=[n_rows * programs, 1, 1],
        block=[WARP, 1, 1],
        min_blocks_per_mp=at_once(FORM),
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )  # fmt: skip


@cute.kernel
def decode(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, accepted: cute.Tensor,
    o: cute.Tensor, states: cute.Tensor, programs: cute.FastDivmodDivisorV2, group: cute.FastDivmodDivisorV2,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, FORM: cutlass.Constexpr,
):  # fmt: skip
    """The outputs and states of a padded row are zero; it reads and writes no slot."""
    lane, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    n, part = Int32(program // programs), Int32(program % programs)
    ROWS, LANES = rows_of(STATE), lanes_of(STATE)
    LINES = WARP // LANES  # OWN rows are a line
    hv = part // (V // ROWS)
    h = Int32(hv // group)
    line, column = lane // LANES, lane % LANES
    lines = part % (V // ROWS) * LINES + line  # before and with that of the lane, in the head
    n_rows, value_heads, heads, pool = v.shape[0], state.shape[1], q.shape[len(q.shape) - 2], state.shape[0]
    tokens = 1 if FORM == "decode" else v.shape[1]

    # Where the state is, then the first token, then the state: so the token does not wait for the slot, too.
    if cutlass.const_expr(FORM == "decode_mtp_paged"):
        count, where = accepted[n], slots[n, 0]
    else:
        slot, live = slot_of(slots, pool, n)
    of_query, of_value = (n_rows, tokens, heads), (n_rows, tokens, value_heads)
    EACH = K // WARP
    arrays = (
        *(in_pieces(x, lead, K, EACH) for x, lead in ((q, of_query), (k, of_query), (g, of_value))),
        in_pieces(v, of_value, V, OWN),
        in_pieces(beta, (n_rows, tokens), value_heads, 1),
    )
    places = (h, lane), (h, lane), (hv, lane), (hv, lines), (hv,)
    token = [cute.make_rmem_tensor(cute.make_layout(size), TYPES[TOKEN]) for size in (EACH, EACH, EACH, OWN, 1)]
    for x, place, to in zip(arrays, places, token, strict=True):
        cute.autovec_copy(x[n, 0, *place, None], to)
    # Gate parameters that all rows share have one row.
    rate = A_log[cutlass.min(n, A_log.shape[0] - 1), hv]
    biases = in_pieces(dt_bias, (dt_bias.shape[0], value_heads), K, EACH)
    bias = loaded(biases[cutlass.min(n, dt_bias.shape[0] - 1), hv, lane, None])
    chosen = numbers_of(options)
    if cutlass.const_expr(FORM == "decode_mtp_paged"):
        if tokens > 1:
            where = slots[n, cutlass.min(cutlass.max(count, 1), tokens) - 1]
        slot, live = within(pool, where)
        live = live & (count > 0) & (count <= tokens)  # another count makes padding
    WORDS = words_of_row(K, STATE)
    LOADS, SIDE, TILE = WORDS // (LANES * SIDE_BY_SIDE), K // (WORDS // SIDE_BY_SIDE), ROWS * WORDS
    memory = cutlass.utils.SmemAllocator()
    tiles = memory.allocate_tensor(word_of(STATE), cute.make_layout((places_of(FORM), TILE), stride=(TILE, 1)), 128)
    keys, decays = (memory.allocate_tensor(Float32, cute.make_layout(K), 16) for _ in range(2))
    PARTS, PITCH = parts_of(STATE), pitch_of(WORDS)
    reads = memory.allocate_tensor(word_of(STATE), cute.make_layout(2 * PARTS * PITCH), 16)
    arrived = memory.allocate_array(Int64, 1)
    load, store = (
        cute.make_copy_atom(kind(), word_of(STATE), num_bits_per_copy=TILE * 32)
        for kind in (cpasync.CopyBulkG2SOp, cpasync.CopyBulkS2GOp)
    )
    cute.arch.sync_warp()  # or the assembler would turn the order around
    if lane == 0:
        cute.arch.mbarrier_init(arrived, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_warp()
    of_head = V // ROWS  # tiles
    if lane == 0:
        source = in_tiles(state, pool * value_heads * of_head, TILE, STATE)[slot * value_heads * of_head + part, None]
        if live:
            cute.arch.mbarrier_arrive_and_expect_tx(arrived, TILE * 4)
            cute.copy(load, source, tiles[0, None], mbar_ptr=arrived)
    cute.arch.sync_warp()

    held_by = (places_of(FORM), LINES, OWN, LOADS, LANES, SIDE_BY_SIDE)
    strides = (TILE, OWN * WORDS, WORDS, LANES * SIDE_BY_SIDE, SIDE_BY_SIDE, 1)
    by_lane = cute.make_tensor(tiles.iterator, cute.make_layout(held_by, stride=strides))
    o_rows = in_pieces(o, of_value, V, OWN)
    targets = in_tiles(
        states, states.shape[0] * value_heads * of_head * (tokens if FORM == "decode_mtp" else 1), TILE, STATE
    )
    padding = select(live, Int32(0), Int32(tokens))
    for t in cutlass.range(tokens - padding, unroll=1):
        b_q, b_k, b_g, b_v, (b_beta,) = (held(x) for x in token)
        to, there = slot, True
        if cutlass.const_expr(FORM != "decode"):
            later = cutlass.min(t + 1, tokens - 1)
            for x, place, into in zip(arrays, places, token, strict=True):
                cute.autovec_copy(x[n, later, *place, None], into)
            to = n * tokens + t
        if cutlass.const_expr(FORM == "decode_mtp_paged"):
            to, there = within(pool, slots[n, t])
        decay = [exp(x) for x in log_decays(b_g, rate, bias, chosen, GATE)]
        b_q, b_k, b_beta, kq = activated(b_q, b_k, b_beta, chosen)
        if cutlass.const_expr(FORM != "decode"):
            cute.arch.cp_async_bulk_wait_group(1, read=True)
        cute.arch.sync_warp()  # what is written over has been read
        write(b_k, in_pieces(keys, (), K, EACH)[lane, None])
        write(decay, in_pieces(decays, (), K, EACH)[lane, None])
        for kind, values in enumerate((b_k, b_q)):
            read = [x * y for x, y in zip(values, decay, strict=True)]
            for i, words in enumerate(thirds(read) if STATE == "bfloat16" else [read]):
                to_reads = in_pieces(reads, (2 * PARTS,), PITCH, WORDS // WARP)
                cute.autovec_copy(registers(words, word_of(STATE)), to_reads[kind * PARTS + i, lane, None])
        cute.arch.sync_warp()

        cute.arch.mbarrier_wait(arrived, 0)  # the first time, if at all
        before, after = (0, 0) if FORM == "decode" else (t % 2, (t + 1) % 2)
        s = cute.make_rmem_tensor(
            cute.make_layout((OWN, LOADS, SIDE_BY_SIDE), stride=(LOADS * SIDE_BY_SIDE, SIDE_BY_SIDE, 1)), word_of(STATE)
        )
        for x in cutlass.range_constexpr(LOADS):
            for i in cutlass.range_constexpr(OWN):
                cute.autovec_copy(by_lane[before, line, i, x, column, None], s[i, x, None])
        asked = in_pieces(reads, (2 * PARTS,), PITCH, SIDE_BY_SIDE)
        found = (products if STATE == "bfloat16" else sums_of_lanes)(s, asked, line, column)
        found = [x + shuffled(x, 1) for x in found]
        us, os, of_first = [], [], column & 2 == 0
        for value, x in zip(b_v, found, strict=True):
            other = shuffled(x, 2)
            u = b_beta * (value - select(of_first, x, other))
            us.append(u)
            os.append(select(of_first, other, x) + u * kq)
        if column == 0:
            write(os, o_rows[n, t, hv, lines, None])
        for x in cutlass.range_constexpr(LOADS):
            mine = x * LANES + column
            of_key, of_decay = (loaded(in_pieces(y, (), K, SIDE)[mine, None]) for y in (keys, decays))
            for i in cutlass.range_constexpr(OWN):
                words = [s[i, x, w] for w in range(SIDE_BY_SIDE)]
                row = of_pairs(words) if STATE == "bfloat16" else words
                row = advanced(row, of_decay, us[i], of_key)
                cute.autovec_copy(registers(words_of(row, STATE), word_of(STATE)), by_lane[after, line, i, x, column, None])
        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_warp()
        if lane == 0:
            if there:
                cute.copy(store, tiles[after, None], targets[to * value_heads * of_head + part, None])
            cute.arch.cp_async_bulk_commit_group()
    cute.arch.cp_async_bulk_wait_group(0, read=True)  # or the place would be another program's

    for t in cutlass.range(padding, unroll=1):
        if column == 0:
            write([Float32(0.0)] * OWN, o_rows[n, t, hv, lines, None])
        if cutlass.const_expr(FORM == "decode_mtp"):
            for i in cutlass.range(TILE // WARP):
                targets[(n * tokens + t) * value_heads * of_head + part, i * WARP + lane] = word_of(STATE)(0)


def advanced(s, decay, u, key):
    """A lane's numbers of a row."""

    def single(s, d, u, k):
        return cute.math.fma(u, k, s * d)

    def packed(s, d, u, k):
        return cute.arch.fma_packed_f32x2(u, k, cute.arch.mul_packed_f32x2(s, d))

    return in_pairs(single, packed, s, decay, [u] * len(s), key)


def word_of(STATE):
    """What the state is held in: numbers, or words of two."""
    return Uint32 if STATE == "bfloat16" else Float32


def in_tiles(x, tiles, words, STATE):
    """[..., HV, V, K], of 2^31 numbers and more, as words [tiles, words]."""
    layout = cute.make_layout((tiles, words), stride=(wide(1, words), 1))
    return cute.make_tensor(cute.recast_ptr(x.iterator, dtype=word_of(STATE)), layout)


def words_of(values, STATE):
    """Rounded to the pool's dtype."""
    if STATE == "float32":
        return values
    words = recast(registers([x.to(BFloat16) for x in values], BFloat16), Uint32, len(values) // 2)
    return [words[i] for i in range(len(values) // 2)]


def products(s, reads, line, column):
    """On tensor cores; columns 0 to 2 are parts of the first read, 4 to 6 of the second. Lanes 0 and 1 of a row have of
    the first, 2 and 3 of the second what neighbours have to add."""
    _, LOADS, _ = s.shape
    LANES, PARTS = 4, reads.shape[0] // 2
    product = atom(BFloat16)
    row = line // 4 * PARTS + cutlass.min(line % 4, PARTS - 1)  # columns 3 and 7 are not summed
    sums = zeros(4), zeros(4)  # the second product need not wait for the first
    for x in range(LOADS):
        read = cute.make_rmem_tensor(cute.make_layout(SIDE_BY_SIDE), Uint32)
        cute.autovec_copy(reads[row, x * LANES + column, None], read)
        for step, to in enumerate(sums):
            two = 2 * step, 2 * step + 1
            left = recast(registers([s[i, x, w] for w in two for i in range(2)], Uint32), BFloat16, 8)
            right = recast(registers([read[w] for w in two], Uint32), BFloat16, 4)
            cute.mma_atom_call(product, to, left, right, to)
    first, second = sums
    found = []
    for i in range(2):
        x, y = (first[2 * i + e] + second[2 * i + e] for e in range(2))
        found.append(x + select(column % 2 == 0, y, Float32(0.0)))
    return found


def sums_of_lanes(s, reads, line, column):
    """As products does, of a lane's own numbers; lanes 4 to 7 have what 0 to 3 have."""
    _, LOADS, _ = s.shape
    LANES = 8
    sums = [[Float32(0.0)] * OWN for _ in range(2)]
    for x in range(LOADS):
        for kind in range(2):
            read = loaded(reads[kind, x * LANES + column, None])
            for i in range(OWN):
                for e in range(SIDE_BY_SIDE):
                    sums[kind][i] = sums[kind][i] + s[i, x, e] * read[e]
    of_first = column & 2 == 0
    sums = [select(of_first, x, y) + shuffled(select(of_first, y, x), 2) for x, y in zip(*sums, strict=True)]
    return [x + shuffled(x, 4) for x in sums]
