"""Stage two: a student learns from a cache. One run is one folder; the same call starts it, goes
on where it stopped, and says when nothing is left. What lies in the folder: had_pipe.run.

It needs caches alone: no teacher, no genome. The student is measured beside floors
(had_pipe.floors), on the same held-out windows.

B windows of a batch, T k-mers, V visible groups, D teacher channels, S = 6T bases, E width.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NoReturn

import torch

from had_pipe import checkpoint, parallel, run
from had_pipe.cache import Cache, open_cache
from had_pipe.card import student_card
from had_pipe.durable import make_folder, publish, storage, sync_tree
from had_pipe.errors import (
    InputError,
    NonFiniteError,
    RecipeError,
    RunMismatch,
)
from had_pipe.finite import named_windows, require_finite
from had_pipe.held_out import HeldOut
from had_pipe.hold import held
from had_pipe.learner import TERMS, Gradient, learning_rate
from had_pipe.pace import Pace, shown
from had_pipe.parallel import Place, Processes
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.signals import Signals, Stopped
from had_pipe.stream import Batch, Stream
from had_pipe.students import save_student
from had_pipe.task import (
    check_caches,
    check_recipe,
    chosen_device,
    count_of,
    described,
    new_learner,
)
from had_pipe.track import Trackers

_BEFORE = "before the first step"
PREFETCH = 256 << 20
"""Bytes read ahead of training, unless said otherwise."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class DistillSummary:
    """What a run came to."""

    run: Path
    student: Path
    steps: int
    first: Mapping[str, float]
    """The first line of training metrics."""
    last: Mapping[str, float]
    validation: Mapping[str, float] | None
    """The last validation; None where nothing was held out."""
    floors: Mapping[str, float] | None
    seconds: float
    """Of training, all processes of the run added."""
    already_done: bool


def distill(
    recipe: Recipe,
    *,
    caches: Sequence[Path | str] | None = None,
    mirror: Path | None = None,
    mirror_nbytes: int | None = None,
    prefetch: int = PREFETCH,
    direct: bool = False,
    through_zarr: bool = False,
    device: str = "auto",
    report: Reporter = silent,
) -> DistillSummary:
    """Train the recipe's student from the recipe's cache, or from `caches`; go on where it stopped.

    A cache may be a URL, which is read by way of a mirror: a folder, `mirror`, that holds at most
    `mirror_nbytes`. `prefetch` bounds the bytes read ahead, but for two batches. `direct` reads
    past the page cache, `through_zarr` a store that another tool has laid out anew. None of these
    changes what is learnt.

    Where a launcher such as torchrun has started several processes, each calls this alike, and all
    return the same: they share every batch out, and the first one reads and writes the run.

    Raises RunMismatch where the run's folder was begun by another recipe or cache, HeldError where
    another process trains into it, NonFiniteError at the first loss or gradient that is no number,
    Interrupted after a signal (a checkpoint is then saved).
    """
    if recipe.train is None:
        raise RecipeError("missing table [train]: distill needs at least out, steps and batch")
    place, sources = Place.of(), list(caches or [recipe.cache.path])
    with ExitStack() as closing:
        processes = closing.enter_context(parallel.joined(place))
        with processes.together():
            torch_device = chosen_device(device, place)
            check_recipe(recipe.train, place, caches=len(sources))
            opened = [
                closing.enter_context(
                    open_cache(
                        source,
                        mirror=mirror,
                        mirror_nbytes=mirror_nbytes,
                        direct=direct,
                        through_zarr=through_zarr,
                    )
                )
                for source in sources
            ]
            check_caches(recipe, opened)
        processes.use(torch_device)
        return _distill(
            recipe,
            opened,
            torch_device,
            processes=processes,
            prefetch=prefetch,
            report=report if processes.first else silent,
        )


def _distill(
    recipe: Recipe,
    opened: Sequence[Cache],
    torch_device: torch.device,
    *,
    processes: Processes,
    prefetch: int,
    report: Reporter,
) -> DistillSummary:
    assert recipe.train is not None
    out = recipe.train.out
    with (
        Signals(let_go=lambda: _close_mirrors(opened)) as signals,
        torch.random.fork_rng([torch_device] if torch_device.type == "cuda" else []),
        ExitStack() as holding,
    ):
        with processes.together():
            if processes.first:
                make_folder(out)
                holding.enter_context(held(out, lock=".lock", doing="training this run"))
            training = _Run(
                recipe,
                opened,
                torch_device,
                processes=processes,
                prefetch=prefetch,
                report=report,
                signals=signals,
            )
        already_done = training.begin()
        if not already_done:
            training.train()
            training.publish_student()
        return training.summary(already_done=already_done)


