"""Genomes in: FASTA (plain, gzip, bgzip) and 2bit, told apart by content, checked, and named.

Reading is strict: what the usual readers skip, cut or keep silently (duplicate names, empty
records, FASTQ, proteins, NUL, spaces, a bgzip file without its end) is refused with file, record
and line. One contig is in memory at a time, at about six bytes a base while a FASTA record is
taken in and two afterwards. The identity of a genome is its GA4GH digest, which ignores case and
file format: a FASTA and the 2bit made from it have the same.

This module does not decide which bases become windows.
"""

from __future__ import annotations

import gzip
import io
import json
import mmap
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NoReturn, cast

import numpy as np
import numpy.typing as npt

from had_pipe.errors import InputError

OTHER = 4
"""Base code of anything that is not A, C, G or T."""

_CODE = bytes({65: 0, 67: 1, 71: 2, 84: 3}.get(b & ~32, OTHER) for b in range(256))
_PLAIN = b"ACGTNacgtn"
_IUPAC = frozenset("ACGTNRYSWKMBDHV")

_GZIP = b"\x1f\x8b"
# DNA packs four to one, and a genome that is mostly N twenty to one; a bomb a thousand to one.
_MOST_RATIO = 100
_ALWAYS_UNPACKED = 1 << 27
_LONGEST_NAME = 1000
_TWOBIT = 0x1A412743
# The empty block that bgzip ends a file with (SAM specification, section 4.1.2).
_BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_FOREIGN = {
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"CRAM": "CRAM",
}


@dataclass(frozen=True, eq=False)
class Contig:
    """One sequence of a genome. Coordinates on it are 0-based, half-open, here and everywhere."""

    name: str
    """First word of the header."""
    base: npt.NDArray[np.uint8]
    """(L,) codes 0-3 for A, C, G, T; OTHER for the rest."""
    soft_masked: npt.NDArray[np.bool_]
    """(L,) lower-case a, c, g, t in the file. (2bit readers do not tell n from N.)"""
    digest: str
    """GA4GH refget: "SQ." and sha512t24u of the upper-cased sequence."""
    other: Mapping[str, int]
    """Upper-cased letters that are not A, C, G, T, and how many of each."""


def read_contigs(path: Path) -> Iterator[Contig]:
    """The contigs of a genome, in file order, one in memory at a time.

    What kind of file it is, is settled in the call; the contents are checked as they are read, so
    a file is sound only when the last contig has been taken.
    """
    head = _head(path)
    return _unchanged(path, _of_kind(path, head))


def _of_kind(path: Path, head: bytes) -> Iterator[Contig]:
    for magic, kind in _FOREIGN.items():
        if head.startswith(magic):
            raise InputError(
                f"{path}: {kind} file; expected FASTA (plain, gzip, bgzip) or 2bit: "
                "convert it first"
            )
    signature = int.from_bytes(head[:4], "little") if len(head) >= 4 else 0
    if signature == _TWOBIT:
        return _read_2bit(path)
    if signature == int.from_bytes(_TWOBIT.to_bytes(4, "little"), "big"):
        raise InputError(
            f"{path}: 2bit file written on a big-endian machine; expected little-endian: "
            "make it again with faToTwoBit"
        )
    return _read_fasta(path, compressed=head.startswith(_GZIP))


def _unchanged(path: Path, contigs: Iterator[Contig]) -> Iterator[Contig]:
    """The contigs, if the file is the same before the first and after the last."""
    before = path.stat()
    yield from contigs
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise InputError(
            f"{path}: changed while it was read (from {before.st_size:,} to {after.st_size:,} "
            "bytes): wait until it has been written, then run again"
        )


def collection_digest(contigs: Sequence[tuple[str, int, str]]) -> str:
    """The genome's GA4GH sequence-collection digest (level 0) from (name, length, digest) each."""
    level_2: dict[str, list[str] | list[int]] = {
        "lengths": [length for _, length, _ in contigs],
        "names": [name for name, _, _ in contigs],
        "sequences": [digest for _, _, digest in contigs],
    }
    level_1 = {key: _sha512t24u(_canonical(values)) for key, values in level_2.items()}
    # The specification's inherent attributes: what a collection is, is its names and sequences.
    inherent = {key: level_1[key] for key in ("names", "sequences")}
    return _sha512t24u(_canonical(inherent))


