"""Stage one: a teacher over genomes into a cache, continued after any stop.

The plan is made first, under a lock, and written before any embedding: after it, parts need only
the cache and the teacher. One part after another is embedded in batches of one fixed shape, while
a thread hashes and writes what came before. Receipts alone tell which parts exist. Students,
streams and training are none of its business.

W windows of a batch, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import math
import queue
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from had_pipe import corpus
from had_pipe.cache import Cache, Codec, Part, Plan, Statistics, integrity, layout, writer
from had_pipe.cache.codec import fidelity
from had_pipe.cache.reader import expected_keys
from had_pipe.dna.kmers import K, reverse_complement
from had_pipe.dna.windows import REST
from had_pipe.errors import (
    CacheCorrupt,
    CacheMismatch,
    CacheRefused,
    NonFiniteError,
    RecipeError,
    StorageError,
)
from had_pipe.hold import held
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Cache as CacheRecipe
from had_pipe.recipe import Genome, Recipe, Windows
from had_pipe.recipe import Teacher as TeacherRecipe
from had_pipe.teachers.teacher import Teacher, load_teacher

# Calibration: the channels' mean and std are then known to about half a percent of a std.
_CALIBRATION_GROUPS = 1 << 15
_HELD_OUT_GROUPS = 1 << 13

# A batch is large enough to keep the device busy and small enough for its memory.
_WINDOWS_ON_CPU = 16
_KMERS_ON_CUDA = 1 << 15

_WAITING_BATCHES = 4  # embedded, not yet written
_PROBE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What stage one would make and cost."""

    cache: Path
    state: str
    """"new", how far the cache at that path is, or that it is another recipe's."""
    teacher: Mapping[str, str | int | None]
    genomes: Sequence[Mapping[str, Any]]
    windows: Mapping[str, int]
    """By split."""
    views: Mapping[str, int]
    """By split."""
    covered_bases: Mapping[str, int]
    """Bases in at least one window, by split; splits share none."""
    dropped_bases: Mapping[str, int]
    """Bases in no window, by reason."""
    other_letters: Mapping[str, int]
    kmers: int
    """K-mers the teacher reads: windows, times views, times k-mers a window."""
    stored_groups: int
    channels: int
    parts: int
    files: int
    """All files of the finished cache."""
    codec: str
    nbytes: Mapping[str, int]
    """By codec: all arrays of the finished cache. Receipts, metadata and the table of windows come
    on top: a few ten bytes a window."""
    free_nbytes: int
    windows_per_second: float
    """Of the teacher alone, from a probe on this device."""
    batch: int
    seconds: float
    licence: str
    notes: Sequence[str]


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


