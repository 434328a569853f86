"""A teacher small enough to reason about: a table of k-mers, and half of what stands to the left.

Every number comes from additions and products of single float32 values, so equal input gives equal
bits whatever else is in the batch. Kept to NumPy, because tests that kill processes start many.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from had_pipe.dna.kmers import KMERS

CHANNELS = 12

# Row 4096 stands for a hidden k-mer. One channel is loud and one far from 0, as in real models.
_TABLE = np.random.default_rng(6).normal(size=(KMERS + 1, CHANNELS)).astype(np.float32)
_TABLE[:, 0] *= 50
_TABLE[:, 1] += 20


@dataclass(kw_only=True)
class NumpyTeacher:
    """Satisfies `had_pipe.teachers.teacher.Teacher`."""

    channels: int = CHANNELS
    context: int = 64
    dtype: str = "float32"
    name: str = "table"
    revision: str | None = None
    weights_sha256: str = "5" * 64
    settings_sha256: str | None = None
    licence: str = "CC-BY-4.0"
    layer: int = -1
    k: int = 6
    numerics: Mapping[str, str | int] = field(default_factory=lambda: {"device": "numpy"})
    seconds: float = 0.0
    """How long a batch takes at least."""
    spoil: Callable[[npt.NDArray[np.uint16]], npt.NDArray[np.bool_]] | None = None
    """Says from what it is shown (W, T) which windows come out as NaN."""
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    """Every shape it was shown."""
    batches: int = 0

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Any:
        time.sleep(self.seconds)
        self.shapes.add(kmer_id_WT.shape)
        self.batches += 1
        emb = np.stack([embed_one(*seen) for seen in zip(kmer_id_WT, hidden_WT, strict=True)])
        if self.spoil is not None:
            emb[self.spoil(kmer_id_WT), -1, 0] = np.nan
        return emb.astype(self.dtype)


def embed_one(
    kmer_id_T: npt.NDArray[np.uint16], hidden_T: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32]:
    """One window's vectors (T, D)."""
    emb = _TABLE[np.where(hidden_T, KMERS, kmer_id_T)]
    emb[1:] += np.float32(0.5) * emb[:-1]
    return emb
