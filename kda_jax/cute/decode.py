"""decode on CuTe."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from kda_jax._operands import PoolOperands, Spec
from kda_jax.cute.call import call, token_operands

KERNEL = "decode"


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for dim, state, gate in itertools.product((64, 128), ("float32", "bfloat16"), (None, "softplus", "lower_bound")):
        yield choices(dim, dim, state, gate)


def choices(k_dim: int, v_dim: int, state_dtype: str, gate: str | None) -> dict[str, Any]:
    return {"K": k_dim, "V": v_dim, "STATE": state_dtype, "GATE": gate or "none"}


def decode(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    like = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (args.v, args.state)]
    of = choices(args.k.shape[-1], args.v.shape[-1], args.state.dtype.name, spec.gate)
    return call(KERNEL, of, token_operands(args, spec), like, in_place={PoolOperands._fields.index("state"): 1})
