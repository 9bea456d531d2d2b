"""The cases every implementation of an operation is tested on, and the named shapes that benchmarks time."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from kda_jax._gates import Gate, LowerBound, Softplus


@dataclasses.dataclass(frozen=True)
class Case:
    """One call: its shape, its options and how its inputs are drawn. ``batch`` is B of chunk and N of the others."""

    name: str
    batch: int = 2
    tokens: int = 1
    heads: int = 2
    value_heads: int = 2
    k_dim: int = 16
    v_dim: int = 16
    dtype: str = "float32"
    state_dtype: str = "float32"
    gate: str | None = "softplus"
    dt_bias: bool = True
    qk_l2norm: bool = True
    beta_sigmoid: bool = True
    allow_neg_eigval: bool = False
    scale: float | None = None
    g_value: float | None = None  # every entry of g, in place of random ones
    initial_state: bool = True
    cu_seqlens: tuple[int, ...] | None = None
    chunk_size: int = 64
    slots: tuple[int, ...] | None = None  # state_indices, with pool_size slots
    pool_size: int | None = None

    def __str__(self) -> str:
        return self.name


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The arrays of a case: NumPy, so that library and oracle read the same."""

    arrays: tuple[np.ndarray, ...]  # q, k, v, g, beta
    state: np.ndarray | None  # the initial state, or the pool
    options: dict[str, Any]  # gate and flags, as keyword arguments

    @property
    def gate(self) -> Gate | None:
        return self.options["gate"]


def draw(case: Case, *, layout: str, seed: int = 0) -> Inputs:
    """The inputs of ``case`` for ``layout``: "chunk" [B, T, ...], "draft" [N, T, ...] or "decode" [N, ...]."""
    rng = np.random.default_rng(seed)
    lead = (case.batch,) if layout == "decode" else (case.batch, case.tokens)

    def normal(*shape: int, dtype: str = case.dtype) -> np.ndarray:
        return rng.standard_normal(shape).astype(jnp.dtype(dtype))

    q, k = normal(*lead, case.heads, case.k_dim), normal(*lead, case.heads, case.k_dim)
    if not case.qk_l2norm:  # keys of norm near one, as a model would pass them
        q, k = (x / np.asarray(case.k_dim**0.5, x.dtype) for x in (q, k))
    v = normal(*lead, case.value_heads, case.v_dim)
    g, beta = normal(*lead, case.value_heads, case.k_dim), normal(*lead, case.value_heads)
    if case.gate is None:
        g = -np.exp(g - 1)
    if case.g_value is not None:
        g = np.full_like(g, case.g_value)
    if not case.beta_sigmoid:
        beta = (1 / (1 + np.exp(-beta.astype(np.float32)))).astype(beta.dtype)
    A_log = normal(case.value_heads, dtype="float32") / 2
    dt_bias = normal(case.value_heads, case.k_dim, dtype="float32") if case.dt_bias else None
    gates: dict[str | None, Gate | None] = {
        None: None,
        "softplus": Softplus(A_log, dt_bias),
        "lower_bound": LowerBound(A_log, dt_bias, -3.0 if case.g_value is None else -5.0),
    }
    return Inputs((q, k, v, g, beta), _state(case, layout, normal), _options(case, gates[case.gate]))


def _state(case: Case, layout: str, normal: Any) -> np.ndarray | None:
    shape = case.value_heads, case.v_dim, case.k_dim
    if layout != "chunk":
        return normal(case.pool_size or case.batch, *shape, dtype=case.state_dtype)
    sequences = case.batch if case.cu_seqlens is None else len(case.cu_seqlens) - 1
    return normal(sequences, *shape, dtype=case.state_dtype) if case.initial_state else None


def _options(case: Case, gate: Gate | None) -> dict[str, Any]:
    names = "qk_l2norm", "beta_sigmoid", "allow_neg_eigval", "scale"
    return {"gate": gate} | {name: getattr(case, name) for name in names}


