"""Which parts are there, sealing a cache, and finding damage.

Only `seal`, `forget`, `restore_planned` and `clear_work` change anything on disk. Others may work
on the cache at the same time: receipts are listed first and files after them, so that whatever a
receipt tells of is seen; what goes meanwhile is no damage.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from had_pipe.cache import writer
from had_pipe.cache.door import open_object, read_object
from had_pipe.cache.layout import (
    CRC_NBYTES,
    DATA,
    MANIFEST,
    PLAN,
    RECEIPTS,
    WINDOWS,
    WORK,
    Manifest,
    ObjectRecord,
    Part,
    Plan,
    Signal,
    SplitPlan,
    parse_receipt,
    read_manifest,
    read_plan,
    read_receipt,
    receipt_limit,
)
from had_pipe.cache.loci import WindowTable
from had_pipe.cache.reader import Cache, check_receipt, expected_keys, refuse_endless
from had_pipe.draws import Purpose, permutation
from had_pipe.durable import make_folder, publish, storage, sync_folder, write_file
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete, shown
from had_pipe.progress import Progress, Reporter, silent

Level = Literal["structure", "sample", "everything"]

_Look = Callable[[memoryview, int], None]
"""Looks at a piece of an object's bytes as they pass, and at which byte it begins."""

_ASKED = 3  # receipts, before it is given up to read one
_LARGEST_RECEIPT = 1 << 24

SAMPLE = 20
"""`sample` hashes one of so many large objects."""

_LARGEST_METADATA = 1 << 24
_BUFFER = 1 << 18  # read and hashed at once: stays in a core's own cache, where it is fastest
_HANDFUL = 1 << 20  # bytes of small objects that a thread takes at once
_TELL_SECONDS = 0.1
_CLEAR_SECONDS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.8)  # waited between attempts to clear `.work/`


@dataclass(frozen=True)
class Problem:
    """One object that is not what it should be."""

    key: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return shown(f"{self.key}: {self.found}, expected {self.expected}; {self.remedy}")


@dataclass(frozen=True)
class VerifyReport:
    """What a verification looked at and found."""

    cache_id: str
    sealed: bool
    level: Level
    share: tuple[int, int]
    """Which of how many verifications this was; the contents of large objects are shared out."""
    parts: int
    """Parts that have receipts."""
    objects: int
    """Objects whose contents were hashed."""
    nbytes: int
    """Bytes hashed."""
    problems: tuple[Problem, ...]


def missing_parts(cache: Path, plan: Plan) -> list[Part]:
    """The parts that have no receipt yet, in order."""
    there = _receipt_keys(cache)
    return [part for part in plan.parts() if part.receipt_key not in there]


def numerics_class(cache: Path, plan: Plan) -> Mapping[str, str | int] | None:
    """The class of arithmetic the parts so far were made with; None where there is none yet."""
    for part in made_parts(cache, plan):
        return read_receipt(cache, plan, part)[0].numerics
    return None


def stated_plan(cache: Path) -> str | None:
    """The plan id that a receipt states; None where none can be read."""
    for key in sorted(_receipt_keys(cache))[:_ASKED]:
        with suppress(OSError, CacheError, ValueError, LookupError, TypeError, RecursionError):
            stated: str = json.loads(read_object(cache, key, limit=_LARGEST_RECEIPT))["plan"]
            return stated
    return None


