"""FLA's chunk_kda beside kda.chunk, for ``python -m benchmarks.peers --suites chunk``, which runs this in other processes.

FLA tunes its kernels at the first call of every head count: some 170 variants to compile, minutes one after the other. So
they are compiled ahead, a process a core; ``python -m benchmarks.peers_chunk`` does that alone. The tuning counts in the
process that times, a process for each gate, because the keys that FLA tunes by do not name the gate.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import functools
import gc
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton

from benchmarks import events
from benchmarks.cells import GATES, LOWER_BOUND, VARIANTS, Sequences, sequences


def rows(size: str) -> list[dict[str, Any]]:
    ahead(size)
    return [row for gate in GATES for row in _process(size, gate)]


def ahead(size: str) -> None:
    heads = sorted({(cell.heads, cell.value_heads) for cell in sequences(size)})
    cores = os.cpu_count() or 1
    shards = max(1, cores // len(heads))
    tasks = [[*map(str, (*pair, shard, shards))] for pair in heads for shard in range(shards)]
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for gate in GATES:  # most kernels are the same for the next
            process = functools.partial(_process, size, gate, "--ahead")
            list(pool.map(lambda task, process=process: process(*task), tasks))


def _process(size: str, *arguments: str) -> list[dict[str, Any]]:
    # What was found the fastest side by side with others must not be kept.
    env = os.environ | {"FLA_CACHE_RESULTS": "0"}
    command = [sys.executable, "-m", "benchmarks.peers_chunk", "--cells", size, "--gate", *arguments]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"{' '.join(command)}: exit {done.returncode}", file=sys.stderr)
        return []
    return json.loads(done.stdout.splitlines()[-1])


class _Inputs:
    """What kda.chunk takes, with the dtypes that it takes."""

    def __init__(self, cell: Sequences) -> None:
        torch.manual_seed(0)
        draw = functools.partial(torch.randn, device="cuda")
        keys, values = (cell.heads, cell.dim), (cell.value_heads, cell.dim)
        tokens = [
            draw(cell.batch, cell.tokens, *shape, dtype=torch.bfloat16)
            for shape in (keys, keys, values, values, (cell.value_heads,), values)
        ]
        self.do = tokens.pop()
        parameters = draw(cell.value_heads) / 2, draw(cell.value_heads * cell.dim)
        self.leaves = [x.requires_grad_() for x in (*tokens, *parameters)]
        self.cu_seqlens = torch.tensor(cell.offsets, device="cuda") if cell.lengths else None
        self.bounded = cell.gate == "lower_bound"


def _call(x: _Inputs, with_state: bool) -> torch.Tensor:
    """It takes HV > H as it is. Its chunks, of 64 tokens, and what it recomputes are its defaults."""
    from fla.ops.kda.chunk import chunk_kda

    q, k, v, g, beta, A_log, dt_bias = x.leaves
    o, _ = chunk_kda(
        q, k, v, g, beta, A_log=A_log, dt_bias=dt_bias, cu_seqlens=x.cu_seqlens, output_final_state=with_state,
        use_qk_l2norm_in_kernel=True, use_gate_in_kernel=True, use_beta_sigmoid_in_kernel=True,
        safe_gate=x.bounded, lower_bound=LOWER_BOUND if x.bounded else None,
    )  # fmt: skip
    return o


def _step(x: _Inputs, variant: str) -> Any:
    """Forward as in prefill, or as in training: without the final states."""
    if variant == "forward":
        with torch.no_grad():
            return _call(x, True)
    o = _call(x, False)
    return o, torch.autograd.grad(o, x.leaves, x.do)


def _eager(cell: Sequences, variant: str) -> dict[str, float]:
    """Peak memory counts what kda.chunk's counts: inputs, outputs and all between; here as the allocator saw it."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = functools.partial(_step, _Inputs(cell), variant)
    for _ in range(2):  # the first tunes
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    return {"peak_bytes": peak, "eager_us": events.microseconds(step)}


def _graphed(cell: Sequences, variant: str) -> dict[str, float]:
    """Without what launching costs the host."""
    torch.cuda.empty_cache()  # of the graph before
    step = functools.partial(_step, _Inputs(cell), variant)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        step()
    return {"graph_us": events.microseconds(graph.replay)}


def _measure(cells: list[Sequences], *attempts: Callable[[Sequences, str], dict[str, float]]) -> list[dict[str, Any]]:
    """The faster of the attempts. The graphs come last, lest one that fails spoil what follows."""
    found: list[dict[str, Any]] = [cell.row() | {"peer": "fla", "variant": what} for cell in cells for what in VARIANTS]
    for attempt in attempts:
        for row, (cell, what) in zip(found, ((cell, what) for cell in cells for what in VARIANTS), strict=True):
            try:
                row |= attempt(cell, what)
            except Exception as error:  # the others are still worth timing
                row.setdefault("errors", []).append(f"{attempt.__name__}: {error!r}"[:300])
            print(row, file=sys.stderr, flush=True)
    for row in found:
        if times := [row[key] for key in ("eager_us", "graph_us") if key in row]:
            row["us"] = min(times)
    return found


def _compile(cell: Sequences, variant: str) -> dict[str, float]:
    _step(_Inputs(cell), variant)
    torch.cuda.synchronize()
    return {}


def _compiling(shard: int, shards: int) -> Callable[..., list[float]]:
    """In place of Triton's benchmark of a variant: one of so many is compiled, and preferred to those that are not."""
    count = itertools.count()

    def once(call: Callable[[], Any], quantiles: tuple[float, ...]) -> list[float]:
        mine = next(count) % shards == shard
        if mine:
            call()
        return [1.0 if mine else 2.0 for _ in quantiles]

    return once


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_chunk", description=__doc__)
    parser.add_argument("--cells", choices=("full", "quick"), default="full")
    parser.add_argument("--gate", choices=GATES, help=argparse.SUPPRESS)  # given to the processes that this one starts
    parser.add_argument("--ahead", type=int, nargs=4, help=argparse.SUPPRESS)  # H, HV, shard, shards
    args = parser.parse_args()
    if args.gate is None:
        return ahead(args.cells)
    cells = [cell for cell in sequences(args.cells) if cell.gate == args.gate]
    if args.ahead:
        heads, value_heads, *shard = args.ahead
        once = _compiling(*shard)
        triton.runtime.driver.active.get_benchmarker = lambda: once
        cells = [cell for cell in cells if (cell.heads, cell.value_heads) == (heads, value_heads)]
        print(json.dumps(_measure(cells, _compile)))
    else:
        print(json.dumps(_measure(cells, _eager, _graphed)))


if __name__ == "__main__":
    main()
