"""How much of the teacher's own speed stage one keeps.

    python benchmarks/extract.py [--quick | --full] [--json] [--folder DIR] [--device DEVICE]

For each teacher (the demo's own, and a wider one with random weights: on a GPU the shape of
NT-v2-500M) a random genome is extracted. First the cache is checked: rows drawn from it, embedded
again in another batch, equal what is stored. Then rounds of

    teacher alone       the same windows in the same batches, vectors left where they are made
    extraction          all parts: encoded, copied, hashed, written, synced, recorded

are interleaved. Planning, calibrating and sealing do not grow with views and are told apart.
A batch's way is also walked step by step, to see where the time goes; writing is that of a thread
beside the teacher: `benchmarks/store.py` has the writer alone.
Every figure is the median over rounds, every
ratio the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from measuring import commit, machine

import had_pipe
from had_pipe import extract as stage
from had_pipe import parts
from had_pipe.cache import Cache, integrity, writer
from had_pipe.cache.layout import Part
from had_pipe.dna.kmers import reverse_complement
from had_pipe.progress import Progress
from had_pipe.recipe import Recipe
from had_pipe.teachers.ntv2 import NTv2Config, random_model
from had_pipe.teachers.ntv2_checkpoint import save_checkpoint
from had_pipe.teachers.teacher import Teacher, load_teacher

DEMO = Path(__file__).resolve().parents[1] / "pipelines" / "demo" / "teacher"


@dataclass(frozen=True)
class Shape:
    """A teacher, and how much of it is measured."""

    name: str
    config: NTv2Config | None
    """None for the demo's teacher."""
    bases: int
    windows: int
    part: int


@dataclass(frozen=True)
class Size:
    shapes: tuple[Shape, ...]
    rounds: int


def wide(layers: int, width: int) -> NTv2Config:
    return NTv2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=4 * width,
        max_position_embeddings=2050,
    )


def sizes(*, full: bool, cuda: bool) -> Size:
    """What is measured: a few minutes at most on two cores, or a minute of a GPU."""
    if cuda:
        more = 4 if full else 1
        shapes = (
            Shape("demo", None, 510, windows=16_384 * more, part=1024),
            Shape("wide", wide(29, 1024), 1020, windows=4096 * more, part=1024),
        )
        return Size(shapes, rounds=5 if full else 3)
    more = 4 if full else 1
    shapes = (
        Shape("demo", None, 510, windows=512 * more, part=128),
        Shape("wide", wide(4, 512), 510, windows=64 * more, part=32),
    )
    return Size(shapes, rounds=7 if full else 3)


def random_genome(path: Path, bases: int) -> None:
    letters = np.frombuffer(b"ACGT", dtype=np.uint8)
    drawn = np.random.default_rng(0).integers(0, 4, bases)
    path.write_bytes(b">random\n" + letters[drawn].tobytes() + b"\n")


def a_recipe(folder: Path, shape: Shape, teacher: Path, cache: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"name": str(teacher), "unchecked": True},
            "genome": [{"name": "random", "path": str(folder / f"{shape.name}.fa")}],
            "windows": {"bases": shape.bases, "stride": shape.bases},
            "cache": {"path": str(cache), "part": shape.part},
        }
    )


def check(cache: Cache, teacher: Teacher, *, batch: int) -> None:
    """Stop unless what is stored is what the teacher says; fast and wrong is not worth timing."""
    rows = np.sort(np.random.default_rng(1).permutation(cache.rows("train"))[:batch])
    block = cache.allocate(len(rows))
    cache.read("train", 0, rows, block)
    emb = _embed(teacher, block.kmer_id, block.mask, block.reversed, batch=batch)
    emb = parts.to_numpy(emb).astype(np.float32)
    stored = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)
    relative = np.linalg.norm(stored - emb) / np.linalg.norm(emb)
    assert relative < 1.5 * cache.fidelity["relative"], relative
    # A row of another window would be far off, however small the error over all.
    worst = np.linalg.norm(stored - emb, axis=(1, 2)) / np.linalg.norm(emb, axis=(1, 2))
    assert worst.max() < 0.1, worst.max()


