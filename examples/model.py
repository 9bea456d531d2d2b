"""A byte-level language model of KDA layers, with multi-token prediction (MTP) heads that draft the bytes after the next.

The same layers run in three ways: over whole sequences (``kda.chunk``: training and prefill), one token a request
(``kda.decode``) and T draft tokens a request (``kda.verify``, whose outcome ``commit`` writes with ``kda.flush_layers``).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

import kda_jax as kda

VOCABULARY = 256
CONV_WIDTH = 4


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    layers: int = 2
    heads: int = 1  # of q and k
    value_heads: int = 2  # a multiple of heads: grouped value attention
    head_dim: int = 64
    width: int = 128
    draft_length: int = 4
    dtype: str = "float32"  # of activations; parameters and states are float32

    def __post_init__(self) -> None:
        if self.value_heads % self.heads:
            raise ValueError(f"{self.value_heads} value heads are not a multiple of {self.heads} heads")

    @property
    def qkv_channels(self) -> int:
        return (2 * self.heads + self.value_heads) * self.head_dim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """What the layers remember of every request: pools of P slots, which requests take and leave.

    A row of a batch whose slot is -1 is padding: it reads zeros and writes nothing.
    """

    states: jax.Array  # [L, P, HV, V, K]
    histories: jax.Array  # [L, P, CONV_WIDTH - 1, channels], the latest inputs of the short convolutions

    @classmethod
    def empty(cls, config: ModelConfig, slots: int) -> Cache:
        size = config.head_dim
        return cls(
            jnp.zeros((config.layers, slots, config.value_heads, size, size)),
            jnp.zeros((config.layers, slots, CONV_WIDTH - 1, config.qkv_channels), config.dtype),
        )

    def pool_of_all_layers(self, slots: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The states as one pool ``[L * P, HV, V, K]``, and each layer's slots in it, ``[L, N]``.

        Taking ``states[layer]`` and stacking the results again would copy the pools in every step; this view is free.
        """
        layers, size = self.states.shape[:2]
        first = size * jnp.arange(layers)[:, None]
        return self.states.reshape(-1, *self.states.shape[2:]), jnp.where(slots < 0, -1, first + slots)


def read_slots(pools: jax.Array, slots: jax.Array) -> jax.Array:
    """Rows ``[L, N, ...]`` of pools ``[L, P, ...]``."""
    return pools.at[:, slots].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def write_slots(pools: jax.Array, slots: jax.Array, rows: jax.Array) -> jax.Array:
    return pools.at[:, slots].set(rows, mode="drop", wrap_negative_indices=False)


class Pending(NamedTuple):
    """What verify leaves for commit."""

    updates: kda.Update  # of arrays [L, N, T, ...]
    windows: jax.Array  # [L, N, CONV_WIDTH - 1 + T, channels], the inputs of the short convolutions


def greedy(logits: jax.Array) -> jax.Array:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


# A way to run the recurrence: (q, k, v, g, beta, **options) to the outputs and what it keeps of the tokens (final states,
# a pool or an Update).
Attend = Callable[..., tuple[jax.Array, Any]]


