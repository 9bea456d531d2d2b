"""kda.verify: T draft tokens a row in parallel, leaving an Update instead of T states."""

from __future__ import annotations

from typing import Any

import jax

from kda_jax import _inputs
from kda_jax._gates import Gate
from kda_jax._operands import DRAFT_AXES, PoolOperands, VerifySpec, arithmetic_dtype
from kda_jax._primitive import Operation, Output
from kda_jax._update import Update


def _outputs(args: PoolOperands, sizes: dict[str, int], spec: VerifySpec) -> tuple[Output, ...]:
    o = Output("N T HV V", args.v.dtype)
    if not spec.with_update:
        return (o,)
    dtype = arithmetic_dtype(args)
    return o, Output("N T HV V", dtype), Output("N T H K", dtype), Output("N T HV K", dtype)


OPERATION = Operation("kda_verify", DRAFT_AXES, _outputs, not_differentiable=_inputs.NOT_DIFFERENTIABLE.format("kda.verify"))


def verify(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    state_indices: Any = None,
    with_update: bool = True,
    gate: Gate | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, Update | Any]:  # None without the update; Any, so that callers need not assert
    """The outputs of T draft tokens, computed as one chunk from states that are only read.

    Where :func:`kda_jax.decode_mtp` returns T states a row, verify returns the compact :class:`kda_jax.Update`, from which
    :func:`kda_jax.flush` rebuilds the state after however many tokens were accepted. Not strict: the sums are taken in
    another order than in decode, so outputs agree to rounding (docs/numerics.md), not bit for bit.

    Args:
      q, k, v, g, beta: as in :func:`kda_jax.decode_mtp`.
      state: the pool ``[P, HV, V, K]``, float32 or bfloat16; never written.
      state_indices: ``[N]`` int32, the slot of each row; None means row n uses slot n, with P == N. A row whose index lies
        outside [0, P) is padding: its output and its update are zero.
      with_update: False leaves the update out, for when only the outputs are wanted.
      gate, qk_l2norm, beta_sigmoid, allow_neg_eigval, scale, implementation: as in :func:`kda_jax.decode`.

    Returns:
      ``o`` ``[N, T, HV, V]`` in the dtype of v, and the Update, or None without it.

    Raises:
      ValueError, TypeError: a shape, dtype or value is wrong; the text says which and what it must be.
      NotImplementedError: the forced implementation does not serve the call, or the call is differentiated.

    Source: the chunkwise form of the gated delta rule (Yang et al., 2024) with C = T, its update kept for a rank-m flush.
    """
    check = _inputs.Checker("kda.verify")
    tokens, spec = _inputs.tokens(
        check,
        DRAFT_AXES,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        operation=OPERATION.name,
        gate=gate,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        scale=scale,
        implementation=implementation,
    )
    spec = VerifySpec(**vars(spec), with_update=check.flag("with_update", with_update))
    state, state_indices = _inputs.pool(check, state, state_indices)
    o, *update = OPERATION.bind(PoolOperands(**tokens, state=state, state_indices=state_indices), spec)
    return o, Update(*update) if update else None
