"""From the recipe's genomes to everything a cache holds before the teacher runs.

Which windows there are, in which order they lie on disk, which groups each view masks and which
strand it sees. It knows neither teachers nor how anything is stored.

W windows, T k-mers per window.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from had_pipe.cache.writer import SplitData, WindowTable
from had_pipe.dna import kmers as dna
from had_pipe.dna.reference import Contig, collection_digest, read_contigs
from had_pipe.dna.windows import (
    REST,
    Region,
    SplitRule,
    Tiles,
    base_windows,
    check_contigs,
    read_bed,
    tile,
)
from had_pipe.draws import Purpose, permutation
from had_pipe.errors import InputError, RecipeError
from had_pipe.progress import Progress, Reporter
from had_pipe.recipe import Genome, Windows

_WINDOWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Reference:
    """One genome of the recipe, read through once and checked."""

    genome: Genome
    described: Mapping[str, Any]
    """What the plan says of it: docs/cache-format.md, plan.json."""
    contigs: Sequence[str]
    digests: Sequence[str]
    """Of each contig: the file is read again when windows are cut from it."""
    rule: SplitRule
    include: Sequence[Region] | None
    exclude: Sequence[Region]
    other: Mapping[str, int]
    """Letters that are not A, C, G, T, and how many of each."""


@dataclass(frozen=True)
class Shown:
    """Some windows as the teacher sees them in the first view."""

    kmer_id: npt.NDArray[np.uint16]
    """(W, T), forward strand."""
    mask: npt.NDArray[np.bool_]
    """(W, T), in the view's orientation."""
    reversed: npt.NDArray[np.bool_]
    """(W)"""

    def __len__(self) -> int:
        return len(self.kmer_id)

    def first(self, windows: int) -> Shown:
        return Shown(self.kmer_id[:windows], self.mask[:windows], self.reversed[:windows])


@dataclass(frozen=True)
class Coverage:
    """What tiling makes of the genomes, in numbers."""

    windows: Mapping[str, int]
    """By split."""
    bases: Mapping[str, int]
    """Bases in at least one window, by split."""
    dropped: Mapping[str, int]
    """Bases in no window, by reason."""
    sample: Shown
    """Windows from all over the genomes, in no order."""


def read_reference(genome: Genome, *, report: Reporter) -> Reference:
    """Read a genome through: its digest, its contigs, and how the recipe divides it."""
    begun = time.monotonic()
    found: list[tuple[str, int, str]] = []
    other: Counter[str] = Counter()
    nbytes = genome.path.stat().st_size if genome.path.is_file() else 0

    def tell(total: int) -> None:
        report(
            Progress(
                what=f"reading {genome.name}",
                done=len(found),
                total=total,
                unit="contigs",
                seconds=time.monotonic() - begun,
                facts={"file": f"{nbytes / 1e6:.1f} MB"},
            )
        )

    for contig in read_contigs(genome.path):
        found.append((contig.name, len(contig.base), contig.digest))
        other.update(contig.other)
        tell(0)  # how many there are is known at the end
    tell(len(found))
    digest = collection_digest(found)
    if genome.digest is not None and genome.digest != digest:
        raise InputError(
            f"{genome.path}: the sequence-collection digest is {digest}, but [[genome]] "
            f"{genome.name!r} expects {genome.digest}: this is another release of the genome, or "
            "its contigs are named otherwise; fetch the right file or mend the recipe"
        )
    names = [name for name, _, _ in found]
    rule = SplitRule.of(genome.splits).prepare([(name, length) for name, length, _ in found])
    include = None if genome.include is None else read_bed(genome.include)
    exclude = () if genome.exclude is None else read_bed(genome.exclude)
    check_contigs(include or (), names, what="include")
    check_contigs(exclude, names, what="exclude")
    return Reference(
        genome=genome,
        described={
            "name": genome.name,
            "digest": digest,
            "contigs": len(found),
            "bases": sum(length for _, length, _ in found),
            "splits": _described_splits(genome),
            "include": _bed_digest(genome.include),
            "exclude": _bed_digest(genome.exclude),
            "sensitive": genome.sensitive,
        },
        contigs=names,
        digests=[contig_digest for _, _, contig_digest in found],
        rule=rule,
        include=include,
        exclude=exclude,
        other=dict(other),
    )


