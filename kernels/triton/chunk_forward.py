"""chunk, second launch: the state carried from chunk to chunk, and the outputs.

Bound: the chain of a chunk's products, one chunk after the other: four in a row, each waiting for the last. So nothing else
is in it: a program keeps its rows of the state in registers, as the left operand of all products, whose right operands come
from ``prepare`` ready to be used, requested some chunks ahead; a product's result is the next one's left operand without
leaving the registers. Outputs are computed beside the chain, so no state is written but those that training keeps.
"""

import triton
import triton.language as tl

from .chunk_tile import C, power_scale, sequence_of


@triton.jit
def forward(v, k_in, k_out, q_in, A_qk, solve, rows, decay, initial_state, cu_seqlens, first_chunks, sequences_end,
            tokens_end, chunks_end, o, final_state, states,
            HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
            SCALE: tl.constexpr, NORMED: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, SAVE_STATES: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """One program a sequence, value head and BV rows of its state [V, K]; tokens are columns here."""
    program = tl.program_id(0)
    head = program // (V // BV)
    hv = head % HV
    row, first, last, begin, end = sequence_of(head, tokens_end, chunks_end, cu_seqlens, first_chunks, sequences_end, HV,
                                               PACKED)  # fmt: skip
    offsets_v = (program % (V // BV)) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    # K in parts of C: then all products have one shape, and their results one layout.
    PARTS: tl.constexpr = K // C
    in_state = head.to(tl.int64) * V * K + offsets_v[:, None] * K + t[None, :]
    s = ()
    for part in tl.static_range(PARTS):
        if HAS_INITIAL_STATE:
            s = s + (tl.load(initial_state + in_state + part * C).to(tl.float32),)
        else:
            s = s + (tl.zeros([BV, C], tl.float32),)
    for chunk in tl.range(first, last, num_stages=STAGES):
        tile = (row * -chunks_end + chunk) * HV + hv
        place_k = (tile * C + t[:, None]) * K + t[None, :]
        place_c = (tile * C + t[:, None]) * C + t[None, :]
        token = begin + (chunk - first) * C + t
        place_v = ((row * -tokens_end + token) * HV + hv)[:, None] * V + offsets_v[None, :]
        b_v = tl.trans(tl.load(v + place_v, mask=(token < end)[:, None], other=0.0)).to(tl.float32)
        b_beta = tl.load(rows + tile * 3 * C + t)
        if not NORMED:
            b_v *= tl.load(rows + (tile * 3 + 1) * C + t)[None, :]
        largest = tl.abs(b_v)
        for part in tl.static_range(PARTS):
            if SAVE_STATES:
                tl.store(states + (tile * V + offsets_v[:, None]) * K + t[None, :] + part * C,
                         s[part].to(states.dtype.element_ty))  # fmt: skip
            largest = tl.maximum(largest, tl.abs(s[part]))
        up, down = power_scale(tl.max(largest, axis=1), 7)

        u = b_v * up[:, None]
        b_o = tl.zeros([BV, C], tl.float32)
        reads = tl.zeros([BV, C], tl.float32)
        for part in tl.static_range(PARTS):
            half = (s[part] * up[:, None]).to(tl.float16)
            reads = tl.dot(half, tl.trans(tl.load(k_in + place_k + part * C)), reads)
            b_o = tl.dot(half, tl.trans(tl.load(q_in + place_k + part * C)), b_o)
        u = ((u - reads) * b_beta[None, :]).to(tl.float16)
        u = tl.dot(u, tl.trans(tl.load(solve + place_c))).to(tl.float16)
        after = ()
        for part in tl.static_range(PARTS):
            gain = tl.dot(u, tl.load(k_out + place_k + part * C))
            b_decay = tl.load(decay + tile * K + part * C + t)
            after = after + (s[part] * b_decay[None, :] + gain * down[:, None],)
        s = after
        b_o = tl.dot(u, tl.trans(tl.load(A_qk + place_c)), b_o) * (down * SCALE)[:, None]
        if not NORMED:
            b_o *= 1 / tl.load(rows + (tile * 3 + 2) * C + t)[None, :]
        tl.store(o + place_v, tl.trans(b_o.to(o.dtype.element_ty)), mask=(token < end)[:, None])
    for part in tl.static_range(PARTS):
        tl.store(final_state + in_state + part * C, s[part].to(final_state.dtype.element_ty))
    if PACKED and head // HV % -sequences_end == -sequences_end - 1:  # tokens behind the row's last sequence
        for token in tl.range(end, -tokens_end, C):
            place_v = ((row * -tokens_end + token + t) * HV + hv)[:, None] * V + offsets_v[None, :]
            zero = tl.zeros([C, BV], o.dtype.element_ty)
            tl.store(o + place_v, zero, mask=(token + t < -tokens_end)[:, None])