def _close_mirrors(caches: Sequence[Cache]) -> None:
    """Whoever waits for a network then waits no more."""
    for cache in caches:
        if cache.mirror is not None:
            cache.mirror.close()


class _Run:
    """One training in one folder, which the first of its processes holds."""

    def __init__(
        self,
        recipe: Recipe,
        caches: Sequence[Cache],
        device: torch.device,
        *,
        processes: Processes,
        prefetch: int,
        report: Reporter,
        signals: Signals,
    ) -> None:
        assert recipe.train is not None
        self.config = recipe.train
        self.caches = caches
        self.out = recipe.train.out
        self._device = device
        self._processes = processes
        self._prefetch = prefetch
        self._report = report
        self._signals = signals
        self._held_out = HeldOut(
            self.config, caches, device, processes=processes, signals=signals, report=report
        )
        # Where the run stands: steps made before this process, the last step metrics tell of, the
        # sums of what was measured since, and the seconds of the processes before.
        self._start = self._told = 0
        self._sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self._seconds_before = 0.0
        self._begun = perf_counter()
        self._validation_due = False
        self._unsaved = False
        # Those of the first process alone.
        self._metrics: run.Metrics | None = None
        self._trackers: Trackers | None = None
        self.learner = new_learner(recipe, caches, device)
        self._document = described(
            recipe, caches, self.learner, device=device, processes=processes.world
        )
        self.id = run.run_id(self._document)

    def begin(self) -> bool:
        """Take the folder for this run, or find it begun; whether all was done before."""
        told, asked = b"", self._document["recipe"]["train"]
        with self._processes.together():
            if self._processes.first:
                run.begin(self.out, self._document)
                done = (self.out / run.STUDENT).exists()
                told = json.dumps([self.id, asked, done]).encode()
        there, asked_there, done = json.loads(self._processes.share(told))
        # What may change within a run too: by it they know when, and in what portions, to meet.
        differing = [key for key, value in asked.items() if asked_there.get(key) != value]
        with self._processes.together():
            if there != self.id or differing:
                keys = f" (other {', '.join(differing)} in [train])" if differing else ""
                raise RunMismatch(
                    f"the first process was given another recipe or cache{keys}: run "
                    f"{there[:12]} there, {self.id[:12]} here; start all of them by the same "
                    "command, with the same files"
                )
        return bool(done)

    # Training

    def train(self) -> None:
        """From the last checkpoint, or from the start, to the last step."""
        state, begun = self._load()
        self._restore(state)
        if begun:
            log.info("going on after step %d of %d", self._start, self.config.steps)
        with ExitStack() as closing:
            with self._processes.together():
                if self._processes.first:
                    self._open_metrics(closing, nbytes=state.facts["metrics_nbytes"])
            if not begun:
                with self._signals.interrupting(_BEFORE):
                    self._measure_floors()
            if self._validation_due:
                self._validate(self._start)
            if self._start == self.config.steps:
                return
            with self._processes.together():
                stream = closing.enter_context(
                    Stream(
                        self.caches,
                        batch=self.config.batch,
                        seed=self.config.seed,
                        weights=self.config.weights,
                        rank=self._processes.rank,
                        ranks=self._processes.world,
                        start=self._start,
                        device=self._device,
                        prefetch=self._prefetch,
                    )
                )
            self._loop(stream)

    def _loop(self, stream: Stream) -> None:
        config, begun = self.config, perf_counter()
        pace = Pace(stream, self._processes)
        facts: dict[str, float | str] = {}
        for step in range(self._start + 1, config.steps + 1):
            self._step(step, stream)
            last = step == config.steps
            if step == 1 or step % config.log_every == 0 or last:
                epoch = stream.order.epochs(step * config.batch)
                facts = self._tell(step, pace, epoch=epoch)
            self._report(
                Progress(
                    what="training",
                    done=step,
                    total=config.steps,
                    unit="steps",
                    begun=self._start,
                    seconds=perf_counter() - begun,
                    facts=facts,
                )
            )
            with pace.aside():
                if step % config.validate_every == 0 or last:
                    self._validate(step)
                if step % config.checkpoint_every == 0 or last:
                    self._save(step)

    def _step(self, step: int, stream: Stream) -> None:
        """One update, made by all processes or by none."""
        with self._keeping(step - 1):
            with self._processes.together(self._signals):
                batch = self._signals.wait_for(stream.__next__)
                self.learner.learn(step, batch)
            gradient = self.learner.gradient(self._processes.average)
        # Asked before the update: the weights stay those of the last good step.
        if not gradient.finite():
            self._refuse(step, batch, gradient)
        self.learner.update()
        self._sums += gradient.terms
        self._unsaved = True

    def _refuse(self, step: int, batch: Batch, gradient: Gradient) -> NoReturn:
        """Stop at numbers that are not finite, and say whose they are."""
        with self._processes.together():
            require_finite(batch, self.caches, "train", f"{self.out}: step {step}")
        saved = [path.name for path in checkpoint.checkpoints(self.out / run.CHECKPOINTS)]
        last = self._processes.share((saved[0] if saved else "none yet").encode()).decode()
        raise NonFiniteError(
            f"{self.out}: step {step}: {', '.join(gradient.faults())}; the targets are finite; "
            f"the batch was: {named_windows(batch, self.caches, 'train')}. The weights were not "
            f"changed by it; the last checkpoint is {last}. "
            "Lower [train] lr or clip, and use another [train] out"
        )

    def _tell(self, step: int, pace: Pace, *, epoch: float) -> dict[str, float | str]:
        """Write a line of metrics, the means since the last one; what of it is worth showing."""
        means = (self._sums / (step - self._told)).tolist()
        windows = self.caches[0].plan.windows
        # A process that goes on has made fewer steps than the line tells of.
        made = step - max(self._told, self._start)
        rate, reading = made * self.config.batch / pace.seconds, pace.reading()
        losses = self.learner.named(means)
        told = {
            "step": step,
            "seconds": self._seconds(),
            **losses,
            "lr": learning_rate(self.config, step),
            "grad_norm": means[-1],
            "windows_per_second": rate,
            "kmers_per_second": rate * windows.kmers,
            "bases_per_second": rate * windows.bases,
            **reading,
            "epoch": epoch,
        }
        self._write("train", told)
        self._sums.zero_()
        self._told = step
        pace.restart()
        return {**{term: losses[term] for term in TERMS[:3] if term in losses}, **shown(reading)}

    def _seconds(self) -> float:
        """Of the run so far, all its processes added."""
        return self._seconds_before + perf_counter() - self._begun

    # Measuring

    def _validate(self, step: int) -> None:
        if not self._held_out:
            return
        # Where this does not come to its end, whoever goes on validates first.
        self._validation_due = True
        with self._keeping(step):
            with self._processes.together(self._signals):
                sums = self._held_out.measure(self.learner)
            *terms, windows = self._processes.sum(sums).tolist()
        self._validation_due = False
        means = self.learner.named([term / windows for term in terms])
        self._write("validation", {"step": step, "windows": int(windows), **means})
        self._unsaved = True

    def _measure_floors(self) -> None:
        """Measured once: they are the same for every process."""
        if not self._held_out:
            return
        floors: dict[str, float] = {}
        with self._processes.together(self._signals):
            if self._processes.first:
                floors = self._held_out.floors(self.learner)
        self._write("floors", floors)
        self._unsaved = True

    # What is kept

    def _open_metrics(self, closing: ExitStack, *, nbytes: int) -> None:
        self._metrics = closing.enter_context(run.Metrics(self.out, nbytes=nbytes))
        self._trackers = closing.enter_context(
            Trackers(
                self.config.track,
                folder=self.out,
                run=self.id,
                recipe=self._document["recipe"],
                step=self._start,
            )
        )

    def _write(self, kind: str, values: Mapping[str, float]) -> None:
        """A line of metrics, for whoever reads them."""
        with self._processes.together():
            if self._metrics is not None and self._trackers is not None:
                self._metrics.write(kind, **values)
                self._trackers.write(kind, values)

    @contextmanager
    def _keeping(self, step: int) -> Iterator[None]:
        """Save what was learnt where it does not go on: a network may be gone for days."""
        try:
            yield
        except Stopped:
            self._keep(step)
            self._signals.stop(self._where(step))
        except Exception:
            # What is told is the first failure: the disk may be what failed, or another process.
            with suppress(Exception):
                self._keep(step)
            raise

    def _keep(self, step: int) -> None:
        if self._unsaved:
            self._save(step)

    def _where(self, step: int) -> str:
        return f"after step {step} of {self.config.steps}, saved" if step else _BEFORE

    def _save(self, step: int) -> None:
        with self._processes.together():
            if self._metrics is not None:
                state = self._state(step, metrics_nbytes=self._metrics.sync())
                folder = self.out / run.CHECKPOINTS
                checkpoint.save(folder, state, run=self.id, keep=self.config.keep)
        self._unsaved = False

    def _load(self) -> tuple[checkpoint.State, bool]:
        """Where the run stands, the same for every process; whether it had begun before."""
        state, begun, told = self._state(0, metrics_nbytes=0), False, b""
        with self._processes.together():
            if self._processes.first:
                found = checkpoint.load(self.out / run.CHECKPOINTS, run=self.id)
                state, begun = found or state, found is not None
                told = checkpoint.pack(state)
        # One that does not see the folder learns it from the first; new weights too, which another
        # make of processor might draw otherwise.
        state = checkpoint.unpack(self._processes.share(told))
        return state, bool(self._processes.most(begun))

    def _state(self, step: int, *, metrics_nbytes: int) -> checkpoint.State:
        tensors, facts = self.learner.state()
        return checkpoint.State(
            step=step,
            tensors={
                **tensors,
                "loop": {"sums": self._sums, "random": torch.get_rng_state()},
            },
            facts={
                "optimiser": facts,
                "told": self._told,
                "validation_due": self._validation_due,
                "seconds": self._seconds(),
                "metrics_nbytes": metrics_nbytes,
            },
        )

    def _restore(self, state: checkpoint.State) -> None:
        self._start, self._told = state.step, state.facts["told"]
        self._seconds_before, self._begun = state.facts["seconds"], perf_counter()
        self._validation_due = state.facts.get("validation_due", False)
        self.learner.restore(state.step, state.tensors, state.facts["optimiser"])
        self._sums.copy_(state.tensors["loop"]["sums"])
        torch.set_rng_state(state.tensors["loop"]["random"])

    # The end

    def publish_student(self) -> None:
        """The student's folder, whole or absent."""
        with self._processes.together():
            if self._processes.first:
                self._publish_student()

    def _publish_student(self) -> None:
        aside = self.out / f".{run.STUDENT}.tmp"
        with storage(self.out), self.learner.averaged():
            if aside.exists():
                shutil.rmtree(aside)
            aside.mkdir()
            save_student(self.learner.student, self.learner.objective.language_head, aside)
            (aside / "README.md").write_text(self._card(), encoding="utf-8")
        sync_tree(aside)
        publish(aside, self.out / run.STUDENT)

    def _card(self) -> str:
        return student_card(
            run.read_run(self.out),
            self.caches,
            parameters=count_of(self.learner.student),
            width=self.learner.student.config.hidden_size,
            batch=self.config.batch,
        )

    def summary(self, *, already_done: bool) -> DistillSummary:
        """What it came to, as its folder tells."""
        told = b""
        with self._processes.together():
            if self._processes.first:
                told = json.dumps(self._figures()).encode()
        figures = json.loads(self._processes.share(told))
        return DistillSummary(
            run=self.out,
            student=self.out / run.STUDENT,
            steps=self.config.steps,
            seconds=figures["last"]["seconds"],
            already_done=already_done,
            **figures,
        )

    def _figures(self) -> dict[str, run.Row | None]:
        record = run.read_run(self.out)
        if not record.train:
            raise InputError(
                f"{self.out / run.METRICS}: tells of no step, though training is done: put the "
                "file back, or use another [train] out"
            )
        return {
            "first": record.train[0],
            "last": record.train[-1],
            "validation": record.validation[-1] if record.validation else None,
            "floors": record.floors,
        }
