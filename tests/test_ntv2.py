"""NT-v2 in torch against the reference implementation's arrays and a float64 forward in NumPy."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from ntv2_float64 import forward as forward_float64

from had_pipe.dna.kmers import KMERS, spell
from had_pipe.errors import InputError
from had_pipe.teachers.ntv2 import (
    CLS_TOKEN,
    TOKEN_OF_KMER,
    NTv2,
    NTv2Config,
    RunBlock,
    compiled_block,
    fused_attention,
    random_model,
    rotary_tables,
)
from had_pipe.teachers.ntv2_checkpoint import hub_shapes, load_checkpoint, save_checkpoint

Weights = dict[str, npt.NDArray[np.float32]]
SPECIALS = ["<unk>", "<pad>", "<mask>", "<cls>", "<eos>", "<bos>"]

TINY = NTv2Config(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=40,
    max_position_embeddings=67,
)
V2_500M = NTv2Config(
    hidden_size=1024, num_hidden_layers=29, num_attention_heads=16, intermediate_size=4096
)


def random_weights(config: NTv2Config, *, seed: int) -> Weights:
    """Weights under the hub's names in which nothing hides behind a 0 or a 1."""
    generator = np.random.default_rng(seed)
    weights = {}
    for key, shape in hub_shapes(config).items():
        values = generator.standard_normal(shape)
        if "norm" in key.lower():
            values = 0.2 * values + key.endswith("weight")
        elif len(shape) == 2:
            values /= np.sqrt(shape[1])
        else:
            values *= 0.1
        weights[key] = values.astype(np.float32)
    return weights


