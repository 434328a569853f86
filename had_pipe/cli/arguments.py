"""What several verbs are asked with."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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
