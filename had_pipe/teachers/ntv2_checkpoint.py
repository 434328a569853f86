"""Nucleotide Transformer v2's folders, laid out as on the hub: read, checked and written.

Names are the hub's; whoever made a folder may be a stranger, so its config.json is bounded and its
tensors are held against it before there is memory for them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor, nn

from had_pipe.dna.kmers import KMERS
from had_pipe.errors import InputError
from had_pipe.teachers.folder import (
    CONFIG_FILE,
    WEIGHT_FILES,
    read_config_file,
    read_weights,
    weight_files,
)
from had_pipe.teachers.ntv2 import MASK_TOKEN, TOKEN_OF_KMER, Block, Head, NTv2, NTv2Config
from had_pipe.teachers.numerics import dtype_name

# Ceilings for a folder that a stranger made; the largest NT-v2 has 32 layers of width 1024.
_MOST = {
    "hidden_size": 1 << 16,
    "num_hidden_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "intermediate_size": 1 << 18,
    "max_position_embeddings": 1 << 20,
    "vocab_size": 1 << 20,
}


def hub_shapes(config: NTv2Config) -> dict[str, tuple[int, ...]]:
    """Every parameter of the hub's model by its own name, the unused ones included."""
    d, half, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    maps = config.num_hidden_layers * config.num_attention_heads
    shapes: dict[str, tuple[int, ...]] = {
        "esm.embeddings.word_embeddings.weight": (vocab, d),
        "esm.embeddings.position_embeddings.weight": (config.max_position_embeddings, d),
    }
    for i in range(config.num_hidden_layers):
        at = f"esm.encoder.layer.{i}"
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            shapes[f"{at}.attention.{part}.weight"] = (d, d)
            shapes[f"{at}.attention.{part}.bias"] = (d,)
        for norm in ("attention.LayerNorm", "LayerNorm"):
            shapes[f"{at}.{norm}.weight"] = shapes[f"{at}.{norm}.bias"] = (d,)
        shapes[f"{at}.intermediate.dense.weight"] = (2 * half, d)
        shapes[f"{at}.output.dense.weight"] = (d, half)
    shapes["esm.encoder.emb_layer_norm_after.weight"] = (d,)
    shapes["esm.encoder.emb_layer_norm_after.bias"] = (d,)
    shapes["esm.contact_head.regression.weight"] = (1, maps)
    shapes["esm.contact_head.regression.bias"] = (1,)
    shapes["lm_head.dense.weight"] = (d, d)
    shapes["lm_head.dense.bias"] = (d,)
    shapes["lm_head.layer_norm.weight"] = shapes["lm_head.layer_norm.bias"] = (d,)
    shapes["lm_head.decoder.weight"] = (vocab, d)
    shapes["lm_head.bias"] = (vocab,)
    return shapes


def _never_needed(key: str) -> bool:
    """Keys a checkpoint may hold that no output depends on: these, and no others, are skipped."""
    return (
        key == "esm.embeddings.position_embeddings.weight"
        or key.startswith("esm.contact_head.")
        or key.endswith(".attention.self.rotary_embeddings.inv_freq")
    )


def _hub_parts(model: NTv2) -> dict[str, Tensor]:
    """The model's own memory under the hub's names: views, so writing to them loads the model."""
    d = model.config.hidden_size
    parts: dict[str, Tensor] = {"esm.embeddings.word_embeddings.weight": model.embedding.weight}

    def put(name: str, module: nn.Module) -> None:
        for kind, tensor in module.named_parameters(recurse=False):
            parts[f"{name}.{kind}"] = tensor

    for i, block in enumerate(model.blocks):
        assert isinstance(block, Block)
        at = f"esm.encoder.layer.{i}"
        for j, part in enumerate(("query", "key", "value")):
            rows = slice(j * d, (j + 1) * d)
            parts[f"{at}.attention.self.{part}.weight"] = block.qkv.weight[rows]
            parts[f"{at}.attention.self.{part}.bias"] = block.qkv.bias[rows]
        put(f"{at}.attention.LayerNorm", block.norm_attention)
        put(f"{at}.attention.output.dense", block.attention_out)
        put(f"{at}.LayerNorm", block.norm_mlp)
        put(f"{at}.intermediate.dense", block.up)
        put(f"{at}.output.dense", block.down)
    put("esm.encoder.emb_layer_norm_after", model.norm)
    if model.head is not None:
        put("lm_head.dense", model.head.dense)
        put("lm_head.layer_norm", model.head.norm)
        parts["lm_head.decoder.weight"] = model.head.decoder.weight
        parts["lm_head.bias"] = model.head.decoder.bias
    return parts


def is_ntv2(config: Mapping[str, object]) -> bool:
    """Whether a config.json is an NT-v2's: the hub's own has no model_type, copies say "esm"."""
    kind = config.get("model_type")
    return kind is None or (kind == "esm" and config.get("add_bias_fnn") is False)


