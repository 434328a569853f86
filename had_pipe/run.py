"""A run's folder: what lies in it, who the run is, and what it measured.

    RUN/
    ├── run.json        what the run is: recipe, caches, student, versions; written first
    ├── metrics.jsonl   one line a measurement; never a step twice
    ├── checkpoints/    whole-run state (had_pipe.checkpoint)
    └── student/        the student alone, with its card; written last, so it says the run is done

It reads and writes run.json and metrics.jsonl, and knows neither torch nor caches.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from io import FileIO
from pathlib import Path
from typing import Any

from had_pipe.durable import storage, write_file
from had_pipe.errors import InputError, NonFiniteError, RunMismatch

FORMAT = "had-run/1"
RUN, METRICS, CHECKPOINTS, STUDENT = "run.json", "metrics.jsonl", "checkpoints", "student"

# Keys of [train] that say where, how often and in what portions, not what is learnt: they may
# change within a run.
_CADENCE = (
    *("out", "log_every", "validate_every", "checkpoint_every"),
    *("micro_batch", "keep", "track"),
)

# Keys that recipes learnt later, at the value that says what was done before there were any: a run
# that was begun without them goes on.
_LEARNT = {
    "objective.align_on": "visible",
    "objective.pool": "mean",
    "objective.error": "mse",
    "objective.masking": "group",
    "objective.mask_tokens": "kept",
}

Row = Mapping[str, Any]
"""A line of metrics: its kind ("floors", "train", "validation") and its figures by name."""


def measured(row: Row, *keys: str) -> bool:
    """Whether a row holds a finite number under each key."""
    return all(isinstance(row.get(key), int | float) and math.isfinite(row[key]) for key in keys)


# Who a run is


def run_id(document: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a run's result; checkpoints carry it."""
    text = json.dumps(identity(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return sha256(text.encode()).hexdigest()


def begin(folder: Path, document: Mapping[str, Any]) -> None:
    """Write run.json, or find that the one there means the same run. Raises RunMismatch."""
    path = folder / RUN
    if not path.exists():
        others = [n for n in (METRICS, CHECKPOINTS, STUDENT) if (folder / n).exists()]
        if others:
            raise RunMismatch(
                f"{folder}: holds {', '.join(others)} but no {RUN}: these are not of a run "
                "that can be gone on with. Use another [train] out"
            )
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        write_file(path, text.encode(), aside=folder)
        return
    try:
        there = identity(json.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise RunMismatch(
            f"{path}: is not the record of a run ({error!r}). Use another [train] out"
        ) from error
    here = identity(document)
    keys = list(dict.fromkeys([*there, *here]))
    differing = [key for key in keys if there.get(key) != here.get(key)]
    if differing:
        width = max(len(key) for key in differing)
        raise RunMismatch(
            f"{folder} was begun by another recipe or cache:\n"
            + "".join(
                f"  {key:<{width}}   there {_show(there.get(key))}   here {_show(here.get(key))}\n"
                for key in differing
            )
            + "Use another [train] out, or restore these values."
        )


def identity(document: Mapping[str, Any]) -> dict[str, Any]:
    """What decides a run's result, flat: two runs that agree in it are one run."""
    found: dict[str, Any] = {"format": document["format"], "order": document["order"]}
    for section, values in document["recipe"].items():
        for key, value in values.items():
            # A key without a value is not there: a run goes on when its recipe learns a new key.
            later = value is None or _LEARNT.get(f"{section}.{key}") == value
            if not later and (section != "train" or key not in _CADENCE):
                found[f"{section}.{key}"] = value
    for i, cache in enumerate(document["caches"]):
        found[f"cache {i + 1}" if i else "cache"] = cache["id"]
    return found


def meant(key: str, value: object) -> object:
    """What a key of an identity means where it is absent: what was done before there was it."""
    return _LEARNT.get(key) if value is None else value


def _show(value: object) -> str:
    text = "(none)" if value is None else str(value)
    return text if len(text) <= 40 else text[:12] + "..."


# What it measured


class Metrics:
    """metrics.jsonl, cut back to where the checkpoint was saved, then appended to."""

    def __init__(self, folder: Path, *, nbytes: int) -> None:
        self._path = folder / METRICS
        self._nbytes = nbytes

    def __enter__(self) -> Metrics:
        with storage(self._path):
            # Without a buffer: closing one that a full disk did not take would fail once more.
            self._file: FileIO = self._path.open("ab", buffering=0)
            found = self._file.tell()
            if found < self._nbytes:
                self._file.close()
                raise InputError(
                    f"{self._path}: {found} bytes, but {self._nbytes} when the checkpoint was "
                    "saved: lines were lost; put the file back, or use another [train] out"
                )
            self._file.truncate(self._nbytes)
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, kind: str, **values: float | int) -> None:
        """Append a line. Raises NonFiniteError where a value is no number."""
        for name, value in values.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"{self._path.parent}: {kind}: {name} is {value}, not a number: "
                    "lower [train] lr or clip, and use another [train] out"
                )
        line = (json.dumps({"kind": kind, **values}) + "\n").encode()
        with storage(self._path):
            while line:
                line = line[self._file.write(line) :]

    def sync(self) -> int:
        """Make what was written durable; how many bytes that is."""
        with storage(self._path):
            os.fsync(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)


def read_metrics(folder: Path) -> list[Row]:
    """All lines of a run's metrics, if there are any. Raises InputError at a broken one."""
    path = folder / METRICS
    try:
        # What is no UTF-8 is no JSON either, and is told of below with its line.
        lines = path.read_text("utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        # Without its line feed the last line is one that a running process is still writing.
        if not line or number == len(lines):
            continue
        try:
            row = json.loads(line)
            rows.append({**row, "kind": row["kind"]})
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{path}: line {number} is not a line of metrics ({error}): {line[:60]!r}; the "
                "file was damaged, remove that line."
            ) from error
    return rows


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder says about itself."""

    folder: Path
    run: Mapping[str, Any]
    """run.json."""
    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    floors: Row | None

    def asked(self, section: str, key: str) -> Any:
        """What the recipe says; of a run that is older than the key, what was done then."""
        return meant(f"{section}.{key}", self.run["recipe"].get(section, {}).get(key))

    @property
    def steps(self) -> int:
        """Steps the recipe asks for."""
        return int(self.run["recipe"]["train"]["steps"])

    @property
    def step(self) -> int:
        """Last step that metrics tell of."""
        return max((int(row["step"]) for row in (*self.train, *self.validation)), default=0)


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises InputError where it is none, or a line of its metrics is broken."""
    told = folder / RUN
    try:
        run = json.loads(told.read_text("utf-8"))
    except OSError as error:
        raise InputError(
            f"{folder}: not a run: {RUN} cannot be read ({error.strerror}); give the folder "
            "that [train] out names in the recipe."
        ) from error
    except ValueError as error:
        raise InputError(f"{told}: not JSON ({error}); the file was changed by hand.") from error
    found = run.get("format") if isinstance(run, dict) else None
    if found != FORMAT:
        raise InputError(
            f"{told}: format {found!r}, but this had-pipe reads {FORMAT!r}; use the version "
            "that made the run."
        )
    try:
        identity(run)
        int(run["recipe"]["train"]["steps"])
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"{told}: is not the record of a run ({error!r}); the file was changed by hand."
        ) from error
    rows = read_metrics(folder)
    floors = [row for row in rows if row["kind"] == "floors"]
    return RunRecord(
        folder=folder,
        run=run,
        train=tuple(row for row in rows if row["kind"] == "train"),
        validation=tuple(row for row in rows if row["kind"] == "validation"),
        floors=floors[-1] if floors else None,
    )
