"""Files that are whole or absent: written aside, synced, renamed, and the folder synced.

A kill or a power cut leaves the old state or the new one, never half of either.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from had_pipe.errors import StorageError

TROUBLE = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EIO: "the disk reports an input/output error",
    errno.EROFS: "the file system is read-only",
    errno.ESTALE: "the network file system lost the file",
    errno.EFBIG: "the file is larger than allowed here",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
}
"""What an errno means where the disk is at fault, in words."""


def as_storage_error(error: OSError, path: Path | None = None) -> StorageError | None:
    """What a failing disk means to whoever runs the command; None where it is no disk's fault."""
    if error.errno not in TROUBLE:
        return None
    where = path or error.filename
    return StorageError(
        f"{f'{where}: ' if where else ''}{TROUBLE[error.errno]}. Everything committed so far is "
        "intact; mend that, then run the same command again"
    )


@contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn a failing disk into a StorageError that says what is safe and how to go on."""
    try:
        yield
    except OSError as error:
        failed = as_storage_error(error, path)
        if failed is None:
            raise
        raise failed from error


def free_nbytes(path: Path) -> int:
    """Bytes free where a path is, or would be."""
    return shutil.disk_usage(_existing(path)).free


def free_files(path: Path) -> int | None:
    """Files that may still be made where a path is, or would be; None where there is no limit."""
    told = os.statvfs(_existing(path))
    return told.f_favail if told.f_files else None


def require_room(target: Path, nbytes: int, files: int) -> None:
    """Raise StorageError where what is still to be written does not fit, before any of it is."""
    free, free_inodes = free_nbytes(target), free_files(target)
    if nbytes > free:
        raise StorageError(
            f"{target}: {nbytes / 1e9:,.2f} GB are still to be written, {free / 1e9:,.2f} GB are "
            "free; make room, then run the same command again"
        )
    if free_inodes is not None and files > free_inodes:
        raise StorageError(
            f"{target}: {files:,} files are to be written, the file system has room for "
            f"{free_inodes:,}; make room, then run the same command again"
        )


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def sync_folder(folder: Path) -> None:
    """Make renames and creations in a folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path, *, below: Path | None = None) -> None:
    """Create a folder and its parents, each durably.

    Under `below` those that exist are synced into their parents too: another process may just have
    made them, and not come to it yet.
    """
    missing = []
    while not folder.exists() or (below is not None and below in folder.parents):
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        with storage(new):
            new.mkdir(exist_ok=True)
            sync_folder(new.parent)


def publish(temporary: Path, final: Path) -> None:
    """Rename a synced file or folder into place, durably. The parent must exist."""
    with storage(final):
        temporary.replace(final)
        sync_folder(final.parent)


def write_file(final: Path, data: bytes, *, aside: Path) -> None:
    """Write one file durably by way of the folder `aside`, on the same file system."""
    temporary = aside / f"{final.name}.{uuid.uuid4().hex}.tmp"
    try:
        with storage(final), temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, final)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync_tree(folder: Path) -> None:
    """Sync every file and folder below and including `folder`."""
    with storage(folder):
        for parent, _, names in os.walk(folder, topdown=False):
            for name in names:
                descriptor = os.open(Path(parent, name), os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            sync_folder(Path(parent))
