"""Stage two: a student learns from a cache. One run is one folder; the same call starts it, goes
on where it stopped, and says when nothing is left. What lies in the folder: had_pipe.run.

It needs caches alone: no teacher, no genome. The student is measured beside floors
(had_pipe.floors), on the same held-out windows.

B windows of a batch, T k-mers, V visible groups, D teacher channels, S = 6T bases, E width.
"""

from __future__ import annotations

import logging
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from had_pipe import __version__, checkpoint, run
from had_pipe.cache import Cache, open_cache
from had_pipe.card import student_card, teacher_of
from had_pipe.durable import make_folder, publish, storage, sync_tree
from had_pipe.errors import (
    CacheMismatch,
    HadPipeError,
    InputError,
    NonFiniteError,
    RecipeError,
    StorageError,
)
from had_pipe.floors import Floors, Seen
from had_pipe.hold import held
from had_pipe.learner import TERMS, Gradient, Learner, learning_rate
from had_pipe.objectives import HADObjective
from had_pipe.order import ORDER_VERSION, whole_weights
from had_pipe.pace import Pace, shown
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.signals import Signals, Stopped
from had_pipe.stream import (
    Batch,
    Stream,
    first_windows,
    require_alike,
    require_split,
)
from had_pipe.students import HADConfig, HADModel, kernel, save_student

