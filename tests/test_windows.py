"""Windows: every one that should be, no other, each in one split; against a loop over bases."""

from __future__ import annotations

import gzip
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ECOLI
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from had_pipe.dna.reference import OTHER, Contig, read_contigs
from had_pipe.dna.windows import (
    DROPPED,
    Region,
    SplitRule,
    Tiles,
    base_windows,
    check_contigs,
    read_bed,
    tile,
)
from had_pipe.errors import InputError, RecipeError

GOLDEN_BLOCKS = ".....v....v.v.........vt.tvv..t"


def contig_of(text: str, name: str = "c") -> Contig:
    code = np.array(["ACGT".find(x) % 5 for x in text.upper()], dtype=np.uint8)
    lower = np.array([x in "acgt" for x in text], dtype=np.bool_)
    return Contig(name=name, base=code, soft_masked=lower, digest="", other={})


def tiles_of(
    contig: Contig,
    bases: int,
    stride: int = 0,
    *,
    splits: SplitRule | None = None,
    include: Sequence[Region] | None = None,
    exclude: Sequence[Region] = (),
    seed: int = 0,
) -> Tiles:
    return tile(
        contig,
        bases=bases,
        stride=stride or bases,
        splits=splits or SplitRule.of(None),
        include=include,
        exclude=exclude,
        seed=seed,
    )


# -- tiling against a loop over bases --------------------------------------------------------------


def tile_by_loop(
    text: str,
    split_of: list[str | None],
    bases: int,
    stride: int,
    include: Sequence[Region] | None,
    exclude: Sequence[Region],
) -> tuple[list[tuple[int, str, float]], dict[str, int], dict[str, int]]:
    """Base by base: why it is out or which split it is in; then window by window."""

    def reason(at: int) -> str:
        if text[at] not in "ACGTacgt":
            return "not ACGT"
        if include is not None and not any(r.start <= at < r.end for r in include):
            return "not included"
        if any(r.start <= at < r.end for r in exclude):
            return "excluded"
        return "" if split_of[at] else "in no split"

    why = [reason(at) for at in range(len(text))]
    windows: list[tuple[int, str, float]] = []
    dropped = dict.fromkeys(DROPPED, 0)
    for out in why:
        if out:
            dropped[out] += 1
    used: dict[str, set[int]] = {split: set() for split in split_of if split}
    at = 0
    while at < len(text):
        if why[at]:
            at += 1
            continue
        end = at
        while end < len(text) and not why[end] and split_of[end] == split_of[at]:
            end += 1
        split = split_of[at]
        assert split
        start, last = at, at
        while start + bases <= end:
            own = text[start : start + bases]
            windows.append((start, split, sum(c.islower() for c in own) / bases))
            used[split] |= set(range(start, start + bases))
            last = start + bases
            start += stride
        dropped["tail"] += end - last
        dropped["between windows"] += sum(p not in used[split] for p in range(at, last))
        at = end
    return windows, dropped, {split: len(bases) for split, bases in used.items()}


def regions_of(labels: Sequence[str | None], cuts: Sequence[int]) -> list[Region]:
    """The runs of equal labels, some cut in two that touch, in no particular order."""
    regions: list[Region] = []
    at = 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or labels[end] != labels[at] or end in cuts:
            if labels[at]:
                regions.append(Region("c", at, end, labels[at] or ""))
            at = end
    return regions[1::2] + regions[::2]


def any_regions(length: int) -> st.SearchStrategy[list[Region]]:
    """Regions that may overlap, touch and repeat."""
    edges = st.tuples(st.integers(0, length - 1), st.integers(1, 30))
    return st.lists(edges.map(lambda e: Region("c", e[0], min(length, e[0] + e[1]))), max_size=5)


