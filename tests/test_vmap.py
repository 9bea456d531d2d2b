"""vmap of every operation: equal to the Python loop, in one call of the primitive, whatever is mapped."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from .common import (
    CALLS,
    CHUNK,
    CHUNK_GRAD,
    CHUNK_GRAD_SAVED,
    CHUNK_PACKED,
    DECODE,
    DECODE_MTP,
    DECODE_MTP_PAGED,
    FLUSH,
    VERIFY,
    Call,
    assert_close,
    chunk,
    equations,
    over_calls,
    rows,
    stack,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

SIZE = 3
TOKENS = ("q", "k", "v", "g", "beta")
INTEGERS = ("state_indices", "num_accepted", "cu_seqlens")


def check(call: Call, unmapped: tuple[str, ...] = (), drop: tuple[str, ...] = (), axis: int = 0) -> None:
    """vmap over everything but ``unmapped``, without the arguments ``drop``, against a loop."""
    draws = [{name: x for name, x in call.draw(seed).items() if name not in drop} for seed in range(SIZE)]
    shared = {name: x for name, x in draws[0].items() if name in unmapped}
    draws = [draw | shared for draw in draws]
    arrays = {name: shared[name] if name in shared else stack([d[name] for d in draws], axis) for name in draws[0]}
    in_axes = {name: None if name in shared else axis for name in arrays}
    batched = jax.vmap(call, in_axes=(in_axes,))
    assert_close(batched(arrays), stack([call(draw) for draw in draws]), 1e-6)
    jaxpr = jax.make_jaxpr(batched)(arrays)
    assert len(list(equations(jaxpr, call.primitive))) == 1


@over_calls(*CALLS, CHUNK_GRAD_SAVED)
def test_everything_mapped(call: Call):
    check(call)


@over_calls(CHUNK, CHUNK_PACKED, CHUNK_GRAD, DECODE, DECODE_MTP, DECODE_MTP_PAGED, VERIFY)
def test_gate_unmapped(call: Call):
    """A shared gate stays one array a head at the primitive; its gradient is an instance's own all the same."""
    check(call, ("gate",))
    arrays = call.draw(0)
    mapped = {name: stack([x] * SIZE) for name, x in arrays.items() if name != "gate"}
    jaxpr = jax.make_jaxpr(jax.vmap(lambda mapped: call(mapped | {"gate": arrays["gate"]})))(mapped)
    (equation,) = equations(jaxpr, call.primitive)
    shapes = [x.aval.shape for x in equation.invars[5:7]]
    assert shapes == [arrays["gate"].A_log.shape, arrays["gate"].dt_bias.shape]


@over_calls()
def test_only_the_gate_or_counts_mapped(call: Call):
    arrays = call.draw(0)
    mapped = "num_accepted" if call is FLUSH else "gate"
    check(call, tuple(name for name in arrays if name != mapped))


@over_calls(DECODE, DECODE_MTP, DECODE_MTP_PAGED, VERIFY, FLUSH)
@pytest.mark.parametrize("unmapped", [("state",), ("state_indices",), ("state", "state_indices")], ids="-".join)
def test_pool_and_indices(call: Call, unmapped):
    """A pool that is written becomes an instance's own; one that is only read stays shared."""
    check(call, unmapped)


@over_calls(DECODE_MTP, VERIFY)
def test_a_pool_that_is_only_read_is_not_repeated(call: Call):
    arrays = call.draw(0)
    mapped = {name: stack([x] * SIZE) for name, x in arrays.items() if name != "state"}
    jaxpr = jax.make_jaxpr(jax.vmap(lambda mapped: call(mapped | {"state": arrays["state"]})))(mapped)
    (equation,) = equations(jaxpr, call.primitive)
    assert equation.invars[7].aval.shape == arrays["state"].shape


@over_calls(DECODE, DECODE_MTP, VERIFY, FLUSH)
@pytest.mark.parametrize("unmapped", [(), ("state",)], ids=["pool-mapped", "pool-unmapped"])
def test_without_indices(call: Call, unmapped):
    def draw(seed):
        arrays = call.draw(seed)
        return arrays | {"state": arrays["state"][: len(arrays["state_indices"])]}

    check(Call(call.name, call.primitive, call.run, draw), unmapped, drop=("state_indices",))


@pytest.mark.parametrize("unmapped", [("cu_seqlens",), TOKENS, ("initial_state",)], ids="-".join)
def test_packed(unmapped):
    check(CHUNK_PACKED, unmapped)


@over_calls(CHUNK, CHUNK_GRAD)
def test_without_initial_state(call: Call):
    check(call, drop=("initial_state",))


@over_calls(CHUNK, DECODE_MTP_PAGED, FLUSH)
def test_another_axis(call: Call):
    """``in_axes=1`` where every array has a second axis."""
    check(call, unmapped=("gate", *INTEGERS), axis=1)


@over_calls(CHUNK, DECODE, VERIFY)
def test_nested(call: Call):
    """vmap of vmap folds twice; the outer one maps everything, the inner one all but the gate."""
    draws = [[call.draw(10 * i + j) for j in range(2)] for i in range(2)]
    for row in draws:
        row[1]["gate"] = row[0]["gate"]
    arrays = stack([stack(row) for row in draws])
    arrays["gate"] = stack([row[0]["gate"] for row in draws])
    inner = jax.vmap(call, in_axes=({name: None if name == "gate" else 0 for name in arrays},))
    assert_close(jax.vmap(inner)(arrays), stack([stack([call(draw) for draw in row]) for row in draws]), 1e-6)
    assert len(list(equations(jax.make_jaxpr(jax.vmap(inner))(arrays), call.primitive))) == 1


def test_grad_of_vmap():
    """Through a sum over instances, a shared gate's gradient is the sum of the per-instance ones (vmap of grad)."""
    arrays = stack([CHUNK.draw(seed) for seed in range(SIZE)])
    gate = rows(arrays.pop("gate"), 0)

    def loss(gate, arrays):
        o, state = chunk(**arrays, gate=gate)
        return jnp.sum(o * o) + jnp.sum(jnp.sin(state))

    def total(gate):
        return jnp.sum(jax.vmap(functools.partial(loss, gate))(arrays))

    each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(gate, arrays)
    assert each.A_log.shape == (SIZE, *gate.A_log.shape)
    assert not np.allclose(each.A_log[0], each.A_log[1])
    assert_close(jax.grad(total)(gate), jax.tree.map(lambda x: x.sum(0), each), 1e-6)
