"""What stage two is asked to do: a recipe and its caches, as run.json says it.

It decides what two calls must have in common to be one run. Nothing here trains anything.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from had_pipe import __version__, run
from had_pipe.cache import Cache
from had_pipe.card import teacher_of
from had_pipe.errors import CacheMismatch, RecipeError
from had_pipe.learner import Learner
from had_pipe.objectives import HADObjective
from had_pipe.order import ORDER_VERSION, whole_weights
from had_pipe.parallel import Place
from had_pipe.recipe import Recipe, Train
from had_pipe.stream import require_alike, require_split
from had_pipe.students import HADConfig, HADModel, kernel
from had_pipe.track import require_trackers


def check_recipe(train: Train, place: Place, *, caches: int) -> None:
    """Refuse what can be refused before anything is begun."""
    if place.rank == 0:
        above = next(folder for folder in (train.out, *train.out.parents) if folder.exists())
        if not above.is_dir():
            raise RecipeError(
                f"[train] out = {train.out}: {above} is not a folder; use another [train] out"
            )
        require_trackers(train.track)
    if train.weights is not None:
        whole_weights(train.weights, caches)
    share, rest = divmod(train.batch, place.world)
    if rest:
        raise RecipeError(
            f"[train] batch = {train.batch}: must be a multiple of the {place.world} processes; "
            "change it or their number"
        )
    if train.micro_batch is not None and share % train.micro_batch:
        raise RecipeError(
            f"[train] micro_batch = {train.micro_batch}: must divide the {share} windows that each "
            f"of the {place.world} processes takes of a batch; change it or their number"
        )


def check_caches(recipe: Recipe, opened: Sequence[Cache]) -> None:
    """Refuse caches that this recipe's student cannot be trained on."""
    require_alike(opened, space=recipe.objective.target)
    for cache in opened:
        require_split(cache, "train")
    wanted, stored = recipe.objective.align_on, opened[0].plan.windows.store
    if stored not in (wanted, "all"):
        serving = "'all'" if wanted == "all" else f"{wanted!r} or 'all'"
        raise CacheMismatch(
            f"{opened[0].path}: windows.store = {stored!r}, but [objective] align_on = {wanted!r} "
            f"needs the embeddings of {wanted} groups; extract with store = {serving}, or set "
            f"align_on = {stored!r}"
        )


def chosen_device(name: str, place: Place) -> torch.device:
    """Where this process computes, as `--device` and its launcher say."""
    count = torch.cuda.device_count()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"--device {name}: must be auto, cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"--device {name}: must be auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise RecipeError(
            f"--device {name}: torch {torch.__version__} sees {count} CUDA devices here; use "
            "--device auto or cpu"
        )
    if device.type == "cpu" or place.world == 1:
        return device
    if device.index is not None:
        raise RecipeError(
            f"--device {name}: each of {place.world} processes takes a device of its own; use "
            "--device cuda"
        )
    # Where a launcher shows each process one device alone, that is its own.
    index = place.local if count > 1 else 0
    if index >= count:
        raise RecipeError(
            f"LOCAL_RANK={index}: torch sees {count} CUDA devices here; start at most one process "
            "for each"
        )
    return torch.device("cuda", index)


def new_learner(recipe: Recipe, caches: Sequence[Cache], device: torch.device) -> Learner:
    """A student that knows nothing yet, and what it will be held to."""
    assert recipe.train is not None
    plan = caches[0].plan
    torch.manual_seed(recipe.train.seed)
    # Made on the CPU, so that every device starts from the same weights.
    student = HADModel(
        HADConfig(
            **recipe.student.model_dump(),
            decoder_heads=recipe.objective.decoder_heads,
            window_bases=plan.windows.bases,
            licence=plan.licence,
            teacher=teacher_of(caches[0]),
        )
    )
    nn.Module.to(student, device)
    mean_D, std_D = torch.tensor(caches[0].mean), torch.tensor(caches[0].std)
    normalised = recipe.objective.target == "normalised"
    objective = HADObjective(
        hidden_size=recipe.student.hidden_size,
        channels=plan.teacher.channels,
        align=recipe.objective.align,
        reconstruct=recipe.objective.reconstruct,
        decoder_heads=recipe.objective.decoder_heads,
        target=recipe.objective.target,
        align_on=recipe.objective.align_on,
        pool=recipe.objective.pool,
        error=recipe.objective.error,
        mask_tokens=recipe.objective.mask_tokens,
        masked=plan.windows.masked,
        mean_D=mean_D if normalised else None,
        std_D=std_D if normalised else None,
    ).to(device)
    return Learner(
        recipe.train,
        recipe.objective,
        student,
        objective,
        visible=plan.windows.kmers - plan.windows.masked,
        device=device,
    )


def described(
    recipe: Recipe,
    caches: Sequence[Cache],
    learner: Learner,
    *,
    device: torch.device,
    processes: int,
) -> dict[str, Any]:
    """run.json: what is learnt from what, and by which means."""
    sections = {
        name: getattr(recipe, name).model_dump(mode="json", exclude={"out"})
        for name in ("student", "objective", "train")
    }
    shape = learner.student.config
    chosen = kernel(
        device,
        heads=shape.gdn_heads,
        key=shape.head_dim,
        value=shape.head_dim * shape.expand_v,
    )
    return {
        "format": run.FORMAT,
        "recipe": sections,
        "order": ORDER_VERSION,
        "caches": [
            {
                "id": cache.id,
                # Never a local path, which would tell of this machine and its user.
                **({} if cache.mirror is None else {"url": cache.mirror.url}),
                "plan": cache.plan.model_dump(mode="json"),
                "fidelity": dict(cache.fidelity),
            }
            for cache in caches
        ],
        "student": {
            "parameters": count_of(learner.student),
            "config": learner.student.config.to_diff_dict(),
        },
        "objective_parameters": count_of(learner.objective),
        "device": _device_name(device),
        "processes": processes,
        "kernel": {"name": chosen.name, "reason": chosen.reason},
        "versions": {
            "had-pipe": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }


def count_of(module: nn.Module) -> int:
    """Its parameters."""
    return sum(parameter.numel() for parameter in module.parameters())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"
