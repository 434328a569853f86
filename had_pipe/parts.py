"""A teacher at work on one planned cache: part after part embedded, and written behind it.

A part needs the cache and the teacher, nothing else: what to embed was planned. Which parts to
make, and who else is at it, is the caller's to know; a lease passed in is given back with the
commit.

B windows of a batch.
"""

from __future__ import annotations

import enum
import json
import queue
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from had_pipe.batches import (
    Arrival,
    SideStream,
    embed_batch,
    finite_windows,
    first_without,
    fit_batch,
    halved,
    in_short,
    like,
    on_cuda,
    out_of_memory,
    side_stream,
    to_numpy,
)
from had_pipe.cache import Cache, Part, Plan, integrity, layout, writer
from had_pipe.cache.layout import Receipt
from had_pipe.durable import storage, sync_folder, write_file
from had_pipe.errors import CacheError, CacheMismatch, NonFiniteError, StorageError
from had_pipe.hold import Lease
from had_pipe.teachers.teacher import Teacher

# Parts in work at once: what a kill costs, and memory. Hashing takes the time, and a part is hashed
# in one go: two parts, two cores. A GPU embeds a part while a disk syncs one: a third there.
_AT_ONCE = 2
_AT_ONCE_ON_CUDA = 3

_WAITING_BATCHES = 4  # of a part, embedded and not yet written
_LOOK_SECONDS = 0.2

_NUMERICS = "numerics.json"
_THREADS = " (OMP_NUM_THREADS sets the threads; Dask's own workers want MKL_NUM_THREADS as well)"

Numerics = Mapping[str, str | int]
"""A class of arithmetic: the teacher's, and the batch that it is shown windows in."""


def lease_of(cache: Path, part: Part) -> Lease:
    """Whoever makes a part should hold this. Receipts decide; a lease only saves double work."""
    return Lease(cache / layout.WORK / "leases" / f"{part.stem}.lock")


def lock_of(cache: Path, what: str) -> Lease:
    """The lease on what is done once for the whole cache: "plan" or "seal"."""
    return Lease(cache / layout.WORK / f"{what}.lock")


@dataclass(frozen=True)
class _Batch:
    """Some windows of a part on their way to the host."""

    first: int
    """Row of the first, in the part."""
    windows: int
    last: bool
    """Whether the part is whole with it."""
    arrival: Arrival
    """Of which windows are finite (B), then one array (B, ...) per signal, as it is stored."""


class _End(enum.Enum):
    """Why no more batches of a part come."""

    STOPPED = enum.auto()
    AGAIN = enum.auto()
    """They come once more, all of them, and whoever holds the part goes on holding it."""


_Batches = queue.Queue[_Batch | _End]
"""Batches of one part on their way to the disk."""


