"""What a student's features look like beside its teacher's, on held-out windows of its caches.

A group is one 6-mer in its window: the teacher's embedding of it, and the mean of the student's six
features. It measures; what is shown of it is had_pipe.portrait's.

B windows of a batch, T k-mers of a window, G of them looked at, P groups, K k-mers, D channels of
either space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from had_pipe.cache import Cache, Part
from had_pipe.dna import kmers as dna
from had_pipe.dna.annotation import Annotation
from had_pipe.errors import CacheMismatch, InputError
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.run import STUDENT, RunRecord
from had_pipe.spaces import Floats, Ints, Space, correlation, distances, turned
from had_pipe.stream import Batch, first_windows
from had_pipe.students import HADModel, load_student, spell

_BASES = 1 << 17
"""Bases of windows that are looked at, at most; some seconds of a CPU."""
_BATCH_BASES = 1 << 14
_GROUPS = 1 << 14
"""Groups that figures are of, at most."""
_DRAWN = 1200
_KMERS = 1024
"""6-mers that distances are taken between, at most: the commonest."""
_LEAST = 4
"""How often a 6-mer must have been seen, to have a mean worth looking at."""
_SHIFTS = 5
"""Ways round the genome that levels are shifted, evenly."""
_KINDS = 7
"""Kinds of an annotation that have a colour of their own."""

_BASE_K6 = dna.decode_kmers(np.arange(dna.KMERS, dtype=np.uint16)[:, None])
_GC_K = ((_BASE_K6 == 1) | (_BASE_K6 == 2)).sum(axis=1)


@dataclass(frozen=True)
class Likeness:
    """One figure of both."""

    teacher: float
    student: float


@dataclass(frozen=True)
class Explained:
    """Share of the variance that lies between the means of levels."""

    share: Likeness
    shifted: Likeness
    """The same, once levels are shifted along the genome: what neighbours alone explain."""


@dataclass(frozen=True, kw_only=True)
class KmerStructure:
    """Mean features of 6-mers: what is known of each without its context."""

    gc_K: Ints
    teacher_K2: Floats
    student_K2: Floats
    share: Likeness
    """Of the variance in these planes."""
    agreement: float
    least: int
    """How often each was seen, at least."""
    correlation: float
    """Of the distances between 6-mers in both spaces."""
    correlation_of_bases: float
    """The same of the teacher's and the number of bases in which two 6-mers differ."""


@dataclass(frozen=True, kw_only=True)
class Features:
    """Groups of held-out windows in two spaces, each channel with mean 0 and variance 1."""

    caches: tuple[str, ...]
    """Ids of what was read."""
    windows: int
    groups: int
    kind: str
    """Of groups: "visible" or "masked"."""
    teacher_P2: Floats
    """Principal components of some groups; 1 is the standard deviation of a group in all."""
    student_P2: Floats
    """The same, turned to lie like the teacher's."""
    share: Likeness
    """Of the variance in these planes."""
    agreement: float
    """Of the planes: the correlation of points, once turned. 1: the same picture."""
    gc_P: Ints
    """How many G and C a 6-mer has."""
    gc: Explained
    soft_level_P: Ints
    """How much of the group's window is soft-masked: 0 for nothing, 1 to 4 for quarters begun."""
    soft: Explained
    features: tuple[str, ...]
    """Kinds of the annotation, the commonest first; then what is another, and what is none."""
    feature_P: Ints | None
    """Which of these; None without an annotation."""
    feature: Explained | None
    kmers: KmerStructure | None
    """None where too few 6-mers were seen often enough."""