@st.composite
def tilings(draw: st.DrawFn) -> dict[str, Any]:
    runs = draw(st.lists(st.text("ACGTacgt", min_size=1, max_size=40), min_size=1, max_size=5))
    gaps = draw(st.lists(st.sampled_from(["N", "n", "NNN", "R"]), min_size=5, max_size=5))
    text = "".join(run + gap for run, gap in zip(runs, gaps, strict=False))
    if draw(st.booleans()):
        text = text[:-1] or "A"
    length = len(text)
    label = st.sampled_from(["train", "valid", "test", None])
    spans = draw(st.lists(st.tuples(label, st.integers(1, 40)), min_size=1, max_size=6))
    labels = [name for name, span in spans for _ in range(span)][:length]
    labels += ["train"] * (length - len(labels))
    return {
        "text": text,
        "labels": labels,
        "cuts": draw(st.lists(st.integers(0, length), max_size=4)),
        "bases": draw(st.integers(1, 12)),
        "stride": draw(st.integers(1, 18)),
        "include": draw(st.none() | any_regions(length)),
        "exclude": draw(any_regions(length)),
    }


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    max_examples=250,
    deadline=None,
)
@given(case=tilings())
def test_tiling_is_what_a_loop_over_bases_gives(tmp_path: Path, case: dict[str, Any]) -> None:
    labels = case["labels"]
    text, bases, stride = case["text"], case["bases"], case["stride"]
    bed = regions_of(labels, case["cuts"])
    if bed:
        path = tmp_path / "splits.bed"
        path.write_text("".join(f"{r.contig}\t{r.start}\t{r.end}\t{r.name}\n" for r in bed))
        rule = SplitRule.of(path)
    else:
        rule, labels = SplitRule.of(None), ["train"] * len(text)
    contig = contig_of(text)
    got = tile(
        contig,
        bases=bases,
        stride=stride,
        splits=rule,
        include=case["include"],
        exclude=case["exclude"],
        seed=0,
    )
    windows, dropped, used = tile_by_loop(
        text, labels, bases, stride, case["include"], case["exclude"]
    )
    assert got.start.tolist() == [start for start, _, _ in windows]
    assert [rule.names[s] for s in got.split] == [split for _, split, _ in windows]
    assert got.soft_masked.tolist() == [np.float32(share) for _, _, share in windows]
    assert got.dropped == dropped
    assert {split: n for split, n in got.split_bases.items() if n} == {
        split: n for split, n in used.items() if n
    }
    # What follows is true of the loop too; it is what the rest of the house relies on.
    assert sum(got.dropped.values()) + sum(got.split_bases.values()) == len(text)
    assert bool((base_windows(contig, got.start, bases) < 4).all())
    covered = [
        {p for s in got.start[got.split == k].tolist() for p in range(s, s + bases)}
        for k in range(len(rule.names))
    ]
    assert sum(map(len, covered)) == len(set().union(*covered))


def test_a_contig_without_a_window_says_where_its_bases_went() -> None:
    got = tiles_of(contig_of("ACGNNACGTR"), 5)
    assert got.start.tolist() == []
    assert got.start.dtype == np.int64
    assert got.split.dtype == np.int16
    assert got.soft_masked.dtype == np.float32
    assert got.dropped == dict.fromkeys(DROPPED, 0) | {"not ACGT": 3, "tail": 7}


def test_the_first_reason_that_holds_is_counted() -> None:
    got = tiles_of(
        contig_of("NNACGTACGTAC"),
        3,
        include=[Region("c", 1, 10)],
        exclude=[Region("c", 0, 4), Region("other", 0, 99)],
    )
    # N at 0 and 1; AC at 10 and 11 not included; AC at 2 and 3 excluded; GTA, CGT are windows.
    assert got.start.tolist() == [4, 7]
    assert got.dropped == dict.fromkeys(DROPPED, 0) | {
        "not ACGT": 2,
        "not included": 2,
        "excluded": 2,
    }


def test_windows_are_gathered_in_any_order() -> None:
    contig = contig_of("ACGTTGCAAC")
    got = base_windows(contig, np.array([6, 0, 3, 0]), 4)
    assert ["".join("ACGT"[b] for b in row) for row in got] == ["CAAC", "ACGT", "TTGC", "ACGT"]
    assert base_windows(contig, np.array([], dtype=np.int64), 4).shape == (0, 4)
    with pytest.raises(AssertionError):
        base_windows(contig, np.array([7]), 4)


