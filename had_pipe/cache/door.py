"""The way into a cache's folder: one file of it, reached through no link, never longer than said.

Whoever made the folder may be a stranger, and may still be changing it: names are followed one
folder at a time from a folder that is held open, so nothing outside can be put in their way. A
hard link is a file like any other: what is read through it is held against its digest all the same.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from had_pipe.errors import CacheRefused

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
# Without O_NONBLOCK, opening a FIFO that was put there since waits for its other end.
_FILE = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC

_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def open_object(cache: Path, key: str) -> int:
    """A descriptor of one file of a cache, to be closed by the caller.

    Raises CacheRefused where a link, or what is no ordinary file, stands in the way; OSError where
    there is nothing, or it cannot be opened.
    """
    *folders, name = key.split("/")
    here = os.open(cache, _FOLDER & ~os.O_NOFOLLOW)  # the caller named it: it may be a link
    try:
        for depth, folder in enumerate(folders):
            try:
                inner = os.open(folder, _FOLDER, dir_fd=here)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                found = os.stat(folder, dir_fd=here, follow_symlinks=False)
                raise CacheRefused(
                    f"{cache.joinpath(*folders[: depth + 1])}: expected an ordinary folder, "
                    f"found {_kind(found)}; copy the cache again"
                ) from None
            # In this order: what a signal makes of it is left open, never closed twice, for by then
            # the number may be another thread's file.
            outer, here = here, inner
            os.close(outer)
        # Looked at first: to open a device can be to use it.
        _require_file(os.stat(name, dir_fd=here, follow_symlinks=False), cache / key)
        try:
            opened = os.open(name, _FILE, dir_fd=here)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise _refused(cache / key, "a link") from None
    finally:
        os.close(here)
    try:
        _require_file(os.fstat(opened), cache / key)
    except CacheRefused:
        os.close(opened)
        raise
    return opened


def read_object(cache: Path, key: str, *, limit: int, start: bytes = b"") -> bytes:
    """One file of a cache, if it has at most `limit` bytes and begins as it must."""
    return read_opened(open_object(cache, key), cache / key, limit=limit, start=start)


def read_opened(descriptor: int, path: Path, *, limit: int, start: bytes = b"") -> bytes:
    """The same of a file that was opened before and is closed here; `path` is for messages."""
    with open(descriptor, "rb", buffering=0) as file:
        nbytes = os.fstat(file.fileno()).st_size
        if nbytes > limit:
            raise CacheRefused(
                f"{path}: {nbytes:,} bytes, expected at most {limit:,}; copy it again"
            )
        # Before room is made for the rest: a hole of that length costs its maker nothing.
        pieces = [file.read(len(start))]
        if pieces[0] != start:
            raise CacheRefused(
                f"{path}: not what format 1 says: begins with {pieces[0]!r}, "
                f"expected {start!r}; copy it again"
            )
        left = nbytes - len(pieces[0])
        while left and (piece := file.read(left)):
            pieces.append(piece)
            left -= len(piece)
    return b"".join(pieces)


def _require_file(found: os.stat_result, path: Path) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _refused(path, _kind(found))


def _refused(path: Path, found: str) -> CacheRefused:
    return CacheRefused(f"{path}: expected an ordinary file, found {found}; copy the cache again")


def _kind(found: os.stat_result) -> str:
    return _KINDS.get(stat.S_IFMT(found.st_mode), "something else")
