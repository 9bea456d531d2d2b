"""The operations of kda_jax.q8_0 in NumPy: activations quantised in float32, as the format says, the rest in float64.

Shares no code with the library and needs NumPy alone. A weight is anything with ``scales`` and ``values``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LEAST_SCALE = np.float32(2.0**-125)


def quantize(x: Any) -> tuple[np.ndarray, np.ndarray]:
    """x [N, IN] as float32 scales [N, BLOCKS] and integer values [N, BLOCKS, 32], as float64."""
    x = _blocks(np.asarray(x, np.float32))
    scales = np.abs(x).max(axis=-1) / np.float32(127)
    scales = np.where(scales < LEAST_SCALE, np.float32(0), scales)
    scaled = x * (1 / np.where(scales == 0, np.float32(np.inf), scales))[..., None]
    fraction, whole = np.modf(np.abs(scaled))
    return scales, np.sign(scaled) * (whole + (fraction >= 0.5)).astype(np.float64)


def dequantize(w: Any) -> np.ndarray:
    """[OUT, IN] float64."""
    values = _blocks(np.asarray(w.values, np.float64)) * np.asarray(w.scales, np.float64)[..., None]
    return values.reshape(len(values), -1)[:, : np.shape(w.values)[1]]


def matmul(x: Any, w: Any) -> np.ndarray:
    """``q8_0.matmul``: [N, OUT] float64."""
    scales, values = quantize(x)
    quantised = (values * scales.astype(np.float64)[..., None]).reshape(len(values), -1)
    return quantised[:, : np.shape(x)[1]] @ dequantize(w).T


def matmul_hc_expand(x: Any, w: Any, residual: Any, post: Any, comb: Any, add: Any = None) -> np.ndarray:
    """``q8_0.matmul_hc_expand``: [N, L, D] float64."""
    residual, post, comb = (np.asarray(a, np.float64) for a in (residual, post, comb))
    b = matmul(x, w) + (0 if add is None else np.asarray(add, np.float64))
    return np.einsum("nd,nl->nld", b, post) + np.einsum("nsl,nsd->nld", comb, residual)


def _blocks(x: np.ndarray) -> np.ndarray:
    """[..., IN] as [..., BLOCKS, 32], the last block filled up with zeros."""
    missing = -x.shape[-1] % 32
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]).reshape(*x.shape[:-1], -1, 32)
