"""decode_mtp on CuTe, in both its forms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from kda_jax._operands import PagedOperands, PoolOperands, Spec
from kda_jax.cute.call import call, token_choices, token_operands, token_output

KERNEL = "decode_mtp"
SMALL = 2  # rows of the state to a warp, where there are too few for all multiprocessors
LARGE = {64: 16, 128: 8}  # by K; more would not stay in registers
WARPS = 4
PROGRAMS = 4 * 132


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for choices, paged in itertools.product(token_choices(), (False, True)):
        for rows in (SMALL, LARGE[choices["K"]]):
            yield choices | {"ROWS": rows, "PAGED": paged}


def rows_of(heads: int, k_dim: int, v_dim: int) -> int:
    large = LARGE[k_dim]
    return large if heads * v_dim // (large * WARPS) >= PROGRAMS else SMALL


def decode_mtp(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    choices, operands = token_operands(args, spec)
    like = jax.ShapeDtypeStruct((*args.v.shape[:2], *args.state.shape[1:]), args.state.dtype)
    o, states = call(KERNEL, choices | _form(args, paged=False), operands, (token_output(args, choices), like))
    return o.astype(args.v.dtype), states


def decode_mtp_paged(args: PagedOperands, spec: Spec) -> tuple[jax.Array, ...]:
    choices, operands = token_operands(args, spec)
    state = jax.ShapeDtypeStruct(args.state.shape, args.state.dtype)
    outputs, in_place = (token_output(args, choices), state), {PagedOperands._fields.index("state"): 1}
    o, pool = call(KERNEL, choices | _form(args, paged=True), [*operands, args.num_accepted], outputs, in_place)
    return o.astype(args.v.dtype), pool


def _form(args: PoolOperands | PagedOperands, paged: bool) -> dict[str, Any]:
    rows, _, value_heads, v_dim = args.v.shape
    return {"ROWS": rows_of(rows * value_heads, args.k.shape[-1], v_dim), "PAGED": paged}
