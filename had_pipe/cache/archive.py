"""The archival form of a sealed cache: shards compressed without loss, all else as it is.

Of a shard only the payload is kept: row CRCs and index follow from it. What lies in its place is a
file in the Zstandard seekable format, so `zstd -d` opens it too: frames of a few windows each, the
elements' bytes shuffled, then a table of the frames. A shard that does not get smaller stays as it
is. Unpacking gives the same bytes under the same id, or an error; it allocates what the plan says,
never what a frame says. docs/cache-format.md, Archive, is normative.

The caller sees to the target: that it is free, held, and has room.
"""

from __future__ import annotations

import hashlib
import os
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import crc32c
import numpy as np
import numpy.typing as npt

from had_pipe.cache.door import open_object
from had_pipe.cache.integrity import Problem, VerifyReport
from had_pipe.cache.layout import (
    ARCHIVE,
    CRC_NBYTES,
    MANIFEST,
    PLAN,
    WORK,
    Archive,
    Manifest,
    ObjectRecord,
    Plan,
    Signal,
    read_archive,
    read_manifest,
    read_plan,
    shard_index,
)
from had_pipe.cache.reader import expected_keys, refuse_endless
from had_pipe.durable import make_folder, publish, storage, write_file
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheRefused
from had_pipe.progress import Progress, Reporter, silent

# Measured on float32, float16, bfloat16 and int8 of a trained teacher: higher levels, channels
# gathered, bit shuffling and pcodec gain at most 2 % of the size and cost 4 to 20 times the time.
_LEVEL = 1

_FRAME_NBYTES = 1 << 22
"""A frame holds as many windows as fit, at least one. Fixed by the format."""

_PIECE = 1 << 22

_COPY = "copy it again"

Buffer = bytes | memoryview

# Zstandard, RFC 8878, and its seekable format, version 0.1.0.
_FRAME_MAGIC = b"\x28\xb5\x2f\xfd"
_TABLE_MAGIC = b"\x5e\x2a\x4d\x18"
_SEEKABLE_MAGIC = b"\xb1\xea\x92\x8f"


@dataclass(frozen=True)
class Moved:
    """What a call of `pack` or `unpack` did."""

    made: int
    """Objects written; the rest was there and was what it should be."""
    total: int
    nbytes: int
    """Bytes of the whole target."""


