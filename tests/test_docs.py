"""Documents say what the code does: pages that repeat it, names, links, commands and recipes."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main
from conftest import REPOSITORY

import had_pipe
import had_pipe.errors
from had_pipe import cli, recipe

DOCS = REPOSITORY / "docs"
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "pipelines" / "README.md",
    REPOSITORY / "cache" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]


def page_ids(path: Path) -> str:
    return path.relative_to(REPOSITORY).as_posix()


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli.md", "recipe.md", "errors.md"])
def test_a_page_that_repeats_the_code_is_what_the_code_says_today(name: str) -> None:
    written = (DOCS / "reference" / name).read_text("utf-8")
    assert written == generator().PAGES[name](), "run: python docs/generate.py"


def walk(group: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for name, command in group.commands.items():
        yield (*path, name), command
        if hasattr(command, "commands"):
            yield from walk(command, (*path, name))


COMMANDS = dict(walk(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_option_is_documented(words: tuple[str, ...]) -> None:
    page = (DOCS / "reference" / "cli.md").read_text("utf-8")
    heading = f"## `had-pipe {' '.join(words)}`"
    assert page.count(heading + "\n") == 1
    told = page.split(heading + "\n")[1].split("\n## ")[0]
    assert COMMANDS[words].help
    for parameter in COMMANDS[words].params:
        if parameter.name != "help":
            option = max(parameter.opts, key=len)
            assert (option if option.startswith("-") else parameter.metavar) in told
            assert parameter.help, parameter.name


def test_every_recipe_key_is_documented_where_it_is_defined() -> None:
    page = (DOCS / "reference" / "recipe.md").read_text("utf-8")
    sections = {
        "teacher": recipe.Teacher,
        "genome": recipe.Genome,
        "windows": recipe.Windows,
        "cache": recipe.Cache,
        "student": recipe.Student,
        "objective": recipe.Objective,
        "train": recipe.Train,
    }
    assert set(sections) == set(recipe.Recipe.model_fields)
    for name, section in sections.items():
        told = page.split(f"## `{'[[genome]]' if name == 'genome' else f'[{name}]'}`\n")[1]
        told = told.split("\n## ")[0]
        for key, field in section.model_fields.items():
            assert field.description, f"[{name}] {key} has no docstring"
            assert f"| `{key}` |" in told


def test_every_error_is_documented_with_its_exit_code() -> None:
    page = (DOCS / "reference" / "errors.md").read_text("utf-8")
    for name, cls in inspect.getmembers(had_pipe.errors, inspect.isclass):
        if issubclass(cls, had_pipe.errors.HadPipeError):
            assert f"| `{name}` | {cls.exit_code} |" in page


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#\s]+)", page.read_text("utf-8")):
        if "://" not in link:
            assert (page.parent / link).exists(), link


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `had-pipe` wherever a command is shown, in a block or in a line."""
    blocks = "\n".join(re.findall(r"```\w*\n(.*?)```", text, flags=re.S))
    shown = re.findall(r"^(?:\.venv/bin/)?had-pipe ([^#|&\n]+)", blocks, flags=re.M)
    shown += re.findall(r"(?<!`)`had-pipe ([^`]+)`(?!`)", text)
    for line in shown:
        yield line.split()


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_command_line_shown_is_one_that_exists(page: Path) -> None:
    for words in command_lines(page.read_text("utf-8")):
        verb = tuple(words[: 2 if tuple(words[:2]) in COMMANDS else 1])
        assert verb in COMMANDS, words
        options = {opt for parameter in COMMANDS[verb].params for opt in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= options, words


def test_the_readme_shows_the_whole_way() -> None:
    text = (REPOSITORY / "README.md").read_text("utf-8")
    verbs = {" ".join(words[:2]).split(" my.toml")[0] for words in command_lines(text)}
    assert {"plan", "extract-teacher", "distill", "cache verify"} <= verbs


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_recipe_shown_is_read(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page.read_text("utf-8"), re.S)):
        path = tmp_path / f"{number}.toml"
        path.write_text(text, "utf-8")
        assert recipe.read_recipe(path).cache.path.is_absolute()


def resolve(name: str) -> Any:
    """The object behind a dotted name, or AttributeError."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AttributeError(name)


@pytest.mark.parametrize("page", PAGES, ids=page_ids)
def test_every_name_of_ours_exists(page: Path) -> None:
    for name in set(re.findall(r"had_pipe(?:\.\w+)+", page.read_text("utf-8"))):
        if not name.endswith(".py"):
            assert resolve(name) is not None


def test_documented_signatures_are_the_real_ones() -> None:
    page = (DOCS / "reference" / "python.md").read_text("utf-8")
    shown = re.findall(r"`(had_pipe[\w.]+)\(([^)]*)\)`", page)
    assert len(shown) > 6
    for name, parameters in shown:
        real = list(inspect.signature(resolve(name)).parameters)
        told = [word.strip() for word in parameters.split(",") if word.strip() != "*"]
        assert told == [word for word in real if word in told], name
        assert real[0] == told[0], name


def test_every_page_stands_in_the_navigation_once() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text("utf-8")
    listed = re.findall(r": ([\w/-]+\.md)$", text, flags=re.M)
    pages = [path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")]
    assert sorted(listed) == sorted(pages)


def test_the_changelog_says_of_every_version_what_happened_to_the_format() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text("utf-8")
    versions = re.split(r"^## ", text, flags=re.M)[1:]
    assert versions[0].startswith(had_pipe.__version__)
    assert all("### Cache format" in version for version in versions)


def test_the_citation_names_this_version() -> None:
    text = (REPOSITORY / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {had_pipe.__version__}\n" in text
    assert "2505.20836" in text


def test_every_module_says_what_it_does() -> None:
    for found in pkgutil.walk_packages(had_pipe.__path__, "had_pipe."):
        path = REPOSITORY / Path(*found.name.split("."))
        source = path / "__init__.py" if found.ispkg else path.with_suffix(".py")
        assert source.read_text("utf-8").startswith('"""'), found.name


def test_pins_are_exact_and_name_no_place() -> None:
    lines = (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9._-]+==[\w.!]+", pin) for pin in pins)
    assert pins == sorted(set(pins))
    assert "torch==2.13.0" in pins
    pinned = {re.sub(r"[._]", "-", pin.split("==")[0]) for pin in pins}
    project = (REPOSITORY / "pyproject.toml").read_text("utf-8")
    for table in ("dependencies", "extract", "dev", "docs"):
        block = re.search(rf"^{table} = \[(.*?)\]", project, flags=re.M | re.S)
        assert block is not None
        for wanted in re.findall(r'"([\w.-]+)[\[><=]', block[1]):
            assert wanted.lower().replace("_", "-").replace(".", "-") in pinned, wanted
