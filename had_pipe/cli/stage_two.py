"""The verbs of stage two: training a student, a page about it, and runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from had_pipe.cli.arguments import Device, DeviceOption, JsonOption, RecipeArgument
from had_pipe.cli.shown import (
    answering,
    as_json_object,
    continued,
    count,
    duration,
    print_facts,
    print_json,
    print_line,
    print_table,
    reporter,
    say_next,
)
from had_pipe.sizes import parse_size


@answering
def distill(
    recipe: RecipeArgument,
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH_OR_URL",
            help="Take this cache instead of the recipe's; repeat it to train on several.",
        ),
    ] = None,
    mirror: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where objects of a cache behind a URL are kept; $HAD_PIPE_MIRROR unless said, "
            "or else ~/.cache/had-pipe/mirror.",
        ),
    ] = None,
    mirror_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="How much that folder may hold, such as 200GB: beyond it, what was used longest "
            "ago is dropped. Nine tenths of the free room unless said.",
        ),
    ] = None,
    prefetch: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="How much is read ahead of training, such as 2GB; 256MiB unless said. Two batches "
            "are held in any case: 1,024 windows of 1 kb under a teacher of 1,024 channels are "
            "150 MB each.",
        ),
    ] = None,
    direct: Annotated[
        bool,
        typer.Option(
            "--direct", help="Read past the page cache, for disks that are faster than it."
        ),
    ] = False,
    through_zarr: Annotated[
        bool,
        typer.Option(
            "--through-zarr",
            help="Read embeddings through zarr-python, from a cache whose data.zarr another tool "
            "has laid out anew: slow, and only for stores whose maker you trust.",
        ),
    ] = False,
    device: DeviceOption = Device.AUTO,
) -> None:
    """Stage two: train a student.

    The same command starts, continues after a stop, and says when nothing is left. A cache may be
    a URL (http, https, s3, gs, az): it is then kept in a local folder as it is read.
    """
    from had_pipe.recipe import read_recipe

    asked = read_recipe(recipe)
    sizes = {
        option: None if text is None else parse_size(text, option=option)
        for option, text in (("--mirror-size", mirror_size), ("--prefetch", prefetch))
    }
    from had_pipe.distill import PREFETCH
    from had_pipe.distill import distill as train

    with reporter() as report:
        made = train(
            asked,
            caches=cache or None,
            mirror=mirror,
            mirror_nbytes=sizes["--mirror-size"],
            prefetch=sizes["--prefetch"] or PREFETCH,
            direct=direct,
            through_zarr=through_zarr,
            device=device.value,
            report=report,
        )
    from had_pipe.parallel import Place
    from had_pipe.run import read_run
    from had_pipe.verdicts import verdicts

    if Place.of().rank > 0:  # of several processes the first one speaks
        return
    if made.already_done:
        done = f"nothing was left to do: all {count(made.steps, 'step')} were done"
    else:
        done = f"{count(made.steps, 'step')} in {duration(made.seconds)}"
    losses = [
        f"{name} {made.first[name]:.4f} -> {made.last[name]:.4f}"
        for name in ("loss", "align", "reconstruct")
        if name in made.first and name in made.last
    ]
    print_facts(
        [
            ("run", str(made.run)),
            ("trained", done),
            *continued("losses", losses),
            *continued("measured", verdicts(read_run(made.run))),
            ("student", str(made.student)),
        ]
    )
    # Never a URL: one may hold a password or a signature.
    sources = cache or [str(asked.cache.path)]
    named = [f"--cache {source}" for source in sources if "://" not in source]
    say_next(" ".join(["had-pipe report", str(made.run), *named]))


@answering
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, [train] out.")],
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH_OR_URL",
            help="A cache of the run, to show the student's features beside the teacher's on its "
            "held-out windows; repeat it for several.",
        ),
    ] = None,
    annotation: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Colour those by feature: BED, GFF3 or GTF, plain or gzipped, that names contigs "
            "as the genome does.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write the page, instead of RUN/report.html."),
    ] = None,
) -> None:
    """Write one HTML page about a run.

    The page holds everything it shows; the run may still be going on.
    """
    from contextlib import ExitStack

    from had_pipe.errors import RecipeError
    from had_pipe.report import write_report
    from had_pipe.run import read_run
    from had_pipe.verdicts import verdicts

    if annotation is not None and not cache:
        raise RecipeError(
            "--annotation says where features lie; to show windows that lie there, name the "
            "cache too: --cache PATH"
        )
    record = read_run(run)
    features = None
    if cache:
        from had_pipe.cache import open_cache
        from had_pipe.dna.annotation import read_annotation
        from had_pipe.features import measure_features

        read = None if annotation is None else read_annotation(annotation)
        with ExitStack() as closing, reporter() as progress:
            opened = [closing.enter_context(open_cache(source)) for source in cache]
            features = measure_features(record, opened, annotation=read, report=progress)
    page = write_report(run, out, features=features)
    print_facts(continued("measured", verdicts(record)))
    print_facts([("page", str(page.resolve()))])


@answering
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="The runs' folders, two or more.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Where to write the page, instead of compare.html beside the first.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Put runs side by side, in a table and on one HTML page.

    In which recipe keys they differ, and how they fare on held-out windows beside the floors. Runs
    that differ in the seed alone are also told as mean and standard deviation; runs that were
    measured on other windows stand in tables of their own.
    """
    from had_pipe.compare import PAGE, headings, rows, write_comparison
    from had_pipe.compare import compare as hold_against

    found = hold_against(runs)
    page = out or runs[0].parent / PAGE
    write_comparison(found, page)
    if as_json:
        print_json({**as_json_object(found), "page": page.resolve()})
        return
    for table in found.tables:
        print_line(f"held out: {table.held_out}", style="bold")
        print_table(headings(found), [cells for _, cells in rows(found, table)])
        print_line()
        print_facts(continued("note", table.notes))
    print_facts([*continued("note", found.notes), ("page", str(page.resolve()))])
