"""The student of HAD (Yang et al. 2025, arXiv 2505.20836) as a transformers model.

Bases in, one feature a base out: embedding, bidirectional Gated DeltaNet layers, one self-attention
layer, a gated MLP, a final norm. The paper gives neither width nor depth; the defaults make
1,070,512 parameters. What is compared with a teacher, and how, is not decided here.

B windows, S bases, T = S / 6 k-mers, E width, F channels of a projection, Q queries, M memory.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    SequenceClassifierOutput,
)
from transformers.modeling_utils import PreTrainedModel

from had_pipe.students.delta_rule import gated_delta_rule
from had_pipe.students.tokenizer import FIRST_BASE, MASK, PAD

NORM_EPS = 1e-5
UNIT_EPS = 1e-6


class HADConfig(PreTrainedConfig):
    """The student's shape, and where it comes from."""

    model_type = "had"

    vocab_size: int = 16
    """Rows of the embedding: the tokenizer's 12 and spare ones."""
    hidden_size: int = 128
    """Width of the residual stream, E."""
    layers: int = 4
    """Bidirectional Gated DeltaNet layers."""
    gdn_heads: int = 3
    """Heads of a Gated DeltaNet layer."""
    head_dim: int = 32
    """Key width of a head; 48 and 64 are miscompiled on Hopper by Triton 3.4 to 3.7.0."""
    expand_v: int = 2
    """Value width of a head, in key widths."""
    conv: int = 4
    """Width of the causal convolution on queries, keys and values, in bases."""
    attention_heads: int = 4
    """Heads of the one self-attention layer; 0 leaves it out."""
    mlp: int = 512
    """Inner width of the gated MLP."""
    decoder_heads: int = 4
    """Heads of the cross-attention that reads masked bases (masked-language head only)."""
    classifier_dropout: float = 0.0
    """Share of a sequence's mean feature that training of the classification head drops."""
    window_bases: int = 1_020
    """Bases of the windows it was trained on; it reads sequences of any length."""
    initializer_range: float = 0.02
    """Standard deviation of first weights."""
    pad_token_id: int = PAD
    """Padding of batches; masked out by `attention_mask`."""
    licence: str = "unknown"
    """The teacher's licence: a student is made from its output."""
    teacher: str = "unknown"
    """Which teacher, at which revision or weights."""


def _unit(x_BSHK: Tensor) -> Tensor:
    """x / sqrt(sum of squares + eps)."""
    width = x_BSHK.shape[-1]
    return F.rms_norm(x_BSHK, (width,), x_BSHK.new_full((width,), width**-0.5), UNIT_EPS / width)


def _or_all(seen_BS: Tensor) -> Tensor:
    """What may be read: all of a row where nothing is seen, as a softmax over nothing is NaN."""
    return seen_BS | ~seen_BS.any(dim=1, keepdim=True)


class BranchEnd(nn.Linear):
    """The last map of a residual branch: it starts smaller than other maps."""


