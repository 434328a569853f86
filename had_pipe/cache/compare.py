"""Two caches held against each other: what they mean, what was planned, and what they hold.

For two labs that made the same cache, for a cache and what it was recoded to, for two codecs.
Nothing is modified; what is read is held against its CRC.

W windows of a block, G stored groups, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from had_pipe.cache import integrity
from had_pipe.cache.codec import STD_FLOOR
from had_pipe.cache.layout import Part
from had_pipe.cache.reader import Block, Cache, GroupLocus
from had_pipe.progress import Progress, Reporter, silent

_AT_ONCE = 1 << 18
"""Values of each cache decoded in one go."""


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the two caches."""

    path: Path
    cache_id: str
    """The plan id while it is not sealed."""
    sealed: bool
    codec: str
    numerics: Mapping[str, str | int] | None
    """The class of arithmetic its parts were made with; None where there is no part yet."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A key of the plan that differs; None where a plan lacks it."""

    key: str
    a: Any
    b: Any


@dataclass(frozen=True, kw_only=True)
class Values:
    """The embeddings of one split under one view. Errors are of b against a, as decoded."""

    split: str
    view: int
    windows: int
    """In both caches, of equal k-mers, mask and strand: only these are compared."""
    equal_windows: int
    """Of these, stored as the same bytes."""
    unlike_windows: int
    """In both caches, but of other k-mers, mask or strand."""
    only_in_a: int
    only_in_b: int
    relative: float
    """||a - b|| / ||a|| over all groups compared."""
    channel_rmse: float
    """A channel's root mean square error in units of its std in a, averaged over channels."""
    worst_channel_rmse: float
    worst_cosine: float
    """The least cosine of a stored group; 1 where nothing was compared."""
    worst_row: int | None
    worst_locus: GroupLocus | None
    """The group of the least cosine, where a group differs."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What `compare` found."""

    a: Side
    b: Side
    meaning: tuple[Difference, ...]
    """What a recipe decides, where the plans differ."""
    contents: tuple[Difference, ...]
    """Digests of windows, masks, strands and statistics that differ."""
    only_in_a: tuple[Part, ...]
    """Parts that have no counterpart in b."""
    only_in_b: tuple[Part, ...]
    values: tuple[Values, ...]

    @property
    def identical(self) -> bool:
        """Whether both are one cache, by their ids; sealed ones only."""
        return self.a.sealed and self.b.sealed and self.a.cache_id == self.b.cache_id

    @property
    def equal(self) -> bool:
        """Whether every window of each is in the other, stored as the same bytes."""
        whole = not (self.only_in_a or self.only_in_b or self.contents)
        return whole and all(
            found.equal_windows == found.windows
            and not (found.unlike_windows or found.only_in_a or found.only_in_b)
            for found in self.values
        )


def compare(a: Path, b: Path, *, report: Reporter = silent) -> Comparison:
    """Hold two caches against each other, finished or not, window by window.

    Windows are the same where split, row, k-mers, mask and strand are; others are counted, not
    compared. Raises CacheRefused or CacheCorrupt where one of them cannot be read.
    """
    left, right = (Cache.open(path, incomplete=True) for path in (a, b))
    rows = {side: _rows_made(side) for side in (left, right)}
    places = sorted({*rows[left], *rows[right]})
    none = np.zeros(0, dtype=np.bool_)
    begun, done = time.monotonic(), 0
    total = sum(
        int(_both(rows[left].get(at, none), rows[right].get(at, none)).sum()) for at in places
    )
    values = []
    for place in places:
        in_a, in_b = rows[left].get(place, none), rows[right].get(place, none)
        both = np.flatnonzero(_both(in_a, in_b))
        tally = _Tally(left, right, *place)
        for some in _pieces(both, left, right):
            tally.add(some)
            done += len(some)
            report(
                Progress(
                    what="comparing",
                    done=done,
                    total=total,
                    unit="windows",
                    seconds=time.monotonic() - begun,
                )
            )
        values.append(
            tally.values(
                only_in_a=int(in_a.sum()) - len(both), only_in_b=int(in_b.sum()) - len(both)
            )
        )
    return Comparison(
        a=_side(left),
        b=_side(right),
        meaning=_differences(left.plan.meaning, right.plan.meaning),
        contents=_differences(left.plan.contents, right.plan.contents),
        only_in_a=_unmatched(left, rows[right]),
        only_in_b=_unmatched(right, rows[left]),
        values=tuple(values),
    )


Place = tuple[str, int]
"""A split and a view of it."""


def _side(cache: Cache) -> Side:
    return Side(
        path=cache.path,
        cache_id=cache.id,
        sealed=cache.sealed,
        codec=cache.plan.codec,
        numerics=integrity.numerics_class(cache.path, cache.plan),
    )


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Difference, ...]:
    return tuple(
        Difference(key=key, a=a.get(key), b=b.get(key))
        for key in sorted({*a, *b})
        if a.get(key) != b.get(key)
    )


def _rows_made(cache: Cache) -> dict[Place, npt.NDArray[np.bool_]]:
    """Which rows of each split and view are there."""
    plan = cache.plan
    rows = {
        (split, view): np.zeros(of_split.windows, dtype=np.bool_)
        for split, of_split in plan.splits.items()
        for view in of_split.views
    }
    for part in _made(cache):
        first = part.number * plan.part
        rows[part.split, part.view][first : first + plan.part_windows(part)] = True
    return rows


def _made(cache: Cache) -> Iterable[Part]:
    """The parts that are there: by listing, since an unfinished cache may have few of many."""
    return cache.plan.parts() if cache.sealed else integrity.made_parts(cache.path, cache.plan)


