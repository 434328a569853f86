"""What several verbs are asked with."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from had_pipe.errors import RecipeError


class Device(StrEnum):
    """Where the arithmetic runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a TOML file.")]
DeviceOption = Annotated[
    Device, typer.Option(help="Where the model runs; auto takes a CUDA device if there is one.")
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Use only what is on this machine; contact no host.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
CacheArgument = Annotated[Path, typer.Argument(metavar="PATH", help="The cache's folder.")]


def read_share(text: str) -> tuple[int, int]:
    """ "3/8" as (3, 8): the third of eight jobs. Raises RecipeError."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise RecipeError(
            f"--share {text}: expected I/N with I from 1 to N, for example 3/8 for the third of "
            "eight jobs"
        )
    return int(found[1]), int(found[2])
