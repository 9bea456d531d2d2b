"""decode and both forms of decode_mtp on CuTe: one kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import jax

from kda_jax._operands import PagedOperands, PoolOperands, Spec
from kda_jax.cute.call import call, token_choices, token_operands, token_output

KERNEL = "decode"
FORMS = "decode", "decode_mtp", "decode_mtp_paged"


def every_choice() -> Iterator[dict[str, Any]]:
    """All kernels that may be asked for."""
    for choices, form in itertools.product(token_choices(), FORMS):
        yield choices | {"FORM": form}


def decode(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    return _in_pool("decode", args, spec)


def decode_mtp(args: PoolOperands, spec: Spec) -> tuple[jax.Array, ...]:
    choices, operands = _given("decode_mtp", args, spec)
    like = jax.ShapeDtypeStruct((*args.v.shape[:2], *args.state.shape[1:]), args.state.dtype)
    o, states = call(KERNEL, choices, operands, (token_output(args, choices), like))
    return o.astype(args.v.dtype), states


def decode_mtp_paged(args: PagedOperands, spec: Spec) -> tuple[jax.Array, ...]:
    return _in_pool("decode_mtp_paged", args, spec, args.num_accepted)


def _in_pool(form: str, args: PoolOperands | PagedOperands, spec: Spec, *others: Any) -> tuple[jax.Array, ...]:
    choices, operands = _given(form, args, spec)
    state = jax.ShapeDtypeStruct(args.state.shape, args.state.dtype)
    in_place = {PoolOperands._fields.index("state"): 1}
    o, pool = call(KERNEL, choices, [*operands, *others], (token_output(args, choices), state), in_place)
    return o.astype(args.v.dtype), pool


def _given(form: str, args: PoolOperands | PagedOperands, spec: Spec) -> tuple[dict[str, Any], list[Any]]:
    choices, operands = token_operands(args, spec)
    return choices | {"FORM": form}, operands
