"""chunk's backward pass, third launch: the cotangents of what a chunk's products were made of, for all chunks at once.

Bound: memory, about 0.17 MB a chunk and value head at K = V = 128, the chunk's first state the largest part; 5 MFLOP. What
the forward pass did not keep is computed again from that state. The gradients of v and beta are done here.

The cotangents of A_qk and A_kk leave as float16, scaled by a power of two that takes the larger of them near 2^6.
"""

import triton
import triton.language as tl

from .chunk_tile import C, chunk_of, power_scale


@triton.jit
def cotangents(v, beta, do, states, dsolved, k_in, A_kk, solve, rows, cu_seqlens, bounds, sequences_end, tokens_end,
               chunks_end, dv, dbeta, u, dA_qk, dA_kk, scales,
               HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, NORMED: tl.constexpr,
               BETA_RANGE: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """One program a chunk and value head.

    dA_kk is that of A_kk plus its transpose. ``scales`` [B, NC, HV] is what the numbers of dA_qk and dA_kk count.
    """
    program = tl.program_id(0)
    item = program // HV
    hv = program % HV
    row, begin, end = chunk_of(item, tokens_end, chunks_end, bounds, PACKED)
    t = tl.arange(0, C)
    i = tl.arange(0, C)[None, :]
    if PACKED:  # tokens behind the row's last sequence, a chunk's worth a program
        behind = tl.load(cu_seqlens + row * (1 - sequences_end) - sequences_end) + (item % -chunks_end) * C + t
        place = (row * -tokens_end + behind) * HV + hv
        tl.store(dbeta + place, tl.zeros([C], dbeta.dtype.element_ty), mask=behind < -tokens_end)
        for part_v in tl.range(V // C):
            tl.store(dv + place[:, None] * V + part_v * C + i, tl.zeros([C, C], dv.dtype.element_ty),
                     mask=(behind < -tokens_end)[:, None])  # fmt: skip
    if begin < end:
        tile = program.to(tl.int64)
        token = row * -tokens_end + begin + t
        valid = begin + t < end
        b_beta = tl.load(rows + tile * 3 * C + t)
        place_c = tile * C * C + t[:, None] * C + i
        b_dA_qk = tl.zeros([C, C], tl.float32)
        b_dA_kk = tl.zeros([C, C], tl.float32)
        b_dbeta = tl.zeros([C], tl.float32)
        for part_v in tl.range(V // C):
            reads = tl.zeros([C, C], tl.float32)
            for part in tl.static_range(K // C):
                b_k_in = tl.load(k_in + (tile * C + t[:, None]) * K + part * C + i).to(tl.bfloat16)
                s = tl.load(states + (tile * V + part_v * C + t[:, None]) * K + part * C + i).to(tl.bfloat16)
                reads = tl.dot(b_k_in, tl.trans(s), reads)
            place_v = (token * HV + hv)[:, None] * V + part_v * C + i
            b_v = tl.load(v + place_v, mask=valid[:, None], other=0.0).to(tl.float32)
            b_do = tl.load(do + place_v, mask=valid[:, None], other=0.0).to(tl.float32) * SCALE
            b_dsolved = tl.load(dsolved + (tile * C + t[:, None]) * V + part_v * C + i)
            b_dv = b_dsolved.to(tl.float32) * b_beta[:, None]
            if not NORMED:
                v_factor = tl.load(rows + (tile * 3 + 1) * C + t)[:, None]
                b_v *= v_factor
                b_dv *= v_factor
                b_do *= 1 / tl.load(rows + (tile * 3 + 2) * C + t)[:, None]
            tl.store(dv + place_v, b_dv.to(dv.dtype.element_ty), mask=valid[:, None])
            r = b_v - reads
            b_dbeta += tl.sum(b_dsolved.to(tl.float32) * r, axis=1)
            b_u = tl.dot(tl.load(solve + place_c).to(tl.bfloat16), (b_beta[:, None] * r).to(tl.bfloat16)).to(tl.bfloat16)
            tl.store(u + (tile * C + t[:, None]) * V + part_v * C + i, b_u)
            b_dA_qk = tl.dot(b_do.to(tl.bfloat16), tl.trans(b_u), b_dA_qk)
            b_dA_kk = tl.dot(b_dsolved, tl.trans(b_u), b_dA_kk)
        b_dA_qk = tl.where(t[:, None] >= i, b_dA_qk, 0.0)
        b_dA_kk = tl.where(t[:, None] > i, -b_dA_kk, 0.0)
        by_beta = b_dA_kk * b_beta[:, None]
        up, down = power_scale(tl.max(tl.maximum(tl.abs(b_dA_qk), tl.abs(by_beta))), 6)
        tl.store(scales + tile, down)
        tl.store(dA_qk + place_c, (b_dA_qk * up).to(tl.float16))
        by_beta = (by_beta * up).to(tl.float16)
        tl.store(dA_kk + place_c, by_beta + tl.trans(by_beta))
        b_dbeta += tl.sum(b_dA_kk * tl.load(A_kk + place_c).to(tl.float32), axis=1)
        if not NORMED:  # from beta times the square of the key's size, which ``prepare`` made of what was given, to that
            k_size = 1 / tl.load(rows + (tile * 3 + 1) * C + t)
            b_dbeta *= k_size * k_size
        if BETA_RANGE is not None:
            b = tl.sigmoid(tl.load(beta + token * HV + hv, mask=valid, other=0.0).to(tl.float32))
            b_dbeta *= BETA_RANGE * b * (1 - b)
        tl.store(dbeta + token * HV + hv, b_dbeta.to(dbeta.dtype.element_ty), mask=valid)
