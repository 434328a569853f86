"""Runs side by side: in which keys of the recipe they differ, and what came of it.

Only figures of the same held-out windows stand in one table. Runs that differ in nothing but the
seed are one setting, with their mean and spread. It reads run.json and metrics.jsonl.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from had_pipe import page
from had_pipe.errors import RecipeError
from had_pipe.page import Curve, Level, Panel, Picture
from had_pipe.run import RunRecord, identity, meant, measured, read_run, run_id

PAGE = "compare.html"
_SEED = "train.seed"
_OF_TABLE = "of_kmer_table"
FIGURES = {
    "loss": "total loss",
    "align": "alignment error",
    _OF_TABLE: "of the k-mer table's",
    "cosine": "cosine",
    "reconstruct": "cross-entropy",
    "accuracy": "accuracy",
    "windows_per_second": "windows/s",
}
"""What is compared, as headings; the last is of training."""
_FLOORS = {
    "floor: k-mer table": {"align": "kmer_align", "cosine": "kmer_cosine"},
    "floor: the mean": {"align": "mean_align", "cosine": "mean_cosine"},
    "floor: base frequencies": {
        "reconstruct": "base_frequency_cross_entropy",
        "accuracy": "base_frequency_accuracy",
    },
}
# Figures of one table that nevertheless are not of one thing, by the keys that make them so.
_APART = (
    (("objective.target", "objective.error"), "alignment errors are in different units"),
    (("objective.align_on",), "alignment errors and cosines are of different k-mers"),
    (("objective.masking",), "cross-entropy and accuracy are of different bases"),
    (("objective.align", "objective.reconstruct"), "total losses weigh their terms differently"),
)


@dataclass(frozen=True, kw_only=True)
class OneRun:
    """What one run came to."""

    name: str
    folder: Path
    run_id: str
    caches: tuple[str, ...]
    seed: int
    step: int
    steps: int
    figures: Mapping[str, float]
    """Of the last validation, by the keys of FIGURES; those that were measured."""
    curves: Mapping[str, Sequence[float]]
    """Validations: their steps under "step", and each figure at these, None where not measured."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Runs of one recipe, a seed each."""

    label: str
    values: Mapping[str, object]
    """Of the keys in which the runs compared differ."""
    runs: tuple[OneRun, ...]
    mean: Mapping[str, float]
    """Of figures that all its runs have."""
    spread: Mapping[str, float]
    """Standard deviation of single runs; empty of one."""
    floors: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Settings that were measured on the same held-out windows."""

    held_out: str
    settings: tuple[Setting, ...]
    notes: tuple[str, ...]
    """Which of its figures are not of one thing."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side."""

    keys: tuple[str, ...]
    """In which recipes differ, but for the seed."""
    tables: tuple[Table, ...]
    notes: tuple[str, ...]


def compare(folders: Sequence[Path]) -> Comparison:
    """Read the runs and hold them against each other. Raises RecipeError, InputError."""
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RecipeError("a run is given twice: name each once")
    if len(folders) < 2:
        raise RecipeError("one run alone compares with nothing: name two or more")
    records = [read_run(folder) for folder in folders]
    names = _names(folders)
    identities = [identity(record.run) for record in records]
    every_key = list(dict.fromkeys(key for one in identities for key in one))
    keys = tuple(
        key
        for key in every_key
        if key != _SEED and len({_as_text(meant(key, one.get(key))) for one in identities}) > 1
    )
    # Tables by what was held out, in them settings by all but the seed; both as first met.
    tables: dict[str, dict[str, list[int]]] = {}
    for i, (record, one) in enumerate(zip(records, identities, strict=True)):
        setting = _as_text({key: meant(key, value) for key, value in one.items() if key != _SEED})
        tables.setdefault(_held_out(record), {}).setdefault(setting, []).append(i)
    made = []
    for held_out, settings in tables.items():
        rows = tuple(
            _setting(
                [names[i] for i in some], [records[i] for i in some], identities[some[0]], keys
            )
            for some in settings.values()
        )
        made.append(Table(held_out=held_out, settings=rows, notes=tuple(_apart(rows))))
    return Comparison(keys=keys, tables=tuple(made), notes=tuple(_notes(made)))


