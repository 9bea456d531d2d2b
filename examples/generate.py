"""Greedy generation from a state pool: one token a model call, or drafts verified several a call."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from model import Cache, LanguageModel, greedy, write_slots


class PlainRun(NamedTuple):
    cache: Cache
    output: jax.Array  # [N, length], zero for padding rows
    calls: jax.Array


class SpeculativeRun(NamedTuple):
    cache: Cache
    output: jax.Array  # [N, length], zero for padding rows
    calls: jax.Array
    emitted: jax.Array  # [N], bytes of the output that are there
    drafts: jax.Array  # [N, D], for the bytes after them
    accepted: jax.Array  # [D + 1], how many verified rows had 0, 1, ... drafts accepted


@functools.partial(jax.jit, static_argnames="pool_size")
def prefill(
    model: LanguageModel, prompts: jax.Array, slots: jax.Array, *, pool_size: int
) -> tuple[Cache, jax.Array, jax.Array]:
    """Reads prompts ``[N, S]`` into a new pool. ``slots`` ``[N]`` are distinct, -1 for padding rows.

    Returns the cache, the first byte after each prompt ``[N]``, and the drafts of those after it ``[N, draft_length]``.
    """
    hidden, rows = model(prompts)
    last = hidden[:, -1]
    empty = Cache.empty(model.config, pool_size)
    cache = jax.tree.map(lambda pools, new: write_slots(pools, slots, new), empty, rows)
    first = greedy(model.logits(last))
    return cache, first, model.draft(last, first)


@functools.partial(jax.jit, static_argnames="length", donate_argnames="cache")
def decode_plainly(model: LanguageModel, cache: Cache, first: jax.Array, slots: jax.Array, *, length: int) -> PlainRun:
    """``length`` bytes a request, one model call a byte after the first."""
    live = slots >= 0

    def step(run: PlainRun) -> PlainRun:
        hidden, cache = model.decode(run.output[:, run.calls], run.cache, slots)
        following = jnp.where(live, greedy(model.logits(hidden)), 0)
        return PlainRun(cache, run.output.at[:, run.calls + 1].set(following), run.calls + 1)

    output = jnp.zeros((len(slots), length), jnp.int32).at[:, 0].set(jnp.where(live, first, 0))
    return lax.while_loop(lambda run: run.calls < length - 1, step, PlainRun(cache, output, jnp.int32(0)))


@functools.partial(jax.jit, static_argnames="length", donate_argnames="cache")
def decode_speculatively(
    model: LanguageModel, cache: Cache, first: jax.Array, drafts: jax.Array, slots: jax.Array, *, length: int
) -> SpeculativeRun:
    """``length`` bytes a request, as many a model call as drafts turn out right, and one more."""
    requests, draft_length = drafts.shape

    def unfinished(run: SpeculativeRun) -> jax.Array:
        return run.emitted < length

    def step(run: SpeculativeRun) -> SpeculativeRun:
        rows = jnp.where(unfinished(run), slots, -1)  # a finished request becomes padding
        row = jnp.arange(requests)
        last = run.output[row, run.emitted - 1]
        hidden, pending = model.verify(jnp.concatenate([last[:, None], run.drafts], axis=1), run.cache, rows)
        predicted = greedy(model.logits(hidden))  # [N, D + 1], the byte after each of those tokens

        # A draft stands as long as it and all before it are what greedy decoding would have emitted.
        right = run.drafts == predicted[:, :-1]
        accepted = jnp.sum(jnp.cumprod(right, axis=1), axis=1)
        cache = model.commit(run.cache, pending, accepted + 1, rows)

        # The accepted drafts equal their predictions, so the bytes to emit are the predictions up to the first that no
        # draft foresaw. What is written beyond it is overwritten by the next call, or lies beyond the output.
        places = run.emitted[:, None] + jnp.arange(draft_length + 1)
        return SpeculativeRun(
            cache=cache,
            output=run.output.at[row[:, None], places].set(predicted, mode="drop"),
            calls=run.calls + 1,
            emitted=jnp.minimum(run.emitted + accepted + 1, length),
            drafts=model.draft(hidden[row, accepted], predicted[row, accepted]),
            accepted=run.accepted.at[accepted].add(unfinished(run)),
        )

    live = slots >= 0
    run = SpeculativeRun(
        cache=cache,
        output=jnp.zeros((requests, length), jnp.int32).at[:, 0].set(jnp.where(live, first, 0)),
        calls=jnp.int32(0),
        emitted=jnp.where(live, 1, length),
        drafts=drafts,
        accepted=jnp.zeros(draft_length + 1, jnp.int32),
    )
    return lax.while_loop(lambda run: jnp.any(unfinished(run)), step, run)