def _embed(
    teacher: Teacher,
    kmer_id: npt.NDArray[np.uint16],
    mask: npt.NDArray[np.bool_],
    reverse: npt.NDArray[np.bool_],
    *,
    batch: int,
) -> Any:
    return parts.embed_batch(
        teacher, kmer_id, mask, reverse, store="visible", shown="masked", batch=batch
    )


class Alone:
    """The teacher and nothing else, over the windows of a cache."""

    def __init__(self, cache: Cache, teacher: Teacher, *, batch: int) -> None:
        self._teacher, self._batch = teacher, batch
        self._seen = []
        for part in cache.plan.parts():
            # A copy, as extraction makes one too: torch wants arrays that may be written.
            kmer_id, mask, reverse = cache.seen(part)
            turned = np.where(reverse[:, None], reverse_complement(kmer_id), kmer_id)
            self._seen.append((turned, mask.copy()))

    def rate(self) -> float:
        """Windows a second."""
        begun, done, emb = perf_counter(), 0, None
        for kmer_id, hidden in self._seen:
            for first in range(0, len(kmer_id), self._batch):
                some = slice(first, first + self._batch)
                emb = self._teacher.embed(kmer_id[some], hidden[some])
                done += len(emb)
        assert emb is not None
        _wait(emb)
        return done / (perf_counter() - begun)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def steps(cache: Cache, teacher: Teacher, folder: Path, *, batch: int) -> dict[str, float]:
    """Milliseconds a window of each step of a batch's way, one after the other."""
    plan = cache.plan
    part = Part("train", 0, 0)
    kmer_id, mask, reverse = cache.seen(part)
    mean = std = None
    spent: dict[str, list[float]] = {}
    # Into a copy: the cache itself stays sealed.
    target = folder / "steps"
    shutil.copytree(cache.path, target)
    (target / ".work").mkdir()
    with writer.PartWriter(target, plan, part, numerics=teacher.numerics) as out:
        for first in range(0, len(kmer_id), batch):
            some, clock = slice(first, first + batch), _Clock(spent)
            emb = _embed(teacher, kmer_id[some], mask[some], reverse[some], batch=batch)
            _wait(emb)
            clock("teacher")
            assert parts.not_finite(emb) is None
            clock("finite")
            if mean is None:
                mean, std = (torch.from_numpy(x.copy()).to(emb) for x in (cache.mean, cache.std))
            value, scale = cache.codec.encode(emb, mean, std)
            _wait(value)
            clock("encode")
            stored = [parts.to_numpy(x) for x in (value, scale)]
            clock("copy")
            out.append(*stored)
            clock("write, beside")
        clock = _Clock(spent)
        out.sync()
        out.commit()
        clock("commit, beside")
    shutil.rmtree(target)
    windows = len(kmer_id)
    # The first batch warms up.
    return {
        name: 1e3
        * (statistics.median(times[1:] or times) * (windows / batch if len(times) > 1 else 1))
        / windows
        for name, times in spent.items()
    }


class _Clock:
    def __init__(self, spent: dict[str, list[float]]) -> None:
        self._spent, self._last = spent, perf_counter()

    def __call__(self, name: str) -> None:
        now = perf_counter()
        self._spent.setdefault(name, []).append(now - self._last)
        self._last = now


