"""How fast the student is, and how its memory grows with the sequence.

    python benchmarks/student.py [--quick | --full] [--json] [--device DEVICE]

The student of the defaults, on random bases. A pass forward is without gradients; one of training
is forward, the mean square of the features, and backward. In interleaved rounds stand beside it

    naive        the same student, its recurrence a loop over positions
    fla layer    the same student and weights, its recurrent layers flash-linear-attention's own
                 (CUDA only)

and, beside one of its bidirectional layers, a layer of two Mamba2 mixers as transformers has them
in torch, one each way, as Caduceus has two of Mamba (CPU only; 17% more parameters). First all are
checked: the same features and gradients as the student's, and of Mamba2, which has no equal here,
that its chunks change rounding alone.

Memory is the peak above what the model and its input hold, at growing lengths of one sequence, each
in a fresh process; a length that would not fit into half of what is free is left out, and a line
says so. Growth is the exponent between the last two lengths: 1 is linear. Shown with the
self-attention layer and without it. Half precision on CUDA, as training has it; float32 on a CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import platform
import resource
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from measuring import commit, machine, rounds, settled
from torch import Tensor, nn
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

import had_pipe
from had_pipe.students import HADConfig, HADModel, had, kernel
from had_pipe.students.had import BidirectionalGDN, Direction
from had_pipe.students.tokenizer import FIRST_BASE


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    windows: int
    bases: int
    rounds: int
    forward: tuple[int, ...]
    """Lengths of the growth without gradients, and without self-attention."""
    training: tuple[int, ...]
    attention: tuple[int, ...]
    """Lengths with the self-attention layer, both without and with gradients."""


def sizes(*, full: bool, cuda: bool) -> Size:
    long = tuple(2**n for n in (10, 12, 14, 16, 17))
    if cuda:
        return Size(
            windows=256 if full else 64,
            bases=1020,
            rounds=9 if full else 3,
            forward=long,
            training=long,
            attention=long,
        )
    if full:
        return Size(
            windows=8, bases=1020, rounds=5, forward=long, training=long, attention=long[:3]
        )
    return Size(
        windows=4, bases=510, rounds=3, forward=long, training=long[:3], attention=(1024, 4096)
    )


# Contenders


def recurrence(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, log_decay_BSH: Tensor, beta_BSH: Tensor
) -> Tensor:
    """The rule position by position, in float32: what anyone writes first."""
    B, _, H, K = q_BSHK.shape
    with torch.autocast(q_BSHK.device.type, enabled=False):
        state_BHKV = torch.zeros(B, H, K, v_BSHV.shape[-1], device=q_BSHK.device)
        rows = (t.float().unsqueeze(3).unbind(1) for t in (q_BSHK, k_BSHK, v_BSHV))
        gates = (t.float()[..., None, None].unbind(1) for t in (log_decay_BSH.exp(), beta_BSH))
        read = []
        for q_BH1K, k_BH1K, v_BH1V, a, b in zip(*rows, *gates, strict=True):
            state_BHKV = a * state_BHKV
            state_BHKV = state_BHKV + k_BH1K.mT @ (b * (v_BH1V - k_BH1K @ state_BHKV))
            read.append(q_BH1K @ state_BHKV)
        return torch.stack(read, dim=1).squeeze(3).mul(K**-0.5).to(v_BSHV.dtype)


class BothWays(nn.Module):
    """A layer of two causal mixers, one of which reads from the end."""

    def __init__(self, forwards: nn.Module, backwards: nn.Module) -> None:
        super().__init__()
        self.forwards, self.backwards = forwards, backwards

    def forward(self, x_BSE: Tensor) -> Tensor:
        one, other = self.forwards(x_BSE), self.backwards(x_BSE.flip(1))
        if isinstance(one, tuple):  # flash-linear-attention's layers tell of caches too
            one, other = one[0], other[0]
        return one + other.flip(1)


def fla_layer(layer: BidirectionalGDN, config: HADConfig) -> BothWays:
    """A layer of flash-linear-attention with the weights of one of ours."""
    from fla.layers import GatedDeltaNet

    def of(ours: Direction) -> nn.Module:
        theirs = GatedDeltaNet(
            hidden_size=config.hidden_size,
            expand_v=config.expand_v,
            head_dim=config.head_dim,
            num_heads=config.gdn_heads,
            conv_size=config.conv,
            norm_eps=had.NORM_EPS,
        )
        qk = ours.heads * ours.key
        widths = [qk, qk, ours.heads * ours.value]
        weights = {
            "A_log": ours.A_log,
            "dt_bias": ours.dt_bias,
            "g_proj.weight": ours.gate.weight,
            "o_norm.weight": ours.norm.weight,
            "o_proj.weight": ours.out.weight,
        }
        for name, weight in zip("ab", ours.decay_beta.weight.chunk(2), strict=True):
            weights[f"{name}_proj.weight"] = weight
        for name, weight in zip("qkv", ours.qkv.weight.split(widths), strict=True):
            weights[f"{name}_proj.weight"] = weight
        for name, weight in zip("qkv", ours.conv.squeeze(1).split(widths), strict=True):
            weights[f"{name}_conv1d.weight"] = weight
        theirs.load_state_dict(weights)
        return theirs

    return BothWays(of(layer.forwards), of(layer.backwards))


def mamba2_layer(config: HADConfig, *, chunk: int = 64) -> BothWays:
    """Two Mamba2 mixers about as large as ours; of 32 to 256, 64 positions a chunk are fastest."""
    logging.getLogger("transformers").setLevel(logging.ERROR)  # it names kernels we do without
    settings = Mamba2Config(
        hidden_size=config.hidden_size,
        expand=2,
        num_heads=2 * config.hidden_size // 64,
        head_dim=64,
        state_size=64,
        n_groups=1,
        chunk_size=chunk,
    )
    return BothWays(Mamba2Mixer(settings, layer_idx=0), Mamba2Mixer(settings, layer_idx=0))


@dataclass(frozen=True, kw_only=True)
class Contender:
    """What is timed: a model on its input."""

    model: nn.Module
    given: Tensor
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def features(self) -> Tensor:
        half = torch.autocast(self.given.device.type, torch.bfloat16, enabled=self.given.is_cuda)
        with self.around(), half:
            made = self.model(self.given)
        return made if isinstance(made, Tensor) else made.last_hidden_state

    def run(self, *, training: bool) -> None:
        if not training:
            with torch.no_grad():
                self.features()
            return
        self.features().float().square().mean().backward()
        self.model.zero_grad()

    def seconds(self, *, training: bool) -> float:
        begun = settled(self.given.device)
        self.run(training=training)
        return settled(self.given.device) - begun


def default_student(*, device: torch.device, **settings: Any) -> HADModel:
    torch.manual_seed(0)
    return HADModel(HADConfig(**settings)).to(device)


def random_bases(*, windows: int, bases: int, device: torch.device) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(FIRST_BASE, FIRST_BASE + 4, (windows, bases), generator=random).to(device)


def contenders(
    size: Size, *, device: torch.device
) -> tuple[dict[str, Contender], dict[str, Contender], dict[str, str]]:
    """Whole students, single layers, and why one is missing; all of them checked."""
    ids_BS = random_bases(windows=size.windows, bases=size.bases, device=device)
    student = default_student(device=device)
    config = student.config
    students = {
        "student": Contender(model=student, given=ids_BS),
        "naive": Contender(
            model=student,
            given=ids_BS,
            around=lambda: patch.object(had, "gated_delta_rule", recurrence),
        ),
    }
    missing = {}
    if device.type != "cuda":
        missing["fla layer"] = "flash-linear-attention needs CUDA"
    else:
        try:
            theirs = default_student(device=device)
            theirs.load_state_dict(student.state_dict())
            for at, layer in enumerate(student.layers):
                assert isinstance(layer, BidirectionalGDN)
                theirs.layers[at] = fla_layer(layer, config).to(device)
            contender = Contender(model=theirs, given=ids_BS)
            contender.run(training=True)
            students["fla layer"] = contender
        # It may not be there, refuse the card, or fail in its compiler.
        except Exception as error:
            missing["fla layer"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    # Half precision rounds to 8 bits; fla's products are then in it too.
    tolerance = 5e-2 if device.type == "cuda" else 1e-4
    for name, contender in students.items():
        check(name, contender, students["student"], tolerance=tolerance)

    x_BSE = student.embeddings(ids_BS).detach()
    layers = {"student": Contender(model=student.layers[0], given=x_BSE)}
    if device.type == "cuda":
        missing["mamba2"] = "timed on a CPU only"
    else:
        torch.manual_seed(0)
        mamba = mamba2_layer(config)
        again = mamba2_layer(config, chunk=32)
        again.load_state_dict(mamba.state_dict())
        layers["mamba2"] = Contender(model=mamba, given=x_BSE)
        check("mamba2", Contender(model=again, given=x_BSE), layers["mamba2"], tolerance=tolerance)
    return students, layers, missing


def check(name: str, found: Contender, expected: Contender, *, tolerance: float) -> None:
    """Features, and the gradients of the weights they share, each off by a share of the largest."""
    told = []
    for contender in (found, expected):
        features = contender.features()
        features.float().square().mean().backward()
        gradients = {n: p.grad for n, p in contender.model.named_parameters()}
        told.append({"the features": features.detach(), **gradients})
        contender.model.zero_grad()
    mine, theirs = told
    for what in mine.keys() & theirs.keys():
        a, b = mine[what], theirs[what]
        assert a is not None
        assert b is not None
        error = float((a.float() - b.float()).abs().max() / b.float().abs().max())
        if not error <= tolerance:
            sys.exit(f"student.py: {name} is wrong: {what} off by {error:.2g} of the largest value")


# Memory


def peak(*, attention: bool, training: bool, bases: int, device: str) -> tuple[int, float]:
    """Bytes that a pass over one sequence takes at most, and its seconds; in a fresh process."""
    settings = {} if attention else {"attention_heads": 0}
    where = torch.device(device)
    model = default_student(device=where, **settings)
    # What the first pass alone brings: threads, libraries, compiled kernels, gradients.
    short = random_bases(windows=1, bases=min(bases, 128), device=where)
    Contender(model=model, given=short).run(training=training)
    contender = Contender(model=model, given=random_bases(windows=1, bases=bases, device=where))
    if where.type == "cuda":
        torch.cuda.synchronize(where)
        torch.cuda.reset_peak_memory_stats(where)
        held = torch.cuda.memory_allocated(where)
        seconds = contender.seconds(training=training)
        return torch.cuda.max_memory_allocated(where) - held, seconds
    held = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = contender.seconds(training=training)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held, seconds


def free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


def exponent(peaks: Mapping[int, int]) -> float | None:
    """e of bytes = c length^e between the last two lengths."""
    if len(peaks) < 2:
        return None
    (n, a), (m, b) = sorted(peaks.items())[-2:]
    return math.log(b / a) / math.log(m / n)


def growth(
    lengths: Sequence[int], *, attention: bool, training: bool, device: torch.device
) -> dict[str, Any]:
    """Peaks at growing lengths, as far as memory reaches."""
    peaks: dict[int, int] = {}
    seconds: dict[int, float] = {}
    left_out = []
    for bases in lengths:
        if peaks:
            last = max(peaks)
            if peaks[last] * (bases / last) ** max(1, exponent(peaks) or 1) > free(device) / 2:
                left_out.append(bases)
                continue
        # A fresh process each: what an allocator keeps of one length would hide the next.
        with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
            task = partial(
                peak, attention=attention, training=training, bases=bases, device=str(device)
            )
            peaks[bases], seconds[bases] = pool.submit(task).result()
    return {
        "attention": attention,
        "training": training,
        "bytes": peaks,
        "seconds": seconds,
        "exponent": exponent(peaks),
        "left_out": left_out,
    }


# All of it


def measure(size: Size, *, device: torch.device) -> dict[str, Any]:
    students, layers, missing = contenders(size, device=device)
    bases = size.windows * size.bases
    speed: dict[str, Any] = {}
    for kind, some in (("student", students), ("layer", layers)):
        for training in (False, True):
            timed = {name: partial(c.seconds, training=training) for name, c in some.items()}
            found = rounds(timed, size.rounds)
            speed[f"{kind}, {'training' if training else 'forward'}"] = {
                name: {
                    "bases_per_second": bases / statistics.median(seconds),
                    "ratios": [b / a for a, b in zip(found["student"], seconds, strict=True)],
                }
                for name, seconds in found.items()
            }

    def ratio(kind: str, name: str) -> float | None:
        told = speed[kind].get(name)
        return None if told is None else statistics.median(told["ratios"])

    memory = {
        "forward, no attention": growth(
            size.forward, attention=False, training=False, device=device
        ),
        "training, no attention": growth(
            size.training, attention=False, training=True, device=device
        ),
        "forward": growth(size.attention, attention=True, training=False, device=device),
        "training": growth(size.attention, attention=True, training=True, device=device),
    }
    return {
        "benchmark": "student",
        # Of training; beside one layer of ours in Mamba2's case.
        "ratio_naive": ratio("student, training", "naive"),
        "ratio_fla_layer": ratio("student, training", "fla layer"),
        "ratio_mamba2": ratio("layer, training", "mamba2"),
        "growth": {name: found["exponent"] for name, found in memory.items()},
        "missing": missing,
        "speed": speed,
        "memory": memory,
        "windows": size.windows,
        "bases": size.bases,
        "rounds": size.rounds,
        "kernel": kernel(device).name,
        "parameters": {
            "layer": count(layers["student"].model),
            "mamba2": count(layers["mamba2"].model) if "mamba2" in layers else None,
        },
        "device": str(device),
        "threads": torch.get_num_threads(),
        "versions": {
            "had-pipe": had_pipe.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "hardware": machine(),
        "commit": commit(),
    }


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def table(result: dict[str, Any]) -> str:
    lines = [
        f"{result['windows']} windows of {result['bases']:,} bases on {result['device']}, "
        f"{result['kernel']}, median of {result['rounds']} rounds; x: as fast as the other"
    ]
    for kind, found in result["speed"].items():
        lines.append(kind)
        for name, told in found.items():
            beside = told["ratios"]
            lines.append(
                f"  {name:<12}{told['bases_per_second']:>12,.0f} bases/s"
                + (
                    ""
                    if name == "student"
                    else f"   x {statistics.median(beside):.2f}"
                    f"   ({min(beside):.2f} to {max(beside):.2f})"
                )
            )
    lines += [f"{name}: not timed ({why})" for name, why in result["missing"].items()]
    for name, found in result["memory"].items():
        shown = "not measured" if found["exponent"] is None else f"{found['exponent']:.2f}"
        lines.append(f"memory, {name}: grows with the length to the power of {shown}")
        lines += [
            f"  {bases:>9,} bases{nbytes / 1e6:>12,.1f} MB{found['seconds'][bases]:>10.2f} s"
            for bases, nbytes in found["bytes"].items()
        ]
        lines += [f"  {bases:>9,} bases: not enough memory" for bases in found["left_out"]]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The student's speed and memory.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="under two minutes (the default)")
    how_much.add_argument("--full", action="store_true", help="more windows, rounds and lengths")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    chosen = parser.parse_args(arguments)
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.device(device)
    result = measure(sizes(full=chosen.full, cuda=where.type == "cuda"), device=where)
    print(table(result))
    if chosen.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # as the command has it; read when torch is loaded
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
