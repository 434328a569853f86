"""How fast a teacher's forward pass is: against published code, and against the hardware.

    python benchmarks/teacher.py [--quick | --full] [--json] [--folder DIR] [--device DEVICE]
                                 [--only speed | numerics] [--shapes NAME ...] [--bases N ...]

Random weights in the shapes of NT-v2 (50m, 100m, 250m, 500m) are written as a checkpoint and loaded
twice: by ours, through the teacher that extraction runs, and by an eager model written for this
comparison (`benchmarks/eager_ntv2.py`), both to the last norm and without a language head.

speed     First every way must give the peer's features: in float32 to rounding, in bfloat16 by the
          cosine of every token. Then rounds are interleaved of
            peer             eager, unfused
            ours             as users run it on this device (on CUDA compiled, on a CPU not)
            ours, eager      and
            ours, compiled   where that is the other one
            ours, CUDA graph the compiled model replayed from a graph: how much launches cost
            matrix product   the rate that `peak_share` is a share of: 8192^3 on CUDA, 2048^3 else
          in the type users compute in; at the first length of a shape in float32 too.
numerics  What a batch's size, bfloat16 and compiling change in features: the largest difference,
          the share of equal numbers, and the cosine of tokens. Among the windows are repeats.

Tokens are counted with `<cls>`; windows do not overlap. Every rate is the median over rounds, every
ratio the median of the rounds' own ratios.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from eager_ntv2 import EagerNTv2
from measuring import Clock, Pass, commit, machine, rounds, settled
from torch import Tensor

import had_pipe
from had_pipe.dna.kmers import KMERS, K, encode_kmers
from had_pipe.teachers.folder import WEIGHT_FILES
from had_pipe.teachers.ntv2 import (
    CLS_TOKEN,
    MASK_TOKEN,
    TOKEN_OF_KMER,
    NTv2,
    NTv2Config,
    NTv2Teacher,
    compiled_block,
    fused_attention,
    random_model,
)
from had_pipe.teachers.ntv2_checkpoint import load_checkpoint, save_checkpoint
from had_pipe.teachers.numerics import compute_dtype, dtype_name, fit_threads

SECTIONS = ("speed", "numerics")
GENOME_BASES = 3.1e9
LARGEST_DIFFERENCE = 2e-4
"""Of float32 features, whose channels have standard deviation 1: some of the depth's rounding."""
LOWEST_COSINE = 0.99
"""Of a token in bfloat16 with itself in float32."""


def _shape(width: int, layers: int, half: int) -> NTv2Config:
    return NTv2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        intermediate_size=half,
        max_position_embeddings=2050,
    )


SHAPES = {
    "50m": _shape(512, 12, 2048),
    "100m": _shape(512, 22, 2048),
    "250m": _shape(768, 24, 3072),
    "500m": _shape(1024, 29, 4096),
}
BASES = (1020, 2046, 6138, 12_282)


@dataclass(frozen=True)
class Cell:
    """What is timed together: one shape at one length."""

    shape: str
    bases: int
    windows: int
    variants: bool
    """Whether other ways and types than the users' are timed too."""


@dataclass(frozen=True)
class Size:
    cells: tuple[Cell, ...]
    rounds: int
    seconds: float
    """What one contender takes in one round, at least."""
    product: int
    """Edge of the matrices whose product is the peak."""
    numerics_shape: str
    numerics_windows: int
    compiled: bool = True
    """Whether numerics has the compiled teacher as well."""


