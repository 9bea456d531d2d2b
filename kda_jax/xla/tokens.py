"""From the operands as given to what the recurrence uses: activations applied, in the arithmetic dtype."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kda_jax import _gates
from kda_jax._operands import L2NORM_EPS, Spec, arithmetic_dtype


class Tokens(NamedTuple):
    """q (scaled), k: [..., H, K]; v: [..., HV, V]; g (log decay): [..., HV, K]; beta: [..., HV]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array


def prepare(args: Any, spec: Spec) -> Tokens:
    """Casts, applies L2 norm, gate and sigmoid, and folds the output's scale into q."""
    dtype = arithmetic_dtype(args)
    q, k, v, g, beta = (x.astype(dtype) for x in args[:5])
    A_log, dt_bias = (
        None if x is None else _per_row(x.astype(dtype), g.ndim, own) for x, own in ((args.A_log, 1), (args.dt_bias, 2))
    )
    if spec.qk_l2norm:
        q, k = _l2norm(q), _l2norm(k)
    if spec.beta_sigmoid:
        beta = jax.nn.sigmoid(beta) * (2.0 if spec.allow_neg_eigval else 1.0)
    g = _gates.log_decay(g, A_log, dt_bias, gate=spec.gate, lower_bound=spec.lower_bound)
    return Tokens(q * spec.scale, k, v, g, beta)


def for_value_heads(x: jax.Array, value_heads: int, axis: int) -> jax.Array:
    """A q/k array with each head repeated for the value heads of its group; XLA fuses the repetition into its reader."""
    return jnp.repeat(x, value_heads // x.shape[axis], axis=axis)


def _per_row(x: jax.Array, ndim: int, own: int) -> jax.Array:
    """A gate parameter with ``own`` axes, or one more for rows, made to broadcast against [row, ..., HV, K]."""
    if x.ndim == own:
        return x
    return x.reshape(x.shape[0], *(1,) * (ndim - 3), *x.shape[1:])


def _l2norm(x: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + L2NORM_EPS)
