"""benchmarks/student.py: what stands beside the student computes the same, or is not timed."""

from __future__ import annotations

import json
from types import ModuleType

import pytest
import torch
from conftest import Script
from test_delta_rule import NAMES, largest_error, some_inputs, step_by_step, with_gradients

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(script: Script) -> ModuleType:
    return script("student")


def small(benchmark: ModuleType) -> object:
    return benchmark.Size(
        windows=2, bases=40, rounds=2, forward=(2**11, 2**13), training=(), attention=()
    )


def test_the_naive_recurrence_is_the_rule(benchmark: ModuleType) -> None:
    inputs = some_inputs(S=50)
    expected = with_gradients(step_by_step, inputs)
    found = with_gradients(benchmark.recurrence, inputs, torch.float32)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert largest_error(a, b) < 5e-6, name


def test_a_student_that_computes_another_thing_is_not_timed(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    students, layers, missing = benchmark.contenders(small(benchmark), device=CPU)
    assert set(students) == {"student", "naive"}
    assert set(layers) == {"student", "mamba2"}
    assert "CUDA" in missing["fla layer"]
    right = benchmark.recurrence
    monkeypatch.setattr(benchmark, "recurrence", lambda *inputs: 1.01 * right(*inputs))
    with pytest.raises(SystemExit, match="naive is wrong"):
        benchmark.contenders(small(benchmark), device=CPU)


def test_mamba2_reads_both_ways_and_is_about_as_large(benchmark: ModuleType) -> None:
    _, layers, _ = benchmark.contenders(small(benchmark), device=CPU)
    ours, mamba = layers["student"], layers["mamba2"]
    assert 1 < benchmark.count(mamba.model) / benchmark.count(ours.model) < 1.2
    x_BSE = mamba.given[:1].clone().requires_grad_()
    (d_x_BSE,) = torch.autograd.grad(mamba.model(x_BSE)[0, 20].sum(), x_BSE)
    assert bool(d_x_BSE[0, [0, 19, 21, 39]].any(dim=-1).all())


@pytest.mark.parametrize(("power", "unit"), [(1, 1000), (2, 3)])
def test_growth_is_the_exponent_between_the_last_two_lengths(
    benchmark: ModuleType, power: int, unit: int
) -> None:
    peaks = {1: 10**9} | {n: unit * n**power for n in (64, 1024)}
    assert benchmark.exponent(peaks) == pytest.approx(power)
    assert benchmark.exponent({1024: 1}) is None


def test_a_length_that_memory_does_not_hold_is_left_out_and_said(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    class Pool:
        """Tells peaks without a process: 1 MB a base."""

        def __init__(self, *settings: object, **more: object) -> None: ...

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *raised: object) -> None: ...

        def submit(self, task: object) -> Pool:
            measured.append(task.keywords["bases"])
            return self

        def result(self) -> tuple[int, float]:
            return measured[-1] * 10**6, 1.0

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(benchmark, "free", lambda device: 10**9)
    found = benchmark.growth((100, 400, 600, 800), attention=False, training=True, device=CPU)
    assert measured == [100, 400]
    assert found["left_out"] == [600, 800]
    assert found["exponent"] == pytest.approx(1)


@pytest.mark.slow
def test_the_whole_of_it_ends_in_one_json_object(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(benchmark, "sizes", lambda **how: small(benchmark))
    benchmark.main(["--json", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    told = json.loads(lines[-1])
    assert told["ratio_fla_layer"] is None
    assert told["ratio_naive"] > 0
    assert told["ratio_mamba2"] > 0
    assert "flash-linear-attention needs CUDA" in "\n".join(lines)
    peaks = told["memory"]["forward, no attention"]["bytes"]
    # A feature is 512 bytes a base, and a pass holds several at once.
    assert peaks[str(2**13)] > peaks[str(2**11)] > 2**11 * 512
    assert told["growth"]["training, no attention"] is None