class PartMaker:
    """Embeds parts of one cache and commits them, the writing hidden behind the next forward pass.

    A context: leaving it commits what was embedded whole, and discards the rest. Threads may share
    it: one embeds at a time, the others' parts are written meanwhile. On a GPU the thread that
    embeds only hands out work: what comes of a batch travels beside the next ones, and whoever
    writes it waits for it.
    """

    def __init__(self, cache: Path, teacher: Teacher, *, at_once: int | None = None) -> None:
        """Raises CacheMismatch where teacher or class of arithmetic are not the cache's, and
        StorageError where the teacher's device has too little memory."""
        self._cache = Cache.open(cache, incomplete=True)
        with storage(cache):
            sync_folder(cache)  # whoever just renamed the plan may not have come to it
        self.plan = self._cache.plan
        check_teacher_of(cache, self.plan, teacher)
        self._teacher = teacher
        self.at_once = at_once or (_AT_ONCE_ON_CUDA if on_cuda(teacher) else _AT_ONCE)
        """Parts that should be begun before one is committed, and that are written at a time."""
        self.numerics = _settled_numerics(cache, self.plan, teacher)
        """The class of arithmetic that the receipts state."""
        self._bound = False
        """Whether nobody can change that any more."""
        self._embedding = threading.Lock()
        self._begun: set[Part] = set()
        self._leases: set[str] = set()
        """Names of those that were handed in and not yet given back."""
        self._statistics: tuple[Any, Any] | None = None
        self._side: SideStream | None = None
        self._pool = ThreadPoolExecutor(self.at_once, thread_name_prefix="had-pipe writer")

    def __enter__(self) -> PartMaker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)

    def make(
        self, part: Part, lease: Lease | None = None, tick: Callable[[int], None] = lambda _: None
    ) -> Future[Receipt | None]:
        """Embed a part now; its receipt once it is committed, None where the lease was lost.

        `tick` is told the windows of every batch, and takes them back where the part begins again,
        in smaller batches. Raises whatever stopped an earlier batch of this part from being
        written, CacheMismatch as the constructor, and StorageError where the device runs out of
        memory; NonFiniteError comes from here or with the result.
        """
        if lease is not None:
            self._leases.add(lease.path.name)
        with self._embedding:
            while (written := self._embedded(part, lease, tick)) is None:
                pass
            return written

    def _embedded(
        self, part: Part, lease: Lease | None, tick: Callable[[int], None]
    ) -> Future[Receipt | None] | None:
        """None where it is to be done again, in batches that fit."""
        batches: _Batches = queue.Queue(_WAITING_BATCHES)
        written: Future[Receipt | None] | None = None
        told = 0
        try:
            self._bind()
            self._begun.add(part)
            written = self._pool.submit(self._write, part, lease, batches)
            for batch in self._stored(part):
                if not _put(batches, batch, written):
                    break  # what ended its writer comes with the result
                told += batch.windows
                tick(batch.windows)
        except BaseException as error:
            end = _End.STOPPED
            try:
                if written is not None and out_of_memory(error) and self._halve(lease):
                    end = _End.AGAIN
            finally:
                if written is None:  # a signal came while the writer's thread was being started
                    batches.put_nowait(end)
                    self._give_back(lease)
                else:
                    _put(batches, end, written)
            if end is _End.AGAIN:
                assert written is not None
                written.result()
                tick(-told)
                return None
            if out_of_memory(error):
                raise StorageError(self._too_much(part, error)) from error
            raise
        return written

    def _bind(self) -> None:
        """Once, a part's lease in hand, which keeps all others from changing the class."""
        if not self._bound:
            self.numerics = _settled_numerics(self._cache.path, self.plan, self._teacher)
            self._bound = True

    @property
    def _batch(self) -> int:
        return int(self.numerics["batch"])

    def _halve(self, lease: Lease | None) -> bool:
        """Go on in half the batch, if nothing was made in whole ones and nobody is about to."""
        if len(self._begun) > 1 or self._batch == 1:
            return False
        cache = self._cache.path
        with waiting(lock_of(cache, "plan")):
            if lease is not None and lease.lost:  # to somebody who makes this part in whole ones
                return False
            if integrity.numerics_class(cache, self.plan) or _at_work(cache, but=self._leases):
                return False
            smaller = {**self.numerics, "batch": halved(self._batch, self.plan.part)}
            _note_numerics(cache, smaller)
            self.numerics = smaller
        return True

    def _too_much(self, part: Part, error: BaseException) -> str:
        stays = "; parts are made or being made in these, so they stay" if self._batch > 1 else ""
        return (
            f"{self._cache.path}: the device ran out of memory at {part}, in batches of "
            f"{self._batch} ({in_short(error)}){stays}. Everything committed so far is intact; end "
            "what else runs on the device, then run the same command again, there or on a device "
            "of the same kind with more room"
        )

    def _stored(self, part: Part) -> Iterator[_Batch]:
        cache, plan = self._cache, self.plan
        kmer_id, mask, reverse = cache.seen(part)
        for first in range(0, len(kmer_id), self._batch):
            some = slice(first, first + self._batch)
            embedding = embed_batch(
                self._teacher,
                kmer_id[some],
                mask[some],
                reverse[some],
                store=plan.windows.store,
                shown=plan.teacher.input,
                batch=self._batch,
            )
            if self._statistics is None:
                self._statistics = like(cache.mean, embedding), like(cache.std, embedding)
                self._side = side_stream(embedding)
            finite = finite_windows(embedding)
            if self._side is None:
                self._check_finite(part, first, to_numpy(finite))
            value, scale = cache.codec.encode(embedding, *self._statistics)
            arrays = [finite, value] if scale is None else [finite, value, scale]
            yield _Batch(
                first=first,
                windows=len(kmer_id[some]),
                last=first + self._batch >= len(kmer_id),
                arrival=_arrived(arrays) if self._side is None else self._side.send(arrays),
            )

    def _check_finite(self, part: Part, first: int, finite: Any) -> None:
        bad = first_without(finite)
        if bad is not None:
            _refuse_window(self._cache, part, part.number * self.plan.part + first + bad)

    def _write(self, part: Part, lease: Lease | None, batches: _Batches) -> Receipt | None:
        cache = self._cache.path
        again = False
        try:
            if lease is not None:
                writer.clear_temporaries(cache, part)
            with writer.PartWriter(cache, self.plan, part, numerics=self.numerics) as out:
                whole = False
                while not whole:
                    batch = batches.get()
                    if isinstance(batch, _End):
                        again = batch is _End.AGAIN
                        return None
                    finite, *stored = batch.arrival()
                    self._check_finite(part, batch.first, finite)
                    out.append(*stored)
                    whole = batch.last
                out.sync()
                # Whoever slept so long that others took over must not touch what they committed.
                if lease is not None and lease.lost:
                    return None
                return out.commit()
        except FileNotFoundError:
            if lease is not None and lease.lost:  # whoever took it over swept our temporaries away
                return None
            raise
        finally:
            if not again:
                self._give_back(lease)

    def _give_back(self, lease: Lease | None) -> None:
        if lease is not None:
            self._leases.discard(lease.path.name)  # from now on it may be another's
            lease.release()


