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


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for dim, state in itertools.product(DIMS, STATES):
        yield {"K": dim, "V": dim, "STATE": state}


def flush(args: FlushOperands, spec: FlushSpec) -> tuple[jax.Array, ...]:
    pool = args.state
    return call(
        KERNEL,
        {"K": pool.shape[3], "V": pool.shape[2], "STATE": pool.dtype.name},
        (args.u, args.k, args.g, pool, slots_of(args.state_indices, args.u.shape[0]), args.num_accepted),
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype),),
        in_place={STATE: 0},
    )
