"""HAD beside its two halves, and any other of its controls: what each student came to know.

    python benchmarks/controls.py [--quick | --full] [--steps N] [--seeds N] [--held-out N] [--json]
                                  [--folder DIR] [--cache PATH] [--device DEVICE] [RECIPE ...]

Recipes of pipelines/controls, by name; the first is what the others are held against, by default
had against reconstruction_only and alignment_only. Each is trained by `had-pipe distill`'s own
function, once for every seed: with the same first weights, which is checked, from the same windows
of one cache in the same order, in as many steps. What lies in the folder already, cache, runs,
checkpoints and answers, is gone on with, so that a benchmark that was stopped loses little.

A run measures what it was trained for, so a student of one half has no figures of the other. All
students are therefore asked alike as well, by maps that are fitted to their frozen features, on
training windows, and measured on the held-out windows of the runs' own validation:

    embeddings    ridge regression from a visible group, the mean of its six features, to the
                  teacher's embedding in normalised space: mean squared error there, cosine in the
                  teacher's own
    masked bases  logistic regression from the feature at a masked base to the base: cross-entropy
                  in nats, accuracy

Features are standardised first and both maps have one fixed penalty, so the same is asked of all.
Untrained students of the same seeds tell what the maps do by themselves. Differences from the first
recipe are taken seed by seed: with an interval of 95 % (Student's t) for their mean.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import commit, machine
from torch import Tensor, nn

import had_pipe
from had_pipe.cache import Cache, open_cache
from had_pipe.distill import DistillSummary, distill
from had_pipe.dna.kmers import K
from had_pipe.durable import write_file
from had_pipe.errors import HadPipeError
from had_pipe.extract import extract
from had_pipe.recipe import Recipe, read_recipe
from had_pipe.stream import Batch, first_windows
from had_pipe.students import HADModel, load_student, spell
from had_pipe.students.tokenizer import FIRST_BASE
from had_pipe.task import new_learner

REPOSITORY = Path(__file__).resolve().parents[1]
CONTROLS = REPOSITORY / "pipelines" / "controls"
HALVES = ("had", "reconstruction_only", "alignment_only")
UNTRAINED = "untrained"
TOGETHER = 16
"""Windows handled at once where nothing is trained."""
RIDGE, LOGISTIC = 1e-3, 1e-2
"""Weights of the squared coefficients, beside mean losses of standardised features."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for an interval of 95 %, by degrees of freedom from 1; more seeds take the last."""


@dataclass(frozen=True)
class Size:
    steps: int
    seeds: int
    fitted: int
    """Training windows that maps are fitted to."""
    held_out: int
    strides: int
    """Distance of windows in windows: 1 is the shipped recipes' own cache."""


QUICK = Size(steps=8, seeds=2, fitted=64, held_out=64, strides=10)
FULL = Size(steps=140, seeds=3, fitted=256, held_out=256, strides=1)


# Maps from frozen features

Fitted = Callable[[Tensor], Tensor]


def _standard(feat_PE: Tensor) -> Fitted:
    """To mean 0 and variance 1 of these; a feature that stands still stays at 0."""
    mean_E, std_E = feat_PE.mean(dim=0), feat_PE.std(dim=0, correction=0)
    std_E = torch.where(std_E > 0, std_E, torch.ones_like(std_E))
    return lambda other_PE: (other_PE - mean_E) / std_E


def ridge(feat_PE: Tensor, wanted_PD: Tensor) -> Fitted:
    """The affine map of least mean squared error + RIDGE * squared coefficients, in float64."""
    standard, bias_D = _standard(feat_PE), wanted_PD.mean(dim=0)
    x_PE = standard(feat_PE)
    gram_EE = x_PE.T @ x_PE / len(x_PE) + RIDGE * torch.eye(x_PE.shape[1], dtype=x_PE.dtype)
    map_ED = torch.linalg.solve(gram_EE, x_PE.T @ (wanted_PD - bias_D) / len(x_PE))
    return lambda other_PE: standard(other_PE) @ map_ED + bias_D


