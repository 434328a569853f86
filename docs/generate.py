"""Write the reference pages that repeat what the code says: commands, recipe keys, errors.

    python docs/generate.py

tests/test_docs.py compares the pages with what this would write, so that they cannot drift.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import typer.main
from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from typer.testing import CliRunner

import had_pipe.errors
from had_pipe import cli, recipe

REFERENCE = Path(__file__).parent / "reference"

_HELP_WIDTH = 88


def commands(group: Any = None, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every command, groups included, as the words after `had-pipe`."""
    group = typer.main.get_command(cli.app) if group is None else group
    for name, command in group.commands.items():
        yield (*path, name)
        if hasattr(command, "commands"):
            yield from commands(command, (*path, name))


def command_page() -> str:
    lines = [
        "# Commands",
        "",
        "Every verb is idempotent: the same line starts, continues, and says that nothing is left.",
        "Flags change where, when and how loudly, never what is computed; `distill --cache`, which",
        "chooses inputs, is the exception. Results go to standard output, progress and errors to",
        "standard error: a bar on a terminal, a line a minute elsewhere. `NO_COLOR` is respected.",
        "Exit codes are on the page of [errors](errors.md).",
        "",
        "This page is written by `docs/generate.py` from the commands themselves.",
        "",
    ]
    runner = CliRunner(env={"COLUMNS": str(_HELP_WIDTH), "TERM": "dumb"})
    for words in ((), *commands()):
        told = runner.invoke(cli.app, [*words, "--help"], prog_name="had-pipe").output.rstrip()
        lines += [f"## `{' '.join(('had-pipe', *words))}`", "", "```text", told, "```", ""]
    return "\n".join(line.rstrip() for line in "\n".join(lines).splitlines()) + "\n"


def recipe_page() -> str:
    lines = [
        "# The recipe",
        "",
        "One TOML file describes both stages, joined by `[cache]`. It holds everything that",
        "changes a result and nothing else. Unknown keys, wrong types and impossible values are",
        "refused with the key, the value, what was expected and the nearest known key. Paths are",
        "relative to the recipe's folder. Stage one reads the first four tables, stage two the",
        "last four.",
        "",
        "This page is written by `docs/generate.py` from the recipe's own checks.",
        "",
    ]
    for name, field in recipe.Recipe.model_fields.items():
        section = _section(field)
        lines += [_prose(section.__doc__), ""]
        lines += ["| key | value | default | |", "|---|---|---|---|"]
        lines += [
            f"| `{key}` | {_kind(key, of)} | {_default(of)} | {_prose(of.description)} |"
            for key, of in section.model_fields.items()
        ]
        lines += ["", *_more(name)]
    return "\n".join(lines).rstrip() + "\n"


def _section(field: FieldInfo) -> type[recipe.Section]:
    """The class of one table, whether optional or a list of tables."""
    for part in (field.annotation, *get_args(field.annotation)):
        if inspect.isclass(part) and issubclass(part, recipe.Section):
            return part
    raise AssertionError(field)


def _more(name: str) -> list[str]:
    if name != "genome":
        return []
    return [
        "`splits` takes one of three forms:",
        "",
        '* `{ valid = ["chr8"], test = ["chr20"] }`: whole contigs; the others are `train`;',
        '* `"splits.bed"`: a BED file of four columns, contig, start, end, split, headed or not.',
        "  Its last column names `train` too: bases in none of its regions are left out;",
        "* `{ blocks = 50_000, valid = 0.1 }`: blocks of so many bases, drawn by `[windows] seed`,",
        "  for a genome of few contigs; other blocks are `train`. No window lies in two splits.",
        "",
    ]


def _kind(key: str, field: FieldInfo) -> str:
    """What may stand behind a key, in words."""
    if key == "splits":
        return "table or path"
    annotation: Any = field.annotation
    metadata = list(field.metadata)
    if set(get_args(annotation)) == {Path, str}:
        return "path or URL"
    if get_origin(annotation) in (Union, UnionType):
        annotation = next(part for part in get_args(annotation) if part is not NoneType)
        if hasattr(annotation, "__metadata__"):
            metadata += annotation.__metadata__
            annotation = annotation.__origin__
    if get_origin(annotation) is Literal:
        return _one_of(annotation)
    word = {bool: "true or false", int: "integer", float: "number", str: "string", Path: "path"}
    listed = get_origin(annotation) is tuple
    if listed:
        annotation, metadata = get_args(annotation)[0], []
        if get_origin(annotation) is Literal:
            return f"list of {_one_of(annotation)}"
        if hasattr(annotation, "__metadata__"):
            metadata, annotation = list(annotation.__metadata__), annotation.__origin__
    # Pydantic keeps the rules of an inner type together in a field of its own.
    metadata = [
        rule for one in metadata for rule in (one.metadata if isinstance(one, FieldInfo) else [one])
    ]
    bounds = [
        f"{sign} {_bound(getattr(rule, name))}"
        for rule in metadata
        for kind, name, sign in ((Gt, "gt", ">"), (Ge, "ge", "≥"), (Lt, "lt", "<"), (Le, "le", "≤"))
        if isinstance(rule, kind)
    ]
    kind = f"list of {word[annotation]}s" if listed else word[annotation]
    return ", ".join([kind, *bounds])


def _one_of(annotation: Any) -> str:
    return " or ".join(f"`{json.dumps(value)}`" for value in get_args(annotation))


def _bound(value: float) -> str:
    if isinstance(value, int) and value > 10**6:
        return f"2^{value.bit_length() - 1}"
    return f"{value:g}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return "" if field.default is None else f"`{json.dumps(field.default)}`"


def _prose(text: str | None) -> str:
    said = re.sub(r"\s+", " ", text or "").replace("|", "\\|").strip()
    # A table's docstring opens with the table: that is its heading.
    heading = r"^`(\[+\w+\]+)`: (.)"
    return re.sub(heading, lambda m: f"## `{m[1]}`\n\n{m[2].upper()}", said)


def errors_page() -> str:
    said = inspect.getdoc(had_pipe.errors) or ""
    head, tree, tail = said.split("\n\n", 2)
    lines = [
        "# Errors and exit codes",
        "",
        head,
        "",
        "```text",
        tree,
        "```",
        "",
        " ".join(tail.split()),
        "",
        "0 says that all went well. With 75 the same line goes on where it stopped: a batch script",
        "puts itself back into the queue. With 8 everything else is there, and the same line tries",
        "the parts again that failed. This page is written by `docs/generate.py` from",
        "`had_pipe/errors.py`.",
        "",
        "| error | exit code | |",
        "|---|---|---|",
    ]
    for name, cls in inspect.getmembers(had_pipe.errors, inspect.isclass):
        if issubclass(cls, had_pipe.errors.HadPipeError):
            lines.append(f"| `{name}` | {cls.exit_code} | {_prose(cls.__doc__)} |")
    return "\n".join(lines) + "\n"


PAGES = {"cli.md": command_page, "recipe.md": recipe_page, "errors.md": errors_page}


if __name__ == "__main__":
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), "utf-8")
