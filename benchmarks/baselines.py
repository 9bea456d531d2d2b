"""What chunk is compared with on any backend: the recurrence, one token after the other, in a lax.scan."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

import kda_jax as kda


def scan_sums(q, k, v, g, beta):
    """The recurrence as it is written, its two contractions as products and sums."""
    return _scan(lambda state, x: jnp.sum(state * x[:, :, None, :], axis=-1), q, k, v, g, beta)


def scan_einsum(q, k, v, g, beta):
    """The same with the contractions as einsum, which XLA compiles to matrix-vector products."""
    return _scan(lambda state, x: jnp.einsum("bhvk,bhk->bhv", state, x), q, k, v, g, beta)


def scan_decode(q, k, v, g, beta, **options):
    """kda.decode for every token."""

    def step(state, token):
        q, k, v, g, beta = token
        o, state = kda.decode(q, k, v, g, beta, state, **options)
        return state, o

    return _over_tokens(step, q, k, v, g, beta)


def _scan(contract, q, k, v, g, beta):
    group, scale = v.shape[2] // k.shape[2], k.shape[-1] ** -0.5

    def step(state, token):
        q, k, v, g, beta = token
        q, k = jnp.repeat(q, group, axis=1), jnp.repeat(k, group, axis=1)
        state = state * jnp.exp(g)[:, :, None, :]
        u = beta[:, :, None] * (v - contract(state, k))
        state = state + u[..., None] * k[:, :, None, :]
        return state, scale * contract(state, q)

    return _over_tokens(step, q, k, v, g, beta)


def _over_tokens(step, *tokens: jax.Array):
    batch, _, value_heads, v_dim = tokens[2].shape
    state = jnp.zeros((batch, value_heads, v_dim, tokens[1].shape[-1]), jnp.float32)
    state, o = lax.scan(step, state, tuple(jnp.moveaxis(x, 1, 0) for x in tokens))
    return jnp.moveaxis(o, 0, 1), state
