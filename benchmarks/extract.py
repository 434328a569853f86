"""How much of the teacher's own speed stage one keeps, and what it takes as a corpus grows.

    python benchmarks/extract.py [--quick | --full] [--json] [--folder DIR] [--device DEVICE]
                                 [--only speed | growth]

speed     For each teacher (the demo's own, and a wider one with random weights: on a GPU the shape
          of NT-v2-500M) a random genome is extracted. First the cache is checked: rows drawn from
          it, embedded again in another batch, equal what is stored. Then rounds are interleaved of
            teacher alone       the same windows in the same batches, vectors left where they are
            extraction          all parts: encoded, copied, hashed, written, synced, recorded
          Planning, calibrating, finding the batch and sealing do not grow with views: the first run
          alone has them, told apart. A batch's way is also walked step by step, each step waited
          for. Exposed is what the teacher has to wait for: on a CPU all but the writing; on a GPU
          what its own stream computes besides, since preparing, copying and writing go on beside
          it. What `benchmarks/store.py` has is the writer alone.
growth    A small teacher over a genome, and over one with ten times as many contigs, each planned
          in one process and extracted in another: most memory that either held, and seconds.

Every figure is the median over rounds, every ratio the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
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
from measuring import Clock, commit, machine

import had_pipe
from had_pipe import batches
from had_pipe import extract as stage
from had_pipe.cache import Cache, integrity, writer
from had_pipe.cache.layout import Part
from had_pipe.dna.kmers import reverse_complement
from had_pipe.job import Job
from had_pipe.parts import PartMaker
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
    contig_windows: int
    """Windows of one contig of the growing genome."""


GROWN = 10
"""How many times as many contigs the larger genome has."""

GROWING = Shape("growing", None, bases=510, windows=0, part=512)


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
        return Size(shapes, rounds=5 if full else 3, contig_windows=16_384 * more)
    more = 4 if full else 1
    shapes = (
        Shape("demo", None, 510, windows=512 * more, part=128),
        Shape("wide", wide(4, 512), 510, windows=64 * more, part=32),
    )
    return Size(shapes, rounds=7 if full else 3, contig_windows=1024 * more)


def random_genome(path: Path, bases: int, *, contigs: int = 1) -> None:
    letters, rng = np.frombuffer(b"ACGT", dtype=np.uint8), np.random.default_rng(0)
    with path.open("wb") as file:
        for number in range(contigs):
            drawn = letters[rng.integers(0, 4, bases)]
            file.write(f">random{number}\n".encode() + drawn.tobytes() + b"\n")


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
    emb = batches.to_numpy(emb).astype(np.float32)
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
    return batches.embed_batch(
        teacher, kmer_id, mask, reverse, store="visible", shown="masked", batch=batch
    )


class Alone:
    """The teacher and nothing else, over the windows of a cache, in the batches of extraction."""

    def __init__(self, cache: Cache, teacher: Teacher, *, batch: int) -> None:
        self._teacher = teacher
        self._windows = 0
        self._seen = []
        for part in cache.plan.parts():
            # A copy, as extraction makes one too: torch wants arrays that may be written.
            kmer_id, mask, reverse = cache.seen(part)
            turned = np.where(reverse[:, None], reverse_complement(kmer_id), kmer_id)
            self._windows += len(turned)
            for first in range(0, len(turned), batch):
                # The last one of a part is filled up, so that there is one shape.
                some = np.minimum(np.arange(first, first + batch), len(turned) - 1)
                self._seen.append((turned[some], mask[some]))

    def rate(self) -> float:
        """Windows a second."""
        begun, emb = perf_counter(), None
        for kmer_id, hidden in self._seen:
            emb = self._teacher.embed(kmer_id, hidden)
        assert emb is not None
        _wait(emb)
        return self._windows / (perf_counter() - begun)


def _wait(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class _Timed:
    """A teacher that tells a clock when it is asked and when it is done."""

    def __init__(self, teacher: Teacher, clock: _Clock) -> None:
        self._teacher, self._clock = teacher, clock

    def embed(self, kmer_id: npt.NDArray[np.uint16], hidden: npt.NDArray[np.bool_]) -> Any:
        self._clock("prepare")
        emb = self._teacher.embed(kmer_id, hidden)
        _wait(emb)
        self._clock("teacher")
        return emb

    def __getattr__(self, name: str) -> Any:
        return getattr(self._teacher, name)


HIDDEN_ON_CPU = ("write", "commit")
HIDDEN_ON_CUDA = ("prepare", "copy", *HIDDEN_ON_CPU)


def steps(cache: Cache, teacher: Teacher, folder: Path, *, batch: int) -> dict[str, Any]:
    """Milliseconds a window of each step of a batch's way, one after the other.

    `exposed` and `hidden` name them by whether the teacher's next batch has to wait for them.
    """
    plan = cache.plan
    part = Part("train", 0, 0)
    kmer_id, mask, reverse = cache.seen(part)
    mean = std = side = None
    clock = _Clock()
    timed: Any = _Timed(teacher, clock)
    on_cuda = False
    # Into a copy: the cache itself stays sealed.
    target = folder / "steps"
    shutil.copytree(cache.path, target)
    (target / ".work").mkdir()
    with writer.PartWriter(target, plan, part, numerics=teacher.numerics) as out:
        for first in range(0, len(kmer_id), batch):
            some = slice(first, first + batch)
            clock.begin()
            emb = _embed(timed, kmer_id[some], mask[some], reverse[some], batch=batch)
            _wait(emb)
            clock("gather")
            if mean is None:
                mean, std = batches.like(cache.mean, emb), batches.like(cache.std, emb)
                side, on_cuda = batches.side_stream(emb), emb.is_cuda
            finite = batches.finite_windows(emb)
            _wait(emb)
            clock("finite")
            value, scale = cache.codec.encode(emb, mean, std)
            _wait(value)
            clock("encode")
            there = [finite, value, scale]
            here = [batches.to_numpy(x) for x in there] if side is None else side.send(there)()
            assert here[0].all()
            clock("copy")
            out.append(*here[1:])
            clock("write")
        clock.begin()
        out.sync()
        out.commit()
        clock("commit")
    shutil.rmtree(target)
    spent = clock.milliseconds(windows=len(kmer_id), batch=batch)
    hidden = HIDDEN_ON_CUDA if on_cuda else HIDDEN_ON_CPU
    exposed = {name: ms for name, ms in spent.items() if name not in ("teacher", *hidden)}
    return {
        "teacher": spent["teacher"],
        "exposed": exposed,
        "hidden": {name: spent[name] for name in hidden},
        "exposed_share": sum(exposed.values()) / (spent["teacher"] + sum(exposed.values())),
    }


class _Clock:
    def __init__(self) -> None:
        self._spent: dict[str, list[float]] = {}
        self.begin()

    def begin(self) -> None:
        self._last = perf_counter()

    def __call__(self, name: str) -> None:
        now = perf_counter()
        self._spent.setdefault(name, []).append(now - self._last)
        self._last = now

    def milliseconds(self, *, windows: int, batch: int) -> dict[str, float]:
        """A window's, of each step: the median batch's, of those after the first, which warms up;
        of a step that comes once, its share."""
        return {
            name: 1e3 * (statistics.median(times[1:]) / batch if times[1:] else times[0] / windows)
            for name, times in self._spent.items()
        }


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
    check(cache, teacher, batch=batch)
    alone = Alone(cache, teacher, batch=batch)

    def extraction() -> float:
        integrity.forget(target, cache.plan.parts())
        with PartMaker(target, teacher):
            pass  # notes how many windows fit, for which a GPU is tried: once, however much is made
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


# Growth


def growth(size: Size, folder: Path, *, device: str) -> dict[str, Any]:
    """What planning and extraction take of memory and time, of a genome and of a larger one."""
    teacher = folder / "growing-teacher"
    config = NTv2Config(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=130,
    )
    save_checkpoint(random_model(config, seed=0, head="language"), teacher)
    found: dict[int, dict[str, Any]] = {}
    for contigs in (1, GROWN):
        bases = size.contig_windows * GROWING.bases
        random_genome(folder / "growing.fa", bases, contigs=contigs)
        told = {phase: _in_a_process(phase, folder, device) for phase in ("planning", "extraction")}
        assert told["extraction"]["windows"] == contigs * size.contig_windows
        found[contigs] = told
        shutil.rmtree(folder / "growing")
    small, large = found[1], found[GROWN]

    def grew(phase: str, what: str) -> float:
        return float(large[phase][what] / small[phase][what])

    return {
        "windows": {n: told["extraction"]["windows"] for n, told in found.items()},
        "phases": found,
        # Of making parts: what planning holds of every window is told apart.
        "memory_ratio": grew("extraction", "peak_memory_bytes"),
        "time_ratio": grew("extraction", "seconds"),
        "cpu_ratio": grew("extraction", "cpu_seconds"),
        "times_as_large": GROWN,
        "planning_memory_ratio": grew("planning", "peak_memory_bytes"),
    }


def _in_a_process(phase: str, folder: Path, device: str) -> dict[str, Any]:
    """One phase in a process of its own, whose peak memory is its own too."""
    words = ["--phase", phase, "--folder", str(folder), "--device", device]
    done = subprocess.run(
        [sys.executable, __file__, *words], stdout=subprocess.PIPE, text=True, check=True
    )
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def one_phase(phase: str, folder: Path, device: str) -> dict[str, Any]:
    """Plan the growing genome's cache, or make its parts."""
    path = folder / "growing-teacher"
    recipe = a_recipe(folder, GROWING, path, folder / "growing")
    teacher = load_teacher(str(path), revision=None, layer=-1, device=device)
    clock = Clock()
    if phase == "planning":
        plan = stage.ensure_plan(Job.of(recipe), teacher)
        windows = sum(split.windows for split in plan.splits.values())
    else:
        windows = stage.extract(recipe, teacher=teacher).windows
    spent = clock.passed(0)
    return {
        "windows": windows,
        "seconds": spent.seconds,
        "cpu_seconds": spent.cpu_seconds,
        **peaks(),
    }


