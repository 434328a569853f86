"""The verbs of a cache's life: what it is, and whether it is whole."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from had_pipe.cli.arguments import JsonOption
from had_pipe.cli.shown import (
    answering,
    continued,
    count,
    duration,
    fidelity,
    layer,
    print_facts,
    print_json,
    reporter,
    size,
)
from had_pipe.errors import CacheCorrupt, CacheIncomplete

if TYPE_CHECKING:
    from had_pipe.cache import Cache


class Level(StrEnum):
    """How much of a cache is read again."""

    STRUCTURE = "structure"
    SAMPLE = "sample"
    EVERYTHING = "everything"


@answering
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The cache's folder.")],
    as_json: JsonOption = False,
) -> None:
    """Say what a cache is.

    Teacher, genomes, windows, splits, codec, fidelity, size, licence, and whether it is finished.
    """
    from had_pipe.cache import Cache
    from had_pipe.cache.integrity import missing_parts

    cache = Cache.open(path, incomplete=True)
    missing = len(missing_parts(path, cache.plan))
    parts = sum(1 for _ in cache.plan.parts())
    nbytes = _nbytes_below(path)
    if as_json:
        print_json(
            {
                "id": cache.id,
                "plan_id": cache.plan.id,
                "sealed": cache.sealed,
                "parts": parts,
                "parts_missing": missing,
                "nbytes": nbytes,
                "fidelity": dict(cache.fidelity),
                "plan": cache.plan.model_dump(mode="json", exclude={"contents"}),
            }
        )
        return
    if cache.sealed:
        state = f"sealed, {count(parts, 'part')}"
    else:
        state = (
            f"not sealed: {missing:,} of {count(parts, 'part')} missing; run the same "
            "extract-teacher command again"
        )
    print_facts(
        [
            ("cache", str(path)),
            ("state", state),
            ("id" if cache.sealed else "plan id", cache.id),
            *_plan_facts(cache),
            ("size", size(nbytes)),
        ]
    )


def _nbytes_below(path: Path) -> int:
    """Bytes of the cache's own files; what is being worked on is none of it."""
    total = 0
    for folder, names, files in os.walk(path):
        if Path(folder) == path:
            names[:] = [name for name in names if name != ".work"]
        total += sum((Path(folder) / name).lstat().st_size for name in files)
    return total


def _plan_facts(cache: Cache) -> list[tuple[str, str]]:
    plan = cache.plan
    teacher, windows = plan.teacher, plan.windows
    revision = f"revision {teacher.revision}, " if teacher.revision else ""
    facts = [
        ("teacher", f"{teacher.name}, {revision}weights SHA-256 {teacher.weights_sha256}"),
        (
            "",
            f"{layer(teacher.layer)}, {teacher.channels:,} channels in {teacher.dtype}, "
            f"input {teacher.input}",
        ),
    ]
    for genome in plan.genomes:
        sensitive = "; SENSITIVE: not to be shared" if genome.sensitive else ""
        facts += [
            (
                "genome",
                f"{genome.name}, {genome.bases:,} bases in {count(genome.contigs, 'contig')}"
                + sensitive,
            ),
            ("", f"sequence-collection digest {genome.digest}"),
        ]
    facts.append(
        (
            "windows",
            f"{windows.bases:,} bases every {windows.stride:,}; {windows.masked} of "
            f"{windows.kmers} k-mers masked, {windows.stored} stored ({windows.store})",
        )
    )
    facts += continued(
        "splits",
        [
            f"{name}: {count(split.windows, 'window')}, {count(len(split.views), 'view')}"
            for name, split in plan.splits.items()
        ],
    )
    facts += [("codec", plan.codec), *continued("fidelity", fidelity(cache.fidelity))]
    reason = f" ({plan.licence_reason})" if plan.licence_reason else ""
    return [*facts, ("licence", f"{plan.licence}{reason}; students inherit it")]


@answering
def verify(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The cache's folder.")],
    level: Annotated[
        Level,
        typer.Option(
            help="structure: names, lengths and JSON; sample: also one in twenty large objects; "
            "everything: every byte."
        ),
    ] = Level.EVERYTHING,
    as_json: JsonOption = False,
) -> None:
    """Look for damage; change nothing.

    Finds every object that is missing, of another length or content, or not part of the cache,
    and says how to mend it.
    """
    from had_pipe.cache.integrity import verify as look

    begun = time.monotonic()
    with reporter() as report:
        found = look(path, level=level.value, report=report)
    seconds = time.monotonic() - begun
    if as_json:
        print_json(found)
    else:
        state = "sealed" if found.sealed else "not sealed: the parts so far"
        hashed = f"{count(found.objects, 'object')}, {size(found.nbytes)}, {duration(seconds)}"
        print_facts(
            [
                ("cache", f"{path} ({state})"),
                ("id" if found.sealed else "plan id", found.cache_id),
                ("hashed", hashed),
                *continued("problem", [str(problem) for problem in found.problems] or ["none"]),
            ]
        )
    if found.problems:
        raise CacheCorrupt(f"{path}: {count(len(found.problems), 'problem')} found")
    if not found.sealed:
        # A copy whose manifest did not arrive looks the same, and must not pass for a whole cache.
        raise CacheIncomplete(
            f"{path}: nothing is damaged so far, but there is no manifest: run the same "
            "extract-teacher command again to finish it, or copy the cache again"
        )
