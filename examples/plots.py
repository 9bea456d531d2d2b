"""The two figures of a run."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from checkpoint import LossCurve


def save_loss_curve(path: pathlib.Path, curve: LossCurve) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    axes.plot(*zip(*curve.training, strict=True), color="tab:blue", alpha=0.6, linewidth=1, label="training (one batch)")
    axes.plot(*zip(*curve.held_out, strict=True), color="tab:orange", marker="o", markersize=4, label="held-out files")
    axes.set(title="Next-byte loss", xlabel="training step", ylabel="nats a byte")
    _finish(figure, axes, path)


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
    _finish(figure, axes, path)


def _finish(figure: plt.Figure, axes: plt.Axes, path: pathlib.Path) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
