"""Any masked language model over DNA that transformers itself can build, as a teacher.

Its tokens must spell DNA one after the other: a token of 6, 3, 2 or 1 bases, so that a 6-mer is a
whole number of them. A 6-mer's vector is its token's, or the mean of its tokens'; of a hidden 6-mer
all tokens are replaced by the mask token. No code of a checkpoint is ever run.

W windows, T 6-mers, P tokens of a 6-mer, D channels, V tokens of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from had_pipe.dna.kmers import KMERS, LETTERS, K, decode_kmers
from had_pipe.errors import InputError, NonFiniteError, RecipeError
from had_pipe.teachers.folder import (
    CONFIG_FILE,
    TOKENIZER_FILES,
    read_config_file,
    read_weights,
    refuse_pointer,
    weight_files,
)
from had_pipe.teachers.numerics import compute_dtype, dtype_name, numerics

# Ceilings for a folder that a stranger made.
_LARGEST_TOKENIZER = 1 << 26
_LARGEST_NUMBER = 1 << 20
_MOST_LAYERS = 1 << 10
_MOST_SPECIAL = 8

# Settings by which a config.json has transformers take code or weights from another place.
_ELSEWHERE = {"experts_implementation", "use_kernels", "transformers_weights"}

# What config.json says that changes no output.
_BOOKKEEPING = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "licence",
    "license",
    "torch_dtype",
    "transformers_version",
}

# Stored, or missing, without a say in any output: what other heads and older versions leave.
_IDLE = re.compile(
    r"(^|\.)(pooler|contact_head|seq_relationship|classifier|qa_outputs)\."
    r"|(^|\.)(position_ids|token_type_ids|inv_freq)$"
)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """How a checkpoint's own tokenizer writes DNA."""

    bases: int
    """Of one token."""
    token_of_kmer: npt.NDArray[np.int64]
    """The tokens of every k-mer id, (4096, P)."""
    mask: int
    before: tuple[int, ...]
    """Special tokens in front of a window, and behind it."""
    after: tuple[int, ...]
    most_tokens: int | None
    """What the tokenizer says a sequence may have, special tokens included."""

    @property
    def digest(self) -> str:
        """Which tokens stand for what."""
        table = self.token_of_kmer.astype("<i8").tobytes()
        special = repr((self.bases, self.mask, self.before, self.after)).encode()
        return hashlib.sha256(special + table).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a folder says of its model before any weight is read."""

    model_class: Any
    config: Any
    settings: str
    """Which config.json, but for what changes no output: a digest."""
    vocabulary: Vocabulary
    channels: int
    blocks: int
    context: int
    """Most 6-mers of a window."""

    @property
    def settings_sha256(self) -> str:
        """Of its tokens and settings: others under the same weights are another teacher."""
        return hashlib.sha256(f"{self.vocabulary.digest} {self.settings}".encode()).hexdigest()


def read_vocabulary(folder: Path) -> Vocabulary:
    """The tokenizer's ids of every 6-mer, held against what it makes of DNA itself.

    Raises InputError where its tokens cannot be told apart by 6-mers.
    """
    tokenizer = _tokenizer(folder)
    try:
        with _quiet():
            return _vocabulary(folder, tokenizer)
    except InputError:
        raise
    except Exception as error:  # classes for other things than text, settings of the wrong type
        raise InputError(
            f"{folder}: its tokenizer, a {type(tokenizer).__name__}, does not read DNA "
            f"({_first_line(error)}); get the tokenizer that belongs to the weights."
        ) from error


def _vocabulary(folder: Path, tokenizer: Any) -> Vocabulary:
    mask = tokenizer.mask_token_id
    if not isinstance(mask, int):
        raise InputError(
            f"{folder}: its tokenizer has no mask token, so this is no masked language model; "
            "name one that is."
        )
    texts = _texts()
    vocabulary = tokenizer.get_vocab()
    for bases in (6, 3, 2, 1):
        for spelt in (str.upper, str.lower):
            table = _table(vocabulary, bases, spelt)
            if table is None:
                continue
            found = [tokenizer(spelt(text), truncation=False)["input_ids"] for text in texts]
            special = _special_around(found, texts, table)
            if special is not None:
                before, after = special
                most = tokenizer.model_max_length
                return Vocabulary(
                    bases=bases,
                    token_of_kmer=table,
                    mask=mask,
                    before=before,
                    after=after,
                    # Where nothing is said it is an absurdly large number.
                    most_tokens=most if isinstance(most, int) and most < 1 << 40 else None,
                )
    raise InputError(f"{folder}: {_why_not(tokenizer, texts[0])}")


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise InputError(
            f"{folder}: there is no tokenizer, neither tokenizer.json nor vocab.txt; a masked "
            "language model's folder holds one beside the weights; get the whole checkpoint, a hub "
            "name's with `had-pipe teachers fetch`."
        )
    for name in TOKENIZER_FILES:
        path = folder / name
        if path.exists() and (not path.is_file() or path.stat().st_size > _LARGEST_TOKENIZER):
            raise InputError(
                f"{path}: expected an ordinary file of at most {_LARGEST_TOKENIZER:,} bytes; "
                "get the file again."
            )
        refuse_pointer(path)
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # each kind of tokenizer trips over a damaged file in its own way
        raise InputError(
            f"{folder}: its tokenizer cannot be read without running code of the checkpoint "
            f"({_first_line(error)}); only tokenizers that transformers {transformers.__version__} "
            "has itself are taken."
        ) from error


def _texts() -> list[str]:
    """Every 6-mer once, in windows of 64 in random order, then a few with repeats."""
    generator = np.random.default_rng(0)
    kmer_id_WT = generator.permutation(KMERS).astype(np.uint16).reshape(-1, 64)
    texts = ["".join(LETTERS[b] for b in row) for row in decode_kmers(kmer_id_WT)]
    return [*texts, "A" * 48, "AC" * 24, "T" * 24 + "G" * 24]


def _table(vocabulary: Mapping[str, int], bases: int, spelt: Any) -> npt.NDArray[np.int64] | None:
    """The tokens of every k-mer id (4096, P), or None where the vocabulary lacks one."""
    base_KS = decode_kmers(np.arange(KMERS, dtype=np.uint16)[:, None])
    words = ["".join(LETTERS[b] for b in row) for row in base_KS]
    pieces = [[spelt(word[i : i + bases]) for i in range(0, K, bases)] for word in words]
    if not all(piece in vocabulary for row in pieces for piece in row):
        return None
    return np.array([[vocabulary[piece] for piece in row] for row in pieces], dtype=np.int64)


def _special_around(
    found: Sequence[Sequence[int]], texts: Sequence[str], table: npt.NDArray[np.int64]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Special tokens before and after every window, where all else is as the table says."""
    place = 4 ** np.arange(K - 1, -1, -1)
    around = None
    for ids, text in zip(found, texts, strict=True):
        base = np.array([LETTERS.index(letter) for letter in text])
        expected = table[base.reshape(-1, K) @ place].ravel().tolist()
        more = len(ids) - len(expected)
        if not 0 <= more <= _MOST_SPECIAL:
            return None
        if around is None:  # of the first window, in which no two places look alike
            starts = [i for i in range(more + 1) if ids[i : i + len(expected)] == expected]
            if not starts:
                return None
            around = tuple(ids[: starts[0]]), tuple(ids[starts[0] + len(expected) :])
        if list(ids) != [*around[0], *expected, *around[1]]:
            return None
    return around


