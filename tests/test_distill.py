"""Stage two as a whole: what a run learns, records and leaves, and how it goes on after a stop."""

from __future__ import annotations

import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_cache import build_cache
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from had_pipe import checkpoint
from had_pipe.cache import Cache
from had_pipe.distill import DistillSummary, distill
from had_pipe.dna import kmers
from had_pipe.errors import (
    CacheIncomplete,
    CacheMismatch,
    HeldError,
    InputError,
    Interrupted,
    NetworkError,
    NonFiniteError,
    RecipeError,
    RunMismatch,
    StorageError,
)
from had_pipe.learner import learning_rate, parameter_groups
from had_pipe.objectives import HADObjective
from had_pipe.progress import Progress
from had_pipe.recipe import Recipe, Train
from had_pipe.run import read_metrics
from had_pipe.stream import Batch, Stream, first_windows
from had_pipe.students import HADConfig, HADModel, spell

TINY = {
    "hidden_size": 32,
    "layers": 1,
    "gdn_heads": 2,
    "head_dim": 16,
    "expand_v": 1,
    "attention_heads": 2,
    "mlp": 32,
}
TIMING = {
    *("seconds", "windows_per_second", "kmers_per_second", "bases_per_second", "wait_share"),
    # A process that goes on tells only of what it read itself.
    *("read_bytes", "read_bytes_per_second"),
    *("mirror_hits", "mirror_misses", "mirror_downloaded_bytes"),
}


def a_recipe(cache: Path, out: Path, *, objective: Any = None, **train: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "cache": {"path": cache},
            "student": TINY,
            "objective": objective or {},
            "train": {
                "out": out,
                "steps": 20,
                "batch": 8,
                "lr": 2e-3,
                "warmup": 2,
                "log_every": 4,
                "validate_every": 10,
                "checkpoint_every": 10,
                "validation_windows": 16,
                **train,
            },
        }
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("caches") / "one", windows=96, part=32, views=2)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> DistillSummary:
    """Twenty steps without a stop."""
    return distill(a_recipe(cache, tmp_path_factory.mktemp("runs") / "straight"))


def untimed(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in read_metrics(run)
    ]


def state_of(run: Path) -> dict[str, bytes]:
    """Weights, optimiser and random state of the last checkpoint, and the student."""
    last = checkpoint.checkpoints(run / "checkpoints")[0]
    files = [*last.glob("*.safetensors"), run / "student" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in files}


def assert_same_run(run: Path, straight: DistillSummary) -> None:
    assert state_of(run) == state_of(straight.run)
    assert untimed(run) == untimed(straight.run)


KILLED_AFTER_13 = """
import json, os, signal, sys
from pathlib import Path
from had_pipe.distill import distill
from had_pipe.recipe import Recipe

def report(progress):
    if progress.what == "training" and progress.done == 13:
        print(*sorted(m for m in sys.modules if m.startswith("had_pipe")), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

distill(Recipe.model_validate(json.load(sys.stdin)), report=report)
"""


def test_a_killed_run_goes_on_bit_for_bit_and_never_needed_stage_one(
    tmp_path: Path, cache: Path, straight: DistillSummary
) -> None:
    recipe = a_recipe(cache, tmp_path / "run")
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_AFTER_13],
        input=recipe.model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    imported = killed.stdout.split()
    assert "had_pipe.distill" in imported
    for stage_one in ("had_pipe.teachers", "had_pipe.extract", "had_pipe.dna.reference"):
        assert not any(name.startswith(stage_one) for name in imported)
    # Step 12 was logged; the last checkpoint is of step 10, in the midst of a line's steps.
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "run" / "checkpoints")] == [
        "step-00000010"
    ]
    summary = distill(recipe)
    assert not summary.already_done
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, cache: Path, straight: DistillSummary, number: signal.Signals
) -> None:
    def report(progress: Progress) -> None:
        if progress.what == "training" and progress.done == 7:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted) as stop:
        distill(a_recipe(cache, tmp_path / "run"), report=report)
    assert str(stop.value) == (
        f"stopped by {number.name} after step 7 of 20, saved: run the same command again to go on"
    )
    assert signal.getsignal(number) is before
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000007"
    told: list[Progress] = []
    distill(a_recipe(cache, tmp_path / "run"), report=told.append)
    assert {progress.begun for progress in told if progress.what == "training"} == {7}
    assert_same_run(tmp_path / "run", straight)


