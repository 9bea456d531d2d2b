"""The figures: two of a run, and one that compares runs."""

from __future__ import annotations

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from checkpoint import LossCurve


def save_loss_curve(path: pathlib.Path, curve: LossCurve) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*curve.training, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="training (one batch)")
    axes.plot(*zip(*curve.held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held-out files")
    axes.set(title="Next-byte loss", xlabel="training step", ylabel="nats a byte")
    _finish(figure, path)


def save_acceptance_histogram(path: pathlib.Path, accepted: list[int], mean: float) -> None:
    """``accepted[a]`` is how many verify calls of a request accepted ``a`` drafts, ``mean`` of them on average."""
    total = sum(accepted)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    bars = axes.bar(range(len(accepted)), [count / total for count in accepted], color="tab:blue", alpha=0.8)
    axes.bar_label(bars, [f"{count / total:.0%}" for count in accepted], padding=2)
    axes.axvline(mean, color="tab:orange", linestyle="--", label=f"mean: {mean:.2f}")
    axes.set(
        title="Drafts accepted a verify call", xlabel="drafts accepted", ylabel="share of the verify calls of all requests"
    )
    axes.set_xticks(range(len(accepted)))
    axes.margins(y=0.12)
    _finish(figure, path)


def save_training_comparison(path: pathlib.Path, runs: list[dict[str, Any]], smoothed_over: int) -> None:
    """Three runs: the one in question, the one it is compared with, and that one with another seed."""
    figure, (curves, differences) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    styles = ({"color": "tab:blue"}, {"color": "tab:orange", "linestyle": "--"}, {"color": "tab:gray", "alpha": 0.7})
    names = [f"{run['implementation']}, seed {run['seed']}" for run in runs]
    losses = np.array([run["losses"] for run in runs])
    steps = np.arange(1, losses.shape[1] + 1)
    for name, loss, style in zip(names, losses, styles, strict=True):
        curves.plot(steps, loss, linewidth=1.2, label=name, **style)
    curves.set(title="Next-byte loss", xlabel="training step", ylabel="nats a byte")

    for i in (0, 2):
        smooth = np.convolve(np.abs(losses[i] - losses[1]), np.full(smoothed_over, 1 / smoothed_over), mode="valid")
        differences.plot(steps[smoothed_over - 1 :], smooth, label=f"({names[i]}) - ({names[1]})", **styles[i])
    differences.set(
        title=f"Absolute difference, mean of {smoothed_over} steps",
        xlabel="training step",
        ylabel="nats a byte",
        yscale="log",
    )
    _finish(figure, path)


def _finish(figure: plt.Figure, path: pathlib.Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
