"""A teacher that is mapped wrongly is found out before anything is made of it."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from conftest import ECOLI, REPOSITORY
from typer.testing import CliRunner

from had_pipe import cli, corpus
from had_pipe.cache import Cache, layout
from had_pipe.cache.recode import recode
from had_pipe.dna.kmers import LETTERS, group_masks, spell
from had_pipe.dna.reference import read_contigs
from had_pipe.errors import CacheRefused, InputError, NonFiniteError
from had_pipe.extract import extract
from had_pipe.job import Job
from had_pipe.progress import Progress, silent
from had_pipe.recipe import Recipe
from had_pipe.survey import survey
from had_pipe.teachers.knowledge import MARGIN, Knowledge, knowledge, windows_of_use

DEMO = REPOSITORY / "pipelines" / "demo" / "teacher"


class Costly:
    """Says of the n-th hidden 6-mer that it is asked for that it costs so much."""

    def __init__(self, token_bases: int = 6) -> None:
        self.token_bases = token_bases
        self.asked: list[int] = []

    def masked_loss(
        self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64]:
        assert kmer_id_WT.shape == hidden_WT.shape
        first = len(self.asked)
        self.asked += kmer_id_WT[hidden_WT].tolist()
        return np.arange(first, len(self.asked), dtype=np.float64)


class Headless(Costly):
    def masked_loss(self, *_: object) -> None:  # type: ignore[override]
        return None


def some_windows(windows: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """6-mers of which some are much commoner than others."""
    generator = np.random.default_rng(0)
    kmer_id_WT = (generator.integers(0, 64, (windows, 20)) ** 2).astype(np.uint16)
    return kmer_id_WT, group_masks(seed=0, view=0, first=0, windows=windows, kmers=20, masked=4)


@pytest.mark.parametrize("bases", [6, 3, 2, 1])
def test_frequencies_are_those_of_a_plain_count_in_other_windows(bases: int) -> None:
    kmer_id_WT, hidden_WT = some_windows(400)
    teacher = Costly(bases)
    found = knowledge(teacher, kmer_id_WT, hidden_WT)
    assert found is not None
    # 1,024 hidden 6-mers would be 256 windows of 4: more than half of those that are there.
    assert (found.windows, found.kmers, found.token_bases) == (200, 800, bases)
    assert teacher.asked == kmer_id_WT[:200][hidden_WT[:200]].tolist()
    assert found.nats == pytest.approx(799 / 2)
    count: Counter[str] = Counter()
    for kmer in kmer_id_WT[200:].ravel():
        count.update(spell(int(kmer))[i : i + bases] for i in range(0, 6, bases))
    total = count.total() + 4**bases
    costs = [
        -sum(math.log((count[spell(kmer)[i : i + bases]] + 1) / total) for i in range(0, 6, bases))
        for kmer in teacher.asked
    ]
    assert found.frequency_nats == pytest.approx(sum(costs) / len(costs))


def test_at_most_half_of_the_windows_are_asked_for_and_of_one_that_one() -> None:
    for windows, asked in ((1, 1), (2, 1), (9, 4), (600, 256)):
        found = knowledge(Costly(), *some_windows(windows))
        assert found is not None
        assert (found.windows, found.kmers) == (asked, 4 * asked)
        assert found.frequency_nats <= math.log(4096) + 1e-9


@pytest.mark.parametrize(("kmers", "masked"), [(20, 4), (2046, 307)])
def test_more_windows_than_are_of_use_tell_nothing_more(kmers: int, masked: int) -> None:
    count = windows_of_use(kmers=kmers, hidden=masked)
    kmer_id_WT = np.random.default_rng(0).integers(0, 4096, (count + 9, kmers)).astype(np.uint16)
    hidden_WT = np.zeros(kmer_id_WT.shape, dtype=np.bool_)
    hidden_WT[:, :masked] = True
    of_all = knowledge(Costly(), kmer_id_WT, hidden_WT)
    assert knowledge(Costly(), kmer_id_WT[:count], hidden_WT[:count]) == of_all
    assert knowledge(Costly(), kmer_id_WT[: count - 1], hidden_WT[: count - 1]) != of_all


def test_enough_is_well_below_frequency() -> None:
    def of(nats: float) -> Knowledge:
        return Knowledge(nats=nats, frequency_nats=8.0, token_bases=6, kmers=1024, windows=79)

    assert of(8.0 - 1.01 * MARGIN).enough
    assert not of(8.0 - 0.99 * MARGIN).enough
    assert not of(8.5).enough
    assert not of(float("nan")).enough


def test_a_teacher_without_a_language_head_cannot_be_asked() -> None:
    assert knowledge(Headless(), *some_windows(10)) is None


# --- before stage one plans ----------------------------------------------------------------------


@pytest.fixture(autouse=True)
def short_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """How fast the teacher is is nothing to us."""
    monkeypatch.setattr("had_pipe.survey._PROBE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not ECOLI.exists():
        pytest.skip("the demo's genome and teacher lie in the repository, not in a package")
    base = next(iter(read_contigs(ECOLI))).base[:9_600]
    path = tmp_path_factory.mktemp("genome") / "piece.fa"
    path.write_text(f">piece\n{''.join(LETTERS[b] for b in base)}\n")
    return path


@pytest.fixture(scope="module")
def permuted(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's teacher with 6-mers under each other's tokens, inside and out."""
    folder = Path(shutil.copytree(DEMO, tmp_path_factory.mktemp("permuted") / "teacher"))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    order = torch.cat(
        (
            torch.arange(6),
            6 + torch.randperm(4096, generator=torch.Generator().manual_seed(0)),
            torch.arange(4102, 4107),
        )
    )
    for key in ("esm.embeddings.word_embeddings.weight", "lm_head.decoder.weight", "lm_head.bias"):
        stored[key] = stored[key][order].contiguous()
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    return folder


