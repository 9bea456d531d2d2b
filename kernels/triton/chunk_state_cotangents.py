"""chunk's backward pass, fourth launch: the cotangents of k_in, k_out and q_in, which tie a chunk to the states at its ends.

Bound: memory, 0.2 MB a chunk and value head at K = V = 128, half of it the two states and their cotangents; 6 MFLOP of plain
products, for which a program has 64 channels and all tokens.
"""

import triton
import triton.language as tl

from .chunk_tile import C, chunk_of


@triton.jit
def state_cotangents(do, states, dstates, dsolved, u, k_in, k_out, q_in, rows, decay, bounds, tokens_end, chunks_end,
                     dq_in, dk_in, dk_out, halves,
                     HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr, PACKED: tl.constexpr, NORMED: tl.constexpr,
                     SCALE: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One program a chunk, value head and 64 channels.

    ``halves`` [B, NC, HV, 2, K]: what the gradient of every log decay in a half of the chunk has in common, for a decay that
    ends in the later half is over all of the earlier one, and the other way round.
    """
    program = tl.program_id(0)
    part = program % (K // C)
    tile = (program // (K // C)).to(tl.int64)
    hv = tile % HV
    row, begin, end = chunk_of((tile // HV).to(tl.int32), tokens_end, chunks_end, bounds, PACKED)
    if begin < end:
        t = tl.arange(0, C)
        columns = t[None, :]
        valid = (begin + t < end)[:, None]
        place_v = ((row * -tokens_end + begin + t) * HV + hv)[:, None] * V + columns
        place_u = (tile * C + t[:, None]) * V + columns
        place_s = (tile * V + t[:, None]) * K + part * C + columns
        of_q = tl.zeros([C, C], tl.float32)
        of_later = tl.zeros([C, C], tl.float32)  # of k as the later token of a pair
        of_earlier = tl.zeros([C, C], tl.float32)
        through = tl.zeros([C], tl.float32)
        for part_v in tl.range(V // C, num_stages=STAGES):
            s = tl.load(states + place_s + part_v * C * K).to(tl.bfloat16)
            ds = tl.load(dstates + place_s + part_v * C * K).to(tl.bfloat16)
            b_do = tl.load(do + place_v + part_v * C, mask=valid, other=0.0).to(tl.bfloat16)
            of_q = tl.dot(b_do, s, of_q)
            of_later = tl.dot(tl.load(dsolved + place_u + part_v * C), s, of_later)
            of_earlier = tl.dot(tl.load(u + place_u + part_v * C), ds, of_earlier)
            through += tl.sum(s.to(tl.float32) * ds.to(tl.float32), axis=0)
        of_q *= SCALE
        if not NORMED:
            of_q *= 1 / tl.load(rows + (tile * 3 + 2) * C + t)[:, None]
        of_later *= -tl.load(rows + tile * 3 * C + t)[:, None]
        place = (tile * C + t[:, None]) * K + part * C + columns
        tl.store(dq_in + place, of_q.to(tl.bfloat16))
        tl.store(dk_in + place, of_later.to(tl.bfloat16))
        tl.store(dk_out + place, of_earlier.to(tl.bfloat16))
        reads = tl.load(q_in + place).to(tl.float32) * of_q + tl.load(k_in + place).to(tl.float32) * of_later
        writes = tl.load(k_out + place).to(tl.float32) * of_earlier
        through *= tl.load(decay + tile * K + part * C + t)
        late = (t >= C // 2)[:, None]
        place = tile * 2 * K + part * C + t
        tl.store(halves + place, tl.sum(tl.where(late, reads, 0.0), axis=0) + through)
        tl.store(halves + place + K, tl.sum(tl.where(late, 0.0, writes), axis=0) + through)
