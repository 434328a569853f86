"""Which parts are there, sealing a cache, and finding damage.

Only `seal`, `forget` and `clear_work` change anything on disk.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from had_pipe.cache.layout import (
    DATA,
    MANIFEST,
    PLAN,
    WINDOWS,
    WORK,
    Manifest,
    ObjectRecord,
    Part,
    Plan,
    read_manifest,
    read_plan,
    read_receipt,
)
from had_pipe.cache.reader import Cache, check_receipt, expected_keys, refuse_endless
from had_pipe.draws import Purpose, permutation
from had_pipe.durable import make_folder, storage, sync_folder, write_file
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete
from had_pipe.progress import Progress, Reporter, silent

Level = Literal["structure", "sample", "everything"]

SAMPLE = 20
"""`sample` hashes one of so many large objects."""


@dataclass(frozen=True)
class Problem:
    """One object that is not what it should be."""

    key: str
    found: str
    expected: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.key}: {self.found}, expected {self.expected}; {self.remedy}"


@dataclass(frozen=True)
class VerifyReport:
    """What a verification looked at and found."""

    cache_id: str
    sealed: bool
    objects: int
    """Objects whose contents were hashed."""
    nbytes: int
    """Bytes hashed."""
    problems: tuple[Problem, ...]


def missing_parts(cache: Path, plan: Plan) -> list[Part]:
    """The parts that have no receipt yet, in order."""
    return [part for part in plan.parts() if not (cache / part.receipt_key).is_file()]


def numerics_class(cache: Path, plan: Plan) -> Mapping[str, str | int] | None:
    """The class of arithmetic the parts so far were made with; None where there is none yet."""
    for part in plan.parts():
        if (cache / part.receipt_key).is_file():
            return read_receipt(cache, part)[0].numerics
    return None


def seal(cache: Path, *, report: Reporter = silent) -> Manifest:
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
        receipt, receipt_raw = read_receipt(cache, part)
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
    begun = time.monotonic()
    keys = sorted(expected_keys(plan))
    for number, key in enumerate(keys):
        path = cache / key
        nbytes = path.stat().st_size if path.is_file() else -1
        if key in objects:
            if nbytes != objects[key].nbytes:
                raise CacheCorrupt(
                    f"{cache}: {key} has {nbytes:,} bytes, its receipt says "
                    f"{objects[key].nbytes:,}; run extract-teacher with --repair"
                )
        else:
            if nbytes < 0:
                raise CacheCorrupt(f"{cache}: {key} is missing; start the cache again")
            objects[key] = ObjectRecord(nbytes=nbytes, sha256=_hash(path))
        report(
            Progress(
                what="sealing",
                done=number + 1,
                total=len(keys),
                unit="objects",
                seconds=time.monotonic() - begun,
            )
        )
    manifest = Manifest.build(plan, objects)
    make_folder(cache / WORK)
    write_file(cache / MANIFEST, manifest.to_json(), aside=cache / WORK)
    clear_work(cache)
    return manifest


def clear_work(cache: Path) -> None:
    """Remove `.work/`; a sealed cache has none."""
    if (cache / WORK).exists():
        with storage(cache):
            shutil.rmtree(cache / WORK)
            sync_folder(cache)


def verify(cache: Path, *, level: Level = "everything", report: Reporter = silent) -> VerifyReport:
    """Look for everything that is not what was written. Never modifies anything.

    `structure`: every file present, of the right length, nothing besides; JSON and metadata hashed.
    `sample`: also one of twenty large objects, always the same ones. `everything`: every byte.
    An unsealed cache is verified as far as it has receipts. Raises CacheRefused where plan.json or
    the manifest themselves cannot be read.
    """
    plan, raw = read_plan(cache)
    manifest = read_manifest(cache)
    problems: list[Problem] = []
    records: dict[str, ObjectRecord] = {PLAN: _record(raw)}
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
    else:
        problems += _planned_problems(cache, plan)
    for part in plan.parts():
        problems += _part_problems(cache, plan, part, records, sealed=manifest is not None)
    problems += _file_problems(cache, records, sealed=manifest is not None)
    lengths = {}
    for key, record in sorted(records.items()):
        problem = _length_problem(cache, key, record)
        if problem is None:
            lengths[key] = record.nbytes
        else:
            problems.append(problem)
    keys = list(_chosen(lengths, level))
    nbytes, total, begun = 0, sum(lengths[key] for key in keys), time.monotonic()
    for key in keys:
        found = _hash(cache / key)
        if found != records[key].sha256:
            problems.append(
                Problem(
                    key,
                    f"SHA-256 {found[:12]}...",
                    f"{records[key].sha256[:12]}...",
                    _remedy(key),
                )
            )
        nbytes += lengths[key]
        report(
            Progress(
                what="verifying",
                done=nbytes,
                total=total,
                unit="bytes",
                seconds=time.monotonic() - begun,
            )
        )
    unique = {(problem.key, problem.found): problem for problem in problems}
    return VerifyReport(
        cache_id=manifest.id if manifest else plan.id,
        sealed=manifest is not None,
        objects=len(keys),
        nbytes=nbytes,
        problems=tuple(sorted(unique.values(), key=lambda problem: problem.key)),
    )


def forget(cache: Path, parts: Iterable[Part]) -> None:
    """Take back the receipts of damaged parts, and the seal, so that they are extracted again.

    The caller holds the cache's lock.
    """
    with storage(cache):
        if (cache / MANIFEST).exists():
            (cache / MANIFEST).unlink()
            sync_folder(cache)
        for part in parts:
            receipt = cache / part.receipt_key
            receipt.unlink(missing_ok=True)
            if receipt.parent.is_dir():
                sync_folder(receipt.parent)


def damaged_parts(plan: Plan, problems: Iterable[Problem]) -> tuple[list[Part], list[Problem]]:
    """The parts that extraction can make again, and the problems that it cannot mend."""
    of_key = {}
    for part in plan.parts():
        of_key[part.receipt_key] = part
        for signal in plan.signals:
            of_key[part.shard_key(signal)] = part
    parts = {of_key[problem.key] for problem in problems if problem.key in of_key}
    return sorted(parts), [problem for problem in problems if problem.key not in of_key]


def _record(raw: bytes) -> ObjectRecord:
    return ObjectRecord(nbytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remedy(key: str) -> str:
    of_part = "/embedding/" in key and "/c/" in key and not key.startswith(f"{DATA}/statistics/")
    if of_part or key.startswith("parts/"):
        return "`had-pipe extract-teacher RECIPE --repair` makes this part again; or copy it again"
    return "made when the cache was planned: copy it again, or make the cache anew"


_AGAIN = "copy the cache again"


def _key_problems(expected: set[str], found: Mapping[str, object]) -> Iterator[Problem]:
    for key in sorted(expected - set(found)):
        yield Problem(key, "not in the manifest", "an entry", "copy manifest.json again")
    for key in sorted(set(found) - expected):
        yield Problem(key, "in the manifest", "no such object in the plan", _AGAIN)


def _planned_problems(cache: Path, plan: Plan) -> Iterator[Problem]:
    """What was made at plan time against the digests in the plan."""
    found: dict[str, Any] = {"windows": _windows_digest(cache / WINDOWS)}
    try:
        opened = Cache(cache, plan, None, check="always")
        found |= {"statistics/embedding/mean": hashlib.sha256(opened.mean.data)}
        found |= {"statistics/embedding/std": hashlib.sha256(opened.std.data)}
        for part in plan.parts():
            below = f"{part.split}/{part.view}"
            kmer_id, mask, reverse = opened.seen(part)
            found.setdefault(f"{below}/mask", hashlib.sha256()).update(mask.data)
            found.setdefault(f"{below}/reversed", hashlib.sha256()).update(reverse.data)
            if part.view == plan.splits[part.split].views[0]:
                found.setdefault(f"{part.split}/kmer_id", hashlib.sha256()).update(kmer_id.data)
    except CacheError as error:
        yield Problem(DATA, str(error), "what was planned", _remedy(DATA))
        return
    for name in sorted({*found, *plan.contents}):
        digest = found[name].hexdigest() if name in found else None
        expected = plan.contents.get(name)
        if digest != expected:
            key = WINDOWS if name == "windows" else f"{DATA}/{name}"
            yield Problem(key, f"contents {digest}", f"{expected}", _remedy(key))


def _windows_digest(path: Path) -> Any:
    """The digest of the window table, taken of its text as docs/cache-format.md says."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = hashlib.sha256()
    if path.is_symlink() or not path.is_file():
        return lines
    names = ("split", "window", "genome", "contig", "start", "soft_masked_bases", "index")
    try:
        with path.open("rb") as file, pq.ParquetFile(file) as table:
            for batch in table.iter_batches(columns=list(names)):
                columns = [batch.column(name).to_pylist() for name in names]
                text = "".join(
                    "\t".join(map(str, row)) + "\n" for row in zip(*columns, strict=True)
                )
                lines.update(text.encode())
    except (pa.ArrowException, OSError, LookupError):
        lines.update(b"unreadable")  # the digest of no table
    return lines


