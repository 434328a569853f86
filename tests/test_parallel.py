"""One training by several processes: the same as by one, and none is left waiting."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from conftest import REPOSITORY
from small_cache import build_cache

from had_pipe import checkpoint
from had_pipe.errors import NetworkError, RecipeError
from had_pipe.parallel import ALONE, Place, joined
from had_pipe.run import read_metrics
from had_pipe.signals import Signals, Stopped

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
    *("read_bytes", "read_bytes_per_second"),
}

Train = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("caches") / "one", windows=96, part=32, views=2)


@pytest.fixture(scope="module")
def train() -> Iterator[Train]:
    """`train(recipe, world=2)`: how each rank's training ended. Troubles: rank to (kind, step)."""
    server = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "parallel_runs.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdin is not None
    assert server.stdout is not None

    def ask(
        *recipes: dict[str, Any],
        world: int,
        troubles: dict[int, tuple[str, int]] | None = None,
        device: str = "cpu",
    ) -> list[Any]:
        asked = {
            "recipes": recipes,
            "world": world,
            "troubles": troubles or {},
            "device": device,
        }
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps(asked), file=server.stdin, flush=True)
        ends: list[Any] = json.loads(server.stdout.readline())
        return ends

    yield ask
    server.stdin.close()
    server.wait()
    server.stdout.close()


def a_recipe(cache: Path, out: Path, **train: Any) -> dict[str, Any]:
    return {
        "cache": {"path": str(cache)},
        "student": TINY,
        "train": {
            "out": str(out),
            "steps": 9,
            "batch": 8,
            "lr": 2e-3,
            "warmup": 2,
            "log_every": 3,
            "validate_every": 4,
            "checkpoint_every": 4,
            "validation_windows": 20,
            **train,
        },
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, cache: Path, train: Train) -> Path:
    """A training by one process."""
    run = tmp_path_factory.mktemp("runs") / "alone"
    (end,) = train(a_recipe(cache, run), world=1)
    assert end["error"] is None
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, cache: Path, train: Train) -> Path:
    """The same by two, without a stop."""
    run = tmp_path_factory.mktemp("runs") / "pair"
    ends = train(a_recipe(cache, run), world=2)
    assert [end["error"] for end in ends] == [None, None]
    # Every process tells its caller the same, and only the first one shows progress.
    assert ends[0]["last"] == ends[1]["last"]
    assert ends[0]["validation"] == ends[1]["validation"]
    assert ("training", 9) in map(tuple, ends[0]["told"])
    assert not ends[1]["told"]
    return run


def untimed(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in TIMING}
        for line in read_metrics(run)
    ]


def assert_equal_to_rounding(run: Path, expected: Path) -> None:
    """Every figure of every line, and the student."""
    found, told = untimed(run), untimed(expected)
    assert [line.keys() for line in found] == [line.keys() for line in told]
    for line, other in zip(found, told, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=2e-4, abs=1e-6)
    weights = [
        safetensors.torch.load_file(folder / "student" / "model.safetensors")
        for folder in (run, expected)
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-3, atol=2e-5, msg=name)


def state_of(run: Path) -> dict[str, bytes]:
    last = checkpoint.checkpoints(run / "checkpoints")[0]
    files = [*last.glob("*.safetensors"), run / "student" / "model.safetensors"]
    return {path.name: path.read_bytes() for path in files}


def saved(run: Path) -> str:
    return checkpoint.checkpoints(run / "checkpoints")[0].name


# What is learnt


def test_two_processes_learn_what_one_does(alone: Path, pair: Path) -> None:
    assert_equal_to_rounding(pair, alone)
    # Together they read what one reads, and say so.
    read = [
        sum(line["read_bytes"] for line in read_metrics(run) if line["kind"] == "train")
        for run in (alone, pair)
    ]
    assert read[0] == read[1] > 0
    record = json.loads((pair / "run.json").read_text())
    assert record["processes"] == 2


@pytest.mark.slow
def test_four_processes_learn_what_one_does(
    tmp_path: Path, cache: Path, train: Train, alone: Path
) -> None:
    ends = train(a_recipe(cache, tmp_path / "run"), world=4)
    assert [end["error"] for end in ends] == [None] * 4
    assert_equal_to_rounding(tmp_path / "run", alone)


@pytest.mark.slow
def test_portions_and_processes_together_learn_what_one_does(
    tmp_path: Path, cache: Path, train: Train, alone: Path
) -> None:
    ends = train(a_recipe(cache, tmp_path / "run", micro_batch=2), world=2)
    assert [end["error"] for end in ends] == [None, None]
    assert_equal_to_rounding(tmp_path / "run", alone)


