"""A checkpoint's folder as the hub lays it out: config.json, weights, a card.

Whoever made it may be a stranger: sizes are bounded, names stay in the folder, pickles make tensors
and nothing else. What the weights mean is for the readers of each architecture.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from had_pipe.errors import InputError
from had_pipe.errors import shown as harmless

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_FILE = "config.json"
CARD_FILE = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")
"""Weights in one file, the better form first; in shards, each has an index of its own name."""

_WEIGHT_SUFFIXES = {Path(name).suffix for name in WEIGHT_FILES}
_LFS = b"version https://git-lfs"
_LARGEST_CONFIG = 1 << 22
_LARGEST_INDEX = 1 << 26
_MOST_SHARDS = 1 << 12
_CARD_NBYTES = 1 << 16
_NT_LICENCE = "CC-BY-NC-SA-4.0"
_SPDX = {
    name.lower(): name
    for name in (
        "Apache-2.0",
        "BSD-3-Clause",
        "CC-BY-4.0",
        "CC-BY-NC-4.0",
        "CC-BY-NC-SA-4.0",
        "CC-BY-SA-4.0",
        "CC0-1.0",
        "GPL-3.0",
        "MIT",
    )
}


def index_of(name: str) -> str:
    """The file that names the shards which stand in for a weight file."""
    return f"{name}.index.json"


def read_config_file(folder: Path) -> dict[str, Any]:
    """config.json as it stands; raises InputError where there is none."""
    try:
        return _read_json(folder / CONFIG_FILE, _LARGEST_CONFIG)
    except FileNotFoundError:
        raise InputError(
            f"{folder}: there is no {CONFIG_FILE}; a teacher's folder holds {CONFIG_FILE} and "
            f"{' or '.join(WEIGHT_FILES)}."
        ) from None


def _read_json(path: Path, limit: int) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: expected an ordinary file; get the file again.")
    refuse_pointer(path)
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
        if len(raw) > limit:
            raise ValueError(f"more than {limit:,} bytes")
        found = json.loads(raw.decode("utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); get the file again.") from error
    if not isinstance(found, dict):
        raise InputError(f"{path}: expected a JSON object; get the file again.")
    return found


def refuse_pointer(path: Path) -> None:
    """Raises InputError where git has left a pointer to a file instead of the file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise InputError(
                    f"{path}: a Git LFS pointer in place of the "
                    f"{'weights' if path.suffix in _WEIGHT_SUFFIXES else 'file'}; "
                    "fetch what it stands for with `git lfs pull`."
                )


def weight_files(folder: Path) -> tuple[Path, ...]:
    """One file of weights, or every shard by name; safetensors where there are any."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            files: tuple[Path, ...] = (folder / name,)
        elif (folder / index_of(name)).is_file():
            files = _shards(folder, name)
        else:
            continue
        for path in files:
            refuse_pointer(path)
        return files
    raise InputError(
        f"{folder}: no weights: neither {' nor '.join(WEIGHT_FILES)} is here; get the "
        "whole checkpoint."
    )


def _shards(folder: Path, name: str) -> tuple[Path, ...]:
    path = folder / index_of(name)
    told = _read_json(path, _LARGEST_INDEX).get("weight_map")
    # A name leads to a file of this folder and of this format, or nowhere.
    form = re.compile(rf"[A-Za-z0-9][\w.-]{{0,200}}{re.escape(Path(name).suffix)}")
    if not isinstance(told, dict) or not told or not all(isinstance(v, str) for v in told.values()):
        raise InputError(
            f"{path}: expected a weight_map of tensors and the files that hold them; get it again."
        )
    names = sorted(set(told.values()))
    if len(names) > _MOST_SHARDS or not all(form.fullmatch(shard) for shard in names):
        raise InputError(
            f"{path}: its weight_map names {len(names):,} files, expected at most {_MOST_SHARDS:,} "
            f"of this folder that end in {Path(name).suffix}; get it again."
        )
    missing = [shard for shard in names if not (folder / shard).is_file()]
    if missing:
        raise InputError(
            f"{folder / missing[0]}: is missing ({len(missing)} of the {len(names)} files that "
            f"{path.name} names are); get the whole checkpoint."
        )
    return tuple(folder / shard for shard in names)


def weights_sha256(files: Sequence[Path]) -> str:
    """What names the weights: a single file's SHA-256; of several, that of their list.

    The list is what `sha256sum` prints of them in the order of their names, so that
    `LC_ALL=C sha256sum *.safetensors | sha256sum` in the folder gives the same.
    """
    if len(files) == 1:
        return file_sha256(files[0])
    listed = "".join(
        f"{file_sha256(path)}  {path.name}\n" for path in sorted(files, key=lambda path: path.name)
    )
    return hashlib.sha256(listed.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as it lies on disk."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_weights(files: Sequence[Path]) -> dict[str, Tensor]:
    """Every tensor by name, on the CPU, in the type it is stored in. Raises InputError."""
    stored: dict[str, Tensor] = {}
    for path in files:
        found = _read_file(path)
        if twice := sorted(stored.keys() & found.keys()):
            raise InputError(
                f"{path}: {twice[0]} stands in another shard too; get the whole checkpoint again."
            )
        stored |= found
    return stored


def _read_file(path: Path) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch
    import torch

    damaged = "the file is damaged or not a checkpoint; get it again."
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path}: {error}: {damaged}") from error
    try:
        # The format before torch 1.6 cannot be mapped into memory.
        mapped = zipfile.is_zipfile(path)
        if mapped:
            with zipfile.ZipFile(path) as entries:
                if sum(entry.file_size for entry in entries.infolist()) > path.stat().st_size:
                    raise ValueError("compressed entries, which torch never writes")
        # weights_only: the unpickler makes tensors and nothing else, so loading runs no code.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # on a damaged file the unpickler raises whatever it trips over
        told = str(error).splitlines()[:1] or [type(error).__name__]
        raise InputError(f"{path}: {told[0]}: {damaged}") from error
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in state.items()
    ):
        raise InputError(f"{path}: holds something else than named tensors: {damaged}")
    return state


def licence(name: str, folder: Path) -> str:
    """The licence told by the hub name, config.json or the model card's header, or "unknown"."""
    if name.startswith("InstaDeepAI/"):
        return _NT_LICENCE
    config = read_config_file(folder)
    told = config.get("licence") or config.get("license")
    card = folder / CARD_FILE
    if not told and card.is_file():
        with card.open("rb") as file:
            text = file.read(_CARD_NBYTES).decode("utf-8", "replace")
        header = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        line = header and re.search(r"^licen[cs]e:\s*(\S+)\s*$", header[1], re.MULTILINE)
        told = line[1].strip("'\"") if line else None
    if not isinstance(told, str) or not told or len(told) > 200 or harmless(told) != told:
        return "unknown"
    return _SPDX.get(told.lower(), told)
