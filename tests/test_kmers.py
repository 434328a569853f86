"""K-mers: ids, strands and masks, against letters and plain loops."""

from __future__ import annotations

import itertools
import math
from decimal import ROUND_HALF_UP, Decimal

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from had_pipe.dna.kmers import (
    KMERS,
    K,
    base_masks,
    decode_kmers,
    encode_kmers,
    group_masks,
    masked_groups,
    reverse_complement,
    spell,
    strand_flips,
)
from had_pipe.draws import Purpose, draws

LETTER = dict(enumerate("ACGT"))
CODE = {letter: code for code, letter in LETTER.items()}
COMPLEMENT = str.maketrans("ACGT", "TGCA")

GOLDEN_MASKS = [
    [4, 6, 28, 42, 44, 48, 50, 53, 61, 63, 72, 76, 79],
    [0, 3, 8, 18, 37, 48, 60, 62, 67, 68, 72, 79, 80],
    [0, 1, 2, 7, 9, 14, 18, 24, 35, 37, 71, 78, 79],
    [18, 29, 37, 40, 42, 48, 51, 57, 60, 62, 67, 68, 70],
]
GOLDEN_STRANDS = "---+--++--++--+--+---++-+---+++-"

sequences = st.integers(1, 12).flatmap(
    lambda kmers: st.lists(
        st.text("ACGT", min_size=K * kmers, max_size=K * kmers), min_size=1, max_size=5
    )
)


def codes(texts: list[str]) -> npt.NDArray[np.uint8]:
    return np.array([[CODE[letter] for letter in text] for text in texts], dtype=np.uint8)


def letters(kmer_id: npt.NDArray[np.uint16]) -> list[str]:
    return ["".join(spell(int(k)) for k in window) for window in kmer_id]


def test_ids_follow_the_alphabet() -> None:
    every = ["".join(kmer) for kmer in itertools.product("ACGT", repeat=K)]
    assert encode_kmers(codes(every))[:, 0].tolist() == list(range(KMERS))
    assert [spell(k) for k in range(KMERS)] == every


