"""The `had-pipe` command: read a recipe, call one function, print what came of it.

It decides nothing about results. Every verb is idempotent: the same line starts, continues, and
says that nothing is left. Heavy imports happen inside the verbs, so that `--help` is at once.
"""

from __future__ import annotations

import os
import signal
from typing import Annotated

import typer

from had_pipe import __version__
from had_pipe.cli import caches, doctor, stage_one, stage_two, students, teachers

__all__ = ["app", "main"]

# Threads that wait must sleep: on a busy machine OpenMP's spinning costs ten times the work itself.
# Read when torch is loaded, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Markup is off in the help: a recipe's [tables] would be read as styles.
app = typer.Typer(
    name="had-pipe",
    help="Distil a DNA language model into a small student, through a cache of its embeddings.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
_cache = typer.Typer(
    help="What a cache is, and whether it is whole and true.",
    rich_markup_mode=None,
    no_args_is_help=True,
)

_teachers = typer.Typer(rich_markup_mode=None, invoke_without_command=True)

app.command()(stage_one.plan)
app.command("extract-teacher")(stage_one.extract_teacher)
app.command()(stage_two.distill)
app.command()(stage_two.report)
app.command()(stage_two.compare)
app.command()(students.embed)
app.add_typer(_cache, name="cache")
_cache.command()(caches.inspect)
_cache.command()(caches.fetch)
_cache.command()(caches.verify)
_cache.command()(caches.audit)
_cache.command()(caches.compare)
_cache.command()(caches.recode)
app.add_typer(_teachers, name="teachers")
_teachers.callback()(teachers.teachers)
_teachers.command()(teachers.fetch)
app.command()(doctor.doctor)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"had-pipe {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """The entry point. SIGTERM stops like Ctrl-C, unless a verb handles it better meanwhile.

    So does SIGUSR2, by which batch systems warn a job that its time is nearly up.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGUSR2, signal.default_int_handler)
    app()
