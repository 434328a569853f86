"""The student: shape, strands of time, padding, masks, and its life as a transformers model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from had_pipe.dna import kmers
from had_pipe.students import (
    HADConfig,
    HADForMaskedLM,
    HADForSequenceClassification,
    HADModel,
    HADTokenizer,
    save_student,
    spell,
)
from had_pipe.students.had import BaseDecoder, BidirectionalGDN, Direction
from had_pipe.students.tokenizer import MASK, PAD

SMALL = {
    "hidden_size": 16,
    "layers": 2,
    "gdn_heads": 2,
    "head_dim": 4,
    "attention_heads": 2,
    "mlp": 24,
    "decoder_heads": 2,
}


def small_student(seed: int = 0) -> HADModel:
    """A small student with weights far from their small first values, so that nothing hides."""
    torch.manual_seed(seed)
    student = HADModel(HADConfig(**SMALL)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return student


def some_bases(B: int, S: int, seed: int = 0) -> Tensor:
    return torch.randint(7, 11, (B, S), generator=torch.Generator().manual_seed(seed))


def features(student: HADModel, ids_BS: Tensor, mask_BS: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return student(ids_BS, mask_BS).last_hidden_state


def silu(x):
    return x / (1 + np.exp(-x))


def layer_step_by_step(direction: Direction, x_SE: np.ndarray) -> np.ndarray:
    """One direction of one layer in NumPy, a base at a time, from the published equations."""
    p = {n: w.detach().double().numpy() for n, w in direction.named_parameters()}
    S, H, K, V = len(x_SE), direction.heads, direction.key, direction.value
    raw_SF = x_SE @ p["qkv.weight"].T
    conv_F4 = p["conv"][:, 0, 0]
    out = []
    state_HVK = np.zeros((H, V, K))
    for t in range(S):
        window = [raw_SF[t - 3 + i] if t - 3 + i >= 0 else 0 * raw_SF[0] for i in range(4)]
        mixed_F = silu(sum(conv_F4[:, i] * window[i] for i in range(4)))
        q, k = mixed_F[: H * K].reshape(H, K), mixed_F[H * K : 2 * H * K].reshape(H, K)
        v = mixed_F[2 * H * K :].reshape(H, V)
        q, k = (y / np.sqrt((y**2).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        a_H, b_H = np.split(p["decay_beta.weight"] @ x_SE[t], 2)
        alpha_H = np.exp(-np.exp(p["A_log"]) * np.log1p(np.exp(a_H + p["dt_bias"])))
        beta_H = 1 / (1 + np.exp(-b_H))
        o_HV = np.zeros((H, V))
        for h in range(H):
            decayed = alpha_H[h] * state_HVK[h]
            state_HVK[h] = decayed + np.outer(beta_H[h] * (v[h] - decayed @ k[h]), k[h])
            o_HV[h] = state_HVK[h] @ q[h] / np.sqrt(K)
        o_HV = o_HV / np.sqrt((o_HV**2).mean(-1, keepdims=True) + 1e-5) * p["norm.weight"]
        out.append(p["out.weight"] @ (o_HV.reshape(-1) * silu(p["gate.weight"] @ x_SE[t])))
    return np.array(out)


def test_the_default_layout_has_exactly_1_070_512_parameters() -> None:
    student = HADModel(HADConfig())
    assert sum(p.numel() for p in student.parameters()) == 1_070_512
    one_direction = student.layers[0].forwards
    assert sum(p.numel() for p in one_direction.parameters()) == 100_678
    decayed = [n for n, p in student.named_parameters() if p.ndim >= 2 and "embed" not in n]
    # Training decays matrices alone: norms, A_log and dt_bias have one axis each.
    assert not any("norm" in n or "A_log" in n or "dt_bias" in n for n in decayed)


@torch.no_grad()
def test_first_weights_are_the_reference_layers() -> None:
    torch.manual_seed(0)
    student = HADModel(HADConfig(layers=2, gdn_heads=64, head_dim=2))
    direction = student.layers[1].backwards
    assert float(direction.A_log.exp().min()) > 0
    assert 12 < float(direction.A_log.exp().max()) < 16
    dt = torch.nn.functional.softplus(direction.dt_bias)
    assert 0.001 <= float(dt.min()) < 0.003
    assert 0.03 < float(dt.max()) <= 0.1001
    assert float(direction.qkv.weight.std()) == pytest.approx(0.02, rel=0.05)
    for end in (direction.out, student.attention.out, student.mlp.down):
        assert float(end.weight.std()) == pytest.approx(0.02 / 2, rel=0.05)


@pytest.mark.parametrize("S", [1, 40])
def test_a_layer_equals_the_equations_in_both_directions(S: int) -> None:
    layer = small_student().layers[0]
    assert isinstance(layer, BidirectionalGDN)
    x_BSE = torch.randn(2, S, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = layer(x_BSE).numpy()
    for x_SE, y_SE in zip(x_BSE.double().numpy(), found, strict=True):
        expected = layer_step_by_step(layer.forwards, x_SE)
        expected = expected + layer_step_by_step(layer.backwards, x_SE[::-1])[::-1]
        np.testing.assert_allclose(y_SE, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_turned_input_and_exchanged_directions_give_turned_features() -> None:
    student, ids_BS = small_student(), some_bases(2, 75)
    ahead = features(student, ids_BS)
    for layer in student.layers:
        layer.forwards, layer.backwards = layer.backwards, layer.forwards
    torch.testing.assert_close(features(student, ids_BS.flip(1)).flip(1), ahead)
    assert not torch.allclose(features(student, ids_BS), ahead, atol=1e-2)


def test_each_base_is_heard_everywhere() -> None:
    student, ids_BS = small_student(), some_bases(1, 60)
    before = features(student, ids_BS)
    ids_BS[0, 30] = 7 + (ids_BS[0, 30] - 6) % 4
    assert bool(((features(student, ids_BS) - before).abs().amax(-1) > 0).all())


HEADS = {
    "features": lambda model, *batch: model.had(*batch).last_hidden_state,
    "bases": lambda model, *batch: model.had_for_masked(*batch).logits,
    "classes": lambda model, *batch: model(*batch).logits,
}


def every_head(**settings: int) -> HADForSequenceClassification:
    """A student with both heads, far from their first weights."""
    torch.manual_seed(2)
    model = HADForSequenceClassification(HADConfig(**{**SMALL, **settings}, num_labels=3)).eval()
    model.had_for_masked = HADForMaskedLM.of(model.had, BaseDecoder(16, 2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def padded(rows: list[Tensor], side: str, *, to: int) -> tuple[Tensor, Tensor]:
    """Rows in one batch, with their attention mask."""
    ids_BS = torch.full((len(rows), to), PAD)
    for padded_S, row_S in zip(ids_BS, rows, strict=True):
        if side == "left":
            padded_S[to - len(row_S) :] = row_S
        else:
            padded_S[: len(row_S)] = row_S
    return ids_BS, (ids_BS != PAD).long()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention_heads", [0, 2])
def test_a_padded_batch_equals_its_rows_alone_in_value_and_gradient(
    head: str, side: str, attention_heads: int
) -> None:
    # Nothing but rounding differs: in float64, where decays alone are float32, that much less.
    model = every_head(attention_heads=attention_heads)
    rows = [some_bases(1, S, seed=S)[0] for S in (1, 3, 33, 57, 90)]
    rows[3][10:16] = MASK
    rows[1][:] = MASK
    for dtype, tolerance in ((torch.float32, 5e-5), (torch.float64, 1e-6)):
        nn.Module.to(model, dtype)
        alone = [HEADS[head](model, row_S.unsqueeze(0))[0] for row_S in rows]
        weight = [torch.randn(out.shape[-1], dtype=dtype) for out in alone]
        (sum((o * w).sum() for o, w in zip(alone, weight, strict=True))).backward()
        expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        together = HEADS[head](model, *padded(rows, side, to=101))
        if head != "classes":
            lengths = [len(row_S) for row_S in rows]
            together = [
                out[-S:] if side == "left" else out[:S]
                for out, S in zip(together, lengths, strict=True)
            ]
        for found, out in zip(together, alone, strict=True):
            torch.testing.assert_close(found, out, rtol=tolerance, atol=tolerance)
        (sum((o * w).sum() for o, w in zip(together, weight, strict=True))).backward()
        assert expected
        for name, parameter in model.named_parameters():
            if name in expected:
                scale = float(expected[name].abs().max())
                error = float((parameter.grad - expected[name]).abs().max())
                assert error <= 10 * tolerance * max(scale, 1.0), name
        model.zero_grad()


def test_what_stands_at_padding_is_never_read() -> None:
    model = every_head()
    ids_BS, mask_BS = padded([some_bases(1, 20)[0], some_bases(1, 40)[0]], "right", to=40)
    for head in HEADS.values():
        before = head(model, ids_BS, mask_BS)
        other_BS = torch.where(mask_BS.bool(), ids_BS, 7 + torch.arange(40) % 4)
        after = head(model, other_BS, mask_BS)
        seen = mask_BS.bool() if before.ndim == 3 else ...
        assert torch.equal(before[seen], after[seen])


def test_a_row_of_padding_alone_spoils_nothing() -> None:
    model = every_head()
    ids_BS, mask_BS = padded(
        [some_bases(1, 20)[0], torch.tensor([], dtype=torch.long)], "left", to=20
    )
    for head in HEADS.values():
        out = head(model, ids_BS, mask_BS)
        assert bool(out.isfinite().all())
        out.mean().backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_spelling_agrees_with_the_letters_and_hides_whole_groups() -> None:
    tokenizer = HADTokenizer()
    kmer_id_BT = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    letters = ["".join(kmers.spell(int(i)) for i in row) for row in kmer_id_BT]
    ids = torch.tensor(tokenizer(letters)["input_ids"])
    nothing = torch.zeros(64, 64, dtype=torch.bool)
    assert torch.equal(spell(torch.from_numpy(kmer_id_BT.astype(np.int32)), nothing), ids)
    assert torch.equal(spell(torch.from_numpy(kmer_id_BT), nothing), ids)
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.15
    hidden = spell(torch.from_numpy(kmer_id_BT), mask)
    assert torch.equal(hidden == MASK, mask.repeat_interleave(6, dim=1))
    assert torch.equal(hidden[hidden != MASK], ids[hidden != MASK])


def test_the_tokenizer_reads_letters_and_adds_nothing() -> None:
    tokenizer = HADTokenizer()
    assert tokenizer("ACGTNacgtn")["input_ids"] == [7, 8, 9, 10, 11, 7, 8, 9, 10, 11]
    assert tokenizer("A[MASK]R")["input_ids"] == [7, 3, 6]
    assert tokenizer.decode([7, 8, 9, 10]) == "ACGT"
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.unk_token_id) == (4, 3, 6)
    assert tokenizer.convert_tokens_to_ids(["[CLS]", "[SEP]", "[BOS]", "[RESERVED]"]) == [
        0,
        1,
        2,
        5,
    ]
    batch = tokenizer(["ACGT", "AC"], padding=True)
    assert batch["input_ids"][1] == [4, 4, 7, 8]
    assert batch["attention_mask"][1] == [0, 0, 1, 1]


def test_masked_language_logits_are_the_decoders_at_the_four_bases() -> None:
    student, decoder = small_student(), BaseDecoder(16, 2)
    before = torch.get_rng_state()
    model = HADForMaskedLM.of(student, decoder).eval()
    assert torch.equal(torch.get_rng_state(), before)
    ids_BS = some_bases(2, 30)
    labels = torch.full_like(ids_BS, -100)
    labels[:, 6:12] = ids_BS[:, 6:12]
    ids_BS[:, 6:12] = MASK
    with torch.no_grad():
        output = model(ids_BS, labels=labels)
        feat = student(ids_BS).last_hidden_state
        memory = torch.cat([feat[:, :6], feat[:, 12:]], dim=1)
        expected = model.decoder(feat[:, 6:12], memory)
    torch.testing.assert_close(output.logits[:, 6:12, 7:11], expected)
    chance = torch.softmax(output.logits, dim=-1)
    assert float(chance[..., :7].sum() + chance[..., 11:].sum()) == 0
    torch.testing.assert_close(
        output.loss,
        -torch.log_softmax(expected, -1).gather(-1, (labels[:, 6:12] - 7).unsqueeze(-1)).mean(),
    )
    with torch.no_grad():
        everything = model(torch.full((1, 12), MASK)).logits
    assert bool(torch.isfinite(everything).all())


READ_BACK = """
import json, sys, warnings
warnings.simplefilter("error")
import numpy as np, torch
import had_pipe.students
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoTokenizer
folder, letters = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder)
assert type(tokenizer).__name__ == "HADTokenizer"
batch = tokenizer(json.loads(letters), padding=True, return_tensors="pt")
student = AutoModel.from_pretrained(folder)
language = AutoModelForMaskedLM.from_pretrained(folder)
assert not student.training
with torch.no_grad():
    feat = student(**batch).last_hidden_state
    logits = language(batch["input_ids"], batch["attention_mask"]).logits