class DeltaAttention(nnx.Module):
    """Kimi Delta Attention between its projections: short convolution before it, gated norm after it."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        values = config.value_heads * config.head_dim
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.qkv = linear(config.width, config.qkv_channels)
        self.conv = nnx.Param(jax.random.uniform(rngs.params(), (CONV_WIDTH, config.qkv_channels), minval=-0.5, maxval=0.5))
        self.decay = linear(config.width, values)
        self.beta = linear(config.width, config.value_heads)
        self.output_gate = linear(config.width, values)
        self.norm = nnx.RMSNorm(config.head_dim, dtype=config.dtype, rngs=rngs)
        self.out = linear(values, config.width)
        # Heads start with memories of about one token to a thousand: rates of 1 to 16, times softplus(dt_bias) of
        # 0.001 to 0.1 (Mamba's initial values).
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (config.value_heads,), minval=1, maxval=16)))
        shape = (config.value_heads, config.head_dim)
        step = jnp.exp(jax.random.uniform(rngs.params(), shape, minval=math.log(0.001), maxval=math.log(0.1)))
        self.dt_bias = nnx.Param(jnp.log(jnp.expm1(step)))  # the inverse of softplus

    def __call__(self, x: jax.Array, history: jax.Array, attend: Attend) -> tuple[jax.Array, Any, jax.Array]:
        """``x`` is ``[N, T, width]``, ``history`` the convolution's last inputs before it.

        Returns the output, what ``attend`` keeps of the tokens, and the convolution's inputs, history first.
        """
        rows, length, _ = x.shape
        heads, head_dim = self.config.heads, self.config.head_dim
        window = jnp.concatenate([history, self.qkv(x)], axis=1)
        conv = self.conv[...].astype(window.dtype)
        qkv = jax.nn.silu(sum(window[:, i : i + length] * conv[i] for i in range(CONV_WIDTH)))
        q, k, v = jnp.split(qkv.reshape(rows, length, -1, head_dim), [heads, 2 * heads], axis=2)
        o, memory = attend(
            q,
            k,
            v,
            self.decay(x).reshape(v.shape),
            self.beta(x),
            gate=kda.Softplus(self.A_log[...], self.dt_bias[...]),
            qk_l2norm=True,
            beta_sigmoid=True,
        )
        o = self.norm(o) * jax.nn.sigmoid(self.output_gate(x)).reshape(o.shape)
        return self.out(o.reshape(rows, length, -1)), memory, window


class Block(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.attention_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.attention = DeltaAttention(config, rngs=rngs)
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.mlp_in = linear(config.width, 4 * config.width)
        self.mlp_out = linear(4 * config.width, config.width)

    def __call__(self, x: jax.Array, history: jax.Array, attend: Attend) -> tuple[jax.Array, Any, jax.Array]:
        attended, memory, window = self.attention(self.attention_norm(x), history, attend)
        x = x + attended
        x = x + self.mlp_out(jax.nn.silu(self.mlp_in(self.mlp_norm(x))))
        return x, memory, window


class DraftHead(nnx.Module):
    """Moves a hidden state on by one byte without the layers: from where ``byte`` was chosen to where the next one is.

    Told what was chosen, the heads draft a sequence that hangs together, not each its own likeliest byte (Hydra, Ankner et
    al., 2024).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, config.width, config.width, use_bias=False, dtype=config.dtype, rngs=rngs)
        self.from_hidden = linear()
        self.from_byte = linear()
        self.out = linear(kernel_init=nnx.initializers.zeros)

    def __call__(self, hidden: jax.Array, byte: jax.Array) -> jax.Array:
        return hidden + self.out(jax.nn.silu(self.from_hidden(hidden) + self.from_byte(byte)))


