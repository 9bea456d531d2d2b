"""The Q8_0 format: weights as blocks of 32 along the input dimension, one float16 scale and 32 int8 each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import lax

from kda_jax import _inputs

BLOCK = 32
GGUF_BLOCK_BYTES = 2 + BLOCK
# Twice the least normal float32. XLA takes subnormal numbers for zero on some platforms and not on others; with scales from
# here on they are less than half of one, and rounded to zero everywhere.
LEAST_SCALE = 2.0**-125
WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
# What an axis is called in an error message.
AXIS_WORDS = {
    "N": "token count",
    "IN": "input size",
    "OUT": "output size",
    "OUT0": "output size",
    "OUT1": "output size",
    "BLOCKS": "block count",
    "BYTES": "byte count",
    "L": "lane count",
    "D": "channel count",
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantised weight ``[OUT, IN]``, a pytree: weight [o, i] is ``scales[o, i // 32] * values[o, i]``.

    Where IN is no multiple of 32 the last block of a row is short; what it lacks counts as zero.

    Attributes:
      scales: ``[OUT, BLOCKS]`` float16, BLOCKS = IN / 32, rounded up.
      values: ``[OUT, IN]`` int8.
    """

    scales: jax.Array
    values: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """``(OUT, IN)``."""
        return self.values.shape


jax.export.register_pytree_node_serialization(
    Weight,
    serialized_name="kda_jax.q8_0.Weight",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda data: (),
)


def num_blocks(inputs: int) -> int:
    return -(-inputs // BLOCK)


def blocks(x: jax.Array) -> jax.Array:
    """[..., IN] as [..., BLOCKS, 32], the last block filled up with zeros."""
    inputs = x.shape[-1]
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num_blocks(inputs) * BLOCK - inputs)])
    return x.reshape(*x.shape[:-1], -1, BLOCK)