def survey_windows(
    references: Sequence[Reference], windows: Windows, *, sample: int = 0
) -> Coverage:
    """Tile the genomes and count, keeping nothing but `sample` windows, or twice as many."""
    by_split: Counter[str] = Counter()
    bases: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    chosen = _Every(sample)
    for reference, _, contig, tiles in _tiles(references, windows):
        chosen.add(contig, tiles, windows)
        names = reference.rule.names
        for split, count in enumerate(np.bincount(tiles.split, minlength=len(names)).tolist()):
            by_split[names[split]] += count
        bases.update(tiles.split_bases)
        dropped.update(tiles.dropped)
    coverage = Coverage(
        windows={name: count for name, count in sorted(by_split.items()) if count},
        bases={name: bases[name] for name, count in sorted(by_split.items()) if count},
        dropped={reason: count for reason, count in dropped.items() if count},
        sample=chosen.shown(windows),
    )
    _check_any(references, windows, coverage.windows, coverage.dropped)
    return coverage


class _Every:
    """Every so-many-th window of a corpus whose end is not known yet: thinned out as more come."""

    def __init__(self, wanted: int) -> None:
        self._wanted = wanted
        self._apart = 1
        self._seen = 0
        self._kept: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]] = []

    def add(self, contig: Contig, tiles: Tiles, windows: Windows) -> None:
        index = np.arange(self._seen, self._seen + len(tiles.start))
        self._seen += len(index)
        if not self._wanted:
            return
        while len(self) + len(index) // self._apart > 2 * self._wanted:
            self._apart *= 2
            self._kept = [
                (had[had % self._apart == 0], kmer_id[had % self._apart == 0])
                for had, kmer_id in self._kept
            ]
        some = index % self._apart == 0
        if some.any():
            bases = base_windows(contig, tiles.start[some], windows.bases)
            self._kept.append((index[some], dna.encode_kmers(bases)))

    def __len__(self) -> int:
        return sum(len(index) for index, _ in self._kept)

    def shown(self, windows: Windows) -> Shown:
        """In no order, so that any of them stand for all."""
        count, none = len(self), np.empty((0, windows.kmers), dtype=np.uint16)
        index = [number for some, _ in self._kept for number in some.tolist()]
        kmer_id = np.concatenate([none, *(kmer_id for _, kmer_id in self._kept)])
        mask = np.empty((count, windows.kmers), dtype=np.bool_)
        turned = np.empty(count, dtype=np.bool_)
        for place, number in enumerate(index):
            mask[place] = dna.group_masks(
                seed=windows.seed,
                view=0,
                first=number,
                windows=1,
                kmers=windows.kmers,
                masked=windows.masked,
            )[0]
            turned[place] = dna.strand_flips(
                seed=windows.seed,
                view=0,
                first=number,
                windows=1,
                probability=windows.reverse_complement,
            )[0]
        order = permutation(Purpose.DISK_ORDER, windows.seed, 0, count)
        return Shown(kmer_id[order], mask[order], turned[order])


def lay_out(references: Sequence[Reference], windows: Windows) -> dict[str, SplitData]:
    """Every split's windows in disk order, with each view's masks and strands.

    Holds all k-mer ids and one mask a view in memory: about 1 GB and 0.5 GB a view for a human
    genome tiled once.
    """
    columns: list[_Found] = []
    contigs: list[str] = []
    dropped: Counter[str] = Counter()
    for reference, number, contig, tiles in _tiles(references, windows):
        dropped.update(tiles.dropped)
        contigs.append(contig.name)
        if len(tiles.start):
            columns.append(_found(number, reference, references, contig, tiles, windows))
    split_names = sorted({name for found in columns for name in set(found.split.tolist())})
    _check_any(references, windows, dict.fromkeys(split_names, 1), dropped)
    split = np.concatenate([found.split for found in columns])
    every = _Found.join(columns)
    masks, strands = _views(windows, len(split))
    data = {}
    for number, name in enumerate(split_names):
        index = np.flatnonzero(split == name)
        order = permutation(Purpose.DISK_ORDER, windows.seed, number, len(index))
        index = index[order]
        views = range(windows.views if name == REST else 1)
        data[name] = SplitData(
            table=WindowTable(
                genome=every.genome[index],
                contig=every.contig[index],
                contigs=contigs,
                start=every.start[index],
                soft_masked_bases=every.soft_masked_bases[index],
                index=index,
            ),
            kmer_id=every.kmer_id[index],
            mask={view: masks[view][index] for view in views},
            reversed={view: strands[view][index] for view in views},
        )
    return data