@jax.custom_vjp
def embed(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """Rows of the table. Its gradient is a product: thousands of rows scattered into 256 would wait for each other."""
    return table[tokens]


def _embed_backward(residuals: tuple[jax.Array, int], rows: jax.Array) -> tuple[jax.Array, None]:
    tokens, size = residuals
    picks = jax.nn.one_hot(tokens.reshape(-1), size, dtype=rows.dtype, axis=0)
    return picks @ rows.reshape(-1, rows.shape[-1]), None


embed.defvjp(lambda table, tokens: (embed(table, tokens), (tokens, len(table))), _embed_backward)


class ByteEmbed(nnx.Embed):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return embed(self.embedding[...].astype(self.dtype), tokens)


class LanguageModel(nnx.Module):
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.embed = ByteEmbed(VOCABULARY, config.width, dtype=config.dtype, rngs=rngs)
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = nnx.RMSNorm(config.width, dtype=config.dtype, rngs=rngs)
        self.draft_heads = nnx.List([DraftHead(config, rngs=rngs) for _ in range(config.draft_length)])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Of the next byte: ``[..., width]`` to ``[..., 256]``."""
        return self.embed.attend(hidden)

    def draft_logits(self, hidden: jax.Array, following: jax.Array) -> jax.Array:
        """For training: ``[..., draft_length, 256]``, where head j is told the j bytes ``following`` that it comes after."""
        logits = []
        for head, byte in zip(self.draft_heads, jnp.moveaxis(following, -1, 0), strict=True):
            hidden = head(hidden, self.embed(byte))
            logits.append(self.logits(hidden))
        return jnp.stack(logits, axis=-2)

    def draft(self, hidden: jax.Array, byte: jax.Array) -> jax.Array:
        """The ``draft_length`` bytes that likely follow ``byte``, which was chosen at ``hidden``: ``[N, draft_length]``."""
        drafts = []
        for head in self.draft_heads:
            hidden = head(hidden, self.embed(byte))
            byte = greedy(self.logits(hidden))
            drafts.append(byte)
        return jnp.stack(drafts, axis=-1)

    def __call__(self, tokens: jax.Array, implementation: str | None = None) -> tuple[jax.Array, Cache]:
        """Whole sequences ``[B, T]``: hidden states ``[B, T, width]``, and what the layers remember after the last token.

        ``implementation`` is kda.chunk's.
        """
        config = self.config
        start = jnp.zeros((config.layers, len(tokens), CONV_WIDTH - 1, config.qkv_channels), config.dtype)
        attend = functools.partial(kda.chunk, implementation=implementation)
        hidden, states, windows = self._run(tokens, start, [attend] * config.layers)
        return hidden, Cache(states, windows[:, :, -(CONV_WIDTH - 1) :])

    def decode(self, tokens: jax.Array, cache: Cache, slots: jax.Array) -> tuple[jax.Array, Cache]:
        """One token a row, ``[N]``: hidden states ``[N, width]`` and the cache after it."""
        x, histories = self.embed(tokens)[:, None], read_slots(cache.histories, slots)
        pool, pool_slots = cache.pool_of_all_layers(slots)
        windows = []
        for block, history, rows in zip(self.blocks, histories, pool_slots, strict=True):
            x, pool, window = block(x, history, functools.partial(_decode_column, state=pool, state_indices=rows))
            windows.append(window)
        histories = write_slots(cache.histories, slots, jnp.stack(windows)[:, :, 1:])
        return self.norm(x[:, 0]), Cache(pool.reshape(cache.states.shape), histories)

    def verify(self, tokens: jax.Array, cache: Cache, slots: jax.Array) -> tuple[jax.Array, Pending]:
        """T draft tokens a row, ``[N, T]``: hidden states ``[N, T, width]``, and what commit needs. The cache stays."""
        pool, pool_slots = cache.pool_of_all_layers(slots)
        attends = [functools.partial(kda.verify, state=pool, state_indices=rows) for rows in pool_slots]
        hidden, updates, windows = self._run(tokens, read_slots(cache.histories, slots), attends)
        return hidden, Pending(updates, windows)

    def commit(self, cache: Cache, pending: Pending, num_accepted: jax.Array, slots: jax.Array) -> Cache:
        """The cache after the first ``num_accepted`` (``[N]``) of the verified tokens."""
        states = kda.flush_layers(cache.states, pending.updates, num_accepted, state_indices=slots)
        # The convolutions roll back too: their latest inputs are those that end at the last accepted token.
        latest = num_accepted[:, None] + jnp.arange(CONV_WIDTH - 1)
        histories = jnp.take_along_axis(pending.windows, latest[None, :, :, None], axis=2)
        return Cache(states, write_slots(cache.histories, slots, histories))

    def _run(self, tokens: jax.Array, histories: jax.Array, attends: list[Attend]) -> tuple[jax.Array, Any, jax.Array]:
        x, memories, windows = self.embed(tokens), [], []
        for block, history, attend in zip(self.blocks, histories, attends, strict=True):
            x, memory, window = block(x, history, attend)
            memories.append(memory)
            windows.append(window)
        return self.norm(x), jax.tree.map(lambda *layers: jnp.stack(layers), *memories), jnp.stack(windows)


def _decode_column(*token: jax.Array, **options: Any) -> tuple[jax.Array, jax.Array]:
    """kda.decode on arrays with a token axis, of length 1."""
    o, state = kda.decode(*(x[:, 0] for x in token), **options)
    return o[:, None], state
