"""Train the demo's teacher, a small NT-v2 masked language model, and measure what it has learnt.

    python pipelines/demo/train_teacher.py --genomes DIR --out pipelines/demo/teacher --minutes 45
    python pipelines/demo/train_teacher.py --genomes DIR --out pipelines/demo/teacher --evaluate

DIR holds the 2bit files named in `GENOMES`. Training sees human chr20 and chrX, worm chrX but for
its last tenth, and the training blocks of E. coli as the demo's recipe draws them; human chr21,
yeast and the validation blocks of E. coli are held out. What is shipped is a plain NT-v2; three
means of training, each gone from the result, make it learn in minutes on two cores what a blank
start would need hours for:

* While training, the embedding of a k-mer is the sum of learnt vectors of its bases, of its
  adjacent pairs and triplets, and of its own; likewise its row in the output. They are added up
  into plain tables when saved.
* The output starts at the log frequency of k-mers, so that every step is spent on context.
* Some heads of the first two blocks start with biases that make them look one or two k-mers to
  the left or right: what lies beside a hidden k-mer tells most about it.

W windows, T k-mers, S = 6T bases, D channels, M masked k-mers.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from had_pipe.dna.kmers import (
    KMERS,
    K,
    decode_kmers,
    encode_kmers,
    masked_groups,
    reverse_complement,
)
from had_pipe.dna.reference import read_contigs
from had_pipe.dna.windows import SplitRule
from had_pipe.teachers.ntv2 import (
    CLS_TOKEN,
    MASK_TOKEN,
    TOKEN_OF_KMER,
    NTv2,
    NTv2Config,
    random_model,
    rotary_tables,
)
from had_pipe.teachers.ntv2_checkpoint import load_checkpoint, save_checkpoint

CONFIG = NTv2Config(
    hidden_size=128,
    num_hidden_layers=6,
    num_attention_heads=4,
    intermediate_size=256,
    max_position_embeddings=173,  # windows of at most 170 k-mers, the longest it was trained on
)
MASK_RATIO = 0.15
GENOMES = {
    "chr20": "human_hg19_chr20.2bit",
    "chr21": "human_hg19_chr21.2bit",
    "chrX": "human_hg19_chrX_first70Mb.2bit",
    "worm": "celegans_ce2_chrX.2bit",
    "yeast": "yeast_R64-1-1.2bit",
    "ecoli": "ecoli_K12_MG1655.2bit",
}
ECOLI_SPLITS = {"blocks": 50_000, "valid": 0.1}  # as [[genome]] splits and [windows] seed in
ECOLI_SEED = 0  # pipelines/demo/demo.toml
SHARE_OF_BATCH = {"ecoli": 0.5, "human": 0.35, "worm": 0.15}
KMERS_PER_WINDOW = (60, 85, 120, 170)
TOKENS_PER_STEP = 4_096

Codes = npt.NDArray[np.uint8]


# --- DNA -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """Stretches of DNA to draw windows from, as base codes; 4 is anything but A, C, G, T."""

    name: str
    pieces: tuple[Codes, ...]

    def windows(
        self, rng: np.random.Generator, *, windows: int, kmers: int
    ) -> npt.NDArray[np.uint16]:
        """K-mer ids (W, T) of windows at random places, pure A, C, G, T, on either strand."""
        bases = kmers * K
        room = np.array([max(0, len(piece) - bases + 1) for piece in self.pieces])
        kept: list[Codes] = []
        missing = windows
        while missing:
            which = rng.choice(len(room), size=missing, p=room / room.sum())
            start = (rng.random(missing) * room[which]).astype(np.int64)
            base_WS = np.stack(
                [self.pieces[p][s : s + bases] for p, s in zip(which, start, strict=True)]
            )
            base_WS = base_WS[(base_WS < 4).all(axis=1)]
            kept.append(base_WS)
            missing -= len(base_WS)
        base_WS = np.concatenate(kept)
        flip = rng.random(windows) < 0.5
        base_WS[flip] = 3 - base_WS[flip, ::-1]
        return encode_kmers(base_WS)


def read_pieces(path: Path) -> tuple[Codes, ...]:
    return tuple(contig.base for contig in read_contigs(path))


def ecoli_pieces(path: Path) -> dict[str, tuple[Codes, ...]]:
    """The stretches of E. coli of each split, as the demo's recipe draws them."""
    (contig,) = read_contigs(path)
    length = len(contig.base)
    rule = SplitRule.of(ECOLI_SPLITS).prepare([(contig.name, length)])
    found = rule.pieces(contig.name, length, ECOLI_SEED)
    return {
        split: tuple(
            contig.base[start:end]
            for start, end, value in zip(found.start, found.end, found.value, strict=True)
            if rule.names[value] == split
        )
        for split in rule.names
    }


