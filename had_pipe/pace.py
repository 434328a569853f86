"""How fast training goes and how reading fares beside it, between two lines of metrics."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import perf_counter

import torch

from had_pipe.parallel import ALONE, Processes
from had_pipe.sizes import size
from had_pipe.stream import Stream, StreamStats


class Pace:
    """Time spent on training since the last line of metrics, and what was read meanwhile."""

    def __init__(self, stream: Stream, processes: Processes = ALONE) -> None:
        self._stream, self._processes = stream, processes
        self._begun, self._aside = perf_counter(), 0.0
        # The first line also tells what a mirror did for the floors.
        self._told: StreamStats | None = None

    def restart(self) -> None:
        self._begun, self._aside = perf_counter(), 0.0
        self._told = self._stream.stats()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Validation and checkpoints are no training."""
        begun = perf_counter()
        yield
        self._aside += perf_counter() - begun

    @property
    def seconds(self) -> float:
        return max(perf_counter() - self._begun - self._aside, 1e-9)

    def reading(self) -> dict[str, float]:
        """How reading fared, as metrics have it: what all processes read, and the longest wait."""
        stats = self._stream.stats()
        if self._told is not None:
            stats = stats.since(self._told)
        waited = self._processes.largest(torch.tensor([stats.wait_seconds]))
        mirror = [] if stats.mirror is None else [stats.mirror.hits, stats.mirror.misses]
        if stats.mirror is not None:
            mirror.append(stats.mirror.downloaded_nbytes)
        nbytes, *mirrored = map(int, self._processes.sum(torch.tensor([stats.nbytes, *mirror])))
        names = ("mirror_hits", "mirror_misses", "mirror_downloaded_bytes")
        return {
            "wait_share": min(1.0, float(waited) / self.seconds),
            "read_bytes": nbytes,
            "read_bytes_per_second": nbytes / self.seconds,
            **dict(zip(names, mirrored, strict=False)),
        }


def shown(reading: Mapping[str, float]) -> dict[str, str]:
    """How reading fared, for a line of progress."""
    told = {
        "wait": f"{reading['wait_share']:.1%}",
        "read": f"{size(reading['read_bytes_per_second'])}/s",
    }
    asked = reading.get("mirror_hits", 0) + reading.get("mirror_misses", 0)
    if asked:
        told["mirror"] = f"{reading['mirror_hits'] / asked:.0%}"
    return told
