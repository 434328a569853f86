"""Stage one: a teacher over genomes into a cache, continued after any stop.

The plan is made first, by one process, and written before any embedding: after it, parts need only
the cache and the teacher. Any number of processes work on one cache at once: each takes a lease on
a part, makes it, and goes on to the next; receipts alone tell which parts exist, and whoever sees
the last one seals. Students, streams and training are none of its business.

W windows of a batch, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from had_pipe import corpus
from had_pipe.batches import embed_batch, enough_memory, not_finite, to_numpy
from had_pipe.cache import Cache, Part, Plan, Statistics, integrity, layout, writer
from had_pipe.cache.codec import calibrate, sample_groups
from had_pipe.cache.layout import Receipt
from had_pipe.durable import free_files, free_nbytes, make_folder, storage
from had_pipe.errors import (
    CacheCorrupt,
    CacheRefused,
    Interrupted,
    NonFiniteError,
    RecipeError,
    StorageError,
)
from had_pipe.hold import Lease, Share
from had_pipe.job import (
    Job,
    check_knowledge,
    check_same,
    check_teacher,
    describe,
    given_statistics,
)
from had_pipe.parts import PartMaker, batch_to_plan_with, lease_of, lock_of, waiting
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.teachers.teacher import Teacher

_LOOK_SECONDS = 0.5  # between two looks at parts that others are making
_LISTING_SECONDS = 5.0  # between two listings of all receipts, to tell how far everybody is


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What a call of `extract` found and made."""

    path: Path
    cache_id: str | None
    """None while parts are missing."""
    windows: int
    """Windows of the cache, views counted apart."""
    parts_made: int
    """By this call."""
    parts_left: int
    """Of the whole cache, that nobody has made yet."""
    parts_total: int
    nbytes: int
    """Of the finished cache; of its shards, while parts are missing."""
    seconds: float
    """Spent on the parts made in this call."""
    windows_per_second: float
    fidelity: Mapping[str, float]


def extract(
    recipe: Recipe,
    *,
    device: str = "auto",
    offline: bool = False,
    repair: bool = False,
    share: Share | None = None,
    stopping: Callable[[], bool] = lambda: False,
    report: Reporter = silent,
    teacher: Teacher | None = None,
) -> ExtractSummary:
    """Make the recipe's cache, or continue it, or help others with it, or say that nothing is left.

    With a `share` only its parts are made, and the cache is sealed if these were the last. `repair`
    hashes every finished part first and makes those again that are not what was written. Once
    `stopping` says so, the parts in work are finished and Interrupted is raised. `teacher` stands
    in for the recipe's, for people whose teacher is a Python object.
    Raises any HadPipeError; whatever was committed stays.
    """
    asked = Job.of(recipe)
    path = asked.path
    if repair and share is not None:
        raise RecipeError(
            "--repair reads the whole cache, and N shares would read it N times: repair without "
            "--share; others may help then to make what is missing, with --share or without"
        )
    if teacher is None:
        teacher = asked.load(device, offline)
    plan = ensure_plan(asked, teacher, repair=repair, report=report)
    made, windows, seconds = 0, 0, 0.0
    if not (path / layout.MANIFEST).exists():
        begun = time.monotonic()
        made, windows = _make_parts(path, plan, teacher, share, stopping, report)
        seconds = time.monotonic() - begun
    seal_if_whole(path, plan, report=report)
    return summary(path, made=made, windows=windows, seconds=seconds)


def parts_of(plan: Plan, share: Share | None) -> list[Part]:
    """The parts of a share, or all."""
    parts = list(plan.parts())
    return parts if share is None else parts[share.number - 1 :: share.of]


# Making the plan


