"""What is laid out before a teacher runs, held against loops written from docs/cache-format.md."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ECOLI
from test_draws import row_by_the_book

from had_pipe import corpus
from had_pipe.cache.writer import SplitData
from had_pipe.dna.kmers import spell
from had_pipe.errors import InputError
from had_pipe.progress import silent
from had_pipe.recipe import Genome, Windows

MASK, STRAND, ORDER = 1, 2, 3
TURNED = str.maketrans("ACGT", "TGCA")


def random_letters(rng: np.random.Generator, length: int) -> str:
    """DNA with runs of N, other letters, and soft-masked stretches."""
    letters = rng.choice(list("ACGT"), length)
    for _ in range(length // 400):
        at, long = rng.integers(length), int(rng.integers(1, 30))
        letters[at : at + long] = rng.choice(list("NNR"))
    text = "".join(letters)
    for _ in range(length // 300):
        at, long = int(rng.integers(length)), int(rng.integers(1, 200))
        text = text[:at] + text[at : at + long].lower() + text[at + long :]
    return text


def write_fasta(path: Path, contigs: Mapping[str, str]) -> Path:
    path.write_text("".join(f">{name}\n{letters}\n" for name, letters in contigs.items()))
    return path


@dataclass(frozen=True)
class Made:
    """Genomes as text, and what was laid out of them."""

    letters: Mapping[str, Mapping[str, str]]
    genomes: Sequence[Genome]
    windows: Windows
    references: Sequence[corpus.Reference]
    splits: Mapping[str, SplitData]


def lay_out(genomes: Sequence[Genome], windows: Windows) -> dict[str, SplitData]:
    return corpus.lay_out([corpus.read_reference(g, report=silent) for g in genomes], windows)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, rng = tmp_path_factory.mktemp("genomes"), np.random.default_rng(11)
    letters = {
        "beast": {f"chr{n}": random_letters(rng, 2_000 * n) for n in (3, 1, 2)},
        "yeasty": {"chr1": random_letters(rng, 2_500), "M": random_letters(rng, 900)},
    }
    rules: dict[str, Any] = {
        "beast": {"valid": ("chr1",), "apart": ("chr2",)},
        "yeasty": {"valid": ("M",)},
    }
    genomes = [
        Genome(
            name=name,
            path=write_fasta(folder / f"{name}.fa", contigs),
            splits=_as_read(rules, name),
        )
        for name, contigs in letters.items()
    ]
    windows = Windows(
        bases=60, stride=42, views=3, mask_ratio=0.25, reverse_complement=0.4, seed=2**62 + 5
    )
    references = [corpus.read_reference(genome, report=silent) for genome in genomes]
    return Made(letters, genomes, windows, references, corpus.lay_out(references, windows))


def _as_read(rules: Mapping[str, Any], name: str) -> Any:
    return {split: list(contigs) for split, contigs in rules[name].items()}


def by_the_book(made: Made) -> dict[str, list[tuple[str, str, int, int, int]]]:
    """Per split, in disk order: genome, contig, start, soft-masked bases, index."""
    found: list[tuple[str, tuple[str, str, int, int, int]]] = []
    for genome in made.genomes:
        assert isinstance(genome.splits, Mapping)
        of_contig = {c: split for split, some in genome.splits.items() for c in some}
        for contig, text in made.letters[genome.name].items():
            for run in re.finditer("[ACGT]+", text.upper()):
                for start in range(run.start(), run.end() - 60 + 1, 42):
                    soft = sum(letter.islower() for letter in text[start : start + 60])
                    row = (genome.name, contig, start, soft, len(found))
                    found.append((of_contig.get(contig, "train"), row))
    ordered = {}
    for number, split in enumerate(sorted({split for split, _ in found})):
        rows = [row for own, row in found if own == split]
        draw = [
            row_by_the_book(ORDER, made.windows.seed, number, j, 1)[0] for j in range(len(rows))
        ]
        ordered[split] = [rows[j] for j in sorted(range(len(rows)), key=lambda j: (draw[j], j))]
    return ordered


def test_windows_and_their_order_are_those_of_the_format(made: Made) -> None:
    expected = by_the_book(made)
    assert {"train", "valid", "apart"} == set(expected) == set(made.splits)
    names = [genome.name for genome in made.genomes]
    for split, rows in expected.items():
        table = made.splits[split].table
        assert [
            (names[genome], table.contigs[contig], start, soft, index)
            for genome, contig, start, soft, index in zip(
                table.genome.tolist(),
                table.contig.tolist(),
                table.start.tolist(),
                table.soft_masked_bases.tolist(),
                table.index.tolist(),
                strict=True,
            )
        ] == rows
    # Both genomes have a chr1: one is held out, the other is not.
    assert {row[:2] for row in expected["valid"]} == {("beast", "chr1"), ("yeasty", "M")}
    assert ("yeasty", "chr1") in {row[:2] for row in expected["train"]}


def test_masks_and_strands_are_those_of_the_format(made: Made) -> None:
    seed, reverse_seen = made.windows.seed, set()
    assert made.windows.masked == 3  # 2.5 groups of 10, halves up
    for split, data in made.splits.items():
        assert (
            sorted(data.mask) == sorted(data.reversed) == ([0, 1, 2] if split == "train" else [0])
        )
        for view in data.mask:
            for row, index in enumerate(data.table.index.tolist()):
                draw = row_by_the_book(MASK, seed, view, index, 10)
                masked = sorted(sorted(range(10), key=lambda t: (draw[t], t))[:3])
                assert np.flatnonzero(data.mask[view][row]).tolist() == masked
                strand = (row_by_the_book(STRAND, seed, view, index, 1)[0] >> 11) * 2.0**-53
                assert data.reversed[view][row] == (strand < 0.4)
                reverse_seen.add(bool(data.reversed[view][row]))
    assert reverse_seen == {True, False}


def test_kmer_ids_are_the_forward_strand_where_the_table_says(made: Made) -> None:
    for data in made.splits.values():
        table = data.table
        for row in range(len(data.kmer_id)):
            genome = made.genomes[table.genome[row]].name
            start = int(table.start[row])
            there = made.letters[genome][table.contigs[table.contig[row]]].upper()
            assert "".join(map(spell, data.kmer_id[row].tolist())) == there[start : start + 60]


def test_what_is_counted_is_what_is_laid_out(made: Made) -> None:
    told = corpus.survey_windows(made.references, made.windows)
    assert dict(told.windows) == {name: len(data.kmer_id) for name, data in made.splits.items()}
    covered = {}
    for split, data in made.splits.items():
        bases = {
            (contig, start + i)
            for contig, start in zip(
                data.table.contig.tolist(), data.table.start.tolist(), strict=True
            )
            for i in range(60)
        }
        covered[split] = bases
        assert told.bases[split] == len(bases)
    whole = sum(len(text) for contigs in made.letters.values() for text in contigs.values())
    assert sum(told.bases.values()) + sum(told.dropped.values()) == whole
    assert not covered["train"] & covered["valid"]
    assert not covered["train"] & covered["apart"]
    assert told.dropped["not ACGT"] == sum(sum(r.other.values()) for r in made.references) > 0


@pytest.mark.parametrize("wanted", [1, 5, 40, 10_000])
def test_a_sample_is_windows_from_all_over_as_they_will_be_seen(made: Made, wanted: int) -> None:
    everything = sum(len(data.kmer_id) for data in made.splits.values())
    expected = {}
    for data in made.splits.values():
        for row, index in enumerate(data.table.index.tolist()):
            seen = data.kmer_id[row], data.mask[0][row], data.reversed[0][row]
            expected[seen[0].tobytes()] = (index, *seen)
    assert len(expected) == everything  # no two windows are alike, so k-mers name them
    sample = corpus.survey_windows(made.references, made.windows, sample=wanted).sample
    assert min(wanted, everything) <= len(sample) <= max(1, 2 * wanted)
    numbers = []
    for kmer_id, mask, turned in zip(sample.kmer_id, sample.mask, sample.reversed, strict=True):
        index, _, its_mask, its_turn = expected[kmer_id.tobytes()]
        assert (mask == its_mask).all()
        assert turned == its_turn
        numbers.append(index)
    apart = sorted(set(np.diff(sorted(numbers)).tolist()))
    assert len(apart) <= 1  # evenly over all genomes and splits
    if len(numbers) > 10:
        assert numbers != sorted(numbers)
    assert max(numbers) + (apart or [everything])[0] >= everything


def test_equal_recipes_give_equal_order_and_another_seed_another(made: Made) -> None:
    again = lay_out(made.genomes, made.windows)
    assert all((again[s].table.index == d.table.index).all() for s, d in made.splits.items())
    other = lay_out(made.genomes, made.windows.model_copy(update={"seed": 0}))
    assert (other["train"].table.index != made.splits["train"].table.index).any()
    assert (np.sort(other["train"].table.index) == np.sort(made.splits["train"].table.index)).all()


def test_windows_taken_in_small_lots_give_the_same(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus, "_WINDOWS_AT_ONCE", 7)
    for split, data in lay_out(made.genomes, made.windows).items():
        whole = made.splits[split]
        assert (data.kmer_id == whole.kmer_id).all()
        for view in whole.mask:
            assert (data.mask[view] == whole.mask[view]).all()
            assert (data.reversed[view] == whole.reversed[view]).all()


def test_another_number_of_views_leaves_the_first_ones_alone(made: Made) -> None:
    fewer = lay_out(made.genomes, made.windows.model_copy(update={"views": 2}))["train"]
    for view in (0, 1):
        assert (fewer.mask[view] == made.splits["train"].mask[view]).all()
        assert (fewer.reversed[view] == made.splits["train"].reversed[view]).all()


def test_regions_to_include_and_exclude_move_windows(tmp_path: Path) -> None:
    text = random_letters(np.random.default_rng(3), 3_000).upper().replace("N", "A")
    text = text.replace("R", "A")
    (tmp_path / "in.bed").write_text("c\t100\t1000\nc\t1500\t2900\n")
    (tmp_path / "out.bed").write_text("c\t400\t405\n")
    genome = Genome(
        name="g",
        path=write_fasta(tmp_path / "g.fa", {"c": text}),
        include=tmp_path / "in.bed",
        exclude=tmp_path / "out.bed",
    )
    data = lay_out([genome], Windows(bases=60, stride=60))["train"]
    pieces = [(100, 400), (405, 1000), (1500, 2900)]
    expected = [s for a, b in pieces for s in range(a, b - 59, 60)]
    assert sorted(data.table.start.tolist()) == expected
    described = corpus.read_reference(genome, report=silent).described
    assert described["include"] != described["exclude"]
    assert all(len(described[key]) == 64 for key in ("include", "exclude"))


def test_a_genome_that_is_not_the_expected_one_is_refused(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "g.fa", {"c": "ACGT" * 50})
    right = corpus.read_reference(Genome(name="g", path=path), report=silent).described["digest"]
    corpus.read_reference(Genome(name="g", path=path, digest=right), report=silent)
    renamed = write_fasta(tmp_path / "h.fa", {"chr_c": "ACGT" * 50})
    with pytest.raises(InputError) as told:
        corpus.read_reference(Genome(name="g", path=renamed, digest=right), report=silent)
    assert right in str(told.value)
    assert "h.fa" in str(told.value)


def test_a_genome_without_a_window_is_refused_with_the_reasons(tmp_path: Path) -> None:
    path = write_fasta(tmp_path / "g.fa", {"c": "ACGTACGTAC" * 5 + "N" * 30 + "ACGT" * 14})
    references = [corpus.read_reference(Genome(name="tiny", path=path), report=silent)]
    windows = Windows(bases=60, stride=60)
    for look in (corpus.survey_windows, corpus.lay_out):
        with pytest.raises(InputError) as told:
            look(references, windows)
        assert "tiny" in str(told.value)
        assert "not ACGT: 30" in str(told.value)
        assert "tail: 106" in str(told.value)


def test_the_demo_genome_has_its_known_windows_and_splits_share_no_base() -> None:
    if not ECOLI.exists():
        pytest.skip("the demo genome is not here: it lies in the repository, not in a package")
    genome = Genome(name="ecoli", path=ECOLI, splits={"blocks": 50_000, "valid": 0.1})
    windows = Windows(bases=510, stride=510, seed=0)
    references = [corpus.read_reference(genome, report=silent)]
    told = corpus.survey_windows(references, windows)
    assert dict(told.windows) == {"train": 8_212, "valid": 882}
    assert sum(told.bases.values()) + sum(told.dropped.values()) == 4_639_675
    splits = corpus.lay_out(references, windows)
    taken = np.zeros(4_639_675, dtype=np.int8)
    for data in splits.values():
        for start in data.table.start.tolist():
            taken[start : start + 510] += 1
    assert taken.max() == 1
    blocks = {name: set((d.table.start // 50_000).tolist()) for name, d in splits.items()}
    ends = {name: set(((d.table.start + 509) // 50_000).tolist()) for name, d in splits.items()}
    assert not (blocks["valid"] | ends["valid"]) & (blocks["train"] | ends["train"])
    assert len(blocks["valid"]) == 9  # a tenth of 93 blocks
