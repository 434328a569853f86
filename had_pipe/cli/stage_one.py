"""The verbs of stage one: what it would make, and making it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from had_pipe.cli.arguments import (
    Device,
    DeviceOption,
    JsonOption,
    OfflineOption,
    RecipeArgument,
)
from had_pipe.cli.shown import (
    answering,
    continued,
    count,
    duration,
    fidelity,
    figure,
    layer,
    print_facts,
    print_json,
    reporter,
    say_next,
    teacher_settings,
)
from had_pipe.errors import RecipeError
from had_pipe.sizes import size

if TYPE_CHECKING:
    from had_pipe.extract import ExtractSummary
    from had_pipe.survey import Survey


@answering
def plan(
    recipe: RecipeArgument,
    device: DeviceOption = Device.AUTO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what stage one will make and cost.

    Windows by split, what is dropped and why, k-mers, parts, files, free space, the licence and
    what it implies; from a short probe of the teacher on this device the time, and what every
    codec loses of these windows beside what it costs. Nothing is written.
    """
    from had_pipe.recipe import read_recipe

    asked = read_recipe(recipe)
    from had_pipe.survey import survey

    with reporter() as report:
        found = survey(asked, device=device.value, offline=offline, report=report)
    if as_json:
        print_json(found)
        return
    print_facts(_survey_facts(found))
    say_next(f"had-pipe extract-teacher {recipe}")


_DROPPED = {
    "not ACGT": "letters other than A, C, G, T",
    "not included": "outside the regions to include",
    "excluded": "in the regions to exclude",
    "between windows": "between windows, the stride being longer than they are",
    "tail": "at the end of a stretch, too few for a window",
}


def _survey_facts(found: Survey) -> list[tuple[str, str]]:
    """The one table of `plan`."""
    teacher = found.teacher
    revision = f"revision {teacher['revision']}, " if teacher["revision"] else ""
    facts = [
        ("cache", f"{found.cache} ({found.state})"),
        ("teacher", f"{teacher['name']}, {revision}weights SHA-256 {teacher['weights_sha256']}"),
        *teacher_settings(teacher.get("settings_sha256")),
        (
            "",
            f"{layer(teacher['layer'])}, {found.channels:,} channels in {teacher['dtype']}, "
            f"input {teacher['input']}",
        ),
    ]
    if found.knowledge is not None:
        facts.append(("", f"it takes {found.knowledge}"))
    for genome in found.genomes:
        facts += [
            (
                "genome",
                f"{genome['name']}, {genome['bases']:,} bases in "
                f"{count(genome['contigs'], 'contig')}",
            ),
            ("", f"sequence-collection digest {genome['digest']}"),
        ]
    bases = sum(genome["bases"] for genome in found.genomes)
    facts += continued(
        "windows",
        [
            f"{name}: {count(number, 'window')}, {count(found.views[name], 'view')}, "
            f"{found.covered_bases[name]:,} bases ({found.covered_bases[name] / bases:.2%})"
            for name, number in found.windows.items()
        ],
    )
    dropped = [
        f"{number:,} bases ({number / bases:.2%}): {_DROPPED.get(reason, reason)}"
        for reason, number in found.dropped_bases.items()
        if number
    ]
    facts += continued("dropped", dropped or ["nothing"])
    if found.other_letters:
        letters = ", ".join(f"{n:,} {letter}" for letter, n in found.other_letters.items())
        facts.append(("other letters", letters))
    facts += [
        ("k-mers", f"{found.kmers:,} for the teacher to read, {found.stored_groups:,} to store"),
        ("parts", f"{found.parts:,} in {count(found.files, 'file')}"),
        *continued("codecs", _codec_table(found)),
        ("free space", _free(found)),
        (
            "time",
            f"about {duration(found.seconds)} at {figure(found.windows_per_second)} "
            f"windows/s, from a short probe in batches of {found.batch}",
        ),
        ("licence", f"{found.licence}: {found.licence_implies}"),
        ("", "the cache and every student inherit it"),
    ]
    return [*facts, *continued("note", list(found.notes))]


def _free(found: Survey) -> str:
    if found.free_files is None:
        return size(found.free_nbytes)
    return f"{size(found.free_nbytes)}, and room for {found.free_files:,} more files"


