"""verify: the chunkwise form with one chunk of T tokens, against states that are only read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kda_jax._operands import PoolOperands, VerifySpec, single_chunk
from kda_jax.xla import pool
from kda_jax.xla.chunk import decayed
from kda_jax.xla.decay import matmul, matmul_t, unit_lower_inverse
from kda_jax.xla.layout import Uniform
from kda_jax.xla.tokens import prepare


def verify(args: PoolOperands, spec: VerifySpec) -> tuple[jax.Array, ...]:
    tokens = prepare(args, spec)
    t = args.k.shape[1]
    one_chunk = Uniform(t, single_chunk(t), 1)
    q, k, v, g, beta = (one_chunk.to_chunks(x)[0] for x in tokens)  # [N, heads, C, ...]
    beta = beta[..., None]
    state = pool.read(args.state, args.state_indices).astype(v.dtype)
    d = decayed(q, k, g)
    # The state is read once, by keys and queries together.
    reads = matmul_t(jnp.concatenate([d.k_in, d.q_in], axis=-2), state)
    k_read, q_read = jnp.split(reads, 2, axis=-2)
    u = matmul(unit_lower_inverse(beta * d.A_kk), beta * (v - k_read))
    o = one_chunk.to_tokens((q_read + matmul(d.A_qk, u))[None]).astype(args.v.dtype)
    outputs = (o, one_chunk.to_tokens(u[None]), tokens.k, tokens.g) if spec.with_update else (o,)
    if args.state_indices is None:
        return outputs
    live = pool.is_live(args.state_indices, args.state)
    return tuple(pool.mask(x, live) for x in outputs)
