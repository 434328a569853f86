"""windows.parquet: where each window lies, read within bounds that follow from the plan.

Parquet pages are compressed, and a page of a few bytes may say that it unpacks to gigabytes. So
everything that decides how much memory the decoder takes is looked at first: the footer's length,
the schema, the row groups, and the header of every page of what is about to be decoded.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from had_pipe.cache.door import open_object
from had_pipe.cache.layout import WINDOWS, Plan
from had_pipe.errors import CacheCorrupt, shown

COLUMNS = {
    "split": "string",
    "window": "int64",
    "genome": "string",
    "contig": "string",
    "start": "int64",
    "soft_masked_bases": "int32",
    "index": "int64",
}
GROUP_ROWS = 1 << 17
"""Rows of a row group; the last of a split may have fewer."""

_MAGIC = b"PAR1"
_UNCOMPRESSED, _ZSTD = 0, 6  # CompressionCodec of parquet.thrift
_FOOTER_A_GROUP = 1 << 14
_LONGEST_HEADER = 1 << 16
_MOST_PAGES = 1024
_LONGEST_NAME = 4096
_AT_ONCE = 1 << 14


class WindowTable:
    """An open windows.parquet whose frame was held against the plan.

    Raises CacheRefused or CacheCorrupt. For one thread.
    """

    def __init__(
        self, cache: Path, plan: Plan, *, opener: Callable[[str], int] | None = None
    ) -> None:
        """`opener` opens an object where it is not simply a file of the folder."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._cache = cache
        self._room = plan.table_nbytes
        self._errors = (pa.ArrowException, OSError, LookupError, ValueError, OverflowError)
        try:
            opened = opener(WINDOWS) if opener is not None else open_object(cache, WINDOWS)
            self._file = os.fdopen(opened, "rb")
        except FileNotFoundError:
            self._refuse("is missing")
        except OSError as error:
            self._refuse(f"cannot be read ({error.strerror})")
        try:
            windows = [plan.splits[split].windows for split in sorted(plan.splits)]
            self._groups = [
                min(GROUP_ROWS, count - first)
                for count in windows
                for first in range(0, count, GROUP_ROWS)
            ]
            self._check_frame()
            try:
                self._table = pq.ParquetFile(
                    self._file,
                    read_dictionary=[name for name, kind in COLUMNS.items() if kind == "string"],
                    thrift_string_size_limit=1 << 20,
                    thrift_container_size_limit=1 << 16,
                )
            except self._errors as error:
                self._refuse(f"is damaged ({type(error).__name__})")
            self._check_schema()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()

    def sha256(self) -> str:
        """Of the file as it lies on disk."""
        self._file.seek(0)
        return hashlib.file_digest(self._file, "sha256").hexdigest()

    def row(self, place: int) -> dict[str, Any]:
        """One row, counted over all splits in alphabetical order."""
        return self.rows([place])[0]

    def rows(self, places: Sequence[int]) -> list[dict[str, Any]]:
        """Some rows, in the order asked for; each row group is decoded once."""
        found: dict[int, dict[str, Any]] = {}
        first = 0
        for group, rows in enumerate(self._groups):
            inside = [place for place in set(places) if first <= place < first + rows]
            if inside:
                table = self._read(group).take([place - first for place in inside])
                columns = [table[name].to_pylist() for name in COLUMNS]
                for place, values in zip(inside, zip(*columns, strict=True), strict=True):
                    self._check_names(value for value in values if isinstance(value, str))
                    found[place] = dict(zip(COLUMNS, values, strict=True))
            first += rows
        assert all(0 <= place < first for place in places), "no such window in the plan"
        return [found[place] for place in places]

    def lines(self) -> Iterator[bytes]:
        """The table as the text that its digest is taken of, some thousand lines at a time."""
        for group, rows in enumerate(self._groups):
            table = self._read(group)
            names = {}
            for name, kind in COLUMNS.items():
                if kind == "string":
                    (chunk,) = table[name].chunks
                    names[name] = chunk.dictionary.to_pylist()
                    self._check_names(names[name])
            for first in range(0, rows, _AT_ONCE):
                columns: list[list[Any]] = []
                for name in COLUMNS:
                    some = table[name].slice(first, _AT_ONCE)
                    if name in names:
                        (chunk,) = some.chunks
                        columns.append([names[name][i] for i in chunk.indices.to_pylist()])
                    else:
                        columns.append(some.to_pylist())
                yield "".join(
                    "\t".join(map(str, row)) + "\n" for row in zip(*columns, strict=True)
                ).encode()

    def _check_frame(self) -> None:
        """Lengths of the file and of its footer, before anything of it is parsed."""
        nbytes = os.fstat(self._file.fileno()).st_size
        if nbytes > self._room:
            self._refuse(f"has {nbytes:,} bytes, expected at most {self._room:,}")
        end = os.pread(self._file.fileno(), 8, max(0, nbytes - 8))
        footer = int.from_bytes(end[:4], "little")
        if end[4:] != _MAGIC or os.pread(self._file.fileno(), 4, 0) != _MAGIC:
            self._refuse("is no Parquet file")
        if footer > min(nbytes - 12, _FOOTER_A_GROUP * (4 + len(self._groups))):
            self._refuse(f"has a footer of {footer:,} bytes")
        raw = os.pread(self._file.fileno(), footer, nbytes - 8 - footer)
        try:
            # Arrow ends the whole process where a compression is asked for that it does not know.
            metadata, _ = _thrift_struct(raw, 0, depth=12)
            compressions = {column[3][4] for group in metadata[4] for column in group[1]}
        except (ValueError, LookupError, TypeError):
            self._refuse("is damaged (its footer)")
        if not compressions <= {_UNCOMPRESSED, _ZSTD}:
            self._refuse("has a column of another compression")

    def _check_schema(self) -> None:
        schema, metadata = self._table.schema_arrow, self._table.metadata
        found = {field.name: str(getattr(field.type, "value_type", field.type)) for field in schema}
        flat = all(metadata.schema.column(i).max_repetition_level == 0 for i in range(len(schema)))
        if found != COLUMNS or metadata.num_columns != len(COLUMNS) or not flat:
            self._refuse(f"has columns {shown(str(found))[:300]}, expected {COLUMNS}")
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        if groups != self._groups:
            self._refuse(
                f"has {len(groups):,} row groups of {sum(groups):,} rows, expected "
                f"{len(self._groups):,} of {sum(self._groups):,}"
            )

    def _read(self, group: int) -> Any:
        """One row group, strings as dictionaries: a name stands in memory once."""
        try:
            for column in range(len(COLUMNS)):
                self._check_pages(self._table.metadata.row_group(group).column(column), group)
            table = self._table.read_row_group(group, use_threads=False)
        except self._errors as error:
            self._refuse(f"is damaged ({type(error).__name__})")
        if len(table) != self._groups[group] or any(column.null_count for column in table.columns):
            self._refuse("lacks values")
        return table

    def _check_pages(self, column: Any, group: int) -> None:
        """Every page of a column chunk, by its header: how much room it will take, and where."""
        rows = self._groups[group]
        if column.file_path:
            self._refuse("has a column elsewhere")
        at = column.data_page_offset
        if column.dictionary_page_offset is not None:
            at = min(at, column.dictionary_page_offset)
        end = at + column.total_compressed_size
        room = self._room
        for _ in range(_MOST_PAGES):
            if at == end:
                return
            raw = os.pread(self._file.fileno(), _LONGEST_HEADER, at)
            header, length = _thrift_struct(raw, 0, depth=4)
            unpacked, packed = header[2], header[3]
            # Of a data page, a dictionary page, a data page of the second version.
            about = header.get(5) or header.get(7) or header.get(8)
            if not isinstance(about, dict) or not 0 <= about[1] <= rows:
                break
            if not (0 <= unpacked <= room and 0 <= packed <= end - at - length):
                break
            room -= unpacked
            at += length + packed
        self._refuse("is damaged (its pages)")

    def _check_names(self, names: Any) -> None:
        for name in names:
            if not isinstance(name, str) or len(name) > _LONGEST_NAME or shown(name) != name:
                self._refuse("holds a name that is none")

    def _refuse(self, what: str) -> NoReturn:
        raise CacheCorrupt(
            f"{self._cache}: {WINDOWS} {what}; copy the cache again, or start it again where it "
            "was made"
        )


