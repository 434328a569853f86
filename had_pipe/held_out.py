"""Figures on windows that are not learnt from: the student's, and the floors beside them.

Several processes share the windows of a validation out. The floors are measured once, by whoever
asks for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from time import perf_counter

import torch
from torch import Tensor

from had_pipe.cache import Cache
from had_pipe.finite import require_finite
from had_pipe.floors import Floors, Seen
from had_pipe.learner import Learner
from had_pipe.parallel import Processes
from had_pipe.progress import Progress, Reporter
from had_pipe.recipe import Train
from had_pipe.signals import Signals
from had_pipe.stream import Batch, first_windows

FLOOR_WINDOWS = 8192
"""Training windows that the floors are learnt from, at most."""
_FLOOR_ELEMENTS = 1 << 22
"""Elements of an embedding in one batch of that."""


class HeldOut:
    """What a run's caches hold out."""

    def __init__(
        self,
        train: Train,
        caches: Sequence[Cache],
        device: torch.device,
        *,
        processes: Processes,
        signals: Signals,
        report: Reporter,
    ) -> None:
        self._train, self._all, self._device = train, caches, device
        self._processes, self._signals, self._report = processes, signals, report
        split = train.validation_split
        self._caches = [
            c for c in caches if split in c.plan.splits and c.plan.splits[split].windows
        ]

    def __bool__(self) -> bool:
        return bool(self._caches)

    def measure(self, learner: Learner) -> Tensor:
        """The learner's own sums on this process's share of the held-out windows."""
        train, world = self._train, self._processes.world
        batches = self._pass(
            self._caches,
            train.validation_split,
            train.validation_windows,
            batch=train.micro_batch or train.batch // world,
            what="validating",
            shared=True,
        )
        with learner.averaged():
            return learner.measure(batches)

    @torch.no_grad()
    def floors(self, learner: Learner) -> dict[str, float]:
        """What the held-out figures are without a student."""
        train, plan = self._train, self._all[0].plan
        # Long batches: what is done with each is little, and setting it going costs more.
        stored, channels = plan.windows.stored, plan.teacher.channels
        many = max(1, _FLOOR_ELEMENTS // (stored * channels))

        def seen(caches: Sequence[Cache], split: str, windows: int) -> Iterator[Seen]:
            for batch in self._pass(
                caches, split, windows, batch=many, what="measuring the floors", ahead=True
            ):
                yield learner.seen(batch)

        floors = Floors.learn(
            seen(self._all, "train", FLOOR_WINDOWS), channels=channels, device=self._device
        )
        return floors.measure(
            seen(self._caches, train.validation_split, train.validation_windows),
            unit_D=learner.objective.unit_D,
            error=learner.objective.error,
        )

    def _pass(
        self,
        caches: Sequence[Cache],
        split: str,
        windows: int,
        *,
        batch: int,
        what: str,
        ahead: bool = False,
        shared: bool = False,
    ) -> Iterator[Batch]:
        """The first windows of a split, told of as `what`; `ahead` is first_windows' own.

        `shared` gives this process its share of the batches.
        """
        rank, ranks = (self._processes.rank, self._processes.world) if shared else (0, 1)
        total = min(windows, sum(cache.plan.splits[split].windows for cache in caches))
        begun, done = perf_counter(), 0
        reading = first_windows(
            caches,
            split=split,
            windows=windows,
            batch=batch,
            rank=rank,
            ranks=ranks,
            device=self._device,
            ahead=ahead,
        )
        while (read := self._signals.wait_for(lambda: next(reading, None))) is not None:
            require_finite(read, caches, split, f"{self._train.out}: {what}")
            yield read
            # Of all processes: they go on side by side.
            done = min(total, done + ranks * len(read.kmer_id))
            self._report(
                Progress(
                    what=what,
                    done=done,
                    total=total,
                    unit="windows",
                    seconds=perf_counter() - begun,
                )
            )
