"""chunk's forward pass on Triton: what each chunk needs on its own, then the state through the chunks of each sequence."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kda_jax import _target
from kda_jax._operands import ChunkBackwardOperands, ChunkOperands, ChunkSpec, Prepared, num_chunks, prepared_shapes
from kda_jax.kernels.triton import chunk_forward, chunk_prepare
from kda_jax.triton.launch import launch, like, token_constants

CHUNK = 64  # tokens


class Tile(NamedTuple):
    """``width`` of K or rows of the state to a program of ``warps`` warps; loads requested ``stages`` ahead."""

    width: int
    warps: int
    stages: int = 1


PREPARE = Tile(32, 4)
FORWARD = Tile(64, 4, stages=3)
WIDE = Tile(128, 8, stages=2)
MULTIPROCESSORS: dict[int | None, int] = {90: 132}  # by compute capability; only there wide tiles have been timed


def chain_tile(narrow: Tile, chains: int, v_dim: int) -> Tile:
    """For the kernels that go from chunk to chunk, of which a multiprocessor runs one: wide where others would have to wait.

    The bits are the same: what rows of V there are beside a row has no part in it.
    """
    at_once = MULTIPROCESSORS.get(_target.compute_capability())
    waiting = at_once is not None and chains * (v_dim // narrow.width) > at_once
    return WIDE if waiting and v_dim % WIDE.width == 0 else narrow


class Chunks(NamedTuple):
    """Where the chunks of B rows lie: NC a row, each of one sequence. The tables are there where sequences are packed."""

    number: int
    sequences: int  # a row
    bounds: jax.Array | None  # [B, NC, 2] int32: first and last token (exclusive), equal where a chunk is left over
    first: jax.Array | None  # [B, N + 1] int32: the first chunk of each sequence, and the number in use

    @property
    def packed(self) -> bool:
        return self.bounds is not None


def chunks_of(args: ChunkOperands | ChunkBackwardOperands) -> Chunks:
    tokens = args.v.shape[1]
    if args.cu_seqlens is None:
        return Chunks(num_chunks(tokens, CHUNK), 1, None, None)
    offsets = args.cu_seqlens
    sequences = offsets.shape[1] - 1
    number = num_chunks(tokens, CHUNK, sequences)
    first = jnp.pad(jnp.cumsum(-(-jnp.diff(offsets) // CHUNK), axis=1), ((0, 0), (1, 0))).astype(jnp.int32)
    chunk = jnp.arange(number, dtype=jnp.int32)
    sequence = jnp.sum(first[:, None, 1:] <= chunk[None, :, None], axis=-1)
    at = lambda x: jnp.take_along_axis(x, jnp.minimum(sequence, sequences - 1), axis=1)
    begin = at(offsets[:, :-1]) + (chunk - at(first[:, :-1])) * CHUNK
    end = jnp.minimum(begin + CHUNK, at(offsets[:, 1:]))
    used = (sequence < sequences)[..., None]
    return Chunks(number, sequences, jnp.where(used, jnp.stack([begin, end], axis=-1), 0), first)


def sum_picks(tokens: int) -> np.ndarray:
    """``tokens`` x ``tokens`` matrices: 2^-8 where a sum of log decays of the row's token contains the column's.

    First, for each level of halving (docs/mathematics.md), of the token's side of a pair; then up to and with it; then
    behind it.
    """
    t, j = np.arange(tokens)[:, None], np.arange(tokens)
    levels = range(tokens.bit_length() - 1)
    middles = [((t >> level) | 1) << level for level in levels]  # of t's block of 2^(level + 1) tokens
    sides = [np.where(t >= m, (j >= m) & (j <= t), (j > t) & (j < m)) for m in middles]
    return np.stack([*sides, j <= t, j > t]) * 2.0**-8


def _edge_picks() -> np.ndarray:
    """As ``sum_picks``, of blocks of 16 tokens, two matrices, in each of which either half of a block's rows has a sum.

    All blocks before it, and all behind it; those before it but for the first, and but for the first two.
    """
    t, j = np.arange(CHUNK)[:, None], np.arange(CHUNK) // 16
    own, first = t // 16, t % 16 < 8
    return np.stack([np.where(first, j < own, j > own), (j < own) & (j >= np.where(first, 1, 2))]) * 2.0**-8


def prepare(args: Any, spec: ChunkSpec, chunks: Chunks, *, with_A_kk: bool) -> Prepared:
    """A_kk is a stand-in where it is not wanted."""
    batch, tokens, value_heads, _ = args.v.shape
    outputs = prepared_shapes(args, chunks.number, CHUNK)
    if not with_A_kk:
        outputs[Prepared._fields.index("A_kk")] = jax.ShapeDtypeStruct((1,), jnp.float16)
    constants = token_constants(args, spec)
    for name in ("V", "SCALE", "SOFTPLUS_LINEAR_ABOVE"):
        del constants[name]
    absent = lambda x: args.beta if x is None else x
    gate = absent(args.A_log), absent(args.dt_bias)
    picks = (jnp.asarray(x, jnp.float16) for x in (sum_picks(16), _edge_picks()))
    return Prepared(
        *launch(
            chunk_prepare.prepare,
            (args.q, args.k, args.g, args.beta, *gate, absent(chunks.bounds), *picks, -tokens, -chunks.number),
            outputs,
            programs=batch * chunks.number * value_heads,
            warps=PREPARE.warps,
            fuse=True,
            BK=PREPARE.width,
            PACKED=chunks.packed,
            WITH_A_KK=with_A_kk,
            **constants,
        )
    )


def for_chain(p: Prepared) -> tuple[jax.Array, ...]:
    """What the two kernels take that go from chunk to chunk."""
    return p.k_in, p.k_out, p.q_in, p.A_qk, p.solve, p.rows, p.decay


def forward(args: ChunkOperands, spec: ChunkSpec) -> tuple[jax.Array, ...]:
    """o, the final states and, for the backward pass, the state at the start of every chunk and what else is to be saved."""
    batch, tokens, value_heads, v_dim = args.v.shape
    k_dim = args.k.shape[-1]
    chunks = chunks_of(args)
    p = prepare(args, spec, chunks, with_A_kk=spec.save_intermediates)
    absent = lambda x: p.decay if x is None else x
    state = (value_heads, v_dim, k_dim)
    initial_dtype = jnp.float32 if args.initial_state is None else args.initial_state.dtype
    saved = (1,) if spec.states_dtype is None else (batch, chunks.number, *state)
    starts = absent(args.initial_state), absent(args.cu_seqlens), absent(chunks.first)
    tile = chain_tile(FORWARD, batch * chunks.sequences * value_heads, v_dim)
    outputs = launch(
        chunk_forward.forward,
        (args.v, *for_chain(p), *starts, -chunks.sequences, -tokens, -chunks.number),
        (
            *like(args.v),
            jax.ShapeDtypeStruct((batch * chunks.sequences, *state), initial_dtype),
            jax.ShapeDtypeStruct(saved, spec.states_dtype or "float32"),
        ),
        programs=batch * chunks.sequences * value_heads * (v_dim // tile.width),
        warps=tile.warps,
        fuse=True,
        HV=value_heads,
        K=k_dim,
        V=v_dim,
        BV=tile.width,
        PACKED=chunks.packed,
        SCALE=spec.scale,
        NORMED=spec.qk_l2norm,
        HAS_INITIAL_STATE=args.initial_state is not None,
        SAVE_STATES=spec.states_dtype is not None,
        STAGES=tile.stages,
    )
    if spec.states_dtype is None:
        return outputs[:2]
    return outputs + (p if spec.save_intermediates else ())
