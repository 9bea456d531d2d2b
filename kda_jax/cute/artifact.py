"""A compiled kernel as a file: a line of JSON that describes it, then the object that XLA's custom call is given.

The first line holds the digest of the rest, so that a damaged file is found before anything of it is run.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
import platform
import tempfile
from typing import Any

FORMAT = 1


class DamagedArtifactError(RuntimeError):
    """A file that is not the artifact it is named after."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What is compiled: a module of kda_jax.kernels.cute, its compile-time choices, and the GPU and host it is for."""

    name: str
    choices: tuple[tuple[str, Any], ...]
    arch: str  # "sm_90a"
    host: str = dataclasses.field(default_factory=platform.machine)

    @property
    def identity(self) -> dict[str, Any]:
        """Two kernels with the same are the same object; it changes with the kernels' source."""
        said = {"format": FORMAT, "kernel": self.name, "choices": dict(self.choices), "arch": self.arch, "host": self.host}
        return said | {"source": source_digest()}

    @property
    def filename(self) -> str:
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()
        return f"{self.name}-{self.arch}-{digest[:20]}.cute"

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.choices)}) for {self.arch}"


@dataclasses.dataclass(frozen=True)
class Artifact:
    """``figures``: what the compiler said of it: the DSL's version, registers and bytes of stack a thread, shared memory."""

    kernel: Kernel
    module: bytes
    figures: dict[str, Any]

    @property
    def manifest(self) -> dict[str, Any]:
        return self.kernel.identity | self.figures | {"bytes": len(self.module), "sha256": self.key.hex()}

    @functools.cached_property
    def key(self) -> bytes:
        """By which the runtime knows an object that it has loaded before."""
        return hashlib.sha256(self.module).digest()


@functools.cache
def source_digest() -> str:
    """Of all kernels' sources: they share code."""
    folder = importlib.resources.files("kda_jax.kernels.cute")
    sources = sorted((f.name, f.read_bytes()) for f in folder.iterdir() if f.name.endswith(".py"))
    return hashlib.sha256(repr(sources).encode()).hexdigest()


def write(artifact: Artifact, folder: pathlib.Path) -> pathlib.Path:
    """Atomically: whoever reads, or writes the same at the same time, finds a whole file or none."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / artifact.kernel.filename
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".writing-", delete=False) as file:
        try:
            file.write(json.dumps(artifact.manifest, sort_keys=True).encode() + b"\n" + artifact.module)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
    return path


def read(kernel: Kernel, folder: pathlib.Path) -> Artifact | None:
    """The kernel's artifact in the folder, if there is one.

    Raises:
      DamagedArtifactError: the file is truncated, altered, or of another kernel.
    """
    path = folder / kernel.filename
    try:
        first, _, module = path.read_bytes().partition(b"\n")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        said = json.loads(first)
        digest, size = said.pop("sha256"), said.pop("bytes")
        identity = {name: said.pop(name) for name in kernel.identity}
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise DamagedArtifactError(f"{path}: its first line is not an artifact's ({error!r})") from error
    if identity != kernel.identity:
        raise DamagedArtifactError(f"{path}: holds {identity}, not {kernel}")
    if len(module) != size:
        raise DamagedArtifactError(f"{path}: holds {len(module)} bytes of an object of {size}")
    found = Artifact(kernel, module, said)
    if found.key.hex() != digest:
        raise DamagedArtifactError(f"{path}: its object is not the one that was written")
    return found