FLOOR_WINDOWS = 8192
"""Training windows that the floors are learnt from, at most."""
_FLOOR_ELEMENTS = 1 << 22
"""Elements of an embedding in one batch of that."""
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

    Raises RunMismatch where the run's folder was begun by another recipe or cache, HeldError where
    another process trains into it, NonFiniteError at the first loss or gradient that is no number,
    Interrupted after a signal (a checkpoint is then saved).
    """
    if recipe.train is None:
        raise RecipeError("missing table [train]: distill needs at least out, steps and batch")
    torch_device = _device(device)
    out = recipe.train.out
    above = next(folder for folder in (out, *out.parents) if folder.exists())
    if not above.is_dir():
        raise RecipeError(f"[train] out = {out}: {above} is not a folder; use another [train] out")
    sources = list(caches or [recipe.cache.path])
    if recipe.train.weights is not None:
        whole_weights(recipe.train.weights, len(sources))  # refused before anything is begun
    with ExitStack() as closing:
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
        return _distill(recipe, opened, torch_device, prefetch=prefetch, report=report)


def _distill(
    recipe: Recipe,
    opened: Sequence[Cache],
    torch_device: torch.device,
    *,
    prefetch: int,
    report: Reporter,
) -> DistillSummary:
    assert recipe.train is not None
    require_alike(opened, space=recipe.objective.target)
    for cache in opened:
        require_split(cache, "train")
    wanted, stored = recipe.objective.align_on, opened[0].plan.windows.store
    if stored not in (wanted, "all"):
        serving = "'all'" if wanted == "all" else f"{wanted!r} or 'all'"
        raise CacheMismatch(
            f"{opened[0].path}: windows.store = {stored!r}, but [objective] align_on = {wanted!r} "
            f"needs the embeddings of {wanted} groups; extract with store = {serving}, or set "
            f"align_on = {stored!r}"
        )
    out = recipe.train.out
    make_folder(out)
    with (
        held(out, lock=".lock", doing="training this run"),
        Signals(let_go=lambda: _close_mirrors(opened)) as signals,
        torch.random.fork_rng(_forked(torch_device)),
    ):
        training = _Run(
            recipe, opened, torch_device, prefetch=prefetch, report=report, signals=signals
        )
        already_done = (out / run.STUDENT).exists()
        if not already_done:
            training.train()
            training.publish_student()
        return _summary(training, already_done=already_done)


def _close_mirrors(caches: Sequence[Cache]) -> None:
    """Whoever waits for a network then waits no more."""
    for cache in caches:
        if cache.mirror is not None:
            cache.mirror.close()


class _Run:
    """One training in one folder, held by this process."""

    def __init__(
        self,
        recipe: Recipe,
        caches: Sequence[Cache],
        device: torch.device,
        *,
        prefetch: int,
        report: Reporter,
        signals: Signals,
    ) -> None:
        assert recipe.train is not None
        self.config = recipe.train
        self.caches = caches
        self.out = recipe.train.out
        self._device = device
        self._prefetch = prefetch
        self._report = report
        self._signals = signals
        # Where the run stands: steps made before this process, the last step metrics tell of, the
        # sums of what was measured since, and the seconds of the processes before.
        self._start = self._told = 0
        self._sums = torch.zeros(len(TERMS) + 1, dtype=torch.float64, device=device)
        self._seconds_before = 0.0
        self._begun = perf_counter()
        self._validation_due = False
        plan = caches[0].plan
        torch.manual_seed(self.config.seed)
        # Made on the CPU, so that every device starts from the same weights.
        student = HADModel(
            HADConfig(
                **recipe.student.model_dump(),
                decoder_heads=recipe.objective.decoder_heads,
                licence=plan.licence,
                teacher=teacher_of(caches[0]),
            )
        )
        nn.Module.to(student, device)
        mean_D, std_D = torch.tensor(caches[0].mean), torch.tensor(caches[0].std)
        normalised = recipe.objective.target == "normalised"
        objective = HADObjective(
            hidden_size=recipe.student.hidden_size,
            channels=plan.teacher.channels,
            align=recipe.objective.align,
            reconstruct=recipe.objective.reconstruct,
            decoder_heads=recipe.objective.decoder_heads,
            target=recipe.objective.target,
            align_on=recipe.objective.align_on,
            pool=recipe.objective.pool,
            error=recipe.objective.error,
            mask_tokens=recipe.objective.mask_tokens,
            masked=plan.windows.masked,
            mean_D=mean_D if normalised else None,
            std_D=std_D if normalised else None,
        ).to(device)
        self.learner = Learner(
            self.config,
            recipe.objective,
            student,
            objective,
            visible=plan.windows.kmers - plan.windows.masked,
            device=device,
        )
        document = self._document(recipe)
        self.id = run.run_id(document)
        run.begin(self.out, document)

    # What the run is

    def _document(self, recipe: Recipe) -> dict[str, Any]:
        sections = {
            name: getattr(recipe, name).model_dump(mode="json", exclude={"out"})
            for name in ("student", "objective", "train")
        }
        chosen = kernel(self._device)
        return {
            "format": run.FORMAT,
            "recipe": sections,
            "order": ORDER_VERSION,
            "caches": [
                {
                    "id": cache.id,
                    # Never a local path, which would tell of this machine and its user.
                    **({} if cache.mirror is None else {"url": cache.mirror.url}),
                    "plan": cache.plan.model_dump(mode="json"),
                    "fidelity": dict(cache.fidelity),
                }
                for cache in self.caches
            ],
            "student": {
                "parameters": _count(self.learner.student),
                "config": self.learner.student.config.to_diff_dict(),
            },
            "objective_parameters": _count(self.learner.objective),
            "device": _device_name(self._device),
            "kernel": {"name": chosen.name, "reason": chosen.reason},
            "versions": {
                "had-pipe": __version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "numpy": np.__version__,
            },
        }

    # Training

    def train(self) -> None:
        """From the last checkpoint, or from the start, to the last step."""
        state = checkpoint.load(self.out / run.CHECKPOINTS, run=self.id)
        if state is not None:
            self._restore(state)
        nbytes = state.facts["metrics_nbytes"] if state is not None else 0
        with run.Metrics(self.out, nbytes=nbytes) as metrics:
            if state is None:
                try:
                    self._measure_floors(metrics)
                except Stopped:
                    self._signals.stop(_BEFORE)
            if self._validation_due:
                self._validate(self._start, metrics)
            if self._start == self.config.steps:
                return
            with Stream(
                self.caches,
                batch=self.config.batch,
                seed=self.config.seed,
                weights=self.config.weights,
                start=self._start,
                device=self._device,
                prefetch=self._prefetch,
            ) as stream:
                self._loop(stream, metrics)

    def _loop(self, stream: Stream, metrics: run.Metrics) -> None:
        config, begun = self.config, perf_counter()
        pace = Pace(stream)
        facts: dict[str, float | str] = {}
        for step in range(self._start + 1, config.steps + 1):
            with self._keeping(step - 1, metrics):
                batch = self._signals.wait_for(stream.__next__)
            self._sums += self._update(step, batch)
            last = step == config.steps
            if step == 1 or step % config.log_every == 0 or last:
                epoch = stream.order.epochs(step * config.batch)
                facts = self._tell(step, metrics, pace, epoch=epoch)
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
            # Asked once: a signal that comes later than here finds the next step.
            stopping = self._signals.caught is not None
            with pace.aside():
                if step % config.validate_every == 0 or last:
                    self._validate(step, metrics)
                if step % config.checkpoint_every == 0 or last or stopping:
                    self._save(step, metrics)
            if stopping and not last:
                self._signals.stop(self._where(step))

    @contextmanager
    def _keeping(self, step: int, metrics: run.Metrics) -> Iterator[None]:
        """Save what was learnt where data does not come: a network may be gone for days."""
        try:
            yield
        except Stopped:
            self._keep(step, metrics)
            self._signals.stop(self._where(step))
        except HadPipeError:
            with suppress(StorageError):  # the disk may be what failed
                self._keep(step, metrics)
            raise

    def _keep(self, step: int, metrics: run.Metrics) -> None:
        if step > self._start or step == 0:
            self._save(step, metrics)

    def _where(self, step: int) -> str:
        return f"after step {step} of {self.config.steps}, saved" if step else _BEFORE

    def _tell(
        self, step: int, metrics: run.Metrics, pace: Pace, *, epoch: float
    ) -> dict[str, float | str]:
        """Write a line of metrics, the means since the last one; what of it is worth showing."""
        means = (self._sums / (step - self._told)).tolist()
        windows = self.caches[0].plan.windows
        # A process that goes on has made fewer steps than the line tells of.
        made = step - max(self._told, self._start)
        rate, reading = made * self.config.batch / pace.seconds, pace.reading()
        losses = self.learner.named(means)
        metrics.write(
            "train",
            step=step,
            seconds=self._seconds(),
            **losses,
            lr=learning_rate(self.config, step),
            grad_norm=means[-1],
            windows_per_second=rate,
            kmers_per_second=rate * windows.kmers,
            bases_per_second=rate * windows.bases,
            **reading,
            epoch=epoch,
        )
        self._sums.zero_()
        self._told = step
        pace.restart()
        return {**{term: losses[term] for term in TERMS[:3] if term in losses}, **shown(reading)}

    def _seconds(self) -> float:
        """Of the run so far, all its processes added."""
        return self._seconds_before + perf_counter() - self._begun

    def _save(self, step: int, metrics: run.Metrics) -> None:
        tensors, facts = self.learner.state()
        state = checkpoint.State(
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
                "metrics_nbytes": metrics.sync(),
            },
        )
        checkpoint.save(self.out / run.CHECKPOINTS, state, run=self.id)

    def _restore(self, state: checkpoint.State) -> None:
        self._start, self._told = state.step, state.facts["told"]
        self._seconds_before = state.facts["seconds"]
        self._validation_due = state.facts.get("validation_due", False)
        self.learner.restore(state.tensors, state.facts["optimiser"])
        self._sums.copy_(state.tensors["loop"]["sums"])
        torch.set_rng_state(state.tensors["loop"]["random"])
        log.info("going on after step %d of %d", state.step, self.config.steps)

    def _update(self, step: int, batch: Batch) -> torch.Tensor:
        """One update; the terms of the loss and the gradient's norm, float64."""
        gradient = self.learner.gradient(step, batch)
        # Asked before the update: the weights stay those of the last good step.
        if not gradient.finite():
            self._refuse(step, batch, gradient)
        self.learner.update()
        return gradient.terms

    def _refuse(self, step: int, batch: Batch, gradient: Gradient) -> NoReturn:
        """Stop at numbers that are not finite, and say whose they are."""
        _require_finite(batch, self.caches, "train", f"{self.out}: step {step}")
        saved = checkpoint.checkpoints(self.out / run.CHECKPOINTS)
        raise NonFiniteError(
            f"{self.out}: step {step}: {', '.join(gradient.faults())}; the targets are finite; "
            f"the batch was: {_name_windows(batch, self.caches, 'train')}. The weights were not "
            f"changed by it; the last checkpoint is {saved[0].name if saved else 'none yet'}. "
            "Lower [train] lr or clip, and use another [train] out"
        )

    # Measuring

    def _held_out(self) -> list[Cache]:
        """The caches that have windows to validate on."""
        split = self.config.validation_split
        return [c for c in self.caches if split in c.plan.splits and c.plan.splits[split].windows]

    def _pass(
        self,
        caches: Sequence[Cache],
        split: str,
        windows: int,
        *,
        batch: int,
        what: str,
        ahead: bool = False,
    ) -> Iterator[Batch]:
        """The first windows of a split, told of as `what`; `ahead` is first_windows' own."""
        total = min(windows, sum(cache.plan.splits[split].windows for cache in caches))
        begun, done = perf_counter(), 0
        reading = first_windows(
            caches, split=split, windows=windows, batch=batch, device=self._device, ahead=ahead
        )
        while (read := self._signals.wait_for(lambda: next(reading, None))) is not None:
            _require_finite(read, caches, split, f"{self.out}: {what}")
            yield read
            done += len(read.kmer_id)
            self._report(
                Progress(
                    what=what,
                    done=done,
                    total=total,
                    unit="windows",
                    seconds=perf_counter() - begun,
                )
            )

    def _validate(self, step: int, metrics: run.Metrics) -> None:
        held_out, config = self._held_out(), self.config
        if not held_out:
            return
        batches = self._pass(
            held_out,
            config.validation_split,
            config.validation_windows,
            batch=config.batch,
            what="validating",
        )
        # Where this does not come to its end, whoever goes on validates first.
        self._validation_due = True
        with self._keeping(step, metrics):
            found = self.learner.measure(batches)
        self._validation_due = False
        metrics.write("validation", step=step, **found)

    @torch.no_grad()
    def _measure_floors(self, metrics: run.Metrics) -> None:
        """What the held-out figures are without a student."""
        held_out, config = self._held_out(), self.config
        if not held_out:
            return
        plan = self.caches[0].plan
        # Long batches: what is done with each is little, and setting it going costs more.
        stored, channels = plan.windows.stored, plan.teacher.channels
        many = max(1, _FLOOR_ELEMENTS // (stored * channels))

        def seen(caches: Sequence[Cache], split: str, windows: int) -> Iterator[Seen]:
            for batch in self._pass(
                caches, split, windows, batch=many, what="measuring the floors", ahead=True
            ):
                self._signals.stop(_BEFORE)
                yield self.learner.seen(batch)

        floors = Floors.learn(
            seen(self.caches, "train", FLOOR_WINDOWS), channels=channels, device=self._device
        )
        measured = floors.measure(
            seen(held_out, config.validation_split, config.validation_windows),
            unit_D=self.learner.objective.unit_D,
            error=self.learner.objective.error,
        )
        self._signals.stop(_BEFORE)
        metrics.write("floors", **measured)

    # The end

    def publish_student(self) -> None:
        """The student's folder, whole or absent."""
        aside = self.out / f".{run.STUDENT}.tmp"
        with storage(self.out):
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
            parameters=_count(self.learner.student),
            width=self.learner.student.config.hidden_size,
            batch=self.config.batch,
        )