class Direction(nn.Module):
    """One direction of a Gated DeltaNet layer: what surrounds the rule."""

    def __init__(self, config: HADConfig) -> None:
        super().__init__()
        E, H = config.hidden_size, config.gdn_heads
        self.heads, self.key, self.value = H, config.head_dim, config.head_dim * config.expand_v
        self.width = config.conv
        channels = H * (2 * self.key + self.value)
        self.qkv = nn.Linear(E, channels, bias=False)
        self.conv = nn.Parameter(torch.empty(channels, 1, 1, config.conv))
        self.decay_beta = nn.Linear(E, 2 * H, bias=False)
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.gate = nn.Linear(E, H * self.value, bias=False)
        self.norm = nn.RMSNorm(self.value, eps=NORM_EPS)
        self.out = BranchEnd(H * self.value, E, bias=False)

    def read(self, x_BSE: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values, log decay and beta of the rule."""
        S = x_BSE.shape[1]
        # A picture one line high with its channels last: the convolution transposes nothing.
        x_BF1S = self.qkv(x_BSE).mT.unsqueeze(2)
        x_BF1S = F.conv2d(x_BF1S, self.conv, padding=(0, self.width - 1), groups=len(self.conv))
        x_BSF = F.silu(x_BF1S.squeeze(2).mT[:, :S])
        qk = self.heads * self.key
        q_BSHK, k_BSHK, v_BSHV = (
            t.unflatten(-1, (self.heads, -1))
            for t in torch.split(x_BSF, [qk, qk, self.heads * self.value], dim=-1)
        )
        decay_BSH, beta_BSH = self.decay_beta(x_BSE).float().chunk(2, dim=-1)
        log_decay_BSH = -self.A_log.float().exp() * F.softplus(decay_BSH + self.dt_bias.float())
        return _unit(q_BSHK), _unit(k_BSHK), v_BSHV, log_decay_BSH, beta_BSH.sigmoid()

    def write(self, o_BSHV: Tensor, x_BSE: Tensor) -> Tensor:
        """What the rule gave, normalised, gated by the input and projected back."""
        # The weight follows the values into half precision; the fused norm takes one dtype only.
        weight_V = self.norm.weight.to(o_BSHV.dtype)
        o_BSHV = F.rms_norm(o_BSHV, (self.value,), weight_V, NORM_EPS)
        gated_BSF = o_BSHV.flatten(2) * F.silu(self.gate(x_BSE))
        return cast(Tensor, self.out(gated_BSF))


class BidirectionalGDN(nn.Module):
    """y = GDN_f(x) + flip(GDN_r(flip(x))), with weights of their own."""

    def __init__(self, config: HADConfig) -> None:
        super().__init__()
        self.forwards = Direction(config)
        self.backwards = Direction(config)

    def forward(self, x_BSE: Tensor) -> Tensor:
        turned_BSE = x_BSE.flip(1)
        both = zip(self.forwards.read(x_BSE), self.backwards.read(turned_BSE), strict=True)
        o_f, o_b = gated_delta_rule(*(torch.cat(pair) for pair in both)).chunk(2)
        return self.forwards.write(o_f, x_BSE) + self.backwards.write(o_b, turned_BSE).flip(1)


class Attention(nn.Module):
    """Softmax attention without positions: the recurrence carries order."""

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        assert hidden_size % heads == 0
        self.heads = heads
        self.q = nn.Linear(hidden_size, hidden_size, bias=False)
        self.kv = nn.Linear(hidden_size, 2 * hidden_size, bias=False)
        self.out = BranchEnd(hidden_size, hidden_size, bias=False)

    def forward(self, query_BQE: Tensor, memory_BME: Tensor, seen_BM: Tensor | None) -> Tensor:
        """`seen_BM` is True where memory may be read; None: everywhere."""
        q = self.q(query_BQE).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for t in self.kv(memory_BME).chunk(2, dim=-1)
        )
        mask = None if seen_BM is None else seen_BM[:, None, None, :]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return cast(Tensor, self.out(o.transpose(1, 2).flatten(2)))


class GatedMLP(nn.Module):
    """down(SiLU(gate x) * up x)."""

    def __init__(self, hidden_size: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Linear(hidden_size, inner, bias=False)
        self.up = nn.Linear(hidden_size, inner, bias=False)
        self.down = BranchEnd(inner, hidden_size, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return cast(Tensor, self.down(F.silu(self.gate(x_BSE)) * self.up(x_BSE)))


class BaseDecoder(nn.Module):
    """Which base stands at a position: its feature asks the features of visible positions.

    One cross-attention block with a residual on the query, a norm and one linear map. The softmax
    is over A, C, G, T alone: windows hold nothing else, and guessing then costs ln 4.
    """

    def __init__(self, hidden_size: int, heads: int) -> None:
        super().__init__()
        self.query_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.memory_norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.attention = Attention(hidden_size, heads)
        self.norm = nn.RMSNorm(hidden_size, eps=NORM_EPS)
        self.head = nn.Linear(hidden_size, 4, bias=True)

    def forward(
        self, query_BQE: Tensor, memory_BME: Tensor, seen_BM: Tensor | None = None
    ) -> Tensor:
        """Logits (B, Q, 4) of A, C, G, T."""
        read_BQE = self.attention(self.query_norm(query_BQE), self.memory_norm(memory_BME), seen_BM)
        return cast(Tensor, self.head(self.norm(query_BQE + read_BQE)))


class HADPreTrainedModel(PreTrainedModel):
    """First weights, and what transformers wants to know."""

    config_class = HADConfig
    config: HADConfig
    base_model_prefix = "had"
    main_input_name = "input_ids"
    # Losses are means of one batch: whoever accumulates gradients has to divide.
    accepts_loss_kwargs = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            # A residual stream of r branches grows with sqrt(r) unless each starts smaller.
            stream = self.config.layers + bool(self.config.attention_heads) + 1
            branches = stream if isinstance(module, BranchEnd) else 1
            init.normal_(module.weight, std=std / math.sqrt(branches))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, Direction):
            bound = 1 / math.sqrt(self.config.conv)
            init.uniform_(module.conv, -bound, bound)
            # The reference layer's: A uniform in (0, 16), dt log-uniform in [0.001, 0.1].
            init.copy_(module.A_log, torch.empty_like(module.A_log).uniform_(1e-4, 16).log())
            dt = torch.empty_like(module.dt_bias).uniform_(math.log(0.001), math.log(0.1)).exp()
            init.copy_(module.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus^-1


class HADModel(HADPreTrainedModel):
    """The student alone: ids of bases to one feature a base."""

    # A folder saved with a head holds the student too.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: HADConfig) -> None:
        super().__init__(config)
        E = config.hidden_size
        self.embeddings = nn.Embedding(config.vocab_size, E)
        self.layer_norms = nn.ModuleList(nn.RMSNorm(E, eps=NORM_EPS) for _ in range(config.layers))
        self.layers = nn.ModuleList(BidirectionalGDN(config) for _ in range(config.layers))
        self.attention_norm = nn.RMSNorm(E, eps=NORM_EPS) if config.attention_heads else None
        self.attention = Attention(E, config.attention_heads) if config.attention_heads else None
        self.mlp_norm = nn.RMSNorm(E, eps=NORM_EPS)
        self.mlp = GatedMLP(E, config.mlp)
        self.norm = nn.RMSNorm(E, eps=NORM_EPS)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        assert isinstance(value, nn.Embedding)
        self.embeddings = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> BaseModelOutput | tuple[Tensor]:
        """Features (B, S, E). Padding, left or right, changes nothing at other positions.

        `attention_mask` is 0 at padding; features there mean nothing.
        """
        x_BSE = self.embeddings(input_ids)
        seen_BS = None if attention_mask is None else attention_mask.bool()
        for norm, layer in zip(self.layer_norms, self.layers, strict=True):
            h_BSE = norm(x_BSE)
            if seen_BS is not None:
                # Nothing in: key and value are zero, the state stays as it is.
                h_BSE = h_BSE * seen_BS.unsqueeze(-1)
            x_BSE = x_BSE + layer(h_BSE)
        if self.attention_norm is not None and self.attention is not None:
            h_BSE = self.attention_norm(x_BSE)
            readable_BS = None if seen_BS is None else _or_all(seen_BS)
            x_BSE = x_BSE + self.attention(h_BSE, h_BSE, readable_BS)
        x_BSE = x_BSE + self.mlp(self.mlp_norm(x_BSE))
        feat_BSE = self.norm(x_BSE)
        if return_dict is False:
            return (feat_BSE,)
        return BaseModelOutput(last_hidden_state=feat_BSE)


class HADForMaskedLM(HADPreTrainedModel):
    """The student with the decoder it was trained with: logits of masked bases."""

    _keys_to_ignore_on_load_unexpected = [r"^classifier\."]  # noqa: RUF012

    def __init__(self, config: HADConfig) -> None:
        super().__init__(config)
        self.had = HADModel(config)
        self.decoder = BaseDecoder(config.hidden_size, config.decoder_heads)
        self.post_init()  # type: ignore[no-untyped-call]

    @classmethod
    def of(cls, student: HADModel, decoder: BaseDecoder) -> HADForMaskedLM:
        """The two put together; they stay what they are, nothing is copied."""
        with torch.random.fork_rng(devices=[]):  # the weights drawn here are thrown away
            model = cls(student.config)
        model.had, model.decoder = student, decoder
        return model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> MaskedLMOutput | tuple[Tensor, ...]:
        """Logits (B, S, vocabulary), -inf in effect but for A, C, G, T; trained at [MASK] only."""
        feat_BSE = self.had(input_ids, attention_mask).last_hidden_state
        seen_BS = input_ids != MASK
        if attention_mask is not None:
            # Where every base is masked, all of them are read, and still no padding.
            unpadded_BS = attention_mask.bool()
            seen_BS = seen_BS & unpadded_BS
            seen_BS = torch.where(seen_BS.any(dim=1, keepdim=True), seen_BS, unpadded_BS)
        base_BS4 = self.decoder(feat_BSE, feat_BSE, _or_all(seen_BS)).float()
        others = self.config.vocab_size - FIRST_BASE - 4
        logits_BSF = F.pad(base_BS4, (FIRST_BASE, others), value=torch.finfo(torch.float32).min)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits_BSF.flatten(0, 1), labels.flatten())
        if return_dict is False:
            return (logits_BSF,) if loss is None else (loss, logits_BSF)
        return MaskedLMOutput(loss=loss, logits=logits_BSF)


class HADForSequenceClassification(HADPreTrainedModel):
    """The student with a linear map of a sequence's mean feature, which is yours to train.

    Losses are transformers' own: squared error of one label, cross-entropy of several, or binary
    cross-entropy where labels are floats; `config.problem_type` says which, or the first labels do.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]  # noqa: RUF012

    def __init__(self, config: HADConfig) -> None:
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.had = HADModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, self.num_labels)
        self.post_init()  # type: ignore[no-untyped-call]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
        **unused: Any,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Logits (B, labels) of the mean feature of all that is not padding."""
        feat_BSE = self.had(input_ids, attention_mask).last_hidden_state
        if attention_mask is None:
            mean_BE = feat_BSE.mean(dim=1)
        else:
            seen_BS1 = _or_all(attention_mask.bool()).unsqueeze(-1).to(feat_BSE.dtype)
            mean_BE = (feat_BSE * seen_BS1).sum(dim=1) / seen_BS1.sum(dim=1)
        logits_BL = self.classifier(self.dropout(mean_BE))
        loss = None if labels is None else self._loss(logits_BL, labels.to(logits_BL.device))
        if return_dict is False:
            return (logits_BL,) if loss is None else (loss, logits_BL)
        return SequenceClassifierOutput(loss=loss, logits=logits_BL)

    def _loss(self, logits_BL: Tensor, labels: Tensor) -> Tensor:
        if self.config.problem_type is None:
            if self.num_labels == 1:
                self.config.problem_type = "regression"
            elif labels.dtype in (torch.int64, torch.int32):
                self.config.problem_type = "single_label_classification"
            else:
                self.config.problem_type = "multi_label_classification"
        logits_BL = logits_BL.float()
        if self.config.problem_type == "regression":
            return F.mse_loss(logits_BL, labels.float().view_as(logits_BL))
        if self.config.problem_type == "single_label_classification":
            return F.cross_entropy(logits_BL, labels.long().view(-1))
        return F.binary_cross_entropy_with_logits(logits_BL, labels.float())
