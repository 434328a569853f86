"""The script that trains and measures the demo's teacher: its pieces against plain loops."""

from __future__ import annotations

import importlib.util
import math
import sys
import tomllib
from itertools import product
from types import ModuleType

import numpy as np
import pytest
import torch
from conftest import ECOLI, REPOSITORY

from had_pipe.dna.kmers import spell

DEMO = REPOSITORY / "pipelines" / "demo"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_teacher", DEMO / "train_teacher.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_teacher"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_training_holds_out_what_the_demo_recipe_holds_out(script: ModuleType) -> None:
    recipe = tomllib.loads((DEMO / "demo.toml").read_text())
    assert recipe["genome"][0]["splits"] == script.ECOLI_SPLITS
    assert recipe["windows"].get("seed", 0) == script.ECOLI_SEED
    pieces = script.ecoli_pieces(ECOLI)
    length = {split: sum(map(len, found)) for split, found in pieces.items()}
    assert sum(length.values()) == 4_639_675
    assert length["valid"] == 9 * 50_000


def test_windows_are_pure_and_inside_one_piece(script: ModuleType) -> None:
    piece = np.tile(np.array([0, 1, 2, 3, 0, 0], dtype=np.uint8), 30)
    piece[90] = 4
    source = script.Source("s", (piece, piece[:12]))
    kmer_id_WT = source.windows(np.random.default_rng(0), windows=50, kmers=5)
    allowed = "ACGTAA" * 12 + "."
    other = "".join("TGCA"["ACGT".index(b)] for b in reversed("ACGTAA" * 12))
    for row in kmer_id_WT:
        text = "".join(spell(int(k)) for k in row)
        assert text in allowed or text in other


def test_kmer_frequency_counts_both_strands_and_skips_n(script: ModuleType) -> None:
    piece = np.array([0, 0, 0, 0, 0, 1, 4, 3, 3, 3, 3, 3, 3], dtype=np.uint8)
    frequency = script.kmer_frequency(script.Source("s", (piece,)))
    seen = {spell(i): round(f / frequency.min()) - 1 for i, f in enumerate(frequency)}
    assert {k: v for k, v in seen.items() if v} == {
        "AAAAAC": 1,
        "GTTTTT": 1,
        "TTTTTT": 1,
        "AAAAAA": 1,
    }


def test_a_table_of_parts_sums_bases_pairs_triplets_and_the_kmer(script: ModuleType) -> None:
    torch.manual_seed(0)
    table = script.SumOfParts(8, std=1.0, seed=0)
    with torch.no_grad():
        table.own.normal_()
        rows = table()
    vocabulary = ["".join(word) for word in product("ATCG", repeat=6)]
    order = [
        (at, "".join(word))
        for width in (1, 2, 3)
        for at in range(6 - width + 1)
        for word in product("ACGT", repeat=width)
    ]
    part = {name: table.part[i] for i, name in enumerate(order)}
    for text in ("AAAAAA", "ACGTAC", "TTGCAG"):
        expected = table.own[int("".join(str("ACGT".index(b)) for b in text), 4)].clone()
        for width in (1, 2, 3):
            for at in range(6 - width + 1):
                expected = expected + part[at, text[at : at + width]]
        assert torch.allclose(rows[6 + vocabulary.index(text)], expected, atol=1e-5)
    assert torch.equal(rows[2], table.special[2])
    assert rows.shape == (4107, 8)


