"""Rows and heads spread over 8 devices: right results, in place, with no collective but the sum of the gate's gradients."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import kda_jax as kda
from kda_jax.testing import cases

from . import common
from .common import arrays, assert_close

pytestmark = pytest.mark.usefixtures("quick_compilation")

CASE = cases.Case("sharded", batch=8, tokens=4, heads=8, value_heads=16, k_dim=8, v_dim=8)
COLLECTIVES = r"\s(all-gather|all-to-all|collective-permute|reduce-scatter|all-reduce)(?:-start)?\("
# Where the heads stand in an array, by its name. Rows (or slots) come first in all but the gate's parameters.
HEADS = {"q": -2, "k": -2, "v": -2, "g": -2, "u": -2, "o": -2, "beta": -1, "state": -3, "initial_state": -3, "states": -3}
PARAMETERS = {"A_log": -1, "dt_bias": -2}


def chunk(**drawn):
    return dict(zip(("o", "state"), common.chunk(**drawn), strict=True))


def decode(**drawn):
    return dict(zip(("o", "state"), common.decode(**drawn), strict=True))


def decode_mtp(**drawn):
    return dict(zip(("o", "states"), common.decode_mtp(**drawn), strict=True))


def verify(**drawn):
    return dict(zip(("o", "update"), common.verify(**drawn), strict=True))


def flush(**drawn):
    return {"state": kda.flush(**drawn)}


def _draw(run):
    if run in (chunk, common.chunk_grad):
        return arrays(dataclasses.replace(CASE, tokens=20), "chunk")
    drawn = arrays(CASE, "decode" if run is decode else "draft")
    if run is flush:
        update = kda.Update(drawn["v"], drawn["k"], -jnp.abs(drawn["g"]))
        return {"state": drawn["state"], "update": update, "num_accepted": jnp.arange(8) % 5}
    return drawn


def _specs(tree, rows="rows"):
    """The placement of every array, by its name in a dict or dataclass."""

    def place(path, x):
        name = getattr(path[-1], "key", getattr(path[-1], "name", None))
        places = [None if name in PARAMETERS or axis else rows for axis in range(x.ndim)]
        if name in HEADS | PARAMETERS:
            places[(HEADS | PARAMETERS)[name]] = "heads"
        return PartitionSpec(*places)

    return jax.tree.map_with_path(place, tree)


def _mesh(rows: int, heads: int, kind: AxisType) -> Mesh:
    return jax.make_mesh((rows, heads), ("rows", "heads"), axis_types=(kind, kind), devices=jax.devices("cpu")[:8])


def _shardings(tree, mesh: Mesh, rows="rows"):
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _specs(tree, rows))


def _check(run, drawn, mesh: Mesh, *, rows="rows", allowed=()):
    """Runs on arrays placed over ``mesh`` and compares values, placement and collectives."""
    reference = run(**drawn)
    with jax.set_mesh(mesh):
        placed = jax.device_put(drawn, _shardings(drawn, mesh, rows))
        compiled = jax.jit(lambda drawn: run(**drawn)).lower(placed).compile()
        out = compiled(placed)
    assert_close(out, reference, 1e-6)
    for x, sharding in zip(jax.tree.leaves(out), jax.tree.leaves(_shardings(out, mesh, rows)), strict=True):
        assert x.sharding.is_equivalent_to(sharding, x.ndim), (x.sharding.spec, sharding.spec)
    assert set(re.findall(COLLECTIVES, compiled.as_text())) <= set(allowed)


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


@KINDS
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)], ids=["rows", "heads", "rows-heads"])
@pytest.mark.parametrize("run", [chunk, decode, decode_mtp, verify, flush])
def test_rows_and_heads(run, shape, kind):
    _check(run, _draw(run), _mesh(*shape, kind))


@KINDS
@pytest.mark.parametrize("shape", [(8, 1), (1, 8), (2, 4)], ids=["rows", "heads", "rows-heads"])
def test_gradients(shape, kind):
    """Only the gradients of A_log and dt_bias are sums over rows."""
    allowed = ("all-reduce",) if shape[0] > 1 else ()
    _check(common.chunk_grad, _draw(common.chunk_grad), _mesh(*shape, kind), allowed=allowed)


@KINDS
@pytest.mark.parametrize("run", [decode, decode_mtp, verify, flush])
def test_indices_with_heads_sharded(run, kind):
    drawn = _draw(run) | {"state_indices": jnp.asarray([3, -1, 0, 7, 5, 1, 2, 6])}
    _check(run, drawn, _mesh(1, 8, kind), rows=None)


@KINDS
@pytest.mark.parametrize("run", [chunk, common.chunk_grad, decode, decode_mtp, verify, flush])
def test_shard_map(run, kind):
    """Every device runs the operation on its rows and heads; what varies over which axis is tracked through it."""
    drawn, mesh = _draw(run), _mesh(2, 4, kind)
    reference = run(**drawn)
    placed = jax.device_put(drawn, _shardings(drawn, mesh))
    specs = {"in_specs": (_specs(drawn),), "out_specs": _specs(reference)}
    mapped = jax.shard_map(lambda drawn: run(**drawn), mesh=mesh, **specs)
    assert_close(jax.jit(mapped)(placed), reference, 1e-6)
