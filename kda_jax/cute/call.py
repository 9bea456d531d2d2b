"""One XLA custom call of a compiled kernel, and the arguments that token kernels share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kda_jax import _gates, _target
from kda_jax._operands import L2NORM_EPS, PagedOperands, PoolOperands, Spec
from kda_jax.cute import runtime, store
from kda_jax.cute.artifact import Kernel

# Kernels use what one generation has and the next need not have: an object runs on its own.
ARCHITECTURES: dict[int | None, str] = {90: "sm_90a", 100: "sm_100a"}
DIMS = 64, 128  # K and V, which are equal
STATES = "float32", "bfloat16"
GATES = None, "softplus", "lower_bound"
TOKENS = "bfloat16", "float32"  # tokens of other dtypes, and of several, are cast to the last


def call(
    name: str,
    choices: Mapping[str, Any],
    operands: Sequence[Any],
    outputs: Sequence[jax.ShapeDtypeStruct],
    in_place: Mapping[int, int] | None = None,
    together: Sequence[Mapping[str, Any]] = (),
) -> tuple[jax.Array, ...]:
    """Runs the kernel of these choices for the target; ``in_place`` maps operands to the outputs that take their place.

    Where nothing can be compiled, the kernels of the choices ``together`` must be in the store too.
    """
    if jax.default_backend() == "gpu":  # a program for export is run elsewhere
        runtime.register()
    architecture = ARCHITECTURES[_target.compute_capability()]
    if not store.can_compile():
        for others in together:
            store.fetch(Kernel(name, tuple(others.items()), architecture))
    artifact = store.fetch(Kernel(name, tuple(choices.items()), architecture))
    made = jax.ffi.ffi_call(runtime.TARGET, tuple(outputs), input_output_aliases=dict(in_place or {}))
    return tuple(made(*operands, module=artifact.module, key=artifact.key))


def slots_of(state_indices: Any, rows: int) -> Any:
    """Without indices row n is slot n: a constant, so that nothing is launched to count."""
    return np.arange(rows, dtype=np.int32) if state_indices is None else state_indices


def token_choices() -> Iterator[dict[str, Any]]:
    """Those that all kernels of tokens have."""
    for dim, state, gate, token in itertools.product(DIMS, STATES, GATES, TOKENS):
        yield _choices(dim, state, gate, token)


def _choices(dim: int, state: str, gate: str | None, token: str) -> dict[str, Any]:
    return {"K": dim, "V": dim, "STATE": state, "GATE": gate or "none", "TOKEN": token}


def token_operands(args: PoolOperands | PagedOperands, spec: Spec) -> tuple[dict[str, Any], list[Any]]:
    """The choices of the kernel, and what it is given.

    No operand is absent, and none is computed: what stands for one is a constant. The options are numbers, so that one
    binary serves all of them.
    """
    token: list[Any] = [args.q, args.k, args.v, args.g, args.beta]
    dtype = "bfloat16" if all(x.dtype == jnp.bfloat16 for x in token) else "float32"
    value_heads, k_dim = args.v.shape[-2], args.k.shape[-1]
    A_log = np.zeros((1, value_heads), np.float32) if args.A_log is None else args.A_log
    dt_bias = np.zeros((1, value_heads, k_dim), np.float32) if args.dt_bias is None else args.dt_bias
    options = [
        spec.scale,
        spec.lower_bound or 0.0,
        spec.qk_l2norm,
        L2NORM_EPS,
        spec.beta_sigmoid,
        2.0 if spec.allow_neg_eigval else 1.0,
        _gates.SOFTPLUS_LINEAR_ABOVE,
        0.0,
    ]
    operands = [
        *(x.astype(dtype) for x in token),
        A_log.astype(np.float32).reshape(-1, value_heads),
        dt_bias.astype(np.float32).reshape(-1, value_heads, k_dim),
        args.state,
        slots_of(args.state_indices, args.v.shape[0]),
        np.asarray(options, np.float32),
    ]
    return _choices(k_dim, args.state.dtype.name, spec.gate, dtype), operands


def token_output(args: PoolOperands | PagedOperands, choices: Mapping[str, Any]) -> jax.ShapeDtypeStruct:
    """o as the kernel gives it, in the dtype of its tokens."""
    return jax.ShapeDtypeStruct(args.v.shape, jnp.dtype(choices["TOKEN"]))
