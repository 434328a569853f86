"""One shard object, open: its rows into the caller's memory, each held against its CRC.

Rows lie one after another, each followed by the four bytes of its CRC. They are read where they
lie, by `preadv` past those four bytes, or past the page cache altogether (O_DIRECT); those of a
store that another tool has laid out anew, through zarr-python. Which shards a part has is the
business of had_pipe.cache.reader.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import crc32c
import numpy as np
import numpy.typing as npt

from had_pipe.cache.layout import (
    CRC_NBYTES,
    DATA,
    ShardRecord,
    Signal,
    shard_index,
    shard_nbytes,
)
from had_pipe.errors import CacheCorrupt, StorageError

Due = npt.NDArray[np.bool_]
"""Which of some neighbouring rows are to be held against their CRC."""

_ROWS_A_CALL = 512  # preadv takes at most IOV_MAX (1024) buffers, two a row
_CHECKED_AT_ONCE = 300 << 10  # read, then checked while it is still in the core's own cache
_ADVISED_AT_ONCE = 128 << 10  # Linux cuts longer advice to the device's read-ahead, often this
_ALIGNED = 4096  # what O_DIRECT may want of offset, length and memory
_BOUNCED = 1 << 20


class Rows(Protocol):
    """The rows of one array of a part."""

    def read(self, first: int, targets: list[memoryview], due: Due | None) -> None:
        """Rows `first` on, one into each target; those that are `due` held against their CRC."""

    def read_all(self, *, check: bool) -> npt.NDArray[Any]:
        """Every row of a small array."""

    def advise(self, first: int, rows: int) -> None:
        """Have the kernel fetch rows that will be read soon."""


class Shard:
    """One shard object: an open file whose rows lie one after another. For any threads."""

    def __init__(
        self,
        path: Path,
        signal: Signal,
        record: ShardRecord,
        fd: int,
        *,
        direct: bool,
        passing: bool,
        remedy: str,
    ) -> None:
        self.path = path
        self._remedy = remedy
        self.signal = signal
        self.crc = record.crcs()
        self._sha256 = record.sha256
        self._nbytes = record.nbytes
        self._fd = fd
        self._direct = direct
        # Of shards that the page cache must not keep: how many rows came since it last let go.
        self._passing = passing
        self._passed = 0
        self._lock = threading.Lock()

    def __del__(self) -> None:
        # Closed by the last user, not by the list of open parts: a thread may still be reading.
        if self._passing and self._passed:
            self._drop()
        os.close(self._fd)

    @classmethod
    def open(
        cls,
        path: Path,
        fd: int,
        signal: Signal,
        record: ShardRecord,
        *,
        windows: int,
        part: int,
        direct: bool = False,
        passing: bool = False,
        remedy: str,
        wrong: Callable[[str], Exception],
    ) -> Shard:
        """Take over a descriptor; length and index must be what the plan says, or `wrong` makes the
        error to raise. `direct` reads past the page cache; what is `passing` leaves it once read;
        `remedy` tells what to do about damage.
        """
        shard = cls(path, signal, record, fd, direct=direct, passing=passing, remedy=remedy)
        nbytes = os.fstat(fd).st_size
        expected = shard_nbytes(signal, windows=windows, part=part)
        if nbytes != expected:
            raise wrong(f"has {nbytes:,} bytes, expected {expected:,}")
        index = shard_index(signal, windows=windows, part=part).tobytes()
        index += crc32c.crc32c(index).to_bytes(CRC_NBYTES, "little")
        try:
            found = os.pread(fd, len(index), windows * signal.stride)
            if direct:
                flags = fcntl.fcntl(fd, fcntl.F_GETFL)
                fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            raise shard._failed(error) from error
        if found != index:
            raise wrong(
                f"is not as planned: its index does not hold {windows:,} windows in row order"
            )
        return shard

    def read(self, first: int, targets: list[memoryview], due: Due | None) -> None:
        """Rows `first` on, one into each target; those that are `due` held against their CRC."""
        try:
            if self._direct:
                self._read_direct(first, targets, due)
            elif due is None:
                for begin in range(0, len(targets), _ROWS_A_CALL):
                    self._read_some(first + begin, targets[begin : begin + _ROWS_A_CALL])
            else:
                step = min(_ROWS_A_CALL, max(1, _CHECKED_AT_ONCE // self.signal.stride))
                crcs, checked = self.crc[first : first + len(targets)].tolist(), due.tolist()
                for begin in range(0, len(targets), step):
                    some = targets[begin : begin + step]
                    self._read_some(first + begin, some)
                    for row, target in enumerate(some, begin):
                        if checked[row] and crc32c.crc32c(target) != crcs[row]:
                            raise self._wrong_crc(first + row)
        except OSError as error:
            raise self._failed(error) from error
        if self._passing:
            self._count(len(targets))

    def read_all(self, *, check: bool) -> npt.NDArray[Any]:
        """Every row of a small shard."""
        signal, windows = self.signal, len(self.crc)
        raw = np.empty(self._nbytes, dtype=np.uint8)
        try:
            self._whole(raw.data, 0)
        except OSError as error:
            raise self._failed(error) from error
        stored = raw[: windows * signal.stride].reshape(windows, signal.stride)
        rows = np.ascontiguousarray(stored[:, : signal.nbytes])
        # One digest of the whole: a CRC for each of so many short rows takes longer.
        if check and hashlib.sha256(raw.data).hexdigest() != self._sha256:
            for row in range(windows):
                self._check(row, rows[row].data)
            raise CacheCorrupt(f"{self.path}: SHA-256 is not what its receipt says; {self._remedy}")
        return rows.reshape(-1).view(signal.dtype).reshape(windows, *signal.window)

    def advise(self, first: int, rows: int) -> None:
        """Have the kernel fetch rows that will be read soon, where they are not in memory."""
        begin, end = first * self.signal.stride, (first + rows) * self.signal.stride
        if self._direct or (self._is_cached(begin) and self._is_cached(end - 1)):
            return
        for at in range(begin, end, _ADVISED_AT_ONCE):
            nbytes = min(_ADVISED_AT_ONCE, end - at)
            os.posix_fadvise(self._fd, at, nbytes, os.POSIX_FADV_WILLNEED)

    def _read_some(self, first: int, targets: list[memoryview]) -> None:
        """Rows `first` on, in one call where all goes well."""
        stride = self.signal.stride
        buffers: list[Any] = [bytearray(CRC_NBYTES)] * (2 * len(targets))
        buffers[::2] = targets
        offset = first * stride
        if os.preadv(self._fd, buffers, offset) != len(targets) * stride:
            for row, target in enumerate(targets):
                self._whole(target, offset + row * stride)

    def _whole(self, target: memoryview, offset: int) -> None:
        """So many bytes, in as many calls as it takes: signals come, and files shrink."""
        done = 0
        while done < len(target):
            got = os.preadv(self._fd, [target[done:]], offset + done)
            if got == 0:
                raise self._shrunk()
            done += got

    def _read_direct(self, first: int, targets: list[memoryview], due: Due | None) -> None:
        """The same past the page cache: whole blocks into this thread's memory, rows from there."""
        stride, nbytes = self.signal.stride, self.signal.nbytes
        buffer = _bounce()
        arrays = [np.frombuffer(target, dtype=np.uint8) for target in targets]
        end = (first + len(targets)) * stride - CRC_NBYTES
        at = first * stride // _ALIGNED * _ALIGNED
        while at < end:
            size = min(_BOUNCED, -(-(end - at) // _ALIGNED) * _ALIGNED)
            # Short at the file's end, which is no multiple of a block; else only if it has shrunk.
            got = os.preadv(self._fd, [buffer[:size].data], at)
            if at + got < end and (got := got // _ALIGNED * _ALIGNED) == 0:
                raise self._shrunk()
            # Every row of which some bytes have come, and its CRC once all of them have.
            for place in range(max(0, at // stride - first), len(targets)):
                begin = (first + place) * stride
                low, high = max(begin, at), min(begin + nbytes, at + got)
                if begin >= at + got:
                    break
                if low < high:
                    arrays[place][low - begin : high - begin] = buffer[low - at : high - at]
                whole = low < high == begin + nbytes
                if whole and due is not None and due[place]:
                    self._check(first + place, targets[place])
            at += got

    def _is_cached(self, offset: int) -> bool:
        try:
            return os.preadv(self._fd, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to wait, or the file system cannot tell
            return False

    def _count(self, rows: int) -> None:
        with self._lock:
            self._passed += rows
            through = self._passed >= len(self.crc)
            if through:
                self._passed = 0
        if through:
            self._drop()

    def _drop(self) -> None:
        # The file as a whole: of a stretch, the kernel keeps every large page that reaches beyond.
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def _check(self, row: int, payload: memoryview) -> None:
        if crc32c.crc32c(payload) != self.crc[row]:
            raise self._wrong_crc(row)

    def _wrong_crc(self, row: int) -> CacheCorrupt:
        return CacheCorrupt(
            f"{self.path}: window {row} of this shard is not what its receipt says "
            f"(wrong CRC32C: damaged, or another shard's); {self._remedy}"
        )

    def _failed(self, error: OSError) -> Exception:
        if self._direct and error.errno == errno.EINVAL:
            return StorageError(
                f"{self.path}: this file system does not read past the page cache (O_DIRECT); read "
                "without `--direct`, or put the cache on a local disk"
            )
        return CacheCorrupt(
            f"{self.path}: cannot be read ({error.strerror}); copy it again, from a disk that works"
        )

    def _shrunk(self) -> CacheCorrupt:
        return CacheCorrupt(f"{self.path}: became shorter while it was read; copy it again")


class ZarrRows:
    """The rows of a part through zarr-python, whatever chunks and codecs it finds.

    Every row is checked at every read, asked for or not: a missing chunk is filled in by Zarr, and
    must not pass for data.
    """

    def __init__(
        self, store: ZarrStore, name: str, signal: Signal, crc: npt.NDArray[np.uint32], first: int
    ) -> None:
        """Row 0 of the part is row `first` of the array `name`."""
        self._store = store
        self._name = name
        self._signal = signal
        self._crc = crc
        self._first = first

    def read(self, first: int, targets: list[memoryview], due: Due | None) -> None:
        rows = self._read(first, len(targets))
        for target, row in zip(targets, rows, strict=True):
            target[:] = row.data.cast("B")

    def read_all(self, *, check: bool) -> npt.NDArray[Any]:
        return self._read(0, len(self._crc))

    def advise(self, first: int, rows: int) -> None:
        """Nothing: only Zarr knows where they lie."""

    def _read(self, first: int, count: int) -> npt.NDArray[Any]:
        begin = self._first + first
        rows = self._store.rows(self._name, begin, begin + count, self._signal)
        for row in range(count):
            if crc32c.crc32c(rows[row].data.cast("B")) != self._crc[first + row]:
                raise CacheCorrupt(
                    f"{self._store.path / self._name}: window {begin + row} is not what its "
                    "receipt says (wrong CRC32C): a chunk is missing or damaged, or values were "
                    "changed; lay the store out anew from a sound cache"
                )
        return rows


class ZarrStore:
    """A cache's data.zarr as zarr-python opens it. What it gives is not checked here."""

    def __init__(self, cache: Path) -> None:
        self.path = cache / DATA
        self._arrays: dict[str, Any] = {}

    def attributes(self) -> dict[str, Any]:
        """Those of the root group."""
        import zarr

        with self._told(self.path):
            return dict(zarr.open_group(self.path, mode="r").attrs)

    def rows(self, name: str, first: int, last: int, signal: Signal) -> npt.NDArray[Any]:
        """Rows of an array, contiguous, of the element type and shape that the plan implies."""
        with self._told(self.path / name):
            found = np.asarray(self._array(name, signal)[first:last])
        if found.shape != (last - first, *signal.window):
            raise CacheCorrupt(
                f"{self.path / name}: rows {first} to {last} come as {found.shape}, expected "
                f"{(last - first, *signal.window)}; lay the store out anew"
            )
        return np.ascontiguousarray(found, dtype=np.dtype(signal.dtype).newbyteorder("<"))

    @contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        """Whatever Zarr and the codecs of others raise, as an error of ours."""
        try:
            yield
        except CacheCorrupt:
            raise
        except Exception as error:
            raise CacheCorrupt(
                f"{path}: zarr-python cannot read it ({type(error).__name__}: "
                f"{str(error)[:200]}); copy the store again, or lay it out anew"
            ) from error

    def _array(self, name: str, signal: Signal) -> Any:
        if name not in self._arrays:
            import zarr

            array = zarr.open_array(self.path, path=name, mode="r")
            found = (array.dtype.newbyteorder("="), tuple(array.shape[1:]))
            expected = (np.dtype(signal.dtype), signal.window)
            if found != expected:
                raise CacheCorrupt(
                    f"{self.path / name}: {found[0]} of {found[1]} a row, the plan says "
                    f"{expected[0]} of {expected[1]}; lay the store out anew, its values unchanged"
                )
            self._arrays[name] = array
        return self._arrays[name]


def memory_nbytes() -> int:
    """Memory that is free or would be given up, of the machine and of this process's group."""
    found = [
        int(line.split()[1]) << 10
        for line in _text(Path("/proc/meminfo")).splitlines()
        if line.startswith("MemAvailable:")
    ]
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, kinds, group = line.split(":", 2)
        if kinds == "":  # version 2
            top, limit = Path("/sys/fs/cgroup"), "memory.max"
        elif kinds == "memory":
            top, limit = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        # A group has its own limit and those of the groups around it; a container sees but the top.
        within = Path(group.lstrip("/"))
        texts = [_text(top / inner / limit) for inner in (within, *within.parents)]
        found += [int(text) for text in texts if text.isdecimal()]
    return min(found, default=1 << 62)


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""


class _Local(threading.local):
    buffer: npt.NDArray[np.uint8] | None = None


_LOCAL = _Local()


def _bounce() -> npt.NDArray[np.uint8]:
    """This thread's aligned memory."""
    if _LOCAL.buffer is None:
        _LOCAL.buffer = np.frombuffer(mmap.mmap(-1, _BOUNCED), dtype=np.uint8)
    return _LOCAL.buffer