def _part_problems(
    cache: Path, plan: Plan, part: Part, records: dict[str, ObjectRecord], *, sealed: bool
) -> Iterator[Problem]:
    """A receipt against plan and manifest; an unsealed cache takes its records from receipts."""
    key = part.receipt_key
    if not (cache / key).is_file():
        if sealed:
            yield Problem(key, "missing", "a receipt", _remedy(key))
        return
    try:
        receipt, raw = read_receipt(cache, part)
        check_receipt(cache, plan, part, receipt)
    except CacheError as error:
        yield Problem(key, str(error), "a receipt of this part", _remedy(key))
        return
    for shard, record in receipt.objects.items():
        entry = ObjectRecord(nbytes=record.nbytes, sha256=record.sha256)
        if not sealed:
            records[shard] = entry
        elif records.get(shard) != entry:
            yield Problem(key, f"another SHA-256 for {shard}", "the manifest's", _remedy(key))
    if not sealed:
        records[key] = _record(raw)


def _file_problems(
    cache: Path, records: Mapping[str, object], *, sealed: bool
) -> Iterator[Problem]:
    """Links, special files, and what does not belong there."""
    folders = {parent.as_posix() for key in records for parent in Path(key).parents}
    for folder, names, files in os.walk(cache):
        here = Path(folder).relative_to(cache)
        if here == Path():
            names[:] = [name for name in names if sealed or name != WORK]
        for name in (*names, *files):
            path = Path(folder, name)
            key = (here / name).as_posix()
            if path.is_symlink() or not (path.is_dir() or path.is_file()):
                yield Problem(key, "a link or special file", "an ordinary file", "remove it")
            elif sealed and key not in records and key not in folders and key != MANIFEST:
                kind = "a folder" if path.is_dir() else "a file"
                yield Problem(key, kind, "nothing of that name", "remove it")


def _length_problem(cache: Path, key: str, record: ObjectRecord) -> Problem | None:
    path = cache / key
    if path.is_symlink() or not path.is_file():
        return Problem(key, "missing", "a file", _remedy(key))
    nbytes = path.stat().st_size
    if nbytes != record.nbytes:
        return Problem(key, f"{nbytes:,} bytes", f"{record.nbytes:,}", _remedy(key))
    return None


def _chosen(lengths: Mapping[str, int], level: Level) -> Iterator[str]:
    """The keys whose contents are hashed at a level."""
    if level == "everything":
        yield from lengths
        return
    small = [key for key in lengths if key.endswith(".json") or key == WINDOWS]
    yield from small
    if level == "sample":
        large = sorted(set(lengths) - set(small))
        order = permutation(Purpose.VERIFY_SAMPLE, 0, 0, len(large))
        yield from (large[place] for place in order[: -(-len(large) // SAMPLE)])
