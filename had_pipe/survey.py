"""`had-pipe plan`: what stage one would make and cost, told before anything is made.

A short probe of the teacher on real windows tells how long it would take, and what each codec
would lose of these very embeddings.

W windows, G stored groups per window, D channels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from had_pipe import corpus
from had_pipe.batches import embed_batch, enough_memory, fit_batch, not_finite, to_numpy
from had_pipe.cache import Part, Plan, Statistics, integrity, layout
from had_pipe.cache.codec import CodecName, calibrate
from had_pipe.cache.reader import expected_keys
from had_pipe.dna.windows import REST
from had_pipe.durable import free_files, free_nbytes
from had_pipe.errors import CacheError, CacheMismatch, InputError, NonFiniteError, RecipeError
from had_pipe.extract import check_free_for_us
from had_pipe.job import (
    Job,
    check_knowledge,
    check_same,
    check_teacher,
    describe,
    described_teacher,
    given_statistics,
)
from had_pipe.parts import batch_of
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.teachers.knowledge import Knowledge, windows_of_use
from had_pipe.teachers.teacher import Teacher

_PROBE_SECONDS = 5.0

# What codecs are fitted to and tested on: about so many stored groups, and for fitting at least so
# many times the channels, or what is measured says more of the sample than of the codec.
_SAMPLED_GROUPS = 1 << 13
_LEAST_GROUPS_A_CHANNEL = 8

CODECS: tuple[CodecName, ...] = get_args(CodecName)


@dataclass(frozen=True, kw_only=True)
class CodecCost:
    """What a cache would cost with one codec, and lose."""

    group_nbytes: float
    """Of one stored group."""
    nbytes: int
    """All arrays of the finished cache. Receipts, metadata and the table of windows come on top: a
    few ten bytes a window."""
    below_float16: float
    """How many times fewer bytes than every value as float16."""
    fidelity: Mapping[str, float] | None
    """Measured on this teacher and this genome; None where the probe saw too few groups."""


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
    """All files of the finished cache, with the recipe's codec."""
    codec: str
    codecs: Mapping[str, CodecCost]
    probed_groups: int
    """Stored groups of real windows that the probe embedded for the codecs."""
    needed_groups: int
    """How many of them would have told what the codecs lose."""
    free_nbytes: int
    free_files: int | None
    """How many more the file system takes; None where it sets no limit."""
    windows_per_second: float
    """Of the teacher alone, from a probe on this device."""
    batch: int
    """Windows shown to the teacher at once: those of a cache already begun, or as many as fit."""
    seconds: float
    licence: str
    licence_implies: str
    knowledge: Knowledge | None
    """What the teacher knows of hidden 6-mers here; None where it was not asked, or too little."""
    notes: Sequence[str]