@given(sequences)
def test_letters_survive_the_way_to_ids_and_back(texts: list[str]) -> None:
    base_WS = codes(texts)
    kmer_id_WT = encode_kmers(base_WS)
    assert kmer_id_WT.dtype == np.uint16
    assert kmer_id_WT.shape == (len(texts), len(texts[0]) // K)
    assert letters(kmer_id_WT) == texts
    np.testing.assert_array_equal(decode_kmers(kmer_id_WT), base_WS)


@given(sequences)
def test_the_other_strand_is_the_letters_complemented_and_turned(texts: list[str]) -> None:
    kmer_id_WT = encode_kmers(codes(texts))
    other = reverse_complement(kmer_id_WT)
    assert letters(other) == [text.translate(COMPLEMENT)[::-1] for text in texts]
    np.testing.assert_array_equal(reverse_complement(other), kmer_id_WT)


def test_a_base_that_is_none_is_not_encoded() -> None:
    with pytest.raises(AssertionError):
        encode_kmers(np.full((1, K), 4, dtype=np.uint8))


@given(
    seed=st.integers(0, 2**64 - 1),
    view=st.integers(0, 50),
    first=st.integers(0, 2**40),
    windows=st.integers(0, 6),
    kmers=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_a_mask_hides_exactly_so_many_groups_those_with_the_smallest_draws(
    seed: int, view: int, first: int, windows: int, kmers: int, share: float
) -> None:
    masked = masked_groups(share, kmers)
    mask = group_masks(
        seed=seed, view=view, first=first, windows=windows, kmers=kmers, masked=masked
    )
    assert mask.shape == (windows, kmers)
    drawn = draws(Purpose.MASK, seed, view, first=first, rows=windows, columns=kmers).tolist()
    for row, own in zip(mask, drawn, strict=True):
        smallest = sorted(range(kmers), key=lambda t: (own[t], t))[:masked]
        assert np.flatnonzero(row).tolist() == sorted(smallest)


@given(
    keys=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=4),
    masked=st.integers(0, 9),
)
def test_of_equal_draws_the_earlier_place_is_hidden(keys: list[list[int]], masked: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("had_pipe.dna.kmers.draws", lambda *_, **__: np.array(keys, dtype=np.uint64))
        mask = group_masks(seed=0, view=0, first=0, windows=len(keys), kmers=9, masked=masked)
    for row, own in zip(mask, keys, strict=True):
        smallest = sorted(range(9), key=lambda t: (own[t], t))[:masked]
        assert np.flatnonzero(row).tolist() == sorted(smallest)


@given(first=st.integers(0, 10**9), split=st.integers(0, 9), view=st.integers(0, 3))
def test_masks_and_strands_do_not_depend_on_how_windows_are_grouped(
    first: int, split: int, view: int
) -> None:
    def both(start: int, windows: int) -> npt.NDArray[np.bool_]:
        mask = group_masks(seed=3, view=view, first=start, windows=windows, kmers=14, masked=2)
        flip = strand_flips(seed=3, view=view, first=start, windows=windows, probability=0.5)
        return np.column_stack([mask, flip])

    np.testing.assert_array_equal(
        both(first, 9), np.concatenate([both(first, split), both(first + split, 9 - split)])
    )


def test_masks_keep_their_groups_for_ever() -> None:
    """Golden: a NumPy that drew otherwise would mask other groups than the caches hold."""
    mask = group_masks(seed=0, view=1, first=9_000, windows=4, kmers=85, masked=13)
    assert [np.flatnonzero(row).tolist() for row in mask] == GOLDEN_MASKS


@given(
    seed=st.integers(0, 2**63 - 1),
    stream=st.integers(0, 2**40),
    rows=st.lists(st.integers(0, 10**9), min_size=1, max_size=5),
    bases=st.integers(1, 70),
    share=st.floats(0.01, 0.99),
)
def test_single_bases_are_hidden_by_the_smallest_draws_of_their_own_window(
    seed: int, stream: int, rows: list[int], bases: int, share: float
) -> None:
    masked = masked_groups(share, bases)
    mask = base_masks(seed=seed, stream=stream, rows=np.array(rows), bases=bases, masked=masked)
    for row, own in zip(rows, mask, strict=True):
        drawn = draws(Purpose.BASE_MASK, seed, stream, first=row, rows=1, columns=bases)[0].tolist()
        smallest = sorted(range(bases), key=lambda s: (drawn[s], s))[:masked]
        assert np.flatnonzero(own).tolist() == sorted(smallest)


def test_strands_keep_their_sides_for_ever() -> None:
    flip = strand_flips(seed=0, view=1, first=9_000, windows=32, probability=0.5)
    assert "".join("-" if f else "+" for f in flip) == GOLDEN_STRANDS


def test_every_group_is_hidden_as_often_as_its_share() -> None:
    mask = group_masks(seed=1, view=0, first=0, windows=4_000, kmers=20, masked=3)
    often = mask.mean(axis=0)
    # Standard error 0.0056; five of them.
    assert np.abs(often - 0.15).max() < 0.028
    together = (mask.T.astype(np.int64) @ mask)[np.triu_indices(20, 1)] / 4_000
    assert np.abs(together - 0.15 * 2 / 19).max() < 0.01


@pytest.mark.parametrize("ratio", ["0.05", "0.1", "0.15", "0.2", "0.25", "0.3", "0.5"])
def test_the_number_of_masked_groups_rounds_halves_up(ratio: str) -> None:
    for kmers in range(1, 2_049):
        expected = int((Decimal(ratio) * kmers).quantize(Decimal(1), ROUND_HALF_UP))
        assert masked_groups(float(ratio), kmers) == expected, kmers


def test_strands_turn_as_often_as_asked() -> None:
    def often(probability: float) -> float:
        flips = strand_flips(seed=2, view=0, first=0, windows=10_000, probability=probability)
        return float(flips.mean())

    assert often(0.0) == 0.0
    assert often(1.0) == 1.0
    assert math.isclose(often(0.5), 0.5, abs_tol=0.025)
    assert math.isclose(often(0.1), 0.1, abs_tol=0.015)
