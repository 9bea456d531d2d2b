"""The CUDA compute capability that kernels are compiled for."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Iterator

import jax

_explicit = jax.make_user_context(default_value=None)  # part of jit's cache key


@contextlib.contextmanager
def cuda_target(compute_capability: str) -> Iterator[None]:
    """Compiles the CUDA kernels of what is lowered inside for GPUs of this compute capability.

    For ahead-of-time work on a machine without such a GPU, as in
    ``with kda.cuda_target("9.0"): jax.export.export(jax.jit(f), platforms=["cuda"])(...)``. Outside, the machine's own GPU
    is the target, and without one a CUDA program gets the plain XLA implementations.

    Args:
      compute_capability: "major.minor", as ``jax.Device.compute_capability`` gives it: "8.0", "9.0", "10.0".

    Returns:
      A context manager.

    Raises:
      ValueError: ``compute_capability`` is not of that form.
    """
    if not re.fullmatch(r"\d+\.\d", str(compute_capability)):
        raise ValueError(
            f'cuda_target: compute_capability is {compute_capability!r}; it must be "major.minor", "9.0" for one'
        )
    with _explicit(str(compute_capability)):
        yield


def compute_capability() -> int | None:
    """Major times 10 plus minor: the explicit target, else the least of this machine's GPUs, else None."""
    explicit = _explicit.value
    found = _local() if explicit is None else explicit
    return None if found is None else int(found.replace(".", ""))


@functools.cache
def _local() -> str | None:
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        return None
    return min((device.compute_capability for device in devices), key=lambda c: tuple(map(int, c.split("."))))