def test_heads_begin_by_looking_at_their_neighbour(script: ModuleType) -> None:
    trainee = script.Trainee(torch.zeros(4096), seed=0)
    head_dim = script.CONFIG.head_dim
    cos, sin = script.rotary_tables(30, head_dim, torch.device("cpu"))
    for layer, offsets in script.NEIGHBOURS.items():
        bias = trainee.model.blocks[layer].qkv.bias.detach().view(3, -1, head_dim)
        for head, offset in enumerate(offsets):
            turned = []
            for vector in bias[:2, head]:
                first, second = vector[: head_dim // 2], vector[head_dim // 2 :]
                number = torch.complex(first, second) * torch.complex(cos[:, 0], sin[:, 0])
                turned.append(number)
            score = (turned[0][:, None] * turned[1][None].conj()).real.sum(dim=-1)
            if offset is None:
                assert torch.equal(score, torch.zeros(30, 30))
            else:
                middle = torch.arange(5, 25)
                assert torch.equal(score[middle].argmax(dim=1), middle + offset)


def test_hidden_kmers_are_hidden_and_their_number_is_fixed(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    kmer_id_WT = rng.integers(0, 4096, (7, 40)).astype(np.uint16)
    batch = script.hide(kmer_id_WT, rng)
    assert batch.masked_WT.sum(dim=1).tolist() == [6] * 7
    assert bool((batch.token_id_WT[batch.masked_WT] == 2).all())
    assert bool((batch.token_id_WT[:, 0] == 3).all())
    token = torch.from_numpy(script.TOKEN_OF_KMER[kmer_id_WT])
    masked = batch.masked_WT[:, 1:]
    assert torch.equal(batch.token_id_WT[:, 1:][~masked], token[~masked])
    assert torch.equal(batch.answer_M + 6, token[masked])


def test_the_plain_model_has_the_loss_of_the_one_that_was_trained(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    trainee = script.Trainee(torch.from_numpy(rng.normal(-8, 1, 4096)).float(), seed=0)
    with torch.no_grad():
        trainee.outputs.part.normal_(std=0.3)
        trainee.outputs.own.normal_(std=0.3)
    batch = script.hide(rng.integers(0, 4096, (4, 30)).astype(np.uint16), rng)
    with torch.inference_mode():
        loss = trainee(batch.token_id_WT, batch.masked_WT, batch.answer_M).item()
    by_teacher = script.teacher_losses(trainee.plain().eval(), batch)
    # The shipped softmax is over the whole vocabulary, in which only k-mers have a share.
    assert by_teacher.mean() == pytest.approx(loss, abs=1e-4)


def test_the_markov_model_equals_a_loop_over_every_candidate(script: ModuleType) -> None:
    rng = np.random.default_rng(0)
    piece = rng.choice(4, size=3_000, p=[0.4, 0.1, 0.2, 0.3]).astype(np.uint8)
    source = script.Source("s", (piece,))
    count: dict[tuple[int, ...], int] = {}
    for strand in (piece, 3 - piece[::-1]):
        for i in range(len(strand) - 5):
            word = tuple(int(b) for b in strand[i : i + 6])
            count[word] = count.get(word, 0) + 1

    def chance(context: tuple[int, ...], base: int) -> float:
        each = [count.get((*context, b), 0) + 1 for b in range(4)]
        return each[base] / sum(each)

    left, hidden, right = (piece[100 + 6 * i : 106 + 6 * i].tolist() for i in range(3))

    def weight(candidate: tuple[int, ...]) -> float:
        chain = (*left[1:], *candidate, *right[:5])
        return math.prod(chance(chain[i : i + 5], chain[i + 5]) for i in range(11))

    total = sum(weight(candidate) for candidate in product(range(4), repeat=6))
    expected = -math.log(weight(tuple(hidden)) / total)
    ids = [np.array([int("".join(map(str, word)), 4)]) for word in (hidden, left, right)]
    assert float(script.Markov(source).loss(*ids)[0]) == pytest.approx(expected, abs=1e-4)


def test_a_linear_probe_finds_what_is_there_and_nothing_where_nothing_is(
    script: ModuleType,
) -> None:
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 800)
    probe = script.Probe("p", np.zeros((800, 1), np.uint16), label, np.arange(800) >= 400)
    noise = rng.standard_normal((800, 10))
    assert abs(script.linear_accuracy(noise, probe) - 0.5) < 0.1
    told = noise + np.outer(label, np.eye(10)[3]) * 4
    assert script.linear_accuracy(told, probe) > 0.95