def a_recipe(teacher: Path, genome: Path, cache: Path, **more: object) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"name": str(teacher), **more},
            "genome": [{"name": "piece", "path": str(genome)}],
            "windows": {"bases": 240, "stride": 240},
            "cache": {"path": str(cache), "part": 40},
        }
    )


def plan_of(cache: Path) -> dict[str, dict[str, object]]:
    return dict(json.loads((cache / "plan.json").read_text()))


def test_a_permuted_vocabulary_is_refused_with_both_numbers_before_anything_is_planned(
    permuted: Path, genome: Path, tmp_path: Path
) -> None:
    recipe = a_recipe(permuted, genome, tmp_path / "cache")
    with pytest.raises(InputError, match=r"does not know this DNA: (8|9)\.\d\d nats .* 8\.\d\d;"):
        extract(recipe, device="cpu")
    assert not (tmp_path / "cache" / "plan.json").exists()
    assert not list((tmp_path / "cache").rglob("*.zarr"))
    (note,) = (n for n in survey(recipe, device="cpu").notes if "refuses to begin" in n)
    assert "does not know this DNA" in note
    # The same folder is free for the right teacher.
    extract(a_recipe(DEMO, genome, tmp_path / "cache"), device="cpu")


def test_the_right_teacher_passes_and_the_plan_says_nothing_of_it(
    genome: Path, tmp_path: Path
) -> None:
    told: list[Progress] = []
    recipe = a_recipe(DEMO, genome, tmp_path / "cache")
    extract(recipe, device="cpu", report=told.append)
    assert "asking the teacher for hidden 6-mers" in {progress.what for progress in told}
    # Nor of what other kinds of teachers are besides their weights.
    assert set(plan_of(tmp_path / "cache")["teacher"]) == {
        "name",
        "revision",
        "weights_sha256",
        "layer",
        "input",
        "channels",
        "dtype",
        "licence",
    }
    # It is asked where a plan is made, not where one is continued.
    told.clear()
    extract(recipe, device="cpu", report=told.append)
    assert "asking the teacher for hidden 6-mers" not in {progress.what for progress in told}
    found = survey(recipe, device="cpu")
    assert not found.notes
    assert found.knowledge is not None
    assert found.knowledge.enough
    assert found.knowledge.nats < found.knowledge.frequency_nats < math.log(4096) + 0.01


