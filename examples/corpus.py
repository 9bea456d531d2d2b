"""Text that every machine has: the source files of Python's own standard library, as bytes."""

from __future__ import annotations

import dataclasses
import pathlib
import sysconfig

import numpy as np

# Installed packages, tests and generated tables: none of them is the library's own source text.
EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "idlelib", "encodings", "pydoc_data"}
HELD_OUT_EVERY = 16  # one file in so many is held out
END_OF_FILE = b"\0"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Two flat uint8 arrays that share no file."""

    train: np.ndarray
    held_out: np.ndarray

    @classmethod
    def standard_library(cls) -> Corpus:
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        paths = (path.relative_to(root) for path in root.rglob("*.py"))
        paths = sorted(path for path in paths if not EXCLUDED_FOLDERS.intersection(path.parts))
        files = [(root / path).read_bytes() + END_OF_FILE for path in paths]
        held_out = files[::HELD_OUT_EVERY]
        del files[::HELD_OUT_EVERY]
        return cls(*(np.frombuffer(b"".join(part), np.uint8) for part in (files, held_out)))

    def batch(self, rng: np.random.Generator, size: int, length: int) -> np.ndarray:
        """``[size, length]`` windows of the training text at random places."""
        return _windows(self.train, rng.integers(len(self.train) - length, size=size), length)

    def held_out_windows(self, count: int, length: int) -> np.ndarray:
        """``[count, length]`` windows of the held-out text, evenly spread and the same in every run."""
        return _windows(self.held_out, np.linspace(0, len(self.held_out) - length, count, dtype=np.int64), length)


def _windows(text: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    return text[starts[:, None] + np.arange(length)]
