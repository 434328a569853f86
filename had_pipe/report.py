"""One run as one page: what was learnt, beside what costs nothing to know.

It reads run.json and metrics.jsonl, and nothing else: neither the cache nor the student is opened,
so a page can be made anywhere the run folder was copied to, also while the run is going on. What a
student's features look like is handed in (had_pipe.features).
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from had_pipe import page, portrait
from had_pipe.page import Curve, Level, Panel, Picture
from had_pipe.run import STUDENT, Row, RunRecord, measured, read_run
from had_pipe.sizes import size
from had_pipe.verdicts import aligned_groups, percent, verdicts

if TYPE_CHECKING:
    from had_pipe.features import Features

_PAGE = "report.html"
_MOST_POINTS = 800
_READ_RATE = "read_bytes_per_second"


def write_report(run: Path, out: Path | None = None, *, features: Features | None = None) -> Path:
    """Write the page of one run, into its folder unless `out` names a file. Returns the page."""
    record = read_run(run)
    written = run / _PAGE if out is None else out
    caches = record.run.get("caches", [])
    weights = record.run.get("recipe", {}).get("train", {}).get("weights") or []
    teachers = {cache.get("plan", {}).get("teacher", {}).get("name", "") for cache in caches}
    page.write_page(
        written,
        "report.html.j2",
        name=record.folder.resolve().name,
        teachers=sorted(teacher for teacher in teachers if teacher),
        finished=record.step >= record.steps,
        progress=f"{record.step:,} of {record.steps:,} steps",
        verdicts=verdicts(record),
        figures=[page.drawn(picture) for picture in _pictures(record)],
        columns=["", "total loss", "alignment error", "cosine", "cross-entropy", "accuracy"],
        comparison=_comparison(record),
        portrait=[page.drawn(one) for one in portrait.pictures(features)] if features else [],
        portrait_said=portrait.said(features) if features else _why_no_features(record),
        run_facts=_run_facts(record),
        student_facts=_student_facts(record),
        caches=[
            _cache_facts(cache, *weights[place : place + 1]) for place, cache in enumerate(caches)
        ],
        recipe=recipe_text(record.run.get("recipe", {})),
        environment=_environment(record),
    )
    return written


# Pictures of the run


@dataclass(frozen=True, kw_only=True)
class _Axes:
    """One pair of axes: a column of the metrics over steps, and its floors."""

    key: str
    label: str
    floors: tuple[tuple[str, str, str], ...] = ()
    """Key among the floors, colour, name."""
    zero: bool = False
    least: float = 0.0
    scale: float = 1.0
    """What a figure of the metrics is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class _Chart:
    name: str
    title: str
    caption: str
    axes: tuple[_Axes, ...]


_EMBEDDING_FLOORS = {
    term: (
        (f"mean_{term}", page.FLOOR_MEAN, "floor: the mean"),
        (f"kmer_{term}", page.FLOOR_KMER, "floor: k-mer table"),
    )
    for term in ("align", "cosine")
}
_CHARTS = (
    _Chart(
        name="loss",
        title="Loss",
        caption="The weighted sum of both terms.",
        axes=(_Axes(key="loss", label="total loss"),),
    ),
    _Chart(
        name="align",
        title="Alignment with the teacher",
        caption="Error on {groups}; lower is better. The mean predictor knows nothing of "
        "the sequence, the k-mer table nothing of context.",
        axes=(_Axes(key="align", label="{error}", floors=_EMBEDDING_FLOORS["align"]),),
    ),
    _Chart(
        name="reconstruct",
        title="Reconstruction of masked bases",
        caption="Lower is better. Base frequencies are what a model without any context can reach.",
        axes=(
            _Axes(
                key="reconstruct",
                label="cross-entropy, nats",
                floors=(
                    ("base_frequency_cross_entropy", page.FLOOR_MEAN, "floor: base frequencies"),
                ),
            ),
        ),
    ),
    _Chart(
        name="accuracy",
        title="Masked bases named correctly",
        caption="Higher is better.",
        axes=(
            _Axes(
                key="accuracy",
                label="share right",
                floors=(("base_frequency_accuracy", page.FLOOR_MEAN, "floor: the commonest base"),),
            ),
        ),
    ),
    _Chart(
        name="cosine",
        title="Cosine with the teacher's embeddings",
        caption="Higher is better; read it beside its floors, which need not be near 0.",
        axes=(_Axes(key="cosine", label="cosine", floors=_EMBEDDING_FLOORS["cosine"]),),
    ),
    _Chart(
        name="rate",
        title="Learning rate and gradient",
        caption="The norm is before clipping.",
        axes=(
            _Axes(key="lr", label="learning rate", zero=True),
            _Axes(key="grad_norm", label="gradient norm", zero=True),
        ),
    ),
    _Chart(
        name="speed",
        title="Speed, and time spent waiting for data",
        caption="Since the line of metrics before. A share near 0 means that reading never held "
        "up training.",
        axes=(
            _Axes(key="bases_per_second", label="bases a second", zero=True),
            _Axes(key="wait_share", label="share waiting", zero=True, least=0.05),
            _Axes(key=_READ_RATE, label="MB read a second", zero=True, scale=1e-6),
        ),
    ),
)