def survey(
    recipe: Recipe, *, device: str = "auto", offline: bool = False, report: Reporter = silent
) -> Survey:
    """What extraction would make and cost; writes nothing.

    Raises RecipeError, InputError, NetworkError.
    """
    asked = _Asked.of(recipe)
    references = [corpus.read_reference(genome, report=report) for genome in asked.genomes]
    coverage = corpus.survey_windows(references, asked.windows)
    teacher = asked.load(device, offline)
    _check_teacher(teacher, asked.windows)
    plans = {
        codec: _outline(asked, references, coverage, teacher, codec) for codec in ("int8", "exact")
    }
    plan = plans[asked.cache.codec]
    views = {name: len(split.views) for name, split in plan.splits.items()}
    windows = sum(count * views[name] for name, count in coverage.windows.items())
    batch = _batch(teacher, asked)
    rate = _probe(teacher, asked.windows, batch, windows)
    return Survey(
        cache=asked.cache.path,
        state=_state(asked, references, teacher),
        teacher=_described_teacher(teacher, asked.teacher),
        genomes=[reference.described for reference in references],
        windows=coverage.windows,
        views=views,
        covered_bases=coverage.bases,
        dropped_bases=coverage.dropped,
        other_letters={
            letter: sum(reference.other.get(letter, 0) for reference in references)
            for letter in sorted({x for reference in references for x in reference.other})
        },
        kmers=windows * asked.windows.kmers,
        stored_groups=windows * asked.windows.stored,
        channels=teacher.channels,
        parts=sum(1 for _ in plan.parts()),
        files=len(expected_keys(plan)) + 1,  # and the manifest
        codec=asked.cache.codec,
        nbytes={codec: _array_nbytes(outline) for codec, outline in plans.items()},
        free_nbytes=_free_nbytes(asked.cache.path),
        windows_per_second=rate,
        batch=batch,
        seconds=windows / rate,
        licence=asked.cache.licence or teacher.licence,
        notes=_notes(asked, teacher),
    )


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
    asked = _Asked.of(recipe)
    path = asked.cache.path
    references = [corpus.read_reference(genome, report=report) for genome in asked.genomes]
    if teacher is None:
        teacher = asked.load(device, offline)
    _check_teacher(teacher, asked.windows)
    described = _described(asked, references, teacher)
    given = _given_statistics(asked, teacher)
    if (path / layout.MANIFEST).exists() and not repair:
        _check_same(path, described, given)
        if (path / layout.WORK).exists():  # killed between sealing and tidying up
            with _held(path):
                integrity.clear_work(path)
        return _summary(path, made=0, windows=0, seconds=0.0)
    _check_free_for_us(path)
    with _held(path):
        writer.clear_temporaries(path)
        if (path / layout.PLAN).exists():
            plan = _check_same(path, described, given)
        else:
            plan = _make_plan(asked, references, teacher, described, given, report)
        if repair:
            _repair(path, plan, report)
        if (path / layout.MANIFEST).exists():
            integrity.clear_work(path)
            return _summary(path, made=0, windows=0, seconds=0.0)
        parts = integrity.missing_parts(path, plan)
        numerics = {**teacher.numerics, "batch": _batch(teacher, asked)}
        _check_numerics(path, plan, numerics)
        _check_space(path, plan, parts)
        begun = time.monotonic()
        windows = _make_parts(path, plan, parts, teacher, numerics, report)
        seconds = time.monotonic() - begun
        integrity.seal(path, report=report)
    return _summary(path, made=len(parts), windows=windows, seconds=seconds)


# What is asked


@dataclass(frozen=True)
class _Asked:
    """The tables of a recipe that stage one needs, all there."""

    teacher: TeacherRecipe
    genomes: Sequence[Genome]
    windows: Windows
    cache: CacheRecipe

    @staticmethod
    def of(recipe: Recipe) -> _Asked:
        needed = {"teacher": recipe.teacher, "genome": recipe.genome, "windows": recipe.windows}
        for table, value in needed.items():
            if not value:
                name = f"[[{table}]]" if table == "genome" else f"[{table}]"
                raise RecipeError(
                    f"the recipe has no {name} table, which stage one needs; a recipe without it "
                    "can only distil from a finished cache"
                )
        assert recipe.teacher is not None
        assert recipe.windows is not None
        return _Asked(recipe.teacher, recipe.genome, recipe.windows, recipe.cache)

    def load(self, device: str, offline: bool) -> Teacher:
        return load_teacher(
            self.teacher.name,
            revision=self.teacher.revision,
            layer=self.teacher.layer,
            device=device,
            offline=offline,
        )


def _check_teacher(teacher: Teacher, windows: Windows) -> None:
    if teacher.k != K:
        raise RecipeError(f"[teacher] {teacher.name}: its k-mers have {teacher.k} bases, not {K}")
    if windows.kmers > teacher.context:
        raise RecipeError(
            f"[windows] bases = {windows.bases}: {windows.kmers:,} k-mers, but {teacher.name} sees "
            f"at most {teacher.context:,}; take windows of at most {teacher.context * K:,} bases"
        )


