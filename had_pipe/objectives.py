"""What a student is trained for: HAD's two losses (Yang et al. 2025, arXiv 2505.20836).

Groups are drawn to the teacher's embeddings; masked bases are read from visible features by
cross-attention (cross-entropy). What the paper leaves open, and its controls, are settings of the
one class here. It holds the weights that serve training alone; it knows neither teachers nor
caches, only their embeddings.

B windows, T k-mers, V visible and M masked groups, G groups aligned on, S = 6T bases, of which P
are seen and Q hidden, E student width, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from had_pipe.dna.kmers import K
from had_pipe.students.had import BaseDecoder
from had_pipe.students.spelling import bases, spell

Groups = Literal["visible", "masked", "all"]
Pool = Literal["mean", "concat", "per_base"]
Error = Literal["mse", "smooth_l1"]


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Scalars of one batch; NaN where a term of weight 0 was not measured."""

    total: Tensor
    """What is minimised: align * weight + reconstruct * weight."""
    align: Tensor
    """Mean error over the groups aligned on and channels, in the space of the target."""
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

    With mask_tokens = "dropped" masked groups are left out of what the student reads (`inputs`
    says what that is), and its features are those of visible bases alone. A masked base then asks
    with one learned vector in place of a feature, and both sides of the cross-attention are told
    where they stand in the window: sines and cosines of it are added to them, as in CrossMAE.
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
        align_on: Groups = "visible",
        pool: Pool = "mean",
        error: Error = "mse",
        mask_tokens: Literal["kept", "dropped"] = "kept",
        masked: int | None = None,
        mean_D: Tensor | None = None,
        std_D: Tensor | None = None,
    ) -> None:
        """`masked` groups of each window are; by default as the number of targets says."""
        super().__init__()
        assert min(align, reconstruct) >= 0
        assert max(align, reconstruct) > 0
        assert (target == "normalised") == (mean_D is not None) == (std_D is not None)
        assert align_on in get_args(Groups)
        assert pool in get_args(Pool)
        assert error in get_args(Error)
        assert mask_tokens == "kept" or align_on == "visible", "masked groups have no features"
        assert masked is not None or (align_on != "all" and mask_tokens == "kept")
        self.align, self.reconstruct = align, reconstruct
        self._channels, self._masked = channels, masked
        self._align_on, self._pool, self._error = align_on, pool, error
        # A term of weight 0 has no weights: they would lie in the optimiser and learn nothing.
        pooled_size = K * hidden_size if pool == "concat" else hidden_size
        self.projection = nn.Linear(pooled_size, channels) if align else None
        self.decoder = BaseDecoder(hidden_size, decoder_heads) if reconstruct else None
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._dropped = mask_tokens == "dropped"
        asks = self._dropped and reconstruct
        self.asking_E = nn.Parameter(0.02 * torch.randn(hidden_size)) if asks else None
        self.register_buffer("mean_D", None)
        self.register_buffer("std_D", None)
        if mean_D is not None and std_D is not None:
            assert mean_D.shape == std_D.shape == (channels,)
            # A channel that never varies says nothing; dividing by its 0 would say NaN.
            std_D = torch.where(std_D > 0, std_D, torch.ones_like(std_D))
            self.mean_D = mean_D.detach().float().clone()
            self.std_D = std_D.detach().float().clone()

    def inputs(
        self, kmer_id_BT: Tensor, mask_BT: Tensor, hidden_BS: Tensor | None = None
    ) -> Tensor:
        """What the student reads: mask symbols at hidden bases (B, S), or nothing there (B, P).

        `hidden_BS` are the bases that the student does not see; None: those of masked groups.
        """
        id_BS = spell(kmer_id_BT, mask_BT if hidden_BS is None else hidden_BS)
        if not self._dropped:
            return id_BS
        assert hidden_BS is None, "groups that are left out are left out whole"
        assert self._masked is not None
        place_BS = _bases_of(_true_last(mask_BT, self._masked))
        return id_BS.gather(1, place_BS[:, : -K * self._masked])

    def forward(
        self,
        feat_BSE: Tensor,
        kmer_id_BT: Tensor,
        mask_BT: Tensor,
        target_BGD: Tensor,
        hidden_BS: Tensor | None = None,
    ) -> Losses:
        """Losses of a batch, k-mers and masks as the teacher saw them.

        `target_BGD` holds the groups aligned on in their order; every window has G of them.
        `hidden_BS` is what `inputs` was given; every window hides as many bases.
        """
        T, G = mask_BT.shape[1], target_BGD.shape[1]
        M = self._masked
        if M is None:
            M = T - G if self._align_on == "visible" else G
        targets = {"visible": T - M, "masked": M, "all": T}[self._align_on]
        assert targets == G, "masks and targets do not match"
        assert feat_BSE.shape[1] == K * (T - M if self._dropped else T)
        group_place_BS = _bases_of(_true_last(mask_BT, M))
        place_BS = group_place_BS if hidden_BS is None else _true_last(hidden_BS, K * M)
        seen_BP, hidden_BQ = place_BS[:, : -K * M], place_BS[:, -K * M :]
        seen_BPE = feat_BSE if self._dropped else _take(feat_BSE, seen_BP)
        nan = torch.full((), torch.nan, device=feat_BSE.device)
        align = cosine = reconstruct = accuracy = nan
        total = torch.zeros((), device=feat_BSE.device)

        if self.projection is not None:
            # Mostly the groups aligned on are what is seen, which has been taken already.
            same = self._align_on == "visible" and hidden_BS is None
            aligned_BGE = seen_BPE if same else self._aligned(feat_BSE, group_place_BS, M)
            found_BGND = self._projected(aligned_BGE).float()
            target_BGD = target_BGD.float()
            wanted_BGND = self._into(target_BGD).unsqueeze(2).expand_as(found_BGND)
            align = (
                F.mse_loss(found_BGND, wanted_BGND)
                if self._error == "mse"
                else 2 * F.smooth_l1_loss(found_BGND, wanted_BGND)
            )
            total = total + self.align * align
            with torch.no_grad():
                found_BGD = self._out_of(found_BGND.mean(dim=2))
                cosine = F.cosine_similarity(found_BGD, target_BGD, dim=-1).mean()

        if self.decoder is not None:
            if self.asking_E is None:
                query_BQE = _take(feat_BSE, hidden_BQ)
            else:
                position_SE = _positions(K * T, feat_BSE)
                query_BQE = self.asking_E.to(feat_BSE.dtype) + position_SE[hidden_BQ]
                seen_BPE = seen_BPE + position_SE[seen_BP]
            logits_BQ4 = self.decoder(query_BQE, seen_BPE).float()
            base_BQ = bases(kmer_id_BT).gather(1, hidden_BQ)
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
        """The teacher's embeddings of the groups aligned on as the student has them, (B, G, D)."""
        M = mask_BT.shape[1] - visible
        aligned_BGE = self._aligned(feat_BSE, _bases_of(_true_last(mask_BT, M)), M)
        return self._out_of(self._projected(aligned_BGE).float().mean(dim=2))

    def error(self, difference: Tensor) -> Tensor:
        """What a difference in the space of the target costs, number by number."""
        if self._error == "mse":
            return difference.square()
        zero = torch.zeros_like(difference)
        return 2 * F.smooth_l1_loss(difference, zero, reduction="none")

    @property
    def unit_D(self) -> Tensor:
        """What a difference of 1 is in each channel of the teacher's space."""
        if self.std_D is not None:
            return self.std_D
        return torch.ones(self._channels, device=next(self.parameters()).device)

    @property
    def language_head(self) -> BaseDecoder | None:
        """The decoder, where it asks with the student's own features at mask symbols."""
        return None if self._dropped else self.decoder

    def _aligned(self, feat_BSE: Tensor, group_place_BS: Tensor, masked: int) -> Tensor:
        """Features of the bases of the groups aligned on, group by group."""
        if self._align_on == "all" or self._dropped:
            return feat_BSE
        end = -K * masked
        visible = self._align_on == "visible"
        return _take(feat_BSE, group_place_BS[:, :end] if visible else group_place_BS[:, end:])

    def _projected(self, feat_BGE: Tensor) -> Tensor:
        """Six features a group to N embeddings a group (B, G, N, D): one, or one of each base."""
        assert self.projection is not None, "trained without alignment"
        feat_BG6E = feat_BGE.unflatten(1, (-1, K))
        pooled_BGNE = {
            "mean": lambda: feat_BG6E.mean(dim=2, keepdim=True),
            "concat": lambda: feat_BG6E.flatten(2).unsqueeze(2),
            "per_base": lambda: feat_BG6E,
        }[self._pool]()
        found: Tensor = self.projection(pooled_BGNE)
        return found

    def _into(self, emb_BGD: Tensor) -> Tensor:
        if self.mean_D is None or self.std_D is None:
            return emb_BGD
        return (emb_BGD - self.mean_D) / self.std_D

    def _out_of(self, emb_BGD: Tensor) -> Tensor:
        if self.mean_D is None or self.std_D is None:
            return emb_BGD
        return emb_BGD * self.std_D + self.mean_D


