"""A training step from a cache against the same step with the teacher in the loop.

    python benchmarks/online_vs_cached.py [--quick | --full] [--json] [--folder DIR]
                                          [--device DEVICE] [--shapes NAME ...]

Random weights in a shape of NT-v2 embed a random genome into an `exact` cache. Then a default
student learns, as `had-pipe distill` has it,

    from the cache  windows streamed in their order, read ahead
    online          the same windows, embedded by the teacher in the step; where they come from is
                    not charged: they lie in memory

First both ways take the same steps, and every loss must be equal to 1e-6. Then rounds of both are
interleaved. What the cache cost is told beside it, shared over runs: those of the recipe for the
human genome see every window four times, under two views. Every figure is the median over rounds,
every ratio the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import Clock, Pass, commit, machine, rounds, settled
from teacher import SHAPES
from torch import Tensor

import had_pipe
from had_pipe import extract as stage
from had_pipe.cache import Cache
from had_pipe.cache.layout import Part
from had_pipe.learner import TERMS, Gradient, Learner
from had_pipe.parallel import Place, Processes
from had_pipe.recipe import Recipe
from had_pipe.stream import Batch, Stream
from had_pipe.task import new_learner
from had_pipe.teachers.ntv2 import NTv2Config, random_model
from had_pipe.teachers.ntv2_checkpoint import save_checkpoint
from had_pipe.teachers.teacher import Teacher, load_teacher

EQUAL = 1e-6
VIEWS, PASSES, RUNS = 2, 4, (1, 2, 5, 10)


@dataclass(frozen=True)
class Case:
    """A teacher's shape, and the windows a student learns from."""

    shape: str
    bases: int
    batch: int
    windows: int
    steps: int
    """Of one way in one round."""


@dataclass(frozen=True)
class Size:
    cases: tuple[Case, ...]
    rounds: int


def sizes(*, full: bool, cuda: bool) -> Size:
    """What is measured: under two minutes on two cores, or some minutes of a GPU."""
    if cuda:
        shapes = ("500m", "50m") if full else ("500m",)
        cases = tuple(Case(name, 1020, batch=384, windows=3840, steps=8) for name in shapes)
        return Size(cases, rounds=9 if full else 5)
    small = Case("50m", 1020, batch=4, windows=16, steps=2)
    if not full:
        return Size((small,), rounds=3)
    return Size((Case("500m", 510, batch=2, windows=8, steps=2), small), rounds=5)


def a_recipe(folder: Path, case: Case, *, cuda: bool) -> Recipe:
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    drawn = np.random.default_rng(0).integers(0, 4, case.windows * case.bases)
    (folder / "random.fa").write_bytes(b">random\n" + letters[drawn].tobytes() + b"\n")
    return Recipe.model_validate(
        {
            "teacher": {"name": str(folder / "teacher"), "unchecked": True},
            "genome": [{"name": "random", "path": str(folder / "random.fa")}],
            "windows": {"bases": case.bases, "stride": case.bases},
            "cache": {"path": str(folder / "cache"), "part": case.batch, "codec": "exact"},
            "train": {
                "out": str(folder / "run"),
                "steps": 1000,
                "batch": case.batch,
                "precision": "bfloat16" if cuda else "float32",
            },
        }
    )


def gradient(learner: Learner, step: int, batch: Batch) -> Gradient:
    """What one process alone makes of a batch."""
    learner.learn(step, batch)
    found = learner.gradient(Processes(Place()).average)
    assert found.finite()
    return found


class Online:
    """The windows of some batches, without what the teacher says of them."""

    def __init__(self, teacher: Teacher, batches: Sequence[Batch], *, at_once: int) -> None:
        """`at_once`: what the teacher saw at once when the cache was made."""
        self._teacher, self._at_once = teacher, at_once
        self._seen = [
            (
                batch,
                batch.kmer_id.cpu().numpy().astype(np.uint16),
                batch.mask.cpu().numpy(),
                # A stable sort puts the visible groups first, in order.
                batch.mask.to(torch.uint8).argsort(dim=1, stable=True),
            )
            for batch in batches
        ]

    def batch(self, number: int) -> Batch:
        """One as the cache would give it, embedded now."""
        batch, kmer_id_BT, mask_BT, order_BT = self._seen[number]
        emb = []
        for first in range(0, len(kmer_id_BT), self._at_once):
            rows = np.minimum(np.arange(first, first + self._at_once), len(kmer_id_BT) - 1)
            emb.append(self._teacher.embed(kmer_id_BT[rows], mask_BT[rows]))
        emb_BTD: Tensor = torch.cat(emb)[: len(kmer_id_BT)]
        visible = batch.target.shape[1]
        target_BVD = emb_BTD.take_along_dim(order_BT[:, :visible, None], dim=1).float()
        return Batch(batch.kmer_id, batch.mask, target_BVD, batch.position, batch.spans)


def check(learner: Learner, batches: Sequence[Batch], online: Online) -> dict[str, float]:
    """Stop unless both ways give the same losses, step after step on the same weights."""
    largest = equal = 0.0
    for number, cached in enumerate(batches):
        made = online.batch(number)
        equal += float((made.target == cached.target).double().mean()) / len(batches)
        there, here = (gradient(learner, number + 1, b).terms for b in (cached, made))
        largest = max(largest, float((there - here)[: len(TERMS)].abs().max()))
        learner.update()
    assert largest <= EQUAL, f"the losses differ by {largest}"
    return {"largest_difference": largest, "equal_targets": equal}


