"""Teachers for workers: they write down every batch, and fail at windows that they are told of.

Kept apart from the tests, because workers import this and should start quickly.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy_teacher import NumpyTeacher

from had_pipe.cache import Cache, Part
from had_pipe.dna.kmers import reverse_complement


def digest(kmer_id_T: npt.NDArray[np.uint16]) -> str:
    """A window as the teacher sees it, in a word."""
    return hashlib.sha256(np.ascontiguousarray(kmer_id_T, "<u2").tobytes()).hexdigest()[:16]


def first_seen(cache: Cache, part: Part) -> str:
    """The first window of a part, in the same word."""
    kmer_id, _, reverse = cache.seen(part)
    return digest(reverse_complement(kmer_id[:1])[0] if reverse[0] else kmer_id[0])


@dataclass(kw_only=True)
class Diary(NumpyTeacher):
    """Writes down each batch, in one line, before and after it."""

    path: Path
    raises: frozenset[str] = frozenset()
    kills: frozenset[str] = frozenset()
    sleeps: frozenset[str] = frozenset()
    """Windows at which its process is stopped, the first time that anybody sees them."""
    error: Exception = field(default_factory=lambda: ArithmeticError("a window that cannot be"))
    """What `raises` raises."""

    def __post_init__(self) -> None:
        self._write("loaded", "-")

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Any:
        first = digest(kmer_id_WT[0])
        before = self.path.read_text()
        self._write("begun", first)
        if first in self.raises:
            raise self.error
        if first in self.kills:
            # Long enough that whatever else is at work here is at work.
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        if first in self.sleeps and f"begun {first}" not in before:
            os.kill(os.getpid(), signal.SIGSTOP)
        embedding = super().embed(kmer_id_WT, hidden_WT)
        self._write("embedded", first)
        return embedding

    def _write(self, what: str, first: str) -> None:
        line = f"{what} {first} {os.getpid()} {time.monotonic()}\n"
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(file, line.encode())
        os.close(file)


def lines(path: Path, what: str) -> list[tuple[str, int, float]]:
    """Of a diary: window, process and time of every line of a kind."""
    found = []
    for line in path.read_text().splitlines():
        kind, first, process, when = line.split()
        if kind == what:
            found.append((first, int(process), float(when)))
    return found
