"""Float embeddings to what is stored and back, and how much that loses.

Written on the arrays it is handed, NumPy or torch on any device: this module imports neither torch
nor Zarr. Formulas: docs/cache-format.md, Codecs. What `compact` and `tiny` learn from the
calibration sample: had_pipe.cache.codebook.

W windows, G stored groups, D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from had_pipe.cache.codebook import Codebook

CodecName = Literal["int8", "exact", "compact", "tiny"]

Dtype = Literal["float32", "float16", "bfloat16"]

Space = Literal["raw", "normalised"]

Array = Any
"""A NumPy array or a torch tensor."""

STD_FLOOR = 0.01
"""Least channel std, as a share of the median: a dead channel must not become noise."""

_SCALES = (2.0**-24, 65504.0)  # float16 without 0 and infinity

# The channels' mean and std are then known to about half a percent of a std; axes take more.
_CALIBRATION_GROUPS = 1 << 15
_LEARNT_GROUPS = 1 << 16
HELD_OUT_GROUPS = 1 << 13
"""Stored groups that fidelity is measured on, none of which calibration has seen."""

_DECODED_AT_ONCE = 1 << 16
"""Numbers decoded in one go by NumPy, so that every step but the first finds them in L2."""

_SCALE_NBYTES = 2
_VALUES_A_BYTE = {"compact": 2, "tiny": 4}


def code_nbytes(name: str, channels: int) -> int:
    """Bytes of a group's code, so that with its scale it has a fourth or an eighth of float16."""
    return max(1, channels // _VALUES_A_BYTE[name] - _SCALE_NBYTES)


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

    name: CodecName
    dtype: Dtype
    codebook: Codebook | None = None
    """Of `compact` and `tiny`."""

    @staticmethod
    def fit(
        name: CodecName,
        dtype: Dtype,
        statistics: Statistics,
        sample_WGD: npt.NDArray[np.floating[Any]],
    ) -> Codec:
        """A codec that suits a calibration sample; `int8` and `exact` learn nothing from it."""
        if not learns(name):
            return Codec(name, dtype)
        channels = sample_WGD.shape[-1]
        z_ND = sample_WGD.reshape(-1, channels).astype(np.float32) - statistics.mean
        z_ND /= statistics.std
        return Codec(name, dtype, Codebook.fit(z_ND, code_nbytes(name, channels)))

    def encode(self, embedding_WGD: Array, mean_D: Array, std_D: Array) -> tuple[Array, Array]:
        """What is stored: value (W, G, D), or (W, G, bytes of a code), and scale (W, G), which is
        None for `exact`. Never depends on which other groups are encoded with a group."""
        x = embedding_WGD
        if self.name == "exact":
            return _own_type(x, self.dtype), None
        z = (_cast(x, "float32") - mean_D) / std_D
        if self.codebook is not None:
            code_NC, scale_N = self.codebook.encode(z.reshape(-1, z.shape[-1]))
            return code_NC.reshape(*z.shape[:-1], -1), scale_N.reshape(z.shape[:-1])
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
        out: npt.NDArray[np.float32] | None = None,
    ) -> Array:
        """Embeddings (W, G, D) in float32: the teacher's own, or each channel normalised.

        NumPy arrays may be decoded into `out`, contiguous and of that shape.
        """
        if isinstance(value_WGD, np.ndarray):
            if out is None:
                out = np.empty((*value_WGD.shape[:-1], len(mean_D)), dtype=np.float32)
            self._decode_into(value_WGD, scale_WG, mean_D, std_D, space, out)
            return out
        assert out is None
        if self.name == "exact":
            bits = self.dtype == "bfloat16"
            x = _cast(
                value_WGD.view(_namespace(value_WGD).bfloat16) if bits else value_WGD, "float32"
            )
            return x if space == "raw" else (x - mean_D) / std_D
        assert scale_WG is not None
        if self.codebook is not None:
            code_NC = value_WGD.reshape(-1, value_WGD.shape[-1])
            z = self.codebook.decode(code_NC, scale_WG.reshape(-1))
            z = z.reshape(*value_WGD.shape[:-1], -1)
            return z * std_D + mean_D if space == "raw" else z
        z = _cast(value_WGD, "float32") * _cast(scale_WG, "float32")[..., None]
        return z * std_D + mean_D if space == "raw" else z

    def _decode_into(
        self,
        value_WGD: npt.NDArray[Any],
        scale_WG: npt.NDArray[np.float16] | None,
        mean_D: npt.NDArray[np.float32],
        std_D: npt.NDArray[np.float32],
        space: Space,
        out_WGD: npt.NDArray[np.float32],
    ) -> None:
        """The same operations in the same order, a few groups at a time and without temporaries."""
        assert out_WGD.flags.c_contiguous
        assert out_WGD.shape == (*value_WGD.shape[:-1], len(mean_D))
        value_NC = value_WGD.reshape(-1, value_WGD.shape[-1])
        x_ND = out_WGD.reshape(-1, len(mean_D))
        scale_N = None if scale_WG is None else scale_WG.reshape(-1).astype(np.float32)
        step = max(1, _DECODED_AT_ONCE // len(mean_D))
        for first in range(0, len(x_ND), step):
            some = slice(first, first + step)
            x = x_ND[some]
            if self.codebook is not None:
                assert scale_N is not None
                x[:] = self.codebook.decode(value_NC[some], scale_N[some])
            elif self.dtype == "bfloat16" and self.name == "exact":
                bits = x.view(np.uint32)
                bits[:] = value_NC[some]
                bits <<= 16
            else:
                x[:] = value_NC[some]
            if self.name == "int8":
                assert scale_N is not None
                x *= scale_N[some, None]
            if self.name == "exact" and space == "normalised":
                x -= mean_D
                x /= std_D
            elif self.name != "exact" and space == "raw":
                x *= std_D
                x += mean_D

    @property
    def formula(self) -> Mapping[str, str]:
        """How anyone decodes, for the attributes of the store."""
        names = "('mean', 'std')"
        wanted = "mean, std"
        if self.name == "int8":
            line = "x = value.astype('f4') * scale.astype('f4')[..., None] * std + mean"
        elif learns(self.name):
            names = "('mean', 'std', 'rotation', 'level', 'byte')"
            wanted = "mean, std, rotation, level, byte"
            line = (
                "x = (level[value[:, byte], np.arange(len(byte))] * scale.astype('f4')[:, None]) "
                "@ rotation * std + mean"
            )
        elif self.dtype == "bfloat16":
            line = "x = (value.astype('u4') << 16).view('f4')"
        else:
            line = "x = value.astype('f4')"
        return {
            "kind": self.name,
            "numpy": (
                "import numpy as np, zarr\n"
                "root = zarr.open_group('data.zarr', mode='r')\n"
                f"{wanted} = (root[f'statistics/embedding/{{k}}'][:] for k in {names})\n"
                "e = root['train/0/embedding']  # split train, view 0\n"
                "value = e['value'][0]"
                + ("; scale = e['scale'][0]" if self.name != "exact" else "")
                + "\n"
                + line
            ),
        }


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A codec with all that it needs, and what it loses of groups it has not seen."""

    codec: Codec
    statistics: Statistics
    fidelity: Mapping[str, float]


def sample_groups(name: str, *, given: bool) -> int:
    """Stored groups that `calibrate` wants to see; `given`: where mean and std are."""
    if learns(name):
        return HELD_OUT_GROUPS + _LEARNT_GROUPS
    return HELD_OUT_GROUPS + (0 if given else _CALIBRATION_GROUPS)


def calibrate(
    name: CodecName,
    dtype: Dtype,
    sample_WGD: npt.NDArray[np.float32],
    *,
    given: Statistics | None = None,
) -> Calibrated:
    """Fit a codec to whole windows in random order, the last of which are kept for measuring."""
    windows, stored, _ = sample_WGD.shape
    held_out = max(1, min(windows // 4, -(-HELD_OUT_GROUPS // stored)))
    known = sample_WGD[:-held_out] if windows > 1 else sample_WGD
    tested = sample_WGD[-held_out:] if learns(name) or given is None else sample_WGD
    statistics = given or Statistics.of(known)
    codec = Codec.fit(name, dtype, statistics, known)
    decoded = tested
    if name != "exact":
        stored_WG = codec.encode(tested, statistics.mean, statistics.std)
        decoded = codec.decode(*stored_WG, statistics.mean, statistics.std)
    return Calibrated(codec=codec, statistics=statistics, fidelity=fidelity(tested, decoded))


def learns(name: str) -> bool:
    """Whether a codec is fitted to a calibration sample, beyond the channels' mean and std."""
    return name in _VALUES_A_BYTE


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


def _own_type(x: Array, dtype: Dtype) -> Array:
    """The teacher's bits; what was decoded from another codec is rounded to its type.

    bfloat16 as uint16, since only torch has the type.
    """
    if dtype == "float16" and str(x.dtype).rpartition(".")[2] != "float16":
        x = x.clip(-65504, 65504)
    if dtype != "bfloat16":
        return _cast(x, dtype)
    if not isinstance(x, np.ndarray):
        return _cast(x, dtype).view(_namespace(x).uint16)
    bits = _cast(x, "float32").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # half to even
