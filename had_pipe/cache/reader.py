"""Opening a cache and reading windows of it, straight from the byte ranges where they lie.

Reading runs no code of the store, follows no link and trusts no length: keys and shapes come from
the plan, every window is held against the CRC in its receipt, and what is missing is an error,
never a fill value. The order in which to read is the caller's.

T k-mers per window, G stored groups per window, D channels, B windows of a block.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import crc32c
import numpy as np
import numpy.typing as npt

from had_pipe.cache.codebook import Codebook
from had_pipe.cache.codec import Codec, learns
from had_pipe.cache.door import open_object, read_opened
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
    parse_receipt,
    read_manifest,
    read_plan,
    receipt_limit,
    shard_index,
    shard_nbytes,
    statistic_key,
)
from had_pipe.cache.loci import WindowTable
from had_pipe.dna.kmers import KMERS, K, reverse_complement
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheRefused

Check = Literal["first", "always", "never"]
"""When a window's CRC is compared: the first time this process reads it, always, never."""

_LARGEST_ATTRIBUTES = 1 << 20
_POSITIVE = ("std", "spread", "stretch")
_OPEN_PARTS = 128  # parts whose files and small arrays are kept at hand
_OPEN_NBYTES = 1 << 30  # and what these arrays may hold together
_ROWS_A_CALL = 512  # preadv takes at most IOV_MAX (1024) buffers, two a row


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