def read_config(folder: Path) -> NTv2Config:
    """The shape told by a folder's config.json; raises InputError where it is not an NT-v2."""
    path = folder / CONFIG_FILE
    found = read_config_file(folder)

    if found.get("model_type", "esm") != "esm":
        raise InputError(
            f"{path}: model_type is {found['model_type']!r}, expected an NT-v2 ('esm' or absent); "
            "name an NT-v2 checkpoint."
        )
    # Each of these changes what the network computes, and every published NT-v2 has them so.
    for key, expected in (
        ("position_embedding_type", "rotary"),
        ("add_bias_fnn", False),
        ("emb_layer_norm_before", False),
        ("token_dropout", False),
        ("is_folding_model", False),
        ("tie_word_embeddings", False),
    ):
        if found.get(key, expected) != expected:
            raise InputError(
                f"{path}: {key} is {found[key]!r}, but NT-v2 has {expected!r}: another "
                "architecture; name an NT-v2 checkpoint."
            )

    def whole(key: str) -> int:
        value = found.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST[key]:
            raise InputError(
                f"{path}: {key} is {json.dumps(value)[:60]}, expected a whole number from 1 to "
                f"{_MOST[key]:,}; get the config.json that belongs to the weights."
            )
        return value

    eps = found.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise InputError(
            f"{path}: layer_norm_eps is {eps!r}, expected a number between 0 and 1; "
            "get the config.json that belongs to the weights."
        )
    config = NTv2Config(
        hidden_size=whole("hidden_size"),
        num_hidden_layers=whole("num_hidden_layers"),
        num_attention_heads=whole("num_attention_heads"),
        intermediate_size=whole("intermediate_size"),
        max_position_embeddings=whole("max_position_embeddings"),
        vocab_size=whole("vocab_size"),
        layer_norm_eps=eps,
    )
    if config.hidden_size % (2 * config.num_attention_heads):
        raise InputError(
            f"{path}: hidden_size {config.hidden_size} does not divide into "
            f"{config.num_attention_heads} heads of an even width; "
            "get the config.json that belongs to the weights."
        )
    if config.vocab_size <= TOKEN_OF_KMER.max():
        raise InputError(
            f"{path}: vocab_size is {config.vocab_size}, too few for {KMERS:,} 6-mers and 6 "
            "special tokens; name an NT-v2 checkpoint."
        )
    if config.max_position_embeddings < 4:
        raise InputError(
            f"{path}: max_position_embeddings is {config.max_position_embeddings}, which leaves no "
            "room for a k-mer; get the config.json that belongs to the weights."
        )
    return config


def load_checkpoint(folder: Path, *, head: Head | Literal["stored"] = "none") -> NTv2:
    """The model of a folder laid out as on the hub, float32 on the CPU, in evaluation mode.

    Needed keys are required, unneeded ones refused, but for the buffers and tables of the hub's
    model that no output depends on and, with head "none", the language-model head. "stored" takes
    that head where there is one.
    """
    config = read_config(folder)
    files = weight_files(folder)
    path = files[0] if len(files) == 1 else folder
    stored = read_weights(files)
    if head == "stored":
        head = "language" if any(key.startswith("lm_head.") for key in stored) else "none"
    with torch.device("meta"):
        model = NTv2(config, head=head)
    # Held against the stored tensors before there is memory for what config.json asks.
    with torch.no_grad():
        parts = _hub_parts(model)
    shapes = hub_shapes(config)

    missing = sorted(parts.keys() - stored.keys())
    if missing:
        raise InputError(
            f"{path}: {missing[0]} is missing ({len(missing)} of {len(parts)} keys are); "
            f"the weights do not belong to this {CONFIG_FILE}, or are not those of an NT-v2."
        )
    for key in sorted(stored):
        ignored = _never_needed(key) or (head == "none" and key.startswith("lm_head."))
        if key not in parts and not ignored:
            raise InputError(
                f"{path}: {key} is not a key of an NT-v2; "
                f"the weights do not belong to this {CONFIG_FILE}, or are another architecture's."
            )
    for key in parts:
        tensor = stored[key]
        if tuple(tensor.shape) != shapes[key]:
            raise InputError(
                f"{path}: {key} is {_by(tensor.shape)}, expected {_by(shapes[key])}"
                + (" (two halves of a gated unit)" if "intermediate" in key else "")
                + f"; the weights do not belong to this {CONFIG_FILE}, or are not an NT-v2's."
            )
        if not tensor.is_floating_point():
            raise InputError(
                f"{path}: {key} is {dtype_name(tensor.dtype)}, expected floating point; "
                "quantised checkpoints are not read."
            )
    model.to_empty(device="cpu")
    with torch.no_grad():
        for key, part in _hub_parts(model).items():
            part.copy_(stored[key])
    return model.eval()


def _by(shape: tuple[int, ...] | torch.Size) -> str:
    return " x ".join(str(s) for s in shape) or "a scalar"


def save_checkpoint(
    model: NTv2,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `load_checkpoint` reads, in the hub's names; `extra` goes to config.json.

    The hub's unused tables (positions, contact head, inverse frequencies) are not written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    described = {
        "architectures": ["EsmForMaskedLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_eps": config.layer_norm_eps,
        "position_embedding_type": "rotary",
        "add_bias_fnn": False,
        "emb_layer_norm_before": False,
        "token_dropout": False,
        "tie_word_embeddings": False,
        "is_folding_model": False,
        "pad_token_id": 1,
        "mask_token_id": MASK_TOKEN,
        "torch_dtype": dtype_name(dtype),
        **(extra or {}),
    }
    tensors = {
        key: part.detach().to(device="cpu", dtype=dtype).contiguous().clone()
        for key, part in _hub_parts(model).items()
    }
    # A reader finds the old weights or the new ones, never half a file.
    aside = folder / f".{WEIGHT_FILES[0]}.{os.getpid()}"
    aside.write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    aside.replace(folder / WEIGHT_FILES[0])
    (folder / CONFIG_FILE).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
