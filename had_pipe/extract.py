"""Stage one: a teacher over genomes into a cache, continued after any stop.

The plan is made first, under a lock, and written before any embedding: after it, parts need only
the cache and the teacher. One part after another is embedded in batches of one fixed shape, while
a thread hashes and writes what came before. Receipts alone tell which parts exist. Students,
streams and training are none of its business.

W windows of a batch, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from had_pipe import corpus
from had_pipe.cache import Cache, Codec, Part, Plan, Statistics, integrity, layout, writer
from had_pipe.cache.codec import fidelity
from had_pipe.dna.kmers import reverse_complement
from had_pipe.durable import free_nbytes
from had_pipe.errors import (
    CacheCorrupt,
    CacheMismatch,
    CacheRefused,
    NonFiniteError,
    StorageError,
)
from had_pipe.hold import held
from had_pipe.job import Job, batch_windows, check_same, check_teacher, describe, given_statistics
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.teachers.teacher import Teacher

# Calibration: the channels' mean and std are then known to about half a percent of a std.
_CALIBRATION_GROUPS = 1 << 15
_HELD_OUT_GROUPS = 1 << 13

_WAITING_BATCHES = 4  # embedded, not yet written


@dataclass(frozen=True, kw_only=True)
class ExtractSummary:
    """What a call of `extract` found and made."""

    path: Path
    cache_id: str
    windows: int
    """Windows of the cache, views counted apart."""
    parts_made: int
    parts_total: int
    nbytes: int
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
    report: Reporter = silent,
    teacher: Teacher | None = None,
) -> ExtractSummary:
    """Make the recipe's cache, or continue it, or say that nothing is left.

    `repair` hashes every finished part first and makes those again that are not what was written.
    `teacher` stands in for the recipe's, for people whose teacher is a Python object.
    Raises any HadPipeError; whatever was committed stays.
    """
    asked = Job.of(recipe)
    path = asked.cache.path
    references = [corpus.read_reference(genome, report=report) for genome in asked.genomes]
    if teacher is None:
        teacher = asked.load(device, offline)
    check_teacher(teacher, asked.windows)
    described = describe(asked, references, teacher)
    given = given_statistics(asked, teacher)
    if (path / layout.MANIFEST).exists() and not repair:
        check_same(path, described, given)
        if (path / layout.WORK).exists():  # killed between sealing and tidying up
            with _held(path):
                integrity.clear_work(path)
        return _summary(path, made=0, windows=0, seconds=0.0)
    check_free_for_us(path)
    with _held(path):
        writer.clear_temporaries(path)
        if (path / layout.PLAN).exists():
            plan = check_same(path, described, given)
        else:
            plan = _make_plan(asked, references, teacher, described, given, report)
        if repair:
            _repair(path, plan, report)
        if (path / layout.MANIFEST).exists():
            integrity.clear_work(path)
            return _summary(path, made=0, windows=0, seconds=0.0)
        parts = integrity.missing_parts(path, plan)
        numerics = {**teacher.numerics, "batch": batch_windows(teacher, asked)}
        _check_numerics(path, plan, numerics)
        _check_space(path, plan, parts)
        begun = time.monotonic()
        windows = _make_parts(path, plan, parts, teacher, numerics, report)
        seconds = time.monotonic() - begun
        integrity.seal(path, report=report)
    return _summary(path, made=len(parts), windows=windows, seconds=seconds)


# Making the plan


def _make_plan(
    asked: Job,
    references: Sequence[corpus.Reference],
    teacher: Teacher,
    described: Mapping[str, Any],
    given: Statistics | None,
    report: Reporter,
) -> Plan:
    """Windows, masks and calibration, written as the plan."""
    splits = corpus.lay_out(references, asked.windows)
    split = "train" if "train" in splits else max(splits, key=lambda s: len(splits[s].kmer_id))
    codec = Codec(asked.cache.codec, cast(Any, teacher.dtype))
    sample = _sample(asked, teacher, splits[split], given is not None, report)
    # Rows are in random order, so the first ones are a random sample, and the last of these are
    # windows that calibration has not seen.
    if given is not None:
        statistics, tested = given, sample
    else:
        held_out = max(1, min(len(sample) // 4, -(-_HELD_OUT_GROUPS // asked.windows.stored)))
        known = sample[:-held_out] if len(sample) > 1 else sample
        statistics, tested = Statistics.of(known), sample[-held_out:]
    decoded = tested
    if codec.name != "exact":
        stored = codec.encode(tested, statistics.mean, statistics.std)
        decoded = codec.decode(*stored, statistics.mean, statistics.std)
    return writer.create(
        asked.cache.path,
        described=described,
        splits=splits,
        statistics=statistics,
        fidelity=fidelity(tested, decoded),
    )


def _sample(
    asked: Job, teacher: Teacher, data: writer.SplitData, given: bool, report: Reporter
) -> npt.NDArray[np.float32]:
    """Embeddings (W, G, D) of the first rows of a split, for calibration and fidelity."""
    groups = _HELD_OUT_GROUPS + (0 if given else _CALIBRATION_GROUPS)
    windows = min(len(data.kmer_id), -(-groups // asked.windows.stored))
    batch = batch_windows(teacher, asked)
    begun, sample = time.monotonic(), []
    for first in range(0, windows, batch):
        some = slice(first, min(first + batch, windows))
        seen = _Seen.of(
            asked.windows.store,
            asked.teacher.input,
            data.kmer_id[some],
            data.mask[0][some],
            data.reversed[0][some],
        )
        embedding = _embed(teacher, seen, batch)
        bad = not_finite(embedding)
        if bad is not None:
            table, row = data.table, first + bad
            raise NonFiniteError(
                f"the teacher gives NaN or infinity for the window at "
                f"{table.contigs[table.contig[row]]}:{table.start[row]} (0-based), while "
                "calibrating; look at its weights, layer and arithmetic"
            )
        sample.append(_to_numpy(embedding).astype(np.float32))
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


@dataclass(frozen=True)
class _Seen:
    """What the teacher is shown of some windows, and which groups of it are kept."""

    kmer_id: npt.NDArray[np.uint16]
    """(W, T), on the strand of the view."""
    hidden: npt.NDArray[np.bool_]
    """(W, T)"""
    kept: npt.NDArray[np.int64]
    """(W, G)"""

    @staticmethod
    def of(
        store: str,
        shown: str,
        kmer_id: npt.NDArray[np.uint16],
        mask: npt.NDArray[np.bool_],
        reverse: npt.NDArray[np.bool_],
    ) -> _Seen:
        kept = {"visible": ~mask, "masked": mask, "all": np.ones_like(mask)}[store]
        return _Seen(
            kmer_id=np.where(reverse[:, None], reverse_complement(kmer_id), kmer_id),
            hidden=mask if shown == "masked" else np.zeros_like(mask),
            kept=np.nonzero(kept)[1].reshape(len(mask), -1),
        )


def _embed(teacher: Teacher, seen: _Seen, batch: int) -> Any:
    """Embeddings of the kept groups (W, G, D), on the teacher's device.

    A short batch is filled up with its last window, so that the teacher sees one shape only: on a
    GPU another shape may mean another kernel and other bits.
    """
    windows = len(seen.kmer_id)
    fill = np.minimum(np.arange(batch), windows - 1)
    embedding = teacher.embed(seen.kmer_id[fill], seen.hidden[fill])
    rows = np.arange(windows)[:, None]
    if isinstance(embedding, np.ndarray):
        return embedding[rows, seen.kept]
    import torch

    device = embedding.device
    return embedding[torch.from_numpy(rows).to(device), torch.from_numpy(seen.kept).to(device)]


def _make_parts(
    path: Path,
    plan: Plan,
    parts: Sequence[Part],
    teacher: Teacher,
    numerics: Mapping[str, str | int],
    report: Reporter,
) -> int:
    """Embed and commit parts, writing behind the forward pass; windows made."""
    cache = Cache.open(path, incomplete=True)
    batch = int(numerics["batch"])
    codec = cache.codec
    total = sum(plan.part_windows(part) for part in plan.parts())
    made, left = 0, sum(plan.part_windows(part) for part in parts)
    begun = time.monotonic()
    mean, std = None, None
    with _Behind(path, plan, numerics) as behind:
        for part in parts:
            first = part.number * plan.part
            rows = np.arange(first, first + plan.part_windows(part))
            kmer_id, mask, reverse = cache.seen(part)
            for start in range(0, len(rows), batch):
                some = slice(start, start + batch)
                seen = _Seen.of(
                    plan.windows.store,
                    plan.teacher.input,
                    kmer_id[some],
                    mask[some],
                    reverse[some],
                )
                embedding = _embed(teacher, seen, batch)
                if mean is None:
                    mean, std = _like(cache.mean, embedding), _like(cache.std, embedding)
                bad = not_finite(embedding)
                if bad is not None:
                    _refuse_window(cache, part, int(rows[start + bad]))
                value, scale = codec.encode(embedding, mean, std)
                stored = [_to_numpy(x) for x in (value, scale) if x is not None]
                behind.put(part, stored, last=start + batch >= len(rows))
                made += len(seen.kmer_id)
                report(
                    Progress(
                        what="extracting",
                        done=total - left + made,
                        begun=total - left,
                        total=total,
                        unit="windows",
                        seconds=time.monotonic() - begun,
                        facts={"part": str(part)},
                    )
                )
    return made


class _Behind:
    """Writes parts in a thread, in the order in which their batches come."""

    def __init__(self, path: Path, plan: Plan, numerics: Mapping[str, str | int]) -> None:
        self._path, self._plan, self._numerics = path, plan, numerics
        self._queue: queue.Queue[tuple[Part, list[Any], bool] | None] = queue.Queue(
            maxsize=_WAITING_BATCHES
        )
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="had-pipe writer", daemon=True)

    def __enter__(self) -> _Behind:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whether all went well or not, what is whole is committed and what is not is discarded.
        self._queue.put(None)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, part: Part, stored: list[Any], *, last: bool) -> None:
        """The next batch of a part; `last` commits it."""
        if self._error is not None:
            raise self._error
        self._queue.put((part, stored, last))

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not None:
                self._write_part(item)
        except BaseException as error:  # handed to the thread that extracts
            self._error = error
            # It may be waiting for room; what still comes is not written.
            while self._queue.get() is not None:
                pass

    def _write_part(self, item: tuple[Part, list[Any], bool] | None) -> None:
        assert item is not None
        part = item[0]
        with writer.PartWriter(self._path, self._plan, part, numerics=self._numerics) as out:
            while item is not None:
                _, stored, last = item
                out.append(*stored)
                if last:
                    out.commit()
                    return
                item = self._queue.get()
            self._queue.put(None)  # stopped in the middle of a part, which is discarded


def _refuse_window(cache: Cache, part: Part, row: int) -> None:
    locus = cache.locus(part.split, row)
    end = locus.start + cache.plan.windows.bases
    raise NonFiniteError(
        f"the teacher gives NaN or infinity for {locus.genome} {locus.contig}:{locus.start}-{end} "
        f"(0-based, half-open), window {row} of {part.split}, view {part.view}. Parts before it "
        "are kept; look at the teacher's weights, layer and arithmetic"
    )


def not_finite(embedding: Any) -> int | None:
    """The first window with NaN or infinity, or None."""
    if isinstance(embedding, np.ndarray):
        good = np.isfinite(embedding).all(axis=(1, 2))
    else:
        good = embedding.isfinite().flatten(1).all(1).cpu().numpy()
    return None if good.all() else int(np.argmin(good))


def _like(array: npt.NDArray[np.float32], embedding: Any) -> Any:
    """float32 values in the array library and on the device of `embedding`."""
    if isinstance(embedding, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array.copy()).to(embedding.device)


def _to_numpy(array: Any) -> npt.NDArray[Any]:
    if isinstance(array, np.ndarray):
        return array
    if str(array.dtype) == "torch.bfloat16":
        array = array.float()
    host: npt.NDArray[Any] = array.cpu().numpy()
    return host


# Around it: locks, space, repair


def _held(path: Path) -> AbstractContextManager[None]:
    """The cache's lock."""
    return held(path, lock=f"{layout.WORK}/lock", doing="extracting into this cache")


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