def split_worm(path: Path) -> dict[str, tuple[Codes, ...]]:
    (piece,) = read_pieces(path)
    cut = len(piece) * 9 // 10
    return {"train": (piece[:cut],), "valid": (piece[cut:],)}


def training_sources(genomes: Path) -> dict[str, Source]:
    return {
        "ecoli": Source("ecoli", ecoli_pieces(genomes / GENOMES["ecoli"])["train"]),
        "human": Source(
            "human",
            read_pieces(genomes / GENOMES["chr20"]) + read_pieces(genomes / GENOMES["chrX"]),
        ),
        "worm": Source("worm", split_worm(genomes / GENOMES["worm"])["train"]),
    }


def kmer_frequency(source: Source) -> npt.NDArray[np.float64]:
    """How often each k-mer stands in a source, both strands, every frame, (4096,)."""
    count = np.zeros(KMERS, dtype=np.int64)
    for piece in source.pieces:
        count += np.bincount(rolling_kmers(piece), minlength=KMERS + 1)[:KMERS]
    every = np.arange(KMERS, dtype=np.uint16)
    count += count[reverse_complement(every[:, None])[:, 0]]
    return (count + 1) / (count + 1).sum()


def rolling_kmers(piece: Codes) -> npt.NDArray[np.int64]:
    """The k-mer id at every base, 4096 where it holds something else than A, C, G, T."""
    ends = len(piece) - K + 1
    kmer_id = np.zeros(ends, dtype=np.int64)
    impure = np.zeros(ends, dtype=np.bool_)
    for i in range(K):
        base = piece[i : i + ends]
        kmer_id = kmer_id * 4 + base
        impure |= base > 3
    kmer_id[impure] = KMERS
    return kmer_id


# --- training ------------------------------------------------------------------------------------