def ensure_plan(
    asked: Job, teacher: Teacher, *, repair: bool = False, report: Reporter = silent
) -> Plan:
    """The recipe's plan on disk: made here, or by whoever came first, and then held against it.

    With `repair`, receipts of damaged parts, and the seal, are taken back as well.
    """
    path = asked.path
    check_teacher(teacher, asked.windows)
    references = [corpus.read_reference(genome, report=report) for genome in asked.genomes]
    described = describe(asked, references, teacher)
    given = given_statistics(asked, teacher)
    if (path / layout.PLAN).exists():
        plan = check_same(path, described, given)
        if not repair:
            return plan
    check_free_for_us(path)
    try:
        make_folder(path)
    except FileNotFoundError as error:
        raise StorageError(
            f"{path}: no folder can be made there; use another [cache] path"
        ) from error
    begun = time.monotonic()

    def waited(lease: Lease) -> None:
        report(
            Progress(
                what=f"waiting for {lease.holder}, which is planning",
                done=0,
                total=1,
                unit="plan",
                seconds=time.monotonic() - begun,
            )
        )

    def make(cache: Path, like: Plan | None = None) -> Plan:
        return _make_plan(cache, asked, references, teacher, described, given, like, report)

    lease = lock_of(path, "plan")
    while True:
        with waiting(lease, waited):
            if not (path / layout.PLAN).exists():
                try:
                    make(path)
                except OSError:
                    if not lease.lost:
                        raise
                    continue  # slept, and whoever took over swept its files away
            plan = check_same(path, described, given)
            if repair:
                _repair(path, plan, partial(make, like=plan), report)
            return plan


def _make_plan(
    path: Path,
    asked: Job,
    references: Sequence[corpus.Reference],
    teacher: Teacher,
    described: Mapping[str, Any],
    given: Statistics | None,
    like: Plan | None,
    report: Reporter,
) -> Plan:
    """Windows, masks and calibration, written as the plan; `like` is the plan it once was."""
    splits = corpus.lay_out(references, asked.windows)
    split = "train" if "train" in splits else max(splits, key=lambda s: len(splits[s].kmer_id))
    if (asked if like is None else like).teacher.unchecked:
        described = {**described, "teacher": {**described["teacher"], "unchecked": True}}
    elif like is None:
        check_knowledge(teacher, splits[split].kmer_id, splits[split].mask[0], report)
    # Rows are in random order, so the first ones are a random sample.
    batch = batch_to_plan_with(
        asked.path, like, teacher, kmers=asked.windows.kmers, part=asked.cache.part
    )
    sample = _sample(asked, teacher, splits[split], batch, given is not None, report)
    found = calibrate(asked.cache.codec, cast(Any, teacher.dtype), sample, given=given)
    return writer.create(
        path,
        described=described,
        splits=splits,
        statistics=found.statistics,
        fidelity=found.fidelity,
        codebook=found.codec.codebook,
    )


