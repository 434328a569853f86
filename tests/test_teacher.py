"""Teachers by name: folders, hub names at a commit, licences, devices, and what `embed` gives."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ECOLI, REPOSITORY
from huggingface_hub import constants as hub_constants
from ntv2_float64 import forward as forward_float64

from had_pipe.dna.kmers import decode_kmers, encode_kmers, group_masks
from had_pipe.dna.reference import read_contigs
from had_pipe.dna.windows import SplitRule, base_windows, tile
from had_pipe.errors import InputError, NetworkError, RecipeError
from had_pipe.job import Job
from had_pipe.recipe import read_recipe
from had_pipe.teachers.ntv2 import NTv2Config, random_model
from had_pipe.teachers.ntv2_checkpoint import load_checkpoint, save_checkpoint
from had_pipe.teachers.teacher import Teacher, load_teacher

DEMO = REPOSITORY / "pipelines" / "demo" / "teacher"
COMMIT = "81b29e5786726d891dbf929404ef20adca5b36f1"
TINY = NTv2Config(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=43,
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(random_model(TINY, seed=1, head="language"), tmp_path / "tiny-teacher")
    return tmp_path / "tiny-teacher"


def load(folder: Path, *, layer: int = -1, dtype: str = "float32") -> Teacher:
    return load_teacher(str(folder), revision=None, layer=layer, device="cpu", dtype=dtype)


def some_kmers(windows: int, kmers: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 4096, (windows, kmers)).astype(np.uint16)


# --- what a teacher says of itself ---------------------------------------------------------------


def test_a_folder_is_named_without_its_path_and_by_its_weights(folder: Path) -> None:
    teacher = load(folder)
    weights = (folder / "model.safetensors").read_bytes()
    assert teacher.name == "tiny-teacher"
    assert teacher.revision is None
    assert teacher.weights_sha256 == hashlib.sha256(weights).hexdigest()
    assert (teacher.k, teacher.channels, teacher.layer, teacher.context) == (6, 16, -1, 40)
    assert teacher.dtype == "float32"
    assert teacher.numerics == {
        "device": "cpu",
        "torch": torch.__version__.split("+")[0],
        "kernels": "sdpa",
        "dtype": "float32",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }


def test_the_class_of_arithmetic_is_plain_data(folder: Path) -> None:
    numerics = dict(load(folder).numerics)
    assert json.loads(json.dumps(numerics)) == numerics


@pytest.mark.parametrize(
    ("config", "card", "licence"),
    [
        ({"licence": "Apache-2.0"}, None, "Apache-2.0"),
        ({"license": "mit"}, "---\nlicense: apache-2.0\n---\n", "MIT"),
        ({}, "---\ntags:\n- dna\nlicense: cc-by-nc-sa-4.0\n---\ntext", "CC-BY-NC-SA-4.0"),
        ({}, "---\nlicense: 'my-own'\n---\n", "my-own"),
        ({}, "# A card\nlicense: mit\n", "unknown"),
        ({}, None, "unknown"),
    ],
    ids=["config", "config-first", "card", "not-spdx", "card-without-header", "nowhere"],
)
def test_the_licence_is_read_from_config_then_card(
    folder: Path, config: dict[str, str], card: str | None, licence: str
) -> None:
    described = json.loads((folder / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(described))
    if card is not None:
        (folder / "README.md").write_text(card)
    assert load(folder).licence == licence


# --- what it gives -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [1, 2, 3, -1])
def test_embeddings_equal_the_float64_forward_of_masked_tokens_without_cls(
    folder: Path, layer: int
) -> None:
    kmer_id_WT = some_kmers(2, 30)
    hidden_WT = group_masks(seed=0, view=0, first=0, windows=2, kmers=30, masked=5)
    found = load(folder, layer=layer).embed(kmer_id_WT, hidden_WT).numpy()
    assert found.shape == (2, 30, 16)
    assert found.dtype == np.float32

    import safetensors.numpy

    weights = safetensors.numpy.load_file(folder / "model.safetensors")
    for row in range(2):
        # A, C, G, T are 0, 2, 3, 1 to the hub, and its first k-mer is token 6.
        digit = np.array([0, 2, 3, 1])[decode_kmers(kmer_id_WT[row]).reshape(-1, 6)]
        token = 6 + digit @ 4 ** np.arange(5, -1, -1)
        token[hidden_WT[row]] = 2
        here = forward_float64(
            np.concatenate([[3], token]), weights, layers=3, heads=2, eps=TINY.layer_norm_eps
        )
        expected = here.final if layer == -1 else here.blocks[layer - 1]
        assert np.abs(found[row] - expected[1:]).max() < 2e-5


def test_what_stands_under_a_mask_changes_nothing(folder: Path) -> None:
    teacher = load(folder)
    kmer_id_WT = some_kmers(3, 20)
    hidden_WT = group_masks(seed=0, view=0, first=0, windows=3, kmers=20, masked=4)
    other_WT = np.where(hidden_WT, some_kmers(3, 20, seed=9), kmer_id_WT).astype(np.uint16)
    assert torch.equal(teacher.embed(kmer_id_WT, hidden_WT), teacher.embed(other_WT, hidden_WT))
    full = np.zeros_like(hidden_WT)
    assert not torch.equal(teacher.embed(kmer_id_WT, full), teacher.embed(other_WT, full))


def test_embedding_twice_gives_the_same_bits_and_no_gradient(folder: Path) -> None:
    teacher = load(folder)
    kmer_id_WT, hidden_WT = some_kmers(4, 20), np.zeros((4, 20), dtype=np.bool_)
    first, second = (teacher.embed(kmer_id_WT, hidden_WT) for _ in range(2))
    assert torch.equal(first, second)
    assert not first.requires_grad


def test_loading_through_the_protocol_needs_no_torch_until_a_teacher_is_loaded() -> None:
    code = "import sys, had_pipe.teachers.teacher; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


# --- what products are in ------------------------------------------------------------------------


def test_a_recipe_says_what_products_are_in_and_the_class_of_arithmetic_tells(folder: Path) -> None:
    (folder.parent / "x.toml").write_text(
        f"""
