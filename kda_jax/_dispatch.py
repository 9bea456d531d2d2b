"""Which implementation serves a call on a target: a table, read at lowering."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from kda_jax._operands import Unavailable

IMPLEMENTATIONS = ("xla", "triton", "pallas", "cute")

# Platforms with a lowering rule of their own; None is every other one.
PLATFORMS: tuple[str | None, ...] = (None, "cuda")


class Call(NamedTuple):
    """What the table is asked about: a call and the target that it is compiled for."""

    operation: str
    sizes: Mapping[str, int]  # by the names of the axes
    dtypes: Mapping[str, str]  # by the names of the operands
    platform: str | None
    compute_capability: int | None  # of CUDA, times ten
    chunk_size: int | None = None  # of chunk


@dataclasses.dataclass(frozen=True)
class Needs:
    """What an implementation needs; None is no restriction."""

    package: str | None = None  # what must be importable
    compute_capability: int = 0  # the least: PTX runs on all later ones
    head_dims: tuple[int, ...] | None = None  # K and V
    dtypes: tuple[str, ...] | None = None  # of every floating operand but the state
    state_dtypes: tuple[str, ...] | None = None
    max_tokens: int | None = None  # T
    chunk_size: int | None = None
    equal_head_dims: bool = False  # K == V
    compute_capabilities: tuple[int, ...] | None = None  # exactly those: sm_90a and the like run on no other
    inputs_multiple: int = 1  # of IN

    def unmet_by_call(self, call: Call) -> str | None:
        """Why the call cannot be served on any machine, or None."""
        if self.head_dims is not None:
            for axis in ("K", "V"):
                if call.sizes[axis] not in self.head_dims:
                    return f"head dimension {axis} is {call.sizes[axis]}; it must be one of {self.head_dims}"
        if self.equal_head_dims and call.sizes["K"] != call.sizes["V"]:
            return f"head dimensions K and V are {call.sizes['K']} and {call.sizes['V']}; they must be equal"
        tokens = call.sizes.get("T", 1)
        if self.max_tokens is not None and tokens > self.max_tokens:
            return f"T is {tokens}; it must be at most {self.max_tokens}"
        if self.chunk_size not in (None, call.chunk_size):
            return f"chunk_size is {call.chunk_size}; it must be {self.chunk_size}"
        if call.sizes.get("IN", 0) % self.inputs_multiple:
            return f"input size IN is {call.sizes['IN']}; it must be a multiple of {self.inputs_multiple}"
        for operand, dtype in call.dtypes.items():
            served = self.state_dtypes if operand.endswith(("state", "states")) else self.dtypes
            if served is not None and not dtype.startswith("int") and dtype not in served:
                return f"{operand} has dtype {dtype}; it must be one of {served}"
        if self != Needs() and 0 in call.sizes.values():
            return "an axis has size 0"
        return None

    def unmet_by_target(self, call: Call) -> str | None:
        """Why the target cannot run it, or None."""
        if not self.compute_capability and self.compute_capabilities is None:
            return None
        if call.platform != "cuda":
            return f"it is compiled for {call.platform or 'a platform without CUDA'}; it must be cuda"
        found = call.compute_capability
        if found is None:
            return "there is no GPU to compile for; name one with kda.cuda_target"
        if self.compute_capabilities is not None and found not in self.compute_capabilities:
            those = ", ".join(str(one / 10) for one in self.compute_capabilities)
            return f"compute capability is {found / 10}; it must be one of {those}"
        if found < self.compute_capability:
            return f"compute capability is {found / 10}; it must be {self.compute_capability / 10} or more"
        return None


class Row(NamedTuple):
    """An implementation of one operation: ``function`` is "module:name", imported when it is first lowered."""

    operation: str
    implementation: str
    needs: Needs
    function: str
    measured: str  # the run that put the row where it stands
    default: bool = True  # whether None may pick it, or a forced name alone
    unproven: tuple[int, ...] = ()  # compute capabilities of GPUs that it never ran on: None passes it over there


_ANY = Needs()
_ACTIVATIONS = ("bfloat16", "float16", "float32")
_TRITON = Needs("jax_triton", 80, (64, 128), _ACTIVATIONS, ("float32", "bfloat16"))
_PALLAS = Needs(None, 90, (64, 128), _ACTIVATIONS, ("bfloat16",))
# No package: where kernels run, a store of compiled ones is the rule and the compiler the exception.
_UNPROVEN = (100,)
_CUTE = Needs(
    compute_capabilities=(90, *_UNPROVEN),
    head_dims=(64, 128),
    equal_head_dims=True,
    dtypes=_ACTIVATIONS,
    state_dtypes=("float32", "bfloat16"),
)
_TRITON_CHUNK = dataclasses.replace(_TRITON, chunk_size=64)
_TRITON_VERIFY, _CUTE_VERIFY = (dataclasses.replace(needs, max_tokens=16) for needs in (_TRITON, _CUTE))
# Four values are read as one word.
_TRITON_Q8_0 = Needs("jax_triton", 80, inputs_multiple=4)
_CHUNK_GPU = "benchmarks/results/chunk-gpu.json"
_DECODE_GPU = "benchmarks/results/decode-gpu.json"
_MTP_GPU = "benchmarks/results/mtp-gpu.json"
_VERIFY_GPU = "benchmarks/results/verify-gpu.json"
_PALLAS_GPU = "benchmarks/results/pallas-gpu.json"
_CPU = "benchmarks/results/serving-cpu.json"
_Q8_0_GPU = "benchmarks/results/q8_0-gpu.json"

# The first row that serves a call wins, so the fastest stands first; None passes over those with default=False.
# None promises that decode_mtp's states are those of decode, bit for bit: so their rows have the same order and needs.
TABLE = (
    Row("kda_chunk_fwd", "triton", _TRITON_CHUNK, "kda_jax.triton.chunk:forward", _CHUNK_GPU),
    Row("kda_chunk_fwd", "xla", _ANY, "kda_jax.xla.chunk:forward", "benchmarks/results/chunk-cpu.json"),
    Row("kda_chunk_bwd", "triton", _TRITON_CHUNK, "kda_jax.triton.chunk_backward:backward", _CHUNK_GPU),
    Row("kda_chunk_bwd", "xla", _ANY, "kda_jax.xla.chunk:backward", "benchmarks/results/chunk-cpu.json"),
    # With float32 pools Triton is up to 5 % faster where N * HV is 256 or less. None must give a row the same bits whatever
    # N is, so it keeps to CuTe, which is as fast or faster beyond that, and with bfloat16 pools everywhere.
    Row("kda_decode", "cute", _CUTE, "kda_jax.cute.decode:decode", _DECODE_GPU, unproven=_UNPROVEN),
    Row("kda_decode", "triton", _TRITON, "kda_jax.triton.decode:decode", _DECODE_GPU),
    # 4 to 5 % faster than Triton at N * HV of 4096 and 8192, slower at 1024 and less; and its bits are not decode_mtp's.
    Row("kda_decode", "pallas", _PALLAS, "kda_jax.pallas.decode:decode", _PALLAS_GPU, default=False),
    Row("kda_decode", "xla", _ANY, "kda_jax.xla.decode:decode", _CPU),
    Row("kda_decode_mtp", "cute", _CUTE, "kda_jax.cute.decode:decode_mtp", _MTP_GPU, unproven=_UNPROVEN),
    Row("kda_decode_mtp", "triton", _TRITON, "kda_jax.triton.decode:decode_mtp", _MTP_GPU),
    Row("kda_decode_mtp", "xla", _ANY, "kda_jax.xla.decode:decode_mtp", _CPU),
    Row("kda_decode_mtp_paged", "cute", _CUTE, "kda_jax.cute.decode:decode_mtp_paged", _MTP_GPU, unproven=_UNPROVEN),
    Row("kda_decode_mtp_paged", "triton", _TRITON, "kda_jax.triton.decode:decode_mtp_paged", _MTP_GPU),
    Row("kda_decode_mtp_paged", "xla", _ANY, "kda_jax.xla.decode:decode_mtp_paged", _CPU),
    Row("kda_verify", "cute", _CUTE_VERIFY, "kda_jax.cute.verify:verify", _VERIFY_GPU, unproven=_UNPROVEN),
    Row("kda_verify", "triton", _TRITON_VERIFY, "kda_jax.triton.verify:verify", _MTP_GPU),
    Row("kda_verify", "xla", _ANY, "kda_jax.xla.verify:verify", _CPU),
    Row("kda_flush", "cute", _CUTE, "kda_jax.cute.flush:flush", _MTP_GPU, unproven=_UNPROVEN),
    Row("kda_flush", "triton", _TRITON, "kda_jax.triton.flush:flush", _MTP_GPU),
    Row("kda_flush", "xla", _ANY, "kda_jax.xla.flush:flush", _CPU),
    Row("q8_0_matmul", "triton", _TRITON_Q8_0, "kda_jax.triton.q8_0:matmul", _Q8_0_GPU),
    Row("q8_0_matmul", "xla", _ANY, "kda_jax.xla.q8_0:matmul", _Q8_0_GPU),
    Row("q8_0_matmul_pair", "triton", _TRITON_Q8_0, "kda_jax.triton.q8_0:matmul_pair", _Q8_0_GPU),
    Row("q8_0_matmul_pair", "xla", _ANY, "kda_jax.xla.q8_0:matmul_pair", _Q8_0_GPU),
    Row("q8_0_matmul_hc_expand", "triton", _TRITON_Q8_0, "kda_jax.triton.q8_0:matmul_hc_expand", _Q8_0_GPU),
    Row("q8_0_matmul_hc_expand", "xla", _ANY, "kda_jax.xla.q8_0:matmul_hc_expand", _Q8_0_GPU),
)


def check_name(call: str, operation: str, implementation: str | None) -> None:
    """Raises for a forced name that no row has for the operation, before anything else is looked at."""
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


def check_call(implementation: str, call: Call) -> None:
    """Raises for a forced implementation that cannot serve the call whatever it is compiled for."""
    for row in _rows(call.operation, implementation):
        if (reason := row.needs.unmet_by_call(call)) is None:
            return
    raise _cannot_serve(call, implementation, reason)


def serve(call: Call, implementation: str | None, args: Any, spec: Any) -> Any:
    """The outputs, traced, of the first implementation that serves the call on its target and is on this machine."""
    cause: Unavailable | None = None
    for row in _rows(call.operation, implementation):
        reason = row.needs.unmet_by_call(call) or row.needs.unmet_by_target(call)
        if reason is not None or (implementation is None and call.compute_capability in row.unproven):
            continue
        try:
            _check_package(row)
            return _load(row)(args, spec)
        except Unavailable as error:
            reason, cause = str(error), error
            if implementation is None:
                _warn_of_unavailable(row.implementation, reason)
    raise _cannot_serve(call, implementation, reason) from cause


def _check_package(row: Row) -> None:
    package = row.needs.package
    if package is not None and importlib.util.find_spec(package) is None:
        raise Unavailable(f"the package {package} is missing: pip install 'kda-jax[{row.implementation}]'")


def _load(row: Row) -> Callable[[Any, Any], Any]:
    module, name = row.function.split(":")
    return getattr(importlib.import_module(module), name)


def _rows(operation: str, implementation: str | None) -> list[Row]:
    rows = [row for row in TABLE if row.operation == operation]
    return [row for row in rows if (row.default if implementation is None else row.implementation == implementation)]


def _cannot_serve(call: Call, implementation: str | None, reason: str | None) -> NotImplementedError:
    module = "q8_0" if call.operation.startswith("q8_0_") else "kda"
    name = call.operation.replace(f"{module}_", f"{module}.", 1)
    for form in ("_fwd", "_bwd", "_paged"):
        name = name.removesuffix(form)
    return NotImplementedError(f"{name}: implementation is {implementation!r}, which does not serve this call: {reason}")


@functools.cache
def _warn_of_unavailable(implementation: str, reason: str) -> None:
    """Once a reason."""
    warnings.warn(f"kda_jax does without its {implementation} kernels, which are the faster ones: {reason}", stacklevel=2)
