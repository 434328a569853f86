"""The controls: each recipe differs from HAD in what it says, and a learner is asked just that."""

from __future__ import annotations

import os
import re
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Made

from had_pipe.cache import Cache
from had_pipe.distill import distill
from had_pipe.dna import kmers
from had_pipe.errors import CacheMismatch, Interrupted
from had_pipe.floors import Floors, Seen
from had_pipe.learner import Learner
from had_pipe.objectives import HADObjective
from had_pipe.progress import Progress
from had_pipe.recipe import Objective, Recipe, Train, read_recipe
from had_pipe.stream import Batch, Stream
from had_pipe.students import HADConfig, HADModel

CONTROLS = REPOSITORY / "pipelines" / "controls"
NAMES = sorted(path.stem for path in CONTROLS.glob("*.toml"))

# As small as a student gets; a control's own key stays.
TINY = {"hidden_size": 32, "layers": 1, "gdn_heads": 1, "head_dim": 16, "expand_v": 1, "mlp": 32}


# The recipes

needs_pipelines = pytest.mark.skipif(
    not CONTROLS.exists(), reason="the pipelines lie in the repository, not in a package"
)


def keys(name: str) -> dict[str, Any]:
    """Every key of a recipe, by table and name; and where its files go apart from that."""
    tables = tomllib.loads((CONTROLS / f"{name}.toml").read_text())
    tables.update({f"genome {i}": genome for i, genome in enumerate(tables.pop("genome"))})
    return {f"[{t}] {key}": value for t, table in tables.items() for key, value in table.items()}


@needs_pipelines
@pytest.mark.parametrize("name", [name for name in NAMES if name != "had"])
def test_a_control_differs_from_had_in_the_one_key_that_its_first_line_names(name: str) -> None:
    first = (CONTROLS / f"{name}.toml").read_text().splitlines()[0]
    said = re.fullmatch(r"# HAD but for (\[\w+\] \w+) = (.+)", first)
    assert said is not None
    had, own = keys("had"), keys(name)
    assert had.keys() == own.keys()
    differing = {key for key in had if had[key] != own[key]}
    # A run has its own folder; a teacher that is asked otherwise has its own cache.
    of_stage_one = said[1].startswith(("[teacher]", "[windows]"))
    assert differing == {said[1], "[train] out"} | ({"[cache] path"} if of_stage_one else set())
    assert own[said[1]] == tomllib.loads(f"value = {said[2]}")["value"]


@needs_pipelines
def test_controls_keep_their_runs_and_caches_apart() -> None:
    recipes = {name: read_recipe(CONTROLS / f"{name}.toml") for name in NAMES}
    outs = {recipe.train.out for recipe in recipes.values() if recipe.train}
    assert len(outs) == len(NAMES)
    stage_one: dict[Path | str, tuple[Any, ...]] = {}
    for recipe in recipes.values():
        made_by = (recipe.teacher, recipe.genome, recipe.windows, recipe.cache)
        assert stage_one.setdefault(recipe.cache.path, made_by) == made_by
    assert len(stage_one) == 2


@needs_pipelines
@pytest.mark.parametrize("name", NAMES)
def test_a_control_trains(name: str, tmp_path: Path, made: Made) -> None:
    recipe = read_recipe(CONTROLS / f"{name}.toml")
    assert recipe.train is not None
    assert recipe.windows is not None
    heads = 2 if recipe.student.attention_heads else 0
    small = Recipe.model_validate(
        {
            "cache": {"path": tmp_path},
            "student": {**TINY, "attention_heads": heads},
            "objective": recipe.objective.model_dump(),
            "train": {"out": tmp_path / "run", "steps": 3, "batch": 4, "validation_windows": 8},
        }
    )
    cache = made(windows=32, valid=8, store=recipe.windows.store)
    found = distill(small, caches=[cache.path])
    assert found.validation is not None
    assert found.floors is not None
    weights = {"align": recipe.objective.align, "reconstruct": recipe.objective.reconstruct}
    assert {term for term in weights if term in found.validation} == {
        term for term, weight in weights.items() if weight
    }
    expected = sum(found.validation[term] * weight for term, weight in weights.items() if weight)
    assert found.validation["loss"] == pytest.approx(expected, rel=1e-5)
    card = (found.student / "README.md").read_text()
    assert f"| cosine of {recipe.objective.align_on} groups |" in card
    assert ("| smooth L1 error of " in card) == (recipe.objective.error == "smooth_l1")
    saved = (found.student / "config.json").read_text()
    assert f'"attention_heads": {heads}' in saved


