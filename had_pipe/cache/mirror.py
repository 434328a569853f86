"""A cache behind a URL, mirrored object by object in a local folder that many processes share.

An object lies in the folder only whole: it comes into a file aside, under that file's lock, is held
against the manifest's length and SHA-256, synced and renamed. So every object is downloaded once
for all processes, a crash leaves nothing that looks like an object, and what is being read (its
lock is shared by the readers) is never evicted. How bytes come over the network is
had_pipe.cache.remote's; how a cache is read, had_pipe.cache.reader's.

FOLDER/<cache id>/...   as the cache is laid out, with holes
FOLDER/.parts/          what is being downloaded
FOLDER/.usage           how many bytes the folder holds or has promised, under a lock
FOLDER/.wanted          touched by whoever finds no room, for others to close what they do not read
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from had_pipe.cache.door import open_object, read_object
from had_pipe.cache.layout import (
    MANIFEST,
    PLAN,
    Manifest,
    Part,
    Plan,
)
from had_pipe.cache.reader import Cache, Check
from had_pipe.cache.remote import Remote, is_url
from had_pipe.durable import free_nbytes, make_folder, publish, storage, write_file
from had_pipe.errors import CacheRefused, HadPipeError, NetworkError, RecipeError, StorageError
from had_pipe.sizes import size

_CONNECTIONS = 4
_AHEAD_NBYTES = 16 << 30
"""Brought ahead of need at most, so that a short run does not fetch a whole cache."""
_POLL = 0.02
_HEEDED = 1.0
"""Seconds after which others have looked whether room is wanted."""
_FOR_ROOM = 10
"""Patience with who reads or downloads in the same folder, in that with a silent server."""
_LONGEST_REST = 60.0

_SPARE_NBYTES = 1 << 16
"""Left free on the disk, for folders and what rounding up to whole blocks takes."""

_PARTS = ".parts"
_USAGE = ".usage"
_WANTED = ".wanted"
_DIGITS = 20
_CACHE_ID = re.compile(r"[0-9a-f]{64}")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def open_cache(
    source: Path | str,
    *,
    check: Check = "first",
    mirror: Path | None = None,
    mirror_nbytes: int | None = None,
    through_zarr: bool = False,
    direct: bool = False,
) -> Cache:
    """Open a sealed cache in a folder, or one behind a URL by way of a mirror.

    `mirror` is the folder of all mirrors, by default $HAD_PIPE_MIRROR or ~/.cache/had-pipe/mirror;
    `mirror_nbytes` is how many bytes it may hold. Closing the cache closes its mirror. The rest is
    as for Cache.open.
    """
    if not is_url(source):
        return Cache.open(Path(source), check=check, through_zarr=through_zarr, direct=direct)
    assert isinstance(source, str)
    folder = (mirror or mirror_folder()).expanduser()
    opened = Mirror(source, folder=folder, limit_nbytes=mirror_nbytes)
    try:
        if through_zarr:
            raise RecipeError(
                f"{opened.url}: only a local store can be read through Zarr; download it first"
            )
        cache = Cache.open(opened.path, check=check, direct=direct, mirror=opened)
        opened.let_go = cache.let_go
        return cache
    except BaseException:
        opened.close()
        raise


def mirror_folder() -> Path:
    """The folder of all mirrors, where no other is named."""
    return Path(os.environ.get("HAD_PIPE_MIRROR") or "~/.cache/had-pipe/mirror").expanduser()


def mirror_usage(folder: Path) -> tuple[int, int]:
    """How many caches have objects in a folder of mirrors, and how many bytes these are."""
    if not folder.is_dir():
        return 0, 0
    caches = [cache for cache in folder.iterdir() if _CACHE_ID.fullmatch(cache.name)]
    return len(caches), sum(entry.nbytes for cache in caches for entry in _files(cache))


@dataclass(frozen=True)
class MirrorStats:
    """What a mirror did since it was opened by this process."""

    hits: int
    """Objects that were there when they were needed."""
    misses: int
    """Objects that had to be waited for."""
    downloaded_nbytes: int
    evicted_nbytes: int
    waiting_seconds: float
    """Of all threads that waited for objects."""
    retries: int


class Mirror:
    """The objects of a cache behind a URL, by way of a local folder. Safe to share by threads.

    Other processes may use the same folder at the same time, for this cache or others.
    """

    def __init__(
        self,
        url: str,
        *,
        folder: Path,
        limit_nbytes: int | None = None,
        connections: int = _CONNECTIONS,
        patience: float = 30.0,
        pause: float = 0.5,
    ) -> None:
        """`limit_nbytes` bounds the whole folder; by default nine tenths of what is free there now,
        and what it holds. `connections` download ahead of need.
        """
        self._remote = Remote(url, patience=patience, pause=pause)
        self.url = self._remote.url
        """Without user, password and query."""
        self.folder = folder
        self._patience = patience
        self._connections = connections
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._hits = self._misses = self._downloaded = self._evicted = 0
        self._waiting = 0.0
        # What is to come. The caller's iterator may take its time, so it has a lock of its own.
        self._asking = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._upcoming: Iterator[str] | None = None
        self._generation = 0
        self._ahead: OrderedDict[str, int] = OrderedDict()
        self._workers: list[threading.Thread] = []
        self.let_go: Callable[[int], None] = lambda keep: None
        """Called when there is no room: to close all but so many parts."""
        try:
            plan, manifest = self._remote.describe()
            self.path = folder / manifest.id
            self._id, self._objects = manifest.id, manifest.objects
            self._parts = folder / _PARTS
            self.limit_nbytes = self._prepare(plan, manifest, limit_nbytes)
        except BaseException:
            self._remote.close()
            raise
        self._largest = max(
            plan.shards_nbytes([Part(split, of_split.views[0], 0)])
            for split, of_split in plan.splits.items()
        )
        self._wanted = self._when_wanted()
        with _ALL:
            _MIRRORS.add(self)

    @property
    def open_parts(self) -> int:
        """Parts that a reader may keep open: what is open cannot make room for others."""
        return max(1, self._share() // self._largest)

    def _share(self) -> int:
        """Bytes that may be open, and as many that may be ahead: all mirrors of this process in one
        folder share it, and what is neither makes room."""
        return self.limit_nbytes // 2 // max(1, len(self._here()))

    def _here(self) -> list[Mirror]:
        """The mirrors of this process in the same folder, this one among them."""
        with _ALL:
            return [mirror for mirror in _MIRRORS if mirror.folder == self.folder]

    def _prepare(self, plan: Plan, manifest: Manifest, limit_nbytes: int | None) -> int:
        """Make the folder and what describes the cache there; how many bytes it may hold."""
        try:
            make_folder(self._parts)
            make_folder(self.path)
        except (NotADirectoryError, FileExistsError) as error:
            raise RecipeError(
                f"{self.folder}: not a folder; name another by --mirror or HAD_PIPE_MIRROR"
            ) from error
        with self._books() as books:
            # In here, or another process would take what is written aside for left over.
            for name, raw in ((PLAN, plan.to_json()), (MANIFEST, manifest.to_json())):
                if not _holds(self.path, name, raw):
                    write_file(self.path / name, raw, aside=self._parts)
            _, books.nbytes = self._survey()
            limit = limit_nbytes or books.nbytes + free_nbytes(self.folder) * 9 // 10
        needed = 2 * max(record.nbytes for record in self._objects.values())
        if limit < needed:
            raise StorageError(
                f"{self.folder}: a mirror of {size(limit)} for {self.url}, which needs at least "
                f"{size(needed)}, twice its largest shard; allow more by --mirror-size, or make "
                "room"
            )
        return limit

    def open(self, key: str) -> int:
        """A descriptor of an object, downloaded if it is not there; to be closed by the caller.

        Until then the object is not evicted. Raises NetworkError, CacheCorrupt or StorageError.
        """
        record = self._objects.get(key)
        if record is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), key)
        begun = since = time.monotonic()
        pressed = 0
        opened = self._opened(key)
        hit = opened is not None
        self._passed(key)
        while opened is None:
            try:
                self._bring(key, demanded=True)
            except _NoRoom as full:
                if pressed == 0:
                    since = time.monotonic()
                pressed += 1
                self._press(pressed)
                if time.monotonic() - since > _FOR_ROOM * self._patience:
                    raise self._full(key, full.nbytes) from None
                self._sleep()
            else:
                pressed = 0
            opened = self._opened(key)
        with self._lock:
            self._hits += hit
            self._misses += not hit
            self._waiting += 0.0 if hit else time.monotonic() - begun
        return opened

    def coming(self, keys: Iterable[str]) -> None:
        """Download these in the background, in this order; what was said before is forgotten.

        The iterable may be endless: it is asked for no more than is brought ahead.
        """
        with self._changed:
            self._upcoming = iter(keys)
            self._generation += 1
            self._ahead.clear()
            self._changed.notify_all()
            if not self._workers and not self._closing.is_set():
                self._workers = [
                    threading.Thread(target=self._work, name="had-pipe mirror", daemon=True)
                    for _ in range(self._connections)
                ]
                for worker in self._workers:
                    worker.start()

    def stats(self) -> MirrorStats:
        """What was done since this process opened the mirror."""
        with self._lock:
            return MirrorStats(
                hits=self._hits,
                misses=self._misses,
                downloaded_nbytes=self._downloaded,
                evicted_nbytes=self._evicted,
                waiting_seconds=self._waiting,
                retries=self._remote.retries,
            )

    def close(self) -> None:
        """Stop all downloads. What is open stays open."""
        self._closing.set()
        with _ALL:
            _MIRRORS.discard(self)
        self._remote.close()
        with self._changed:
            self._changed.notify_all()
        for worker in self._workers:
            worker.join(timeout=5)

    # One object

    def _opened(self, key: str) -> int | None:
        """A descriptor of an object under a shared lock; None where it is not there whole."""
        try:
            opened = open_object(self.path, key)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            # Held by others for moments only: they remove the object, or have just brought it.
            while not self._locked(opened, fcntl.LOCK_SH):
                self._sleep()
            found = os.fstat(opened)
            if found.st_nlink and found.st_size == self._objects[key].nbytes:
                with suppress(OSError):  # another user's: it then looks less recently used
                    os.utime(opened)
                return opened
        except BaseException:
            os.close(opened)
            raise
        os.close(opened)
        return None

    def _has(self, key: str) -> bool:
        try:
            found = (self.path / key).lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return stat.S_ISREG(found.st_mode) and found.st_size == self._objects[key].nbytes

    def _bring(self, key: str, *, demanded: bool) -> None:
        """Have an object in the folder, through us or through whoever is at it. Raises _NoRoom."""
        record, final = self._objects[key], self.path / key
        part = self._parts / f"{self._id}-{key.replace('/', '-')}.part"
        with storage(self.folder):
            claimed = self._claim(part, key)
            if claimed is None:
                return
            with os.fdopen(claimed, "wb", buffering=0) as file:
                try:
                    self._reserve(claimed, record.nbytes, demanded=demanded)
                    try:
                        self._remote.download(key, record, file)
                        os.fsync(claimed)
                        make_folder(final.parent)
                        publish(part, final)
                    except BaseException:
                        with self._books() as books:
                            books.nbytes -= record.nbytes
                        raise
                except BaseException:
                    with suppress(OSError):
                        part.unlink()
                    raise
        with self._lock:
            self._downloaded += record.nbytes

    def _claim(self, part: Path, key: str) -> int | None:
        """The file that an object comes into, locked for us alone; None once the object is there.

        Its lock ends with its holder. Renamed, it is the object, and another file takes its place:
        whoever gets the lock looks whether it is still the one.
        """
        while not self._has(key):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            opened = os.open(part, flags, 0o666)
            try:
                if self._locked(opened, fcntl.LOCK_EX) and _is(opened, part):
                    if not self._has(key):
                        return opened
                    part.unlink()
            except BaseException:
                os.close(opened)
                raise
            os.close(opened)
            self._sleep()
        return None

    def _locked(self, opened: int, kind: int) -> bool:
        """Lock a file; False where another has it."""
        try:
            fcntl.flock(opened, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            raise StorageError(
                f"{self.folder}: this file system has no locks ({error.strerror}); choose a folder "
                "on a local disk by --mirror or HAD_PIPE_MIRROR"
            ) from error
        return True

    def _sleep(self) -> None:
        if self._closing.wait(_POLL):
            raise NetworkError(f"{self.url}: the mirror was closed while it was read")

    # Room

    @contextmanager
    def _books(self) -> Iterator[_Books]:
        """What the folder holds and has promised, for us alone to read and change."""
        path = self.folder / _USAGE
        with storage(path):
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            opened = os.open(path, flags, 0o666)
        with os.fdopen(opened, "r+b", buffering=0) as file, storage(path):
            while not self._locked(opened, fcntl.LOCK_EX):
                time.sleep(_POLL)  # held for as long as it takes to look around
            written = file.read(_DIGITS)
            books = _Books(int(written) if written.isdigit() else 0)
            try:
                yield books
            finally:
                file.seek(0)
                file.write(f"{max(0, books.nbytes):0{_DIGITS}}".encode())

    def _reserve(self, claimed: int, nbytes: int, *, demanded: bool) -> None:
        """Promise room to an object that is to come, evicting others. Raises _NoRoom."""
        with self._books() as books:
            # Others fill the disk too: what is there goes before a run fails.
            free = self._free_nbytes()
            if min(self.limit_nbytes - books.nbytes, free) < nbytes:
                # A little more than needed, or every object from here on looks around again.
                limit = min(self.limit_nbytes, books.nbytes + free)
                goal = max(0, limit - self.limit_nbytes // 50 - nbytes)
                books.nbytes = self._evict(goal, demanded=demanded)
                if min(self.limit_nbytes - books.nbytes, self._free_nbytes()) < nbytes:
                    raise _NoRoom(books.nbytes)
            os.ftruncate(claimed, 0)
            os.ftruncate(claimed, nbytes)  # counted by whoever looks around
            books.nbytes += nbytes

    def _free_nbytes(self) -> int:
        """Bytes free on the disk that nothing under way will take."""
        promised = 0
        for entry in _files(self._parts):
            with suppress(FileNotFoundError):
                found = entry.path.lstat()
                promised += max(0, found.st_size - 512 * found.st_blocks)
        return free_nbytes(self.folder) - promised - _SPARE_NBYTES

    def _evict(self, goal: int, *, demanded: bool) -> int:
        """Remove what was least recently used until so many bytes are left; how many are."""
        found, nbytes = self._survey()
        with self._lock:
            spared = {self.path / key for key in self._ahead}
        found.sort(key=lambda entry: (entry.path in spared, entry.used))
        for entry in found:
            if nbytes <= goal or (entry.path in spared and not demanded):
                break
            if self._removed(entry.path):
                nbytes -= entry.nbytes
                with self._lock:
                    self._evicted += entry.nbytes
        return nbytes

    def _removed(self, path: Path) -> bool:
        """Remove a file unless somebody reads it, or writes it."""
        try:
            # To be written to: a network file system locks no other file for one alone.
            opened = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            if not self._locked(opened, fcntl.LOCK_EX) or not _is(opened, path):
                return False
            path.unlink()
        except PermissionError:
            return False
        finally:
            os.close(opened)
        return True

    def _survey(self) -> tuple[list[_Entry], int]:
        """What can be evicted, of all caches in the folder, and the bytes of everything there.

        What a process left that was stopped while it downloaded is removed.
        """
        found, nbytes = [], 0
        for entry in _files(self._parts):
            if not self._removed(entry.path):
                nbytes += entry.nbytes
        for cache in self.folder.iterdir():
            if _CACHE_ID.fullmatch(cache.name) and not cache.is_symlink():
                described = (cache / PLAN, cache / MANIFEST)
                for entry in _files(cache):
                    nbytes += entry.nbytes
                    if entry.path not in described:
                        found.append(entry)
        return found, nbytes

    def _full(self, key: str, nbytes: int) -> StorageError:
        needed = self._objects[key].nbytes
        if nbytes + needed <= self.limit_nbytes:
            return StorageError(
                f"{self.folder}: the disk is full, and all that this mirror holds is being read; "
                "make room there, then run the same command again"
            )
        return StorageError(
            f"{self.folder}: this mirror may hold {size(self.limit_nbytes)}, of which "
            f"{size(nbytes)} are being read, and {key} needs {size(needed)} more; allow "
            f"{size(nbytes + needed)} at least by --mirror-size, or end other processes that read "
            "there"
        )

    def _press(self, times: int) -> None:
        """Have readers close what they have open and do not read just now: ours, then others'."""
        for mirror in self._here():
            mirror.let_go(mirror.open_parts // 2 if times == 1 else 0)
        if times % round(_HEEDED / _POLL) == 2:
            with suppress(OSError):
                (self.folder / _WANTED).touch()

    def _heed(self) -> None:
        """Have our reader close what it does not read, if another lacks room since we last looked:
        a process that stands still would keep it for as long as it lives."""
        wanted = self._when_wanted()
        with self._lock:
            heeded, self._wanted = self._wanted == wanted, wanted
        if not heeded:
            self.let_go(0)

    def _when_wanted(self) -> int:
        try:
            return (self.folder / _WANTED).stat().st_mtime_ns
        except OSError:
            return 0

    # What comes

    def _passed(self, key: str) -> None:
        """An object is needed now: it, and what was to come before it, is ahead no more."""
        with self._changed:
            if key in self._ahead:
                while self._ahead.popitem(last=False)[0] != key:
                    pass
                self._changed.notify_all()

    def _work(self) -> None:
        failures = 0
        while True:
            try:
                asked = self._next()
                if asked is None:
                    return
                self._bring_ahead(*asked)
                failures = 0
            except HadPipeError:
                # Whoever needs the object asks for it again, and is told.
                failures += 1
                if self._closing.wait(min(2.0**failures, _LONGEST_REST)):
                    return

    def _next(self) -> tuple[str, int] | None:
        """The next object to bring ahead, once there is room for it; None when all is over."""
        while not self._closing.is_set():
            self._heed()
            with self._changed:
                if self._upcoming is None or sum(self._ahead.values()) >= self._ahead_nbytes():
                    if not self._closing.is_set():
                        self._changed.wait(_HEEDED)
                    continue
                upcoming, generation = self._upcoming, self._generation
            with self._asking:
                key = next(upcoming, None)
            while True:
                with self._changed:
                    if self._stale(generation):
                        break
                    if key is None:
                        self._upcoming = None
                        break
                    if key not in self._ahead:
                        self._ahead[key] = self._objects[key].nbytes
                        return key, generation
                    # An order that begins again has nothing more to bring.
                    self._changed.wait(_HEEDED)
                self._heed()
        return None

    def _ahead_nbytes(self) -> int:
        return min(_AHEAD_NBYTES, self._share())

    def _stale(self, generation: int) -> bool:
        return self._closing.is_set() or self._generation != generation

    def _bring_ahead(self, key: str, generation: int) -> None:
        while not self._closing.is_set():
            try:
                self._bring(key, demanded=False)
                with suppress(OSError):
                    os.utime(
                        self.path / key, follow_symlinks=False
                    )  # or it is the next to be evicted
                return
            except _NoRoom:
                self._heed()
                with self._changed:
                    if self._stale(generation) or key not in self._ahead:
                        return
                self._closing.wait(_POLL * 10)


_ALL = threading.Lock()
_MIRRORS: weakref.WeakSet[Mirror] = weakref.WeakSet()
"""Those that are open in this process."""


@dataclass
class _Books:
    nbytes: int


@dataclass(frozen=True)
class _Entry:
    path: Path
    used: int
    """When it was last, by its time stamp."""
    nbytes: int


class _NoRoom(Exception):
    """Nothing more can be evicted: `nbytes` are being read, downloaded or soon needed."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes


def _files(folder: Path) -> Iterator[_Entry]:
    """The ordinary files below a folder; no link is followed, and what goes meanwhile is gone."""
    folders = [folder]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(Path(entry.path))
                    continue
                with suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(found.st_mode):
                        yield _Entry(Path(entry.path), found.st_mtime_ns, found.st_size)


def _is(opened: int, path: Path) -> bool:
    """Whether an open file is the one that now has a name."""
    try:
        named = path.lstat()
    except FileNotFoundError:
        return False
    found = os.fstat(opened)
    return (found.st_dev, found.st_ino) == (named.st_dev, named.st_ino)


def _holds(folder: Path, name: str, raw: bytes) -> bool:
    try:
        return read_object(folder, name, limit=len(raw)) == raw
    except (OSError, CacheRefused):
        return False