def _both(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    shared = min(len(a), len(b))
    both: npt.NDArray[np.bool_] = a[:shared] & b[:shared]
    return both


def _unmatched(cache: Cache, other: Mapping[Place, npt.NDArray[np.bool_]]) -> tuple[Part, ...]:
    """The parts that are there and have no row in the other cache."""
    plan, found = cache.plan, []
    for part in _made(cache):
        rows = other.get((part.split, part.view), np.zeros(0, dtype=np.bool_))
        first = part.number * plan.part
        if not rows[first : first + plan.part_windows(part)].any():
            found.append(part)
    return tuple(found)


def _pieces(
    rows: npt.NDArray[np.int64], left: Cache, right: Cache
) -> Iterator[npt.NDArray[np.int64]]:
    """So many rows at a time that both caches' values of them fit well into memory."""
    largest = max(side.plan.windows.stored * side.plan.teacher.channels for side in (left, right))
    some = max(1, _AT_ONCE // largest)
    for first in range(0, len(rows), some):
        yield rows[first : first + some]


class _Tally:
    """Sums over the windows compared of one split and view."""

    def __init__(self, left: Cache, right: Cache, split: str, view: int) -> None:
        self._left, self._right, self._split, self._view = left, right, split, view
        mine, theirs = left.plan, right.plan
        self._comparable = all(
            getattr(mine.windows, key) == getattr(theirs.windows, key)
            for key in ("kmers", "stored", "store")
        ) and (mine.teacher.channels == theirs.teacher.channels)
        # Equal bytes then mean equal values.
        self._one_code = (mine.codec, mine.teacher.dtype) == (theirs.codec, theirs.teacher.dtype)
        self._one_code &= all(
            mine.contents.get(key) == theirs.contents.get(key)
            for key in {*mine.contents, *theirs.contents}
            if key.startswith("statistics/")
        )
        channels = mine.teacher.channels
        self._windows = self._equal = self._unlike = self._groups = 0
        self._error_D = np.zeros(channels)
        self._sum_D = np.zeros(channels)
        self._square_D = np.zeros(channels)
        self._norm = 0.0
        self._worst = (1.0, -1, -1)

    def add(self, rows: npt.NDArray[np.int64]) -> None:
        """Compare some windows."""
        if not self._comparable:
            self._unlike += len(rows)
            return
        a, b = self._read(self._left, rows), self._read(self._right, rows)
        alike = (a.kmer_id == b.kmer_id).all(axis=1) & (a.mask == b.mask).all(axis=1)
        alike &= a.reversed == b.reversed
        self._unlike += int((~alike).sum())
        self._windows += int(alike.sum())
        equal = alike & _equal_bytes(a.value, b.value)
        if a.scale is not None and b.scale is not None:
            equal &= _equal_bytes(a.scale, b.scale)
        self._equal += int(equal.sum())
        x = self._decode(self._left, a)[alike].astype(np.float64)
        if len(x) == 0:
            return
        offset = x - self._left.mean
        self._groups += x.shape[0] * x.shape[1]
        self._sum_D += offset.sum(axis=(0, 1))
        self._square_D += (offset**2).sum(axis=(0, 1))
        self._norm += float((x**2).sum())
        if self._one_code and equal[alike].all():
            return
        y = self._decode(self._right, b)[alike].astype(np.float64)
        self._error_D += ((y - x) ** 2).sum(axis=(0, 1))
        norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
        cosine = (x * y).sum(axis=-1) / np.maximum(norms, 1e-30)
        cosine[(x == y).all(axis=-1)] = 1.0  # also of a group that is 0
        cosine = np.nan_to_num(cosine, nan=-1.0)
        row, group = np.unravel_index(int(cosine.argmin()), cosine.shape)
        if cosine[row, group] < self._worst[0]:
            at = int(rows[np.flatnonzero(alike)[row]])
            self._worst = (float(cosine[row, group]), at, int(group))

    def values(self, *, only_in_a: int, only_in_b: int) -> Values:
        cosine, row, group = self._worst
        groups = max(1, self._groups)
        std = np.sqrt(np.maximum(self._square_D / groups - (self._sum_D / groups) ** 2, 0.0))
        std = np.maximum(std, max(STD_FLOOR * float(np.median(std)), 1e-12))
        channel = np.sqrt(self._error_D / groups) / std
        locus = None
        if row >= 0:
            locus = self._left.group_locus(self._split, row, view=self._view, group=group)
        return Values(
            split=self._split,
            view=self._view,
            windows=self._windows,
            equal_windows=self._equal,
            unlike_windows=self._unlike,
            only_in_a=only_in_a,
            only_in_b=only_in_b,
            relative=float(np.sqrt(self._error_D.sum() / max(self._norm, 1e-30))),
            channel_rmse=float(channel.mean()),
            worst_channel_rmse=float(channel.max()),
            worst_cosine=cosine,
            worst_row=row if row >= 0 else None,
            worst_locus=locus,
        )

    def _read(self, cache: Cache, rows: npt.NDArray[np.int64]) -> Block:
        block = cache.allocate(len(rows))
        cache.read(self._split, self._view, rows, block)
        return block

    def _decode(self, cache: Cache, block: Block) -> npt.NDArray[np.float32]:
        decoded: npt.NDArray[np.float32] = cache.codec.decode(
            block.value, block.scale, cache.mean, cache.std
        )
        return decoded


def _equal_bytes(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which windows (W, ...) hold the same bytes."""
    windows = len(a)
    if a.dtype != b.dtype or a.shape != b.shape:
        return np.zeros(windows, dtype=np.bool_)
    same: npt.NDArray[np.bool_] = (
        a.reshape(windows, -1).view(np.uint8) == b.reshape(windows, -1).view(np.uint8)
    ).all(axis=1)
    return same
