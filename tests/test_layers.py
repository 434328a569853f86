"""Imports run one way, and every heavy dependency has its owner."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest
from conftest import REPOSITORY

PACKAGE = REPOSITORY / "had_pipe"

# What each room may import of ours; a room may always import itself and the version.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "progress": set(),
    "sizes": {"errors"},
    "draws": set(),
    "durable": {"errors"},
    "dna": {"errors", "draws"},
    "recipe": {"errors", "dna"},
    "cache": {"errors", "progress", "sizes", "draws", "durable", "hold", "dna"},
    "corpus": {"errors", "progress", "draws", "dna", "recipe", "cache"},
    "teachers": {"errors", "dna"},
    "students": {"errors", "dna"},
    "objectives": {"errors", "dna", "students"},
    "checkpoint": {"errors", "durable"},
    "order": {"errors", "draws"},
    "feed": {"dna", "cache"},
    "stream": {"errors", "order", "cache", "feed"},
    "hold": {"errors", "durable"},
    "floors": {"dna"},
    "run": {"errors", "durable"},
    "card": {"cache", "run"},
    "page": {"durable", "errors"},
    "verdicts": {"run"},
    "spaces": set(),
    "features": {
        *{"errors", "progress", "dna", "cache", "stream", "students", "run", "spaces"},
    },
    "portrait": {"page", "verdicts", "features"},
    "report": {"sizes", "run", "page", "verdicts", "features", "portrait"},
    "compare": {"errors", "run", "page", "verdicts"},
    "job": {"errors", "progress", "dna", "recipe", "cache", "corpus", "teachers"},
    "batches": {"errors", "dna", "teachers"},
    "parts": {"errors", "durable", "hold", "cache", "teachers", "batches"},
    "audit": {"errors", "progress", "draws", "recipe", "cache", "teachers", "batches", "parts"},
    "extract": {
        *{"errors", "progress", "durable", "hold", "recipe", "cache"},
        *{"corpus", "teachers", "job", "batches", "parts"},
    },
    "cluster": {
        *{"errors", "progress", "durable", "hold", "recipe", "cache"},
        *{"teachers", "job", "parts", "extract"},
    },
    "survey": {
        *{"errors", "progress", "durable", "dna", "recipe", "cache"},
        *{"corpus", "teachers", "job", "batches", "parts", "extract"},
    },
    "signals": {"errors"},
    "parallel": {"errors", "signals"},
    "pace": {"sizes", "stream", "parallel"},
    "track": {"errors"},
    "finite": {"errors", "cache", "stream"},
    "held_out": {
        *{"progress", "recipe", "cache", "stream", "learner", "floors"},
        *{"finite", "parallel", "signals"},
    },
    "task": {
        *{"errors", "recipe", "cache", "students", "objectives", "order", "stream", "learner"},
        *{"card", "parallel", "run", "track"},
    },
    "learner": {"dna", "recipe", "objectives", "floors", "students", "stream", "checkpoint"},
    "distill": {
        *{"errors", "progress", "durable", "recipe", "cache", "students", "stream"},
        *{"checkpoint", "learner", "signals", "pace", "hold", "run", "card"},
        *{"parallel", "track", "finite", "held_out", "task"},
    },
    "vectors": {"errors", "durable"},
    "embed": {"errors", "progress", "dna", "students", "vectors"},
    "cli": {
        "embed",
        "dna",  # inspect spells a k-mer
        *{"errors", "progress", "sizes", "durable", "hold", "recipe", "cache"},
        *{"survey", "extract", "cluster", "audit", "distill", "run", "report", "teachers"},
        "parallel",  # of several processes one speaks
        *{"verdicts", "features", "compare"},
        "students",  # doctor says which kernel runs
        "batches",  # tells a device that is full from a bug
    },
}

OWNERS: dict[str, set[str]] = {
    "obstore": {"cache.remote"},
    "zarr": {"cache", "vectors"},
    "numcodecs": {"cache"},
    "pyarrow": {"cache", "vectors"},
    "crc32c": {"cache"},
    "threadpoolctl": {"cache"},
    "dask": {"cluster"},
    "distributed": {"cluster"},
    "dnaio": {"dna"},
    "gtars": {"dna"},
    "py2bit": {"dna"},
    "fla": {"students.delta_rule", "students.fla_backend"},
    "triton": {"students.delta_rule"},
    "transformers": {"teachers", "students"},
    "tokenizers": {"students"},
    "huggingface_hub": {"teachers"},
    "safetensors": {"teachers", "students", "checkpoint"},
    "pydantic": {"recipe", "cache"},
    "pydantic_core": {"recipe", "cache"},
    "wandb": {"track"},
    "typer": {"cli"},
    "rich": {"cli"},
    "jinja2": {"page"},
    "markupsafe": {"page"},
    "matplotlib": {"page"},
    "torch": {
        *{"teachers", "students", "objectives", "stream", "checkpoint", "extract", "distill"},
        "floors",
        "features",
        "feed",
        "embed",
        "learner",
        *{"parallel", "pace", "held_out", "task"},
        "track",  # its writer of TensorBoard's files
        "batches",
        "cluster",  # deals out the devices of one machine
        "cli",  # doctor says which devices there are
    },
}


def _modules() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            yield name, ast.parse(path.read_text("utf-8"), filename=str(path))


MODULES = dict(_modules())
"""Every module of the package: its dotted name below had_pipe, and its syntax tree."""


def imported(tree: ast.Module) -> set[str]:
    """Every dotted name a module imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written in full"
            module = node.module or ""
            names |= {f"{module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(tree: ast.Module) -> set[str]:
    ours = {name.split(".")[1] for name in imported(tree) if name.startswith("had_pipe.")}
    return {
        room for room in ours if (PACKAGE / room).is_dir() or (PACKAGE / f"{room}.py").is_file()
    }


@pytest.mark.parametrize("name", MODULES)
def test_imports_run_one_way(name: str) -> None:
    room = name.split(".")[0]
    assert room in MAY_IMPORT, f"had_pipe.{room} has no place in the house: give it one here"
    assert rooms_imported(MODULES[name]) - {room} <= MAY_IMPORT[room]


def test_the_table_of_imports_has_no_circle() -> None:
    left = {room: set(may) for room, may in MAY_IMPORT.items()}
    while left:
        free = {room for room, may in left.items() if not may & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {room: may for room, may in left.items() if room not in free}


@pytest.mark.parametrize("name", MODULES)
def test_heavy_dependencies_are_imported_by_their_owners_alone(name: str) -> None:
    for dependency in {found.split(".")[0] for found in imported(MODULES[name])} & set(OWNERS):
        owners = OWNERS[dependency]
        assert name.split(".")[0] in owners or name in owners, dependency


def loaded_after(*imports: str) -> set[str]:
    """Every module that a fresh interpreter holds after the imports."""
    code = "import sys\n" + "".join(f"import {name}\n" for name in imports)
    done = subprocess.run(
        [sys.executable, "-c", code + "print('\\n'.join(sys.modules))"],
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stdout.split())


def test_genomes_recipes_and_caches_never_load_torch() -> None:
    data_path = [
        f"had_pipe.{name}"
        for name in MODULES
        if name.split(".")[0]
        in {
            "errors",
            "progress",
            "sizes",
            "draws",
            "durable",
            "dna",
            "recipe",
            "corpus",
            "cache",
            "report",
        }
        | {"hold", "run", "card", "page", "verdicts", "portrait", "spaces", "compare"}
    ]
    assert len(data_path) > 10
    assert "torch" not in loaded_after(*data_path)


def test_stage_two_never_loads_stage_one() -> None:
    loaded = loaded_after("had_pipe.distill", "had_pipe.stream", "had_pipe.students")
    assert "had_pipe.cache.reader" in loaded
    assert not {
        name for name in loaded if name.startswith(("had_pipe.teachers", "had_pipe.extract"))
    }
    assert not loaded & {"gtars", "dnaio", "py2bit", "dask", "typer", "had_pipe.dna.reference"}


def test_stage_one_never_loads_students() -> None:
    loaded = loaded_after("had_pipe.extract")
    assert "had_pipe.cache.writer" in loaded
    assert not {
        name for name in loaded if name.startswith(("had_pipe.students", "had_pipe.distill"))
    }
    assert not loaded & {"had_pipe.objectives", "had_pipe.stream", "typer", "dask"}


def test_no_module_is_called_utils() -> None:
    names = {name.split(".")[-1] for name in MODULES}
    assert not names & {"utils", "util", "helpers", "common", "misc"}
