"""Who may work on what: a share of the work, one piece of it by a lease, or a folder by a lock.

`held` is a lock that the system drops when its holder ends, however it ends. A `Lease` works on
every file system that many machines share, where locks may be missing; it may be taken over, so
whatever it guards must bear being done twice.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from filelock import FileLock, SoftFileLease, Timeout

from had_pipe.durable import make_folder, storage
from had_pipe.errors import HeldError, RecipeError

LEASE_SECONDS = 60.0
"""A lease is another's once its holder has not been heard of for so long; all must agree on it."""


@dataclass(frozen=True)
class Share:
    """One of several jobs' part of the work: every `of`-th part, from `number`, counted from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From "3/8". Raises RecipeError."""
        found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise RecipeError(
                f"--share {text}: expected I/N with I from 1 to N, for example 3/8 for the third "
                "of eight jobs"
            )
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


class Lease:
    """One process's claim on one piece of work: a file that names its holder and is kept fresh.

    A holder that died on this machine is replaced at once; one that died elsewhere, or sleeps, once
    whoever wants the lease has watched it for `LEASE_SECONDS` by its own clock: ask the same object
    again. A sleeper that wakes up finds its lease `lost`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Taken in one thread and given back in another, when what it guards was written.
        self._file = SoftFileLease(path, lease_duration=LEASE_SECONDS, thread_local=False)
        self._nameless: tuple[tuple[int, int], float] | None = None

    def take(self) -> bool:
        """Take it if it is free. The folder is made; one that others just removed is not free."""
        try:
            make_folder(self.path.parent)
            with storage(self.path):
                self._file.acquire(blocking=False)
        except (Timeout, FileNotFoundError):
            self._sweep_nameless()
            return False
        return True

    def _sweep_nameless(self) -> None:
        """Remove a lease that stays empty: its maker was killed before writing its name.

        filelock takes over leases whose holder can be told to be gone, and so never this one.
        """
        try:
            told = self.path.stat()
        except OSError:
            return
        found, now = (told.st_ino, told.st_mtime_ns), time.monotonic()
        if told.st_size or self._nameless is None or self._nameless[0] != found:
            self._nameless = None if told.st_size else (found, now)
        elif now - self._nameless[1] >= self._file.lease_duration:
            with storage(self.path):
                self.path.unlink(missing_ok=True)

    @property
    def lost(self) -> bool:
        """Whether somebody else took it over, or swept it away."""
        token = self._file.token
        try:
            return token is None or token not in self.path.read_text("ascii")
        except (OSError, UnicodeDecodeError):
            return True

    @property
    def holder(self) -> str:
        """Who has it, for people: "process 7 on alpha"."""
        try:
            lines = self.path.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return "another process"
        said = dict(line.split("=", 1) for line in lines if "=" in line)
        if not {"pid", "host"} <= said.keys():
            return "another process"
        return f"process {said['pid']} on {said['host']}"

    def release(self) -> None:
        """Give it back; one that was lost is somebody else's, and stays."""
        with storage(self.path):
            self._file.release()


@contextmanager
def held(folder: Path, *, lock: str, doing: str) -> Iterator[None]:
    """Hold a folder until the block ends. Raises HeldError where another process, or thread, does.

    `lock` is the lock's file inside the folder; who holds it stands in a file beside it, for
    whoever is refused. `doing` ends the sentence "process 7 on alpha is ...".
    """
    path = folder / lock
    holder = path.with_name(f"{path.name}.holder")
    make_folder(path.parent)
    taken = FileLock(path)
    try:
        with storage(path):
            taken.acquire(timeout=0)
    except Timeout as error:
        raise HeldError(
            f"{folder}: {_who(holder)} is {doing}; wait until it is done, or stop it and run the "
            "same command again"
        ) from error
    try:
        with storage(holder):
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}", "utf-8")
        yield
    finally:
        # Only a name for others to read: that it cannot be removed must not hide what happened.
        with suppress(OSError):
            holder.unlink()
        taken.release()


def _who(holder: Path) -> str:
    """Whoever holds it may not have written its name yet, or have gone by now."""
    try:
        return holder.read_text("utf-8") or "another process"
    except (OSError, UnicodeDecodeError):
        return "another process"
