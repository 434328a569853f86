"""A student's folder: weights, configuration and tokenizer, and the code that reads them elsewhere.

The code is this package's own: the model and what it imports, made to import each other where they
lie, so that transformers loads a student without had-pipe (`trust_remote_code=True`).
"""

from __future__ import annotations

import ast
import json
import os
import re
import sys
from collections.abc import Mapping
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from had_pipe import __version__
from had_pipe.errors import InputError
from had_pipe.students.had import BaseDecoder, HADForMaskedLM, HADModel
from had_pipe.students.tokenizer import HADTokenizer

WEIGHTS = "model.safetensors"

_HERE = Path(__file__).parent
# What transformers calls such files.
_EXPORTED = {"had": "modeling_had", "tokenizer": "tokenization_had"}
_MODEL_CLASSES = {
    "AutoConfig": "modeling_had.HADConfig",
    "AutoModel": "modeling_had.HADModel",
    "AutoModelForMaskedLM": "modeling_had.HADForMaskedLM",
    "AutoModelForSequenceClassification": "modeling_had.HADForSequenceClassification",
}
# In the place of fast tokenizers.
_TOKENIZER_CLASSES = {"AutoTokenizer": [None, "tokenization_had.HADTokenizer"]}
_REQUIRED = {"torch", "transformers", "tokenizers", *sys.stdlib_module_names}
_OURS = re.compile(r"^( *)from had_pipe\.students\.(\w+) import ", flags=re.M)
_WHOLE = re.compile(r"^( *)from had_pipe\.students import (\w+)$", flags=re.M)

_HEADER = """\
# SPDX-License-Identifier: Apache-2.0
#
# Code of a student made with had-pipe {version}: its had_pipe/students/{name}.py, written here so
# that transformers can load the student where had-pipe is not installed. This licence is the
# code's; that of the weights stands in README.md and config.json.

"""


def save_student(student: HADModel, decoder: BaseDecoder | None, folder: Path) -> None:
    """Weights, configuration, tokenizer and code, as transformers reads them.

    The decoder is kept with the student where there is one. Raises OSError where the disk fails.
    """
    model = HADForMaskedLM.of(student, decoder) if decoder else student
    nn.Module.eval(model)
    try:
        with redirect_stderr(StringIO()):  # transformers draws a progress bar of its own
            model.save_pretrained(folder)
    except SafetensorError as error:
        # It tells a full disk in an exception of its own.
        told = re.search(r"os error (\d+)", str(error))
        if told is None:
            raise
        raise OSError(int(told[1]), os.strerror(int(told[1])), str(folder)) from error
    HADTokenizer().save_pretrained(folder)
    export_code(folder)
    # The weights come out readable by their owner alone; a student is there to be shared.
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)


def load_student(folder: Path, *, device: torch.device | str = "cpu") -> HADModel:
    """The student of a folder, whichever head it was saved with, ready to be used.

    No code of the folder is run. Raises InputError.
    """
    expected = f"expected a student, as had-pipe distill leaves it in RUN/student: with {WEIGHTS}"
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except OSError as error:
        raise InputError(
            f"{folder}: config.json cannot be read ({error.strerror}); {expected}"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder}: config.json is no JSON ({error}); copy it again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "had":
        raise InputError(f"{folder}: config.json tells of a model of type {kind!r}; {expected}")
    if not (folder / WEIGHTS).is_file():
        raise InputError(f"{folder}: no {WEIGHTS}; {expected}")
    try:
        with redirect_stderr(StringIO()):
            # The stubs know of one result only.
            loaded: Any = HADModel.from_pretrained(
                folder,
                dtype=torch.float32,  # whatever it was saved in
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    # A damaged folder shows itself in any of these, out of three libraries and of our own shapes.
    except (
        SafetensorError, OSError, RuntimeError, ValueError, TypeError, LookupError, AssertionError,
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{folder}: cannot be loaded ({type(error).__name__}: {reason}); copy it again"
        ) from None
    student: HADModel = loaded[0]
    if missing := sorted(loaded[1]["missing_keys"]):
        raise InputError(
            f"{folder}: {WEIGHTS} lacks {len(missing)} of the student's tensors, {missing[0]} for "
            "one; copy it again"
        )
    # A head has the student under this name, and beside it what is the head's alone.
    bare, own = config.get("architectures") == [HADModel.__name__], f"{HADModel.base_model_prefix}."
    unused = sorted(loaded[1]["unexpected_keys"])
    if strange := [name for name in unused if bare or name.startswith(own)]:
        # A student of fewer layers would load, and say something else.
        raise InputError(
            f"{folder}: {WEIGHTS} holds {len(strange)} tensors that config.json knows nothing of, "
            f"{strange[0]} for one; copy both again"
        )
    nn.Module.to(student, device)
    nn.Module.eval(student)
    return student


def export_code(folder: Path) -> None:
    """Put the code beside a student saved there by `save_pretrained`, and name it in its JSON.

    `save_student` does it by itself; after fine-tuning, call it on the folder that is to be shared.
    """
    for name in _needed("had"):
        path = folder / f"{_EXPORTED.get(name, name)}.py"
        path.write_text(_exported(name), encoding="utf-8")
    _add(folder / "config.json", {"auto_map": _MODEL_CLASSES})
    if (folder / "tokenizer_config.json").exists():
        _add(folder / "tokenizer_config.json", {"auto_map": _TOKENIZER_CLASSES})


def _add(path: Path, entries: Mapping[str, Any]) -> None:
    """Entries more in a JSON file, written as transformers writes it."""
    document = {**json.loads(path.read_bytes()), **entries}
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def _source(name: str) -> str:
    return (_HERE / f"{name}.py").read_text("utf-8")


def _needed(name: str) -> list[str]:
    """A module of this package and all of it that it imports, and the tokenizer."""
    needed, at, whole = [name, "tokenizer"], 0, set()
    while at < len(needed):
        source = _source(needed[at])
        for _, other in _OURS.findall(source):
            if other not in needed:
                needed.append(other)
        whole |= {other for _, other in _WHOLE.findall(source)}
        at += 1
    assert whole <= set(needed), "transformers finds a module by `from .module import` alone"
    return needed


def _exported(name: str) -> str:
    """A module's source, importing its fellows from where they lie, and nothing else of ours."""
    text = _OURS.sub(
        lambda found: f"{found[1]}from .{_EXPORTED.get(found[2], found[2])} import ",
        _source(name),
    )
    text = _WHOLE.sub(r"\1from . import \2", text)
    lines = text.splitlines()
    # transformers asks, before it loads a file, for every package imported outside a `try`.
    for node in reversed(_optional_imports(ast.parse(text))):
        indent = " " * node.col_offset
        first, last = node.lineno - 1, node.end_lineno or node.lineno
        imported = [f"    {line}" for line in lines[first:last]]
        lines[first:last] = [f"{indent}try:", *imported, f"{indent}finally:", f"{indent}    pass"]
    return _HEADER.format(version=__version__, name=name) + "\n".join(lines) + "\n"


def _optional_imports(tree: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    """Imports, in order, of packages that a student may do without; those in a `try` left out."""
    found: list[ast.Import | ast.ImportFrom] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            packages = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            packages = set() if node.level else {(node.module or "").partition(".")[0]}
        else:
            if not isinstance(node, ast.Try):
                found += _optional_imports(node)
            continue
        assert "had_pipe" not in packages, "a student's code needs nothing else of ours"
        if packages - _REQUIRED:
            found.append(node)
    return found