def seal(cache: Path, *, threads: int | None = None, report: Reporter = silent) -> Manifest:
    """Write the manifest, once every part is there; then `.work/` goes.

    Shards are held against their receipts by length; all else is hashed, and the arrays made at
    plan time are held against the plan. Raises CacheIncomplete or CacheCorrupt.
    """
    plan, raw = read_plan(cache)
    missing = missing_parts(cache, plan)
    if missing:
        raise CacheIncomplete(f"{cache}: {len(missing):,} parts are missing, {missing[0]} first")
    for problem in _planned_problems(cache, plan):
        raise CacheCorrupt(f"{cache}: {problem}")
    objects = {PLAN: _record(raw)}
    numerics = None
    for part in plan.parts():
        receipt, receipt_raw = read_receipt(cache, plan, part)
        check_receipt(cache, plan, part, receipt)
        numerics = numerics or receipt.numerics
        if receipt.numerics != numerics:
            raise CacheCorrupt(
                f"{cache}: {part} was made by {dict(receipt.numerics)}, other parts by "
                f"{dict(numerics)}; delete {part.receipt_key} and run extract-teacher again"
            )
        objects[part.receipt_key] = _record(receipt_raw)
        for key, shard in receipt.objects.items():
            objects[key] = ObjectRecord(nbytes=shard.nbytes, sha256=shard.sha256)
    unread = {}
    for key in expected_keys(plan):
        nbytes = _length(cache, key)
        if key not in objects:
            if nbytes is None:
                raise CacheCorrupt(f"{cache}: {key} is missing; {_remedy(key)}")
            unread[key] = nbytes
        elif nbytes != objects[key].nbytes:
            told = "is missing" if nbytes is None else f"has {nbytes:,} bytes"
            raise CacheCorrupt(
                f"{cache}: {key} {told}, its receipt says {objects[key].nbytes:,} bytes; run "
                "extract-teacher with --repair"
            )
    read = _hashed(cache, unread, what="sealing", threads=threads, report=report)
    for key, found in read.items():
        if isinstance(found, str):
            raise CacheCorrupt(f"{cache}: {key} {found}; {_remedy(key)}")
        objects[key] = found
    manifest = Manifest.build(plan, objects)
    with storage(cache):
        # Others may have renamed a receipt and not come to syncing its folder.
        for folder in sorted({(cache / part.receipt_key).parent for part in plan.parts()}):
            sync_folder(folder)
    make_folder(cache / WORK)
    write_file(cache / MANIFEST, manifest.to_json(), aside=cache / WORK)
    clear_work(cache)
    return manifest


def clear_work(cache: Path) -> None:
    """Remove `.work/`; a sealed cache has none.

    Others may be about to leave it, and a network file system keeps a removed file for as long as
    somebody has it open: what cannot go soon is left for the next who comes by.
    """
    for seconds in _CLEAR_SECONDS:
        time.sleep(seconds)
        with storage(cache):
            if _removed(cache / WORK):
                sync_folder(cache)
                return


def _removed(folder: Path) -> bool:
    """Remove a folder and all in it, whoever else removes or adds; whether it is gone."""
    for below, folders, names in os.walk(folder, topdown=False):
        links = [name for name in folders if Path(below, name).is_symlink()]
        for name in (*names, *links):
            Path(below, name).unlink(missing_ok=True)
        try:
            Path(below).rmdir()
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY):
                raise
    return not os.path.lexists(folder)


