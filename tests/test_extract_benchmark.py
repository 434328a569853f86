"""benchmarks/extract.py: every step of a batch's way is told, and growth is of what was asked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Script

from had_pipe import batches
from had_pipe.cache import Cache
from had_pipe.extract import extract
from had_pipe.teachers.ntv2 import NTv2Config, random_model
from had_pipe.teachers.ntv2_checkpoint import save_checkpoint
from had_pipe.teachers.teacher import load_teacher

TINY = NTv2Config(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=48,
    max_position_embeddings=64,
)


@pytest.fixture
def bench(script: Script) -> Any:
    return script("extract")


def test_a_ratio_and_every_step_are_told_of_a_teacher(bench: Any, tmp_path: Path) -> None:
    shape = bench.Shape("wide", TINY, 120, windows=70, part=40)
    size = bench.Size((shape,), rounds=1, contig_windows=1)
    result = bench.measure(size, tmp_path, device="cpu", only="speed")
    assert json.loads(json.dumps(result)) == result
    found = result["teachers"]["wide"]
    assert result["ratio_teacher_alone"] == found["ratio_teacher_alone"] > 0
    walk = found["milliseconds_per_window"]
    # What surrounds a forward pass in its own thread, and what goes on beside it.
    assert set(walk["exposed"]) == {"prepare", "gather", "finite", "encode", "copy"}
    assert set(walk["hidden"]) == {"write", "commit"}
    assert 0 < walk["exposed_share"] < 1
    assert result["growth"] is None
    assert result["peak_memory_bytes"] > 10**7
    shown = bench.table(result)
    assert all(step in shown for step in (*walk["exposed"], *walk["hidden"], "teacher alone"))


def test_what_is_not_what_the_teacher_says_is_not_timed(bench: Any, tmp_path: Path) -> None:
    shape = bench.Shape("wide", TINY, 120, windows=40, part=40)
    bench.random_genome(tmp_path / "wide.fa", shape.windows * shape.bases)
    teachers = []
    for seed in (0, 1):
        save_checkpoint(random_model(TINY, seed=seed), tmp_path / str(seed))
        path = str(tmp_path / str(seed))
        teachers.append(load_teacher(path, revision=None, layer=-1, device="cpu"))
    recipe = bench.a_recipe(tmp_path, shape, tmp_path / "0", tmp_path / "cache")
    extract(recipe, teacher=teachers[0])
    cache = Cache.open(tmp_path / "cache")
    bench.check(cache, teachers[0], batch=8)
    with pytest.raises(AssertionError):
        bench.check(cache, teachers[1], batch=8)


def test_the_teacher_alone_sees_the_batches_of_extraction(bench: Any, tmp_path: Path) -> None:
    shape = bench.Shape("wide", TINY, 120, windows=50, part=20)
    bench.random_genome(tmp_path / "wide.fa", shape.windows * shape.bases)
    save_checkpoint(random_model(TINY, seed=0), tmp_path / "teacher")
    teacher = load_teacher(str(tmp_path / "teacher"), revision=None, layer=-1, device="cpu")

    class Seen:
        def __init__(self) -> None:
            self.batches: list[tuple[bytes, bytes]] = []

        def embed(self, kmer_id: Any, hidden: Any) -> Any:
            self.batches.append((kmer_id.tobytes(), hidden.tobytes()))
            return teacher.embed(kmer_id, hidden)

        def __getattr__(self, name: str) -> Any:
            return getattr(teacher, name)

    recipe = bench.a_recipe(tmp_path, shape, tmp_path / "teacher", tmp_path / "cache")
    extracting, alone = Seen(), Seen()
    extract(recipe, teacher=extracting)  # type: ignore[arg-type]
    cache = Cache.open(tmp_path / "cache")
    assert bench.Alone(cache, alone, batch=16).rate() > 0
    assert len(alone.batches) == 5  # two of each whole part, one of the last
    assert extracting.batches[-5:] == alone.batches


def test_how_many_windows_fit_is_found_before_extraction_is_timed(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []

    def note(name: str, was: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return was(*args, **kwargs)

        return noted

    monkeypatch.setattr("had_pipe.parts.fit_batch", note("tried", batches.fit_batch))
    monkeypatch.setattr(bench.stage, "extract", note("extract", bench.stage.extract))
    shape = bench.Shape("wide", TINY, 120, windows=8, part=8)
    bench.measure_teacher(shape, tmp_path, rounds=1, device="cpu")
    assert found == ["extract", "tried", *2 * ["tried", "extract"]]


def test_growth_is_of_one_contig_and_of_ten(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "_in_a_process", bench.one_phase)  # what it takes is not looked at
    size = replace(bench.sizes(full=False, cuda=False), contig_windows=32)
    result = bench.measure(size, tmp_path, device="cpu", only="growth")
    grown = result["growth"]
    assert grown["windows"] == {1: 32, 10: 320}
    for told in grown["phases"].values():
        assert told["planning"]["windows"] == told["extraction"]["windows"]
        assert all(of["seconds"] > 0 and of["cpu_seconds"] > 0 for of in told.values())
    assert grown["memory_ratio"] >= 1  # most that one process ever held
    assert "10 times the windows" in bench.table(result)
