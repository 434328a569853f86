"""A student in other hands: its folder read by transformers alone, had-pipe not installed."""

from __future__ import annotations

import ast
import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made
from test_card import blocks, card
from test_had import SMALL, small_student
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from had_pipe.errors import InputError
from had_pipe.students import (
    HADConfig,
    HADForMaskedLM,
    HADForSequenceClassification,
    HADModel,
    HADTokenizer,
    export_code,
    load_student,
    save_student,
    saving,
)
from had_pipe.students.had import BaseDecoder, HADPreTrainedModel

LETTERS = ["ACGTTGCA" * 9, "ACG[MASK]TTnacg"]


@pytest.fixture(scope="module")
def student() -> HADModel:
    return small_student()


@pytest.fixture(scope="module")
def decoder() -> BaseDecoder:
    torch.manual_seed(1)
    return BaseDecoder(SMALL["hidden_size"], SMALL["decoder_heads"])


@pytest.fixture(scope="module")
def folder(
    student: HADModel, decoder: BaseDecoder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "student-1.0"
    folder.mkdir()
    save_student(student, decoder, folder)
    return folder


@pytest.fixture(scope="module")
def usage(made: Made) -> list[str]:
    """What a student's card shows: how to load it with had-pipe, and without."""
    return blocks(card(made(windows=4, valid=0)))


def elsewhere(code: str, *words: str | Path, home: Path) -> str:
    """What a process prints that has neither had-pipe nor a network."""
    absent = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('had_pipe', 'fla', 'triton'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Absent())\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", absent + code, *map(str, words)],
        env={**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "had_pipe" not in done.stderr
    return done.stdout


READ = """
import json
import numpy as np, torch
from transformers import (
    AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer,
)
folder, letters, found, card = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
batch = tokenizer(json.loads(letters), padding=True, return_tensors="pt")
student = AutoModel.from_pretrained(folder, trust_remote_code=True)
language = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True)
torch.manual_seed(0)
classes = AutoModelForSequenceClassification.from_pretrained(
    folder, num_labels=3, trust_remote_code=True
)
with torch.no_grad():
    np.savez(
        found,
        ids=batch["input_ids"],
        feat=student(**batch).last_hidden_state,
        logits=language(**batch).logits,
    )
classes(**batch, labels=torch.tensor([0, 2])).loss.backward()
assert all(p.grad is not None for p in classes.parameters())
classes.save_pretrained("tuned")
tokenizer.save_pretrained("tuned")
again = AutoModelForSequenceClassification.from_pretrained("tuned", trust_remote_code=True)
with torch.no_grad():
    assert torch.equal(again.eval()(**batch).logits, classes.eval()(**batch).logits)
shown = {}
exec(card.replace("path/of/this/folder", folder), shown)
with torch.no_grad():
    batch = tokenizer(["ACGTACGT"], return_tensors="pt")
    assert torch.equal(shown["features"], student(**batch).last_hidden_state)
names = {type(model).__name__: type(model).__module__ for model in (student, language, classes)}
print(json.dumps([names, type(tokenizer).__name__, [m for m in sys.modules if "had_pipe" in m]]))
"""


def test_a_student_gives_the_same_bits_where_had_pipe_is_not_installed(
    student: HADModel, decoder: BaseDecoder, folder: Path, tmp_path: Path, usage: list[str]
) -> None:
    _, shown = usage
    found = tmp_path / "found.npz"
    said = elsewhere(READ, folder, json.dumps(LETTERS), found, shown, home=tmp_path)
    names, tokenizer, ours = json.loads(said)
    assert set(names) == {"HADModel", "HADForMaskedLM", "HADForSequenceClassification"}
    assert all(name.startswith("transformers_modules.") for name in names.values())
    assert (tokenizer, ours) == ("HADTokenizer", [])
    batch = HADTokenizer()(LETTERS, padding=True, return_tensors="pt")
    model = HADForMaskedLM.of(student, decoder).eval()
    with np.load(found) as there, torch.no_grad():
        np.testing.assert_array_equal(there["ids"], batch["input_ids"])
        np.testing.assert_array_equal(there["feat"], student(**batch).last_hidden_state)
        np.testing.assert_array_equal(there["logits"], model(**batch).logits)
    # What was tuned there is read here, without code from there.
    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned")
    assert type(tuned) is HADForSequenceClassification
    assert tuned.config.num_labels == 3


def test_a_card_shows_what_works_with_had_pipe(
    student: HADModel, folder: Path, usage: list[str]
) -> None:
    shown, _ = usage
    names: dict[str, Any] = {}
    exec(shown.replace("path/of/this/folder", str(folder)), names)
    assert type(names["student"]) is HADModel
    with torch.no_grad():
        expected = student(torch.tensor([[7, 8, 9, 10] * 2])).last_hidden_state
    assert torch.equal(names["features"], expected)


@pytest.mark.parametrize("trusted", [None, True, False])
def test_with_had_pipe_it_is_had_pipes_code_that_runs(folder: Path, trusted: bool | None) -> None:
    for auto, kind in (
        (AutoModel, HADModel),
        (AutoModelForMaskedLM, HADForMaskedLM),
        (AutoModelForSequenceClassification, HADForSequenceClassification),
    ):
        assert type(auto.from_pretrained(folder, trust_remote_code=trusted)) is kind
    # transformers asks no registered tokenizer before code that it is told to trust.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
    assert (type(tokenizer) is HADTokenizer) == (not trusted)


class _NoImports(ast.NodeTransformer):
    """A module without its imports: all in which the code beside a student may differ from ours."""

    def visit_Import(self, node: ast.Import) -> None:
        return None

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        return None

    def visit_Try(self, node: ast.Try) -> ast.AST | None:
        self.generic_visit(node)
        return node if node.body else None


def test_the_code_beside_a_student_is_the_packages_own(folder: Path) -> None:
    written = {path.stem: path.read_text("utf-8") for path in folder.glob("*.py")}
    assert {"modeling_had", "tokenization_had", "delta_rule"} <= set(written)
    ours = {"modeling_had": "had", "tokenization_had": "tokenizer"}
    for name, text in written.items():
        assert "SPDX-License-Identifier: Apache-2.0" in text.partition('"""')[0]
        assert not re.search(r"^\s*(from|import) had_pipe", text, flags=re.M), name
        source = Path(saving.__file__).with_name(f"{ours.get(name, name)}.py").read_text("utf-8")
        found, expected = (_NoImports().visit(ast.parse(t)) for t in (text, source))
        assert ast.dump(found) == ast.dump(expected)


def test_the_hub_asks_for_no_package_that_a_student_may_do_without(folder: Path) -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files

    # What a hub download checks: every file, each by itself.
    for path in folder.glob("*.py"):
        assert {"fla", "triton", "had_pipe"}.isdisjoint(get_imports(path))
    found = {Path(path).stem for path in get_relative_import_files(folder / "modeling_had.py")}
    assert {path.stem for path in folder.glob("*.py")} - {"modeling_had"} == found


def test_optional_imports_are_wrapped_wherever_they_stand() -> None:
    lines = [
        "import triton",
        "def f():",
        "    from fla.ops import (",
        "        a,",
        "        b,",
        "    )",
        "    if f:",
        "        import fla, math",
        "    try:",
        "        import triton",
        "    except ImportError:",
        "        pass",
    ]
    found = saving._optional_imports(ast.parse("\n".join(lines)))
    assert [node.lineno for node in found] == [1, 3, 8]


def test_a_fine_tuned_student_is_given_the_same_code(folder: Path, tmp_path: Path) -> None:
    HADForSequenceClassification(HADConfig(**SMALL, num_labels=2)).save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    export_code(tmp_path)  # a tokenizer was not saved, and is not made up
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in folder.iterdir()} - {
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for path in folder.glob("*.py"):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    maps = [json.loads((f / "config.json").read_text())["auto_map"] for f in (folder, tmp_path)]
    assert maps[0] == maps[1]


def test_files_of_a_student_are_as_readable_as_each_other(folder: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert len(modes) == 1


class AnotherHead(HADPreTrainedModel):
    """A head that somebody else made."""

    def __init__(self, student: HADModel) -> None:
        super().__init__(student.config)
        self.had = student
        self.judge = torch.nn.Linear(SMALL["hidden_size"], 1)


def test_a_student_is_loaded_whichever_head_it_has(
    student: HADModel, folder: Path, tmp_path: Path
) -> None:
    save_student(student, None, tmp_path / "bare")
    HADForSequenceClassification(student.config).save_pretrained(tmp_path / "classes")
    AnotherHead(student).save_pretrained(tmp_path / "another")
    for path in (folder, tmp_path / "bare", tmp_path / "another"):
        loaded = load_student(path)
        assert not loaded.training
        for (name, a), (_, b) in zip(
            loaded.state_dict().items(), student.state_dict().items(), strict=True
        ):
            assert torch.equal(a, b), name
    assert type(load_student(tmp_path / "classes")) is HADModel


def test_a_student_saved_in_half_precision_is_used_in_whole(
    student: HADModel, tmp_path: Path
) -> None:
    halved = HADModel(student.config).to(torch.bfloat16)
    halved.save_pretrained(tmp_path)
    loaded = load_student(tmp_path)
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, halved.state_dict()[name].float()), name


def _spoil(folder: Path, how: str) -> None:
    config = folder / "config.json"
    if how == "no folder":
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    elif how == "no JSON":
        config.write_text("{")
    elif how == "another model":
        config.write_text('{"model_type": "bert"}')
    elif how == "no weights":
        (folder / "model.safetensors").unlink()
    elif how == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif how == "too few tensors":
        config.write_text(re.sub(r'"layers": 2', '"layers": 3', config.read_text()))
    elif how == "too many tensors":
        config.write_text(re.sub(r'"layers": 2', '"layers": 1', config.read_text()))
    elif how == "no such student":
        config.write_text(
            re.sub(r'"attention_heads": 2', '"attention_heads": 3', config.read_text())
        )
    else:
        config.write_text(re.sub(r'"mlp": 24', '"mlp": 25', config.read_text()))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("no folder", "config.json cannot be read"),
        ("no JSON", "is no JSON"),
        ("another model", "of type 'bert'"),
        ("no weights", "no model.safetensors"),
        ("cut", "cannot be loaded"),
        ("too few tensors", "lacks"),
        ("too many tensors", "knows nothing of"),
        ("no such student", "cannot be loaded"),
        ("another shape", "cannot be loaded"),
    ],
)
@pytest.mark.parametrize("headed", [False, True], ids=["bare", "with a head"])
def test_what_is_no_whole_student_is_refused(
    student: HADModel, decoder: BaseDecoder, tmp_path: Path, headed: bool, how: str, said: str
) -> None:
    folder = tmp_path / "student"
    save_student(student, decoder if headed else None, folder)
    _spoil(folder, how)
    with pytest.raises(InputError, match=said) as refused:
        load_student(folder)
    assert str(folder) in str(refused.value)
