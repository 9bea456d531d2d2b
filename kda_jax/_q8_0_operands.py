"""What crosses the primitives of q8_0. A mapped weight has one more axis in front: G groups of N / G consecutive rows."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

GROUP_AXIS = "G"


@dataclasses.dataclass(frozen=True)
class MatmulSpec:
    implementation: str | None


MATMUL_AXES = {"x": "N IN", "scales": "OUT BLOCKS", "values": "OUT IN"}
MATMUL_PAIR_AXES = {
    "x": "N IN",
    "scales0": "OUT0 BLOCKS",
    "values0": "OUT0 IN",
    "scales1": "OUT1 BLOCKS",
    "values1": "OUT1 IN",
}
MATMUL_HC_EXPAND_AXES = {
    "x": "N IN",
    "scales": "D BLOCKS",
    "values": "D IN",
    "residual": "N L D",
    "post": "N L",
    "comb": "N L L",
    "add": "N D",
}


class MatmulOperands(NamedTuple):
    x: jax.Array
    scales: jax.Array
    values: jax.Array


class MatmulPairOperands(NamedTuple):
    x: jax.Array
    scales0: jax.Array
    values0: jax.Array
    scales1: jax.Array
    values1: jax.Array


class MatmulHcExpandOperands(NamedTuple):
    x: jax.Array
    scales: jax.Array
    values: jax.Array
    residual: jax.Array
    post: jax.Array
    comb: jax.Array
    add: jax.Array | None
