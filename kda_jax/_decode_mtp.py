"""kda.decode_mtp: T draft tokens a row, strictly one after the other, with the state after each."""

from __future__ import annotations

from typing import Any

import jax

from kda_jax import _inputs
from kda_jax._gates import Gate
from kda_jax._operands import DRAFT_AXES, PAGED_AXES, PagedOperands, PoolOperands, Spec
from kda_jax._primitive import Operation, Output


def _outputs(args: PoolOperands, sizes: dict[str, int], spec: Spec) -> tuple[Output, ...]:
    return Output("N T HV V", args.v.dtype), Output("N T HV V K", args.state.dtype)


def _paged_outputs(args: PagedOperands, sizes: dict[str, int], spec: Spec) -> tuple[Output, ...]:
    return Output("N T HV V", args.v.dtype), Output("P HV V K", args.state.dtype)


_MESSAGE = _inputs.NOT_DIFFERENTIABLE.format("kda.decode_mtp")
OPERATION = Operation("kda_decode_mtp", DRAFT_AXES, _outputs, not_differentiable=_MESSAGE)
PAGED = Operation("kda_decode_mtp_paged", PAGED_AXES, _paged_outputs, not_differentiable=_MESSAGE)


def decode_mtp(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    state_indices: Any = None,
    num_accepted: Any = None,
    gate: Gate | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """T steps of the KDA recurrence for N rows, keeping the state after every token.

    Strict: equal to T calls of :func:`kda_jax.decode`, bit for bit. There are two forms:

    * without ``num_accepted``, row n starts from slot ``state_indices[n]`` and the pool is only read; the states come back
      as an array of their own;
    * paged, with ``state_indices`` ``[N, T]`` and ``num_accepted`` ``[N]``: row n starts from slot
      ``state_indices[n, num_accepted[n] - 1]`` (where the previous call left the last accepted state), the state after
      token t goes to slot ``state_indices[n, t]``, and the pool comes back. Donated to jit, it is updated in place.

    Args:
      q, k: ``[N, T, H, K]`` bfloat16, float16 or float32.
      v: ``[N, T, HV, V]``, HV a multiple of H.
      g: ``[N, T, HV, K]``, the log decay (<= 0), or the raw input of ``gate``.
      beta: ``[N, T, HV]`` in [0, 1], or its logits with ``beta_sigmoid``.
      state: the pool ``[P, HV, V, K]``, float32 or bfloat16. Between tokens the state stays in this dtype's precision,
        as it does between calls of decode.
      state_indices: ``[N]`` int32 (None: row n, slot n, P == N), or ``[N, T]`` in the paged form. A row whose starting
        index lies outside [0, P) is padding: its outputs and states are zero and it touches no slot. In the paged form a
        state whose own index lies outside is not stored.
      num_accepted: ``[N]`` int32 or one integer, 1 to T, traced. In the paged form only. A row with a value outside that
        range is padding.
      gate, qk_l2norm, beta_sigmoid, allow_neg_eigval, scale, implementation: as in :func:`kda_jax.decode`.

    Returns:
      ``o`` ``[N, T, HV, V]`` in the dtype of v, and the states ``[N, T, HV, V, K]``, or the pool in the paged form.

    Raises:
      ValueError, TypeError: a shape, dtype or value is wrong; the text says which and what it must be.
      NotImplementedError: the forced implementation does not serve the call, or the call is differentiated.

    Source: Kimi Linear (2025) for the recurrence; the paged form is that of vLLM and FlashInfer.
    """
    check = _inputs.Checker("kda.decode_mtp")
    paged = num_accepted is not None
    operation = PAGED if paged else OPERATION
    tokens, spec = _inputs.tokens(
        check,
        DRAFT_AXES,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        operation=operation.name,
        gate=gate,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        scale=scale,
        implementation=implementation,
    )
    if paged and state_indices is None:
        raise ValueError("kda.decode_mtp: state_indices is None with num_accepted given; it must then be [N, T]")
    state, state_indices = _inputs.pool(check, state, state_indices, "N T" if paged else "N")
    if not paged:
        o, states = OPERATION.bind(PoolOperands(**tokens, state=state, state_indices=state_indices), spec)
        return o, states
    num_accepted = _inputs.accepted(check, num_accepted, least=1)
    o, state = PAGED.bind(PagedOperands(**tokens, state=state, state_indices=state_indices, num_accepted=num_accepted), spec)
    return o, state
