"""The verbs of a cache's life: what it is, and whether it is whole."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from had_pipe.cli.arguments import (
    CacheArgument,
    Device,
    DeviceOption,
    JsonOption,
    OfflineOption,
)
from had_pipe.cli.shown import (
    answering,
    as_json_object,
    continued,
    count,
    duration,
    fidelity,
    layer,
    print_facts,
    print_json,
    reporter,
    say_next,
    teacher_settings,
)
from had_pipe.errors import CacheCorrupt, CacheIncomplete, RecipeError
from had_pipe.sizes import size

if TYPE_CHECKING:
    from had_pipe.audit import Audit, Failure
    from had_pipe.cache import Cache
    from had_pipe.cache.compare import Comparison, Difference, Side, Values
    from had_pipe.recipe import Recipe


class Level(StrEnum):
    """How much of a cache is read again."""

    STRUCTURE = "structure"
    SAMPLE = "sample"
    EVERYTHING = "everything"


@answering
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH_OR_URL", help="The cache's folder, or URL.")],
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
    Of a cache behind a URL only the small files that tell are downloaded.
    """
    from had_pipe.cache import Cache, open_cache
    from had_pipe.cache.remote import is_url

    with open_cache(path) if is_url(path) else Cache.open(Path(path), incomplete=True) as cache:
        if locus is None:
            _inspect_whole(cache, path, as_json=as_json)
        else:
            _inspect_locus(cache, locus, as_json=as_json)


