"""Runs Triton kernels in Triton's interpreter, on NumPy arrays: what stands in for ``triton.launch.launch`` in tests.

Whether ``@triton.jit`` makes an interpreted function or a compiled one is decided when a kernel's module is imported, by
TRITON_INTERPRET in the environment; conftest.py sets it where there is no GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter

GUARD = 64  # elements before and behind every array, which no kernel may write
POISON = 0xFF  # in every floating dtype a NaN
NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16", "int32": "i32", "int8": "i8"}


class Memory:
    """A NumPy array as the interpreter takes a torch tensor: by address, in place, with guards around it."""

    def __init__(self, values: np.ndarray | None, shape: tuple[int, ...], dtype: Any):
        dtype = np.dtype(dtype)
        count = int(np.prod(shape))
        self._bytes = np.full((count + 2 * GUARD) * dtype.itemsize, POISON, np.uint8)
        inside = self._bytes[GUARD * dtype.itemsize : (GUARD + count) * dtype.itemsize]
        self.values = inside.view(dtype).reshape(shape)
        if values is not None:
            self.values[...] = values
        self.dtype = NAMES[dtype.name]

    def check_guards(self) -> None:
        width = GUARD * self.values.dtype.itemsize
        assert (self._bytes[:width] == POISON).all()
        assert (self._bytes[-width:] == POISON).all()

    # What the interpreter asks of a tensor.

    def data_ptr(self) -> int:
        return self.values.ctypes.data

    def untyped_storage(self) -> Memory:
        return self

    def cpu(self) -> Memory:
        return self

    def copy_(self, other: Memory) -> None:
        assert other is self

    def new_empty(self, *args: Any, **kwargs: Any) -> Memory:
        return self

    def set_(self, *args: Any) -> None:
        pass

    def storage_offset(self) -> int:
        return 0

    def element_size(self) -> int:
        return self.values.itemsize

    def size(self) -> tuple[int, ...]:
        return self.values.shape

    shape = property(size)
    device = "cpu"

    def stride(self) -> tuple[int, ...]:
        return tuple(stride // self.values.itemsize for stride in self.values.strides)


@contextlib.contextmanager
def installed(monkeypatch: Any, *modules: Any) -> Iterator[None]:
    """Kernels that ``modules`` (of kda_jax.triton) launch run here."""
    mend(monkeypatch)
    for module in modules:
        for replacement in (launch, launch_tiles):
            if hasattr(module, replacement.__name__):
                monkeypatch.setattr(module, replacement.__name__, replacement)
    with np.errstate(all="ignore"):  # exp(-200) is zero, on a GPU silently
        yield


def mend(monkeypatch: Any) -> None:
    """The interpreter keeps bfloat16 as uint16, cuts where a GPU rounds, and multiplies matrices of those integers.

    And the bounds of a loop that a kernel loads are arrays of one number, which NumPy 2.4 no longer takes for an index.
    """
    convert, dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot

    def rounded(data, source, target, rounding_mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return np.asarray(data, np.float32).astype(ml_dtypes.bfloat16).view(np.uint16)
        return convert(data, source, target, rounding_mode)

    def of_numbers(self, a, b, *rest):
        a, b = (
            interpreter.TensorHandle(x.data.view(ml_dtypes.bfloat16).astype(np.float32), tl.float32)
            if x.dtype.scalar == tl.bfloat16
            else x
            for x in (a, b)
        )
        return dot(self, a, b, *rest)

    patch_tensor = interpreter._patch_lang_tensor

    def with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_index)
    monkeypatch.setattr(interpreter, "_convert_float", rounded)
    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", of_numbers)


LEAST_ROWS = 32  # of a tile here: the interpreter's time is programs, and two a head show all there is to see


def launch_tiles(kernel, inputs, outputs, *, heads, tile, **options):
    rows = max(tile.rows, LEAST_ROWS)
    return launch(kernel, inputs, outputs, programs=heads * (options["V"] // rows), warps=tile.warps, BV=rows, **options)


def launch(kernel, inputs, outputs, *, programs, warps, registers=None, in_place=None, fuse=False, **constants):
    """As ``kda_jax.triton.launch.launch``, eagerly; an output starts as poison, unless it is an input's memory."""
    owned: dict[int, Memory] = {}
    arguments = []
    for x in inputs:
        if isinstance(x, int):
            arguments.append(x)
        else:
            if id(x) not in owned:  # an array that stands for absent ones is one memory
                owned[id(x)] = Memory(np.asarray(x), x.shape, np.asarray(x).dtype)
            arguments.append(owned[id(x)])
    arrays = [x for x in arguments if isinstance(x, Memory)]
    before = [x.values.copy() for x in arrays]
    aliased = {output: arrays[at] for at, output in (in_place or {}).items()}
    results = [aliased.get(i) or Memory(None, x.shape, x.dtype) for i, x in enumerate(outputs)]
    kernel[(programs,)](*arguments, *results, **constants)
    for memory in (*arrays, *results):
        memory.check_guards()
    for memory, old in zip(arrays, before, strict=True):
        if memory not in aliased.values():
            np.testing.assert_array_equal(memory.values.view(np.uint8), old.view(np.uint8), "an input was written")
    return tuple(memory.values.copy() for memory in results)