def write_folder(folder: Path, config: NTv2Config, weights: Mapping[str, np.ndarray]) -> Path:
    """A checkpoint folder as on the hub, written without our own writer."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: torch.from_numpy(np.ascontiguousarray(v)) for key, v in weights.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    write_config(folder, config)
    return folder


def write_config(folder: Path, config: NTv2Config, **changes: object) -> None:
    described = {
        "auto_map": {"AutoModelForMaskedLM": "modeling_esm.EsmForMaskedLM"},
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "layer_norm_eps": config.layer_norm_eps,
        "position_embedding_type": "rotary",
        "add_bias_fnn": False,
        "emb_layer_norm_before": False,
        "token_dropout": False,
        "tie_word_embeddings": False,
        "is_folding_model": False,
    } | changes
    (folder / "config.json").write_text(json.dumps(described))


@pytest.fixture(scope="module")
def tiny_weights() -> Weights:
    return random_weights(TINY, seed=3)


@pytest.fixture
def tiny_folder(tmp_path: Path, tiny_weights: Weights) -> Path:
    return write_folder(tmp_path / "tiny", TINY, tiny_weights)


# --- the reference implementation's arrays -------------------------------------------------------

REFERENCE_NAMES = {
    "self_attention_layer_norm": "attention.LayerNorm",
    "self_attention/query": "attention.self.query",
    "self_attention/key": "attention.self.key",
    "self_attention/value": "attention.self.value",
    "self_attention/mha_output": "attention.output.dense",
    "final_layer_norm": "LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}


def hub_weights(oracle: Mapping[str, np.ndarray]) -> Weights:
    """The oracle's parameters under the hub's names, matrices turned to (out, in)."""
    root = "param/ntv2tiny/"
    weights: Weights = {
        "esm.embeddings.word_embeddings.weight": oracle[f"{root}~/embed/embeddings"],
    }
    kinds = {"w": "weight", "scale": "weight", "b": "bias", "offset": "bias"}
    head = {
        "emb_layer_norm_after": "esm.encoder.emb_layer_norm_after",
        "lm_head_fc_1": "lm_head.dense",
        "lm_head_layer_norm": "lm_head.layer_norm",
        "lm_final_fc": "lm_head.decoder",
    }
    for key in oracle:
        if not key.startswith(root) or key.endswith("embeddings"):
            continue
        module, kind = key.removeprefix(root).rsplit("/", 1)
        if module.startswith("~/roberta_lm_head/~/"):
            name = f"{head[module.removeprefix('~/roberta_lm_head/~/')]}.{kinds[kind]}"
        else:
            layer, module = module.split("/~/")
            index = int(layer.removeprefix("attention_layer_"))
            name = f"esm.encoder.layer.{index}.{REFERENCE_NAMES[module]}.{kinds[kind]}"
        weights[name.replace("decoder.bias", "bias")] = (
            oracle[key].T if kind == "w" else oracle[key]
        )
    return weights


ORACLE = NTv2Config(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    layer_norm_eps=1e-5,
)
ORACLE_SMALL = NTv2Config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    layer_norm_eps=1e-5,
)
TOLERANCE = 2e-5


def worst(found: torch.Tensor | np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(found, dtype=np.float64) - expected).max())


@pytest.fixture(scope="module")
def oracle(shared: Callable[[str], Path]) -> Mapping[str, np.ndarray]:
    return dict(np.load(shared("oracle/ntv2_reference.npz")))


@pytest.fixture(scope="module")
def oracle_small(shared: Callable[[str], Path]) -> Mapping[str, np.ndarray]:
    return dict(np.load(shared("oracle/ntv2_reference_small.npz")))


def compiled(model: NTv2) -> RunBlock:
    """Its blocks compiled; a skip where torch finds nothing to compile for a CPU with."""
    if not model.norm.weight.is_cuda and shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler here")
    run = compiled_block(model)
    assert run is not None
    return run


def loaded(folder: Path, config: NTv2Config, weights: Weights) -> NTv2:
    return load_checkpoint(write_folder(folder, config, weights), head="language")


@pytest.mark.parametrize(("ids", "out"), [("ids", "out"), ("ids_masked", "outmasked")])
def test_every_layer_and_logit_equals_the_reference_implementation(
    oracle: Mapping[str, np.ndarray], tmp_path: Path, ids: str, out: str
) -> None:
    model = loaded(tmp_path, ORACLE, hub_weights(oracle))
    token = torch.from_numpy(oracle[ids].astype(np.int64))
    attend = token != 1
    real = attend.numpy()
    with torch.inference_mode():
        for layer, name in ((1, "1"), (2, "2"), (-1, "3")):
            feat = model(token, layer=layer, attend_WT=attend).numpy()
            assert worst(feat[real], oracle[f"{out}/embeddings_{name}"][real]) <= TOLERANCE
        logits = model.logits(model(token, attend_WT=attend)).numpy()
    assert worst(logits[real], oracle[f"{out}/logits"][real]) <= TOLERANCE


def test_a_row_of_512_tokens_equals_the_reference_implementation(
    oracle: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    model = loaded(tmp_path, ORACLE, hub_weights(oracle))
    with torch.inference_mode():
        feat = model(torch.from_numpy(oracle["ids_long"].astype(np.int64)))
        logits = model.logits(feat[:, :32])
    assert worst(feat, oracle["outlong/embeddings_3"]) <= TOLERANCE
    assert worst(logits, oracle["outlong/logits"]) <= TOLERANCE


@pytest.mark.slow
def test_compiled_blocks_equal_the_reference_implementation(
    oracle: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    model = loaded(tmp_path, ORACLE, hub_weights(oracle))
    run = compiled(model)
    token = torch.from_numpy(oracle["ids_masked"].astype(np.int64))
    attend = token != 1
    real = attend.numpy()
    with torch.inference_mode():
        for layer, name in ((1, "1"), (2, "2"), (-1, "3")):
            feat = model(token, layer=layer, attend_WT=attend, run=run)
            expected = oracle[f"outmasked/embeddings_{name}"]
            assert worst(feat.numpy()[real], expected[real]) <= TOLERANCE
        logits = model.logits(feat).numpy()
    assert worst(logits[real], oracle["outmasked/logits"][real]) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_cuda_in_float32_equals_the_reference_implementation(
    oracle: Mapping[str, np.ndarray], tmp_path: Path, fused: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    model = loaded(tmp_path, ORACLE, hub_weights(oracle)).to("cuda")
    run = compiled(model) if fused else None
    # Rows without padding: with a mask there is no flash attention.
    rows = [row[row != 1] for row in oracle["ids_masked"]] + [oracle["ids_long"][0]]
    with torch.inference_mode(), fused_attention(model):
        for i, row in enumerate(rows):
            token = torch.from_numpy(row.astype(np.int64))[None].to("cuda")
            for layer, name in ((1, "1"), (2, "2"), (-1, "3")):
                feat = model(token, layer=layer, run=run)[0].cpu()
                if i < 3:
                    assert worst(feat, oracle[f"outmasked/embeddings_{name}"][i, : len(row)]) < 1e-4
            if i == 3:
                assert worst(feat, oracle["outlong/embeddings_3"][0]) < 1e-4


ORACLE_LOWEST, ORACLE_MEAN = 0.9996, 0.99994
"""Cosines of a token in bfloat16 with itself in float32; 0.99985 and 0.99997 were measured."""


def test_bfloat16_keeps_the_direction_of_the_reference_implementations_tokens(
    oracle: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    token = torch.from_numpy(oracle["ids_long"].astype(np.int64))
    model = loaded(tmp_path, ORACLE, hub_weights(oracle)).compute_in(torch.bfloat16)
    with torch.inference_mode():
        rough = model(token).double()
    expected = torch.from_numpy(oracle["outlong/embeddings_3"]).double()
    cosine = torch.cosine_similarity(rough, expected, dim=-1)
    assert float(cosine.min()) > ORACLE_LOWEST
    assert float(cosine.mean()) > ORACLE_MEAN


def test_the_smaller_model_equals_the_reference_implementation(
    oracle_small: Mapping[str, np.ndarray], tmp_path: Path
) -> None:
    model = loaded(tmp_path, ORACLE_SMALL, hub_weights(oracle_small))
    token = torch.from_numpy(oracle_small["ids"].astype(np.int64))
    attend = token != 1
    real = attend.numpy()
    with torch.inference_mode():
        first = model(token, layer=1, attend_WT=attend).numpy()
        last = model(token, attend_WT=attend)
        logits = model.logits(last[:, 5])
    assert worst(first[real], oracle_small["emb_1"][real]) <= TOLERANCE
    assert worst(last.numpy()[real], oracle_small["emb_2"][real]) <= TOLERANCE
    assert worst(logits, oracle_small["logits_pos5"]) <= TOLERANCE


def test_the_float64_forward_equals_the_reference_implementation(
    oracle: Mapping[str, np.ndarray],
) -> None:
    weights = hub_weights(oracle)
    for row, ids in enumerate(oracle["ids_masked"]):
        real = ids[ids != 1]
        here = forward_float64(real, weights, layers=3, heads=4, eps=1e-5)
        tokens = len(real)
        for found, name in ((here.blocks[0], 1), (here.blocks[1], 2), (here.final, 3)):
            expected = oracle[f"outmasked/embeddings_{name}"][row, :tokens]
            assert worst(found, expected) <= TOLERANCE
        assert worst(here.logits, oracle["outmasked/logits"][row, :tokens]) <= TOLERANCE


# --- the float64 forward, which needs no shared data ---------------------------------------------


@pytest.mark.parametrize("eps", [1e-12, 1e-5], ids=["hub-eps", "reference-eps"])
def test_every_layer_and_logit_equals_the_float64_forward(
    tmp_path: Path, tiny_weights: Weights, eps: float
) -> None:
    folder = write_folder(tmp_path, TINY, tiny_weights)
    write_config(folder, TINY, layer_norm_eps=eps)
    model = load_checkpoint(folder, head="language")
    generator = np.random.default_rng(5)
    token_WT = generator.integers(2, TINY.vocab_size, size=(2, 64))
    token_WT[:, 0] = 3
    with torch.inference_mode():
        token = torch.from_numpy(token_WT)
        blocks = [model(token, layer=layer) for layer in (1, 2, 3)]
        final = model(token)
        logits = model.logits(final)
    for row in range(2):
        here = forward_float64(token_WT[row], tiny_weights, layers=3, heads=2, eps=eps)
        for block, expected in zip(blocks, here.blocks, strict=True):
            assert worst(block[row], expected) <= TOLERANCE
        assert worst(final[row], here.final) <= TOLERANCE
        assert worst(logits[row], here.logits) <= TOLERANCE


def test_the_two_eps_values_can_be_told_apart(tiny_weights: Weights) -> None:
    """Else the parity above would not show that eps is read from the folder."""
    token = np.arange(3, 40)
    weights = tiny_weights | {
        "esm.embeddings.word_embeddings.weight": 0.05
        * tiny_weights["esm.embeddings.word_embeddings.weight"]
    }
    hub, reference = (
        forward_float64(token, weights, layers=3, heads=2, eps=eps).final for eps in (1e-12, 1e-5)
    )
    assert worst(hub, reference) > 5 * TOLERANCE


def repeats(*, seed: int) -> npt.NDArray[np.int64]:
    """A window of 2,047 k-mers: poly-A, then a microsatellite, then anything."""
    assert ORACLE.context == 2047
    other = np.random.default_rng(seed).integers(0, KMERS, 647)
    acacac, cacaca = 0b000100010001, 0b010001000100
    kmer_id = np.concatenate([np.zeros(700), np.resize([acacac, cacaca], 700), other])
    return np.concatenate([[CLS_TOKEN], TOKEN_OF_KMER[kmer_id.astype(np.int64)]])


@pytest.mark.parametrize(
    "fused", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "compiled"]
)
def test_repeats_in_the_longest_context_equal_the_float64_forward(
    tmp_path: Path, fused: bool
) -> None:
    weights = random_weights(ORACLE, seed=3)
    model = load_checkpoint(write_folder(tmp_path, ORACLE, weights))
    run = compiled(model) if fused else None
    row = repeats(seed=0)
    here = forward_float64(row, weights, layers=3, heads=4, eps=ORACLE.layer_norm_eps)
    token = torch.from_numpy(row)[None]
    with torch.inference_mode():
        for layer, expected in ((1, here.blocks[0]), (2, here.blocks[1]), (-1, here.final)):
            assert worst(model(token, layer=layer, run=run)[0], expected) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_cuda_repeats_in_the_longest_context_equal_the_float64_forward(
    tmp_path: Path, fused: bool
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    weights = random_weights(ORACLE, seed=3)
    model = load_checkpoint(write_folder(tmp_path, ORACLE, weights)).to("cuda")
    run = compiled(model) if fused else None
    row = repeats(seed=0)
    here = forward_float64(row, weights, layers=3, heads=4, eps=ORACLE.layer_norm_eps)
    token = torch.from_numpy(row)[None].to("cuda")
    with torch.inference_mode(), fused_attention(model):
        for layer, expected in ((1, here.blocks[0]), (2, here.blocks[1]), (-1, here.final)):
            assert worst(model(token, layer=layer, run=run)[0].cpu(), expected) < 1e-4


def test_a_window_of_nothing_but_poly_a_equals_the_float64_forward(
    tmp_path: Path, tiny_weights: Weights
) -> None:
    model = load_checkpoint(write_folder(tmp_path, TINY, tiny_weights))
    row = np.full(65, TOKEN_OF_KMER[0])
    here = forward_float64(row, tiny_weights, layers=3, heads=2, eps=TINY.layer_norm_eps)
    with torch.inference_mode():
        assert worst(model(torch.from_numpy(row)[None])[0], here.final) <= TOLERANCE


def test_bfloat16_products_keep_every_token_close_to_float32(tiny_folder: Path) -> None:
    token = torch.from_numpy(np.random.default_rng(1).integers(6, 4102, size=(2, 60)))
    with torch.inference_mode():
        exact = load_checkpoint(tiny_folder)(token)
        model = load_checkpoint(tiny_folder).compute_in(torch.bfloat16)
        rough = model(token)
    assert model.blocks[0].qkv.weight.dtype == torch.bfloat16
    assert rough.dtype == torch.float32
    assert float(torch.cosine_similarity(exact, rough, dim=-1).min()) > 0.999


def test_rotary_angles_are_those_of_float64_to_float32_rounding() -> None:
    cos, sin = rotary_tables(2048, 64, torch.device("cpu"))
    assert cos.dtype == sin.dtype == torch.float32
    angle = np.arange(2048)[:, None] * 10_000.0 ** (-np.arange(0, 64, 2) / 64)
    # Position 2,047 rounds to 1.2e-4 in float32; half precision would be off by radians.
    assert worst(cos[:, 0], np.cos(angle)) < 3e-4
    assert worst(sin[:, 0], np.sin(angle)) < 3e-4


# --- tokens --------------------------------------------------------------------------------------


def test_token_ids_follow_the_hubs_vocabulary() -> None:
    vocabulary = (
        SPECIALS + ["".join(word) for word in product("ATCG", repeat=6)] + ["A", "T", "C", "G", "N"]
    )
    text = "\n".join(vocabulary).encode()
    digest = hashlib.sha256(text).hexdigest()
    assert (len(text), digest[:8], digest[-4:]) == (28_718, "c00e0ad1", "1052")
    assert [vocabulary[token] for token in TOKEN_OF_KMER] == [spell(i) for i in range(4096)]


# --- sizes ---------------------------------------------------------------------------------------

SIZES = {
    "50m": (512, 12, 2048, 55_904_972, 55_905_164),
    "100m": (512, 22, 2048, 97_889_132, 97_889_484),
    "250m": (768, 24, 3072, 235_120_780, 235_121_356),
    "500m": (1024, 29, 4096, 498_345_436, 498_346_364),
}


@pytest.mark.parametrize("size", SIZES)
def test_every_published_size_has_the_published_parameter_count(size: str) -> None:
    hidden, layers, half, parameters, stored = SIZES[size]
    config = NTv2Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=16, intermediate_size=half
    )
    shapes = hub_shapes(config)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == parameters
    assert parameters + layers * config.head_dim // 2 == stored
    with torch.device("meta"):
        model = NTv2(config, head="language")
    unused = 2050 * hidden + layers * 16 + 1
    assert sum(p.numel() for p in model.parameters()) == parameters - unused


def test_the_500m_shape_has_447_tensors_and_490_984_448_parameters_in_the_encoder() -> None:
    assert len(hub_shapes(V2_500M)) + 29 == 447
    with torch.device("meta"):
        model = NTv2(V2_500M)
    assert sum(p.numel() for p in model.parameters()) == 490_984_448


@pytest.mark.slow
def test_the_500m_shape_runs_forward_with_random_weights() -> None:
    model = random_model(V2_500M, seed=0)
    token = torch.from_numpy(np.random.default_rng(0).integers(6, 4102, size=(1, 32)))
    with torch.inference_mode():
        feat = model(token)
    assert feat.shape == (1, 32, 1024)
    assert bool(torch.isfinite(feat).all())
    # Out of a layer norm with weight 1 and bias 0 every token has mean 0 and variance 1.
    assert torch.allclose(feat.var(dim=-1, correction=0), torch.ones(1, 32), atol=1e-3)
    assert float(feat.std(dim=1).mean()) > 0.1


# --- layers ---------------------------------------------------------------------------------------


def test_blocks_above_the_chosen_layer_are_not_run(tiny_folder: Path) -> None:
    model = load_checkpoint(tiny_folder)
    token = torch.arange(6, 40)[None]
    with torch.inference_mode():
        expected = model(token, layer=2)
        del model.blocks[2:]
        model.norm.weight.fill_(float("nan"))
        assert torch.equal(model(token, layer=2), expected)


# --- folders -------------------------------------------------------------------------------------


def features(model: NTv2) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.arange(6, 40)[None])


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_a_pickled_checkpoint_gives_the_same_features(
    tmp_path: Path, tiny_folder: Path, tiny_weights: Weights, zipped: bool
) -> None:
    other = tmp_path / "bin"
    other.mkdir()
    write_config(other, TINY)
    torch.save(
        {k: torch.from_numpy(v) for k, v in tiny_weights.items()},
        other / "pytorch_model.bin",
        _use_new_zipfile_serialization=zipped,
    )
    assert torch.equal(features(load_checkpoint(other)), features(load_checkpoint(tiny_folder)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_saving_and_loading_rounds_only_to_the_stored_type(
    tmp_path: Path, tiny_folder: Path, dtype: torch.dtype
) -> None:
    model = load_checkpoint(tiny_folder, head="language")
    save_checkpoint(model, tmp_path / "again", dtype=dtype, extra={"licence": "Apache-2.0"})
    again = load_checkpoint(tmp_path / "again", head="language")
    assert again.config == model.config
    for (name, before), (_, after) in zip(
        model.named_parameters(), again.named_parameters(), strict=True
    ):
        assert after.dtype == torch.float32
        assert torch.equal(after, before.to(dtype).float()), name
    assert json.loads((tmp_path / "again" / "config.json").read_text())["licence"] == "Apache-2.0"
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_exactly_the_unused_keys_may_be_absent_or_present(
    tmp_path: Path, tiny_folder: Path, tiny_weights: Weights
) -> None:
    unused = {
        "esm.embeddings.position_embeddings.weight",
        "esm.contact_head.regression.weight",
        "esm.contact_head.regression.bias",
    }
    buffers = {
        f"esm.encoder.layer.{i}.attention.self.rotary_embeddings.inv_freq": np.ones(
            6, dtype=np.float32
        )
        for i in range(3)
    }
    bare = {k: v for k, v in tiny_weights.items() if k not in unused and "lm_head" not in k}
    expected = features(load_checkpoint(tiny_folder))
    for name, weights in (("bare", bare), ("full", tiny_weights | buffers)):
        assert torch.equal(
            features(load_checkpoint(write_folder(tmp_path / name, TINY, weights))), expected
        )


@given(st.sampled_from(sorted(k for k in hub_shapes(TINY) if not k.startswith("esm.contact"))))
def test_every_needed_key_is_required_and_named(key: str) -> None:
    weights = {
        k: np.zeros(shape, dtype=np.float16) for k, shape in hub_shapes(TINY).items() if k != key
    }
    with tempfile.TemporaryDirectory() as name:
        folder = write_folder(Path(name), TINY, weights)
        if "position_embeddings" in key:
            load_checkpoint(folder, head="language")
            return
        with pytest.raises(InputError, match=f"{key} is missing"):
            load_checkpoint(folder, head="language")


def test_a_key_of_another_architecture_is_refused(tmp_path: Path, tiny_weights: Weights) -> None:
    more = {"esm.pooler.dense.weight": np.ones((24, 24), dtype=np.float32)}
    folder = write_folder(tmp_path, TINY, tiny_weights | more)
    with pytest.raises(InputError, match=r"esm\.pooler\.dense\.weight is not a key of an NT-v2"):
        load_checkpoint(folder)


def test_an_esm_without_gated_units_is_refused_by_the_shape(
    tmp_path: Path, tiny_weights: Weights
) -> None:
    key = "esm.encoder.layer.1.intermediate.dense.weight"
    folder = write_folder(tmp_path, TINY, tiny_weights | {key: tiny_weights[key][:40]})
    with pytest.raises(InputError, match=rf"{key} is 40 x 24, expected 80 x 24 \(two halves"):
        load_checkpoint(folder)


def test_quantised_weights_are_refused(tmp_path: Path, tiny_weights: Weights) -> None:
    key = "esm.encoder.emb_layer_norm_after.bias"
    folder = write_folder(tmp_path, TINY, tiny_weights | {key: np.zeros(24, dtype=np.int8)})
    with pytest.raises(InputError, match=f"{key} is int8, expected floating point"):
        load_checkpoint(folder)


def test_a_git_lfs_pointer_is_named_as_such(tiny_folder: Path) -> None:
    (tiny_folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    with pytest.raises(InputError, match=r"model\.safetensors: a Git LFS pointer in place"):
        load_checkpoint(tiny_folder)


@pytest.mark.parametrize("keep", [0, 7, 4_000], ids=["empty", "no-header", "cut-short"])
def test_a_damaged_weight_file_is_an_input_error(tiny_folder: Path, keep: int) -> None:
    path = tiny_folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(InputError, match=r"model\.safetensors: .* the file is damaged"):
        load_checkpoint(tiny_folder)
    (tiny_folder / "pytorch_model.bin").write_bytes(whole[:keep])
    path.unlink()
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .* the file is damaged"):
        load_checkpoint(tiny_folder)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before-torch-1.6"])
def test_flipped_bits_in_a_pickled_checkpoint_never_raise_anything_else(
    tmp_path: Path, tiny_weights: Weights, zipped: bool
) -> None:
    write_config(tmp_path, TINY)
    path = tmp_path / "pytorch_model.bin"
    torch.save(
        {k: torch.from_numpy(v) for k, v in tiny_weights.items()},
        path,
        _use_new_zipfile_serialization=zipped,
    )
    whole = path.read_bytes()
    refused = 0
    for seed in range(40):
        generator = np.random.default_rng(seed)
        damaged = bytearray(whole)
        # The pickle lies in front, the directory of a zip at the end.
        for at in generator.integers(0, 3_000, size=3):
            damaged[at if seed % 2 else -1 - at] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            load_checkpoint(tmp_path)
        except InputError:
            refused += 1
    assert refused > 10


class Payload:
    """Runs when unpickled by an unguarded loader."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    torch.save({"a": Payload(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model\.bin: .* the file is damaged"):
        load_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_or_config_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"there is no config\.json"):
        load_checkpoint(tmp_path)
    write_config(tmp_path, TINY)
    with pytest.raises(InputError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"position_embedding_type": "absolute"}, "position_embedding_type is 'absolute'"),
        ({"token_dropout": True}, "token_dropout is True"),
        ({"hidden_size": "24"}, 'hidden_size is "24", expected a whole number'),
        ({"num_hidden_layers": None}, "num_hidden_layers is null"),
        ({"num_attention_heads": 5}, "does not divide into 5 heads"),
        ({"vocab_size": 30}, "vocab_size is 30, too few"),
        ({"max_position_embeddings": 3}, "no room for a k-mer"),
        ({"layer_norm_eps": -1.0}, "layer_norm_eps is -1.0"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_of_something_else_is_refused_with_its_key(
    tiny_folder: Path, changes: dict[str, object], message: str
) -> None:
    write_config(tiny_folder, TINY, **changes)
    with pytest.raises(InputError, match=message):
        load_checkpoint(tiny_folder)


def test_a_config_that_is_not_json_is_refused(tiny_folder: Path) -> None:
    (tiny_folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="not readable as JSON"):
        load_checkpoint(tiny_folder)
    (tiny_folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="expected a JSON object"):
        load_checkpoint(tiny_folder)
