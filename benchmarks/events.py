"""Timing on a GPU with CUDA events, for the processes of the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ROUNDS, ROUND_MS = 3, 80.0  # as long as ours (benchmarks/gpu.py): under load a GPU lowers its clock


def microseconds(replay: Callable[[], Any]) -> float:
    """The time of one replay, the median of rounds of back-to-back replays between two events."""

    def ms(replays: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / replays

    ms(2)
    replays = max(2, int(ROUND_MS / ms(2)) + 1)
    return sorted(ms(replays) for _ in range(ROUNDS))[ROUNDS // 2] * 1e3
