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
from had_pipe.errors import CacheCorrupt, CacheIncomplete, RecipeError

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
    locus: Annotated[
        str | None,
        typer.Option(
            metavar="SPLIT:ROW[:VIEW:GROUP]",
            help="Say instead where a window lies, or which k-mer a row of its embedding is of.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a cache is.

    Teacher, genomes, windows, splits, codec, fidelity, size, licence, and whether it is finished.
    """
    from had_pipe.cache import Cache
    from had_pipe.cache.integrity import missing_parts

    cache = Cache.open(path, incomplete=True)
    if locus is not None:
        _inspect_locus(cache, locus, as_json=as_json)
        return
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


def _inspect_locus(cache: Cache, asked: str, *, as_json: bool) -> None:
    """Where a window, or one stored group of it, lies; coordinates are 0-based and half-open."""
    split, row, view, group = _read_locus(cache, asked)
    plan = cache.plan
    window = cache.locus(split, row)
    told: dict[str, object] = {
        "split": split,
        "row": row,
        "genome": window.genome,
        "contig": window.contig,
        "start": window.start,
        "end": window.start + plan.windows.bases,
    }
    facts = [
        ("window", f"{row:,} of {split}, in part {row // plan.part:,}"),
        ("genome", window.genome),
        ("bases", f"{window.contig}:{window.start}-{window.start + plan.windows.bases}"),
    ]
    if view is not None and group is not None:
        from had_pipe.dna.kmers import K, spell

        found = cache.group_locus(split, row, view=view, group=group)
        told |= {
            "view": view,
            "group": group,
            "group_start": found.start,
            "group_end": found.start + K,
            "strand": "-" if found.reversed else "+",
            "kmer": spell(found.kmer_id),
            "masked": found.masked,
        }
        strand = "reverse" if found.reversed else "forward"
        facts += [
            ("group", f"{group} of view {view}, {'masked' if found.masked else 'visible'}"),
            ("its bases", f"{found.contig}:{found.start}-{found.start + K}"),
            ("k-mer", f"{spell(found.kmer_id)}, on the {strand} strand"),
        ]
    if as_json:
        print_json(told)
    else:
        print_facts([*facts, ("", "coordinates are 0-based and half-open")])


def _read_locus(cache: Cache, asked: str) -> tuple[str, int, int | None, int | None]:
    """What `--locus` names, if the cache has it."""
    split, *numbers = asked.split(":")
    if len(numbers) not in (1, 3) or not all(x.isascii() and x.isdigit() for x in numbers):
        raise RecipeError(f"--locus {asked}: expected SPLIT:ROW or SPLIT:ROW:VIEW:GROUP")
    if split not in cache.plan.splits:
        known = ", ".join(cache.plan.splits)
        raise RecipeError(f"--locus {asked}: no split {split!r} in {cache.path}; it has {known}")
    row, *within = map(int, numbers)
    if row >= cache.rows(split):
        raise RecipeError(
            f"--locus {asked}: {split} has {count(cache.rows(split), 'window')}, counted from 0"
        )
    if not within:
        return split, row, None, None
    view, group = within
    if view not in cache.views(split):
        views = ", ".join(map(str, cache.views(split)))
        raise RecipeError(f"--locus {asked}: no view {view} of {split}; it has {views}")
    if group >= cache.plan.windows.stored:
        raise RecipeError(
            f"--locus {asked}: a window has {count(cache.plan.windows.stored, 'stored group')}, "
            "counted from 0"
        )
    return split, row, view, group


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
