"""Points in two spaces, held against each other: principal planes, turns, distances.

P points or K of them, D channels. It knows nothing of what the points are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.int64]


class Space:
    """Where points lie, each channel with mean 0 and variance 1, and their principal plane."""

    def __init__(self, x_PD: Floats) -> None:
        self._mean_D = x_PD.mean(axis=0, dtype=np.float64)
        std_D = x_PD.std(axis=0, dtype=np.float64)
        # A channel that never varies says nothing.
        self._per_D = np.where(std_D > 0, 1 / np.where(std_D > 0, std_D, 1.0), 0.0)
        self._varying = max(1, int((std_D > 0).sum()))
        self._x_PD = self.standard(x_PD)
        value_D, vector_DD = np.linalg.eigh(self._x_PD.T @ self._x_PD / len(x_PD))
        plane_D2 = vector_DD[:, :-3:-1]
        # A vector and its opposite are one axis: the largest number of it is taken as positive.
        largest_2 = np.abs(plane_D2).argmax(axis=0)
        self._plane_D2 = plane_D2 * np.where(plane_D2[largest_2, [0, 1]] < 0, -1.0, 1.0)
        self.share = float(value_D[-2:].sum() / self._varying)
        """Of the variance that lies in the plane."""

    def standard(self, x_PD: Floats) -> Floats:
        scaled: Floats = (x_PD - self._mean_D) * self._per_D
        return scaled

    def plane(self, x_PD: Floats) -> Floats:
        """Principal components; 1 is the root of the variance in all channels together."""
        at_P2: Floats = self.standard(x_PD) @ self._plane_D2 / np.sqrt(self._varying)
        return at_P2

    def explained(self, level_P: Ints) -> float:
        """Share of the variance that lies between the means of levels."""
        between = 0.0
        for level in np.unique(level_P):
            here_D = self._x_PD[level_P == level]
            between += len(here_D) * float(np.square(here_D.mean(axis=0)).sum())
        return between / (len(level_P) * self._varying)


def turned(from_P2: Floats, to_P2: Floats) -> tuple[Floats, float]:
    """The turn or mirror that brings points nearest others but for scale; how near, 0 to 1."""
    left_22, value_2, right_22 = np.linalg.svd(from_P2.T @ to_P2)
    norm = float(np.linalg.norm(from_P2) * np.linalg.norm(to_P2))
    return left_22 @ right_22, float(value_2.sum() / norm) if norm else 0.0


def distances(x_KD: Floats) -> Floats:
    """Between all pairs of points, each pair once."""
    square_K = np.square(x_KD).sum(axis=1)
    square_KK = square_K[:, None] + square_K[None, :] - 2 * (x_KD @ x_KD.T)
    apart: Floats = np.sqrt(np.maximum(square_KK[np.triu_indices(len(x_KD), k=1)], 0.0))
    return apart


def correlation(a: Floats, b: Floats) -> float:
    """Pearson's; 0 where either never varies."""
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / norm if norm else 0.0