def _arrived(arrays: list[Any]) -> Arrival:
    """What is on the host already."""
    here = [to_numpy(array) for array in arrays]
    return lambda: here


def _put(batches: _Batches, item: _Batch | _End, written: Future[Receipt | None]) -> bool:
    """Hand on a batch, unless its writer has ended."""
    while not written.done():
        try:
            batches.put(item, timeout=_LOOK_SECONDS)
        except queue.Full:
            continue
        return True
    return False


def _refuse_window(cache: Cache, part: Part, row: int) -> None:
    locus = cache.locus(part.split, row)
    end = locus.start + cache.plan.windows.bases
    raise NonFiniteError(
        f"the teacher gives NaN or infinity for {locus.genome} {locus.contig}:{locus.start}-{end} "
        f"(0-based, half-open), window {row} of {part.split}, view {part.view}. Parts before it "
        "are kept; look at the teacher's weights, layer and arithmetic"
    )


# One teacher, one class of arithmetic


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """What differs between a cache and this process, both values of each; empty where nothing."""
    return "; ".join(
        f"{key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in dict.fromkeys([*here, *there])
        if there.get(key) != here.get(key)
    )


def check_teacher_of(cache: Path, plan: Plan, teacher: Teacher) -> None:
    """Raises CacheMismatch where a teacher is not the one the cache was planned for."""
    mine = {
        "weights_sha256": teacher.weights_sha256,
        "settings_sha256": teacher.settings_sha256,
        "layer": teacher.layer,
        "channels": teacher.channels,
        "dtype": teacher.dtype,
    }
    if said := differences({key: getattr(plan.teacher, key) for key in mine}, mine):
        raise CacheMismatch(
            f"{cache}: it was planned for another teacher ({said}); take that one, or another "
            "[cache] path"
        )


