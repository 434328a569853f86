"""Bases, k-mer ids and group masks.

W windows, T k-mers per window, S = 6T bases. A base code is 0-3 for A, C, G, T. A k-mer id is a
k-mer read as a number in base 4, first base first: 0 (AAAAAA) to 4095 (TTTTTT), the lexicographic
order of A, C, G, T. Teachers map ids to their own tokens; no file holds a teacher's token ids.
"""

from __future__ import annotations

from decimal import Decimal

import numpy as np
import numpy.typing as npt

from had_pipe.draws import Purpose, draws

K = 6
KMERS = 4**K
LETTERS = "ACGT"

_PLACE = 4 ** np.arange(K - 1, -1, -1)


def encode_kmers(base_WS: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint16]:
    """Base codes (W, 6T) to k-mer ids (W, T). Every base must be 0-3."""
    windows, bases = base_WS.shape
    assert bases % K == 0
    assert base_WS.size == 0 or int(base_WS.max()) < 4
    return (base_WS.reshape(windows, -1, K).astype(np.uint16) @ _PLACE.astype(np.uint16)).astype(
        np.uint16, copy=False
    )


def decode_kmers(kmer_id: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """K-mer ids (..., T) to base codes (..., 6T)."""
    base = (kmer_id[..., None] // _PLACE) % 4
    return base.astype(np.uint8).reshape(*kmer_id.shape[:-1], kmer_id.shape[-1] * K)


def spell(kmer_id: int) -> str:
    """The six letters of one k-mer id."""
    return "".join(LETTERS[b] for b in decode_kmers(np.array([kmer_id], dtype=np.uint16)))


def _reverse_complement_table() -> npt.NDArray[np.uint16]:
    every = np.arange(KMERS, dtype=np.uint16)
    base = decode_kmers(every[:, None])
    return encode_kmers(3 - base[:, ::-1])[:, 0]


_REVERSE_COMPLEMENT = _reverse_complement_table()


def reverse_complement(kmer_id_WT: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """The same windows read on the other strand: each k-mer complemented, their order turned."""
    return np.ascontiguousarray(_REVERSE_COMPLEMENT[kmer_id_WT][..., ::-1])


def masked_groups(mask_ratio: float, kmers: int) -> int:
    """How many of `kmers` groups are masked: round(ratio * T), halves up."""
    # Decimal, because 0.29 * 50 is 14.499999999999998 in binary and 14.5 to whoever wrote it.
    return int(Decimal(repr(mask_ratio)) * kmers + Decimal("0.5"))


def group_masks(
    *, seed: int, view: int, first: int, windows: int, kmers: int, masked: int
) -> npt.NDArray[np.bool_]:
    """Masks (windows, kmers) of windows `first` on, True where hidden, exactly `masked` a window.

    The masked groups of a window are those with the smallest draws, ties by position, so a mask
    depends only on (seed, view, window, kmers, masked): Yang et al. 2025 (arXiv 2505.20836) mask
    whole k-mers so that the teacher cannot read a hidden base from its own token.
    """
    assert 0 <= masked <= kmers
    keys = draws(Purpose.MASK, seed, view, first=first, rows=windows, columns=kmers)
    return _smallest(keys, masked)


def base_masks(
    *, seed: int, stream: int, rows: npt.NDArray[np.int64], bases: int, masked: int
) -> npt.NDArray[np.bool_]:
    """Masks (rows, bases) of the named windows, exactly `masked` single bases of each.

    Drawn as groups are, from (seed, stream, row): the control that hides bases, not k-mers.
    """
    assert 0 <= masked <= bases
    keys = [
        draws(Purpose.BASE_MASK, seed, stream, first=row, rows=1, columns=bases)
        for row in rows.tolist()
    ]
    return _smallest(np.concatenate(keys), masked)


def _smallest(keys_WN: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.bool_]:
    """True at the `count` smallest keys of each row, ties by position."""
    if count == 0:
        return np.zeros(keys_WN.shape, dtype=np.bool_)
    # A partition costs a tenth of sorting.
    mask = keys_WN <= np.partition(keys_WN, count - 1, axis=1)[:, count - 1, None]
    for w in np.flatnonzero(mask.sum(axis=1) > count):  # the last one has its equal
        mask[w] = False
        mask[w, np.argsort(keys_WN[w], kind="stable")[:count]] = True
    return np.asarray(mask, dtype=np.bool_)


def strand_flips(
    *, seed: int, view: int, first: int, windows: int, probability: float
) -> npt.NDArray[np.bool_]:
    """Which of the windows `first` on a view sees on the other strand, (windows,)."""
    keys = draws(Purpose.STRAND, seed, view, first=first, rows=windows, columns=1)[:, 0]
    # 53 bits make an exact double in [0, 1).
    return (keys >> np.uint64(11)).astype(np.float64) * 2.0**-53 < probability