def logistic(feat_PE: Tensor, base_P: Tensor) -> Fitted:
    """Logits of least mean cross-entropy + LOGISTIC / 2 * squared coefficients, in float64."""
    standard = _standard(feat_PE)
    x_PE = standard(feat_PE)
    # In these coordinates the loss is about as steep every way: tens of steps, not hundreds.
    spread_E, turn_EE = torch.linalg.eigh(x_PE.T @ x_PE / len(x_PE))
    axis_EE = turn_EE * (spread_E.clamp(min=0) + 4 * LOGISTIC).rsqrt()
    free_E4 = torch.zeros(x_PE.shape[1], 4, dtype=x_PE.dtype, requires_grad=True)
    bias_4 = torch.zeros(4, dtype=x_PE.dtype, requires_grad=True)
    free = [free_E4, bias_4]
    optimiser = torch.optim.LBFGS(
        free,
        max_iter=1000,
        tolerance_grad=1e-7,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimiser.zero_grad()
        map_E4 = axis_EE @ free_E4
        fit = F.cross_entropy(x_PE @ map_E4 + bias_4, base_P)
        whole: Tensor = fit + LOGISTIC / 2 * map_E4.square().sum()
        whole.backward()
        return whole

    optimiser.step(loss)
    loss()
    # The loss is convex: where it is flat it is least.
    steepest = max(float(part.grad.abs().max()) for part in free if part.grad is not None)
    assert steepest < 1e-5, f"the regression has not come to its end: its slope is {steepest:.1e}"
    found_E4: Tensor = axis_EE @ free_E4.detach()
    return lambda other_PE: standard(other_PE) @ found_E4 + bias_4.detach()


@dataclass(frozen=True, kw_only=True)
class Truth:
    """What is asked about some windows: P visible groups, Q masked bases."""

    batches: Sequence[Batch]
    emb_PD: Tensor
    """float64, normalised by these:"""
    mean_D: Tensor
    std_D: Tensor
    base_Q: Tensor

    @staticmethod
    def of(cache: Cache, split: str, windows: int) -> Truth:
        mean_D, std_D = (torch.tensor(a, dtype=torch.float64) for a in (cache.mean, cache.std))
        batches, embs, bases = [], [], []
        for batch in first_windows([cache], split=split, windows=windows, batch=TOGETHER):
            whole = batch.target.shape[1] == batch.mask.shape[1]
            emb_PD = batch.target[~batch.mask] if whole else batch.target.flatten(0, 1)
            base_BS = spell(batch.kmer_id, torch.zeros_like(batch.mask)) - FIRST_BASE
            batches.append(batch)
            embs.append((emb_PD.double() - mean_D) / std_D)
            bases.append(base_BS[_masked_bases(batch)])
        return Truth(
            batches=batches,
            emb_PD=torch.cat(embs),
            mean_D=mean_D,
            std_D=std_D,
            base_Q=torch.cat(bases),
        )

    def about_embeddings(self, guess_PD: Tensor) -> dict[str, float]:
        """Of guesses in normalised space."""
        there_PD, here_PD = (emb * self.std_D + self.mean_D for emb in (guess_PD, self.emb_PD))
        return {
            "probe_error": float((guess_PD - self.emb_PD).square().mean()),
            "probe_cosine": float(F.cosine_similarity(there_PD, here_PD, dim=1).mean()),
        }

    def about_bases(self, logits_Q4: Tensor) -> dict[str, float]:
        right_Q = logits_Q4.argmax(dim=1) == self.base_Q
        return {
            "probe_cross_entropy": float(F.cross_entropy(logits_Q4, self.base_Q)),
            "probe_accuracy": float(right_Q.double().mean()),
        }


@dataclass(frozen=True)
class Features:
    """What a student has of them, float64."""

    group_PE: Tensor
    base_QE: Tensor | None
    """None of a student that reads no masked bases."""


@torch.no_grad()
def features(
    student: HADModel, batches: Iterable[Batch], *, mask_tokens: str, device: str
) -> Features:
    """Frozen features of windows, from what such a student reads of them."""
    groups, bases = [], []
    for batch in batches:
        ids, masked_BS = spell(batch.kmer_id, batch.mask), _masked_bases(batch)
        dropped = mask_tokens == "dropped"
        if dropped:
            ids = ids[~masked_BS].view(len(ids), -1)
        feat_BSE = student(ids.to(device)).last_hidden_state.double().cpu()
        group_BGE = feat_BSE.unflatten(1, (-1, K)).mean(dim=2)
        groups.append(group_BGE.flatten(0, 1) if dropped else group_BGE[~batch.mask])
        if not dropped:
            bases.append(feat_BSE[masked_BS])
    return Features(torch.cat(groups), torch.cat(bases) if bases else None)


def _masked_bases(batch: Batch) -> Tensor:
    return batch.mask.repeat_interleave(K, dim=1)


def probe(known: Truth, to_fit: Features, truth: Truth, held_out: Features) -> dict[str, float]:
    """Figures of maps on held-out windows, fitted to what is known of others."""
    guess_PD = ridge(to_fit.group_PE, known.emb_PD)(held_out.group_PE)
    found = truth.about_embeddings(guess_PD)
    if to_fit.base_QE is not None and held_out.base_QE is not None:
        logits_Q4 = logistic(to_fit.base_QE, known.base_Q)(held_out.base_QE)
        found |= truth.about_bases(logits_Q4)
    return found


# Runs


def a_recipe(shipped: Recipe, cache: Path, out: Path, size: Size, *, seed: int) -> Recipe:
    """A shipped recipe's stage two, with what is the same for all of one benchmark."""
    assert shipped.train is not None
    train = {
        **shipped.train.model_dump(),
        "out": out,
        "seed": seed,
        "steps": size.steps,
        "warmup": size.steps // 10,
        "validate_every": size.steps,
        "validation_windows": size.held_out,
        "checkpoint_every": 50,
    }
    return Recipe.model_validate(
        {
            "cache": {"path": cache},
            "student": shipped.student.model_dump(),
            "objective": shipped.objective.model_dump(),
            "train": train,
        }
    )


def make_cache(shipped: Recipe, folder: Path, size: Size, *, device: str) -> Path:
    """The recipe's cache, or one of every so many of its windows, made in the folder once."""
    assert shipped.windows is not None
    path = folder / "cache"
    windows, cache = shipped.windows, shipped.cache
    stride = size.strides * windows.stride
    asked = {
        "windows": windows.model_copy(update={"stride": stride}),
        "cache": cache.model_copy(update={"path": path}),
    }
    extract(shipped.model_copy(update=asked), device=device)
    return path


def first_student(recipe: Recipe, cache: Cache, *, device: str) -> HADModel:
    """What a run starts from, before it has learnt anything."""
    student = new_learner(recipe, [cache], torch.device(device)).student
    nn.Module.eval(student)
    return student


def check_start(recipes: Mapping[str, Recipe], cache: Cache) -> None:
    """Stop unless students of one layout start from the same weights."""
    first, *others = recipes.values()
    there = first_student(first, cache, device="cpu").state_dict()
    for other in others:
        if other.student == first.student:
            here = first_student(other, cache, device="cpu").state_dict()
            assert there.keys() == here.keys()
            assert all(torch.equal(there[key], here[key]) for key in there)


OWN = {
    "error": "align",
    "cosine": "cosine",
    "cross_entropy": "reconstruct",
    "accuracy": "accuracy",
}
"""Figures of a run's validation, by their names here."""
FLOORS = {
    "the mean": {"error": "mean_align", "cosine": "mean_cosine"},
    "k-mer table": {"error": "kmer_align", "cosine": "kmer_cosine"},
    "base frequencies": {
        "cross_entropy": "base_frequency_cross_entropy",
        "accuracy": "base_frequency_accuracy",
    },
}


def own_figures(done: DistillSummary) -> dict[str, float]:
    """What a run measured of itself on held-out windows."""
    validation = done.validation
    assert validation is not None, "the cache holds nothing out"
    return {name: validation[key] for name, key in OWN.items() if key in validation}


def floors_of(done: DistillSummary) -> dict[str, dict[str, float]]:
    floors = done.floors
    assert floors is not None
    return {
        name: {figure: floors[key] for figure, key in figures.items()}
        for name, figures in FLOORS.items()
    }


# What they came to


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Mean over seeds and standard deviation of single runs; of one seed there is none."""
    spread = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.mean(values), "std": spread, "values": list(values)}


def difference(values: Sequence[float], first: Sequence[float]) -> dict[str, Any]:
    """Paired, seed by seed; `within` is half the 95 % interval of the mean."""
    apart = [a - b for a, b in zip(values, first, strict=True)]
    found = summary(apart)
    count = len(apart)
    if count < 2:
        return {**found, "within": None, "told": False}
    within = T_95[min(count - 1, len(T_95)) - 1] * found["std"] / math.sqrt(count)
    return {**found, "within": within, "told": abs(found["mean"]) > within}


def measure(
    size: Size, folder: Path, shipped: Mapping[str, Recipe], cache: Cache, *, device: str
) -> dict[str, Any]:
    """Train what is not trained yet, then ask all students alike."""
    first = next(iter(shipped))
    known, truth = Truth.of(cache, "train", size.fitted), Truth.of(cache, "valid", size.held_out)

    def asked(student: HADModel, out: Path, *, mask_tokens: str = "kept") -> dict[str, float]:
        """What it answers, kept in its folder: to ask costs as much as some dozen steps."""
        kept, about = out / "asked.json", [cache.id, size.fitted, size.held_out, RIDGE, LOGISTIC]
        if kept.exists():
            told = json.loads(kept.read_text())
            if told["about"] == about:
                return dict(told["answers"])
        read = {"mask_tokens": mask_tokens, "device": device}
        to_fit, held_out = (features(student, t.batches, **read) for t in (known, truth))
        answers = probe(known, to_fit, truth, held_out)
        write_file(kept, json.dumps({"about": about, "answers": answers}).encode(), aside=folder)
        return answers

    found: dict[str, list[dict[str, float]]] = {name: [] for name in (*shipped, UNTRAINED)}
    floors: dict[str, dict[str, float]] = {}
    for seed in range(size.seeds):
        recipes = {
            name: a_recipe(
                recipe, cache.path, folder / f"{name}-{size.steps}-{seed}", size, seed=seed
            )
            for name, recipe in shipped.items()
        }
        check_start(recipes, cache)
        for name, recipe in recipes.items():
            done = distill(recipe, device=device)
            if name == first:
                floors = floors_of(done)
            student = load_student(done.student, device=device)
            figures = own_figures(done)
            figures |= asked(student, done.run, mask_tokens=recipe.objective.mask_tokens)
            found[name].append(figures)
            _say(f"seed {seed}, {name}", figures)
        out = folder / f"{UNTRAINED}-{first}-{seed}"
        out.mkdir(exist_ok=True)
        found[UNTRAINED].append(asked(first_student(recipes[first], cache, device=device), out))
        _say(f"seed {seed}, {UNTRAINED}", found[UNTRAINED][-1])
    values = {
        name: {figure: [one[figure] for one in runs] for figure in runs[0]}
        for name, runs in found.items()
    }
    return {
        "benchmark": "controls",
        "first": first,
        "students": {
            name: {figure: summary(some) for figure, some in figures.items()}
            for name, figures in values.items()
        },
        "differences": {
            name: {
                figure: difference(some, values[first][figure])
                for figure, some in figures.items()
                if figure in values[first]
            }
            for name, figures in values.items()
            if name != first
        },
        "floors": floors,
        "size": asdict(size),
        "windows": {split: cache.rows(split) for split in cache.plan.splits},
        "cache": cache.id,
        "device": device,
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


def _say(who: str, figures: Mapping[str, float]) -> None:
    told = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    print(f"{who}: {told}", file=sys.stderr, flush=True)


TABLES = {
    "The teacher's embeddings of visible groups": ("error", "cosine"),
    "Masked bases": ("cross_entropy", "accuracy"),
}


def table(result: dict[str, Any]) -> str:
    size, first = result["size"], result["first"]
    lines = [
        f"{size['steps']} steps, {size['seeds']} seeds; maps fitted to {size['fitted']} windows, "
        f"{size['held_out']} held out; cache {result['cache'][:12]}",
    ]

    def cell(found: Mapping[str, Any], figure: str) -> str:
        if figure not in found:
            return f"{'-':>20}"
        mean, spread = found[figure]["mean"], found[figure]["std"]
        return f"{mean:.4f}" + (" " * 9 if spread is None else f" ± {spread:.4f}")

    for title, figures in TABLES.items():
        columns = [(way, figure) for way in ("", "probe_") for figure in figures]
        lines += ["", title + ", mean ± standard deviation over seeds", ""]
        heads = ["of the map" if way else "of the run" for way, _ in columns]
        for heading in (heads, [figure.replace("_", "-") for _, figure in columns]):
            lines.append(f"{'':<24}" + "".join(f"{text:>20}" for text in heading))
        for name, found in result["students"].items():
            cells = "".join(f"{cell(found, way + figure):>20}" for way, figure in columns)
            lines.append(f"{name:<24}{cells}")
        for name, found in result["floors"].items():
            if figures[0] in found:
                cells = "".join(f"{found[figure]:>20.4f}" for figure in figures)
                lines.append(f"{'floor: ' + name:<24}{cells}")
    lines += ["", f"Differences from {first}, seed by seed; an interval of 95 % for the mean", ""]
    for name, figures in result["differences"].items():
        for figure, apart in figures.items():
            within = "" if apart["within"] is None else f" ± {apart['within']:.4f}"
            verdict = "" if apart["told"] else "   not told apart"
            lines.append(f"{name:<24}{figure:<22}{apart['mean']:+.4f}{within}{verdict}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="HAD beside its halves and other controls.")
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--quick", action="store_true", help="that it runs (the default)")
    how_much.add_argument("--full", action="store_true", help="the shipped recipes' steps")
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="of pipelines/controls")
    parser.add_argument("--steps", type=int, help="of each training")
    parser.add_argument("--seeds", type=int, help="trainings of each recipe")
    parser.add_argument("--held-out", type=int, help="windows that are measured on")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where caches and runs are kept")
    parser.add_argument("--cache", type=Path, help="one that is there, of the recipes' teacher")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    chosen = parser.parse_args(arguments)
    names = chosen.recipes or HALVES
    known = sorted(path.stem for path in CONTROLS.glob("*.toml"))
    if unknown := [name for name in names if name not in known]:
        parser.error(f"unknown recipe {unknown[0]}: known are {', '.join(known)}")
    shipped = {name: read_recipe(CONTROLS / f"{name}.toml") for name in names}
    first = shipped[names[0]]
    for name, recipe in shipped.items():
        if (recipe.teacher, recipe.windows) != (first.teacher, first.windows):
            parser.error(f"{name} and {names[0]} learn from different caches")
    device = chosen.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    size = FULL if chosen.full else QUICK
    size = replace(
        size,
        steps=chosen.steps or size.steps,
        seeds=chosen.seeds or size.seeds,
        held_out=chosen.held_out or size.held_out,
    )
    which = "full" if chosen.full else "quick"
    folder = chosen.folder or REPOSITORY / "runs" / "benchmarks" / f"controls-{which}"
    try:
        path = chosen.cache or make_cache(first, folder, size, device=device)
        with open_cache(path) as cache:
            result = measure(size, folder, shipped, cache, device=device)
    except HadPipeError as error:
        raise SystemExit(f"{error}\nThe same command goes on from what lies in {folder}") from error
    print(table(result))
    if chosen.json:
        print(json.dumps(result))


if __name__ == "__main__":
    if "OMP_WAIT_POLICY" not in os.environ:  # as the command has it; read when torch is loaded
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.execv(sys.executable, [sys.executable, *sys.argv])
    main()
