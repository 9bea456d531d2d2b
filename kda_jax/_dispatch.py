"""Which implementation serves an operation on a platform: a table, read at lowering."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

IMPLEMENTATIONS = ("xla", "triton", "pallas", "cute")

# Platforms with a lowering rule of their own; None is every other one.
PLATFORMS: tuple[str | None, ...] = (None,)


class Row(NamedTuple):
    """An implementation of one operation: ``function`` is "module:name", imported when it is first lowered."""

    operation: str
    implementation: str
    platforms: tuple[str | None, ...]
    function: str


# The first row that matches wins, so the fastest stands first.
TABLE = (
    Row("kda_chunk_fwd", "xla", PLATFORMS, "kda_jax.xla.chunk:forward"),
    Row("kda_chunk_bwd", "xla", PLATFORMS, "kda_jax.xla.chunk:backward"),
    Row("kda_decode", "xla", PLATFORMS, "kda_jax.xla.decode:decode"),
    Row("kda_decode_mtp", "xla", PLATFORMS, "kda_jax.xla.decode:decode_mtp"),
    Row("kda_decode_mtp_paged", "xla", PLATFORMS, "kda_jax.xla.decode:decode_mtp_paged"),
    Row("kda_verify", "xla", PLATFORMS, "kda_jax.xla.verify:verify"),
    Row("kda_flush", "xla", PLATFORMS, "kda_jax.xla.flush:flush"),
)


def check(call: str, operation: str, implementation: str | None) -> None:
    """Raises for a forced implementation that can serve the operation nowhere, before anything is traced."""
    if implementation is None:
        return
    if implementation not in IMPLEMENTATIONS:
        names = ", ".join(repr(name) for name in IMPLEMENTATIONS)
        raise ValueError(f"{call}: implementation is {implementation!r}; it must be None or one of {names}")
    served = [row.implementation for row in TABLE if row.operation == operation]
    if implementation not in served:
        raise NotImplementedError(
            f"{call}: implementation is {implementation!r}, which this version does not have for this operation; "
            f"it must be None or one of {', '.join(map(repr, served))}"
        )


def find(operation: str, implementation: str | None, platform: str | None) -> Callable[[Any, Any], Any]:
    """The function ``(operands, spec) -> outputs`` that serves ``operation`` on ``platform``."""
    for row in TABLE:
        if row.operation == operation and implementation in (None, row.implementation) and platform in row.platforms:
            module, name = row.function.split(":")
            return getattr(importlib.import_module(module), name)
    raise NotImplementedError(f"{operation}: no implementation {implementation or ''} for platform {platform or 'default'}")