def sizes(*, full: bool, cuda: bool) -> Size:
    """What is measured: under two minutes on two cores, or some minutes of a GPU."""
    if cuda:
        # As much as extraction has in one batch.
        shapes = list(reversed(SHAPES)) if full else ["500m", "50m"]
        cells = tuple(
            Cell(name, bases, 2**15 // (bases // K), variants=bases == BASES[0])
            for name in shapes
            for bases in (BASES if full else (BASES[0], BASES[-1]))
        )
        return Size(cells, 9 if full else 5, 0.5, 8192, "500m", 64)
    if not full:
        return Size((Cell("50m", BASES[0], 4, variants=True),), 5, 0.0, 2048, "50m", 4)
    long = tuple(Cell("50m", b, max(1, 2720 // (b // K)), variants=False) for b in BASES[1:])
    large = tuple(Cell(name, BASES[0], 2, variants=False) for name in ("100m", "250m", "500m"))
    return Size((Cell("50m", BASES[0], 16, variants=True), *long, *large), 5, 0.0, 2048, "50m", 8)


def flops_per_token(config: NTv2Config, *, tokens: int) -> int:
    """Of matrix products alone: attention's four maps, the gated unit's three, scores, mixing."""
    d, half = config.hidden_size, config.intermediate_size
    return config.num_hidden_layers * (2 * (4 * d * d + 3 * d * half) + 4 * tokens * d)


@dataclass(frozen=True)
class Windows:
    """The same windows for both: k-mers and what is hidden, and token ids on the device."""

    kmer_id: npt.NDArray[np.uint16]
    hidden: npt.NDArray[np.bool_]
    token: Tensor

    @property
    def tokens(self) -> int:
        """Of one window."""
        return self.token.shape[1]


def some_windows(windows: int, kmers: int, *, device: torch.device, seed: int = 0) -> Windows:
    """Random k-mers, a seventh hidden; the last two windows repeat one base and two."""
    rng = np.random.default_rng(seed)
    kmer_id = rng.integers(0, KMERS, (windows, kmers), dtype=np.uint16)
    if windows > 2:
        repeats = [np.zeros(kmers * K, dtype=np.uint8), np.arange(kmers * K, dtype=np.uint8) % 2]
        kmer_id[-2:] = encode_kmers(np.stack(repeats))
    hidden = rng.random((windows, kmers)) < 0.15
    token = np.where(hidden, MASK_TOKEN, TOKEN_OF_KMER[kmer_id])
    token = np.concatenate((np.full((windows, 1), CLS_TOKEN), token), axis=1)
    return Windows(kmer_id, hidden, torch.from_numpy(token).to(device))


class Checkpoint:
    """Random weights of one shape in a folder, and whoever runs them."""

    def __init__(self, name: str, config: NTv2Config, folder: Path, device: torch.device) -> None:
        self.config, self._device, self._path = config, device, folder / name
        if not self._path.exists():
            model = random_model(config, seed=0)
            generator = torch.Generator().manual_seed(1)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:  # nothing may hide behind a 1 or a 0
                        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
            save_checkpoint(model, self._path)

    def peer(self, dtype: torch.dtype) -> EagerNTv2:
        return EagerNTv2(
            safetensors.torch.load_file(self._path / WEIGHT_FILES[0]),
            heads=self.config.num_attention_heads,
            eps=self.config.layer_norm_eps,
            device=self._device,
            dtype=dtype,
        )

    def model(self) -> NTv2:
        return load_checkpoint(self._path)

    def ours(self, dtype: torch.dtype, *, compiled: bool | None = None) -> NTv2Teacher:
        return NTv2Teacher(
            self.model(),
            name=self._path.name,
            revision=None,
            weights_sha256="0" * 64,
            licence="CC0-1.0",
            layer=-1,
            device=self._device,
            compute=dtype,
            compiled=compiled,
        )


def is_compiled(teacher: NTv2Teacher) -> bool:
    return "compile" in str(teacher.numerics["kernels"])


# Speed


class Timed:
    """Calls something so often that it takes a while, and tells what one call took."""

    def __init__(self, run: Callable[[], object], device: torch.device, *, seconds: float) -> None:
        self._run, self._device = run, device
        self._calls = 1
        run()  # compiles, and makes what is made once
        self._calls = max(1, round(seconds / self().seconds))

    def __call__(self) -> Pass:
        settled(self._device)
        clock = Clock()
        for _ in range(self._calls):
            self._run()
        settled(self._device)
        whole = clock.passed(0)
        return Pass(0, whole.seconds / self._calls, whole.cpu_seconds / self._calls)


def matrix_product(edge: int, dtype: torch.dtype, device: torch.device) -> Callable[[], object]:
    left, right = (torch.randn(edge, edge, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return lambda: torch.mm(left, right, out=product)


def check(
    name: str, found_WTD: Tensor, peer_WTD: Tensor, reference_WTD: Tensor
) -> dict[str, float]:
    """How far ours and the peer's features lie apart; stops where one of them is wrong.

    The reference is the peer's in float32.
    """
    if found_WTD.dtype == torch.float32:
        told = {"largest": float((found_WTD - reference_WTD).abs().max())}
        assert told["largest"] < LARGEST_DIFFERENCE, (name, told)
        return told
    ours_WT, peers_WT = (
        torch.cosine_similarity(x.float(), reference_WTD, dim=-1) for x in (found_WTD, peer_WTD)
    )
    told = {
        "lowest_cosine": float(ours_WT.min()),
        "mean_cosine": float(ours_WT.mean()),
        "peer_lowest_cosine": float(peers_WT.min()),
        "peer_mean_cosine": float(peers_WT.mean()),
    }
    assert told["lowest_cosine"] > LOWEST_COSINE, (name, told)
    return told


def measure_cell(
    cell: Cell, config: NTv2Config, size: Size, folder: Path, device: torch.device
) -> dict[str, Any]:
    """Every way against the peer and the matrix product, type by type."""
    users = compute_dtype(device)
    dtypes = dict.fromkeys([users, torch.float32] if cell.variants else [users])
    checkpoint = Checkpoint(cell.shape, config, folder, device)
    windows = some_windows(cell.windows, cell.bases // K, device=device)
    flops = flops_per_token(config, tokens=windows.tokens)
    reference_WTD = checkpoint.peer(torch.float32)(windows.token)[:, 1:]
    found = {
        dtype_name(dtype): _measure_dtype(
            checkpoint,
            dtype,
            windows,
            reference_WTD,
            size,
            device,
            flops=flops * windows.token.numel(),
            variants=cell.variants,
        )
        for dtype in dtypes
    }
    return {
        "shape": cell.shape,
        "bases": cell.bases,
        "windows": cell.windows,
        "tokens": windows.tokens,
        "flops_per_token": flops,
        "dtypes": found,
    }


def _measure_dtype(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    windows: Windows,
    reference_WTD: Tensor,
    size: Size,
    device: torch.device,
    *,
    flops: int,
    variants: bool,
) -> dict[str, Any]:
    # Compiled code is kept by shape, and only so much of it.
    torch.compiler.reset()
    checks: dict[str, Any] = {}
    absent: dict[str, str] = {}
    contenders: dict[str, Callable[[], Pass]] = {}

    def timed(run: Callable[[], object]) -> Timed:
        return Timed(run, device, seconds=size.seconds)

    peer = checkpoint.peer(dtype)
    contenders["peer"] = timed(lambda: peer(windows.token))
    peer_WTD = peer(windows.token)[:, 1:]

    def enter(name: str, run: Callable[[], Tensor]) -> None:
        checks[name] = check(name, run(), peer_WTD, reference_WTD)
        contenders[name] = timed(run)

    def of(teacher: NTv2Teacher) -> Callable[[], Tensor]:
        return lambda: teacher.embed(windows.kmer_id, windows.hidden)

    users = checkpoint.ours(dtype)
    enter("ours", of(users))
    if variants:
        other = checkpoint.ours(dtype, compiled=not is_compiled(users))
        if is_compiled(other) == is_compiled(users):
            absent["ours, compiled"] = "could not be compiled here; the log says why"
        else:
            enter("ours, compiled" if is_compiled(other) else "ours, eager", of(other))
        if device.type == "cuda":
            try:
                enter("ours, CUDA graph", replayed(checkpoint.model(), windows, dtype=dtype))
            except RuntimeError as error:  # what a graph cannot hold
                absent["ours, CUDA graph"] = str(error).splitlines()[0]
    contenders["matrix product"] = timed(matrix_product(size.product, dtype, device))
    taken = rounds(contenders, size.rounds)
    product = [2 * size.product**3 / done.seconds for done in taken.pop("matrix product")]
    tokens = windows.token.numel()
    bases = windows.kmer_id.size * K
    ways = {}
    for name, passes in taken.items():
        rivals = list(zip(taken["peer"], passes, strict=True))
        ratio = [peers.seconds / own.seconds for peers, own in rivals]
        share = [flops / own.seconds / peak for own, peak in zip(passes, product, strict=True)]
        median = statistics.median(own.seconds for own in passes)
        ways[name] = {
            "seconds": median,
            "tokens_per_second": tokens / median,
            "bases_per_second": bases / median,
            "minutes_for_genome": GENOME_BASES / (bases / median) / 60,
            "peak_share": statistics.median(share),
            "ratio_eager": statistics.median(ratio),
            # By the processors' own time, which others on the machine take less from.
            "ratio_eager_cpu_seconds": statistics.median(
                peers.cpu_seconds / own.cpu_seconds for peers, own in rivals
            ),
            "range": [min(ratio), max(ratio)],
        }
    return {
        "ways": ways,
        "absent": absent,
        "check": checks,
        "matrix_product_flops": statistics.median(product),
        "kernels": users.numerics["kernels"],
    }


def replayed(model: NTv2, windows: Windows, *, dtype: torch.dtype) -> Callable[[], Tensor]:
    """The compiled model's launches recorded once, and played again for every batch."""
    token = windows.token.clone()
    model = model.to(token.device).compute_in(dtype)
    block = compiled_block(model)

    def features() -> Tensor:
        with torch.inference_mode(), fused_attention(model):
            feat_WTD: Tensor = model(token, run=block)[:, 1:].to(dtype)
        return feat_WTD

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiling and choosing kernels cannot be recorded
        for _ in range(3):
            features()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        feat_WTD = features()
    incoming = windows.token.cpu().pin_memory()

    def play() -> Tensor:
        token.copy_(incoming, non_blocking=True)
        graph.replay()
        return feat_WTD

    return play


# Numerics


def in_batches(teacher: NTv2Teacher, windows: Windows, *, batch: int) -> Tensor:
    """Features in batches of one size, the last filled up as extraction does; float32."""
    count = len(windows.kmer_id)
    feat = []
    for first in range(0, count, batch):
        rows = np.minimum(np.arange(first, first + batch), count - 1)
        feat.append(teacher.embed(windows.kmer_id[rows], windows.hidden[rows]).float())
    return torch.cat(feat)[:count]


def apart(found_WTD: Tensor, expected_WTD: Tensor) -> dict[str, float]:
    cosine_WT = torch.cosine_similarity(found_WTD.double(), expected_WTD.double(), dim=-1)
    return {
        "largest": float((found_WTD - expected_WTD).abs().max()),
        "equal": float((found_WTD == expected_WTD).double().mean()),
        "lowest_cosine": float(cosine_WT.min()),
        "mean_cosine": float(cosine_WT.mean()),
    }


def measure_numerics(
    config: NTv2Config, size: Size, folder: Path, device: torch.device
) -> dict[str, Any]:
    """What else than the windows decides their features, and by how much."""
    torch.compiler.reset()
    checkpoint = Checkpoint(size.numerics_shape, config, folder, device)
    count = size.numerics_windows
    windows = some_windows(count, BASES[0] // K, device=device)
    told: dict[str, Any] = {}
    feat: dict[str, Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        # Compiling takes long: only for the type that users compute in.
        compiling = size.compiled and dtype == compute_dtype(device)
        for compiled in (False, True) if compiling else (False,):
            teacher = checkpoint.ours(dtype, compiled=compiled)
            if is_compiled(teacher) != compiled:
                continue
            name = dtype_name(dtype) + (", compiled" if compiled else "")
            feat[name] = in_batches(teacher, windows, batch=count)
            for batch in dict.fromkeys([1, count // 2 + 1]):
                if dtype == compute_dtype(device):
                    told[f"{name}: batches of {batch} against {count}"] = apart(
                        in_batches(teacher, windows, batch=batch), feat[name]
                    )
    told["bfloat16 against float32"] = apart(feat["bfloat16"], feat["float32"])
    for name in feat:
        if name.endswith(", compiled"):
            eager = name.removesuffix(", compiled")
            told[f"{name} against eager"] = apart(feat[name], feat[eager])
    return {"shape": size.numerics_shape, "windows": count, "found": told}


# All of it


def measure(
    size: Size,
    folder: Path,
    *,
    device: torch.device,
    sections: Sequence[str] = SECTIONS,
    shapes: dict[str, NTv2Config] = SHAPES,
) -> dict[str, Any]:
    result: dict[str, Any] = {"benchmark": "teacher"}
    if "speed" in sections:
        cells = []
        for cell in size.cells:
            cells.append(measure_cell(cell, shapes[cell.shape], size, folder, device))
            gc.collect()
            print(f"  {cell.shape}, {cell.bases:,} bases: done", file=sys.stderr, flush=True)
        users = cells[0]["dtypes"][dtype_name(compute_dtype(device))]["ways"]["ours"]
        result |= {name: users[name] for name in ("tokens_per_second", "peak_share", "ratio_eager")}
        result |= {"of": f"{cells[0]['shape']}, {cells[0]['bases']} bases", "cells": cells}
    if "numerics" in sections:
        result["numerics"] = measure_numerics(shapes[size.numerics_shape], size, folder, device)
    return result | {
        "device": str(device),
        "dtype": dtype_name(compute_dtype(device)),
        "product": size.product,
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
    for cell in result.get("cells", []):
        lines.append(
            f"{cell['shape']}, {cell['bases']:,} bases: {cell['windows']} windows of "
            f"{cell['tokens']:,} tokens, {cell['flops_per_token'] / 1e6:,.1f} MFLOP a token"
        )
        for dtype, found in cell["dtypes"].items():
            lines.append(
                f"  {dtype}, a product of {result['product']}^3 at "
                f"{found['matrix_product_flops'] / 1e12:,.2f} TFLOP/s"
            )
            for name, way in found["ways"].items():
                low, high = way["range"]
                lines.append(
                    f"    {name:<17}{way['tokens_per_second']:>11,.0f} tokens/s"
                    f"{way['bases_per_second'] / 1e6:>9,.3f} Mb/s"
                    f"{way['peak_share']:>8.1%} of peak"
                    f"   x {way['ratio_eager']:.2f} ({low:.2f} to {high:.2f}; "
                    f"by CPU seconds {way['ratio_eager_cpu_seconds']:.2f})"
                    f"   3.1 Gb in {way['minutes_for_genome']:,.0f} min"
                )
            lines += [f"    {name:<17}{why}" for name, why in found["absent"].items()]
            lines += [
                f"    {name:<17}"
                + ", ".join(f"{key.replace('_', ' ')} {x:.3g}" for key, x in told.items())
                for name, told in found["check"].items()
            ]
        lines.append("")
    if "numerics" in result:
        numerics = result["numerics"]
        lines.append(f"numerics of {numerics['shape']}, {numerics['windows']} windows")
        lines += [
            f"  {name}: largest {told['largest']:.3g}, equal {told['equal']:.2%}, "
            f"cosine {told['lowest_cosine']:.7f} at least, {told['mean_cosine']:.7f} in the mean"
            for name, told in numerics["found"].items()
        ]
        lines.append("")
    hardware = result["hardware"]
    lines.append(
        f"{hardware['gpu'] if result['device'] != 'cpu' else hardware['cpu']}, "
        f"{result['threads']} threads, load {hardware['load']:.1f}, "
        f"torch {result['versions']['torch']}, commit {result['commit']}, "
        f"median of {result['rounds']} rounds"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A teacher's forward pass against others.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="under two minutes (the default)")
    how_much.add_argument("--full", action="store_true", help="every shape and length")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written, 3 GB if full")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=SECTIONS)
    parser.add_argument("--shapes", choices=SHAPES, nargs="+", help="of those measured")
    parser.add_argument("--bases", type=int, nargs="+", help="of the lengths measured")
    chosen = parser.parse_args(arguments)
    name = chosen.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    fit_threads()
    size = sizes(full=chosen.full, cuda=device.type == "cuda")
    cells = tuple(
        cell
        for cell in size.cells
        if (not chosen.shapes or cell.shape in chosen.shapes)
        and (not chosen.bases or cell.bases in chosen.bases)
    )
    if not cells:
        parser.error("nothing is left to measure: --full has every shape and length")
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-teacher-", dir=chosen.folder))
    try:
        result = measure(replace(size, cells=cells), folder, device=device, sections=chosen.only)
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
