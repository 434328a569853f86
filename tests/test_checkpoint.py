"""Checkpoints: whole or absent, their own run's, and exact."""

from __future__ import annotations

import json
import logging
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from had_pipe import checkpoint
from had_pipe.checkpoint import State
from had_pipe.errors import InputError, StorageError

RUN = "a" * 64


def a_state(step: int, *, numbers: int = 10) -> State:
    generator = torch.Generator().manual_seed(step)
    return State(
        step=step,
        tensors={
            "student": {"w": torch.randn(numbers, generator=generator), "b": torch.tensor(step)},
            "loop": {"random": torch.get_rng_state()},
        },
        facts={"seconds": 0.1 + step, "metrics_nbytes": 7 * step, "lr": 1e-3 / 3},
    )


def assert_equal(found: State | None, expected: State) -> None:
    assert found is not None
    assert found.step == expected.step
    assert found.facts == expected.facts
    assert found.tensors.keys() == expected.tensors.keys()
    for group, tensors in expected.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert torch.equal(found.tensors[group][name], tensor)
            assert found.tensors[group][name].dtype == tensor.dtype


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_state(5), run=RUN)
    assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(5))


def test_nothing_saved_is_nothing_loaded(tmp_path: Path) -> None:
    assert checkpoint.load(tmp_path / "none", run=RUN) is None
    assert checkpoint.load(tmp_path, run=RUN) is None


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 123_456_789):
        checkpoint.save(tmp_path, a_state(step), run=RUN)
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == [
        "step-123456789",
        "step-00000030",
    ]
    assert len(list(tmp_path.iterdir())) == 2
    assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(123_456_789))


@pytest.mark.parametrize("name", ["student.safetensors", "loop.safetensors", "state.json"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, harm: str
) -> None:
    checkpoint.save(tmp_path, a_state(1), run=RUN)
    path = checkpoint.save(tmp_path, a_state(2), run=RUN) / name
    if harm == "flipped":
        # In state.json this is a digit of a fact, so that it stays JSON.
        place = path.read_bytes().index(b'"seconds": 2') + 11 if name == "state.json" else -1
        flip(path, place)
    elif harm == "cut":
        path.write_bytes(path.read_bytes()[:-3])
    else:
        path.unlink()
    with caplog.at_level(logging.WARNING):
        assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(1))
    assert "step-00000002" in caplog.text
    assert name in caplog.text
    # The run comes to step 2 again and saves over what could not be read.
    checkpoint.save(tmp_path, a_state(2), run=RUN)
    assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(2))


def test_one_that_cannot_be_read_does_not_push_out_one_that_can(tmp_path: Path) -> None:
    for step in (1, 9):
        newest = checkpoint.save(tmp_path, a_state(step), run=RUN)
    (newest / "state.json").unlink()
    for step in (3, 4):
        checkpoint.save(tmp_path, a_state(step), run=RUN)
    assert [path.name[-1] for path in checkpoint.checkpoints(tmp_path)] == ["9", "4", "3"]
    flip(tmp_path / "step-00000004" / "state.json", 0)
    assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(3))


def test_every_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, a_state(3, numbers=2), run=RUN)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for place in range(0, len(whole), 29):
            flip(path, place)
            with pytest.raises(InputError):
                checkpoint.load(tmp_path, run=RUN)
            path.write_bytes(whole)
    assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(3, numbers=2))


def test_another_runs_checkpoint_is_refused_with_what_to_do(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_state(4), run="b" * 64)
    with pytest.raises(InputError) as refusal:
        checkpoint.load(tmp_path, run=RUN)
    assert str(refusal.value) == (
        f"{tmp_path}: no checkpoint can be used:\n"
        "  step-00000004   it belongs to another run (bbbbbbbbbbbb, not aaaaaaaaaaaa)\n"
        "Put back a good copy, or remove this folder to train from the start."
    )