@dataclass(frozen=True)
class Shard:
    """One shard of a cache, as the plan says it."""

    key: str
    signal: Signal
    windows: int
    part: int

    @staticmethod
    def of(plan: Plan) -> dict[str, Shard]:
        """Every shard of a cache, by key."""
        return {
            part.shard_key(signal): Shard(
                part.shard_key(signal), signal, plan.part_windows(part), plan.part
            )
            for part in plan.parts()
            for signal in plan.signals
        }

    @property
    def frames(self) -> list[int]:
        """Windows of each frame."""
        whole = max(1, _FRAME_NBYTES // self.signal.nbytes)
        full, rest = divmod(self.windows, whole)
        return [whole] * full + [rest] * bool(rest)

    @property
    def tail(self) -> bytes:
        """What follows the rows: the index and its CRC."""
        index = shard_index(self.signal, windows=self.windows, part=self.part).tobytes()
        return index + crc32c.crc32c(index).to_bytes(CRC_NBYTES, "little")

    @property
    def table_nbytes(self) -> int:
        return 8 + 8 * len(self.frames) + 9


def read(archive: Path) -> tuple[Archive, Plan, Manifest]:
    """What an archive is of. Raises CacheRefused, or CacheIncomplete where packing was stopped."""
    plan, _ = read_plan(archive, archived=True)
    index = read_archive(archive, plan)
    manifest = read_manifest(archive, plan)
    if manifest is None:
        raise CacheIncomplete(
            f"{archive}: this archive was not finished; run the `had-pipe cache recode` command "
            "that began it again"
        )
    refuse_endless(archive, plan, manifest)
    if (manifest.plan, manifest.id) != (plan.id, index.cache):
        raise CacheRefused(
            f"{archive}: {ARCHIVE} is of cache {index.cache[:12]}..., {MANIFEST} is cache "
            f"{manifest.id[:12]}... of plan {manifest.plan[:12]}..., {PLAN} is {plan.id[:12]}...; "
            "the files of two archives were mixed: copy the archive again"
        )
    shards, objects = Shard.of(plan), manifest.objects
    stray = [
        key
        for key, record in index.packed.items()
        if key not in shards or record.nbytes >= objects[key].nbytes
    ]
    if set(objects) != expected_keys(plan) or stray:
        raise CacheRefused(f"{archive}: it does not list what its plan implies; copy it again")
    return index, plan, manifest


def nbytes(index: Archive, manifest: Manifest) -> int:
    """Bytes of an archive, its index and manifest apart, as those of a cache are counted."""
    objects = {**manifest.objects, **index.packed}
    return sum(record.nbytes for record in objects.values())


def pack(cache: Path, archive: Path, *, report: Reporter = silent) -> Moved:
    """Write the archival form of a sealed cache, or finish it.

    Every object is held against the manifest before it is published, and a frame is unpacked again
    before it is believed. Raises CacheCorrupt where the cache is not what its manifest says.
    """
    plan, raw = read_plan(cache)
    manifest = read_manifest(cache, plan)
    if manifest is None:
        raise CacheIncomplete(f"{cache}: not finished; only a finished cache is archived")
    shards = Shard.of(plan)
    expected = expected_keys(plan)
    if set(manifest.objects) != expected:
        raise CacheRefused(f"{cache}: the manifest does not list what the plan implies")
    aside = archive / WORK
    packed: dict[str, ObjectRecord] = {}

    def move(key: str) -> bool:
        record, shard = manifest.objects[key], shards.get(key)
        final = archive / key
        there = _known(archive, key, record, shard)
        made = there is None
        if made and shard is not None:
            there = _write(final, _packed(cache, shard, record), aside=aside, below=record.nbytes)
        if there is None:
            there = _write(final, _plain(cache, key), aside=aside, expected=record)
        if there is not None and there != record:
            packed[key] = there
        return made

    keys = sorted(expected - {PLAN})
    made = _each(keys, move, what="packing", report=report)
    index = Archive(format="had-archive/1", cache=manifest.id, packed=dict(sorted(packed.items())))
    # In this order: a folder with a plan and without archive.json would pass for a cache.
    write_file(archive / ARCHIVE, index.to_json(), aside=aside)
    write_file(archive / PLAN, raw, aside=aside)
    write_file(archive / MANIFEST, manifest.to_json(), aside=aside)
    return Moved(made=made, total=len(keys), nbytes=nbytes(index, manifest))


def unpack(archive: Path, cache: Path, *, report: Reporter = silent) -> Moved:
    """Write the cache an archive was made of, or finish it; byte for byte, under its id.

    Raises CacheCorrupt or CacheRefused, naming the object, where the archive is not what it says.
    """
    index, plan, manifest = read(archive)
    shards = Shard.of(plan)
    aside = cache / WORK

    def move(key: str) -> bool:
        record = manifest.objects[key]
        if _known(cache, key, record, None) is not None:
            return False
        if key in index.packed:
            pieces = _unpacked(archive, shards[key], index.packed[key])
        else:
            pieces = _plain(archive, key)
        _write(cache / key, pieces, aside=aside, expected=record)
        return True

    keys = sorted(set(manifest.objects) - {PLAN})
    made = _each(keys, move, what="unpacking", report=report)
    write_file(cache / PLAN, plan.to_json(), aside=aside)
    write_file(cache / MANIFEST, manifest.to_json(), aside=aside)
    whole = sum(record.nbytes for record in manifest.objects.values())
    return Moved(made=made, total=len(keys), nbytes=whole)


def verify(archive: Path, *, report: Reporter = silent) -> VerifyReport:
    """Look whether the very cache would come of an archive: unpacked piece by piece, never kept.

    Modifies nothing. Raises CacheRefused or CacheIncomplete where plan.json, archive.json or
    manifest.json themselves do not tell what there should be.
    """
    index, plan, manifest = read(archive)
    shards = Shard.of(plan)
    problems: list[Problem] = []

    def look(key: str) -> bool:
        record = manifest.objects[key]
        there = index.packed.get(key, record)
        try:
            found = _record(_plain(archive, key, nbytes=there.nbytes))
            if found == there and there != record:
                found, there = _record(_unpacked(archive, shards[key], there)), record
        except CacheError as error:
            told = str(error).partition("; copy")[0]  # its place and remedy are said here
            for place in (f"{archive}: {key}: ", f"{archive / key}: "):
                told = told.removeprefix(place)
            problems.append(Problem(key, told, "what was packed", _COPY))
            return False
        if found != there:
            told, wanted = f"SHA-256 {found.sha256[:12]}...", f"{there.sha256[:12]}..."
            problems.append(Problem(key, told, wanted, _COPY))
        return found == there

    _each(sorted(manifest.objects), look, what="verifying", report=report)
    return VerifyReport(
        cache_id=manifest.id,
        sealed=True,
        level="everything",
        share=(1, 1),
        parts=plan.part_count,
        objects=len(manifest.objects),
        nbytes=nbytes(index, manifest),
        problems=tuple(sorted(problems, key=lambda problem: problem.key)),
    )


def _each(keys: list[str], move: Callable[[str], bool], *, what: str, report: Reporter) -> int:
    """Move every object, some at once; how many had to be made."""
    begun, made = time.monotonic(), 0
    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix=f"had-pipe {what}") as pool:
        moves = [pool.submit(move, key) for key in keys]
        try:
            for number, done in enumerate(as_completed(moves), start=1):
                made += done.result()
                report(
                    Progress(
                        what=what,
                        done=number,
                        total=len(keys),
                        unit="objects",
                        seconds=time.monotonic() - begun,
                    )
                )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return made