def write_comparison(found: Comparison, out: Path) -> None:
    """Write a comparison as one page."""
    page.write_page(
        out,
        "compare.html.j2",
        names=[run.name for table in found.tables for row in table.settings for run in row.runs],
        notes=found.notes,
        tables=[
            {
                "held_out": table.held_out,
                "notes": table.notes,
                "heads": headings(found),
                "rows": list(rows(found, table)),
                "pictures": [page.drawn(one) for one in _pictures(table, f"held-out-{i}")],
            }
            for i, table in enumerate(found.tables)
        ],
        runs=[
            (run.name, [("run id", run.run_id), *(("cache id", one) for one in run.caches)])
            for table in found.tables
            for row in table.settings
            for run in row.runs
        ],
    )


def headings(found: Comparison) -> list[str]:
    """Of the columns of `rows`."""
    return ["run", *_columns(found), "seed", "steps", *FIGURES.values()]


def _columns(found: Comparison) -> list[str]:
    """The keys that have a column; which caches it was stands above each table."""
    return [key for key in found.keys if not key.startswith("cache")]


def rows(found: Comparison, table: Table) -> Iterator[tuple[str, list[str]]]:
    """A table in words: each row's kind ("", "mean" or "floor") and its cells."""
    columns = _columns(found)
    for row in table.settings:
        values = [_shown(row.values[key]) for key in columns]
        for run in row.runs:
            steps = f"{run.step:,}" if run.step == run.steps else f"{run.step:,} of {run.steps:,}"
            yield "", [run.name, *values, str(run.seed), steps, *_cells(run.figures)]
        if len(row.runs) > 1:
            name = f"mean ± sd of {len(row.runs)} seeds"
            yield "mean", [name, *values, "", "", *_cells(row.mean, row.spread)]
    empty = [""] * (len(columns) + 2)
    for name, floors in _FLOORS.items():
        distinct: dict[str, list[Setting]] = {}
        for row in table.settings:
            figures = {
                key: row.floors[floor] for key, floor in floors.items() if floor in row.floors
            }
            if figures:
                distinct.setdefault(_as_text(figures), []).append(row)
        for text, some in distinct.items():
            whose = "" if len(distinct) == 1 else f" ({'; '.join(row.label for row in some)})"
            yield "floor", [name + whose, *empty, *_cells(json.loads(text))]