def _summary(training: _Run, *, already_done: bool) -> DistillSummary:
    record = run.read_run(training.out)
    if not record.train:
        raise InputError(
            f"{training.out / run.METRICS}: tells of no step, though training is done: put the "
            "file back, or use another [train] out"
        )
    return DistillSummary(
        run=training.out,
        student=training.out / run.STUDENT,
        steps=training.config.steps,
        first=record.train[0],
        last=record.train[-1],
        validation=record.validation[-1] if record.validation else None,
        floors=record.floors,
        seconds=record.train[-1]["seconds"],
        already_done=already_done,
    )


def _require_finite(batch: Batch, caches: Sequence[Cache], split: str, when: str) -> None:
    bad_B = (~batch.target.isfinite()).flatten(1).any(1).tolist()
    if any(bad_B):
        raise NonFiniteError(
            f"{when}: the cache holds numbers that are not finite: "
            f"{_name_windows(batch, caches, split, chosen=bad_B)}. No writer of ours lets these "
            "pass: get the cache again, or extract it again"
        )


def _name_windows(
    batch: Batch, caches: Sequence[Cache], split: str, *, chosen: Sequence[bool] | None = None
) -> str:
    """Where a batch's windows, or the chosen ones, come from: at most eight rows of each view."""
    names, first = [], 0
    for span in batch.spans:
        rows = [
            row
            for i, row in enumerate(span.row.tolist(), start=first)
            if chosen is None or chosen[i]
        ]
        if rows:
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            names.append(f"{caches[span.cache].path} {split} view {span.view} rows {shown}")
        first += len(span.row)
    return "; ".join(names)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# The machine


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: must be auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA "
            "devices here; use --device auto or cpu"
        )
    return device


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def _forked(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []
