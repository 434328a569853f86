"""Opening a cache and reading windows of it, straight from the byte ranges where they lie.

Reading runs no code of the store, follows no link and trusts no length: keys and shapes come from
the plan, every window is held against the CRC in its receipt, and what is missing is an error,
never a fill value. (Asked to, it reads a store of another layout through zarr-python, which decodes
what it finds.) The order in which to read is the caller's.

T k-mers per window, G stored groups per window, D channels, B windows of a block.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import resource
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self

import crc32c
import numpy as np
import numpy.typing as npt

from had_pipe.cache.codebook import Codebook
from had_pipe.cache.codec import Codec, learns
from had_pipe.cache.door import open_object, read_object, read_opened
from had_pipe.cache.layout import (
    CRC_NBYTES,
    DATA,
    PLAN,
    RECEIPTS,
    WINDOWS,
    Manifest,
    Part,
    Plan,
    Receipt,
    ShardRecord,
    Signal,
    SplitPlan,
    parse_receipt,
    read_manifest,
    read_plan,
    receipt_limit,
    shard_nbytes,
    statistic_key,
)
from had_pipe.cache.loci import WindowTable
from had_pipe.cache.shard import Due, Rows, Shard, ZarrRows, ZarrStore, memory_nbytes
from had_pipe.dna.kmers import KMERS, K, reverse_complement
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheRefused, StorageError

if TYPE_CHECKING:
    from had_pipe.cache.mirror import Mirror

Check = Literal["first", "always", "never"]
"""When a window's CRC is compared: the first time this process reads it, always, never."""

_LARGEST_ATTRIBUTES = 1 << 20
_POSITIVE = ("std", "spread", "stretch")
_INFINITE = 0x7C00  # in float16
_OPEN_PARTS = 128  # parts of a cache whose files and small arrays are kept at hand
_OPEN_NBYTES = 1 << 30  # and what these arrays of all caches may hold together
_SOON_READ = 1 << 30  # what is shorter is no burden to the page cache
_OPEN_PASSING = 32  # such parts at least, where the page cache must not keep their shards


@dataclass(frozen=True)
class Block:
    """Some windows of one view. The arrays may be the caller's own, pinned memory for example."""

    kmer_id: npt.NDArray[np.uint16]
    """(B, T), always the forward strand."""
    mask: npt.NDArray[np.bool_]
    """(B, T), True where masked, in the orientation the teacher saw."""
    reversed: npt.NDArray[np.bool_]
    """(B): the teacher saw `kmers.reverse_complement(kmer_id)`."""
    value: npt.NDArray[Any]
    """(B, G, D), rows in the orientation the teacher saw."""
    scale: npt.NDArray[np.float16] | None
    """(B, G), or None where the codec has none."""

    @cached_property
    def rows(self) -> list[memoryview]:
        """The bytes of each window's value, writable in place. A block that is read into again and
        again is spared making them anew."""
        assert self.value.flags.c_contiguous
        nbytes = self.value.itemsize * math.prod(self.value.shape[1:])
        flat = self.value.reshape(-1).view(np.uint8).data
        return [flat[row * nbytes : (row + 1) * nbytes] for row in range(len(self.value))]

    def part(self, first: int, last: int) -> Block:
        """Some of the windows, in the same memory."""
        some = slice(first, last)
        scale = None if self.scale is None else self.scale[some]
        part = Block(
            self.kmer_id[some], self.mask[some], self.reversed[some], self.value[some], scale
        )
        part.__dict__["rows"] = self.rows[some]
        return part


@dataclass(frozen=True)
class Locus:
    """A window's place: 0-based start on a contig of a genome."""

    genome: str
    contig: str
    start: int
    soft_masked_bases: int
    """How many of its bases the genome has in lower case: repeats, mostly."""


@dataclass(frozen=True)
class GroupLocus:
    """What one stored group covers: one k-mer of a window, on the strand that the teacher saw."""

    genome: str
    contig: str
    start: int
    """First base on the forward strand, 0-based."""
    reversed: bool
    kmer_id: int
    """As the teacher saw it: of a reversed window the k-mer of the other strand."""
    masked: bool


class Cache:
    """One cache, open for reading. Safe to share between threads."""

    def __init__(
        self,
        path: Path,
        plan: Plan,
        manifest: Manifest | None,
        *,
        check: Check,
        through_zarr: bool = False,
        direct: bool = False,
        mirror: Mirror | None = None,
    ) -> None:
        assert not (through_zarr and mirror), "what comes from elsewhere is what was written"
        self.path = path
        self.mirror = mirror
        """Where the cache's objects come from, if it lies behind a URL."""
        self._direct = direct
        self._store = ZarrStore(path) if through_zarr else None
        self.plan = plan
        self._value = plan.signals[0]
        self.sealed = manifest is not None
        self.id = manifest.id if manifest else plan.id
        """The cache id; of an unsealed cache, the plan id."""
        self._manifest = manifest
        self._check = check
        self._parts: OrderedDict[Part, _OpenPart] = OrderedDict()
        self._closed = False
        self._checked: dict[Part, Due | None] = {}
        """Rows this process has checked, None for all of a part."""
        self._planned_crcs: dict[str, list[int]] = {}
        self._planning = threading.Lock()
        # K-mer ids, mask, strand, CRC and scales of a window.
        nbytes = 3 * plan.windows.kmers + 1 + CRC_NBYTES + 2 * plan.windows.stored
        self._open_nbytes = plan.part * nbytes
        self._windows_checked = False
        self.mean = self._statistic("mean")
        self.std = self._statistic("std")
        self.codec = Codec(plan.codec, plan.teacher.dtype, self._codebook())

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        incomplete: bool = False,
        check: Check = "first",
        through_zarr: bool = False,
        direct: bool = False,
        mirror: Mirror | None = None,
    ) -> Cache:
        """Open a cache for reading.

        An unsealed cache is refused unless `incomplete`, which gives the parts that have receipts.
        `through_zarr` reads the arrays of a store that another tool has laid out anew, by
        zarr-python, every window checked at every read: slow, and it runs codecs on whatever the
        store holds, so only for a store whose maker is trusted. `direct` reads past the page cache,
        for disks that are faster than it.
        With a mirror, `path` is its folder of this cache, and objects come through it.
        Raises CacheRefused, CacheIncomplete or CacheCorrupt.
        """
        plan, _ = read_plan(path)
        manifest = read_manifest(path, plan)
        if manifest is None and not incomplete:
            receipts = path / RECEIPTS
            walked = () if receipts.is_symlink() else os.walk(receipts)
            found = sum(len(files) for _, _, files in walked)
            raise CacheIncomplete(
                f"{path}: not finished: {found:,} of {plan.part_count:,} parts are there and no "
                f"manifest. Run the same `{plan.made_by}` command again to finish it"
            )
        if manifest is not None:
            _agree(path, manifest, plan)
        return cls(
            path,
            plan,
            manifest,
            check=check,
            through_zarr=through_zarr,
            direct=direct,
            mirror=mirror,
        )

    def close(self) -> None:
        """Let go of all open files; nothing is read from now on. Reads under way end well."""
        self._closed = True
        self.let_go()
        if self.mirror is not None:
            self.mirror.close()

    def let_go(self, keep: int = 0) -> None:
        """Close the files of all parts but the `keep` last used; they are opened again on demand.

        A file that is just being read is closed at its reader's end.
        """
        with _OPEN:
            given_up = self._shrink(keep)
        del given_up  # here, for closing may take a while

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def statistics(self) -> Mapping[str, npt.NDArray[Any]]:
        """All that decoding needs besides a window, by name."""
        learnt = self.codec.codebook.arrays if self.codec.codebook is not None else {}
        return {"mean": self.mean, "std": self.std, **learnt}

    def rows(self, split: str) -> int:
        """How many windows a split has."""
        return self._split(split).windows

    def views(self, split: str) -> tuple[int, ...]:
        """The views of a split."""
        return tuple(self._split(split).views)

    def has(self, part: Part) -> bool:
        """Whether a part is there; in a sealed cache all are."""
        return self.sealed or (self.path / part.receipt_key).is_file()

    def allocate(self, windows: int) -> Block:
        """A block for so many windows, its contents undefined."""
        kmers = self.plan.windows.kmers
        arrays = [np.empty((windows, *s.window), dtype=s.dtype) for s in self.plan.signals]
        return Block(
            kmer_id=np.empty((windows, kmers), dtype=np.uint16),
            mask=np.empty((windows, kmers), dtype=np.bool_),
            reversed=np.empty(windows, dtype=np.bool_),
            value=arrays[0],
            scale=arrays[1] if len(arrays) > 1 else None,
        )

    def read(self, split: str, view: int, rows: npt.NDArray[np.int64], out: Block) -> None:
        """Read any rows of a split under one view into `out`, row i to place i.

        Neighbouring rows are read in one call, whatever their places in `out`; ascending rows are
        the fast way. For any number of threads.
        """
        order, runs = self._runs(split, view, rows)
        assert out.value.dtype == self._value.dtype
        assert out.value.shape[1:] == self._value.window
        targets = out.rows
        assert len(rows) <= len(targets)
        for part, first, begin, end in runs:
            opened = self._open_part(part)
            last = first + end - begin
            due = self._due(part, first, last)
            places: Any
            if order is None:
                places = slice(begin, end)
                opened.value.read(first, targets[begin:end], due)
            else:
                places = order[begin:end]
                opened.value.read(first, [targets[place] for place in places.tolist()], due)
            if due is not None:
                self._set_checked(part, first, last)
            out.kmer_id[places] = opened.kmer_id[first:last]
            out.mask[places] = opened.mask[first:last]
            out.reversed[places] = opened.reversed[first:last]
            if out.scale is not None:
                assert opened.scale is not None
                out.scale[places] = opened.scale[first:last]
            del opened  # or, while the next waits for room in a mirror, this would take some

    def advise(self, split: str, view: int, rows: npt.NDArray[np.int64]) -> None:
        """Have the kernel fetch rows that will be read soon; it does not wait for them.

        Opens their parts where these are local, which is then done by the time they are read. What
        is wrong with one is told then, too.
        """
        for part, first, begin, end in self._runs(split, view, rows)[1]:
            with suppress(CacheError, StorageError):
                opened = self._open_part(part) if self.mirror is None else self._parts.get(part)
                if opened is not None:
                    opened.value.advise(first, end - begin)

    def coming(self, parts: Iterable[Part]) -> None:
        """Say which parts are needed next, in that order; a mirror brings them ahead of need.

        What was said before is forgotten. The iterable may be endless.
        """
        if self.mirror is not None:
            self.mirror.coming(key for part in parts for key in self._keys(part))

    def _keys(self, part: Part) -> Iterator[str]:
        """The objects of a part, in the order in which they are opened."""
        below = f"{part.split}/{part.view}"
        yield part.receipt_key
        yield _chunk_key(f"{below}/mask", part.number, 1)
        yield _chunk_key(f"{below}/reversed", part.number, 0)
        yield _chunk_key(f"{part.split}/kmer_id", part.number, 1)
        yield from (part.shard_key(signal) for signal in reversed(self.plan.signals))

    def read_kmers(self, split: str, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.uint16]:
        """K-mer ids (B, T) of any rows of a split, forward strand."""
        assert _inside(rows, self.rows(split))
        out = np.empty((len(rows), self.plan.windows.kmers), dtype=np.uint16)
        numbers = rows // self.plan.part
        for number in np.unique(numbers):
            chosen = numbers == number
            chunk = self._kmer_chunk(split, int(number))
            out[chosen] = chunk[rows[chosen] - int(number) * self.plan.part]
        return out

    def seen(
        self, part: Part
    ) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """What was planned for a part, made or not: k-mer ids (B, T), mask (B, T), reversed (B)."""
        below, kmers = f"{part.split}/{part.view}", (self.plan.windows.kmers,)
        mask = self._planned(f"{below}/mask", part.number, "bool", kmers)
        reverse = self._planned(f"{below}/reversed", part.number, "bool", ())
        return self._kmer_chunk(part.split, part.number), mask, reverse

    @property
    def nbytes(self) -> int:
        """Bytes of a sealed cache's objects."""
        assert self._manifest is not None
        return sum(record.nbytes for record in self._manifest.objects.values())

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes of the store's root: licence, decode, orientation, fidelity."""
        if self._store is not None:
            return self._store.attributes()
        key = f"{DATA}/zarr.json"
        limit = _LARGEST_ATTRIBUTES + 256 * self.plan.teacher.channels
        try:
            group = json.loads(
                self._object(key, limit=limit),
                parse_constant=_no_constant,
                parse_float=_finite,
                parse_int=_short,
            )
            attributes = group["attributes"]
            if not isinstance(attributes, dict):
                raise TypeError("attributes that are no object")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise CacheCorrupt(
                f"{self.path}: {key} is not the JSON of a Zarr group; {self._remedy}"
            ) from error
        return attributes

    @property
    def fidelity(self) -> Mapping[str, Any]:
        """What the codec lost on held-out groups, measured when the cache was made."""
        fidelity = self.attributes.get("fidelity")
        if not isinstance(fidelity, dict):
            raise CacheCorrupt(f"{self.path}: {DATA}/zarr.json tells no fidelity; {self._remedy}")
        return fidelity

    def locus(self, split: str, row: int) -> Locus:
        """Where a window lies on its genome."""
        return self.loci(split, [row])[0]

    def loci(self, split: str, rows: Sequence[int]) -> list[Locus]:
        """Where some windows lie, in the order asked for."""
        assert all(0 <= row < self.rows(split) for row in rows)
        before = sum(self.rows(name) for name in self.plan.splits if name < split)
        with WindowTable(self.path, self.plan, opener=self._open_object) as table:
            if self._manifest is not None and not self._windows_checked:
                self._compare(WINDOWS, table.sha256())
                self._windows_checked = True
            lines = table.rows([before + row for row in rows])
        for row, line in zip(rows, lines, strict=True):
            if (line["split"], line["window"]) != (split, row):
                raise CacheCorrupt(
                    f"{self.path}: {WINDOWS} does not hold window {row} of {split!r} at its place; "
                    f"{self._remedy}"
                )
        return [
            Locus(line["genome"], line["contig"], line["start"], line["soft_masked_bases"])
            for line in lines
        ]

    def group_locus(self, split: str, row: int, *, view: int, group: int) -> GroupLocus:
        """Where a stored group lies: row `group` of the embedding of window `row` under a view."""
        assert view in self.views(split)
        assert 0 <= group < self.plan.windows.stored
        window = self.locus(split, row)
        kmer_id, mask, reverse = self.seen(Part(split, view, row // self.plan.part))
        inside = row % self.plan.part
        turned = bool(reverse[inside])
        read = reverse_complement(kmer_id[inside : inside + 1])[0] if turned else kmer_id[inside]
        hidden = mask[inside]
        stored = {"visible": ~hidden, "masked": hidden, "all": np.ones_like(hidden)}
        column = int(np.flatnonzero(stored[self.plan.windows.store])[group])
        place = self.plan.windows.kmers - 1 - column if turned else column
        return GroupLocus(
            genome=window.genome,
            contig=window.contig,
            start=window.start + K * place,
            reversed=turned,
            kmer_id=int(read[column]),
            masked=bool(hidden[column]),
        )

    def receipt(self, part: Part) -> Receipt:
        """The receipt of one part, held against the manifest."""
        if not self.has(part):
            raise CacheIncomplete(
                f"{self.path}: part {part} is not there yet; run the same "
                f"`{self.plan.made_by}` command again to make it"
            )
        limit = receipt_limit(self.plan, part)
        receipt = parse_receipt(self.path, part, self._object(part.receipt_key, limit=limit))
        check_receipt(self.path, self.plan, part, receipt)
        return receipt

    def _split(self, split: str) -> SplitPlan:
        if split not in self.plan.splits:
            known = ", ".join(self.plan.splits)
            raise CacheError(f"{self.path}: no split {split!r} here; it has {known}")
        return self.plan.splits[split]

    def _statistic(self, name: str) -> npt.NDArray[Any]:
        dtype, shape = self.plan.statistics_arrays[name]
        key = f"{DATA}/{statistic_key(name, shape)}"
        if self._store is None:
            values = self._chunk(key, dtype, shape)
        else:
            array = f"statistics/embedding/{name}"
            values = self._store.rows(array, 0, shape[0], Signal(array, dtype, shape[1:]))
        if hashlib.sha256(values.data).hexdigest() != self.plan.contents.get(
            f"statistics/embedding/{name}"
        ):
            raise CacheCorrupt(f"{self.path}: {key} is not what the plan says; {self._remedy}")
        if not np.isfinite(values).all() or (name in _POSITIVE and not (values > 0).all()):
            raise CacheCorrupt(
                f"{self.path}: {key} holds numbers that are no {name}: they must be finite, a std "
                f"positive; {self._remedy}"
            )
        return values

    def _codebook(self) -> Codebook | None:
        plan = self.plan
        if not learns(plan.codec):
            return None
        arrays = {name: self._statistic(name) for name in Codebook.shapes(plan.teacher.channels)}
        nbytes = plan.signals[0].window[-1]
        if sorted(set(arrays["byte"].tolist())) != list(range(nbytes)):
            raise CacheCorrupt(
                f"{self.path}: statistics/embedding/byte does not name each of the {nbytes:,} "
                f"bytes of a code; {self._remedy}"
            )
        return Codebook(**arrays)

    def _runs(
        self, split: str, view: int, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64] | None, Iterator[tuple[Part, int, int, int]]]:
        """Rows as runs of neighbours within a part: the part, its first row there, and from where
        to where the run goes in the order that is given first (None: as they stand)."""
        of_split, part = self._split(split), self.plan.part
        if view not in of_split.views:
            raise CacheError(f"{self.path}: {split!r} has views {of_split.views}, not {view}")
        assert not self._closed
        if len(rows) == 0:
            return None, iter(())
        order = None
        step = rows[1:] - rows[:-1]
        if len(step) and step.min() < 0:
            order = np.argsort(rows, kind="stable")
            rows = rows[order]
            step = rows[1:] - rows[:-1]
        assert rows[0] >= 0
        assert rows[-1] < of_split.windows
        breaks = np.flatnonzero((step != 1) | (rows[1:] % part == 0)) + 1
        edges = [0, *breaks.tolist(), len(rows)]
        first = rows[edges[:-1]].tolist()

        def runs() -> Iterator[tuple[Part, int, int, int]]:
            for row, (begin, end) in zip(first, itertools.pairwise(edges), strict=True):
                number, inside = divmod(row, part)
                yield Part(split, view, number), inside, begin, end

        return order, runs()

    def _open_part(self, part: Part) -> _OpenPart:
        with _OPEN:
            opened = self._parts.get(part)
            if opened is not None:
                self._parts.move_to_end(part)
                return opened
        # Opened outside the lock: two threads may do it twice, which only costs time.
        opened = self._prepare(part)
        with _OPEN:
            if self._closed:
                return opened
            self._parts[part] = opened
            _CACHES.add(self)
            given_up = _share_out()
        del given_up  # here, for closing may take a while
        return opened

    def _shrink(self, parts: int) -> list[_OpenPart]:
        """Under the lock: forget all open parts but so many."""
        return [self._parts.popitem(last=False)[1] for _ in range(len(self._parts) - parts)]

    def _prepare(self, part: Part) -> _OpenPart:
        plan, receipt = self.plan, self.receipt(part)
        kmer_id, mask, reverse = self.seen(part)
        masked = np.bitwise_count(np.packbits(mask, axis=1)).sum(axis=1)
        if not (masked == plan.windows.masked).all():
            raise CacheCorrupt(
                f"{self.path}: part {part}: a window without exactly {plan.windows.masked} masked "
                f"groups, as the plan says; {self._remedy}"
            )
        scale = None
        for signal in plan.signals[1:]:
            rows = self._rows(part, signal, receipt.objects[part.shard_key(signal)])
            scale = rows.read_all(check=self._check != "never")
            del rows
        # Last, when nothing else is open: whoever waits for room in a mirror must not take some.
        value = self._rows(part, self._value, receipt.objects[part.shard_key(self._value)])
        # Of float16, the bits of all finite positive numbers and of no others lie between these.
        if scale is not None and not (
            scale.view(np.uint16).min() > 0 and scale.view(np.uint16).max() < _INFINITE
        ):
            raise CacheCorrupt(
                f"{self.path}: part {part}: a scale that is not finite and positive; {self._remedy}"
            )
        return _OpenPart(
            kmer_id=kmer_id,
            mask=mask,
            reversed=reverse,
            value=value,
            scale=scale,
        )

    @cached_property
    def _passing(self) -> frozenset[str]:
        """Splits whose shards the page cache shall not keep: what is read from start to end and too
        long to be there at the next turn would only push out what others have in memory."""
        stride = self._value.stride
        nbytes = {name: split.windows * stride for name, split in self.plan.splits.items()}
        if self._direct or max(nbytes.values()) < _SOON_READ:
            return frozenset()
        half = memory_nbytes() // 2
        return frozenset(name for name in nbytes if nbytes[name] > half)

    @cached_property
    def _open_passing(self) -> int:
        """Parts kept open of which some pass: about as much as a fourth of memory holds."""
        shard = self.plan.part * self._value.stride
        return min(_OPEN_PARTS, max(_OPEN_PASSING, memory_nbytes() // 4 // shard))

    def _rows(self, part: Part, signal: Signal, record: ShardRecord) -> Rows:
        """The rows of one signal of a part."""
        if self._store is not None:
            name = f"{part.split}/{part.view}/{signal.path}"
            first = part.number * self.plan.part
            return ZarrRows(self._store, name, signal, record.crcs(), first)
        key = part.shard_key(signal)
        try:
            fd = self._open_object(key)
        except OSError as error:
            raise self._wrong(key, f"cannot be opened ({error.strerror})") from error
        streamed = signal == self._value
        return Shard.open(
            self.path / key,
            fd,
            signal,
            record,
            windows=self.plan.part_windows(part),
            part=self.plan.part,
            direct=self._direct and streamed,
            passing=part.split in self._passing and streamed,
            remedy=self._remedy,
            wrong=lambda found: self._wrong(key, found),
        )

    def _due(self, part: Part, first: int, last: int) -> Due | None:
        """Which of some rows of a part must be checked now; None for none."""
        if self._check == "never":
            return None
        if self._check == "always":
            return np.ones(last - first, dtype=np.bool_)
        done = self._checked.setdefault(part, np.zeros(self.plan.part_windows(part), np.bool_))
        if done is None or done[first:last].all():
            return None
        return ~done[first:last]

    def _set_checked(self, part: Part, first: int, last: int) -> None:
        done = self._checked.get(part)
        if done is not None:
            done[first:last] = True
            if done.all():
                self._checked[part] = None

    def _kmer_chunk(self, split: str, number: int) -> npt.NDArray[np.uint16]:
        array = f"{split}/kmer_id"
        chunk = self._planned(array, number, "uint16", (self.plan.windows.kmers,))
        largest = int(chunk.max())
        if largest >= KMERS:
            raise CacheCorrupt(
                f"{self.path}: {_chunk_key(array, number, 1)} holds a k-mer id of {largest:,}, "
                f"expected less than {KMERS:,}; {self._remedy}"
            )
        return chunk

    def _planned(
        self, array: str, number: int, dtype: str, window: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """A part's rows of an array that was written when the cache was planned."""
        whole = self.plan.part
        rows = self.rows(array.partition("/")[0])
        first, last = number * whole, min((number + 1) * whole, rows)
        if self._store is None:
            key = _chunk_key(array, number, len(window))
            return self._chunk(key, dtype, (whole, *window))[: last - first]
        signal = Signal(array, dtype, window)
        with self._planning:
            if array not in self._planned_crcs:
                self._planned_crcs[array] = self._hold_against_plan(self._store, signal, rows)
        values = self._store.rows(array, first, last, signal)
        if crc32c.crc32c(values.data.cast("B")) != self._planned_crcs[array][number]:
            raise CacheCorrupt(
                f"{self.path}: {DATA}/{array} has changed since it was first read; start again"
            )
        return values

    def _hold_against_plan(self, store: ZarrStore, signal: Signal, rows: int) -> list[int]:
        """Read a whole array once, a part at a time; the CRC of each part of what it holds."""
        digest, crcs = hashlib.sha256(), []
        for first in range(0, rows, self.plan.part):
            last = min(first + self.plan.part, rows)
            values = store.rows(signal.path, first, last, signal).data.cast("B")
            digest.update(values)
            crcs.append(crc32c.crc32c(values))
        if digest.hexdigest() != self.plan.contents.get(signal.path):
            raise CacheCorrupt(
                f"{self.path}: {DATA}/{signal.path} is not what the plan says: a chunk is missing "
                "or damaged, or values were changed; lay the store out anew from a sound cache"
            )
        return crcs

    def _chunk(self, key: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A whole plan-time chunk: [bytes, crc32c]."""
        count = int(np.prod(shape))
        expected = count * np.dtype(dtype).itemsize + CRC_NBYTES
        raw = self._object(key, limit=expected)
        if len(raw) != expected:
            raise CacheCorrupt(
                f"{self.path}: {key} has {len(raw):,} bytes, expected {expected:,}; {self._remedy}"
            )
        stored = int.from_bytes(raw[-CRC_NBYTES:], "little")
        if crc32c.crc32c(memoryview(raw)[:-CRC_NBYTES]) != stored:
            raise CacheCorrupt(f"{self.path}: {key}: wrong CRC32C; {self._remedy}")
        little = np.dtype(dtype).newbyteorder("<")
        values = np.frombuffer(raw, dtype=little, count=count).reshape(shape)
        if dtype == "bool" and int(values.view(np.uint8).max()) > 1:
            raise CacheCorrupt(
                f"{self.path}: {key} holds bytes that are neither true nor false; {self._remedy}"
            )
        return values

    def _open_object(self, key: str) -> int:
        """A descriptor of one object, to be closed by the caller; raises as door.open_object."""
        if self.mirror is not None:
            return self.mirror.open(key)
        return open_object(self.path, key)

    def _object(self, key: str, *, limit: int) -> bytes:
        """A small object's bytes, held against the manifest where there is one."""
        try:
            raw = read_opened(self._open_object(key), self.path / key, limit=limit)
        except FileNotFoundError:
            raise self._wrong(key, "is missing") from None
        except CacheRefused:
            if self._laid_out_anew(key):
                raise self._wrong(key, "is longer than it was") from None
            raise
        except OSError as error:
            raise CacheCorrupt(
                f"{self.path}: {key} cannot be read ({error.strerror}); {self._remedy}"
            ) from error
        if self._manifest is not None:
            self._compare(key, hashlib.sha256(raw).hexdigest())
        return raw

    def _compare(self, key: str, found: str) -> None:
        """Hold an object's SHA-256 against the manifest."""
        assert self._manifest is not None
        expected = self._manifest.objects[key].sha256
        if found != expected:
            raise self._wrong(
                key, f"SHA-256 is {found[:12]}..., the manifest says {expected[:12]}...", sep=": "
            )

    @property
    def _remedy(self) -> str:
        if self.mirror is not None:
            return "remove it from this mirror, and the next run downloads it again"
        return _remedy(self.path)

    def _wrong(self, key: str, found: str, *, sep: str = " ") -> CacheError:
        """The error for an object that is not as it was written."""
        if self._laid_out_anew(key):
            return CacheRefused(
                f"{self.path}: {key}{sep}{found}, and its array's metadata is not what was "
                f"written: another tool has laid {DATA} out anew. If you trust who did, for codecs "
                "of others then decode what it holds, read it with `--through-zarr` "
                "(in Python: through_zarr=True); its windows are still held against their receipts"
            )
        return CacheCorrupt(f"{self.path}: {key}{sep}{found}; {self._remedy}")

    def _laid_out_anew(self, key: str) -> bool:
        """Whether an object's array has other metadata than was written, yet such as Zarr reads."""
        array, inside, _ = key.removeprefix(f"{DATA}/").rpartition("/c/")
        if self._manifest is None or self.mirror is not None or not inside:
            return False
        for name in ("zarr.json", ".zarray"):
            metadata = f"{DATA}/{array}/{name}"
            try:
                raw = read_object(self.path, metadata, limit=_LARGEST_ATTRIBUTES)
                shape = json.loads(raw)["shape"]
            except (OSError, CacheRefused, ValueError, LookupError, TypeError, RecursionError):
                continue
            written = self._manifest.objects.get(metadata)
            if isinstance(shape, list) and (
                written is None or hashlib.sha256(raw).hexdigest() != written.sha256
            ):
                return True
        return False


_OPEN = threading.Lock()
_CACHES: weakref.WeakSet[Cache] = weakref.WeakSet()
"""Those that have open parts, or had."""


def _share_out() -> list[_OpenPart]:
    """Under the lock: leave each cache its share of what all caches may have open; the rest."""
    caches = [cache for cache in _CACHES if cache._parts]
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        files = 1 << 20
    given_up = []
    for cache in caches:
        # One file a part; half of what a process may have is left to everybody else.
        share = min(
            _OPEN_PARTS if not cache._passing else cache._open_passing,
            files // 2 // len(caches),
            _OPEN_NBYTES // len(caches) // cache._open_nbytes,
            # What is open in a mirror cannot make room there.
            _OPEN_PARTS if cache.mirror is None else cache.mirror.open_parts,
        )
        given_up += cache._shrink(max(1, share))
    return given_up


def check_receipt(cache: Path, plan: Plan, part: Part, receipt: Receipt) -> None:
    """Hold a receipt against the plan and its own place. Raises CacheCorrupt."""
    found = (receipt.plan, receipt.split, receipt.view, receipt.part, receipt.windows)
    windows = plan.part_windows(part)
    expected = (plan.id, part.split, part.view, part.number, windows)
    if found != expected:
        raise CacheCorrupt(
            f"{cache}: {part.receipt_key} belongs elsewhere: it says {found}, expected {expected}; "
            f"{_remedy(cache)}"
        )
    if set(receipt.objects) != {part.shard_key(signal) for signal in plan.signals}:
        raise CacheCorrupt(
            f"{cache}: {part.receipt_key} lists {sorted(receipt.objects)}, not the part's shards; "
            f"{_remedy(cache)}"
        )
    for signal in plan.signals:
        record = receipt.objects[part.shard_key(signal)]
        nbytes = shard_nbytes(signal, windows=windows, part=plan.part)
        if record.nbytes != nbytes or len(record.crcs()) != windows:
            raise CacheCorrupt(
                f"{cache}: {part.receipt_key}: {part.shard_key(signal)} is said to have "
                f"{record.nbytes:,} bytes and {len(record.crcs()):,} CRCs, expected {nbytes:,} and "
                f"{windows:,}; {_remedy(cache)}"
            )


def _agree(cache: Path, manifest: Manifest, plan: Plan) -> None:
    """Hold plan and manifest against each other: the plan's hash, and exactly the implied keys."""
    if manifest.plan != plan.id:
        raise CacheRefused(
            f"{cache}: the manifest is of plan {manifest.plan[:12]}..., but plan.json is "
            f"{plan.id[:12]}...; the files of two caches were mixed: copy the cache again"
        )
    refuse_endless(cache, plan, manifest)
    expected = expected_keys(plan)
    if set(manifest.objects) != expected:
        differing = sorted(set(manifest.objects) ^ expected)[:3]
        raise CacheRefused(
            f"{cache}: the manifest does not list what the plan implies; first differences: "
            f"{', '.join(differing)}"
        )


def refuse_endless(cache: Path, plan: Plan, manifest: Manifest) -> None:
    """Raise CacheRefused before walking through more parts than the manifest can have."""
    if plan.part_count > len(manifest.objects):
        raise CacheRefused(
            f"{cache}: the plan has {plan.part_count:,} parts, the manifest only "
            f"{len(manifest.objects):,} objects: the files of two caches were mixed; copy the "
            "cache again"
        )


def expected_keys(plan: Plan) -> set[str]:
    """Every file of a sealed cache but its manifest."""
    return {PLAN, WINDOWS, *plan.metadata_keys(), *plan.keys()}


def _remedy(cache: Path) -> str:
    return (
        f"`had-pipe cache verify {cache}` finds all damage; copy the cache again, or run "
        "`had-pipe extract-teacher RECIPE --repair` where it was made"
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is beyond any number")
    return number


def _short(text: str) -> int:
    if len(text) > 20:  # no float could hold it, nor does anything count so far
        raise ValueError(f"{text[:20]}... has too many digits")
    return int(text)


def _chunk_key(array: str, number: int, inner: int) -> str:
    """A chunk of an array that was written when the cache was planned, with so many more axes."""
    return f"{DATA}/{array}/c/{number}" + "/0" * inner


def _inside(rows: npt.NDArray[np.int64], count: int) -> bool:
    return len(rows) == 0 or bool(rows.min() >= 0 and rows.max() < count)


@dataclass(frozen=True)
class _OpenPart:
    """A part's small arrays, and its open shard of values."""

    kmer_id: npt.NDArray[np.uint16]
    mask: npt.NDArray[np.bool_]
    reversed: npt.NDArray[np.bool_]
    value: Rows
    scale: npt.NDArray[np.float16] | None