def measure_features(
    record: RunRecord,
    caches: Sequence[Cache],
    *,
    annotation: Annotation | None = None,
    report: Reporter = silent,
) -> Features | None:
    """Look at a run's published student on windows its caches hold out.

    None where there is no student yet, or nothing was held out. Raises CacheMismatch where a cache
    is not one of the run's, InputError where an annotation knows none of the contigs.
    """
    split = record.asked("train", "validation_split")
    trained_on = [cache["id"] for cache in record.run["caches"]]
    for cache in caches:
        if cache.id not in trained_on:
            raise CacheMismatch(
                f"{cache.path}: has id {cache.id[:12]}, but this student was trained on "
                f"{', '.join(known[:12] for known in trained_on)}: give that cache"
            )
    held_out = [c for c in caches if split in c.plan.splits and c.plan.splits[split].windows]
    if not held_out or not (record.folder / STUDENT).is_dir():
        return None
    student = load_student(record.folder / STUDENT)
    plan = held_out[0].plan.windows
    dropped = record.asked("objective", "mask_tokens") == "dropped"
    kind = "masked" if plan.store == "masked" else "visible"
    if kind == "masked" and dropped:
        return None  # what is left out has no features
    total = sum(cache.plan.splits[split].windows for cache in held_out)
    windows = min(total, max(1, _BASES // plan.bases))
    batches = first_windows(
        held_out, split=split, windows=windows, batch=max(1, _BATCH_BASES // plan.bases)
    )
    groups = plan.masked if kind == "masked" else plan.kmers - plan.masked
    kept = _Kept(share=min(1.0, _GROUPS / (windows * groups)))
    begun, done = perf_counter(), 0
    for batch in batches:
        looked_at_BT = batch.mask if kind == "masked" else ~batch.mask
        place_BG = looked_at_BT.nonzero()[:, 1].view(len(looked_at_BT), groups)
        kept.add(
            teacher_PD=_teacher(batch, place_BG).flatten(0, 1).numpy(),
            student_PD=_student(student, batch, place_BG, dropped=dropped).flatten(0, 1).numpy(),
            kmer_id_P=batch.kmer_id.gather(1, place_BG).flatten().numpy(),
            where=_where(held_out, split, batch, place_BG.numpy()),
        )
        done += len(batch.kmer_id)
        report(
            Progress(
                what="looking at features",
                done=done,
                total=windows,
                unit="windows",
                seconds=perf_counter() - begun,
            )
        )
    return kept.compared(held_out, windows=windows, kind=kind, annotation=annotation)


# What is looked at


def _teacher(batch: Batch, place_BG: Tensor) -> Tensor:
    """The teacher's embeddings of groups."""
    if batch.target.shape[1] == place_BG.shape[1]:
        return batch.target
    return batch.target.take_along_dim(place_BG[..., None], dim=1)


@torch.inference_mode()
def _student(student: HADModel, batch: Batch, place_BG: Tensor, *, dropped: bool) -> Tensor:
    """The student's features of groups; the masked ones are hidden whole, as from the teacher."""
    kmer_id_BT, mask_BT = batch.kmer_id, batch.mask
    if dropped:  # it reads visible groups alone, one after the other
        kmer_id_BT = kmer_id_BT.gather(1, place_BG)
        mask_BT = torch.zeros_like(kmer_id_BT, dtype=torch.bool)
    feat_BSE = student(spell(kmer_id_BT, mask_BT)).last_hidden_state
    feat_BTE: Tensor = feat_BSE.unflatten(1, (-1, dna.K)).mean(dim=2)
    return feat_BTE if dropped else feat_BTE.take_along_dim(place_BG[..., None], dim=1)


@dataclass(frozen=True)
class _Where:
    """Where groups lie."""

    soft_P: Floats
    contig_P: npt.NDArray[np.str_]
    """Genome and contig, with a tab between."""
    base_P: Ints
    """The middle of each, on the contig."""

    @staticmethod
    def joined(all_: Sequence[_Where]) -> _Where:
        return _Where(
            np.concatenate([one.soft_P for one in all_]),
            np.concatenate([one.contig_P for one in all_]),
            np.concatenate([one.base_P for one in all_]),
        )

    def some(self, chosen_P: Ints) -> _Where:
        return _Where(self.soft_P[chosen_P], self.contig_P[chosen_P], self.base_P[chosen_P])


def _where(caches: Sequence[Cache], split: str, batch: Batch, place_BG: Ints) -> _Where:
    found, first = [], 0
    for span in batch.spans:
        cache, row_B = caches[span.cache], span.row
        plan, place_bG = cache.plan, place_BG[first : first + len(row_B)]
        first += len(row_B)
        number_B = row_B // plan.part
        reversed_B = np.empty(len(row_B), dtype=bool)
        for number in np.unique(number_B):
            here = number_B == number
            _, _, reversed_of_part = cache.seen(Part(split, span.view, int(number)))
            reversed_B[here] = reversed_of_part[row_B[here] - int(number) * plan.part]
        # What the teacher saw on the other strand lies the other way round on the genome.
        turned_bG = plan.windows.kmers - 1 - place_bG
        place_bG = np.where(reversed_B[:, None], turned_bG, place_bG)
        loci, groups = cache.loci(split, row_B.tolist()), place_bG.shape[1]
        start_B = np.array([locus.start for locus in loci], dtype=np.int64)
        soft_B = np.array([locus.soft_masked_bases for locus in loci]) / plan.windows.bases
        contig_B = np.array([f"{locus.genome}\t{locus.contig}" for locus in loci])
        found.append(
            _Where(
                np.clip(soft_B, 0.0, 1.0).repeat(groups),
                contig_B.repeat(groups),
                (start_B[:, None] + dna.K * place_bG + dna.K // 2).ravel(),
            )
        )
    return _Where.joined(found)


class _Kept:
    """A random share of all groups, and the sums of all by 6-mer."""

    def __init__(self, *, share: float) -> None:
        self._share = share
        self._draw = np.random.default_rng(0)
        self._groups: list[tuple[Floats, Floats, Ints, _Where]] = []
        self._count_K = np.zeros(dna.KMERS, dtype=np.int64)
        self._teacher_KD = self._student_KD = np.zeros((dna.KMERS, 0))

    def add(
        self, *, teacher_PD: Floats, student_PD: Floats, kmer_id_P: Ints, where: _Where
    ) -> None:
        if not self._groups:
            self._teacher_KD = np.zeros((dna.KMERS, teacher_PD.shape[1]))
            self._student_KD = np.zeros((dna.KMERS, student_PD.shape[1]))
        np.add.at(self._teacher_KD, kmer_id_P, teacher_PD)
        np.add.at(self._student_KD, kmer_id_P, student_PD)
        self._count_K += np.bincount(kmer_id_P, minlength=dna.KMERS)
        many = round(self._share * len(kmer_id_P))
        chosen_P = self._draw.permutation(len(kmer_id_P))[:many]
        self._groups.append(
            (teacher_PD[chosen_P], student_PD[chosen_P], kmer_id_P[chosen_P], where.some(chosen_P))
        )

    def compared(
        self,
        caches: Sequence[Cache],
        *,
        windows: int,
        kind: str,
        annotation: Annotation | None,
    ) -> Features:
        teachers, students, ids, wheres = zip(*self._groups, strict=True)
        teacher_PD, student_PD = np.concatenate(teachers), np.concatenate(students)
        gc_P, where = _GC_K[np.concatenate(ids)], _Where.joined(wheres)
        soft_level_P = np.ceil(where.soft_P * 4).astype(np.int64)
        teacher = Space(teacher_PD)
        student = Space(student_PD)

        along_P = np.lexsort((where.base_P, where.contig_P))

        def explained(level_P: Ints) -> Explained:
            shifts = []
            for turn in range(1, _SHIFTS + 1):
                moved_P = np.empty_like(level_P)
                shift = turn * len(level_P) // (_SHIFTS + 1)
                moved_P[along_P] = np.roll(level_P[along_P], shift)
                shifts.append((teacher.explained(moved_P), student.explained(moved_P)))
            of_teacher, of_student = zip(*shifts, strict=True)
            return Explained(
                Likeness(teacher.explained(level_P), student.explained(level_P)),
                Likeness(fmean(of_teacher), fmean(of_student)),
            )

        names: tuple[str, ...] = ()
        feature_P = None
        if annotation is not None:
            names, feature_P = _annotated(annotation, where)
        teacher_P2, student_P2 = teacher.plane(teacher_PD), student.plane(student_PD)
        turn_22, agreement = turned(student_P2, teacher_P2)
        return Features(
            caches=tuple(cache.id for cache in caches),
            windows=windows,
            groups=len(gc_P),
            kind=kind,
            teacher_P2=teacher_P2[:_DRAWN],
            student_P2=(student_P2 @ turn_22)[:_DRAWN],
            share=Likeness(teacher.share, student.share),
            agreement=agreement,
            gc_P=gc_P[:_DRAWN],
            gc=explained(gc_P),
            soft_level_P=soft_level_P[:_DRAWN],
            soft=explained(soft_level_P),
            features=names,
            feature_P=None if feature_P is None else feature_P[:_DRAWN],
            feature=None if feature_P is None else explained(feature_P),
            kmers=self._kmers(teacher, student),
        )

    def _kmers(self, teacher: Space, student: Space) -> KmerStructure | None:
        """Of the 6-mers seen often enough, the commonest."""
        order_K = np.argsort(-self._count_K, kind="stable")[:_KMERS]
        chosen_K = order_K[self._count_K[order_K] >= _LEAST]
        if len(chosen_K) < 3:
            return None
        count_K1 = self._count_K[chosen_K, None]
        teacher_KD = teacher.standard(self._teacher_KD[chosen_K] / count_K1)
        student_KD = student.standard(self._student_KD[chosen_K] / count_K1)
        base_K6 = _BASE_K6[chosen_K]
        # Of letters written as four 0s and 1s, the squared distance is twice the bases that differ.
        letters_KF = np.eye(4)[base_K6].reshape(len(chosen_K), -1)
        apart = distances(teacher_KD)
        teacher_space, student_space = Space(teacher_KD), Space(student_KD)
        teacher_K2 = teacher_space.plane(teacher_KD)
        student_K2 = student_space.plane(student_KD)
        turn_22, agreement = turned(student_K2, teacher_K2)
        return KmerStructure(
            gc_K=_GC_K[chosen_K],
            teacher_K2=teacher_K2,
            student_K2=student_K2 @ turn_22,
            share=Likeness(teacher_space.share, student_space.share),
            agreement=agreement,
            least=int(self._count_K[chosen_K].min()),
            correlation=correlation(apart, distances(student_KD)),
            correlation_of_bases=correlation(apart, distances(letters_KF) ** 2),
        )


def _annotated(annotation: Annotation, where: _Where) -> tuple[tuple[str, ...], Ints]:
    """Names of kinds, and which of them each group has; the last two are another kind, and none."""
    known = np.unique(where.contig_P).tolist()
    contigs = [name.split("\t")[1] for name in known]
    shared = set(contigs) & set(annotation.contigs)
    if not shared:
        raise InputError(
            f"{annotation.path}: has nothing on the contigs of these windows "
            f"({', '.join(contigs[:5])}); it names {', '.join(annotation.contigs[:5])}: give one "
            "that names contigs as the genome does"
        )
    twice = sorted(contig for contig in shared if contigs.count(contig) > 1)
    if twice:
        raise InputError(
            f"{annotation.path}: contig {twice[0]} is of several genomes here, and an annotation "
            "does not say of which: give --cache of one genome"
        )
    kind_P = np.full(len(where.base_P), -1, dtype=np.int64)
    for name, contig in zip(known, contigs, strict=True):
        here = where.contig_P == name
        kind_P[here] = annotation.at(contig, where.base_P[here])
    count = np.bincount(kind_P[kind_P >= 0], minlength=len(annotation.kinds))
    commonest = [int(kind) for kind in np.argsort(-count, kind="stable")[:_KINDS] if count[kind]]
    feature_P = np.full(len(kind_P), len(commonest), dtype=np.int64)
    for place, kind in enumerate(commonest):
        feature_P[kind_P == kind] = place
    feature_P[kind_P < 0] = len(commonest) + 1
    names = [annotation.kinds[kind] or "(no name)" for kind in commonest]
    return (*names, "another", "none"), feature_P