def _canonical(value: object) -> bytes:
    """RFC 8785 JSON, for the strings and integers that sequence collections hold."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, sort_keys=True).encode()


def _sha512t24u(data: bytes) -> str:
    return cast(str, _library("gtars.refget", "GA4GH digests").sha512t24u_digest(data))


def _library(name: str, purpose: str) -> ModuleType:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError as error:
        raise InputError(
            f"{purpose} need the package {name.partition('.')[0]!r}, which cannot be imported "
            f"({error}): pip install 'had-pipe[extract]'"
        ) from None


def _contig(name: str, raw: bytes) -> Contig:
    """A contig from checked letters."""
    code = np.frombuffer(raw.translate(_CODE), dtype=np.uint8)
    other = Counter(raw.translate(None, _PLAIN).decode("ascii").upper())
    other["N"] = raw.count(b"N") + raw.count(b"n")
    return Contig(
        name=name,
        base=code,
        soft_masked=(np.frombuffer(raw, dtype=np.uint8) >= ord("a")) & (code != OTHER),
        digest="SQ." + _sha512t24u(raw.upper()),
        other={letter: count for letter, count in sorted(other.items()) if count},
    )


# -- files -----------------------------------------------------------------------------------------


def _head(path: Path) -> bytes:
    if path.is_dir():
        raise InputError(f"{path}: is a folder; expected a FASTA or 2bit file")
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file; write the genome to a file first")
    try:
        with path.open("rb") as file:
            return file.read(64)
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected a FASTA or 2bit file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


class _Unpacked(gzip.GzipFile):
    """The contents of a gzip file, as long as they are in proportion to it."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self._path = path
        self._most = max(_ALWAYS_UNPACKED, _MOST_RATIO * path.stat().st_size)

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size >= 0:
            return self._counted(super().read(size))
        return b"".join(iter(lambda: self.read(1 << 20), b""))

    def read1(self, size: int = -1) -> bytes:
        return self._counted(super().read1(size))

    def _counted(self, data: bytes) -> bytes:
        if self.tell() > self._most:
            raise InputError(
                f"{self._path}: gzip data that unpacks to more than {self._most:,} bytes, over "
                f"{_MOST_RATIO} times its length; no genome does: if it is one, unpack it first"
            )
        return data


def open_unpacked(path: Path) -> BinaryIO:
    """The file's bytes, unpacked if it is gzip or bgzip."""
    with path.open("rb") as file:
        packed = file.read(2) == _GZIP
    return cast(BinaryIO, _Unpacked(path) if packed else path.open("rb"))


def _check_bgzip_end(path: Path) -> None:
    with path.open("rb") as file:
        header = file.read(18)
        is_bgzip = len(header) == 18 and header[3] & 4 and header[12:16] == b"BC\x02\x00"
        file.seek(0, io.SEEK_END)
        file.seek(max(0, file.tell() - len(_BGZIP_END)))
        if is_bgzip and file.read() != _BGZIP_END:
            raise InputError(
                f"{path}: bgzip file without its end-of-file block; the file was probably cut "
                "while it was copied: copy it again"
            )


# -- FASTA -----------------------------------------------------------------------------------------