def _why_not(tokenizer: Any, text: str) -> str:
    """Why a tokenizer's tokens cannot be told apart by 6-mers, and what to do."""
    ids = tokenizer(text, truncation=False)["input_ids"]
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    inner = [i for i in ids if i not in special]
    tokens = [str(token) for token in tokenizer.convert_ids_to_tokens(inner)]
    shown = " ".join(tokens[:4])[:80]
    if tokenizer.unk_token_id in inner:
        return (
            f"its tokenizer does not know plain DNA: of {text[:12]}... it makes {shown}. Models of "
            "overlapping k-mers (DNABERT) want them spelt apart: they show a hidden base through "
            "its neighbours' tokens, so 6-mers cannot be hidden; name a model whose tokens stand "
            "one after the other."
        )
    lengths = sorted({len(token) for token in tokens})
    if len(lengths) == 1 and len(tokens) == len(text) - lengths[0] + 1 and lengths[0] > 1:
        return (
            f"its tokens are overlapping k-mers of {lengths[0]} bases ({shown} ...): a hidden base "
            "would show in its neighbours' tokens, so 6-mers cannot be hidden; name a model whose "
            "tokens stand one after the other."
        )
    if "".join(tokens).upper() == text and len(lengths) > 1:
        return (
            f"its tokens are of {lengths[0]} to {lengths[-1]} bases (byte pairs, BPE: {shown} ...) "
            "and do not end where 6-mers do; name a model with a token for every 6, 3, 2 or 1 "
            "bases."
        )
    if "".join(tokens).upper() == text:
        return (
            f"its tokens have {lengths[0]} bases ({shown} ...), of which 6-mers are no whole "
            "number; name a model with a token for every 6, 3, 2 or 1 bases."
        )
    return (
        f"of {text[:12]}... its tokenizer makes {shown}, which does not spell it; "
        "name a model with a token for every 6, 3, 2 or 1 bases."
    )