def survey(
    recipe: Recipe, *, device: str = "auto", offline: bool = False, report: Reporter = silent
) -> Survey:
    """What extraction would make and cost; writes nothing.

    Raises RecipeError, InputError, NetworkError, CacheError.
    """
    asked = Job.of(recipe)
    check_free_for_us(asked.path)
    references = [corpus.read_reference(genome, report=report) for genome in asked.genomes]
    teacher = asked.load(device, offline)
    check_teacher(teacher, asked.windows)
    wanted = max(
        -(-_SAMPLED_GROUPS // asked.windows.stored), _least_windows(asked.windows.stored, teacher)
    )
    kmers, masked = asked.windows.kmers, asked.windows.masked
    coverage = corpus.survey_windows(
        references,
        asked.windows,
        sample=max(wanted, windows_of_use(kmers=kmers, hidden=masked)),
    )
    given = given_statistics(asked, teacher)
    plan = _outline(asked, references, coverage, teacher, asked.cache.codec)
    plans = {asked.cache.codec: plan}
    for codec in CODECS:
        with suppress(RecipeError):  # too many channels for it, or too long a window
            plans[codec] = _outline(asked, references, coverage, teacher, codec)
    views = {name: len(split.views) for name, split in plan.splits.items()}
    windows = sum(count * views[name] for name, count in coverage.windows.items())
    state, left = _state(asked, references, teacher, given)
    batch = _batch_there(asked.path, teacher) if left is not None else None
    if batch is None:
        batch = fit_batch(teacher, kmers=asked.windows.kmers, part=asked.cache.part)
    probe = _probe(asked, teacher, coverage.sample.first(2 * wanted), batch, windows, report)
    losses = _losses(probe.sample, list(plans), teacher, given, report)
    known, doubts = _asked_for_hidden(asked, teacher, coverage.sample, report)
    files = len(expected_keys(plan)) + 1  # and the manifest
    costs = {name: _cost(outline, losses.get(name)) for name, outline in plans.items()}
    if left is None:
        needed, needed_files = costs[asked.cache.codec].nbytes, files
    else:
        needed, needed_files = plan.shards_nbytes(left), len(left) * (len(plan.signals) + 1)
    return Survey(
        cache=asked.path,
        state=state,
        teacher=described_teacher(teacher, asked.teacher),
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
        parts=plan.part_count,
        files=files,
        codec=asked.cache.codec,
        codecs=dict(sorted(costs.items(), key=lambda cost: -cost[1].group_nbytes)),
        probed_groups=len(probe.sample) * asked.windows.stored,
        needed_groups=_least_windows(asked.windows.stored, teacher) * asked.windows.stored,
        free_nbytes=free_nbytes(asked.path),
        free_files=free_files(asked.path),
        windows_per_second=probe.windows_per_second,
        batch=batch,
        seconds=windows / probe.windows_per_second,
        licence=asked.cache.licence or teacher.licence,
        licence_implies=_implied(asked.cache.licence or teacher.licence),
        knowledge=known,
        notes=[*doubts, *_notes(asked, needed=needed, files=needed_files)],
    )


def _outline(
    asked: Job,
    references: Sequence[corpus.Reference],
    coverage: corpus.Coverage,
    teacher: Teacher,
    codec: str,
) -> Plan:
    """The plan that extraction would write, without the digests of what it has yet to make."""
    views = {name: asked.windows.views if name == REST else 1 for name in coverage.windows}
    return Plan.new(
        {
            **describe(asked, references, teacher),
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
    total = sum(
        int(np.prod(shape)) * np.dtype(dtype).itemsize + crc
        for dtype, shape in plan.statistics_arrays.values()
    )
    for split in plan.splits.values():
        chunks = -(-split.windows // plan.part)
        of_view = plan.part * kmers + crc + plan.part + crc
        total += chunks * (2 * plan.part * kmers + crc + len(split.views) * of_view)
    return total + plan.shards_nbytes(plan.parts())


def _cost(plan: Plan, lost: Mapping[str, float] | None) -> CodecCost:
    group = sum(signal.nbytes for signal in plan.signals) / plan.windows.stored
    return CodecCost(
        group_nbytes=group,
        nbytes=_array_nbytes(plan),
        below_float16=2 * plan.teacher.channels / group,
        fidelity=lost,
    )


# The probe


@dataclass(frozen=True)
class _Probe:
    windows_per_second: float
    sample: npt.NDArray[np.float32]
    """(W, G, D), of windows from all over the genomes."""


def _probe(
    asked: Job,
    teacher: Teacher,
    shown: corpus.Shown,
    batch: int,
    available: int,
    report: Reporter,
) -> _Probe:
    """The teacher alone on real windows, for a few seconds at most; their embeddings are kept."""

    def embed(first: int) -> Any:
        some = slice(first, first + batch)
        with enough_memory(f"probing {teacher.name} in batches of {batch} windows"):
            embedding = embed_batch(
                teacher,
                shown.kmer_id[some],
                shown.mask[some],
                shown.reversed[some],
                store=asked.windows.store,
                shown=asked.teacher.input,
                batch=batch,
            )
            bad = not_finite(embedding)  # asking also waits for the device
        if bad is not None:
            raise NonFiniteError(
                f"{teacher.name} gives NaN or infinity for windows of these genomes; look at its "
                "weights, layer and arithmetic"
            )
        return embedding

    embed(0)  # the first call sets up
    kept: list[npt.NDArray[np.float32]] = []
    first, done, seconds, over = 0, 0, 0.0, False
    while not over:
        begun = time.monotonic()
        embedding = embed(first)
        seconds += time.monotonic() - begun
        done += batch
        if len(kept) * batch < len(shown):
            kept.append(to_numpy(embedding).astype(np.float32))
        first += batch
        if first >= len(shown):
            first = 0
        over = done >= available or seconds >= _PROBE_SECONDS
        report(
            Progress(
                what="probing the teacher",
                done=done,
                total=done if over else 0,
                unit="windows",
                seconds=seconds,
            )
        )
    return _Probe(done / max(seconds, 1e-9), np.concatenate(kept))


def _least_windows(stored: int, teacher: Teacher) -> int:
    """Windows without which nothing is said of the codecs: for fitting, and a third for tests."""
    fitted = -(-_LEAST_GROUPS_A_CHANNEL * teacher.channels // stored)
    return fitted + max(1, fitted // 3)


def _losses(
    sample_WGD: npt.NDArray[np.float32],
    codecs: Sequence[CodecName],
    teacher: Teacher,
    given: Statistics | None,
    report: Reporter,
) -> dict[str, Mapping[str, float]]:
    """What every codec loses of embeddings it was not fitted to; empty where there are too few."""
    windows, stored, _ = sample_WGD.shape
    if windows < _least_windows(stored, teacher):
        return {}
    begun = time.monotonic()
    losses: dict[str, Mapping[str, float]] = {}
    for name in codecs:
        losses[name] = calibrate(name, cast(Any, teacher.dtype), sample_WGD, given=given).fidelity
        report(
            Progress(
                what="trying codecs",
                done=len(losses),
                total=len(codecs),
                unit="codecs",
                seconds=time.monotonic() - begun,
            )
        )
    return losses


def _asked_for_hidden(
    asked: Job, teacher: Teacher, shown: corpus.Shown, report: Reporter
) -> tuple[Knowledge | None, list[str]]:
    """What the teacher knows of this DNA, or why extraction would not take it."""
    if asked.teacher.unchecked:
        return None, []
    try:
        return check_knowledge(teacher, shown.kmer_id, shown.mask, report), []
    except (InputError, NonFiniteError) as error:
        return None, [f"extract-teacher refuses to begin: {error}"]


def _state(
    asked: Job,
    references: Sequence[corpus.Reference],
    teacher: Teacher,
    given: Statistics | None,
) -> tuple[str, Sequence[Part] | None]:
    """How far the cache is, and the parts still to be made; None where it is not this recipe's."""
    path = asked.path
    if not (path / layout.PLAN).exists():
        return "new", None
    try:
        plan = check_same(path, describe(asked, references, teacher), given)
    except CacheMismatch:
        return "another recipe's: extract-teacher refuses it", None
    if (path / layout.MANIFEST).exists():
        return "finished", ()
    total = plan.part_count
    left = integrity.missing_parts(path, plan)
    return f"begun: {total - len(left):,} of {total:,} parts", left


def _batch_there(path: Path, teacher: Teacher) -> int | None:
    """The batch that the parts of this recipe's cache are made in, where they are of our class."""
    plan, _ = layout.read_plan(path)
    with suppress(CacheError):  # a receipt is damaged
        found = integrity.numerics_class(path, plan)
        return None if found is None else batch_of(found, teacher, part=plan.part)
    return None


# What it implies


_PERMISSIVE = {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "CC0-1.0", "ISC", "Unlicense"}

_CLAUSES = {
    "BY": "name the authors",
    "NC": "no commercial use",
    "ND": "adapted versions are not passed on",
    "SA": "adapted versions only under the same licence",
}


def _implied(licence: str) -> str:
    """What a licence asks of whoever passes the cache or a student on."""
    parts = licence.split("-")
    if parts[0] == "CC" and len(parts) > 1 and parts[1] == "BY":
        asked = [said for clause, said in _CLAUSES.items() if clause in parts]
        said = "; ".join(asked)
        if "NC" in parts:
            said += (
                ". Whether embeddings are adaptations of a model is unsettled: the cache and every "
                "student made from it are marked non-commercial like the teacher"
            )
        return said
    if licence in _PERMISSIVE:
        return "any use, commercial too; its text and notices go along"
    if licence == "unknown":
        return "the teacher states no licence; find out before you share the cache"
    return "not one known here: read it before you share the cache"


def _notes(asked: Job, *, needed: int, files: int) -> list[str]:
    notes = []
    free, places = free_nbytes(asked.path), free_files(asked.path)
    if needed > free:
        notes.append(
            f"too little room: {needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free; "
            "extract-teacher refuses to begin"
        )
    if places is not None and files > places:
        notes.append(
            f"too few inodes: {files:,} files are to be made, the file system takes {places:,} "
            "more; extract-teacher refuses to begin. Larger parts ([cache] part) are fewer files"
        )
    if asked.windows.stride < asked.windows.bases:
        times = math.ceil(asked.windows.bases / asked.windows.stride)
        notes.append(f"windows overlap: a base is seen up to {times} times a view")
    if any(genome.sensitive for genome in asked.genomes):
        notes.append("a genome is marked sensitive: the cache holds its k-mers; do not share it")
    return notes