[teacher]
name = "./{folder.name}"
dtype = "bfloat16"

[[genome]]
name = "g"
path = "g.fa"
splits = {{ valid = ["*"] }}

[windows]
bases = 60
stride = 60

[cache]
path = "cache"
"""
    )
    teacher = Job.of(read_recipe(folder.parent / "x.toml")).load("cpu", True)
    assert teacher.dtype == teacher.numerics["dtype"] == "bfloat16"
    assert teacher.embed(some_kmers(1, 5), np.ones((1, 5), np.bool_)).dtype == torch.bfloat16
    assert {**teacher.numerics, "dtype": "float32"} == load(folder).numerics


def test_a_type_that_no_product_is_in_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="'float16': expected auto, float32, bfloat16"):
        load(folder, dtype="float16")


DEMO_LOWEST, DEMO_MEAN = 0.9997, 0.99998
"""Cosines of a 6-mer in bfloat16 with itself in float32; 0.99987 and 0.99999 were measured."""


@pytest.mark.parametrize("layer", [1, 3, -1])
def test_the_demo_teacher_in_bfloat16_keeps_the_direction_of_every_kmer(layer: int) -> None:
    (contig,) = read_contigs(ECOLI)
    kmer_id_WT = encode_kmers(contig.base[: 8 * 510].reshape(8, 510))
    hidden_WT = group_masks(seed=0, view=0, first=0, windows=8, kmers=85, masked=13)
    exact, rough = (
        load(DEMO, layer=layer, dtype=dtype).embed(kmer_id_WT, hidden_WT).double()
        for dtype in ("float32", "bfloat16")
    )
    cosine = torch.cosine_similarity(exact, rough, dim=-1)
    assert float(cosine.min()) > DEMO_LOWEST
    assert float(cosine.mean()) > DEMO_MEAN


# --- weights in several files --------------------------------------------------------------------


def shard(folder: Path, *, suffix: str) -> dict[str, str]:
    """A folder's weights put into three files, as the hub has large models; file by tensor."""
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem = {".safetensors": "model", ".bin": "pytorch_model"}[suffix]
    holds = {key: f"{stem}-{i % 3 + 1:05d}-of-00003{suffix}" for i, key in enumerate(stored)}
    for name in set(holds.values()):
        some = {key: stored[key] for key in stored if holds[key] == name}
        if suffix == ".bin":
            torch.save(some, folder / name)
        else:
            safetensors.torch.save_file(some, folder / name)
    index = {"metadata": {"total_size": 1}, "weight_map": holds}
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return holds


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_weights_in_several_files_are_the_same_teacher_named_by_all_of_them(
    folder: Path, suffix: str
) -> None:
    kmer_id_WT, hidden_WT = some_kmers(2, 20), np.zeros((2, 20), dtype=np.bool_)
    expected = load(folder).embed(kmer_id_WT, hidden_WT)
    shard(folder, suffix=suffix)
    teacher = load(folder)
    assert torch.equal(teacher.embed(kmer_id_WT, hidden_WT), expected)
    listed = subprocess.run(
        f"LC_ALL=C sha256sum *{suffix} | sha256sum",
        shell=True,
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert teacher.weights_sha256 == listed.split()[0]


def test_what_is_wrong_with_several_files_is_said(folder: Path) -> None:
    holds = shard(folder, suffix=".safetensors")
    index = folder / "model.safetensors.index.json"
    one, two, three = sorted(set(holds.values()))
    whole = (folder / two).read_bytes()

    (folder / two).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=rf"{two}: a Git LFS pointer in place of the weights"):
        load(folder)
    (folder / two).write_bytes(whole[:-100])
    with pytest.raises(InputError, match=rf"{two}: .* the file is damaged"):
        load(folder)
    (folder / two).unlink()
    with pytest.raises(
        InputError, match=rf"{two}: is missing \(1 of the 3 files that model\.safet"
    ):
        load(folder)
    (folder / two).write_bytes((folder / one).read_bytes())
    with pytest.raises(InputError, match=rf"{two}: \S+ stands in another shard too"):
        load(folder)
    for told in (
        {"a": "../model.safetensors"},
        {"a": "/etc/passwd.safetensors"},
        {"a": "x.bin"},
        {str(i): f"{i}.safetensors" for i in range(5_000)},
    ):
        index.write_text(json.dumps({"weight_map": told}))
        with pytest.raises(
            InputError, match=r"its weight_map names [\d,]+ files, expected at most"
        ):
            load(folder)
    for bad in ({}, {"weight_map": {"a": 1}}, {"weight_map": []}):
        index.write_text(json.dumps(bad))
        with pytest.raises(InputError, match="expected a weight_map of tensors"):
            load(folder)
    index.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(InputError, match=r"index\.json: a Git LFS pointer in place of the file"):
        load(folder)
    assert (folder / three).is_file()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 4, -2])