# What a learner is asked


def a_learner(cache: Cache, *, device: str = "cpu", **objective: Any) -> Learner:
    settings = Objective(**objective)
    windows = cache.plan.windows
    torch.manual_seed(0)
    return Learner(
        Train(out=Path("run"), steps=4, batch=8, seed=5),
        settings,
        HADModel(HADConfig(**TINY, attention_heads=2)).to(device),
        HADObjective(
            hidden_size=32,
            channels=cache.plan.teacher.channels,
            masked=windows.masked,
            **settings.model_dump(include={"align_on", "pool", "error", "mask_tokens"}),
        ).to(device),
        visible=windows.kmers - windows.masked,
        device=torch.device(device),
    )


def batches(*caches: Cache, **settings: Any) -> Iterator[Batch]:
    """Batches of one pass and a bit, of as many windows as all ranks take."""
    with Stream(list(caches), batch=8, seed=1, **settings) as stream:
        for _ in range(6):
            yield next(stream)


@pytest.mark.parametrize("align_on", ["visible", "masked", "all"])
@pytest.mark.parametrize("own", [False, True], ids=["store all", "store these"])
def test_targets_are_those_of_the_groups_aligned_on(made: Made, align_on: str, own: bool) -> None:
    whole = made(windows=32, valid=8, store="all", codec="exact")
    cache = made(windows=32, valid=8, store=align_on if own else "all", codec="exact")
    learner = a_learner(cache, align_on=align_on)
    every = {}
    for batch in batches(whole):
        rows = [row for span in batch.spans for row in span.row.tolist()]
        every.update(dict(zip(rows, batch.target.numpy(), strict=True)))
    for batch in batches(cache):
        seen = learner.seen(batch)
        rows = [row for span in batch.spans for row in span.row.tolist()]
        for i, row in enumerate(rows):
            mask_T = batch.mask[i].tolist()
            groups = [
                t
                for t, masked in enumerate(mask_T)
                if align_on == "all" or masked == (align_on == "masked")
            ]
            assert seen.aligned_BT[i].nonzero()[:, 0].tolist() == groups
            np.testing.assert_array_equal(seen.target_BGD[i].numpy(), every[row][groups])
            assert seen.hidden_BS[i].tolist() == [m for m in mask_T for _ in range(kmers.K)]


def hidden_by_window(learner: Learner, read: Iterator[Batch]) -> dict[tuple[int, ...], list[int]]:
    """The hidden bases of every window, by cache, view and row; the same whenever it comes."""
    found: dict[tuple[int, ...], list[int]] = {}
    for batch in read:
        hidden_BS = learner.seen(batch).hidden_BS
        windows = [(s.cache, s.view, row) for s in batch.spans for row in s.row.tolist()]
        for window, hidden_S in zip(windows, hidden_BS, strict=True):
            bases = hidden_S.nonzero()[:, 0].tolist()
            assert found.setdefault(window, bases) == bases
    return found