def test_a_renamed_checkpoint_is_refused(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_state(4), run=RUN).rename(tmp_path / "step-00000009")
    with pytest.raises(InputError, match="it is of step 4"):
        checkpoint.load(tmp_path, run=RUN)


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, a_state(4), run=RUN) / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": "had-checkpoint/2"}))
    with pytest.raises(InputError, match="not of format had-checkpoint/1"):
        checkpoint.load(tmp_path, run=RUN)


def test_a_full_disk_leaves_the_earlier_checkpoints_as_they_were(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, a_state(1), run=RUN)
    checkpoint.save(tmp_path, a_state(2), run=RUN)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # The kernel refuses to let a file grow beyond this, as it refuses on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
        with pytest.raises(StorageError, match="Everything committed so far is intact"):
            checkpoint.save(tmp_path, a_state(3, numbers=1 << 16), run=RUN)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert_equal(checkpoint.load(tmp_path, run=RUN), a_state(2))


KILLED_WITHIN = """
import os, sys
# Steps saved before the kill, the one saved then, and how many are kept.
before, now, keep = [int(x) for x in sys.argv[2].split(",")], int(sys.argv[3]), int(sys.argv[4])
from pathlib import Path
import torch
from had_pipe import checkpoint

def state(step):
    return checkpoint.State(step=step, tensors={"s": {"w": torch.arange(5.0) + step}}, facts={})

def save(folder, step, run="a" * 64):
    checkpoint.save(folder, state(step), run=run, keep=keep)

def die_at(number):
    calls = 0
    def hook(event, _):
        # Every call of the operating system that changes the folder is a place to be killed at.
        nonlocal calls
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            calls += 1
            if calls == number:
                os._exit(9)
    sys.addaudithook(hook)

number, ended = 0, False
while not ended:
    number += 1
    folder = Path(sys.argv[1], str(number))
    for step in before:
        save(folder, step)
    child = os.fork()
    if not child:
        die_at(number)
        save(folder, now)
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    found = checkpoint.load(folder, run="a" * 64)
    assert found.step in ((now,) if ended else (before[-1], now)), (number, found)
    assert found.tensors["s"]["w"].equal(state(found.step).tensors["s"]["w"])
    save(folder, 4)
    assert len(list(folder.iterdir())) == keep, (number, list(folder.iterdir()))
print(number)
"""


@pytest.mark.parametrize(
    ("before", "now", "keep"),
    [("1,2", "3", "2"), ("2", "2", "1")],
    ids=["the next step", "the only one again"],
)
def test_killed_anywhere_a_whole_checkpoint_is_left(
    tmp_path: Path, before: str, now: str, keep: str
) -> None:
    child = subprocess.run(
        [sys.executable, "-c", KILLED_WITHIN, str(tmp_path), before, now, keep],
        check=True,
        capture_output=True,
    )
    assert int(child.stdout) > 10


def test_an_optimiser_comes_back_and_goes_on_as_if_it_had_not_stopped() -> None:
    def begin() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        groups = [
            {"params": [model.weight], "weight_decay": 0.1},
            {"params": [model.bias], "weight_decay": 0.0},
        ]
        return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)

    def step(model: torch.nn.Linear, optimiser: torch.optim.AdamW, seed: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed))
        optimiser.zero_grad()
        model(x).square().sum().backward()
        optimiser.step()

    model, optimiser = begin()
    for seed in range(4):
        step(model, optimiser, seed)
    other, resumed = begin()
    for seed in range(2):
        step(other, resumed, seed)
    tensors, facts = checkpoint.optimiser_state(resumed)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    facts = json.loads(json.dumps(facts))
    weights = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    third, fresh = begin()
    third.load_state_dict(weights)
    checkpoint.restore_optimiser(fresh, tensors, facts)
    for seed in range(2, 4):
        step(third, fresh, seed)
    assert torch.equal(third.weight, model.weight)
    assert torch.equal(third.bias, model.bias)
    assert fresh.param_groups[0]["betas"] == (0.9, 0.95)
