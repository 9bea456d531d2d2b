"""How tokens lie in chunks, and how a scan over chunks hands the state on.

Arrays by chunk are [NC, B, H or HV, C, D]: chunks first, for the scan; states are [B, HV, V, K].
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kda_jax._operands import ChunkBackwardOperands, ChunkOperands, ChunkSpec, chunk_length, num_chunks

Step = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@dataclasses.dataclass(frozen=True)
class Uniform:
    """B rows of T tokens, one sequence each."""

    tokens: int
    length: int  # tokens of a chunk
    count: int  # chunks of a row

    def to_chunks(self, x: jax.Array) -> jax.Array:
        """[B, T, heads, ...] to chunks; what fills up the last chunk is zero, which leaves the state alone."""
        x = jnp.pad(x, ((0, 0), (0, self.count * self.length - self.tokens), *((0, 0),) * (x.ndim - 2)))
        return self._split(x)

    def to_tokens(self, x: jax.Array) -> jax.Array:
        """The inverse of to_chunks."""
        return self._join(x)[:, : self.tokens]

    def without_padding(self, x: jax.Array) -> jax.Array:
        """[B, T, ...] with zeros for the tokens of no sequence."""
        return x

    def scan(self, step: Step, start: jax.Array, chunks: Any, *, reverse: bool = False) -> tuple[jax.Array, Any]:
        """Carries the states ``[S, HV, V, K]`` over the chunks: ``step(state, chunk) -> (state, out)``.

        Returns the last state of every sequence and the outs by chunk.
        """
        return lax.scan(step, start, chunks, reverse=reverse)

    def _split(self, x: jax.Array) -> jax.Array:
        x = x.reshape(x.shape[0], self.count, self.length, *x.shape[2:])
        return jnp.moveaxis(x, (1, 0, 3, 2), (0, 1, 2, 3))

    def _join(self, x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, (0, 1, 2, 3), (1, 0, 3, 2))
        return x.reshape(x.shape[0], self.count * self.length, *x.shape[3:])


@dataclasses.dataclass(frozen=True)
class Packed(Uniform):
    """Rows of T tokens in which N sequences lie one after the other, as cu_seqlens says; zero-length ones may be among them.

    Every sequence starts a new chunk. The number of chunks is fixed (enough for any lengths); those left over are empty.
    Tokens at and after the last offset belong to no sequence: their outputs are zero.
    """

    offsets: jax.Array  # [B, N + 1]

    @property
    def _first_chunk(self) -> jax.Array:
        """[B, N + 1]: the first chunk of each sequence, and the number of chunks in use."""
        chunks = -(-jnp.diff(self.offsets, axis=1) // self.length)
        return jnp.pad(jnp.cumsum(chunks, axis=1), ((0, 0), (1, 0)))

    def _sequence(self, position: jax.Array, bounds: jax.Array) -> jax.Array:
        """[B, len(position)]: which sequence each position falls in, N behind the last."""
        return jnp.sum(bounds[:, None, 1:] <= position[None, :, None], axis=-1)

    def _at(self, x: jax.Array, index: jax.Array) -> jax.Array:
        """Rowwise x[index], zero where the index lies outside."""
        index = jnp.where(index < 0, x.shape[1], index)
        return jax.vmap(lambda x, i: x.at[i].get(mode="fill", fill_value=0))(x, index)

    def to_chunks(self, x: jax.Array) -> jax.Array:
        chunk = jnp.arange(self.count)
        sequence = self._sequence(chunk, self._first_chunk)
        begin = (
            self._at(self.offsets[:, :-1], sequence) + (chunk - self._at(self._first_chunk[:, :-1], sequence)) * self.length
        )
        end = self._at(self.offsets[:, 1:], sequence)  # 0 for the chunks left over, so that they stay empty
        token = begin[:, :, None] + jnp.arange(self.length)
        token = jnp.where(token < end[:, :, None], token, -1)
        return self._split(self._at(x, token.reshape(x.shape[0], -1)))

    def to_tokens(self, x: jax.Array) -> jax.Array:
        token = jnp.arange(self.tokens)
        sequence = self._sequence(token, self.offsets)
        place = (
            self._at(self._first_chunk[:, :-1], sequence) * self.length + token - self._at(self.offsets[:, :-1], sequence)
        )
        return self._at(self._join(x), jnp.where(token < self.offsets[:, -1:], place, -1))

    def without_padding(self, x: jax.Array) -> jax.Array:
        within = jnp.arange(self.tokens) < self.offsets[:, -1:]
        return jnp.where(within.reshape(*within.shape, *(1,) * (x.ndim - 2)), x, 0)

    def scan(self, step: Step, start: jax.Array, chunks: Any, *, reverse: bool = False) -> tuple[jax.Array, Any]:
        batch = self.offsets.shape[0]
        sequences = start.shape[0] // batch
        start = start.reshape(batch, sequences, *start.shape[1:])
        rows = jnp.arange(batch)
        chunk, first_chunk = jnp.arange(self.count), self._first_chunk
        sequence = self._sequence(chunk, first_chunk)  # [B, NC]
        first = chunk == self._at(first_chunk[:, :-1], sequence)
        last = chunk == self._at(first_chunk[:, 1:], sequence) - 1
        enters, leaves = (last, first) if reverse else (first, last)

        def packed_step(carry, xs):
            state, ended = carry
            sequence, enters, leaves, chunk = xs
            fresh = start.at[rows, sequence].get(mode="clip")
            state, out = step(jnp.where(enters[:, None, None, None], fresh, state), chunk)
            ended = ended.at[rows, jnp.where(leaves, sequence, sequences)].set(state, mode="drop")
            return (state, ended), out

        # A sequence without tokens keeps the state it starts with.
        carry = jnp.zeros_like(start[:, 0]), start
        (_, ended), outs = lax.scan(packed_step, carry, (sequence.T, enters.T, leaves.T, chunks), reverse=reverse)
        return ended.reshape(-1, *ended.shape[2:]), outs


def layout(args: ChunkOperands | ChunkBackwardOperands, spec: ChunkSpec) -> Uniform:
    tokens = args.k.shape[1]
    length = chunk_length(tokens, spec.chunk_size)
    if args.cu_seqlens is None:
        return Uniform(tokens, length, num_chunks(tokens, spec.chunk_size))
    count = num_chunks(tokens, spec.chunk_size, args.cu_seqlens.shape[1] - 1)
    return Packed(tokens, length, count, args.cu_seqlens)
