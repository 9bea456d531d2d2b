"""What the tests of q8_0 draw: activations, weights, and the lanes of a residual stream."""

import jax.numpy as jnp
import numpy as np

from kda_jax import q8_0

OUT, OUT1, LANES = 7, 3, 4


def draw(*shape, seed=0, dtype="float32"):
    """A NumPy array, so that what tests do with it is compiled by nobody."""
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def weight(out=OUT, inputs=96, seed=1):
    return q8_0.quantize(draw(out, inputs, seed=seed))


def lanes(n, lanes=LANES, out=OUT, dtype="float32", seed=2):
    """residual, post, comb and add, by name."""
    shapes = {"residual": (n, lanes, out), "post": (n, lanes), "comb": (n, lanes, lanes), "add": (n, out)}
    return {name: draw(*shape, seed=seed + i, dtype=dtype) for i, (name, shape) in enumerate(shapes.items())}
