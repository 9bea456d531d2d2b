"""The one way an operation becomes a JAX primitive.

An :class:`Operation` is declared by the axes of its operands and outputs, written as in the documentation
(``"N T HV V"``). From that declaration follow the abstract evaluation, the batching rule, the sharding of the outputs on
an explicit mesh and the names in error messages. Lowering asks :mod:`kda_jax._dispatch` for the implementation.

Three kinds of operands, told apart by their first axis:

* rows (``B``, ``N``, ``S``): a vmapped axis folds into that first axis, so a vmapped call is one call over more rows;
* the state pool (``P``): a vmapped axis folds into the slots, and ``state_indices`` are shifted to match;
* parameters (any other, as ``HV``): shared by all rows as long as they are unmapped; once mapped they gain a leading
  axis, of the rows or of groups of rows.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from kda_jax import _dispatch, _target

ROW_AXES = ("B", "N", "S")


class Output(NamedTuple):
    """One output: its axes as in the documentation, and its dtype."""

    axes: str
    dtype: Any


class Operation:
    """A KDA operation bound as one JAX primitive.

    Args:
      name: the primitive's name, as it stands in a jaxpr.
      axes: the axes of each operand by name, in the order of the operands' NamedTuple; a repeated name is one size.
      outputs: ``(operands, sizes, spec) -> tuple of Output``; it may add sizes that no operand has.
      not_differentiable: what to tell who differentiates it.
      mapped_axis: the axis that a mapped parameter gains in front. None is the rows' own. Another name is an axis of
        groups, G of them with N / G consecutive rows each: then a mapped parameter is not repeated for every row.
    """

    def __init__(
        self,
        name: str,
        axes: Mapping[str, str],
        outputs: Callable[[Any, dict[str, int], Any], tuple[Output, ...]],
        *,
        not_differentiable: str,
        mapped_axis: str | None = None,
    ):
        self.name = name
        self.axes = {operand: tuple(names.split()) for operand, names in axes.items()}
        self._outputs = outputs
        self._not_differentiable = not_differentiable
        self._mapped_axis = mapped_axis
        p = self.primitive = Primitive(name)
        p.multiple_results = True
        p.def_impl(self._eager)
        p.def_abstract_eval(self._abstract)
        batching.primitive_batchers[p] = self._batch
        ad.primitive_jvps[p] = self._no_derivative
        for platform in _dispatch.PLATFORMS:
            mlir.register_lowering(p, functools.partial(self._lower, platform=platform), platform=platform)

    def bind(self, args: Any, spec: Any) -> tuple[jax.Array, ...]:
        """Runs the operation on a NamedTuple of arrays, absent ones None, with the hashable static ``spec``."""
        if spec.implementation is not None:
            _dispatch.check_call(spec.implementation, self._call(args, spec, None))
        args = vary_together(args)
        leaves, tree = jax.tree.flatten(args)
        run = functools.partial(self.primitive.bind, tree=tree, spec=spec)
        shardings = self._explicit_shardings(args, spec)
        if shardings is not None:
            run = jax.sharding.auto_axes(run, out_sharding=shardings)
        return tuple(run(*leaves))

    # What the declaration says of shapes.

    def _operand_axes(self, operand: str, ndim: int) -> tuple[str, ...]:
        axes = self.axes[operand]
        return axes if ndim == len(axes) else (self._mapped_axis or self._row_axis, *axes)  # a mapped parameter

    @property
    def _row_axis(self) -> str:
        return next(iter(self.axes.values()))[0]

    def _sizes(self, args: Any) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for operand, x in args._asdict().items():
            if x is not None:
                sizes.update(zip(self._operand_axes(operand, len(x.shape)), x.shape, strict=True))
        return sizes

    def _declared_outputs(self, args: Any, spec: Any) -> tuple[dict[str, int], tuple[Output, ...]]:
        sizes = self._sizes(args)
        return sizes, self._outputs(args, sizes, spec)

    def _explicit_shardings(self, args: Any, spec: Any) -> list[NamedSharding] | None:
        """The outputs' shardings where the operands live on a mesh with explicit axes, else None."""
        mesh, placed = None, dict[str, Any]()
        for operand, x in args._asdict().items():
            if x is None:
                continue
            sharding = jax.typeof(x).sharding
            if AxisType.Explicit in sharding.mesh.axis_types:
                mesh = sharding.mesh
                for axis, place in zip(self._operand_axes(operand, x.ndim), sharding.spec, strict=True):
                    if place is not None:
                        placed.setdefault(axis, place)
        if mesh is None:
            return None
        placed.setdefault("S", placed.get(self._row_axis))  # the states follow their rows when none is given
        _, outputs = self._declared_outputs(args, spec)
        return [NamedSharding(mesh, PartitionSpec(*(placed.get(a) for a in out.axes.split()))) for out in outputs]

    def _call(self, args: Any, spec: Any, platform: str | None) -> _dispatch.Call:
        """What the dispatch table needs to know of a call."""
        dtypes = {operand: jnp.dtype(x.dtype).name for operand, x in args._asdict().items() if x is not None}
        capability = _target.compute_capability() if platform == "cuda" else None
        chunk_size = getattr(spec, "chunk_size", None)
        return _dispatch.Call(self.name, self._sizes(args), dtypes, platform, capability, chunk_size)

    # The rules.

    def _eager(self, *leaves, tree, spec):
        if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # for debugging: operation by operation, in Python
            return list(self._flat("xla", None, tree, spec)(*leaves))
        return _compiled(self.primitive, tree, spec)(*leaves)

    def _abstract(self, *avals, tree, spec):
        sizes, outputs = self._declared_outputs(tree.unflatten(avals), spec)

        def aval(out: Output):
            shape = tuple(sizes[a] for a in out.axes.split())
            sharding = NamedSharding(avals[0].sharding.mesh, PartitionSpec(*(None for _ in shape)))
            # update() keeps what shard_map tracks: the manual axes over which the value varies.
            return avals[0].update(shape=shape, dtype=jnp.dtype(out.dtype), weak_type=False, sharding=sharding)

        return [aval(out) for out in outputs]

    def _lower(self, ctx, *leaves, tree, spec, platform):
        # An implementation is one device's program: it need not know what shard_map tracks, and Pallas would refuse it.
        ctx = ctx.replace(avals_in=[jax.core.ShapedArray(x.shape, x.dtype, x.weak_type) for x in ctx.avals_in])
        return mlir.lower_fun(self._flat(spec.implementation, platform, tree, spec), multiple_results=True)(ctx, *leaves)

    def _flat(self, implementation, platform, tree, spec):
        """The implementation as a function of the operands that are there."""

        def flat(*leaves):
            args = tree.unflatten(leaves)
            with jax.numpy_rank_promotion("allow"):  # a user's stricter setting is for the user's own code
                return _dispatch.serve(self._call(args, spec, platform), implementation, args, spec)

        return flat

    def _no_derivative(self, primals, tangents, *, tree, spec):
        raise NotImplementedError(self._not_differentiable)

    def _batch(self, leaves, dims, *, tree, spec):
        size = next(x.shape[d] for x, d in zip(leaves, dims, strict=True) if d is not None)
        leaves = [x if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(leaves, dims, strict=True)]
        mapped = {operand for operand, d in tree.unflatten(dims)._asdict().items() if d is not None}
        one = tree.unflatten(
            [jax.ShapeDtypeStruct(x.shape[d is not None :], x.dtype) for x, d in zip(leaves, dims, strict=True)]
        )
        folded = self._fold(tree.unflatten(leaves), one, mapped, size, spec)
        results = self.bind(folded, spec)
        return [x.reshape(size, x.shape[0] // size, *x.shape[1:]) for x in results], [0] * len(results)

    def _fold(self, args: Any, one: Any, mapped: set[str], size: int, spec: Any) -> Any:
        """The call over ``size`` times as many rows that stands for ``size`` calls shaped like ``one``."""
        rows = one[0].shape[0]
        _, outputs = self._declared_outputs(one, spec)
        # A pool that is only read can stay shared; one that is written becomes a pool of its own for every instance.
        fold_pool = "state" in mapped or any(out.axes.split()[0] == "P" for out in outputs)

        def fold(operand: str, x: jax.Array | None) -> jax.Array | None:
            first, is_mapped = self.axes[operand][0], operand in mapped
            if operand == "state_indices":
                return self._fold_slots(x, is_mapped, size, rows, one.state.shape[0] if fold_pool else None)
            if x is None or (first == "P" and not fold_pool):
                return x
            if first not in ("P", *ROW_AXES) and getattr(one, operand).ndim == len(self.axes[operand]):
                return jnp.repeat(x, rows, axis=0) if is_mapped and self._mapped_axis is None else x
            return _merge(x if is_mapped else _repeat(x, size))

        return type(args)(**{operand: fold(operand, x) for operand, x in args._asdict().items()})

    @staticmethod
    def _fold_slots(indices, is_mapped: bool, size: int, rows: int, slots: int | None) -> jax.Array | None:
        """The indices into the folded pool of ``size * slots`` slots, or into the shared pool where slots is None."""
        if indices is None:
            # Row n uses slot n; that still holds after folding rows and slots alike.
            return None if slots is not None else jnp.tile(jnp.arange(rows, dtype=jnp.int32), size)
        indices = indices if is_mapped else _repeat(indices, size)
        if slots is not None:
            offset = slots * jnp.arange(size, dtype=indices.dtype).reshape(size, *(1,) * (indices.ndim - 1))
            indices = jnp.where((indices >= 0) & (indices < slots), indices + offset, -1)
        return _merge(indices)


def vary_together(args: Any) -> Any:
    """Inside shard_map: all operands varying over the mesh axes that any of them varies over, as a primitive wants them.

    The cast's transpose is a sum over those axes, so a shared parameter's gradient is summed over the shards.
    """

    def axes(x: Any) -> frozenset[Any]:
        kind = jax.typeof(x)
        return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # the name changed in JAX 0.10

    together = frozenset[Any]().union(*map(axes, jax.tree.leaves(args)))

    def vary(x: jax.Array) -> jax.Array:
        missing = together - axes(x)
        return jax.lax.pcast(x, tuple(missing), to="varying") if missing else x

    return jax.tree.map(vary, args) if together else args


def _merge(x: jax.Array) -> jax.Array:
    return x.reshape(math.prod(x.shape[:2]), *x.shape[2:])


def _repeat(x: jax.Array, size: int) -> jax.Array:
    return jnp.broadcast_to(x, (size, *x.shape))


@functools.cache
def _compiled(primitive: Primitive, tree: Any, spec: Any) -> Callable[..., Any]:
    """Outside jit a call is its own small jit, compiled once for each set of options and shapes."""
    return jax.jit(functools.partial(primitive.bind, tree=tree, spec=spec))
