"""What the token operations share before they bind: the options, the checks and the canonical operands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kda_jax import _dispatch
from kda_jax._gates import Gate, LowerBound, Softplus
from kda_jax._operands import Spec

# What an axis is called in an error message.
AXIS_WORDS = {
    "B": "batch size",
    "N": "row count",
    "T": "token count",
    "H": "head count",
    "HV": "value head count",
    "K": "head dimension",
    "V": "value head dimension",
    "P": "slot count",
    "L": "layer count",
    "S": "sequence count",
    "N+1": "offset count",
}

ACTIVATION_DTYPES = ("bfloat16", "float16", "float32", "float64")
STATE_DTYPES = ("float32", "bfloat16", "float64")

# Said by every operation that has no derivative.
NOT_DIFFERENTIABLE = "{}: serving operations have no derivative; train with kda.chunk, which computes the same recurrence"


class Checker:
    """Checks arrays against named axes; the first array with an axis sets its size.

    Every message names the call, the argument, what it got and what it must be. ``words`` says what an axis is called there.
    """

    def __init__(self, call: str, words: Mapping[str, str] = AXIS_WORDS):
        self.call = call
        self.words = words
        self.sizes: dict[str, int] = {}
        self.set_by: dict[str, str] = {}

    def array(self, name: str, x: Any, axes: str, dtypes: Sequence[str]) -> jax.Array:
        if not isinstance(x, (jax.Array, np.ndarray)):
            raise TypeError(f"{self.call}: {name} is a {type(x).__name__}; it must be an array [{axes.replace(' ', ', ')}]")
        if str(x.dtype) not in dtypes:
            raise TypeError(f"{self.call}: {name} has dtype {x.dtype}; it must be {_either(dtypes)}")
        names = axes.split()
        form = f"[{', '.join(names)}]"
        if x.ndim != len(names):
            raise ValueError(f"{self.call}: {name} has shape {x.shape}, {x.ndim} axes; it must be {form}")
        for axis, size in zip(names, x.shape, strict=True):
            if size < 1:
                raise ValueError(f"{self.call}: {name} {form} has {self.words[axis]} {axis}=0; it must be at least 1")
            expected = self.sizes.setdefault(axis, size)
            source = self.set_by.setdefault(axis, name)
            if size != expected:
                raise ValueError(
                    f"{self.call}: {name} {form} has shape {x.shape} with {self.words[axis]} {axis}={size}; "
                    f"{axis} must be {expected}, as in {source}"
                )
        return jnp.asarray(x)

    def flag(self, name: str, value: Any) -> bool:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"{self.call}: {name} is {value!r}; it must be True or False, known when tracing")
        return bool(value)

    def indices(self, name: str, x: Any, axes: str) -> jax.Array:
        """int32 indices or counts; lists and Python integers are taken as arrays."""
        if not isinstance(x, (jax.Array, np.ndarray)):
            x = np.asarray(x)
        if not np.issubdtype(x.dtype, np.integer):
            raise TypeError(f"{self.call}: {name} has dtype {x.dtype}; it must hold integers (int32)")
        # Clipped, so that a wider integer outside int32 stays outside every pool instead of wrapping into one.
        own, narrow = np.iinfo(x.dtype), np.iinfo(np.int32)
        x = jnp.asarray(x.clip(max(own.min, narrow.min), min(own.max, narrow.max)), jnp.int32)
        return self.array(name, x, axes, ("int32",))

    def groups(self) -> None:
        """What grouped value attention asks of the two head counts."""
        heads, value_heads = self.sizes["H"], self.sizes["HV"]
        if value_heads % heads:
            raise ValueError(
                f"{self.call}: {self.set_by['HV']} has head count HV={value_heads}; "
                f"it must be a multiple of the head count H={heads} of {self.set_by['H']}"
            )


def concrete(x: jax.Array) -> np.ndarray | None:
    """The values of ``x`` where they are known, None under a transformation."""
    return None if isinstance(x, jax.core.Tracer) else np.asarray(x)


def tokens(
    check: Checker,
    axes: Mapping[str, str],
    arrays: Mapping[str, Any],
    *,
    operation: str,
    gate: Gate | None,
    qk_l2norm: bool,
    beta_sigmoid: bool,
    allow_neg_eigval: bool,
    scale: float | None,
    implementation: str | None,
) -> tuple[dict[str, Any], Spec]:
    """Checks the arrays (q, k, v, g, beta) and the options that every token operation shares.

    Returns them by name, with the gate's A_log and dt_bias (or None), and the spec.
    """
    _dispatch.check_name(check.call, operation, implementation)
    checked = {name: check.array(name, x, axes[name], ACTIVATION_DTYPES) for name, x in arrays.items()}
    check.groups()
    kind, lower_bound, A_log, dt_bias = None, None, None, None
    if gate is not None:
        if not isinstance(gate, (Softplus, LowerBound)):
            raise TypeError(
                f"{check.call}: gate is a {type(gate).__name__}; it must be None (g is the log decay), "
                "kda.Softplus or kda.LowerBound"
            )
        kind = "softplus" if isinstance(gate, Softplus) else "lower_bound"
        lower_bound = gate.lower_bound if isinstance(gate, LowerBound) else None
        A_log = check.array("gate.A_log", gate.A_log, axes["A_log"], ACTIVATION_DTYPES)
        if gate.dt_bias is not None:
            dt_bias = check.array("gate.dt_bias", gate.dt_bias, axes["dt_bias"], ACTIVATION_DTYPES)
    flags = {
        "qk_l2norm": check.flag("qk_l2norm", qk_l2norm),
        "beta_sigmoid": check.flag("beta_sigmoid", beta_sigmoid),
        "allow_neg_eigval": check.flag("allow_neg_eigval", allow_neg_eigval),
    }
    if flags["allow_neg_eigval"] and not flags["beta_sigmoid"]:
        raise ValueError(
            f"{check.call}: allow_neg_eigval is True with beta_sigmoid False; it doubles the sigmoid, so beta_sigmoid "
            "must be True (or pass beta already in (0, 2))"
        )
    if scale is None:
        scale = check.sizes["K"] ** -0.5
    elif isinstance(scale, bool) or not isinstance(scale, (int, float, np.number)) or not np.isfinite(scale):
        raise TypeError(f"{check.call}: scale is {scale!r}; it must be None (K ** -0.5) or a finite Python number")
    spec = Spec(gate=kind, lower_bound=lower_bound, scale=float(scale), implementation=implementation, **flags)
    return checked | {"A_log": A_log, "dt_bias": dt_bias}, spec


def pool(check: Checker, state: Any, state_indices: Any, axes: str = "N") -> tuple[jax.Array, jax.Array | None]:
    """Checks a state pool and the rows' slots in it; index values only where they are known, that is outside jit."""
    state = check.array("state", state, "P HV V K", STATE_DTYPES)
    rows, slots = check.sizes["N"], check.sizes["P"]
    if state_indices is None:
        if rows != slots:
            raise ValueError(
                f"{check.call}: state has slot count P={slots} for N={rows} rows; without state_indices they must be equal"
            )
        return state, None
    state_indices = check.indices("state_indices", state_indices, axes)
    known = concrete(state_indices)
    if known is not None:
        slot, count = np.unique(known[(known >= 0) & (known < slots)], return_counts=True)
        if (count > 1).any():
            raise ValueError(
                f"{check.call}: state_indices names slot {slot[count > 1][0]} {count[count > 1][0]} times; every live row "
                "must have a slot of its own (a padded row takes an index outside [0, P))"
            )
    return state, state_indices


def accepted(check: Checker, num_accepted: Any, least: int) -> jax.Array:
    """Checks the number of accepted tokens a row, an array [N] or one number for all rows."""
    if np.ndim(num_accepted) == 0:
        num_accepted = check.indices("num_accepted", num_accepted, "")
        num_accepted = jnp.broadcast_to(num_accepted, check.sizes["N"])
    else:
        num_accepted = check.indices("num_accepted", num_accepted, "N")
    known = concrete(num_accepted)
    most = check.sizes["T"]
    if known is not None and ((known < least) | (known > most)).any():
        raise ValueError(f"{check.call}: num_accepted is {known.tolist()}; every value must lie in [{least}, T={most}]")
    return num_accepted


def _either(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
