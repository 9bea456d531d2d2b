"""KDA in NumPy float64, one token after the other, with its derivative written out by hand.

Shares no code with the library and needs NumPy alone. The functions take the same arguments as the operations of the
library (anything NumPy can read, gates by their attributes) and return float64 arrays; they follow the formulas of
docs/mathematics.md as literally as they can, and are slow.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np


class Activated(NamedTuple):
    """What the recurrence uses: q and k [..., HV, K] already repeated over their group, g the log decay."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    g: np.ndarray
    beta: np.ndarray


def chunk(q, k, v, g, beta, *, initial_state=None, cu_seqlens=None, **options) -> tuple[np.ndarray, np.ndarray]:
    """``kda.chunk``: o [B, T, HV, V] and the final states; options as there (chunk_size has no meaning here)."""
    q, k, v, g, beta = map(_f64, (q, k, v, g, beta))
    x, scale = _activate(q, k, v, g, beta, **options)
    o = np.zeros(v.shape)
    finals = []
    for state, (row, begin, end) in zip(_starts(x, initial_state, cu_seqlens), _spans(x, cu_seqlens), strict=True):
        for t in range(begin, end):
            state = _step(state, Activated(*(a[row, t] for a in x)))
            o[row, t] = scale * np.einsum("hvk,hk->hv", state, x.q[row, t])
        finals.append(state)
    return o, np.stack(finals)


def chunk_grad(
    q, k, v, g, beta, do, dstate, *, gate=None, initial_state=None, cu_seqlens=None, **options
) -> dict[str, np.ndarray]:
    """The gradients of ``sum(o * do) + sum(final_state * dstate)`` by name: q, k, v, g, beta, initial_state and, with a
    gate, A_log and dt_bias."""
    q, k, v, g, beta, do, dstate = map(_f64, (q, k, v, g, beta, do, dstate))
    x, scale = _activate(q, k, v, g, beta, gate=gate, **options)
    dx = Activated(*(np.zeros(a.shape) for a in x))
    dstarts = []
    starts = _starts(x, initial_state, cu_seqlens)
    for state, ds, (row, begin, end) in zip(starts, dstate, _spans(x, cu_seqlens), strict=True):
        before = []
        for t in range(begin, end):
            before.append(state)
            state = _step(state, Activated(*(a[row, t] for a in x)))
        for t in reversed(range(begin, end)):
            previous = before.pop()
            qt, kt, vt, gt, bt = (a[row, t] for a in x)
            a = np.exp(gt)
            decayed = previous * a[:, None, :]
            residual = vt - np.einsum("hvk,hk->hv", decayed, kt)
            u = bt[:, None] * residual
            after = decayed + u[:, :, None] * kt[:, None, :]
            dx.q[row, t] = scale * np.einsum("hvk,hv->hk", after, do[row, t])
            ds = ds + scale * do[row, t][:, :, None] * qt[:, None, :]
            du = np.einsum("hvk,hk->hv", ds, kt)
            dresidual = bt[:, None] * du
            dx.v[row, t] = dresidual
            dx.beta[row, t] = np.sum(du * residual, axis=-1)
            dx.k[row, t] = np.einsum("hvk,hv->hk", ds, u) - np.einsum("hvk,hv->hk", decayed, dresidual)
            ddecayed = ds - dresidual[:, :, None] * kt[:, None, :]
            dx.g[row, t] = a * np.sum(ddecayed * previous, axis=1)
            ds = ddecayed * a[:, None, :]
        dstarts.append(ds)
    grads = _activate_grad(q, k, g, beta, dx, gate=gate, **options)
    return grads | {"v": dx.v, "initial_state": np.stack(dstarts)}


def decode(q, k, v, g, beta, state, *, state_indices=None, **options) -> tuple[np.ndarray, np.ndarray]:
    """``kda.decode``: o [N, HV, V] and the pool."""
    q, k, v, g, beta = (_f64(x)[:, None] for x in (q, k, v, g, beta))
    o, states = decode_mtp(q, k, v, g, beta, state, state_indices=state_indices, **options)
    pool = _f64(state).copy()
    for n, slot in enumerate(_slots(state_indices, pool)):
        if 0 <= slot < len(pool):
            pool[slot] = states[n, 0]
    return o[:, 0], pool


def decode_mtp(
    q, k, v, g, beta, state, *, state_indices=None, num_accepted=None, **options
) -> tuple[np.ndarray, np.ndarray]:
    """``kda.decode_mtp``: o [N, T, HV, V] and the states [N, T, HV, V, K], or the pool in the paged form."""
    q, k, v, g, beta, pool = map(_f64, (q, k, v, g, beta, state))
    x, scale = _activate(q, k, v, g, beta, **options)
    rows, tokens = v.shape[:2]
    slots = _slots(state_indices, pool)
    if num_accepted is not None:
        accepted = np.broadcast_to(num_accepted, rows)
        slots = [slots[n][m - 1] if 1 <= m <= tokens else -1 for n, m in enumerate(accepted)]
    o, states = np.zeros(v.shape), np.zeros((*v.shape[:2], *pool.shape[1:]))
    for n, slot in enumerate(slots):
        if not 0 <= slot < len(pool):
            continue
        s = pool[slot]
        for t in range(tokens):
            s = _step(s, Activated(*(a[n, t] for a in x)))
            o[n, t] = scale * np.einsum("hvk,hk->hv", s, x.q[n, t])
            states[n, t] = s
    if num_accepted is None:
        return o, states
    written = pool.copy()
    for n, slot in enumerate(slots):
        for t in range(tokens):
            target = np.asarray(state_indices)[n, t]
            if 0 <= slot < len(pool) and 0 <= target < len(pool):
                written[target] = states[n, t]
    return o, written


