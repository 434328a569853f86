"""Float embeddings to what is stored and back, and how much that loses.

Written on the arrays it is handed, NumPy or torch on any device: this module imports neither torch
nor Zarr. Formulas: docs/cache-format.md, Codecs.

W windows, G stored groups, D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Space = Literal["raw", "normalised"]

Array = Any
"""A NumPy array or a torch tensor."""

STD_FLOOR = 0.01
"""Least channel std, as a share of the median: a dead channel must not become noise."""

_SCALES = (2.0**-24, 65504.0)  # float16 without 0 and infinity


@dataclass(frozen=True)
class Statistics:
    """Mean and std of every channel, float32 (D)."""

    mean: npt.NDArray[np.float32]
    std: npt.NDArray[np.float32]

    @staticmethod
    def of(embedding: npt.NDArray[np.floating[Any]]) -> Statistics:
        """From a calibration sample (..., D), in float64, the std floored."""
        sample = embedding.reshape(-1, embedding.shape[-1]).astype(np.float64)
        std = sample.std(axis=0)
        floor = max(STD_FLOOR * float(np.median(std)), 1e-12)
        return Statistics(
            mean=sample.mean(axis=0).astype(np.float32),
            std=np.maximum(std, floor).astype(np.float32),
        )


@dataclass(frozen=True)
class Codec:
    """One way to store embeddings of a teacher that computes in `dtype`."""

    name: Literal["int8", "exact"]
    dtype: Literal["float32", "float16", "bfloat16"]

    def encode(self, embedding_WGD: Array, mean_D: Array, std_D: Array) -> tuple[Array, Array]:
        """What is stored: value (W, G, D), and scale (W, G), which is None for `exact`."""
        x = embedding_WGD
        if self.name == "exact":
            return (_bits(x) if self.dtype == "bfloat16" else x), None
        z = (_cast(x, "float32") - mean_D) / std_D
        largest = _namespace(z).amax(abs(z), -1)
        scale = _cast((largest / 127).clip(*_SCALES), "float16")
        value = (z / _cast(scale, "float32")[..., None]).round().clip(-127, 127)
        return _cast(value, "int8"), scale

    def decode(
        self,
        value_WGD: Array,
        scale_WG: Array | None,
        mean_D: Array,
        std_D: Array,
        *,
        space: Space = "raw",
    ) -> Array:
        """Embeddings (W, G, D) in float32: the teacher's own, or each channel normalised."""
        if self.name == "exact":
            x = _from_bits(value_WGD) if self.dtype == "bfloat16" else _cast(value_WGD, "float32")
            return x if space == "raw" else (x - mean_D) / std_D
        assert scale_WG is not None
        z = _cast(value_WGD, "float32") * _cast(scale_WG, "float32")[..., None]
        return z * std_D + mean_D if space == "raw" else z

    @property
    def formula(self) -> Mapping[str, str]:
        """How anyone decodes, for the attributes of the store."""
        if self.name == "int8":
            line = "x = value.astype('f4') * scale.astype('f4')[..., None] * std + mean"
        elif self.dtype == "bfloat16":
            line = "x = (value.astype('u4') << 16).view('f4')"
        else:
            line = "x = value.astype('f4')"
        return {
            "kind": self.name,
            "numpy": (
                "import numpy as np, zarr\n"
                "root = zarr.open_group('data.zarr', mode='r')\n"
                "mean, std = (root[f'statistics/embedding/{k}'][:] for k in ('mean', 'std'))\n"
                "e = root['train/0/embedding']  # split train, view 0\n"
                "value = e['value'][0]"
                + ("; scale = e['scale'][0]" if self.name == "int8" else "")
                + "\n"
                + line
            ),
        }


def fidelity(
    original_WGD: npt.NDArray[np.floating[Any]], decoded_WGD: npt.NDArray[np.floating[Any]]
) -> dict[str, float]:
    """How far decoded embeddings are from the original ones.

    relative: ||x - y|| / ||x||. channel_rmse: a channel's root mean square error in units of its
    std, averaged over channels (and its worst). cosine: per stored group, mean and worst.
    """
    x = original_WGD.reshape(-1, original_WGD.shape[-1]).astype(np.float64)
    y = decoded_WGD.reshape(x.shape).astype(np.float64)
    error = y - x
    std = x.std(axis=0)
    std = np.maximum(std, max(STD_FLOOR * float(np.median(std)), 1e-12))
    channel = np.sqrt((error**2).mean(axis=0)) / std
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = (x * y).sum(axis=1) / np.maximum(norms, 1e-30)
    return {
        "groups": float(len(x)),
        "relative": float(np.linalg.norm(error) / max(float(np.linalg.norm(x)), 1e-30)),
        "channel_rmse": float(channel.mean()),
        "worst_channel_rmse": float(channel.max()),
        "mean_cosine": float(cosine.mean()),
        "worst_cosine": float(cosine.min()),
    }


def _namespace(x: Array) -> Any:
    """The library an array came from; already imported, since the array is here."""
    return sys.modules[type(x).__module__.partition(".")[0]]


def _cast(x: Array, dtype: str) -> Array:
    kind = getattr(_namespace(x), dtype)
    return x.astype(kind, copy=False) if isinstance(x, np.ndarray) else x.to(kind)


def _bits(x: Array) -> Array:
    """bfloat16 values as uint16; only torch has the type."""
    return x.view(_namespace(x).uint16)


def _from_bits(value: Array) -> Array:
    if isinstance(value, np.ndarray):
        return (value.astype(np.uint32) << 16).view(np.float32)
    return _cast(value.view(_namespace(value).bfloat16), "float32")
