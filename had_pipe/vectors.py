"""Embeddings of named sequences in files that others read, Parquet or Zarr: written as they come,
and whole or absent.

It does not know whose embeddings they are. N rows of a write, E channels.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from had_pipe.durable import make_folder, publish, require_room, storage, sync_tree
from had_pipe.errors import RecipeError

Per = Literal["base", "kmer", "sequence"]
"""What one row is the embedding of."""
PER: tuple[Per, ...] = get_args(Per)

NOTE = "had_pipe"
"""Under this name a file tells, as JSON, what it was made from."""

_BLOCK = 1 << 25
"""Bytes of embeddings that are kept in memory, and written at once."""
_CHUNK = 1 << 20
"""Bytes of embeddings that a reader of Zarr gets at once."""
_NAMES = 1 << 16
"""Sequences whose names a reader of Zarr gets at once."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """A sequence as its rows are told of."""

    name: str
    bases: int
    unknown: int
    """Bases that are not A, C, G or T."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much will be written."""

    sequences: int
    rows: int
    channels: int

    @property
    def nbytes(self) -> int:
        """Of the embeddings; names and places come on top."""
        return self.rows * self.channels * 4


class Rows(Protocol):
    """What takes embeddings, sequence by sequence and row by row."""

    def begin(self, sequence: Named) -> None:
        """Rows from here on are of this sequence."""

    def add(self, start_N: npt.NDArray[np.int64], feat_NE: npt.NDArray[np.float32]) -> None:
        """Its next rows; `start_N` is the first base of each."""


def check_name(out: Path) -> None:
    """Raise RecipeError unless the name says what the file is to be, and lies in a folder."""
    if out.suffix not in (".parquet", ".zarr"):
        raise RecipeError(
            f"--out {out}: expected a name that ends in .parquet (one file) or .zarr (a folder)"
        )
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise RecipeError(f"--out {out}: {above} is not a folder; use another name")


def note_of(out: Path) -> Any:
    """What a finished file tells it was made from; None where it tells nothing."""
    try:
        if out.suffix == ".zarr":
            return json.loads((out / "zarr.json").read_bytes())["attributes"][NOTE]
        import pyarrow.parquet as pq

        return json.loads(pq.read_schema(out).metadata[NOTE.encode()])
    except (OSError, ValueError, LookupError, TypeError):  # Arrow's own are ValueErrors
        return None


