"""One XLA custom call of a compiled kernel, and the arguments that token kernels share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kda_jax import _gates, _target
from kda_jax._operands import L2NORM_EPS, PoolOperands, Spec
from kda_jax.cute import runtime, store
from kda_jax.cute.artifact import Kernel

# Kernels use what one generation has and the next need not have: an object runs on its own.
ARCHITECTURES: dict[int | None, str] = {90: "sm_90a", 100: "sm_100a"}


def call(
    name: str,
    choices: Mapping[str, Any],
    operands: Sequence[jax.Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    in_place: Mapping[int, int] | None = None,
) -> tuple[jax.Array, ...]:
    """Runs the kernel of these choices for the target; ``in_place`` maps operands to the outputs that take their place."""
    capability = _target.compute_capability()
    artifact = store.fetch(Kernel(name, tuple(choices.items()), ARCHITECTURES[capability]))
    if jax.default_backend() == "gpu":  # a program for export is run elsewhere
        runtime.register()
    made = jax.ffi.ffi_call(runtime.TARGET, tuple(outputs), input_output_aliases=dict(in_place or {}))
    return tuple(made(*operands, module=artifact.module, key=artifact.key))


def token_operands(args: PoolOperands, spec: Spec) -> list[jax.Array]:
    """Those of a PoolOperands, none absent, and the options: numbers that one binary serves all of."""
    value_heads, k_dim = args.v.shape[-2], args.k.shape[-1]
    A_log = jnp.zeros((1, value_heads)) if args.A_log is None else args.A_log
    dt_bias = jnp.zeros((1, value_heads, k_dim)) if args.dt_bias is None else args.dt_bias
    slots = jnp.arange(args.v.shape[0], dtype=jnp.int32) if args.state_indices is None else args.state_indices
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
    return [
        *(args.q, args.k, args.v, args.g, args.beta),
        A_log.astype(jnp.float32).reshape(-1, value_heads),
        dt_bias.astype(jnp.float32).reshape(-1, value_heads, k_dim),
        args.state,
        slots,
        jnp.asarray(options, jnp.float32),
    ]
