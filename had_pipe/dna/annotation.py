"""Annotations: what is known of stretches of a genome, from BED, GFF3 or GTF, plain or gzipped.

Coordinates are 0-based and half-open, whatever the file has.
"""

from __future__ import annotations

import gzip
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from had_pipe.dna.reference import open_unpacked
from had_pipe.dna.windows import Region, read_bed
from had_pipe.errors import InputError

_GFF = (".gff", ".gff3", ".gtf")
_BED = (".bed",)


class Annotation:
    """Features by contig, each of a kind: column 4 of a BED file, column 3 of GFF or GTF."""

    def __init__(self, path: Path, regions: Iterable[Region]) -> None:
        self.path = path
        self.kinds: list[str] = []
        """By number."""
        number: dict[str, int] = {}
        # Numbers in a row: a genome's annotation has millions of features.
        found: dict[str, array[int]] = {}
        for region in regions:
            kind = number.setdefault(region.name, len(number))
            found.setdefault(region.contig, array("q")).extend((region.start, region.end, kind))
        self.kinds = list(number)
        self._features: dict[str, npt.NDArray[np.int64]] = {}
        for contig, numbers in found.items():
            feature_F3 = np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)
            longest_first = np.argsort(feature_F3[:, 0] - feature_F3[:, 1], kind="stable")
            self._features[contig] = feature_F3[longest_first]

    @property
    def contigs(self) -> list[str]:
        return list(self._features)

    def at(self, contig: str, base_P: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The kind of the shortest feature that covers each base, -1 where none does.

        Of several as short the one that the file names last.
        """
        order = np.argsort(base_P, kind="stable")
        sorted_P = base_P[order]
        kind_P = np.full(len(base_P), -1, dtype=np.int64)
        feature_F3 = self._features.get(contig)
        if feature_F3 is not None:
            first_F = np.searchsorted(sorted_P, feature_F3[:, 0])
            end_F = np.searchsorted(sorted_P, feature_F3[:, 1])
            # Longer ones first: what is shorter is written over them.
            for i in np.flatnonzero(end_F > first_F):
                kind_P[first_F[i] : end_F[i]] = feature_F3[i, 2]
        found_P = np.empty_like(kind_P)
        found_P[order] = kind_P
        return found_P


def read_annotation(path: Path) -> Annotation:
    """Read a file, its format told by its name. Raises InputError with the line that is wrong."""
    name = path.name.lower().removesuffix(".gz").removesuffix(".bgz")
    if name.endswith(_BED):
        annotation = Annotation(path, read_bed(path))
    elif name.endswith(_GFF):
        annotation = Annotation(path, _read_gff(path))
    else:
        raise InputError(
            f"{path}: an annotation's name ends in {', '.join((*_BED, *_GFF))}, with or without "
            ".gz: rename it, if it is one of these"
        )
    if not annotation.kinds:
        raise InputError(f"{path}: holds no feature; expected one a line")
    return annotation


def _read_gff(path: Path) -> Iterator[Region]:
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is not a regular file; expected GFF3 or GTF")
    try:
        with open_unpacked(path) as file:
            lines: Iterator[Any] = iter(file)
            features = True
            for number, raw in enumerate(lines, start=1):
                # Names of genes and notes may be in any alphabet; what counts here is not.
                text = raw.decode("utf-8", "replace").rstrip("\r\n")
                # Sequence may follow; it is read over, since only its end shows that gzip is whole.
                features = features and not text.startswith(("##FASTA", ">"))
                if features and text.strip() and not text.startswith("#"):
                    yield _gff_region(text, f"{path}: line {number}")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; expected GFF3 or GTF") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(
            f"{path}: gzip data that is cut or damaged ({error}): copy the file again"
        ) from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from None


def _gff_region(text: str, where: str) -> Region:
    column = text.split("\t")
    if len(column) < 8:
        raise InputError(
            f"{where}: {text[:60]!r} has {len(column)} columns; expected the nine of GFF, "
            "separated by tabs"
        )
    contig, kind = unquote(column[0]), column[2].strip()
    for value in column[3:5]:
        if not (value.isascii() and value.isdigit() and len(value) <= 18):
            raise InputError(
                f"{where}: {value[:60]!r} is no coordinate; expected first and last base of a "
                "feature in columns 4 and 5, counted from 1"
            )
    first, last = int(column[3]), int(column[4])
    if not contig or not 1 <= first <= last:
        raise InputError(
            f"{where}: {text[:60]!r} covers no base; expected a contig, and a first base of 1 or "
            "more that is not after the last"
        )
    return Region(contig, first - 1, last, kind)
