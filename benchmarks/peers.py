"""``python -m benchmarks.peers FOLDER``: SGLang's, FLA's, FlashInfer's kernels and the card's bandwidth, a file a suite.

PyTorch only, in a process of its own: FLA finds no GPU in one that imported jax_triton. The peers are looked for on
PYTHONPATH; what is missing is said and left out. Every shape is a CUDA graph of as many calls, on slots of one pool in the
same rotation, as the JAX program it is compared with (benchmarks.cells). For chunk see benchmarks.peers_chunk.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import record
from benchmarks.cells import LOWER_BOUND, Cell, accepted, cells

try:
    import torch
    import triton
    import triton.language as tl

    from benchmarks import events, peers_chunk
except ImportError as error:
    raise SystemExit(f"benchmarks.peers needs PyTorch and Triton: {error}") from error

SCRATCH_BYTES = 60e9
Replay = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=__doc__)
    parser.add_argument("output", type=pathlib.Path, nargs="?", default=record.RESULTS, help="folder for the JSON files")
    parser.add_argument("--suites", nargs="+", choices=tuple(SUITES), default=list(SUITES), help="a JSON file each")
    parser.add_argument("--cells", choices=("full", "targets", "quick"), default="full")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.peers times GPU kernels, and PyTorch sees no GPU.")
    sglang, fla = _sglang(), _fla()
    with torch.inference_mode():
        bandwidth = _bandwidth()
        agreement = _agreement(sglang, fla)
        print(bandwidth, {"sglang against fla, relative error of o": agreement})
        for suite in args.suites:
            rows = SUITES[suite](args.cells, sglang, fla)
            # FLA would use FlashKDA and TileLang where they are installed.
            projects = "flash-linear-attention", "fla-core", "flash-kda", "tilelang", "sglang", "flashinfer-python"
            stamp = record.stamp(("torch", "triton", *projects))
            if version := os.environ.get("KDA_SGLANG_VERSION"):  # its kernel may come as a file, which says no version
                stamp["versions"].setdefault("sglang", version)
            said = {"device": torch.cuda.get_device_name(), "platform": "gpu"} | stamp
            said |= {"bandwidth": bandwidth, "sglang_against_fla": agreement, "rows": rows}
            print("wrote", record.write(f"{suite}-peers-gpu", said, args.output))


def _decode_rows(size: str, sglang: Any, fla: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cell in cells("decode", size):
        if sglang:
            rows += _row(cell, "sglang", "decode", functools.partial(_sglang_decode, cell, sglang))
        if fla:
            rows += _row(cell, "fla", "decode", functools.partial(_fla_decode, cell, fla))
    return rows


def _mtp_rows(size: str, sglang: Any, fla: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for cell in cells("mtp", size) if sglang else ():
        for name, count in accepted(cell.tokens).items():
            rows += _row(cell, "sglang", name, functools.partial(_sglang_chain, cell, sglang, count))
    return rows


def _verify_rows(size: str, sglang: Any, fla: Any) -> list[dict[str, Any]]:
    """FlashInfer's kernel for tensor cores, which knows bfloat16 pools alone."""
    function = _find("flashinfer.kda_kernels.kda_decode_wy_output_only", "kda_wy_output_only")
    chosen = [cell for cell in cells("verify", size) if cell.pool == "bfloat16"] if function else []
    return [
        row
        for cell in chosen
        for row in _row(cell, "flashinfer", "verify", functools.partial(_flashinfer_verify, cell, function))
    ]


def _chunk_rows(size: str, sglang: Any, fla: Any) -> list[dict[str, Any]]:
    return peers_chunk.rows(size) if fla else []


SUITES = {"decode": _decode_rows, "mtp": _mtp_rows, "verify": _verify_rows, "chunk": _chunk_rows}


def _sglang() -> Callable[..., torch.Tensor] | None:
    """From its single file, or from an installed SGLang."""
    name = "fused_sigmoid_gating_delta_rule_update"
    return _find("sglang_recurrent", name) or _find(
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent", name
    )


def _fla() -> Callable[..., Any] | None:
    return _find("fla.ops.kda.fused_recurrent", "fused_recurrent_kda_fwd")


