"""kda.chunk: whole sequences, for training and prefill, differentiable."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from kda_jax import _inputs
from kda_jax._gates import Gate
from kda_jax._operands import (
    CHUNK_AXES,
    CHUNK_BACKWARD_AXES,
    PREPARED_AXES,
    ChunkBackwardOperands,
    ChunkOperands,
    ChunkSpec,
    arithmetic_dtype,
    num_chunks,
    prepared_dtype,
    prepared_sizes,
)
from kda_jax._primitive import Operation, Output, vary_together

_TWICE = (
    "kda.chunk: differentiated in forward mode or a second time; it has a first reverse-mode derivative only "
    "(jax.grad, jax.vjp)"
)


def _forward_outputs(args: ChunkOperands, sizes: dict[str, int], spec: ChunkSpec) -> tuple[Output, ...]:
    sequences = None if args.cu_seqlens is None else sizes["N+1"] - 1
    sizes["S"] = sizes["B"] * (1 if sequences is None else sequences)
    sizes["C"] = num_chunks(sizes["T"], spec.chunk_size, sequences)
    dtype = arithmetic_dtype(args)
    state_dtype = dtype if args.initial_state is None else args.initial_state.dtype
    outputs = [Output("B T HV V", args.v.dtype), Output("S HV V K", state_dtype)]
    if spec.states_dtype is not None:
        outputs.append(Output("B C HV V K", spec.states_dtype))
        if spec.save_intermediates:
            sizes |= prepared_sizes(spec.chunk_size)
            outputs += (Output(axes, prepared_dtype(name)) for name, axes in PREPARED_AXES.items())
    return tuple(outputs)


def _backward_outputs(args: ChunkBackwardOperands, sizes: dict[str, int], spec: ChunkSpec) -> tuple[Output, ...]:
    outputs = [Output(CHUNK_AXES[name], getattr(args, name).dtype) for name in ("q", "k", "v", "g", "beta")]
    outputs += [
        Output(f"B {CHUNK_AXES[name]}", x.dtype) for name in ("A_log", "dt_bias") if (x := getattr(args, name)) is not None
    ]
    outputs += [Output("S HV V K", args.initial_state.dtype)] if args.initial_state is not None else []
    return tuple(outputs)


FORWARD = Operation("kda_chunk_fwd", CHUNK_AXES, _forward_outputs, not_differentiable=_TWICE)
BACKWARD = Operation("kda_chunk_bwd", CHUNK_BACKWARD_AXES, _backward_outputs, not_differentiable=_TWICE)


def chunk(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    g: jax.Array,
    beta: jax.Array,
    *,
    gate: Gate | None = None,
    qk_l2norm: bool = False,
    beta_sigmoid: bool = False,
    allow_neg_eigval: bool = False,
    scale: float | None = None,
    initial_state: jax.Array | None = None,
    cu_seqlens: Any = None,
    chunk_size: int = 64,
    save_intermediates: bool = False,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """KDA over whole sequences, computed chunk by chunk with matrix products.

    The same recurrence as :func:`kda_jax.decode`, token after token. Differentiable once in reverse mode in q, k, v, g,
    beta, the gate's parameters and initial_state; between the passes only the states at chunk boundaries are kept, unless
    ``save_intermediates`` is set.

    Args:
      q, k: ``[B, T, H, K]`` bfloat16, float16 or float32.
      v: ``[B, T, HV, V]``, HV a multiple of H; value head hv reads q/k head ``hv // (HV // H)``.
      g: ``[B, T, HV, K]``, the log decay (<= 0), or the raw input of ``gate``. Any finite gate gives finite results.
      beta: ``[B, T, HV]`` in [0, 1], or its logits with ``beta_sigmoid``.
      gate, qk_l2norm, beta_sigmoid, allow_neg_eigval, scale: as in :func:`kda_jax.decode`.
      initial_state: ``[B, HV, V, K]`` float32 or bfloat16, ``[N, HV, V, K]`` with cu_seqlens; None is zero.
      cu_seqlens: ``[N + 1]`` int32, for B = 1: sequence n holds tokens ``cu_seqlens[n]`` to ``cu_seqlens[n + 1]``. It
        starts at 0 and does not decrease; zero-length sequences are allowed and keep their initial state. Tokens from
        ``cu_seqlens[N]`` on are padding: their outputs and gradients are zero. Traced: no recompilation for other lengths.
      chunk_size: tokens of a chunk, a power of two from 16 to 128. Fewer tokens mean more states kept for the backward
        pass, more mean more arithmetic within the chunk.
      save_intermediates: keep for the backward pass what the GPU kernels computed of each chunk by itself,
        ``6 K + 6 chunk_size`` bytes a token and value head, instead of computing it again. "xla" has no use for them.
      implementation: None for the best one that serves the call, or a name ("xla", ...) to force it.

    Returns:
      ``o`` ``[B, T, HV, V]`` in the dtype of v, and the final states ``[B, HV, V, K]`` (``[N, HV, V, K]`` with cu_seqlens)
      in the dtype of initial_state, float32 without one. They are what decode takes as its pool.

    Raises:
      ValueError, TypeError: a shape, dtype or value is wrong; the text says which and what it must be.
      NotImplementedError: the forced implementation does not serve the call, or it is differentiated twice.

    Source: Kimi Linear (2025); the chunkwise form of the gated delta rule (Yang et al., 2024).
    """
    check = _inputs.Checker("kda.chunk")
    tokens, spec = _inputs.tokens(
        check,
        CHUNK_AXES,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        operation=FORWARD.name,
        gate=gate,
        qk_l2norm=qk_l2norm,
        beta_sigmoid=beta_sigmoid,
        allow_neg_eigval=allow_neg_eigval,
        scale=scale,
        implementation=implementation,
    )
    if not isinstance(chunk_size, int) or chunk_size not in (16, 32, 64, 128):
        raise ValueError(f"kda.chunk: chunk_size is {chunk_size!r}; it must be 16, 32, 64 or 128")
    if cu_seqlens is not None:
        cu_seqlens = _check_cu_seqlens(check, cu_seqlens)
    if initial_state is not None:
        check.sizes["S"] = check.sizes["B"] if cu_seqlens is None else cu_seqlens.shape[1] - 1
        check.set_by["S"] = "q" if cu_seqlens is None else "cu_seqlens"
        initial_state = check.array("initial_state", initial_state, CHUNK_AXES["initial_state"], _inputs.STATE_DTYPES)
    # Outside the custom_vjp: a shared operand's gradient is summed over the shards by the transpose of this cast.
    operands = vary_together(ChunkOperands(**tokens, initial_state=initial_state, cu_seqlens=cu_seqlens))
    return _chunk(operands, ChunkSpec(**vars(spec), chunk_size=chunk_size, save_intermediates=bool(save_intermediates)))


def _check_cu_seqlens(check: _inputs.Checker, cu_seqlens: Any) -> jax.Array:
    batch, tokens = check.sizes["B"], check.sizes["T"]
    if batch != 1:
        raise ValueError(f"{check.call}: q has batch size B={batch} with cu_seqlens given; packed sequences need B = 1")
    cu_seqlens = check.indices("cu_seqlens", cu_seqlens, "N+1")
    known = _inputs.concrete(cu_seqlens)
    if len(cu_seqlens) < 2 or (
        known is not None and (known[0] != 0 or (known[1:] < known[:-1]).any() or known[-1] > tokens)
    ):
        raise ValueError(
            f"{check.call}: cu_seqlens is {known if known is None else known.tolist()}; it must have two offsets or more, "
            f"start at 0, not decrease, and end at most at T={tokens}"
        )
    return cu_seqlens[None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _chunk(args: ChunkOperands, spec: ChunkSpec) -> tuple[jax.Array, jax.Array]:
    o, state = FORWARD.bind(args, dataclasses.replace(spec, save_intermediates=False))
    return o, state


def _chunk_fwd(args: ChunkOperands, spec: ChunkSpec):
    half = all(jnp.finfo(x.dtype).bits == 16 for x in args[:5])
    states_dtype = "bfloat16" if half else arithmetic_dtype(args).name
    o, state, *kept = FORWARD.bind(args, dataclasses.replace(spec, states_dtype=states_dtype))
    return (o, state), (args, kept)


def _chunk_bwd(spec: ChunkSpec, residuals: tuple[ChunkOperands, list[jax.Array]], cotangents: tuple[jax.Array, jax.Array]):
    args, (states, *prepared) = residuals
    do, dstate = cotangents
    grads = iter(BACKWARD.bind(ChunkBackwardOperands(*args, states, do, dstate, *prepared), spec))
    named: dict[str, Any] = {name: next(grads) for name in ("q", "k", "v", "g", "beta")}
    for name in ("A_log", "dt_bias"):
        if getattr(args, name) is not None:
            named[name] = jnp.sum(next(grads), axis=0)
    if args.initial_state is not None:
        named["initial_state"] = next(grads)
    absent: dict[str, Any] = dict.fromkeys(ChunkOperands._fields)
    return (ChunkOperands(**absent | named),)


_chunk.defvjp(_chunk_fwd, _chunk_bwd)
