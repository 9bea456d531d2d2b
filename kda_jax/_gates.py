"""The gate formulas, once: from the raw gate input to the log decay g_t <= 0."""

from __future__ import annotations

import dataclasses
import json
from typing import TypeAlias

import jax
import jax.export
import jax.numpy as jnp

# Above this input softplus(x) is x to the last bit of float32 (exp(-20) = 2e-9); being linear keeps it finite.
SOFTPLUS_LINEAR_ABOVE = 20.0
LOWER_BOUND_MIN = -5.0  # a 16-token sub-chunk then decays by at least exp(-80), which float32 still represents


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Softplus:
    """Log decay from ``g = -exp(A_log) * softplus(x + dt_bias)``, where ``x`` is the array passed as ``g``.

    ``softplus`` is linear above 20. The gate is unbounded below: a large ``x`` forgets the state within one token.

    Attributes:
      A_log: ``[HV]`` float32, the log of the decay rate of each value head.
      dt_bias: ``[HV, K]`` float32 or None, added to ``x``.

    Source: Mamba-2 (Dao and Gu, 2024) for the scalar form, Kimi Linear (2025) for the gate per key dimension.
    """

    A_log: jax.typing.ArrayLike
    dt_bias: jax.typing.ArrayLike | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowerBound:
    """Log decay from ``g = lower_bound * sigmoid(exp(A_log) * (x + dt_bias))``, the bounded ("safe") gate.

    Attributes:
      A_log: ``[HV]`` float32, the log of the slope of each value head.
      dt_bias: ``[HV, K]`` float32 or None, added to ``x``.
      lower_bound: the smallest log decay of one token, a Python float in [-5, 0). Static: part of the compiled program.

    Raises:
      ValueError: ``lower_bound`` lies outside [-5, 0).

    Source: the ``kda_safe_gate`` setting of Kimi Linear models.
    """

    A_log: jax.typing.ArrayLike
    dt_bias: jax.typing.ArrayLike | None = None
    lower_bound: float = dataclasses.field(default=LOWER_BOUND_MIN, metadata={"static": True})

    def __post_init__(self) -> None:
        # One type for equal bounds: it is part of the pytree's structure.
        object.__setattr__(self, "lower_bound", float(self.lower_bound))
        if not LOWER_BOUND_MIN <= self.lower_bound < 0:
            raise ValueError(
                f"LowerBound: lower_bound is {self.lower_bound}; "
                f"it must lie in [{LOWER_BOUND_MIN:g}, 0), in log decay a token"
            )


Gate: TypeAlias = Softplus | LowerBound


def log_decay(
    x: jax.Array, A_log: jax.Array | None, dt_bias: jax.Array | None, *, gate: str | None, lower_bound: float | None
) -> jax.Array:
    """The log decay g of the raw gate input ``x`` ``[..., HV, K]``, in the dtype of ``x``.

    ``A_log`` ends in ``HV`` and ``dt_bias`` in ``HV, K``; their leading axes broadcast against those of ``x``.
    """
    if gate is None:
        return x
    assert A_log is not None
    if dt_bias is not None:
        x = x + dt_bias
    rate = jnp.exp(A_log)[..., None]
    if gate == "softplus":
        # min() keeps exp finite on the branch where() drops, so that its derivative is finite too.
        curved = jnp.log1p(jnp.exp(jnp.minimum(x, SOFTPLUS_LINEAR_ABOVE)))
        return -rate * jnp.where(x > SOFTPLUS_LINEAR_ABOVE, x, curved)
    assert lower_bound is not None
    return lower_bound * jax.nn.sigmoid(rate * x)


for _cls in (Softplus, LowerBound):
    # Lets jax.export serialise functions that take or return gates.
    jax.export.register_pytree_node_serialization(
        _cls,
        serialized_name=f"kda_jax.{_cls.__name__}",
        serialize_auxdata=lambda static: json.dumps(static).encode(),
        deserialize_auxdata=lambda data: tuple(json.loads(data)),
    )
