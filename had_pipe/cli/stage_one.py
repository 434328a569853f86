"""The verbs of stage one: what it would make, and making it."""

from __future__ import annotations

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
    size,
)

if TYPE_CHECKING:
    from had_pipe.survey import Survey


@answering
def plan(
    recipe: RecipeArgument,
    device: DeviceOption = Device.AUTO,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say what stage one will make and cost.

    Windows by split, what is dropped and why, k-mers, parts, files, bytes by codec, free space,
    time from a short probe, and the licence. Nothing is written.
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
        (
            "",
            f"{layer(teacher['layer'])}, {found.channels:,} channels in {teacher['dtype']}, "
            f"input {teacher['input']}",
        ),
    ]
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
        *continued(
            "size",
            [
                f"{size(nbytes)} as {codec}" + (", this recipe's" if codec == found.codec else "")
                for codec, nbytes in found.nbytes.items()
            ],
        ),
        ("free space", size(found.free_nbytes)),
        (
            "time",
            f"about {duration(found.seconds)} at {figure(found.windows_per_second)} "
            f"windows/s, from a short probe in batches of {found.batch}",
        ),
        ("licence", f"{found.licence}; the cache and every student inherit it"),
    ]
    return [*facts, *continued("note", list(found.notes))]


@answering
def extract_teacher(
    recipe: RecipeArgument,
    device: DeviceOption = Device.AUTO,
    offline: OfflineOption = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Hash every finished part first, and make those again that differ.",
        ),
    ] = False,
) -> None:
    """Stage one: make the cache.

    The same command starts, continues after a stop, and says when nothing is left.
    """
    from had_pipe.recipe import read_recipe

    asked = read_recipe(recipe)
    from had_pipe.extract import extract

    with reporter() as report:
        made = extract(asked, device=device.value, offline=offline, repair=repair, report=report)
    if made.parts_made:
        done = (
            f"{count(made.parts_made, 'part')} of {made.parts_total:,} in "
            f"{duration(made.seconds)}, {figure(made.windows_per_second)} windows/s"
        )
    else:
        done = f"nothing was left to do: all {count(made.parts_total, 'part')} were there"
    print_facts(
        [
            ("cache", str(made.path)),
            ("id", made.cache_id or f"none yet: {count(made.parts_left, 'part')} are missing"),
            ("made", done),
            ("windows", f"{made.windows:,}, {size(made.nbytes)} on disk"),
            *continued("fidelity", fidelity(made.fidelity)),
        ]
    )
    say_next(f"had-pipe distill {recipe}")