@pytest.mark.gpu
def test_two_devices_learn_what_one_processor_does(
    tmp_path: Path, cache: Path, train: Train, alone: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    ends = train(a_recipe(cache, tmp_path / "run"), world=2, device="cuda")
    assert [end["error"] for end in ends] == [None, None]
    found, told = (untimed(run) for run in (tmp_path / "run", alone))
    for line, other in zip(found, told, strict=True):
        assert line.pop("kind") == other.pop("kind")
        assert line == pytest.approx(other, rel=1e-2, abs=1e-4)


# How it ends


def test_a_signal_to_one_stops_all_after_the_same_step_and_loses_nothing(
    tmp_path: Path, cache: Path, train: Train, pair: Path
) -> None:
    recipe = a_recipe(cache, tmp_path / "run")
    ends = train(recipe, world=2, troubles={1: ("SIGTERM", 7)})
    for end in ends:
        assert end["error"] == "Interrupted"
        assert end["said"] == (
            "stopped by SIGTERM after step 6 of 9, saved: run the same command again to go on"
        )
    assert saved(tmp_path / "run") == "step-00000006"
    ends = train(recipe, world=2)
    assert [end["error"] for end in ends] == [None, None]
    # As many processes as before: bit for bit what was never stopped.
    assert state_of(tmp_path / "run") == state_of(pair)
    assert untimed(tmp_path / "run") == untimed(pair)
    again = train(recipe, world=2)
    assert [end["already_done"] for end in again] == [True, True]


@pytest.mark.parametrize(
    ("kind", "own", "others"),
    [
        ("network", "the host is gone", "NetworkError: rank 1 of 2: the host is gone"),
        pytest.param(
            "bug",
            "a bug",
            "HadPipeError: rank 1 of 2: ZeroDivisionError: a bug; its own output says where",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failure_of_one_ends_all_and_what_was_learnt_is_kept_for_any_number_of_processes(
    tmp_path: Path, cache: Path, train: Train, alone: Path, kind: str, own: str, others: str
) -> None:
    recipe = a_recipe(cache, tmp_path / "run")
    first, second = train(recipe, world=2, troubles={1: (kind, 7)})
    assert f"{first['error']}: {first['said']}" == others
    assert second["said"] == own
    assert saved(tmp_path / "run") == "step-00000006"
    (end,) = train(recipe, world=1)
    assert end["error"] is None
    assert_equal_to_rounding(tmp_path / "run", alone)


def test_one_that_is_killed_leaves_nobody_waiting(
    tmp_path: Path, cache: Path, train: Train
) -> None:
    ends = train(a_recipe(cache, tmp_path / "run"), world=2, troubles={1: ("SIGKILL", 7)})
    assert ends[1] is None
    assert ends[0]["error"] == "NetworkError"
    assert "rank 0 of 2: another process of this training has ended" in ends[0]["said"]
    assert saved(tmp_path / "run") == "step-00000006"


def test_targets_that_are_not_finite_are_named_by_whoever_read_them(
    tmp_path: Path, train: Train
) -> None:
    path = build_cache(tmp_path / "cache", windows=32, valid=0, codec="exact", spoilt=21)
    ends = train(a_recipe(path, tmp_path / "run"), world=2)
    fault = f"the cache holds numbers that are not finite: {path} train view 0 rows 21. "
    assert [end["error"] for end in ends] == ["NonFiniteError"] * 2
    assert sorted("of 2: " in end["said"] for end in ends) == [False, True]
    assert all(fault in end["said"] for end in ends)


@pytest.mark.parametrize("key", ["lr", "validate_every"], ids=["the run", "when they meet"])
def test_another_recipe_for_one_of_them_is_refused(
    tmp_path: Path, cache: Path, train: Train, key: str
) -> None:
    recipe, other = (a_recipe(cache, tmp_path / "run") for _ in range(2))
    other["train"][key] = 1
    ends = train(recipe, other, world=2)
    assert [end["error"] for end in ends] == ["RunMismatch"] * 2
    assert ends[0]["said"].startswith(
        f"rank 1 of 2: the first process was given another recipe or cache (other {key} in [train])"
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"batch": 9}, "batch = 9: must be a multiple of the 2 processes"),
        (
            {"micro_batch": 8},
            "micro_batch = 8: must divide the 4 windows that each of the 2 processes takes",
        ),
    ],
    ids=["batch", "micro_batch"],
)
def test_a_batch_that_cannot_be_shared_out_is_refused_before_a_run_is_begun(
    tmp_path: Path, cache: Path, train: Train, keys: dict[str, int], said: str
) -> None:
    ends = train(a_recipe(cache, tmp_path / "run", **keys), world=2)
    assert [end["error"] for end in ends] == ["RecipeError"] * 2
    assert all(said in end["said"] for end in ends)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_starts_the_command_as_it_is(tmp_path: Path, cache: Path, alone: Path) -> None:
    run = tmp_path / "run"
    keys = "\n".join(
        f"{key} = {json.dumps(value)}" for key, value in a_recipe(cache, run)["train"].items()
    )
    student = "\n".join(f"{key} = {value}" for key, value in TINY.items())
    (tmp_path / "recipe.toml").write_text(
        f"[cache]\npath = {json.dumps(str(cache))}\n[student]\n{student}\n[train]\n{keys}\n"
    )
    command = Path(sys.executable).parent
    done = subprocess.run(
        [
            *(command / "torchrun", "--standalone", "--nproc-per-node", "2", "--no-python"),
            *(command / "had-pipe", "distill", tmp_path / "recipe.toml", "--device", "cpu"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # One of them speaks.
    assert done.stdout.count("9 steps") == 1
    assert_equal_to_rounding(run, alone)


FAKES = {
    "srun": """
for rank in 0 1; do SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks+=($!); done
worst=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ $code -gt $worst ] && worst=$code; done
exit $worst
""",
    "scontrol": 'if [ "$1" = show ]; then printf "node7\nnode8\n"; else echo "$@" >> asked; fi',
    "had-pipe": """
echo "$* rank $RANK of $WORLD_SIZE, $LOCAL_RANK there; $MASTER_ADDR:$MASTER_PORT" > said-$RANK
exit $((RANK * CODE))
""",
}


@pytest.mark.parametrize("code", [0, 2, 75])
def test_a_job_says_to_each_process_which_one_it_is_and_comes_back_if_stopped(
    tmp_path: Path, code: int
) -> None:
    if not (script := REPOSITORY / "pipelines" / "slurm" / "distill.sbatch").exists():
        pytest.skip("the pipelines lie in the repository, not in a package")
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    said = {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "20077", "SLURM_JOB_NODELIST": "node[7-8]"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", script, "recipe.toml"],
        env={**os.environ, **said, "PATH": path, "CODE": str(code)},
        cwd=tmp_path,
        check=False,
        stdout=subprocess.DEVNULL,
    )
    assert done.returncode == code
    for rank in (0, 1):
        assert (tmp_path / f"said-{rank}").read_text() == (
            f"distill recipe.toml rank {rank} of 2, {rank} there; node7:10077\n"
        )
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == (
        "requeue 20077\n" if code == 75 else ""
    )


# The parts


def test_a_launcher_says_which_process_this_is() -> None:
    assert Place.of({}) == Place.of({"WORLD_SIZE": "1", "RANK": "x"}) == Place(0, 1, 0)
    said = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    assert Place.of(said) == Place(rank=5, world=8, local=1)
    for name, text in [("RANK", "8"), ("RANK", "-1"), ("LOCAL_RANK", ""), ("WORLD_SIZE", "two")]:
        with pytest.raises(RecipeError, match=rf"{name}='{text}'.* start them with torchrun"):
            Place.of({**said, name: text})


def test_processes_that_do_not_meet_are_told_where_they_looked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(RecipeError, match="MASTER_ADDR=None"), joined(Place(1, 2, 1)):
        pass
    monkeypatch.setattr("had_pipe.parallel._PATIENCE_TO_MEET", timedelta(seconds=1))
    with socket.socket() as nobody:  # it has a port, and does not listen there
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        with (
            pytest.raises(NetworkError, match=rf"rank 1 of 2: .* did not meet at 127.0.0.1:{port}"),
            joined(Place(1, 2, 1)),
        ):
            pass


def test_a_signal_that_others_told_of_first_is_not_taken_for_a_second_one() -> None:
    with Signals() as signals:
        with pytest.raises(Stopped):
            signals.obey(signal.SIGTERM)
        # A launcher signals all of them, not at one moment; this one may be saving by now.
        signal.raise_signal(signal.SIGTERM)
        assert signals.caught == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_a_process_alone_talks_to_nobody() -> None:
    tensor = torch.tensor([1.5, -2.0])
    ALONE.average(tensor)
    assert tensor.tolist() == [1.5, -2.0]
    assert ALONE.sum(tensor).tolist() == ALONE.largest(tensor).tolist() == [1.5, -2.0]
    assert ALONE.share(b"word") == b"word"
    assert ALONE.most(7) == 7
    with pytest.raises(ZeroDivisionError), ALONE.together():
        raise ZeroDivisionError