@dataclass(frozen=True)
class Locus:
    """A window's place: 0-based start on a contig of a genome."""

    genome: str
    contig: str
    start: int


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
        opener: Callable[[str], int] | None = None,
    ) -> None:
        """`opener` gives a descriptor of the object of a key, which the cache then closes."""
        self.path = path
        self._opener = opener
        self.plan = plan
        self.sealed = manifest is not None
        self.id = manifest.id if manifest else plan.id
        """The cache id; of an unsealed cache, the plan id."""
        self._manifest = manifest
        self._check = check
        self._parts: OrderedDict[Part, _OpenPart] = OrderedDict()
        self._checked: dict[Part, npt.NDArray[np.bool_]] = {}
        self._lock = threading.Lock()
        # K-mer ids, mask, strand, CRC and scales of a window.
        nbytes = 3 * plan.windows.kmers + 1 + CRC_NBYTES + 2 * plan.windows.stored
        self._open_parts = max(1, min(_OPEN_PARTS, _OPEN_NBYTES // (plan.part * nbytes)))
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
        opener: Callable[[str], int] | None = None,
    ) -> Cache:
        """Open a cache for reading.

        An unsealed cache is refused unless `incomplete`, which gives the parts that have receipts.
        plan.json and manifest.json lie in the folder; all else comes from `opener` where there is
        one.
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
        return cls(path, plan, manifest, check=check, opener=opener)

    @property
    def statistics(self) -> Mapping[str, npt.NDArray[Any]]:
        """All that decoding needs besides a window, by name."""
        learnt = self.codec.codebook.arrays if self.codec.codebook is not None else {}
        return {"mean": self.mean, "std": self.std, **learnt}

    def rows(self, split: str) -> int:
        """How many windows a split has."""
        windows: int = self._split(split).windows
        return windows

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

        Neighbouring rows are read in one call, whatever their places in `out`.
        """
        of_split = self._split(split)
        if view not in of_split.views:
            raise CacheError(f"{self.path}: {split!r} has views {of_split.views}, not {view}")
        assert _inside(rows, of_split.windows)
        order = np.argsort(rows, kind="stable")
        numbers = rows[order] // self.plan.part
        for first, last in _runs(numbers, step=0):
            places = order[first:last]
            part = Part(split, view, int(numbers[first]))
            opened = self._open_part(part)
            inside = rows[places] - part.number * self.plan.part
            out.kmer_id[places] = opened.kmer_id[inside]
            out.mask[places] = opened.mask[inside]
            out.reversed[places] = opened.reversed[inside]
            if out.scale is not None:
                assert opened.scale is not None
                out.scale[places] = opened.scale[inside]
            due = self._due(part, inside)
            for start, stop in _runs(inside, step=1):
                opened.read_values(inside[start:stop], places[start:stop], out.value, due)
            if due is not None:
                self._checked[part][inside] = True

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
        windows, kmers = self.plan.part_windows(part), self.plan.windows.kmers
        below = f"{DATA}/{part.split}/{part.view}"
        whole = self.plan.part
        mask = self._chunk(f"{below}/mask/c/{part.number}/0", "bool", (whole, kmers))
        reverse = self._chunk(f"{below}/reversed/c/{part.number}", "bool", (whole,))
        kmer_id = self._kmer_chunk(part.split, part.number)
        return kmer_id[:windows], mask[:windows], reverse[:windows]

    @property
    def nbytes(self) -> int:
        """Bytes of a sealed cache's objects."""
        assert self._manifest is not None
        return sum(record.nbytes for record in self._manifest.objects.values())

    @property
    def attributes(self) -> Mapping[str, Any]:
        """The attributes of the store's root: licence, decode, orientation, fidelity."""
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
                f"{self.path}: {key} is not the JSON of a Zarr group; {_remedy(self.path)}"
            ) from error
        return attributes

    @property
    def fidelity(self) -> Mapping[str, Any]:
        """What the codec lost on held-out groups, measured when the cache was made."""
        fidelity = self.attributes.get("fidelity")
        if not isinstance(fidelity, dict):
            raise CacheCorrupt(
                f"{self.path}: {DATA}/zarr.json tells no fidelity; {_remedy(self.path)}"
            )
        return fidelity

    def locus(self, split: str, row: int) -> Locus:
        """Where a window lies on its genome."""
        assert 0 <= row < self.rows(split)
        place = row + sum(self.rows(name) for name in self.plan.splits if name < split)
        with WindowTable(self.path, self.plan, opener=self._open_object) as table:
            if self._manifest is not None and not self._windows_checked:
                self._compare(WINDOWS, table.sha256())
                self._windows_checked = True
            found = table.row(place)
        if (found["split"], found["window"]) != (split, row):
            raise CacheCorrupt(
                f"{self.path}: {WINDOWS} does not hold window {row} of {split!r} at its place; "
                f"{_remedy(self.path)}"
            )
        return Locus(found["genome"], found["contig"], found["start"])

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

    def _split(self, split: str) -> Any:
        if split not in self.plan.splits:
            known = ", ".join(self.plan.splits)
            raise CacheError(f"{self.path}: no split {split!r} here; it has {known}")
        return self.plan.splits[split]

    def _statistic(self, name: str) -> npt.NDArray[Any]:
        dtype, shape = self.plan.statistics_arrays[name]
        key = f"{DATA}/{statistic_key(name, shape)}"
        values = self._chunk(key, dtype, shape)
        if hashlib.sha256(values.data).hexdigest() != self.plan.contents.get(
            f"statistics/embedding/{name}"
        ):
            raise CacheCorrupt(
                f"{self.path}: {key} is not what the plan says; {_remedy(self.path)}"
            )
        if not np.isfinite(values).all() or (name in _POSITIVE and not (values > 0).all()):
            raise CacheCorrupt(
                f"{self.path}: {key} holds numbers that are no {name}: they must be finite, a std "
                f"positive; {_remedy(self.path)}"
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
                f"bytes of a code; {_remedy(self.path)}"
            )
        return Codebook(**arrays)

    def _open_part(self, part: Part) -> _OpenPart:
        with self._lock:
            opened = self._parts.get(part)
            if opened is not None:
                self._parts.move_to_end(part)
                return opened
        # Opened outside the lock: two threads may do it twice, which only costs time.
        opened = self._prepare(part)
        with self._lock:
            self._parts[part] = opened
            if len(self._parts) > self._open_parts:
                self._parts.popitem(last=False)
        return opened

    def _prepare(self, part: Part) -> _OpenPart:
        plan, receipt = self.plan, self.receipt(part)
        windows = plan.part_windows(part)
        kmer_id, mask, reverse = self.seen(part)
        if not (mask.sum(axis=1) == plan.windows.masked).all():
            raise CacheCorrupt(
                f"{self.path}: part {part}: a window without exactly {plan.windows.masked} masked "
                f"groups, as the plan says; {_remedy(self.path)}"
            )
        shards = [
            _Shard.open(
                self.path,
                part.shard_key(signal),
                self._open_object,
                signal,
                receipt.objects[part.shard_key(signal)],
                windows=windows,
                part=plan.part,
            )
            for signal in plan.signals
        ]
        scale = shards[1].read_all(check=self._check) if len(shards) > 1 else None
        if scale is not None and not (np.isfinite(scale) & (scale > 0)).all():
            raise CacheCorrupt(
                f"{self.path}: part {part}: a scale that is not finite and positive; "
                f"{_remedy(self.path)}"
            )
        return _OpenPart(
            kmer_id=kmer_id,
            mask=mask,
            reversed=reverse,
            value=shards[0],
            scale=scale,
        )

    def _due(self, part: Part, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_] | None:
        """Which rows of a part must be checked now, by row; None for none."""
        if self._check == "never":
            return None
        done = self._checked.setdefault(part, np.zeros(self.plan.part, dtype=np.bool_))
        if self._check == "always":
            return np.ones_like(done)
        return None if done[rows].all() else ~done

    def _kmer_chunk(self, split: str, number: int) -> npt.NDArray[np.uint16]:
        shape = (self.plan.part, self.plan.windows.kmers)
        key = f"{DATA}/{split}/kmer_id/c/{number}/0"
        chunk = self._chunk(key, "uint16", shape)[: self.rows(split) - number * self.plan.part]
        largest = int(chunk.max())
        if largest >= KMERS:
            raise CacheCorrupt(
                f"{self.path}: {key} holds a k-mer id of {largest:,}, expected less than "
                f"{KMERS:,}; {_remedy(self.path)}"
            )
        return chunk

    def _chunk(self, key: str, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
        """A whole plan-time chunk: [bytes, crc32c]."""
        count = int(np.prod(shape))
        expected = count * np.dtype(dtype).itemsize + CRC_NBYTES
        raw = self._object(key, limit=expected)
        if len(raw) != expected:
            raise CacheCorrupt(
                f"{self.path}: {key} has {len(raw):,} bytes, expected {expected:,}; "
                f"{_remedy(self.path)}"
            )
        stored = int.from_bytes(raw[-CRC_NBYTES:], "little")
        if crc32c.crc32c(memoryview(raw)[:-CRC_NBYTES]) != stored:
            raise CacheCorrupt(f"{self.path}: {key}: wrong CRC32C; {_remedy(self.path)}")
        little = np.dtype(dtype).newbyteorder("<")
        values = np.frombuffer(raw, dtype=little, count=count).reshape(shape)
        if dtype == "bool" and int(values.view(np.uint8).max()) > 1:
            raise CacheCorrupt(
                f"{self.path}: {key} holds bytes that are neither true nor false; "
                f"{_remedy(self.path)}"
            )
        return values

    def _open_object(self, key: str) -> int:
        """A descriptor of one object, to be closed by the caller; raises as door.open_object."""
        if self._opener is not None:
            return self._opener(key)
        return open_object(self.path, key)

    def _object(self, key: str, *, limit: int) -> bytes:
        """A small object's bytes, held against the manifest where there is one."""
        try:
            raw = read_opened(self._open_object(key), self.path / key, limit=limit)
        except FileNotFoundError:
            raise CacheCorrupt(f"{self.path}: {key} is missing; {_remedy(self.path)}") from None
        except OSError as error:
            raise CacheCorrupt(
                f"{self.path}: {key} cannot be read ({error.strerror}); {_remedy(self.path)}"
            ) from error
        if self._manifest is not None:
            self._compare(key, hashlib.sha256(raw).hexdigest())
        return raw

    def _compare(self, key: str, found: str) -> None:
        """Hold an object's SHA-256 against the manifest."""
        assert self._manifest is not None
        expected = self._manifest.objects[key].sha256
        if found != expected:
            raise CacheCorrupt(
                f"{self.path}: {key}: SHA-256 is {found[:12]}..., the manifest says "
                f"{expected[:12]}...; {_remedy(self.path)}"
            )


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


def _inside(rows: npt.NDArray[np.int64], count: int) -> bool:
    return len(rows) == 0 or bool(rows.min() >= 0 and rows.max() < count)


def _runs(values: npt.NDArray[np.int64], *, step: int) -> list[tuple[int, int]]:
    """Slices of an ascending array in which neighbours differ by exactly `step`."""
    if len(values) == 0:
        return []
    breaks = np.flatnonzero(np.diff(values) != step) + 1
    edges = [0, *breaks.tolist(), len(values)]
    return list(itertools.pairwise(edges))


class _Shard:
    """One shard object: an open file whose rows lie one after another."""

    def __init__(self, path: Path, signal: Signal, crc: npt.NDArray[np.uint32], fd: int) -> None:
        self.path = path
        self.signal = signal
        self.crc = crc
        self._fd = fd

    def __del__(self) -> None:
        # Closed by the last user, not by the list of open parts: a thread may still be reading.
        os.close(self._fd)

    @classmethod
    def open(
        cls,
        cache: Path,
        key: str,
        opener: Callable[[str], int],
        signal: Signal,
        record: ShardRecord,
        *,
        windows: int,
        part: int,
    ) -> _Shard:
        """Open a shard; its length and index must be what the plan says."""
        try:
            fd = opener(key)
        except OSError as error:
            raise CacheCorrupt(
                f"{cache}: {key} cannot be opened ({error.strerror}); {_remedy(cache)}"
            ) from error
        shard = cls(cache / key, signal, record.crcs(), fd)
        nbytes = os.fstat(fd).st_size
        expected = shard_nbytes(signal, windows=windows, part=part)
        if nbytes != expected:
            raise CacheCorrupt(
                f"{cache}: {key} has {nbytes:,} bytes, expected {expected:,}; {_remedy(cache)}"
            )
        index = shard_index(signal, windows=windows, part=part).tobytes()
        index += crc32c.crc32c(index).to_bytes(CRC_NBYTES, "little")
        if os.pread(fd, len(index), windows * signal.stride) != index:
            raise CacheCorrupt(
                f"{cache}: {key}: its index does not hold {windows:,} windows in row order; "
                f"{_remedy(cache)}"
            )
        return shard

    def read(
        self, first: int, targets: list[memoryview], due: npt.NDArray[np.bool_] | None
    ) -> None:
        """Rows `first` on, one into each target; those that are `due` held against their CRC."""
        stride, skipped = self.signal.stride, bytearray(CRC_NBYTES)
        for begin in range(0, len(targets), _ROWS_A_CALL):
            some = targets[begin : begin + _ROWS_A_CALL]
            buffers: list[Any] = []
            for target in some:
                buffers += (target, skipped)
            offset = (first + begin) * stride
            try:
                if os.preadv(self._fd, buffers, offset) != len(some) * stride:
                    for row, target in enumerate(some):
                        self._read_slowly(target, offset + row * stride)
            except OSError as error:
                raise CacheCorrupt(
                    f"{self.path}: cannot be read ({error.strerror}); copy it again, from a disk "
                    "that works"
                ) from error
        if due is None:
            return
        for place in np.flatnonzero(due[first : first + len(targets)]).tolist():
            row = first + place
            if crc32c.crc32c(targets[place]) != self.crc[row]:
                raise CacheCorrupt(
                    f"{self.path}: window {row} of this shard is not what its receipt says "
                    "(wrong CRC32C: damaged, or another shard's); "
                    "`had-pipe cache verify` finds all damage"
                )

    def read_all(self, *, check: Check) -> npt.NDArray[Any]:
        """Every row of a small shard."""
        rows = np.empty((len(self.crc), *self.signal.window), dtype=self.signal.dtype)
        every = np.arange(len(rows))
        due = None if check == "never" else np.ones(len(rows), dtype=np.bool_)
        self.read(0, _row_views(rows, every), due)
        return rows

    def _read_slowly(self, target: memoryview, offset: int) -> None:
        """A row that one call did not bring whole: a signal came, or the file shrank."""
        done = 0
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], offset + done)
            if got == 0:
                raise CacheCorrupt(f"{self.path}: became shorter while it was read; copy it again")
            done += got


@dataclass(frozen=True)
class _OpenPart:
    """A part's small arrays, and its open shard of values."""

    kmer_id: npt.NDArray[np.uint16]
    mask: npt.NDArray[np.bool_]
    reversed: npt.NDArray[np.bool_]
    value: _Shard
    scale: npt.NDArray[np.float16] | None

    def read_values(
        self,
        rows: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        out: npt.NDArray[Any],
        due: npt.NDArray[np.bool_] | None,
    ) -> None:
        """Neighbouring rows of the part to their places in `out`."""
        assert out.dtype == self.value.signal.dtype
        assert out.shape[1:] == self.value.signal.window
        targets = _row_views(out, places)
        self.value.read(int(rows[0]), targets, due)


def _row_views(array: npt.NDArray[Any], rows: npt.NDArray[np.int64]) -> list[memoryview]:
    """The bytes of some rows of an array, writable in place."""
    assert array.flags.c_contiguous
    flat = array.reshape(-1).view(np.uint8).data
    nbytes = array[0].nbytes
    return [flat[row * nbytes : (row + 1) * nbytes] for row in rows.tolist()]