class SumOfParts(nn.Module):
    """A table (4107, D) whose k-mer rows sum what is learnt of bases, pairs, triplets, itself."""

    def __init__(self, channels: int, *, std: float, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        base = decode_kmers(np.arange(KMERS, dtype=np.uint16)[:, None]).astype(np.int64)
        columns = []
        first = 0
        for width in (1, 2, 3):
            for at in range(K - width + 1):
                place = 4 ** np.arange(width - 1, -1, -1)
                columns.append(first + base[:, at : at + width] @ place)
                first += 4**width
        parts = np.zeros((KMERS, first), dtype=np.float32)
        parts[np.arange(KMERS)[:, None], np.stack(columns, axis=1)] = 1
        self.register_buffer("parts", torch.from_numpy(parts))
        self.part = nn.Parameter(torch.randn(first, channels, generator=generator) * std)
        self.own = nn.Parameter(torch.randn(KMERS, channels, generator=generator) * std / 4)
        self.special = nn.Parameter(torch.randn(11, channels, generator=generator) * std)

    def forward(self) -> Tensor:
        kmer = self.parts @ self.part + self.own
        token = kmer[torch.from_numpy(KMER_OF_TOKEN)]
        return torch.cat((self.special[:6], token, self.special[6:]))


KMER_OF_TOKEN = np.argsort(TOKEN_OF_KMER)
KMER_TOKENS = slice(6, 6 + KMERS)
NEIGHBOURS = {0: (-1, 1, -2, 2), 1: (-1, 1, None, None), 2: (-1, 1, None, None)}
"""Which k-mers the heads of the first blocks look at to begin with."""


def look_at_neighbours(model: NTv2) -> None:
    """Set query and key biases so that a head's attention peaks at a fixed distance.

    With rotary positions, biases q = (a, 0) and k = a (cos(w d), -sin(w d)) on a pair of speed w
    score a^2 cos(w (distance - d)): summed over the faster pairs, one peak at distance d.
    """
    strength, pairs = 4.0, 5
    d = model.config.head_dim
    speed = 10_000.0 ** (-torch.arange(pairs) * 2 / d)
    with torch.no_grad():
        for layer, offsets in NEIGHBOURS.items():
            bias = model.blocks[layer].qkv.bias.view(3, model.config.num_attention_heads, d)
            for head, offset in enumerate(offsets):
                if offset is not None:
                    bias[0, head, :pairs] = strength
                    bias[1, head, :pairs] = strength * torch.cos(speed * offset)
                    bias[1, head, d // 2 : d // 2 + pairs] = -strength * torch.sin(speed * offset)


class Trainee(nn.Module):
    """An NT-v2 whose two tables are sums of parts while it learns."""

    def __init__(self, log_frequency: Tensor, *, seed: int, config: NTv2Config = CONFIG) -> None:
        super().__init__()
        self.model = random_model(config, seed=seed, head="language").train()
        assert self.model.head is not None
        look_at_neighbours(self.model)
        self.inputs = SumOfParts(config.hidden_size, std=0.1, seed=seed + 1)
        self.outputs = SumOfParts(config.hidden_size, std=0.0, seed=seed + 2)
        # Nothing but k-mers is ever hidden, so nothing else is ever to be expected.
        bias = torch.full((config.vocab_size,), -20.0)
        bias[KMER_TOKENS] = log_frequency[torch.from_numpy(KMER_OF_TOKEN)]
        self.bias = nn.Parameter(bias)
        self.model.embedding.weight.requires_grad_(False)
        self.model.head.decoder.requires_grad_(False)

    def forward(self, token_id_WT: Tensor, masked_WT: Tensor, answer_M: Tensor) -> Tensor:
        """Mean cross-entropy at the masked k-mers; `masked_WT` covers `<cls>` too."""
        head = self.model.head
        assert head is not None
        x = F.embedding(token_id_WT, self.inputs())
        rotary = rotary_tables(token_id_WT.shape[1], self.model.config.head_dim, x.device)
        for block in self.model.blocks:
            x = block(x, rotary, None)
        hidden = head.norm(F.gelu(head.dense(self.model.norm(x[masked_WT]))))
        table = self.outputs()[KMER_TOKENS]
        return F.cross_entropy(F.linear(hidden, table, self.bias[KMER_TOKENS]), answer_M)

    def plain(self) -> NTv2:
        """The model with its tables added up."""
        head = self.model.head
        assert head is not None
        with torch.no_grad():
            self.model.embedding.weight.copy_(self.inputs())
            head.decoder.weight.copy_(self.outputs())
            head.decoder.bias.copy_(self.bias)
        return self.model


@dataclass(frozen=True)
class Batch:
    token_id_WT: Tensor
    masked_WT: Tensor
    answer_M: Tensor


def hide(kmer_id_WT: npt.NDArray[np.uint16], rng: np.random.Generator) -> Batch:
    """Hide the same number of k-mers in every window, all of them behind `<mask>`."""
    windows, kmers = kmer_id_WT.shape
    rank = np.argsort(np.argsort(rng.random((windows, kmers)), axis=1), axis=1)
    masked = np.zeros((windows, kmers + 1), dtype=np.bool_)
    masked[:, 1:] = rank < masked_groups(MASK_RATIO, kmers)
    token = np.full((windows, kmers + 1), CLS_TOKEN, dtype=np.int64)
    token[:, 1:] = TOKEN_OF_KMER[kmer_id_WT]
    answer = token[masked] - KMER_TOKENS.start
    token[masked] = MASK_TOKEN
    return Batch(torch.from_numpy(token), torch.from_numpy(masked), torch.from_numpy(answer))


def training_batch(sources: dict[str, Source], *, seed: int, step: int) -> Batch:
    rng = np.random.default_rng([seed, step])
    kmers = int(rng.choice(KMERS_PER_WINDOW))
    windows = TOKENS_PER_STEP // kmers
    of_source = rng.multinomial(windows, list(SHARE_OF_BATCH.values()))
    kmer_id = [
        sources[name].windows(rng, windows=int(count), kmers=kmers)
        for name, count in zip(SHARE_OF_BATCH, of_source, strict=True)
        if count
    ]
    return hide(np.concatenate(kmer_id), rng)


def train(
    genomes: Path,
    out: Path,
    *,
    config: NTv2Config,
    minutes: float,
    steps: int,
    lr: float,
    seed: int,
) -> None:
    """Train until `steps` or `minutes` are used up; the learning rate falls to zero by then."""
    begin = time.monotonic()
    sources = training_sources(genomes)
    frequency = sum(SHARE_OF_BATCH[name] * kmer_frequency(s) for name, s in sources.items())
    trainee = Trainee(torch.from_numpy(np.log(frequency)).float(), seed=seed, config=config)
    matrices = [p for n, p in trainee.model.blocks.named_parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trainee.parameters() if p.requires_grad and id(p) not in chosen]
    optimisers = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.98)),
    ]
    valid = {
        name: validation_batches(source, seed=seed)
        for name, source in quick_held_out(genomes).items()
    }
    print(f"data ready after {time.monotonic() - begin:.0f} s", flush=True)
    begin = time.monotonic()
    recent: list[float] = []
    step = 0
    while (progress := max(step / steps, (time.monotonic() - begin) / (60 * minutes))) < 1:
        rate = lr * min(1.0, (step + 1) / 100) * min(1.0, (1 - progress) / 0.6)
        for optimiser in optimisers:
            for group in optimiser.param_groups:
                group["lr"] = rate
        batch = training_batch(sources, seed=seed, step=step)
        loss = trainee(batch.token_id_WT, batch.masked_WT, batch.answer_M)
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(rest, 1.0)
        for optimiser in optimisers:
            optimiser.step()
        recent.append(loss.item())
        step += 1
        if step % 250 == 0:
            seconds = time.monotonic() - begin
            held_out = {name: cross_entropy(trainee, batches) for name, batches in valid.items()}
            print(
                json.dumps(
                    {
                        "step": step,
                        "minutes": round(seconds / 60, 2),
                        "tokens_per_second": round(step * TOKENS_PER_STEP / seconds),
                        "loss": round(float(np.mean(recent)), 4),
                        **{name: round(value, 4) for name, value in held_out.items()},
                    }
                ),
                flush=True,
            )
            recent.clear()
        if step % 500 == 0:
            ship(trainee, out)
    ship(trainee, out)
    print(f"{step} steps in {(time.monotonic() - begin) / 60:.1f} minutes", flush=True)