np.savez(folder + "/found.npz", feat=feat, logits=logits)
loaded = [m for m in sys.modules if m.startswith(("had_pipe.teachers", "had_pipe.extract"))]
print(json.dumps([loaded, AutoConfig.from_pretrained(folder).licence]))
"""


def test_a_saved_student_gives_the_same_bits_in_a_process_without_teachers(tmp_path: Path) -> None:
    student = small_student()
    student.config.licence = "CC-BY-NC-SA-4.0"
    model = HADForMaskedLM.of(student, BaseDecoder(16, 2)).eval()
    tokenizer = HADTokenizer()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} >= {
        "model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    letters = ["ACGTTGCA" * 9, "ACG[MASK]TT"]
    command = [sys.executable, "-c", READ_BACK, str(tmp_path), json.dumps(letters)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], "CC-BY-NC-SA-4.0"]
    assert "UNEXPECTED" not in done.stderr
    assert "MISSING" not in done.stderr
    batch = tokenizer(letters, padding=True, return_tensors="pt")
    with np.load(tmp_path / "found.npz") as found, torch.no_grad():
        np.testing.assert_array_equal(found["feat"], student(**batch).last_hidden_state)
        np.testing.assert_array_equal(found["logits"], model(**batch).logits)
    assert AutoTokenizer.from_pretrained(tmp_path)("acgt")["input_ids"] == [7, 8, 9, 10]


def test_the_bare_student_saves_and_loads_alone(tmp_path: Path) -> None:
    student, ids_BS = small_student(), some_bases(1, 24)
    student.save_pretrained(tmp_path)
    again = HADModel.from_pretrained(tmp_path)
    assert torch.equal(features(again, ids_BS), features(student, ids_BS))


def test_half_precision_stays_near() -> None:
    student, ids_BS = small_student(), some_bases(2, 60)
    exact = features(student, ids_BS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = features(student, ids_BS)
    assert near.dtype == torch.float32
    # bfloat16 has 8 bits; weights here are an order of magnitude above trained ones.
    assert float((near - exact).abs().mean()) < 0.05


def test_every_parameter_of_the_student_gets_a_gradient() -> None:
    student = small_student()
    feat_BSE = student(some_bases(2, 40)).last_hidden_state
    (feat_BSE * torch.randn_like(feat_BSE)).sum().backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


@pytest.mark.parametrize(
    ("labels", "count", "problem", "expected"),
    [
        (torch.tensor([0.5, -1.0]), 1, "regression", nn.functional.mse_loss),
        (torch.tensor([2, 0]), 3, "single_label_classification", nn.functional.cross_entropy),
        (
            torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]),
            3,
            "multi_label_classification",
            nn.functional.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_losses_of_classification_are_those_of_transformers(
    labels: Tensor, count: int, problem: str, expected: Any
) -> None:
    model = HADForSequenceClassification(HADConfig(**SMALL, num_labels=count)).eval()
    ids_BS = some_bases(2, 30)
    with torch.no_grad():
        out = model(ids_BS, labels=labels)
        found = model(ids_BS, labels=labels, return_dict=False)
    assert model.config.problem_type == problem
    logits = out.logits.squeeze(-1) if count == 1 else out.logits
    torch.testing.assert_close(out.loss, expected(logits, labels))
    assert torch.equal(found[0], out.loss)
    assert torch.equal(found[1], out.logits)


def test_dropout_is_of_the_classification_head_and_of_training_alone() -> None:
    torch.manual_seed(0)
    config = HADConfig(**SMALL, num_labels=2, classifier_dropout=0.5)
    model = HADForSequenceClassification(config)
    ids_BS = some_bases(4, 30)
    with torch.no_grad():
        trained = [model.train()(ids_BS).logits for _ in range(2)]
        used = [model.eval()(ids_BS).logits for _ in range(2)]
    assert not torch.equal(*trained)
    assert torch.equal(*used)


def test_a_saved_student_learns_to_tell_motifs_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_student(HADModel(HADConfig(**SMALL)), BaseDecoder(16, 2), tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=2, classifier_dropout=0.1
    ).train()
    random = np.random.default_rng(0)

    def examples(many: int) -> tuple[Any, Tensor]:
        """Sequences of unequal length, of class 1 where TATAAA stands somewhere in them."""
        letters = [
            "".join(random.choice(list("ACGT"), random.integers(20, 60))) for _ in range(many)
        ]
        labels = torch.tensor(random.integers(0, 2, many))
        for i in labels.nonzero().flatten().tolist():
            at = random.integers(0, len(letters[i]) - 6)
            letters[i] = letters[i][:at] + "TATAAATATAAA" + letters[i][at + 6 :]
        return HADTokenizer()(letters, padding=True, return_tensors="pt"), labels

    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        batch, labels = examples(16)
        loss = model(**batch, labels=labels).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    batch, labels = examples(200)
    with torch.no_grad():
        right = model.eval()(**batch).logits.argmax(-1) == labels
    assert float(right.float().mean()) > 0.9


def test_transformers_trainer_steps_alike_however_gradients_are_accumulated(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def trained(batch: int, accumulated: int) -> Tensor:
        torch.manual_seed(0)
        model = HADForSequenceClassification(HADConfig(**SMALL, num_labels=2))
        data = [
            {"input_ids": some_bases(1, 30, seed=i)[0], "labels": torch.tensor(i % 2)}
            for i in range(8)
        ]
        arguments = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulated,
            max_steps=2,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        )
        Trainer(model, arguments, train_dataset=data).train()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(2, 2), trained(4, 1), rtol=1e-5, atol=1e-5)
