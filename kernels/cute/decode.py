"""decode and decode_mtp: T tokens on one row's state, one after the other, in FORM

  decode            one token, the state in place;
  decode_mtp        the state after each token is an output;
  decode_mtp_paged  the state after each token goes into a slot of its own, and the first comes from one of these.

Bound: memory, V K numbers of state read and T times as many written; in small batches the latency of what follows each
other. Many small programs, in the order of addresses, each with all its state requested at once, read and write fastest. So
a program is one warp with ROWS rows of one state, in registers from token to token. It requests the slot, the token, which
needs none, and the state, one behind the other, and does what has to do with the token alone while the state is under way.

Four neighbouring lanes have a row, each 16 bytes side by side of every 64. As sums may go over K in any order these are the
left factor of a product on tensor cores as they are, if the pool is bfloat16; the right one is what the token asks of the
state, S (d k) and S (d q) with d the decay, each number as a sum of three bfloat16 numbers, which is exact. Splitting
float32 numbers takes more instructions than the sums themselves: there a lane sums over its channels. With
u = beta (v - S (d k)) the output is S (d q) + u (k . q) and the new state d S + u k. No bit depends on ROWS or FORM.
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import BFloat16, Float32, Int32, Uint32

from .product import atom, recast, registers, thirds, zeros
from .token import (
    TYPES,
    WARP,
    activated,
    exp,
    held,
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

LANES = 4  # of a row
LINES = WARP // LANES  # rows of a warp's load
SIDE_BY_SIDE = 4  # words that a lane loads at once


def operands(K, V, STATE, GATE, TOKEN, ROWS, FORM):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    inputs, o = token_inputs("N" if FORM == "decode" else "N T", STATE, TOKEN)
    if FORM == "decode_mtp":
        return inputs, [o, ("N T HV V K", STATE)], {}
    if FORM == "decode_mtp_paged":
        inputs[8] = ("N T", "int32")
        inputs.append(("N", "int32"))
    return inputs, [o, inputs[7]], {7: 1}


def at_once(STATE, ROWS, FORM):
    """Programs on a multiprocessor: with 16 rows of float32 they request as much at once as 32 with half of it."""
    if FORM != "decode":
        return 12
    return 16 if (STATE, ROWS) == ("float32", 16) else 28


def parts_of(STATE):
    """A read of the state is as many rows of the pool's dtype."""
    return 3 if STATE == "bfloat16" else 1


def pitch_of(words):
    """From one row to the next: lanes of a request then meet in no bank."""
    return words + 16


