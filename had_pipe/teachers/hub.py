"""Checkpoints of the Hugging Face hub at one commit: fetched, checked, found again without network.

A branch or tag may move, so a commit is asked for everywhere. Only the files that a teacher needs
are fetched, and none of them is run.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from had_pipe.errors import InputError, NetworkError, RecipeError
from had_pipe.teachers.folder import (
    CARD_FILE,
    CONFIG_FILE,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    file_sha256,
    index_of,
    licence,
    read_config_file,
    weight_files,
    weights_sha256,
)

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def snapshot(name: str, revision: str | None, *, offline: bool) -> Path:
    """A folder with the files of a hub model at one commit, fetched where it is not yet here."""
    from huggingface_hub import constants, errors, snapshot_download

    where, revision = _pinned(name, revision)
    try:
        # What a commit holds never changes, so that what is here is not asked for.
        folder = Path(
            snapshot_download(
                name, revision=revision, local_files_only=True, cache_dir=constants.HF_HUB_CACHE
            )
        )
        read_config_file(folder)
        weight_files(folder)  # fetched last
        return folder
    except (errors.LocalEntryNotFoundError, InputError) as error:
        if offline:
            whole = "whole " if isinstance(error, InputError) else ""
            raise NetworkError(
                f"{where}: not {whole}in the local hub cache, and the hub may not be asked; run "
                f"`had-pipe teachers fetch {name}@{revision}` where there is network, or copy the "
                "model's folder here and name the folder."
            ) from error
    return fetch(f"{name}@{revision}").path


def _pinned(name: str, revision: str | None) -> tuple[str, str]:
    """How a model at a commit is called in messages, and the commit. Raises RecipeError."""
    if revision is None or not _COMMIT.fullmatch(revision):
        raise RecipeError(
            f"[teacher] revision = {revision!r}: {name} needs a commit of 40 hexadecimal digits, "
            "because a branch or tag may move; copy it from the model's page under 'Files', "
            "'History'."
        )
    return f"{name} at {revision[:12]}", revision


@contextmanager
def _telling(where: str) -> Iterator[None]:
    """What goes wrong between here and the hub, as errors of ours."""
    from huggingface_hub import errors

    try:
        yield
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise InputError(
            f"{where}: the hub knows no such model or commit, or does not show it without a login; "
            "mend the name or the commit."
        ) from error
    except Exception as error:
        # Which HTTP client stands below, and so its errors, changes with the hub client's version;
        # the hub client's own error is always derived from theirs.
        if not isinstance(error, (*errors.HfHubHTTPError.__bases__, OSError)):
            raise
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the disk, not the network
        raise NetworkError(
            f"{where}: the hub could not be reached, or broke off ({type(error).__name__}); check "
            "the connection and run again, which goes on where it stopped, or name a folder."
        ) from error


# Fetching


@dataclass(frozen=True, kw_only=True)
class Fetched:
    """A checkpoint that lies here, every file held against what the hub says of it."""

    name: str
    revision: str
    path: Path
    nbytes: int
    files: Sequence[str]
    weights_sha256: str
    licence: str


def fetch(reference: str, *, folder: Path | None = None) -> Fetched:
    """Download `NAME@COMMIT` into the hub cache, or laid out plainly into a folder.

    What is there already and whole is not asked for again; a stopped download goes on. Raises
    RecipeError, InputError, NetworkError.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars

    name, _, revision = reference.partition("@")
    if not HUB_NAME.fullmatch(name) or not _COMMIT.fullmatch(revision):
        named = name if HUB_NAME.fullmatch(name) else "organisation/model"
        raise RecipeError(
            f"{reference!r}: expected NAME@COMMIT, a hub name and its commit of 40 hexadecimal "
            "digits, because a branch or tag may move. "
            f"`git ls-remote {constants.ENDPOINT}/{named}` lists the commits; so does the model's "
            "page under 'Files', 'History'."
        )
    where, _ = _pinned(name, revision)
    if folder is not None:
        _check_ours(folder)
    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    with _telling(where):
        told = HfApi(endpoint=constants.ENDPOINT).model_info(
            name, revision=revision, files_metadata=True
        )
    here: list[Path] = []
    for entry in _needed(where, told.siblings or []):
        path = None if folder is None else folder / entry.rfilename
        if path is None or not path.is_file() or _differs(path, entry):
            with _telling(where):
                path = Path(
                    hf_hub_download(
                        name,
                        entry.rfilename,
                        revision=revision,
                        local_dir=folder,
                        cache_dir=constants.HF_HUB_CACHE,
                        endpoint=constants.ENDPOINT,
                    )
                )
        if said := _differs(path, entry):
            # Else the next attempt would take it for whole.
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise InputError(
                f"{where}: {entry.rfilename} is not what the hub says it is ({said}); it was "
                "removed: fetch again, and if it comes again, do not trust the way to the hub."
            )
        here.append(path)
    if folder is not None:
        _tidy(folder)
    at = here[0].parent
    return Fetched(
        name=name,
        revision=revision,
        path=at,
        nbytes=sum(path.stat().st_size for path in here),
        files=[path.name for path in here],
        weights_sha256=weights_sha256(weight_files(at)),
        licence=licence(name, at),
    )


