"""decode_mtp on CuTe, in its form that keeps all states."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax

from kda_jax._operands import PoolOperands, Spec
from kda_jax.cute import decode
from kda_jax.cute.call import call, token_operands

KERNEL = "decode_mtp"
SMALL = 2  # rows of the state to a warp, where there are too few for all multiprocessors
LARGE = {64: 16, 128: 8}  # by K; more would not stay in registers
WARPS = 4
PROGRAMS = 4 * 132


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for choices in decode.every_choice():
        for rows in (SMALL, LARGE[choices["K"]]):
            yield choices | {"ROWS": rows}


def rows_of(heads: int, k_dim: int, v_dim: int) -> int:
    large = LARGE[k_dim]
    return large if heads * v_dim // (large * WARPS) >= PROGRAMS else SMALL


def decode_mtp(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    n, t, value_heads, v_dim = args.v.shape
    k_dim = args.k.shape[-1]
    states = jax.ShapeDtypeStruct((n, t, *args.state.shape[1:]), args.state.dtype)
    rows = {"ROWS": rows_of(n * value_heads, k_dim, v_dim)}
    choices = decode.choices(k_dim, v_dim, args.state.dtype.name, spec.gate) | rows
    o = jax.ShapeDtypeStruct(args.v.shape, args.v.dtype)
    return call(KERNEL, choices, token_operands(args, spec), (o, states))
