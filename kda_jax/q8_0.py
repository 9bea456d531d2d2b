"""Products of few tokens with weights in Q8_0, and the format itself. docs/q8_0.md has the formulas."""

from __future__ import annotations

from typing import Any

import jax

from kda_jax import _dispatch, _inputs
from kda_jax._primitive import Operation, Output
from kda_jax._q8_0_format import AXIS_WORDS, WEIGHT_DTYPES, check_weight
from kda_jax._q8_0_format import Weight as Weight
from kda_jax._q8_0_format import dequantize as dequantize
from kda_jax._q8_0_format import from_gguf as from_gguf
from kda_jax._q8_0_format import quantize as quantize
from kda_jax._q8_0_format import to_gguf as to_gguf
from kda_jax._q8_0_operands import (
    GROUP_AXIS,
    MATMUL_AXES,
    MATMUL_HC_EXPAND_AXES,
    MATMUL_PAIR_AXES,
    MatmulHcExpandOperands,
    MatmulOperands,
    MatmulPairOperands,
    MatmulSpec,
)

ACTIVATION_DTYPES = WEIGHT_DTYPES
MAX_LANES = 8


def _operation(name: str, axes: dict[str, str], *outputs: str, like: str = "x") -> Operation:
    """An operation whose outputs have these axes and the dtype of the operand ``like``."""
    return Operation(
        f"q8_0_{name}",
        axes,
        lambda args, sizes, spec: tuple(Output(output, getattr(args, like).dtype) for output in outputs),
        not_differentiable=f"q8_0.{name}: products with quantised weights have no derivative; train with the weights as "
        "they were before q8_0.quantize, in a plain matrix product",
        mapped_axis=GROUP_AXIS,
    )


_MATMUL = _operation("matmul", MATMUL_AXES, "N OUT")
_MATMUL_PAIR = _operation("matmul_pair", MATMUL_PAIR_AXES, "N OUT0", "N OUT1")
_MATMUL_HC_EXPAND = _operation("matmul_hc_expand", MATMUL_HC_EXPAND_AXES, "N L D", like="residual")


def matmul(x: jax.Array, w: Weight, *, implementation: str | None = None) -> jax.Array:
    """``x W^T`` for N tokens, x quantised as the weight is: exact integer products within a block, float32 beyond.

    A token's result does not depend, to the bit, on N or on the other tokens (on a GPU with xla: to rounding).

    Args:
      x: ``[N, IN]`` float32, bfloat16 or float16, N >= 1. Each block of 32 is quantised with a float32 scale max |x| / 127.
      w: a :class:`Weight` of shape ``[OUT, IN]``.
      implementation: None for the best one that serves the call, or a name ("xla", ...) to force it.

    Returns:
      ``[N, OUT]`` in the dtype of x, rounded to it once at the end.

    Raises:
      ValueError, TypeError: a shape or dtype is wrong; the text says which and what it must be.
      NotImplementedError: the forced implementation does not serve the call, or the call is differentiated.

    Source: the products of llama.cpp and ds4 with Q8_0 weights and activations.
    """
    check, x = _tokens(_MATMUL, "q8_0.matmul", x, implementation)
    (y,) = _MATMUL.bind(MatmulOperands(x, *check_weight(check, "w", w)), MatmulSpec(implementation))
    return y


def matmul_pair(x: jax.Array, w0: Weight, w1: Weight, *, implementation: str | None = None) -> tuple[jax.Array, jax.Array]:
    """``x W0^T`` and ``x W1^T`` in one call with one quantisation of x: bit for bit as two calls of :func:`matmul`.

    Args:
      x: ``[N, IN]`` as in :func:`matmul`.
      w0, w1: a :class:`Weight` of shape ``[OUT0, IN]`` and one of shape ``[OUT1, IN]``.
      implementation: as in :func:`matmul`.

    Returns:
      ``[N, OUT0]`` and ``[N, OUT1]`` in the dtype of x.

    Raises:
      As :func:`matmul`.

    Source: the pair of down projections that a latent attention layer begins with, as ds4 fuses it.
    """
    check, x = _tokens(_MATMUL_PAIR, "q8_0.matmul_pair", x, implementation)
    weights = *check_weight(check, "w0", w0, "OUT0"), *check_weight(check, "w1", w1, "OUT1")
    y0, y1 = _MATMUL_PAIR.bind(MatmulPairOperands(x, *weights), MatmulSpec(implementation))
    return y0, y1


def matmul_hc_expand(
    x: jax.Array,
    w: Weight,
    residual: jax.Array,
    post: jax.Array,
    comb: jax.Array,
    add: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """A product and the hyper-connection that takes it back into the L lanes of the residual stream, in one call.

    ``b = x W^T (+ add)``, ``out[n, dst, d] = b[n, d] post[n, dst] + sum_src comb[n, src, dst] residual[n, src, d]``: bit
    for bit :func:`matmul` and then, in float32, the rounded products added from left to right, src upwards.

    Args:
      x: ``[N, IN]`` as in :func:`matmul`.
      w: a :class:`Weight` of shape ``[D, IN]``.
      residual: ``[N, L, D]``, L from 1 to 8; float32, bfloat16 or float16, as the next three.
      post: ``[N, L]``, the weight of b in each lane.
      comb: ``[N, L, L]``, ``comb[n, src, dst]`` the weight of lane src in lane dst.
      add: ``[N, D]``, added to the product, or None.
      implementation: as in :func:`matmul`.

    Returns:
      ``[N, L, D]`` in the dtype of residual.

    Raises:
      As :func:`matmul`.

    Source: hyper-connections (Zhu et al., 2024), with the mixing matrices computed by token.
    """
    check, x = _tokens(_MATMUL_HC_EXPAND, "q8_0.matmul_hc_expand", x, implementation)
    weight = check_weight(check, "w", w, "D")

    def checked(name: str, array: Any) -> jax.Array:
        return check.array(name, array, MATMUL_HC_EXPAND_AXES[name], ACTIVATION_DTYPES)

    residual, post, comb = checked("residual", residual), checked("post", post), checked("comb", comb)
    add = None if add is None else checked("add", add)
    if check.sizes["L"] > MAX_LANES:
        raise ValueError(
            f"{check.call}: residual has shape {residual.shape} with lane count L={check.sizes['L']}; "
            f"it must be at most {MAX_LANES}"
        )
    operands = MatmulHcExpandOperands(x, *weight, residual, post, comb, add)
    (out,) = _MATMUL_HC_EXPAND.bind(operands, MatmulSpec(implementation))
    return out


def _tokens(operation: Operation, call: str, x: Any, implementation: str | None) -> tuple[_inputs.Checker, jax.Array]:
    _dispatch.check_name(call, operation.name, implementation)
    check = _inputs.Checker(call, AXIS_WORDS)
    return check, check.array("x", x, "N IN", ACTIVATION_DTYPES)
