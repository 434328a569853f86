"""Whether a teacher knows the DNA at hand: what hidden 6-mers cost it, beside their frequency.

A checkpoint whose tokens are mapped wrongly loads and runs like any other; only what it says tells.
With tokens in another order a hidden 6-mer costs about as much as guessing, which frequency beats.
It proves no more: with every 6-mer turned to the other strand, or blocks computed a little wrongly,
a good teacher may still beat frequency.

W windows, T 6-mers, N hidden ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from had_pipe.dna.kmers import K, decode_kmers
from had_pipe.teachers.teacher import LanguageModel

MARGIN = 0.05
"""Nats by which a teacher must beat frequency. Its error on so many 6-mers is about 0.03."""

_HIDDEN = 1024
_BACKGROUND = 1 << 19
"""6-mers that frequencies are counted on: a hundred for each that there is."""
_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What hidden 6-mers cost, in nats each."""

    nats: float
    """The teacher."""
    frequency_nats: float
    """Whoever knows how common its tokens are here, and nothing else."""
    token_bases: int
    kmers: int
    """Hidden 6-mers asked for."""
    windows: int

    @property
    def enough(self) -> bool:
        return self.nats <= self.frequency_nats - MARGIN

    def __str__(self) -> str:
        of = f"{self.token_bases}-mers" if self.token_bases > 1 else "bases"
        return (
            f"{self.nats:.2f} nats for a hidden 6-mer ({self.kmers:,} of them in {self.windows:,} "
            f"windows), where the frequencies of {of} alone take {self.frequency_nats:.2f}"
        )


def windows_of_use(*, kmers: int, hidden: int) -> int:
    """How many windows `knowledge` looks at, of any number."""
    return -(-_HIDDEN // hidden) + -(-_BACKGROUND // kmers)


def knowledge(
    teacher: LanguageModel,
    kmer_id_WT: npt.NDArray[np.uint16],
    hidden_WT: npt.NDArray[np.bool_],
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Knowledge | None:
    """Measured on the first windows, frequencies counted on the others; None without a head."""
    assert kmer_id_WT.shape == hidden_WT.shape
    assert hidden_WT[0].any()
    each = int(hidden_WT[0].sum())
    asked = min(-(-_HIDDEN // each), max(1, len(kmer_id_WT) // 2))
    looked_at = asked + -(-_BACKGROUND // kmer_id_WT.shape[1])
    nats = []
    for first in range(0, asked, _AT_ONCE):
        some = slice(first, min(first + _AT_ONCE, asked))
        found = teacher.masked_loss(kmer_id_WT[some], hidden_WT[some])
        if found is None:
            return None
        nats.append(found)
        tick(some.stop, asked)
    cost_N = np.concatenate(nats)
    return Knowledge(
        nats=float(cost_N.mean()),
        frequency_nats=_by_frequency(
            kmer_id_WT[:asked][hidden_WT[:asked]],
            kmer_id_WT[asked:looked_at].ravel(),
            teacher.token_bases,
        ),
        token_bases=teacher.token_bases,
        kmers=len(cost_N),
        windows=asked,
    )


def _by_frequency(
    kmer_id_N: npt.NDArray[np.uint16], others: npt.NDArray[np.uint16], bases: int
) -> float:
    """Nats of a 6-mer by the frequency of its tokens in others, each counted once more."""
    count = np.bincount(_tokens(others, bases).ravel(), minlength=4**bases) + 1.0
    cost = -np.log(count / count.sum())
    return float(cost[_tokens(kmer_id_N, bases)].sum(1).mean())


def _tokens(kmer_id_N: npt.NDArray[np.uint16], bases: int) -> npt.NDArray[np.int64]:
    """Each 6-mer as its tokens, numbered in base 4, (N, 6 / bases)."""
    base = decode_kmers(kmer_id_N[:, None]).reshape(len(kmer_id_N), K // bases, bases)
    return np.asarray(base @ 4 ** np.arange(bases - 1, -1, -1), dtype=np.int64)
