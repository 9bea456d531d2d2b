"""Trains a small byte-level language model of KDA layers, then decodes with it plainly and speculatively.

    python examples/train_and_decode.py                  # a few minutes on a laptop's CPU
    python examples/train_and_decode.py --decode-only    # again from its checkpoint
    python examples/train_and_decode.py --resume --steps 5000

The text is the source of Python's standard library. Beside the prediction of the next byte, multi-token prediction (MTP)
heads learn to draft those after it. Both ways of decoding must emit the same bytes, which the speculative one does in fewer
model calls; the exit status is 1 if they differ.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import plots
from checkpoint import CheckpointFolder, LossCurve
from corpus import Corpus
from flax import nnx
from generate import PlainRun, SpeculativeRun, decode_plainly, decode_speculatively, prefill
from model import Cache, LanguageModel, ModelConfig
from tqdm import tqdm
from training import evaluate, make_optimizer, train_step

LOG_EVERY = 10  # steps
EVALUATE_EVERY = 100  # steps; a checkpoint is saved as often
EVALUATED_WINDOWS = 64
TIMED_RUNS = 3
SAMPLES = 3
SAMPLE_BYTES = 120  # of a prompt
SIZES = [field for field in dataclasses.fields(ModelConfig) if isinstance(field.default, int)]


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    size = parser.add_argument_group("model", "With --resume and --decode-only the checkpoint says.")
    for field in SIZES:
        flag = "--" + field.name.replace("_", "-")
        size.add_argument(flag, type=_positive, default=argparse.SUPPRESS, metavar="N", help=f"(default: {field.default})")
    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_positive, default=900, help="trained in all, those before --resume included")
    training.add_argument("--batch", type=_positive, default=8, help="sequences a step")
    training.add_argument("--seq-len", type=_positive, default=160, help="bytes a sequence")
    training.add_argument("--learning-rate", type=float, default=4e-3, help="at the peak of the schedule")
    training.add_argument(
        "--implementation", choices=("triton", "xla"), help="of kda.chunk; None is the best one that serves the model here"
    )
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--prompts", type=_positive, default=8, help="requests decoded together")
    decoding.add_argument("--prompt-len", type=_positive, default=192, help="bytes a prompt")
    decoding.add_argument("--decode-len", type=_positive, default=256, help="bytes to emit after each")
    parser.add_argument("--seed", type=int, default=0, help="of the initial model, the batches and the slots")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        default=pathlib.Path("runs"),
        help="folder of all results; a new run replaces those that are there",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", action="store_true", help="train on from the output folder's checkpoint, to --steps")
    start.add_argument("--decode-only", action="store_true", help="no training: take the output folder's checkpoint")
    args = parser.parse_args()

    names = [field.name for field in SIZES if field.name in args]
    if names and (args.resume or args.decode_only):
        parser.error(f"the checkpoint says how large the model is; leave out {', '.join(names)}")
    try:
        args.config = ModelConfig(**{name: getattr(args, name) for name in names})
    except ValueError as error:
        parser.error(str(error))
    return args


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not positive")
    return number


def train(args: argparse.Namespace, corpus: Corpus, checkpoints: CheckpointFolder) -> tuple[LanguageModel, LossCurve]:
    """The trained model, from scratch or on from the checkpoint."""
    if args.resume:
        done, config, curve = checkpoints.read_run()
    else:
        done, config, curve = 0, args.config, LossCurve()
        checkpoints.clear()
    model = LanguageModel(config, rngs=nnx.Rngs(args.seed))
    optimizer = make_optimizer(model, args.steps, args.learning_rate)
    if args.resume:
        checkpoints.restore(model=model, optimizer=optimizer)

    length = args.seq_len + 1 + config.draft_length
    held_out = corpus.held_out_windows(EVALUATED_WINDOWS, length)
    with tqdm(range(done, args.steps), initial=done, total=args.steps, desc="training", unit="step") as progress:
        for step in progress:
            # Seeded by the step: a resumed run goes on with the batches that an unbroken one would have seen.
            windows = corpus.batch(np.random.default_rng((args.seed, step)), args.batch, length)
            model, optimizer, loss = train_step(model, optimizer, windows, args.implementation)
            trained = step + 1
            last = trained == args.steps
            if last or trained % LOG_EVERY == 0:  # reading the loss waits for the device, so not in every step
                curve.training.append((trained, float(loss)))
                progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
            if last or trained % EVALUATE_EVERY == 0:
                curve.held_out.append((trained, float(evaluate(model, held_out, args.implementation)[0])))
                checkpoints.save(trained, model, optimizer, curve)
    return model, curve


def load(checkpoints: CheckpointFolder) -> tuple[LanguageModel, LossCurve]:
    _, config, curve = checkpoints.read_run()
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    checkpoints.restore(model=model)
    return model, curve


@dataclasses.dataclass(frozen=True)
class Decoded:
    """What both ways of decoding made of the same prompts, and how long each took."""

    prompts: np.ndarray  # [N, S]
    plain: PlainRun
    plain_seconds: float
    speculative: SpeculativeRun
    speculative_seconds: float


def decode_both_ways(args: argparse.Namespace, model: LanguageModel, corpus: Corpus) -> Decoded:
    prompts = corpus.held_out_windows(args.prompts, args.prompt_len)
    # As a server would have it: slots anywhere in a pool larger than the batch, and a batch with a row to spare.
    pool_size = 2 * args.prompts
    slots = np.random.default_rng(args.seed).permutation(pool_size)[: args.prompts]
    slots = jnp.asarray(np.append(slots, -1), jnp.int32)
    rows = jnp.asarray(np.pad(prompts, ((0, 1), (0, 0))))

    def start() -> tuple[Cache, jax.Array, jax.Array]:
        return prefill(model, rows, slots, pool_size=pool_size)

    plain, plain_seconds = timed(
        start, lambda cache, first, drafts: decode_plainly(model, cache, first, slots, length=args.decode_len)
    )
    speculative, speculative_seconds = timed(
        start, lambda cache, first, drafts: decode_speculatively(model, cache, first, drafts, slots, length=args.decode_len)
    )
    return Decoded(prompts, plain, plain_seconds, speculative, speculative_seconds)


def timed(start: Callable[[], tuple], decode: Callable[..., Any]) -> tuple[Any, float]:
    """What ``decode(*start())`` gives, and the seconds of its timed run once compiled. Every run donates a fresh start."""
    seconds = []
    for _ in range(1 + TIMED_RUNS):
        started = jax.block_until_ready(start())
        begin = time.perf_counter()
        run = jax.block_until_ready(decode(*started))
        seconds.append(time.perf_counter() - begin)
    return run, min(seconds[1:])


def summarize(decoded: Decoded, curve: LossCurve) -> dict[str, Any]:
    """The figures of the run, as they go to results.json."""
    requests, length = len(decoded.prompts), decoded.plain.output.shape[1]
    plain, speculative = (np.asarray(run.output[:requests]) for run in (decoded.plain, decoded.speculative))
    accepted = decoded.speculative.accepted.tolist()
    verified = sum(accepted)
    # Prefill emits the first byte of each request.
    decoded_bytes = requests * (length - 1)
    return {
        "held_out_loss": curve.held_out[-1][1],
        "trained_steps": curve.held_out[-1][0],
        "requests": requests,
        "tokens_per_request": length,
        "identical": bool(np.array_equal(plain, speculative)),
        "plain_calls": int(decoded.plain.calls),
        "speculative_calls": int(decoded.speculative.calls),
        "call_ratio": int(decoded.speculative.calls) / int(decoded.plain.calls),
        "accepted_histogram": accepted,
        "mean_drafts_accepted": sum(count * drafts for drafts, count in enumerate(accepted)) / verified,
        "mean_bytes_emitted": decoded_bytes / verified,
        "plain_tokens_per_second": decoded_bytes / decoded.plain_seconds,
        "speculative_tokens_per_second": decoded_bytes / decoded.speculative_seconds,
    }


def report(decoded: Decoded, results: dict[str, Any]) -> None:
    for request in range(0, len(decoded.prompts), -(-len(decoded.prompts) // SAMPLES)):
        print(" held-out prompt, its end ".center(80, "-"), text(decoded.prompts[request, -SAMPLE_BYTES:]), sep="\n")
        print(" continuation ".center(80, "-"), text(decoded.plain.output[request]), sep="\n")
    print("-" * 80)
    outcome = "byte-identical" if results["identical"] else "DIFFERENT"
    for name, figures in {
        "held-out loss": "{held_out_loss:.3f} nats a byte after {trained_steps} steps",
        "model calls": "plain {plain_calls}, speculative {speculative_calls} ({call_ratio:.2f} of the plain ones)",
        "a verify call": "accepts {mean_drafts_accepted:.2f} drafts and emits {mean_bytes_emitted:.2f} bytes a request",
        "tokens a second": "plain {plain_tokens_per_second:.0f}, speculative {speculative_tokens_per_second:.0f}",
        "outputs": outcome + ", {requests} requests of {tokens_per_request} bytes",
    }.items():
        print(f"{name:18}{figures.format(**results)}")


def text(codes: np.ndarray | jax.Array) -> str:
    return np.asarray(codes, np.uint8).tobytes().decode(errors="replace")


def main() -> int:
    args = parse_arguments()
    # In full float32, rounding is so small that the two ways of decoding do not choose differently between near-ties.
    jax.config.update("jax_default_matmul_precision", "highest")
    corpus = Corpus.standard_library()
    checkpoints = CheckpointFolder(args.output / "checkpoint")
    model, curve = load(checkpoints) if args.decode_only else train(args, corpus, checkpoints)
    decoded = decode_both_ways(args, model, corpus)
    results = summarize(decoded, curve)
    report(decoded, results)

    plots.save_loss_curve(args.output / "loss.png", curve)
    plots.save_acceptance_histogram(
        args.output / "acceptance.png", results["accepted_histogram"], results["mean_drafts_accepted"]
    )
    (args.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {args.output}/: loss.png, acceptance.png, results.json, checkpoint/")
    return 0 if results["identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
