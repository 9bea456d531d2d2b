"""decode on CuTe."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from kda_jax._operands import PagedOperands, PoolOperands, Spec
from kda_jax.cute import decode_mtp
from kda_jax.cute.call import call, slots_of, token_choices, token_operands, token_output

KERNEL = "decode"
STREAMED = 1024  # (row, value head) pairs from which on they go through a ring; below, each would see but a tile or two


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for; with fewer rows, decode_mtp's."""
    return token_choices()


def decode(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    rows, value_heads, _ = args.v.shape
    if rows * value_heads < STREAMED:
        return _as_one_draft(args, spec)
    choices, operands = token_operands(args, spec)
    state = jax.ShapeDtypeStruct(args.state.shape, args.state.dtype)
    in_place = {PoolOperands._fields.index("state"): 1}
    o, pool = call(KERNEL, choices, operands, (token_output(args, choices), state), in_place)
    return o.astype(args.v.dtype), pool


def _as_one_draft(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    """A draft of one token whose one page is the slot it starts from: the same bits."""
    rows = args.v.shape[0]
    slots = slots_of(args.state_indices, rows)
    token = {name: getattr(args, name)[:, None] for name in ("q", "k", "v", "g", "beta")}
    draft = PagedOperands(
        **args._asdict() | token | {"state_indices": slots[:, None], "num_accepted": np.ones(rows, np.int32)}
    )
    o, pool = decode_mtp.decode_mtp_paged(draft, spec)
    return o[:, 0], pool