def _find(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        print(f"no {module}: {error}", file=sys.stderr)
        return None


def _row(cell: Cell, peer: str, variant: str, replay: Callable[[], Replay]) -> list[dict[str, Any]]:
    row = cell.row() | {"peer": peer, "variant": variant, "calls": cell.calls}
    try:
        return [row | {"us": events.microseconds(replay()) / cell.calls}]
    except Exception as error:  # a peer that refuses a shape is no reason to lose the others
        print(f"{peer} {cell}: {error}", file=sys.stderr)
        return [row | {"error": repr(error)[:300]}]


def _graph(*phases: Sequence[Callable[[], Any]]) -> Replay:
    """All calls of the first phase, then of the next, captured; each phase's first call runs before, to be compiled."""
    for calls in phases:
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for calls in phases:
            for call in calls:
                call()

    def replay(kept: Any = phases) -> None:  # a graph does not keep what its calls point to
        graph.replay()

    return replay


class _Inputs:
    """A cell's pool and inputs, as [N, T, ...]."""

    def __init__(self, cell: Cell) -> None:
        torch.manual_seed(0)
        draw = functools.partial(torch.randn, device="cuda")
        lead, keys, values = (cell.n, cell.tokens), (cell.heads, cell.dim), (cell.value_heads, cell.dim)
        shapes = (keys, keys, values, values, (cell.value_heads,))
        self.q, self.k, self.v, self.g, self.beta = (draw(*lead, *shape, dtype=torch.bfloat16) for shape in shapes)
        self.A_log, self.dt_bias = draw(cell.value_heads) / 2, draw(cell.value_heads * cell.dim)
        self.pool = draw(cell.calls * cell.n, cell.value_heads, cell.dim, cell.dim, dtype=getattr(torch, cell.pool))
        # Each call's slots lie at a multiple of 16 bytes: Triton would compile another kernel, in the capture, where not.
        width = -(-cell.n // 4) * 4
        slots = torch.arange(width, device="cuda") + cell.n * torch.arange(cell.calls, device="cuda")[:, None]
        self.slots = [row[: cell.n] for row in slots.to(torch.int32)]


def _sglang_call(x: _Inputs, function: Callable[..., torch.Tensor], slots: torch.Tensor, **options: Any) -> torch.Tensor:
    return function(
        x.A_log, x.g, x.dt_bias, 1.0, 20.0, x.q, x.k, x.v, x.beta, x.pool, slots,
        use_qk_l2norm_in_kernel=True, is_kda=True, lower_bound=LOWER_BOUND, **options,
    )  # fmt: skip


def _sglang_decode(cell: Cell, function: Callable[..., torch.Tensor]) -> Replay:
    x = _Inputs(cell)
    return _graph([functools.partial(_sglang_call, x, function, slots) for slots in x.slots])


def _fla_call(x: _Inputs, function: Callable[..., Any], slots: torch.Tensor) -> torch.Tensor:
    """Its serving form: the pool in place by slots, V rows of K numbers. ``out`` is given, else it would be zeroed first."""
    o, _ = function(
        x.q, x.k, x.v, x.g, x.beta, x.A_log, x.dt_bias, x.pool, inplace_final_state=True, state_v_first=True,
        ssm_state_indices=slots, use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        lower_bound=LOWER_BOUND, out=torch.empty_like(x.v),
    )  # fmt: skip
    return o


def _fla_decode(cell: Cell, function: Callable[..., Any]) -> Replay:
    x = _Inputs(cell)
    return _graph([functools.partial(_fla_call, x, function, slots) for slots in x.slots])


def _flashinfer_verify(cell: Cell, function: Callable[..., torch.Tensor]) -> Replay:
    x, o = _Inputs(cell), torch.empty(cell.n, cell.tokens, cell.value_heads, cell.dim, dtype=torch.bfloat16, device="cuda")
    options = {"use_gate_in_kernel": True, "lower_bound": LOWER_BOUND, "beta_is_logit": True, "output": o}
    call = functools.partial(function, x.q, x.k, x.v, x.g, x.beta, x.pool, A_log=x.A_log, dt_bias=x.dt_bias, **options)
    return _graph([functools.partial(call, initial_state_indices=slots) for slots in x.slots])


def _sglang_chain(cell: Cell, function: Callable[..., torch.Tensor], count: int) -> Replay:
    """Its verify writes T states a row into a scratch; what was accepted is then copied into the pool."""
    x = _Inputs(cell)
    # A scratch row a slot, unless that is more than there is memory for: then calls share rows.
    rows = x.pool.shape[0]
    while rows > cell.n and rows * cell.tokens * cell.states // cell.n > SCRATCH_BYTES:
        rows -= cell.n
    scratch = torch.empty(rows, cell.tokens, *x.pool.shape[1:], dtype=x.pool.dtype, device="cuda")
    scratch_rows = [slots % rows for slots in x.slots]
    counts = torch.full((cell.n,), count, dtype=torch.int32, device="cuda")
    verify = [
        functools.partial(
            _sglang_call, x, function, slots, disable_state_update=True, intermediate_states_buffer=scratch,
            intermediate_state_indices=where, cache_steps=cell.tokens,
        )
        for slots, where in zip(x.slots, scratch_rows, strict=True)
    ]  # fmt: skip
    commit = [
        functools.partial(_commit, x.pool, scratch, slots, where, counts)
        for slots, where in zip(x.slots, scratch_rows, strict=True)
    ]
    return _graph(verify, commit)


@triton.jit
def _commit_kernel(pool, scratch, slots, rows, counts, SIZE: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0)
    slot = tl.load(slots + n).to(tl.int64)
    state = tl.load(rows + n).to(tl.int64) * T + tl.load(counts + n) - 1
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(pool + slot * SIZE + offsets, tl.load(scratch + state * SIZE + offsets))


def _commit(
    pool: torch.Tensor, scratch: torch.Tensor, slots: torch.Tensor, rows: torch.Tensor, counts: torch.Tensor
) -> None:
    """The copy alone; what SGLang runs here also handles rows that it skips."""
    size, block = pool[0].numel(), 4096
    _commit_kernel[(len(slots), size // block)](pool, scratch, slots, rows, counts, size, scratch.shape[1], block)


def _agreement(sglang: Any, fla: Any) -> float | None:
    """The relative difference of the two peers' outputs: they were called as they must be if it is bfloat16's rounding."""
    if not (sglang and fla):
        return None
    cell = Cell(128, 16, 32, "float32", 3)
    one, other = (
        call(_Inputs(cell), function, torch.arange(3, dtype=torch.int32, device="cuda")).double()
        for call, function in ((_sglang_call, sglang), (_fla_call, fla))
    )
    return float((one - other).norm() / other.norm())


def _bandwidth() -> dict[str, float]:
    """TB/s of the card, bytes read plus bytes written: an in-place product, and a copy, of 4 GiB; the best of several."""
    x, y = (torch.randn(1 << 30, device="cuda") for _ in range(2))
    calls = {"read_modify_write": lambda: x.mul_(0.999), "copy": lambda: y.copy_(x)}
    return {
        name: 2 * x.nbytes / min(events.microseconds(_graph([call])) for _ in range(3)) / 1e6 for name, call in calls.items()
    }


if __name__ == "__main__":
    main()
