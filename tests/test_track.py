"""Onlookers of a run: they are told what metrics.jsonl is told, and nothing else."""

from __future__ import annotations

import getpass
import json
import socket
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from small_cache import build_cache

from had_pipe import track
from had_pipe.distill import distill
from had_pipe.errors import InputError, Interrupted, RecipeError
from had_pipe.learner import Learner
from had_pipe.recipe import Recipe
from had_pipe.run import read_metrics


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("caches") / "one", windows=32, part=32)


def a_recipe(cache: Path, out: Path, *track: str) -> Recipe:
    return Recipe.model_validate(
        {
            "cache": {"path": cache},
            "student": {
                "hidden_size": 32,
                "layers": 1,
                "gdn_heads": 2,
                "head_dim": 16,
                "expand_v": 1,
                "attention_heads": 2,
                "mlp": 32,
            },
            "train": {
                "out": out,
                "steps": 6,
                "batch": 4,
                "log_every": 1,
                "validate_every": 3,
                "checkpoint_every": 3,
                "track": track,
            },
        }
    )


def as_scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """metrics.jsonl, figure by figure: steps and values."""
    scalars: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(run):
        for name, value in line.items():
            if name not in ("kind", "step"):
                told = scalars.setdefault(f"{line['kind']}/{name}", [])
                told.append((line.get("step", 0), value))
    return scalars


def stop_at(step: int, patched: pytest.MonkeyPatch) -> None:
    learn = Learner.learn

    def stopped(self: Learner, now: int, batch: Any) -> None:
        if now == step:
            raise Interrupted("enough")
        learn(self, now, batch)

    patched.setattr(Learner, "learn", stopped)


@pytest.mark.parametrize("killed", [2, 5], ids=["before a checkpoint", "after one"])
def test_tensorboard_shows_what_metrics_say_and_no_step_twice(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, killed: int
) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = a_recipe(cache, tmp_path / "run", "tensorboard")
    with monkeypatch.context() as patched:
        stop_at(killed, patched)
        patched.setattr("had_pipe.distill._Run._keep", lambda run, step: None)  # as if killed
        with pytest.raises(Interrupted, match="enough"):
            distill(recipe)
    distill(recipe)  # goes on after step 3, or begins anew: what came after is told once more
    read = events.EventAccumulator(str(tmp_path / "run" / track.TENSORBOARD))
    read.Reload()
    found = {
        name: [(event.step, event.value) for event in read.Scalars(name)]
        for name in read.Tags()["scalars"]
    }
    expected = as_scalars(tmp_path / "run")
    assert found.keys() == expected.keys()
    assert "validation/loss" in expected
    assert "floors/kmer_cosine" in expected
    for name, told in expected.items():
        assert [step for step, _ in found[name]] == [step for step, _ in told]
        assert [value for _, value in found[name]] == pytest.approx([value for _, value in told])


class Board(types.ModuleType):
    """A stand-in for wandb: all that it is told, in order."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        self.asked: dict[str, Any] = {}
        self.logged: list[dict[str, float]] = []
        self.finished = 0

    @staticmethod
    def Settings(**settings: Any) -> dict[str, Any]:
        return settings

    def init(self, **asked: Any) -> Board:
        self.asked = asked
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, told: dict[str, float]) -> None:
        self.logged.append(told)

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Board:
    board = Board()
    monkeypatch.setitem(sys.modules, "wandb", board)
    return board


def test_wandb_is_told_what_metrics_say_and_no_path_machine_user_or_secret(
    tmp_path: Path, cache: Path, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush-hush")
    distill(a_recipe(cache, run, "wandb"))
    told: dict[str, list[tuple[int, float]]] = {}
    for line in board.logged:
        for name, value in line.items():
            if name != "step":
                told.setdefault(name, []).append((int(line["step"]), value))
    assert told == as_scalars(run)
    assert board.finished == 1
    # Whoever goes on goes on with the same run there.
    assert board.asked["resume"] == "allow"
    state = json.loads((run / "checkpoints" / "step-00000006" / "state.json").read_text())
    assert state["run"].startswith(board.asked["id"])
    # `dir` is where its files lie on this machine, and `settings` is what it shall not look at.
    sent = {key: value for key, value in board.asked.items() if key not in ("dir", "settings")}
    text = json.dumps([sent, board.logged])
    for private in (str(tmp_path), str(cache), socket.gethostname(), "hush-hush"):
        assert private not in text
    assert getpass.getuser() not in json.dumps(sent["config"])
    assert sent["config"]["train"]["steps"] == 6
    assert sent["config"].keys() == {"student", "objective", "train"}
    settings = board.asked["settings"]
    assert settings["console"] == "off"
    assert settings["host"] == ""
    for name in ("disable_code", "disable_git", "x_disable_meta", "x_disable_machine_info"):
        assert settings[name] is True


def test_wandb_is_closed_when_training_fails(
    tmp_path: Path, cache: Path, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        stop_at(2, patched)
        with pytest.raises(Interrupted, match="enough"):
            distill(a_recipe(cache, tmp_path / "run", "wandb"))
    assert board.finished == 1


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_wandb_that_is_gone_does_not_stop_training(
    tmp_path: Path,
    cache: Path,
    board: Board,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fails: str,
) -> None:
    def gone(*_: Any) -> None:
        raise ConnectionError("it is gone")

    monkeypatch.setattr(board, fails, gone)
    assert distill(a_recipe(cache, tmp_path / "run", "wandb")).student.is_dir()
    assert as_scalars(tmp_path / "run")["train/loss"][-1][0] == 6
    (said,) = caplog.messages
    assert said.startswith("[train] track: wandb ")
    assert said.endswith("training goes on: it is gone")


def test_a_wandb_that_does_not_start_is_told(
    tmp_path: Path, cache: Path, board: Board, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise RuntimeError("no API key")

    monkeypatch.setattr(board, "init", refuse)
    with pytest.raises(InputError, match=r"did not start \(no API key\): .* WANDB_MODE=offline"):
        distill(a_recipe(cache, tmp_path / "run", "wandb"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_one_that_is_not_installed_is_told_before_a_run_is_begun(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        RecipeError, match=rf"track names '{name}', which is not installed: pip install 'had-pipe"
    ):
        distill(a_recipe(cache, tmp_path / "run", name))
    assert not (tmp_path / "run").exists()


def test_who_looks_on_may_change_within_a_run(tmp_path: Path, cache: Path, board: Board) -> None:
    distill(a_recipe(cache, tmp_path / "run"))
    assert distill(a_recipe(cache, tmp_path / "run", "wandb")).already_done