def test_a_layer_that_does_not_exist_is_refused_with_those_that_do(
    folder: Path, layer: int
) -> None:
    with pytest.raises(
        RecipeError, match=rf"layer = {layer}: tiny-teacher has blocks 1 to 3; .* or -1"
    ):
        load(folder, layer=layer)


def test_a_name_that_is_neither_folder_nor_hub_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder that exists nor a hub name"):
        load(tmp_path / "nowhere")


def test_a_folder_with_a_revision_is_refused(folder: Path) -> None:
    with pytest.raises(RecipeError, match="is a folder, which has no commit"):
        load_teacher(str(folder), revision=COMMIT, layer=-1, device="cpu")


@pytest.mark.parametrize("revision", [None, "main", COMMIT[:12], COMMIT.upper()])
def test_a_hub_name_without_a_whole_commit_is_refused(revision: str | None) -> None:
    with pytest.raises(RecipeError, match="needs a commit of 40 hexadecimal digits"):
        load_teacher("org/model", revision=revision, layer=-1, device="cpu", offline=True)


@pytest.mark.parametrize(("device", "message"), [("gpu", "expected auto"), ("cuda:99", "finds")])
def test_a_device_that_is_not_here_is_refused(folder: Path, device: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_teacher(str(folder), revision=None, layer=-1, device=device)


# --- hub names -----------------------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_in_hub_cache(hub_cache: Path, name: str, folder: Path) -> Path:
    """What the hub client leaves behind after a download."""
    home = hub_cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(folder, home / "snapshots" / COMMIT)
    return home / "snapshots" / COMMIT


@pytest.mark.parametrize(
    ("name", "licence"),
    [("InstaDeepAI/nt-v2-tiny", "CC-BY-NC-SA-4.0"), ("someone/dna", "unknown")],
    ids=["instadeep", "someone"],
)
def test_a_hub_name_is_taken_from_the_local_hub_cache(
    hub_cache: Path, folder: Path, name: str, licence: str
) -> None:
    put_in_hub_cache(hub_cache, name, folder)
    teacher = load_teacher(
        name, revision=COMMIT, layer=2, device="cpu", dtype="float32", offline=True
    )
    assert (teacher.name, teacher.revision, teacher.licence) == (name, COMMIT, licence)
    kmer_id_WT, hidden_WT = some_kmers(2, 20), np.zeros((2, 20), dtype=np.bool_)
    expected = load(folder, layer=2).embed(kmer_id_WT, hidden_WT)
    assert torch.equal(teacher.embed(kmer_id_WT, hidden_WT), expected)


def test_a_hub_model_with_pickled_weights_alone_is_loaded(hub_cache: Path, folder: Path) -> None:
    import safetensors.torch

    snapshot = put_in_hub_cache(hub_cache, "org/model", folder)
    weights = safetensors.torch.load_file(snapshot / "model.safetensors")
    (snapshot / "model.safetensors").unlink()
    torch.save(weights, snapshot / "pytorch_model.bin")
    teacher = load_teacher("org/model", revision=COMMIT, layer=-1, device="cpu", offline=True)
    assert teacher.channels == 16


def test_a_hub_name_that_was_never_fetched_is_a_network_error_offline(hub_cache: Path) -> None:
    with pytest.raises(NetworkError, match=r"org/model at 81b29e578672: not in the local hub"):
        load_teacher("org/model", revision=COMMIT, layer=-1, device="cpu", offline=True)


def test_a_hub_that_cannot_be_reached_is_a_network_error(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nothing listens on the discard port; the hub client's waits between its tries are skipped.
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    with pytest.raises(NetworkError, match=r"org/model at 81b29e578672: .* could not be reached"):
        load_teacher("org/model", revision=COMMIT, layer=-1, device="cpu")


# --- the demo's teacher --------------------------------------------------------------------------


DEMO_MARGIN = 0.3
"""Nats under k-mer frequency that the shipped teacher must keep; its card has the figure."""


def test_the_demo_teacher_is_small_free_and_long_enough_for_the_demo() -> None:
    teacher = load(DEMO)
    assert (teacher.channels, teacher.licence) == (128, "Apache-2.0")
    assert teacher.context >= 85
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 8_000_000
    model = load_checkpoint(DEMO, head="language")
    assert 1_500_000 < sum(p.numel() for p in model.parameters()) < 2_500_000


def test_the_demo_teacher_names_hidden_kmers_better_than_their_frequency_does() -> None:
    (contig,) = read_contigs(ECOLI)
    rule = SplitRule.of({"blocks": 50_000, "valid": 0.1}).prepare([(contig.name, len(contig.base))])
    tiles = tile(contig, bases=510, stride=510, splits=rule, include=None, exclude=(), seed=0)
    kmer_id = {
        split: encode_kmers(
            base_windows(contig, tiles.start[tiles.split == rule.names.index(split)], 510)
        )
        for split in ("train", "valid")
    }
    kmer_id_WT = kmer_id["valid"][::6]
    windows, kmers = kmer_id_WT.shape
    hidden_WT = group_masks(seed=0, view=0, first=0, windows=windows, kmers=kmers, masked=13)
    count = np.bincount(kmer_id["train"].ravel(), minlength=4096) + 1.0
    by_frequency = -np.log(count / count.sum())[kmer_id_WT[hidden_WT]].mean()

    model = load_checkpoint(DEMO, head="language")
    with torch.inference_mode():
        feat_WTD = load(DEMO).embed(kmer_id_WT, hidden_WT)
        logits = model.logits(feat_WTD[torch.from_numpy(hidden_WT)])
    # The table of k-mer ids to tokens, once more by spelling.
    digit = np.array([0, 2, 3, 1])[decode_kmers(kmer_id_WT[hidden_WT][:, None])]
    token = 6 + digit @ 4 ** np.arange(5, -1, -1)
    by_teacher = torch.nn.functional.cross_entropy(logits, torch.from_numpy(token)).item()
    assert windows > 100
    assert by_teacher < by_frequency - DEMO_MARGIN