def shared_bytes(K, V, STATE, GATE, TOKEN, ROWS, FORM):
    return 2 * K * 4 + 2 * parts_of(STATE) * pitch_of(K * TYPES[STATE].width // 32) * 4


@cute.jit
def launch(
    stream: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, *others: cute.Tensor,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, ROWS: cutlass.Constexpr, FORM: cutlass.Constexpr,
):  # fmt: skip
    # Where there are no counts none is read; where there is no output for states they go into the pool.
    accepted, *others = others if FORM == "decode_mtp_paged" else (slots, *others)
    o, states = others if FORM == "decode_mtp" else (*others, state)
    n_rows, value_heads, heads = v.shape[0], state.shape[1], q.shape[len(q.shape) - 2]
    programs = value_heads * (V // ROWS)  # of a row
    decode(
        q, k, v, g, beta, A_log, dt_bias, state, slots, options, accepted, o, states,
        cute.FastDivmodDivisorV2(programs), cute.FastDivmodDivisorV2(value_heads // heads),
        K, V, STATE, GATE, TOKEN, ROWS, FORM,
    ).launch(
        grid=[n_rows * programs, 1, 1],
        block=[WARP, 1, 1],
        min_blocks_per_mp=at_once(STATE, ROWS, FORM),
        preferred_smem_carveout=100,  # percent; left out, the DSL would ask a device
        stream=stream,
    )  # fmt: skip


@cute.kernel
def decode(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, accepted: cute.Tensor,
    o: cute.Tensor, states: cute.Tensor, programs: cute.FastDivmodDivisorV2, group: cute.FastDivmodDivisorV2,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
    TOKEN: cutlass.Constexpr, ROWS: cutlass.Constexpr, FORM: cutlass.Constexpr,
):  # fmt: skip
    """The outputs and states of a padded row are zero; it reads and writes no slot."""
    lane, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    n, part = Int32(program // programs), Int32(program % programs)
    hv = part // (V // ROWS)
    h = Int32(hv // group)
    OWN = ROWS // LINES  # rows of a lane, side by side, so that outputs leave together
    line, column = part % (V // ROWS) * LINES + lane // LANES, lane % LANES  # OWN rows are a line
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
    places = (h, lane), (h, lane), (hv, lane), (hv, line), (hv,)
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
    WORDS = K * TYPES[STATE].width // 32  # of a row of the state
    LOADS, SIDE = WORDS // (LANES * SIDE_BY_SIDE), K // (WORDS // SIDE_BY_SIDE)
    s = cute.make_rmem_tensor(
        cute.make_layout((OWN, LOADS, SIDE_BY_SIDE), stride=(LOADS * SIDE_BY_SIDE, SIDE_BY_SIDE, 1)), word_of(STATE)
    )
    sources = in_loads(state, pool, value_heads, V, OWN, WORDS, STATE)
    cute.arch.sync_warp()  # or the assembler would turn the order around
    if live:
        for x in cutlass.range_constexpr(LOADS):
            for i in cutlass.range_constexpr(OWN):
                cute.autovec_copy(sources[slot, hv, line, i, x, column, None], s[i, x, None])
    cute.arch.sync_warp()

    memory = cutlass.utils.SmemAllocator()
    keys, decays = (memory.allocate_tensor(Float32, cute.make_layout(K), 16) for _ in range(2))
    PARTS, PITCH = parts_of(STATE), pitch_of(WORDS)
    reads = memory.allocate_tensor(word_of(STATE), cute.make_layout(2 * PARTS * PITCH), 16)
    o_rows = in_pieces(o, of_value, V, OWN)
    targets = in_loads(states, n_rows * tokens if FORM == "decode_mtp" else pool, value_heads, V, OWN, WORDS, STATE)
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
        cute.arch.sync_warp()  # what is written over has been read
        write(b_k, in_pieces(keys, (), K, EACH)[lane, None])
        write(decay, in_pieces(decays, (), K, EACH)[lane, None])
        for kind, values in enumerate((b_k, b_q)):
            read = [x * y for x, y in zip(values, decay, strict=True)]
            for i, words in enumerate(thirds(read) if STATE == "bfloat16" else [read]):
                to_reads = in_pieces(reads, (2 * PARTS,), PITCH, WORDS // WARP)
                cute.autovec_copy(registers(words, word_of(STATE)), to_reads[kind * PARTS + i, lane, None])
        cute.arch.sync_warp()

        # Always so. Not across a branch does the assembler move what waits for the state before what does not.
        if n_rows > 0:
            asked = in_pieces(reads, (2 * PARTS,), PITCH, SIDE_BY_SIDE)
            found = (products if STATE == "bfloat16" else sums_of_lanes)(s, asked, lane)
            found = [x + shuffled(x, 1) for x in found]
            us, os = [], []
            for value, x in zip(b_v, found, strict=True):
                other = shuffled(x, 2)
                u = b_beta * (value - select(column < 2, x, other))
                us.append(u)
                os.append(select(column < 2, other, x) + u * kq)
            if column == 0:
                write(os, o_rows[n, t, hv, line, None])
            for x in cutlass.range_constexpr(LOADS):
                if cutlass.const_expr(FORM != "decode"):
                    cute.arch.sync_warp()  # or the assembler would read all first, into more registers than there are
                mine = x * LANES + column
                of_key, of_decay = (loaded(in_pieces(y, (), K, SIDE)[mine, None]) for y in (keys, decays))
                for i in cutlass.range_constexpr(OWN):
                    before = [s[i, x, w] for w in range(SIDE_BY_SIDE)]
                    row = of_pairs(before) if STATE == "bfloat16" else before
                    after = [cute.math.fma(us[i], of_key[e], y * of_decay[e]) for e, y in enumerate(row)]
                    for w, word in enumerate(words_of(after, STATE)):
                        s[i, x, w] = word
                    if there:
                        cute.autovec_copy(s[i, x, None], targets[to, hv, line, i, x, column, None])

    for t in cutlass.range(padding, unroll=1):
        if column == 0:
            write([Float32(0.0)] * OWN, o_rows[n, t, hv, line, None])
        if cutlass.const_expr(FORM == "decode_mtp"):
            zero = registers([word_of(STATE)(0)] * SIDE_BY_SIDE, word_of(STATE))
            for x in cutlass.range_constexpr(LOADS):
                for i in cutlass.range_constexpr(OWN):
                    cute.autovec_copy(zero, targets[n * tokens + t, hv, line, i, x, column, None])


def word_of(STATE):
    """How the state is held: as a number, or as a word of two, which loops then keep in one register."""
    return Uint32 if STATE == "bfloat16" else Float32


def in_loads(x, states, value_heads, V, OWN, WORDS, STATE):
    """[states, HV, V, K], of 2^31 numbers and more, as words [states, HV, lines, OWN, loads, LANES, SIDE_BY_SIDE]."""
    load = LANES * SIDE_BY_SIDE
    shape = states, value_heads, V // OWN, OWN, WORDS // load, LANES, SIDE_BY_SIDE
    strides = wide(value_heads, V * WORDS), V * WORDS, OWN * WORDS, WORDS, load, SIDE_BY_SIDE, 1
    words = cute.recast_ptr(x.iterator, dtype=word_of(STATE))
    return cute.make_tensor(words, cute.make_layout(shape, stride=strides))


def words_of(values, STATE):
    """Rounded to the pool's dtype."""
    if STATE == "float32":
        return values
    words = recast(registers([x.to(BFloat16) for x in values], BFloat16), Uint32, len(values) // 2)
    return [words[i] for i in range(len(values) // 2)]


def products(s, reads, lane):
    """On tensor cores; columns 0 to 2 are parts of the first read, 4 to 6 of the second. Lanes 0 and 1 of a row have of
    the first, 2 and 3 of the second what neighbours have to add."""
    OWN, LOADS, _ = s.shape
    PARTS = reads.shape[0] // 2
    product = atom(BFloat16)
    line, column = lane // LANES, lane % LANES
    row = line // 4 * PARTS + cutlass.min(line % 4, PARTS - 1)  # columns 3 and 7 are not summed
    pairs = [(i, min(i + 1, OWN - 1)) for i in range(0, OWN, 2)]
    sums = [[zeros(4) for _ in range(2)] for _ in pairs]
    for x in range(LOADS):
        read = cute.make_rmem_tensor(cute.make_layout(SIDE_BY_SIDE), Uint32)
        cute.autovec_copy(reads[row, x * LANES + column, None], read)
        for step in range(2):
            two = 2 * step, 2 * step + 1
            right = recast(registers([read[w] for w in two], Uint32), BFloat16, 4)
            for pair, to in zip(pairs, sums, strict=True):
                left = recast(registers([s[i, x, w] for w in two for i in pair], Uint32), BFloat16, 8)
                cute.mma_atom_call(product, to[step], left, right, to[step])
    found = []
    for first, second in sums:
        for i in range(min(2, OWN)):
            x, y = (first[2 * i + e] + second[2 * i + e] for e in range(2))
            found.append(x + select(column % 2 == 0, y, Float32(0.0)))
    return found


def sums_of_lanes(s, reads, lane):
    """As products does, of a lane's own numbers."""
    OWN, LOADS, _ = s.shape
    column = lane % LANES
    sums = [[Float32(0.0)] * OWN for _ in range(2)]
    for x in range(LOADS):
        for kind in range(2):
            read = loaded(reads[kind, x * LANES + column, None])
            for i in range(OWN):
                for e in range(SIDE_BY_SIDE):
                    sums[kind][i] = sums[kind][i] + s[i, x, e] * read[e]
    return [select(column < 2, x, y) + shuffled(select(column < 2, y, x), 2) for x, y in zip(*sums, strict=True)]