def batch_of(found: Numerics, teacher: Teacher, *, part: int) -> int | None:
    """The batch of a class of arithmetic; None where that is not this teacher's class."""
    batch = found.get("batch")
    one_class = {**teacher.numerics, "batch": batch} == dict(found)
    return batch if one_class and isinstance(batch, int) and 1 <= batch <= part else None


def batch_to_plan_with(
    cache: Path, like: Plan | None, teacher: Teacher, *, kmers: int, part: int
) -> int:
    """The batch to calibrate in, for whoever holds the lease on planning.

    That of the parts of a plan which is made once more; else as many windows as fit now, noted:
    where there is no plan, what an earlier attempt noted binds nobody, and may be why it failed.
    """
    if like is None:
        return int(_newly_noted(cache, teacher, kmers=kmers, part=part)["batch"])
    batch = None
    with suppress(CacheError):  # it is planned again because something is damaged
        found = integrity.numerics_class(cache, like)
        batch = None if found is None else batch_of(found, teacher, part=part)
    return fit_batch(teacher, kmers=kmers, part=part) if batch is None else batch


def _settled_numerics(cache: Path, plan: Plan, teacher: Teacher) -> Numerics:
    """The cache's class of arithmetic, its batch taken over; this teacher's where it has none."""
    kmers, part = plan.windows.kmers, plan.part
    found = integrity.numerics_class(cache, plan)
    while found is None:
        # Whoever had to wait may find parts, or all of them, and `.work/` swept away.
        with waiting(lock_of(cache, "plan")), suppress(FileNotFoundError):
            found = integrity.numerics_class(cache, plan) or _noted_numerics(
                cache, teacher, kmers=kmers, part=part
            )
    if batch_of(found, teacher, part=part) is None:
        here = {**teacher.numerics, "batch": found.get("batch")}
        said = differences(found, here) or f"batch: there {here['batch']!r}, here 1 to {part}"
        raise CacheMismatch(
            f"{cache}: its parts are made by another class of arithmetic ({said}); one cache holds "
            "one class only: continue where it was begun, or start again at another path"
            + (_THREADS if "threads" in said else "")
        )
    return found


def _noted_numerics(cache: Path, teacher: Teacher, *, kmers: int, part: int) -> Numerics:
    """The class that was noted before there were parts, or else this teacher's, noted."""
    note = cache / layout.WORK / _NUMERICS
    if note.is_file():
        noted: Numerics = json.loads(layout.read_small(note))
        # Those of another class may have gone before they made anything.
        if batch_of(noted, teacher, part=part) is not None or _at_work(cache):
            return noted
    return _newly_noted(cache, teacher, kmers=kmers, part=part)


def _newly_noted(cache: Path, teacher: Teacher, *, kmers: int, part: int) -> Numerics:
    batch = fit_batch(teacher, kmers=kmers, part=part)
    numerics = {**teacher.numerics, "batch": batch}
    _note_numerics(cache, numerics)
    return numerics


def _note_numerics(cache: Path, numerics: Numerics) -> None:
    note = cache / layout.WORK / _NUMERICS
    write_file(note, layout.canonical_json(dict(numerics)), aside=note.parent)


def _at_work(cache: Path, *, but: Collection[str] = ()) -> bool:
    """Whether somebody holds a part, `but` for leases of these names."""
    for path in (cache / layout.WORK / "leases").glob("*.lock"):
        if path.name in but:
            continue
        lease = Lease(path)
        if not lease.take():
            return True
        lease.release()
    return False


@contextmanager
def waiting(lease: Lease, look: Callable[[Lease], None] = lambda _: None) -> Iterator[None]:
    """Hold a lease until the block ends; `look` is called, again and again, until it is free."""
    pause = threading.Event()
    while not lease.take():
        look(lease)
        pause.wait(_LOOK_SECONDS)
    try:
        yield
    finally:
        lease.release()
