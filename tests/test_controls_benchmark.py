"""benchmarks/controls.py: what students are asked by, against plain NumPy and scikit-learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made, Script
from sklearn.linear_model import LogisticRegression

from had_pipe.dna import kmers
from had_pipe.recipe import Recipe
from had_pipe.students import HADConfig, HADModel
from had_pipe.students.tokenizer import FIRST_BASE, MASK

TINY = {"hidden_size": 32, "layers": 1, "gdn_heads": 1, "head_dim": 16, "expand_v": 1, "mlp": 32}


@pytest.fixture
def bench(script: Script) -> Any:
    return script("controls")


# The maps


def some_features(count: int) -> np.ndarray:
    """Of unequal scales and places, some alike, the last standing still."""
    random = np.random.default_rng(0)
    x_PE = random.normal(size=(count, 6)) @ random.normal(size=(6, 6)) * np.geomspace(1e-3, 1e3, 6)
    return np.concatenate([x_PE + random.normal(size=6), np.full((count, 1), 7.0)], axis=1)


def test_a_ridge_is_least_squares_with_its_penalty_as_so_many_more_rows(bench: Any) -> None:
    x_PE, random = some_features(300), np.random.default_rng(1)
    y_PD = np.tanh(x_PE[:, :3]) + random.normal(size=(300, 3)) + 5
    found = bench.ridge(torch.from_numpy(x_PE[:200]), torch.from_numpy(y_PD[:200]))

    mean_E, std_E = x_PE[:200].mean(axis=0), x_PE[:200].std(axis=0)
    std_E[-1] = 1
    standard_PE = (x_PE - mean_E) / std_E
    penalty_EE = np.sqrt(200 * bench.RIDGE) * np.eye(7)
    rows = np.block([[standard_PE[:200], np.ones((200, 1))], [penalty_EE, np.zeros((7, 1))]])
    wanted = np.concatenate([y_PD[:200], np.zeros((7, 3))])
    solved, *_ = np.linalg.lstsq(rows, wanted, rcond=None)
    expected_PD = standard_PE[200:] @ solved[:-1] + solved[-1]
    np.testing.assert_allclose(found(torch.from_numpy(x_PE[200:])).numpy(), expected_PD, rtol=1e-9)


def test_a_logistic_regression_is_that_of_scikit_learn(bench: Any) -> None:
    x_PE, random = some_features(300), np.random.default_rng(1)
    chance_P4 = np.exp(np.tanh(x_PE[:, :4] / x_PE[:, :4].std(axis=0)) * 2)
    base_P = np.array([random.choice(4, p=p / p.sum()) for p in chance_P4])
    fitted = bench.logistic(torch.from_numpy(x_PE[:200]), torch.from_numpy(base_P[:200]))
    found_P4 = fitted(torch.from_numpy(x_PE[200:])).log_softmax(dim=1).numpy()

    mean_E, std_E = x_PE[:200].mean(axis=0), x_PE[:200].std(axis=0)
    std_E[-1] = 1
    standard_PE = (x_PE - mean_E) / std_E
    other = LogisticRegression(C=1 / (200 * bench.LOGISTIC), tol=1e-9, max_iter=10_000)
    other.fit(standard_PE[:200], base_P[:200])
    expected_P4 = other.predict_log_proba(standard_PE[200:])
    np.testing.assert_allclose(found_P4, expected_P4, rtol=1e-4, atol=1e-5)


# What they are fitted to


@pytest.mark.parametrize("store", ["all", "visible"])
@pytest.mark.parametrize("mask_tokens", ["kept", "dropped"])
def test_features_and_truths_are_those_of_a_loop_over_windows_and_groups(
    bench: Any, made: Made, store: str, mask_tokens: str
) -> None:
    cache = made(windows=32, valid=24, store=store)
    torch.manual_seed(0)
    student = HADModel(HADConfig(**TINY, attention_heads=2)).eval()
    truth = bench.Truth.of(cache, "valid", 20)
    assert [len(batch.kmer_id) for batch in truth.batches] == [16, 4]
    found = bench.features(student, truth.batches, mask_tokens=mask_tokens, device="cpu")

    groups, vectors, bases, letters = [], [], [], []
    for batch in truth.batches:
        for b, kmer_id_T in enumerate(batch.kmer_id.tolist()):
            seen = [t for t in range(len(kmer_id_T)) if not batch.mask[b, t]]
            read, place = [], {}
            for t, kmer_id in enumerate(kmer_id_T):
                codes = ["ACGT".index(letter) for letter in kmers.spell(kmer_id)]
                if t in seen or mask_tokens == "kept":
                    place[t] = len(read)
                    read += [FIRST_BASE + c if t in seen else MASK for c in codes]
                if t not in seen:
                    letters += codes
            with torch.no_grad():
                feat_SE = student(torch.tensor([read])).last_hidden_state[0].double().numpy()
            for number, t in enumerate(seen):
                groups.append(feat_SE[place[t] : place[t] + 6].mean(axis=0))
                vector_D = batch.target[b, t if store == "all" else number].double().numpy()
                vectors.append((vector_D - cache.mean) / cache.std)
            bases += [feat_SE[first : first + 6] for t, first in place.items() if t not in seen]
    np.testing.assert_allclose(found.group_PE.numpy(), np.array(groups), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(truth.emb_PD.numpy(), np.array(vectors), rtol=1e-9)
    assert truth.base_Q.tolist() == letters
    if mask_tokens == "dropped":
        assert found.base_QE is None
    else:
        base_QE = np.concatenate(bases)
        np.testing.assert_allclose(found.base_QE.numpy(), base_QE, rtol=1e-4, atol=1e-6)


def test_figures_of_guesses_are_those_of_plain_numpy(bench: Any, made: Made) -> None:
    cache = made(windows=32, valid=24, store="all")
    truth = bench.Truth.of(cache, "valid", 8)
    random = np.random.default_rng(0)
    guess_PD = random.normal(size=truth.emb_PD.shape)
    wanted_PD = truth.emb_PD.numpy()
    found = truth.about_embeddings(torch.from_numpy(guess_PD))
    assert found["probe_error"] == pytest.approx(((guess_PD - wanted_PD) ** 2).mean())
    a_PD, b_PD = (x * cache.std + cache.mean for x in (guess_PD, wanted_PD))
    lengths_P = np.linalg.norm(a_PD, axis=1) * np.linalg.norm(b_PD, axis=1)
    assert found["probe_cosine"] == pytest.approx(((a_PD * b_PD).sum(axis=1) / lengths_P).mean())

    base_Q = truth.base_Q.numpy()
    logits_Q4 = random.normal(size=(len(base_Q), 4))
    chance_Q4 = np.exp(logits_Q4) / np.exp(logits_Q4).sum(axis=1, keepdims=True)
    told = truth.about_bases(torch.from_numpy(logits_Q4))
    surprise = -np.log(chance_Q4[np.arange(len(base_Q)), base_Q]).mean()
    assert told["probe_cross_entropy"] == pytest.approx(surprise)
    assert told["probe_accuracy"] == pytest.approx((logits_Q4.argmax(axis=1) == base_Q).mean())


# What is made of them


def test_a_difference_is_paired_by_seed_and_told_where_its_interval_leaves_out_none(
    bench: Any,
) -> None:
    # Far from each other by seed, and yet always a little apart.
    apart = bench.difference([1.1, 2.2, 3.3], [1.0, 2.1, 3.1])
    assert apart["values"] == pytest.approx([0.1, 0.1, 0.2])
    assert apart["mean"] == pytest.approx(0.4 / 3)
    # 4.303 of the standard error, which is the deviation over the root of 3.
    assert apart["within"] == pytest.approx(4.303 * np.std([0.1, 0.1, 0.2], ddof=1) / 3**0.5)
    assert not apart["told"]
    assert bench.difference([1.10, 2.11, 3.12], [1.0, 2.0, 3.0])["told"]
    assert not bench.difference([1.1], [1.0])["told"]


def tiny_recipe(path: Path, **objective: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "cache": {"path": path},
            "student": {**TINY, "attention_heads": 2},
            "objective": {"target": "normalised", **objective},
            "train": {"out": path / "run", "steps": 1, "batch": 4},
        }
    )


def test_students_are_asked_alike_and_a_benchmark_that_is_done_trains_no_more(
    bench: Any, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(windows=32, valid=16, store="all")
    size = bench.Size(steps=3, seeds=2, fitted=32, held_out=16, strides=1)
    shipped = {
        "had": tiny_recipe(tmp_path),
        "alignment_only": tiny_recipe(tmp_path, reconstruct=0.0),
        "mask_tokens_dropped": tiny_recipe(tmp_path, mask_tokens="dropped"),
    }
    result = bench.measure(size, tmp_path, shipped, cache, device="cpu")
    assert json.loads(json.dumps(result)) == result
    students = result["students"]
    embeddings, bases = {"probe_error", "probe_cosine"}, {"probe_cross_entropy", "probe_accuracy"}
    own = {"error", "cosine", "cross_entropy", "accuracy"}
    assert set(students["had"]) == own | embeddings | bases
    assert set(students["alignment_only"]) == {"error", "cosine"} | embeddings | bases
    assert set(students["mask_tokens_dropped"]) == own | embeddings
    assert set(students["untrained"]) == embeddings | bases
    for seed in range(2):
        lines = (tmp_path / f"had-3-{seed}" / "metrics.jsonl").read_text().splitlines()
        told = {row["kind"]: row for row in map(json.loads, lines)}
        assert told["validation"]["windows"] == 16
        assert told["validation"]["cosine"] == students["had"]["cosine"]["values"][seed]
    assert result["floors"]["k-mer table"]["error"] == told["floors"]["kmer_align"]
    apart = result["differences"]["untrained"]["probe_error"]["values"]
    errors = (students[name]["probe_error"]["values"] for name in ("untrained", "had"))
    assert apart == [a - b for a, b in zip(*errors, strict=True)]
    shown = bench.table(result)
    assert all(name in shown for name in (*shipped, "untrained", "floor: base frequencies"))

    weights = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/student/*.safetensors")}
    assert len(weights) == 6
    with monkeypatch.context() as patched:
        patched.delattr(bench, "features")  # nobody is asked twice
        again = bench.measure(size, tmp_path, shipped, cache, device="cpu")
    assert again["students"] == students
    fewer = bench.measure(replace(size, fitted=16), tmp_path, shipped, cache, device="cpu")
    assert fewer["students"]["had"]["error"] == students["had"]["error"]
    assert fewer["students"]["had"]["probe_error"] != students["had"]["probe_error"]
    assert weights == {path: path.stat().st_mtime_ns for path in weights}


def test_students_that_start_from_other_weights_are_not_compared(
    bench: Any, made: Made, tmp_path: Path
) -> None:
    cache = made(windows=32, valid=16, store="all")
    size = bench.QUICK
    one, same, other = (
        bench.a_recipe(tiny_recipe(tmp_path, **objective), cache.path, tmp_path, size, seed=seed)
        for objective, seed in (({}, 0), ({"reconstruct": 0.0}, 0), ({}, 1))
    )
    bench.check_start({"had": one, "alignment_only": same}, cache)
    with pytest.raises(AssertionError):
        bench.check_start({"had": one, "other": other}, cache)


def test_recipes_of_other_caches_are_refused(bench: Any, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        bench.main(["had", "teacher_full"])
    assert "teacher_full and had learn from different caches" in capsys.readouterr().err
