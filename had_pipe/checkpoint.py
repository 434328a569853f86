"""Whole-run state on disk: complete or absent, never half, and known by its bytes.

    checkpoints/step-00000500/
    ├── state.json            format, run, step, facts; nbytes and sha256 of every other file
    └── NAME.safetensors      one for each group of tensors: student, objective, optimiser, ...

It does not know what a run is: whoever saves says what the state means. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from had_pipe.durable import make_folder, publish, storage, sync_folder
from had_pipe.errors import InputError

FORMAT = "had-checkpoint/1"

_STATE = "state.json"
_NAME = re.compile(r"step-(\d{8,})")

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class State:
    """A run after `step` steps."""

    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By group (a file's name), then by name."""
    facts: Mapping[str, Any]
    """Whatever is JSON."""


def save(folder: Path, state: State, *, run: str, keep: int = 2) -> Path:
    """Save a state as the newest checkpoint of the run, then drop all but the newest `keep`.

    Raises StorageError where the disk fails; the earlier checkpoints are then as they were. Only
    one process may save into a folder at a time.
    """
    assert keep > 0
    make_folder(folder)
    final = folder / f"step-{state.step:08d}"
    aside = folder / f".{final.name}.tmp"
    with storage(folder):
        for leftover in folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
    try:
        with storage(aside):
            aside.mkdir()
            files = {}
            for group, tensors in state.tensors.items():
                data = safetensors.torch.save(
                    {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
                )
                _write(aside / f"{group}.safetensors", data)
                files[f"{group}.safetensors"] = {
                    "nbytes": len(data),
                    "sha256": hashlib.sha256(data).hexdigest(),
                }
            document = {
                "format": FORMAT,
                "run": run,
                "step": state.step,
                "facts": dict(state.facts),
                "files": files,
            }
            document["sha256"] = _digest(document)
            _write(aside / _STATE, json.dumps(document, indent=1, allow_nan=False).encode())
            sync_folder(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    with storage(final):
        # The same step is saved again after a validation that was due, or a fall back behind it.
        if final.exists():
            if _gone(final).exists():
                shutil.rmtree(_gone(final))
            final.rename(_gone(final))
    publish(aside, final)
    with storage(folder):
        for leftover in folder.glob(".step-*"):
            shutil.rmtree(leftover)
    # Later ones could not be read, or the run would not stand here: they do not count.
    sound = [path for path in checkpoints(folder) if _step(path) <= state.step]
    for old in sound[keep:]:
        _discard(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first. Each was whole when it was published."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def load(folder: Path, *, run: str) -> State | None:
    """The newest state that is whole and this run's own; None where nothing was saved yet.

    One that is damaged or foreign is passed over with a warning in the log. Raises InputError
    where there are checkpoints and none of them can be used.
    """
    faults = []
    # What was being replaced comes last: it is all there is where a kill came in between.
    gone = sorted(folder.glob(".step-*.gone"), key=_step, reverse=True)
    for path in [*checkpoints(folder), *gone]:
        try:
            state = _read(path, run=run)
        except _Unusable as fault:
            log.warning("%s: %s; falling back to the one before", path, fault)
            faults.append(f"  {path.name}   {fault}")
            continue
        return state
    if faults:
        raise InputError(
            "\n".join([f"{folder}: no checkpoint can be used:", *faults])
            + "\nPut back a good copy, or remove this folder to train from the start."
        )
    return None


class _Unusable(Exception):
    """Why a checkpoint cannot be loaded."""


def _read(path: Path, *, run: str) -> State:
    try:
        document = json.loads((path / _STATE).read_bytes())
    except (OSError, ValueError) as error:
        raise _Unusable(f"{_STATE} cannot be read ({error})") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise _Unusable(f"{_STATE} is not of format {FORMAT}")
    if document.pop("sha256", None) != _digest(document):
        raise _Unusable(f"{_STATE} is not what was saved")
    if document["run"] != run:
        raise _Unusable(f"it belongs to another run ({document['run'][:12]}, not {run[:12]})")
    if document["step"] != _step(path):
        raise _Unusable(f"it is of step {document['step']}")
    tensors = {}
    for name, expected in document["files"].items():
        try:
            data = (path / name).read_bytes()
        except OSError as error:
            raise _Unusable(f"{name} cannot be read ({error.strerror})") from error
        if hashlib.sha256(data).hexdigest() != expected["sha256"]:
            raise _Unusable(
                f"{name} is not what was saved ({len(data)} bytes, {expected['nbytes']} saved)"
            )
        tensors[name.removesuffix(".safetensors")] = safetensors.torch.load(data)
    return State(step=document["step"], tensors=tensors, facts=document["facts"])


def pack(state: State) -> bytes:
    """A state as one piece, for processes that do not see the folder."""
    told = {"step": state.step, "facts": dict(state.facts), "groups": list(state.tensors)}
    tensors = {
        f"{group}/{name}": tensor.detach().cpu().contiguous()
        for group, tensors in state.tensors.items()
        for name, tensor in tensors.items()
    }
    return safetensors.torch.save(tensors, {"state": json.dumps(told, allow_nan=False)})


def unpack(data: bytes) -> State:
    """What `pack` was given."""
    length = int.from_bytes(data[:8], "little")
    told = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
    tensors: dict[str, dict[str, Tensor]] = {group: {} for group in told["groups"]}
    for key, tensor in safetensors.torch.load(data).items():
        group, _, name = key.partition("/")
        tensors[group][name] = tensor
    return State(step=told["step"], tensors=tensors, facts=told["facts"])


def optimiser_state(optimiser: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser as tensors, and what of it is JSON."""
    state = optimiser.state_dict()
    tensors, numbers = {}, {}
    for parameter, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{parameter}.{name}"] = value
            else:
                numbers[f"{parameter}.{name}"] = value
    return tensors, {"groups": state["param_groups"], "numbers": numbers}


def restore_optimiser(
    optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Put an optimiser of the same parameters back to where `optimiser_state` found it."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in {**tensors, **facts["numbers"]}.items():
        parameter, _, name = key.partition(".")
        state.setdefault(int(parameter), {})[name] = value
    groups = [
        {key: tuple(v) if key == "betas" else v for key, v in group.items()}
        for group in facts["groups"]
    ]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _step(path: Path) -> int:
    match = _NAME.search(path.name)
    assert match
    return int(match[1])


def _digest(document: Mapping[str, Any]) -> str:
    """Of the rest of state.json: what it says of the others holds only if it is whole itself."""
    text = json.dumps(document, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    """Remove a checkpoint; killed within, what is left of it is not taken for one."""
    if path.exists():
        with storage(path):
            path.rename(_gone(path))
            shutil.rmtree(_gone(path))


def _gone(path: Path) -> Path:
    """What a checkpoint is called that is being removed, or replaced."""
    return path.with_name(f".{path.name}.gone")