@contextmanager
def writing(out: Path, *, per: Per, size: Size, note: Mapping[str, Any]) -> Iterator[Rows]:
    """Take rows; the file appears when the block ends well, and leaves nothing otherwise.

    Raises StorageError, before anything is written where there is no room.
    """
    make_folder(out.parent)
    require_room(out, size.nbytes, 32 + size.nbytes // _BLOCK)
    aside = out.with_name(f".{out.name}.{uuid.uuid4().hex}.tmp")
    kind = _Zarr if out.suffix == ".zarr" else _Parquet
    try:
        with storage(out):
            rows = kind(aside, per=per, size=size, note=note)
            yield rows
            rows.finish()
        if out.exists():
            raise RecipeError(f"--out {out}: was made by somebody else meanwhile; use another name")
        publish(aside, out)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
        raise


class _Blocks:
    """Rows in blocks of equal size: what comes in pieces goes out in blocks, the last one short."""

    def __init__(self, *, channels: int) -> None:
        chunk = max(1, _CHUNK // (4 * channels))
        self.chunk, self.block = chunk, chunk * (_BLOCK // _CHUNK)
        self.held = 0
        # Rows come few at a time; what is held is made when the first of them does.
        self._feat_BE: npt.NDArray[np.float32] | None = None
        self._channels = channels

    def fill(self, feat_NE: npt.NDArray[np.float32]) -> int:
        """Take as many rows as there is room for; how many."""
        if self._feat_BE is None:
            self._feat_BE = np.empty((self.block, self._channels), np.float32)
        taken = min(len(feat_NE), self.block - self.held)
        self._feat_BE[self.held : self.held + taken] = feat_NE[:taken]
        self.held += taken
        return taken

    def empty(self) -> npt.NDArray[np.float32]:
        """What is held, which is written before more is taken."""
        assert self._feat_BE is not None
        feat_NE = self._feat_BE[: self.held]
        self.held = 0
        return feat_NE


class _Parquet:
    """One table: a row a sequence, or a row a base or k-mer with the name of its sequence."""

    def __init__(self, aside: Path, *, per: Per, size: Size, note: Mapping[str, Any]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._pa, self._aside, self._per, self._channels = pa, aside, per, size.channels
        told = ("bases", "unknown") if per == "sequence" else ("start",)
        vector = pa.list_(pa.field("element", pa.float32(), nullable=False), size.channels)
        self._schema = pa.schema(
            [
                pa.field("name", pa.string(), nullable=False),
                *(pa.field(column, pa.int64(), nullable=False) for column in told),
                pa.field("embedding", vector, nullable=False),
            ],
            metadata={NOTE: json.dumps(note)},
        )
        # Floats of a network do not shrink; names and places do.
        packed = dict.fromkeys(("name", *told), "zstd")
        self._file = pq.ParquetWriter(
            aside,
            self._schema,
            use_dictionary=["name"],
            compression={**packed, "embedding.list.element": "none"},
        )
        self._blocks = _Blocks(channels=size.channels)
        self._sequences: list[Named] = []
        self._sequence_of: list[npt.NDArray[np.int32]] = []
        self._start: list[npt.NDArray[np.int64]] = []

    def begin(self, sequence: Named) -> None:
        self._sequences.append(sequence)

    def add(self, start_N: npt.NDArray[np.int64], feat_NE: npt.NDArray[np.float32]) -> None:
        while len(feat_NE):
            taken = self._blocks.fill(feat_NE)
            self._sequence_of.append(np.full(taken, len(self._sequences) - 1, np.int32))
            self._start.append(start_N[:taken])
            start_N, feat_NE = start_N[taken:], feat_NE[taken:]
            if self._blocks.held == self._blocks.block:
                self._write()

    def _write(self) -> None:
        if not self._blocks.held:
            return
        pa = self._pa
        of_N = pa.array(np.concatenate(self._sequence_of))
        columns = {"name": pa.array([s.name for s in self._sequences]).take(of_N)}
        if self._per == "sequence":
            columns["bases"] = pa.array([s.bases for s in self._sequences]).take(of_N)
            columns["unknown"] = pa.array([s.unknown for s in self._sequences]).take(of_N)
        else:
            columns["start"] = pa.array(np.concatenate(self._start))
        feat_NE = self._blocks.empty()
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(
            pa.array(feat_NE.reshape(-1)), type=self._schema.field("embedding").type
        )
        self._file.write_table(pa.table(columns, schema=self._schema), row_group_size=len(of_N))
        # The last sequence may go on.
        del self._sequences[:-1]
        self._sequence_of, self._start = [], []

    def finish(self) -> None:
        self._write()
        self._file.close()
        with self._aside.open("rb") as file:
            os.fsync(file.fileno())


class _Zarr:
    """`embedding` (row, channel), rows of all sequences one after another; `name`, `bases` and
    `unknown` (sequence); where rows are not sequences, those of sequence i are `offset[i]` to
    `offset[i + 1]`.
    """

    def __init__(self, aside: Path, *, per: Per, size: Size, note: Mapping[str, Any]) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        self._aside, self._per = aside, per
        self._blocks = _Blocks(channels=size.channels)
        root = zarr.create_group(aside, attributes={NOTE: dict(note)})

        def array(
            name: str,
            shape: tuple[int, ...],
            dimensions: tuple[str, ...],
            dtype: Any,
            chunk: tuple[int, ...],
            shard: tuple[int, ...] | None = None,
        ) -> Any:
            return root.create_array(
                name,
                shape=shape,
                chunks=chunk,
                shards=shard,
                dtype=dtype,
                fill_value={"float32": float("nan"), str: ""}.get(dtype, -1),
                compressors=[Crc32cCodec()] if dtype == "float32" else "auto",
                dimension_names=dimensions,
                config={"write_empty_chunks": True},
            )

        row = "sequence" if per == "sequence" else per
        self._embedding = array(
            "embedding",
            (size.rows, size.channels),
            (row, "channel"),
            "float32",
            (self._blocks.chunk, size.channels),
            (self._blocks.block, size.channels),
        )
        many = (_NAMES,)
        self._of_sequence = {
            "name": array("name", (size.sequences,), ("sequence",), str, many),
            "bases": array("bases", (size.sequences,), ("sequence",), "int64", many),
            "unknown": array("unknown", (size.sequences,), ("sequence",), "int64", many),
        }
        if per != "sequence":
            self._of_sequence["offset"] = array(
                "offset", (size.sequences + 1,), ("boundary",), "int64", many
            )
        self._begun: dict[str, list[Any]] = {name: [] for name in self._of_sequence}
        self._sequences = self._rows = 0

    def begin(self, sequence: Named) -> None:
        for name, values in self._begun.items():
            if name == "offset":
                values.append(self._rows + self._blocks.held)
            else:
                values.append(getattr(sequence, name))
        if len(self._begun["name"]) == _NAMES:
            self._write_sequences()

    def add(self, start_N: npt.NDArray[np.int64], feat_NE: npt.NDArray[np.float32]) -> None:
        while len(feat_NE):
            feat_NE = feat_NE[self._blocks.fill(feat_NE) :]
            if self._blocks.held == self._blocks.block:
                self._write()

    def _write(self) -> None:
        if self._blocks.held:
            feat_NE = self._blocks.empty()
            self._embedding[self._rows : self._rows + len(feat_NE)] = feat_NE
            self._rows += len(feat_NE)

    def _write_sequences(self) -> None:
        many = len(self._begun["name"])
        for name, values in self._begun.items():
            kind = object if name == "name" else np.int64
            if values:
                place = slice(self._sequences, self._sequences + len(values))
                self._of_sequence[name][place] = np.array(values, dtype=kind)
            values.clear()
        self._sequences += many

    def finish(self) -> None:
        self._write()
        if "offset" in self._begun:
            self._begun["offset"].append(self._rows)
        self._write_sequences()
        sync_tree(self._aside)
