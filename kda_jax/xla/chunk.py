"""The chunkwise form: matrix products over chunks and a scan that carries the state from chunk to chunk.

Forward: what depends on one chunk alone is computed for all chunks at once, before and after a scan that carries the
state. Backward: a reverse scan recomputes each chunk from its first state, so its working memory is one chunk's, whatever T.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kda_jax._operands import ChunkBackwardOperands, ChunkOperands, ChunkSpec, prepared_shapes
from kda_jax.xla.decay import decayed_products, matmul, matmul_t, unit_lower_inverse
from kda_jax.xla.layout import layout
from kda_jax.xla.tokens import Tokens, for_value_heads, prepare


class Decayed(NamedTuple):
    """The products of a chunk in which decay stands."""

    A_qk: jax.Array  # [..., C, C]
    A_kk: jax.Array  # [..., C, C] without beta; only what lies below the diagonal counts
    q_in: jax.Array  # [..., C, K], q_t exp(G_t): how the outputs read the chunk's first state
    k_in: jax.Array  # [..., C, K], k_t exp(G_t): how the updates read it
    k_out: jax.Array  # [..., C, K], k_t exp(G_C - G_t): how the last state takes the updates
    decay: jax.Array  # [..., 1, K], exp(G_C)


def decayed(q: jax.Array, k: jax.Array, g: jax.Array) -> Decayed:
    """From q and k [..., H, C, K] and g [..., HV, C, K]."""
    q, k = (for_value_heads(x, g.shape[-3], axis=-3) for x in (q, k))
    (A_qk, A_kk), prefix, suffix = decayed_products((q, k), k, g)
    since_start = jnp.exp(prefix)
    return Decayed(A_qk, A_kk, q * since_start, k * since_start, k * jnp.exp(suffix), since_start[..., -1:, :])


def forward(args: ChunkOperands, spec: ChunkSpec) -> tuple[jax.Array, ...]:
    """o, the final states and, for the backward pass, the state at the start of every chunk."""
    chunked = layout(args, spec)
    q, k, v, g, beta = map(chunked.to_chunks, prepare(args, spec))
    beta = beta[..., None]
    d = decayed(q, k, g)
    inverse = unit_lower_inverse(beta * d.A_kk)
    w = matmul(inverse, beta * d.k_in)
    u = matmul(inverse, beta * v)

    def step(state, chunk):
        w, u, k_out, decay = chunk
        u = u - matmul_t(w, state)
        return state * decay + matmul(_t(u), k_out), (state, u)

    final, (states, u) = chunked.scan(step, _initial_state(args, v.dtype), (w, u, d.k_out, d.decay))
    o = chunked.to_tokens(matmul_t(d.q_in, states) + matmul(d.A_qk, u)).astype(args.v.dtype)
    final = final.astype(v.dtype if args.initial_state is None else args.initial_state.dtype)
    if spec.states_dtype is None:
        return o, final
    states = jnp.moveaxis(states, 0, 1).astype(spec.states_dtype)
    if not spec.save_intermediates:
        return o, final, states
    # The backward pass here computes chunk after chunk again in any case.
    return o, final, states, *(jnp.zeros(x.shape, x.dtype) for x in prepared_shapes(args, states.shape[1], spec.chunk_size))


def backward(args: ChunkBackwardOperands, spec: ChunkSpec) -> tuple[jax.Array, ...]:
    """The gradients of q, k, v, g, beta and, where given, A_log [B, HV], dt_bias [B, HV, K] and initial_state."""
    chunked = layout(args, spec)
    rows = args.v.shape[0]
    # One copy of the gate's parameters a row: their gradients then come out a row each.
    per_row = {
        name: jnp.broadcast_to(x, (rows, *x.shape[x.ndim - axes :]))
        for name, x, axes in (("A_log", args.A_log, 1), ("dt_bias", args.dt_bias, 2))
        if x is not None
    }
    # Zeros, not its content: a derivative of NaN is NaN even times zero.
    within = {name: chunked.without_padding(getattr(args, name)) for name in ("q", "k", "v", "g", "beta")}
    args = args._replace(**per_row, **within)
    raw = within | per_row
    tokens, pull_tokens = jax.vjp(lambda raw: prepare(args._replace(**raw), spec), raw)
    chunks = Tokens(*map(chunked.to_chunks, tokens))
    do = chunked.to_chunks(args.do.astype(tokens.v.dtype))
    states = jnp.moveaxis(args.states, 1, 0).astype(do.dtype)
    dstate, dchunks = chunked.scan(_backward_step, args.dstate.astype(do.dtype), (chunks, states, do), reverse=True)
    (draw,) = pull_tokens(Tokens(*map(chunked.to_tokens, dchunks)))
    outputs = tuple(draw[name] for name in raw)
    if args.initial_state is not None:
        outputs += (dstate.astype(args.initial_state.dtype),)
    return outputs


def _backward_step(dstate: jax.Array, chunk: tuple[Tokens, jax.Array, jax.Array]) -> tuple[jax.Array, Tokens]:
    """From the cotangent of a chunk's last state to that of its first, and those of its tokens."""
    (q, k, v, g, beta), state, do = chunk
    beta = beta[..., None]
    d, pull_decayed = jax.vjp(decayed, q, k, g)
    inverse = unit_lower_inverse(beta * d.A_kk)
    residual = v - matmul_t(d.k_in, state)  # (I + beta A_kk) u = beta residual
    u = matmul(inverse, beta * residual)

    du = matmul(_t(d.A_qk), do) + matmul_t(d.k_out, dstate)
    dsolved = matmul(_t(inverse), du)
    dresidual = beta * dsolved
    dA = -jnp.tril(matmul_t(dsolved, u), -1)  # the cotangent of beta A_kk
    dbeta = jnp.sum(dsolved * residual, axis=-1) + jnp.sum(dA * d.A_kk, axis=-1)
    dq, dk, dg = pull_decayed(
        Decayed(
            A_qk=matmul_t(do, u),
            A_kk=beta * dA,
            q_in=matmul(do, state),
            k_in=-matmul(dresidual, state),
            k_out=matmul(u, dstate),
            decay=jnp.sum(state * dstate, axis=-2, keepdims=True),
        )
    )
    dstate = dstate * d.decay + matmul(_t(do), d.q_in) - matmul(_t(dresidual), d.k_in)
    return dstate, Tokens(dq, dk, dresidual, dg, dbeta)


def _initial_state(args: ChunkOperands, dtype: jnp.dtype) -> jax.Array:
    if args.initial_state is not None:
        return args.initial_state.astype(dtype)
    b, _, hv, v = args.v.shape
    sequences = b if args.cu_seqlens is None else b * (args.cu_seqlens.shape[1] - 1)
    return jnp.zeros((sequences, hv, v, args.k.shape[-1]), dtype)


def _t(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, -1, -2)
