"""What a run leaves for the next: model, optimizer, model size and loss curve, saved with Orbax."""

from __future__ import annotations

import dataclasses
import pathlib

import orbax.checkpoint as ocp
from flax import nnx
from model import LanguageModel, ModelConfig


@dataclasses.dataclass
class LossCurve:
    """Nats a byte of the next byte, as (step, loss) pairs."""

    training: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    held_out: list[tuple[int, float]] = dataclasses.field(default_factory=list)


class CheckpointFolder:
    """The latest checkpoint of a run."""

    def __init__(self, path: pathlib.Path):
        self.path = path
        items = ("model", "optimizer", "run")
        self.manager = ocp.CheckpointManager(
            path.absolute(), item_names=items, options=ocp.CheckpointManagerOptions(max_to_keep=1)
        )

    def clear(self) -> None:
        for step in self.manager.all_steps():
            self.manager.delete(step)

    def save(self, step: int, model: LanguageModel, optimizer: nnx.Optimizer, curve: LossCurve) -> None:
        self.manager.save(
            step,
            args=ocp.args.Composite(
                model=ocp.args.StandardSave(nnx.state(model)),
                optimizer=ocp.args.StandardSave(nnx.state(optimizer)),
                run=ocp.args.JsonSave({"config": dataclasses.asdict(model.config), "curve": dataclasses.asdict(curve)}),
            ),
        )
        # The next training step donates the arrays that are being written.
        self.manager.wait_until_finished()

    def read_run(self) -> tuple[int, ModelConfig, LossCurve]:
        """The steps trained, the model's size and the loss curve so far."""
        step = self.manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.path}")
        run = self.manager.restore(step, args=ocp.args.Composite(run=ocp.args.JsonRestore())).run
        return step, ModelConfig(**run["config"]), LossCurve(**run["curve"])

    def restore(self, **modules: nnx.Module | nnx.Optimizer) -> None:
        """Fills ``model=`` and, where training goes on, ``optimizer=`` in place."""
        like = {name: ocp.args.StandardRestore(nnx.state(module)) for name, module in modules.items()}
        restored = self.manager.restore(self.manager.latest_step(), args=ocp.args.Composite(**like))
        for name, module in modules.items():
            nnx.update(module, restored[name])
