"""What stage one is asked to make: a recipe and a teacher, as the plan says it.

It decides what two calls must have in common to work on one cache. Nothing here makes anything.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from had_pipe import corpus
from had_pipe.cache import Cache, Plan, Statistics, integrity, layout, writer
from had_pipe.dna.kmers import K
from had_pipe.errors import (
    CacheCorrupt,
    CacheMismatch,
    InputError,
    NonFiniteError,
    RecipeError,
)
from had_pipe.progress import Progress, Reporter
from had_pipe.recipe import Cache as CacheRecipe
from had_pipe.recipe import Genome, Recipe, Windows
from had_pipe.recipe import Teacher as TeacherRecipe
from had_pipe.teachers.knowledge import MARGIN, Knowledge, knowledge
from had_pipe.teachers.teacher import LanguageModel, Teacher, load_teacher


@dataclass(frozen=True)
class Job:
    """The tables of a recipe that stage one needs, all there."""

    teacher: TeacherRecipe
    genomes: Sequence[Genome]
    windows: Windows
    cache: CacheRecipe
    path: Path
    """Where the cache is made."""

    @staticmethod
    def of(recipe: Recipe) -> Job:
        needed = {"teacher": recipe.teacher, "genome": recipe.genome, "windows": recipe.windows}
        for table, value in needed.items():
            if not value:
                name = f"[[{table}]]" if table == "genome" else f"[{table}]"
                raise RecipeError(
                    f"the recipe has no {name} table, which stage one needs; a recipe without it "
                    "can only distil from a finished cache"
                )
        assert recipe.teacher is not None
        assert recipe.windows is not None
        return Job(recipe.teacher, recipe.genome, recipe.windows, recipe.cache, recipe.cache.folder)

    def load(self, device: str, offline: bool) -> Teacher:
        return load_teacher(
            self.teacher.name,
            revision=self.teacher.revision,
            layer=self.teacher.layer,
            device=device,
            dtype=self.teacher.dtype,
            offline=offline,
        )


def check_teacher(teacher: Teacher, windows: Windows) -> None:
    if teacher.k != K:
        raise RecipeError(f"[teacher] {teacher.name}: its k-mers have {teacher.k} bases, not {K}")
    if windows.kmers > teacher.context:
        raise RecipeError(
            f"[windows] bases = {windows.bases}: {windows.kmers:,} k-mers, but {teacher.name} sees "
            f"at most {teacher.context:,}; take windows of at most {teacher.context * K:,} bases"
        )


def check_knowledge(
    teacher: Teacher,
    kmer_id_WT: npt.NDArray[np.uint16],
    mask_WT: npt.NDArray[np.bool_],
    report: Reporter,
) -> Knowledge | None:
    """What a teacher knows of windows in random order; None of one that has no such question.

    Raises InputError where that is no more than frequencies tell: then it is mapped wrongly; and
    NonFiniteError.
    """
    if not isinstance(teacher, LanguageModel):  # a Python object that somebody passed
        return None
    begun = time.monotonic()

    def tick(done: int, total: int) -> None:
        report(
            Progress(
                what="asking the teacher for hidden 6-mers",
                done=done,
                total=total,
                unit="windows",
                seconds=time.monotonic() - begun,
            )
        )

    found = knowledge(teacher, kmer_id_WT, mask_WT, tick)
    override = "or set unchecked = true in [teacher], which the cache records"
    if found is None:
        raise InputError(
            f"[teacher] {teacher.name}: its checkpoint holds no language head, so that it cannot "
            "be asked for hidden 6-mers, which tells whether it is loaded rightly; get the whole "
            f"one, {override}"
        )
    if not math.isfinite(found.nats):
        raise NonFiniteError(
            f"[teacher] {teacher.name} says NaN or infinity of a hidden 6-mer; look at its weights "
            "and arithmetic"
        )
    if not found.enough:
        raise InputError(
            f"[teacher] {teacher.name} does not know this DNA: {found}; expected at least {MARGIN} "
            "fewer. Its tokens or weights are mapped wrongly, or it never learnt such genomes: get "
            f"the checkpoint's own tokenizer and config.json, {override}"
        )
    return found


def describe(
    asked: Job, references: Sequence[corpus.Reference], teacher: Teacher
) -> dict[str, Any]:
    """The plan, but for what follows from the windows."""
    windows = asked.windows
    return {
        "format": layout.FORMAT,
        "genomes": [dict(reference.described) for reference in references],
        "windows": {
            "bases": windows.bases,
            "stride": windows.stride,
            "kmers": windows.kmers,
            "masked": windows.masked,
            "mask_ratio": windows.mask_ratio,
            "stored": windows.stored,
            "store": windows.store,
            "views": windows.views,
            "reverse_complement": windows.reverse_complement,
            "seed": windows.seed,
            "algorithm": 1,
        },
        "part": asked.cache.part,
        "teacher": described_teacher(teacher, asked.teacher),
        "codec": asked.cache.codec,
        "licence": asked.cache.licence or teacher.licence,
        "licence_reason": asked.cache.licence_reason,
    }


def described_teacher(teacher: Teacher, asked: TeacherRecipe) -> dict[str, str | int | None]:
    settings = teacher.settings_sha256
    return {
        "name": teacher.name,
        "revision": teacher.revision,
        "weights_sha256": teacher.weights_sha256,
        **({} if settings is None else {"settings_sha256": settings}),
        "layer": teacher.layer,
        "input": asked.input,
        "channels": teacher.channels,
        "dtype": teacher.dtype,
        "licence": teacher.licence,
    }


def check_same(path: Path, described: Mapping[str, Any], given: Statistics | None) -> Plan:
    """The plan on disk, if it means what the recipe asks. Raises CacheMismatch."""
    plan, _ = layout.read_plan(path)
    # Windows are numbered, and so masked, in the order of the genomes.
    here = {**plan.meaning, "genomes": [genome.name for genome in plan.genomes]}
    asked = {**layout.meaning(described), "genomes": [g["name"] for g in described["genomes"]]}
    if given is not None:
        here["statistics"] = plan.statistics
        asked["statistics"] = writer.statistics_digest(given)
    differing = [key for key in sorted({*here, *asked}) if here.get(key) != asked.get(key)]
    if differing and integrity.stated_plan(path) not in (None, plan.id):
        raise CacheCorrupt(
            f"{path}: {layout.PLAN} is damaged: its receipts are of another plan; copy it again "
            "from where the cache came from, or have it planned again (how-to, Verify and repair)"
        )
    if differing:
        width = max(len(key) for key in differing)
        lines = [
            f"  {key:<{width}}  here {_short(here.get(key))}  recipe {_short(asked.get(key))}"
            for key in differing
        ]
        raise CacheMismatch(
            f"{path} was made from something else:\n" + "\n".join(lines) + "\n"
            "Use another [cache] path, or restore these values in the recipe."
        )
    return plan


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def given_statistics(asked: Job, teacher: Teacher) -> Statistics | None:
    """Those of the recipe's other cache, if it names one; it must be of the same teacher."""
    if asked.cache.statistics is None:
        return None
    other = Cache.open(asked.cache.statistics, incomplete=True)
    mine = described_teacher(teacher, asked.teacher)
    theirs = other.plan.teacher.model_dump(mode="json", exclude={"unchecked"})
    keys = dict.fromkeys([*mine, *theirs])
    differing = [key for key in keys if mine.get(key) != theirs.get(key)]
    if differing:
        said = "; ".join(
            f"{key}: there {theirs.get(key)!r}, here {mine.get(key)!r}" for key in differing
        )
        raise CacheMismatch(
            f"[cache] statistics: {other.path} is of another teacher ({said}), so its mean and std "
            "do not fit"
        )
    return Statistics(other.mean, other.std)