@pytest.mark.parametrize("stride", [1, 100, 510, 1_000])
def test_soft_masked_shares_are_exact_on_long_contigs(stride: int) -> None:
    bits = np.random.Philox(3).random_raw(20_000)
    text = "".join("ACGTacgt"[int(b >> np.uint64(61))] for b in bits)
    contig = contig_of(text)
    got = tiles_of(contig, 510, stride)
    expected = [contig.soft_masked[s : s + 510].mean() for s in got.start]
    np.testing.assert_array_equal(got.soft_masked, np.array(expected, dtype=np.float32))


# -- real genomes ----------------------------------------------------------------------------------


def test_ecoli_has_its_9097_windows_of_510_bases(tmp_path: Path) -> None:
    pytest.importorskip("py2bit", reason="stage one is not installed")
    pytest.importorskip("dnaio", reason="stage one is not installed")
    (contig,) = read_contigs(ECOLI)
    got = tiles_of(contig, 510)
    assert got.start.tolist() == list(range(0, 9_097 * 510, 510))
    assert got.dropped == dict.fromkeys(DROPPED, 0) | {"tail": 205}
    assert got.split_bases == {"train": 9_097 * 510}

    fasta = tmp_path / "ecoli.fa.gz"
    letters = np.frombuffer(b"ACGTN", dtype=np.uint8)[contig.base].tobytes().decode()
    lines = "\n".join(letters[i : i + 70] for i in range(0, len(letters), 70))
    fasta.write_bytes(gzip.compress(f">{contig.name}\n{lines}\n".encode(), compresslevel=1))
    (other,) = read_contigs(fasta)
    assert other.digest == contig.digest
    np.testing.assert_array_equal(other.base, contig.base)
    np.testing.assert_array_equal(tiles_of(other, 510).start, got.start)


