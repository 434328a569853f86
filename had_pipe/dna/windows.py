"""Windows: where on a genome the teacher is asked.

A window is exactly `bases` long, holds A, C, G, T only, and lies wholly inside one contig, one
split, what is included, and outside what is excluded. A contig falls into *pieces*, the maximal
stretches that meet all of this; each piece is tiled from its own start, so windows of different
splits share no base, and an N moves only the windows behind it in its own piece.

Intervals are sorted, disjoint arrays `start`, `end`. This module does not order or draw windows.
"""

from __future__ import annotations

import difflib
import gzip
import math
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from had_pipe.dna.reference import OTHER, Contig, open_unpacked
from had_pipe.draws import Purpose, permutation
from had_pipe.errors import InputError, RecipeError

REST = "train"
"""The split of what a rule does not name."""

_FIRST = (REST, "valid", "test")
# A split names a group of the cache, and so a folder.
_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
_COORDINATE = re.compile(r"[0-9]{1,18}")


@dataclass(frozen=True)
class Region:
    """A stretch of one contig."""

    contig: str
    start: int
    end: int
    name: str = ""

    def __str__(self) -> str:
        return f"{self.contig}:{self.start}-{self.end}" + (f" ({self.name})" if self.name else "")


@dataclass(frozen=True, eq=False)
class Intervals:
    """Sorted, disjoint stretches of one contig, with a value each (a split, or 0)."""

    start: npt.NDArray[np.int64]
    end: npt.NDArray[np.int64]
    value: npt.NDArray[np.int16]

    @property
    def bases(self) -> int:
        """How many bases the intervals cover."""
        return int((self.end - self.start).sum())


# -- BED -------------------------------------------------------------------------------------------


def read_bed(path: Path) -> tuple[Region, ...]:
    """The regions of a BED file, plain or gzipped, in file order; column 4 is the name.

    Comments, `track` and `browser` lines are skipped. The first other line may be a header; if it
    has a column `split`, that one is the name.
    """
    regions: list[Region] = []
    name_column = 3
    headed = False
    for line, text in _bed_lines(path):
        column = text.split("\t") if "\t" in text else text.split()
        column = [value.strip() for value in column]
        where = f"{path}: line {line}"
        if len(column) < 3:
            raise InputError(
                f"{where}: {text[:60]!r} has {len(column)} columns; "
                "expected contig, start and end, separated by tabs"
            )
        if not regions and not headed and not any(map(_COORDINATE.fullmatch, column[1:3])):
            headed = True
            lower = [value.lower() for value in column]
            name_column = lower.index("split") if "split" in lower else 3
            continue
        for value in column[1:3]:
            if not _COORDINATE.fullmatch(value):
                raise InputError(
                    f"{where}: {value!r} is no coordinate; expected contig, start and end, "
                    "with 0 as the first base and the end not included"
                )
        start, end = int(column[1]), int(column[2])
        if end <= start or not column[0]:
            raise InputError(
                f"{where}: {text[:60]!r} covers no base; expected an end greater than the start"
            )
        name = column[name_column] if len(column) > name_column else ""
        regions.append(Region(column[0], start, end, name))
    return tuple(regions)


def _bed_lines(path: Path) -> Iterator[tuple[int, str]]:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a BED file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file; write the regions to a file first")
    try:
        with open_unpacked(path) as file:
            data = file.read()
        text = data.decode("ascii")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a BED file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: gzip data that is cut or damaged ({error}): copy the file again"
        ) from None
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path}: line {line}: "
            f"byte 0x{data[error.start]:02x} is not ASCII; expected a BED file as plain text"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    for line, content in enumerate(text.splitlines(), start=1):
        content = content.strip()
        if not content or content.startswith("#"):
            continue
        if content.split(None, 1)[0] not in ("track", "browser"):
            yield line, content


def check_contigs(regions: Sequence[Region], names: Iterable[str], *, what: str) -> None:
    """Refuse regions of which none lies on a contig of the genome.

    A BED made for a whole genome may well be used with some of its chromosomes, so contigs that
    the genome lacks are no error as long as one is known.
    """
    _check_some_known({region.contig for region in regions}, set(names), what)


