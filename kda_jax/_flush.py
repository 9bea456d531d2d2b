"""kda.flush and kda.flush_layers: rebuild the states after the accepted tokens."""

from __future__ import annotations

from typing import Any

import jax

from kda_jax import _dispatch, _inputs
from kda_jax._operands import FLUSH_AXES, FlushOperands, FlushSpec
from kda_jax._primitive import Operation, Output
from kda_jax._update import Update

UPDATE_DTYPES = ("float32", "float64")


def _outputs(args: FlushOperands, sizes: dict[str, int], spec: FlushSpec) -> tuple[Output, ...]:
    return (Output("P HV V K", args.state.dtype),)


OPERATION = Operation("kda_flush", FLUSH_AXES, _outputs, not_differentiable=_inputs.NOT_DIFFERENTIABLE.format("kda.flush"))


def flush(
    state: jax.Array,
    update: Update,
    num_accepted: Any,
    *,
    state_indices: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """The pool with each row's state advanced over its first ``num_accepted`` verified tokens.

    ``S_m = S_0 diag(exp G_m) + sum_{i <= m} u_i (k_i * exp(G_m - G_i))^T`` with G the running sum of g, in float32.

    Args:
      state: the pool ``[P, HV, V, K]`` that verify read, float32 or bfloat16. Donated to jit, it is updated in place.
      update: what :func:`kda_jax.verify` returned for it.
      num_accepted: ``[N]`` int32 or one integer, the accepted tokens m of each row, 0 to T, traced (no recompilation).
        With m = 0 the state stays bit for bit as it is. Traced values outside the range are clipped to it.
      state_indices: as given to verify; padded rows touch no slot.
      implementation: None for the best one that serves the call, or a name ("xla", ...) to force it.

    Returns:
      The pool, in its shape and dtype.

    Raises:
      ValueError, TypeError: a shape, dtype or value is wrong; the text says which and what it must be.
      NotImplementedError: the forced implementation does not serve the call, or the call is differentiated.

    Source: the last line of the chunkwise gated delta rule (Yang et al., 2024), cut after m tokens.
    """
    check = _inputs.Checker("kda.flush")
    return _flush(check, state, update, num_accepted, state_indices, implementation)


def _flush(
    check: _inputs.Checker, state: Any, update: Any, num_accepted: Any, state_indices: Any, implementation: str | None
) -> jax.Array:
    _dispatch.check_name(check.call, OPERATION.name, implementation)
    if not isinstance(update, Update):
        raise TypeError(
            f"{check.call}: update is a {type(update).__name__}; it must be the kda.Update that kda.verify returned"
        )
    u, k, g = (check.array(f"update.{name}", getattr(update, name), FLUSH_AXES[name], UPDATE_DTYPES) for name in "ukg")
    check.groups()
    state, state_indices = _inputs.pool(check, state, state_indices)
    num_accepted = _inputs.accepted(check, num_accepted, least=0)
    (state,) = OPERATION.bind(FlushOperands(u, k, g, state, state_indices, num_accepted), FlushSpec(implementation))
    return state


def flush_layers(
    states: jax.Array,
    updates: Update,
    num_accepted: Any,
    *,
    state_indices: Any = None,
    implementation: str | None = None,
) -> jax.Array:
    """:func:`flush` for all layers of a model in one call, bit for bit as the loop over layers.

    Args:
      states: the layers' pools ``[L, P, HV, V, K]``.
      updates: the layers' updates, each array with a first axis L.
      num_accepted, state_indices: as in :func:`flush`, shared by all layers.
      implementation: as in :func:`flush`.

    Returns:
      The pools ``[L, P, HV, V, K]``.

    Raises:
      As :func:`flush`.
    """
    call = "kda.flush_layers"
    if not isinstance(updates, Update):
        raise TypeError(
            f"{call}: updates is a {type(updates).__name__}; it must be a kda.Update of arrays stacked over layers"
        )
    check = _inputs.Checker(call)
    check.array("states", states, "L P HV V K", _inputs.STATE_DTYPES)
    for name in "ukg":
        check.array(f"updates.{name}", getattr(updates, name), f"L {FLUSH_AXES[name]}", UPDATE_DTYPES)

    def one(state: jax.Array, update: Update) -> jax.Array:
        return _flush(_inputs.Checker(call), state, update, num_accepted, state_indices, implementation)

    # The batching rule folds the layers into the rows and the slots: one call, whatever L.
    return jax.vmap(one)(states, updates)