def _sample(
    asked: Job,
    teacher: Teacher,
    data: writer.SplitData,
    batch: int,
    given: bool,
    report: Reporter,
) -> npt.NDArray[np.float32]:
    """Embeddings (W, G, D) of the first rows of a split, for calibration and fidelity."""
    groups = sample_groups(asked.cache.codec, given=given)
    windows = min(len(data.kmer_id), -(-groups // asked.windows.stored))
    begun, sample = time.monotonic(), []
    for first in range(0, windows, batch):
        some = slice(first, min(first + batch, windows))
        with enough_memory(f"calibrating in batches of {batch} windows"):
            embedding = embed_batch(
                teacher,
                data.kmer_id[some],
                data.mask[0][some],
                data.reversed[0][some],
                store=asked.windows.store,
                shown=asked.teacher.input,
                batch=batch,
            )
            bad = not_finite(embedding)
        if bad is not None:
            table, row = data.table, first + bad
            raise NonFiniteError(
                f"the teacher gives NaN or infinity for the window at "
                f"{table.contigs[table.contig[row]]}:{table.start[row]} (0-based), while "
                "calibrating; look at its weights, layer and arithmetic"
            )
        sample.append(to_numpy(embedding).astype(np.float32))
        report(
            Progress(
                what="calibrating",
                done=some.stop,
                total=windows,
                unit="windows",
                seconds=time.monotonic() - begun,
            )
        )
    return np.concatenate(sample)


# Making parts


def _make_parts(
    path: Path,
    plan: Plan,
    teacher: Teacher,
    share: Share | None,
    stopping: Callable[[], bool],
    report: Reporter,
) -> tuple[int, int]:
    """Make what is missing of a share, along with whoever else is at it: parts and windows made."""
    mine = parts_of(plan, share)
    left = [part for part in mine if not _there(path, part)]
    check_room(path, plan, left)
    tally = _Tally(path, plan, mine, left, report)
    with PartMaker(path, teacher) as maker:
        in_work: deque[Future[Receipt | None]] = deque()
        leases: dict[Part, Lease] = {}
        while left:
            before = tally.parts
            for part in left:
                while in_work and (
                    in_work[0].done() or len(in_work) >= maker.at_once or stopping()
                ):
                    tally.committed(in_work.popleft().result())
                if stopping():
                    missing = len(integrity.missing_parts(path, plan))
                    raise Interrupted(
                        f"{path}: stopped after the parts in work; {missing:,} of "
                        f"{plan.part_count:,} are still to be made: run the same command again"
                    )
                if _there(path, part):
                    continue
                check_room(path, plan, [part])
                lease = leases.setdefault(part, lease_of(path, part))
                try:
                    taken = lease.take()
                except BaseException:  # a signal, perhaps with the lease in hand
                    lease.release()
                    raise
                if not taken:
                    continue  # asked again later: this is how a silent holder is found out
                del leases[part]
                if _there(path, part):
                    lease.release()
                    continue
                in_work.append(maker.make(part, lease, partial(tally.embedded, part)))
            while in_work:
                tally.committed(in_work.popleft().result())
            left = [part for part in left if not _there(path, part)]
            if left and tally.parts == before:
                tally.waiting_for(left, leases)
                time.sleep(_LOOK_SECONDS)
    return tally.parts, tally.windows


class _Tally:
    """What has become of a process's parts, made by it and by others, told as it goes."""

    def __init__(
        self, path: Path, plan: Plan, mine: Sequence[Part], left: Sequence[Part], report: Reporter
    ) -> None:
        self._path, self._plan, self._mine, self._report = path, plan, mine, report
        self._total = self._windows(mine)
        self._begun = self._total - self._windows(left)
        self._embedded = 0
        self._by_others = 0
        self._since = self._looked = time.monotonic()
        self.parts = 0
        self.windows = 0

    def embedded(self, part: Part, windows: int) -> None:
        self._embedded += windows
        if time.monotonic() - self._looked > _LISTING_SECONDS:
            self._look_around()
        self._tell("extracting", {"part": str(part)})

    def committed(self, receipt: Receipt | None) -> None:
        if receipt is not None:
            self.parts += 1
            self.windows += receipt.windows

    def waiting_for(self, left: Sequence[Part], leases: Mapping[Part, Lease]) -> None:
        part = left[0]
        who = leases[part].holder if part in leases else "another process"
        self._look_around()
        self._tell("waiting", {"for": f"{who} at {part}"})

    def _look_around(self) -> None:
        missing = set(integrity.missing_parts(self._path, self._plan))
        there = self._windows(part for part in self._mine if part not in missing)
        self._by_others = max(0, there - self._begun - self.windows)
        self._looked = time.monotonic()

    def _windows(self, parts: Iterable[Part]) -> int:
        return sum(self._plan.part_windows(part) for part in parts)

    def _tell(self, what: str, facts: Mapping[str, str]) -> None:
        done = self._begun + self._by_others + self._embedded
        self._report(
            Progress(
                what=what,
                # What is embedded and already there as well, made by others, counts once.
                done=min(done, self._total),
                begun=self._begun,
                total=self._total,
                unit="windows",
                seconds=time.monotonic() - self._since,
                facts=facts,
            )
        )


def _there(path: Path, part: Part) -> bool:
    return (path / part.receipt_key).is_file()


def seal_if_whole(path: Path, plan: Plan, *, report: Reporter = silent) -> bool:
    """Seal the cache once every part is there; one process does it, the others wait for it."""
    if not (path / layout.MANIFEST).exists():
        if integrity.missing_parts(path, plan):
            return False
        with waiting(lock_of(path, "seal")):
            if not (path / layout.MANIFEST).exists():
                integrity.seal(path, report=report)
    # Also where somebody was killed between sealing and tidying up.
    integrity.clear_work(path)
    return True


# Around it: room, repair


def check_free_for_us(path: Path) -> None:
    """A folder that holds something else is not made into a cache."""
    above = next(folder for folder in (path, *path.parents) if folder.exists())
    if not above.is_dir():
        raise CacheRefused(f"{above}: not a folder; use another [cache] path")
    if above != path or (path / layout.PLAN).exists():
        return
    # What planning leaves when it is killed.
    ours = {layout.WORK, layout.DATA, layout.WINDOWS} if (path / layout.WORK).is_dir() else set()
    strangers = sorted({entry.name for entry in path.iterdir()} - ours)
    if strangers:
        raise CacheRefused(
            f"{path}: not empty and no cache (it holds {', '.join(strangers[:3])}); use another "
            "[cache] path"
        )


def check_room(path: Path, plan: Plan, parts: Sequence[Part]) -> None:
    """Raises StorageError where the file system cannot take some parts."""
    needed, free = plan.shards_nbytes(parts), free_nbytes(path)
    if needed > free:
        raise StorageError(
            f"{path}: {needed:,} bytes are still to be written, {free:,} are free. Everything "
            "committed so far is intact; make room, then run the same command again"
        )
    files, free_now = len(parts) * (len(plan.signals) + 1), free_files(path)
    if free_now is not None and files > free_now:
        raise StorageError(
            f"{path}: {files:,} files are still to be made, the file system has room for "
            f"{free_now:,} (its inodes are used up). Everything committed so far is intact; remove "
            "files or take another file system, then run the same command again"
        )


def _repair(path: Path, plan: Plan, plan_again: Callable[[Path], Plan], report: Reporter) -> None:
    """Take back the receipts of parts that are not what was written; mend what was planned."""
    try:
        layout.read_manifest(path, plan)
    except CacheRefused:
        # It follows from the receipts, so it need not be mended: sealing writes it again.
        integrity.forget(path, ())
    found = integrity.verify(path, report=report).problems
    # Our own lock lies in .work/ while a sealed cache, which has none, is being mended.
    problems = [problem for problem in found if problem.key.split("/")[0] != layout.WORK]
    parts, beyond = integrity.damaged_parts(plan, problems)
    if any(integrity.is_planned(plan, problem) for problem in beyond):
        _mend_planned(path, plan, plan_again)
        found = integrity.verify(path, level="structure", report=report).problems
        _, beyond = integrity.damaged_parts(
            plan, [problem for problem in found if problem.key != layout.WORK]
        )
    if beyond:
        raise CacheCorrupt(
            f"{path}: what extraction cannot mend is damaged too: "
            + "; ".join(str(problem) for problem in beyond[:3])
        )
    if parts:
        # Whoever is sealing has seen their receipts.
        with waiting(lock_of(path, "seal")):
            integrity.forget(path, parts)


def _mend_planned(path: Path, plan: Plan, plan_again: Callable[[Path], Plan]) -> None:
    """Put objects made at plan time, made once more, in the place of those that differ."""
    aside = path / layout.WORK / "again"
    with storage(aside):
        if aside.exists():  # a killed repair left it, perhaps one that calibrates otherwise
            shutil.rmtree(aside)
    try:
        remade = plan_again(aside)
        if remade.id != plan.id:
            raise CacheCorrupt(
                f"{path}: what was made at plan time is damaged, and planning again gives another "
                "plan (another kind of device, or other versions, calibrate otherwise); copy these "
                "objects again, or repair where the cache was made"
            )
        integrity.restore_planned(path, plan, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def summary(path: Path, *, made: int, windows: int, seconds: float) -> ExtractSummary:
    """What stands at the end of a call that made so many parts and windows."""
    cache = Cache.open(path, incomplete=True)
    plan = cache.plan
    missing = [] if cache.sealed else integrity.missing_parts(path, plan)
    return ExtractSummary(
        path=path,
        cache_id=cache.id if cache.sealed else None,
        windows=sum(plan.part_windows(part) for part in plan.parts()),
        parts_made=made,
        parts_left=len(missing),
        parts_total=plan.part_count,
        nbytes=cache.nbytes
        if cache.sealed
        else plan.shards_nbytes(plan.parts()) - plan.shards_nbytes(missing),
        seconds=seconds,
        windows_per_second=windows / seconds if seconds else 0.0,
        fidelity=cache.fidelity,
    )