def read_shape(folder: Path) -> Shape:
    """Class, tokens and sizes, without the weights. Raises InputError."""
    path = folder / CONFIG_FILE
    said = read_config_file(folder)
    _check_config(path, said)
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
    except Exception as error:  # a damaged or foreign config.json is refused in many ways
        raise InputError(
            f"{path}: transformers {transformers.__version__} makes no model of it without running "
            f"code of the checkpoint ({_first_line(error)}); name a model of its own classes."
        ) from error
    model_class: Any = MODEL_FOR_MASKED_LM_MAPPING.get(type(config), None)
    if model_class is None or config.is_encoder_decoder:
        raise InputError(
            f"{path}: model_type is {str(config.model_type)[:60]!r}, of which transformers "
            f"{transformers.__version__} has no masked language model that is an encoder alone; "
            "name an ESM, BERT, RoFormer, ModernBERT or the like."
        )
    vocabulary = read_vocabulary(folder)
    # A name of kernels on the hub would be fetched and run.
    config._attn_implementation = "eager"
    try:
        with torch.device("meta"):
            skeleton = model_class(config)
        channels, blocks = int(config.hidden_size), int(config.num_hidden_layers)
        rows = skeleton.get_input_embeddings().num_embeddings
    except Exception as error:
        raise InputError(
            f"{path}: {model_class.__name__} cannot be built of it ({_first_line(error)}); "
            "get the config.json that belongs to the weights."
        ) from error
    largest = max(
        int(vocabulary.token_of_kmer.max()), vocabulary.mask, *vocabulary.before, *vocabulary.after
    )
    if largest >= rows:
        raise InputError(
            f"{folder}: the tokenizer has token {largest:,}, the model {rows:,} of them; "
            "get the tokenizer that belongs to the weights."
        )
    return Shape(
        model_class=model_class,
        config=config,
        settings=_settings(said),
        vocabulary=vocabulary,
        channels=channels,
        blocks=blocks,
        context=_context(path, skeleton.base_model, config, vocabulary),
    )


def _check_config(path: Path, told: Mapping[str, Any]) -> None:
    """Raises InputError for what transformers would take as it stands and we do not."""
    left = list(told.items())
    while left:
        key, value = left.pop()
        most = _MOST_LAYERS if "layers" in key else _LARGEST_NUMBER
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) > most:
            raise InputError(
                f"{path}: {key[:60]} is {str(value)[:60]}, expected at most {most:,}; get the "
                "config.json that belongs to the weights."
            )
        if isinstance(value, dict):
            left += value.items()
        if value and key.lstrip("_") in _ELSEWHERE:
            raise InputError(
                f"{path}: {key} names code or weights that lie elsewhere; remove the line."
            )
    if told.get("quantization_config"):
        raise InputError(
            f"{path}: the weights are quantised (quantization_config); name the checkpoint in "
            "floating point."
        )
    if told.get("is_decoder"):
        raise InputError(
            f"{path}: is_decoder is true: a model that looks to the left alone; name a masked "
            "language model."
        )


