"""K-mer ids spelt base by base, in the student's alphabet."""

from __future__ import annotations

import torch
from torch import Tensor

from had_pipe.dna.kmers import K
from had_pipe.students.tokenizer import FIRST_BASE, MASK


def bases(kmer_id_BT: Tensor) -> Tensor:
    """Base codes (B, 6T): a k-mer id is its bases as pairs of bits, first base highest."""
    shift_6 = torch.arange(2 * (K - 1), -1, -2, device=kmer_id_BT.device)
    return ((kmer_id_BT.long().unsqueeze(-1) >> shift_6) & 3).flatten(1)


def spell(kmer_id_BT: Tensor, mask: Tensor) -> Tensor:
    """The student's input (B, 6T): bases, and mask symbols where `mask` is True.

    It is of groups, (B, T), or of single bases, (B, 6T).
    """
    id_BS = bases(kmer_id_BT) + FIRST_BASE
    hidden = mask.unflatten(1, (kmer_id_BT.shape[1], -1))
    id_BS.view(*kmer_id_BT.shape, K).masked_fill_(hidden, MASK)
    return id_BS