def measure_teacher(shape: Shape, folder: Path, *, rounds: int, device: str) -> dict[str, Any]:
    path = DEMO
    if shape.config is not None:
        path = folder / f"{shape.name}-teacher"
        save_checkpoint(random_model(shape.config, seed=0, head="language"), path)
    random_genome(folder / f"{shape.name}.fa", shape.windows * shape.bases)
    teacher = load_teacher(str(path), revision=None, layer=-1, device=device)

    phases: dict[str, float] = {}

    def note(progress: Progress) -> None:
        phases[progress.what] = progress.seconds

    target = folder / shape.name
    recipe = a_recipe(folder, shape, path, target)
    begun = perf_counter()
    stage.extract(recipe, teacher=teacher, report=note)
    phases["all"] = perf_counter() - begun
    cache = Cache.open(target)
    batch = int(cache.receipt(Part("train", 0, 0)).numerics["batch"])
    assert shape.windows % shape.part == 0
    assert shape.part % batch == 0
    check(cache, teacher, batch=batch)
    alone = Alone(cache, teacher, batch=batch)

    def extraction() -> float:
        integrity.forget(target, cache.plan.parts())
        made = stage.extract(recipe, teacher=teacher)
        assert made.cache_id == cache.id
        return made.windows_per_second

    contenders = {"teacher alone": alone.rate, "extraction": extraction}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in contenders if number % 2 else reversed(contenders):
            rate = contenders[name]()
            if number:  # the first round warms up
                rates[name].append(rate)
    ratios = [a / b for a, b in zip(rates["extraction"], rates["teacher alone"], strict=True)]
    found = {
        "ratio_teacher_alone": statistics.median(ratios),
        "ratios": ratios,
        "windows_per_second": {name: statistics.median(some) for name, some in rates.items()},
        "tokens_per_second": statistics.median(rates["extraction"]) * cache.plan.windows.kmers,
        "milliseconds_per_window": steps(cache, teacher, folder, batch=batch),
        "seconds": phases,
        "bytes_per_second": statistics.median(rates["extraction"]) * cache.nbytes / shape.windows,
        "channels": teacher.channels,
        "dtype": teacher.dtype,
        "bases": shape.bases,
        "windows": shape.windows,
        "part": shape.part,
        "batch": batch,
    }
    shutil.rmtree(target)
    return found


def measure(size: Size, folder: Path, *, device: str) -> dict[str, Any]:
    teachers = {
        shape.name: measure_teacher(shape, folder, rounds=size.rounds, device=device)
        for shape in size.shapes
        if shape.config is not None or DEMO.exists()
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "benchmark": "extract",
        # Of the wide teacher: the demo's is so small that everything else weighs.
        "ratio_teacher_alone": teachers["wide"]["ratio_teacher_alone"],
        "peak_memory_bytes": peak,
        "peak_gpu_memory_bytes": (
            torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        ),
        "teachers": teachers,
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
    lines = []
    for name, found in result["teachers"].items():
        rates, phases = found["windows_per_second"], found["seconds"]
        lines += [
            f"{name}: {found['channels']} channels in {found['dtype']}, {found['windows']:,} "
            f"windows of {found['bases']:,} bases, batches of {found['batch']}, "
            f"median of {result['rounds']} rounds",
            f"  teacher alone      {rates['teacher alone']:>9.1f} windows/s",
            f"  extraction         {rates['extraction']:>9.1f} windows/s"
            f"   x {found['ratio_teacher_alone']:.3f}"
            f"   ({min(found['ratios']):.3f} to {max(found['ratios']):.3f})",
            "  a window's ms      "
            + ", ".join(
                f"{step} {ms:.3f}" for step, ms in found["milliseconds_per_window"].items()
            ),
            f"  the first run's s  {phases['all']:.2f}: "
            + ", ".join(f"{what} {s:.2f}" for what, s in phases.items() if what != "all"),
            "",
        ]
    lines += [
        f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB",
    ]
    if result["peak_gpu_memory_bytes"] is not None:
        lines.append(f"peak GPU memory {result['peak_gpu_memory_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Extraction against the teacher alone.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="under two minutes (the default)")
    how_much.add_argument("--full", action="store_true", help="more windows, more rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where to write (a fast disk)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    chosen = parser.parse_args(arguments)
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size = sizes(full=chosen.full, cuda=device.startswith("cuda"))
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-extract-", dir=chosen.folder))
    try:
        result = measure(size, folder, device=device)
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
