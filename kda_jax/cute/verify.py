"""verify on CuTe, on tensor cores."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kda_jax._operands import PoolOperands, VerifySpec
from kda_jax.cute import decode
from kda_jax.cute.call import call, token_operands

KERNEL = "verify"
MAX_TOKENS = 16


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for choices, update in itertools.product(decode.every_choice(), (False, True)):
        yield choices | {"UPDATE": update}


def verify(args: PoolOperands, spec: VerifySpec) -> tuple[jax.Array, ...]:
    update = (args.v, args.k, args.g) if spec.with_update else ()
    outputs = [
        jax.ShapeDtypeStruct(args.v.shape, args.v.dtype),
        *(jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in update),
    ]
    choices = decode.choices(args.k.shape[-1], args.v.shape[-1], args.state.dtype.name, spec.gate)
    return call(KERNEL, choices | {"UPDATE": spec.with_update}, token_operands(args, spec), outputs)
