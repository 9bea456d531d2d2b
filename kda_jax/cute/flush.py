"""flush on CuTe; flush_layers is the same launch over the slots of all layers."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from kda_jax._operands import FlushOperands, FlushSpec
from kda_jax.cute.call import call

KERNEL = "flush"
STATE = FlushOperands._fields.index("state")
STREAMED = 1024  # (row, value head) pairs from which on they go through a ring, as in decode


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for dim, state, streamed in itertools.product((64, 128), ("float32", "bfloat16"), (False, True)):
        yield {"K": dim, "V": dim, "STATE": state, "STREAM": streamed}


def flush(args: FlushOperands, spec: FlushSpec) -> tuple[jax.Array, ...]:
    pool, (rows, _, value_heads, _) = args.state, args.u.shape
    slots = np.arange(rows, dtype=np.int32) if args.state_indices is None else args.state_indices
    shape = {"K": pool.shape[3], "V": pool.shape[2], "STATE": pool.dtype.name}
    return call(
        KERNEL,
        shape | {"STREAM": rows * value_heads >= STREAMED},
        (args.u, args.k, args.g, pool, slots, args.num_accepted),
        (jax.ShapeDtypeStruct(pool.shape, pool.dtype),),
        in_place={STATE: 0},
    )