def verify(
    cache: Path,
    *,
    level: Level = "everything",
    share: tuple[int, int] = (1, 1),
    threads: int | None = None,
    report: Reporter = silent,
) -> VerifyReport:
    """Look for everything that is not what was written. Never modifies anything.

    `structure`: every file present, of the right length, nothing besides; JSON and metadata hashed.
    `sample`: also one of twenty large objects, always the same ones. `everything`: every byte.
    With `share` (i, n), the i-th of n verifications: each does all of `structure`, and together
    they read every large object once. `threads` hash at once, one a core unless said.

    An unsealed cache is verified as far as it has receipts; others may be extending it. Raises
    CacheRefused where plan.json or the manifest themselves cannot be read.
    """
    assert 1 <= share[0] <= share[1]
    plan, raw = read_plan(cache)
    manifest = read_manifest(cache, plan)
    sealed = manifest is not None
    objects = _Objects(plan)
    problems: list[Problem] = []
    since: dict[Part, object] = {}
    records: dict[str, ObjectRecord] = {PLAN: _record(raw)}
    crcs: dict[str, bytes] = {}
    if manifest is not None:
        refuse_endless(cache, plan, manifest)
        if manifest.plan != plan.id:
            problems.append(
                Problem(MANIFEST, f"of plan {manifest.plan[:12]}...", f"{plan.id[:12]}...", _AGAIN)
            )
        expected = expected_keys(plan)
        problems += _key_problems(expected, manifest.objects)
        # Keys that a stranger made up are named, and never followed.
        records = {key: entry for key, entry in manifest.objects.items() if key in expected}
        parts = list(plan.parts())
    else:
        problems += _planned_problems(cache, plan)
        parts = made_parts(cache, plan)
        since = {part: _receipt_stamp(cache, part) for part in parts}
    for part in parts:
        problems += _part_problems(cache, plan, part, records, crcs, sealed=sealed)
    seen, strangers = _look_around(cache, objects, sealed=sealed)
    problems += strangers
    odd = {problem.key for problem in strangers}
    lengths = {}
    for key, record in records.items():
        if key in odd:
            continue
        nbytes = seen.get(key)
        if nbytes is None:
            nbytes = _length(cache, key)
        if nbytes == record.nbytes and nbytes <= plan.largest_nbytes:
            lengths[key] = nbytes
        elif nbytes == record.nbytes:
            most = f"at most {plan.largest_nbytes:,}"
            problems.append(Problem(key, f"{nbytes:,} bytes", most, _AGAIN))
        else:
            told = "missing" if nbytes is None else f"{nbytes:,} bytes"
            problems.append(Problem(key, told, f"{record.nbytes:,} bytes", _remedy(key)))
    chosen = {key: lengths[key] for key in _chosen(records, level, share) if key in lengths}
    hashed = 0
    there = {key: hashlib.sha256() for key in crcs.keys() & chosen.keys()}

    def look(key: str) -> _Look | None:
        part = objects.part(key)
        if part is None or key not in there:
            return None
        signal = next(signal for signal in plan.signals if part.shard_key(signal) == key)
        windows = plan.part_windows(part)
        return lambda piece, at: there[key].update(_crcs_within(piece, at, signal, windows))

    read = _hashed(cache, chosen, what="verifying", threads=threads, report=report, look=look)
    for key, found in read.items():
        if isinstance(found, str):
            problems.append(Problem(key, found, "to be read", _remedy(key)))
            continue
        hashed += found.nbytes
        if found.sha256 != records[key].sha256:
            problems.append(_other_contents(key, found, records[key]))
        elif key in there and there[key].digest() != crcs[key]:
            # By these a shard is read. Nothing else covers them before there is a manifest.
            receipt = _receipt_of(objects, key)
            told = f"other CRCs than {key} holds"
            problems.append(Problem(receipt, told, "those of its windows", _remedy(receipt)))
    if manifest is not None and level == "everything" and share == (1, 1) and not problems:
        # Whole, and still no cache: a forger's digests fit whatever he wrote.
        try:
            _ = Cache(cache, plan, manifest, check="first").fidelity
        except CacheError as error:
            problems.append(Problem(DATA, str(error), "what can be opened", _AGAIN))
    # Parts that others took back meanwhile, or made again, are for another time to judge.
    stirred = {part for part, stamp in since.items() if stamp != _receipt_stamp(cache, part)}
    unique = {
        (problem.key, problem.found): problem
        for problem in problems
        if objects.part(problem.key) not in stirred
    }
    return VerifyReport(
        cache_id=manifest.id if manifest else plan.id,
        sealed=sealed,
        level=level,
        share=share,
        parts=sum(part.receipt_key in seen for part in parts),
        objects=len(chosen),
        nbytes=hashed,
        problems=tuple(_healable(cache, plan, unique[place]) for place in sorted(unique)),
    )