@pytest.mark.usefixtures("genome")
def test_plan_counts_the_frequencies_that_extraction_counts(tmp_path: Path) -> None:
    base = next(iter(read_contigs(ECOLI))).base[:600_000]
    (tmp_path / "longer.fa").write_text(f">piece\n{''.join(LETTERS[b] for b in base)}\n")
    recipe = a_recipe(DEMO, tmp_path / "longer.fa", tmp_path / "cache")
    asked = Job.of(recipe)
    references = [corpus.read_reference(one, report=silent) for one in asked.genomes]
    data = corpus.lay_out(references, asked.windows)["train"]
    extracted = knowledge(Costly(), data.kmer_id, data.mask[0])
    planned = survey(recipe, device="cpu").knowledge
    assert extracted is not None
    assert planned is not None
    assert planned.frequency_nats == pytest.approx(extracted.frequency_nats, abs=0.02)


def test_what_the_recipe_lets_through_is_recorded_and_stays_recorded(
    permuted: Path, genome: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    made = extract(a_recipe(permuted, genome, cache, unchecked=True), device="cpu")
    assert plan_of(cache)["teacher"]["unchecked"] is True
    shown = CliRunner().invoke(cli.app, ["cache", "inspect", str(cache)]).stdout
    assert "never checked to know the DNA" in shown
    assert not survey(a_recipe(permuted, genome, cache, unchecked=True), device="cpu").notes

    # A cache that is there goes on, whatever the recipe says of this by now; so does its repair.
    plain = a_recipe(permuted, genome, cache)
    assert extract(plain, device="cpu").cache_id == made.cache_id
    (cache / "data.zarr" / "train" / "kmer_id" / "c" / "0" / "0").write_bytes(b"damaged")
    assert extract(plain, device="cpu", repair=True).cache_id == made.cache_id

    recode(cache, tmp_path / "other", codec="exact")
    assert Cache.open(tmp_path / "other").plan.teacher.unchecked is True


def test_a_plan_says_something_of_a_teacher_or_nothing(genome: Path, tmp_path: Path) -> None:
    extract(a_recipe(DEMO, genome, tmp_path / "cache"), device="cpu")
    plan, raw = layout.read_plan(tmp_path / "cache")
    assert plan.to_json() == raw
    told = json.loads(raw)
    for value in (False, None, 1):
        told["teacher"]["unchecked"] = value
        with pytest.raises(Exception, match=r"not what format 1 says|not canonical"):
            layout.parse_plan(tmp_path, layout.canonical_json(told))
    told["teacher"] = {**plan.teacher.model_dump(), "settings_sha256": None}
    with pytest.raises(CacheRefused, match="not canonical"):
        layout.parse_plan(tmp_path, layout.canonical_json(told))
    told["teacher"]["settings_sha256"] = "0" * 64
    other = layout.parse_plan(tmp_path, layout.canonical_json(told))
    assert set(other.meaning) - set(plan.meaning) == {"teacher.settings_sha256"}
    del told["teacher"]["settings_sha256"]
    told["teacher"]["unchecked"] = True
    parsed = layout.parse_plan(tmp_path, layout.canonical_json(told))
    assert parsed.meaning == plan.meaning
    assert parsed.id != plan.id


def test_a_checkpoint_without_its_head_is_refused_unless_the_recipe_lets_it_through(
    genome: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "teacher"))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    bare = {key: value for key, value in stored.items() if not key.startswith("lm_head.")}
    safetensors.torch.save_file(bare, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"holds no language head.*unchecked = true"):
        extract(a_recipe(folder, genome, tmp_path / "cache"), device="cpu")
    extract(a_recipe(folder, genome, tmp_path / "cache", unchecked=True), device="cpu")


def test_a_teacher_of_broken_numbers_is_told_as_such(genome: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(DEMO, tmp_path / "teacher"))
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    stored["lm_head.bias"][7] = float("nan")
    safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteError, match="says NaN or infinity of a hidden 6-mer"):
        extract(a_recipe(folder, genome, tmp_path / "cache"), device="cpu")
    assert not (tmp_path / "cache" / "plan.json").exists()
