"""Stage two's input: windows in their order (had_pipe.order), read ahead and decoded.

It says which windows make a batch, and holds its caches against each other; how they are read and
decoded is had_pipe.feed's, how a cache lies on disk had_pipe.cache's, and what a batch is for its
caller's.

P places, B windows of a batch, T k-mers, G stored groups, D teacher channels.
"""

from __future__ import annotations

import functools
import itertools
import operator
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from operator import attrgetter
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Self, get_args

import numpy as np
import torch

from had_pipe.cache import Block, Cache, Part, open_cache
from had_pipe.cache.mirror import MirrorStats
from had_pipe.errors import CacheMismatch, RecipeError
from had_pipe.feed import Arrays, Batch, Feed, Plan, Space, Span
from had_pipe.order import Corpus, Mix

__all__ = ["Arrays", "Batch", "Space", "Span", "Stream", "StreamStats", "first_windows"]

_PLANNED = 1 << 12
"""Windows planned in one go, about."""
_PLANNED_BATCHES = 64
"""And batches, at most."""


class Stream:
    """An endless, resumable sequence of training batches.

    Batch number p of the whole run holds places p * batch to (p + 1) * batch of the order, whoever
    reads them: rank r of R takes the r-th of R equal shares, and within a share windows are
    arranged by cache, epoch and row, so that neighbours on disk are read together. A batch may
    cross into the next epoch: nothing is dropped, every window is seen equally often.

    Batches are read ahead by threads, which end when the stream is closed or nobody holds it any
    more. A batch never changes after it was handed over. The first error of a thread is raised in
    its batch's turn, and again by every call after that.
    """

    order: Mix
    position: int
    """The number of the next batch: all there is to save; go on by giving it as `start`."""

    def __init__(
        self,
        caches: Sequence[Cache | Path | str],
        *,
        batch: int,
        seed: int,
        split: str = "train",
        weights: Sequence[float] | None = None,
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        space: Space = "raw",
        device: torch.device | str = "cpu",
        prefetch: int = 256 << 20,
        threads: int | None = None,
    ) -> None:
        """`batch`: windows of all ranks together. `weights`: one for each cache; every cache then
        has epochs of its own. `prefetch` bounds the bytes read ahead, but for two batches, which
        there always are. A path or URL is opened here, and closed with the stream.
        """
        assert not isinstance(caches, str | Path), "caches is a list, of one too"
        assert space in get_args(Space), f"space={space!r}, not one of {get_args(Space)}"
        assert batch > 0
        assert start >= 0
        assert 0 <= rank < ranks
        assert threads is None or threads > 0, f"threads={threads}"
        if batch % ranks:
            raise RecipeError(
                f"[train] batch = {batch}: must be a multiple of the {ranks} processes, so that "
                "every one has equally many windows; change batch or the number of processes"
            )
        with ExitStack() as closing:
            self._caches = [_opened(cache, closing) for cache in caches]
            require_alike(self._caches, space=space)
            for cache in self._caches:
                require_split(cache, split)
            counts = [cache.rows(split) for cache in self._caches]
            self.order = Mix(
                [
                    Corpus(windows, cache.plan.part)
                    for windows, cache in zip(counts, self._caches, strict=True)
                ],
                seed=seed,
                weights=weights,
            )
            self.position = start
            self._plans = _Plans(
                self.order,
                batch=batch,
                rank=rank,
                ranks=ranks,
                views=[cache.views(split) for cache in self._caches],
                rows=max(counts),
                start=start,
            )
            self._feed = Feed(
                self._caches,
                split=split,
                plans=self._plans,
                windows=batch // ranks,
                space=space,
                device=torch.device(device),
                prefetch=prefetch,
                threads=threads,
            )
            self._begun = perf_counter()
            # Of a stream that nobody holds any more too, there may be threads that download.
            self._close_caches = weakref.finalize(self, closing.pop_all().close)
        for i, cache in enumerate(self._caches):
            cache.coming(self._plans.parts(split, i))

    def spans(self, position: int) -> tuple[Span, ...]:
        """Which windows this rank reads in batch `position`."""
        return self._plans.spans(position)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._feed.batch()
        assert batch is not None
        self.position = batch.position + 1
        return batch

    def arrays(self) -> Iterator[Arrays]:
        """The same batches as NumPy arrays."""
        # No generator: one would end with the first error or interrupt.
        return iter(self._next_arrays, None)

    def blocks(self) -> Iterator[tuple[Block, ...]]:
        """The batches as they are stored, not decoded, a block for each of a batch's spans.

        One is overwritten after the next is asked for.
        """
        return iter(self._next_blocks, None)

    def stats(self) -> StreamStats:
        """What was handed over since the stream began."""
        mirrors = [cache.mirror.stats() for cache in self._caches if cache.mirror is not None]
        return StreamStats(
            batches=self._feed.batches,
            windows=self._feed.windows,
            nbytes=self._feed.nbytes,
            seconds=perf_counter() - self._begun,
            wait_seconds=self._feed.wait_seconds,
            mirror=_combined(operator.add, *mirrors),
        )

    def close(self) -> None:
        """End the threads, and close the caches that were opened here."""
        self._feed.stop()
        for cache in self._caches:
            cache.coming(())
        # Before the threads end: one that waits for a network then waits no more.
        self._close_caches()
        self._feed.close()

    def _next_arrays(self) -> Arrays | None:
        arrays = self._feed.arrays()
        assert arrays is not None
        self.position = arrays.position + 1
        return arrays

    def _next_blocks(self) -> tuple[Block, ...] | None:
        blocks = self._feed.blocks()
        assert blocks is not None
        self.position += 1
        return blocks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True, kw_only=True)
