"""`had-pipe plan`: what stage one would make and cost, told before anything is made."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from had_pipe import corpus
from had_pipe.cache import Plan, Statistics, integrity, layout
from had_pipe.cache.reader import expected_keys
from had_pipe.dna.kmers import K
from had_pipe.dna.windows import REST
from had_pipe.durable import free_nbytes
from had_pipe.errors import CacheMismatch
from had_pipe.extract import check_free_for_us, not_finite
from had_pipe.job import (
    Job,
    batch_windows,
    check_same,
    check_teacher,
    describe,
    described_teacher,
    given_statistics,
)
from had_pipe.progress import Reporter, silent
from had_pipe.recipe import Recipe, Windows
from had_pipe.teachers.teacher import Teacher

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


def survey(
    recipe: Recipe, *, device: str = "auto", offline: bool = False, report: Reporter = silent
) -> Survey:
    """What extraction would make and cost; writes nothing.

    Raises RecipeError, InputError, NetworkError, CacheError.
    """
    asked = Job.of(recipe)
    check_free_for_us(asked.cache.path)
    references = [corpus.read_reference(genome, report=report) for genome in asked.genomes]
    coverage = corpus.survey_windows(references, asked.windows)
    teacher = asked.load(device, offline)
    check_teacher(teacher, asked.windows)
    given = given_statistics(asked, teacher)
    plans = {
        codec: _outline(asked, references, coverage, teacher, codec) for codec in ("int8", "exact")
    }
    plan = plans[asked.cache.codec]
    views = {name: len(split.views) for name, split in plan.splits.items()}
    windows = sum(count * views[name] for name, count in coverage.windows.items())
    batch = batch_windows(teacher, asked)
    rate = _probe(teacher, asked.windows, batch, windows)
    return Survey(
        cache=asked.cache.path,
        state=_state(asked, references, teacher, given),
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
        parts=sum(1 for _ in plan.parts()),
        files=len(expected_keys(plan)) + 1,  # and the manifest
        codec=asked.cache.codec,
        nbytes={codec: _array_nbytes(outline) for codec, outline in plans.items()},
        free_nbytes=free_nbytes(asked.cache.path),
        windows_per_second=rate,
        batch=batch,
        seconds=windows / rate,
        licence=asked.cache.licence or teacher.licence,
        notes=_notes(asked, teacher, needed=_array_nbytes(plan)),
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
    return Plan.model_validate(
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
    total = 2 * (4 * plan.teacher.channels + crc)
    for split in plan.splits.values():
        chunks = -(-split.windows // plan.part)
        of_view = plan.part * kmers + crc + plan.part + crc
        total += chunks * (2 * plan.part * kmers + crc + len(split.views) * of_view)
    return total + plan.shards_nbytes(plan.parts())


def _probe(teacher: Teacher, windows: Windows, batch: int, available: int) -> float:
    """Windows a second of the teacher alone, on random k-mers, for a few seconds at most."""
    kmers = windows.kmers
    kmer_id = np.random.default_rng(0).integers(0, 4**K, (batch, kmers), dtype=np.uint16)
    hidden = np.zeros((batch, kmers), dtype=np.bool_)
    not_finite(teacher.embed(kmer_id, hidden))  # the first call sets up, and must end
    begun, done = time.monotonic(), 0
    while done < available and (spent := time.monotonic() - begun) < _PROBE_SECONDS:
        not_finite(teacher.embed(kmer_id, hidden))
        done += batch
    spent = time.monotonic() - begun
    return done / max(spent, 1e-9)


def _state(
    asked: Job,
    references: Sequence[corpus.Reference],
    teacher: Teacher,
    given: Statistics | None,
) -> str:
    path = asked.cache.path
    if not (path / layout.PLAN).exists():
        return "new"
    try:
        plan = check_same(path, describe(asked, references, teacher), given)
    except CacheMismatch:
        return "another recipe's: extract-teacher refuses it"
    if (path / layout.MANIFEST).exists():
        return "finished"
    total = sum(1 for _ in plan.parts())
    return f"begun: {total - len(integrity.missing_parts(path, plan)):,} of {total:,} parts"


def _notes(asked: Job, teacher: Teacher, *, needed: int) -> list[str]:
    notes = []
    free = free_nbytes(asked.cache.path)
    if needed > free:
        notes.append(
            f"too little room: {needed / 1e9:,.2f} GB are needed, {free / 1e9:,.2f} GB are free; "
            "extract-teacher refuses to begin"
        )
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
