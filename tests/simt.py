"""Runs CuTe kernels on the CPU, thread by thread, on NumPy arrays: what stands in for the DSL and a GPU in tests.

The kernels' source is imported a second time, with modules of this file's in place of the DSL's. Every thread of a program
is a greenlet that runs until it has to wait: for its warp, for all threads, for a barrier in shared memory. Memory that
was not written holds NaN, an index outside an array fails, and so does a program whose threads wait for each other for ever.

Copies happen at once: this shows what a kernel computes, not that it waits long enough. For that there is racecheck on
a GPU (tests/sanitized.py).
"""

from __future__ import annotations

import collections
import functools
import importlib
import itertools
import math
import pathlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import greenlet
import ml_dtypes
import numpy as np

WARP = 32
SOURCES = pathlib.Path(__file__).resolve().parents[1] / "kernels" / "cute"
PACKAGE = "kda_jax_simulated_cute"


# Numbers. Integers are Python's.


class Number:
    """Of one dtype; arithmetic is float32's."""

    numpy: Any
    width: int

    def __init__(self, value: Any):
        self.value = self.numpy(value.value if isinstance(value, Number) else value)

    def to(self, dtype: type[Number]) -> Number:
        return dtype(self.numpy(self.value))

    def bitcast(self, dtype: type[Number]) -> Any:
        return dtype(np.asarray(self.value).view(dtype.numpy)[()])


class BFloat16(Number):
    numpy, width = ml_dtypes.bfloat16, 16


class Float32(Number):
    numpy, width = np.float32, 32

    def __neg__(self) -> Float32:
        return Float32(-self.value)


class TFloat32(Float32):
    """A product takes 11 of its bits."""


class Uint32(Number):
    numpy, width = np.uint32, 32


class Integer(int):
    def ir_value(self) -> Integer:
        return self


class Int32(Integer):
    numpy, width = np.int32, 32


class Int64(Integer):
    numpy, width = np.int64, 64


def _operator(kind: type[Number], name: str, result: Callable[[Any], Any]) -> None:
    def apply(self: Any, other: Any) -> Any:
        return result(getattr(self.value, name)(kind.numpy(other.value if isinstance(other, Number) else other)))

    setattr(kind, name, apply)


for _name in ("add", "sub", "mul", "truediv"):
    for _prefix in ("__", "__r"):
        _operator(Float32, f"{_prefix}{_name}__", Float32)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    _operator(Float32, f"__{_name}__", bool)
for _name in ("add", "and", "or", "lshift", "rshift"):
    _operator(Uint32, f"__{_name}__", Uint32)

KINDS = {np.dtype(kind.numpy): kind for kind in (BFloat16, Float32, Uint32, Int32)}


def _function(f: Callable[[Any], Any]) -> Callable[[Number], Float32]:
    return lambda x: Float32(f(np.float32(x.value)))


def _fma(x: Number, y: Number, z: Number) -> Float32:
    return Float32(np.float64(x.value) * np.float64(y.value) + np.float64(z.value))


def _packed(f: Callable[..., Float32]) -> Callable[..., tuple[Float32, ...]]:
    return lambda *pairs: tuple(f(*numbers) for numbers in zip(*pairs, strict=True))


# Arrays in memory.


class Pointer:
    def __init__(self, memory: np.ndarray, dtype: Any, offset: int = 0):
        self.memory, self.dtype, self.offset = memory, dtype, offset

    def __add__(self, count: int) -> Pointer:
        return Pointer(self.memory, self.dtype, self.offset + count)

    @property
    def llvm_ptr(self) -> Pointer:
        return self

    @property
    def place(self) -> tuple[int, int]:
        return id(self.memory), self.offset


class Layout:
    def __init__(self, shape: Any, stride: Any = None):
        self.shape = (shape,) if isinstance(shape, int) else tuple(shape)
        if stride is None:  # the first axis is the one whose elements lie side by side
            stride = itertools.accumulate((1, *self.shape[:-1]), lambda x, y: x * y)
        self.stride = (stride,) if isinstance(stride, int) else tuple(stride)


