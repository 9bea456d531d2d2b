"""examples/: the scripts as a user runs them, and the equivalences that its decoding rests on."""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

nnx = pytest.importorskip("flax.nnx")

pytestmark = pytest.mark.usefixtures("quick_compilation")

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
SMALL = {"layers": 2, "heads": 1, "value_heads": 2, "head_dim": 16, "width": 32, "draft_length": 3}
POOL_SIZE = 7
SLOTS = np.array([5, -1, 2, 3], np.int32)  # row 1 is padding
LIVE = SLOTS >= 0


@pytest.fixture(scope="module")
def modules():
    """model.py and generate.py, importable by their plain names for this file alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("model"), importlib.import_module("generate")
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture
def language_model(modules):
    model, _ = modules
    return model.LanguageModel(model.ModelConfig(**SMALL), rngs=nnx.Rngs(0))


def random_bytes(length: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (len(SLOTS), length), 0, 256)


def test_the_three_ways_to_run_the_model_agree(modules, language_model):
    """Prefill and verified tokens, some of them accepted, against the same tokens decoded one by one."""
    model, generate = modules
    before, num_accepted = 20, np.array([1, 4, 0, 3], np.int32)
    tokens = random_bytes(before + 4)

    whole, _ = jax.jit(lambda model, tokens: model(tokens))(language_model, tokens)
    cache, *_ = generate.prefill(language_model, tokens[:, :before], SLOTS, pool_size=POOL_SIZE)
    verified, pending = jax.jit(lambda model, *args: model.verify(*args))(language_model, tokens[:, before:], cache, SLOTS)
    cache = jax.jit(lambda model, *args: model.commit(*args))(language_model, cache, pending, num_accepted, SLOTS)

    decode = jax.jit(lambda model, *args: model.decode(*args))
    stepwise, caches = [], [model.Cache.empty(language_model.config, POOL_SIZE)]
    for column in tokens.T:
        hidden, following = decode(language_model, column, caches[-1], SLOTS)
        stepwise.append(hidden)
        caches.append(following)
    stepwise = jnp.stack(stepwise, axis=1)

    for hidden, expected in ((whole, stepwise), (verified, stepwise[:, before:])):
        logits, expected = (np.asarray(language_model.logits(x))[LIVE] for x in (hidden, expected))
        np.testing.assert_allclose(logits, expected, atol=1e-4, rtol=0)
    for slot, accepted in zip(SLOTS[LIVE], num_accepted[LIVE], strict=True):
        for pool, expected in zip(jax.tree.leaves(cache), jax.tree.leaves(caches[before + accepted]), strict=True):
            np.testing.assert_allclose(pool[:, slot], expected[:, slot], atol=1e-4, rtol=0)


def rig_untrained(model) -> None:
    """Heads draft as they were initialised: the next byte, once more."""


def rig_random_drafts(model) -> None:
    for seed, head in enumerate(model.draft_heads):
        head.out.kernel[...] = 10 * jax.random.normal(jax.random.key(seed), head.out.kernel.shape)


def rig_perfect_drafts(model) -> None:
    """Blocks that add nothing: the next byte is a function of the last, and soon the heads' copies of it are right."""
    for block in model.blocks:
        block.attention.out.kernel[...] = jnp.zeros_like(block.attention.out.kernel)
        block.mlp_out.kernel[...] = jnp.zeros_like(block.mlp_out.kernel)