def _described(
    asked: _Asked, references: Sequence[corpus.Reference], teacher: Teacher
) -> dict[str, Any]:
    """The plan, but for what follows from the windows."""
    windows = asked.windows
    return {
        "format": layout.FORMAT,
        "genomes": [dict(reference.described) for reference in references],
        "windows": {
            "bases": windows.bases,
            "stride": windows.stride,
            "kmers": windows.kmers,
            "masked": windows.masked,
            "mask_ratio": windows.mask_ratio,
            "stored": windows.stored,
            "store": windows.store,
            "views": windows.views,
            "reverse_complement": windows.reverse_complement,
            "seed": windows.seed,
            "algorithm": 1,
        },
        "part": asked.cache.part,
        "teacher": _described_teacher(teacher, asked.teacher),
        "codec": asked.cache.codec,
        "licence": asked.cache.licence or teacher.licence,
        "licence_reason": asked.cache.licence_reason,
    }


def _described_teacher(teacher: Teacher, asked: TeacherRecipe) -> dict[str, str | int | None]:
    return {
        "name": teacher.name,
        "revision": teacher.revision,
        "weights_sha256": teacher.weights_sha256,
        "layer": teacher.layer,
        "input": asked.input,
        "channels": teacher.channels,
        "dtype": teacher.dtype,
        "licence": teacher.licence,
    }


def _check_same(path: Path, described: Mapping[str, Any], given: Statistics | None) -> Plan:
    """The plan on disk, if it means what the recipe asks. Raises CacheMismatch."""
    plan, _ = layout.read_plan(path)
    # Windows are numbered, and so masked, in the order of the genomes.
    here = {**plan.meaning, "genomes": [genome.name for genome in plan.genomes]}
    asked = {**layout.meaning(described), "genomes": [g["name"] for g in described["genomes"]]}
    if given is not None:
        here["statistics"] = plan.statistics
        asked["statistics"] = writer.statistics_digest(given)
    differing = [key for key in sorted({*here, *asked}) if here.get(key) != asked.get(key)]
    if differing:
        width = max(len(key) for key in differing)
        lines = [
            f"  {key:<{width}}  here {_short(here.get(key))}  recipe {_short(asked.get(key))}"
            for key in differing
        ]
        raise CacheMismatch(
            f"{path} was made from something else:\n" + "\n".join(lines) + "\n"
            "Use another [cache] path, or restore these values in the recipe."
        )
    return plan


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# Making the plan


