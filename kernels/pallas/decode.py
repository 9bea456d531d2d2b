"""decode: one token on one row's state, in place.

Bound: memory; a (row, value head) moves 2 * V * K * 2 bytes, against 8 operations an element. The state goes through
:func:`stream`; activations are computed where they are used, a thread holding 16 of the K columns, and outputs leave with
the tile's state.

Measured on an H200 (benchmarks/results/pallas-gpu.json; H = HV = 32, K = V = 128) against the Triton kernel, which has
no ring but many programs a multiprocessor, each with its tile in registers: 76.7 us against 80.1 at N = 128, 149.3 against
156.5 at N = 256. At N of 32 and less, where a CTA has too few tiles for its ring, it is 10 to 33 % slower, and with a
float32 pool 3 to 18 % at every N. So it serves bfloat16 pools, by name.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .stream import Place, Tile, across_columns, down_rows, layout, load, stream


class Options(NamedTuple):
    """The static options: ``l2norm_eps`` is None without the norm, ``beta_range`` None where beta is no logit."""

    gate: str | None
    lower_bound: float | None
    linear_above: float
    l2norm_eps: float | None
    beta_range: float | None
    scale: float


class Token(NamedTuple):
    """One token of one head as it lies in memory: q, k, g [K]; v [rows]; beta; the gate's parameters."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    g: jax.Array
    beta: jax.Array
    A_log: jax.Array | None
    dt_bias: jax.Array | None


def decode(args: Any, o: Any, ring: Any, outs: Any, ready: Any, *, tile: Tile, options: Options) -> None:
    """``args`` are references to decode's operands by name, absent ones None; ``outs`` is [stages, rows] for ``o``."""
    n, value_heads, _ = args.v.shape
    columns, rows = (layout(args.state.dtype).reduce(axis) for axis in (0, 1))

    def update(s: jax.Array, stage: jax.Array, token: Token) -> jax.Array:
        q, k, v, decay, beta = activate(token, options)
        s = s * down_rows(decay, s)
        u = beta * (v - jnp.sum(s * down_rows(k, s), axis=1))
        s = s + across_columns(u, s) * down_rows(k, s)
        outs[stage] = jnp.sum(s * down_rows(q, s), axis=1).astype(outs.dtype)
        return s

    def send(where: Place, stage: jax.Array, live: jax.Array) -> None:
        there = o.at[where.n, where.hv, pl.ds(where.v, tile.rows)]

        @pl.when(jnp.logical_not(live))
        def _():
            outs[stage] = plgpu.layout_cast(jnp.zeros((tile.rows,), outs.dtype), rows)
            plgpu.commit_smem()

        plgpu.copy_smem_to_gmem(outs.at[stage], there, commit_group=False)

    stream(
        args.state,
        args.state_indices,
        ring,
        ready,
        tile,
        n * value_heads,
        prefetch=lambda where: fetch_token(args, where, tile.rows, columns, rows),
        update=update,
        send=send,
    )


def fetch_token(args: Any, where: Place, tile_rows: int, columns: Any, rows: Any) -> Token:
    n, hv, v = where
    group = args.v.shape[-2] // args.q.shape[-2]
    h = lax.div(hv, jnp.int32(group))
    A_log = dt_bias = None
    if args.A_log is not None:
        A_log = args.A_log[hv] if len(args.A_log.shape) == 1 else args.A_log[n, hv]
    if args.dt_bias is not None:
        dt_bias = load(args.dt_bias.at[hv] if len(args.dt_bias.shape) == 2 else args.dt_bias.at[n, hv], columns)
    return Token(
        q=load(args.q.at[n, h], columns),
        k=load(args.k.at[n, h], columns),
        v=load(args.v.at[n, hv, pl.ds(v, tile_rows)], rows),
        g=load(args.g.at[n, hv], columns),
        beta=args.beta[n, hv],
        A_log=A_log,
        dt_bias=dt_bias,
    )


def activate(token: Token, options: Options) -> tuple[jax.Array, ...]:
    """q (scaled), k, v, the decay exp(g) and beta, in float32."""
    q, k, v, g, beta, A_log, dt_bias = (x if x is None else x.astype(jnp.float32) for x in token)
    if options.l2norm_eps is not None:
        q, k = (x * lax.rsqrt(jnp.sum(x * x) + options.l2norm_eps) for x in (q, k))
    if options.beta_range is not None:
        beta = options.beta_range * sigmoid(beta)
    return q * options.scale, k, v, jnp.exp(log_decay(g, A_log, dt_bias, options)), beta


def log_decay(x: jax.Array, A_log: jax.Array | None, dt_bias: jax.Array | None, options: Options) -> jax.Array:
    if options.gate is None:
        return x
    rate = jnp.exp(A_log)
    if dt_bias is not None:
        x = x + dt_bias
    if options.gate == "softplus":
        curved = log1p(jnp.exp(jnp.minimum(x, options.linear_above)))
        return -rate * jnp.where(x > options.linear_above, x, curved)
    return options.lower_bound * sigmoid(rate * x)


def sigmoid(x: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-x))


def log1p(x: jax.Array) -> jax.Array:
    """log(1 + x) for x >= 0, exact in the last bits where 1 + x rounds (Higham, Accuracy and Stability, 1.14.1)."""
    u = 1 + x
    return jnp.where(u == 1, x, jnp.log(u) * (x / jnp.where(u == 1, 1.0, u - 1)))