# One object


def _write(
    final: Path,
    pieces: Iterable[Buffer],
    *,
    aside: Path,
    expected: ObjectRecord | None = None,
    below: int | None = None,
) -> ObjectRecord | None:
    """A file of some pieces, whole or absent; None where it would not stay `below` a length.

    Raises CacheCorrupt where it is not the `expected` one, before it is published.
    """
    name = "-".join(final.relative_to(aside.parent).parts)
    temporary = aside / f"{name}.{uuid.uuid4().hex}.tmp"
    digest, nbytes = hashlib.sha256(), 0
    limit = expected.nbytes if expected is not None else below
    try:
        with storage(temporary), temporary.open("wb") as file:
            for piece in pieces:
                nbytes += len(piece)
                if limit is not None and nbytes > limit:
                    break
                digest.update(piece)
                file.write(piece)
            if below is not None and nbytes >= below:
                return None
            found = ObjectRecord(nbytes=nbytes, sha256=digest.hexdigest())
            if expected is not None and found != expected:
                raise CacheCorrupt(
                    f"{final}: {nbytes:,} bytes of SHA-256 {found.sha256[:12]}... came of it, the "
                    f"manifest says {expected.nbytes:,} of {expected.sha256[:12]}...; its source "
                    "is damaged: copy that again"
                )
            file.flush()
            os.fsync(file.fileno())
        make_folder(final.parent)
        publish(temporary, final)
        return found
    finally:
        with suppress(OSError):
            temporary.unlink()


def _known(
    folder: Path, key: str, record: ObjectRecord, shard: Shard | None
) -> ObjectRecord | None:
    """What an earlier, stopped call left at its place, if it is the object, or unpacks to it."""
    try:
        with _open(folder, key) as file:
            found = _record(iter(lambda: file.read(_PIECE), b""))
    except FileNotFoundError:
        return None
    if found == record:
        return record
    if shard is None or found.nbytes >= record.nbytes:
        return None
    try:
        return found if _record(_unpacked(folder, shard, found)) == record else None
    except CacheError:
        return None


def _record(pieces: Iterable[Buffer]) -> ObjectRecord:
    digest, nbytes = hashlib.sha256(), 0
    for piece in pieces:
        digest.update(piece)
        nbytes += len(piece)
    return ObjectRecord(nbytes=nbytes, sha256=digest.hexdigest())


def _plain(folder: Path, key: str, *, nbytes: int | None = None) -> Iterator[bytes]:
    """A file as it is; of no other length, where one is known."""
    try:
        with _open(folder, key) as file:
            length = os.fstat(file.fileno()).st_size
            if nbytes not in (None, length):
                raise _damaged(folder, key, f"{length:,} bytes, expected {nbytes:,}")
            while piece := file.read(_PIECE):
                yield piece
    except OSError as error:
        raise _damaged(folder, key, f"cannot be read ({error.strerror})") from error


def _packed(cache: Path, shard: Shard, record: ObjectRecord) -> Iterator[Buffer]:
    """A shard compressed, checked against its record before the last piece comes."""
    signal, digest, sizes = shard.signal, hashlib.sha256(), []
    itemsize = np.dtype(signal.dtype).itemsize
    try:
        with _open(cache, shard.key) as file:
            for windows in shard.frames:
                raw = file.read(windows * signal.stride)
                digest.update(raw)
                if len(raw) != windows * signal.stride:
                    break
                rows = np.frombuffer(raw, np.uint8).reshape(windows, signal.stride)
                payload = np.ascontiguousarray(rows[:, : signal.nbytes])
                frame = _deflate(payload, itemsize)
                if not np.array_equal(_rows(_inflate(frame, payload.shape, itemsize)), rows):
                    raise _damaged(cache, shard.key, "a window's CRC32C is wrong")
                sizes.append((len(frame), payload.nbytes))
                yield frame
            tail = file.read(record.nbytes)
            digest.update(tail)
            if tail != shard.tail or digest.hexdigest() != record.sha256:
                raise _damaged(cache, shard.key, "not what the manifest says")
    except OSError as error:
        raise _damaged(cache, shard.key, f"cannot be read ({error.strerror})") from error
    yield _table(sizes)