def measure_case(
    case: Case, config: NTv2Config, folder: Path, *, count: int, device: torch.device
) -> dict[str, Any]:
    folder.mkdir()
    save_checkpoint(random_model(config, seed=0), folder / "teacher")
    recipe = a_recipe(folder, case, cuda=device.type == "cuda")
    teacher = load_teacher(str(folder / "teacher"), revision=None, layer=-1, device=str(device))
    made = stage.extract(recipe, teacher=teacher)
    cache = Cache.open(folder / "cache")
    learner = new_learner(recipe, [cache], device)

    def taking(step: Callable[[int], object]) -> Callable[[], Pass]:
        """What a step takes."""

        def timed() -> Pass:
            settled(device)
            clock = Clock()
            for number in range(case.steps):
                step(number)
            settled(device)
            whole = clock.passed(0)
            return Pass(0, whole.seconds / case.steps, whole.cpu_seconds / case.steps)

        return timed

    def learn(batch: Batch) -> None:
        gradient(learner, 1, batch)
        learner.update()

    with Stream([cache], batch=case.batch, seed=0, device=device) as stream:
        kept = list(islice(stream, case.steps))
        batch = int(cache.receipt(Part("train", 0, 0)).numerics["batch"])
        online = Online(teacher, kept, at_once=batch)
        checked = check(learner, kept, online)
        taken = rounds(
            {
                "from the cache": taking(lambda _: learn(next(stream))),
                "online": taking(lambda number: learn(online.batch(number))),
                "teacher alone": taking(online.batch),
            },
            count,
        )
    seconds = {
        name: statistics.median(done.seconds for done in some) for name, some in taken.items()
    }
    rivals = list(zip(taken["online"], taken["from the cache"], strict=True))
    ratio = [online.seconds / cached.seconds for online, cached in rivals]
    extraction = made.seconds / made.windows
    online_window, cached_window = (
        seconds[name] / case.batch for name in ("online", "from the cache")
    )
    shutil.rmtree(folder)
    return {
        "shape": case.shape,
        "bases": case.bases,
        "batch": case.batch,
        "dtype": teacher.dtype,
        "check": checked,
        "step_seconds": seconds,
        "ratio_step": statistics.median(ratio),
        "range": [min(ratio), max(ratio)],
        # By the processors' own time, which others on the machine take less from.
        "ratio_step_cpu_seconds": statistics.median(
            online.cpu_seconds / cached.cpu_seconds for online, cached in rivals
        ),
        "extraction_seconds_per_window": extraction,
        "passes_until_cheaper": VIEWS * extraction / (online_window - cached_window),
        "ratio_runs": {
            str(runs): runs
            * PASSES
            * online_window
            / (VIEWS * extraction + runs * PASSES * cached_window)
            for runs in RUNS
        },
    }


def measure(
    size: Size,
    folder: Path,
    *,
    device: torch.device,
    shapes: Mapping[str, NTv2Config] = SHAPES,
) -> dict[str, Any]:
    cases = []
    for case in size.cases:
        cases.append(
            measure_case(
                case, shapes[case.shape], folder / case.shape, count=size.rounds, device=device
            )
        )
        gc.collect()
        print(f"  {case.shape}: done", file=sys.stderr, flush=True)
    return {
        "benchmark": "online_vs_cached",
        "ratio_step": cases[0]["ratio_step"],
        "of": cases[0]["shape"],
        "cases": cases,
        "views": VIEWS,
        "passes": PASSES,
        "device": str(device),
        "rounds": size.rounds,
        "threads": torch.get_num_threads(),
        "versions": {
            "had-pipe": had_pipe.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
        },
        "hardware": machine(),
        "commit": commit(),
    }


def table(result: dict[str, Any]) -> str:
    lines: list[str] = []
    for case in result["cases"]:
        low, high = case["range"]
        lines += [
            f"{case['shape']} in {case['dtype']}, batches of {case['batch']} windows of "
            f"{case['bases']:,} bases",
            f"  losses differ by {case['check']['largest_difference']:.1e} at most, "
            f"{case['check']['equal_targets']:.2%} of the targets are equal",
            *(f"  {name:<15}{s:>9.3f} s a step" for name, s in case["step_seconds"].items()),
            f"  from the cache a step is x {case['ratio_step']:.2f} ({low:.2f} to {high:.2f}; "
            f"by CPU seconds {case['ratio_step_cpu_seconds']:.2f})",
            f"  extraction took {case['extraction_seconds_per_window']:.4f} s a window: {VIEWS} "
            f"views are paid for after {case['passes_until_cheaper']:.2f} passes",
            f"  runs of {PASSES} passes, extraction included: "
            + ", ".join(f"{runs} x {x:.2f}" for runs, x in case["ratio_runs"].items()),
            "",
        ]
    hardware = result["hardware"]
    lines.append(
        f"{hardware['gpu'] if result['device'] != 'cpu' else hardware['cpu']}, "
        f"{result['threads']} threads, load {hardware['load']:.1f}, "
        f"torch {result['versions']['torch']}, commit {result['commit']}, "
        f"median of {result['rounds']} rounds"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Steps with a teacher against steps from a cache.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="under two minutes (the default)")
    how_much.add_argument("--full", action="store_true", help="the 500m shape on a CPU too")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where checkpoint and cache go, 3 GB if full")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", help="of those measured")
    chosen = parser.parse_args(arguments)
    name = chosen.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    size = sizes(full=chosen.full, cuda=device.type == "cuda")
    cases = tuple(c for c in size.cases if not chosen.shapes or c.shape in chosen.shapes)
    if not cases:
        parser.error("nothing is left to measure: --full has more shapes")
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-online-", dir=chosen.folder))
    try:
        result = measure(replace(size, cases=cases), folder, device=device)
    finally:
        shutil.rmtree(folder)
    print(table(result))
    if chosen.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # as the command has it; read when torch is loaded
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