def _read_fasta(path: Path, *, compressed: bool) -> Iterator[Contig]:
    try:
        if compressed:
            _check_bgzip_end(path)
        _check_fasta_start(path)
        yield from _fasta_contigs(path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: gzip data that is cut or damaged ({error}): copy the file again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _check_fasta_start(path: Path) -> None:
    """Refuse what is not FASTA at all, by its first line that is neither blank nor a comment."""
    with open_unpacked(path) as stream:
        start = stream.read(4)
    if start.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise InputError(
            f"{path}: line 1: starts with a byte order mark; expected '>': "
            "save the file as plain ASCII text"
        )
    for line, text in _lines(path):
        if not text or text.startswith("#"):
            continue
        if text.startswith(">"):
            return
        if text.startswith("@"):
            raise InputError(
                f"{path}: line {line}: starts with '@', as FASTQ reads do; expected '>': "
                "a genome is needed, not reads"
            )
        raise InputError(
            f"{path}: line {line}: starts with {text[:20]!r}; expected '>' and a name: "
            "this is neither FASTA nor 2bit"
        )
    raise InputError(f"{path}: holds no record; expected at least one line that starts with '>'")


def _fasta_contigs(path: Path) -> Iterator[Contig]:
    dnaio = _library("dnaio", "FASTA files")
    seen: dict[str, int] = {}
    # dnaio's own opener would accept other packings and a file that is cut.
    with dnaio.FastaReader(
        str(path), opener=lambda name, mode: open_unpacked(Path(name))
    ) as reader:
        records = iter(reader)
        while True:
            ordinal = len(seen)
            try:
                record = next(records, None)
                if record is None:
                    return
                words = record.name.split()
                raw = record.sequence.encode("ascii")
            except (dnaio.FastaFormatError, ValueError):
                _refuse_encoding(path, ordinal)
            del record  # the letters as text: another byte a base
            name = words[0] if words else ""
            if not name or name in seen or not raw or not _is_name(name):
                _refuse_record(path, ordinal, name, seen)
            if not _IUPAC.issuperset(raw.translate(None, _PLAIN).decode("ascii").upper()):
                _refuse_letter(path, ordinal, name)
            seen[name] = ordinal
            contig = _contig(name, raw)
            del raw
            yield contig
            del contig


def _is_name(name: str) -> bool:
    return name.isprintable() and len(name) <= _LONGEST_NAME


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, stripped as the FASTA reader strips them; any byte is a character."""
    with io.TextIOWrapper(open_unpacked(path), encoding="latin-1") as lines:
        for line, text in enumerate(lines, start=1):
            yield line, text.strip()


def _record_lines(path: Path, ordinal: int) -> Iterator[tuple[int, str]]:
    """Header and sequence lines of one record. Slow, and only needed to explain a refusal."""
    current = -1
    for line, text in _lines(path):
        current += text.startswith(">")
        if current == ordinal and text and not text.startswith("#"):
            yield line, text
        elif current > ordinal:
            return


def _refuse_record(path: Path, ordinal: int, name: str, seen: Mapping[str, int]) -> NoReturn:
    line, header = next(_record_lines(path, ordinal))
    if not name:
        raise InputError(f"{path}: line {line}: header without a name; expected '>' and a name")
    if not _is_name(name):
        raise InputError(
            f"{path}: line {line}: {name[:60]!r} is no name; expected at most {_LONGEST_NAME:,} "
            "printable characters after '>'"
        )
    if name in seen:
        first, _ = next(_record_lines(path, seen[name]))
        raise InputError(
            f"{path}: record {name!r}, line {line}: the name is already that of the record on "
            f"line {first}; every record needs its own name (the first word after '>')"
        )
    raise InputError(
        f"{path}: record {name!r}, line {line}: no sequence follows the header {header[:60]!r}; "
        "remove the record, or get the file again if it should have one"
    )


def _refuse_letter(path: Path, ordinal: int, name: str) -> NoReturn:
    for line, text in list(_record_lines(path, ordinal))[1:]:
        column = next((c for c, letter in enumerate(text) if letter.upper() not in _IUPAC), None)
        if column is not None:
            raise InputError(
                f"{path}: record {name!r}, line {line}, column {column + 1}: "
                f"{_explain_letter(text[column])}"
            )
    raise AssertionError("the record was refused for a letter it does not hold")


def _refuse_encoding(path: Path, ordinal: int) -> NoReturn:
    """Name the first byte beyond ASCII; text is decoded ahead, so it may be in a later record."""
    current = -1
    for line, text in _lines(path):
        current += text.startswith(">")
        if current >= ordinal and not text.isascii():
            letter = next(letter for letter in text if not letter.isascii())
            raise InputError(
                f"{path}: record number {current + 1}, line {line}: byte 0x{ord(letter):02x} is "
                "not ASCII; expected plain ASCII text"
            )
    raise AssertionError("the file was refused for a byte it does not hold")


def _explain_letter(letter: str) -> str:
    if letter in "Uu":
        return "'U': this is RNA; expected DNA: replace U by T"
    if letter == "\0":
        return "a NUL byte in the sequence; the file is damaged: copy it again"
    if letter.isspace():
        return "a space inside a line of sequence; remove it, or copy the file again"
    if letter in "-.":
        return f"{letter!r}: a gap, as alignments have; expected a genome without gaps"
    if letter.isascii() and (letter.isalpha() or letter == "*"):
        return (
            f"{letter!r} is no nucleotide; expected A, C, G, T or an IUPAC code "
            "(N R Y S W K M B D H V): is this a protein?"
        )
    return f"{letter!r} is no nucleotide; expected A, C, G, T or an IUPAC code"


# -- 2bit ------------------------------------------------------------------------------------------


def _read_2bit(path: Path) -> Iterator[Contig]:
    try:
        lengths = _check_2bit(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None
    # py2bit gives wrong letters, or dies of a bus error, on a file that is cut: hence the check of
    # every offset first. twobitreader needs 18 bytes and 110 ns a base, py2bit 2 bytes and 7 ns.
    twobit = _library("py2bit", "2bit files").open(str(path), True)
    try:
        for name, bases in lengths.items():
            raw = twobit.sequence(name).encode("ascii")
            if len(raw) != bases:
                raise InputError(
                    f"{path}: record {name!r}: {len(raw)} bases read, its header says {bases}: "
                    "the file changed while it was read"
                )
            contig = _contig(name, raw)
            del raw
            yield contig
            del contig
    finally:
        twobit.close()


def _check_2bit(path: Path) -> dict[str, int]:
    """Name and length of each record, after every count and offset was seen to lie in the file.

    The layout is that of the UCSC file format page: header, index, records of little-endian
    32-bit words.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        version, records, _ = _words(path, data, 4, 3)
        if version != 0:
            raise InputError(
                f"{path}: 2bit version {version}; expected 0: make it again without -long"
            )
        if records == 0:
            raise InputError(f"{path}: 2bit file without a record; expected at least one")
        lengths: dict[str, int] = {}
        packed = 0
        at = 16
        for _ in range(records):
            letters = _bytes(path, data, at, 1)[0]
            name = _bytes(path, data, at + 1, letters).decode("latin-1")
            if not (name and name.isascii() and name.isprintable()):
                raise InputError(
                    f"{path}: record number {len(lengths) + 1}: {name!r} is no name; "
                    "the file is damaged: copy it again"
                )
            (offset,) = _words(path, data, at + 1 + letters, 1)
            at += 5 + letters
            if name in lengths:
                raise InputError(
                    f"{path}: record {name!r} (number {len(lengths) + 1}): the name occurs "
                    "twice; every record needs its own name"
                )
            lengths[name] = _check_2bit_record(path, data, name, int(offset))
            packed += -(-lengths[name] // 4)
            if packed > len(data):
                raise InputError(
                    f"{path}: record {name!r} (number {len(lengths)}): with it, records have more "
                    f"bases than the file's {len(data):,} bytes hold: some lie over each other; "
                    "the file is damaged: copy it again"
                )
    return lengths


def _check_2bit_record(path: Path, data: mmap.mmap, name: str, at: int) -> int:
    where = f"record {name!r}: "
    bases = int(_words(path, data, at, 1, where)[0])
    if bases == 0:
        raise InputError(
            f"{path}: {where}no sequence; remove the record, or get the file again if it should "
            "have one"
        )
    at += 4
    for kind in ("N", "soft-masked"):
        blocks = int(_words(path, data, at, 1, where)[0])
        span = _words(path, data, at + 4, 2 * blocks, where).astype(np.int64).reshape(2, blocks)
        at += 4 + 8 * blocks
        if blocks and int(span.sum(axis=0).max()) > bases:
            raise InputError(
                f"{path}: {where}a block of {kind} bases ends beyond the record's {bases} bases; "
                "the file is damaged: copy it again"
            )
    _bytes(path, data, at + 4, -(-bases // 4), where)
    return bases


def _words(
    path: Path, data: mmap.mmap, at: int, count: int, where: str = ""
) -> npt.NDArray[np.uint32]:
    return np.frombuffer(_bytes(path, data, at, 4 * count, where), dtype="<u4")


def _bytes(path: Path, data: mmap.mmap, at: int, nbytes: int, where: str = "") -> bytes:
    if at + nbytes > len(data):
        raise InputError(
            f"{path}: {where}2bit data reaches byte {at + nbytes}, but the file ends at "
            f"{len(data)}; it was probably cut while it was copied: copy it again"
        )
    return data[at : at + nbytes]
