"""The order in which things become durable: what a power cut could show that a receipt denies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from disturbed import Step, Worker, tables, wait_for, watch
from numpy_teacher import NumpyTeacher

from had_pipe import extract as stage_one
from had_pipe.cache import layout
from had_pipe.recipe import Recipe


def trace_of(genome: str, folder: str, *, workers: int, slow: float) -> dict[str, Any]:
    """Processes that make one cache together, all their steps told in order, and what is wrong.

    The first of them dawdles for `slow` seconds between making a folder and syncing it into its
    parent, and between a rename and the sync of its folder: the others come in between.
    """
    path = Path(folder) / "cache"
    told = os.open(Path(folder) / "trace", os.O_CREAT | os.O_APPEND | os.O_RDWR)

    def traced(worker: Worker, teacher: NumpyTeacher) -> None:
        def write(step: Step, key: str) -> None:
            # One line at a time, before a call begins or after it has ended: so the order of lines
            # is an order in which things may be relied upon.
            line = json.dumps([step.when, step.doing, key, threading.get_native_id()])
            os.write(told, line.encode() + b"\n")
            made = step.when == "after" and step.doing in ("mkdir", "replace")
            if worker is group[0] and made and not key.startswith(f"{layout.WORK}/plan-"):
                time.sleep(5 * slow if key.startswith(layout.PLAN) else slow)

        watch(worker.path, write)
        stage_one.extract(Recipe.model_validate(worker.asked), teacher=teacher)

    asked = tables(Path(genome), path)
    group = [Worker(asked=asked, run=traced) for _ in range(workers)]
    group[0].start()
    wait_for(path / layout.PLAN)  # so that it is the one that plans, and has not synced it
    codes = [worker.ended() for worker in [group[0], *(worker.start() for worker in group[1:])]]
    events = read_trace(Path(folder) / "trace")
    return {"codes": codes, "wrong": disorder(events, path), "events": len(events)}


@dataclass(frozen=True)
class Event:
    """A change of a cache's folder, as it was traced."""

    when: str
    doing: str
    key: str
    """Where; of a rename the new name, and the old one after a tab."""
    thread: int = 0


def read_trace(path: Path) -> list[Event]:
    return [Event(*json.loads(line)) for line in path.read_text().splitlines()]


def disorder(events: Sequence[Event], path: Path) -> list[str]:
    """What a power cut could show that receipts or manifest deny, by the order of events alone.

    A file must be synced before it is renamed; the folder of a renamed file, and the parent of each
    folder made on the way to it, before the receipt that names it is renamed; likewise the
    receipts' before the manifest; a receipt's own before its lease is given back.
    """
    plan = layout.read_plan(path)[0]
    shards = {part.receipt_key: [part.shard_key(s) for s in plan.signals] for part in plan.parts()}
    leases = {f"{layout.WORK}/leases/{part.stem}.lock": part.receipt_key for part in plan.parts()}
    unsynced: set[str] = set()
    synced: set[str] = set()
    # Entries of each folder that no sync covers yet, and those that one now going on covers.
    owed: dict[str, set[str]] = {}
    covered: dict[tuple[str, int], set[str]] = {}
    renamed: set[str] = set()
    wrong = []

    def above(key: str) -> Iterator[tuple[str, str]]:
        while key != ".":
            folder = os.path.dirname(key) or "."  # noqa: PTH120
            yield folder, key
            key = folder

    def undurable(key: str) -> list[str]:
        lacking = [] if key in renamed else [f"{key} is not there"]
        return lacking + [
            f"{one} in {folder}" for folder, one in above(key) if one in owed.get(folder, ())
        ]

    for event in events:
        key, _, old = event.key.partition("\t")
        folder = os.path.dirname(key) or "."  # noqa: PTH120
        match event.when, event.doing:
            case "before", "open":
                unsynced.add(key)
                synced.discard(key)
            case "after", "fsync":
                unsynced.discard(key)
                synced.add(key)
            case "before", "replace":
                if old.endswith(".tmp") and old not in synced:
                    wrong.append(f"{old} was renamed to {key} unsynced")
                needed = [layout.PLAN, *shards[key]] if key in shards else []
                if key == layout.MANIFEST:
                    needed = [*shards, layout.PLAN, layout.WINDOWS, layout.DATA]
                wrong += [f"{key} came before {one}" for what in needed for one in undurable(what)]
            case "after", "replace":
                renamed.add(key)
                owed.setdefault(folder, set()).add(key)
            case "after", "mkdir":
                owed.setdefault(folder, set()).add(key)
            case "before", "folder":
                covered[key, event.thread] = set(owed.get(key, ()))
            case "after", "folder":
                # What was listed when this sync began is durable, and no more.
                owed.get(key, set()).difference_update(covered[key, event.thread])
            case "before", "unlink" if key in leases and leases[key] in renamed:
                wrong += [f"{key} was given back before {one}" for one in undurable(leases[key])]
    return wrong


# The same, as the system saw it


_CALL = re.compile(r"^(\d+) +(?:<\.\.\. )?(\w+)(?: resumed>|\()(.*)$")
_PATHS = re.compile(r'"((?:[^"\\]|\\.)*)"|(?:\d+|AT_FDCWD)<([^>]*)>')


def strace_of(command: Sequence[str], trace: Path, cache: Path) -> list[Event]:
    """Run a command under strace; what it changed of a cache's folder."""
    calls = "openat,fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat"
    subprocess.run(
        ["strace", "-f", "-y", "-s", "4096", "-o", trace, "-e", f"trace={calls}", *command],
        check=True,
        capture_output=True,
        cwd=Path(__file__).parent,
    )
    events: list[Event] = []
    open_calls: dict[str, Event | None] = {}
    for line in trace.read_text("utf-8", "replace").splitlines():
        found = _CALL.match(line)
        if found is None:
            continue
        process, call, rest = found.groups()
        if "resumed>" not in line.split("(")[0]:
            event = open_calls[process] = _event_of(call, rest, cache, int(process))
            if event is not None:
                events.append(event)
        if "<unfinished" not in rest:
            event = open_calls.pop(process, None)
            if event is not None and " = -1" not in rest:
                events.append(Event("after", event.doing, event.key, event.thread))
    return events


def _event_of(call: str, rest: str, cache: Path, thread: int) -> Event | None:
    """A system call's beginning, if it changes something below the cache."""
    names = [text or path for text, path in _PATHS.findall(rest.split(") = ")[0])]
    # A folder given as AT_FDCWD comes first; a name below an open folder follows it.
    if call.endswith("at") or call == "renameat2":
        names = _joined(names)
    keys = [os.path.relpath(name, cache) for name in names]
    if not keys or any(key.startswith("..") for key in keys):
        return None
    match call:
        case "openat":
            return Event("before", "open", keys[0], thread) if "O_CREAT" in rest else None
        case "fsync" | "fdatasync":
            return Event(
                "before", "folder" if (cache / keys[0]).is_dir() else "fsync", keys[0], thread
            )
        case "rename" | "renameat" | "renameat2":
            return Event("before", "replace", f"{keys[1]}\t{keys[0]}", thread)
        case "mkdir" | "mkdirat":
            return Event("before", "mkdir", keys[0], thread)
        case _:
            return Event("before", "unlink", keys[0], thread)


def _joined(names: Sequence[str]) -> list[str]:
    """Pairs of a folder and a name in it as paths; -y tells what AT_FDCWD and descriptors are."""
    folders, found = names[::2], names[1::2]
    pairs = zip(folders, found, strict=False)
    return [os.path.join(folder, name) for folder, name in pairs]  # noqa: PTH118