def _inspect_whole(cache: Cache, named: str, *, as_json: bool) -> None:
    from had_pipe.cache.integrity import missing_parts
    from had_pipe.cache.layout import MANIFEST

    parts = sum(1 for _ in cache.plan.parts())
    if cache.mirror is None:
        missing = len(missing_parts(cache.path, cache.plan))
        nbytes = _nbytes_below(cache.path)
    else:
        named = cache.mirror.url
        missing, nbytes = 0, cache.nbytes + (cache.path / MANIFEST).stat().st_size
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
            f"`{cache.plan.made_by}` command again"
        )
    print_facts(
        [
            ("cache", named),
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
        *teacher_settings(teacher.settings_sha256),
        (
            "",
            f"{layer(teacher.layer)}, {teacher.channels:,} channels in {teacher.dtype}, "
            f"input {teacher.input}"
            + (", never checked to know the DNA" if teacher.unchecked else ""),
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
    if plan.source is not None:
        facts.append(("source", f"recoded from {plan.source.codec}, cache {plan.source.cache}"))
    reason = f" ({plan.licence_reason})" if plan.licence_reason else ""
    return [*facts, ("licence", f"{plan.licence}{reason}; students inherit it")]


@answering
def fetch(
    url: Annotated[
        str, typer.Argument(metavar="URL", help="The cache's URL: http, https, s3, gs or az.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder to make.")],
) -> None:
    """Copy a cache from a URL into a folder.

    Every byte is held against the manifest; the folder appears when all of it is there. Run the
    same command again to continue.
    """
    from had_pipe.cache.fetch import fetch_cache

    with reporter() as report:
        begun = time.monotonic()
        fetched = fetch_cache(url, folder, report=report)
    if fetched.made:
        done = (
            f"{count(fetched.made, 'object')} of {fetched.total:,} in "
            f"{duration(time.monotonic() - begun)}"
        )
    else:
        done = f"nothing was left to do: all {count(fetched.total, 'object')} were there"
    print_facts(
        [
            ("cache", str(fetched.path)),
            ("id", fetched.cache_id),
            ("fetched", done),
            ("size", size(fetched.nbytes)),
        ]
    )
    say_next(f"had-pipe distill RECIPE --cache {fetched.path}")


@answering
def verify(
    path: CacheArgument,
    level: Annotated[
        Level,
        typer.Option(
            help="structure: names, lengths and JSON; sample: also one in twenty large objects; "
            "everything: every byte."
        ),
    ] = Level.EVERYTHING,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Read only this job's share of the large objects: N jobs read them all, once.",
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="How many read at once; one a core unless said."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Look for damage; change nothing.

    Finds every object that is missing, of another length or content, or not part of the cache,
    and says how to mend it. The exit code is 4 where there is a problem, and for a cache that is
    not finished, or whose manifest did not arrive. An archive is unpacked for it, and not kept.
    """
    from had_pipe.hold import Share

    mine = Share(1, 1) if share is None else Share.parse(share)
    from had_pipe.cache import archive, integrity
    from had_pipe.cache.layout import ARCHIVE

    begun = time.monotonic()
    with reporter() as report:
        if (path / ARCHIVE).exists():
            if share is not None or level is not Level.EVERYTHING:
                raise RecipeError(
                    f"{path}: an archive is verified as a whole: no --level, no --share"
                )
            found = archive.verify(path, report=report)
        else:
            found = integrity.verify(
                path,
                level=level.value,
                share=(mine.number, mine.of),
                threads=threads,
                report=report,
            )
    seconds = time.monotonic() - begun
    if as_json:
        print_json(found)
    else:
        state = "sealed" if found.sealed else "not sealed: the parts so far"
        hashed = f"{count(found.objects, 'object')}, {size(found.nbytes)}, {duration(seconds)}"
        if share is not None:
            hashed += f"; share {share} of the large ones"
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
            f"{path}: nothing is damaged so far, but there is no manifest: run the command that "
            "was making it again to finish it, or copy the cache again"
        )


@answering
def audit(
    path: CacheArgument,
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE_OR_TEACHER",
            help="A recipe, whose [teacher] is taken, or a teacher's folder or hub name.",
        ),
    ],
    windows: Annotated[
        int, typer.Option(metavar="N", min=1, help="How many windows to look at.")
    ] = 64,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=0,
            max=2**63 - 1,
            help="Draw the same windows as another audit; any unless said.",
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run the teacher again on some windows and compare; change nothing.

    How one lab checks another's cache: `verify` proves that it is as it was sealed, this that what
    was sealed is true. Needs the teacher, no genome. On the same class of arithmetic stored bytes
    must be equal, on another one close; and all together no further off than the cache says its
    codec loses. The exit code is 4 where one window fails, or all of them together.
    """
    from secrets import randbits

    named = Path(teacher)
    if named.suffix == ".toml":
        from had_pipe.recipe import read_recipe

        of: Recipe | str = read_recipe(named)
    else:
        of = teacher
    from had_pipe.audit import audit as look

    drawn = randbits(32) if seed is None else seed
    with reporter() as report:
        found = look(
            path,
            of,
            windows=windows,
            device=device.value,
            offline=offline,
            seed=drawn,
            report=report,
        )
    if as_json:
        print_json({**as_json_object(found), "seed": drawn, "passed": found.passed})
    else:
        print_facts(_audit_facts(found, drawn))
    if not found.passed:
        if not found.failures:
            raise CacheCorrupt(f"{path}: not what the teacher says: {found.doubts[0]}")
        failed = count(len(found.failures), "window")
        raise CacheCorrupt(f"{path}: {failed} of {found.windows:,} not what the teacher says")


def _audit_facts(found: Audit, seed: int) -> list[tuple[str, str]]:
    def arithmetic(numerics: Mapping[str, object]) -> str:
        return ", ".join(f"{key} {value}" for key, value in numerics.items())

    if found.bytes_expected:
        expected = "one class of arithmetic: equal bytes expected"
    else:
        expected = f"a cosine of at least {found.limit} expected, less what the codec loses"
    return [
        ("cache", str(found.path)),
        ("id", found.cache_id),
        ("teacher", f"{found.teacher}: weights and layer are those of the plan"),
        ("made with", arithmetic(found.there)),
        ("audited with", arithmetic(found.here)),
        (
            "windows",
            f"{found.windows:,} of {found.windows_total:,}, from {found.parts:,} of "
            f"{count(found.parts_total, 'part')}, drawn with --seed {seed}",
        ),
        ("", expected),
        ("", f"{found.equal_windows:,} of equal bytes; worst cosine {found.worst_cosine:.6f}"),
        (
            "",
            f"if one window in a hundred were false, an audit of so many would meet one with "
            f"{found.share_found(0.01):.0%}",
        ),
        (
            "",
            f"off by {found.loss:.3g} of a channel's std; the cache says {found.loss_said:.3g}"
            + (f", against its source, {found.source_codec}" if found.source_codec else ""),
        ),
        *continued(
            "failed",
            [*map(_failure, found.failures), *found.doubts] or ["none"],
        ),
    ]


def _failure(failure: Failure) -> str:
    locus = failure.locus
    return (
        f"window {failure.row} of {failure.split}, view {failure.view}, part {failure.part}, "
        f"{locus.genome} {locus.contig}:{locus.start}: {failure.found}"
    )


@answering
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A cache's folder.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Another cache's folder.")],
    as_json: JsonOption = False,
) -> None:
    """Say how two caches differ; change nothing.

    What they were made from, then the embeddings of the windows that both have, decoded, by split
    and view: of equal bytes, or how far apart, and where most. For two labs' caches of one recipe,
    and for a cache beside what was recoded from it. To differ is no error: the exit code is 0, and
    --json says whether they are identical or equal.
    """
    from had_pipe.cache.compare import compare as hold_against

    with reporter() as report:
        found = hold_against(a, b, report=report)
    if as_json:
        print_json({**as_json_object(found), "identical": found.identical, "equal": found.equal})
        return
    if found.identical:
        verdict = "one cache: the ids are the same"
    elif found.equal:
        verdict = "every window is in both, stored as the same bytes"
    elif _is_recoded(found):
        verdict = "by its plan b was recoded from a; see above how far apart they are"
    else:
        verdict = "they differ"
    print_facts(
        [
            *_side_facts("a", found.a),
            *_side_facts("b", found.b),
            *continued(
                "made from", [_difference(key) for key in found.meaning] or ["the same recipe"]
            ),
            *continued("contents", [f"{key.key} differs" for key in found.contents] or ["equal"]),
            *continued("parts", _parts_apart(found)),
            *continued("embeddings", [_values(values) for values in found.values]),
            ("verdict", verdict),
        ]
    )


def _is_recoded(found: Comparison) -> bool:
    differing = {key.key: key.b for key in found.meaning}
    of_codec = all(key.key.startswith("statistics/") for key in found.contents)
    whole = not (found.only_in_a or found.only_in_b)
    return (
        of_codec
        and whole
        and (
            set(differing) == {"codec", "source.cache", "source.codec"}
            and differing["source.cache"] == found.a.cache_id
        )
    )


def _side_facts(name: str, side: Side) -> list[tuple[str, str]]:
    state = "" if side.sealed else " (not sealed: the parts so far)"
    facts = [
        (name, f"{side.path}{state}, {side.codec}"),
        ("", f"{'id' if side.sealed else 'plan id'} {side.cache_id}"),
    ]
    if side.numerics is not None:
        made = ", ".join(f"{key} {value}" for key, value in side.numerics.items())
        facts.append(("", f"made with {made}"))
    return facts


def _difference(key: Difference) -> str:
    def told(value: object) -> str:
        return "nothing" if value is None else json.dumps(value)

    return f"{key.key}: {told(key.a)} in a, {told(key.b)} in b"


def _parts_apart(found: Comparison) -> list[str]:
    said = [
        f"{count(len(parts), 'part')} only in {name}, {parts[0]} first"
        for name, parts in (("a", found.only_in_a), ("b", found.only_in_b))
        if parts
    ]
    return said or ["every part has its counterpart"]


def _values(values: Values) -> str:
    """One split under one view."""
    said = [f"{values.split}/{values.view}: {count(values.windows, 'window')}"]
    if values.windows and values.equal_windows == values.windows:
        said[0] += ", all of equal bytes"
    elif values.windows:
        said[0] += f", {values.equal_windows:,} of equal bytes"
        said += [
            f"relative error {values.relative:.3g}",
            f"channel error {values.channel_rmse:.2%}, worst {values.worst_channel_rmse:.2%}",
            f"worst cosine {values.worst_cosine:.6f}" + _at(values),
        ]
    for number, what in (
        (values.unlike_windows, "of other k-mers, mask or strand"),
        (values.only_in_a, "only in a"),
        (values.only_in_b, "only in b"),
    ):
        if number:
            said.append(f"{number:,} {what}")
    return "; ".join(said)


def _at(values: Values) -> str:
    locus = values.worst_locus
    if locus is None:
        return ""
    return f" in row {values.worst_row}, {locus.genome} {locus.contig}:{locus.start}"


@answering
def recode(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A finished cache, or archive.")],
    target: Annotated[Path, typer.Argument(metavar="TARGET", help="The folder to make.")],
    codec: Annotated[
        str | None,
        typer.Option(
            metavar="CODEC",
            help="A codec as in [cache] codec, or archive; of an archive as SOURCE none.",
        ),
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Check a finished TARGET; make what is damaged again.")
    ] = False,
) -> None:
    """Make another cache of a cache, without the teacher.

    With another codec the new cache names the one it was made of, and says what was lost. An
    archive is the same cache in less room, and cannot be trained on; recoding it again, without
    --codec, gives the cache back, byte for byte, under its id. Run the same command again to
    continue.
    """
    from had_pipe.cache.recode import recode as make

    with reporter() as report:
        made = make(source, target, codec=codec, repair=repair, report=report)
    things = "object" if made.codec == "archive" or made.fidelity is None else "part"
    if made.made:
        done = f"{count(made.made, things)} of {made.total:,} in {duration(made.seconds)}"
    else:
        done = f"nothing was left to do: all {count(made.total, things)} were there"
    if made.lossless:
        lost = ["nothing lost: every value is the source's"]
    else:
        assert made.fidelity is not None
        lost = fidelity(made.fidelity)
    if made.coded_twice:
        lost.append(f"against the source, which is {made.source_codec} and had lost some already")
    print_facts(
        [
            ("source", f"{made.source}, {made.source_codec}, {size(made.source_nbytes)}"),
            ("target", f"{made.path}, {made.codec}, {size(made.nbytes)}"),
            ("id", made.cache_id),
            ("made", done),
            *continued("fidelity", lost),
        ]
    )
