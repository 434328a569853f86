"""What held-out figures are without a student: three guesses that look at no neighbour.

The mean embedding for every group; the mean embedding of each k-mer; the base frequencies for every
masked base. They are learnt from training windows and measured like the student. It does not know
where windows come from.

B windows of a batch, T k-mers, S = 6T bases, G groups aligned on, D channels, P of them in a
whole batch, K = 4096 k-mers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from had_pipe.dna import kmers

# The bases of each k-mer.
_BASE_K6 = kmers.decode_kmers(np.arange(kmers.KMERS, dtype=np.uint16)[:, None]).astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A batch as a student is asked about it."""

    kmer_id_BT: Tensor
    """In the orientation the teacher saw, as is all of this."""
    aligned_BT: Tensor
    """True at groups aligned on."""
    hidden_BS: Tensor
    """True at bases that the student does not see."""
    target_BGD: Tensor
    """The embeddings of the groups aligned on, in their order."""


@dataclass(frozen=True)
class Floors:
    """The three guesses."""

    mean_D: Tensor
    table_KD: Tensor
    frequency_4: Tensor
    """float64; of A, C, G, T."""

    @staticmethod
    def learn(batches: Iterable[Seen], *, channels: int, device: torch.device) -> Floors:
        """From training windows; a k-mer that they never show is guessed to be the mean."""
        table_KD = torch.zeros(kmers.KMERS, channels, dtype=torch.float64, device=device)
        count_K = torch.zeros(kmers.KMERS, dtype=torch.float64, device=device)
        every_K = torch.zeros(kmers.KMERS, dtype=torch.float64, device=device)
        for seen in batches:
            kmer_id_P = seen.kmer_id_BT[seen.aligned_BT]
            table_KD.index_add_(0, kmer_id_P, seen.target_BGD.flatten(0, 1).double())
            count_K += torch.bincount(kmer_id_P, minlength=kmers.KMERS)
            every_K += torch.bincount(seen.kmer_id_BT.flatten(), minlength=kmers.KMERS)
        mean_D = table_KD.sum(0) / count_K.sum()
        known_K1 = count_K[:, None]
        table_KD = torch.where(known_K1 > 0, table_KD / known_K1.clamp(min=1), mean_D)
        every_4 = torch.zeros(4, dtype=torch.float64, device=device)
        every_4.index_add_(0, _bases(device).flatten(), every_K.repeat_interleave(kmers.K))
        frequency_4 = every_4 / (every_K.sum() * kmers.K)
        return Floors(mean_D.float(), table_KD.float(), frequency_4)

    def measure(
        self,
        batches: Iterable[Seen],
        *,
        unit_D: Tensor,
        error: Callable[[Tensor], Tensor] = torch.square,
    ) -> dict[str, float]:
        """Their figures on held-out windows.

        `error` is what a difference in units of `unit_D` costs; cosines are in the teacher's space.
        """
        device = self.mean_D.device
        base_K6 = _bases(device)
        squares = torch.zeros(4, dtype=torch.float64, device=device)
        masked_4 = torch.zeros(4, dtype=torch.float64, device=device)
        groups = windows = 0
        for seen in batches:
            kmer_id_P = seen.kmer_id_BT[seen.aligned_BT]
            target_PD = seen.target_BGD.flatten(0, 1)
            squares += torch.stack(
                [
                    figure
                    for guess_PD in (self.mean_D.expand_as(target_PD), self.table_KD[kmer_id_P])
                    for figure in (
                        error((guess_PD - target_PD) / unit_D).mean(1).double().sum(),
                        F.cosine_similarity(guess_PD, target_PD, dim=1).double().sum(),
                    )
                ]
            )
            base_BS = base_K6[seen.kmer_id_BT].flatten(1)
            masked_4 += torch.bincount(base_BS[seen.hidden_BS], minlength=4)
            groups += len(kmer_id_P)
            windows += len(base_BS)
        names = ("mean_align", "mean_cosine", "kmer_align", "kmer_cosine")
        commonest = int(self.frequency_4.argmax())
        surprise_4 = -self.frequency_4.clamp(min=1e-12).log()
        return {
            **dict(zip(names, (squares / groups).tolist(), strict=True)),
            "base_frequency_accuracy": float(masked_4[commonest] / masked_4.sum()),
            "base_frequency_cross_entropy": float((masked_4 * surprise_4).sum() / masked_4.sum()),
            "windows": windows,
        }


def _bases(device: torch.device) -> Tensor:
    return torch.from_numpy(_BASE_K6).to(device)
