"""The NT-v2 forward pass once more, in float64 NumPy and loops, from the description alone.

Shares nothing with `had_pipe.teachers`: weights arrive under the hub's names as a mapping of
arrays, every head and layer is spelled out, and positions turn by complex multiplication. Slow.

T tokens, D channels, C = D / heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outputs:
    """What one sequence gives: block outputs, the normed last one, and logits."""

    blocks: list[Array]
    final: Array
    logits: Array


def _norm(x_TD: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x_TD - x_TD.mean(axis=1, keepdims=True)
    variance = (centred**2).mean(axis=1, keepdims=True)
    return centred / np.sqrt(variance + eps) * weight + bias


def _turn(x_TC: Array) -> Array:
    """Channel pairs (i, i + C/2) as complex numbers, turned by position * 10000^(-2i/C)."""
    tokens, channels = x_TC.shape
    half = channels // 2
    speed = np.array([10_000.0 ** (-2 * i / channels) for i in range(half)])
    number = x_TC[:, :half] + 1j * x_TC[:, half:]
    turned = number * np.exp(1j * np.arange(tokens)[:, None] * speed)
    return np.concatenate([turned.real, turned.imag], axis=1)


_ERF = np.vectorize(math.erf, otypes=[np.float64])


def forward(
    token_ids: npt.NDArray[np.integer],
    weights: Mapping[str, npt.NDArray[np.floating]],
    *,
    layers: int,
    heads: int,
    eps: float,
) -> Outputs:
    """One sequence of token ids (T,), no padding, `<cls>` already in front."""

    def w(name: str) -> Array:
        return np.asarray(weights[name], dtype=np.float64)

    def linear(x: Array, name: str) -> Array:
        return x @ w(f"{name}.weight").T + w(f"{name}.bias")

    def norm(x: Array, name: str) -> Array:
        return _norm(x, w(f"{name}.weight"), w(f"{name}.bias"), eps)

    x = w("esm.embeddings.word_embeddings.weight")[token_ids]
    width = x.shape[1] // heads
    blocks = []
    for i in range(layers):
        at = f"esm.encoder.layer.{i}"
        normed = norm(x, f"{at}.attention.LayerNorm")
        query = linear(normed, f"{at}.attention.self.query")
        key = linear(normed, f"{at}.attention.self.key")
        value = linear(normed, f"{at}.attention.self.value")
        mixed = np.empty_like(x)
        for h in range(heads):
            own = slice(h * width, (h + 1) * width)
            score = _turn(query[:, own]) @ _turn(key[:, own]).T / math.sqrt(width)
            share = np.exp(score - score.max(axis=1, keepdims=True))
            share /= share.sum(axis=1, keepdims=True)
            mixed[:, own] = share @ value[:, own]
        x = x + linear(mixed, f"{at}.attention.output.dense")
        both = norm(x, f"{at}.LayerNorm") @ w(f"{at}.intermediate.dense.weight").T
        gate, passed = np.split(both, 2, axis=1)
        x = x + (gate / (1 + np.exp(-gate)) * passed) @ w(f"{at}.output.dense.weight").T
        blocks.append(x)
    final = norm(x, "esm.encoder.emb_layer_norm_after")
    hidden = linear(final, "lm_head.dense")
    hidden = hidden * (1 + _ERF(hidden / math.sqrt(2))) / 2
    hidden = norm(hidden, "lm_head.layer_norm")
    logits = hidden @ w("lm_head.decoder.weight").T + w("lm_head.bias")
    return Outputs(blocks, final, logits)
