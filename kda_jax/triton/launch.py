"""One launch of a Triton kernel, and the arguments that the token kernels share."""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kda_jax import _gates, _target
from kda_jax._operands import L2NORM_EPS, ChunkBackwardOperands, PagedOperands, PoolOperands, Spec


class Tile(NamedTuple):
    """How a head's V rows are divided: ``rows`` of the state to a program of ``warps`` warps."""

    rows: int
    warps: int

    def of_128(self, state: jax.Array) -> Tile:
        """This tile where K is 128; with shorter rows more of them, up to all."""
        v_dim, k_dim = state.shape[-2:]
        return Tile(min(self.rows * 128 // k_dim, v_dim), self.warps)


def launch_tiles(
    kernel: Any, inputs: Sequence[Any], outputs: Sequence[jax.ShapeDtypeStruct], *, heads: int, tile: Tile, **options: Any
) -> tuple[jax.Array, ...]:
    """Runs ``kernel`` on every tile of ``heads`` (rows times value heads) of the state; otherwise as :func:`launch`."""
    programs = heads * (options["V"] // tile.rows)
    return launch(kernel, inputs, outputs, programs=programs, warps=tile.warps, BV=tile.rows, **options)


def launch(
    kernel: Any,
    inputs: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    programs: int,
    warps: int,
    registers: int | None = None,
    in_place: Mapping[int, int] | None = None,
    fuse: bool = False,
    **constants: Any,
) -> tuple[jax.Array, ...]:
    """Runs ``programs`` programs of ``kernel``.

    The kernel's parameters are the inputs (arrays, then integers), the outputs and the constants, in that order.
    ``in_place`` maps an input to the output that is the same memory. ``fuse`` lets the compiler contract products and sums;
    not where bits must be those of another kernel. ``registers`` a thread may be fewer than the compiler would take, so that
    more programs run at a time. A constant STAGES, how far ahead loads are requested, is reduced to fit in shared memory.
    What depends on N or T is in ``programs`` and in integers that are read at run time, so one binary serves all.
    """
    arrays = [x for x in inputs if not isinstance(x, int)]
    program = _program(
        kernel,
        tuple(x if isinstance(x, int) else jnp.dtype(x.dtype).name for x in (*inputs, *outputs)),
        programs,
        warps,
        registers,
        fuse,
        _target.compute_capability(),
        tuple(sorted(constants.items())),
    )
    # XLA records this target, and not jax-triton's own call, into command buffers (CUDA graphs).
    call = jax.ffi.ffi_call("triton_kernel_call_ffi", tuple(outputs), input_output_aliases=dict(in_place or {}))
    return tuple(call(*arrays, name=f"kda_{kernel.__name__}", opaque=program))


@functools.cache
def _program(kernel, parameters, programs, warps, registers, fuse, compute_capability, constants) -> bytes:
    """The serialised launch: PTX for the target, the grid and the parameters."""
    from jax_triton import triton_lib

    library = triton_lib.triton_kernel_call_lib
    scalars = [(i, "i32", x) for i, x in enumerate(parameters) if isinstance(x, int)]
    types = ["i32" if isinstance(x, int) else f"*{triton_lib._JAX_TO_TRITON_TYPE_MAP[jnp.dtype(x)]}" for x in parameters]
    metaparams = dict(constants)
    while True:
        try:
            compiled, _ = triton_lib.get_or_create_triton_kernel(
                functools.partial(_cuda_backend, registers),
                "cuda",
                kernel,
                types,
                scalars,
                num_warps=warps,
                num_stages=1,
                num_ctas=1,
                compute_capability=compute_capability,
                enable_fp_fusion=fuse,
                metaparams=metaparams,
                dump=False,
            )
            break
        except MemoryError:
            if metaparams.get("STAGES", 1) == 1:
                raise
            metaparams["STAGES"] -= 1
    arguments = [
        library.create_scalar_parameter(x, "i32") if isinstance(x, int) else library.create_array_parameter(0, 16)
        for x in parameters
    ]
    call = library.TritonKernelCall(compiled, programs, 1, 1, arguments)
    return zlib.compress(call.to_proto(f"kda_{kernel.__name__}", b""))


# KiB of shared memory that one program may have, by compute capability (CUDA's programming guide); least where unknown.
SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}


def _cuda_backend(registers: int | None, platform: str, compute_capability: int) -> Any:
    """Triton's compiler, told of an option that jax-triton does not pass on, and asked for what it does not ask."""
    from jax_triton import triton_lib

    backend = triton_lib.get_cuda_backend(platform, compute_capability)
    parse, make_llir = backend.parse_options, backend.make_llir

    def checked(module: Any, metadata: Any, *args: Any) -> Any:
        found = make_llir(module, metadata, *args)
        limit = SHARED_MEMORY.get(compute_capability, min(SHARED_MEMORY.values())) << 10
        if metadata["shared"] > limit:
            raise MemoryError(f"{metadata['shared']} bytes of shared memory; the GPU has {limit} for a program")
        return found

    backend.parse_options = lambda options: parse({**options, "maxnreg": registers})
    backend.make_llir = checked
    return backend


def like(*arrays: jax.Array) -> tuple[jax.ShapeDtypeStruct, ...]:
    return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays)


def pool_end(state: jax.Array) -> int:
    """The number of slots, negative: Triton compiles a kernel anew for a scalar that equals 1, and no negative one does."""
    return -state.shape[0]


def token_inputs(args: PoolOperands | PagedOperands) -> list[jax.Array]:
    """The kernels' first nine parameters; what is absent is never read, and stands for itself by another array."""
    return [args.beta if x is None else x for x in args[:9]]


STATE = PoolOperands._fields.index("state")


def token_constants(args: PoolOperands | PagedOperands | ChunkBackwardOperands, spec: Spec) -> dict[str, Any]:
    """The constants that most kernels share: sizes and options."""
    heads, k_dim = args.q.shape[-2:]
    return {
        "H": heads,
        "HV": args.v.shape[-2],
        "K": k_dim,
        "V": args.v.shape[-1],
        "GATE": spec.gate,
        "HAS_BIAS": args.dt_bias is not None,
        "A_LOG_STRIDE": _row_stride(args.A_log, 1),
        "DT_BIAS_STRIDE": _row_stride(args.dt_bias, 2),
        "LOWER_BOUND": spec.lower_bound,
        "SOFTPLUS_LINEAR_ABOVE": _gates.SOFTPLUS_LINEAR_ABOVE,
        "L2NORM_EPS": L2NORM_EPS if spec.qk_l2norm else None,
        "BETA_RANGE": (2.0 if spec.allow_neg_eigval else 1.0) if spec.beta_sigmoid else None,
        "SCALE": spec.scale,
    }


def _row_stride(x: jax.Array | None, own: int) -> int:
    """The elements from one row's gate parameter to the next: none where all rows share it."""
    return 0 if x is None or x.ndim == own else math.prod(x.shape[1:])
