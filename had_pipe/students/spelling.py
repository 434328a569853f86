"""K-mer ids spelt base by base, in the student's alphabet."""

from __future__ import annotations

import torch
from torch import Tensor

from had_pipe.dna.kmers import K
from had_pipe.students.tokenizer import FIRST_BASE, MASK


def spell(kmer_id_BT: Tensor, mask: Tensor) -> Tensor:
    """The student's input (B, 6T): bases, and mask symbols where `mask` is True.

    It is of groups, (B, T), or of single bases, (B, 6T).
    """
    # A k-mer id is its bases as pairs of bits, first base highest.
    shift_6 = torch.arange(2 * (K - 1), -1, -2, device=kmer_id_BT.device)
    base_BT6 = ((kmer_id_BT.long().unsqueeze(-1) >> shift_6) & 3) + FIRST_BASE
    return base_BT6.masked_fill_(mask.unflatten(1, (kmer_id_BT.shape[1], -1)), MASK).flatten(1)
