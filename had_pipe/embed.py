"""A student used: the sequences of a file to embeddings, whatever their length and number.

A sequence no longer than a window is read whole. A longer one is read in windows that overlap, and
each base keeps the feature of the window in which it has more of its surroundings: in the middle
of an overlap one window hands over to the next. Order and numbers of sequences are those of the
file. One sequence is in memory at a time, and its features never are.

B windows of a forward pass, S bases, N rows, E channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from had_pipe.dna.kmers import K
from had_pipe.dna.reference import OTHER, read_contigs
from had_pipe.errors import InputError, NonFiniteError, RecipeError
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.students import HADModel, load_student
from had_pipe.students.saving import WEIGHTS
from had_pipe.students.tokenizer import FIRST_BASE, MASK, PAD
from had_pipe.vectors import Named, Per, Rows, Size, check_name, note_of, writing

FORMAT = "had-embeddings/1"
BATCH_BASES = {"cpu": 1 << 15, "cuda": 1 << 19}
"""Bases of one forward pass, padding counted."""

# What is no A, C, G or T is to the student a base that it is not told. The tokenizer's own N has a
# feature that no training has touched.
_TOKEN = np.array([*range(FIRST_BASE, FIRST_BASE + OTHER), MASK], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class EmbedSummary:
    """What was written."""

    out: Path
    sequences: int
    bases: int
    rows: int
    channels: int
    window: int
    overlap: int
    seconds: float
    already_done: bool


@dataclass(frozen=True)
class _Window:
    """Bases start to end of a sequence, of which those from `keep` to `until` keep its features."""

    sequence: Named
    base_S: npt.NDArray[np.uint8]
    start: int
    end: int
    keep: int
    until: int


def embed(
    fasta: Path,
    *,
    student: Path,
    out: Path,
    per: Per = "sequence",
    window: int | None = None,
    overlap: int | None = None,
    device: str = "auto",
    report: Reporter = silent,
) -> EmbedSummary:
    """Write the embeddings of a file's sequences (FASTA or 2bit) to `out`, .parquet or .zarr.

    A row is of a base, of a k-mer (the mean of six bases, from the first one on; fewer at the end
    have no row), or of a sequence (the mean of its bases, those that are no A, C, G or T left out
    where there are others). `window` is the student's own unless given, `overlap` a quarter of it.

    Raises RecipeError where `out` is there and was made from something else.
    """
    check_name(out)
    model = load_student(student)
    window = model.config.window_bases if window is None else window
    overlap = window // 4 if overlap is None else overlap
    if not 0 <= overlap < window:
        raise RecipeError(
            f"--window {window} --overlap {overlap}: expected a window of at least 1 base, and an "
            "overlap from 0 to less than the window"
        )
    torch_device = _device(device)
    read_contigs(fasta)  # says what is wrong with a file that is none
    before = fasta.stat()
    identity = {
        "format": FORMAT,
        "per": per,
        "window": window,
        "overlap": overlap,
        "student_sha256": _sha256(student / WEIGHTS),
        "sequences_sha256": _sha256(fasta),
    }
    there = out.exists()
    if there:
        _require_same(out, identity)
    size, bases = _survey(fasta, per=per, channels=model.config.hidden_size, report=report)
    begun = perf_counter()
    if not there:
        note = {**identity, "teacher": model.config.teacher, "licence": model.config.licence}
        torch.nn.Module.to(model, torch_device)
        with writing(out, per=per, size=size, note=note) as rows:
            windows = _windows(fasta, window=window, overlap=overlap, bases=bases)
            pooled = _Pooled(rows, per)
            done = 0
            for batch in _batches(windows, BATCH_BASES[torch_device.type]):
                for of, feat_SE in zip(batch, _features(model, batch), strict=True):
                    pooled.add(of, feat_SE)
                    done += len(feat_SE)
                report(
                    Progress(
                        what="embedding",
                        done=done,
                        total=bases,
                        unit="bases",
                        seconds=perf_counter() - begun,
                    )
                )
            after = fasta.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise _changed(fasta)
    return EmbedSummary(
        out=out,
        sequences=size.sequences,
        bases=bases,
        rows=size.rows,
        channels=size.channels,
        window=window,
        overlap=overlap,
        seconds=perf_counter() - begun,
        already_done=there,
    )


def _require_same(out: Path, identity: dict[str, Any]) -> None:
    """That what lies there is what would be made."""
    note = note_of(out)
    if not isinstance(note, dict) or note.get("format") != FORMAT:
        raise RecipeError(f"--out {out}: is there, and is no embeddings of ours; use another name")
    other = [
        f"{key} is {note.get(key)!r} there, {value!r} here"
        for key, value in identity.items()
        if note.get(key) != value
    ]
    if other:
        raise RecipeError(
            f"--out {out}: is there, made from something else: {'; '.join(other)}. Remove it, or "
            "use another name"
        )


def _changed(fasta: Path) -> InputError:
    return InputError(
        f"{fasta}: changed while it was read: wait until it has been written, then run again"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _survey(fasta: Path, *, per: Per, channels: int, report: Reporter) -> tuple[Size, int]:
    """How much there is, every letter of the file checked before the first is embedded."""
    sequences = bases = kmers = 0
    begun = told = perf_counter()
    for contig in read_contigs(fasta):
        sequences += 1
        bases += len(contig.base)
        kmers += len(contig.base) // K
        if perf_counter() - told > 0.5:  # there may be a million of them
            told = perf_counter()
            report(
                Progress(what="reading", done=bases, total=0, unit="bases", seconds=told - begun)
            )
    rows = {"sequence": sequences, "kmer": kmers, "base": bases}[per]
    return Size(sequences=sequences, rows=rows, channels=channels), bases


def spans(length: int, *, window: int, overlap: int) -> Iterator[tuple[int, int, int, int]]:
    """Windows over a sequence: start, end, and from where until where a window's features are kept.

    All have the same length if the sequence has it; the last one ends where the sequence does.
    """
    margin = overlap // 2
    kept = 0
    for start in range(0, length - window, window - overlap):
        yield start, start + window, kept, start + window - margin
        kept = start + window - margin
    yield max(0, length - window), length, kept, length


def _windows(fasta: Path, *, window: int, overlap: int, bases: int) -> Iterator[_Window]:
    left = bases
    for contig in read_contigs(fasta):
        left -= len(contig.base)
        if left < 0:  # room was made for what there was
            raise _changed(fasta)
        sequence = Named(
            name=contig.name,
            bases=len(contig.base),
            unknown=int(np.count_nonzero(contig.base == OTHER)),
        )
        for start, end, keep, until in spans(len(contig.base), window=window, overlap=overlap):
            base_S = contig.base[start:end].copy()  # a view would keep the whole sequence
            yield _Window(sequence, base_S, start, end, keep, until)
        del contig  # one at a time: the next one is read now


def _batches(windows: Iterable[_Window], bases: int) -> Iterator[list[_Window]]:
    """Windows in order, as many as make so many bases with padding; one at least."""
    batch: list[_Window] = []
    longest = 0
    for window in windows:
        longest = max(longest, len(window.base_S))
        if batch and (len(batch) + 1) * longest > bases:
            yield batch
            batch, longest = [], len(window.base_S)
        batch.append(window)
    if batch:
        yield batch


@torch.inference_mode()
def _features(model: HADModel, batch: list[_Window]) -> Iterator[npt.NDArray[np.float32]]:
    """The features that are kept of each window."""
    lengths = [len(of.base_S) for of in batch]
    ids_BS = np.full((len(batch), max(lengths)), PAD, dtype=np.int64)
    for row_S, of in zip(ids_BS, batch, strict=True):
        row_S[: len(of.base_S)] = _TOKEN[of.base_S]
    ids = torch.from_numpy(ids_BS).to(model.device)
    seen = None if min(lengths) == max(lengths) else ids != PAD
    feat_BSE = model(ids, seen).last_hidden_state.cpu().numpy()
    for feat_SE, of in zip(feat_BSE, batch, strict=True):
        kept_SE = feat_SE[of.keep - of.start : of.until - of.start]
        if not np.isfinite(kept_SE).all():
            raise NonFiniteError(
                f"{of.sequence.name}: bases {of.start:,} to {of.end:,} have features that are not "
                "finite: are the student's weights whole?"
            )
        yield kept_SE


class _Pooled:
    """Features of bases, in order, to rows."""

    def __init__(self, rows: Rows, per: Per) -> None:
        self._rows, self._per = rows, per
        self._sequence: Named | None = None
        self._sum_E: npt.NDArray[np.float64]
        self._left_NE: npt.NDArray[np.float32]

    def add(self, of: _Window, feat_SE: npt.NDArray[np.float32]) -> None:
        if of.sequence is not self._sequence:
            self._sequence = of.sequence
            self._rows.begin(of.sequence)
            self._sum_E = np.zeros(feat_SE.shape[1])
            self._left_NE = feat_SE[:0]
        match self._per:
            case "base":
                self._rows.add(np.arange(of.keep, of.until, dtype=np.int64), feat_SE)
            case "kmer":
                self._add_kmers(of, feat_SE)
            case "sequence":
                self._add_to_mean(of, feat_SE)

    def _add_kmers(self, of: _Window, feat_SE: npt.NDArray[np.float32]) -> None:
        first = of.keep - len(self._left_NE)
        feat_SE = np.concatenate([self._left_NE, feat_SE])
        whole = len(feat_SE) // K * K
        self._left_NE = feat_SE[whole:]
        start_N = np.arange(first, first + whole, K, dtype=np.int64)
        self._rows.add(start_N, feat_SE[:whole].reshape(-1, K, feat_SE.shape[1]).mean(axis=1))

    def _add_to_mean(self, of: _Window, feat_SE: npt.NDArray[np.float32]) -> None:
        sequence = of.sequence
        known = sequence.bases - sequence.unknown
        if known:
            base_S = of.base_S[of.keep - of.start : of.until - of.start]
            feat_SE = feat_SE[base_S != OTHER]
        self._sum_E += feat_SE.sum(axis=0, dtype=np.float64)
        if of.until == sequence.bases:
            mean_E = self._sum_E / (known or sequence.bases)
            self._rows.add(np.zeros(1, np.int64), mean_E[None].astype(np.float32))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            f"--device cuda: torch {torch.__version__} sees no CUDA device here; use --device cpu"
        )
    return torch.device(name)
