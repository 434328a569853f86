"""One run as one self-contained HTML page: what was learnt, beside what costs nothing to know.

It reads run.json and metrics.jsonl, and nothing else: neither the cache nor the student is opened,
so a page can be made anywhere the run folder was copied to, also while the run is going on. The
page loads nothing from anywhere: its figures are SVG inside it, and there is no script.
"""

from __future__ import annotations

import io
import json
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
import numpy as np

from had_pipe import __version__
from had_pipe.durable import make_folder, write_file
from had_pipe.run import Row, RunRecord, read_run
from had_pipe.sizes import size

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_PAGE = "report.html"
_MOST_POINTS = 800
_READ_RATE = "read_bytes_per_second"


def write_report(run: Path, out: Path | None = None) -> Path:
    """Write the page of one run, into its folder unless `out` names a file. Returns the page."""
    record = read_run(run)
    page = run / _PAGE if out is None else out
    html = _render(record)
    make_folder(page.parent)
    write_file(page, html.encode("utf-8"), aside=page.parent)
    return page


# What the numbers say


def verdicts(record: RunRecord) -> list[str]:
    """The run in plain sentences, each figure beside its floor; never more than was measured."""
    said = []
    if record.step < record.steps:
        said.append(
            f"This run is not finished: {record.step:,} of {record.steps:,} steps so far. "
            "What follows holds for this moment."
        )
    if not record.train:
        return [*said, "Nothing has been measured yet."]
    if not record.validation:
        return [
            *said,
            "No windows were held out, so nothing here is measured on DNA the student has not "
            "seen: the figures are those of training batches.",
        ]
    last, floors = record.validation[-1], record.floors
    if floors is not None:
        said += [*_alignment(last, floors), *_reconstruction(last, floors)]
    said.append(
        f"Measured on {int(last['windows']):,} held-out windows after step {int(last['step']):,}."
    )
    return said


def _alignment(last: Row, floors: Row) -> list[str]:
    if not _numbers(last, "align") or not _numbers(floors, "mean_align", "kmer_align"):
        return []
    align, mean, table = last["align"], floors["mean_align"], floors["kmer_align"]
    if min(mean, table) <= 0:
        return ["The teacher's embeddings are alike for every k-mer: alignment says nothing here."]
    beyond_mean, beyond_table = 1 - align / mean, 1 - align / table
    if beyond_table > 0:
        table_says = (
            f"It explains {_percent(beyond_table)} of what a k-mer table (the mean embedding of "
            "each k-mer, without any context) leaves unexplained."
        )
    else:
        table_says = (
            "It does not beat the k-mer table (the mean embedding of each k-mer): its error is "
            f"{_larger(-beyond_table)}, so alignment does not show yet that it reads context."
        )
    if beyond_mean > 0:
        mean_says = (
            f"The student explains {_percent(beyond_mean)} of the variance of the teacher's "
            "embeddings on visible k-mers."
        )
    else:
        mean_says = (
            "The student does not yet explain the teacher's embeddings better than their plain "
            f"mean does: its error is {_larger(-beyond_mean)}."
        )
    return [mean_says, table_says]


def _reconstruction(last: Row, floors: Row) -> list[str]:
    if not _numbers(last, "accuracy") or not _numbers(floors, "base_frequency_accuracy"):
        return []
    accuracy, commonest = last["accuracy"], floors["base_frequency_accuracy"]
    sentence = (
        f"Masked-base accuracy {accuracy:.3f}, against {commonest:.3f} for always naming the "
        "commonest base"
    )
    if _numbers(last, "reconstruct") and _numbers(floors, "base_frequency_cross_entropy"):
        gain = floors["base_frequency_cross_entropy"] - last["reconstruct"]
        sentence += (
            f"; cross-entropy {abs(gain):.4f} nats {'below' if gain > 0 else 'above'} that of the "
            "base frequencies"
        )
    better = accuracy > commonest
    return [sentence + ("." if better else ": masked bases are not learnt yet.")]


def _numbers(row: Row, *keys: str) -> bool:
    """Whether the row holds a finite number under each key."""
    return all(isinstance(row.get(key), int | float) and math.isfinite(row[key]) for key in keys)


