"""Masked language models of transformers' own classes as teachers, against their own forward."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr
from functools import cache, partial
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    EsmConfig,
    EsmTokenizer,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RoFormerConfig,
)
from typer.testing import CliRunner

from had_pipe import cli
from had_pipe.audit import audit
from had_pipe.cache import Cache, integrity
from had_pipe.cache.recode import recode
from had_pipe.distill import distill
from had_pipe.dna.kmers import KMERS, group_masks, spell
from had_pipe.errors import CacheMismatch, InputError, NonFiniteError, RecipeError
from had_pipe.extract import extract
from had_pipe.parts import PartMaker
from had_pipe.recipe import read_recipe
from had_pipe.stream import Stream
from had_pipe.teachers.masked_lm import read_vocabulary
from had_pipe.teachers.teacher import load_teacher

SPECIALS = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>"]
LAYERS = 3
CONTEXT = 40
WIDTHS: dict[str, Any] = {
    "hidden_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "intermediate_size": 40,
}


def esm_tokenizer(folder: Path) -> None:
    """One token a 6-mer, `<cls>` in front: a vocab.txt, as the first Nucleotide Transformer has."""
    words = SPECIALS + ["".join(word) for word in product("ATCG", repeat=6)] + list("ATCGN")
    (folder / "words.txt").write_text("\n".join(words))
    tokenizer = EsmTokenizer(str(folder / "words.txt"), eos_token=None, model_max_length=1000)
    (folder / "words.txt").unlink()
    tokenizer.save_pretrained(folder)


def word_tokenizer(
    folder: Path, *, bases: int, ends: bool = True, words: list[str] | None = None, seed: int = 0
) -> None:
    """One token for so many bases, in any order: a tokenizer.json, `[CLS]` and `[SEP]` around."""
    if words is None:
        words = ["".join(word) for word in product("ACGT", repeat=bases)]
        words = [words[i] for i in np.random.default_rng(seed).permutation(len(words))]
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    ids = {word: i for i, word in enumerate([*specials, *words, "N"])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(f"[A-Za-z]{{1,{bases}}}"), behavior="isolated"
    )
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    save_fast(folder, tokenizer)


def save_fast(folder: Path, tokenizer: Tokenizer) -> None:
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def esm(folder: Path, **changes: Any) -> None:
    esm_tokenizer(folder)
    save_model(
        folder,
        EsmConfig(
            vocab_size=4107,
            pad_token_id=1,
            mask_token_id=2,
            # Positions count from the one after padding; one token is <cls>.
            max_position_embeddings=CONTEXT + 3,
            **WIDTHS | changes,
        ),
    )


def bert(folder: Path) -> None:
    word_tokenizer(folder, bases=1)
    positions = 6 * CONTEXT + 2
    save_model(folder, BertConfig(vocab_size=10, max_position_embeddings=positions, **WIDTHS))


def roformer(folder: Path) -> None:
    word_tokenizer(folder, bases=2, ends=False)
    positions = 3 * CONTEXT
    save_model(folder, RoFormerConfig(vocab_size=22, max_position_embeddings=positions, **WIDTHS))


def modernbert(folder: Path) -> None:
    word_tokenizer(folder, bases=3)
    save_model(
        folder,
        ModernBertConfig(
            vocab_size=70,
            max_position_embeddings=2 * CONTEXT + 3,  # one more than whole 6-mers take
            pad_token_id=0,
            cls_token_id=2,
            sep_token_id=3,
            bos_token_id=2,
            eos_token_id=3,
            local_attention=16,
            **WIDTHS,
        ),
    )


def save_model(folder: Path, config: Any, *, shard: str = "1GB") -> None:
    """Random weights in which nothing hides behind a 0 or a 1, with a model card."""
    torch.manual_seed(3)
    model = AutoModelForMaskedLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    with redirect_stderr(StringIO()):
        model.save_pretrained(folder, max_shard_size=shard)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")


TINY_STUDENT = """
[student]
hidden_size = 32
layers = 1
gdn_heads = 2
head_dim = 16
expand_v = 1
attention_heads = 2
mlp = 32

