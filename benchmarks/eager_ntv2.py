"""NT-v2 as published code runs it, one operation after the other: the peer of a benchmark.

Written from the published architecture alone: three projections for queries, keys and values,
heads split by view and permute, positions turned by rotate-half, scores written out, softmax over
them, mixed, projected; layer norms, gate and residuals each an operation of its own. In half
precision all of it is, as `model.to(torch.bfloat16)` makes it, but for the rotary angles, which
half precision would ruin. Where it may be faster it is: no padding mask is added (windows have no
padding), tables are made once, tokens lie on the device, there is no language head.

W windows, T tokens (`<cls>` first), D channels, H heads, C = D / H.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

_PREFIX = "esm.encoder.layer"


class EagerNTv2:
    """The encoder on weights under the hub's names; gives features (W, T, D) of the last norm."""

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        *,
        heads: int,
        eps: float,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._weights = {name: w.to(device=device, dtype=dtype) for name, w in weights.items()}
        self._layers = sum(name.endswith("intermediate.dense.weight") for name in weights)
        self._heads, self._eps = heads, eps
        self._tables: dict[int, tuple[Tensor, Tensor]] = {}

    @torch.inference_mode()
    def __call__(self, token_id_WT: Tensor) -> Tensor:
        x_WTD = F.embedding(token_id_WT, self._weights["esm.embeddings.word_embeddings.weight"])
        for layer in range(self._layers):
            at = f"{_PREFIX}.{layer}"
            x_WTD = self._attention(x_WTD, at) + x_WTD
            normed_WTD = self._norm(x_WTD, f"{at}.LayerNorm")
            both = self._linear(normed_WTD, f"{at}.intermediate.dense")
            gate, value = both.chunk(2, dim=-1)
            x_WTD = self._linear(F.silu(gate) * value, f"{at}.output.dense") + x_WTD
        return self._norm(x_WTD, "esm.encoder.emb_layer_norm_after")

    def _attention(self, x_WTD: Tensor, at: str) -> Tensor:
        normed_WTD = self._norm(x_WTD, f"{at}.attention.LayerNorm")
        q_WHTC, k_WHTC, v_WHTC = (
            self._split(self._linear(normed_WTD, f"{at}.attention.self.{name}"))
            for name in ("query", "key", "value")
        )
        cos_TC, sin_TC = self._rotary(q_WHTC)
        q_WHTC = q_WHTC * q_WHTC.shape[-1] ** -0.5
        q_WHTC = q_WHTC * cos_TC + _half_turned(q_WHTC) * sin_TC
        k_WHTC = k_WHTC * cos_TC + _half_turned(k_WHTC) * sin_TC
        share_WHTT = F.softmax(torch.matmul(q_WHTC, k_WHTC.transpose(-1, -2)), dim=-1)
        mixed_WTHC = torch.matmul(share_WHTT, v_WHTC).permute(0, 2, 1, 3).contiguous()
        return self._linear(mixed_WTHC.view(x_WTD.shape), f"{at}.attention.output.dense")

    def _split(self, x_WTD: Tensor) -> Tensor:
        return x_WTD.view(*x_WTD.shape[:2], self._heads, -1).permute(0, 2, 1, 3)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self._eps)

    def _rotary(self, q_WHTC: Tensor) -> tuple[Tensor, Tensor]:
        tokens, width = q_WHTC.shape[2:]
        if tokens not in self._tables:
            frequency = 10_000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
            angle = torch.outer(torch.arange(tokens, dtype=torch.float64), frequency)
            angle_TC = torch.cat((angle, angle), dim=-1)
            self._tables[tokens] = angle_TC.cos().to(q_WHTC), angle_TC.sin().to(q_WHTC)
        return self._tables[tokens]


def _half_turned(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
