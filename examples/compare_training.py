"""Trains one model with two implementations of kda.chunk: their loss step by step, and their tokens a second.

    python examples/compare_training.py                                    # triton and xla, on a GPU, about two minutes
    python examples/compare_training.py --tiny --implementations xla xla   # to see it run on a CPU

Three runs see the same batches: the first implementation, the second, and the second once more from another seed's initial
model. The last one's distance is the noise that the first one's must not exceed. Writes training-PLATFORM.json and .png.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import shlex
import sys
import time
from typing import Any

import jax
import numpy as np
import plots
from corpus import Corpus
from flax import nnx
from model import LanguageModel, ModelConfig
from training import make_optimizer, train_step

# benchmarks is no part of the installation. Last, so that kda_jax is the installed one.
sys.path.append(str(pathlib.Path(__file__).parents[1]))

from benchmarks import harness, record

ROUND = 10  # steps that are timed together: waiting for each one's loss would leave the GPU idle
COLUMNS = {
    "implementation": "implementation",
    "seed": "seed",
    "tokens_per_second": "tokens a second",
    "step_ms": "ms a step",
    "first_round_s": f"first {ROUND} steps, s",
}


@dataclasses.dataclass(frozen=True)
class Job:
    model: ModelConfig
    batch: int
    seq_len: int
    learning_rate: float = 1e-3


# What the GPU kernels are for: K = V = 128, grouped values twice as wide as the model, bfloat16. 50 million parameters.
FULL = Job(ModelConfig(layers=4, heads=6, value_heads=12, head_dim=128, width=768, dtype="bfloat16"), batch=8, seq_len=2048)
TINY = Job(ModelConfig(layers=1, heads=1, value_heads=2, head_dim=16, width=32, dtype="bfloat16"), batch=2, seq_len=70)


def train(job: Job, corpus: Corpus, steps: int, implementation: str, seed: int) -> dict[str, Any]:
    """A row of the record. Any failure, and a loss that is not finite, ends the program."""
    model = LanguageModel(job.model, rngs=nnx.Rngs(seed))
    optimizer = make_optimizer(model, steps, job.learning_rate)
    length = job.seq_len + 1 + job.model.draft_length
    losses, seconds = [], []
    for first in range(0, steps, ROUND):
        began = time.perf_counter()
        for step in range(first, first + ROUND):
            windows = corpus.batch(np.random.default_rng(step), job.batch, length)
            model, optimizer, loss = train_step(model, optimizer, windows, implementation)
            losses.append(loss)
        jax.block_until_ready((model, loss))
        seconds.append((time.perf_counter() - began) / ROUND)
    losses = [round(float(loss), 6) for loss in losses]
    if not np.isfinite(losses).all():
        raise FloatingPointError(f"{implementation}, seed {seed}: the losses are not all finite: {losses}")
    step_s = float(np.median(seconds[1:]))  # the first round compiles
    return {
        "implementation": implementation,
        "seed": seed,
        "tokens_per_second": job.batch * job.seq_len / step_s,
        "step_ms": 1e3 * step_s,
        "first_round_s": seconds[0] * ROUND,
        "losses": losses,
    }


def compare(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the three runs say together; differences are of the losses of the same step, in nats a byte."""
    tested, reference, other_seed = (np.array(row["losses"]) for row in rows)
    return {
        "speedup": rows[0]["tokens_per_second"] / rows[1]["tokens_per_second"],
        "mean_difference": float(np.mean(np.abs(tested - reference))),
        "mean_difference_of_seeds": float(np.mean(np.abs(other_seed - reference))),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help=f"a multiple of {ROUND}, twice that or more (default: 150)")
    parser.add_argument(
        "--implementations", nargs=2, default=["triton", "xla"], metavar="NAME", help="(default: triton xla)"
    )
    parser.add_argument("--tiny", action="store_true", help="a model and sequences for a trial on a CPU")
    parser.add_argument("--output", type=pathlib.Path, default=record.RESULTS, help="folder for the JSON and the plot")
    args = parser.parse_args(arguments)
    if args.steps % ROUND or args.steps < 2 * ROUND:
        parser.error(f"--steps is {args.steps}; it must be a multiple of {ROUND}, {2 * ROUND} or more")

    job, corpus = TINY if args.tiny else FULL, Corpus.standard_library()
    tested, reference = args.implementations
    rows = []
    for implementation, seed in ((tested, 0), (reference, 0), (reference, 1)):
        rows.append(train(job, corpus, args.steps, implementation, seed))
        print(f"{implementation}, seed {seed}: {rows[-1]['tokens_per_second']:.0f} tokens a second", flush=True)

    model = nnx.eval_shape(lambda: LanguageModel(job.model, rngs=nnx.Rngs(0)))
    said = {"command": shlex.join(["python", *sys.argv]), "steps": args.steps} | dataclasses.asdict(job)
    said |= {"parameters": sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))} | compare(rows)
    written = harness.write("training", rows, args.output, said)
    plots.save_training_comparison(written.with_suffix(".png"), rows, smoothed_over=ROUND)
    print(f"\n{record.table(rows, COLUMNS)}\n", *(f"{name} {value:.4g}" for name, value in compare(rows).items()), sep="\n")
    print(f"wrote {written} and {written.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
