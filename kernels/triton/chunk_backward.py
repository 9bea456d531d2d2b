"""chunk's backward pass, the chain: the state's cotangent carried from the last chunk to the first.

Bound and means are those of the forward chain (chunk_forward.py), which this mirrors: rows of the cotangent stay in
registers, everything else comes from ``prepare``. It leaves what each chunk needs to be differentiated on its own: the
cotangent of its last state, and that of the solved system's right-hand side.
"""

import triton
import triton.language as tl

from .chunk_tile import C, power_scale, sequence_of


@triton.jit
def backward(do, k_in, k_out, q_in, A_qk, solve, rows, decay, dstate, cu_seqlens, first_chunks, sequences_end, tokens_end,
             chunks_end, dsolved, dstates, dinitial_state,
             HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PACKED: tl.constexpr,
             SCALE: tl.constexpr, NORMED: tl.constexpr, HAS_INITIAL_STATE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program a sequence, value head and BV rows of the cotangent [V, K]; tokens are columns here."""
    program = tl.program_id(0)
    head = program // (V // BV)
    hv = head % HV
    row, first, last, begin, end = sequence_of(head, tokens_end, chunks_end, cu_seqlens, first_chunks, sequences_end, HV,
                                               PACKED)  # fmt: skip
    offsets_v = (program % (V // BV)) * BV + tl.arange(0, BV)
    t = tl.arange(0, C)
    PARTS: tl.constexpr = K // C
    in_state = head.to(tl.int64) * V * K + offsets_v[:, None] * K + t[None, :]
    ds = ()
    for part in tl.static_range(PARTS):
        ds = ds + (tl.load(dstate + in_state + part * C).to(tl.float32),)
    for back in tl.range(0, last - first, num_stages=STAGES):
        chunk = last - 1 - back
        tile = (row * -chunks_end + chunk) * HV + hv
        place_k = (tile * C + t[:, None]) * K + t[None, :]
        place_c = (tile * C + t[:, None]) * C + t[None, :]
        token = begin + (chunk - first) * C + t
        place_v = ((row * -tokens_end + token) * HV + hv)[:, None] * V + offsets_v[None, :]
        b_do = tl.trans(tl.load(do + place_v, mask=(token < end)[:, None], other=0.0)).to(tl.float32) * SCALE
        b_beta = tl.load(rows + tile * 3 * C + t)
        if not NORMED:
            b_do *= 1 / tl.load(rows + (tile * 3 + 2) * C + t)[None, :]
        largest = tl.abs(b_do)
        for part in tl.static_range(PARTS):
            tl.store(dstates + (tile * V + offsets_v[:, None]) * K + t[None, :] + part * C,
                     ds[part].to(dstates.dtype.element_ty))  # fmt: skip
            largest = tl.maximum(largest, tl.abs(ds[part]))
        up, down = power_scale(tl.max(largest, axis=1), 5)

        half_do = (b_do * up[:, None]).to(tl.float16)
        du = tl.dot(half_do, tl.load(A_qk + place_c))
        for part in tl.static_range(PARTS):
            half = (ds[part] * up[:, None]).to(tl.float16)
            du = tl.dot(half, tl.trans(tl.load(k_out + place_k + part * C)), du)
        b_dsolved = tl.dot(du.to(tl.float16), tl.load(solve + place_c))
        b_dr = (b_dsolved * -b_beta[None, :]).to(tl.float16)
        before = ()
        for part in tl.static_range(PARTS):
            gain = tl.dot(half_do, tl.load(q_in + place_k + part * C))
            gain = tl.dot(b_dr, tl.load(k_in + place_k + part * C), gain)
            b_decay = tl.load(decay + tile * K + part * C + t)
            before = before + (ds[part] * b_decay[None, :] + gain * down[:, None],)
        ds = before
        place_v = (tile * C + t[:, None]) * V + offsets_v[None, :]
        tl.store(dsolved + place_v, tl.trans((b_dsolved * down[:, None]).to(dsolved.dtype.element_ty)))
    if HAS_INITIAL_STATE:
        for part in tl.static_range(PARTS):
            tl.store(dinitial_state + in_state + part * C, ds[part].to(dinitial_state.dtype.element_ty))