def forget(cache: Path, parts: Iterable[Part]) -> None:
    """Take back the receipts of damaged parts, and the seal, so that they are extracted again.

    Shards stay until others replace them, but what is no file goes. The caller holds the cache's
    lock.
    """
    with storage(cache):
        if os.path.lexists(cache / MANIFEST):
            _remove(cache / MANIFEST)
            sync_folder(cache)
        parts = list(parts)
        signals = read_plan(cache)[0].signals if parts else ()
        for part in parts:
            receipt = cache / part.receipt_key
            _remove(receipt)
            if receipt.parent.is_dir():
                sync_folder(receipt.parent)
            for signal in signals:
                shard = cache / part.shard_key(signal)
                if shard.is_symlink() or not shard.is_file():
                    _remove(shard)


def damaged_parts(plan: Plan, problems: Iterable[Problem]) -> tuple[list[Part], list[Problem]]:
    """The parts that extraction can make again, and the problems that it cannot mend."""
    objects = _Objects(plan)
    parts, beyond = set(), []
    for problem in problems:
        part = objects.part(problem.key)
        if part is None:
            beyond.append(problem)
        else:
            parts.add(part)
    return sorted(parts), beyond


class _Objects:
    """What a key names, worked out from the key alone: a plan may have millions of parts."""

    def __init__(self, plan: Plan) -> None:
        self._parts = {name: -(-split.windows // plan.part) for name, split in plan.splits.items()}
        self._views = {name: frozenset(split.views) for name, split in plan.splits.items()}
        self._first = {name: str(split.views[0]) for name, split in plan.splits.items()}
        # A plan of the same kind, of one window a split: its keys stand for all.
        small = {
            name: SplitPlan(windows=1, views=split.views[:1]) for name, split in plan.splits.items()
        }
        of_one = plan.model_copy(update={"splits": small})
        self._files = expected_keys(of_one)
        self._folders = {str(parent) for key in self._files for parent in Path(key).parents}
        self._of_parts = {
            key
            for part in of_one.parts()
            for key in (part.receipt_key, *(part.shard_key(signal) for signal in plan.signals))
        }

    def part(self, key: str) -> Part | None:
        """The part whose receipt or shard an object is."""
        like, part = self._like(key)
        return part if like in self._of_parts else None

    def is_file(self, key: str) -> bool:
        """Whether a sealed cache holds such a file, its manifest apart."""
        return self._like(key)[0] in self._files

    def is_folder(self, key: str) -> bool:
        return self._like(key)[0] in self._folders

    def _like(self, key: str) -> tuple[str, Part | None]:
        """The key of the first object of its kind, and the part whose number a key bears."""
        words = key.split("/")
        split = words[1] if len(words) > 1 else ""
        if words[0] not in (DATA, RECEIPTS) or split not in self._parts or len(words) < 3:
            return key, None
        view = _number(words[2], "{}")
        if view in self._views[split]:
            words[2] = self._first[split]
        place, spelling = 3, "{:05d}.json"
        if words[0] == DATA:
            place, spelling = (words.index("c") + 1 if "c" in words else len(words)), "{}"
        number = _number(words[place], spelling) if place < len(words) else None
        if number is None or number >= self._parts[split]:
            return "/".join(words), None
        words[place] = spelling.format(0)
        return "/".join(words), None if view is None else Part(split, view, number)


def _number(word: str, spelling: str) -> int | None:
    """The number that is spelt so, if one is."""
    digits = word.removesuffix(".json")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 20):
        return None
    return int(digits) if spelling.format(int(digits)) == word else None


def _receipt_keys(cache: Path) -> set[str]:
    """Every receipt there is, by listing: asking for each part takes a network disk minutes."""
    folders = [RECEIPTS]
    with storage(cache):
        for _ in range(2):
            folders = [
                f"{folder}/{entry.name}"
                for folder in folders
                for entry in _entries(cache / folder)
                if os.path.isdir(entry)  # noqa: PTH112  (a DirEntry raises where links turn)
            ]
        return {
            f"{folder}/{entry.name}"
            for folder in folders
            for entry in _entries(cache / folder)
            if entry.is_file(follow_symlinks=False)
            or (entry.is_symlink() and os.path.isfile(entry))  # noqa: PTH113
        }


def made_parts(cache: Path, plan: Plan) -> list[Part]:
    """The parts that have a receipt."""
    objects = _Objects(plan)
    return sorted(part for key in _receipt_keys(cache) if (part := objects.part(key)))


def _entries(folder: Path) -> Sequence[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return ()


def _length(cache: Path, key: str) -> int | None:
    """Length of an ordinary file that no link leads to; None where there is none."""
    try:
        with os.fdopen(open_object(cache, key), "rb", buffering=0) as file:
            return os.fstat(file.fileno()).st_size
    except (CacheError, OSError):
        return None


def _remove(path: Path) -> None:
    """Remove whatever stands where a file belongs."""
    if not path.is_symlink() and path.is_dir():
        try:
            path.rmdir()
        except OSError as error:
            raise CacheCorrupt(
                f"{path}: a folder with something in it stands where a file belongs; remove it, "
                "then run the same command again"
            ) from error
    else:
        path.unlink(missing_ok=True)


def is_planned(plan: Plan, problem: Problem) -> bool:
    """Whether a problem is about what was made when the cache was planned, plan.json apart."""
    objects = _Objects(plan)
    below = problem.key == WINDOWS or problem.key.partition("/")[0] == DATA
    known = objects.is_file(problem.key) or objects.is_folder(problem.key)
    return below and known and objects.part(problem.key) is None


def restore_planned(cache: Path, plan: Plan, again: Path) -> None:
    """Put the objects of a folder that was planned alike in the place of those that differ.

    Raises CacheCorrupt, and changes nothing, where one is not what the manifest says of it. The
    caller holds the cache's lock.
    """
    manifest = read_manifest(cache, plan)
    objects = _Objects(plan)
    keys = [
        key
        for path in again.rglob("*")
        if path.is_file()
        and objects.is_file(key := path.relative_to(again).as_posix())
        and key != PLAN
    ]
    made = _hashed(again, {key: _length(again, key) or 0 for key in keys}, what="mending")
    there = _hashed(cache, {key: _length(cache, key) or 0 for key in keys}, what="mending")
    # What another version of Zarr or Arrow spells otherwise is no damage.
    differing = [
        key
        for key in keys
        if there[key] != made[key] and (manifest is None or there[key] != manifest.objects.get(key))
    ]
    for key in differing:
        if manifest is not None and manifest.objects.get(key) != made[key]:
            raise CacheCorrupt(
                f"{cache}: {key} is damaged, and made again it is not what the manifest says: "
                "another version of Zarr or Arrow made it; copy it again"
            )
    for key in differing:
        for folder in Path(key).parents:
            if (cache / folder).is_symlink():
                raise CacheCorrupt(f"{cache}: {folder} is a link; remove it, then run this again")
    with storage(cache):
        for key in differing:
            if not (cache / key).is_file() or (cache / key).is_symlink():
                _remove(cache / key)
            make_folder((cache / key).parent)
            publish(again / key, cache / key)


def _record(raw: bytes) -> ObjectRecord:
    return ObjectRecord(nbytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def _hashed(
    cache: Path,
    lengths: Mapping[str, int],
    *,
    what: str,
    threads: int | None = None,
    report: Reporter = silent,
    look: Callable[[str], _Look | None] = lambda _: None,
) -> dict[str, ObjectRecord | str]:
    """What objects hold, or why one cannot be read; the largest first, told in bytes.

    `look` says, in a thread, who else looks at an object's bytes as they pass.
    """
    threads = threads or len(os.sched_getaffinity(0))
    total, begun, done = sum(lengths.values()), time.monotonic(), 0
    counting, stopped = threading.Lock(), threading.Event()

    def advance(nbytes: int) -> bool:
        nonlocal done
        with counting:
            done += nbytes
        return not stopped.is_set()

    def tell() -> None:
        seconds = time.monotonic() - begun
        report(Progress(what=what, done=done, total=total, unit="bytes", seconds=seconds))

    found: dict[str, ObjectRecord | str] = {}
    handfuls = _handfuls(lengths)
    running: set[Future[dict[str, ObjectRecord | str]]] = set()

    def read(keys: Sequence[str]) -> dict[str, ObjectRecord | str]:
        return {key: _read(cache, key, lengths[key], advance, look(key)) for key in keys}

    pool = ThreadPoolExecutor(threads, thread_name_prefix="had-pipe hash")
    try:
        told = begun
        while True:
            # A few beyond those at work, and no more: a cache may have a million objects.
            running |= {
                pool.submit(read, keys) for keys in islice(handfuls, 4 * threads - len(running))
            }
            if not running:
                break
            ended, running = wait(running, timeout=_TELL_SECONDS, return_when=FIRST_COMPLETED)
            for future in ended:
                found |= future.result()
            if time.monotonic() - told >= _TELL_SECONDS:
                tell()
                told = time.monotonic()
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)
    if lengths:
        tell()
    return found


def _handfuls(lengths: Mapping[str, int]) -> Iterator[list[str]]:
    """The keys, the largest first, small ones together: a thread costs more than their hashing."""
    handful: list[str] = []
    nbytes = 0
    for key in sorted(lengths, key=lambda key: (-lengths[key], key)):
        handful.append(key)
        nbytes += lengths[key]
        if nbytes >= _HANDFUL or len(handful) == 64:
            yield handful
            handful, nbytes = [], 0
    if handful:
        yield handful


def _read(
    cache: Path, key: str, nbytes: int, advance: Callable[[int], bool], look: _Look | None
) -> ObjectRecord | str:
    """Hash one file, as long as `advance` says to go on; a disk that fails is an answer too."""
    digest, done = hashlib.sha256(), 0
    buffer = memoryview(bytearray(min(_BUFFER, nbytes + 1)))
    try:
        with os.fdopen(open_object(cache, key), "rb", buffering=0) as file:
            while got := file.readinto(buffer):
                digest.update(buffer[:got])
                if look is not None:
                    look(buffer[:got], done)
                done += got
                if done > nbytes:
                    return f"more than {nbytes:,} bytes"
                if not advance(got):
                    break
    except CacheError as error:
        return str(error)
    except FileNotFoundError:
        return "missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ObjectRecord(nbytes=done, sha256=digest.hexdigest())


def _crcs_within(piece: memoryview, at: int, signal: Signal, windows: int) -> bytes:
    """What a piece of a shard, from byte `at` on, holds of the CRCs that follow its windows."""
    nbytes, stride, end = signal.nbytes, signal.stride, at + len(piece)
    found = bytearray()
    row = max(0, (at - nbytes - CRC_NBYTES) // stride)
    while row < windows and (start := row * stride + nbytes) < end:
        found += piece[max(start - at, 0) : max(start + CRC_NBYTES - at, 0)]
        row += 1
    return bytes(found)


def _receipt_of(objects: _Objects, key: str) -> str:
    part = objects.part(key)
    assert part is not None
    return part.receipt_key


def _remedy(key: str) -> str:
    if key in (PLAN, MANIFEST):
        return _AGAIN
    of_part = "/embedding/" in key and "/c/" in key and not key.startswith(f"{DATA}/statistics/")
    if of_part or key.startswith(f"{RECEIPTS}/"):
        return "`had-pipe extract-teacher RECIPE --repair` makes this part again; or copy it again"
    return "`had-pipe extract-teacher RECIPE --repair` plans it again; or copy it again"


def _healable(cache: Path, plan: Plan, problem: Problem) -> Problem:
    """No teacher makes a recoded cache again, but its source does."""
    if plan.source is None:
        return problem
    command = f"`had-pipe cache recode SOURCE {cache} --codec {plan.codec} --repair`"
    by_teacher = "`had-pipe extract-teacher RECIPE --repair`"
    return replace(problem, remedy=problem.remedy.replace(by_teacher, command))


_AGAIN = "copy the cache again"


def _key_problems(expected: set[str], found: Mapping[str, object]) -> Iterator[Problem]:
    for key in sorted(expected - set(found)):
        yield Problem(key, "not in the manifest", "an entry", "copy manifest.json again")
    for key in sorted(set(found) - expected):
        yield Problem(key, "in the manifest", "no such object in the plan", _AGAIN)


def _other_contents(key: str, found: ObjectRecord, expected: ObjectRecord) -> Problem:
    return Problem(
        key, f"SHA-256 {found.sha256[:12]}...", f"{expected.sha256[:12]}...", _remedy(key)
    )


def _planned_problems(cache: Path, plan: Plan) -> Iterator[Problem]:
    """What was made at plan time against the digests in the plan."""
    found: dict[str, Any] = {"windows": _windows_digest(cache, plan)}
    try:
        opened = Cache(cache, plan, None, check="always")
        for name, array in opened.statistics.items():
            found[f"statistics/embedding/{name}"] = hashlib.sha256(array.data)
        for part in plan.parts():
            below = f"{part.split}/{part.view}"
            kmer_id, mask, reverse = opened.seen(part)
            found.setdefault(f"{below}/mask", hashlib.sha256()).update(mask.data)
            found.setdefault(f"{below}/reversed", hashlib.sha256()).update(reverse.data)
            if part.view == plan.splits[part.split].views[0]:
                found.setdefault(f"{part.split}/kmer_id", hashlib.sha256()).update(kmer_id.data)
        measured = opened.fidelity  # the one thing there that does not follow from the plan
    except CacheError as error:
        yield Problem(DATA, str(error), "what was planned", _remedy(DATA))
        return
    yield from _metadata_problems(cache, plan, measured)
    for name in sorted({*found, *plan.contents}):
        digest = found[name].hexdigest() if name in found else None
        expected = plan.contents.get(name)
        if digest != expected:
            key = WINDOWS if name == "windows" else f"{DATA}/{name}"
            yield Problem(key, f"contents {digest}", f"{expected}", _remedy(key))


def _metadata_problems(cache: Path, plan: Plan, fidelity: Mapping[str, Any]) -> Iterator[Problem]:
    """Every zarr.json against what the plan says; all are there, or none is worked out."""
    found: dict[str, Any] = {}
    for key in plan.metadata_keys():
        try:
            found[key] = json.loads(read_object(cache, key, limit=_LARGEST_METADATA))
        except (CacheError, OSError, ValueError, RecursionError) as error:
            yield Problem(key, str(error), "the JSON of a Zarr node", _remedy(key))
            return
    for key, expected in writer.metadata(plan, fidelity).items():
        if found[key] != expected:
            yield Problem(key, "other metadata", "what follows from the plan", _remedy(key))


def _windows_digest(cache: Path, plan: Plan) -> Any:
    """The digest of the window table, taken of its text as docs/cache-format.md says."""
    lines = hashlib.sha256()
    try:
        with WindowTable(cache, plan) as table:
            for some in table.lines():
                lines.update(some)
    except CacheError:
        lines.update(b"unreadable")  # the digest of no table
    return lines


def _part_problems(
    cache: Path,
    plan: Plan,
    part: Part,
    records: dict[str, ObjectRecord],
    crcs: dict[str, bytes],
    *,
    sealed: bool,
) -> Iterator[Problem]:
    """A receipt against plan and manifest; an unsealed cache takes its records from receipts.

    Notes the SHA-256 of the CRCs that it tells of each shard.

    A receipt that is not the manifest's is told of where objects are hashed.
    """
    key = part.receipt_key
    try:
        raw = read_object(cache, key, limit=receipt_limit(plan, part))
        if sealed and records.get(key) != _record(raw):
            return
        receipt = parse_receipt(cache, part, raw)
        check_receipt(cache, plan, part, receipt)
    except (CacheError, OSError) as error:
        # A forger's manifest has the receipt's own length and digest: then only this tells.
        told = sealed and (key not in records or _length(cache, key) != records[key].nbytes)
        if not told:
            yield Problem(key, str(error), "a receipt of this part", _remedy(key))
        return
    for shard, record in receipt.objects.items():
        entry = ObjectRecord(nbytes=record.nbytes, sha256=record.sha256)
        crcs[shard] = hashlib.sha256(record.crcs().astype("<u4").tobytes()).digest()
        if not sealed:
            records[shard] = entry
        elif records.get(shard) != entry:
            yield Problem(key, f"another SHA-256 for {shard}", "the manifest's", _remedy(key))
    if not sealed:
        records[key] = _record(raw)


def _receipt_stamp(cache: Path, part: Part) -> object:
    """Tells a receipt from one that was written since in its place."""
    try:
        found = (cache / part.receipt_key).lstat()
    except (FileNotFoundError, NotADirectoryError):
        return object()  # none: like no other
    return found.st_ino, found.st_mtime_ns


def _look_around(
    cache: Path, objects: _Objects, *, sealed: bool
) -> tuple[dict[str, int], list[Problem]]:
    """The lengths of the cache's files; links, special files, and what does not belong there.

    No link is followed. What goes while we look was never part of the cache.
    """
    seen: dict[str, int] = {}
    problems = []
    folders = [""]
    while folders:
        below = folders.pop()
        try:
            entries = _entries(cache / below)
        except OSError as error:
            told = f"cannot be listed ({error.strerror})"
            problems.append(Problem(below, told, "a folder", _AGAIN))
            continue
        for entry in entries:
            key = f"{below}{entry.name}"
            wanted = "a file" if objects.is_file(key) or key == MANIFEST else ""
            wanted = "a folder" if objects.is_folder(key) else wanted
            if key == WORK and not entry.is_symlink():
                if sealed:
                    problems.append(Problem(key, "a folder", "nothing of that name", _LEFT))
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if stat.S_ISDIR(status.st_mode):
                kind = "a folder"
                folders.append(f"{key}/")
            elif stat.S_ISREG(status.st_mode):
                kind = "a file"
                seen[key] = status.st_size
            else:
                kind = "a link or special file"
            if kind != wanted:
                remedy = "remove it" if not wanted else f"remove it; then {_remedy(key)}"
                problems.append(Problem(key, kind, wanted or "nothing of that name", remedy))
    return seen, problems


_LEFT = "a stopped process left it: run the same extract-teacher command again, or remove it"


def _chosen(records: Mapping[str, object], level: Level, share: tuple[int, int]) -> Iterator[str]:
    """The keys whose contents one of so many verifications hashes at a level."""
    small = [key for key in records if key.endswith(".json") or key == WINDOWS]
    yield from small
    large = sorted(set(records) - set(small))
    if level == "structure":
        return
    if level == "sample":
        order = permutation(Purpose.VERIFY_SAMPLE, 0, 0, len(large))
        large = [large[place] for place in order[: -(-len(large) // SAMPLE)]]
    # By the numbers in the key, so part by part in turn, and whatever other keys there are: another
    # verification may see more parts of a cache that is being made.
    turns = (sum(map(int, re.findall(r"[0-9]+", key))) % share[1] for key in large)
    yield from (key for key, turn in zip(large, turns, strict=True) if turn == share[0] - 1)
