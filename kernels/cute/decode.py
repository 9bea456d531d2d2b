"""decode: one token on one row's state, in place.

Bound: memory. A (row, value head) moves its state twice, 128 KiB in float32. So tiles of the state, which lie in one piece,
go through a ring in shared memory by bulk copies: while one tile is computed with, the next ones are loaded and the last
one is stored. A program goes from tile to tile; three of them share a multiprocessor. What is small beside the state, the
token's operands, each tile loads for itself while its state is under way.

Both sums over K, with k and with q, are of the decayed state, so that they are one pass: o = S q + u (k . q).
"""

import cuda.bindings.driver as cuda
import cutlass
import cutlass.cute as cute
from cutlass import Float32, Int32
from cutlass.cute.nvgpu import cpasync

from .token import (
    OPTIONS,
    WARP,
    activated,
    by_lane,
    decays,
    dot,
    holder,
    loaded,
    select,
    shuffled,
    slot_of,
    sums,
)

TILE_BYTES = 16384
STAGES = 4
WARPS = 4
PROGRAMS = 3 * 132  # at once, on an H200
TYPES = {"float32": cutlass.Float32, "bfloat16": cutlass.BFloat16}


def rows_of(K, V, STATE):
    return min(V, 16 * WARPS, TILE_BYTES // (K * TYPES[STATE].width // 8))


def operands(K, V, STATE, GATE):
    """Inputs and outputs, each its axes and dtype; which input is which output."""
    token = [("N H K", "bfloat16")] * 2 + [("N HV V", "bfloat16"), ("N HV K", "bfloat16"), ("N HV", "bfloat16")]
    gate = [("RA HV", "float32"), ("RB HV K", "float32")]
    state = ("P HV V K", STATE)
    inputs = [*token, *gate, state, ("N", "int32"), (str(OPTIONS), "float32")]
    return inputs, [("N HV V", "bfloat16"), state], {7: 1}


def shared_bytes(K, V, STATE, GATE):
    return STAGES * (rows_of(K, V, STATE) * K * TYPES[STATE].width // 8 + 8)


@cute.jit
def launch(
    stream: cuda.CUstream,
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor,
    *, K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
):  # fmt: skip
    tiles = v.shape[0] * v.shape[1] * (V // rows_of(K, V, STATE))
    programs = cutlass.min(tiles, Int32(PROGRAMS))
    decode(q, k, v, g, beta, A_log, dt_bias, state, slots, options, o, tiles, K, V, STATE, GATE).launch(
        grid=[programs, 1, 1], block=[WARPS * WARP, 1, 1], stream=stream
    )


@cute.kernel
def decode(
    q: cute.Tensor, k: cute.Tensor, v: cute.Tensor, g: cute.Tensor, beta: cute.Tensor, A_log: cute.Tensor,
    dt_bias: cute.Tensor, state: cute.Tensor, slots: cute.Tensor, options: cute.Tensor, o: cute.Tensor, tiles: Int32,
    K: cutlass.Constexpr, V: cutlass.Constexpr, STATE: cutlass.Constexpr, GATE: cutlass.Constexpr,
):  # fmt: skip
    thread, _, _ = cute.arch.thread_idx()
    program, _, _ = cute.arch.block_idx()
    programs, _, _ = cute.arch.grid_dim()
    lane, warp = thread % WARP, thread // WARP
    ROWS = rows_of(K, V, STATE)
    OWN = ROWS // WARPS  # rows of a tile that a warp has
    PARTS = V // ROWS  # tiles to a head
    dtype = TYPES[STATE]
    n_rows, heads, value_heads, pool = v.shape[0], q.shape[1], v.shape[1], state.shape[0]

    memory = cutlass.utils.SmemAllocator()
    ring = memory.allocate_tensor(dtype, cute.make_layout((STAGES, ROWS * K), stride=(ROWS * K, 1)), 128)
    full = memory.allocate_array(cutlass.Int64, STAGES)
    in_pool = cute.make_tensor(
        state.iterator,
        cute.make_layout((pool, value_heads, PARTS, ROWS * K), stride=(value_heads * V * K, V * K, ROWS * K, 1)),
    )
    load = cute.make_copy_atom(cpasync.CopyBulkG2SOp(), dtype, num_bits_per_copy=ROWS * K * dtype.width)
    store = cute.make_copy_atom(cpasync.CopyBulkS2GOp(), dtype, num_bits_per_copy=ROWS * K * dtype.width)

    if thread == 0:
        for stage in cutlass.range_constexpr(STAGES):
            cute.arch.mbarrier_init(full + stage, 1)
        cute.arch.mbarrier_init_fence()
    cute.arch.sync_threads()

    count = (tiles - program + programs - 1) // programs
    if thread == 0:
        for i in cutlass.range_constexpr(STAGES - 1):
            if i < count:
                request(i, program + i * programs, in_pool, slots, pool, value_heads, PARTS, ring, full, load)

    q_lanes, k_lanes = (by_lane(x, (n_rows, heads), K) for x in (q, k))
    g_lanes = by_lane(g, (n_rows, value_heads), K)
    bias_lanes = by_lane(dt_bias, (dt_bias.shape[0], value_heads), K)
    each = K // WARP
    ring_lanes = cute.make_tensor(ring.iterator, cute.make_layout((STAGES, ROWS, WARP, each), stride=(ROWS * K, K, each, 1)))
    for i in cutlass.range(count):
        tile = program + i * programs
        part, hv, n = tile % PARTS, tile // PARTS % value_heads, tile // PARTS // value_heads
        h = hv // (value_heads // heads)
        slot, live = slot_of(slots, n, pool)
        # Where the gate's parameters are the same for all rows they have one.
        n_A, n_bias = cutlass.min(n, A_log.shape[0] - 1), cutlass.min(n, dt_bias.shape[0] - 1)
        decay = decays(
            loaded(g_lanes[n, hv, lane, None]), A_log[n_A, hv], loaded(bias_lanes[n_bias, hv, lane, None]), options, GATE
        )
        b_q, b_k, b_beta, kq = activated(
            loaded(q_lanes[n, h, lane, None]), loaded(k_lanes[n, h, lane, None]), beta[n, hv].to(Float32), options
        )
        # Lanes below 16 come to hold the sums with k, the others those with q, of the same row.
        held = (lane % 16) // (16 // OWN)
        row = part * ROWS + warp * OWN + held
        b_v = v[n, hv, row].to(Float32)

        stage = i % STAGES
        cute.arch.mbarrier_wait(full + stage, i // STAGES % 2)
        s = []
        for j in cutlass.range_constexpr(OWN):
            one = loaded(ring_lanes[stage, warp * OWN + j, lane, None])
            s.append([x * y for x, y in zip(one, decay, strict=True)])
        found = sums([dot(x, b_k) for x in s] + [dot(x, b_q) for x in s], lane)
        u = b_beta * (b_v - found)  # in the lower lanes
        of_u = shuffled(u, 16)
        if (lane >= 16) & (lane % (16 // OWN) == 0):
            o[n, hv, row] = select(live, found + of_u * kq, Float32(0.0)).to(o.element_type)
        for j in cutlass.range_constexpr(OWN):
            of_row = cute.arch.shuffle_sync(u, holder(j, 2 * OWN))
            out = ring_lanes[stage, warp * OWN + j, lane, None]
            after = cute.make_rmem_tensor(out.layout, dtype)
            for e in cutlass.range_constexpr(each):
                after[e] = (s[j][e] + of_row * b_k[e]).to(dtype)
            cute.autovec_copy(after, out)

        cute.arch.fence_proxy("async.shared", space="cta")
        cute.arch.sync_threads()
        if thread == 0:
            if live:
                cute.copy(store, ring[stage, None], in_pool[slot, hv, part, None])
            cute.arch.cp_async_bulk_commit_group()
            later = i + STAGES - 1
            if later < count:
                cute.arch.cp_async_bulk_wait_group(1, read=True)  # the tile before has left its place in the ring
                request(later, program + later * programs, in_pool, slots, pool, value_heads, PARTS, ring, full, load)
    if thread == 0:
        cute.arch.cp_async_bulk_wait_group(0, read=True)


@cute.jit
def request(i, tile, in_pool, slots, pool, value_heads, PARTS: cutlass.Constexpr, ring, full, load):
    """The i-th tile of a program, into its place in the ring. A row without a slot reads some state, and stores none."""
    slot, _ = slot_of(slots, tile // PARTS // value_heads, pool)
    stage = i % STAGES
    place = ring[stage, None]
    cute.arch.mbarrier_arrive_and_expect_tx(full + stage, cute.size(place) * place.element_type.width // 8)
    cute.copy(load, in_pool[slot, tile // PARTS % value_heads, tile % PARTS, None], place, mbar_ptr=full + stage)
