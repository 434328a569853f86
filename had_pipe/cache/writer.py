"""Making a cache: everything known at plan time first, then part after part.

A part is written aside, synced, renamed, and then recorded by its receipt, so a kill at any moment
leaves it missing, never torn. What to store and in which order is the caller's to say.

W windows of a split, T k-mers per window, G stored groups, D channels, B windows of a batch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import crc32c
import numpy as np
import numpy.typing as npt

from had_pipe.cache.codebook import BYTE_VALUES, Codebook
from had_pipe.cache.codec import Codec, Statistics
from had_pipe.cache.layout import (
    DATA,
    PLAN,
    WINDOWS,
    WORK,
    Part,
    Plan,
    Receipt,
    ShardRecord,
    Signal,
    shard_index,
)
from had_pipe.cache.loci import GROUP_ROWS
from had_pipe.durable import make_folder, publish, storage, sync_tree, write_file

ORIENTATION = (
    "kmer_id is on the forward strand; mask and embedding follow the strand the teacher saw. "
    "Row g of embedding is the g-th stored group t of mask. It covers bases start + 6t to "
    "start + 6t + 6 of the contig, or, where reversed, start + 6(T-1-t) to start + 6(T-1-t) + 6 "
    "on the reverse strand. Coordinates are 0-based and half-open; contig and start are in "
    "windows.parquet."
)


@dataclass(frozen=True)
class WindowTable:
    """Where the windows of one split lie, in disk order; all columns (W)."""

    genome: npt.NDArray[np.int32]
    """Index into the plan's genomes."""
    contig: npt.NDArray[np.int32]
    """Index into `contigs`."""
    contigs: Sequence[str]
    start: npt.NDArray[np.int64]
    soft_masked_bases: npt.NDArray[np.int32]
    index: npt.NDArray[np.int64]
    """Place in genome order over all splits: the key of masks and strands."""


@dataclass(frozen=True)
class SplitData:
    """All that is known of one split before the teacher runs."""

    table: WindowTable
    kmer_id: npt.NDArray[np.uint16]
    """(W, T), forward strand."""
    mask: Mapping[int, npt.NDArray[np.bool_]]
    """View -> (W, T), in the view's orientation."""
    reversed: Mapping[int, npt.NDArray[np.bool_]]
    """View -> (W)."""


