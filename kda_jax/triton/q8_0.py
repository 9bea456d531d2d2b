"""matmul, matmul_pair and matmul_hc_expand of q8_0 on Triton: a launch each."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from kda_jax._q8_0_operands import MatmulHcExpandOperands, MatmulOperands, MatmulPairOperands, MatmulSpec
from kda_jax.kernels.triton import q8_0 as kernels
from kda_jax.triton.launch import launch, like

COMPILED = True  # tests run them in the interpreter


class Tile(NamedTuple):
    """What a program has of a weight: ``rows`` at a time, as many times as lets all programs run at once."""

    rows: int
    threads: int  # of a multiprocessor, so many as there are registers for
    eager: bool  # whether it requests rows a turn ahead, in more registers
    registers: int | None = None

    def turns(self, out: int, warps: int) -> int:
        programs = MULTIPROCESSORS * max(1, self.threads // (32 * warps))
        return min(-(-out // (self.rows * programs)), MOST_TURNS)


# By the tokens to a program; 8 tokens would spill. For more turns than FEW_TURNS the last one.
TILES = {
    1: (Tile(rows=2, threads=768, eager=True),),
    2: (Tile(rows=4, threads=512, eager=True),),
    4: (Tile(rows=4, threads=256, eager=True), Tile(rows=4, threads=512, eager=False, registers=128)),
}
FEW_TURNS = 4
MULTIPROCESSORS = 132  # of the GPU that the tiles were chosen on; with more or fewer they are not at once, but right
MOST_TURNS = 16
WARP_INPUTS = 1024  # of a row: a thread has a block
MOST_WARPS = 8  # with longer rows a program goes along them, in one turn


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
    warps = min(_power(-(-size // WARP_INPUTS)), MOST_WARPS)
    outs, token_tiles = [values.shape[-2] for values in weights], -(-(n // groups) // tokens)
    # As if tokens were the next power of two, so that one binary serves up to twice as many.
    rows = groups * _power(token_tiles) * sum(outs)
    tile = next((tile for tile in TILES[tokens] if tile.turns(rows, warps) <= FEW_TURNS), TILES[tokens][-1])
    turns = tile.turns(rows, warps) if size <= MOST_WARPS * WARP_INPUTS else 1
    row_tiles = sum(-(-out // (tile.rows * turns)) for out in outs)
    return launch(
        kernel,
        (*inputs, -(n // groups)),  # negative, because Triton compiles a kernel anew for a scalar that equals 1
        outputs,
        programs=groups * row_tiles * token_tiles,
        warps=warps,
        registers=tile.registers,
        IN=size,
        BN=tokens,
        R=tile.rows,
        TURNS=turns,
        EAGER=tile.eager,
        ALONE=token_tiles == 1,
        COMPILED=COMPILED,
        **constants,
    )


def _power(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()
