"""decode and both forms of decode_mtp on CuTe: one kernel."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
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
    shape = *args.v.shape[:2], *args.state.shape[1:]
    return _call("decode_mtp", args, spec, jax.ShapeDtypeStruct(shape, args.state.dtype))


def decode_mtp_paged(args: PagedOperands, spec: Spec) -> tuple[jax.Array, ...]:
    return _in_pool("decode_mtp_paged", args, spec, args.num_accepted)


def _in_pool(form: str, args: PoolOperands | PagedOperands, spec: Spec, *others: Any) -> tuple[jax.Array, ...]:
    pool = jax.ShapeDtypeStruct(args.state.shape, args.state.dtype)
    return _call(form, args, spec, pool, others, {PoolOperands._fields.index("state"): 1})


def _call(
    form: str,
    args: PoolOperands | PagedOperands,
    spec: Spec,
    states: jax.ShapeDtypeStruct,
    others: tuple[Any, ...] = (),
    in_place: Mapping[int, int] | None = None,
) -> tuple[jax.Array, ...]:
    choices, operands = token_operands(args, spec)
    # All forms have the same bits, which are not those of another implementation: all are taken from here or none.
    forms = [choices | {"FORM": each} for each in FORMS]
    outputs = token_output(args, choices), states
    o, written = call(KERNEL, choices | {"FORM": form}, [*operands, *others], outputs, in_place, forms)
    return o.astype(args.v.dtype), written