class Tensor:
    def __init__(self, iterator: Pointer, layout: Layout):
        self.iterator, self.layout, self.shape, self.element_type = iterator, layout, layout.shape, iterator.dtype

    def __getitem__(self, index: Any) -> Any:
        offset, free = self._place(index)
        if free:
            shape, stride = zip(*((self.shape[axis], self.layout.stride[axis]) for axis in free), strict=True)
            return Tensor(Pointer(self.iterator.memory, self.element_type, offset), Layout(shape, stride))
        value = self.iterator.memory[offset]
        return int(value) if issubclass(self.element_type, int) else self.element_type(value)

    def __setitem__(self, index: Any, value: Any) -> None:
        offset, free = self._place(index)
        assert not free
        same = isinstance(value, self.element_type) or (isinstance(value, int) and self.element_type in (Int32, Int64))
        assert same, f"{type(value).__name__} into {self.element_type.__name__}"
        self.iterator.memory[offset] = value.value if isinstance(value, Number) else value

    def _place(self, index: Any) -> tuple[int, list[int]]:
        index = index if isinstance(index, tuple) else (index,)
        assert len(index) == len(self.shape), f"{len(index)} indices of {len(self.shape)} axes"
        offset, free = self.iterator.offset, []
        for axis, (i, size, stride) in enumerate(zip(index, self.shape, self.layout.stride, strict=True)):
            if i is None:
                free.append(axis)
            else:
                assert 0 <= i < size, f"index {i} of an axis of {size}"
                offset += i * stride
        assert offset < self.iterator.memory.size
        return offset, free

    def elements(self) -> np.ndarray:
        """The places of all, in the order of copies."""
        if len(self.shape) == 1:
            return np.arange(self.iterator.offset, self.iterator.offset + self.shape[0] * self.layout.stride[0],
                             self.layout.stride[0])  # fmt: skip
        grid = np.indices(self.shape[::-1]).reshape(len(self.shape), -1)[::-1]
        places = self.iterator.offset + sum(i * int(stride) for i, stride in zip(grid, self.layout.stride, strict=True))
        assert places.max() < self.iterator.memory.size
        return places

    def fill(self, value: Any) -> None:
        self.iterator.memory[self.elements()] = value


def _unwritten(count: int, dtype: Any) -> np.ndarray:
    memory = np.zeros(count, dtype.numpy)
    memory.view(np.uint8)[...] = 0xFF  # NaN, -1
    return memory


def _make_rmem_tensor(layout: Layout, dtype: Any) -> Tensor:
    layout = layout if isinstance(layout, Layout) else Layout(layout)
    last = sum((size - 1) * stride for size, stride in zip(layout.shape, layout.stride, strict=True))
    return Tensor(Pointer(_unwritten(last + 1, dtype), dtype), layout)


def _recast(pointer: Pointer, dtype: Any) -> Pointer:
    memory = pointer.memory.view(dtype.numpy)
    offset, rest = divmod(pointer.offset * memory.size, pointer.memory.size)
    assert rest == 0
    return Pointer(memory, dtype, offset)


def _copy_elements(source: Tensor, to: Tensor) -> None:
    assert source.element_type is to.element_type
    to.iterator.memory[to.elements()] = source.iterator.memory[source.elements()]


# A program's threads.


class Barrier:
    """An mbarrier: ``count`` arrivals and the announced bytes end a phase."""

    def __init__(self, count: int):
        self.count = self.pending = count
        self.bytes = self.phase = 0

    def change(self, arrivals: int = 0, more_bytes: int = 0) -> None:
        self.pending, self.bytes = self.pending - arrivals, self.bytes + more_bytes
        assert self.pending >= 0
        if self.pending == self.bytes == 0:
            self.pending, self.phase = self.count, self.phase + 1


