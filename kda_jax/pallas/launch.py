"""One launch of a streaming kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kda_jax.kernels.pallas.stream import THREADS, Tile

# Of an H100 or H200. The grid is this times the CTAs that a multiprocessor holds; on a part with more of them it is only too
# small by their ratio.
MULTIPROCESSORS = 132

# The compiler's own barriers around accesses to shared memory are not needed: a thread reads and writes the same elements of
# the ring, and stream() commits before every copy.
AUTO_BARRIERS = False


def launch(
    kernel: Callable[..., None],
    args: Any,
    outputs: Sequence[jax.ShapeDtypeStruct],
    buffers: Sequence[Any],
    *,
    heads: int,
    tile: Tile,
    copies: int = 1,
    interpret: Any = None,
    **options: Any,
) -> tuple[jax.Array, ...]:
    """The outputs of ``kernel`` and then the state pool, which it updates in place.

    The kernel takes ``args`` as references, then references to the outputs, its ring of state tiles, the further ``buffers``
    in shared memory, and the ring's barriers, at each of which ``copies`` arrive for a tile.
    """
    _, _, v_dim, k_dim = args.state.shape
    tiles = heads * (v_dim // tile.rows)
    state = jax.new_ref(args.state, memory_space=plgpu.GMEM)
    scratch = (
        plgpu.SMEM((tile.stages, tile.rows, k_dim), args.state.dtype),
        *buffers,
        plgpu.Barrier(num_arrivals=copies, num_barriers=tile.stages),
    )

    def body(*refs: Any) -> None:
        # Allocated inside: pl.kernel's own scratch_types knows no buffers with a layout of their own.
        pl.run_scoped(functools.partial(kernel, *refs, tile=tile, **options), *scratch)

    name = f"kda_{kernel.__name__}"
    results = pl.kernel(
        body,
        tuple(outputs),
        mesh=plgpu.Mesh(grid=(min(tiles, MULTIPROCESSORS * tile.ctas),), grid_names=(THREADS,), kernel_name=name),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup, unsafe_no_auto_barriers=not AUTO_BARRIERS
        ),
        interpret=interpret or False,
        name=name,
    )(args._replace(state=state))
    return *results, jax.freeze(state)


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, jnp.dtype(dtype))