@pytest.mark.parametrize(
    ("rig", "least", "most"), [(rig_untrained, 0, 3), (rig_random_drafts, 0, 0.2), (rig_perfect_drafts, 3, 3)]
)
def test_speculative_decoding_emits_the_plain_bytes(modules, language_model, rig, least, most):
    _, generate = modules
    rig(language_model)
    length = 42
    free = np.setdiff1d(np.arange(POOL_SIZE), SLOTS)

    def start():
        cache, first, drafts = generate.prefill(language_model, random_bytes(20), SLOTS, pool_size=POOL_SIZE)
        return jax.tree.map(lambda pool: pool.at[:, free].set(jnp.nan), cache), first, drafts

    cache, first, _ = start()
    plain = generate.decode_plainly(language_model, cache, first, SLOTS, length=length)
    speculative = generate.decode_speculatively(language_model, *start(), SLOTS, length=length)

    np.testing.assert_array_equal(speculative.output, plain.output)
    assert not plain.output[~LIVE].any()
    assert (speculative.emitted == length).all()
    assert plain.calls == length - 1
    accepted = np.repeat(np.arange(len(speculative.accepted)), speculative.accepted)
    assert least <= accepted.mean() <= most
    assert speculative.calls >= len(accepted) / LIVE.sum()
    if least == most:
        assert speculative.calls == -(-(length - 1) // (1 + most))
    for run in (plain, speculative):
        for pool in jax.tree.leaves(run.cache):
            assert np.isnan(pool[:, free]).all()  # nobody else's slot was touched
            assert np.isfinite(pool[:, SLOTS[LIVE]]).all()


def run_script(output: pathlib.Path, *flags: object, script: str = "train_and_decode.py") -> str:
    command = [sys.executable, EXAMPLES / script, "--output", output, *flags]
    environment = os.environ | {
        "XLA_FLAGS": "",  # one device, as a user has it
        # Nearly all of the time is compilation: little of it, and once for all runs.
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(output.parent / "compiled"),
        "JAX_PERSISTENT_COMPILATION_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_script_trains_decodes_and_goes_on_from_its_checkpoint(tmp_path):
    output = tmp_path / "run"
    size = [x for name, value in (SMALL | {"layers": 1}).items() for x in ("--" + name.replace("_", "-"), value)]
    training = ["--batch", 2, "--seq-len", 32]
    decoding = ["--prompts", 3, "--prompt-len", 24, "--decode-len", 24]

    def results() -> dict:
        return json.loads((output / "results.json").read_text())

    assert "byte-identical" in run_script(output, *size, *training, *decoding, "--steps", 12)
    first = results()
    assert first["identical"]
    assert first["trained_steps"] == 12
    assert first["plain_calls"] == 23 >= first["speculative_calls"]
    assert np.isfinite(first["held_out_loss"])
    for figure in ("loss.png", "acceptance.png"):
        assert (output / figure).read_bytes().startswith(b"\x89PNG")

    assert "byte-identical" in run_script(output, *decoding, "--decode-only")
    unchanged = {name for name in first if not name.endswith("_per_second")}
    assert {name: results()[name] for name in unchanged} == {name: first[name] for name in unchanged}

    assert "byte-identical" in run_script(output, *training, *decoding, "--resume", "--steps", 20)
    assert results()["trained_steps"] == 20

    run_script(output, "--windows", 3, "--length", 24, script="decode_quantised.py")
    said = json.loads((output / "quantised.json").read_text())
    assert said["bytes_predicted"] == 3 * 23
    assert 0 < abs(said["difference"]) < 0.05
    assert said["difference"] == said["quantised_loss"] - said["loss"]
    assert said["quantised_model_bytes"] < said["model_bytes"]


def test_projections_are_quantised_in_a_copy(modules, language_model):
    example = importlib.import_module("decode_quantised")
    copied = example.quantised(language_model, ["mlp_out", "qkv"])
    x = random_bytes(32)[:, None] / 256 - 0.5
    for before, after in zip(language_model.blocks, copied.blocks, strict=True):
        weight = after.attention.qkv.weight.get_value()
        assert weight.shape == before.attention.qkv.kernel.shape[::-1]
        np.testing.assert_allclose(after.attention.qkv(x), before.attention.qkv(x), atol=0.02)
        assert isinstance(after.attention.out, nnx.Linear)
        assert isinstance(before.mlp_out, nnx.Linear)


def compare_training(*flags: object) -> None:
    importlib.import_module("compare_training").main([*map(str, flags), "--tiny", "--steps", "20"])


def test_comparison_of_an_implementation_with_itself(modules, tmp_path):
    compare_training("--implementations", "xla", "xla", "--output", tmp_path)
    [written] = tmp_path.glob("training-*.json")
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    said = json.loads(written.read_text())
    assert {"device", "versions", "commit", "date", "command", "parameters"} <= said.keys()
    assert [(row["implementation"], row["seed"]) for row in said["rows"]] == [("xla", 0), ("xla", 0), ("xla", 1)]
    tested, reference, other_seed = (np.array(row["losses"]) for row in said["rows"])
    assert len(tested) == said["steps"] == 20
    assert 0 < reference[-5:].mean() < reference[:5].mean()
    np.testing.assert_array_equal(tested, reference)
    assert said["mean_difference"] == 0
    assert said["mean_difference_of_seeds"] == pytest.approx(np.mean(np.abs(other_seed - reference)))
    assert said["mean_difference_of_seeds"] > 0
    for row in said["rows"]:
        assert row["tokens_per_second"] == pytest.approx(said["batch"] * said["seq_len"] / row["step_ms"] * 1e3)
    assert said["speedup"] == pytest.approx(said["rows"][1]["step_ms"] / said["rows"][0]["step_ms"])


def test_comparison_fails_where_an_implementation_does(modules, tmp_path):
    """The model's heads are too small for the kernels: none of the layers may fall back to xla unheard."""
    with pytest.raises(NotImplementedError, match=r"kda\.chunk: implementation is 'triton'"):
        compare_training("--output", tmp_path)
    assert not list(tmp_path.iterdir())