# The options, each at least once; they apply to every operation.
OPTIONS = (
    Case("softplus"),
    Case("softplus-no-bias", dt_bias=False),
    Case("lower-bound", gate="lower_bound"),
    Case("log-decay", gate=None),
    Case("raw", gate=None, qk_l2norm=False, beta_sigmoid=False),
    Case("neg-eigval", allow_neg_eigval=True),
    Case("scale", scale=0.5),
    Case("gva", value_heads=8),
    Case("gva-rectangular", heads=1, value_heads=3, k_dim=8, v_dim=24),
    Case("wide", batch=1, heads=1, value_heads=2, k_dim=128, v_dim=128),
    Case("bf16", dtype="bfloat16", value_heads=4, k_dim=64, v_dim=64),
    Case("fp16", dtype="float16", value_heads=4),
    Case("g-zero", gate=None, g_value=0.0),
    Case("g-minus-200", gate=None, g_value=-200.0),
)


def _with(cases: tuple[Case, ...], **changes: Any) -> tuple[Case, ...]:
    return tuple(dataclasses.replace(case, **changes) for case in cases)


CHUNK_CASES = (
    *_with(OPTIONS, tokens=75),
    Case("one-token", tokens=1),
    Case("two-tokens", tokens=2),
    Case("one-short", tokens=63),
    Case("one-chunk", tokens=64),
    Case("one-more", tokens=65),
    Case("small-chunks", tokens=100, chunk_size=16),
    Case("large-chunks", tokens=200, chunk_size=128),
    Case("no-initial-state", tokens=40, initial_state=False),
    Case("bf16-state", tokens=40, dtype="bfloat16", state_dtype="bfloat16"),
    Case("packed", batch=1, tokens=150, cu_seqlens=(0, 7, 70, 150)),
    Case("packed-empty", batch=1, tokens=130, value_heads=4, cu_seqlens=(0, 0, 33, 97, 97, 130, 130)),
    Case("packed-tail", batch=1, tokens=100, cu_seqlens=(0, 1, 65, 80), initial_state=False),
    Case("packed-aligned", batch=1, tokens=128, cu_seqlens=(0, 64, 128), gate="lower_bound"),
)

_POOL = (
    Case("one-row", batch=1),
    Case("padded", batch=5, pool_size=7, slots=(6, -1, 2, 7, 0)),
    Case("all-padded", batch=3, pool_size=4, slots=(-1, -5, 100)),
    Case("shuffled", batch=6, pool_size=6, slots=(3, 1, 5, 0, 2, 4), value_heads=4),
    Case("bf16-pool", batch=3, pool_size=5, slots=(4, 1, -1), state_dtype="bfloat16"),
)
DECODE_CASES = (*OPTIONS, *_POOL)
DRAFT_CASES = (
    *_with(OPTIONS, tokens=5),
    *_with(_POOL, tokens=4),
    Case("one-draft", tokens=1),
    Case("long-draft", tokens=16, value_heads=4),
    Case("draft-g-minus-200", tokens=6, gate=None, g_value=-200.0),
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """A shape worth timing."""

    batch: int
    tokens: int
    heads: int
    value_heads: int
    dim: int
    dtype: str = "bfloat16"

    def case(self, name: str, **changes: Any) -> Case:
        """The case of this shape, with other options where ``changes`` says so."""
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "dim"}
        return Case(name, k_dim=self.dim, v_dim=self.dim, **sizes | changes)


# Named by operation; the small ones are for CPUs, the others are layers of real models on one GPU.
SHAPES = {
    "chunk": {
        "cpu": Shape(1, 2048, 4, 4, 64, "float32"),
        "cpu-gva": Shape(1, 2048, 2, 8, 64, "float32"),
        "cpu-batch": Shape(8, 512, 4, 4, 64, "float32"),
        "kimi-linear-8k": Shape(1, 8192, 32, 32, 128),
        "h64-8k": Shape(1, 8192, 64, 64, 128),
        "h96-8k": Shape(1, 8192, 96, 96, 128),
        "batch-2k": Shape(8, 2048, 32, 32, 128),
        "gva-4k": Shape(2, 4096, 16, 32, 128),
    },
    "decode": {
        "cpu": Shape(8, 1, 4, 4, 64, "float32"),
        "kimi-linear": Shape(32, 1, 32, 32, 128),
        "gva": Shape(32, 1, 16, 32, 128),
    },
    "draft": {
        "cpu": Shape(8, 4, 4, 4, 64, "float32"),
        "kimi-linear": Shape(32, 4, 32, 32, 128),
        "gva": Shape(32, 4, 16, 32, 128),
    },
}