def test_single_bases_are_hidden_alike_by_whoever_reads_the_window(made: Made) -> None:
    caches = [made(windows=32, valid=8, views=2, seed=seed) for seed in (0, 1)]
    learner = a_learner(caches[0], masking="base")
    alone = hidden_by_window(learner, batches(*caches))
    windows = caches[0].plan.windows
    for (cache, view, row), bases in alone.items():
        mask = kmers.base_masks(
            seed=5,
            stream=cache * 2**20 + view,
            rows=np.array([row]),
            bases=windows.bases,
            masked=6 * windows.masked,
        )
        assert bases == np.flatnonzero(mask[0]).tolist()
    assert {window[:2] for window in alone} >= {(0, 0), (1, 0)}
    assert len({tuple(bases) for bases in alone.values()}) == len(alone)
    shared: dict[tuple[int, ...], list[int]] = {}
    for rank in range(2):
        shared |= hidden_by_window(learner, batches(*caches, rank=rank, ranks=2))
    assert shared == alone
    later = hidden_by_window(learner, batches(*caches, start=3))
    both = later.keys() & alone.keys()
    assert both
    assert all(later[window] == alone[window] for window in both)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "objective",
    [
        {"masking": "base"},
        {"mask_tokens": "dropped"},
        {"align_on": "masked", "pool": "concat"},
        {"align_on": "all", "pool": "per_base", "error": "smooth_l1"},
    ],
    ids=str,
)
def test_on_a_gpu_a_control_measures_what_a_cpu_does(made: Made, objective: dict[str, str]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    cache = made(windows=32, valid=8, store="all")
    sums = {
        device: a_learner(cache, device=device, **objective).measure(batches(cache, device=device))
        for device in ("cpu", "cuda")
    }
    torch.testing.assert_close(sums["cuda"].cpu(), sums["cpu"], rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize(
    "objective",
    [{"masking": "base"}, {"mask_tokens": "dropped"}, {"pool": "concat", "error": "smooth_l1"}],
    ids=str,
)
def test_a_control_that_was_stopped_goes_on_bit_for_bit(
    tmp_path: Path, made: Made, objective: dict[str, str]
) -> None:
    cache = made(windows=32, valid=8, store="all")

    def run(name: str, **settings: Any) -> bytes:
        recipe = Recipe.model_validate(
            {
                "cache": {"path": cache.path},
                "student": {**TINY, "attention_heads": 2},
                "objective": objective,
                "train": {"out": tmp_path / name, "steps": 6, "batch": 4},
            }
        )
        student = distill(recipe, **settings).student
        return (student / "model.safetensors").read_bytes()

    def stop(progress: Progress) -> None:
        if progress.what == "training" and progress.done == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted):
        run("stopped", report=stop)
    assert run("stopped") == run("straight")


@pytest.mark.parametrize(
    ("store", "align_on", "serving"),
    [
        ("masked", "visible", "'visible' or 'all', or set align_on = 'masked'"),
        ("visible", "masked", "'masked' or 'all', or set align_on = 'visible'"),
        ("visible", "all", "'all', or set align_on = 'visible'"),
        ("masked", "all", "'all', or set align_on = 'masked'"),
    ],
)
def test_a_cache_without_the_groups_aligned_on_is_refused_by_key_and_value(
    tmp_path: Path, made: Made, store: str, align_on: str, serving: str
) -> None:
    cache = made(windows=32, valid=8, store=store)
    recipe = Recipe.model_validate(
        {
            "cache": {"path": cache.path},
            "objective": {"align_on": align_on},
            "train": {"out": tmp_path / "run", "steps": 2, "batch": 4},
        }
    )
    with pytest.raises(CacheMismatch) as refused:
        distill(recipe)
    assert str(refused.value) == (
        f"{cache.path}: windows.store = {store!r}, but [objective] align_on = {align_on!r} needs "
        f"the embeddings of {align_on} groups; extract with store = {serving}"
    )
    assert not (tmp_path / "run").exists()


# What the same figures are without a student


@pytest.mark.parametrize("error", ["mse", "smooth_l1"])
def test_floors_are_of_the_groups_aligned_on_and_the_bases_hidden(error: str) -> None:
    B, T, G, D = 3, 8, 3, 4
    random = np.random.default_rng(0)
    objective = HADObjective(hidden_size=8, channels=D, error=error)
    unit_D = np.array([0.5, 1, 2, 3])

    def a_batch() -> Seen:
        aligned, hidden = np.zeros((B, T), dtype=bool), np.zeros((B, 6 * T), dtype=bool)
        for b in range(B):
            aligned[b, random.permutation(T)[:G]] = True
            hidden[b, random.permutation(6 * T)[:7]] = True
        return Seen(
            kmer_id_BT=torch.from_numpy(random.integers(0, 5, (B, T)) * 300),
            aligned_BT=torch.from_numpy(aligned),
            hidden_BS=torch.from_numpy(hidden),
            target_BGD=torch.from_numpy(random.normal(size=(B, G, D), scale=3)).float(),
        )

    def groups(read: list[Seen]) -> list[tuple[int, np.ndarray]]:
        return [
            (int(seen.kmer_id_BT[b, t]), target_D.double().numpy())
            for seen in read
            for b in range(B)
            for t, target_D in zip(
                np.flatnonzero(seen.aligned_BT[b]), seen.target_BGD[b], strict=True
            )
        ]

    def letters(read: list[Seen], *, hidden_only: bool) -> str:
        return "".join(
            letter
            for seen in read
            for b in range(B)
            for s, letter in enumerate("".join(kmers.spell(int(k)) for k in seen.kmer_id_BT[b]))
            if seen.hidden_BS[b, s] or not hidden_only
        )

    def cost(a_D: np.ndarray, b_D: np.ndarray) -> float:
        away_D = np.abs(a_D - b_D) / unit_D
        if error == "mse":
            return float(np.mean(away_D**2))
        return float(np.mean([a**2 if a < 1 else 2 * a - 1 for a in away_D]))

    def cosine(a_D: np.ndarray, b_D: np.ndarray) -> float:
        return float(a_D @ b_D / np.linalg.norm(a_D) / np.linalg.norm(b_D))

    train, held_out = [a_batch() for _ in range(4)], [a_batch() for _ in range(2)]
    learnt = Floors.learn(train, channels=D, device=torch.device("cpu"))
    unit = torch.from_numpy(unit_D).float()
    found = learnt.measure(held_out, unit_D=unit, error=objective.error)
    mean_D = np.mean([t_D for _, t_D in groups(train)], axis=0)
    table = {
        k: np.mean([t_D for other, t_D in groups(train) if other == k], axis=0)
        for k, _ in groups(train)
    }
    guesses = {
        "mean": [(mean_D, t_D) for _, t_D in groups(held_out)],
        "kmer": [(table.get(k, mean_D), t_D) for k, t_D in groups(held_out)],
    }
    bases, hidden = letters(train, hidden_only=False), letters(held_out, hidden_only=True)
    share = {base: bases.count(base) / len(bases) for base in "ACGT"}
    commonest = max(share, key=lambda base: share[base])
    expected = {
        **{f"{name}_align": np.mean([cost(*pair) for pair in guesses[name]]) for name in guesses},
        **{
            f"{name}_cosine": np.mean([cosine(*pair) for pair in guesses[name]]) for name in guesses
        },
        "base_frequency_accuracy": np.mean([base == commonest for base in hidden]),
        "base_frequency_cross_entropy": np.mean([-np.log(share[base]) for base in hidden]),
        "windows": 2 * B,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5), name


# A student without attention


def test_a_student_without_attention_is_one_whose_attention_says_nothing() -> None:
    torch.manual_seed(0)
    without = HADModel(HADConfig(**TINY, attention_heads=0)).eval()
    with_it = HADModel(HADConfig(**TINY, attention_heads=2)).eval()
    missing, unexpected = with_it.load_state_dict(without.state_dict(), strict=False)
    assert not unexpected
    assert {name.split(".")[0] for name in missing} == {"attention", "attention_norm"}
    ids = torch.randint(7, 11, (2, 30))
    assert with_it.attention is not None
    with torch.no_grad():
        assert not torch.equal(without(ids).last_hidden_state, with_it(ids).last_hidden_state)
        with_it.attention.out.weight.zero_()
        assert torch.equal(without(ids).last_hidden_state, with_it(ids).last_hidden_state)
    default = sum(p.numel() for p in HADModel(HADConfig(attention_heads=0)).parameters())
    assert default == 1_070_512 - 65_536 - 128
