"""The verbs about teachers: which there are, and how one is brought here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from had_pipe.cli.arguments import JsonOption
from had_pipe.cli.shown import (
    answering,
    as_json_object,
    continued,
    print_facts,
    print_json,
    print_line,
)
from had_pipe.sizes import size

if TYPE_CHECKING:
    from had_pipe.teachers.listing import Family, Found


@answering
def teachers(
    context: typer.Context,
    inside: Annotated[
        list[Path] | None,
        typer.Option(
            "--in",
            metavar="FOLDER",
            help="Look here too: a checkpoint's folder, or one that holds several. Repeatable.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the teachers that can be loaded.

    Families known to work, and checkpoints found here: in the local hub cache and the folders
    named. Reads no weights and contacts no host.
    """
    if context.invoked_subcommand is not None:
        return
    from had_pipe.teachers.listing import FAMILIES, find

    found = find(inside or [])
    if as_json:
        print_json({"families": list(FAMILIES), "found": [_as_json(one) for one in found]})
        return
    for family in FAMILIES:
        print_facts(_family_facts(family))
        print_line()
    if not found:
        print_line("No checkpoint lies in the local hub cache" + (" or there." if inside else "."))
    for one in found:
        print_facts(_found_facts(one))
        print_line()


def _as_json(found: Found) -> dict[str, object]:
    return {**as_json_object(found), "k": found.k}


def _family_facts(family: Family) -> list[tuple[str, str]]:
    return [
        ("family", family.name),
        ("channels", family.channels),
        ("tokens", f"of {family.token_bases} bases; {family.context}"),
        ("licence", family.licence),
        *continued("hub names", list(family.examples)),
        ("shown by", family.shown_by),
    ]


def _found_facts(found: Found) -> list[tuple[str, str]]:
    where = [("teacher", found.name + (f"@{found.revision}" if found.revision else ""))]
    if found.problem is not None:
        return [*where, ("", f"cannot be loaded: {found.problem}")]
    assert found.context is not None
    assert found.weights_nbytes is not None
    return [
        *where,
        (
            "",
            f"{found.model}, {found.channels:,} channels, {found.layers} layers, tokens of "
            f"{found.token_bases} bases, windows of at most {found.context * found.k:,} bases",
        ),
        ("", f"licence {found.licence}, weights of {size(found.weights_nbytes)} in {found.path}"),
    ]


@answering
def fetch(
    teacher: Annotated[
        str,
        typer.Argument(
            metavar="NAME@COMMIT",
            help="A model on the hub, and its commit of 40 hexadecimal digits.",
        ),
    ],
    folder: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Lay the files out here, to be copied elsewhere and named as a folder, instead of "
            "in the local hub cache.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Download a teacher, where there is network: a login node.

    Fetches only the files a teacher is loaded from, and holds each against what the hub says of
    it. What is whole already is not fetched again; a stopped download goes on. Everywhere else
    --offline takes it from the local hub cache.
    """
    from had_pipe.teachers.hub import fetch as fetched_from_hub
    from had_pipe.teachers.listing import look

    made = fetched_from_hub(teacher, folder=folder)
    found = look(made.name, made.revision, made.path)
    if as_json:
        print_json({**as_json_object(made), "problem": found.problem})
        return
    print_facts(
        [
            *_found_facts(found),
            ("files", f"{', '.join(made.files)} ({size(made.nbytes)})"),
            ("weights", f"SHA-256 {made.weights_sha256}"),
        ]
    )
    print_line()
    if folder is None:
        recipe = [f'name = "{made.name}"', f'revision = "{made.revision}"']
    else:
        recipe = [f'name = "{folder.resolve()}"']
    print_facts(continued("recipe", ["[teacher]", *recipe]))
