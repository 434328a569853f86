"""The verbs of a finished student."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from had_pipe.cli.arguments import Device, DeviceOption
from had_pipe.cli.shown import answering, count, duration, print_facts, reporter
from had_pipe.errors import Interrupted


class Per(StrEnum):
    """What one row is the embedding of."""

    BASE = "base"
    KMER = "kmer"
    SEQUENCE = "sequence"


_SAID = {Per.BASE: "base", Per.KMER: "k-mer", Per.SEQUENCE: "sequence"}


@answering
def embed(
    fasta: Annotated[
        Path,
        typer.Argument(metavar="FASTA", help="Sequences: FASTA (plain, gzip, bgzip) or 2bit."),
    ],
    student: Annotated[
        Path,
        typer.Option(metavar="FOLDER", help="The student: its run's student folder, or a copy."),
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="What to make: NAME.parquet, or the folder NAME.zarr."),
    ],
    per: Annotated[
        Per,
        typer.Option(
            help="A row a base; a row a k-mer, the mean of six bases; or a row a sequence, the "
            "mean of its bases."
        ),
    ] = Per.SEQUENCE,
    window: Annotated[
        int | None,
        typer.Option(
            metavar="BASES",
            min=1,
            help="How much the student reads at once; as much as it was trained on unless said.",
        ),
    ] = None,
    overlap: Annotated[
        int | None,
        typer.Option(
            metavar="BASES",
            min=0,
            help="How much of that neighbouring windows of a long sequence share; a quarter "
            "unless said.",
        ),
    ] = None,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Write a student's embeddings of sequences of any length.

    Letters other than A, C, G and T, in either case, are to the student bases that it is not told.
    The file is there when it is whole.
    """
    from had_pipe.embed import embed as write

    with reporter() as report:
        try:
            made = write(
                fasta,
                student=student,
                out=out,
                per=per.value,
                window=window,
                overlap=overlap,
                device=device.value,
                report=report,
            )
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {out} was not made: run the same command again") from None
    if made.already_done:
        done = "nothing was left to do: they were there"
    else:
        done = f"{count(made.bases, 'base')} in {duration(made.seconds)}"
    print_facts(
        [
            ("sequences", f"{made.sequences:,}"),
            ("embedded", done),
            ("windows", f"of {made.window:,} bases, {made.overlap:,} shared with the next"),
            ("rows", f"{made.rows:,} of {made.channels:,} channels, one a {_SAID[per]}"),
            ("file", str(made.out)),
        ]
    )