def _codec_table(found: Survey) -> list[str]:
    """Every codec: what it costs, and what it loses of what the probe embedded."""
    rows = [["", "bytes a 6-mer", "in all", "below float16", "channel error", "worst cosine", ""]]
    for name, cost in found.codecs.items():
        lost = cost.fidelity
        rows.append(
            [
                name,
                figure(cost.group_nbytes),
                size(cost.nbytes),
                f"{cost.below_float16:.2g}x",
                f"{lost['channel_rmse']:.2%}" if lost else "?",
                f"{lost['worst_cosine']:.6f}" if lost else "?",
                "this recipe's" if name == found.codec else "",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *map(str.rjust, row[1:-1], widths[1:-1]), row[-1]]
        ).rstrip()
        for row in rows
    ]
    if any(cost.fidelity is None for cost in found.codecs.values()):
        return [
            *lines,
            f"what they lose is not known: {found.needed_groups:,} stored 6-mers would tell, the "
            f"probe had {found.probed_groups:,}",
        ]
    return [*lines, "errors as measured on windows of these genomes, in units of a channel's std"]


@answering
def extract_teacher(
    recipe: RecipeArgument,
    device: DeviceOption = Device.AUTO,
    offline: OfflineOption = False,
    share: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Make every N-th part only, from the I-th on: one of N jobs that need not know of "
            "each other. Whoever makes the last part finishes the cache.",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="So many processes on this machine, each on a CUDA device of its own as long as "
            "there are enough.",
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="The workers of a running Dask cluster: its scheduler's address, or scheduler "
            "file.",
        ),
    ] = None,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Hash every finished part first, and make those again that differ.",
        ),
    ] = False,
) -> None:
    """Stage one: make the cache.

    The same command starts, continues after a stop, and says when nothing is left; run several
    times at once, on any machines that share the disk, it makes one cache together. However it is
    made, on one class of arithmetic the cache has the same bytes.

    Stopped by Ctrl-C or SIGTERM it drops the part in work, by SIGUSR2 it finishes it first; the
    exit code is then 75: run me again. It is 8 where parts failed three times and all others were
    made.
    """
    with _warned() as stopping:
        _check_one_way(share, workers, scheduler)
        from had_pipe.hold import Share

        mine = None if share is None else Share.parse(share)
        from had_pipe.recipe import read_recipe

        asked = read_recipe(recipe)
        with reporter() as report:
            if workers is not None or scheduler is not None:
                from had_pipe.cluster import extract_on_cluster

                made = extract_on_cluster(
                    asked,
                    workers=workers,
                    scheduler=scheduler,
                    device=device.value,
                    offline=offline,
                    repair=repair,
                    stopping=stopping,
                    report=report,
                )
            else:
                from had_pipe.extract import extract

                made = extract(
                    asked,
                    device=device.value,
                    offline=offline,
                    repair=repair,
                    share=mine,
                    stopping=stopping,
                    report=report,
                )
    print_facts(
        [
            ("cache", str(made.path)),
            ("id", made.cache_id or "none before all parts are there"),
            ("made", _made(made, share)),
            ("windows", f"{made.windows:,}, {size(made.nbytes)} on disk"),
            *continued("fidelity", fidelity(made.fidelity)),
        ]
    )
    if made.cache_id is not None:
        say_next(f"had-pipe distill {recipe}")


def _check_one_way(share: str | None, workers: int | None, scheduler: str | None) -> None:
    """Raises RecipeError where the command line names two ways of sharing the work out."""
    given = {"--share": share, "--workers": workers, "--scheduler": scheduler}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise RecipeError(
            f"{' and '.join(named)} exclude each other: --share is for jobs that do not know of "
            "each other, --workers for processes on this machine, --scheduler for a running Dask "
            "cluster; take one of them"
        )


@contextmanager
def _warned() -> Iterator[Callable[[], bool]]:
    """Whether SIGUSR2 came: time is nearly up, so what is in work should be finished."""
    warned = threading.Event()
    before = signal.signal(signal.SIGUSR2, lambda *_: warned.set())
    try:
        yield warned.is_set
    finally:
        signal.signal(signal.SIGUSR2, before)


def _made(made: ExtractSummary, share: str | None) -> str:
    left = f"; {count(made.parts_left, 'part')} still missing" if made.parts_left else ""
    if made.parts_made:
        return (
            f"{count(made.parts_made, 'part')} of {made.parts_total:,} in "
            f"{duration(made.seconds)}, {figure(made.windows_per_second)} windows/s{left}"
        )
    if left:
        return f"nothing was left to do in share {share}{left}, of other shares"
    return f"nothing was left to do: all {count(made.parts_total, 'part')} were there"