def ship(trainee: Trainee, out: Path) -> None:
    save_checkpoint(trainee.plain(), out, dtype=torch.float16, extra={"licence": "Apache-2.0"})


def quick_held_out(genomes: Path) -> dict[str, Source]:
    return {
        "ecoli_valid": Source("ecoli", ecoli_pieces(genomes / GENOMES["ecoli"])["valid"]),
        "worm_valid": Source("worm", split_worm(genomes / GENOMES["worm"])["valid"]),
        "chr21": Source("chr21", read_pieces(genomes / GENOMES["chr21"])),
    }


def validation_batches(source: Source, *, seed: int) -> list[Batch]:
    rng = np.random.default_rng([seed, 2**40])
    return [hide(source.windows(rng, windows=48, kmers=85), rng) for _ in range(4)]


def cross_entropy(trainee: Trainee, batches: Sequence[Batch]) -> float:
    with torch.inference_mode():
        return float(
            np.mean([trainee(b.token_id_WT, b.masked_WT, b.answer_M).item() for b in batches])
        )


# --- measuring -----------------------------------------------------------------------------------

WINDOWS_MEASURED = 2_000
KMERS_MEASURED = 85  # 510 bases, the demo's windows
FLANK = 5


class Markov:
    """An order-5 chain asked for a hidden k-mer between its true flanks, five bases each side.

    p(k-mer) is proportional to the chance that the chain runs from the left flank through the
    k-mer into the right flank: both contexts in one model, fitted on both strands.
    """

    def __init__(self, source: Source) -> None:
        count = kmer_frequency(source).reshape(4**FLANK, 4)
        step = np.log(count / count.sum(axis=1, keepdims=True)).astype(np.float32)
        every = np.arange(KMERS)
        self.into = np.zeros((4**FLANK, KMERS), dtype=np.float32)
        context = np.repeat(np.arange(4**FLANK)[:, None], KMERS, axis=1)
        for i in range(K):
            base = np.broadcast_to(every // 4 ** (K - 1 - i) % 4, context.shape)
            self.into += step[context, base]
            context = (context * 4 + base) % 4**FLANK
        self.out_of = np.zeros((4**FLANK, 4**FLANK), dtype=np.float32)
        context = np.repeat(np.arange(4**FLANK)[:, None], 4**FLANK, axis=1)
        for i in range(FLANK):
            base = np.broadcast_to(np.arange(4**FLANK) // 4 ** (FLANK - 1 - i) % 4, context.shape)
            self.out_of += step[context, base]
            context = (context * 4 + base) % 4**FLANK
        self.suffix = every % 4**FLANK

    def loss(
        self,
        kmer_id_M: npt.NDArray[np.int64],
        left_M: npt.NDArray[np.int64],
        right_M: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.float32]:
        """Negative log probability of each k-mer between the k-mers left and right of it."""
        losses = []
        for some in np.array_split(np.arange(len(kmer_id_M)), -(-len(kmer_id_M) // 512)):
            right = right_M[some] // 4
            score = self.into[left_M[some] % 4**FLANK] + self.out_of[self.suffix][:, right].T
            top = score.max(axis=1, keepdims=True)
            total = top[:, 0] + np.log(np.exp(score - top).sum(axis=1))
            losses.append(total - score[np.arange(len(some)), kmer_id_M[some]])
        return np.concatenate(losses)


def held_out(genomes: Path) -> dict[str, Source]:
    """DNA that training never saw."""
    return quick_held_out(genomes) | {
        "yeast": Source("yeast", read_pieces(genomes / GENOMES["yeast"]))
    }


def teacher_losses(model: NTv2, batch: Batch) -> npt.NDArray[np.float32]:
    losses = []
    with torch.inference_mode():
        for token_id_WT, masked_WT in zip(
            batch.token_id_WT.split(50), batch.masked_WT.split(50), strict=True
        ):
            losses.append(model.logits(model(token_id_WT)[masked_WT]))
        return F.cross_entropy(
            torch.cat(losses), batch.answer_M + KMER_TOKENS.start, reduction="none"
        ).numpy()


def measure_masked(model: NTv2, genomes: Path, *, seed: int) -> list[dict[str, float | str]]:
    """Masked cross-entropy in nats on each held-out source, beside what simple models get.

    A simple model is fitted on each training source, and the best of the three is shown. The
    Markov model is always given the true flanks, also where the teacher has a neighbour hidden or
    its window ends.
    """
    fitted = training_sources(genomes)
    frequencies = [-np.log(kmer_frequency(source)) for source in fitted.values()]
    chains = [Markov(source) for source in fitted.values()]
    rows: list[dict[str, float | str]] = []
    for name, source in held_out(genomes).items():
        rng = np.random.default_rng([seed, 2**41])
        # One k-mer more on either side than the teacher sees, for the flanks.
        wide_WT = source.windows(rng, windows=WINDOWS_MEASURED, kmers=KMERS_MEASURED + 2)
        kmer_id_WT = wide_WT[:, 1:-1]
        batch = hide(kmer_id_WT, rng)
        hidden_WT = batch.masked_WT[:, 1:].numpy()
        answer, left, right = (
            wide_WT[:, at : at + KMERS_MEASURED][hidden_WT].astype(np.int64) for at in (1, 0, 2)
        )
        seen_WT = np.pad(~hidden_WT, ((0, 0), (1, 1)))
        both = (seen_WT[:, :-2] & seen_WT[:, 2:])[hidden_WT]
        teacher = teacher_losses(model, batch)
        frequency = min((table[answer] for table in frequencies), key=np.mean)
        chain = min((chain.loss(answer, left, right) for chain in chains), key=np.mean)
        gain = frequency - teacher
        rows.append(
            {
                "held out": name,
                "hidden k-mers": len(answer),
                "k-mer frequency": float(frequency.mean()),
                "order-5 Markov, true flanks": float(chain.mean()),
                "teacher": float(teacher.mean()),
                "teacher under frequency": float(gain.mean()),
                "+/-": float(gain.std() / math.sqrt(len(gain))),
                "both neighbours visible: Markov": float(chain[both].mean()),
                "both neighbours visible: teacher": float(teacher[both].mean()),
            }
        )
    return rows


KMERS_PROBED = 30
WINDOWS_PROBED = 4_000


@dataclass(frozen=True)
class Probe:
    """Windows of two classes; train and test windows lie in different stretches of DNA."""

    name: str
    kmer_id_WT: npt.NDArray[np.uint16]
    label_W: npt.NDArray[np.int64]
    is_test_W: npt.NDArray[np.bool_]


def human_or_worm(genomes: Path, *, seed: int) -> Probe:
    """Human chr21 against the held-out tenth of worm chrX; first halves train, second ones test."""
    rng = np.random.default_rng([seed, 2**42])
    parts = []
    for piece in (
        read_pieces(genomes / GENOMES["chr21"])[0],
        split_worm(genomes / GENOMES["worm"])["valid"][0],
    ):
        for half in np.array_split(piece, 2):
            source = Source("half", (half,))
            parts.append(source.windows(rng, windows=WINDOWS_PROBED // 4, kmers=KMERS_PROBED))
    each = np.repeat(np.arange(4), WINDOWS_PROBED // 4)
    return Probe("human or worm", np.concatenate(parts), each // 2, each % 2 == 1)


def repeat_or_not(genomes: Path, *, seed: int) -> Probe:
    """Windows of chr21 that are soft-masked (repeats) by at least 90 % or by at most 10 %."""
    (contig,) = read_contigs(genomes / GENOMES["chr21"])
    rng = np.random.default_rng([seed, 2**43])
    bases = KMERS_PROBED * K
    start = np.sort(rng.choice(len(contig.base) - bases, size=60_000, replace=False))
    masked = np.concatenate([[0], np.cumsum(contig.soft_masked)])
    share = (masked[start + bases] - masked[start]) / bases
    base_WS = np.lib.stride_tricks.sliding_window_view(contig.base, bases)
    pure = (base_WS[start] < 4).all(axis=1)
    is_test = start > np.median(start[pure])
    chosen = [
        rng.choice(np.flatnonzero(pure & kind & part), size=WINDOWS_PROBED // 4, replace=False)
        for kind in (share <= 0.1, share >= 0.9)
        for part in (~is_test, is_test)
    ]
    each = np.repeat(np.arange(4), WINDOWS_PROBED // 4)
    kmer_id_WT = encode_kmers(base_WS[start[np.concatenate(chosen)]])
    return Probe("repeat or not", kmer_id_WT, each // 2, each % 2 == 1)


def pooled(model: NTv2, kmer_id_WT: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """Features of the final norm, averaged over a window's k-mers (nothing hidden)."""
    token = torch.from_numpy(TOKEN_OF_KMER[kmer_id_WT])
    cls = token.new_full((len(token), 1), CLS_TOKEN)
    with torch.inference_mode():
        found = [model(some)[:, 1:].mean(dim=1) for some in torch.cat((cls, token), 1).split(100)]
    return torch.cat(found).double().numpy()


def counted(kmer_id_WT: npt.NDArray[np.uint16]) -> npt.NDArray[np.float64]:
    """How often each 3-, 4- and 5-mer stands in a window, at any base, (W, 1344)."""
    base_WS = decode_kmers(kmer_id_WT).astype(np.int64)
    tables = []
    for width in (3, 4, 5):
        word = sum(
            base_WS[:, i : base_WS.shape[1] - width + 1 + i] * 4 ** (width - 1 - i)
            for i in range(width)
        )
        table = np.zeros((len(base_WS), 4**width))
        np.add.at(table, (np.arange(len(base_WS))[:, None], word), 1)
        tables.append(table)
    return np.concatenate(tables, axis=1)


def linear_accuracy(feature_WD: npt.NDArray[np.float64], probe: Probe) -> float:
    """Test accuracy of a logistic regression; its penalty is chosen within the training windows."""
    train = ~probe.is_test_W
    spread = feature_WD[train].std(axis=0)
    scaled = (feature_WD - feature_WD[train].mean(axis=0)) / np.where(spread > 0, spread, 1)
    x, y = torch.from_numpy(scaled), torch.from_numpy(probe.label_W).double()
    tuning = np.flatnonzero(train)
    fit, check = tuning[np.arange(len(tuning)) % 4 > 0], tuning[::4]
    penalties = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
    accuracy = [_accuracy(_logistic(x[fit], y[fit], p), x[check], y[check]) for p in penalties]
    weight = _logistic(x[train], y[train], penalties[int(np.argmax(accuracy))])
    return _accuracy(weight, x[probe.is_test_W], y[probe.is_test_W])


def _logistic(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    weight = torch.zeros(x.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        score = x @ weight[:-1] + weight[-1]
        loss = F.binary_cross_entropy_with_logits(score, y) + penalty * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return weight.detach()


def _accuracy(weight: Tensor, x: Tensor, y: Tensor) -> float:
    return float(((x @ weight[:-1] + weight[-1] > 0) == (y > 0.5)).double().mean())


def measure_probes(model: NTv2, genomes: Path, *, seed: int) -> list[dict[str, float | str]]:
    """Test accuracy of linear probes of the teacher, of the same shape untrained, of counts."""
    untrained = random_model(model.config, seed=seed)
    return [
        {
            "probe": probe.name,
            "test windows": int(probe.is_test_W.sum()),
            "teacher": linear_accuracy(pooled(model, probe.kmer_id_WT), probe),
            "random weights": linear_accuracy(pooled(untrained, probe.kmer_id_WT), probe),
            "3- to 5-mer counts": linear_accuracy(counted(probe.kmer_id_WT), probe),
        }
        for probe in (human_or_worm(genomes, seed=seed), repeat_or_not(genomes, seed=seed))
    ]


def show(rows: list[dict[str, float | str]]) -> None:
    """A Markdown table, as the card has it."""
    print("| " + " | ".join(rows[0]) + " |")
    print("|---" * len(rows[0]) + "|")
    for row in rows:
        cells = [f"{v:.3f}" if isinstance(v, float) else f"{v}" for v in row.values()]
        print("| " + " | ".join(cells) + " |", flush=True)


def evaluate(genomes: Path, folder: Path, *, seed: int) -> None:
    model = load_checkpoint(folder, head="language")
    show(measure_masked(model, genomes, seed=seed))
    print()
    show(measure_probes(model, genomes, seed=seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--genomes", type=Path, required=True, help="folder of the 2bit files")
    parser.add_argument("--out", type=Path, required=True, help="the teacher's folder")
    parser.add_argument("--evaluate", action="store_true", help="measure --out; train nothing")
    parser.add_argument("--minutes", type=float, default=45, help="of training at most")
    parser.add_argument("--steps", type=int, default=100_000, help="at most")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--channels", type=int, default=CONFIG.hidden_size, help="a wider teacher, for measurements"
    )
    parser.add_argument("--layers", type=int, default=CONFIG.num_hidden_layers, help="at least 3")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    if asked.evaluate:
        evaluate(asked.genomes, asked.out, seed=asked.seed)
    else:
        train(
            asked.genomes,
            asked.out,
            config=dataclasses.replace(
                CONFIG,
                hidden_size=asked.channels,
                intermediate_size=2 * asked.channels,
                num_attention_heads=asked.channels // CONFIG.head_dim,
                num_hidden_layers=asked.layers,
            ),
            minutes=asked.minutes,
            steps=asked.steps,
            lr=asked.lr,
            seed=asked.seed,
        )


if __name__ == "__main__":
    main()
