"""Pages: one self-contained HTML file, its pictures as SVG inside it, readable on a phone.

A page loads nothing from anywhere and runs no script. What stands on it is its caller's: this knows
curves, dots and tables, and nothing of runs.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import markupsafe
import matplotlib
import numpy as np
import numpy.typing as npt

from had_pipe import __version__
from had_pipe.durable import make_folder, write_file
from had_pipe.errors import RecipeError

matplotlib.use("Agg")
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline

# Colours are CSS variables, so that one SVG reads in the light, in the dark and on paper:
# matplotlib is given stand-ins, which are exchanged in its output.
_TEXT, _GRID = "currentColor", "var(--grid)"
TRAIN, HELD = "var(--train)", "var(--held)"
FLOOR_MEAN, FLOOR_KMER = "var(--floor-mean)", "var(--floor-kmer)"
PLAIN = "var(--plain)"
"""What belongs to none of several kinds."""
RAMP = tuple(f"var(--ramp-{i})" for i in range(7))
"""From little to much."""
KINDS = tuple(f"var(--kind-{i})" for i in range(8))
"""Kinds without an order."""
_COLOURS = (_TEXT, _GRID, TRAIN, HELD, FLOOR_MEAN, FLOOR_KMER, PLAIN, *RAMP, *KINDS)
_STAND_IN = {colour: f"#0101{i:02x}" for i, colour in enumerate(_COLOURS, start=1)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "text.color": _STAND_IN[_TEXT],
    "axes.labelcolor": _STAND_IN[_TEXT],
    "axes.edgecolor": _STAND_IN[_GRID],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _STAND_IN[_GRID],
    "grid.linewidth": 0.7,
    "xtick.color": _STAND_IN[_GRID],
    "ytick.color": _STAND_IN[_GRID],
    "xtick.labelcolor": _STAND_IN[_TEXT],
    "ytick.labelcolor": _STAND_IN[_TEXT],
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 7),
    "axes.formatter.use_mathtext": False,
    # It would take a dot, a stroke of no length, for nothing.
    "path.simplify": False,
}
_FEW = 40
_NOTHING = 1e-9
"""An axis that starts at 0 ends above this: of zeros alone it would have no length."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Figures over steps; without a label it has no place in the legend."""

    x: npt.ArrayLike
    y: npt.ArrayLike
    colour: str
    label: str = ""
    faint: bool = False
    heavy: bool = False
    """Every point is marked, however many there are."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A figure that does not change: a floor."""

    y: float
    colour: str
    label: str
    dotted: bool = False


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Curves and levels in one pair of axes."""

    label: str
    """Of the vertical axis."""
    curves: Sequence[Curve]
    levels: Sequence[Level] = ()
    zero: bool = False
    """Whether the vertical axis starts at 0."""
    least: float = 0.0
    """It reaches at least this."""


@dataclass(frozen=True, kw_only=True)
class Dots:
    """Points (P, 2) of one kind."""

    at_P2: npt.NDArray[Any]
    colour: str
    label: str


@dataclass(frozen=True, kw_only=True)
class Cloud:
    """Points in a square around 0, both axes of one scale."""

    label: str
    dots: Sequence[Dots]
    limit: float
    """How far the axes reach; what lies beyond is set on the edge."""
    axes: tuple[str, str] = ("", "")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """Panels side by side under one title, with one legend."""

    name: str
    """Of this picture alone on its page."""
    title: str
    caption: str
    panels: Sequence[Panel | Cloud]


def write_page(page: Path, template: str, **values: Any) -> None:
    """Fill in a template of the package and write the page, whole or not at all.

    Raises RecipeError where `page` is a folder, StorageError where the disk fails.
    """
    if page.is_dir():
        raise RecipeError(f"{page}: is a folder; name a file in it, such as {page / 'page.html'}")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(
            lambda name: files("had_pipe").joinpath(name).read_text("utf-8")
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template(template).render(version=__version__, **values)
    make_folder(page.parent)
    # Half characters, which JSON may hold, are no text that could be written.
    write_file(page, html.encode("utf-8", "replace"), aside=page.parent)


def drawn(picture: Picture) -> dict[str, Any]:
    """A picture as the templates show it."""
    return {
        "title": picture.title,
        "caption": picture.caption,
        "wide": len(picture.panels) > 1,
        "legend": _legend(picture),
        "panels": [
            _svg(f"{picture.name}-{place}", f"{picture.title}: {panel.label}", panel)
            for place, panel in enumerate(picture.panels)
        ],
    }


def _legend(picture: Picture) -> list[tuple[str, str, str]]:
    """Kind of mark, colour and words, each once; none where there is one alone."""
    told: dict[tuple[str, str, str], None] = {}
    for panel in picture.panels:
        if isinstance(panel, Cloud):
            told |= {("dot", dots.colour, dots.label): None for dots in panel.dots}
        else:
            told |= {("line", c.colour, c.label): None for c in panel.curves if c.label}
            for level in panel.levels:
                told["dotted" if level.dotted else "dashed", level.colour, level.label] = None
    return list(told) if len(told) > 1 else []


def _svg(name: str, title: str, panel: Panel | Cloud) -> markupsafe.Markup:
    """One pair of axes as SVG to stand inside a page."""
    cloud = isinstance(panel, Cloud)
    fill: Callable[[Axes, Any], None] = _fill_cloud if cloud else _fill_panel
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(4.4, 4.2) if cloud else (5.0, 2.9))
        figure.patch.set_alpha(0)
        # Of one place in all pictures: to measure every label first takes as long as drawing.
        ax = figure.add_axes((0.08, 0.08, 0.88, 0.85) if cloud else (0.16, 0.17, 0.82, 0.75))
        ax.patch.set_alpha(0)
        fill(ax, panel)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # A hundredth of a point is beyond seeing, and paths are most of a page.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)
    for colour, stand_in in _STAND_IN.items():
        svg = svg.replace(stand_in, colour)
    # Several share one page, so every id takes the panel's name.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    opening = f'<svg role="img" aria-label="{markupsafe.escape(title)}" '
    return markupsafe.Markup(svg.replace("<svg ", opening, 1))


def _fill_panel(ax: Axes, panel: Panel) -> None:
    ax.set_ylabel(panel.label)
    ax.set_xlabel("step")
    for curve in panel.curves:
        x = np.asarray(curve.x)
        ax.plot(
            x,
            np.asarray(curve.y),
            color=_STAND_IN[curve.colour],
            alpha=0.45 if curve.faint else 1,
            lw=0.9 if curve.faint else 1.5,
            marker="o" if curve.heavy or (len(x) <= _FEW and not curve.faint) else "",
            ms=4.5 if curve.heavy else 3,
            zorder=4 if curve.heavy else 3,
        )
    for level in panel.levels:
        dashes = (1.5, 1.5) if level.dotted else (5, 2)
        ax.axhline(level.y, color=_STAND_IN[level.colour], lw=1.5, dashes=dashes, zorder=2)
    ax.set_xlim(left=0)
    if panel.zero:
        ax.set_ylim(bottom=0, top=max(ax.get_ylim()[1], panel.least, _NOTHING))


def _fill_cloud(ax: Axes, cloud: Cloud) -> None:
    ax.set_title(cloud.label, fontsize=11)
    ax.set_xlabel(cloud.axes[0])
    ax.set_ylabel(cloud.axes[1])
    for dots in cloud.dots:
        at_P2 = np.clip(dots.at_P2, -cloud.limit, cloud.limit)
        # All dots of a kind are one path of strokes without length, whose round ends are seen: a
        # tenth of what as many markers take.
        ends_2P2 = np.repeat(at_P2, 2, axis=0)
        codes = np.tile([Outline.MOVETO, Outline.LINETO], len(at_P2))
        ax.add_patch(
            PathPatch(
                Outline(ends_2P2, codes),
                edgecolor=_STAND_IN[dots.colour],
                fill=False,
                capstyle="round",
                lw=3.4,
                alpha=0.75,
                zorder=3,
                clip_on=False,
            )
        )
    ax.set_xlim(-cloud.limit, cloud.limit)
    ax.set_ylim(-cloud.limit, cloud.limit)
    ax.set_aspect("equal")
    ax.tick_params(labelbottom=False, labelleft=False, length=0)
