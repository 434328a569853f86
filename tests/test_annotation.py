"""Annotations: what covers a base, in either format, and lines that are wrong."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from had_pipe.dna.annotation import Annotation, read_annotation
from had_pipe.dna.windows import Region
from had_pipe.errors import InputError

GFF = (
    "##gff-version 3\n"
    "one\tmaker\tgene\t11\t40\t.\t+\t.\tID=g;Name=größe\n"
    "\n"
    "one\tmaker\tCDS\t21\t30\t.\t+\t0\tParent=g\n"
    "chr%201\tmaker\texon\t1\t5\t.\t+\t.\tParent=g\n"
    "##FASTA\n"
    ">one\nACGT\n"
)


def kinds(annotation: Annotation, contig: str, *bases: int) -> list[str]:
    found = annotation.at(contig, np.array(bases, dtype=np.int64))
    return [annotation.kinds[kind] if kind >= 0 else "" for kind in found]


@pytest.mark.parametrize("name", ["a.gff3", "a.gff3.gz", "a.GFF", "a.gtf"])
def test_a_base_is_of_the_shortest_feature_that_covers_it(tmp_path: Path, name: str) -> None:
    text = GFF.encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    read = read_annotation(tmp_path / name)
    # Bases 11 to 40 counted from 1 are 10 to 39 counted from 0.
    assert kinds(read, "one", 40, 9, 10, 39, 20, 29, 19, 30) == [
        *("", "", "gene", "gene", "CDS", "CDS", "gene", "gene"),
    ]
    assert kinds(read, "chr 1", 4, 5) == ["exon", ""]
    assert kinds(read, "another", 4) == [""]
    assert read.contigs == ["one", "chr 1"]


def test_a_bed_file_gives_its_names_and_one_without_names_a_nameless_kind(tmp_path: Path) -> None:
    (tmp_path / "a.bed").write_text("one\t10\t40\tgene\none\t20\t30\tCDS\n", "utf-8")
    assert kinds(read_annotation(tmp_path / "a.bed"), "one", 9, 10, 20, 39) == [
        *("", "gene", "CDS", "gene"),
    ]
    (tmp_path / "b.bed").write_text("one\t10\t40\n", "utf-8")
    read = read_annotation(tmp_path / "b.bed")
    assert read.kinds == [""]
    assert read.at("one", np.array([9, 10])).tolist() == [-1, 0]


@given(
    features=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12)), max_size=12),
    bases=st.lists(st.integers(0, 45), min_size=1, max_size=20),
)
def test_covering_is_what_a_loop_over_all_features_finds(
    features: list[tuple[int, int]], bases: list[int]
) -> None:
    regions = [
        Region("one", start, start + length, str(i)) for i, (start, length) in enumerate(features)
    ]
    annotation = Annotation(Path("a.bed"), regions)
    expected = []
    for base in bases:
        over = [r for r in regions if r.start <= base < r.end]
        shortest = min((r.end - r.start for r in over), default=0)
        expected.append(next((r.name for r in reversed(over) if r.end - r.start == shortest), ""))
    assert kinds(annotation, "one", *bases) == expected


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("one\tx\tgene\t1\t5", "has 5 columns"),
        ("one x gene 1 5 . + . a", "has 1 columns"),
        ("one\tx\tgene\t-1\t5\t.\t+\t.\ta", "'-1' is no coordinate"),
        ("one\tx\tgene\t1\t5e3\t.\t+\t.\ta", "'5e3' is no coordinate"),
        ("one\tx\tgene\t\u0661\t5\t.\t+\t.\ta", "is no coordinate"),
        ("one\tx\tgene\t6\t5\t.\t+\t.\ta", "covers no base"),
        ("one\tx\tgene\t0\t5\t.\t+\t.\ta", "covers no base"),
        ("\tx\tgene\t1\t5\t.\t+\t.\ta", "covers no base"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: str, told: str) -> None:
    path = tmp_path / "a.gff3"
    path.write_text(f"# comment\none\tx\tgene\t1\t5\t.\t+\t.\ta\n{line}\n", "utf-8")
    with pytest.raises(InputError, match=rf"a\.gff3: line 3: .*{told}"):
        read_annotation(path)
    (tmp_path / "a.bed").write_text("one\t1\t5\none\tx\t5\n", "utf-8")
    with pytest.raises(InputError, match=r"a\.bed: line 2: "):
        read_annotation(tmp_path / "a.bed")


def test_what_is_no_annotation_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_annotation(tmp_path / "a.gff3")
    (tmp_path / "folder.gff3").mkdir()
    with pytest.raises(InputError, match="not a regular file"):
        read_annotation(tmp_path / "folder.gff3")
    (tmp_path / "a.txt").write_text(GFF, "utf-8")
    with pytest.raises(InputError, match=r"ends in \.bed, \.gff, \.gff3, \.gtf"):
        read_annotation(tmp_path / "a.txt")
    (tmp_path / "empty.gff3").write_text("##gff-version 3\n", "utf-8")
    with pytest.raises(InputError, match="holds no feature"):
        read_annotation(tmp_path / "empty.gff3")
    (tmp_path / "cut.gff3.gz").write_bytes(gzip.compress(GFF.encode())[:-9])
    with pytest.raises(InputError, match="cut or damaged"):
        read_annotation(tmp_path / "cut.gff3.gz")
