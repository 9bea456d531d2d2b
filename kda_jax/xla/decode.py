"""The recurrence, token by token: decode and decode_mtp share one step, so T tokens of one equal T calls of the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kda_jax._operands import PagedOperands, PoolOperands, Spec
from kda_jax.xla import pool
from kda_jax.xla.tokens import for_value_heads, prepare


def decode(args: PoolOperands, spec: Spec) -> tuple[jax.Array, jax.Array]:
    state = pool.read(args.state, args.state_indices)
    o, state = _step(state, args, spec)
    return _outputs(o, args, args.state_indices), pool.write(args.state, args.state_indices, state)


def decode_mtp(args: PoolOperands, spec: Spec) -> tuple[jax.Array, jax.Array]:
    o, states = _steps(pool.read(args.state, args.state_indices), args, spec)
    return _outputs(o, args, args.state_indices), _outputs(states, args, args.state_indices, args.state.dtype)


def decode_mtp_paged(args: PagedOperands, spec: Spec) -> tuple[jax.Array, jax.Array]:
    n, t = args.state_indices.shape
    accepted = args.num_accepted
    last = jnp.take_along_axis(args.state_indices, jnp.clip(accepted - 1, 0, t - 1)[:, None], axis=1)[:, 0]
    start = jnp.where((accepted >= 1) & (accepted <= t), last, -1)
    o, states = _steps(pool.read(args.state, start), args, spec)
    live = pool.is_live(start, args.state)
    slots = jnp.where(live[:, None], args.state_indices, -1)
    return _outputs(o, args, start), pool.write(args.state, slots.reshape(n * t), states.reshape(n * t, *states.shape[2:]))


def _outputs(x: jax.Array, args: PoolOperands | PagedOperands, slots: jax.Array | None, dtype=None) -> jax.Array:
    x = x.astype(args.v.dtype if dtype is None else dtype)
    return x if slots is None else pool.mask(x, pool.is_live(slots, args.state))


def _steps(state: jax.Array, args: PoolOperands | PagedOperands, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """Outputs [N, T, HV, V] and states [N, T, HV, V, K] of T steps from ``state``."""

    def step(state, token):
        o, state = _step(state, args._replace(**token), spec)
        return state, (o, state)

    tokens = {name: jnp.moveaxis(getattr(args, name), 1, 0) for name in ("q", "k", "v", "g", "beta")}
    _, (o, states) = lax.scan(step, state, tokens)
    return jnp.moveaxis(o, 0, 1), jnp.moveaxis(states, 0, 1)


def _step(state: jax.Array, args: PoolOperands | PagedOperands, spec: Spec) -> tuple[jax.Array, jax.Array]:
    """One token for every row: o [N, HV, V] and the state in the dtype it came in.

    Everything that one token needs is computed here, activations too: taken for all tokens at once in decode_mtp, they
    would be compiled in another way than in decode, and differ from it in the last bit.
    """
    q, k, v, g, beta = prepare(args, spec)
    q, k = (for_value_heads(x, v.shape[1], axis=1) for x in (q, k))
    s = state.astype(g.dtype) * jnp.exp(g)[:, :, None, :]
    u = beta[..., None] * (v - _matvec(s, k))
    s = s + u[..., None] * k[:, :, None, :]
    return _matvec(s, q), s.astype(state.dtype)


def _matvec(s: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.einsum("nhvk,nhk->nhv", s, x, precision=lax.Precision.HIGHEST)