def test_a_second_signal_is_obeyed_at_once_and_costs_only_what_was_not_saved(
    tmp_path: Path, cache: Path, straight: DistillSummary
) -> None:
    def report(progress: Progress) -> None:
        if progress.what == "training" and progress.done == 12:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        distill(a_recipe(cache, tmp_path / "run"), report=report)
    assert checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000010"
    distill(a_recipe(cache, tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("pass_", [1, 2], ids=["learnt", "measured"])
def test_a_signal_before_the_first_step_stops_there(
    tmp_path: Path, cache: Path, pass_: int
) -> None:
    ended = 0

    def report(progress: Progress) -> None:
        nonlocal ended
        assert progress.what == "measuring the floors"
        ended += progress.done == progress.total
        if ended == pass_:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM before the first step"):
        distill(a_recipe(cache, tmp_path / "run"), report=report)
    assert not read_metrics(tmp_path / "run")


def stall() -> None:
    """A signal while data does not come."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)
    raise AssertionError("nobody woke it")


@pytest.mark.parametrize("step", [0, 7])
def test_a_signal_while_data_is_waited_for_stops_at_once_and_loses_nothing(
    tmp_path: Path,
    cache: Path,
    straight: DistillSummary,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
) -> None:
    class Stalling(Stream):
        def __next__(self) -> Batch:
            batch = super().__next__()
            if batch.position == step:
                stall()
            return batch

    with monkeypatch.context() as patched:
        patched.setattr("had_pipe.distill.Stream", Stalling)
        with pytest.raises(Interrupted) as stop:
            distill(a_recipe(cache, tmp_path / "run"))
    where = f"after step {step} of 20, saved" if step else "before the first step"
    assert str(stop.value) == f"stopped by SIGTERM {where}: run the same command again to go on"
    # What was measured before the first step is kept as well.
    told: list[Progress] = []
    distill(a_recipe(cache, tmp_path / "run"), report=told.append)
    assert "measuring the floors" not in {progress.what for progress in told}
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize("which", [1, 2], ids=["midway", "last"])
def test_a_validation_that_is_stopped_is_made_by_whoever_goes_on(
    tmp_path: Path,
    cache: Path,
    straight: DistillSummary,
    monkeypatch: pytest.MonkeyPatch,
    which: int,
) -> None:
    validations = 0

    def stalling(*args: Any, **options: Any) -> Iterator[Batch]:
        nonlocal validations
        for number, batch in enumerate(first_windows(*args, **options)):
            if options["batch"] == 8 and number == 1:  # the second batch of a validation
                validations += 1
                if validations == which:
                    stall()
            yield batch

    recipe = a_recipe(cache, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("had_pipe.held_out.first_windows", stalling)
        with pytest.raises(Interrupted, match=f"after step {10 * which} of 20, saved"):
            distill(recipe)
        assert not (tmp_path / "run" / "student").exists()
        # Stopped there once more, before anything new, it stands where it stood.
        validations = which - 1
        with pytest.raises(Interrupted, match=f"after step {10 * which} of 20, saved"):
            distill(recipe)
    distill(recipe)
    assert_same_run(tmp_path / "run", straight)


def test_what_was_learnt_is_kept_when_a_network_goes_away(
    tmp_path: Path,
    cache: Path,
    straight: DistillSummary,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Cut(Stream):
        def __next__(self) -> Batch:
            batch = super().__next__()
            if batch.position == 7:
                raise NetworkError("the host is gone")
            return batch

    recipe = a_recipe(cache, tmp_path / "run")
    with monkeypatch.context() as patched:
        patched.setattr("had_pipe.distill.Stream", Cut)
        for _ in range(2):  # still gone
            with pytest.raises(NetworkError):
                distill(recipe)
            saved = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
            assert [path.name for path in saved] == ["step-00000007"]
    distill(recipe)
    assert_same_run(tmp_path / "run", straight)


# Forks, so that torch is loaded once: a child for each rename that a whole run makes, killed there.
KILLED_AT_EVERY_RENAME = """
import json, os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from had_pipe.distill import distill
from had_pipe.recipe import Recipe

def recipe(out):
    return Recipe.model_validate({**told, "train": {**told["train"], "out": str(out)}})

def in_a_child(out, kill_at):
    if (child := os.fork()) == 0:
        renames = 0
        def count(event, _):
            nonlocal renames
            if event == "os.rename":
                renames += 1
                if renames == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        done = distill(recipe(out))
        os._exit(10 + done.already_done)
    return os.waitpid(child, 0)[1]

told = json.load(sys.stdin)
folder = Path(told["train"]["out"])
kills = 0
while os.WIFSIGNALED(in_a_child(folder / str(kills + 1), kills + 1)):
    kills += 1
    for expected in (10, 11):
        status = in_a_child(folder / str(kills), 0)
        assert os.waitstatus_to_exitcode(status) == expected, (kills, status)
print(kills)
"""


def test_killed_at_any_rename_a_run_goes_on_to_the_same_end(tmp_path: Path, cache: Path) -> None:
    settings = {"steps": 3, "warmup": 1, "checkpoint_every": 1, "validate_every": 2}
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_RENAME],
        input=a_recipe(cache, tmp_path, **settings).model_dump_json(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # The record, three checkpoints of which one is dropped again, and the student.
    kills = int(done.stdout)
    assert kills >= 6
    whole = tmp_path / str(kills + 1)
    for kill in range(1, kills + 1):
        assert state_of(tmp_path / str(kill)) == state_of(whole), kill
        assert untimed(tmp_path / str(kill)) == untimed(whole), kill


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(
    tmp_path: Path, cache: Path, straight: DistillSummary
) -> None:
    shutil.copytree(straight.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    newest = tmp_path / "run" / "checkpoints" / "step-00000020" / "student.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    distill(a_recipe(cache, tmp_path / "run"))
    assert_same_run(tmp_path / "run", straight)


@pytest.mark.parametrize(
    "how",
    [{"prefetch": 1}, {"prefetch": 1 << 30}, {"direct": True}, {"through_zarr": True}],
    ids=str,
)
def test_how_a_cache_is_read_changes_nothing_that_is_learnt(
    tmp_path: Path, cache: Path, straight: DistillSummary, how: dict[str, Any]
) -> None:
    try:
        distill(a_recipe(cache, tmp_path / "run"), **how)
    except StorageError as refused:
        assert "direct" in how
        pytest.skip(str(refused))
    assert_same_run(tmp_path / "run", straight)


def test_a_finished_run_says_so_and_redoes_nothing(cache: Path, straight: DistillSummary) -> None:
    def stamps() -> dict[Path, int]:
        files = [p for p in straight.run.rglob("*") if p.is_file() and not p.name.startswith(".")]
        return {path: path.stat().st_mtime_ns for path in files}

    before = stamps()
    # How often to tell and to save may change; what is learnt does not depend on it.
    again = distill(a_recipe(cache, straight.run, checkpoint_every=3, log_every=1))
    assert again.already_done
    assert again.last == straight.last
    assert stamps() == before


def test_a_student_that_was_not_published_yet_is_published_without_training(
    tmp_path: Path, cache: Path, straight: DistillSummary
) -> None:
    shutil.copytree(straight.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    told: list[Progress] = []
    distill(a_recipe(cache, tmp_path / "run"), report=told.append)
    assert not told
    assert_same_run(tmp_path / "run", straight)


def test_metrics_tell_every_line_of_the_schedule(straight: DistillSummary, cache: Path) -> None:
    lines = read_metrics(straight.run)
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 4, 8, 12, 16, 20]
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [10, 20]
    assert lines[0]["kind"] == "floors"
    train = [line for line in lines if line["kind"] == "train"]
    for line in train:
        assert line["loss"] == pytest.approx(line["align"] + line["reconstruct"], rel=1e-5)
        assert line["epoch"] == line["step"] * 8 / 96
        assert 0 <= line["wait_share"] <= 1
        assert line["read_bytes_per_second"] > 0
        assert "mirror_hits" not in line
        assert line["kmers_per_second"] == pytest.approx(line["windows_per_second"] * 12)
        assert line["bases_per_second"] == pytest.approx(line["windows_per_second"] * 72)
    # 20 batches of 8 windows, values and scales as they are stored.
    stored = Cache.open(cache).allocate(20 * 8)
    assert stored.scale is not None
    assert sum(line["read_bytes"] for line in train) == stored.value.nbytes + stored.scale.nbytes
    assert [line["seconds"] for line in train] == sorted(line["seconds"] for line in train)
    assert straight.first == train[0]
    assert straight.last == train[-1]
    assert straight.validation == lines[-1]
    assert straight.floors == lines[0]


def test_the_record_of_a_run_says_what_it_is_and_not_where(
    straight: DistillSummary, cache: Path
) -> None:
    text = (straight.run / "run.json").read_text()
    assert str(cache) not in text
    assert str(straight.run) not in text
    record = json.loads(text)
    assert record["format"] == "had-run/1"
    assert record["recipe"]["train"]["steps"] == 20
    assert record["recipe"]["student"] == TINY
    assert record["caches"][0]["id"] == Cache.open(cache).id
    assert record["caches"][0]["plan"]["teacher"]["channels"] == 16
    state = safetensors.torch.load_file(
        checkpoint.checkpoints(straight.run / "checkpoints")[0] / "student.safetensors"
    )
    assert record["student"]["parameters"] == sum(tensor.numel() for tensor in state.values())
    assert record["kernel"]["name"]
    assert record["versions"]["torch"] == torch.__version__


def test_the_student_loads_with_transformers_and_is_the_one_that_was_trained(
    straight: DistillSummary,
) -> None:
    trained = safetensors.torch.load_file(
        checkpoint.checkpoints(straight.run / "checkpoints")[0] / "student.safetensors"
    )
    student = AutoModel.from_pretrained(straight.student)
    assert {name: t.tolist() for name, t in student.state_dict().items()} == {
        name: t.tolist() for name, t in trained.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(straight.student)
    batch = tokenizer(["ACGTACGTGGCA"], return_tensors="pt")
    assert student(**batch).last_hidden_state.shape == (1, 12, 32)
    reader = AutoModelForMaskedLM.from_pretrained(straight.student)
    objective = safetensors.torch.load_file(
        checkpoint.checkpoints(straight.run / "checkpoints")[0] / "objective.safetensors"
    )
    for name, tensor in reader.decoder.state_dict().items():
        assert torch.equal(tensor, objective[f"decoder.{name}"])


def test_the_card_names_licence_teacher_cache_and_figures(
    straight: DistillSummary, cache: Path
) -> None:
    card = (straight.student / "README.md").read_text()
    opened = Cache.open(cache)
    assert card.startswith(f"---\nlicense: {opened.plan.licence.lower()}\n")
    assert opened.plan.teacher.name in card
    assert opened.id[:12] in card
    assert opened.plan.genomes[0].digest in card
    assert straight.validation is not None
    assert straight.floors is not None
    assert f"{straight.validation['align']:.4g} | {straight.floors['kmer_align']:.4g}" in card
    assert str(cache.parent) not in card


@pytest.mark.parametrize("target", ["raw", "normalised"])
def test_floors_are_those_of_numpy(tmp_path: Path, cache: Path, target: str) -> None:
    recipe = a_recipe(cache, tmp_path / "run", objective={"target": target}, steps=3)
    floors = distill(recipe).floors
    opened = Cache.open(cache)
    # The error is in the space of the loss, the cosine in the teacher's own.
    unit = opened.std.astype(np.float64) if target == "normalised" else 1.0

    def read(split: str, rows: int) -> tuple[list[tuple[int, np.ndarray]], list[int], list[int]]:
        """(k-mer, embedding) of visible groups; bases of masked k-mers; all bases."""
        block = opened.allocate(rows)
        opened.read(split, 0, np.arange(rows), block)
        emb = opened.codec.decode(block.value, block.scale, opened.mean, opened.std)
        visible, hidden, bases = [], [], []
        for w in range(rows):
            ids = block.kmer_id[w : w + 1]
            ids = (kmers.reverse_complement(ids) if block.reversed[w] else ids)[0]
            bases += list("".join(kmers.spell(int(k)) for k in ids))
            seen = [int(k) for k, masked in zip(ids, block.mask[w], strict=True) if not masked]
            visible += list(zip(seen, emb[w].astype(np.float64), strict=True))
            for k, masked in zip(ids, block.mask[w], strict=True):
                hidden += list(kmers.spell(int(k))) if masked else []
        return visible, hidden, bases

    train, _, bases = read("train", 96)
    valid, hidden, _ = read("valid", 16)
    mean = np.mean([emb for _, emb in train], axis=0)
    by_kmer: dict[int, list[np.ndarray]] = {}
    for k, emb in train:
        by_kmer.setdefault(k, []).append(emb)
    table = {k: np.mean(embs, axis=0) for k, embs in by_kmer.items()}

    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    frequency = {base: bases.count(base) / len(bases) for base in "ACGT"}
    commonest = max(frequency, key=lambda base: frequency[base])
    expected = {
        "mean_align": np.mean([np.mean(((emb - mean) / unit) ** 2) for _, emb in valid]),
        "mean_cosine": np.mean([cosine(emb, mean) for _, emb in valid]),
        "kmer_align": np.mean(
            [np.mean(((emb - table.get(k, mean)) / unit) ** 2) for k, emb in valid]
        ),
        "kmer_cosine": np.mean([cosine(emb, table.get(k, mean)) for k, emb in valid]),
        "base_frequency_accuracy": np.mean([base == commonest for base in hidden]),
        "base_frequency_cross_entropy": np.mean([-math.log(frequency[base]) for base in hidden]),
    }
    assert floors is not None
    assert floors["windows"] == 16
    for name, value in expected.items():
        assert floors[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_validation_is_the_trained_student_on_the_held_out_windows(
    straight: DistillSummary, cache: Path
) -> None:
    last = checkpoint.checkpoints(straight.run / "checkpoints")[0]
    student = HADModel(HADConfig(**TINY))
    student.load_state_dict(safetensors.torch.load_file(last / "student.safetensors"))
    objective = HADObjective(hidden_size=32, channels=16)
    objective.load_state_dict(safetensors.torch.load_file(last / "objective.safetensors"))
    opened = Cache.open(cache)
    block = opened.allocate(16)
    opened.read("valid", 0, np.arange(16), block)
    turned = kmers.reverse_complement(block.kmer_id)
    ids = np.where(block.reversed[:, None], turned, block.kmer_id).astype(np.int64)
    target = opened.codec.decode(block.value, block.scale, opened.mean, opened.std)
    kmer_id, mask = torch.from_numpy(ids), torch.from_numpy(block.mask)
    with torch.no_grad():
        feat = student(spell(kmer_id, mask)).last_hidden_state
        losses = objective(feat, kmer_id, mask, torch.from_numpy(target))
    assert straight.validation is not None
    assert straight.validation["windows"] == 16
    for term in ("align", "reconstruct", "accuracy", "cosine"):
        assert straight.validation[term] == pytest.approx(
            float(getattr(losses, term)), rel=1e-4, abs=1e-6
        )


def test_a_student_learns_what_a_table_of_kmers_cannot_know(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "cache", windows=256, valid=64, part=64)
    recipe = a_recipe(
        path,
        tmp_path / "run",
        steps=100,
        batch=16,
        lr=2e-2,
        lr_final=1e-3,
        validate_every=100,
        validation_windows=64,
    )
    summary = distill(recipe)
    assert summary.validation is not None
    assert summary.floors is not None
    assert summary.validation["align"] < summary.floors["kmer_align"]
    assert summary.floors["kmer_align"] < summary.floors["mean_align"]
    assert summary.last["loss"] < 0.5 * summary.first["loss"]


def test_without_held_out_windows_nothing_is_validated(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "cache", windows=32, valid=0)
    summary = distill(a_recipe(path, tmp_path / "run", steps=4, warmup=1))
    assert summary.validation is None
    assert summary.floors is None
    assert {line["kind"] for line in read_metrics(summary.run)} == {"train"}
    assert "Nothing was held out" in (summary.student / "README.md").read_text()


def test_stored_masked_groups_are_left_out_of_the_alignment(tmp_path: Path) -> None:
    runs = []
    for store in ("visible", "all"):
        path = build_cache(tmp_path / store, windows=32, valid=16, codec="exact", store=store)
        runs.append(distill(a_recipe(path, tmp_path / f"run-{store}", steps=4, warmup=1)).run)
    assert state_of(runs[0]) == state_of(runs[1])
    assert untimed(runs[0]) == untimed(runs[1])


def test_a_cache_of_masked_groups_is_refused(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "cache", windows=32, store="masked")
    with pytest.raises(CacheMismatch, match="needs the embeddings of visible groups"):
        distill(a_recipe(path, tmp_path / "run"))


@pytest.mark.parametrize("target", ["raw", "normalised"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_space_and_precision_trains(
    tmp_path: Path, cache: Path, target: str, precision: str
) -> None:
    recipe = a_recipe(
        cache, tmp_path / "run", objective={"target": target}, precision=precision, steps=3
    )
    summary = distill(recipe)
    assert math.isfinite(summary.last["loss"])
    assert summary.floors is not None
    assert summary.validation is not None
    assert math.isfinite(summary.validation["align"])


@pytest.mark.parametrize(
    ("weights", "absent"),
    [
        pytest.param({"align": 0.0}, {"align", "cosine"}, id="reconstruction-only"),
        pytest.param({"reconstruct": 0.0}, {"reconstruct", "accuracy"}, id="alignment-only"),
    ],
)
def test_one_term_alone_trains_and_the_other_is_not_told(
    tmp_path: Path, cache: Path, weights: dict[str, float], absent: set[str]
) -> None:
    recipe = a_recipe(cache, tmp_path / "run", objective=weights, steps=3)
    summary = distill(recipe)
    assert summary.validation is not None
    for line in (summary.first, summary.last, summary.validation):
        assert not absent & line.keys()
    assert AutoModel.from_pretrained(summary.student).config.hidden_size == 32


def test_several_caches_are_one_corpus(tmp_path: Path, cache: Path) -> None:
    other = build_cache(tmp_path / "other", windows=32, seed=1)
    recipe = a_recipe(cache, tmp_path / "run", steps=4)
    summary = distill(recipe, caches=[cache, other])
    assert summary.last["epoch"] == 4 * 8 / 128
    record = json.loads((summary.run / "run.json").read_text())
    assert [c["id"] for c in record["caches"]] == [Cache.open(p).id for p in (cache, other)]
    with pytest.raises(RunMismatch, match="cache 2 "):
        distill(recipe)


def test_weights_mix_caches_and_are_part_of_what_a_run_is(tmp_path: Path, cache: Path) -> None:
    other = build_cache(tmp_path / "other", windows=32, seed=1)
    taken = [0, 0]

    class Counting(Stream):
        def __next__(self) -> Batch:
            batch = super().__next__()
            for span in batch.spans:
                taken[span.cache] += len(span.row)
            return batch

    recipe = a_recipe(cache, tmp_path / "run", weights=[3, 1])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("had_pipe.distill.Stream", Counting)
        summary = distill(recipe, caches=[cache, other])
    assert taken == [120, 40]  # of 20 batches of 8
    assert summary.last["epoch"] == 120 / 96  # of the cache that is seen slowest
    record = json.loads((summary.run / "run.json").read_text())
    assert record["recipe"]["train"]["weights"] == [3.0, 1.0]
    card = (summary.student / "README.md").read_text()
    for opened, weight in ((Cache.open(cache), "3"), (Cache.open(other), "1")):
        assert f"| {opened.id[:12]} | {weight} | " in card
    for weights in ([1, 3], None):
        with pytest.raises(RunMismatch, match=r"train\.weights   there \[3\.0, 1\.0\]   here"):
            distill(a_recipe(cache, tmp_path / "run", weights=weights), caches=[cache, other])


# Refusals


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1], "1 for 2 caches; give one for each"),
        ([1, 1, 1], "3 for 2 caches; give one for each"),
        ([0.123456, 1], "these add up to 17,554"),
    ],
)
def test_weights_that_cannot_be_kept_to_are_refused_before_a_run_begins(
    tmp_path: Path, cache: Path, weights: list[float], said: str
) -> None:
    recipe = a_recipe(cache, tmp_path / "run", weights=weights)
    with pytest.raises(RecipeError, match=rf"\[train\] weights = .*{said}"):
        distill(recipe, caches=[cache, cache])
    assert not (tmp_path / "run").exists()


def test_a_run_begun_by_another_recipe_is_refused_naming_each_key(
    cache: Path, straight: DistillSummary
) -> None:
    other = a_recipe(cache, straight.run, lr=1e-3, seed=5, objective={"align": 0.5})
    with pytest.raises(RunMismatch) as refusal:
        distill(other)
    assert str(refusal.value) == (
        f"{straight.run} was begun by another recipe or cache:\n"
        "  objective.align   there 1.0   here 0.5\n"
        "  train.lr          there 0.002   here 0.001\n"
        "  train.seed        there 0   here 5\n"
        "Use another [train] out, or restore these values."
    )


def test_a_run_begun_from_another_cache_is_refused(
    tmp_path: Path, straight: DistillSummary
) -> None:
    other = build_cache(tmp_path / "other", windows=96, seed=3)
    with pytest.raises(RunMismatch, match=r"cache   there \w{12}\.\.\.   here \w{12}\.\.\."):
        distill(a_recipe(other, straight.run))


def test_a_folder_with_files_of_something_else_is_refused(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(RunMismatch, match=r"holds student but no run\.json"):
        distill(a_recipe(cache, tmp_path))


@pytest.mark.parametrize(
    "text", ["{}", "[]", "{", '{"format": "had-run/1", "order": 1, "recipe": []}', "\xff"]
)
def test_a_record_that_is_none_is_refused(tmp_path: Path, cache: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, "latin-1")
    with pytest.raises(RunMismatch, match="is not the record of a run"):
        distill(a_recipe(cache, tmp_path))


def test_lost_metrics_are_told(tmp_path: Path, cache: Path, straight: DistillSummary) -> None:
    shutil.copytree(straight.run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match=r"0 bytes, but .* lines were lost"):
        distill(a_recipe(cache, tmp_path / "run"))


def test_metrics_lost_after_the_end_are_told(
    tmp_path: Path, cache: Path, straight: DistillSummary
) -> None:
    shutil.copytree(straight.run, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()
    with pytest.raises(InputError, match="tells of no step, though training is done"):
        distill(a_recipe(cache, tmp_path / "run"))


@pytest.mark.parametrize("below", ["", "deeper/run"])
def test_a_run_where_a_file_is_in_the_way_is_refused(
    tmp_path: Path, cache: Path, below: str
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"\[train\] out = .*: .*file is not a folder"):
        distill(a_recipe(cache, tmp_path / "file" / below))


@pytest.fixture
def fill_disk() -> Iterator[Callable[[int], None]]:
    """From its call to the test's end, no file grows over so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda nbytes: resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("at", "nbytes", "where"),
    [
        pytest.param(5, 1_500, "metrics.jsonl", id="a-line-of-metrics"),
        pytest.param(9, 20_000, "checkpoints/.step-00000010.tmp", id="a-checkpoint"),
        pytest.param(0, 20_000, "", id="the-student"),
    ],
)
def test_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(
    tmp_path: Path,
    cache: Path,
    straight: DistillSummary,
    fill_disk: Callable[[int], None],
    at: int,
    nbytes: int,
    where: str,
) -> None:
    def report(progress: Progress) -> None:
        if progress.what == "training" and progress.done == at:
            fill_disk(nbytes)

    if at == 0:  # trained, but not published
        shutil.copytree(straight.run, tmp_path / "run")
        shutil.rmtree(tmp_path / "run" / "student")
        fill_disk(nbytes)
    recipe = a_recipe(cache, tmp_path / "run")
    with pytest.raises(StorageError, match="the file is larger than allowed here") as full:
        distill(recipe, report=report)
    assert str(tmp_path / "run" / where) in str(full.value)
    assert not (tmp_path / "run" / "student").exists()
    fill_disk(resource.RLIM_INFINITY)
    distill(recipe)
    assert_same_run(tmp_path / "run", straight)


def test_two_trainings_of_one_run_do_not_meet(tmp_path: Path, cache: Path) -> None:
    training, go_on = threading.Event(), threading.Event()

    def wait(progress: Progress) -> None:
        if progress.what == "training":
            training.set()
            assert go_on.wait(60)

    recipe = a_recipe(cache, tmp_path / "run", steps=3)
    first = threading.Thread(target=distill, args=(recipe,), kwargs={"report": wait})
    first.start()
    try:
        assert training.wait(60)
        with pytest.raises(HeldError, match=rf"process {os.getpid()} on .* is training this run"):
            distill(recipe)
    finally:
        go_on.set()
        first.join()
    assert distill(recipe).already_done


def test_numbers_that_run_away_stop_the_run_before_they_are_learnt(
    tmp_path: Path, cache: Path
) -> None:
    recipe = a_recipe(cache, tmp_path / "run", lr=1e30, lr_final=0.0, warmup=0, checkpoint_every=1)
    with pytest.raises(NonFiniteError) as stop:
        distill(recipe)
    message = str(stop.value)
    assert "loss is " in message
    assert "the targets are finite; the batch was: " in message
    assert f"{cache} train view 0 rows " in message
    last = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert f"the last checkpoint is {last.name}" in message
    for tensor in safetensors.torch.load_file(last / "student.safetensors").values():
        assert tensor.isfinite().all()


@pytest.mark.parametrize("valid", [0, 16], ids=["training", "measuring"])
def test_a_window_that_is_not_finite_is_named(tmp_path: Path, valid: int) -> None:
    path = build_cache(tmp_path / "cache", windows=32, valid=valid, codec="exact", spoilt=21)
    with pytest.raises(NonFiniteError) as stop:
        distill(a_recipe(path, tmp_path / "run"))
    assert f"the cache holds numbers that are not finite: {path} train view 0 rows 21. " in str(
        stop.value
    )


def test_a_cache_without_training_windows_is_refused_before_a_run_is_begun(tmp_path: Path) -> None:
    held_out = build_cache(tmp_path / "cache", windows=0, valid=32)
    with pytest.raises(CacheMismatch, match="no window in split 'train'; it has valid"):
        distill(a_recipe(held_out, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_an_unfinished_cache_is_refused(tmp_path: Path, cache: Path) -> None:
    shutil.copytree(cache, tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    with pytest.raises(CacheIncomplete):
        distill(a_recipe(tmp_path / "cache", tmp_path / "run"))


def test_a_recipe_without_train_is_refused(cache: Path) -> None:
    with pytest.raises(RecipeError, match=r"missing table \[train\]"):
        distill(Recipe.model_validate({"cache": {"path": cache}}))


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda:99"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, cache: Path, device: str) -> None:
    with pytest.raises(RecipeError, match=f"--device {device}"):
        distill(a_recipe(cache, tmp_path / "run"), device=device)


# The parts


def test_the_learning_rate_rises_in_a_line_and_falls_as_a_cosine() -> None:
    train = Train(out=Path("x"), steps=110, batch=1, lr=2e-3, lr_final=1e-4, warmup=10)
    rates = [learning_rate(train, step) for step in range(1, 111)]
    assert rates[0] == pytest.approx(2e-4)
    assert rates[9] == pytest.approx(2e-3)
    assert max(rates) == rates[9]
    assert rates[59] == pytest.approx((2e-3 + 1e-4) / 2)
    assert rates[109] == pytest.approx(1e-4)
    assert all(a > b for a, b in pairwise(rates[9:]))


def test_weight_decay_touches_matrices_alone() -> None:
    student, objective = HADModel(HADConfig(**TINY)), HADObjective(hidden_size=32, channels=8)
    decayed, kept = parameter_groups([student, objective], 0.1)
    names = {id(p): name for m in (student, objective) for name, p in m.named_parameters()}
    assert len(decayed["params"]) + len(kept["params"]) == len(names)
    assert decayed["weight_decay"] == 0.1
    assert kept["weight_decay"] == 0.0
    for parameter in kept["params"]:
        assert any(word in names[id(parameter)] for word in ("norm", "bias", "embeddings", "A_log"))
    for parameter in decayed["params"]:
        assert not any(
            word in names[id(parameter)]
            for word in ("norm", ".bias", "embeddings", "A_log", "dt_bias")
        )
