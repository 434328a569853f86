"""The `had-pipe` command: read a recipe, call one function, print what came of it.

It decides nothing about results. Every verb is idempotent: the same line starts, continues, and
says that nothing is left. Heavy imports happen inside the verbs, so that `--help` is at once.
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn, ParamSpec

import typer
from rich.console import Console
from rich.text import Text

from had_pipe import __version__
from had_pipe.errors import (
    CacheCorrupt,
    CacheIncomplete,
    HadPipeError,
    Interrupted,
    RecipeError,
    StorageError,
)
from had_pipe.progress import Progress, Reporter

if TYPE_CHECKING:
    from had_pipe.cache import Cache
    from had_pipe.survey import Survey

# Threads that wait must sleep: on a busy machine OpenMP's spinning costs ten times the work itself.
# Read when torch is loaded, so set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_P = ParamSpec("_P")

# Markup is off in the help: a recipe's [tables] would be read as styles.
app = typer.Typer(
    name="had-pipe",
    help="Distil a DNA language model into a small student, through a cache of its embeddings.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
cache_app = typer.Typer(
    help="What a cache is, and whether it is whole.", rich_markup_mode=None, no_args_is_help=True
)
app.add_typer(cache_app, name="cache")


class Device(StrEnum):
    """Where the arithmetic runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


class Level(StrEnum):
    """How much of a cache is read again."""

    STRUCTURE = "structure"
    SAMPLE = "sample"
    EVERYTHING = "everything"


RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
DeviceOption = Annotated[
    Device, typer.Option(help="Where the model runs; auto takes a CUDA device if there is one.")
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use only what is on this machine; contact no host.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


# What is printed: results on stdout, progress and errors on stderr. Consoles are made when used,
# so that they follow NO_COLOR and whoever reads the streams.


def _print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Aligned lines of a name and what is said of it; an empty name continues the one above."""
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    width = max((len(name) for name, _ in facts), default=0)
    for name, said in facts:
        console.print(Text.assemble((name.ljust(width), "bold"), "  ", said))


def _print_line(line: str = "", style: str = "") -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text(line, style=style))


def _print_json(value: object) -> None:
    print(json.dumps(value, default=_as_json, indent=2, allow_nan=False))


def _as_json(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no place in JSON")


def _fail(message: str, exit_code: int) -> NoReturn:
    console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)
    console.print(Text.assemble(("had-pipe: ", "bold red"), message))
    raise typer.Exit(exit_code)


_STORAGE_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS}

_EXTRA_OF_MODULE = {
    "dnaio": "extract",
    "gtars": "extract",
    "py2bit": "extract",
    "dask": "extract",
    "distributed": "extract",
}


def _answering(command: Callable[_P, None]) -> Callable[_P, None]:
    """Turn what can go wrong into a message and its exit code; a bug keeps its traceback."""

    @functools.wraps(command)
    def answered(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except HadPipeError as error:
            _fail(str(error), error.exit_code)
        except KeyboardInterrupt:
            _fail(
                "stopped. What was finished is kept: run the same command again to continue.",
                Interrupted.exit_code,
            )
        except ModuleNotFoundError as error:
            extra = _EXTRA_OF_MODULE.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            _fail(
                f"this verb needs the package {error.name!r}, which is not installed: "
                f"pip install 'had-pipe[{extra}]'",
                RecipeError.exit_code,
            )
        except OSError as error:
            if error.errno not in _STORAGE_TROUBLE:
                raise
            where = f"{error.filename}: " if error.filename else ""
            _fail(
                f"{where}{(error.strerror or 'the disk failed').lower()}. Everything committed so "
                "far is intact; mend that, then run the same command again.",
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
        return f"{size(progress.done)} of {size(progress.total)}"
    return f"{progress.done:,} of {progress.total:,} {progress.unit}"


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
        self._unsaid: Progress | None = None

    def __call__(self, progress: Progress) -> None:
        now = self._clock()
        if progress.what != self._what:
            self.finish()
            self._what, self._said_at = progress.what, now - 60
        self._unsaid = progress
        if now - self._said_at >= 60 or progress.done >= progress.total:
            self.finish()
            self._said_at = now

    def finish(self) -> None:
        """Say the last moment, unless it was said."""
        if self._unsaid is not None:
            self._say(describe(self._unsaid))
            self._unsaid = None


@contextmanager
def _reporter() -> Iterator[Reporter]:
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
                tasks[progress.what] = bars.add_task(progress.what, total=progress.total, pace="")
            bars.update(
                tasks[progress.what],
                completed=progress.done,
                total=progress.total,
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


def size(nbytes: float) -> str:
    """Bytes in decimal units."""
    if nbytes < 1000:
        return f"{nbytes:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.5:  # beyond it three digits would round to 1e+03
            return f"{nbytes:.3g} {unit}"
    nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"


def figure(value: float) -> str:
    """A measured number: whole from 100 on, else three or four digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def count(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number:,} {noun if number == 1 else noun + 's'}"


def _next(command: str) -> None:
    _print_line()
    _print_facts([("next", command)])


# The verbs


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


@app.command()
@_answering
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

    with _reporter() as report:
        found = survey(asked, device=device.value, offline=offline, report=report)
    if as_json:
        _print_json(found)
        return
    _print_facts(_survey_facts(found))
    _next(f"had-pipe extract-teacher {recipe}")


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
            f"{_layer(teacher['layer'])}, {found.channels:,} channels in {teacher['dtype']}, "
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
    facts += _continued(
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
    facts += _continued("dropped", dropped or ["nothing"])
    if found.other_letters:
        letters = ", ".join(f"{n:,} {letter}" for letter, n in found.other_letters.items())
        facts.append(("other letters", letters))
    facts += [
        ("k-mers", f"{found.kmers:,} for the teacher to read, {found.stored_groups:,} to store"),
        ("parts", f"{found.parts:,} in {count(found.files, 'file')}"),
        *_continued(
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
    return [*facts, *_continued("note", list(found.notes))]


def _layer(layer: object) -> str:
    return "after the final norm" if layer == -1 else f"output of block {layer}"


@app.command("extract-teacher")
@_answering
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

    with _reporter() as report:
        made = extract(asked, device=device.value, offline=offline, repair=repair, report=report)
    if made.parts_made:
        done = (
            f"{count(made.parts_made, 'part')} of {made.parts_total:,} in "
            f"{duration(made.seconds)}, {figure(made.windows_per_second)} windows/s"
        )
    else:
        done = f"nothing was left to do: all {count(made.parts_total, 'part')} were there"
    _print_facts(
        [
            ("cache", str(made.path)),
            ("id", made.cache_id),
            ("made", done),
            ("windows", f"{made.windows:,}, {size(made.nbytes)} on disk"),
            *_continued("fidelity", _fidelity(made.fidelity)),
        ]
    )
    _next(f"had-pipe distill {recipe}")


def _fidelity(told: Mapping[str, object]) -> list[str]:
    """The figures of a fidelity report; what it says of each channel is for `--json`."""
    return [
        f"{name.replace('_', ' ')} {value:,.6g}"
        for name, value in told.items()
        if isinstance(value, int | float)
    ]


@app.command()
@_answering
def distill(
    recipe: RecipeArgument,
    cache: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Take this cache instead of the recipe's; repeat it to train on several.",
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Stage two: train a student.

    The same command starts, continues after a stop, and says when nothing is left.
    """
    from had_pipe.recipe import read_recipe

    asked = read_recipe(recipe)
    from had_pipe.distill import distill as train

    with _reporter() as report:
        made = train(asked, caches=cache or None, device=device.value, report=report)
    from had_pipe.report import verdicts
    from had_pipe.run import read_run

    if made.already_done:
        done = f"nothing was left to do: all {count(made.steps, 'step')} were done"
    else:
        done = f"{count(made.steps, 'step')} in {duration(made.seconds)}"
    losses = [
        f"{name} {made.first[name]:.4f} -> {made.last[name]:.4f}"
        for name in ("loss", "align", "reconstruct")
        if name in made.first and name in made.last
    ]
    _print_facts(
        [
            ("run", str(made.run)),
            ("trained", done),
            *_continued("losses", losses),
            *_continued("measured", verdicts(read_run(made.run))),
            ("student", str(made.student)),
        ]
    )
    _next(f"had-pipe report {made.run}")


def _continued(name: str, lines: Sequence[str]) -> list[tuple[str, str]]:
    """Several lines under one name."""
    return [(name if place == 0 else "", line) for place, line in enumerate(lines)]


@app.command()
@_answering
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, [train] out.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write the page, instead of RUN/report.html."),
    ] = None,
) -> None:
    """Write one HTML page about a run.

    The page holds everything it shows; the run may still be going on.
    """
    from had_pipe.report import verdicts, write_report
    from had_pipe.run import read_run

    page = write_report(run, out)
    _print_facts(_continued("measured", verdicts(read_run(run))))
    _print_facts([("page", str(page.resolve()))])


@cache_app.command()
@_answering
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
        _print_json(
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
    _print_facts(
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
            f"{_layer(teacher.layer)}, {teacher.channels:,} channels in {teacher.dtype}, "
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
    facts += _continued(
        "splits",
        [
            f"{name}: {count(split.windows, 'window')}, {count(len(split.views), 'view')}"
            for name, split in plan.splits.items()
        ],
    )
    facts += [("codec", plan.codec), *_continued("fidelity", _fidelity(cache.fidelity))]
    reason = f" ({plan.licence_reason})" if plan.licence_reason else ""
    return [*facts, ("licence", f"{plan.licence}{reason}; students inherit it")]


@cache_app.command()
@_answering
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
    with _reporter() as report:
        found = look(path, level=level.value, report=report)
    seconds = time.monotonic() - begun
    if as_json:
        _print_json(found)
    else:
        state = "sealed" if found.sealed else "not sealed: the parts so far"
        hashed = f"{count(found.objects, 'object')}, {size(found.nbytes)}, {duration(seconds)}"
        _print_facts(
            [
                ("cache", f"{path} ({state})"),
                ("id" if found.sealed else "plan id", found.cache_id),
                ("hashed", hashed),
                *_continued("problem", [str(problem) for problem in found.problems] or ["none"]),
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


_PACKAGES = ("torch", "transformers", "safetensors", "zarr", "numpy", "pydantic")
_EXTRA_PACKAGES = {
    "gtars": "extract",
    "dnaio": "extract",
    "py2bit": "extract",
    "flash-linear-attention": "cuda",
    "triton": "cuda",
}


@app.command()
@_answering
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine has.

    Versions, devices, and which kernels run and why.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from had_pipe.students.delta_rule import kernel

    found: dict[str, str | None] = {}
    for package in (*_PACKAGES, *_EXTRA_PACKAGES):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    cuda = {
        f"cuda:{index}": torch.cuda.get_device_properties(index)
        for index in range(torch.cuda.device_count())
    }
    devices = {name: {"name": p.name, "nbytes": p.total_memory} for name, p in cuda.items()}
    kernels = {}
    for device in ("cpu", *devices):
        chosen = kernel(device)
        kernels[device] = {"name": chosen.name, "reason": chosen.reason}
    if as_json:
        _print_json(
            {
                "had_pipe": __version__,
                "python": platform.python_version(),
                "platform": platform.platform(),
                "packages": found,
                "threads": torch.get_num_threads(),
                "devices": devices,
                "delta_rule": kernels,
            }
        )
        return
    packages = []
    for package, number in found.items():
        extra = _EXTRA_PACKAGES.get(package, "")
        packages.append((package, number or f"not installed: pip install 'had-pipe[{extra}]'"))
    _print_facts(
        [
            ("had-pipe", __version__),
            ("Python", f"{platform.python_version()}, {platform.platform()}"),
            *packages,
            ("cpu", f"{torch.get_num_threads()} threads for torch"),
            *((name, f"{p.name}, {size(p.total_memory)}") for name, p in cuda.items()),
            *([] if cuda else [("cuda", "no device")]),
            *(
                ("delta rule", f"{k['name']} on {device}: {k['reason']}")
                for device, k in kernels.items()
            ),
        ]
    )


def main() -> None:
    """The entry point. SIGTERM stops like Ctrl-C, unless a verb handles it better meanwhile."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
