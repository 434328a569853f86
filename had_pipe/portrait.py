"""A student's features beside its teacher's, as had_pipe.features measured them, to be read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from had_pipe import page
from had_pipe.page import Cloud, Dots, Picture
from had_pipe.verdicts import percent

if TYPE_CHECKING:
    from had_pipe.features import Explained, Features


def said(features: Features) -> list[str]:
    told = [
        f"Measured with the published student on {features.windows:,} held-out windows of "
        + ("cache " if len(features.caches) == 1 else "caches ")
        + ", ".join(features.caches)
        + f". A group is a {features.kind} 6-mer in its window: the teacher's embedding of it, and "
        "the mean of the student's six features. Each channel of either was brought to mean 0 and "
        f"standard deviation 1. Every figure is of {features.groups:,} groups, of which "
        f"{len(features.teacher_P2):,} are drawn.",
        f"The two planes agree at {features.agreement:.2f} (1: the same picture, but for turning "
        "and scale).",
    ]
    kmers = features.kmers
    if kmers is not None:
        told.append(
            f"How far apart the mean features of {len(kmers.gc_K):,} 6-mers lie correlates with "
            f"the teacher's at {kmers.correlation:.2f}; counting the bases in which two 6-mers "
            f"differ gives {kmers.correlation_of_bases:.2f}, without any model"
            + (
                ": the student holds 6-mers alike as the teacher does, beyond their letters."
                if kmers.correlation > kmers.correlation_of_bases
                else ", so that the student shares more with the teacher than letters is not shown."
            )
        )
    if not _varied(features):
        told.append("Nothing is coloured by soft-masking: in that these windows are all alike.")
    return told


_GC = [f"{gc} of 6" for gc in range(7)]
_SOFT = ["none", "to a quarter", "to a half", "to three quarters", "more"]
_SOFT_COLOURS = [page.RAMP[i] for i in (0, 1, 3, 5, 6)]


def pictures(features: Features) -> Iterator[Picture]:
    both = (features.teacher_P2, features.student_P2)
    lies = (
        f"{percent(features.share.teacher)} of the teacher's variance lies in this plane, "
        f"{percent(features.share.student)} of the student's. "
    )
    yield _clouds(
        "groups-gc",
        "Groups by their G and C",
        f"Principal components of groups, the student's turned to the teacher's; {lies}"
        + _explained("How many G and C a 6-mer has", features.gc),
        both,
        features.gc_P,
        _GC,
        page.RAMP,
    )
    if _varied(features):
        yield _clouds(
            "groups-soft",
            "Groups by soft-masking",
            "The same points, by the share of their window that the genome has in lower case "
            "(repeats, mostly). " + _explained("It", features.soft),
            both,
            features.soft_level_P,
            _SOFT,
            _SOFT_COLOURS,
        )
    if features.feature_P is not None and features.feature is not None:
        names = list(features.features)
        yield _clouds(
            "groups-feature",
            "Groups by feature",
            "The same points, by the shortest feature of the annotation that covers them. "
            + _explained("It", features.feature),
            both,
            features.feature_P,
            names,
            [*page.KINDS[: len(names) - 1], page.PLAIN],
        )
    kmers = features.kmers
    if kmers is not None:
        yield _clouds(
            "kmers",
            "Learned 6-mer structure",
            f"One point for each 6-mer seen {kmers.least} times or more: the mean of its features "
            f"in all its contexts. {percent(kmers.share.teacher)} of the teacher's variance lies "
            f"in this plane, {percent(kmers.share.student)} of the student's; the planes agree at "
            f"{kmers.agreement:.2f}.",
            (kmers.teacher_K2, kmers.student_K2),
            kmers.gc_K,
            _GC,
            page.RAMP,
        )


def _varied(features: Features) -> bool:
    return len(np.unique(features.soft_level_P)) > 1


def _explained(what: str, found: Explained) -> str:
    return (
        f"{what} explains {percent(found.share.teacher)} of the variance of the teacher's groups "
        f"and {percent(found.share.student)} of the student's; shifted along the genome, "
        f"{percent(found.shifted.teacher)} and {percent(found.shifted.student)}."
    )


def _clouds(
    name: str,
    title: str,
    caption: str,
    both: tuple[Any, Any],
    kind_P: Any,
    names: Sequence[str],
    colours: Sequence[str],
) -> Picture:
    """The teacher's cloud and the student's, on axes of one scale."""
    # A hundredth of the points may lie outside and are set on the edge: they would shrink the rest.
    limit = 1.05 * max(float(np.quantile(np.abs(at_P2), 0.99)) for at_P2 in both)
    return Picture(
        name=name,
        title=title,
        caption=caption,
        panels=[
            Cloud(
                label=whose,
                dots=[
                    Dots(at_P2=at_P2[kind_P == i], colour=colours[i], label=names[i])
                    for i in range(len(names))
                    if (kind_P == i).any()
                ],
                limit=limit or 1.0,
                axes=axes,
            )
            for whose, at_P2, axes in zip(
                ("teacher", "student"),
                both,
                (
                    ("first component", "second component"),
                    ("turned to the teacher's first", "and second component"),
                ),
                strict=True,
            )
        ],
    )