def _check_ours(folder: Path) -> None:
    """Raises InputError where a folder holds something else than a checkpoint, whole or begun."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: not a folder; name another --folder.")
    ours = {CONFIG_FILE, CARD_FILE, *TOKENIZER_FILES, ".cache"}
    strangers = sorted(
        entry.name
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.name not in ours and not _is_weights(entry.name)
    )
    if strangers:
        raise InputError(
            f"{folder}: holds {', '.join(strangers[:3])}, which is no checkpoint's; name an empty "
            "--folder, or one that does not exist."
        )


def _is_weights(name: str, weights: Sequence[str] = WEIGHT_FILES) -> bool:
    """Whether a name is that of weights, in one file or in shards, or of their index."""
    for whole in weights:
        stem, suffix = Path(whole).stem, Path(whole).suffix
        if name in (whole, index_of(whole)):
            return True
        if re.fullmatch(rf"{re.escape(stem)}-\d+-of-\d+{re.escape(suffix)}", name):
            return True
    return False


def _needed(where: str, entries: Sequence[Any]) -> list[Any]:
    """The files of a model that a teacher is loaded from, config.json first."""
    by_name = {entry.rfilename: entry for entry in entries}
    if CONFIG_FILE not in by_name:
        raise InputError(
            f"{where}: holds no {CONFIG_FILE}, so it is no model that can be loaded; name another."
        )
    wanted = [name for name in (CONFIG_FILE, CARD_FILE, *TOKENIZER_FILES) if name in by_name]
    for weights in WEIGHT_FILES:
        if weights in by_name:
            return [by_name[name] for name in (*wanted, weights)]
        if index_of(weights) in by_name:
            shards = sorted(name for name in by_name if _is_weights(name, [weights]))
            return [by_name[name] for name in (*wanted, *shards)]
    raise InputError(
        f"{where}: holds no weights, neither {' nor '.join(WEIGHT_FILES)}; name another model or "
        "commit."
    )


def _differs(path: Path, entry: Any) -> str:
    """What is wrong with a file, by what the hub says of it; empty where nothing."""
    nbytes = path.stat().st_size
    if entry.size is not None and nbytes != entry.size:
        return f"{nbytes:,} bytes, expected {entry.size:,}"
    if entry.lfs is not None:
        found, expected = file_sha256(path), str(entry.lfs.sha256)
        return "" if found == expected else f"SHA-256 {found}, expected {expected}"
    if entry.blob_id is None:
        return ""
    # Small files are named as git names them.
    digest = hashlib.sha1(b"blob %d\0" % nbytes, usedforsecurity=False)
    digest.update(path.read_bytes())
    found = digest.hexdigest()
    return "" if found == entry.blob_id else f"git blob {found}, expected {entry.blob_id}"


def _tidy(folder: Path) -> None:
    """Remove the hub client's notes on a download that is finished."""
    shutil.rmtree(folder / ".cache" / "huggingface", ignore_errors=True)
    notes = folder / ".cache"
    if notes.is_dir() and not any(notes.iterdir()):
        notes.rmdir()
