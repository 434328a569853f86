"""The verbs of stage two: training a student, and a page about it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from had_pipe.cli.arguments import Device, DeviceOption, RecipeArgument
from had_pipe.cli.shown import (
    answering,
    continued,
    count,
    duration,
    print_facts,
    reporter,
    say_next,
)


@answering
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

    with reporter() as report:
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
    print_facts(
        [
            ("run", str(made.run)),
            ("trained", done),
            *continued("losses", losses),
            *continued("measured", verdicts(read_run(made.run))),
            ("student", str(made.student)),
        ]
    )
    say_next(f"had-pipe report {made.run}")


@answering
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
    print_facts(continued("measured", verdicts(read_run(run))))
    print_facts([("page", str(page.resolve()))])
