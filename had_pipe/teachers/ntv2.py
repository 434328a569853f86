"""Nucleotide Transformer v2 in torch, all sizes; `ntv2_checkpoint` reads and writes its folders.

Written from the published description of the architecture (Dalla-Torre et al., Nature Methods
2025) and checked against arrays of the reference implementation; no remote code is ever run.
It does not train: the demo teacher's training lives beside its recipe.

W windows, T tokens (`<cls>` and T - 1 k-mers where both occur), D channels, H heads.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from had_pipe.dna.kmers import KMERS, K, decode_kmers
from had_pipe.teachers.numerics import compute_dtype, dtype_name, numerics

log = logging.getLogger(__name__)

_MOST_SHAPES = 64
"""Of input that one process compiles blocks for."""

MASK_TOKEN = 2
CLS_TOKEN = 3
_FIRST_KMER_TOKEN = 6
# Ids of the hub's vocabulary count in base 4 with A, T, C, G as digits; ours are A, C, G, T.
_DIGIT_OF_BASE = np.array([0, 2, 3, 1])


def _token_table() -> npt.NDArray[np.int64]:
    base = decode_kmers(np.arange(KMERS, dtype=np.uint16)[:, None])
    place = 4 ** np.arange(K - 1, -1, -1)
    return np.asarray(_FIRST_KMER_TOKEN + _DIGIT_OF_BASE[base] @ place, dtype=np.int64)


TOKEN_OF_KMER = _token_table()
"""The teacher's token id of every k-mer id, (4096,)."""

Head = Literal["none", "language"]
"""What comes after the encoder."""


@dataclass(frozen=True, kw_only=True)
class NTv2Config:
    """What config.json says about the shape; names are the hub's."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    """Width of one half of the gated linear unit."""
    max_position_embeddings: int = 2050
    vocab_size: int = 4107
    layer_norm_eps: float = 1e-12

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def context(self) -> int:
        """Most k-mers a window may have: positions less the two reserved ones and `<cls>`."""
        return self.max_position_embeddings - 3


class LayerNorm(nn.Module):
    """Layer norm in float32 whatever the matrix products use."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight, self.bias, self.eps)


Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of every position."""


class Block(nn.Module):
    """Pre-norm attention with rotary positions, then a gated linear unit without biases."""

    def __init__(self, config: NTv2Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_attention_heads
        self.norm_attention = LayerNorm(d, config.layer_norm_eps)
        self.qkv = nn.Linear(d, 3 * d)
        self.attention_out = nn.Linear(d, d)
        self.norm_mlp = LayerNorm(d, config.layer_norm_eps)
        self.up = nn.Linear(d, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, d, bias=False)

    def forward(self, x_WTD: Tensor, rotary: Rotary, attend: Tensor | None) -> Tensor:
        windows, tokens, d = x_WTD.shape
        dtype = self.qkv.weight.dtype
        qkv = self.qkv(self.norm_attention(x_WTD).to(dtype))
        q, k, v = qkv.view(windows, tokens, 3, self.heads, d // self.heads).unbind(2)
        q, k = _rotate(q, rotary).to(dtype), _rotate(k, rotary).to(dtype)
        mixed = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=attend
        )
        x_WTD = x_WTD + self.attention_out(mixed.transpose(1, 2).reshape(windows, tokens, d))
        gate, value = self.up(self.norm_mlp(x_WTD).to(dtype)).chunk(2, dim=-1)
        mlp_WTD: Tensor = self.down(F.silu(gate) * value)
        return x_WTD + mlp_WTD


class LanguageHead(nn.Module):
    """Features after the final norm to logits over the vocabulary."""

    def __init__(self, config: NTv2Config) -> None:
        super().__init__()
        d = config.hidden_size
        self.dense = nn.Linear(d, d)
        self.norm = LayerNorm(d, config.layer_norm_eps)
        self.decoder = nn.Linear(d, config.vocab_size)

    def forward(self, feat: Tensor) -> Tensor:
        dtype = self.dense.weight.dtype
        hidden: Tensor = self.norm(F.gelu(self.dense(feat.to(dtype))))
        logits: Tensor = self.decoder(hidden.to(dtype))
        return logits


class NTv2(nn.Module):
    """The encoder, with its language-model head where `head` is "language"."""

    def __init__(self, config: NTv2Config, *, head: Head = "none") -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.head = LanguageHead(config) if head == "language" else None

    def forward(
        self,
        token_id_WT: Tensor,
        *,
        layer: int = -1,
        attend_WT: Tensor | None = None,
        run: RunBlock | None = None,
    ) -> Tensor:
        """Features (W, T, D): the output of block `layer`, or of the final norm for -1.

        Blocks above `layer` are not run. `attend_WT` is False at padding, which only comparisons
        with other implementations need: our windows have no padding. `run` runs a block in another
        way, see `compiled_block`.
        """
        depth = len(self.blocks)
        assert layer == -1 or 1 <= layer <= depth
        x_WTD: Tensor = self.embedding(token_id_WT).float()
        rotary = rotary_tables(token_id_WT.shape[1], self.config.head_dim, x_WTD.device)
        attend = None if attend_WT is None else attend_WT[:, None, None, :]
        for block in self.blocks[: depth if layer == -1 else layer]:
            x_WTD = (run or Block.__call__)(block, x_WTD, rotary, attend)
        return self.norm(x_WTD) if layer == -1 else x_WTD

    def logits(self, feat: Tensor) -> Tensor:
        """Logits (..., vocabulary) of features (..., D) after the final norm."""
        assert self.head is not None
        return self.head(feat)  # type: ignore[no-any-return]

    def compute_in(self, dtype: torch.dtype) -> NTv2:
        """Hold the matrices of products in `dtype`; norms, angles and residuals stay float32."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                module.to(dtype)
        return self