def verify(q, k, v, g, beta, state, *, state_indices=None, **options) -> np.ndarray:
    """The outputs of ``kda.verify`` [N, T, HV, V]."""
    return decode_mtp(q, k, v, g, beta, state, state_indices=state_indices, **options)[0]


def verify_flush(q, k, v, g, beta, state, num_accepted, *, state_indices=None, **options) -> np.ndarray:
    """The pool after ``kda.verify`` and ``kda.flush``: the state after the accepted tokens of each row."""
    _, states = decode_mtp(q, k, v, g, beta, state, state_indices=state_indices, **options)
    pool = _f64(state).copy()
    accepted = np.broadcast_to(num_accepted, len(states))
    for n, slot in enumerate(_slots(state_indices, pool)):
        if 0 <= slot < len(pool) and accepted[n] > 0:
            pool[slot] = states[n, accepted[n] - 1]
    return pool


def error(out: Any, reference: Any) -> float:
    """``||out - reference|| / ||reference||`` in float64; the plain norm of ``out`` where the reference is zero."""
    out, reference = _f64(out), _f64(reference)
    norm = np.linalg.norm(reference)
    return float(np.linalg.norm(out - reference) / (norm if norm > 0 else 1.0))


def _f64(x: Any) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def _step(state: np.ndarray, token: Activated) -> np.ndarray:
    state = state * np.exp(token.g)[:, None, :]
    u = token.beta[:, None] * (token.v - np.einsum("hvk,hk->hv", state, token.k))
    return state + u[:, :, None] * token.k[:, None, :]


def _spans(x: Activated, cu_seqlens: Any) -> list[tuple[int, int, int]]:
    """Row, first token and end of every sequence."""
    if cu_seqlens is None:
        return [(row, 0, x.v.shape[1]) for row in range(x.v.shape[0])]
    offsets = [int(offset) for offset in np.asarray(cu_seqlens)]
    return [(0, begin, end) for begin, end in itertools.pairwise(offsets)]


def _starts(x: Activated, initial_state: Any, cu_seqlens: Any) -> np.ndarray:
    if initial_state is not None:
        return _f64(initial_state)
    return np.zeros((len(_spans(x, cu_seqlens)), x.v.shape[2], x.v.shape[3], x.k.shape[3]))


def _slots(state_indices: Any, pool: np.ndarray) -> Any:
    return np.arange(len(pool)) if state_indices is None else np.asarray(state_indices)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))


def _gate(g: np.ndarray, gate: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The log decay, its derivative in the raw input, and its derivative in A_log."""
    if gate is None:
        return g, np.ones(g.shape), np.zeros(g.shape)
    rate = np.exp(_f64(gate.A_log))[:, None]
    x = g if gate.dt_bias is None else g + _f64(gate.dt_bias)
    bound = getattr(gate, "lower_bound", None)
    if bound is None:
        softplus = np.where(x > 20, x, np.logaddexp(0, x))
        slope = np.where(x > 20, 1.0, _sigmoid(x))
        return -rate * softplus, -rate * slope, -rate * softplus
    s = _sigmoid(rate * x)
    return bound * s, bound * s * (1 - s) * rate, bound * s * (1 - s) * rate * x


def _activate(
    q, k, v, g, beta, *, gate=None, qk_l2norm=False, beta_sigmoid=False, allow_neg_eigval=False, scale=None, chunk_size=None
) -> tuple[Activated, float]:
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    group = v.shape[-2] // k.shape[-2]
    if qk_l2norm:
        q, k = (x / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6) for x in (q, k))
    if beta_sigmoid:
        beta = _sigmoid(beta) * (2 if allow_neg_eigval else 1)
    return Activated(np.repeat(q, group, axis=-2), np.repeat(k, group, axis=-2), v, _gate(g, gate)[0], beta), scale


def _activate_grad(
    q, k, g, beta, dx, *, gate=None, qk_l2norm=False, beta_sigmoid=False, allow_neg_eigval=False, scale=None, chunk_size=None
) -> dict[str, np.ndarray]:
    grads = {}
    for name, x, d in (("q", q, dx.q), ("k", k, dx.k)):
        d = d.reshape(*x.shape[:-1], -1, x.shape[-1]).sum(axis=-2)  # over the value heads of the group
        if qk_l2norm:
            r = 1 / np.sqrt(np.sum(x * x, axis=-1, keepdims=True) + 1e-6)
            d = r * d - r**3 * x * np.sum(x * d, axis=-1, keepdims=True)
        grads[name] = d
    dbeta = dx.beta
    if beta_sigmoid:
        s = _sigmoid(beta)
        dbeta = dbeta * s * (1 - s) * (2 if allow_neg_eigval else 1)
    _, slope, by_A_log = _gate(g, gate)
    grads |= {"beta": dbeta, "g": dx.g * slope}
    if gate is not None:
        grads["A_log"] = np.sum(dx.g * by_A_log, axis=(0, 1, 3))
        if gate.dt_bias is not None:
            grads["dt_bias"] = np.sum(dx.g * slope, axis=(0, 1))
    return grads
