"""Points in two spaces: planes, turns and distances against slower ways to the same."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from had_pipe.spaces import Space, correlation, distances, turned


def points(seed: int, P: int = 60, D: int = 5) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(P, D)) @ rng.normal(size=(D, D)) + 3


def standard(x_PD: np.ndarray) -> np.ndarray:
    return (x_PD - x_PD.mean(0)) / x_PD.std(0)


def test_the_plane_is_that_of_a_singular_value_decomposition() -> None:
    x_PD = points(0)
    space = Space(x_PD)
    left, value, _ = np.linalg.svd(standard(x_PD), full_matrices=False)
    expected = left[:, :2] * value[:2] / np.sqrt(5)
    found = space.plane(x_PD)
    # An axis may point either way.
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-10)
    assert space.share == pytest.approx(float((value[:2] ** 2).sum() / (value**2).sum()))
    np.testing.assert_array_equal(Space(x_PD).plane(x_PD), found)


def test_a_channel_that_never_varies_says_nothing() -> None:
    x_PD = points(1)
    with_one = np.concatenate([x_PD, np.full((len(x_PD), 1), 7.0)], axis=1)
    level_P = np.arange(len(x_PD)) % 3
    assert Space(with_one).share == pytest.approx(Space(x_PD).share)
    assert Space(with_one).explained(level_P) == pytest.approx(Space(x_PD).explained(level_P))
    flat = Space(np.ones((4, 3)))
    assert flat.share == 0
    assert flat.explained(np.array([0, 0, 1, 1])) == 0


def test_what_levels_explain_is_the_variance_that_their_means_have() -> None:
    x_PD, level_P = points(2), np.random.default_rng(3).integers(0, 4, 60)
    z_PD = standard(x_PD)
    mean_PD = np.stack([z_PD[level_P == level].mean(0) for level in level_P])
    assert Space(x_PD).explained(level_P) == pytest.approx(mean_PD.var(0).sum() / z_PD.var(0).sum())
    assert Space(x_PD).explained(np.zeros(60)) == pytest.approx(0, abs=1e-12)
    assert Space(x_PD).explained(np.arange(60)) == pytest.approx(1)


@given(angle=st.floats(-4, 4), scale=st.floats(0.1, 9), mirrored=st.booleans())
def test_a_turned_scaled_or_mirrored_picture_is_the_same(
    angle: float, scale: float, mirrored: bool
) -> None:
    to_P2 = points(4, D=2) - points(4, D=2).mean(0)
    turn_22 = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    from_P2 = scale * to_P2 @ turn_22 * [1, -1 if mirrored else 1]
    found_22, agreement = turned(from_P2, to_P2)
    np.testing.assert_allclose(from_P2 @ found_22, scale * to_P2, atol=1e-9)
    assert agreement == pytest.approx(1)


def test_no_other_turn_agrees_better() -> None:
    from_P2, to_P2 = (x - x.mean(0) for x in (points(5, D=2), points(6, D=2)))
    _, agreement = turned(from_P2, to_P2)
    norm = np.linalg.norm(from_P2) * np.linalg.norm(to_P2)
    best = 0.0
    for angle, side in itertools.product(np.linspace(0, 2 * np.pi, 721), (1, -1)):
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        best = max(best, float(((from_P2 @ turn * [1, side]) * to_P2).sum() / norm))
    assert agreement == pytest.approx(best, abs=1e-4)
    assert turned(np.zeros((3, 2)), to_P2[:3])[1] == 0


def test_distances_and_correlation_are_those_of_loops() -> None:
    a, b = points(7, P=9), points(8, P=9)
    pairs = list(itertools.combinations(range(9), 2))
    np.testing.assert_allclose(distances(a), [np.linalg.norm(a[i] - a[j]) for i, j in pairs])
    expected = np.corrcoef(distances(a), distances(b))[0, 1]
    assert correlation(distances(a), distances(b)) == pytest.approx(expected)
    assert correlation(np.ones(4), np.arange(4.0)) == 0
