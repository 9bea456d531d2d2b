"""Decodes held-out text with projections of the trained model in Q8_0, and says what that costs in loss.

    python examples/train_and_decode.py                          # leaves a checkpoint in runs/
    python examples/decode_quantised.py                          # every projection of every layer
    python examples/decode_quantised.py --projections mlp_out    # or some

Windows of the text are read byte by byte, once with the weights as they were trained and once with q8_0.matmul in their
place; both predict every next byte. Writes quantised.json beside the checkpoint.
"""

from __future__ import annotations

import argparse
import copy
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from checkpoint import CheckpointFolder
from corpus import Corpus
from flax import nnx
from jax import lax
from model import Cache, LanguageModel
from train_and_decode import load

from kda_jax import q8_0

ATTENTION = ("qkv", "decay", "beta", "output_gate", "out")
PROJECTIONS = (*ATTENTION, "mlp_in", "mlp_out")


class QuantisedLinear(nnx.Module):
    """A projection without a bias, its weight in Q8_0, its input quantised on the way."""

    def __init__(self, linear: nnx.Linear):
        self.weight = nnx.Variable(q8_0.quantize(linear.kernel[...].T))

    def __call__(self, x: jax.Array) -> jax.Array:
        y = q8_0.matmul(x.reshape(-1, x.shape[-1]), self.weight.get_value())
        return y.reshape(*x.shape[:-1], -1)


def quantised(model: LanguageModel, projections: Sequence[str]) -> LanguageModel:
    """A copy of the model with those ``projections`` of all layers quantised."""
    model = copy.deepcopy(model)
    for block in model.blocks:
        for name in projections:
            owner: Any = block.attention if name in ATTENTION else block
            setattr(owner, name, QuantisedLinear(getattr(owner, name)))
    return model


@jax.jit
def decoded_loss(model: LanguageModel, windows: jax.Array) -> jax.Array:
    """Nats a byte of ``[N, T]`` windows: each byte after the first, predicted by a decode step for all N."""
    slots = jnp.arange(len(windows))

    def step(cache: Cache, column: tuple[jax.Array, jax.Array]) -> tuple[Cache, jax.Array]:
        byte, following = column
        hidden, cache = model.decode(byte, cache, slots)
        logits = model.logits(hidden).astype(jnp.float32)
        return cache, optax.softmax_cross_entropy_with_integer_labels(logits, following)

    columns = windows.T.astype(jnp.int32)
    _, nats = lax.scan(step, Cache.empty(model.config, len(windows)), (columns[:-1], columns[1:]))
    return jnp.mean(nats)


def num_bytes(model: LanguageModel) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(model))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projections", nargs="+", choices=PROJECTIONS, default=PROJECTIONS, metavar="NAME")
    parser.add_argument("--windows", type=int, default=64, help="decoded together (default: 64)")
    parser.add_argument("--length", type=int, default=320, help="bytes of each (default: 320)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs"), help="folder of the checkpoint")
    args = parser.parse_args(arguments)
    jax.config.update("jax_default_matmul_precision", "highest")

    trained, _ = load(CheckpointFolder(args.output / "checkpoint"))
    small = quantised(trained, args.projections)
    windows = Corpus.standard_library().held_out_windows(args.windows, args.length)
    loss, small_loss = (float(decoded_loss(model, windows)) for model in (trained, small))
    results = {
        "projections": list(args.projections),
        "bytes_predicted": windows[:, 1:].size,
        "loss": loss,
        "quantised_loss": small_loss,
        "difference": small_loss - loss,
        "model_bytes": num_bytes(trained),
        "quantised_model_bytes": num_bytes(small),
    }
    (args.output / "quantised.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"quantised    {', '.join(args.projections)}")
    print(f"loss         {loss:.4f} nats a byte of {windows[:, 1:].size} held out; quantised {small_loss:.4f}")
    print(f"difference   {small_loss - loss:+.5f}")
    print(f"model        {num_bytes(trained)} bytes; quantised {num_bytes(small)}")


if __name__ == "__main__":
    main()
