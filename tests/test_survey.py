"""What `plan` tells, held against what is then made and against arithmetic by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from numpy_teacher import CHANNELS, NumpyTeacher
from test_corpus import random_letters, write_fasta

from had_pipe import survey
from had_pipe.cache import Cache
from had_pipe.cache.codebook import MOST_CHANNELS
from had_pipe.errors import NonFiniteError, RecipeError
from had_pipe.extract import extract
from had_pipe.recipe import Recipe
from had_pipe.survey import Survey


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    letters = random_letters(np.random.default_rng(5), 40_000)
    return write_fasta(tmp_path_factory.mktemp("genome") / "g.fa", {"one": letters})


def a_recipe(genome: Path, path: Path, **cache: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"name": "/there/is/none", "input": "masked"},
            "genome": [{"name": "g", "path": str(genome)}],
            "windows": {"bases": 60, "stride": 60, "mask_ratio": 0.25, "seed": 3},
            "cache": {"path": str(path), "part": 64, **cache},
        }
    )


def told(
    recipe: Recipe, patched: pytest.MonkeyPatch, *, seconds: float = 60.0, **teacher: Any
) -> Survey:
    return told_by(NumpyTeacher(**teacher), recipe, patched, seconds=seconds)


def told_by(
    teacher: NumpyTeacher, recipe: Recipe, patched: pytest.MonkeyPatch, *, seconds: float
) -> Survey:
    patched.setattr(survey, "_PROBE_SECONDS", seconds)
    patched.setattr("had_pipe.job.load_teacher", lambda *_, **__: teacher)
    return survey.survey(recipe)


def test_bytes_a_group_are_those_of_its_shards(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = told(a_recipe(genome, tmp_path / "none"), monkeypatch)
    assert list(found.codecs) == sorted(
        found.codecs, key=lambda name: -found.codecs[name].group_nbytes
    )
    assert {"exact", "int8"} <= set(found.codecs)
    assert found.codecs["exact"].group_nbytes == 4 * CHANNELS
    assert found.codecs["int8"].group_nbytes == CHANNELS + 2
    assert found.codecs["int8"].below_float16 == 2 * CHANNELS / (CHANNELS + 2)
    for codec, cost in found.codecs.items():
        path = tmp_path / codec
        extract(a_recipe(genome, path, codec=codec), teacher=NumpyTeacher())
        arrays = [file for file in path.rglob("c/**/*") if file.is_file()]
        assert cost.nbytes == sum(file.stat().st_size for file in arrays)
        # A shard is its windows' payloads, a CRC each, and an index of 16 bytes a row and a CRC.
        shards = [file for file in arrays if "embedding" in file.parts and "0" in file.parts]
        shards = [file for file in shards if "statistics" not in file.parts]
        signals = 1 if codec == "exact" else 2
        assert len(shards) == signals * -(-Cache.open(path).rows("train") // 64)
        windows = Cache.open(path).rows("train")
        parts = -(-windows // 64)
        around = signals * (windows * 4 + parts * (64 * 16 + 4))
        payload = sum(file.stat().st_size for file in shards) - around
        assert cost.group_nbytes * found.stored_groups == payload


def test_what_codecs_lose_is_what_the_finished_cache_says_it_lost(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = told(a_recipe(genome, tmp_path / "none"), monkeypatch)
    assert found.probed_groups == found.stored_groups
    for codec, cost in found.codecs.items():
        path = tmp_path / codec
        made = extract(a_recipe(genome, path, codec=codec), teacher=NumpyTeacher())
        assert cost.fidelity is not None
        for figure in ("relative", "channel_rmse"):
            # Other windows of the same genome: the same figure but for the sample.
            assert cost.fidelity[figure] == pytest.approx(made.fidelity[figure], rel=0.2)
        if codec == "exact":
            assert cost.fidelity["relative"] == 0
        assert 1 - cost.fidelity["worst_cosine"] <= 5 * (1 - made.fidelity["worst_cosine"]) + 1e-12


def test_a_codec_that_cannot_hold_the_teacher_is_not_offered(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(kw_only=True)
    class Wide(NumpyTeacher):
        channels: int = MOST_CHANNELS + 1

        def embed(
            self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
        ) -> Any:
            return np.zeros((*kmer_id_WT.shape, self.channels), dtype=np.float32)

    found = told_by(Wide(), a_recipe(genome, tmp_path / "none"), monkeypatch, seconds=0.0)
    assert list(found.codecs) == ["exact", "int8"]
    with pytest.raises(RecipeError, match="no cache can be made of this recipe"):
        told_by(Wide(), a_recipe(genome, tmp_path / "none", codec="tiny"), monkeypatch, seconds=0.0)


def test_too_few_groups_say_nothing_of_codecs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    letters = "".join(np.random.default_rng(1).choice(list("ACGT"), 60 * 12))
    few = write_fasta(tmp_path / "few.fa", {"one": letters})
    found = told(a_recipe(few, tmp_path / "none"), monkeypatch)
    # Eight times the channels in whole windows of 7 stored groups, and a third of that for tests.
    least = -(-8 * CHANNELS // 7)
    assert found.needed_groups == 7 * (least + least // 3)
    assert found.probed_groups == 7 * 12
    assert all(cost.fidelity is None for cost in found.codecs.values())


def test_the_probe_ends_with_its_time_and_with_the_windows_there_are(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seconds in (0.0, 60.0):
        teacher = NumpyTeacher(seconds=0.001)
        found = told_by(teacher, a_recipe(genome, tmp_path / "none"), monkeypatch, seconds=seconds)
        windows = sum(found.windows.values())
        # One batch sets the teacher up.
        assert teacher.batches == (2 if seconds == 0 else 1 + -(-windows // 16))
        assert teacher.shapes == {(16, 10)}
        assert found.seconds * found.windows_per_second == pytest.approx(windows)
        assert found.windows_per_second < 16 / 0.001


def test_a_teacher_of_nan_is_refused(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil = {"spoil": lambda kmer_id: np.ones(len(kmer_id), dtype=np.bool_)}
    with pytest.raises(NonFiniteError, match="table gives NaN or infinity for windows of these"):
        told(a_recipe(genome, tmp_path / "none"), monkeypatch, **spoil)


def test_room_for_too_few_files_or_bytes_is_told(
    genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = told(a_recipe(genome, tmp_path / "none"), monkeypatch, seconds=0.0)
    assert not whole.notes
    monkeypatch.setattr(survey, "free_files", lambda _: whole.files - 1)
    found = told(a_recipe(genome, tmp_path / "none"), monkeypatch, seconds=0.0)
    assert found.free_files == whole.files - 1
    assert [note.split(":")[0] for note in found.notes] == ["too few inodes"]
    monkeypatch.setattr(survey, "free_files", lambda _: None)
    monkeypatch.setattr(survey, "free_nbytes", lambda _: 10)
    found = told(a_recipe(genome, tmp_path / "none"), monkeypatch, seconds=0.0)
    assert (found.free_nbytes, found.free_files) == (10, None)
    assert [note.split(":")[0] for note in found.notes] == ["too little room"]


@pytest.mark.parametrize(
    ("licence", "said"),
    [
        ("Apache-2.0", ["any use, commercial too"]),
        ("CC-BY-4.0", ["name the authors"]),
        (
            "CC-BY-NC-SA-4.0",
            ["name the authors; no commercial use; ", "under the same licence", "unsettled"],
        ),
        ("unknown", ["find out before you share"]),
        ("Grandmother-1.0", ["read it before you share"]),
    ],
)
def test_what_the_licence_implies_is_told(
    licence: str,
    said: list[str],
    genome: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = told(a_recipe(genome, tmp_path / "none"), monkeypatch, seconds=0.0, licence=licence)
    assert found.licence == licence
    assert all(words in found.licence_implies for words in said)
    assert ("commercial" in found.licence_implies) == (licence in ("Apache-2.0", "CC-BY-NC-SA-4.0"))


def everything_below(folder: Path) -> Iterator[tuple[Path, int, int]]:
    for path in sorted(folder.rglob("*")):
        found = path.lstat()
        yield path, found.st_size, found.st_mtime_ns


def test_nothing_is_written(genome: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    extract(a_recipe(genome, made), teacher=NumpyTeacher())
    before = list(everything_below(tmp_path)), list(everything_below(genome.parent))
    states: Mapping[str, str] = {
        name: told(a_recipe(genome, tmp_path / name), monkeypatch, seconds=0.0).state
        for name in ("made", "none")
    }
    assert states == {"made": "finished", "none": "new"}
    assert (list(everything_below(tmp_path)), list(everything_below(genome.parent))) == before