def _check_numerics(path: Path, plan: Plan, numerics: Mapping[str, str | int]) -> None:
    found = integrity.numerics_class(path, plan)
    if found is not None and dict(found) != dict(numerics):
        said = "; ".join(
            f"{key}: there {found.get(key)!r}, here {numerics.get(key)!r}"
            for key in sorted({*found, *numerics})
            if found.get(key) != numerics.get(key)
        )
        raise CacheMismatch(
            f"{path}: its parts were made by another class of arithmetic ({said}); one cache holds "
            "one class only: continue where it was begun, or start again at another path"
        )


def _check_space(path: Path, plan: Plan, parts: Sequence[Part]) -> None:
    needed = plan.shards_nbytes(parts)
    free = free_nbytes(path)
    if needed > free:
        raise StorageError(
            f"{path}: {needed / 1e9:,.2f} GB are still to be written, {free / 1e9:,.2f} GB are "
            "free. Everything committed so far is intact; make room, then run the same command "
            "again"
        )


def _repair(path: Path, plan: Plan, report: Reporter) -> None:
    """Take back the receipts of parts that are not what was written."""
    try:
        layout.read_manifest(path)
    except CacheRefused:
        # It follows from the receipts, so it need not be mended: sealing writes it again.
        integrity.forget(path, ())
    found = integrity.verify(path, report=report).problems
    # Our own lock lies in .work/ while a sealed cache, which has none, is being mended.
    problems = [problem for problem in found if problem.key.split("/")[0] != layout.WORK]
    parts, beyond = integrity.damaged_parts(plan, problems)
    if beyond:
        raise CacheCorrupt(
            f"{path}: what extraction cannot mend is damaged too: "
            + "; ".join(str(problem) for problem in beyond[:3])
        )
    if parts:
        integrity.forget(path, parts)


def _summary(path: Path, *, made: int, windows: int, seconds: float) -> ExtractSummary:
    cache = Cache.open(path)
    plan = cache.plan
    return ExtractSummary(
        path=path,
        cache_id=cache.id,
        windows=sum(plan.part_windows(part) for part in plan.parts()),
        parts_made=made,
        parts_total=sum(1 for _ in plan.parts()),
        nbytes=cache.nbytes,
        seconds=seconds,
        windows_per_second=windows / seconds if seconds else 0.0,
        fidelity=cache.fidelity,
    )
