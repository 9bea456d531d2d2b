"""chunk's backward pass on Triton: the states' cotangent through the chunks of each sequence, then all chunks at once."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kda_jax._operands import ChunkBackwardOperands, ChunkSpec
from kda_jax.kernels.triton import chunk_backward, chunk_cotangents, chunk_gradients, chunk_state_cotangents
from kda_jax.triton.chunk import CHUNK, Tile, chain_tile, chunks_of, for_chain, prepare, sum_picks
from kda_jax.triton.launch import launch, like, token_constants

BACKWARD = Tile(64, 4, stages=2)
COTANGENTS = Tile(64, 4)
STATE_COTANGENTS = Tile(64, 4, stages=2)
STATE_COTANGENTS_REGISTERS = 168
GRADIENTS_STAGES = 2


def backward(args: ChunkBackwardOperands, spec: ChunkSpec) -> tuple[jax.Array, ...]:
    """The gradients of q, k, v, g, beta and, where given, A_log [B, HV], dt_bias [B, HV, K] and initial_state."""
    batch, tokens, value_heads, v_dim = args.v.shape
    heads, k_dim = args.k.shape[2:]
    chunks = chunks_of(args)
    p = args.prepared or prepare(args, spec, chunks, with_A_kk=True)
    absent = lambda x: p.decay if x is None else x
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    lead = batch, chunks.number, value_heads
    sizes: dict[str, Any] = {"HV": value_heads, "K": k_dim, "V": v_dim, "PACKED": chunks.packed}
    options: dict[str, Any] = {"SCALE": spec.scale, "NORMED": spec.qk_l2norm}
    of_chunk = -tokens, -chunks.number
    of_sequence = -chunks.sequences, *of_chunk

    tile = chain_tile(BACKWARD, batch * chunks.sequences * value_heads, v_dim)
    initial = array(jnp.float32, 1) if args.initial_state is None else like(args.initial_state)[0]
    dsolved, dstates, dinitial_state = launch(
        chunk_backward.backward,
        (args.do, *for_chain(p), args.dstate, absent(args.cu_seqlens), absent(chunks.first), *of_sequence),
        (array(jnp.bfloat16, *lead, CHUNK, v_dim), *like(args.states), initial),
        programs=batch * chunks.sequences * value_heads * (v_dim // tile.width),
        warps=tile.warps,
        fuse=True,
        BV=tile.width,
        HAS_INITIAL_STATE=args.initial_state is not None,
        STAGES=tile.stages,
        **sizes,
        **options,
    )

    constants = token_constants(args, spec)
    places = absent(args.cu_seqlens), absent(chunks.bounds)
    square = array(jnp.float16, *lead, CHUNK, CHUNK)
    dv, dbeta, u, dA_qk, dA_kk, scales = launch(
        chunk_cotangents.cotangents,
        (args.v, args.beta, args.do, args.states, dsolved, p.k_in, p.A_kk, p.solve, p.rows, *places, *of_sequence),
        (*like(args.v, args.beta), array(jnp.bfloat16, *lead, CHUNK, v_dim), square, square, array(jnp.float32, *lead)),
        programs=batch * chunks.number * value_heads,
        warps=COTANGENTS.warps,
        fuse=True,
        BETA_RANGE=constants["BETA_RANGE"],
        **sizes,
        **options,
    )
    wide = array(jnp.bfloat16, *lead, CHUNK, k_dim)
    of_ends = launch(
        chunk_state_cotangents.state_cotangents,
        (args.do, args.states, dstates, dsolved, u, p.k_in, p.k_out, p.q_in, p.rows, p.decay, places[1], *of_chunk),
        (wide, wide, wide, array(jnp.float32, *lead, 2, k_dim)),
        programs=batch * chunks.number * value_heads * (k_dim // STATE_COTANGENTS.width),
        warps=STATE_COTANGENTS.warps,
        registers=STATE_COTANGENTS_REGISTERS,
        fuse=True,
        STAGES=STATE_COTANGENTS.stages,
        **sizes,
        **options,
    )
    gate = absent(args.A_log), absent(args.dt_bias)
    dq, dk, dg = launch(
        chunk_gradients.gradients,
        (args.q, args.k, args.g, *gate, *of_ends, dA_qk, dA_kk, scales, p.rows, *_level_tables(), *places, *of_sequence),
        like(args.q, args.k, args.g),
        programs=batch * chunks.number * 2 * heads,
        # Two programs to a multiprocessor; those that sum over a group need all of its registers.
        warps=4 if value_heads == heads else k_dim // 16,
        fuse=True,
        PACKED=chunks.packed,
        STAGES=GRADIENTS_STAGES,
        **{x: constants[x] for x in ("H", "HV", "K", "GATE", "HAS_BIAS", "A_LOG_STRIDE", "DT_BIAS_STRIDE", "LOWER_BOUND")},
        L2NORM_EPS=constants["L2NORM_EPS"],
    )
    grads = [dq, dk, dv, dg, dbeta]
    if args.A_log is not None:
        grads.append(_A_log_gradient(args, spec, dg))
    if args.dt_bias is not None:
        grads.append(jnp.sum(dg, axis=1, dtype=jnp.float32).astype(args.dt_bias.dtype))
    if args.initial_state is not None:
        grads.append(dinitial_state)
    return tuple(grads)


def _level_tables() -> tuple[jax.Array, jax.Array]:
    """For half a chunk: ``sum_picks``, and for each level 1 where two tokens are on its two sides."""
    t = np.arange(CHUNK // 2)
    pairs = np.stack([(t[:, None] ^ t) >> level == 1 for level in range(5)])
    return jnp.asarray(sum_picks(CHUNK // 2), jnp.float16), jnp.asarray(pairs, jnp.float16)


def _A_log_gradient(args: ChunkBackwardOperands, spec: ChunkSpec, dg: jax.Array) -> jax.Array:
    """[B, HV], from the gradient of the gate's input: times what the gate's two derivatives have not in common."""
    assert args.A_log is not None
    x = args.g.astype(jnp.float32)
    if args.dt_bias is not None:
        x += jnp.expand_dims(args.dt_bias.astype(jnp.float32), -3)
    if spec.gate == "softplus":  # softplus(x) / sigmoid(x), which tends to 1 where both vanish
        x = jnp.where(x < -20, 1.0, jax.nn.softplus(x) * (1 + jnp.exp(-jnp.maximum(x, -20))))
    dg = dg.astype(jnp.float32)
    terms = jnp.where(dg == 0, 0.0, dg * x)  # whatever x is: it may be padding
    return jnp.sum(terms, axis=(1, 3)).astype(args.A_log.dtype)
