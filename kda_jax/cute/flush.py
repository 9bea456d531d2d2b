"""flush on CuTe; flush_layers is the same launch over the slots of all layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kda_jax._operands import FlushOperands, FlushSpec
from kda_jax.cute.call import call

KERNEL = "flush"
STATE = FlushOperands._fields.index("state")


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for dim, state in itertools.product((64, 128), ("float32", "bfloat16")):
        yield {"K": dim, "V": dim, "STATE": state}


def flush(args: FlushOperands, spec: FlushSpec) -> tuple[jax.Array, ...]:
    pool = args.state
    slots = jnp.arange(args.u.shape[0], dtype=jnp.int32) if args.state_indices is None else args.state_indices
    return call(
        KERNEL,
        {"K": pool.shape[3], "V": pool.shape[2], "STATE": pool.dtype.name},
        (args.u, args.k, args.g, pool, slots, args.num_accepted),
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype),),
        in_place={STATE: 0},
    )
