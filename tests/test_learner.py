"""What learns: in portions as in one piece, and with its moving average beside it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from small_cache import build_cache

from had_pipe import checkpoint
from had_pipe.cache import Cache
from had_pipe.distill import distill
from had_pipe.errors import Interrupted, RecipeError
from had_pipe.held_out import HeldOut
from had_pipe.learner import Gradient, Learner
from had_pipe.parallel import ALONE
from had_pipe.progress import silent
from had_pipe.recipe import Recipe
from had_pipe.run import read_metrics
from had_pipe.signals import Signals
from had_pipe.stream import Stream
from had_pipe.task import new_learner

CPU = torch.device("cpu")
train = partial(distill, device="cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("caches") / "one", windows=96, part=32, views=2)


def a_recipe(
    cache: Path, out: Path, *, objective: dict[str, Any] | None = None, **train: Any
) -> Recipe:
    return Recipe.model_validate(
        {
            "cache": {"path": cache},
            "student": {
                "hidden_size": 32,
                "layers": 1,
                "gdn_heads": 2,
                "head_dim": 16,
                "expand_v": 1,
                "attention_heads": 2,
                "mlp": 32,
            },
            "objective": objective or {},
            "train": {
                "out": out,
                "steps": 6,
                "batch": 8,
                "lr": 2e-3,
                "warmup": 2,
                "log_every": 3,
                "validate_every": 6,
                "checkpoint_every": 3,
                "validation_windows": 16,
                **train,
            },
        }
    )


def one_gradient(recipe: Recipe, cache: Path) -> tuple[Learner, Gradient]:
    """Of a fresh learner on the first batch."""
    with Cache.open(cache) as opened:
        learner = new_learner(recipe, [opened], CPU)
        with Stream([opened], batch=8, seed=0) as stream:
            learner.learn(1, next(stream))
    return learner, learner.gradient(ALONE.average)


@pytest.mark.parametrize(("windows", "masking"), [(1, "base"), (2, "group")])
def test_portions_add_up_to_the_whole_batch(
    tmp_path: Path, cache: Path, windows: int, masking: str
) -> None:
    objective = {"masking": masking}
    whole, asked = one_gradient(a_recipe(cache, tmp_path, objective=objective), cache)
    recipe = a_recipe(cache, tmp_path, objective=objective, micro_batch=windows)
    parts, found = one_gradient(recipe, cache)
    torch.testing.assert_close(found.terms, asked.terms, rtol=1e-5, atol=1e-6)
    for a, b in ((whole.student, parts.student), (whole.objective, parts.objective)):
        for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
            assert p.grad is not None
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_student_never_sees_more_windows_at_once_than_a_portion(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    losses = Learner._losses

    def counting(self: Learner, batch: Any) -> Any:
        seen.append(len(batch.kmer_id))
        return losses(self, batch)

    monkeypatch.setattr(Learner, "_losses", counting)
    train(a_recipe(cache, tmp_path / "run", steps=2, warmup=1, micro_batch=2))
    # Four portions of a batch of 8, twice, and 16 held-out windows.
    assert seen == [2] * (4 + 4 + 8)


def test_portions_that_do_not_divide_a_batch_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch = 3: must divide batch = 8"):
        a_recipe(Path("cache"), Path("run"), micro_batch=3)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> Path:
    """A run with a moving average and every checkpoint kept."""
    run = tmp_path_factory.mktemp("runs") / "averaged"
    train(a_recipe(cache, run, ema=0.37, checkpoint_every=1, keep=100))
    return run


def test_the_average_is_a_recurrence_over_all_weights_and_is_what_is_published_and_measured(
    tmp_path: Path, cache: Path, averaged: Path
) -> None:
    recipe = a_recipe(cache, tmp_path)
    assert recipe.train is not None
    saved = checkpoint.checkpoints(averaged / "checkpoints")[::-1]
    assert len(saved) == 6
    published = safetensors.torch.load_file(averaged / "student" / "model.safetensors")
    with Cache.open(cache) as opened:
        learner = new_learner(recipe, [opened], CPU)
        modules = {"student": learner.student, "objective": learner.objective}
        for group, module in modules.items():
            mean = {name: p.detach().double().numpy() for name, p in module.named_parameters()}
            for t, path in enumerate(saved, start=1):
                # It warms up: 2/11, 3/12, 4/13, 5/14, and then what was asked for.
                decay = min(0.37, (1 + t) / (10 + t))
                weights = safetensors.torch.load_file(path / f"{group}.safetensors")
                for name in mean:
                    now = weights[name].double().numpy()
                    mean[name] = decay * mean[name] + (1 - decay) * now
            state = module.state_dict()
            state |= {name: torch.from_numpy(array).float() for name, array in mean.items()}
            module.load_state_dict(state)
            prefix = {"student": "had.", "objective": ""}[group]
            shown = {name for name in mean if prefix + name in published}
            assert shown == {name for name in mean if not name.startswith("projection.")}
            for name in shown:
                found = published[prefix + name].numpy()
                np.testing.assert_allclose(found, mean[name], rtol=1e-5, atol=1e-7)
        with Signals() as signals:
            held_out = HeldOut(
                recipe.train, [opened], CPU, processes=ALONE, signals=signals, report=silent
            )
            *sums, windows = held_out.measure(learner).tolist()
    told = [line for line in read_metrics(averaged) if line["kind"] == "validation"][-1]
    assert told["windows"] == windows == 16
    for term, mean_of in learner.named([x / windows for x in sums]).items():
        assert told[term] == pytest.approx(mean_of, rel=1e-5), term


def test_an_average_changes_nothing_that_is_learnt(
    tmp_path: Path, cache: Path, averaged: Path
) -> None:
    train(a_recipe(cache, tmp_path / "run"))
    # Portions and what is kept may change within a run: what is learnt does not depend on them.
    assert train(a_recipe(cache, tmp_path / "run", micro_batch=4, keep=1)).already_done
    for name in ("student.safetensors", "objective.safetensors", "optimiser.safetensors"):
        files = [
            checkpoint.checkpoints(run / "checkpoints")[0] / name
            for run in (averaged, tmp_path / "run")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
    published = [
        (run / "student" / "model.safetensors").read_bytes() for run in (averaged, tmp_path / "run")
    ]
    assert published[0] != published[1]


def test_a_run_with_an_average_goes_on_bit_for_bit(
    tmp_path: Path, cache: Path, averaged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = a_recipe(cache, tmp_path / "run", ema=0.37, checkpoint_every=1, keep=100)
    learn = Learner.learn

    def stopped(self: Learner, step: int, batch: Any) -> None:
        if step == 4:
            raise Interrupted("enough")
        learn(self, step, batch)

    with monkeypatch.context() as patched:
        patched.setattr(Learner, "learn", stopped)
        with pytest.raises(Interrupted, match="enough"):
            train(recipe)
    train(recipe)
    for name in ("average", "student", "objective", "optimiser"):
        files = [
            checkpoint.checkpoints(run / "checkpoints")[0] / f"{name}.safetensors"
            for run in (averaged, tmp_path / "run")
        ]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    students = [run / "student" / "model.safetensors" for run in (averaged, tmp_path / "run")]
    assert students[0].read_bytes() == students[1].read_bytes()


def test_as_many_checkpoints_are_kept_as_asked_for(tmp_path: Path, cache: Path) -> None:
    train(a_recipe(cache, tmp_path / "run", checkpoint_every=1, keep=3))
    saved = checkpoint.checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in saved] == ["step-00000006", "step-00000005", "step-00000004"]
    with pytest.raises((RecipeError, ValueError), match="keep"):
        a_recipe(cache, tmp_path / "run", keep=0)
