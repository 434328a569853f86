"""What each codec costs: bytes, error, time, and what a student loses that learns from it.

    python benchmarks/fidelity.py [--quick | --full] [--json] [--teacher FOLDER] [--genome FILE]
                                  [--steps N] [--seeds N] [--at-once N] [--folder DIR]
                                  [--device DEVICE]

Windows of a real genome are embedded by a trained teacher and kept as `exact`; the other codecs'
caches are made from that one. Blocks of the genome are dealt to training and to held-out windows,
and all that is said of a codec is measured on held-out ones, which no codec was fitted to: bytes a
token of the cache as written, error against the exact vectors, that error in units of what the
teacher's own arithmetic makes (bfloat16 against float32), rates of encoding and decoding against
memcpy. First every cache is checked: the same windows, masks and statistics, and vectors that are
what encoding the exact ones gives.

What decides is the student. `had-pipe distill` trains one on each codec, alignment alone in
normalised space, with the same first weights, the same windows in the same order and as many steps;
then all are held against the exact vectors of held-out windows. The loss delta is the paired
difference in units of the loss of the student of `exact`, the mean over seeds. Two students of one
seed drift apart through rounding alone; how far, the spread over seeds tells.

Beside it stands what a codec costs without that drift: linear maps are solved for in float64, from
exact and from decoded vectors, and held against held-out exact ones. Errors that look random from
the features average out in them, errors that follow from what the features tell do not: they are
what a student would learn. Head delta: on the features of the student of `exact`. Strong delta: on
the teacher's own features before its last block, as a student would have that knows far more than
ours.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from measuring import commit, machine
from safetensors.torch import load_file
from torch import Tensor, nn

import had_pipe
from had_pipe import checkpoint, run
from had_pipe.cache import Cache
from had_pipe.cache.codec import CodecName, fidelity
from had_pipe.cache.recode import recode
from had_pipe.distill import distill
from had_pipe.dna.kmers import K
from had_pipe.dna.reference import read_contigs
from had_pipe.extract import extract
from had_pipe.floors import Floors, Seen
from had_pipe.objectives import HADObjective
from had_pipe.recipe import Recipe
from had_pipe.stream import Batch, first_windows
from had_pipe.students import HADConfig, HADModel, spell
from had_pipe.teachers.ntv2 import CLS_TOKEN, MASK_TOKEN, TOKEN_OF_KMER
from had_pipe.teachers.ntv2_checkpoint import load_checkpoint
from had_pipe.teachers.teacher import Teacher, load_teacher

DEMO = Path(__file__).resolve().parents[1] / "pipelines" / "demo"
CODECS: tuple[str, ...] = get_args(CodecName)
NARROW = 512
"""A teacher of fewer channels does not decide: its few components are all used."""

BASES = 510
BLOCK = 32
"""Windows of a block, which is either trained on or held out."""
BATCH = 8
"""Windows of a training step."""
TOGETHER = 16
"""Windows handled at once where nothing is trained."""
STUDENT = {"layers": 1, "gdn_heads": 2, "mlp": 256}
"""Smaller than the default: of what learns within minutes on two cores, it learns most."""


@dataclass(frozen=True)
class Size:
    held_out: int
    steps: int
    seeds: int
    solved: int
    """Training windows from which the last map is solved for."""
    noisy: int
    """Held-out windows for the noise of the teacher's arithmetic."""
    rounds: int

    @property
    def train(self) -> int:
        """Windows to learn from, as many as the steps see; the first calibrate, as in any cache."""
        return max(FEWEST, -(-self.steps * BATCH // BLOCK) * BLOCK)


FEWEST = 1152
"""Training windows, for a calibration as long as in large caches."""
QUICK = Size(held_out=128, steps=12, seeds=1, solved=128, noisy=32, rounds=3)
FULL = Size(held_out=512, steps=400, seeds=3, solved=1024, noisy=128, rounds=9)


# Caches


def deal(genome: Path, size: Size, bed: Path) -> None:
    """Draw blocks of pure A, C, G, T from a genome and deal them to train and valid."""
    length = BLOCK * BASES
    places = []
    for contig in read_contigs(genome):
        blocks = contig.base[: len(contig.base) // length * length].reshape(-1, length)
        pure = np.flatnonzero((blocks < 4).all(axis=1))
        places += [(contig.name, int(block) * length) for block in pure]
    train, valid = size.train // BLOCK, size.held_out // BLOCK
    if len(places) < train + valid:
        raise SystemExit(
            f"{genome}: {len(places):,} blocks of {length:,} bases of pure A, C, G, T; "
            f"{train + valid:,} are needed: give a longer genome"
        )
    drawn = np.random.default_rng(0).permutation(len(places))[: train + valid]
    with bed.open("w", encoding="utf-8") as file:
        for place, which in enumerate(drawn):
            name, start = places[which]
            split = "train" if place < train else "valid"
            file.write(f"{name}\t{start}\t{start + length}\t{split}\n")


def a_recipe(teacher: Path, genome: Path, bed: Path, cache: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"name": str(teacher)},
            "genome": [{"name": "genome", "path": str(genome), "splits": str(bed)}],
            "windows": {"bases": BASES, "stride": BASES},
            "cache": {"path": str(cache), "codec": "exact", "part": 128},
        }
    )


def written(path: Path, cache: Cache) -> dict[str, float]:
    """Bytes a token of the embeddings, and of what decoding needs besides, once a cache."""
    plan = cache.plan
    nbytes = tokens = 0
    for part in plan.parts():
        nbytes += sum((path / part.shard_key(s)).stat().st_size for s in plan.signals)
        tokens += plan.part_windows(part) * plan.windows.stored
    fixed = sum(f.stat().st_size for f in (path / "data.zarr/statistics").rglob("*") if f.is_file())
    return {"bytes_per_token": nbytes / tokens, "fixed_nbytes": fixed}


def decoded(cache: Cache, split: str, windows: int, *, device: str = "cpu") -> npt.NDArray[Any]:
    """The first windows of a split, float32 (W, G, D)."""
    some = first_windows([cache], split=split, windows=windows, batch=TOGETHER, device=device)
    return np.concatenate([batch.target.cpu().numpy() for batch in some])


def check(cache: Cache, exact: Cache, original: npt.NDArray[Any]) -> None:
    """Stop unless a codec's cache is that of `exact` but for what the codec loses."""
    assert np.array_equal(cache.mean, exact.mean)
    assert np.array_equal(cache.std, exact.std)
    for split in exact.plan.splits:
        rows = np.arange(exact.rows(split))
        assert np.array_equal(cache.read_kmers(split, rows), exact.read_kmers(split, rows))
    for ours, theirs in zip(cache.plan.parts(), exact.plan.parts(), strict=True):
        for a, b in zip(cache.seen(ours), exact.seen(theirs), strict=True):
            assert np.array_equal(a, b)
    some = original[:TOGETHER]
    block = cache.allocate(len(some))
    cache.read("valid", 0, np.arange(len(some)), block)
    value, scale = cache.codec.encode(some, cache.mean, cache.std)
    assert np.array_equal(value, block.value)
    if block.scale is not None:
        assert np.array_equal(scale, block.scale)


def check_exact(exact: Cache, teacher: Teacher) -> None:
    """Stop unless the vectors are the teacher's."""
    for batch in first_windows([exact], split="valid", windows=TOGETHER, batch=TOGETHER):
        emb = teacher.embed(batch.kmer_id.numpy().astype(np.uint16), batch.mask.numpy())
        visible = emb.float().cpu()[~batch.mask].view_as(batch.target)
        error = (visible - batch.target).norm() / batch.target.norm()
        assert float(error) < 1e-2, error


# Error and time


class Inside:
    """A teacher of our own, in any arithmetic and of any layer."""

    def __init__(self, folder: Path, *, dtype: torch.dtype, layer: int, device: str) -> None:
        model = load_checkpoint(folder).eval().requires_grad_(False)
        self._model, self._layer = model.to(device).compute_in(dtype), layer

    @torch.inference_mode()
    def visible(self, batch: Batch) -> Tensor:
        """Vectors of visible groups, (P, D)."""
        kmer = torch.from_numpy(TOKEN_OF_KMER).to(batch.mask.device)[batch.kmer_id]
        token = kmer.masked_fill(batch.mask, MASK_TOKEN)
        cls = token.new_full((len(token), 1), CLS_TOKEN)
        feat: Tensor = self._model(torch.cat((cls, token), dim=1), layer=self._layer)[:, 1:]
        return feat[~batch.mask].float()


def arithmetic_noise(folder: Path, exact: Cache, *, windows: int, device: str) -> dict[str, float]:
    """How far bfloat16 leads the teacher from float32."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        teacher = Inside(folder, dtype=dtype, layer=-1, device=device)
        some = first_windows([exact], split="valid", windows=windows, batch=TOGETHER, device=device)
        found.append(np.concatenate([teacher.visible(batch).cpu().numpy() for batch in some]))
    return fidelity(*found)


def rates(caches: dict[str, Cache], *, rounds: int, device: str) -> dict[str, dict[str, float]]:
    """Gigabytes a second, counted as float16 of the same values, and ratios to memcpy of these.

    Encoding is in torch, as extraction has it; decoding in NumPy, or on a GPU in torch, as training
    has it.
    """
    contenders: dict[str, Callable[[], object]] = {}
    on_gpu = device.startswith("cuda")
    values = 0
    for name, cache in caches.items():
        block = cache.allocate(TOGETHER)
        cache.read("valid", 0, np.arange(TOGETHER), block)
        stored = [a if a is None else a.copy() for a in (block.value, block.scale)]
        mean_std: list[Any] = [cache.mean, cache.std]
        there = [torch.tensor(a, device=device) for a in mean_std]
        decode_with = [*stored, *mean_std]
        if on_gpu:
            decode_with = [a if a is None else torch.from_numpy(a).to(device) for a in stored]
            decode_with += there
        emb = torch.from_numpy(cache.codec.decode(*stored, *mean_std)).to(device)
        values = emb.numel()
        if cache.codec.dtype == "bfloat16":
            emb = emb.bfloat16()

        def encode(cache: Cache = cache, emb: Tensor = emb, there: Any = there) -> object:
            return cache.codec.encode(emb, *there)

        def decode(cache: Cache = cache, stored: Any = decode_with) -> object:
            return cache.codec.decode(*stored, space="normalised")

        contenders[f"{name} decode"] = decode
        if name != "exact":  # which computes nothing
            contenders[f"{name} encode"] = encode
    half = torch.zeros(values, dtype=torch.float16, device=device)
    other = torch.empty_like(half)
    contenders["memcpy"] = lambda: other.copy_(half)

    def seconds(contender: Callable[[], object]) -> float:
        begun, calls = perf_counter(), 0
        while perf_counter() - begun < 0.02:
            contender()
            calls += 1
            if on_gpu:
                torch.cuda.synchronize()
        return (perf_counter() - begun) / calls

    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        names = list(contenders)
        for name in names if number % 2 else reversed(names):
            rate = 2 * values / seconds(contenders[name]) / 1e9
            if number:  # the first round warms up
                found[name].append(rate)
    copied = found.pop("memcpy")
    told: dict[str, dict[str, float]] = {"memcpy": {"gbps": statistics.median(copied)}}
    for key, some in found.items():
        name, way = key.split()
        told.setdefault(name, {})[f"{way}_gbps"] = statistics.median(some)
        ratios = [a / b for a, b in zip(some, copied, strict=True)]
        told[name][f"{way}_ratio_memcpy"] = statistics.median(ratios)
    return told


# Students


def _and_one(feat: Tensor) -> Tensor:
    """A column of ones, for the map's bias."""
    return torch.cat((feat, feat.new_ones(len(feat), 1)), dim=1).double()


@dataclass(frozen=True)
class Trained:
    """A student and what maps its features to the teacher's, as a run left them."""

    student: HADModel
    objective: HADObjective

    @torch.inference_mode()
    def features(self, batch: Batch) -> Tensor:
        """What the last map is applied to, for each visible group, and 1: (P, E + 1)."""
        ids = spell(batch.kmer_id, batch.mask)
        feat = self.student(ids).last_hidden_state
        return _and_one(feat.unflatten(1, (-1, K)).mean(dim=2)[~batch.mask])

    @torch.inference_mode()
    def errors(self, exact: Cache, windows: int, *, device: str) -> npt.NDArray[np.float64]:
        """Mean squared error of each held-out window, normalised, against exact vectors, (W)."""
        found = []
        for batch in first_windows(
            [exact], split="valid", windows=windows, batch=TOGETHER, device=device
        ):
            feat = self.student(spell(batch.kmer_id, batch.mask)).last_hidden_state
            objective = self.objective
            guess = objective.predictions(feat, batch.mask, visible=batch.target.shape[1])
            error = (guess - batch.target) / objective.unit_D
            found.append(error.double().square().mean(dim=(1, 2)).cpu().numpy())
        return np.concatenate(found)


def train(cache: Path, out: Path, *, steps: int, seed: int, device: str) -> Trained:
    """A student of one cache, by the command's own way."""
    recipe = Recipe.model_validate(
        {
            "cache": {"path": str(cache)},
            "student": STUDENT,
            "objective": {"align": 1.0, "reconstruct": 0.0, "target": "normalised"},
            "train": {
                "out": str(out),
                "steps": steps,
                "batch": BATCH,
                "lr": 6e-3,
                "warmup": max(1, steps // 10),
                "seed": seed,
                "checkpoint_every": steps,
                # Measured here, against exact vectors, and not there against the codec's own.
                "validation_split": "none",
            },
        }
    )
    distill(recipe, device=device)
    (last, *_) = checkpoint.checkpoints(out / run.CHECKPOINTS)
    opened = Cache.open(cache)
    student = HADModel(HADConfig(**recipe.student.model_dump()))
    student.load_state_dict(load_file(last / "student.safetensors"))
    objective = HADObjective(
        hidden_size=recipe.student.hidden_size,
        channels=opened.plan.teacher.channels,
        reconstruct=0.0,
        target="normalised",
        mean_D=torch.tensor(opened.mean),
        std_D=torch.tensor(opened.std),
    )
    objective.load_state_dict(load_file(last / "objective.safetensors"))
    shutil.rmtree(out)
    for module in (student, objective):
        nn.Module.to(nn.Module.eval(module), device)
    return Trained(student, objective)


def learn(
    folder: Path,
    name: str,
    codecs: Sequence[str],
    *,
    steps: int,
    seed: int,
    windows: int,
    held_out: int,
    device: str,
) -> tuple[float, dict[str, float]]:
    """Of a student of one codec: its held-out loss; of that of `exact`, also its head's, by codec.

    Runs in a process of its own.
    """
    trained = train(
        folder / name, folder / f"run-{name}-{seed}", steps=steps, seed=seed, device=device
    )
    exact = Cache.open(folder / "exact")
    loss = float(trained.errors(exact, held_out, device=device).mean())
    if name != "exact":
        return loss, {}
    caches = {codec: Cache.open(folder / codec) for codec in codecs}
    solved = linear_errors(
        trained.features, caches, windows=windows, held_out=held_out, device=device
    )
    return loss, solved


def _alone(threads: int) -> None:
    torch.set_num_threads(threads)


def linear_errors(
    features: Callable[[Batch], Tensor],
    caches: dict[str, Cache],
    *,
    windows: int,
    held_out: int,
    device: str,
) -> dict[str, float]:
    """Held-out error, against exact vectors, of the best linear map to each codec's vectors."""
    exact = caches["exact"]
    mean, std = (torch.tensor(a, device=device).double() for a in (exact.mean, exact.std))

    def normalised(batch: Batch) -> Tensor:
        return (batch.target.flatten(0, 1).double() - mean) / std

    def read(cache: Cache, split: str, count: int) -> Iterator[Batch]:
        return first_windows([cache], split=split, windows=count, batch=TOGETHER, device=device)

    gram = torch.zeros((), device=device)
    products = dict.fromkeys(caches, gram)
    for batches in zip(*(read(cache, "train", windows) for cache in caches.values()), strict=True):
        feat = features(batches[0])
        gram = gram + feat.T @ feat
        for name, batch in zip(caches, batches, strict=True):
            products[name] = products[name] + feat.T @ normalised(batch)
    # Least squares by the normal equations; a hair on the diagonal, for features that stand still.
    gram = gram + 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=device)
    maps = {name: torch.linalg.solve(gram, product) for name, product in products.items()}
    sums, values = dict.fromkeys(caches, 0.0), 0
    for batch in read(exact, "valid", held_out):
        feat, target = features(batch), normalised(batch)
        values += target.numel()
        for name in caches:
            sums[name] += float((feat @ maps[name] - target).square().sum())
    return {name: total / values for name, total in sums.items()}


def floors(exact: Cache, *, held_out: int, device: str) -> dict[str, float]:
    """Errors without a student: the mean vector, and the mean vector of each k-mer."""

    def seen(split: str, count: int) -> Iterator[Seen]:
        some = first_windows([exact], split=split, windows=count, batch=TOGETHER, device=device)
        for batch in some:
            yield Seen(
                kmer_id_BT=batch.kmer_id,
                aligned_BT=~batch.mask,
                hidden_BS=batch.mask.repeat_interleave(K, dim=1),
                target_BGD=batch.target,
            )

    learnt = Floors.learn(
        seen("train", exact.rows("train")), channels=len(exact.mean), device=torch.device(device)
    )
    unit = torch.tensor(exact.std, device=device)
    measured = learnt.measure(seen("valid", held_out), unit_D=unit)
    return {"mean": measured["mean_align"], "kmer_table": measured["kmer_align"]}


# All of it


def measure(
    size: Size,
    folder: Path,
    *,
    teacher_folder: Path,
    genome: Path,
    device: str,
    at_once: int,
    tell: bool,
) -> dict[str, Any]:
    def say(text: str) -> None:
        if tell:
            print(text, file=sys.stderr, flush=True)

    bed = folder / "blocks.bed"
    deal(genome, size, bed)
    recipe = a_recipe(teacher_folder, genome, bed, folder / "exact")
    teacher = load_teacher(str(teacher_folder), revision=None, layer=-1, device=device)
    extract(recipe, teacher=teacher)
    exact = Cache.open(folder / "exact")
    check_exact(exact, teacher)
    say(f"exact: {exact.rows('train'):,} windows to learn from, {exact.rows('valid'):,} held out")
    original = decoded(exact, "valid", size.held_out)
    caches = {"exact": exact}
    for name in CODECS:
        if name != "exact":
            recode(exact.path, folder / name, codec=name)
            caches[name] = Cache.open(folder / name)
            check(caches[name], exact, original)
            say(f"{name}: made and checked")

    channels = exact.plan.teacher.channels
    noise = arithmetic_noise(teacher_folder, exact, windows=size.noisy, device=device)
    rate = rates(caches, rounds=size.rounds, device=device)
    found: dict[str, dict[str, Any]] = {}
    for name, cache in caches.items():
        error = fidelity(original, decoded(cache, "valid", size.held_out))
        nbytes = written(folder / name, cache)
        found[name] = {
            **nbytes,
            "ratio_float16": 2 * channels / nbytes["bytes_per_token"],
            **error,
            "ratio_arithmetic_noise": error["channel_rmse"] / noise["channel_rmse"],
            **rate[name],
        }
        say(
            f"{name}: {nbytes['bytes_per_token']:.1f} bytes a token, channel rmse "
            f"{error['channel_rmse']:.4f}, worst cosine {error['worst_cosine']:.4f}"
        )
    below = floors(exact, held_out=size.held_out, device=device)
    say(f"the mean vector {below['mean']:.5f}, the mean of each k-mer {below['kmer_table']:.5f}")

    how_many: dict[str, Any] = {
        "windows": size.solved,
        "held_out": size.held_out,
        "device": device,
    }
    blocks = load_checkpoint(teacher_folder).config.num_hidden_layers
    before = Inside(teacher_folder, dtype=torch.float32, layer=blocks - 1, device=device)
    strong = linear_errors(lambda batch: _and_one(before.visible(batch)), caches, **how_many)
    for name in caches:
        gap = strong[name] / strong["exact"] - 1
        say(f"{name}: from the teacher's block {blocks - 1} {strong[name]:.5f}, {gap:+.4%}")

    losses: dict[str, list[float]] = {name: [] for name in caches}
    deltas: dict[str, list[float]] = {name: [] for name in caches}
    heads: dict[str, list[float]] = {name: [] for name in caches}
    threads = max(1, torch.get_num_threads() // at_once)
    with ProcessPoolExecutor(at_once, get_context("spawn"), _alone, (threads,)) as pool:
        learning = {
            (seed, name): pool.submit(
                learn, folder, name, list(caches), steps=size.steps, seed=seed, **how_many
            )
            for seed in range(size.seeds)
            for name in caches
        }
        try:
            for (seed, name), future in learning.items():
                loss, solved = future.result()
                losses[name].append(loss)
                deltas[name].append(loss / losses["exact"][seed] - 1)
                for other in solved:
                    heads[other].append(solved[other] / solved["exact"] - 1)
                say(
                    f"seed {seed}, {name}: held-out loss {loss:.5f}, {deltas[name][-1]:+.3%}, "
                    f"head {heads[name][seed]:+.4%}"
                )
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    for name in caches:
        found[name] |= {
            "loss_delta": statistics.mean(deltas[name]),
            "loss_deltas": deltas[name],
            "losses": losses[name],
            "head_delta": statistics.mean(heads[name]),
            "head_deltas": heads[name],
            "strong_delta": strong[name] / strong["exact"] - 1,
        }
    return {
        "benchmark": "fidelity",
        "codecs": found,
        "arithmetic_noise": noise,
        "floors": below,
        "strong_loss": strong["exact"],
        "memcpy_gbps": rate["memcpy"]["gbps"],
        "teacher": {
            "name": teacher.name,
            "weights_sha256": teacher.weights_sha256,
            "channels": channels,
            "dtype": teacher.dtype,
        },
        "genome": exact.plan.genomes[0].digest,
        "windows": {"bases": BASES, "train": size.train, "held_out": size.held_out},
        "student": {**STUDENT, "steps": size.steps, "batch": BATCH, "seeds": size.seeds},
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


COLUMNS = (
    ("bytes", "a token", "bytes_per_token", ".1f"),
    ("below", "float16", "ratio_float16", ".2f"),
    ("channel", "rmse", "channel_rmse", ".4f"),
    ("worst", "channel", "worst_channel_rmse", ".4f"),
    ("relative", "error", "relative", ".4f"),
    ("worst", "cosine", "worst_cosine", ".4f"),
    ("x bf16", "noise", "ratio_arithmetic_noise", ".1f"),
    ("encode", "x memcpy", "encode_ratio_memcpy", ".3f"),
    ("decode", "x memcpy", "decode_ratio_memcpy", ".3f"),
    ("strong", "delta", "strong_delta", "+.3%"),
    ("head", "delta", "head_delta", "+.3%"),
    ("loss", "delta", "loss_delta", "+.2%"),
)


def table(result: dict[str, Any]) -> str:
    teacher, windows, student = result["teacher"], result["windows"], result["student"]
    noise = result["arithmetic_noise"]
    lines = [
        f"{teacher['name']}: {teacher['channels']} channels in {teacher['dtype']}; "
        f"{windows['train']:,} windows of {windows['bases']} bases to learn from, "
        f"{windows['held_out']:,} held out; {student['steps']} steps of {student['batch']}, "
        f"{student['seeds']} seeds",
        "",
        *(f"{'':<8}" + "".join(f"{column[i]:>10}" for column in COLUMNS) for i in (0, 1)),
    ]
    for name, found in result["codecs"].items():
        cells = "".join(
            f"{format(found[key], form) if key in found else '-':>10}"
            for _, _, key, form in COLUMNS
        )
        deltas = found["loss_deltas"]
        spread = f"   ({min(deltas):+.2%} to {max(deltas):+.2%})" if len(deltas) > 1 else ""
        lines.append(f"{name:<8}{cells}{spread}")
    losses = result["codecs"]["exact"]["losses"]
    below = result["floors"]
    lines += [
        "",
        f"held-out loss of the student of exact {statistics.mean(losses):.4f} "
        f"({min(losses):.4f} to {max(losses):.4f}); the mean vector {below['mean']:.4f}, "
        f"the mean of each k-mer {below['kmer_table']:.4f}, "
        f"from the teacher's last block but one {result['strong_loss']:.4f}",
        f"the teacher in bfloat16: channel rmse {noise['channel_rmse']:.4f}, "
        f"relative error {noise['relative']:.4f}, worst cosine {noise['worst_cosine']:.4f}",
        f"memcpy {result['memcpy_gbps']:.1f} GB/s, {result['threads']} threads",
    ]
    if teacher["channels"] < NARROW:
        lines += [
            "",
            f"A teacher of {teacher['channels']} channels is too narrow to decide about codecs: "
            f"give --teacher one of at least {NARROW}.",
        ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="What each codec costs.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="under two minutes (the default)")
    how_much.add_argument("--full", action="store_true", help="students that have learnt something")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--teacher", type=Path, default=DEMO / "teacher", help="its folder")
    parser.add_argument(
        "--genome", type=Path, default=DEMO / "ecoli_K12_MG1655.2bit", help="FASTA or 2bit"
    )
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, help="trainings of each codec")
    parser.add_argument("--at-once", type=int, help="trainings (one a core; on a GPU one)")
    parser.add_argument("--folder", type=Path, help="where to write (a fast disk)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    chosen = parser.parse_args(arguments)
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    cores = len(os.sched_getaffinity(0))
    size = FULL if chosen.full else QUICK
    size = replace(size, steps=chosen.steps or size.steps, seeds=chosen.seeds or size.seeds)
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-fidelity-", dir=chosen.folder))
    try:
        result = measure(
            size,
            folder,
            teacher_folder=chosen.teacher.resolve(),
            genome=chosen.genome.resolve(),
            device=device,
            at_once=chosen.at_once or (1 if device.startswith("cuda") else cores),
            tell=chosen.full,
        )
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