def _make_plan(
    asked: _Asked,
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
    asked: _Asked, teacher: Teacher, data: writer.SplitData, given: bool, report: Reporter
) -> npt.NDArray[np.float32]:
    """Embeddings (W, G, D) of the first rows of a split, for calibration and fidelity."""
    groups = _HELD_OUT_GROUPS + (0 if given else _CALIBRATION_GROUPS)
    windows = min(len(data.kmer_id), -(-groups // asked.windows.stored))
    batch = _batch(teacher, asked)
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
        bad = _not_finite(embedding)
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


def _given_statistics(asked: _Asked, teacher: Teacher) -> Statistics | None:
    """Those of the recipe's other cache, if it names one; it must be of the same teacher."""
    if asked.cache.statistics is None:
        return None
    other = Cache.open(asked.cache.statistics, incomplete=True)
    mine = _described_teacher(teacher, asked.teacher)
    theirs = other.plan.teacher.model_dump(mode="json")
    differing = [key for key in mine if mine[key] != theirs[key]]
    if differing:
        said = "; ".join(f"{key}: there {theirs[key]!r}, here {mine[key]!r}" for key in differing)
        raise CacheMismatch(
            f"[cache] statistics: {other.path} is of another teacher ({said}), so its mean and std "
            "do not fit"
        )
    return Statistics(other.mean, other.std)


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
                bad = _not_finite(embedding)
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


def _not_finite(embedding: Any) -> int | None:
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


def _batch(teacher: Teacher, asked: _Asked) -> int:
    """Windows the teacher sees at once: one number for the whole cache."""
    on_cuda = str(teacher.numerics.get("device", "")).startswith("cuda")
    limit = _KMERS_ON_CUDA // asked.windows.kmers if on_cuda else _WINDOWS_ON_CPU
    return max(1, min(limit, asked.cache.part))


# Around it: locks, space, repair, estimates


def _held(path: Path) -> AbstractContextManager[None]:
    """The cache's lock."""
    return held(path, lock=f"{layout.WORK}/lock", doing="extracting into this cache")


def _check_free_for_us(path: Path) -> None:
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
    needed = _shard_nbytes(plan, parts)
    free = _free_nbytes(path)
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


def _outline(
    asked: _Asked,
    references: Sequence[corpus.Reference],
    coverage: corpus.Coverage,
    teacher: Teacher,
    codec: str,
) -> Plan:
    """The plan that extraction would write, without the digests of what it has yet to make."""
    views = {name: asked.windows.views if name == REST else 1 for name in coverage.windows}
    return Plan.model_validate(
        {
            **_described(asked, references, teacher),
            "codec": codec,
            "splits": {
                name: {"windows": count, "views": list(range(views[name]))}
                for name, count in coverage.windows.items()
            },
            "statistics": "0" * 64,
            "contents": {},
        }
    )


def _array_nbytes(plan: Plan) -> int:
    """All arrays of a finished cache; plan-time chunks are whole, as Zarr pads the last."""
    kmers, crc = plan.windows.kmers, layout.CRC_NBYTES
    total = 2 * (4 * plan.teacher.channels + crc)
    for split in plan.splits.values():
        chunks = -(-split.windows // plan.part)
        of_view = plan.part * kmers + crc + plan.part + crc
        total += chunks * (2 * plan.part * kmers + crc + len(split.views) * of_view)
    return total + _shard_nbytes(plan, plan.parts())


def _shard_nbytes(plan: Plan, parts: Iterable[Part]) -> int:
    return sum(
        layout.shard_nbytes(signal, windows=plan.part_windows(part), part=plan.part)
        for part in parts
        for signal in plan.signals
    )


def _probe(teacher: Teacher, windows: Windows, batch: int, available: int) -> float:
    """Windows a second of the teacher alone, on random k-mers, for a few seconds at most."""
    kmers = windows.kmers
    kmer_id = np.random.default_rng(0).integers(0, 4**K, (batch, kmers), dtype=np.uint16)
    hidden = np.zeros((batch, kmers), dtype=np.bool_)
    _not_finite(teacher.embed(kmer_id, hidden))  # the first call sets up, and must end
    begun, done = time.monotonic(), 0
    while done < available and (spent := time.monotonic() - begun) < _PROBE_SECONDS:
        _not_finite(teacher.embed(kmer_id, hidden))
        done += batch
    spent = time.monotonic() - begun
    return done / max(spent, 1e-9)


def _free_nbytes(path: Path) -> int:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _state(asked: _Asked, references: Sequence[corpus.Reference], teacher: Teacher) -> str:
    path = asked.cache.path
    if not (path / layout.PLAN).exists():
        return "new"
    try:
        plan = _check_same(
            path, _described(asked, references, teacher), _given_statistics(asked, teacher)
        )
    except CacheMismatch:
        return "another recipe's: extract-teacher refuses it"
    if (path / layout.MANIFEST).exists():
        return "finished"
    total = sum(1 for _ in plan.parts())
    return f"begun: {total - len(integrity.missing_parts(path, plan)):,} of {total:,} parts"


def _notes(asked: _Asked, teacher: Teacher) -> list[str]:
    notes = []
    licence = asked.cache.licence or teacher.licence
    if "NC" in licence.split("-"):
        notes.append(
            f"{licence}: whether embeddings are adaptations of a model is unsettled; the cache and "
            "every student made from it are marked non-commercial like the teacher"
        )
    if licence == "unknown":
        notes.append("the teacher states no licence; find out before you share the cache")
    if asked.windows.stride < asked.windows.bases:
        times = math.ceil(asked.windows.bases / asked.windows.stride)
        notes.append(f"windows overlap: a base is seen up to {times} times a view")
    if any(genome.sensitive for genome in asked.genomes):
        notes.append("a genome is marked sensitive: the cache holds its k-mers; do not share it")
    return notes