@dataclass(frozen=True)
class _Found:
    """Windows in genome order, as columns."""

    split: npt.NDArray[np.str_]
    genome: npt.NDArray[np.int32]
    contig: npt.NDArray[np.int32]
    start: npt.NDArray[np.int64]
    soft_masked_bases: npt.NDArray[np.int32]
    kmer_id: npt.NDArray[np.uint16]

    @staticmethod
    def join(some: Sequence[_Found]) -> _Found:
        return _Found(
            *(
                np.concatenate([getattr(found, name) for found in some])
                for name in _Found.__dataclass_fields__
            )
        )


def _found(
    number: int,
    reference: Reference,
    references: Sequence[Reference],
    contig: Contig,
    tiles: Tiles,
    windows: Windows,
) -> _Found:
    """One contig's windows with their k-mer ids."""
    count = len(tiles.start)
    kmer_id = np.empty((count, windows.kmers), dtype=np.uint16)
    for first in range(0, count, _WINDOWS_AT_ONCE):
        some = slice(first, first + _WINDOWS_AT_ONCE)
        kmer_id[some] = dna.encode_kmers(base_windows(contig, tiles.start[some], windows.bases))
    return _Found(
        split=np.array(reference.rule.names)[tiles.split],
        genome=np.full(count, references.index(reference), dtype=np.int32),
        contig=np.full(count, number, dtype=np.int32),
        start=tiles.start,
        soft_masked_bases=np.rint(tiles.soft_masked * windows.bases).astype(np.int32),
        kmer_id=kmer_id,
    )


def _views(
    windows: Windows, count: int
) -> tuple[list[npt.NDArray[np.bool_]], list[npt.NDArray[np.bool_]]]:
    """Masks (W, T) and strands (W) of every view, in genome order."""
    masks, strands = [], []
    for view in range(windows.views):
        mask = np.empty((count, windows.kmers), dtype=np.bool_)
        for first in range(0, count, _WINDOWS_AT_ONCE):
            some = min(_WINDOWS_AT_ONCE, count - first)
            mask[first : first + some] = dna.group_masks(
                seed=windows.seed,
                view=view,
                first=first,
                windows=some,
                kmers=windows.kmers,
                masked=windows.masked,
            )
        masks.append(mask)
        strands.append(
            dna.strand_flips(
                seed=windows.seed,
                view=view,
                first=0,
                windows=count,
                probability=windows.reverse_complement,
            )
        )
    return masks, strands


def _tiles(
    references: Sequence[Reference], windows: Windows
) -> Iterator[tuple[Reference, int, Contig, Tiles]]:
    """Every contig of every genome with its windows; contigs are numbered over all genomes."""
    number = 0
    for reference in references:
        expected = zip(reference.contigs, reference.digests, strict=True)
        for contig in read_contigs(reference.genome.path):
            if (contig.name, contig.digest) != next(expected, None):
                raise _changed(reference)
            tiles = tile(
                contig,
                bases=windows.bases,
                stride=windows.stride,
                splits=reference.rule,
                include=reference.include,
                exclude=reference.exclude,
                seed=windows.seed,
            )
            yield reference, number, contig, tiles
            number += 1
        if next(expected, None) is not None:
            raise _changed(reference)


def _changed(reference: Reference) -> InputError:
    return InputError(
        f"{reference.genome.path}: the genome changed since it was read the first time; leave the "
        "file alone, then run again"
    )


def _check_any(
    references: Sequence[Reference],
    windows: Windows,
    found: Mapping[str, int],
    dropped: Mapping[str, int],
) -> None:
    if found:
        return
    names = ", ".join(reference.genome.name for reference in references)
    reasons = ", ".join(f"{reason}: {count:,}" for reason, count in dropped.items() if count)
    raise InputError(
        f"{names}: no stretch of {windows.bases:,} pure A, C, G, T bases was found "
        f"(bases dropped: {reasons}); take shorter windows, or mend include, exclude and splits"
    )


def _described_splits(genome: Genome) -> object:
    if isinstance(genome.splits, Path):
        return _bed_digest(genome.splits)
    if genome.splits is None:
        return None
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in genome.splits.items()
    }


def _bed_digest(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
