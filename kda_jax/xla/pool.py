"""Reading and writing slots of a state pool; padded rows read zeros and write nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def is_live(slots: jax.Array, pool: jax.Array) -> jax.Array:
    """Whether each slot index lies inside the pool."""
    return (slots >= 0) & (slots < pool.shape[0])


def read(pool: jax.Array, slots: jax.Array | None) -> jax.Array:
    """The states of the rows, [N, ...]; None is row n, slot n, which needs no gather."""
    if slots is None:
        return pool
    return pool.at[jnp.where(is_live(slots, pool), slots, pool.shape[0])].get(mode="fill", fill_value=0)


def write(pool: jax.Array, slots: jax.Array | None, states: jax.Array) -> jax.Array:
    """The pool with the rows' states in their slots."""
    states = states.astype(pool.dtype)
    if slots is None:
        return states
    return pool.at[jnp.where(is_live(slots, pool), slots, pool.shape[0])].set(states, mode="drop")


def mask(x: jax.Array, live: jax.Array) -> jax.Array:
    """``x`` with the rows that are not live set to zero."""
    return jnp.where(live.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)