@jax.jit
def quantize_blocks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., BLOCKS, 32] as float32 scales [..., BLOCKS] and int8 values, rounded half away from zero.

    A block whose scale is below LEAST_SCALE is zero. NaN and infinity make their block's scale NaN or infinite.
    """
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=-1)
    # XLA would multiply by the reciprocal of a constant, which rounds differently from a division.
    scales = amax / jnp.where(amax == 0, jnp.float32(1), jnp.float32(127))
    scales = jnp.where(scales < LEAST_SCALE, 0, scales)
    reciprocals = jnp.where(scales == 0, 0, 1 / scales)
    values = lax.round(x * reciprocals[..., None], lax.RoundingMethod.AWAY_FROM_ZERO)
    return scales, values.astype(jnp.int8)


def quantize(w: jax.Array) -> Weight:
    """A weight in Q8_0, with the bits of GGUF's: scale max |w| / 127 of each block, values rounded half away from zero.

    Args:
      w: ``[OUT, IN]`` float32, bfloat16 or float16; any IN. A block with a number from 127 * 65520 on gets an infinite
        scale; one whose numbers are all below 127 * 2^-125 gets values of zero.

    Returns:
      The :class:`Weight`. Its values are rounded by the float32 scale and the scale then to float16, as in GGUF.

    Raises:
      ValueError, TypeError: a shape or dtype is wrong; the text says which and what it must be.
    """
    w = _inputs.Checker("q8_0.quantize", AXIS_WORDS).array("w", w, "OUT IN", WEIGHT_DTYPES)
    scales, values = quantize_blocks(blocks(w))
    return Weight(scales.astype(jnp.float16), values.reshape(w.shape[0], -1)[:, : w.shape[1]])


def dequantize(w: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """The numbers that a quantised weight stands for.

    Args:
      w: a :class:`Weight` of shape ``[OUT, IN]``.
      dtype: of the result, a floating one; the products are taken in float32.

    Returns:
      ``[OUT, IN]`` in ``dtype``.

    Raises:
      ValueError, TypeError: a shape or dtype is wrong; the text says which and what it must be.
    """
    check = _inputs.Checker("q8_0.dequantize", AXIS_WORDS)
    scales, values = check_weight(check, "w", w)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{check.call}: dtype is {jnp.dtype(dtype)}; it must be a floating one")
    products = blocks(values).astype(jnp.float32) * scales.astype(jnp.float32)[..., None]
    return products.reshape(values.shape[0], -1)[:, : values.shape[1]].astype(dtype)


def from_gguf(data: Any, shape: Sequence[int] | None = None) -> Weight:
    """A weight from GGUF's blocks of 34 bytes: the float16 scale, little endian, then 32 int8.

    Args:
      data: bytes, or an array ``[OUT, BLOCKS * 34]`` uint8, as in a ``gguf`` tensor's ``data``.
      shape: ``(OUT, IN)``, IN a multiple of 32. bytes need it; an array may have any shape if it is given.

    Returns:
      The :class:`Weight`, with the same bits.

    Raises:
      ValueError, TypeError: the data or the shape is wrong; the text says what it must be.
    """
    call = "q8_0.from_gguf"
    array = np.frombuffer(data, np.uint8) if isinstance(data, (bytes, bytearray, memoryview)) else np.asarray(data)
    if array.dtype != np.uint8:
        raise TypeError(f"{call}: data has dtype {array.dtype}; it must be bytes or uint8")
    if shape is None:
        if array.ndim != 2 or array.shape[1] % GGUF_BLOCK_BYTES:
            raise ValueError(f"{call}: data has shape {array.shape}; without shape it must be [OUT, BLOCKS * 34]")
        shape = (array.shape[0], array.shape[1] // GGUF_BLOCK_BYTES * BLOCK)
    if len(shape) != 2 or min(shape) < 1 or shape[1] % BLOCK:
        raise ValueError(f"{call}: shape is {tuple(shape)}; it must be (OUT, IN), IN a multiple of 32")
    if array.size * BLOCK != math.prod(shape) * GGUF_BLOCK_BYTES:
        needed = math.prod(shape) // BLOCK * GGUF_BLOCK_BYTES
        raise ValueError(f"{call}: data has {array.size} bytes; for shape {tuple(shape)} it must have {needed}")
    packed = array.reshape(shape[0], -1, GGUF_BLOCK_BYTES)
    scales = np.ascontiguousarray(packed[..., :2]).view("<f2")[..., 0]
    values = np.ascontiguousarray(packed[..., 2:]).view(np.int8).reshape(shape)
    return Weight(jnp.asarray(scales, jnp.float16), jnp.asarray(values))


def to_gguf(w: Weight) -> np.ndarray:
    """The weight in GGUF's blocks of 34 bytes; the inverse of :func:`from_gguf`.

    Args:
      w: a :class:`Weight` of shape ``[OUT, IN]``, IN a multiple of 32.

    Returns:
      A NumPy array ``[OUT, BLOCKS * 34]`` uint8; its ``tobytes()`` are the tensor's bytes in a file.

    Raises:
      ValueError, TypeError: a shape or dtype is wrong, or IN is no multiple of 32, which GGUF has no form for.
    """
    check = _inputs.Checker("q8_0.to_gguf", AXIS_WORDS)
    scales, values = map(np.asarray, check_weight(check, "w", w))
    rows, inputs = values.shape
    if inputs % BLOCK:
        raise ValueError(f"{check.call}: w has shape {w.shape} with input size IN={inputs}; it must be a multiple of 32")
    packed = [scales.astype("<f2")[..., None].view(np.uint8), values.reshape(rows, -1, BLOCK).view(np.uint8)]
    return np.concatenate(packed, axis=-1).reshape(rows, -1)


def check_weight(check: _inputs.Checker, name: str, w: Any, out: str = "OUT") -> tuple[jax.Array, jax.Array]:
    """Checks a weight whose output axis is named ``out``; returns its scales and values."""
    if not isinstance(w, Weight):
        raise TypeError(f"{check.call}: {name} is a {type(w).__name__}; it must be a q8_0.Weight, as q8_0.quantize makes it")
    values = check.array(f"{name}.values", w.values, f"{out} IN", ("int8",))
    check.sizes["BLOCKS"] = num_blocks(values.shape[1])
    check.set_by["BLOCKS"] = f"the 32 inputs a block of {name}.values"
    return check.array(f"{name}.scales", w.scales, f"{out} BLOCKS", ("float16",)), values
