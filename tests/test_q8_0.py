"""kda.q8_0: the operations against the oracle, the transformations and the errors."""

from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kda_jax import q8_0
from kda_jax.testing import oracle_q8_0, tolerance

from .common import assert_close, assert_equal, equations, stack, xla_on_cpu
from .quantised import OUT, OUT1, draw, lanes, weight

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.parametrize("n", [1, 3, 64])
@pytest.mark.parametrize("inputs", [32, 96, 100])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_values(n, inputs, dtype):
    x, w0, w1 = draw(n, inputs, dtype=dtype), weight(OUT, inputs), weight(OUT1, inputs, seed=5)
    limit = tolerance(dtype).output
    y0, y1 = q8_0.matmul_pair(x, w0, w1)
    assert_close((y0, y1), (oracle_q8_0.matmul(x, w0), oracle_q8_0.matmul(x, w1)), limit)
    some = lanes(n, dtype=dtype)
    assert_close(q8_0.matmul_hc_expand(x, w0, **some), oracle_q8_0.matmul_hc_expand(x, w0, **some), limit)
    assert y0.dtype == y1.dtype == dtype


@pytest.mark.parametrize("count", range(1, 9))
def test_lane_counts_with_and_without_add(count):
    x, w, some = draw(3, 64), weight(inputs=64), lanes(3, count)
    if count % 2:
        some.pop("add")
    assert_close(q8_0.matmul_hc_expand(x, w, **some), oracle_q8_0.matmul_hc_expand(x, w, **some), 1e-5)


def test_dtypes_of_the_results():
    x, w = draw(2, 96, dtype="float16"), weight()
    some = lanes(2) | {"residual": lanes(2)["residual"].astype("bfloat16")}
    assert q8_0.matmul(x, w).dtype == "float16"
    assert q8_0.matmul_hc_expand(x, w, **some).dtype == "bfloat16"


def test_special_numbers():
    """Zero and tiny tokens give zero; what is not finite stays in its row and shows there."""
    x = draw(5, 96)
    x[0], x[1], x[2, 40], x[3, 50] = 0, 1e-39, np.nan, np.inf
    y = q8_0.matmul(x, weight())
    assert not y[:2].any()
    assert jnp.isnan(y[2:4]).all()
    assert_equal(y[4:], q8_0.matmul(x[4:], weight()))


OPERATIONS = ("matmul", "matmul_pair", "matmul_hc_expand")


def arguments(name, n=3, seed=0):
    """All arguments of a call by name, the weights among them."""
    x, w = draw(n, 96, seed=seed), weight(seed=seed)
    if name == "matmul_pair":
        return {"x": x, "w0": w, "w1": weight(OUT1, seed=seed + 10)}
    return {"x": x, "w": w} | (lanes(n, seed=seed) if name == "matmul_hc_expand" else {})


def run(name, arrays):
    return getattr(q8_0, name)(**arrays)


MAPPED = [
    lambda names: names,
    lambda names: {name for name in names if not name.startswith("w")},
    lambda names: {name for name in names if name.startswith("w")},
    lambda names: {"w", "w1"} & names,
]


@xla_on_cpu
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("mapped", MAPPED, ids=["all", "tokens", "weights", "one-weight"])
def test_vmap(name, mapped):
    """One call with more rows, with the bits of the loop; a mapped weight stands in it once a group, not once a row."""
    draws = [arguments(name, seed=seed) for seed in range(2)]
    mapped = mapped(set(draws[0]))
    draws[1] = {key: draws[key in mapped][key] for key in draws[0]}
    arrays = {key: stack([d[key] for d in draws]) if key in mapped else a for key, a in draws[0].items()}
    batched = jax.vmap(partial(run, name), in_axes=({key: 0 if key in mapped else None for key in arrays},))
    assert_equal(jax.jit(batched)(arrays), stack([run(name, d) for d in draws]))
    (equation,) = equations(jax.make_jaxpr(batched)(arrays), f"q8_0_{name}")
    given = jax.tree.unflatten(equation.params["tree"], [a.aval.shape for a in equation.invars])._asdict()
    assert given["x"] == (6, 96)
    for key in mapped & {"w", "w1"}:
        assert given[f"values{key[1:]}"] == (2, *draws[0][key].shape)


@xla_on_cpu
@pytest.mark.parametrize("inner", ["x", "w"])
def test_nested_vmap(inner):
    outer = "w" if inner == "x" else "x"
    x, w = stack([draw(3, 96, seed=i) for i in range(2)]), stack([weight(seed=i) for i in range(2)])
    mapped = {"x": x, "w": w}

    def both(arrays):
        return jax.vmap(lambda one: run("matmul", arrays | {inner: one}))(arrays[inner])

    batched = jax.vmap(both, in_axes=({inner: None, outer: 0},))(mapped)
    x_at, w_at = (lambda i: x[i]), (lambda i: jax.tree.map(lambda a: a[i], w))
    for i in range(2):
        for j in range(2):
            one = q8_0.matmul(x_at(j), w_at(i)) if inner == "x" else q8_0.matmul(x_at(i), w_at(j))
            assert_equal(batched[i, j], one)


