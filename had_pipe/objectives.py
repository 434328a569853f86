"""What a student is trained for: HAD's two losses (Yang et al. 2025, arXiv 2505.20836).

Visible groups are drawn to the teacher's embeddings (mean squared error); masked bases are read
from visible features by cross-attention (cross-entropy). It holds the weights that serve training
alone; it knows neither teachers nor caches, only their embeddings.

B windows, T k-mers, V visible and M masked groups, S = 6T bases, E student width, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from had_pipe.dna.kmers import K
from had_pipe.students.had import BaseDecoder


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Scalars of one batch; NaN where a term of weight 0 was not measured."""

    total: Tensor
    """What is minimised: align * weight + reconstruct * weight."""
    align: Tensor
    """Mean squared error over visible groups and channels, in the space of the target."""
    reconstruct: Tensor
    """Cross-entropy of masked bases in nats; guessing costs ln 4 = 1.386."""
    accuracy: Tensor
    """Share of masked bases read right."""
    cosine: Tensor
    """Mean cosine of predicted and teacher's embeddings, in the teacher's space."""


class HADObjective(nn.Module):
    """`align * L_align + reconstruct * L_rec` on the features of a batch of windows.

    With target = "normalised" the error is taken after each channel is brought to mean 0 and
    standard deviation 1 by the cache's statistics; "raw" takes the teacher's own space.
    """

    mean_D: Tensor | None
    std_D: Tensor | None

    def __init__(
        self,
        *,
        hidden_size: int,
        channels: int,
        align: float = 1.0,
        reconstruct: float = 1.0,
        decoder_heads: int = 4,
        target: Literal["raw", "normalised"] = "raw",
        mean_D: Tensor | None = None,
        std_D: Tensor | None = None,
    ) -> None:
        super().__init__()
        assert min(align, reconstruct) >= 0
        assert max(align, reconstruct) > 0
        assert (target == "normalised") == (mean_D is not None) == (std_D is not None)
        self.align, self.reconstruct = align, reconstruct
        self._channels = channels
        # A term of weight 0 has no weights: they would lie in the optimiser and learn nothing.
        self.projection = nn.Linear(hidden_size, channels) if align else None
        self.decoder = BaseDecoder(hidden_size, decoder_heads) if reconstruct else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.register_buffer("mean_D", None)
        self.register_buffer("std_D", None)
        if mean_D is not None and std_D is not None:
            assert mean_D.shape == std_D.shape == (channels,)
            # A channel that never varies says nothing; dividing by its 0 would say NaN.
            std_D = torch.where(std_D > 0, std_D, torch.ones_like(std_D))
            self.mean_D = mean_D.detach().float().clone()
            self.std_D = std_D.detach().float().clone()

    def forward(
        self, feat_BSE: Tensor, kmer_id_BT: Tensor, mask_BT: Tensor, target_BVD: Tensor
    ) -> Losses:
        """Losses of a batch, k-mers and masks as the teacher saw them.

        `target_BVD` holds the visible groups in their order; every window has V of them.
        """
        V = target_BVD.shape[1]
        order_BT, visible_BV6E, masked_BM6E = _visible_first(feat_BSE, mask_BT, V)
        nan = torch.full((), torch.nan, device=feat_BSE.device)
        align = cosine = reconstruct = accuracy = nan
        total = torch.zeros((), device=feat_BSE.device)

        if self.projection is not None:
            found_BVD = self.projection(visible_BV6E.mean(dim=2)).float()
            target_BVD = target_BVD.float()
            align = F.mse_loss(found_BVD, self._into(target_BVD))
            total = total + self.align * align
            with torch.no_grad():
                cosine = F.cosine_similarity(self._out_of(found_BVD), target_BVD, dim=-1).mean()

        if self.decoder is not None:
            logits_BQ4 = self.decoder(masked_BM6E.flatten(1, 2), visible_BV6E.flatten(1, 2)).float()
            masked_BM = order_BT[:, V:]
            # A k-mer id is its bases as pairs of bits, first base highest.
            shift_6 = torch.arange(2 * (K - 1), -1, -2, device=kmer_id_BT.device)
            kmer_id_BM1 = kmer_id_BT.long().gather(1, masked_BM).unsqueeze(-1)
            base_BQ = ((kmer_id_BM1 >> shift_6) & 3).flatten(1)
            reconstruct = F.cross_entropy(logits_BQ4.flatten(0, 1), base_BQ.flatten())
            total = total + self.reconstruct * reconstruct
            with torch.no_grad():
                accuracy = (logits_BQ4.argmax(dim=-1) == base_BQ).float().mean()

        return Losses(
            total=total,
            align=align.detach(),
            reconstruct=reconstruct.detach(),
            accuracy=accuracy,
            cosine=cosine,
        )

    def predictions(self, feat_BSE: Tensor, mask_BT: Tensor, *, visible: int) -> Tensor:
        """The teacher's embeddings of visible groups as the student has them, (B, V, D)."""
        assert self.projection is not None, "trained without alignment"
        _, visible_BV6E, _ = _visible_first(feat_BSE, mask_BT, visible)
        return self._out_of(self.projection(visible_BV6E.mean(dim=2)).float())

    @property
    def unit_D(self) -> Tensor:
        """What an error of 1 is in each channel of the teacher's space."""
        if self.std_D is not None:
            return self.std_D
        return torch.ones(self._channels, device=next(self.parameters()).device)

    def _into(self, emb_BVD: Tensor) -> Tensor:
        if self.mean_D is None or self.std_D is None:
            return emb_BVD
        return (emb_BVD - self.mean_D) / self.std_D

    def _out_of(self, emb_BVD: Tensor) -> Tensor:
        if self.mean_D is None or self.std_D is None:
            return emb_BVD
        return emb_BVD * self.std_D + self.mean_D


def _visible_first(
    feat_BSE: Tensor, mask_BT: Tensor, visible: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Groups reordered so that the visible ones come first, and their features, split there.

    The number of masked groups is the same in every window, so shapes are fixed and nothing waits
    for the device to count.
    """
    B, T = mask_BT.shape
    if mask_BT.device.type == "cpu":
        assert bool((mask_BT.sum(dim=1) == T - visible).all()), "masks and targets do not match"
    order_BT = mask_BT.to(torch.uint8).argsort(dim=1, stable=True)
    feat_BTF = feat_BSE.reshape(B, T, -1)
    feat_BTF = feat_BTF.gather(1, order_BT.unsqueeze(-1).expand_as(feat_BTF))
    feat_BT6E = feat_BTF.view(B, T, K, -1)
    return order_BT, feat_BT6E[:, :visible], feat_BT6E[:, visible:]
