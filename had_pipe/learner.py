"""What learns: a student, the objective it is held to, and the optimiser of both.

It takes batches one by one and knows neither where they come from nor where its state is kept.

B windows of a batch, T k-mers, V visible groups, G groups aligned on, D teacher channels, S = 6T
bases, E width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from had_pipe import checkpoint
from had_pipe.dna import kmers
from had_pipe.floors import Seen
from had_pipe.objectives import HADObjective, Losses
from had_pipe.recipe import Objective, Train
from had_pipe.stream import Batch
from had_pipe.students import HADModel

TERMS = ("loss", "align", "reconstruct", "accuracy", "cosine")


def learning_rate(train: Train, step: int) -> float:
    """Of step 1, 2, ... `steps`: a line up to lr, then a cosine that ends at lr_final."""
    if step <= train.warmup:
        return train.lr * step / train.warmup
    share = (step - train.warmup) / (train.steps - train.warmup)
    return train.lr_final + (train.lr - train.lr_final) * 0.5 * (1 + math.cos(math.pi * share))


def parameter_groups(modules: Sequence[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, embeddings, A_log and dt_bias do not (Caduceus, fla)."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for module in modules:
        embedded = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding)}
        for parameter in module.parameters():
            keep = parameter.ndim < 2 or id(parameter) in embedded
            (kept if keep else decayed).append(parameter)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]


@dataclass(frozen=True)
class Gradient:
    """What one batch of all processes asks for; the weights have not been changed yet."""

    loss: Tensor
    norm: Tensor
    """Of the gradient, before clipping."""
    terms: Tensor
    """float64; those of TERMS, then the norm."""

    def finite(self) -> bool:
        return bool((self.loss + self.norm).isfinite())

    def faults(self) -> list[str]:
        """What of it is no number, in words."""
        figures = {"loss": float(self.loss), "gradient norm": float(self.norm)}
        return [f"{name} is {x}" for name, x in figures.items() if not math.isfinite(x)]


class Learner:
    """Student, objective and optimiser on one device."""

    def __init__(
        self,
        train: Train,
        weights: Objective,
        student: HADModel,
        objective: HADObjective,
        *,
        visible: int,
        device: torch.device,
    ) -> None:
        """`visible` groups of each window are seen by the teacher."""
        self.student, self.objective = student, objective
        self._train, self._visible, self._device = train, visible, device
        self._weights = weights
        # A term of weight 0 is not measured.
        absent = {
            "align": weights.align,
            "cosine": weights.align,
            "reconstruct": weights.reconstruct,
            "accuracy": weights.reconstruct,
        }
        self._measured = [absent.get(term, 1.0) > 0 for term in TERMS]
        self._optimiser = torch.optim.AdamW(
            parameter_groups([student, objective], train.weight_decay),
            lr=train.lr,
            betas=(0.9, 0.95),
            fused=True,
        )
        self._parameters = [p for group in self._optimiser.param_groups for p in group["params"]]
        # Terms and gradients of the batch that was learnt and not asked for yet.
        self._learnt: Tensor | None = None
        self._updates = 0
        self._average = (
            None if train.ema is None else [p.detach().clone() for p in self._parameters]
        )

    def learn(self, step: int, batch: Batch) -> None:
        """Find what the weights lack on this process's share of a step's batch, in portions."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate(self._train, step)
        self._optimiser.zero_grad(set_to_none=True)
        portions = list(_portions(batch, self._train.micro_batch))
        terms = []
        for portion in portions:
            losses = self._losses(portion)
            (losses.total / len(portions)).backward()
            terms.append(torch.stack(_terms(losses)))
        # Portions are equally long: the batch's means are the means of theirs. In one piece, for a
        # reduction costs its delay more than its bytes; and made here, where a device without room
        # for it says so before the others wait for it.
        gradients = (gradient.flatten() for gradient in self._gradients())
        self._learnt = torch.cat([torch.stack(terms).mean(dim=0), *gradients])

    def gradient(self, average: Callable[[Tensor], None]) -> Gradient:
        """What was learnt since the last update; `average` makes a tensor the processes' mean."""
        assert self._learnt is not None
        gradients, learnt, self._learnt = self._gradients(), self._learnt, None
        average(learnt)
        terms, *parts = learnt.split([len(TERMS), *(gradient.numel() for gradient in gradients)])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
        norm = nn.utils.clip_grad_norm_(self._parameters, self._train.clip).detach()
        return Gradient(terms[0], norm, torch.cat([terms, norm[None]]).double())

    def _gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]

    def update(self) -> None:
        """Change the weights by the last gradient."""
        self._optimiser.step()
        self._updates += 1
        if self._average is not None:
            assert self._train.ema is not None
            decay = min(self._train.ema, (1 + self._updates) / (10 + self._updates))
            with torch.no_grad():
                torch._foreach_lerp_(self._average, self._parameters, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within, the weights are their moving average, where the recipe asks for one."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def _exchange(self) -> None:
        if self._average is not None:
            for i, parameter in enumerate(self._parameters):
                parameter.data, self._average[i] = self._average[i], parameter.data

    @torch.no_grad()
    def measure(self, batches: Iterable[Batch]) -> Tensor:
        """Sums of the terms over windows that are not learnt from, and how many these are."""
        nn.Module.eval(self.student)
        self.objective.eval()
        sums = torch.zeros(len(TERMS), dtype=torch.float64, device=self._device)
        windows = 0
        try:
            for batch in batches:
                # Every window has as many visible and masked groups: means weigh by windows.
                sums += torch.stack(_terms(self._losses(batch))).double() * len(batch.kmer_id)
                windows += len(batch.kmer_id)
        finally:
            self.student.train()
            self.objective.train()
        return torch.cat([sums, sums.new_tensor([windows])])

    def named(self, means: Sequence[float]) -> dict[str, float]:
        """Terms by name, but for those that are not measured."""
        named = zip(TERMS, means, self._measured, strict=False)
        return {term: mean for term, mean, measured in named if measured}

    def seen(self, batch: Batch) -> Seen:
        """What the student is asked about a batch."""
        aligned_BT = {
            "visible": ~batch.mask,
            "masked": batch.mask,
            "all": torch.ones_like(batch.mask),
        }[self._weights.align_on]
        hidden_BS = self._hidden(batch)
        if hidden_BS is None:
            hidden_BS = batch.mask.repeat_interleave(kmers.K, dim=1)
        return Seen(
            kmer_id_BT=batch.kmer_id,
            aligned_BT=aligned_BT,
            hidden_BS=hidden_BS,
            target_BGD=self._aligned_target(batch),
        )

    def state(self) -> tuple[dict[str, Mapping[str, Tensor]], Any]:
        """Tensors by file, and what else the optimiser knows."""
        tensors, facts = checkpoint.optimiser_state(self._optimiser)
        state: dict[str, Mapping[str, Tensor]] = {
            "student": self.student.state_dict(),
            "objective": self.objective.state_dict(),
            "optimiser": tensors,
        }
        if self._average is not None:
            state["average"] = {str(i): tensor for i, tensor in enumerate(self._average)}
        return state, facts

    def restore(self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], facts: Any) -> None:
        """Stand where a learner stood after so many updates."""
        self._updates = step
        checkpoint.restore_optimiser(self._optimiser, tensors["optimiser"], facts)
        self.student.load_state_dict(tensors["student"])
        self.objective.load_state_dict(tensors["objective"])
        for i, tensor in enumerate(self._average or []):
            tensor.copy_(tensors["average"][str(i)])

    def _losses(self, batch: Batch) -> Losses:
        with torch.autocast(
            self._device.type,
            dtype=torch.bfloat16,
            enabled=self._train.precision == "bfloat16",
        ):
            hidden_BS = self._hidden(batch)
            base_id = self.objective.inputs(batch.kmer_id, batch.mask, hidden_BS)
            losses: Losses = self.objective(
                self.student(base_id).last_hidden_state,
                batch.kmer_id,
                batch.mask,
                self._aligned_target(batch),
                hidden_BS,
            )
        return losses

    def _aligned_target(self, batch: Batch) -> Tensor:
        """The teacher's embeddings of the groups aligned on, (B, G, D)."""
        T, wanted = batch.mask.shape[1], self._weights.align_on
        if wanted == "all" or batch.target.shape[1] < T:  # the cache holds these and no others
            return batch.target
        # A stable sort puts the visible groups first, each kind in order; their number is constant.
        place_BT = batch.mask.int().argsort(dim=1, stable=True)
        visible = wanted == "visible"
        place_BG = place_BT[:, : self._visible] if visible else place_BT[:, self._visible :]
        return batch.target.take_along_dim(place_BG[..., None], dim=1)

    def _hidden(self, batch: Batch) -> Tensor | None:
        """The bases that the student does not see, (B, S); None: those of masked groups.

        They are drawn by the window's own address, so that whoever reads it hides the same ones.
        """
        if self._weights.masking == "group":
            return None
        T = batch.mask.shape[1]
        assert sum(len(span.row) for span in batch.spans) == len(batch.mask)
        masks = [
            kmers.base_masks(
                seed=self._train.seed,
                stream=span.cache << 20 | span.view,  # a cache has 2^20 views at most
                rows=span.row,
                bases=kmers.K * T,
                masked=kmers.K * (T - self._visible),
            )
            for span in batch.spans
        ]
        hidden_BS = torch.from_numpy(np.concatenate(masks))
        if self._device.type != "cuda":
            return hidden_BS
        return hidden_BS.pin_memory().to(self._device, non_blocking=True)


def _portions(batch: Batch, windows: int | None) -> Iterator[Batch]:
    """A batch in parts of so many windows."""
    count = len(batch.kmer_id)
    if windows is None or windows == count:
        yield batch
        return
    for first in range(0, count, windows):
        spans, begin = [], 0
        for span in batch.spans:
            row = span.row[max(0, first - begin) : max(0, first + windows - begin)]
            if len(row):
                spans.append(replace(span, row=row))
            begin += len(span.row)
        part = slice(first, first + windows)
        yield replace(
            batch,
            kmer_id=batch.kmer_id[part],
            mask=batch.mask[part],
            target=batch.target[part],
            spans=tuple(spans),
        )


def _terms(losses: Losses) -> list[Tensor]:
    """In the order of TERMS."""
    parts = (losses.total, losses.align, losses.reconstruct, losses.accuracy, losses.cosine)
    return [part.detach().float() for part in parts]