@xla_on_cpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_export(name):
    arrays = arguments(name)
    program = jax.export.export(jax.jit(partial(run, name)))(arrays)
    assert_equal(jax.export.deserialize(program.serialize()).call(arrays), run(name, arrays))


@xla_on_cpu
@pytest.mark.parametrize("rows", [True, False], ids=["tokens", "outputs"])
def test_shard_map(rows):
    x, w = draw(8, 96), weight(16)
    mesh = jax.make_mesh((8,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded, whole = PartitionSpec("i"), PartitionSpec()
    specs = {"in_specs": (sharded, whole), "out_specs": sharded}
    if not rows:
        specs = {"in_specs": (whole, sharded), "out_specs": PartitionSpec(None, "i")}
    assert_equal(jax.jit(jax.shard_map(q8_0.matmul, mesh=mesh, **specs))(x, w), q8_0.matmul(x, w))


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_derivative(name):
    arrays = arguments(name)
    loss = lambda x: sum(a.sum() for a in jax.tree.leaves(run(name, arrays | {"x": x})))
    with pytest.raises(NotImplementedError, match=f"^q8_0.{name}: products with quantised weights have no derivative"):
        jax.grad(loss)(arrays["x"])


@pytest.mark.parametrize("name", OPERATIONS)
def test_implementations_by_name(name):
    arrays = arguments(name)
    assert_equal(run(name, arrays | {"implementation": "xla"}), run(name, arrays))
    with pytest.raises(ValueError, match=f"^q8_0.{name}: implementation is 'blas'; it must be None or one of 'xla'"):
        run(name, arrays | {"implementation": "blas"})
    with pytest.raises(
        NotImplementedError, match=f"^q8_0.{name}: implementation is 'pallas'.* None or one of 'triton', 'xla'"
    ):
        run(name, arrays | {"implementation": "pallas"})


def zeros(*shape, dtype="float32"):
    return np.zeros(shape, dtype)


W = weight()
NINE = lanes(3, 9)
ERRORS = [
    ("matmul", {"x": [1.0]}, TypeError, r"x is a list; it must be an array \[N, IN\]"),
    ("matmul", {"x": zeros(3, 96, dtype="int8")}, TypeError, "x has dtype int8; it must be float32, bfloat16 or float16"),
    ("matmul", {"x": zeros(96)}, ValueError, r"x has shape \(96,\), 1 axes; it must be \[N, IN\]"),
    ("matmul", {"x": zeros(0, 96)}, ValueError, "x .* has token count N=0; it must be at least 1"),
    ("matmul", {"x": zeros(3, 64)}, ValueError, "w.values .* with input size IN=96; IN must be 64, as in x"),
    ("matmul", {"w": zeros(7, 96)}, TypeError, "w is a ndarray; it must be a q8_0.Weight"),
    ("matmul", {"w": q8_0.Weight(W.scales[:, :2], W.values)}, ValueError, "w.scales .* block count BLOCKS=2; .* must be 3"),
    ("matmul", {"w": q8_0.Weight(W.scales[:2], W.values)}, ValueError, "w.scales .*OUT=2; OUT must be 7, as in w.values"),
    ("matmul", {"w": q8_0.Weight(W.scales, zeros(7, 96))}, TypeError, "w.values has dtype float32; it must be int8"),
    ("matmul", {"w": q8_0.Weight(zeros(7, 3), W.values)}, TypeError, "w.scales has dtype float32; it must be float16"),
    ("matmul_pair", {"w1": weight(3, 64)}, ValueError, "w1.values .* input size IN=64; IN must be 96, as in x"),
    ("matmul_hc_expand", {"residual": zeros(3, 4, 8)}, ValueError, "residual .* D=8; D must be 7, as in w.values"),
    ("matmul_hc_expand", {"residual": zeros(2, 4, 7)}, ValueError, "residual .* N=2; N must be 3, as in x"),
    ("matmul_hc_expand", {"post": zeros(3, 5)}, ValueError, "post .* lane count L=5; L must be 4, as in residual"),
    ("matmul_hc_expand", {"comb": zeros(3, 4, 3)}, ValueError, "comb .* lane count L=3; L must be 4, as in residual"),
    ("matmul_hc_expand", {"add": zeros(3, 6)}, ValueError, "add .* D=6; D must be 7, as in w.values"),
    ("matmul_hc_expand", NINE, ValueError, r"residual has shape \(3, 9, 7\) with lane count L=9; it must be at most 8"),
]


@pytest.mark.parametrize(("name", "changes", "error", "message"), ERRORS)
def test_errors_name_the_argument(name, changes, error, message):
    with pytest.raises(error, match=f"^q8_0.{name}: .*{message}"):
        run(name, arguments(name) | changes)
