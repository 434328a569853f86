"""How the command line speaks: facts, JSON, progress, numbers as words, errors as exit codes.

Results go to stdout, progress and errors to stderr. Consoles are made when used, so that they
follow NO_COLOR and whoever reads the streams.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from had_pipe.durable import as_storage_error
from had_pipe.errors import HadPipeError, Interrupted, RecipeError, StorageError
from had_pipe.errors import shown as harmless
from had_pipe.progress import Progress, Reporter
from had_pipe.sizes import size

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_P = ParamSpec("_P")


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned lines of a name and what is said of it; an empty name continues the one above."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    width = max((len(name) for name, _ in facts), default=0)
    for name, said in facts:
        console.print(Text.assemble((name.ljust(width), "bold"), "  ", harmless(said)))


def continued(name: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Several lines under one name."""
    return [(name if place == 0 else "", line) for place, line in enumerate(lines)]


def print_line(line: str = "", style: str = "") -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text(harmless(line), style=style))


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Aligned columns, the first to the left, the others to the right; empty ones are left out."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    kept = [i for i in range(len(heads)) if any(row[i] for row in rows)]
    lines = [[harmless(line[i]) for i in kept] for line in (heads, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for place, line in enumerate(lines):
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        console.print(Text("  ".join(cells).rstrip(), style="" if place else "bold"))


def print_json(value: object) -> None:
    print(json.dumps(value, default=_as_json, indent=2, allow_nan=False))


def as_json_object(value: DataclassInstance) -> dict[str, object]:
    """The fields of a value that some function returned, for `print_json`."""
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return as_json_object(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def fail(message: str, exit_code: int) -> NoReturn:
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text.assemble(("had-pipe: ", "bold red"), message))
    raise typer.Exit(exit_code)


def say_next(command: str) -> None:
    print_line()
    print_facts([("next", command)])


_EXTRA_OF_MODULE = {
    "dnaio": "extract",
    "gtars": "extract",
    "py2bit": "extract",
    "dask": "extract",
    "distributed": "extract",
    "obstore": "remote",
}


def answering(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn what can go wrong into a message and its exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def answered(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except HadPipeError as error:
            fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            fail(
                "stopped. What was finished is kept: run the same command again to continue.",
                Interrupted.exit_code,
            )
        except ModuleNotFoundError as error:
            extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            fail(
                f"this verb needs the package {error.name!r}, which is not installed: "
                f"pip install 'had-pipe[{extra}]'",
                RecipeError.exit_code,
            )
        except OSError as error:
            failed = as_storage_error(error)
            if failed is None:
                raise
            fail(str(failed), failed.exit_code)
        except RuntimeError as error:
            from had_pipe.batches import in_short, out_of_memory

            if not out_of_memory(error):
                raise
            fail(
                f"the device ran out of memory ({in_short(error)}). What was finished is kept: end "
                "what else runs there, or take fewer windows at once (training: [train] "
                "micro_batch), then run the same command again",
                StorageError.exit_code,
            )

    return answered


# Progress: a bar where somebody watches, a line a minute where a log is kept


def describe(progress: Progress) -> str:
    """One moment as a line: what, how much of how much, since when, how fast, how long still."""
    said = [progress.what, _counted(progress), duration(progress.seconds), *_pace(progress)]
    return "  ".join(said)


def _counted(progress: Progress) -> str:
    if progress.unit == "bytes":
        done, total, unit = size(progress.done), size(progress.total), ""
    else:
        done, total, unit = f"{progress.done:,}", f"{progress.total:,}", f" {progress.unit}"
    return f"{done} of {total}{unit}" if progress.total else f"{done}{unit}"


def _pace(progress: Progress) -> list[str]:
    said = []
    if progress.rate > 0:
        if progress.unit == "bytes":
            said.append(f"{size(progress.rate)}/s")
        else:
            said.append(f"{figure(progress.rate)} {progress.unit}/s")
    if progress.seconds_left is not None and progress.done < progress.total:
        said.append(f"{duration(progress.seconds_left)} left")
    for name, value in progress.facts.items():
        said.append(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else figure(value)}"
        )
    return said


class Lines:
    """Progress for a log: the first moment of a piece of work, one a minute, and the last."""

    def __init__(
        self, say: Callable[[str], None], *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        self._what = ""
        self._said_at = 0.0
        self._ended = False
        self._unsaid: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if progress.what != self._what:
            self.finish()
            self._what, self._said_at, self._ended = progress.what, now - 60, False
        self._unsaid = progress
        ended = 0 < progress.total <= progress.done
        if now - self._said_at >= 60 or (ended and not self._ended):
            self.finish()
            self._said_at = now
        self._ended = ended

    def finish(self) -> None:
        """Say the last moment, unless it was said."""
        if self._unsaid is not None:
            self._say(describe(self._unsaid))
            self._unsaid = None


@contextmanager
def reporter() -> Iterator[Reporter]:
    """Show progress on stderr for as long as the work lasts."""
    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal or console.is_dumb_terminal:
        lines = Lines(lambda line: print(line, file=sys.stderr, flush=True))
        try:
            yield lines
        finally:
            lines.finish()
        return

    from rich.progress import BarColumn, TaskID, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    whole = Column(no_wrap=True, min_width=10)
    columns = (
        TextColumn("{task.description}", markup=False, table_column=whole),
        BarColumn(bar_width=16),
        TextColumn("{task.fields[pace]}", markup=False, table_column=Column(no_wrap=True)),
    )
    with Bars(*columns, console=console) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: Progress) -> None:
            if progress.what not in tasks:
                # What is done makes room for what comes next; a log has lines for it.
                for what, task in list(tasks.items()):
                    if bars.tasks[bars.task_ids.index(task)].finished:
                        bars.remove_task(tasks.pop(what))
                tasks[progress.what] = bars.add_task(progress.what, total=None, pace="")
            bars.update(
                tasks[progress.what],
                completed=progress.done,
                total=progress.total or None,
                pace="  ".join([_counted(progress), *_pace(progress)]),
            )

        yield show


# Words for numbers


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def figure(value: float) -> str:
    """A measured number: whole from 100 on, else three or four digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def layer(layer: object) -> str:
    return "after the final norm" if layer == -1 else f"output of block {layer}"


def teacher_settings(sha256: object) -> list[tuple[str, str]]:
    """What names a teacher besides its weights, of one that has it."""
    return [("", f"tokenizer and config.json SHA-256 {sha256}")] if sha256 else []


def fidelity(told: Mapping[str, object]) -> list[str]:
    """The figures of a fidelity report; what it says of each channel is for `--json`."""
    return [
        f"{name.replace('_', ' ')} {value:,.6g}"
        for name, value in told.items()
        if isinstance(value, int | float)
    ]