[train]
out = "run"
steps = 4
batch = 8
validate_every = 4
validation_windows = 8
checkpoint_every = 4
"""

FAMILIES: dict[str, tuple[Callable[[Path], None], int]] = {
    "esm": (esm, 6),
    "bert": (bert, 1),
    "roformer": (roformer, 2),
    "modernbert": (modernbert, 3),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for family, (make, _) in FAMILIES.items():
        made[family] = tmp_path_factory.mktemp(family)
        make(made[family])
    return made


@pytest.fixture
def family_folder(request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path) -> Path:
    """One to change."""
    return Path(shutil.copytree(folders[request.param], tmp_path / request.param))


one_of_each = pytest.mark.parametrize("family", FAMILIES)
a_bert = pytest.mark.parametrize("family_folder", ["bert"], indirect=True, ids=["bert"])


@cache
def loaded(folder: Path, layer: int = -1) -> Any:
    """A teacher that no test changes, loaded once."""
    return load(folder, layer=layer)


def load(folder: Path, *, layer: int = -1, dtype: str = "float32") -> Any:
    return load_teacher(
        str(folder), revision=None, layer=layer, device="cpu", dtype=dtype, offline=True
    )


def some_windows(
    windows: int, kmers: int, *, masked: int = 5
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    kmer_id_WT = np.random.default_rng(1).integers(0, KMERS, (windows, kmers)).astype(np.uint16)
    hidden_WT = group_masks(seed=0, view=0, first=0, windows=windows, kmers=kmers, masked=masked)
    return kmer_id_WT, hidden_WT


def seen_by_the_tokenizer(
    folder: Path, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_], bases: int
) -> torch.Tensor:
    """The windows spelt, mask tokens written where hidden, read by the checkpoint's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = []
    for kmers, hidden in zip(kmer_id_WT, hidden_WT, strict=True):
        ids = tokenizer("".join(spell(k) for k in kmers))["input_ids"]
        first = len(ids) - len(kmers) * 6 // bases
        first = 1 if tokenizer.cls_token_id == ids[0] else first
        for group in np.flatnonzero(hidden):
            for piece in range(6 // bases):
                ids[first + group * 6 // bases + piece] = tokenizer.mask_token_id
        rows.append(ids)
    return torch.tensor(rows)


# --- what it gives -------------------------------------------------------------------------------


@one_of_each
def test_vectors_are_those_of_transformers_own_forward(
    folders: dict[str, Path], family: str
) -> None:
    bases = FAMILIES[family][1]
    kmer_id_WT, hidden_WT = some_windows(3, 17)
    ids = seen_by_the_tokenizer(folders[family], kmer_id_WT, hidden_WT, bases)
    with redirect_stderr(StringIO()):
        own = AutoModelForMaskedLM.from_pretrained(folders[family], attn_implementation="eager")
    with torch.inference_mode():
        states = own.eval().base_model(ids, output_hidden_states=True)
    assert len(states.hidden_states) == LAYERS + 1
    first = 0 if family == "roformer" else 1
    pieces = 6 // bases
    for layer in (1, 2, LAYERS, -1):
        feat = states.last_hidden_state if layer == -1 else states.hidden_states[layer]
        per_token = feat[:, first : first + 17 * pieces].double().numpy()
        expected = per_token.reshape(3, 17, pieces, -1).mean(2)
        found = loaded(folders[family], layer).embed(kmer_id_WT, hidden_WT).numpy()
        assert found.dtype == np.float32
        if layer == LAYERS and family in ("esm", "modernbert"):
            # These put the last block's output through the final norm before they list it.
            assert np.abs(found - expected).max() > 0.1
            normed = final_norm(own, family)(torch.from_numpy(found)).detach().numpy()
            assert bases != 6 or np.abs(normed - expected).max() < 2e-5
        else:
            assert np.abs(found - expected).max() < 2e-5


def final_norm(model: Any, family: str) -> Any:
    return {
        "esm": lambda: model.esm.encoder.emb_layer_norm_after,
        "modernbert": lambda: model.model.final_norm,
    }[family]()


@one_of_each
def test_what_it_knows_of_hidden_kmers_is_what_its_own_head_says(
    folders: dict[str, Path], family: str
) -> None:
    bases = FAMILIES[family][1]
    kmer_id_WT, hidden_WT = some_windows(3, 17)
    ids = seen_by_the_tokenizer(folders[family], kmer_id_WT, hidden_WT, bases)
    full = seen_by_the_tokenizer(folders[family], kmer_id_WT, np.zeros_like(hidden_WT), bases)
    with redirect_stderr(StringIO()):
        own = AutoModelForMaskedLM.from_pretrained(folders[family]).eval()
    with torch.inference_mode():
        logp = torch.log_softmax(own(ids).logits.double(), dim=-1).numpy()
    first, pieces = 0 if family == "roformer" else 1, 6 // bases
    expected = [
        -sum(
            logp[w, place, full[w, place]]
            for place in range(first + t * pieces, first + (t + 1) * pieces)
        )
        for w, t in np.argwhere(hidden_WT)
    ]
    teacher = loaded(folders[family], 1)
    found = teacher.masked_loss(kmer_id_WT, hidden_WT)
    assert teacher.token_bases == bases
    assert found.shape == (15,)
    assert np.abs(found - expected).max() < 1e-4


@one_of_each
def test_it_says_what_it_is(folders: dict[str, Path], family: str) -> None:
    teacher = loaded(folders[family], 2)
    assert (teacher.name, teacher.revision) == (folders[family].name, None)
    assert (teacher.k, teacher.channels, teacher.layer) == (6, 24, 2)
    assert (teacher.licence, teacher.dtype) == ("Apache-2.0", "float32")
    numerics = dict(teacher.numerics)
    assert numerics["transformers"] == transformers.__version__
    assert json.loads(json.dumps(numerics)) == numerics


@one_of_each
def test_the_longest_window_is_as_long_as_the_positions_allow(
    folders: dict[str, Path], family: str
) -> None:
    teacher = loaded(folders[family])
    assert teacher.context == CONTEXT
    kmer_id_WT, hidden_WT = some_windows(1, CONTEXT)
    assert bool(torch.isfinite(teacher.embed(kmer_id_WT, hidden_WT)).all())


@one_of_each
def test_what_stands_under_a_mask_changes_nothing(folders: dict[str, Path], family: str) -> None:
    teacher = loaded(folders[family])
    kmer_id_WT, hidden_WT = some_windows(2, 12)
    other_WT = np.where(hidden_WT, kmer_id_WT[:, ::-1] ^ 77, kmer_id_WT).astype(np.uint16)
    assert torch.equal(teacher.embed(kmer_id_WT, hidden_WT), teacher.embed(other_WT, hidden_WT))
    full = np.zeros_like(hidden_WT)
    assert not torch.equal(teacher.embed(kmer_id_WT, full), teacher.embed(other_WT, full))


@one_of_each
def test_at_one_batch_shape_a_window_has_the_same_bits_whatever_is_beside_it(
    folders: dict[str, Path], family: str
) -> None:
    teacher = loaded(folders[family])
    kmer_id_WT, hidden_WT = some_windows(16, 12)
    together = teacher.embed(kmer_id_WT, hidden_WT)
    filled = np.full(16, 5)
    filled[:5] = range(5)
    beside = teacher.embed(kmer_id_WT[filled], hidden_WT[filled])
    assert torch.equal(beside[:6], together[:6])
    assert torch.equal(teacher.embed(kmer_id_WT, hidden_WT), together)


@pytest.mark.parametrize("family_folder", ["esm"], indirect=True, ids=["esm"])
def test_weights_in_several_files_are_the_same_teacher(family_folder: Path) -> None:
    kmer_id_WT, hidden_WT = some_windows(2, 12)
    before = load(family_folder).embed(kmer_id_WT, hidden_WT)
    with redirect_stderr(StringIO()):
        model = AutoModelForMaskedLM.from_pretrained(family_folder)
        (family_folder / "model.safetensors").unlink()
        model.save_pretrained(family_folder, max_shard_size="100KB")
    assert len(list(family_folder.glob("model-*.safetensors"))) > 1
    assert torch.equal(load(family_folder).embed(kmer_id_WT, hidden_WT), before)


@pytest.mark.parametrize("family_folder", FAMILIES, indirect=True)
def test_a_checkpoint_of_the_encoder_alone_is_a_teacher_without_a_head(
    family_folder: Path,
) -> None:
    kmer_id_WT, hidden_WT = some_windows(2, 12)
    whole = load(family_folder)
    stored = safetensors.torch.load_file(family_folder / "model.safetensors")
    encoder = f"{next(name for name in stored if '.layer' in name).partition('.')[0]}."
    bare = {
        key.removeprefix(encoder): value for key, value in stored.items() if key.startswith(encoder)
    }
    safetensors.torch.save_file(bare, family_folder / "model.safetensors", {"format": "pt"})
    alone = load(family_folder)
    assert torch.equal(alone.embed(kmer_id_WT, hidden_WT), whole.embed(kmer_id_WT, hidden_WT))
    assert alone.masked_loss(kmer_id_WT, hidden_WT) is None


@one_of_each
def test_products_in_bfloat16_keep_every_vector_close(
    folders: dict[str, Path], family: str
) -> None:
    """Angles, norms and residuals must not be rounded as well."""
    teacher, half = loaded(folders[family]), load(folders[family], dtype="bfloat16")
    assert half.dtype == half.numerics["dtype"] == "bfloat16"
    assert {**half.numerics, "dtype": "float32"} == teacher.numerics
    kmer_id_WT, hidden_WT = some_windows(2, CONTEXT)
    exact = teacher.embed(kmer_id_WT, hidden_WT)
    rough = half.embed(kmer_id_WT, hidden_WT)
    assert rough.dtype == torch.bfloat16
    assert float(torch.cosine_similarity(exact, rough.float(), dim=-1).min()) > 0.999


@pytest.mark.gpu
@one_of_each
def test_cuda_in_bfloat16_stays_close_to_the_cpu(folders: dict[str, Path], family: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    kmer_id_WT, hidden_WT = some_windows(3, 17)
    teacher = load_teacher(str(folders[family]), revision=None, layer=-1, device="cuda")
    there = teacher.embed(kmer_id_WT, hidden_WT)
    assert teacher.dtype == "bfloat16"
    assert there.dtype == torch.bfloat16
    here = loaded(folders[family]).embed(kmer_id_WT, hidden_WT)
    assert float(torch.cosine_similarity(here, there.cpu().float(), dim=-1).min()) > 0.998


# --- the whole way -------------------------------------------------------------------------------


def a_recipe(folder: Path, *, teacher: Path, cache: str = "cache") -> Path:
    letters = "".join(np.random.default_rng(2).choice(list("ACGT"), 9_000))
    (folder / "g.fa").write_text(f">one\n{letters}\n")
    (folder / "x.toml").write_text(
        f"""
[teacher]
name = {json.dumps(str(teacher))}
layer = 2
dtype = "float32"
unchecked = true

[[genome]]
name = "g"
path = "g.fa"
splits = {{ blocks = 1_500, valid = 0.2 }}

[windows]
bases = 120
stride = 120

[cache]
path = {json.dumps(cache)}
codec = "exact"
part = 16
{TINY_STUDENT}
"""
    )
    return folder / "x.toml"


@pytest.mark.parametrize("family", ["bert", pytest.param("esm", marks=pytest.mark.slow)])
def test_both_stages_and_an_audit_run_with_it(
    folders: dict[str, Path], family: str, tmp_path: Path
) -> None:
    recipe = read_recipe(a_recipe(tmp_path, teacher=folders[family]))
    made = extract(recipe, device="cpu")
    assert made.cache_id is not None
    assert integrity.verify(tmp_path / "cache").problems == ()

    plan = Cache.open(tmp_path / "cache").plan
    assert (plan.teacher.channels, plan.teacher.layer) == (24, 2)
    assert plan.licence == "Apache-2.0"
    assert plan.teacher.weights_sha256 == loaded(folders[family]).weights_sha256

    found = audit(tmp_path / "cache", recipe, windows=12, device="cpu")
    assert (found.passed, found.bytes_expected, found.equal_windows) == (True, True, 12)
    summary = distill(recipe, device="cpu")
    assert summary.steps == 4


# --- tokens --------------------------------------------------------------------------------------


@one_of_each
def test_the_table_of_tokens_spells_every_kmer(folders: dict[str, Path], family: str) -> None:
    bases = FAMILIES[family][1]
    found = read_vocabulary(folders[family])
    tokenizer = AutoTokenizer.from_pretrained(folders[family])
    assert found.bases == bases
    assert found.token_of_kmer.shape == (KMERS, 6 // bases)
    spelt = ["".join(tokenizer.convert_ids_to_tokens(list(row))) for row in found.token_of_kmer]
    assert spelt == [spell(i) for i in range(KMERS)]
    special = (len(found.before), len(found.after))
    assert special == {"esm": (1, 0), "roformer": (0, 0)}.get(family, (1, 1))


def test_a_tokenizer_of_small_letters_is_shown_small_letters(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, bases=1, words=list("tgca"))
    with_config(tmp_path)
    found = read_vocabulary(tmp_path)
    # [PAD] to [MASK] are 0 to 4, then t, g, c, a.
    assert found.token_of_kmer[0].tolist() == [8] * 6
    assert found.token_of_kmer[1].tolist() == [8, 8, 8, 8, 8, 7]


def with_config(folder: Path) -> None:
    BertConfig(vocab_size=5000, **WIDTHS).save_pretrained(folder)


def bpe(folder: Path) -> None:
    ids = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}
    ids |= {word: 5 + i for i, word in enumerate(["A", "C", "G", "T", "AC", "GT", "ACGT", "TA"])}
    merges = [("A", "C"), ("G", "T"), ("AC", "GT"), ("T", "A")]
    save_fast(folder, Tokenizer(models.BPE(ids, merges, unk_token="[UNK]")))


def spelt_apart(folder: Path) -> None:
    """As DNABERT has it: a vocabulary of k-mers, and words between spaces."""
    words = ["".join(word) for word in product("ACGT", repeat=6)]
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    save_fast(folder, tokenizer)


def lacking(folder: Path) -> None:
    word_tokenizer(folder, bases=1, words=list("ACG"))


def without_a_mask(folder: Path) -> None:
    word_tokenizer(folder, bases=1)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            told = json.loads((folder / name).read_text())
            told.pop("mask_token", None)
            (folder / name).write_text(json.dumps(told))


def tokenizer_config(folder: Path, **changes: object) -> None:
    word_tokenizer(folder, bases=1)
    told = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def unknown_code(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join([*SPECIALS, *"ACGT"]))
    told = {"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["mine.Mine", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))
    (folder / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(folder / 'ran')!r}).touch()"
    )


def tokenizer_pointer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "byte pairs": (bpe, r"its tokens are of 1 to 4 bases \(byte pairs, BPE: .*\)"),
    "k-mers spelt apart": (spelt_apart, r"does not know plain DNA: .* overlapping k-mers"),
    "tokens of four": (lambda f: word_tokenizer(f, bases=4), "have 4 bases .* no whole number"),
    "no T": (lacking, "does not know plain DNA"),
    "no mask token": (without_a_mask, "its tokenizer has no mask token"),
    "a tokenizer with code": (unknown_code, "cannot be read without running code"),
    "no tokenizer": (lambda f: None, r"neither tokenizer\.json nor vocab\.txt"),
    "a tokenizer of another kind": (
        lambda f: tokenizer_config(f, tokenizer_class="RagTokenizer"),
        "its tokenizer, a RagTokenizer, does not read DNA",
    ),
    "a length that is no number": (
        lambda f: tokenizer_config(f, model_max_length="x"),
        r"its tokenizer, a \w+, does not read DNA",
    ),
    "a pointer": (
        tokenizer_pointer,
        r"tokenizer\.json: a Git LFS pointer in place of the file; .*git lfs pull",
    ),
    "a damaged tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{"),
        "its tokenizer cannot be read",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_tokens_that_cannot_be_told_apart_by_6mers_are_refused_with_the_reason(
    tmp_path: Path, case: str
) -> None:
    make, message = REFUSED[case]
    make(tmp_path)
    with_config(tmp_path)
    with pytest.raises(InputError, match=message):
        read_vocabulary(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_overlapping_kmers_are_refused_as_such(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Sliding:
        """Three bases a token, one base apart, as a tokenizer of DNA may be written."""

        mask_token_id, unk_token_id, model_max_length = 4, 1, 512
        all_special_ids = (0, 1, 2, 3, 4)
        words = tuple("".join(word) for word in product("ACGT", repeat=3))

        def get_vocab(self) -> dict[str, int]:
            return {word: 5 + i for i, word in enumerate(self.words)}

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            ids = [5 + self.words.index(text[i : i + 3]) for i in range(len(text) - 2)]
            return {"input_ids": [2, *ids, 3]}

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [self.words[i - 5] for i in ids]

    monkeypatch.setattr("had_pipe.teachers.masked_lm._tokenizer", lambda folder: Sliding())
    with pytest.raises(InputError, match=r"overlapping k-mers of 3 bases .* hidden base"):
        read_vocabulary(folders["bert"])


# --- folders that do not fit ---------------------------------------------------------------------


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(told))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        stored = safetensors.torch.load_file(folder / "model.safetensors")
        change(stored)
        safetensors.torch.save_file(stored, folder / "model.safetensors", {"format": "pt"})

    return write


def cut_short(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


QUERY = "bert.encoder.layer.1.attention.self.query.weight"

UNFIT: dict[str, tuple[Callable[[Path], None], str]] = {
    "no class": (config(model_type="gpt2"), "has no masked language model that is an encoder"),
    "no such type": (config(model_type="nobody"), "makes no model of it without running code"),
    "decoder": (config(is_decoder=True), "looks to the left alone"),
    "quantised": (config(quantization_config={"quant_method": "gptq"}), "weights are quantised"),
    "10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected"),
    "10^12 wide": (config(hidden_size=10**12), "hidden_size is 1000000000000, expected at most"),
    "10^9 layers below": (
        config(text_config={"num_hidden_layers": 10**9}),
        "num_hidden_layers is 1000000000, expected",
    ),
    "weights elsewhere": (
        config(transformers_weights="../../x.safetensors"),
        "transformers_weights names code or weights that lie elsewhere",
    ),
    "experts from the hub": (
        config(_experts_implementation="some/kernel"),
        "_experts_implementation names code or weights that lie elsewhere",
    ),
    "much wider than stored": (
        config(hidden_size=1 << 14, intermediate_size=1 << 16, num_hidden_layers=200),
        r"numbers, but config\.json describes a BertForMaskedLM of",
    ),
    "heads that do not divide": (config(num_attention_heads=7), "cannot be built of it"),
    "too few rows": (config(vocab_size=8), "the tokenizer has token 8, the model 8 of them"),
    "no positions": (config(max_position_embeddings=3), "leave no room for a 6-mer"),
    "one layer more": (config(num_hidden_layers=4), r"layer\.3\.\S+ is missing \(16 of the enc"),
    "one layer less": (config(num_hidden_layers=2), r"layer\.2\.\S+ is not a key of a BertFor"),
    "other widths": (config(intermediate_size=48), r"intermediate\S+ is 40.*, expected 48"),
    "a tensor of the head missing": (
        weights(lambda w: w.pop("cls.predictions.transform.dense.bias")),
        r"cls\.predictions\.transform\.dense\.bias is missing \(1 of the language head's keys is",
    ),
    "a tied tensor of the head missing": (
        weights(lambda w: w.pop("cls.predictions.bias")),
        r"cls\.predictions\.bias is missing \(2 of the language head's keys are, the others are",
    ),
    "a tensor missing": (weights(lambda w: w.pop(QUERY)), f"{QUERY} is missing"),
    "integers": (
        weights(lambda w: w.update({QUERY: w[QUERY].to(torch.int8)})),
        f"{QUERY} is int8, expected floating point",
    ),
    "a strange tensor": (
        weights(lambda w: w.update({"bert.encoder.gate\x1b[2J": torch.zeros(2)})),
        r"bert\.encoder\.gate\\x1b\[2J is not a key",
    ),
    "cut short": (cut_short, r"model\.safetensors: .* the file is damaged"),
    "a pointer": (pointer, r"model\.safetensors: a Git LFS pointer in place of the weights"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights: neither"),
}


@a_bert
@pytest.mark.parametrize("case", UNFIT)
def test_a_folder_that_does_not_fit_together_is_refused(family_folder: Path, case: str) -> None:
    change, message = UNFIT[case]
    change(family_folder)
    with pytest.raises(InputError, match=message) as caught:
        load(family_folder)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


@a_bert
def test_weights_that_are_no_numbers_are_told_as_such(family_folder: Path) -> None:
    weights(lambda w: w[QUERY].fill_(float("nan")))(family_folder)
    with pytest.raises(NonFiniteError, match="gives NaN or infinity; get the weights again"):
        load(family_folder)


@a_bert
def test_code_in_a_checkpoint_is_never_run(family_folder: Path) -> None:
    config(auto_map={"AutoConfig": "mine.C", "AutoModelForMaskedLM": "mine.M"})(family_folder)
    (family_folder / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(family_folder / 'ran')!r}).touch()"
    )
    load(family_folder)  # a class of that type is transformers' own
    config(model_type="mine")(family_folder)
    with pytest.raises(InputError, match="without running code of the checkpoint"):
        load(family_folder)
    assert not (family_folder / "ran").exists()


@a_bert
@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_kernels_that_a_checkpoint_names_are_not_taken(family_folder: Path, key: str) -> None:
    config(**{key: "some/kernel"})(family_folder)
    assert load(family_folder).numerics["kernels"] == "sdpa"


ANOTHER: dict[str, Callable[[Path], None]] = {
    "a reordered vocabulary": partial(word_tokenizer, bases=1, seed=1),
    "another activation": config(hidden_act="relu"),
}


@pytest.mark.parametrize("change", ANOTHER)
@a_bert
def test_other_tokens_or_settings_under_the_same_weights_are_another_teacher(
    family_folder: Path, folders: dict[str, Path], change: str
) -> None:
    before = loaded(folders["bert"])
    config(dtype="float16", transformers_version="4.0.0", license="mit")(family_folder)
    assert load(family_folder).settings_sha256 == before.settings_sha256
    ANOTHER[change](family_folder)
    after = load(family_folder)
    assert after.weights_sha256 == before.weights_sha256
    assert after.settings_sha256 != before.settings_sha256


@pytest.fixture(scope="module")
def sealed(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a recipe and the finished cache of both."""
    folder = tmp_path_factory.mktemp("sealed")
    shutil.copytree(folders["bert"], folder / "teacher")
    extract(read_recipe(a_recipe(folder, teacher=folder / "teacher")), device="cpu")
    return folder


@pytest.mark.parametrize("change", ANOTHER)
def test_a_sealed_cache_of_other_tokens_or_settings_is_refused_everywhere(
    sealed: Path, tmp_path: Path, change: str
) -> None:
    folder = Path(shutil.copytree(sealed, tmp_path / "here"))
    ANOTHER[change](folder / "teacher")
    there = Cache.open(folder / "cache").plan.teacher.settings_sha256
    here = load(folder / "teacher", layer=2).settings_sha256
    assert there is not None

    recipe = a_recipe(folder, teacher=folder / "teacher")
    for command in (["extract-teacher", recipe], ["cache", "audit", folder / "cache", recipe]):
        refused = CliRunner().invoke(cli.app, [*map(str, command), "--device", "cpu"])
        assert refused.exit_code == CacheMismatch.exit_code
        told = [line for line in refused.stderr.splitlines() if "_sha256" in line]
        assert len(told) == 1  # of one key, with both values
        assert re.search(rf"settings_sha256.*{there[:50]}.*{here[:50]}", told[0])
        assert "weights_sha256" not in told[0]
    with pytest.raises(CacheMismatch, match=r"another teacher \(settings_sha256: there "):
        PartMaker(folder / "cache", load(folder / "teacher", layer=2))

    extract(read_recipe(a_recipe(folder, teacher=folder / "teacher", cache="other")), device="cpu")
    with pytest.raises(CacheMismatch) as caught:
        Stream([folder / "cache", folder / "other"], batch=4, seed=0)
    assert re.findall(r"^  (\S+) ", str(caught.value), re.M) == ["teacher.settings_sha256"]
    assert there in str(caught.value)
    assert here in str(caught.value)
    given = read_recipe(a_recipe(folder, teacher=folder / "teacher", cache="third"))
    given = given.model_copy(
        update={"cache": given.cache.model_copy(update={"statistics": folder / "cache"})}
    )
    with pytest.raises(CacheMismatch, match=r"of another teacher \(settings_sha256: there "):
        extract(given, device="cpu")


def test_what_a_teacher_is_besides_its_weights_is_shown_and_stays(
    sealed: Path, tmp_path: Path
) -> None:
    teacher = Cache.open(sealed / "cache").plan.teacher
    for command in (["cache", "inspect", sealed / "cache"], ["plan", sealed / "x.toml"]):
        shown = CliRunner().invoke(cli.app, [str(word) for word in command])
        assert f"tokenizer and config.json SHA-256 {teacher.settings_sha256}" in shown.stdout
    recode(sealed / "cache", tmp_path / "int8", codec="int8")
    assert Cache.open(tmp_path / "int8").plan.teacher == teacher


@pytest.mark.parametrize("layer", [0, LAYERS + 1, -2])
def test_a_layer_that_does_not_exist_is_refused(folders: dict[str, Path], layer: int) -> None:
    with pytest.raises(RecipeError, match=rf"layer = {layer}: \S+ has blocks 1 to 3; .* or -1"):
        load(folders["bert"], layer=layer)


def test_a_class_without_blocks_of_its_own_gives_its_last_output_alone(tmp_path: Path) -> None:
    word_tokenizer(tmp_path, bases=1)
    sizes = WIDTHS | {"embedding_size": 8}
    save_model(tmp_path, transformers.AlbertConfig(vocab_size=10, **sizes))
    assert load(tmp_path).channels == 24
    with pytest.raises(RecipeError, match="has no list of blocks to choose from; take -1"):
        load(tmp_path, layer=2)


def test_an_ntv2_stays_on_our_own_code_and_a_plain_esm_does_not(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    from had_pipe.teachers.ntv2 import NTv2Config, random_model
    from had_pipe.teachers.ntv2_checkpoint import save_checkpoint

    shape = NTv2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    save_checkpoint(random_model(shape, seed=0), tmp_path)
    for told in ({}, {"model_type": "esm"}):
        config(**told)(tmp_path)
        assert "transformers" not in load(tmp_path).numerics
    assert "transformers" in load(folders["esm"]).numerics
