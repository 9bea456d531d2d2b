"""chunk, second launch: the state carried from chunk to chunk, and the outputs.

Bound: the chain of a chunk's products, one chunk after the other: four in a row, each waiting for the last. So nothing else is in
it: a program keeps its rows of the state in registers, as the left operand of all products, whose right operands come
from ``prepare`` ready to be used, requested some chunks ahead; a product's result is the next one's left operand without
leaving the registers. Outputs are computed beside the chain, so no state is written but those that training keeps.
"""

import triton
import triton.language as tl

from .chunk_tile import C, scaled, sequence_of


@triton.jit
def forward(v, k_in, k_out, q_in, A_qk, solve, rows, decay, initial_state, cu_seqlens, first_chunks, sequences_end, tokens_end,
            chunks_end, o, final_state, states,
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
    offsets_k = tl.arange(0, K)
    t = tl.arange(0, C)
    in_state = offsets_v[:, None] * K + offsets_k[None, :]
    if HAS_INITIAL_STATE:
        s = tl.load(initial_state + head.to(tl.int64) * V * K + in_state).to(tl.float32)
    else:
        s = tl.zeros([BV, K], tl.float32)
    for chunk in tl.range(first, last, num_stages=STAGES):
        tile = (row * -chunks_end + chunk) * HV + hv
        place_k = tile * C * K + t[:, None] * K + offsets_k[None, :]
        place_c = tile * C * C + t[:, None] * C + t[None, :]
        token = begin + (chunk - first) * C + t
        valid = token < end
        place_v = ((row * -tokens_end + token) * HV + hv)[:, None] * V + offsets_v[None, :]
        b_v = tl.load(v + place_v, mask=valid[:, None], other=0.0).to(tl.float32)
        b_k_in = tl.load(k_in + place_k)
        b_q_in = tl.load(q_in + place_k)
        b_k_out = tl.load(k_out + place_k)
        b_solve = tl.load(solve + place_c)
        b_A_qk = tl.load(A_qk + place_c)
        b_beta = tl.load(rows + tile * 3 * C + t)
        b_decay = tl.load(decay + tile * K + offsets_k)
        if SAVE_STATES:
            tl.store(states + tile * V * K + in_state, s.to(states.dtype.element_ty))
        if not NORMED:
            b_v *= tl.load(rows + (tile * 3 + 1) * C + t)[:, None]
        s_half, s_scale = scaled(s, 12)
        u = (tl.trans(b_v) - tl.dot(s_half, tl.trans(b_k_in)) * s_scale[:, None]) * b_beta[None, :]
        u_half, u_scale = scaled(u, 6)
        u_half = tl.dot(u_half, tl.trans(b_solve)).to(tl.float16)
        s = s * b_decay[None, :] + tl.dot(u_half, b_k_out) * u_scale[:, None]
        b_o = tl.dot(s_half, tl.trans(b_q_in)) * s_scale[:, None] + tl.dot(u_half, tl.trans(b_A_qk)) * u_scale[:, None]
        b_o *= SCALE
        if not NORMED:
            b_o *= tl.load(rows + (tile * 3 + 2) * C + t)[None, :]
        tl.store(o + place_v, tl.trans(b_o).to(o.dtype.element_ty), mask=valid[:, None])
    tl.store(final_state + head.to(tl.int64) * V * K + in_state, s.to(final_state.dtype.element_ty))
    if PACKED:
        if head // HV % -sequences_end == -sequences_end - 1:  # tokens behind the row's last sequence
            for token in tl.range(end, -tokens_end, C):
                place_v = ((row * -tokens_end + token + t) * HV + hv)[:, None] * V + offsets_v[None, :]
                zero = tl.zeros([C, BV], o.dtype.element_ty)
                tl.store(o + place_v, zero, mask=(token + t < -tokens_end)[:, None])