@pytest.mark.slow
def test_a_human_chromosome_is_tiled_around_its_gaps(shared: Callable[[str], Path]) -> None:
    (contig,) = read_contigs(shared("genomes/human_hg19_chr21.2bit"))
    rule = SplitRule.of({"blocks": 100_000, "valid": 0.1}).prepare([("chr21", contig.base.size)])
    got = tiles_of(contig, 510, splits=rule)
    assert got.dropped["not ACGT"] == contig.other["N"]
    assert sum(got.dropped.values()) + sum(got.split_bases.values()) == contig.base.size
    for at in range(0, got.start.size, 10_000):
        assert base_windows(contig, got.start[at : at + 10_000], 510).max() < OTHER
    block = got.start // 100_000
    for index, name in enumerate(rule.names):
        mine = set(block[got.split == index].tolist())
        last = set(((got.start + 509) // 100_000)[got.split == index].tolist())
        others = set(block[got.split != index].tolist())
        assert not (mine | last) & others, name


# -- splits ----------------------------------------------------------------------------------------


def test_contigs_that_no_split_names_are_train() -> None:
    rule = SplitRule.of({"test": ("b",), "valid": ("c", "d"), "late": ("e",)})
    assert rule.names == ("train", "valid", "test", "late")
    found = {
        name: rule.names[tiles_of(contig_of("ACGTAC", name), 6, splits=rule).split[0]]
        for name in "abcde"
    }
    assert found == {"a": "train", "b": "test", "c": "valid", "d": "valid", "e": "late"}


def test_a_bed_leaves_the_rest_in_no_split(tmp_path: Path) -> None:
    path = tmp_path / "splits.bed"
    path.write_text("c\t2\t8\tvalid\n")
    rule = SplitRule.of(path)
    assert rule.names == ("valid",)
    got = tiles_of(contig_of("ACGTACGTAC"), 3, splits=rule)
    assert got.start.tolist() == [2, 5]
    assert got.dropped["in no split"] == 4
    elsewhere = tiles_of(contig_of("ACGTACGTAC", "d"), 3, splits=rule)
    assert elsewhere.start.size == 0
    assert elsewhere.dropped["in no split"] == 10


def lengths_strategy() -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(1, 90), min_size=1, max_size=6)


@given(
    lengths=lengths_strategy(),
    block=st.integers(3, 25),
    valid=st.integers(1, 60),
    test=st.integers(1, 39),
    seed=st.integers(0, 2**32),
)
def test_blocks_fall_to_splits_in_exactly_their_shares(
    lengths: list[int], block: int, valid: int, test: int, seed: int
) -> None:
    contigs = [(f"c{i}", length) for i, length in enumerate(lengths)]
    blocks = sum(-(-length // block) for length in lengths)
    # Percentages, so that halves are halves.
    want = {"valid": (valid * blocks + 50) // 100, "test": (test * blocks + 50) // 100}
    rule = SplitRule.of({"blocks": block, "valid": valid / 100, "test": test / 100})
    if 0 in want.values() or sum(want.values()) > blocks:
        with pytest.raises(RecipeError, match="cannot be had"):
            rule.prepare(contigs)
        return
    rule = rule.prepare(contigs)
    found = dict.fromkeys(rule.names, 0)
    for name, length in contigs:
        pieces = rule.pieces(name, length, seed)
        assert pieces.start.tolist() == [0, *pieces.end[:-1].tolist()]
        assert pieces.end[-1] == length
        assert bool((pieces.value[1:] != pieces.value[:-1]).all()), "neighbours are joined"
        assert bool((pieces.start % block == 0).all())
        for start, end, value in zip(pieces.start, pieces.end, pieces.value, strict=True):
            found[rule.names[value]] += math.ceil((end - start) / block)
    assert found == {"train": blocks - sum(want.values()), **want}


def block_letters(rule: SplitRule, contigs: Sequence[tuple[str, int]], seed: int) -> str:
    return "".join(
        {"train": ".", "valid": "v", "test": "t"}[rule.names[value]]
        * math.ceil((end - start) / rule.block)
        for name, length in contigs
        for start, end, value in zip(
            *(getattr(rule.pieces(name, length, seed), f) for f in ("start", "end", "value")),
            strict=True,
        )
    )


def test_block_splits_stay_the_same_for_ever() -> None:
    contigs = [("a", 2_050), ("b", 1_000)]
    rule = SplitRule.of({"blocks": 100, "valid": 0.2, "test": 0.1}).prepare(contigs)
    assert block_letters(rule, contigs, 0) == GOLDEN_BLOCKS
    assert block_letters(rule, contigs, 1) != GOLDEN_BLOCKS


def test_windows_of_neighbouring_blocks_of_one_split_cross_their_border() -> None:
    rule = SplitRule.of({"blocks": 10, "valid": 0.5}).prepare([("c", 20)])
    (first, *_) = [
        seed for seed in range(50) if rule.pieces("c", 20, seed).value.tolist() == [0, 1]
    ]
    assert tiles_of(contig_of("ACGTA" * 4), 6, splits=rule, seed=first).start.tolist() == [0, 10]
    whole = SplitRule.of(None)
    assert tiles_of(contig_of("ACGTA" * 4), 6, splits=whole).start.tolist() == [0, 6, 12]


def test_a_share_that_is_no_block_is_refused() -> None:
    rule = SplitRule.of({"blocks": 100_000, "valid": 0.1})
    with pytest.raises(RecipeError) as caught:
        rule.prepare([("phage", 48_502)])
    assert str(caught.value) == (
        "splits: valid = 0.1 of 1 blocks of 100000 bases cannot be had (rounded: {'valid': 0}): "
        "make the blocks shorter or change the shares"
    )


def test_a_contig_in_two_splits_is_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        SplitRule.of({"valid": ("chr1", "chr2"), "test": ("chr2",)})
    assert str(caught.value) == (
        "splits: contig 'chr2' is in 'valid' and in 'test'; a contig belongs to one split"
    )


@pytest.mark.parametrize(
    ("asked", "has", "hint"),
    [
        ("chr1", ["1", "2", "MT"], "'1', '2', 'MT'; did you mean '1'?"),
        ("1", ["chr1", "chr10"], "'chr1', 'chr10'; did you mean 'chr1'?"),
        ("chrM", ["1", "MT"], "'1', 'MT'; did you mean 'MT'?"),
        ("chr22_", ["chr20", "chr22"], "'chr20', 'chr22'; did you mean 'chr22'?"),
        ("Q", ["chr1", "chr2", "chr3", "chr4", "chr5"], "'chr1', 'chr2', 'chr3' and 2 more"),
    ],
)
def test_a_contig_that_the_genome_lacks_is_refused_with_the_nearest(
    asked: str, has: list[str], hint: str
) -> None:
    rule = SplitRule.of({"valid": (asked,)})
    with pytest.raises(RecipeError) as caught:
        rule.prepare([(name, 10) for name in has])
    assert str(caught.value) == (
        f"splits: valid = {asked!r}: no such contig in the genome, which has {hint}"
    )


def test_a_bed_of_another_naming_is_refused_and_one_of_more_contigs_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.bed"
    path.write_text("chr1\t0\t9\ttrain\nchr2\t0\t9\tvalid\n")
    rule = SplitRule.of(path)
    rule.check_contigs(["chr2", "chrX"])
    message = (
        "no region lies on a contig of the genome; it names 'chr1', 'chr2', the genome has '1', "
        "'2'; did you mean '1'?: rename the contigs"
    )
    with pytest.raises(InputError) as caught:
        rule.check_contigs(["1", "2"])
    assert str(caught.value) == f"{path}: {message}"
    with pytest.raises(InputError) as caught:
        check_contigs(read_bed(path), ["1", "2"], what="exclude")
    assert str(caught.value) == f"exclude: {message}"
    check_contigs((), ["1"], what="exclude")


@pytest.mark.parametrize(
    "lines",
    [
        [("c", 0, 10, "train"), ("c", 9, 20, "valid")],
        [("c", 9, 20, "valid"), ("d", 0, 10, "train"), ("c", 0, 10, "train")],
        [("c", 0, 50, "train"), ("c", 20, 30, "train"), ("c", 49, 50, "test")],
        [("c", 5, 6, "test"), ("c", 0, 50, "train"), ("c", 50, 60, "test")],
    ],
    ids=["neighbours", "out of order", "behind a nested one", "inside"],
)
def test_a_base_in_two_splits_is_refused_by_both_regions(
    tmp_path: Path, lines: list[tuple[str, int, int, str]]
) -> None:
    path = tmp_path / "s.bed"
    path.write_text("".join("\t".join(map(str, line)) + "\n" for line in lines))
    with pytest.raises(InputError) as caught:
        SplitRule.of(path)
    clash = [
        f"regions {a} and {b} overlap but are in different splits; a base may be in one split only"
        for a in (Region(*line) for line in lines)
        for b in (Region(*line) for line in lines)
        if a.contig == b.contig and a.name != b.name and a.start < b.end and b.start < a.end
    ]
    assert str(caught.value) in [f"{path}: {message}" for message in clash]


def test_regions_of_another_assembly_are_refused(tmp_path: Path) -> None:
    contig = contig_of("ACGTACGTAC")
    beyond = Region("c", 4, 11, "x")
    tail = "ends beyond its contig, which has 10 bases: it was made for another assembly"
    for key in ("include", "exclude"):
        given: Mapping[str, Any] = {key: [beyond]}
        with pytest.raises(InputError) as caught:
            tiles_of(contig, 3, **given)
        assert str(caught.value) == f"{key}: region c:4-11 (x) {tail}"
    path = tmp_path / "s.bed"
    path.write_text("c\t4\t11\ttest\n")
    with pytest.raises(InputError) as caught:
        tiles_of(contig, 3, splits=SplitRule.of(path))
    assert str(caught.value) == f"{path}: region c:4-11 {tail}"


# -- BED -------------------------------------------------------------------------------------------

GOOD_BED = {
    "three columns": ("c\t0\t5\n", [Region("c", 0, 5)]),
    "four columns": (
        "c\t0\t5\ttrain\nd\t7\t9\ttest\n",
        [Region("c", 0, 5, "train"), Region("d", 7, 9, "test")],
    ),
    "more columns": ("c\t0\t5\tx\t960\t+\n", [Region("c", 0, 5, "x")]),
    "spaces": ("c 0  5 valid\n", [Region("c", 0, 5, "valid")]),
    "header": ("chrom\tstart\tend\tsplit\nc\t0\t5\ttrain\n", [Region("c", 0, 5, "train")]),
    "header with the split elsewhere": (
        "chromosome\tstart\tend\tstrand\tlabel\tSplit\nc\t0\t5\t+\t1\tvalid\n",
        [Region("c", 0, 5, "valid")],
    ),
    "comments, track and browser lines": (
        "#chrom\n\nbrowser position c:1-2\ntrack name=a\nc\t0\t5\n#end\n",
        [Region("c", 0, 5)],
    ),
    "CRLF and no final newline": ("c\t0\t5\r\nc\t6\t9", [Region("c", 0, 5), Region("c", 6, 9)]),
    "empty": ("", []),
}


@pytest.mark.parametrize("packing", ["plain", "gzip"])
@pytest.mark.parametrize("case", GOOD_BED)
def test_a_sound_bed_is_read(tmp_path: Path, case: str, packing: str) -> None:
    text, regions = GOOD_BED[case]
    path = tmp_path / "regions"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if packing == "gzip" else data)
    assert read_bed(path) == tuple(regions)


BAD_BED = {
    "two columns": (
        b"c\t0\t5\nc\t7\n",
        "line 2: 'c\\t7' has 2 columns; expected contig, start and end, separated by tabs",
    ),
    "a letter for a number": (
        b"c\t0\t5\nc\t7\tx\n",
        "line 2: 'x' is no coordinate; expected contig, start and end, "
        "with 0 as the first base and the end not included",
    ),
    "a second header": (
        b"chrom\tstart\tend\nchrom\tstart\tend\n",
        "line 2: 'start' is no coordinate; expected contig, start and end, "
        "with 0 as the first base and the end not included",
    ),
    "a number with a sign": (
        b"c\t-1\t5\n",
        "line 1: '-1' is no coordinate; expected contig, start and end, "
        "with 0 as the first base and the end not included",
    ),
    "a number with an underscore": (
        b"c\t0\t1_000\n",
        "line 1: '1_000' is no coordinate; expected contig, start and end, "
        "with 0 as the first base and the end not included",
    ),
    "an end before the start": (
        b"# text\n\nc\t9\t5\n",
        "line 3: 'c\\t9\\t5' covers no base; expected an end greater than the start",
    ),
    "no base": (
        b"c\t5\t5\n",
        "line 1: 'c\\t5\\t5' covers no base; expected an end greater than the start",
    ),
    "not ASCII": (
        b"c\t0\t5\nc\t6\t9\t\xff\n",
        "line 2: byte 0xff is not ASCII; expected a BED file as plain text",
    ),
    "not text": (
        b"\x89PNG\r\n",
        "line 1: byte 0x89 is not ASCII; expected a BED file as plain text",
    ),
}


def bed_refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        read_bed(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("packing", ["plain", "gzip"])
@pytest.mark.parametrize("case", BAD_BED)
def test_a_bad_bed_is_refused_by_file_and_line(tmp_path: Path, case: str, packing: str) -> None:
    data, expected = BAD_BED[case]
    path = tmp_path / "regions.bed"
    path.write_bytes(gzip.compress(data) if packing == "gzip" else data)
    assert bed_refusal(path) == expected


def test_a_bed_that_is_missing_a_folder_or_cut_is_refused(tmp_path: Path) -> None:
    assert bed_refusal(tmp_path / "none.bed") == "no such file; expected a BED file"
    assert bed_refusal(tmp_path) == "is a folder; expected a BED file"
    path = tmp_path / "cut.bed.gz"
    path.write_bytes(gzip.compress(b"c\t0\t5\n" * 50)[:-9])
    assert "gzip data that is cut or damaged" in bed_refusal(path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no region; expected contig, start, end and split"),
        (
            "c\t0\t5\n",
            "region c:0-5 has '' for a split; expected a name of lower-case letters, digits and "
            "'_' in column 4, or in a column 'split' of a headed file",
        ),
        (
            "c\t0\t5\t../x\n",
            "region c:0-5 has '../x' for a split; expected a name of lower-case letters, digits "
            "and '_' in column 4, or in a column 'split' of a headed file",
        ),
    ],
    ids=["empty", "without a split", "a path"],
)
def test_a_bed_of_splits_without_splits_is_refused(
    tmp_path: Path, text: str, expected: str
) -> None:
    path = tmp_path / "s.bed"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        SplitRule.of(path)
    assert str(caught.value) == f"{path}: {expected}"