def _larger(share: float) -> str:
    return "the same" if share < 0.0005 else f"{_percent(share)} larger"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# Figures. Colours are CSS variables, so that one SVG reads in the light, in the dark and on paper:
# matplotlib is given stand-ins, which are exchanged in its output.

_INK = {
    "#010101": "currentColor",
    "#020202": "var(--grid)",
    "#030303": "var(--train)",
    "#040404": "var(--held)",
    "#050505": "var(--floor-mean)",
    "#060606": "var(--floor-kmer)",
}
_TEXT, _GRID, _TRAIN, _HELD, _MEAN, _KMER = _INK
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 9.5,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "grid.linewidth": 0.7,
    "xtick.color": _GRID,
    "ytick.color": _GRID,
    "xtick.labelcolor": _TEXT,
    "ytick.labelcolor": _TEXT,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 7),
    "axes.formatter.use_mathtext": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One pair of axes: a column of the metrics over steps, and its floors."""

    key: str
    label: str
    floors: tuple[tuple[str, str, str], ...] = ()
    """Key among the floors, colour, name."""
    zero: bool = False
    """Whether the axis starts at 0."""
    least: float = 0.0
    """The axis reaches at least this."""
    scale: float = 1.0
    """What a figure of the metrics is multiplied with."""


@dataclass(frozen=True, kw_only=True)
class _Chart:
    name: str
    title: str
    caption: str
    panels: tuple[_Panel, ...]
    wide: bool = False
    """Panels side by side over the whole page, not one below the other."""


_EMBEDDING_FLOORS = {
    term: (
        (f"mean_{term}", _MEAN, "floor: the mean"),
        (f"kmer_{term}", _KMER, "floor: k-mer table"),
    )
    for term in ("align", "cosine")
}
_CHARTS = (
    _Chart(
        name="loss",
        title="Loss",
        caption="The weighted sum of both terms.",
        panels=(_Panel(key="loss", label="total loss"),),
    ),
    _Chart(
        name="align",
        title="Alignment with the teacher",
        caption="Error on visible k-mers; lower is better. The mean predictor knows nothing of "
        "the sequence, the k-mer table nothing of context.",
        panels=(
            _Panel(key="align", label="mean squared error", floors=_EMBEDDING_FLOORS["align"]),
        ),
    ),
    _Chart(
        name="reconstruct",
        title="Reconstruction of masked bases",
        caption="Lower is better. Base frequencies are what a model without any context can reach.",
        panels=(
            _Panel(
                key="reconstruct",
                label="cross-entropy, nats",
                floors=(("base_frequency_cross_entropy", _MEAN, "floor: base frequencies"),),
            ),
        ),
    ),
    _Chart(
        name="accuracy",
        title="Masked bases named correctly",
        caption="Higher is better.",
        panels=(
            _Panel(
                key="accuracy",
                label="share right",
                floors=(("base_frequency_accuracy", _MEAN, "floor: the commonest base"),),
            ),
        ),
    ),
    _Chart(
        name="cosine",
        title="Cosine with the teacher's embeddings",
        caption="Higher is better; read it beside its floors, which need not be near 0.",
        panels=(_Panel(key="cosine", label="cosine", floors=_EMBEDDING_FLOORS["cosine"]),),
    ),
    _Chart(
        name="rate",
        title="Learning rate and gradient",
        caption="The norm is before clipping.",
        panels=(
            _Panel(key="lr", label="learning rate", zero=True),
            _Panel(key="grad_norm", label="gradient norm", zero=True),
        ),
    ),
    _Chart(
        name="speed",
        title="Speed, and time spent waiting for data",
        caption="Since the line of metrics before. A share near 0 means that reading never held "
        "up training.",
        panels=(
            _Panel(key="bases_per_second", label="bases a second", zero=True),
            _Panel(key="wait_share", label="share waiting", zero=True, least=0.05),
            _Panel(key=_READ_RATE, label="MB read a second", zero=True, scale=1e-6),
        ),
        wide=True,
    ),
)


def _draw(chart: _Chart, record: RunRecord) -> markupsafe.Markup:
    """One chart as SVG to stand inside a page."""
    panels = [panel for panel in chart.panels if _measured(panel, record)]
    rows, columns = (1, len(panels)) if chart.wide else (len(panels), 1)
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": chart.name}):
        figure = Figure(figsize=(11.2, 2.6) if chart.wide else (5.6, 3.4), layout="constrained")
        figure.patch.set_alpha(0)
        axes = list(figure.subplots(rows, columns, sharex=True, squeeze=False).flat)
        for ax, panel in zip(axes, panels, strict=True):
            _draw_panel(ax, panel, record)
        for ax in axes[-columns:]:
            ax.set_xlabel("step")
            ax.set_xlim(left=0)
        if len(axes) == 1 and len(axes[0].get_legend_handles_labels()[1]) > 1:
            # Outside, so that it never lies on what it explains.
            figure.legend(loc="outside upper left", ncols=2)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    for stand_in, colour in _INK.items():
        svg = svg.replace(stand_in, colour)
    # Several charts share one page, so every id takes the chart's name.
    svg = re.sub(r'\bid="', f'id="{chart.name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{chart.name}-", svg)
    svg = re.sub(r'href="#', f'href="#{chart.name}-', svg)
    opening = f'<svg role="img" aria-label="{markupsafe.escape(chart.title)}" '
    return markupsafe.Markup(svg.replace("<svg ", opening, 1))


def _measured(panel: _Panel, record: RunRecord) -> bool:
    return any(_numbers(row, panel.key) for row in record.train)


def _draw_panel(ax: Axes, panel: _Panel, record: RunRecord) -> None:
    ax.patch.set_alpha(0)
    ax.set_ylabel(panel.label)
    x, y = _thin(record.train, panel.key)
    marker = "o" if len(x) <= 40 else ""
    y = y * panel.scale
    ax.plot(x, y, color=_TRAIN, label="training batches", lw=1.4, marker=marker, ms=3, zorder=3)
    x, y = _thin(record.validation, panel.key)
    if len(x):
        ax.plot(x, y, color=_HELD, label="held out", lw=1.6, marker="o", ms=4.5, zorder=4)
    for key, colour, label in panel.floors:
        if record.floors is not None and _numbers(record.floors, key):
            dashes = (5, 2) if colour == _KMER else (1.5, 1.5)
            level = record.floors[key]
            ax.axhline(level, color=colour, lw=1.5, dashes=dashes, label=label, zorder=2)
    if panel.zero:
        ax.set_ylim(bottom=0, top=max(ax.get_ylim()[1], panel.least))


def _thin(rows: Sequence[Row], key: str) -> tuple[Any, Any]:
    """Steps and values, at most _MOST_POINTS of them, each the mean of its neighbours."""
    kept = [row for row in rows if _numbers(row, "step", key)]
    x = np.array([row["step"] for row in kept], dtype=float)
    y = np.array([row[key] for row in kept], dtype=float)
    if len(x) > _MOST_POINTS:
        x = np.array([piece.mean() for piece in np.array_split(x, _MOST_POINTS)])
        y = np.array([piece.mean() for piece in np.array_split(y, _MOST_POINTS)])
    return x, y


def _figures(record: RunRecord) -> list[dict[str, Any]]:
    """The charts of everything that was measured; a term of weight 0 has none."""
    note = ""
    if len(record.train) > _MOST_POINTS:
        note = f" Lines of metrics are averaged to {_MOST_POINTS} points."
    return [
        {
            "title": chart.title,
            "caption": chart.caption + note,
            "wide": chart.wide,
            "svg": _draw(chart, record),
        }
        for chart in _CHARTS
        if any(_measured(panel, record) for panel in chart.panels)
    ]


# Tables


def _facts(*pairs: tuple[str, object]) -> list[tuple[str, str]]:
    """The pairs that say something, as text."""
    return [(name, str(value)) for name, value in pairs if value not in (None, "", {}, [])]


def _run_facts(record: RunRecord) -> list[tuple[str, str]]:
    run, train = record.run, record.train
    kernel = run.get("kernel") or {}
    told = _facts(
        ("steps", f"{record.step:,} of {record.steps:,}"),
        ("time in training", _duration(train[-1]["seconds"]) if train else None),
        ("epochs", f"{train[-1]['epoch']:.2f}" if train and _numbers(train[-1], "epoch") else None),
    )
    # The first line pays for the start of the threads and the kernels.
    steady = train[1:] or train
    for name, key in (
        ("windows a second, median", "windows_per_second"),
        ("k-mers a second, median", "kmers_per_second"),
        ("bases a second, median", "bases_per_second"),
    ):
        found = [row[key] for row in steady if _numbers(row, key)]
        if found:
            told.append((name, _round(statistics.median(found))))
    waits = [row["wait_share"] for row in steady if _numbers(row, "wait_share")]
    if waits:
        told.append(("waiting for data, median", _percent(statistics.median(waits))))
    told += _reading_facts(record)
    return told + _facts(
        ("device", run.get("device")),
        ("delta-rule kernel", kernel.get("name")),
        ("why this kernel", kernel.get("reason")),
    )


def _reading_facts(record: RunRecord) -> list[tuple[str, str]]:
    """What training read, and where from."""

    def total(key: str) -> float | None:
        found = [row[key] for row in record.train if _numbers(row, key)]
        return sum(found) if found else None

    nbytes, hits, misses = total("read_bytes"), total("mirror_hits"), total("mirror_misses")
    rates = [r[_READ_RATE] for r in record.train if _numbers(r, _READ_RATE)]
    told = []
    if nbytes is not None:
        told.append(("read from the cache", size(nbytes)))
    if rates:
        told.append(("read a second, median", size(statistics.median(rates))))
    if hits is not None and misses is not None and hits + misses > 0:
        told.append(("objects found in the mirror", _percent(hits / (hits + misses))))
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


def _recipe_text(recipe: Mapping[str, Any]) -> str:
    """The recipe as it would be written: one table after another."""
    lines: list[str] = []
    for name, section in recipe.items():
        for table in section if isinstance(section, list) else [section]:
            if not isinstance(table, dict):
                continue
            lines += ["", f"[[{name}]]" if isinstance(section, list) else f"[{name}]"]
            lines += [
                f"{key} = {json.dumps(value, ensure_ascii=False)}"
                for key, value in table.items()
                if value is not None
            ]
    return "\n".join(lines).strip()


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
    """First and last figures beside the floors: rows of one small table."""

    def cells(row: Row, keys: Mapping[str, str] | None = None) -> list[str]:
        shown = []
        for name in _FIGURES:
            key = name if keys is None else keys.get(name, "")
            shown.append(f"{row[key]:.4f}" if _numbers(row, key) else "")
        return shown

    table = []
    if record.train:
        first, last = record.train[0], record.train[-1]
        table.append((f"training, step {first['step']:,}", cells(first)))
        if last is not first:
            table.append((f"training, step {last['step']:,}", cells(last)))
    for row in record.validation[-1:]:
        table.append((f"held out, step {row['step']:,}", cells(row)))
    if record.floors is not None:
        for name, keys in _FLOORS.items():
            table.append((f"floor: {name}", cells(record.floors, keys)))
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


def _render(record: RunRecord) -> str:
    run = record.run
    template = files("had_pipe").joinpath("report.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    caches = run.get("caches", [])
    weights = run.get("recipe", {}).get("train", {}).get("weights") or []
    teachers = sorted(
        {cache.get("plan", {}).get("teacher", {}).get("name", "") for cache in caches}
    )
    return environment.from_string(template).render(
        name=record.folder.resolve().name,
        version=__version__,
        teachers=[teacher for teacher in teachers if teacher],
        finished=record.step >= record.steps,
        progress=f"{record.step:,} of {record.steps:,} steps",
        verdicts=verdicts(record),
        figures=_figures(record),
        columns=_FIGURES,
        comparison=_comparison(record),
        run_facts=_run_facts(record),
        student_facts=_student_facts(record),
        caches=[
            _cache_facts(cache, *weights[place : place + 1]) for place, cache in enumerate(caches)
        ],
        recipe=_recipe_text(run.get("recipe", {})),
        versions=_facts(*(run.get("versions") or {}).items()),
    )
