"""decode on Pallas."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kda_jax import _gates
from kda_jax._operands import L2NORM_EPS, PoolOperands, Spec
from kda_jax.kernels.pallas import decode as kernels
from kda_jax.kernels.pallas.stream import THREADS, Tile

# Its rows divide V, which is 64 or 128; the two rings take 192 of a multiprocessor's 227 KiB where K is 128.
TILE = Tile(rows=64, stages=6, ctas=2, lag=1)

# Of an H100 or H200. The grid is this times the CTAs that a multiprocessor holds; on a part with more of them it is only too
# small by their ratio.
MULTIPROCESSORS = 132


def decode(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    n, value_heads, v_dim = args.v.shape
    options = kernels.Options(
        gate=spec.gate,
        lower_bound=spec.lower_bound,
        linear_above=_gates.SOFTPLUS_LINEAR_ABOVE,
        l2norm_eps=L2NORM_EPS if spec.qk_l2norm else None,
        beta_range=(2.0 if spec.allow_neg_eigval else 1.0) if spec.beta_sigmoid else None,
        scale=spec.scale,
    )
    state: Any = jax.new_ref(args.state, memory_space=plgpu.GMEM)  # updated in place

    def body(args: Any, o: Any) -> None:
        def kernel(ring: Any, outs: Any, ready: Any) -> None:
            kernels.decode(args, o, ring, outs, ready, tile=TILE, options=options)

        # Allocated inside: pl.kernel's own scratch_types knows no buffers with a layout of their own.
        pl.run_scoped(
            kernel,
            plgpu.SMEM((TILE.stages, TILE.rows, args.state.shape[3]), args.state.dtype),
            plgpu.SMEM((TILE.stages, TILE.rows), o.dtype),
            plgpu.Barrier(num_barriers=TILE.stages),
        )

    tiles = n * value_heads * (v_dim // TILE.rows)
    (o,) = pl.kernel(
        body,
        (jax.typeof(args.v),),  # not a ShapeDtypeStruct, which inside shard_map must say how it varies
        mesh=plgpu.Mesh(grid=(min(tiles, MULTIPROCESSORS * TILE.ctas),), grid_names=(THREADS,), kernel_name="kda_decode"),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
            # The compiler's own barriers around accesses to shared memory are not needed: a thread reads and writes the same
            # elements of the ring, and stream() commits before every copy.
            unsafe_no_auto_barriers=True,
        ),
        name="kda_decode",
    )(args._replace(state=state))
    return o, jax.freeze(state)