def peaks() -> dict[str, int | None]:
    """Most memory that this process held."""
    cuda = torch.cuda.is_available()
    return {
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_gpu_memory_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


# All of it


def measure(size: Size, folder: Path, *, device: str, only: str | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "extract", "ratio_teacher_alone": None}
    if only != "growth":
        teachers = {
            shape.name: measure_teacher(shape, folder, rounds=size.rounds, device=device)
            for shape in size.shapes
            if shape.config is not None or DEMO.exists()
        }
        result["teachers"] = teachers
        # Of the wide teacher: the demo's is so small that everything else weighs.
        result["ratio_teacher_alone"] = teachers["wide"]["ratio_teacher_alone"]
    result |= peaks()
    result["growth"] = None if only == "speed" else growth(size, folder, device=device)
    return {
        **result,
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
    for name, found in result.get("teachers", {}).items():
        rates, phases = found["windows_per_second"], found["seconds"]
        walk = found["milliseconds_per_window"]
        lines += [
            f"{name}: {found['channels']} channels in {found['dtype']}, {found['windows']:,} "
            f"windows of {found['bases']:,} bases, batches of {found['batch']}, "
            f"median of {result['rounds']} rounds",
            f"  teacher alone      {rates['teacher alone']:>9.1f} windows/s",
            f"  extraction         {rates['extraction']:>9.1f} windows/s"
            f"   x {found['ratio_teacher_alone']:.3f}"
            f"   ({min(found['ratios']):.3f} to {max(found['ratios']):.3f})",
            f"  a window's ms      teacher {walk['teacher']:.3f}",
            f"    exposed          {_listed(walk['exposed'])}: "
            f"{walk['exposed_share']:.1%} of what the teacher's thread or stream does",
            f"    hidden           {_listed(walk['hidden'])}",
            f"  the first run's s  {phases['all']:.2f}: "
            + ", ".join(f"{what} {s:.2f}" for what, s in phases.items() if what != "all"),
            "",
        ]
    grown = result["growth"]
    if grown is not None:
        lines.append("growth, each phase in a process of its own")
        for told in grown["phases"].values():
            for phase, of in told.items():
                lines.append(
                    f"  {of['windows']:>9,} windows   {phase:<10}   {of['seconds']:>8.2f} s"
                    f"   {of['cpu_seconds']:>7.2f} s of CPU"
                    f"   {of['peak_memory_bytes'] / 1e6:>7.0f} MB"
                )
        lines += [
            f"  {grown['times_as_large']} times the windows: making parts takes "
            f"{grown['time_ratio']:.1f} times as long, {grown['cpu_ratio']:.1f} times the CPU's "
            f"seconds and {grown['memory_ratio']:.2f} times the memory; planning, "
            f"{grown['planning_memory_ratio']:.2f} times the memory",
            "",
        ]
    lines.append(f"peak memory {result['peak_memory_bytes'] / 1e9:.2f} GB")
    if result["peak_gpu_memory_bytes"] is not None:
        lines.append(f"peak GPU memory {result['peak_gpu_memory_bytes'] / 1e9:.2f} GB")
    return "\n".join(lines)


def _listed(spent: dict[str, float]) -> str:
    return ", ".join(f"{step} {ms:.3f}" for step, ms in spent.items())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Extraction against the teacher alone.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="under two minutes (the default)")
    how_much.add_argument("--full", action="store_true", help="more windows, more rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where to write (a fast disk)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", choices=["speed", "growth"], help="one of the two")
    parser.add_argument("--phase", choices=["planning", "extraction"], help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if chosen.phase is not None:
        print(json.dumps(one_phase(chosen.phase, chosen.folder, device)))
        return
    size = sizes(full=chosen.full, cuda=device.startswith("cuda"))
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-extract-", dir=chosen.folder))
    try:
        result = measure(size, folder, device=device, only=chosen.only)
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
