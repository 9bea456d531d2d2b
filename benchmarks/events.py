"""Timing on a GPU with CUDA events, for the processes of the peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

ROUNDS, ROUND_MS = 5, 10.0


def microseconds(replay: Callable[[], Any], round_ms: float = ROUND_MS) -> float:
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
    replays = max(2, int(round_ms / ms(2)) + 1)
    return sorted(ms(replays) for _ in range(ROUNDS))[ROUNDS // 2] * 1e3