_ERRORS = {"mse": "mean squared error", "smooth_l1": "smooth L1 error, doubled"}


def _pictures(record: RunRecord) -> Iterator[Picture]:
    """Everything that was measured; a term of weight 0 has no picture."""
    note = ""
    if len(record.train) > _MOST_POINTS:
        note = f" Lines of metrics are averaged to {_MOST_POINTS} points."
    words = {
        "groups": aligned_groups(record),
        "error": _ERRORS.get(record.asked("objective", "error"), "error"),
    }
    for chart in _CHARTS:
        axes = [one for one in chart.axes if any(measured(row, one.key) for row in record.train)]
        if axes:
            yield Picture(
                name=chart.name,
                title=chart.title,
                caption=chart.caption.format(**words) + note,
                panels=[_panel(one, one.label.format(**words), record) for one in axes],
            )


def _panel(axes: _Axes, label: str, record: RunRecord) -> Panel:
    x, y = thinned(record.train, axes.key)
    curves = [Curve(x=x, y=y * axes.scale, colour=page.TRAIN, label="training batches")]
    x, y = thinned(record.validation, axes.key)
    if len(x):
        held = Curve(x=x, y=y * axes.scale, colour=page.HELD, label="held out", heavy=True)
        curves.append(held)
    floors = record.floors or {}
    return Panel(
        label=label,
        curves=curves,
        levels=[
            Level(y=floors[key], colour=colour, label=name, dotted=colour == page.FLOOR_MEAN)
            for key, colour, name in axes.floors
            if measured(floors, key)
        ],
        zero=axes.zero,
        least=axes.least,
    )


