"""Who else is told of a run's metrics: TensorBoard, Weights & Biases.

They get what metrics.jsonl gets and the recipe's numbers: no path, no name of a machine or user, no
code, nothing of the environment.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, Self

from had_pipe.errors import InputError, RecipeError

TENSORBOARD = "tensorboard"
"""The folder of its files, below the run's."""

log = logging.getLogger(__name__)


class _Tracker(Protocol):
    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def require_trackers(names: Sequence[str]) -> None:
    """Refuse a recipe whose trackers are not installed: RecipeError says which."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise RecipeError(
                f"[train] track names {name!r}, which is not installed: "
                "pip install 'had-pipe[track]', or leave it out"
            )


class Trackers:
    """Those that a recipe names, open until the block ends."""

    def __init__(
        self, names: Sequence[str], *, folder: Path, run: str, recipe: Mapping[str, Any], step: int
    ) -> None:
        """Of run `run`, which goes on after `step`; `recipe` is what it was asked for."""
        self._names, self._folder, self._run, self._recipe = names, folder, run, recipe
        self._step = step
        self._open: dict[str, _Tracker] = {}

    def __enter__(self) -> Self:
        with ExitStack() as closing:
            for name in self._names:
                tracker: _Tracker
                if name == "tensorboard":
                    tracker = _TensorBoard(self._folder / TENSORBOARD, step=self._step)
                else:
                    tracker = _WandB(self._folder, run=self._run, recipe=self._recipe)
                self._open[name] = tracker
                closing.callback(self._close, name)
            self._closing = closing.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.close()

    def write(self, kind: str, values: Mapping[str, float]) -> None:
        """A line of metrics; one without a step was measured before the first."""
        step = int(values.get("step", 0))
        figures = {name: value for name, value in values.items() if name != "step"}
        for name, tracker in self._open.copy().items():
            try:
                tracker.write(kind, step, figures)
            except Exception as error:
                self._failed(name, f"was told nothing from step {step} on", error)

    def _close(self, name: str) -> None:
        if tracker := self._open.pop(name, None):
            try:
                tracker.close()
            except Exception as error:
                self._failed(name, "may not have all that it was told", error)

    def _failed(self, name: str, what: str, error: Exception) -> None:
        """Days of training do not end because somebody who looks on is gone."""
        self._open.pop(name, None)
        log.warning("[train] track: %s %s, training goes on: %s", name, what, error)


class _TensorBoard:
    def __init__(self, folder: Path, *, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # Lines after the checkpoint come again; without one all do, the floors at step 0 too.
        self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else 0)

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, folder: Path, *, run: str, recipe: Mapping[str, Any]) -> None:
        import wandb

        try:
            self._run = wandb.init(
                id=run[:32],
                resume="allow",
                name=run[:12],
                project="had-pipe",
                dir=str(folder),
                config={key: dict(section) for key, section in recipe.items()},
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    host="",
                    x_disable_machine_info=True,
                    x_disable_meta=True,
                    x_disable_stats=True,
                    x_save_requirements=False,
                    silent=True,
                ),
            )
        except Exception as error:
            raise InputError(
                f"[train] track names 'wandb', which did not start ({error}): log in with "
                "`wandb login`, set WANDB_MODE=offline, or leave it out"
            ) from error
        # Its own steps may only grow, but a run that goes on tells some lines again.
        self._run.define_metric("*", step_metric="step")

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        told = {f"{kind}/{name}": value for name, value in values.items()}
        self._run.log({"step": step, **told})

    def close(self) -> None:
        self._run.finish()
