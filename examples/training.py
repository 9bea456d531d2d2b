"""Training: the loss of all heads, the optimiser and the jitted steps."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from model import LanguageModel

WARMUP_STEPS = 50
DRAFT_WEIGHT = 0.5  # of the mean loss of the drafting heads, against that of the next byte


def make_optimizer(model: LanguageModel, steps: int, learning_rate: float) -> nnx.Optimizer:
    return nnx.Optimizer(model, _updates(steps, learning_rate), wrt=nnx.Param)


@functools.cache  # static to train_step: with another object it would be compiled again
def _updates(steps: int, learning_rate: float) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(WARMUP_STEPS, steps // 4), steps, end_value=learning_rate / 20
    )
    optimizer = optax.adamw(schedule, b2=0.98, weight_decay=0.1, mask=_is_kernel)
    return optax.chain(optax.clip_by_global_norm(1.0), optimizer)


def _is_kernel(parameters: nnx.State) -> nnx.State:
    """Only projections decay: no embedding, norm, convolution or gate."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "kernel" in jax.tree_util.keystr(path), parameters)


def losses(model: LanguageModel, windows: jax.Array, implementation: str | None = None) -> jax.Array:
    """Nats a byte on ``[B, S + 1 + draft_length]`` bytes: of the next byte, then of each drafting head."""
    heads = 1 + model.config.draft_length
    length = windows.shape[1] - heads
    hidden, _ = model(windows[:, :length], implementation)
    targets = jnp.stack([windows[:, 1 + ahead :][:, :length] for ahead in range(heads)], axis=-1).astype(jnp.int32)
    logits = jnp.concatenate([model.logits(hidden)[..., None, :], model.draft_logits(hidden, targets[..., :-1])], axis=-2)
    nats = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets)
    return jnp.mean(nats, axis=(0, 1))


@functools.partial(jax.jit, static_argnames="implementation", donate_argnames=("model", "optimizer"))
def train_step(
    model: LanguageModel, optimizer: nnx.Optimizer, windows: jax.Array, implementation: str | None = None
) -> tuple[LanguageModel, nnx.Optimizer, jax.Array]:
    """One update of model and optimizer, and the loss of the next byte before it."""

    def objective(model: LanguageModel) -> tuple[jax.Array, jax.Array]:
        following, *drafted = losses(model, windows, implementation)
        return following + DRAFT_WEIGHT * jnp.mean(jnp.stack(drafted)), following

    (_, following), gradients = nnx.value_and_grad(objective, has_aux=True)(model)
    optimizer.update(model, gradients)
    return model, optimizer, following


evaluate = jax.jit(losses, static_argnames="implementation")