def create(
    cache: Path,
    *,
    described: Mapping[str, Any],
    splits: Mapping[str, SplitData],
    statistics: Statistics,
    fidelity: Mapping[str, float],
    codebook: Codebook | None = None,
) -> Plan:
    """Write plan.json and all that is made at plan time; `described` holds the plan's other fields.

    Built in `.work/`, then renamed into place, plan.json last: without it there is no cache, and
    what a killed attempt left is cleared away. The caller holds the lease on planning, and holds
    what lies there then against its recipe: where a plan came meanwhile, that stays.
    """
    splits = dict(sorted(splits.items()))
    names = [genome["name"] for genome in described["genomes"]]
    lines = hashlib.sha256()
    for split, data in splits.items():
        for line in _table_lines(split, data.table, names):
            lines.update(line)
    arrays = {"mean": statistics.mean, "std": statistics.std}
    arrays |= codebook.arrays if codebook is not None else {}
    contents = {"windows": lines.hexdigest(), **_array_digests(splits, arrays)}
    plan = Plan.new(
        {
            **described,
            "splits": {
                split: {"windows": len(data.kmer_id), "views": sorted(data.mask)}
                for split, data in splits.items()
            },
            "statistics": statistics_digest(statistics),
            "contents": contents,
        }
    )
    aside = cache / WORK / f"plan-{uuid.uuid4().hex}"
    with storage(cache):
        for leftover in (cache / WORK).glob("plan-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(aside)
        _write_zarr(aside / DATA, plan, splits, arrays, fidelity)
        _write_windows(aside / WINDOWS, splits, names)
        sync_tree(aside)
        # Whoever slept so long that another planned must not touch what may be in use.
        if (cache / PLAN).exists():
            shutil.rmtree(aside)
            return plan
        if (cache / DATA).exists():
            shutil.rmtree(cache / DATA)
        (cache / WINDOWS).unlink(missing_ok=True)
    publish(aside / DATA, cache / DATA)
    publish(aside / WINDOWS, cache / WINDOWS)
    write_file(cache / PLAN, plan.to_json(), aside=aside)
    shutil.rmtree(aside)
    return plan


def digest(array: npt.NDArray[Any]) -> str:
    """SHA-256 of an array's elements in C order, little-endian."""
    plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(plain.view(np.uint8).reshape(-1).data).hexdigest()


def statistics_digest(statistics: Statistics) -> str:
    """The identity of a normalised space: SHA-256 of mean then std."""
    return digest(np.concatenate([statistics.mean, statistics.std]))


def _array_digests(
    splits: Mapping[str, SplitData], statistics: Mapping[str, npt.NDArray[Any]]
) -> dict[str, str]:
    found = {f"statistics/embedding/{name}": digest(array) for name, array in statistics.items()}
    for split, data in splits.items():
        found[f"{split}/kmer_id"] = digest(data.kmer_id)
        for view in data.mask:
            found[f"{split}/{view}/mask"] = digest(data.mask[view])
            found[f"{split}/{view}/reversed"] = digest(data.reversed[view])
    return found


def _table_lines(split: str, table: WindowTable, genomes: Sequence[str]) -> Iterator[bytes]:
    """The window table as the text its digest is taken of, some thousand lines at a time."""
    for first in range(0, len(table.start), 1 << 16):
        some = slice(first, first + (1 << 16))
        columns = zip(
            table.genome[some].tolist(),
            table.contig[some].tolist(),
            table.start[some].tolist(),
            table.soft_masked_bases[some].tolist(),
            table.index[some].tolist(),
            strict=True,
        )
        yield "".join(
            f"{split}\t{row}\t{genomes[genome]}\t{table.contigs[contig]}\t{start}\t{soft}\t{index}\n"
            for row, (genome, contig, start, soft, index) in enumerate(columns, start=first)
        ).encode()


def _write_windows(path: Path, splits: Mapping[str, SplitData], genomes: Sequence[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [
            ("split", pa.string()),
            ("window", pa.int64()),
            ("genome", pa.string()),
            ("contig", pa.string()),
            ("start", pa.int64()),
            ("soft_masked_bases", pa.int32()),
            ("index", pa.int64()),
        ]
    )
    with pq.ParquetWriter(path, schema, compression="zstd") as file:
        for split, data in splits.items():
            table, windows = data.table, len(data.kmer_id)
            file.write_table(
                pa.table(
                    {
                        "split": pa.array([split]).take(pa.array(np.zeros(windows, np.int64))),
                        "window": np.arange(windows, dtype=np.int64),
                        "genome": pa.array(list(genomes)).take(pa.array(table.genome)),
                        "contig": pa.array(list(table.contigs)).take(pa.array(table.contig)),
                        "start": table.start,
                        "soft_masked_bases": table.soft_masked_bases,
                        "index": table.index,
                    },
                    schema=schema,
                ),
                row_group_size=GROUP_ROWS,
            )


def metadata(plan: Plan, fidelity: Mapping[str, Any]) -> dict[str, Any]:
    """What every zarr.json of a plan's cache says, by key."""
    kept: dict[str, Any] = {}
    _hierarchy(kept, plan, fidelity)
    return {f"{DATA}/{key}": json.loads(buffer.to_bytes()) for key, buffer in kept.items()}


def _write_zarr(
    path: Path,
    plan: Plan,
    splits: Mapping[str, SplitData],
    statistics: Mapping[str, npt.NDArray[Any]],
    fidelity: Mapping[str, float],
) -> None:
    """The Zarr hierarchy: all metadata, and every array but the embeddings."""
    arrays = _hierarchy(path, plan, fidelity)
    assert {name: (str(a.dtype), a.shape) for name, a in statistics.items()} == (
        plan.statistics_arrays
    )

    for name, values in statistics.items():
        arrays[f"statistics/embedding/{name}"][...] = values
    for split, data in splits.items():
        arrays[f"{split}/kmer_id"][...] = data.kmer_id
        for view in sorted(data.mask):
            arrays[f"{split}/{view}/mask"][...] = data.mask[view]
            arrays[f"{split}/{view}/reversed"][...] = data.reversed[view]


def _hierarchy(
    store: Path | dict[str, Any], plan: Plan, fidelity: Mapping[str, Any]
) -> dict[str, Any]:
    """All metadata; the arrays by path, their values still to be written."""
    import zarr
    from zarr.codecs import Crc32cCodec

    root = zarr.create_group(
        store,
        attributes={
            "format": plan.format,
            "plan": plan.id,
            "licence": plan.licence,
            "decode": dict(Codec(plan.codec, plan.teacher.dtype).formula),
            "orientation": ORIENTATION,
            "fidelity": dict(fidelity),
        },
    )

    arrays: dict[str, Any] = {}

    def array(
        name: str,
        shape: tuple[int, ...],
        chunk: tuple[int, ...],
        dtype: str,
        dimensions: tuple[str, ...],
        *,
        fill: object,
        shard: tuple[int, ...] | None = None,
    ) -> None:
        arrays[name] = root.create_array(
            name,
            shape=shape,
            chunks=chunk,
            shards=shard,
            dtype=dtype,
            fill_value=fill,
            filters=None,
            compressors=[Crc32cCodec()],
            dimension_names=dimensions,
            config={"write_empty_chunks": True},
        )

    root.create_group("statistics").create_group("embedding")
    for name, (dtype, shape) in plan.statistics_arrays.items():
        array(
            f"statistics/embedding/{name}",
            shape,
            shape,
            dtype,
            _STATISTIC_DIMENSIONS.get(name, ("component",)),
            fill=_FILL[dtype] if dtype == "float32" else 65535,
        )
    part, kmers = plan.part, plan.windows.kmers
    for split, of_split in plan.splits.items():
        windows = of_split.windows
        tiles, columns = (windows, kmers), ("window", "kmer")
        root.create_group(split)
        array(f"{split}/kmer_id", tiles, (part, kmers), "uint16", columns, fill=65535)
        for view in of_split.views:
            below = f"{split}/{view}"
            root.create_group(below).create_group("embedding")
            array(f"{below}/mask", tiles, (part, kmers), "bool", columns, fill=False)
            array(f"{below}/reversed", (windows,), (part,), "bool", ("window",), fill=False)
            for signal in plan.signals:
                last = "byte" if signal.dtype == "uint8" else "channel"
                array(
                    f"{below}/{signal.path}",
                    (windows, *signal.window),
                    (1, *signal.window),
                    signal.dtype,
                    ("window", "group", last)[: 1 + len(signal.window)],
                    fill=_FILL[signal.dtype],
                    shard=(part, *signal.window),
                )
    return arrays


_STATISTIC_DIMENSIONS: Mapping[str, tuple[str, ...]] = {
    "mean": ("channel",),
    "std": ("channel",),
    "rotation": ("component", "channel"),
    "level": ("code", "component"),
}

_FILL: Mapping[str, object] = {
    "int8": -128,
    "uint8": BYTE_VALUES,
    "uint16": 0x7FFF,
    "float16": float("nan"),
    "float32": float("nan"),
}


class PartWriter:
    """Writes the shards of one part, batch after batch, and commits them with a receipt."""

    def __init__(
        self, cache: Path, plan: Plan, part: Part, *, numerics: Mapping[str, str | int]
    ) -> None:
        self._cache = cache
        self._plan = plan
        self._part = part
        self._numerics = dict(numerics)
        self._records: dict[str, ShardRecord] = {}
        self._shards = [
            _Shard(cache / WORK / f"{part.stem}.{signal.path.replace('/', '-')}", signal)
            for signal in plan.signals
        ]

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for shard in self._shards:
            shard.discard()

    def append(self, *arrays: npt.NDArray[Any]) -> None:
        """The next windows: one array (B, ...) per signal of the plan, in its order."""
        for shard, array in zip(self._shards, arrays, strict=True):
            shard.append(array)

    def sync(self) -> None:
        """End the shards, still aside. Every window of the part must be there."""
        part, plan = self._part, self._plan
        windows = plan.part_windows(part)
        for shard in self._shards:
            key = part.shard_key(shard.signal)
            self._records[key] = shard.finish(windows=windows, part=plan.part)

    def commit(self) -> Receipt:
        """Publish the synced shards, then the receipt."""
        part, plan = self._part, self._plan
        assert len(self._records) == len(self._shards)
        for shard in self._shards:
            final = self._cache / part.shard_key(shard.signal)
            planned = self._cache / DATA / part.split / str(part.view) / shard.signal.path
            make_folder(final.parent, below=planned)
            publish(shard.path, final)
        receipt = Receipt(
            format=plan.format,
            plan=plan.id,
            split=part.split,
            view=part.view,
            part=part.number,
            windows=plan.part_windows(part),
            numerics=self._numerics,
            objects=self._records,
        )
        final = self._cache / part.receipt_key
        make_folder(final.parent, below=self._cache)
        write_file(final, receipt.to_json(), aside=self._cache / WORK)
        return receipt


class _Shard:
    """One shard object while it is written: rows with their CRCs, then the index."""

    def __init__(self, stem: Path, signal: Signal) -> None:
        self.signal = signal
        self.path = stem.with_name(f"{stem.name}.{uuid.uuid4().hex}.tmp")
        self._sha256 = hashlib.sha256()
        self._crc: list[int] = []
        make_folder(self.path.parent)
        with storage(self.path):
            self._file: IO[bytes] = self.path.open("wb")

    def append(self, array: npt.NDArray[Any]) -> None:
        signal = self.signal
        assert array.shape[1:] == signal.window
        assert array.dtype == np.dtype(signal.dtype)
        rows = np.empty((len(array), signal.stride), dtype=np.uint8)
        payload = np.ascontiguousarray(array).view(np.uint8).reshape(len(array), signal.nbytes)
        rows[:, : signal.nbytes] = payload
        crc = [crc32c.crc32c(row.data) for row in payload]
        rows[:, signal.nbytes :] = np.array(crc, dtype="<u4").view(np.uint8).reshape(-1, 4)
        self._crc += crc
        self._write(rows)

    def finish(self, *, windows: int, part: int) -> ShardRecord:
        assert len(self._crc) == windows
        index = shard_index(self.signal, windows=windows, part=part).view(np.uint8).reshape(-1)
        self._write(index)
        self._write(np.array([crc32c.crc32c(index.data)], dtype="<u4").view(np.uint8))
        with storage(self.path):
            self._file.flush()
            os.fsync(self._file.fileno())
            nbytes = self._file.tell()
            self._file.close()
        return ShardRecord(
            nbytes=nbytes,
            sha256=self._sha256.hexdigest(),
            crc32c=ShardRecord.pack(np.array(self._crc, dtype=np.uint32)),
        )

    def discard(self) -> None:
        """Remove what was not published."""
        with suppress(OSError):  # a full disk says so again when what is buffered is flushed
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _write(self, data: npt.NDArray[np.uint8]) -> None:
        with storage(self.path):
            self._file.write(data.data)
        self._sha256.update(data.data)


def clear_temporaries(cache: Path, part: Part) -> None:
    """Remove what killed processes left of a part in `.work/`. The caller holds its lease."""
    work = cache / WORK
    with storage(work):
        for leftover in work.glob(f"{part.stem}.*.tmp"):
            leftover.unlink(missing_ok=True)
