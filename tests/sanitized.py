"""A small case of each GPU kernel, for compute-sanitizer to watch: padded, out-of-range and shuffled slots, all gates, and
packed sequences, some of no token, with a tail behind them. ``long``: of CuTe's verify of more than 8 tokens alone."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from common import cute_is_missing

import kda_jax as kda
from kda_jax.testing import cases

IMPLEMENTATIONS = ("triton",) if cute_is_missing() else ("triton", "cute")
SLOTS = np.asarray([6, -1, 2, 1 << 30, 0], np.int32)


def run(implementation: str, gate: str | None, state_dtype: str, dim: int) -> None:
    case = cases.Case(
        "sanitized", batch=5, tokens=4, heads=1, value_heads=2, k_dim=dim, v_dim=dim, gate=gate, pool_size=7,
        dtype="bfloat16", state_dtype=state_dtype,
    )  # fmt: skip
    drawn = cases.draw(case, layout="draft")
    tokens, state = tuple(map(jnp.asarray, drawn.arrays)), jnp.asarray(drawn.state)
    options = drawn.options | {"implementation": implementation}
    slots = {"state_indices": jnp.asarray(SLOTS)}
    first = [x[:, 0] for x in tokens]
    outputs = [kda.decode(*first, state, **options, **slots), kda.decode_mtp(*tokens, state, **options, **slots)]
    paged = np.random.default_rng(0).permutation(7)[:4].reshape(1, 4)
    paged = jnp.asarray(np.concatenate([paged, [[-1, 1 << 30, -5, 7]]]), jnp.int32)
    outputs.append(
        kda.decode_mtp(*(x[:2] for x in tokens), state, **options, state_indices=paged, num_accepted=jnp.asarray([3, 1]))
    )
    for count in (1, 4):
        o, update = kda.verify(*(x[:, :count] for x in tokens), state, **options, **slots)
        flushed = kda.flush(state, update, jnp.asarray([1, 0, 1, 1, 0]), **slots, implementation=implementation)
        outputs.append((o, flushed))
    if (implementation, state_dtype) == ("triton", "bfloat16"):
        outputs.append(kda.decode(*first, state, **options | {"implementation": "pallas"}, **slots))
    assert_finite(outputs)


def crowd(gate: str | None, state_dtype: str, count: int, dim: int) -> None:
    """verify of more heads than there are programs: what a program does with one head while the next is under way. With
    K = 128 without the update, for which other warps may do it; else flush as well, which has larger programs here."""
    case = cases.Case(
        "crowd", batch=40, tokens=count, heads=16, value_heads=32, k_dim=dim, v_dim=dim, gate=gate, pool_size=40,
        dtype="bfloat16", state_dtype=state_dtype,
    )  # fmt: skip
    drawn = cases.draw(case, layout="draft")
    slots = np.where(np.arange(40) % 7 == 3, -1, np.arange(40)[::-1]).astype(np.int32)
    tokens, state = tuple(map(jnp.asarray, drawn.arrays)), jnp.asarray(drawn.state)
    where = {"implementation": "cute", "state_indices": jnp.asarray(slots)}
    o, update = kda.verify(*tokens, state, **drawn.options, **where, with_update=dim < 128)
    assert_finite(o if update is None else (o, kda.flush(state, update, count, **where)))


def train(gate: str | None, dtype: str, k_dim: int, v_dim: int, offsets: tuple[int, ...] | None) -> None:
    """Both passes of chunk, with and without what the forward pass may save."""
    case = cases.Case(
        "sanitized", batch=1, tokens=100, heads=1, value_heads=2, k_dim=k_dim, v_dim=v_dim, gate=gate, dtype=dtype,
        qk_l2norm=gate is not None, cu_seqlens=offsets,
    )  # fmt: skip
    drawn = cases.draw(case, layout="chunk")
    tokens, state = tuple(map(jnp.asarray, drawn.arrays)), jnp.asarray(drawn.state)
    packed = {} if offsets is None else {"cu_seqlens": jnp.asarray(offsets, jnp.int32)}
    for saved in (False, True):
        options = drawn.options | packed | {"implementation": "triton", "save_intermediates": saved}

        def run(tokens, state, options=options):
            return kda.chunk(*tokens, initial_state=state, **options)

        out, pull = jax.vjp(run, tokens, state)
        assert_finite((out, pull(out)))
    assert_finite(kda.chunk(*tokens, **options))  # keeps no states, and starts from none


def assert_finite(outputs) -> None:
    assert all(bool(jnp.isfinite(x.astype(jnp.float32)).all()) for x in jax.tree.leaves(outputs))


LONG = sys.argv[1:] == ["long"]
for gate, state_dtype, dim in (("softplus", "float32", 128), ("lower_bound", "bfloat16", 64), (None, "float32", 64)):
    for implementation in () if LONG else IMPLEMENTATIONS:
        run(implementation, gate, state_dtype, dim)
if "cute" in IMPLEMENTATIONS:
    for gate, state_dtype, count, dim in (
        [("lower_bound", "bfloat16", 9, 64), (None, "float32", 9, 64)]
        if LONG
        else [("lower_bound", "bfloat16", 3, 64), (None, "float32", 3, 64), ("lower_bound", "bfloat16", 5, 128)]
    ):
        crowd(gate, state_dtype, count, dim)
for gate, dtype, k_dim, v_dim, offsets in (
    ("softplus", "bfloat16", 128, 64, None),
    ("lower_bound", "bfloat16", 64, 128, (0, 0, 33, 97, 97)),
    (None, "float32", 64, 64, (0, 65)),
):
    if not LONG:
        train(gate, dtype, k_dim, v_dim, offsets)
print("all ran")