def _shown(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


# How runs are read


def _names(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders, with as much of the path as tells them apart."""
    paths = [folder.resolve().parts for folder in folders]
    depth = 1
    while len({path[-depth:] for path in paths}) < len(paths):
        depth += 1
    return ["/".join(path[-depth:]) for path in paths]


def _as_text(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _held_out(record: RunRecord) -> str:
    """Which windows a run was measured on; equal words mean equal windows."""
    if not record.validation:
        return "nothing was held out or measured yet"
    caches = [cache["id"][:12] for cache in record.run["caches"]]
    return (
        f"the first {int(record.validation[-1]['windows']):,} windows of split "
        f"{record.asked('train', 'validation_split')!r} of "
        f"{'cache' if len(caches) == 1 else 'caches'} {', '.join(caches)}"
    )


def _one(name: str, record: RunRecord) -> OneRun:
    figures: dict[str, float] = {}
    floor = (record.floors or {}).get("kmer_align")
    lines = []
    for row in record.validation:
        line = {key: row[key] for key in FIGURES if measured(row, key)}
        if "align" in line and floor:
            line[_OF_TABLE] = line["align"] / floor
        lines.append(line)
    if lines:
        figures |= lines[-1]
    # The first line pays for the start of the threads and the kernels.
    steady = record.train[1:] or record.train
    rates = [row["windows_per_second"] for row in steady if measured(row, "windows_per_second")]
    if rates:
        figures["windows_per_second"] = statistics.median(rates)
    return OneRun(
        name=name,
        folder=record.folder,
        run_id=run_id(record.run),
        caches=tuple(cache["id"] for cache in record.run["caches"]),
        seed=record.asked("train", "seed"),
        step=record.step,
        steps=record.steps,
        figures=figures,
        curves={
            "step": [row["step"] for row in record.validation],
            **{
                key: [line[key] for line in lines]
                for key in FIGURES
                if lines and all(key in line for line in lines)
            },
        },
    )


def _setting(
    names: Sequence[str],
    records: Sequence[RunRecord],
    values: Mapping[str, Any],
    keys: Sequence[str],
) -> Setting:
    runs = tuple(_one(name, record) for name, record in zip(names, records, strict=True))
    common = [key for key in FIGURES if all(key in run.figures for run in runs)]
    figures = {key: [run.figures[key] for run in runs] for key in common}
    floors = records[0].floors or {}
    return Setting(
        label=", ".join(names),
        values={key: meant(key, values.get(key)) for key in keys},
        runs=runs,
        mean={key: statistics.fmean(found) for key, found in figures.items()},
        spread={key: statistics.stdev(found) for key, found in figures.items() if len(runs) > 1},
        floors={key: floors[key] for key in floors if measured(floors, key) and key != "windows"},
    )


# What must be said


def _apart(settings: Sequence[Setting]) -> Iterator[str]:
    for keys, what in _APART:
        differing = [
            key
            for key in keys
            if len({_as_text(row.values[key]) for row in settings if key in row.values}) > 1
        ]
        if differing:
            yield f"{' and '.join(differing)} differ{'s' * (len(differing) == 1)}: {what}"


def _notes(tables: Sequence[Table]) -> Iterator[str]:
    if len(tables) > 1:
        yield (
            "These runs were not measured on the same windows: figures of different tables cannot "
            "be held against each other"
        )
    for row in (row for table in tables for row in table.settings):
        seeds = [run.seed for run in row.runs]
        if len(set(seeds)) < len(seeds):
            yield f"{row.label}: of one recipe and one seed, so their spread is not that of seeds"
        for run in row.runs:
            if run.step < run.steps:
                yield f"{run.name} is not finished: {run.step:,} of {run.steps:,} steps so far"
            elif run.curves["step"] and run.curves["step"][-1] < run.step:
                yield (
                    f"{run.name} was last measured after step {int(run.curves['step'][-1]):,} of "
                    f"{run.step:,}"
                )


# How it looks


def _cells(figures: Mapping[str, float], spread: Mapping[str, float] | None = None) -> list[str]:
    def written(key: str, value: float) -> str:
        if key == _OF_TABLE:
            return f"{100 * value:.1f} %"
        return f"{value:.4f}" if key != "windows_per_second" else f"{value:.4g}"

    return [
        ""
        if key not in figures
        else written(key, figures[key])
        + (f" ± {written(key, spread[key])}" if spread and key in spread else "")
        for key in FIGURES
    ]


_PANELS = {
    _OF_TABLE: "alignment error / k-mer table's",
    "cosine": "cosine",
    "reconstruct": "cross-entropy, nats",
    "accuracy": "masked bases named right",
}


def _pictures(table: Table, name: str) -> Iterator[Picture]:
    """The held-out curves of a table; none where nothing was measured."""
    panels = [
        Panel(label=label, curves=curves, levels=list(_levels(key, table)))
        for key, label in _PANELS.items()
        if (curves := list(_curves(key, table)))
    ]
    if panels:
        many = any(len(row.runs) > 1 for row in table.settings)
        yield Picture(
            name=name,
            title="Held out, over training",
            caption="Cosine and accuracy: higher is better; the others: lower."
            + (" Heavy lines are means over seeds, thin ones single runs." if many else ""),
            panels=panels,
        )


def _curves(key: str, table: Table) -> Iterator[Curve]:
    for i, row in enumerate(table.settings):
        colour = page.KINDS[i % len(page.KINDS)]
        found = [
            dict(zip(run.curves["step"], run.curves[key], strict=True))
            for run in row.runs
            if key in run.curves
        ]
        if not found:
            continue
        steps = sorted(set.intersection(*(set(one) for one in found)))
        y = [statistics.fmean(one[step] for one in found) for step in steps]
        yield Curve(x=steps, y=y, colour=colour, label=row.label, heavy=True)
        if len(found) > 1:
            for one in found:
                yield Curve(x=list(one), y=list(one.values()), colour=colour, faint=True)


def _levels(key: str, table: Table) -> Iterator[Level]:
    """Floors, where they are the same for all."""
    if key == _OF_TABLE:
        yield Level(y=1.0, colour=page.FLOOR_KMER, label="floor: k-mer table")
        return
    for name, floors in _FLOORS.items():
        found = {row.floors.get(floors.get(key, "")) for row in table.settings}
        if len(found) == 1 and (level := found.pop()) is not None:
            of_table = "k-mer" in name
            colour = page.FLOOR_KMER if of_table else page.FLOOR_MEAN
            yield Level(y=level, colour=colour, label=name, dotted=not of_table)