def thinned(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """Steps and values, at most _MOST_POINTS of them, each the mean of its neighbours."""
    kept = [row for row in rows if measured(row, "step", key)]
    x = np.array([row["step"] for row in kept], dtype=float)
    y = np.array([row[key] for row in kept], dtype=float)
    if len(x) > _MOST_POINTS:
        x = np.array([piece.mean() for piece in np.array_split(x, _MOST_POINTS)])
        y = np.array([piece.mean() for piece in np.array_split(y, _MOST_POINTS)])
    return x, y


def _why_no_features(record: RunRecord) -> list[str]:
    """What is missing, and how to get it."""
    if not (record.folder / STUDENT).is_dir():
        return ["Shown once the run is finished and its student published."]
    if not record.validation:
        return ["Left out: no windows were held out."]
    return [
        "Left out, for the cache is not read unless it is named: had-pipe report RUN --cache PATH "
        "adds the student's features beside the teacher's on held-out windows."
    ]


# Tables


def _facts(*pairs: tuple[str, object]) -> list[tuple[str, str]]:
    """The pairs that say something, as text."""
    return [(name, str(value)) for name, value in pairs if value not in (None, "", {}, [])]


def _run_facts(record: RunRecord) -> list[tuple[str, str]]:
    train = record.train
    told = _facts(
        ("steps", f"{record.step:,} of {record.steps:,}"),
        ("time in training", _duration(train[-1]["seconds"]) if train else None),
        ("epochs", f"{train[-1]['epoch']:.2f}" if train and measured(train[-1], "epoch") else None),
    )
    # The first line pays for the start of the threads and the kernels.
    steady = train[1:] or train
    for name, key in (
        ("windows a second, median", "windows_per_second"),
        ("k-mers a second, median", "kmers_per_second"),
        ("bases a second, median", "bases_per_second"),
    ):
        found = [row[key] for row in steady if measured(row, key)]
        if found:
            told.append((name, _round(statistics.median(found))))
    waits = [row["wait_share"] for row in steady if measured(row, "wait_share")]
    if waits:
        told.append(("waiting for data, median", percent(statistics.median(waits))))
    return told + _reading_facts(record)


def _environment(record: RunRecord) -> list[tuple[str, str]]:
    """What the training ran on and with."""
    run = record.run
    kernel = run.get("kernel") or {}
    return _facts(
        ("device", run.get("device")),
        ("delta-rule kernel", kernel.get("name")),
        ("why this kernel", kernel.get("reason")),
        *(run.get("versions") or {}).items(),
    )


def _reading_facts(record: RunRecord) -> list[tuple[str, str]]:
    """What training read, and where from."""

    def total(key: str) -> float | None:
        found = [row[key] for row in record.train if measured(row, key)]
        return sum(found) if found else None

    nbytes, hits, misses = total("read_bytes"), total("mirror_hits"), total("mirror_misses")
    rates = [r[_READ_RATE] for r in record.train if measured(r, _READ_RATE)]
    told = []
    if nbytes is not None:
        told.append(("read from the cache", size(nbytes)))
    if rates:
        told.append(("read a second, median", size(statistics.median(rates))))
    if hits is not None and misses is not None and hits + misses > 0:
        told.append(("objects found in the mirror", percent(hits / (hits + misses))))
        told.append(("downloaded", size(total("mirror_downloaded_bytes") or 0)))
    return told


# Keys of a student's configuration that say nothing of its layout.
_BOOKKEEPING = {"model_type", "transformers_version", "pad_token_id", "initializer_range"}


def _student_facts(record: RunRecord) -> list[tuple[str, str]]:
    student = record.run.get("student", {})
    config = student.get("config", {})
    parameters, others = student.get("parameters"), record.run.get("objective_parameters")
    return _facts(
        ("parameters", f"{parameters:,}" if parameters else None),
        ("besides, while training", f"{others:,} (projection and decoder)" if others else None),
    ) + _facts(
        *(
            (key.replace("_", " "), value)
            for key, value in _scalars(config)
            if key not in _BOOKKEEPING
        )
    )


def _cache_facts(cache: Mapping[str, Any], weight: object = None) -> list[tuple[str, str]]:
    plan = cache.get("plan", {})
    teacher, windows = plan.get("teacher", {}), plan.get("windows", {})
    told = _facts(
        ("cache id", cache.get("id")),
        ("read from", cache.get("url")),
        ("weight among the caches", weight),
        ("teacher", teacher.get("name")),
        ("revision", teacher.get("revision")),
        ("weights SHA-256", teacher.get("weights_sha256")),
        ("settings SHA-256", teacher.get("settings_sha256")),
        ("layer", teacher.get("layer")),
        ("sees at masked k-mers", teacher.get("input")),
        ("channels", teacher.get("channels")),
    )
    for genome in plan.get("genomes", ()):
        told += _facts(
            ("genome", f"{genome['name']}, {genome['bases']:,} bases"),
            ("genome digest", genome.get("digest")),
        )
    if windows:
        told += _facts(
            ("window", f"{windows['bases']:,} bases, every {windows['stride']:,}"),
            ("masked", f"{windows['masked']} of {windows['kmers']} k-mers"),
            ("stored", f"{windows['stored']} k-mers a window ({windows['store']})"),
        )
    for name, split in plan.get("splits", {}).items():
        views = len(split.get("views", ()))
        told.append((f"split {name}", f"{split['windows']:,} windows, {_count(views, 'view')}"))
    told += _facts(("codec", plan.get("codec")))
    told += [
        (f"fidelity: {key.replace('_', ' ')}", f"{value:,.6g}" if _number(value) else str(value))
        for key, value in _scalars(cache.get("fidelity") or {})
    ]
    return told + _facts(
        ("licence", plan.get("licence")), ("reason for this licence", plan.get("licence_reason"))
    )


def _scalars(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return [
        (key, value)
        for key, value in table.items()
        if value is None or isinstance(value, str | int | float)
    ]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe's tables as TOML; keys without a value are left out, as in a recipe."""
    lines: list[str] = []
    for name, table in recipe.items():
        lines += ["", f"[{name}]"]
        lines += [f"{key} = {_toml(value)}" for key, value in table.items() if value is not None]
    return "\n".join(lines).strip()


def _toml(value: object) -> str:
    """A value as JSON has it, which TOML reads too, but for one character in strings."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_FIGURES = ("loss", "align", "cosine", "reconstruct", "accuracy")
_FLOORS = {
    "the mean": {"align": "mean_align", "cosine": "mean_cosine"},
    "k-mer table": {"align": "kmer_align", "cosine": "kmer_cosine"},
    "base frequencies": {
        "reconstruct": "base_frequency_cross_entropy",
        "accuracy": "base_frequency_accuracy",
    },
}


def _comparison(record: RunRecord) -> list[tuple[str, list[str]]]:
    """First and last figures beside the floors: rows of one small table, each with its kind."""

    def cells(label: str, row: Row, keys: Mapping[str, str] | None = None) -> list[str]:
        shown = [label]
        for name in _FIGURES:
            key = name if keys is None else keys.get(name, "")
            shown.append(f"{row[key]:.4f}" if measured(row, key) else "")
        return shown

    table = []
    if record.train:
        first, last = record.train[0], record.train[-1]
        table.append(("", cells(f"training, step {first['step']:,}", first)))
        if last is not first:
            table.append(("", cells(f"training, step {last['step']:,}", last)))
    for row in record.validation[-1:]:
        table.append(("", cells(f"held out, step {row['step']:,}", row)))
    if record.floors is not None:
        for name, keys in _FLOORS.items():
            table.append(("floor", cells(f"floor: {name}", record.floors, keys)))
    return table


def _duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _round(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.4g}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
