"""The losses against loops of NumPy in every setting, and what must not leak between them."""

from __future__ import annotations

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from had_pipe.dna import kmers
from had_pipe.objectives import Error, Groups, HADObjective, Losses, Pool
from had_pipe.students import HADConfig, HADModel, spell
from had_pipe.students.tokenizer import FIRST_BASE, MASK

B, T, M, D, E = 3, 20, 3, 10, 16
V = T - M


def a_batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    feat_BSE = torch.randn(B, 6 * T, E, generator=random)
    kmer_id_BT = torch.randint(0, 4096, (B, T), generator=random)
    mask_BT = torch.from_numpy(
        kmers.group_masks(seed=seed, view=0, first=0, windows=B, kmers=T, masked=M)
    )
    target_BVD = 3 * torch.randn(B, V, D, generator=random) + 1
    return feat_BSE, kmer_id_BT, mask_BT, target_BVD


def an_objective(**settings: Any) -> HADObjective:
    torch.manual_seed(0)
    objective = HADObjective(hidden_size=E, channels=D, decoder_heads=2, **settings)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return objective


def weights(objective: HADObjective) -> dict[str, np.ndarray]:
    return {n: w.detach().double().numpy() for n, w in objective.named_parameters()}


def projected(objective: HADObjective, feat_BSE: Tensor, mask_BT: Tensor) -> np.ndarray:
    guesses = naive_guesses(objective, feat_BSE, mask_BT, "visible", "mean")
    return np.array([[six[0] for six in window] for window in guesses])


def naive_guesses(
    objective: HADObjective, feat_BSE: Tensor, mask_BT: Tensor, align_on: str, pool: str
) -> list[list[list[np.ndarray]]]:
    """Of each window, of each group aligned on: one guess, or one of each base."""
    p = weights(objective)
    found = []
    for feat_SE, mask_T in zip(feat_BSE.double().numpy(), mask_BT.tolist(), strict=True):
        window = []
        for j, masked in enumerate(mask_T):
            if (align_on, masked) in (("visible", True), ("masked", False)):
                continue
            six = [feat_SE[6 * j + i] for i in range(6)]
            pooled = {
                "mean": [sum(six) / 6],
                "concat": [np.concatenate(six)],
                "per_base": six,
            }[pool]
            window.append([p["projection.weight"] @ u + p["projection.bias"] for u in pooled])
        found.append(window)
    return found


def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight


def softmax(x: np.ndarray) -> np.ndarray:
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def chances(objective: HADObjective, asking_QE: np.ndarray, seen_PE: np.ndarray) -> np.ndarray:
    """Probabilities of A, C, G, T at the bases of one window that ask."""
    p = {n.removeprefix("decoder."): w for n, w in weights(objective).items()}
    query = rms(asking_QE, p["query_norm.weight"]) @ p["attention.q.weight"].T
    memory = rms(seen_PE, p["memory_norm.weight"]) @ p["attention.kv.weight"].T
    heads = []
    for h in (slice(0, E // 2), slice(E // 2, E)):
        key, value = memory[:, :E][:, h], memory[:, E:][:, h]
        heads.append(softmax(query[:, h] @ key.T / np.sqrt(E / 2)) @ value)
    read = np.concatenate(heads, axis=1) @ p["attention.out.weight"].T
    logits = rms(asking_QE + read, p["norm.weight"]) @ p["head.weight"].T
    return softmax(logits + p["head.bias"])


def test_alignment_equals_numpy() -> None:
    objective, (feat, kmer_id, mask, target) = an_objective(), a_batch()
    losses = objective(feat, kmer_id, mask, target)
    found, t = projected(objective, feat, mask), target.double().numpy()
    assert float(losses.align) == pytest.approx(((found - t) ** 2).mean(), rel=1e-5)
    cosine = (found * t).sum(-1) / np.linalg.norm(found, axis=-1) / np.linalg.norm(t, axis=-1)
    assert float(losses.cosine) == pytest.approx(cosine.mean(), rel=1e-4)
    with torch.no_grad():
        rows = objective.predictions(feat, mask, visible=V)
    np.testing.assert_allclose(rows.numpy(), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("error", get_args(Error))
@pytest.mark.parametrize("pool", get_args(Pool))
@pytest.mark.parametrize("align_on", get_args(Groups))
def test_alignment_equals_loops_wherever_and_however_it_is_asked_for(
    align_on: Groups, pool: Pool, error: Error
) -> None:
    feat, kmer_id, mask, _ = a_batch()
    groups = {"visible": V, "masked": M, "all": T}[align_on]
    target = 3 * torch.randn(B, groups, D, generator=torch.Generator().manual_seed(5)) + 1
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0.5, 4, D)
    objective = an_objective(
        align_on=align_on,
        pool=pool,
        error=error,
        masked=M,
        target="normalised",
        mean_D=mean,
        std_D=std,
    )
    losses = objective(feat, kmer_id, mask, target)
    unit_D, mean_D = std.double().numpy(), mean.double().numpy()
    costs, cosines, rows = [], [], []
    for window, t_GD in zip(
        naive_guesses(objective, feat, mask, align_on, pool), target.double().numpy(), strict=True
    ):
        for guesses, t_D in zip(window, t_GD, strict=True):
            for guess_D, wanted_D in ((g, (t_D - mean_D) / unit_D) for g in guesses):
                for away in np.abs(guess_D - wanted_D):
                    straight = error == "smooth_l1" and away > 1
                    costs.append(2 * away - 1 if straight else away**2)
            found_D = sum(guesses) / len(guesses) * unit_D + mean_D
            cosines.append(found_D @ t_D / np.linalg.norm(found_D) / np.linalg.norm(t_D))
            rows.append(found_D)
    assert min(costs) < 1 < max(costs)  # both sides of the bend
    assert float(losses.align) == pytest.approx(np.mean(costs), rel=1e-5)
    assert float(losses.cosine) == pytest.approx(np.mean(cosines), rel=1e-4)
    with torch.no_grad():
        found = objective.predictions(feat, mask, visible=V).numpy()
    np.testing.assert_allclose(found, np.reshape(rows, (B, groups, D)), rtol=1e-4, atol=1e-4)
    # What floors are measured in is that same error.
    away = torch.tensor([-2.0, 0.5])
    assert objective.error(away).tolist() == [{"mse": 4.0, "smooth_l1": 3.0}[error], 0.25]


def single_bases(seed: int = 7) -> Tensor:
    """As many bases as the masked groups have, anywhere, (B, S)."""
    return torch.from_numpy(
        kmers.base_masks(seed=seed, stream=0, rows=np.arange(B), bases=6 * T, masked=6 * M)
    )


def nats_and_hits(
    asked: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, of chances and the bases that stand there."""
    nats = [
        -math.log(chance[base])
        for chances, bases in asked
        for chance, base in zip(chances, bases, strict=True)
    ]
    hits = [
        chance.argmax() == base
        for chances, bases in asked
        for chance, base in zip(chances, bases, strict=True)
    ]
    return float(np.mean(nats)), float(np.mean(hits))


@pytest.mark.parametrize("masking", ["group", "base"])
def test_reconstruction_equals_numpy(masking: str) -> None:
    objective, (feat, kmer_id, mask, target) = an_objective(), a_batch()
    hidden = single_bases() if masking == "base" else None
    losses = objective(feat, kmer_id, mask, target, hidden)
    base_BS = kmers.decode_kmers(kmer_id.numpy().astype(np.uint16))
    hidden_BS = mask.numpy().repeat(6, axis=1) if hidden is None else hidden.numpy()
    asked = [
        (chances(objective, f_SE[hidden_S], f_SE[~hidden_S]), base_S[hidden_S])
        for f_SE, base_S, hidden_S in zip(feat.double().numpy(), base_BS, hidden_BS, strict=True)
    ]
    nats, hits = nats_and_hits(asked)
    assert float(losses.reconstruct) == pytest.approx(nats, rel=1e-5)
    assert float(losses.accuracy) == pytest.approx(hits)
    # Alignment is on the cache's groups, whatever the student does not see.
    found = projected(objective, feat, mask)
    expected = ((found - target.double().numpy()) ** 2).mean()
    assert float(losses.align) == pytest.approx(expected, rel=1e-5)


def test_bases_that_were_left_out_ask_by_where_they_stand_alone() -> None:
    objective = an_objective(mask_tokens="dropped", masked=M)
    _, kmer_id, mask, target = a_batch()
    feat = torch.randn(B, 6 * V, E, generator=torch.Generator().manual_seed(3))
    losses = objective(feat, kmer_id, mask, target)
    asking_E = weights(objective)["asking_E"]
    half = E // 2
    place_SE = np.array(
        [
            [math.sin(s * 10_000 ** (-e / half)) for e in range(half)]
            + [math.cos(s * 10_000 ** (-e / half)) for e in range(half)]
            for s in range(6 * T)
        ]
    )
    base_BS = kmers.decode_kmers(kmer_id.numpy().astype(np.uint16))
    asked = []
    for f_PE, base_S, hidden_S in zip(
        feat.double().numpy(), base_BS, mask.numpy().repeat(6, axis=1), strict=True
    ):
        chance = chances(objective, asking_E + place_SE[hidden_S], f_PE + place_SE[~hidden_S])
        asked.append((chance, base_S[hidden_S]))
    nats, hits = nats_and_hits(asked)
    assert float(losses.reconstruct) == pytest.approx(nats, rel=1e-5)
    assert float(losses.accuracy) == pytest.approx(hits)
    p = weights(objective)
    six_BVE = feat.double().numpy().reshape(B, V, 6, E).mean(2)
    found = six_BVE @ p["projection.weight"].T + p["projection.bias"]
    expected = ((found - target.double().numpy()) ** 2).mean()
    assert float(losses.align) == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        rows = objective.predictions(feat, mask, visible=V)
    np.testing.assert_allclose(rows.numpy(), found, rtol=1e-4, atol=1e-5)
    # The language head of a student asks with features at mask symbols: it has not learnt to.
    assert objective.language_head is None
    assert an_objective().language_head is not None


def test_what_the_student_reads_is_the_bases_with_what_is_hidden_masked_or_left_out() -> None:
    _, kmer_id, mask, _ = a_batch()
    base_BS = kmers.decode_kmers(kmer_id.numpy().astype(np.uint16)) + FIRST_BASE
    group_BS = mask.numpy().repeat(6, axis=1)
    kept, single = an_objective(), single_bases()
    np.testing.assert_array_equal(
        kept.inputs(kmer_id, mask).numpy(), np.where(group_BS, MASK, base_BS)
    )
    np.testing.assert_array_equal(
        kept.inputs(kmer_id, mask, single).numpy(), np.where(single.numpy(), MASK, base_BS)
    )
    dropped = an_objective(mask_tokens="dropped", masked=M).inputs(kmer_id, mask).numpy()
    for read_P, base_S, hidden_S in zip(dropped, base_BS, group_BS, strict=True):
        assert read_P.tolist() == base_S[~hidden_S].tolist()


def test_the_total_weighs_both() -> None:
    batch = a_batch()
    losses = an_objective(align=0.5, reconstruct=2.0)(*batch)
    assert float(losses.total.detach()) == pytest.approx(
        0.5 * float(losses.align) + 2 * float(losses.reconstruct), rel=1e-6
    )
    assert losses.total.requires_grad
    assert not losses.align.requires_grad


@pytest.mark.parametrize("off", ["align", "reconstruct"])
def test_a_term_of_weight_zero_has_no_weights_and_no_figure(off: str) -> None:
    objective = an_objective(**{off: 0.0})
    losses = objective(*a_batch())
    absent = {"align": losses.align, "reconstruct": losses.reconstruct}[off]
    present = {"align": losses.reconstruct, "reconstruct": losses.align}[off]
    assert bool(torch.isnan(absent))
    assert float(losses.total.detach()) == pytest.approx(float(present))
    gone = {"align": "projection", "reconstruct": "decoder"}[off]
    assert not any(n.startswith(gone) for n, _ in objective.named_parameters())


def test_normalised_targets_are_compared_in_units_of_each_channel() -> None:
    feat, kmer_id, mask, target = a_batch()
    mean, std = torch.linspace(-1, 1, D), torch.linspace(0.5, 4, D)
    std[3] = 0.0  # a channel that never varies
    objective = an_objective(target="normalised", mean_D=mean, std_D=std)
    losses = objective(feat, kmer_id, mask, target)
    unit = np.where(std.numpy() > 0, std.numpy(), 1)
    found = projected(objective, feat, mask)
    wanted = (target.double().numpy() - mean.numpy()) / unit
    assert float(losses.align) == pytest.approx(((found - wanted) ** 2).mean(), rel=1e-5)
    with torch.no_grad():
        rows = objective.predictions(feat, mask, visible=V)
    np.testing.assert_allclose(rows.numpy(), found * unit + mean.numpy(), rtol=1e-4, atol=1e-4)


def test_the_decoder_reads_visible_features_and_its_own_query_alone() -> None:
    objective, (feat, kmer_id, mask, target) = an_objective(), a_batch()
    feat.requires_grad_()
    hidden_BS = mask.repeat_interleave(6, dim=1)
    assert objective.decoder is not None
    query = feat[hidden_BS].view(B, 6 * M, E)
    memory = feat[~hidden_BS].view(B, 6 * V, E)
    logits = objective.decoder(query, memory)
    (gradient,) = torch.autograd.grad(logits[0, 0].sum(), feat)
    heard_BS = gradient.abs().amax(-1) > 0
    expected_BS = torch.zeros_like(heard_BS)
    expected_BS[0] = ~hidden_BS[0]
    expected_BS[0, int(hidden_BS[0].nonzero()[0])] = True
    assert torch.equal(heard_BS, expected_BS)
    # The loss feeds the decoder those same rows, in that order.
    losses = objective(feat, kmer_id, mask, target)
    base_BQ = torch.from_numpy(
        kmers.decode_kmers(kmer_id.numpy().astype(np.uint16)).astype(np.int64)
    )[hidden_BS]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), base_BQ)
    torch.testing.assert_close(losses.reconstruct, expected.detach())


def test_alignment_hears_visible_groups_alone() -> None:
    objective, (feat, kmer_id, mask, target) = an_objective(reconstruct=0.0), a_batch()
    feat.requires_grad_()
    objective(feat, kmer_id, mask, target).total.backward()
    assert feat.grad is not None
    assert torch.equal(feat.grad.abs().amax(-1) > 0, ~mask.repeat_interleave(6, dim=1))


def a_student() -> HADModel:
    torch.manual_seed(0)
    shape = {"gdn_heads": 2, "head_dim": 8, "attention_heads": 2, "mlp": 32}
    return HADModel(HADConfig(hidden_size=E, layers=2, **shape))


def test_what_is_masked_never_reaches_the_student() -> None:
    student, (_, kmer_id, mask, target) = a_student(), a_batch()
    other = torch.where(mask, 4095 - kmer_id, kmer_id)
    assert not torch.equal(other, kmer_id)
    objective = an_objective()

    def run(kmer_id_BT: Tensor) -> tuple[Tensor, Losses]:
        with torch.no_grad():
            feat = student(spell(kmer_id_BT, mask)).last_hidden_state
            return feat, objective(feat, kmer_id_BT, mask, target)

    (feat, losses), (feat_other, losses_other) = run(kmer_id), run(other)
    assert torch.equal(feat, feat_other)
    assert float(losses.align) == float(losses_other.align)
    assert float(losses.reconstruct) != float(losses_other.reconstruct)


@pytest.mark.parametrize(
    ("align_on", "heard"), [("masked", [True]), ("all", [False, True]), ("visible", [False])]
)
def test_alignment_hears_the_groups_it_is_on_alone(align_on: Groups, heard: list[bool]) -> None:
    objective = an_objective(reconstruct=0.0, align_on=align_on, masked=M)
    feat, kmer_id, mask, _ = a_batch()
    groups = {"visible": V, "masked": M, "all": T}[align_on]
    feat.requires_grad_()
    objective(feat, kmer_id, mask, torch.randn(B, groups, D)).total.backward()
    assert feat.grad is not None
    felt_BT = feat.grad.view(B, T, -1).abs().amax(-1) > 0
    assert felt_BT.tolist() == [[masked in heard for masked in row] for row in mask.tolist()]


def test_masks_that_do_not_fit_the_targets_are_caught() -> None:
    feat, kmer_id, mask, target = a_batch()
    mask[0] = ~mask[0]
    with pytest.raises(AssertionError, match="masks and targets"):
        an_objective()(feat, kmer_id, mask, target)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"pool": "concat", "error": "smooth_l1"},
        {"pool": "per_base"},
        {"mask_tokens": "dropped"},
    ],
    ids=str,
)
def test_gradients_reach_every_parameter(settings: dict[str, Any]) -> None:
    student, objective = a_student(), an_objective(masked=M, **settings)
    _, kmer_id, mask, target = a_batch()
    feat = student(objective.inputs(kmer_id, mask)).last_hidden_state
    objective(feat, kmer_id, mask, target).total.backward()
    for name, parameter in [*student.named_parameters(), *objective.named_parameters()]:
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_forty_steps_on_one_batch_learn_it() -> None:
    student = a_student().train()
    torch.manual_seed(0)
    objective = HADObjective(hidden_size=E, channels=D, decoder_heads=2)
    _, kmer_id, mask, target = a_batch()
    optimizer = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-2)
    course = []
    for _ in range(40):
        feat = student(spell(kmer_id, mask)).last_hidden_state
        losses = objective(feat, kmer_id, mask, target)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        course.append(losses)
    first, last = course[0], course[-1]
    # Nothing is known at first: four bases alike, and no embedding.
    assert float(first.reconstruct) == pytest.approx(np.log(4), abs=0.05)
    assert float(last.reconstruct) < 0.9 * float(first.reconstruct)
    assert float(last.align) < 0.85 * float(first.align)
    assert float(last.cosine) > float(first.cosine) + 0.2


def test_an_error_of_one_is_a_channels_deviation_or_one_where_it_never_varies() -> None:
    std_D = torch.tensor([0.0, 2.0] * (D // 2))
    normalised = an_objective(target="normalised", mean_D=torch.zeros(D), std_D=std_D)
    assert normalised.unit_D.tolist() == [1.0, 2.0] * (D // 2)
    assert an_objective().unit_D.tolist() == [1.0] * D
