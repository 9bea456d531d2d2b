"""verify on CuTe, on tensor cores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kda_jax._operands import PoolOperands, VerifySpec
from kda_jax.cute.call import call, token_choices, token_operands, token_output

KERNEL = "verify"
MAX_TOKENS = 16


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for choices, update in itertools.product(token_choices(), (False, True)):
        yield choices | {"UPDATE": update}


def verify(args: PoolOperands, spec: VerifySpec) -> tuple[jax.Array, ...]:
    choices, operands = token_operands(args, spec)
    like = (args.v, args.k, args.g) if spec.with_update else ()
    outputs = [token_output(args, choices), *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in like)]
    o, *update = call(KERNEL, choices | {"UPDATE": spec.with_update}, operands, outputs)
    return o.astype(args.v.dtype), *update
