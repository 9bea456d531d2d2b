"""matmul, matmul_pair and matmul_hc_expand of q8_0 on Triton: a launch each."""

from __future__ import annotations

from typing import Any

import jax

from kda_jax._q8_0_operands import MatmulHcExpandOperands, MatmulOperands, MatmulPairOperands, MatmulSpec
from kda_jax.kernels.triton import q8_0 as kernels
from kda_jax.triton.launch import Tile, launch, like

# By the tokens to a program. One token leaves instructions to spare, so more programs quantise it; 8 tokens would spill.
# Not measured.
TILES = {1: Tile(rows=8, warps=4), 2: Tile(rows=16, warps=8), 4: Tile(rows=16, warps=8)}
STAGES = 4
DP4A = True


def matmul(args: MatmulOperands, spec: MatmulSpec) -> tuple[jax.Array, ...]:
    inputs = args.x, args.scales, args.values
    return _launch(kernels.matmul, inputs, [args.values], [_output(args.x, args.values)], OUT=args.values.shape[-2])


def matmul_pair(args: MatmulPairOperands, spec: MatmulSpec) -> tuple[jax.Array, ...]:
    weights = args.values0, args.values1
    return _launch(
        kernels.matmul_pair,
        args,
        weights,
        [_output(args.x, values) for values in weights],
        **{f"OUT{i}": values.shape[-2] for i, values in enumerate(weights)},
        **{f"SHARED{i}": values.ndim == 2 for i, values in enumerate(weights)},
    )


def matmul_hc_expand(args: MatmulHcExpandOperands, spec: MatmulSpec) -> tuple[jax.Array, ...]:
    _, lanes, out = args.residual.shape
    return _launch(
        kernels.matmul_hc_expand,
        args._replace(add=args.x if args.add is None else args.add),  # never read
        [args.values],
        like(args.residual),
        OUT=out,
        L=lanes,
        LANES=_power(lanes),
        HAS_ADD=args.add is not None,
    )


def _output(x: jax.Array, values: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], values.shape[-2]), x.dtype)


def _launch(kernel: Any, inputs: Any, weights: Any, outputs: Any, **constants: Any) -> tuple[jax.Array, ...]:
    """A program for each tile of tokens, of rows of ``weights``, and group of tokens that have a weight of their own."""
    n, size = inputs[0].shape
    groups = max(values.shape[0] if values.ndim == 3 else 1 for values in weights)
    tokens = min(_power(n // groups), max(TILES))
    tile = TILES[tokens]
    tiles = sum(-(-values.shape[-2] // tile.rows) for values in weights)
    return launch(
        kernel,
        (*inputs, -(n // groups)),  # negative, because Triton compiles a kernel anew for a scalar that equals 1
        outputs,
        programs=groups * tiles * -(-(n // groups) // tokens),
        warps=tile.warps,
        IN=size,
        BN=tokens,
        BO=tile.rows,
        STAGES=STAGES,
        DP4A=DP4A,
        **constants,
    )


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