def _unpacked(archive: Path, shard: Shard, record: ObjectRecord) -> Iterator[Buffer]:
    """The shard that a packed file was made of."""
    signal, key, frames = shard.signal, shard.key, shard.frames
    itemsize = np.dtype(signal.dtype).itemsize
    try:
        with _open(archive, key) as file:
            found = os.fstat(file.fileno()).st_size
            if found != record.nbytes or found < shard.table_nbytes:
                raise _damaged(archive, key, f"{found:,} bytes, expected {record.nbytes:,}")
            file.seek(found - shard.table_nbytes)
            table = file.read(shard.table_nbytes)
            sizes = np.frombuffer(table[8:-9], dtype="<u4").reshape(-1, 2).tolist()
            lengths = [windows * signal.nbytes for windows in frames]
            frame_sizes = [(size, length) for (size, _), length in zip(sizes, lengths, strict=True)]
            expected = _table(frame_sizes)
            if table != expected or sum(size for size, _ in sizes) + len(table) != found:
                raise _damaged(archive, key, "its table of frames is not what the plan implies")
            file.seek(0)
            for windows, (size, _) in zip(frames, sizes, strict=True):
                try:
                    payload = _inflate(file.read(size), (windows, signal.nbytes), itemsize)
                except ValueError as error:
                    raise _damaged(archive, key, str(error)) from error
                yield _rows(payload).reshape(-1).data
    except OSError as error:
        raise _damaged(archive, key, f"cannot be read ({error.strerror})") from error
    yield shard.tail


def _deflate(payload: npt.NDArray[np.uint8], itemsize: int) -> bytes:
    """One frame: first all first bytes of the elements, then all second bytes, ..."""
    from numcodecs import Shuffle, Zstd

    frame: bytes = Zstd(level=_LEVEL).encode(Shuffle(itemsize).encode(payload.reshape(-1)))
    return frame


def _inflate(frame: bytes, shape: tuple[int, int], itemsize: int) -> npt.NDArray[np.uint8]:
    """The payload of one frame. Raises ValueError where it is not of this shape.

    A frame that does not say its length would be inflated to whatever it holds.
    """
    from numcodecs import Shuffle, Zstd

    nbytes = shape[0] * shape[1]
    if _declared_nbytes(frame) != nbytes:
        raise ValueError(f"a frame says it holds {_declared_nbytes(frame)} bytes, not {nbytes:,}")
    shuffled = np.empty(nbytes, dtype=np.uint8)
    try:
        Zstd().decode(frame, out=shuffled)
    except RuntimeError as error:
        raise ValueError(f"a frame is no sound Zstandard ({error})") from error
    payload = np.empty(nbytes, dtype=np.uint8)
    Shuffle(itemsize).decode(shuffled, out=payload)
    return payload.reshape(shape)


def _declared_nbytes(frame: bytes) -> int | None:
    """The content size in a frame's header (RFC 8878, 3.1.1.1), where there is one."""
    if len(frame) < 5 or frame[:4] != _FRAME_MAGIC:
        return None
    descriptor = frame[4]
    alone = bool(descriptor & 0x20)
    width = (int(alone), 2, 4, 8)[descriptor >> 6]
    first = 5 + (not alone) + (0, 1, 2, 4)[descriptor & 3]
    if not width or len(frame) < first + width:
        return None
    return int.from_bytes(frame[first : first + width], "little") + (256 if width == 2 else 0)


def _rows(payload: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Windows as they lie in a shard, each followed by its CRC."""
    rows = np.empty((len(payload), payload.shape[1] + CRC_NBYTES), dtype=np.uint8)
    rows[:, :-CRC_NBYTES] = payload
    crc = np.array([crc32c.crc32c(row.data) for row in payload], dtype="<u4")
    rows[:, -CRC_NBYTES:] = crc.view(np.uint8).reshape(-1, CRC_NBYTES)
    return rows


def _table(sizes: list[tuple[int, int]]) -> bytes:
    """Where each frame ends: a frame that decoders skip, as the seekable format has it."""
    entries = b"".join(struct.pack("<II", *size) for size in sizes)
    footer = struct.pack("<IB", len(sizes), 0) + _SEEKABLE_MAGIC
    return _TABLE_MAGIC + struct.pack("<I", len(entries) + len(footer)) + entries + footer


def _open(folder: Path, key: str) -> IO[bytes]:
    return os.fdopen(open_object(folder, key), "rb", buffering=0)


def _damaged(folder: Path, key: str, found: str) -> CacheCorrupt:
    return CacheCorrupt(f"{folder}: {key}: {found}; copy it again from where it came from")
