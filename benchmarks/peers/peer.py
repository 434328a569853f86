"""The side of a peer: a process that reads the same windows through another library.

It is spoken to in lines of JSON. A first line gives the Job; `prepare` has it write the windows in
its own format, once; `check` has it read one epoch and tell the first bytes and the CRC of every
window; `go` has it read and tells bytes, seconds and the first bytes of every window it delivered,
so that nobody is timed for windows that were not read. A pass begins when the first batch is asked
for and ends when the last one is an array in memory; open files and running workers stay so
between passes, as between the epochs of a training.

W windows, B windows of a batch.
"""

from __future__ import annotations

import base64
import json
import os
import resource
import sys
import traceback
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

HEAD = 8
"""So many first bytes of a window tell it from all others: they are random."""

Array = Any
"""numpy.ndarray; its generic form differs between the versions of NumPy that peers need."""


@dataclass(frozen=True)
class Job:
    raw: str
    """All windows one after another, (W, *window) int8."""
    cache: str
    """The same windows as a cache; its data.zarr is for those who read Zarr."""
    folder: str
    """Where a peer writes its own format."""
    windows: int
    window: tuple[int, ...]
    part: int
    """Windows of a shard."""
    batch: int
    rows: list[list[int]]
    """Rows of the batches of an epoch, ascending: for those to whom one tells what to read."""
    threads: int

    @property
    def nbytes(self) -> int:
        """Of a window."""
        return int(np.prod(self.window))

    def source(self) -> Array:
        """The windows, to write them from."""
        return np.memmap(self.raw, dtype=np.int8, mode="r", shape=(self.windows, *self.window))

    def runs(self, rows: list[int]) -> list[tuple[int, int, int]]:
        """Neighbours among rows: their place in the batch, the first row, the row after the last.

        Neighbours of two shards are two runs.
        """
        row = np.array(rows)
        apart = (np.diff(row) != 1) | (np.diff(row // self.part) != 0)
        edges = [0, *(np.flatnonzero(apart) + 1).tolist(), len(rows)]
        return [(first, rows[first], rows[end - 1] + 1) for first, end in pairwise(edges)]

    def buffer(self) -> Array:
        """Memory for a batch, for those that can read into what is there."""
        return np.zeros((self.batch, *self.window), dtype=np.int8)


class Peer(ABC):
    """One way to read batches."""

    packages: tuple[str, ...]
    """Whose versions to tell."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def prepare(self) -> None:
        """Write the windows in the library's own format; nothing where it reads the cache."""
        return

    def open(self) -> None:
        """Whatever a training does once, before its first epoch."""
        return

    @abstractmethod
    def epoch(self) -> Iterator[Array]:
        """Batches of shape (B, *window); one may be overwritten when the next is asked for."""

    @property
    def folder(self) -> Path:
        return Path(self.job.folder)


def serve(kind: type[Peer], *arguments: Any) -> None:
    """Answer lines until there are no more."""
    # What a library prints must not come between: standard output is kept for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: dict[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    try:
        told = json.loads(sys.stdin.readline())
        job = Job(**{**told, "window": tuple(told["window"])})
        peer = kind(job, *arguments)
        answer({"versions": {name: version(name) for name in ("numpy", *peer.packages)}})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "prepare":
                peer.prepare()
                answer({})
            elif asked["do"] == "check":
                peer.open()
                answer(_check(peer))
            else:
                answer(_go(peer, asked["windows"]))
    except BaseException as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"[:300]})
        raise SystemExit(1) from None


def _check(peer: Peer) -> dict[str, Any]:
    begun = perf_counter()
    heads, crcs = [], []
    for batch in peer.epoch():
        flat = _flat(peer, batch)
        heads.append(flat[:, :HEAD].copy())
        crcs.append(np.array([zlib.crc32(row) for row in flat], dtype=np.uint32))
    seconds = perf_counter() - begun
    return {
        "heads": _text(np.concatenate(heads)),
        "crcs": _text(np.concatenate(crcs)),
        "seconds": seconds,
    }


def _go(peer: Peer, windows: int) -> dict[str, Any]:
    heads, done = [], 0
    cpu, begun = cpu_seconds(), perf_counter()
    for batch in peer.epoch():
        heads.append(_flat(peer, batch)[:, :HEAD].copy())
        done += len(batch)
        if done >= windows:
            break
    seconds = perf_counter() - begun
    return {
        "nbytes": done * peer.job.nbytes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds() - cpu,
        "heads": _text(np.concatenate(heads)),
    }


def _flat(peer: Peer, batch: Array) -> Array:
    assert batch.shape[1:] == peer.job.window, batch.shape
    assert batch.dtype == np.int8, batch.dtype
    assert batch.flags.c_contiguous
    return batch.reshape(len(batch), -1).view(np.uint8)


def _text(array: Array) -> str:
    return base64.b64encode(array.tobytes()).decode()


def cpu_seconds() -> float:
    """Of this process, of those it has waited for, and of its children that still run."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    tick = os.sysconf("SC_CLK_TCK")
    children: dict[int, list[tuple[int, float]]] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            fields = (process / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        seconds = (int(fields[11]) + int(fields[12])) / tick
        children.setdefault(int(fields[1]), []).append((int(process.name), seconds))
    left = [os.getpid()]
    while left:
        for process_id, seconds in children.get(left.pop(), []):
            total += seconds
            left.append(process_id)
    return total
