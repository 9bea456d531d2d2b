"""The compact record that verify leaves for flush."""

from __future__ import annotations

import dataclasses

import jax
import jax.export


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Update:
    """What is needed to rebuild the state after any number of the verified tokens: ``T * (HV V + H K + HV K)`` numbers a
    row, where the T states themselves would be ``T * HV V K``.

    A pytree of float32 arrays (float64 for float64 inputs). Stacked along a new first axis it serves
    :func:`kda_jax.flush_layers`.

    Attributes:
      u: ``[N, T, HV, V]``, the rank-one updates ``b_t (v_t - S' k_t)``.
      k: ``[N, T, H, K]``, the keys as the recurrence used them (after the L2 norm where it is on).
      g: ``[N, T, HV, K]``, the log decays (after the gate formula).
    """

    u: jax.Array
    k: jax.Array
    g: jax.Array


jax.export.register_pytree_node_serialization(
    Update,
    serialized_name="kda_jax.Update",
    serialize_auxdata=lambda static: b"",
    deserialize_auxdata=lambda data: (),
)