class StreamStats:
    """What a stream has done, in all since it began or between two moments."""

    batches: int
    windows: int
    nbytes: int
    """Of the windows handed over, as they are stored."""
    seconds: float
    wait_seconds: float
    """How long its caller was kept waiting for batches."""
    mirror: MirrorStats | None
    """What the mirrors of its caches did; None where every cache is local."""

    def since(self, earlier: StreamStats) -> StreamStats:
        """What was done after an earlier moment."""
        between = _combined(operator.sub, self, earlier)
        assert isinstance(between, StreamStats)
        return between

    @property
    def bytes_per_second(self) -> float:
        return self.nbytes / max(self.seconds, 1e-9)

    @property
    def wait_share(self) -> float:
        return min(1.0, self.wait_seconds / max(self.seconds, 1e-9))


class _Plans:
    """Which windows one rank reads in which batch; some batches are planned in one go."""

    def __init__(
        self,
        order: Mix,
        *,
        batch: int,
        rank: int,
        ranks: int,
        views: Sequence[tuple[int, ...]],
        rows: int,
        start: int,
    ) -> None:
        self._order = order
        self._batch, self._rank, self._ranks = batch, rank, ranks
        self._share = batch // ranks
        self._views, self._rows = views, rows
        self._start = self._position = start
        self._at_once = max(1, min(_PLANNED_BATCHES, _PLANNED // self._share))
        self._planned: deque[Plan] = deque()

    def __iter__(self) -> Iterator[Plan]:
        return self

    def __next__(self) -> Plan:
        if not self._planned:
            spans = self._plan(self._position, self._at_once)
            self._planned.extend(enumerate(spans, start=self._position))
            self._position += self._at_once
        return self._planned.popleft()

    def spans(self, position: int) -> tuple[Span, ...]:
        return self._plan(position, 1)[0]

    def parts(self, split: str, cache: int) -> Iterator[Part]:
        """The parts of a cache in the order in which they are needed first; endless."""
        views = self._views[cache]
        for need in self._order.coming(self._start * self._batch):
            if need.cache == cache:
                yield Part(split, views[need.epoch % len(views)], need.shard)

    def _plan(self, position: int, batches: int) -> list[tuple[Span, ...]]:
        first = position * self._batch + self._rank * self._share
        if self._ranks == 1:
            places = [self._order.at(first, batches * self._share)]
        else:
            places = [self._order.at(first + b * self._batch, self._share) for b in range(batches)]
        cache_P, epoch_P, row_P = (
            np.concatenate([getattr(place, name) for place in places])
            for name in ("cache_P", "epoch_P", "row_P")
        )
        # One number for batch, cache, epoch and row, so that one sort arranges all the windows.
        caches, earliest = len(self._views), int(epoch_P.min())
        epochs = int(epoch_P.max()) - earliest + 1
        assert batches * caches * epochs * self._rows < 1 << 63
        batch_P = np.arange(batches).repeat(self._share)
        key_P = ((batch_P * caches + cache_P) * epochs + (epoch_P - earliest)) * self._rows + row_P
        key_P.sort()
        group_P, row_P = np.divmod(key_P, self._rows)
        edges = [0, *(np.flatnonzero(np.diff(group_P)) + 1).tolist(), len(group_P)]
        planned: list[list[Span]] = [[] for _ in range(batches)]
        for begin, end in itertools.pairwise(edges):
            rest, epoch = divmod(int(group_P[begin]), epochs)
            batch, cache = divmod(rest, caches)
            epoch += earliest
            view = self._views[cache][epoch % len(self._views[cache])]
            planned[batch].append(Span(cache, epoch, view, row_P[begin:end]))
        return [tuple(spans) for spans in planned]


def first_windows(
    caches: Sequence[Cache],
    *,
    split: str,
    windows: int,
    batch: int,
    rank: int = 0,
    ranks: int = 1,
    space: Space = "raw",
    device: torch.device | str = "cpu",
    threads: int | None = None,
    ahead: bool = False,
) -> Iterator[Batch]:
    """The first windows of a split, once, under its first view: at most `windows` of all caches.

    Rows were shuffled when the cache was planned, so these are a random sample of the split. Each
    cache gives its share. The last batch may be smaller. Rank r of R gets every R-th batch. `ahead`
    has mirrors bring them ahead of need, and forget what else was to come.
    """
    assert 0 <= rank < ranks
    require_alike(caches, space=space)
    for cache in caches:
        require_split(cache, split)
    views = [cache.views(split)[0] for cache in caches]
    counts = [cache.rows(split) for cache in caches]
    total = sum(counts)
    windows = min(windows, total)
    # Rounding the running sum gives each cache its share and the sum exactly.
    ends = [sum(counts[: i + 1]) * windows // total for i in range(len(counts))]
    plans = []
    for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        if ahead:
            count = -(-(end - first) // caches[i].plan.part)
            caches[i].coming([Part(split, views[i], number) for number in range(count)])
        for row in range(0, end - first, batch):
            rows = np.arange(row, min(row + batch, end - first), dtype=np.int64)
            plans.append((Span(i, 0, views[i], rows),))
    feed = Feed(
        caches,
        split=split,
        plans=enumerate(plans[rank::ranks]),
        windows=batch,
        space=space,
        device=torch.device(device),
        prefetch=64 << 20,
        threads=threads,
    )
    try:
        while (read := feed.batch()) is not None:
            yield read
    finally:
        feed.close()


def require_alike(caches: Sequence[Cache], *, space: Space) -> None:
    """Refuse caches that cannot be streamed together: CacheMismatch names each differing key."""
    assert caches
    first = _meaning(caches[0], space)
    for i, cache in enumerate(caches[1:], start=1):
        if any(cache.id == other.id for other in caches[:i]):
            raise CacheMismatch(
                f"{cache.path}: the same cache is given twice (id {cache.id[:12]}); name it once"
            )
        other = _meaning(cache, space)
        differing = [key for key in first if first[key] != other[key]]
        if differing:
            lines = [f"  {key}   {first[key]} and {other[key]}" for key in differing]
            raise CacheMismatch(
                "\n".join(
                    [f"{caches[0].path} and {cache.path} cannot be trained on together:", *lines]
                )
                + "\nGive caches that agree in these."
            )


def _meaning(cache: Cache, space: Space) -> dict[str, object]:
    plan = cache.plan
    meaning: dict[str, object] = {
        "teacher.name": plan.teacher.name,
        "teacher.revision": plan.teacher.revision,
        "teacher.weights_sha256": plan.teacher.weights_sha256,
        "teacher.settings_sha256": plan.teacher.settings_sha256,
        "teacher.layer": plan.teacher.layer,
        "teacher.input": plan.teacher.input,
        "teacher.channels": plan.teacher.channels,
        "windows.kmers": plan.windows.kmers,
        "windows.masked": plan.windows.masked,
        "windows.store": plan.windows.store,
        "codec": plan.codec,
        "licence": plan.licence,
    }
    if plan.codec == "exact":  # stores the type that the teacher computes in
        meaning["teacher.dtype"] = plan.teacher.dtype
    if space == "normalised":
        meaning["statistics"] = plan.statistics
    return meaning


def require_split(cache: Cache, split: str) -> None:
    """Refuse a cache without windows in a split: CacheMismatch names those it has."""
    splits = cache.plan.splits
    if split not in splits or splits[split].windows == 0:
        have = ", ".join(f"{name} ({splits[name].windows} windows)" for name in splits)
        raise CacheMismatch(
            f"{cache.path}: no window in split {split!r}; it has {have or 'none'}. "
            "Name one of these, or extract a cache with that split"
        )


def _opened(cache: Cache | Path | str, closing: ExitStack) -> Cache:
    if isinstance(cache, Cache):
        return cache
    opened = open_cache(cache)
    closing.callback(opened.close)
    return opened


def _combined(how: Callable[[Any, Any], Any], *stats: Any) -> Any:
    """Dataclasses of numbers, field by field; None of nothing."""
    if not stats or any(one is None for one in stats):
        return None
    first, *others = stats
    if not others:
        return first
    if not is_dataclass(first):
        return functools.reduce(how, others, first)
    kind: Any = type(first)
    names = [field.name for field in fields(first)]
    return kind(**{name: _combined(how, *map(attrgetter(name), stats)) for name in names})
