"""A student's card: what it is, what it came from, what it may be used for, what it was seen to do.

Names, licences and reasons come out of caches, which strangers may have made: here they are text
on one line, whatever they hold.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from had_pipe.cache import Cache
from had_pipe.run import RunRecord

_ERRORS = {"mse": "squared error", "smooth_l1": "smooth L1 error"}
_BASE_FLOORS = {
    "accuracy": "base_frequency_accuracy",
    "reconstruct": "base_frequency_cross_entropy",
}


def student_card(
    record: RunRecord, caches: Sequence[Cache], *, parameters: int, width: int, batch: int
) -> str:
    """README.md of a student, as model hubs read it."""
    plan = caches[0].plan
    licence = plan.licence  # that of every cache: others are not trained on together
    spelt = _hub_licence(licence)
    front = [
        "---",
        f"license: {spelt}",
        *([f"license_name: {_yaml(licence)}"] if spelt == "other" else []),
        "library_name: transformers",
        *([f"base_model: {_yaml(plan.teacher.name)}"] if plan.teacher.revision else []),
        "tags: [dna, genomics, distillation, had-pipe]",
        "---",
    ]
    body = [
        "",
        "# A DNA student distilled with had-pipe",
        "",
        f"{parameters:,} parameters; one feature of width {width} a base. Made from the "
        f"embeddings of {_line(plan.teacher.name)} ({_version(caches[0])}, layer "
        f"{plan.teacher.layer}) in {record.steps:,} steps of {batch:,} windows of "
        f"{plan.windows.bases:,} bases.",
        "",
        *_provenance(caches, record.run["recipe"]["train"].get("weights")),
        "",
        f"Licence: {_line(licence)}, inherited from the teacher through the cache.",
    ]
    reasons = {_line(c.plan.licence_reason) for c in caches if c.plan.licence_reason}
    body += [f"Reason recorded for this licence: {reason}" for reason in sorted(reasons)]
    validation = record.validation[-1] if record.validation else None
    floors = record.floors
    groups = record.asked("objective", "align_on")
    error = _ERRORS.get(record.asked("objective", "error"), "error")
    if validation and floors:
        body += [
            "",
            f"On {validation['windows']:,} held-out windows:",
            "",
            "| | student | mean of each k-mer | mean embedding | base frequencies |",
            "|---|---|---|---|---|",
            _row(f"{error} of {groups} groups", validation, "align", floors, ".4g"),
            _row(f"cosine of {groups} groups", validation, "cosine", floors, ".4f"),
            _row("cross-entropy of masked bases", validation, "reconstruct", floors, ".4f"),
            _row("accuracy of masked bases", validation, "accuracy", floors, ".4f"),
        ]
    else:
        body += ["", "Nothing was held out: no figure on unseen DNA is known."]
    if record.asked("objective", "mask_tokens") == "dropped":
        body += [
            "",
            "It was trained without mask symbols: `[MASK]`, as which `had-pipe embed` reads what "
            "is no A, C, G or T, means nothing to it.",
        ]
    body += [
        "",
        "With had-pipe installed:",
        "",
        *_usage("import had_pipe.students  # registers the model with transformers"),
        "",
        "Without it, transformers runs the code that lies beside the weights, which is had-pipe's "
        "(Apache-2.0):",
        "",
        *_usage(trusting=", trust_remote_code=True"),
        "",
    ]
    return "\n".join([*front, *body])


def _usage(first: str | None = None, *, trusting: str = "") -> list[str]:
    """A block of Python that loads the student, and what it says of a sequence."""
    return [
        "```python",
        *([first] if first else []),
        "from transformers import AutoModel, AutoTokenizer",
        "",
        'folder = "path/of/this/folder"',
        f"student = AutoModel.from_pretrained(folder{trusting})",
        f"tokenizer = AutoTokenizer.from_pretrained(folder{trusting})",
        'features = student(**tokenizer(["ACGTACGT"], return_tensors="pt")).last_hidden_state',
        "```",
    ]


def _provenance(caches: Sequence[Cache], weights: Sequence[float] | None) -> list[str]:
    """A table of what was read; `weights` says in which proportion, where that was asked for."""
    columns = ["cache", *(["weight"] if weights else []), "genome", "bases", "digest"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for place, cache in enumerate(caches):
        weight = [f"{weights[place]:g}"] if weights else []
        for of in cache.plan.genomes:
            cells = [cache.id[:12], *weight, _line(of.name), f"{of.bases:,}", _line(of.digest)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def teacher_of(cache: Cache) -> str:
    """Which teacher, at which revision or weights."""
    return f"{cache.plan.teacher.name} ({_version(cache)})"


def _version(cache: Cache) -> str:
    teacher = cache.plan.teacher
    return (
        f"revision {_line(teacher.revision[:12])}"
        if teacher.revision
        else f"weights {_line(teacher.weights_sha256[:12])}"
    )


def _hub_licence(licence: str) -> str:
    """As model cards spell it: one known word, or `other`."""
    plain = re.fullmatch(r"[A-Za-z0-9.+-]+", licence) and licence != "unknown"
    return licence.lower() if plain else "other"


def _yaml(text: str) -> str:
    """Text that YAML reads as text: JSON's strings are YAML's."""
    return text if re.fullmatch(r"[A-Za-z0-9][\w ./+()-]*", text) else json.dumps(text)


def _line(text: str) -> str:
    """Text that stays one line and one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _row(
    what: str, student: Mapping[str, Any], term: str, floors: Mapping[str, Any], form: str
) -> str:
    """One line of the table: the student's figure and those of the floors it has."""

    def cell(figures: Mapping[str, Any], key: str) -> str:
        return format(figures[key], form) if key in figures else "-"

    cells = [
        cell(student, term),
        cell(floors, f"kmer_{term}"),
        cell(floors, f"mean_{term}"),
        cell(floors, _BASE_FLOORS.get(term, "")),
    ]
    return f"| {what} | {' | '.join(cells)} |"
