"""How far a result may lie from the oracle, as ``||out - ref|| / ||ref||``. docs/numerics.md explains the rows."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    output: float
    state: float
    gradient: float


# By the dtype of the activations, for any implementation with a float32 state.
TOLERANCES = {
    "float32": Tolerance(output=1e-5, state=1e-5, gradient=1e-4),
    "bfloat16": Tolerance(output=5e-3, state=1e-3, gradient=1e-2),
    "float16": Tolerance(output=5e-3, state=1e-3, gradient=1e-2),
    "float64": Tolerance(output=1e-12, state=1e-12, gradient=1e-11),
}
# A bfloat16 pool rounds the state after every call, to 2**-9 of each entry at most.
BFLOAT16_POOL = Tolerance(output=1e-2, state=1e-2, gradient=float("nan"))
# The verify kernels on tensor cores against the recurrent kernels, same inputs.
TENSOR_CORE_VERIFY = Tolerance(output=2e-3, state=1e-3, gradient=float("nan"))


def tolerance(dtype: str, state_dtype: str = "float32") -> Tolerance:
    """The row for activations of ``dtype`` and a state of ``state_dtype``."""
    return BFLOAT16_POOL if state_dtype == "bfloat16" else TOLERANCES[dtype]
