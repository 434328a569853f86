"""A whole cache copied from a URL into a folder: every object verified, resumable, then renamed."""

from __future__ import annotations

import os
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

from had_pipe.cache.integrity import clear_work
from had_pipe.cache.layout import MANIFEST, WORK, Manifest, read_manifest, read_plan, read_small
from had_pipe.cache.remote import Remote
from had_pipe.durable import make_folder, publish, require_room, storage, write_file
from had_pipe.errors import CacheMismatch, CacheRefused
from had_pipe.hold import held
from had_pipe.progress import Progress, Reporter, silent

_CONNECTIONS = 4
_FETCHING = "fetching"
"""A note of which cache it is."""


@dataclass(frozen=True)
class Fetched:
    """What a call of `fetch_cache` did."""

    path: Path
    cache_id: str
    made: int
    """Objects downloaded; the rest was there."""
    total: int
    nbytes: int
    """Of the whole cache."""


def fetch_cache(
    url: str,
    target: Path,
    *,
    report: Reporter = silent,
    connections: int = _CONNECTIONS,
    patience: float = 30.0,
    pause: float = 0.5,
) -> Fetched:
    """Copy a whole cache from a URL into a folder that is not there yet, or is empty.

    Every object is verified; they gather in a folder beside the target, which gets its name at the
    end. A call that was stopped is gone on with by the next. Raises NetworkError, CacheCorrupt,
    CacheMismatch, CacheRefused or StorageError.
    """
    remote = Remote(url, patience=patience, pause=pause)
    try:
        _, manifest = remote.describe()
        whole = sum(record.nbytes for record in manifest.objects.values())
        fetched = Fetched(target, manifest.id, 0, len(manifest.objects), whole)
        target = Path(os.path.abspath(target))  # noqa: PTH100 (a link to a folder keeps its name)
        if _is_there(target, manifest):
            return fetched
        staging = target.with_name(f".{target.name}.part")
        try:
            make_folder(staging)
        except (NotADirectoryError, FileExistsError) as error:
            raise CacheRefused(
                f"{target}: no folder can be made there ({error.strerror}: {error.filename}); use "
                "another target"
            ) from error
        with held(staging, lock=f"{WORK}/lock", doing="fetching into this folder"):
            made = _fetch(remote, staging, manifest, connections, report)
            write_file(staging / MANIFEST, manifest.to_json(), aside=staging / WORK)
            clear_work(staging)
            if not _is_there(target, manifest):
                publish(staging, target)
    finally:
        remote.close()
    return replace(fetched, made=made)


def _is_there(target: Path, manifest: Manifest) -> bool:
    """Whether a target is this cache already. Raises CacheRefused where it is anything else."""
    if not os.path.lexists(target):
        return False
    if target.is_dir() and not any(target.iterdir()):
        if target.is_symlink():
            raise CacheRefused(f"{target}: a link; use the folder that it names as target")
        return False
    if target.is_dir() and (target / MANIFEST).exists():
        found = read_manifest(target, read_plan(target)[0])
        if found is not None and found.id == manifest.id:
            return True
    raise CacheRefused(f"{target}: not empty, and not this cache; use another target")


def _fetch(
    remote: Remote,
    staging: Path,
    manifest: Manifest,
    connections: int,
    report: Reporter,
) -> int:
    """Download what a folder does not have of a cache; how many objects that were."""
    # Shards of two caches of one plan differ, but not in length.
    note = staging / WORK / _FETCHING
    if not note.exists():
        write_file(note, f"{manifest.id}\n".encode(), aside=note.parent)
    elif read_small(note) != f"{manifest.id}\n".encode():
        raise CacheMismatch(
            f"{staging}: fetching another cache was begun here; remove this folder, or use another "
            "target"
        )
    for left in (staging / WORK).glob("*.part"):
        left.unlink()
    missing, there = [], 0
    for key, record in manifest.objects.items():
        # What has its name was verified and synced before it got it.
        if (staging / key).is_file() and (staging / key).lstat().st_size == record.nbytes:
            there += record.nbytes
        else:
            missing.append(key)
    left_nbytes = sum(manifest.objects[key].nbytes for key in missing)
    require_room(staging, left_nbytes, len(missing))

    def move(key: str) -> int:
        record, final = manifest.objects[key], staging / key
        part = staging / WORK / f"{key.replace('/', '-')}.part"
        with storage(part):
            with part.open("wb", buffering=0) as file:
                remote.download(key, record, file)
                os.fsync(file.fileno())
            make_folder(final.parent)
            publish(part, final)
        return record.nbytes

    begun, done = time.monotonic(), there
    with ThreadPoolExecutor(connections, thread_name_prefix="had-pipe fetch") as pool:
        try:
            for moved in as_completed([pool.submit(move, key) for key in missing]):
                done += moved.result()
                report(
                    Progress(
                        what="fetching",
                        done=done,
                        total=there + left_nbytes,
                        unit="bytes",
                        begun=there,
                        seconds=time.monotonic() - begun,
                    )
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            remote.close()
            raise
    return len(missing)