def _true_last(mask_BN: Tensor, true: int) -> Tensor:
    """Places of a window, those where the mask is False first, each kind in its order.

    The number of either is the same in every window, so shapes are fixed and nothing waits for the
    device to count.
    """
    if mask_BN.device.type == "cpu":
        assert bool((mask_BN.sum(dim=1) == true).all()), "masks and targets do not match"
    return mask_BN.to(torch.uint8).argsort(dim=1, stable=True)


def _bases_of(group_BN: Tensor) -> Tensor:
    """The bases of groups, (B, 6N)."""
    return (K * group_BN.unsqueeze(-1) + torch.arange(K, device=group_BN.device)).flatten(1)


def _take(x_BSE: Tensor, place_BN: Tensor) -> Tensor:
    return x_BSE.gather(1, place_BN.unsqueeze(-1).expand(-1, -1, x_BSE.shape[-1]))


def _positions(places: int, like_BSE: Tensor) -> Tensor:
    """Sines, then cosines of each place at wavelengths from 2 pi to 10,000 times that, (S, E)."""
    E, device = like_BSE.shape[-1], like_BSE.device
    half = -(-E // 2)
    wave_H = 10_000.0 ** (-torch.arange(half, device=device) / half)
    angle_SH = torch.arange(places, device=device).unsqueeze(-1) * wave_H
    return torch.cat([angle_SH.sin(), angle_SH.cos()], dim=1)[:, :E].to(like_BSE.dtype)
