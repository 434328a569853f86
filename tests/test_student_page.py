"""The page on using a student does what it shows: its blocks are run as they stand, in order."""

from __future__ import annotations

import re
import shlex
from typing import Any

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from test_had import SMALL, small_student
from typer.testing import CliRunner

from had_pipe import cli
from had_pipe.students import save_student
from had_pipe.students.had import BaseDecoder

PAGE = REPOSITORY / "docs" / "student.md"
BLOCKS = re.findall(r"^```(python|bash)\n(.*?)^```", PAGE.read_text("utf-8"), flags=re.M | re.S)


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's blocks made, one after another."""
    folder = tmp_path_factory.mktemp("page")
    torch.manual_seed(1)
    decoder = BaseDecoder(SMALL["hidden_size"], SMALL["decoder_heads"])
    save_student(small_student(), decoder, folder / "runs" / "demo" / "student")
    random = np.random.default_rng(0)
    letters = ["".join(random.choice(list("ACGTN"), n)) for n in (40, 2500, 7)]
    (folder / "sequences.fa").write_text(
        "".join(f">s{i}\n{text}\n" for i, text in enumerate(letters))
    )
    found: dict[str, Any] = {"__name__": "page", "letters": letters}
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        for number, (kind, text) in enumerate(BLOCKS):
            if kind == "python":
                exec(compile(text, f"{PAGE.name}: block {number}", "exec"), found)
            else:
                for line in text.splitlines():
                    program, *words = shlex.split(line)
                    assert program == "had-pipe"
                    done = CliRunner().invoke(cli.app, words)
                    assert done.exit_code == 0, done.output
        found["files"] = {path.name for path in (folder / "tuned").iterdir()}
    return found


def test_features_of_a_padded_batch_are_those_of_each_sequence(names: dict[str, Any]) -> None:
    assert names["features"].shape == (2, 12, SMALL["hidden_size"])
    with torch.no_grad():
        alone = small_student()(torch.tensor([[7, 8, 9, 10]])).last_hidden_state[0]
    torch.testing.assert_close(names["features"][1, -4:], alone, rtol=5e-5, atol=5e-5)


def test_a_masked_base_is_one_of_four(names: dict[str, Any]) -> None:
    chance = names["chance"]
    assert float(chance[7:11].sum()) == pytest.approx(1)
    assert float(chance.max()) < 1


def test_the_classifier_learns_and_is_shared_with_its_code(names: dict[str, Any]) -> None:
    assert names["loss"].item() < 0.5
    assert {"modeling_had.py", "tokenization_had.py", "delta_rule.py"} <= names["files"]


def test_what_was_embedded_is_read(names: dict[str, Any]) -> None:
    assert list(names["mean"]) == names["names"] == ["s0", "s1", "s2"]
    known = np.array([x != "N" for x in names["letters"][1]])
    # Both come of float32 features, the table's mean through float64.
    np.testing.assert_allclose(names["mean"]["s1"], names["second"][known].mean(0), rtol=1e-4)


def test_seams_differ_and_what_is_read_whole_does_not(names: dict[str, Any]) -> None:
    difference = names["difference"]
    assert len(difference) == 40 + 2500 + 7
    assert float(difference[:40].max()) < 1e-3
    assert float(difference[40:2540].max()) > 1e-3


def test_every_kind_of_block_of_the_page_is_run() -> None:
    fences = re.findall(r"^```(\w+)$", PAGE.read_text("utf-8"), flags=re.M)
    assert len(fences) == len(BLOCKS) == 8
