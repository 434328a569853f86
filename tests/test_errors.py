"""The tree of errors: what is drawn is what there is, and each leaf has its exit code."""

from __future__ import annotations

import inspect
import re

import had_pipe.errors
from had_pipe.errors import HadPipeError

EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 75}


def classes() -> dict[str, type[HadPipeError]]:
    found = inspect.getmembers(had_pipe.errors, inspect.isclass)
    return {name: cls for name, cls in found if issubclass(cls, HadPipeError)}


def drawn() -> dict[str, tuple[str, int]]:
    """The drawing at the top of the module: name -> (parent, exit code)."""
    tree: dict[str, tuple[str, int]] = {}
    parents = ["HadPipeError"]
    for line in (had_pipe.errors.__doc__ or "").splitlines():
        match = re.match(r"([│ ]*)[├└]── (\w+) +(\d+) +\S", line)
        if match is None:
            continue
        depth = len(match[1]) // 4 + 1
        parents[depth:] = [match[2]]
        tree[match[2]] = (parents[depth - 1], int(match[3]))
    return tree


def test_the_drawing_is_the_tree() -> None:
    there = {
        name: (cls.__mro__[1].__name__, cls.exit_code)
        for name, cls in classes().items()
        if cls is not HadPipeError
    }
    assert drawn() == there
    assert len(there) == 14


def test_exit_codes_are_the_documented_ones_and_groups_do_not_share_them() -> None:
    tops = {name: code for name, (parent, code) in drawn().items() if parent == "HadPipeError"}
    assert set(tops.values()) <= EXIT_CODES - {0, 1}
    assert len(set(tops.values())) == len(tops)
    for name, (parent, code) in drawn().items():
        assert parent == "HadPipeError" or code == tops[parent], name


def test_every_error_says_in_one_sentence_what_it_is() -> None:
    for name, cls in classes().items():
        said = cls.__dict__["__doc__"]
        assert said.endswith("."), name
        assert "\n" not in said, name


def test_a_message_never_steers_the_terminal() -> None:
    """What is quoted may be a stranger's: a file's name, a key of a plan."""
    name = "a\x1b]0;owned\x07\r\x9b2J\u202e\u2066\udc80\x7f"
    assert str(HadPipeError(f"one {name}\ntwo µ é 中\u00a0")) == (
        "one a\\x1b]0;owned\\x07\\r\\x9b2J\\u202e\\u2066\\udc80\\x7f\ntwo µ é 中\u00a0"
    )
