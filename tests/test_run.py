"""A run's folder: who a run is, and lines of metrics that are whole or told of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from had_pipe.errors import InputError, NonFiniteError, RunMismatch
from had_pipe.run import FORMAT, Metrics, begin, read_metrics, read_run, run_id


def a_document(**train: Any) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "recipe": {"train": {"steps": 5, "lr": 1e-3, "log_every": 10, **train}},
        "order": 1,
        "caches": [{"id": "5f" * 32}],
        "device": "cpu, 2 threads",
        "versions": {"torch": "2.13.0"},
    }


def test_a_run_is_what_decides_its_result_and_not_how_often_or_where(tmp_path: Path) -> None:
    begin(tmp_path, a_document())
    same = {
        **a_document(log_every=1, weights=None),
        "device": "another",
        "versions": {"torch": "3"},
    }
    begin(tmp_path, same)
    assert run_id(same) == run_id(a_document())
    assert json.loads((tmp_path / "run.json").read_text()) == a_document()
    for other in (
        a_document(lr=2e-3),
        a_document(weights=[3.0, 1.0]),
        a_document(new=None, lr=1e-3, steps=6),
        {**a_document(), "order": 2},
        {**a_document(), "caches": [{"id": "60" * 32}]},
        {**a_document(), "caches": [{"id": "5f" * 32}, {"id": "60" * 32}]},
    ):
        assert run_id(other) != run_id(a_document())
        with pytest.raises(RunMismatch):
            begin(tmp_path, other)


def test_a_key_at_the_value_of_the_time_before_it_changes_no_run() -> None:
    before, after = a_document(), a_document()
    after["recipe"] = {**before["recipe"], "objective": {"pool": "mean", "masking": "group"}}
    assert run_id(after) == run_id(before)
    after["recipe"]["objective"]["pool"] = "concat"
    assert run_id(after) != run_id(before)


def test_metrics_come_back_as_written_and_are_cut_to_the_checkpoint(tmp_path: Path) -> None:
    begin(tmp_path, a_document())
    assert read_metrics(tmp_path) == []
    with Metrics(tmp_path, nbytes=0) as metrics:
        metrics.write("floors", kmer_align=0.1)
        metrics.write("train", step=1, loss=1 / 3)
        saved = metrics.sync()
        metrics.write("train", step=2, loss=0.25)
    assert saved < (tmp_path / "metrics.jsonl").stat().st_size
    with Metrics(tmp_path, nbytes=saved) as metrics:
        metrics.write("validation", step=1, loss=0.5)
    assert read_metrics(tmp_path) == [
        {"kind": "floors", "kmer_align": 0.1},
        {"kind": "train", "step": 1, "loss": 1 / 3},
        {"kind": "validation", "step": 1, "loss": 0.5},
    ]
    record = read_run(tmp_path)
    assert (record.step, record.steps) == (1, 5)
    assert record.floors == {"kind": "floors", "kmer_align": 0.1}
    with pytest.raises(InputError, match="lines were lost"), Metrics(tmp_path, nbytes=10_000):
        pass


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_written(tmp_path: Path, value: float) -> None:
    with Metrics(tmp_path, nbytes=0) as metrics:
        with pytest.raises(NonFiniteError, match="train: loss is "):
            metrics.write("train", step=1, loss=value)
        assert metrics.sync() == 0


@pytest.mark.parametrize(
    "line", [b"{", b"[]", b"7", b'{"step": 1}', b'{"kind": "train", "step": \xff}']
)
def test_a_broken_line_is_named_and_an_unfinished_one_is_not_there_yet(
    tmp_path: Path, line: bytes
) -> None:
    whole = b'{"kind": "train", "step": 1}\n'
    (tmp_path / "metrics.jsonl").write_bytes(whole + line)
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]
    (tmp_path / "metrics.jsonl").write_bytes(whole + line + b"\n" + whole)
    with pytest.raises(InputError, match="line 2 is not a line of metrics"):
        read_metrics(tmp_path)
