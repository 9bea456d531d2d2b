"""Where compiled kernels are kept, and what happens at lowering when one is not there.

Looked for in turn: the folder that KDA_CUTE_STORE names, the one that came with the package, the user's cache. What is in
none of them is compiled, once, where nvidia-cutlass-dsl is installed, and kept in the cache.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import pathlib
import warnings

from kda_jax._operands import Unavailable
from kda_jax.cute import artifact
from kda_jax.cute.artifact import Artifact, DamagedArtifactError, Kernel

PACKAGED = pathlib.Path(__file__).with_name("store")


class UnavailableError(Unavailable):
    """A kernel that is not compiled, on a machine that has no compiler for it or one that fails."""


def cache_folder() -> pathlib.Path:
    """KDA_CUTE_CACHE, or kda_jax/cute in the user's cache."""
    if given := os.environ.get("KDA_CUTE_CACHE"):
        return pathlib.Path(given)
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache") / "kda_jax" / "cute"


def folders() -> list[pathlib.Path]:
    given = os.environ.get("KDA_CUTE_STORE")
    return [*([pathlib.Path(given)] if given else []), PACKAGED, cache_folder()]


def can_compile() -> bool:
    return importlib.util.find_spec("cutlass") is not None


def fetch(kernel: Kernel) -> Artifact:
    """The kernel, compiled before or now.

    Raises:
      UnavailableError: it is in no store, or only damaged, and nvidia-cutlass-dsl is not installed or fails.
    """
    found = _fetch(kernel, tuple(folders()))
    if isinstance(found, str):
        raise UnavailableError(found)
    return found


@functools.cache
def _fetch(kernel: Kernel, where: tuple[pathlib.Path, ...]) -> Artifact | str:
    """The kernel, or what a compiler said that failed, which is not asked again for every call."""
    damaged: list[str] = []
    for folder in where:
        try:
            if (found := artifact.read(kernel, folder)) is not None:
                return found
        except (DamagedArtifactError, OSError) as error:
            damaged.append(str(error))
    if not can_compile():
        seen = f" ({'; '.join(damaged)})" if damaged else ""
        # One reason for all kernels, so one warning, where there is no store at all.
        what = f"{kernel} is not" if any(folder.is_dir() for folder in where) else "no CuTe kernel is"
        raise UnavailableError(
            f"{what} compiled{seen}: pip install 'kda-jax[cute]', or build a store elsewhere with "
            f"python -m kda_jax.cute build --arch {kernel.arch}, and name its folder in KDA_CUTE_STORE"
        )
    for reason in damaged:
        warnings.warn(f"compiling anew: {reason}", stacklevel=2)
    from kda_jax.cute import compiler

    try:
        (made,) = compiler.compile_all([kernel])
    except compiler.CompilationError as error:
        return str(error)
    try:
        artifact.write(made, where[-1])
    except OSError as error:  # it serves this process all the same
        warnings.warn(f"{kernel} is not kept: {error}", stacklevel=2)
    return made
