"""What held-out figures are without a student: three guesses that look at no neighbour.

The mean embedding for every group; the mean embedding of each k-mer; the base frequencies for every
masked base. They are learnt from training windows and measured like the student. It does not know
where windows come from.

B windows of a batch, T k-mers, V visible groups, D channels, P visible groups of a whole batch,
K = 4096 k-mers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from had_pipe.dna import kmers

Seen = tuple[Tensor, Tensor, Tensor]
"""K-mer ids (B, T) and masks (B, T) as the teacher saw them; visible groups' embeddings (B, V, D)
in their order."""

# Bases of each k-mer: how many A, C, G, T.
_BASES_K4 = np.stack(
    [
        (kmers.decode_kmers(np.arange(kmers.KMERS, dtype=np.uint16)[:, None]) == base).sum(1)
        for base in range(4)
    ],
    axis=1,
).astype(np.float64)


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
        for kmer_id_BT, mask_BT, target_BVD in batches:
            kmer_id_P = kmer_id_BT[~mask_BT]
            table_KD.index_add_(0, kmer_id_P, target_BVD.flatten(0, 1).double())
            count_K += torch.bincount(kmer_id_P, minlength=kmers.KMERS)
            every_K += torch.bincount(kmer_id_BT.flatten(), minlength=kmers.KMERS)
        mean_D = table_KD.sum(0) / count_K.sum()
        known_K1 = count_K[:, None]
        table_KD = torch.where(known_K1 > 0, table_KD / known_K1.clamp(min=1), mean_D)
        frequency_4 = (every_K @ _bases(device)) / (every_K.sum() * kmers.K)
        return Floors(mean_D.float(), table_KD.float(), frequency_4)

    def measure(self, batches: Iterable[Seen], *, unit_D: Tensor) -> dict[str, float]:
        """Their figures on held-out windows; errors are in units of `unit_D`, cosines are not."""
        device = self.mean_D.device
        base_K4 = _bases(device)
        squares = torch.zeros(4, dtype=torch.float64, device=device)
        masked_4 = torch.zeros(4, dtype=torch.float64, device=device)
        groups = windows = 0
        for kmer_id_BT, mask_BT, target_BVD in batches:
            kmer_id_P, target_PD = kmer_id_BT[~mask_BT], target_BVD.flatten(0, 1)
            squares += torch.stack(
                [
                    figure
                    for guess_PD in (self.mean_D.expand_as(target_PD), self.table_KD[kmer_id_P])
                    for figure in (
                        ((guess_PD - target_PD) / unit_D).square().mean(1).double().sum(),
                        F.cosine_similarity(guess_PD, target_PD, dim=1).double().sum(),
                    )
                ]
            )
            hidden_K = torch.bincount(kmer_id_BT[mask_BT], minlength=kmers.KMERS)
            masked_4 += hidden_K.double() @ base_K4
            groups += len(kmer_id_P)
            windows += len(kmer_id_BT)
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
    return torch.from_numpy(_BASES_K4).to(device)
