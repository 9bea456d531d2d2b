"""flush: the rank-m rebuild of the accepted states."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kda_jax._operands import FlushOperands, FlushSpec
from kda_jax.xla import pool
from kda_jax.xla.tokens import for_value_heads


def flush(args: FlushOperands, spec: FlushSpec) -> tuple[jax.Array]:
    t, value_heads = args.u.shape[1:3]
    accepted = jnp.clip(args.num_accepted, 0, t)
    taken = (jnp.arange(t) < accepted[:, None])[:, :, None, None]
    u, g = jnp.where(taken, args.u, 0), jnp.where(taken, args.g, 0)
    # Sums of the decays after each token, taken in order: no large sums are subtracted from each other.
    through_end = lax.cumsum(g, axis=1, reverse=True)
    after = jnp.pad(through_end[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))
    k_out = for_value_heads(args.k, value_heads, axis=2) * jnp.exp(after)
    state = pool.read(args.state, args.state_indices)
    update = jnp.einsum("nthv,nthk->nhvk", u, k_out, precision=lax.Precision.HIGHEST)
    advanced = state * jnp.exp(through_end[:, 0])[:, :, None, :] + update
    # Nothing accepted leaves the slot bit for bit as it is.
    if args.state_indices is None:
        return (jnp.where((accepted == 0)[:, None, None, None], state, advanced.astype(state.dtype)),)
    return (pool.write(args.state, jnp.where(accepted == 0, -1, args.state_indices), advanced),)