def _settings(said: Mapping[str, Any]) -> str:
    computing = {key: value for key, value in said.items() if key not in _BOOKKEEPING}
    return hashlib.sha256(json.dumps(computing, sort_keys=True).encode()).hexdigest()


def _context(path: Path, base: nn.Module, config: Any, vocabulary: Vocabulary) -> int:
    limits = []
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # Classes with padding in their positions count from the one after it.
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            limits.append(module.num_embeddings - reserved)
    if vocabulary.most_tokens is not None:
        limits.append(vocabulary.most_tokens)
    if not limits:
        raise InputError(
            f"{path}: neither max_position_embeddings nor the tokenizer's model_max_length says "
            "how long a sequence may be; state one of them."
        )
    special = len(vocabulary.before) + len(vocabulary.after)
    context = (min(limits) - special) // (K // vocabulary.bases)
    if context < 1:
        raise InputError(
            f"{path}: sequences of {min(limits)} tokens leave no room for a 6-mer; get the "
            "config.json that belongs to the weights."
        )
    return context


def load_model(folder: Path, shape: Shape) -> tuple[Any, bool]:
    """The model in float32 on the CPU, every weight of it stored, and whether its head is."""
    files = weight_files(folder)
    path = files[0] if len(files) == 1 else folder
    stored = read_weights(files)
    name = shape.model_class.__name__
    for key, tensor in stored.items():
        if not tensor.is_floating_point() and not _IDLE.search(key):
            raise InputError(
                f"{path}: {key} is {dtype_name(tensor.dtype)}, expected floating point; "
                "quantised checkpoints are not read."
            )
    # Held against the stored numbers before there is memory for what config.json asks.
    with torch.device("meta"):
        asked = sum(parameter.numel() for parameter in shape.model_class(shape.config).parameters())
    here = sum(tensor.numel() for tensor in stored.values())
    if asked > 2 * here + (1 << 20):
        raise InputError(
            f"{path}: {here:,} numbers, but {CONFIG_FILE} describes a {name} of {asked:,}; the "
            "weights do not belong to it."
        )
    kernels = "sdpa" if getattr(shape.model_class, "_supports_sdpa", False) else "eager"
    try:
        with _quiet():
            model, told = shape.model_class.from_pretrained(
                None,
                config=shape.config,
                state_dict=stored,
                dtype=torch.float32,
                attn_implementation=kernels,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(
            f"{path}: {name} cannot be loaded from it ({_first_line(error)}); the weights do not "
            f"belong to this {CONFIG_FILE}."
        ) from error
    for key, found, expected in sorted(told["mismatched_keys"]):
        raise InputError(
            f"{path}: {key} is {_by(found)}, expected {_by(expected)}; the weights do not belong "
            f"to this {CONFIG_FILE}, or are not a {name}'s."
        )
    missing = sorted(key for key in told["missing_keys"] if not _IDLE.search(key))
    encoder = f"{model.base_model_prefix}."
    if lacking := [key for key in missing if key.startswith(encoder)]:
        raise InputError(
            f"{path}: {lacking[0]} is missing ({len(lacking)} of the encoder's keys are); the "
            f"weights do not belong to this {CONFIG_FILE}, or are not a {name}'s."
        )
    if strange := sorted(key for key in told["unexpected_keys"] if not _IDLE.search(key)):
        raise InputError(
            f"{path}: {strange[0]} is not a key of a {name}; the weights do not belong to this "
            f"{CONFIG_FILE}, or are another architecture's."
        )
    if missing and _some_head(model, missing):
        raise InputError(
            f"{path}: {missing[0]} is missing ({len(missing)} of the language head's keys "
            f"{'is' if len(missing) == 1 else 'are'}, the others are there); get the whole "
            "checkpoint."
        )
    return model, not missing


def _some_head(model: Any, missing: Sequence[str]) -> bool:
    """Whether the head has a tensor that was stored and is not the encoder's."""
    tensors = {key: id(tensor) for key, tensor in model.state_dict(keep_vars=True).items()}
    # Tied tensors have several names, of which a checkpoint holds one.
    others = {tensors.get(key) for key in missing}
    others |= {tensors[key] for key in tensors if key.startswith(f"{model.base_model_prefix}.")}
    return any(tensors[key] not in others for key in tensors if not _IDLE.search(key))


class MaskedLMTeacher:
    """A masked language model held to one layer and one device; see `teachers.teacher.Teacher`.

    Layer k is what block k returns, layer -1 what the language head reads: the last block's output,
    after the final norm in the classes that have one (ESM, ModernBERT).
    """

    k = K

    def __init__(
        self,
        model: Any,
        shape: Shape,
        *,
        has_head: bool,
        name: str,
        revision: str | None,
        weights_sha256: str,
        licence: str,
        layer: int,
        device: torch.device,
        compute: torch.dtype | None = None,
    ) -> None:
        """`compute` is what matrix products are in; None: as the device is fast.

        Raises InputError or NonFiniteError where the model does not do what a teacher must.
        """
        compute = compute_dtype(device) if compute is None else compute
        self.name = name
        self.revision = revision
        self.weights_sha256 = weights_sha256
        self.settings_sha256 = shape.settings_sha256
        self.licence = licence
        self.layer = layer
        self.channels = shape.channels
        self.context = shape.context
        self.token_bases = shape.vocabulary.bases
        self.dtype = dtype_name(compute)
        self._has_head = has_head
        self._block = None if layer == -1 else _block(model.base_model, shape, layer, name)
        self._model = model.eval().requires_grad_(False).to(device)
        self.numerics = numerics(
            device,
            compute=compute,
            kernels=str(model.config._attn_implementation),
            transformers=transformers.__version__,
        )
        self._device, self._compute, self._vocabulary = device, compute, shape.vocabulary
        self._check_behaviour()

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Tensor:
        """Features (W, T, D) on the teacher's device, mask tokens where `hidden_WT` is True."""
        with torch.inference_mode(), self._arithmetic():
            token = self._tokens(kmer_id_WT, hidden_WT)
            feat = self._encoded(token)
            if feat.shape[:2] != token.shape:
                raise InputError(
                    f"{self.name}: of {token.shape[1]} tokens it returns {feat.shape[1]}, so there "
                    "is no vector for every 6-mer; name another model or layer."
                )
            feat_WTPD = self._of_kmers(feat, kmer_id_WT.shape[1])
            return feat_WTPD.float().mean(2).to(self._compute)

    def masked_loss(
        self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64] | None:
        """Nats of every hidden k-mer, in order; see `teachers.teacher.LanguageModel`."""
        if not self._has_head:
            return None
        with torch.inference_mode(), self._arithmetic():
            logits = self._model(input_ids=self._tokens(kmer_id_WT, hidden_WT)).logits
            hidden = torch.from_numpy(np.ascontiguousarray(hidden_WT)).to(self._device)
            logits_NPV = self._of_kmers(logits, kmer_id_WT.shape[1])[hidden].float()
            token_NP = torch.from_numpy(self._vocabulary.token_of_kmer[kmer_id_WT[hidden_WT]])
            token_NP = token_NP.to(self._device)
            nats = F.cross_entropy(logits_NPV.flatten(0, 1), token_NP.flatten(), reduction="none")
        return nats.view(token_NP.shape).double().sum(1).cpu().numpy()

    def _arithmetic(self) -> torch.autocast:
        # Matrix products alone are in half precision: norms, angles and residuals stay float32.
        half = self._compute != torch.float32
        return torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=half)

    def _tokens(
        self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
    ) -> Tensor:
        windows, kmers = kmer_id_WT.shape
        assert hidden_WT.shape == (windows, kmers)
        assert 1 <= kmers <= self.context
        assert kmer_id_WT.size == 0 or int(kmer_id_WT.max()) < KMERS
        vocabulary = self._vocabulary
        token_WTP = vocabulary.token_of_kmer[kmer_id_WT]
        token_WTP[hidden_WT] = vocabulary.mask
        before, after = (
            np.broadcast_to(np.array(special, dtype=np.int64), (windows, len(special)))
            for special in (vocabulary.before, vocabulary.after)
        )
        token = torch.from_numpy(
            np.concatenate((before, token_WTP.reshape(windows, -1), after), axis=1)
        )
        if self._device.type == "cuda":
            # From pinned memory the copy waits its turn on the device, and nobody for the copy.
            token = token.pin_memory().to(self._device, non_blocking=True)
        return token

    def _encoded(self, token: Tensor) -> Tensor:
        """The encoder's output at the layer, for every token; what lies above is not run."""
        if self._block is None:
            last: Tensor = self._model.base_model(input_ids=token).last_hidden_state
            return last
        handle = self._block.register_forward_hook(_stop)
        try:
            self._model.base_model(input_ids=token)
        except _Reached as reached:
            return reached.feat
        finally:
            handle.remove()
        raise AssertionError("the block was not run")

    def _of_kmers(self, of_tokens: Tensor, kmers: int) -> Tensor:
        """(W, tokens, ...) without special tokens as (W, T, P, ...)."""
        pieces = K // self.token_bases
        first = len(self._vocabulary.before)
        of_dna = of_tokens[:, first : first + kmers * pieces]
        return of_dna.reshape(len(of_dna), kmers, pieces, -1)

    def _check_behaviour(self) -> None:
        """Raises InputError or NonFiniteError where a tiny batch comes out as no teacher's may."""
        kmer_id_WT = np.arange(2 * min(8, self.context), dtype=np.uint16).reshape(2, -1) * 97
        hidden_WT = np.zeros(kmer_id_WT.shape, dtype=np.bool_)
        try:
            first, again = (self.embed(kmer_id_WT, hidden_WT) for _ in range(2))
        except (InputError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a class may want arguments or lengths of its own
            raise InputError(
                f"{self.name}: {type(self._model).__name__} does not run on DNA alone "
                f"({_first_line(error)}); name another model."
            ) from error
        if not bool(torch.isfinite(first).all()):
            raise NonFiniteError(
                f"{self.name}: {type(self._model).__name__} gives NaN or infinity; get the weights "
                "again, or look at the layer and the arithmetic"
            )
        if first.shape[-1] != self.channels or not torch.equal(first, again):
            raise InputError(
                f"{self.name}: {type(self._model).__name__} gives vectors of {first.shape[-1]} "
                f"channels, expected {self.channels}, "
                f"{'equal' if torch.equal(first, again) else 'different'} ones for equal input; "
                "name another model."
            )


class _Reached(Exception):
    """No error: carries a block's output out of the encoder, so that those above are not run."""

    def __init__(self, feat: Tensor) -> None:
        super().__init__()
        self.feat = feat


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Reached(output[0] if isinstance(output, tuple) else output)


def _block(base: nn.Module, shape: Shape, layer: int, name: str) -> nn.Module:
    """Block `layer`, counted from 1."""
    lists = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) == shape.blocks
    ]
    if len(lists) != 1:
        raise RecipeError(
            f"[teacher] layer = {layer}: {name}, a {shape.model_class.__name__}, has no list of "
            "blocks to choose from; take -1, what its language head reads."
        )
    return lists[0][layer - 1]


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape)) or "a scalar"


def _first_line(error: Exception) -> str:
    told = str(error).strip().splitlines()[:1] or [type(error).__name__]
    return told[0][:200]


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers draws bars and tables of its own; what matters is told by us."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(before)