def _check_some_known(named: set[str], known: set[str], what: str) -> None:
    if named and known.isdisjoint(named):
        raise InputError(
            f"{what}: no region lies on a contig of the genome; it names {_few(named)}, the genome "
            f"has {_few(known)}{_nearest(min(named), known)}: rename the contigs"
        )


def _nearest(name: str, known: set[str]) -> str:
    """What to add to a message about an unknown contig: a likely one, or nothing."""
    twins = {f"chr{name}", name.removeprefix("chr"), {"chrM": "MT", "MT": "chrM"}.get(name, name)}
    near = sorted(known & twins) or difflib.get_close_matches(name, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _few(names: set[str]) -> str:
    shown = ", ".join(repr(name) for name in sorted(names)[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- splits ----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class SplitRule:
    """How a genome is cut into splits. Made by `SplitRule.of`, completed by `prepare`."""

    names: tuple[str, ...]
    """Splits that can occur: train, valid, test, then the others by name."""
    contig_split: Mapping[str, str] = field(default_factory=dict)
    """By contig; the rest is train."""
    regions: Mapping[str, Intervals] | None = None
    """By region, for each contig that has some; the rest is in no split."""
    source: str = ""
    """Where the regions come from, for messages."""
    block: int = 0
    """By blocks of so many bases; 0 for none."""
    shares: tuple[tuple[str, float], ...] = ()
    """Share of the blocks for each split; the rest is train."""
    first_block: Mapping[str, int] = field(default_factory=dict)
    """The contig's first block, counted over the genome in file order."""
    counts: tuple[int, ...] = ()
    """Blocks of the genome for each of `names`."""

    @classmethod
    def of(cls, value: Mapping[str, Any] | Path | None) -> SplitRule:
        """The rule of a recipe's `splits`, a value the recipe has checked.

        {"valid": ["chr8"], "test": ["chr20"]}             by contig, the rest is train
        {"blocks": 100_000, "valid": 0.1, "test": 0.05}    by seeded blocks, the rest is train
        the path of a 4-column BED                         by region, the rest is in no split
        None                                               everything is train
        """
        if value is None:
            return cls(names=(REST,))
        if not isinstance(value, Mapping):
            return _region_rule(value)
        if "blocks" in value:
            return _block_rule(value)
        return _contig_rule(value)

    def check_contigs(self, names: Iterable[str]) -> None:
        """Refuse contigs that the genome does not have."""
        known = set(names)
        for contig, split in self.contig_split.items():
            if contig not in known:
                raise RecipeError(
                    f"splits: {split} = {contig!r}: no such contig in the genome, which has "
                    f"{_few(known)}{_nearest(contig, known)}"
                )
        if self.regions is not None:
            _check_some_known(set(self.regions), known, self.source)

    def prepare(self, contigs: Sequence[tuple[str, int]]) -> SplitRule:
        """The rule for this genome, given as (name, length) in file order, with contigs checked.

        `tile` needs a prepared rule when it goes by blocks: exactly round(share * blocks), halves
        up, of all the genome's blocks fall to a split.
        """
        self.check_contigs(name for name, _ in contigs)
        if not self.block:
            return self
        of_contig = [-(-length // self.block) for _, length in contigs]
        first = np.cumsum([0, *of_contig]).tolist()
        blocks = int(first.pop())
        # As a fraction, because 0.29 * 50 is 14.499999999999998 in floating point.
        count = {n: math.floor(Fraction(str(s)) * blocks + Fraction(1, 2)) for n, s in self.shares}
        for split, share in self.shares:
            if count[split] == 0 or sum(count.values()) > blocks:
                raise RecipeError(
                    f"splits: {split} = {share} of {blocks} blocks of {self.block} bases cannot "
                    f"be had (rounded: {count}): make the blocks shorter or change the shares"
                )
        count[REST] = blocks - sum(count.values())
        return replace(
            self,
            first_block={name: at for (name, _), at in zip(contigs, first, strict=True)},
            counts=tuple(count[name] for name in self.names),
        )

    def pieces(self, contig: str, length: int, seed: int) -> Intervals:
        """The contig's stretches by split (index into `names`), neighbours of one split joined."""
        if self.regions is not None:
            own = self.regions.get(contig, _intervals([], [], 0))
            if own.end.size and own.end[-1] > length:
                last = Region(contig, int(own.start[-1]), int(own.end[-1]))
                _refuse_end(last, length, self.source)
            return own
        if self.block:
            return _by_block(self, contig, length, seed)
        split = self.names.index(self.contig_split.get(contig, REST))
        return _intervals([0], [length], split)


def _ordered(names: Iterable[str]) -> tuple[str, ...]:
    present = set(names)
    return tuple(n for n in _FIRST if n in present) + tuple(sorted(present.difference(_FIRST)))


def _contig_rule(value: Mapping[str, Any]) -> SplitRule:
    contig_split: dict[str, str] = {}
    for split, contigs in value.items():
        for contig in contigs:
            if contig_split.setdefault(contig, split) != split:
                raise RecipeError(
                    f"splits: contig {contig!r} is in {contig_split[contig]!r} and in {split!r}; "
                    "a contig belongs to one split"
                )
    return SplitRule(names=_ordered([REST, *value]), contig_split=contig_split)


def _block_rule(value: Mapping[str, Any]) -> SplitRule:
    share = {split: float(of) for split, of in value.items() if split != "blocks"}
    assert value["blocks"] >= 1
    assert all(of > 0 for of in share.values())
    names = _ordered([REST, *share])
    return SplitRule(
        names=names,
        block=int(value["blocks"]),
        shares=tuple((name, share[name]) for name in names if name in share),
    )


def _region_rule(path: Path) -> SplitRule:
    regions = read_bed(path)
    if not regions:
        raise InputError(f"{path}: holds no region; expected contig, start, end and split")
    for region in regions:
        if not _SPLIT_NAME.fullmatch(region.name):
            raise InputError(
                f"{path}: region {region.contig}:{region.start}-{region.end} has "
                f"{region.name!r} for a split; expected a name of lower-case letters, digits and "
                "'_' in column 4, or in a column 'split' of a headed file"
            )
    names = _ordered(region.name for region in regions)
    by_contig: dict[str, list[Region]] = {}
    for region in regions:
        by_contig.setdefault(region.contig, []).append(region)
    return SplitRule(
        names=names,
        regions={contig: _join(own, names, path) for contig, own in by_contig.items()},
        source=str(path),
    )


def _join(regions: list[Region], names: tuple[str, ...], path: Path) -> Intervals:
    """One contig's regions, joined within each split. Two splits on one base are refused.

    Dropping contested bases would be quieter, but two splits that claim one base mean that the
    file is not what its maker thinks, and nobody finds a leak between splits later.
    """
    own = [merge([r for r in regions if r.name == name], v) for v, name in enumerate(names)]
    start = np.concatenate([split.start for split in own])
    order = np.argsort(start, kind="stable")
    joined = Intervals(
        start=start[order],
        end=np.concatenate([split.end for split in own])[order],
        value=np.concatenate([split.value for split in own])[order],
    )
    # Within a split the intervals are disjoint, so if any two overlap, two neighbours do.
    clash = np.flatnonzero(joined.start[1:] < joined.end[:-1])
    if clash.size:
        base = int(joined.start[clash[0] + 1])
        there = [region for region in regions if region.start <= base < region.end]
        other = next(region for region in there if region.name != there[0].name)
        raise InputError(
            f"{path}: regions {there[0]} and {other} overlap but are in different splits; "
            "a base may be in one split only"
        )
    return joined


def _by_block(rule: SplitRule, contig: str, length: int, seed: int) -> Intervals:
    assert contig in rule.first_block, "a rule by blocks must be prepared for the genome"
    first, blocks = rule.first_block[contig], -(-length // rule.block)
    value = _block_splits(rule.counts, rule.names.index(REST), seed)[first : first + blocks]
    cut = np.concatenate([[0], np.flatnonzero(np.diff(value)) + 1, [blocks]]).astype(np.int64)
    return Intervals(
        start=cut[:-1] * rule.block,
        end=np.minimum(cut[1:] * rule.block, length),
        value=value[cut[:-1]],
    )


@lru_cache(maxsize=4)
def _block_splits(counts: tuple[int, ...], rest: int, seed: int) -> npt.NDArray[np.int16]:
    """The split of every block of the genome: the first of a permutation are valid, and so on."""
    split = np.full(sum(counts), rest, dtype=np.int16)
    order = permutation(Purpose.BLOCK_SPLIT, seed, 0, split.size)
    taken = 0
    for value, count in enumerate(counts):
        if value != rest:
            split[order[taken : taken + count]] = value
            taken += count
    return split


# -- intervals -------------------------------------------------------------------------------------


def _intervals(start: Sequence[int], end: Sequence[int], value: int) -> Intervals:
    return Intervals(
        start=np.array(start, dtype=np.int64),
        end=np.array(end, dtype=np.int64),
        value=np.full(len(start), value, dtype=np.int16),
    )


def merge(regions: Sequence[Region], value: int = 0) -> Intervals:
    """Regions of one contig, overlapping and touching ones joined."""
    start = np.array([r.start for r in regions], dtype=np.int64)
    end = np.array([r.end for r in regions], dtype=np.int64)
    order = np.argsort(start, kind="stable")
    start, reach = start[order], np.maximum.accumulate(end[order])
    opens = np.concatenate([[True], start[1:] > reach[:-1]])[: start.size]
    closes = np.concatenate([opens[1:], [True]])[: start.size]
    return Intervals(
        start=start[opens],
        end=reach[closes],
        value=np.full(int(opens.sum()), value, dtype=np.int16),
    )


def intersect(a: Intervals, b: Intervals) -> Intervals:
    """Bases in both, cut at every edge of either; values are those of `b`."""
    first = np.searchsorted(b.end, a.start, side="right")
    last = np.searchsorted(b.start, a.end, side="left")
    count = np.maximum(last - first, 0)
    of_a = np.repeat(np.arange(a.start.size), count)
    of_b = np.repeat(first, count) + _within(count)
    return Intervals(
        start=np.maximum(a.start[of_a], b.start[of_b]),
        end=np.minimum(a.end[of_a], b.end[of_b]),
        value=b.value[of_b],
    )


def complement(a: Intervals, length: int) -> Intervals:
    """Bases of the contig that are not in `a`."""
    start = np.concatenate([[0], a.end]).astype(np.int64)
    end = np.concatenate([a.start, [length]]).astype(np.int64)
    keep = start < end
    return Intervals(
        start=start[keep], end=end[keep], value=np.zeros(int(keep.sum()), dtype=np.int16)
    )


def _within(count: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """0, 1, …, count[0]-1, 0, 1, …, count[1]-1, …"""
    total = int(count.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(count) - count, count)


def pure_runs(base: npt.NDArray[np.uint8]) -> Intervals:
    """The maximal stretches of A, C, G and T."""
    pure = base != OTHER
    edge = np.flatnonzero(pure[1:] != pure[:-1]) + 1
    cut = np.concatenate([[0], edge, [base.size]]).astype(np.int64)
    inside = pure[cut[:-1]] if base.size else np.zeros(1, dtype=np.bool_)
    return Intervals(
        start=cut[:-1][inside],
        end=cut[1:][inside],
        value=np.zeros(int(inside.sum()), dtype=np.int16),
    )


# -- tiling ----------------------------------------------------------------------------------------

DROPPED = ("not ACGT", "not included", "excluded", "in no split", "between windows", "tail")
"""Why a base is in no window, in the order in which it is asked: the first that holds counts."""


@dataclass(frozen=True, eq=False)
class Tiles:
    """One contig's windows, sorted by start.

    Every base of the contig is counted once: `sum(dropped.values()) + sum(split_bases.values())`
    is the contig's length, whatever the stride. A base is "between windows" when the stride leaves
    it out, and "tail" when what is left of its piece (or the whole piece) is shorter than a window.
    """

    start: npt.NDArray[np.int64]
    """(W,) 0-based."""
    split: npt.NDArray[np.int16]
    """(W,) index into SplitRule.names."""
    soft_masked: npt.NDArray[np.float32]
    """(W,) share of the window's bases that are lower case in the file."""
    dropped: Mapping[str, int]
    """Bases in no window, by reason (DROPPED)."""
    split_bases: Mapping[str, int]
    """Bases in at least one window, by split."""


def tile(
    contig: Contig,
    *,
    bases: int,
    stride: int,
    splits: SplitRule,
    include: Sequence[Region] | None,
    exclude: Sequence[Region],
    seed: int,
) -> Tiles:
    """The windows of one contig.

    `include` and `exclude` may hold regions of other contigs. A region that ends beyond its contig
    is refused: it was made for another assembly.
    """
    assert min(bases, stride) >= 1
    length = int(contig.base.size)
    own_include = [r for r in include or () if r.contig == contig.name]
    own_exclude = [r for r in exclude if r.contig == contig.name]
    _check_ends(own_include, length, "include")
    _check_ends(own_exclude, length, "exclude")

    pure = pure_runs(contig.base)
    included = pure if include is None else intersect(pure, merge(own_include))
    kept = intersect(included, complement(merge(own_exclude), length))
    piece = intersect(kept, splits.pieces(contig.name, length, seed))

    piece_bases = piece.end - piece.start
    count = np.maximum((piece_bases - bases) // stride + 1, 0)
    start = np.repeat(piece.start, count) + stride * _within(count)
    # From the first base of a piece's first window to the last of its last.
    reach = np.where(count > 0, (count - 1) * stride + bases, 0)
    covered = np.where(stride < bases, reach, count * bases)

    reasons = (
        length - pure.bases,
        pure.bases - included.bases,
        included.bases - kept.bases,
        kept.bases - piece.bases,
        int((reach - covered).sum()),
        int((piece_bases - reach).sum()),
    )
    return Tiles(
        start=start,
        split=np.repeat(piece.value, count),
        soft_masked=_share(contig.soft_masked, start, bases),
        dropped=dict(zip(DROPPED, reasons, strict=True)),
        split_bases={
            name: int(covered[piece.value == value].sum())
            for value, name in enumerate(splits.names)
        },
    )


def base_windows(contig: Contig, start: npt.NDArray[np.int64], bases: int) -> npt.NDArray[np.uint8]:
    """The windows' base codes (W, bases), copied; `start` may be in any order."""
    if start.size == 0:
        return np.empty((0, bases), dtype=np.uint8)
    assert start.min() >= 0
    assert start.max() + bases <= contig.base.size
    return np.lib.stride_tricks.sliding_window_view(contig.base, bases)[start]


def _share(
    soft_masked: npt.NDArray[np.bool_], start: npt.NDArray[np.int64], bases: int
) -> npt.NDArray[np.float32]:
    """Share of True in each window, a few megabytes at a time."""
    share = np.zeros(start.size, dtype=np.float32)
    if start.size and soft_masked.any():
        window = np.lib.stride_tricks.sliding_window_view(soft_masked, bases)
        step = max(1, 2**22 // bases)
        for at in range(0, start.size, step):
            rows = slice(at, at + step)
            share[rows] = np.count_nonzero(window[start[rows]], axis=1) / bases
    return share


def _check_ends(regions: Sequence[Region], length: int, what: str) -> None:
    for region in regions:
        if region.end > length:
            _refuse_end(region, length, what)


def _refuse_end(region: Region, length: int, what: str) -> NoReturn:
    raise InputError(
        f"{what}: region {region} ends beyond its contig, which has {length} bases: "
        "it was made for another assembly"
    )
