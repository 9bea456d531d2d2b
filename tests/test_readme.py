"""The README's Python examples run, in order, as they stand there."""

from __future__ import annotations

import pathlib
import re

import jax.numpy as jnp

README = pathlib.Path(__file__).parent.parent / "README.md"


def test_python_blocks_run_and_agree_with_the_oracle():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:  # the last asserts that chunk agrees with the oracle
        exec(compile(block, str(README), "exec"), names)
    for name in ("o", "o_next", "o_draft", "state", "y"):
        assert jnp.isfinite(names[name]).all(), name


def test_exactly_two_set_up_commands():
    commands = re.findall(r"```\n(pip .*?)\n```", README.read_text())
    assert commands == [
        "pip install -e '.[examples]' && python examples/train_and_decode.py",
        "pip install -e '.[test]' && pytest",
    ]