class Program:
    """One block of threads; ``here`` is the thread that runs."""

    here: Program
    thread: int

    def __init__(self, body: Callable[[], None], index: Sequence[int], grid: Sequence[int], threads: int):
        self.index, self.grid, self.threads = index, grid, threads
        self.shared: list[np.ndarray] = []
        self.allocated = collections.Counter[int]()
        self.barriers: dict[tuple[int, int], Barrier] = {}
        self.meetings = collections.Counter[Any]()
        self.exchanged: dict[Any, dict[Any, Any]] = collections.defaultdict(dict)
        self.rounds = collections.Counter[Any]()
        hub = greenlet.getcurrent()

        def run(thread: int) -> None:
            Program.thread = thread
            with np.errstate(all="ignore"):
                body()

        waiting: dict[int, Callable[[], bool]] = {thread: lambda: True for thread in range(threads)}
        lets = {thread: greenlet.greenlet(functools.partial(run, thread), hub) for thread in range(threads)}
        while waiting:
            ready = [thread for thread, may_go in waiting.items() if may_go()]
            assert ready, f"{len(waiting)} threads wait for ever"
            for thread in ready:
                Program.here, Program.thread = self, thread
                may_go = lets[thread].switch()
                if lets[thread].dead:
                    del waiting[thread]
                else:
                    waiting[thread] = may_go

    def wait(self, may_go: Callable[[], bool]) -> None:
        thread = Program.thread
        if not may_go():
            greenlet.getcurrent().parent.switch(may_go)
            Program.thread = thread

    def arrive(self, who: Any) -> None:
        self.meetings[who] += 1

    def meet(self, who: Any, count: int) -> None:
        """All ``count`` of them are here."""
        self.arrive(who)
        until = -(-self.meetings[who] // count) * count
        self.wait(lambda: self.meetings[who] >= until)

    def exchange(self, value: Any) -> dict[Any, Any]:
        """What the lanes of the warp bring, by lane."""
        warp, lane = divmod(Program.thread, WARP)
        this = self.rounds[Program.thread]
        self.rounds[Program.thread] += 1
        brought = self.exchanged[warp, this]
        brought[lane] = value
        self.wait(lambda: len(brought) >= WARP)
        return brought

    def allocate(self, count: int, dtype: Any) -> Pointer:
        this = self.allocated[Program.thread]
        self.allocated[Program.thread] += 1
        if this == len(self.shared):
            self.shared.append(_unwritten(count, dtype))
        assert self.shared[this].size == count
        return Pointer(self.shared[this], dtype)


def _lane() -> int:
    return Program.thread % WARP


def _shuffle(x: Number, lane: int) -> Number:
    return Program.here.exchange(x)[lane]


def _sums(atom: str, a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Every lane's four; ``a``, ``b`` and ``c`` are the lanes' fragments."""
    beside = 1 if atom == "tf32" else 2  # numbers of a row side by side
    # A lane is a line and a column. What it has lies in two halves of the depth; of the left factor, and of the sums, in two
    # halves of the rows.
    left = a.reshape(8, 4, 2, 2, beside).transpose(3, 0, 2, 1, 4).reshape(16, 8 * beside)
    right = b.reshape(8, 4, 2, beside).transpose(2, 1, 3, 0).reshape(8 * beside, 8)
    sums = (left @ right).reshape(2, 8, 4, 2).transpose(1, 2, 0, 3).reshape(WARP, 4)
    return (c + sums).astype(np.float32)


def _multiply(atom: str, d: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """m16n8k16 and m16n8k8, of fragments as PTX describes them."""

    def of(x: Tensor) -> np.ndarray:
        values = x.iterator.memory[x.elements()]
        if atom == "tf32":
            values = (values.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
        return values.astype(np.float64)

    brought = Program.here.exchange((of(a), of(b), c.iterator.memory[c.elements()]))
    if "sums" not in brought:  # the first lane computes what all have a part of
        brought["sums"] = _sums(atom, *(np.stack(x) for x in zip(*(brought[lane] for lane in range(WARP)), strict=True)))
    d.iterator.memory[d.elements()] = brought["sums"][_lane()]


def _copy(atom: str, source: Tensor, to: Tensor, mbar_ptr: Pointer | None = None) -> None:
    _copy_elements(source, to)
    if atom == "load":
        assert mbar_ptr is not None
        size = to.elements().size * to.element_type.width // 8
        Program.here.barriers[mbar_ptr.place].change(more_bytes=-size)


def _copy_bulk(dst_mem: Pointer, src_mem: Pointer, mbar: Pointer, size: int, l2_cache_hint: int) -> None:
    source, to = (Tensor(x, Layout(size * 8 // x.dtype.width)) for x in (src_mem, dst_mem))
    _copy("load", source, to, mbar)


def _init(pointer: Pointer, count: int) -> None:
    Program.here.barriers[pointer.place] = Barrier(count)


def _arrive(pointer: Pointer, more_bytes: int = 0) -> None:
    Program.here.barriers[pointer.place].change(1, more_bytes)


def _await(pointer: Pointer, parity: int) -> None:
    barrier = Program.here.barriers[pointer.place]
    Program.here.wait(lambda: barrier.phase % 2 != parity)


class Shared:
    def allocate_tensor(self, dtype: Any, layout: Layout, align: int) -> Tensor:
        last = sum((size - 1) * stride for size, stride in zip(layout.shape, layout.stride, strict=True))
        return Tensor(Program.here.allocate(last + 1, dtype), layout)

    def allocate_array(self, dtype: Any, count: int) -> Pointer:
        return Program.here.allocate(count, dtype)


class _Launch:
    def __init__(self, body: Callable[[], None]):
        self.body = body

    def launch(self, *, grid: Sequence[int], block: Sequence[int], **_: Any) -> None:
        for z, y, x in itertools.product(*map(range, reversed(grid))):
            Program(self.body, (x, y, z), grid, block[0])


def _kernel(function: Callable[..., None]) -> Callable[..., _Launch]:
    return lambda *args, **choices: _Launch(functools.partial(function, *args, **choices))


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _modules() -> dict[str, Any]:
    space = types.SimpleNamespace
    arch = space(
        thread_idx=lambda: (Program.thread, 0, 0),
        lane_idx=lambda: _lane(),
        block_idx=lambda: Program.here.index,
        grid_dim=lambda: Program.here.grid,
        sync_threads=lambda: Program.here.meet("all", Program.here.threads),
        barrier=lambda barrier_id, number_of_threads: Program.here.meet(("barrier", barrier_id), number_of_threads),
        barrier_arrive=lambda barrier_id, number_of_threads: Program.here.arrive(("barrier", barrier_id)),
        sync_warp=lambda: Program.here.meet(Program.thread // WARP, WARP),
        make_warp_uniform=lambda x: x,
        shuffle_sync=_shuffle,
        shuffle_sync_bfly=lambda x, offset: _shuffle(x, _lane() ^ offset),
        exp2=_function(np.exp2),
        rcp_approx=_function(np.reciprocal),
        mul_packed_f32x2=_packed(lambda x, y: x * y),
        fma_packed_f32x2=_packed(_fma),
        fmin=lambda x, y: Float32(np.fmin(x.value, y.value)),
        mbarrier_init=_init,
        mbarrier_arrive=_arrive,
        mbarrier_arrive_and_expect_tx=_arrive,
        mbarrier_wait=_await,
    )
    for name in ("mbarrier_init_fence", "fence_proxy", "prefetch", "cp_async_commit_group", "cp_async_wait_group"):
        setattr(arch, name, _nothing)
    for name in ("cp_async_bulk_commit_group", "cp_async_bulk_wait_group"):
        setattr(arch, name, _nothing)
    cpasync = space(CopyBulkG2SOp=lambda: "load", CopyBulkS2GOp=lambda: "store", CopyG2SOp=lambda: "load by its thread")
    cpasync.LoadCacheMode = space(GLOBAL=None)
    warp = space(MmaTF32Op=lambda shape: "tf32", MmaF16BF16Op=lambda dtype, sums, shape: "bf16")
    nvgpu = space(cpasync=cpasync, warp=warp, LoadCacheMode=cpasync.LoadCacheMode)
    cute = space(
        arch=arch,
        nvgpu=nvgpu,
        Tensor=Tensor,
        jit=lambda function: function,
        kernel=_kernel,
        make_layout=Layout,
        make_tensor=Tensor,
        make_rmem_tensor=_make_rmem_tensor,
        recast_ptr=_recast,
        FastDivmodDivisorV2=int,
        make_copy_atom=lambda atom, dtype, num_bits_per_copy: atom,
        make_mma_atom=lambda atom: atom,
        mma_atom_call=_multiply,
        copy=_copy,
        autovec_copy=_copy_elements,
        assume=lambda x, divby: x,
        size=lambda x: x if isinstance(x, int) else math.prod(x.shape),
        math=space(log=_function(np.log), rsqrt=_function(lambda x: 1 / np.sqrt(x)), fma=_fma),
    )
    cutlass = space(
        cute=cute,
        utils=space(SmemAllocator=Shared),
        Constexpr=None,
        range=lambda *of, unroll=1: range(*of),
        range_constexpr=range,
        const_expr=lambda x: x,
        min=min,
        max=max,
        select_=lambda condition, x, y: x if condition else y,
        **{kind.__name__: kind for kind in (BFloat16, Float32, TFloat32, Uint32, Int32, Int64)},
    )
    driver = space(CUstream=None)
    llvm = space(PointerType=space(get=_nothing), addrspacecast=lambda space, pointer: pointer)
    nvvm = space(cp_async_bulk_shared_cluster_global=_copy_bulk)
    return {
        "cutlass": cutlass,
        "cutlass.cute": cute,
        "cutlass.cute.nvgpu": nvgpu,
        "cutlass._mlir.dialects": space(llvm=llvm, nvvm=nvvm),
        "cuda": space(bindings=space(driver=driver)),
        "cuda.bindings": space(driver=driver),
        "cuda.bindings.driver": driver,
    }


@functools.cache
def module(name: str) -> Any:
    """A kernel's module, over this file's DSL."""
    modules = _modules()
    kept = {key: sys.modules.get(key) for key in modules}
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(SOURCES)]
    sys.modules.setdefault(PACKAGE, package)
    sys.modules.update(modules)
    try:
        return importlib.import_module(f"{PACKAGE}.{name}")
    finally:
        for key, one in kept.items():
            if one is None:
                del sys.modules[key]
            else:
                sys.modules[key] = one


def call(
    name: str,
    choices: Mapping[str, Any],
    operands: Sequence[Any],
    outputs: Sequence[Any],
    in_place: Mapping[int, int] | None = None,
    together: Sequence[Mapping[str, Any]] = (),
) -> tuple[np.ndarray, ...]:
    """Stands in for ``kda_jax.cute.call.call``."""
    source = module(name)
    declared, _, aliases = source.operands(**choices)
    assert aliases == (in_place or {})
    inputs = [np.array(x) for x in operands]
    for x, (axes, dtype) in zip(inputs, declared, strict=True):
        assert (x.dtype.name, x.ndim) == (dtype, len(axes.split())), axes
    results = [_unwritten(math.prod(x.shape), KINDS[np.dtype(x.dtype)]).reshape(x.shape) for x in outputs]
    for source_index, index in aliases.items():
        results[index] = inputs[source_index]

    def tensor(x: np.ndarray) -> Tensor:
        strides = tuple(math.prod(x.shape[i + 1 :]) for i in range(x.ndim))
        return Tensor(Pointer(x.reshape(-1), KINDS[x.dtype]), Layout(x.shape, strides))

    extra = [x for i, x in enumerate(results) if i not in aliases.values()]
    source.launch(None, *map(tensor, [*inputs, *extra]), **choices)
    return tuple(results)
