"""A student's card: which licence binds it, and that a stranger's cache writes no line of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from small_cache import build_cache

from had_pipe.cache import Cache
from had_pipe.card import student_card
from had_pipe.run import RunRecord


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    return Cache.open(build_cache(tmp_path_factory.mktemp("cache") / "c", windows=4, valid=0))


@dataclass
class Planned:
    """A cache of another plan."""

    plan: object
    id: str = "5f" * 32


def planned(cache: Cache, *, licence: str = "MIT", **teacher: str) -> Cache:
    plan = cache.plan.model_copy(
        update={"licence": licence, "teacher": cache.plan.teacher.model_copy(update=teacher)}
    )
    return Planned(plan)  # type: ignore[return-value]


def card(*caches: Cache, **objective: str) -> str:
    run = {"recipe": {"train": {"steps": 5}, "objective": objective}}
    record = RunRecord(folder=Path("run"), run=run, train=(), validation=(), floors=None)
    return student_card(record, caches, parameters=1000, width=32, batch=8)


def blocks(text: str) -> list[str]:
    """The Python that a card shows."""
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def front(text: str) -> list[str]:
    return text.split("---\n")[1].splitlines()


@pytest.mark.parametrize(
    ("licence", "lines"),
    [
        ("Apache-2.0", ["license: apache-2.0"]),
        ("unknown", ["license: other", "license_name: unknown"]),
        ("MIT OR GPL-2.0", ["license: other", "license_name: MIT OR GPL-2.0"]),
        ("a\nb: c", ["license: other", 'license_name: "a\\nb: c"']),
        ("[x", ["license: other", 'license_name: "[x"']),
    ],
)
def test_the_front_matter_names_the_licence_as_hubs_read_it(
    cache: Cache, licence: str, lines: list[str]
) -> None:
    told = front(card(planned(cache, licence=licence)))
    assert told[: len(lines)] == lines
    assert told[len(lines)] == "library_name: transformers"


def test_a_name_from_a_strangers_cache_stays_on_its_line_and_in_its_cell(cache: Cache) -> None:
    wicked = "x\n---\nlicense: mit | y"
    text = card(planned(cache, licence="Apache-2.0", name=wicked, revision="0" * 40))
    assert 'base_model: "x\\n---\\nlicense: mit | y"' in front(text)
    assert [line for line in front(text) if line.startswith("license:")] == ["license: apache-2.0"]
    assert text.splitlines().count("license: mit") == 0
    assert "embeddings of x --- license: mit \\| y (revision 000000000000" in text


def test_the_card_shows_how_to_load_it_with_had_pipe_and_without(cache: Cache) -> None:
    # tests/test_export.py runs both.
    with_it, without_it = blocks(card(cache))
    assert "import had_pipe" in with_it
    assert "trust_remote_code" not in with_it
    assert "had_pipe" not in without_it
    assert without_it.count("trust_remote_code=True") == 2


def test_a_student_that_never_met_a_mask_symbol_says_so(cache: Cache) -> None:
    assert "`[MASK]`, as which" in card(cache, mask_tokens="dropped")
    assert "[MASK]" not in card(cache)
