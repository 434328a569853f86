"""A folder for one process alone: a lock the system drops when its holder ends, however it ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from had_pipe.durable import make_folder, storage
from had_pipe.errors import HeldError


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