RunBlock = Callable[[Any, Tensor, Rotary, Tensor | None], Tensor]
"""What `Block.forward` does, by other means."""


@lru_cache(maxsize=4)
def rotary_tables(tokens: int, head_dim: int, device: torch.device) -> Rotary:
    """Cosines and sines (T, 1, head_dim / 2), float32: angles in half precision ruin attention."""
    # Kept for later calls, of which some may want gradients.
    with torch.inference_mode(False), torch.no_grad():
        exponent = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
        position = torch.arange(tokens, device=device, dtype=torch.float32)
        angle = position[:, None, None] * 10_000.0**-exponent
        return angle.cos(), angle.sin()


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """Turn the pairs (i, i + head_dim / 2) of queries or keys (W, T, H, head_dim)."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


_FUSED = [
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
]


@contextmanager
def fused_attention(model: NTv2) -> Iterator[None]:
    """On CUDA no attention that writes its scores out: that is slow, and wants memory for T x T."""
    if model.embedding.weight.device.type != "cuda":
        yield
        return
    # Of the published sizes' heads every one is a multiple of 8, which the kernels want.
    more = [] if model.config.head_dim % 8 == 0 else [SDPBackend.MATH]
    with sdpa_kernel([*_FUSED, *more]):
        yield


def compiled_block(model: NTv2) -> RunBlock | None:
    """One compiled function for all blocks of a model as it stands; None where that fails here.

    Norms, rotary angles, gates and residuals are fused between the matrix products. Every shape
    of input is compiled for itself, as it comes.
    """
    # Seconds of importing, which nobody else needs.
    from torch._dynamo import config as dynamo
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor import config as inductor

    # Kernels are chosen by rule and not by a race, so that two processes choose the same.
    options: dict[str, Any] = {"deterministic": True} if hasattr(inductor, "deterministic") else {}
    fused = torch.compile(Block.forward, dynamic=False, fullgraph=True, options=options)

    def run(block: Any, x_WTD: Tensor, rotary: Rotary, attend: Tensor | None) -> Tensor:
        # The settings are each thread's own, and past the limit a new shape is an error.
        if dynamo.recompile_limit < _MOST_SHAPES:
            dynamo.recompile_limit = _MOST_SHAPES
        try:
            out: Tensor = fused(block, x_WTD, rotary, attend)
        except TorchDynamoException as error:
            error.add_note("With TORCHDYNAMO_DISABLE=1 had-pipe runs the teacher uncompiled.")
            raise
        return out

    weight = model.embedding.weight
    config = model.config
    try:
        # torch heeds the variable as well, without a word: it is not among its settings.
        if dynamo.disable or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
            raise RuntimeError("TORCH_COMPILE_DISABLE or TORCHDYNAMO_DISABLE is set")
        # The smallest input tells whether there is a compiler, and what it makes runs.
        with torch.inference_mode(), fused_attention(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            x_WTD = torch.zeros((1, 2, config.hidden_size), device=weight.device)
            rotary = rotary_tables(2, config.head_dim, weight.device)
            run(model.blocks[0], x_WTD, rotary, None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # every step of compiling fails in ways of its own
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        log.warning(
            "the teacher's blocks could not be compiled and run uncompiled, slower (%s)", told[:300]
        )
        return None
    return run


class NTv2Teacher:
    """An NT-v2 held to one layer and one device; see `teachers.teacher.Teacher`."""

    k = K
    token_bases = K
    settings_sha256 = None
    """Tokens are ours, and of config.json only heads and epsilon are not in the weights' shapes."""

    def __init__(
        self,
        model: NTv2,
        *,
        name: str,
        revision: str | None,
        weights_sha256: str,
        licence: str,
        layer: int,
        device: torch.device,
        compute: torch.dtype | None = None,
        compiled: bool | None = None,
    ) -> None:
        """`compute` is what matrix products are in; None: as the device is fast.

        `compiled` fuses what stands between the products; None: on CUDA alone. Where it cannot be
        done here, the log says so, and `numerics` that it was not.
        """
        compute = compute_dtype(device) if compute is None else compute
        self.name = name
        self.revision = revision
        self.weights_sha256 = weights_sha256
        self.licence = licence
        self.layer = layer
        self.channels = model.config.hidden_size
        self.context = model.config.context
        self.dtype = dtype_name(compute)
        self._device = device
        self._compute = compute
        self._model = model.eval().requires_grad_(False).to(device).compute_in(compute)
        wanted = device.type == "cuda" if compiled is None else compiled
        self._run = compiled_block(self._model) if wanted else None
        self.numerics = numerics(
            device, compute=compute, kernels="sdpa" if self._run is None else "sdpa+compile"
        )

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Tensor:
        """Features (W, T, D) on the teacher's device, `<mask>` where `hidden_WT` is True."""
        with torch.inference_mode():
            feat_WTD = self._features(kmer_id_WT, hidden_WT, self.layer, self._run)
            return feat_WTD.to(self._compute)

    def masked_loss(
        self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64] | None:
        """Nats of every hidden k-mer, in order; see `teachers.teacher.LanguageModel`."""
        if self._model.head is None:
            return None
        with torch.inference_mode():
            # A few windows, once: not worth compiling for their shape.
            feat_WTD = self._features(kmer_id_WT, hidden_WT, -1, None)
            hidden = torch.from_numpy(np.ascontiguousarray(hidden_WT)).to(self._device)
            token = torch.from_numpy(TOKEN_OF_KMER[kmer_id_WT[hidden_WT]]).to(self._device)
            logits = self._model.logits(feat_WTD[hidden]).float()
            nats = F.cross_entropy(logits, token, reduction="none")
        return nats.double().cpu().numpy()

    def _features(
        self,
        kmer_id_WT: npt.NDArray[np.uint16],
        hidden_WT: npt.NDArray[np.bool_],
        layer: int,
        run: RunBlock | None,
    ) -> Tensor:
        windows, kmers = kmer_id_WT.shape
        assert hidden_WT.shape == (windows, kmers)
        assert 1 <= kmers <= self.context
        assert kmer_id_WT.size == 0 or int(kmer_id_WT.max()) < KMERS
        token_WT = np.full((windows, 1 + kmers), CLS_TOKEN, dtype=np.int64)
        token_WT[:, 1:] = np.where(hidden_WT, MASK_TOKEN, TOKEN_OF_KMER[kmer_id_WT])
        token = torch.from_numpy(token_WT)
        if self._device.type == "cuda":
            # From pinned memory the copy waits its turn on the device, and nobody for the copy.
            token = token.pin_memory().to(self._device, non_blocking=True)
        with fused_attention(self._model):
            feat_WTD: Tensor = self._model(token, layer=layer, run=run)
        return feat_WTD[:, 1:]


def random_model(config: NTv2Config, *, seed: int, head: Head = "none") -> NTv2:
    """A model with seeded random weights of the size that training starts from."""
    with torch.device("meta"):
        model = NTv2(config, head=head)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    shrink = 1 / math.sqrt(2 * config.num_hidden_layers)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.fill_(1.0 if name.endswith("weight") else 0.0)
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.normal_(std=0.02, generator=generator)
                if name.endswith(("attention_out.weight", "down.weight")):
                    tensor.mul_(shrink)
    return model.eval()
