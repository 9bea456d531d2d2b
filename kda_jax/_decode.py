"""kda.decode: one token a row against a pool of states."""

from __future__ import annotations

from typing import Any

import jax

from kda_jax import _inputs
from kda_jax._gates import Gate
from kda_jax._operands import DECODE_AXES, PoolOperands, Spec
from kda_jax._primitive import Operation, Output


def _outputs(args: PoolOperands, sizes: dict[str, int], spec: Spec) -> tuple[Output, ...]:
    return Output("N HV V", args.v.dtype), Output("P HV V K", args.state.dtype)


OPERATION = Operation(
    "kda_decode", DECODE_AXES, _outputs, not_differentiable=_inputs.NOT_DIFFERENTIABLE.format("kda.decode")
)


def decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    state: jax.Array,
    *,
    state_indices: Any = None,
    gate: Gate | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One step of the KDA recurrence for N rows, on their states in the pool.

    ``S' = S diag(exp g)``, ``u = beta (v - S' k)``, ``S = S' + u k^T``, ``o = scale S q``, all in float32.

    Args:
      q, k: ``[N, H, K]`` bfloat16, float16 or float32.
      v: ``[N, HV, V]``, HV a multiple of H; value head hv reads q/k head ``hv // (HV // H)``.
      g: ``[N, HV, K]``, the log decay (<= 0), or the raw input of ``gate``.
      beta: ``[N, HV]`` in [0, 1], or its logits with ``beta_sigmoid``.
      state: the pool ``[P, HV, V, K]``, float32 or bfloat16. Donated to jit, it is updated in place.
      state_indices: ``[N]`` int32, the slot of each row; None means row n uses slot n, with P == N. A row whose index lies
        outside [0, P) is padding: its output is zero and it touches no slot. Live rows need distinct slots.
      gate: None, :class:`kda_jax.Softplus` or :class:`kda_jax.LowerBound`.
      qk_l2norm: normalise q and k over K: ``x / sqrt(sum x^2 + 1e-6)``.
      beta_sigmoid: pass ``beta`` through a sigmoid.
      allow_neg_eigval: double that sigmoid, so that ``I - beta k k^T`` may have negative eigenvalues.
      scale: factor of the output, default ``K ** -0.5``.
      implementation: None for the best one that serves the call, or a name ("xla", ...) to force it.

    Returns:
      ``o`` ``[N, HV, V]`` in the dtype of v, and the pool with the rows' slots replaced.

    Raises:
      ValueError, TypeError: a shape, dtype or value is wrong; the text says which and what it must be.
      NotImplementedError: the forced implementation does not serve the call, or the call is differentiated.

    Source: Kimi Linear (2025), eq. of the KDA recurrence; the gated delta rule (Yang et al., 2024) where g is constant
    along K.
    """
    check = _inputs.Checker("kda.decode")
    tokens, spec = _inputs.tokens(
        check,
        DECODE_AXES,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        operation=OPERATION.name,
        gate=gate,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        scale=scale,
        implementation=implementation,
    )
    state, state_indices = _inputs.pool(check, state, state_indices)
    o, state = OPERATION.bind(PoolOperands(**tokens, state=state, state_indices=state_indices), spec)
    return o, state