def _thrift_struct(raw: bytes, at: int, *, depth: int) -> tuple[dict[int, Any], int]:
    """A struct of Thrift's compact protocol, and where it ends; of text only the end.

    Field numbers must ascend, so that no field can stand twice. Raises ValueError, IndexError.
    """
    if depth <= 0:
        raise ValueError("too deep")
    fields: dict[int, Any] = {}
    number = 0
    while raw[at]:
        step, kind = raw[at] >> 4, raw[at] & 15
        if step == 0:
            raise ValueError("fields that do not ascend")
        number, at = number + step, at + 1
        fields[number], at = _thrift_value(raw, at, kind, depth)
    return fields, at + 1


def _thrift_value(raw: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    match kind:
        case 1 | 2:
            return kind == 1, at
        case 3:
            return raw[at], at + 1
        case 4 | 5 | 6:
            value, at = _varint(raw, at)
            return value >> 1 ^ -(value & 1), at
        case 8:
            length, at = _varint(raw, at)
            if at + length > len(raw):
                raise ValueError("text beyond the end")
            return None, at + length
        case 9:
            count, kind, at = raw[at] >> 4, raw[at] & 15, at + 1
            if count == 15:
                count, at = _varint(raw, at)
            if depth <= 0 or count > len(raw) - at:  # each takes a byte at least
                raise ValueError("a list too deep or beyond the end")
            values = []
            for _ in range(count):
                # A truth takes a byte here; in a struct its kind says which it is.
                value, at = _thrift_value(raw, at, 3 if kind in (1, 2) else kind, depth - 1)
                values.append(value)
            return values, at
        case 12:
            return _thrift_struct(raw, at, depth=depth - 1)
    raise ValueError("a kind of value that Parquet's headers do not have")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        value |= (raw[at + place] & 127) << 7 * place
        if raw[at + place] < 128:
            return value, at + place + 1
    raise ValueError("a number too long")
