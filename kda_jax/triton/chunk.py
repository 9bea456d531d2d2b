"""chunk on Triton: what each chunk needs on its own, then the state through the chunks of each sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kda_jax._operands import ChunkBackwardOperands, ChunkOperands, ChunkSpec, Prepared, num_chunks
from kda_jax.kernels.triton import (
    chunk_backward,
    chunk_cotangents,
    chunk_forward,
    chunk_gradients,
    chunk_prepare,
    chunk_state_cotangents,
)
from kda_jax.triton.launch import launch, like, token_constants

CHUNK = 64  # tokens


class Tile(NamedTuple):
    """``width`` of K (prepare) or rows of the state (forward) to a program of ``warps`` warps; chunks requested ahead."""

    width: int
    warps: int
    stages: int = 1


PREPARE = Tile(32, 4)
FORWARD = Tile(64, 4, stages=3)
BACKWARD = Tile(64, 4, stages=3)
COTANGENTS = Tile(64, 4)
STATE_COTANGENTS = Tile(64, 4, stages=2)
GRADIENTS_STAGES = 2
GRADIENTS_REGISTERS = 128  # two programs at a time; where they sum over a group that costs more than it gives


class Chunks(NamedTuple):
    """Where the chunks of B rows lie: NC a row, each of one sequence. The tables are there where sequences are packed."""

    number: int
    bounds: jax.Array | None  # [B, NC, 2] int32: first and last token (exclusive), equal where a chunk is left over
    first: jax.Array | None  # [B, N + 1] int32: the first chunk of each sequence, and the number in use

    @property
    def packed(self) -> bool:
        return self.bounds is not None


def chunks_of(args: Any) -> Chunks:
    tokens = args.v.shape[1]
    if args.cu_seqlens is None:
        return Chunks(num_chunks(tokens, CHUNK), None, None)
    offsets = args.cu_seqlens
    sequences = offsets.shape[1] - 1
    count = num_chunks(tokens, CHUNK, sequences)
    first = jnp.pad(jnp.cumsum(-(-jnp.diff(offsets) // CHUNK), axis=1), ((0, 0), (1, 0))).astype(jnp.int32)
    chunk = jnp.arange(count, dtype=jnp.int32)
    sequence = jnp.sum(first[:, None, 1:] <= chunk[None, :, None], axis=-1)
    at = lambda x: jnp.take_along_axis(x, jnp.minimum(sequence, sequences - 1), axis=1)
    begin = at(offsets[:, :-1]) + (chunk - at(first[:, :-1])) * CHUNK
    end = jnp.minimum(begin + CHUNK, at(offsets[:, 1:]))
    used = (sequence < sequences)[..., None]
    return Chunks(count, jnp.where(used, jnp.stack([begin, end], axis=-1), 0), first)


def level_tables() -> tuple[jax.Array, jax.Array]:
    """What the five levels of halving 32 tokens (docs/mathematics.md) pick, as matrices [32, 32] of float16.

    picks [7, ...]: 2^-8 where the sum of log decays of token t contains token j: of t's side of a pair at levels 0 to 4, up to
    and with t at 5, behind t at 6. pairs [5, ...]: 1 where t and j are on the two sides of a level.
    """
    t, j = np.arange(32)[:, None], np.arange(32)
    middle = lambda level: ((t >> level) | 1) << level  # of t's block of 2^(level + 1) tokens
    until = [np.where(t >= middle(n), (j >= middle(n)) & (j <= t), (j > t) & (j < middle(n))) for n in range(5)]
    picks = np.stack([*until, j <= t, j > t]) * 2.0**-8
    pairs = np.stack([(t ^ j) >> level == 1 for level in range(5)])
    return jnp.asarray(picks, jnp.float16), jnp.asarray(pairs, jnp.float16)


def block_tables() -> tuple[jax.Array, jax.Array]:
    """What ``prepare`` sums log decays with: 2^-8 where the sum of a row's token contains the column's, in float16.

    picks [6, 16, 16], within a block of 16 tokens: of a token's side of a pair at levels 0 to 3, up to and with it, and behind
    it. edges [2, 64, 64], of whole blocks, for two sums that the two halves of a block's rows hold: all before it and all
    behind it; those before it but for the first, and but for the first two.
    """
    t, j = np.arange(16)[:, None], np.arange(16)
    middle = lambda level: ((t >> level) | 1) << level  # of t's block of 2^(level + 1) tokens
    until = [np.where(t >= middle(n), (j >= middle(n)) & (j <= t), (j > t) & (j < middle(n))) for n in range(4)]
    picks = *until, j <= t, j > t
    t, j = np.arange(64)[:, None], np.arange(64) // 16
    own, first = t // 16, t % 16 < 8
    edges = np.where(first, j < own, j > own), (j < own) & (j >= np.where(first, 1, 2))
    return tuple(jnp.asarray(np.stack(x) * 2.0**-8, jnp.float16) for x in (picks, edges))


def prepare(args: Any, spec: ChunkSpec, chunks: Chunks, *, with_A_kk: bool) -> Prepared:
    batch, tokens, value_heads, _ = args.v.shape
    k_dim = args.k.shape[-1]
    lead = batch, chunks.number, value_heads
    half = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float16)
    full = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    wide, square = half(*lead, CHUNK, k_dim), half(*lead, CHUNK, CHUNK)
    constants = token_constants(args, spec)
    del constants["V"], constants["SCALE"]
    absent = lambda x: args.beta if x is None else x
    return Prepared(
        *launch(
            chunk_prepare.prepare,
            (args.q, args.k, args.g, args.beta, absent(args.A_log), absent(args.dt_bias), absent(chunks.bounds))
            + (*block_tables(), -tokens, -chunks.number),
            (wide, wide, wide, square, square if with_A_kk else half(1), square, full(*lead, 3, CHUNK), full(*lead, k_dim)),
            programs=batch * chunks.number * value_heads,
            warps=PREPARE.warps,
            fuse=True,
            BK=PREPARE.width,
            PACKED=chunks.packed,
            WITH_A_KK=with_A_kk,
            **constants,
        )
    )


def forward(args: ChunkOperands, spec: ChunkSpec) -> tuple[jax.Array, ...]:
    """o, the final states and, for the backward pass, the state at the start of every chunk and what else is to be saved."""
    batch, tokens, value_heads, v_dim = args.v.shape
    k_dim = args.k.shape[-1]
    chunks = chunks_of(args)
    sequences = 1 if args.cu_seqlens is None else args.cu_seqlens.shape[1] - 1
    p = prepare(args, spec, chunks, with_A_kk=spec.save_intermediates)
    absent = lambda x: p.decay if x is None else x
    state = (value_heads, v_dim, k_dim)
    initial_dtype = jnp.float32 if args.initial_state is None else args.initial_state.dtype
    saved = (1,) if spec.states_dtype is None else (batch, chunks.number, *state)
    outputs = launch(
        chunk_forward.forward,
        (args.v, p.k_in, p.k_out, p.q_in, p.A_qk, p.solve, p.rows, p.decay, absent(args.initial_state))
        + (absent(args.cu_seqlens), absent(chunks.first), -sequences, -tokens, -chunks.number),
        (
            jax.ShapeDtypeStruct(args.v.shape, args.v.dtype),
            jax.ShapeDtypeStruct((batch * sequences, *state), initial_dtype),
            jax.ShapeDtypeStruct(saved, spec.states_dtype or "float32"),
        ),
        programs=batch * sequences * value_heads * (v_dim // FORWARD.width),
        warps=FORWARD.warps,
        fuse=True,
        HV=value_heads,
        K=k_dim,
        V=v_dim,
        BV=FORWARD.width,
        PACKED=chunks.packed,
        SCALE=spec.scale,
        NORMED=spec.qk_l2norm,
        HAS_INITIAL_STATE=args.initial_state is not None,
        SAVE_STATES=spec.states_dtype is not None,
        STAGES=FORWARD.stages,
    )
    if spec.states_dtype is None:
        return outputs[:2]
    return outputs + (p if spec.save_intermediates else ())


def backward(args: ChunkBackwardOperands, spec: ChunkSpec) -> tuple[jax.Array, ...]:
    """The gradients of q, k, v, g, beta and, where given, A_log [B, HV], dt_bias [B, HV, K] and initial_state."""
    batch, tokens, value_heads, v_dim = args.v.shape
    heads, k_dim = args.k.shape[2:]
    chunks = chunks_of(args)
    sequences = 1 if args.cu_seqlens is None else args.cu_seqlens.shape[1] - 1
    p = args.prepared or prepare(args, spec, chunks, with_A_kk=True)
    absent = lambda x: p.decay if x is None else x
    array = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
    lead = batch, chunks.number, value_heads
    initial = (1,) if args.initial_state is None else args.initial_state.shape
    dsolved, dstates, dinitial_state = launch(
        chunk_backward.backward,
        (args.do, p.k_in, p.k_out, p.q_in, p.A_qk, p.solve, p.rows, p.decay, args.dstate, absent(args.cu_seqlens))
        + (absent(chunks.first), -sequences, -tokens, -chunks.number),
        (
            array(jnp.bfloat16, *lead, CHUNK, v_dim),
            array(args.states.dtype, *args.states.shape),
            array(jnp.float32 if args.initial_state is None else args.initial_state.dtype, *initial),
        ),
        programs=batch * sequences * value_heads * (v_dim // BACKWARD.width),
        warps=BACKWARD.warps,
        fuse=True,
        HV=value_heads,
        K=k_dim,
        V=v_dim,
        BV=BACKWARD.width,
        PACKED=chunks.packed,
        SCALE=spec.scale,
        NORMED=spec.qk_l2norm,
        HAS_INITIAL_STATE=args.initial_state is not None,
        STAGES=BACKWARD.stages,
    )
    tables = absent(args.cu_seqlens), absent(chunks.bounds), -sequences, -tokens, -chunks.number
    constants = token_constants(args, spec)
    dv, dbeta, u, dA_qk, dA_kk, scales = launch(
        chunk_cotangents.cotangents,
        (args.v, args.beta, args.do, args.states, dsolved, p.k_in, p.A_kk, p.solve, p.rows, *tables),
        (
            *like(args.v, args.beta),
            array(jnp.bfloat16, *lead, CHUNK, v_dim),
            *(array(jnp.float16, *lead, CHUNK, CHUNK),) * 2,
            array(jnp.float32, *lead),
        ),
        programs=batch * chunks.number * value_heads,
        warps=COTANGENTS.warps,
        fuse=True,
        PACKED=chunks.packed,
        NORMED=spec.qk_l2norm,
        **{name: constants[name] for name in ("HV", "K", "V", "BETA_RANGE", "SCALE")},
    )
    for name in ("BETA_RANGE", "V", "SCALE", "SOFTPLUS_LINEAR_ABOVE"):
        del constants[name]
    wide = array(jnp.bfloat16, *lead, CHUNK, k_dim)
    dq_in, dk_in, dk_out, halves = launch(
        chunk_state_cotangents.state_cotangents,
        (args.do, args.states, dstates, dsolved, u, p.k_in, p.k_out, p.q_in, p.rows, p.decay)
        + (absent(chunks.bounds), -tokens, -chunks.number),
        (wide, wide, wide, array(jnp.float32, *lead, 2, k_dim)),
        programs=batch * chunks.number * value_heads * (k_dim // STATE_COTANGENTS.width),
        warps=STATE_COTANGENTS.warps,
        registers=168,
        fuse=True,
        HV=value_heads,
        K=k_dim,
        V=v_dim,
        PACKED=chunks.packed,
        NORMED=spec.qk_l2norm,
        SCALE=spec.scale,
        STAGES=STATE_COTANGENTS.stages,
    )
    dq, dk, dg = launch(
        chunk_gradients.gradients,
        (args.q, args.k, args.g, absent(args.A_log), absent(args.dt_bias), dq_in, dk_in, dk_out, halves)
        + (dA_qk, dA_kk, scales, p.rows, *level_tables(), *tables),
        like(args.q, args.k, args.g),
        programs=batch * chunks.number * 2 * heads,
        warps=k_dim // 16,
        registers=GRADIENTS_REGISTERS if value_heads == heads else None,
        fuse=True,
        PACKED=chunks.packed,
        STAGES=GRADIENTS_STAGES,
        **constants,
    )
    grads = [dq, dk, dv, dg, dbeta]
    if args.A_log is not None:
        grads.append(A_log_gradient(args, spec, dg))
    if args.dt_bias is not None:
        grads.append(jnp.sum(dg, axis=1, dtype=jnp.float32).astype(args.dt_bias.dtype))
    if args.initial_state is not None:
        grads.append(dinitial_state)
    return tuple(grads)


def A_log_gradient(args: ChunkBackwardOperands, spec: ChunkSpec, dg: jax.Array) -> jax.Array:
    """[B, HV], from the gradient of the gate's input: what the gate's two derivatives have not in common."""
    x = args.g.astype(jnp.float32)
    if args.dt_bias is not None:
        x += jnp.expand_dims(args.dt_bias.astype(jnp.float32), -3)
    if spec.gate == "softplus":  # softplus(x) / sigmoid(x), which tends to 1 where both vanish
        x = jnp.where(x < -20, 1.0, jax.nn.softplus(x) * (1 + jnp.exp(-jnp.maximum(x, -20))))
    return jnp.sum(dg.astype(jnp.float32) * x, axis=(1, 3)).astype(args.A_log.dtype)
