"""flush on CuTe; flush_layers is the same launch over the slots of all layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from kda_jax._operands import FlushOperands, FlushSpec
from kda_jax.cute.call import DIMS, STATES, call, slots_of

KERNEL = "flush"
STATE = FlushOperands._fields.index("state")
STREAMED = 1024  # (row, value head) pairs from which on they go through a ring, as in decode


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for dim, state, streamed in itertools.product(DIMS, STATES, (False, True)):
        yield {"K": dim, "V": dim, "STATE": state, "STREAM": streamed}


def flush(args: FlushOperands, spec: FlushSpec) -> tuple[jax.Array, ...]:
    pool, (rows, _, value_heads, _) = args.state, args.u.shape
    shape = {"K": pool.shape[3], "V": pool.shape[2], "STATE": pool.dtype.name}
    return call(
        KERNEL,
        shape | {"STREAM": rows * value_heads >= STREAMED},
        (args.u, args.k, args.g, pool, slots_of(args.state_indices, rows), args.num_accepted),
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype),),
        in_place={STATE: 0},
    )
