"""A cache made from another one, without the teacher: another codec, or the archival form.

The same plan but for the codec, which names its source; the same commit protocol, so that a kill at
any moment leaves parts missing, never torn, and the same command goes on to the same bytes.

W windows, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt

from had_pipe.cache import archive, integrity, writer
from had_pipe.cache.codec import (
    HELD_OUT_GROUPS,
    CodecName,
    Statistics,
    calibrate,
    fidelity,
    learns,
    sample_groups,
)
from had_pipe.cache.layout import (
    ARCHIVE,
    MANIFEST,
    PLAN,
    WORK,
    Part,
    Plan,
    SourcePlan,
    read_plan,
    read_small,
)
from had_pipe.cache.loci import WindowTable
from had_pipe.cache.reader import Cache
from had_pipe.durable import require_room, storage, write_file
from had_pipe.errors import CacheCorrupt, CacheMismatch, CacheRefused, RecipeError
from had_pipe.hold import held
from had_pipe.progress import Progress, Reporter, silent

TARGETS = (*get_args(CodecName), "archive")
"""What a cache can be recoded to."""

_MAKING = "making"
_SMALLEST_ARCHIVE = 0.6
"""An archive's least share of the cache: measured 0.66 for bfloat16, more for all else."""

_AT_ONCE = 1 << 18
"""Values decoded and encoded in one go."""


@dataclass(frozen=True, kw_only=True)
class Recoded:
    """What a call of `recode` found and made."""

    path: Path
    cache_id: str
    """Of the new cache; of an archive, the id of the cache in it."""
    codec: str
    """ "archive" for an archive."""
    source: Path
    source_id: str
    source_codec: str
    made: int
    """Parts made by this call; of an archive, packed or unpacked, objects."""
    total: int
    nbytes: int
    source_nbytes: int
    seconds: float
    fidelity: Mapping[str, Any] | None
    """Against what the source says, on held-out windows; None where nothing was coded anew."""

    @property
    def lossless(self) -> bool:
        """Whether the source says nothing that this does not, on the windows tested."""
        return self.fidelity is None or self.fidelity["relative"] == 0

    @property
    def coded_twice(self) -> bool:
        """Whether the source had lost something already, to which `fidelity` comes on top."""
        return self.fidelity is not None and self.source_codec != "exact"


def recode(
    source: Path,
    target: Path,
    *,
    codec: str | None = None,
    repair: bool = False,
    report: Reporter = silent,
) -> Recoded:
    """Make a cache of another codec, an archive of a cache, or the cache of an archive.

    `codec` is one of `TARGETS`; an archive as source is unpacked as it was, whatever its codec, so
    none is given. Nothing is done where the target is there already; with `repair` all of it is
    hashed, and what is not what was written is made again. Raises CacheRefused, CacheCorrupt,
    CacheIncomplete or CacheMismatch, and StorageError where the disk is full.
    """
    begun = time.monotonic()
    _check_apart(source, target)
    if (source / ARCHIVE).exists():
        return _unpack(source, target, codec, repair, begun, report)
    if codec not in TARGETS:
        asked = "no --codec" if codec is None else f"--codec {codec}"
        raise RecipeError(f"{asked}: expected one of {', '.join(TARGETS)}")
    if codec == "archive":
        return _pack(source, target, repair, begun, report)
    return _recode(Cache.open(source), target, cast(CodecName, codec), repair, begun, report)


# The archival form


def _pack(source: Path, target: Path, repair: bool, begun: float, report: Reporter) -> Recoded:
    opened = Cache.open(source)
    if (target / MANIFEST).exists() and not (target / ARCHIVE).exists():
        raise _other(target, "a finished cache", f"the archive of {source}")
    if (target / MANIFEST).exists() and not repair:
        index, _, manifest = archive.read(target)
        if index.cache != opened.id:
            raise _other(target, f"the archive of cache {index.cache[:12]}...", f"of {source}")
        moved = archive.Moved(
            made=0, total=len(manifest.objects) - 1, nbytes=archive.nbytes(index, manifest)
        )
        _tidy(target)
    else:
        with _target(target, f"archive of {opened.id}", lambda plan: plan == opened.plan):
            files = opened.plan.part_count * (len(opened.plan.signals) + 1)
            require_room(target, int(opened.nbytes * _SMALLEST_ARCHIVE) - _nbytes(target), files)
            moved = archive.pack(source, target, report=report)
            integrity.clear_work(target)
    return Recoded(
        path=target,
        cache_id=opened.id,
        codec="archive",
        source=source,
        source_id=opened.id,
        source_codec=opened.plan.codec,
        made=moved.made,
        total=moved.total,
        nbytes=moved.nbytes,
        source_nbytes=opened.nbytes,
        seconds=time.monotonic() - begun,
        fidelity=None,
    )


def _unpack(
    source: Path,
    target: Path,
    codec: str | None,
    repair: bool,
    begun: float,
    report: Reporter,
) -> Recoded:
    index, plan, manifest = archive.read(source)
    if codec not in (None, plan.codec):
        raise RecipeError(
            f"--codec {codec}: {source} is an archive of {plan.codec!r}, unpacked as it is; "
            "unpack it without --codec, then recode that"
        )
    whole = sum(record.nbytes for record in manifest.objects.values())
    packed = archive.nbytes(index, manifest)
    if (target / MANIFEST).exists() and not repair:
        if Cache.open(target).id != index.cache:
            raise _other(target, "another cache", f"that of {source}")
        moved = archive.Moved(made=0, total=len(manifest.objects) - 1, nbytes=whole)
        _tidy(target)
    else:
        with _target(target, f"cache {index.cache}", lambda there: there == plan):
            require_room(target, whole - _nbytes(target), len(manifest.objects))
            moved = archive.unpack(source, target, report=report)
            integrity.clear_work(target)
    return Recoded(
        path=target,
        cache_id=index.cache,
        codec=plan.codec,
        source=source,
        source_id=index.cache,
        source_codec=plan.codec,
        made=moved.made,
        total=moved.total,
        nbytes=moved.nbytes,
        source_nbytes=packed,
        seconds=time.monotonic() - begun,
        fidelity=None,
    )


# Another codec


def _recode(
    source: Cache, target: Path, name: CodecName, repair: bool, begun: float, report: Reporter
) -> Recoded:
    from threadpoolctl import threadpool_limits

    if name == source.plan.codec:
        raise RecipeError(f"--codec {name}: {source.path} is {name} already; copy the folder")
    wanted = SourcePlan(cache=source.id, codec=source.plan.codec)
    made = 0

    def ours(plan: Plan) -> bool:
        return (plan.source, plan.codec) == (wanted, name)

    if (target / MANIFEST).exists() and not repair:
        plan = Cache.open(target).plan
        if not ours(plan):
            raise _other(target, "another cache", f"{source.path} as {name}")
        _tidy(target)
    else:
        # Decoding a learnt codec ends in a float32 product, whose last bits follow the threads.
        with _target(target, f"{name} of {source.id}", ours), threadpool_limits(limits=1):
            for leftover in (target / WORK).glob("*.tmp"):
                with storage(leftover):
                    leftover.unlink()
            if (target / PLAN).exists():
                plan, _ = read_plan(target)
                if repair:
                    _forget_damaged(target, plan, report)
            else:
                plan = _make_plan(source, target, name, wanted)
            parts = integrity.missing_parts(target, plan)
            files = len(parts) * (len(plan.signals) + 1)
            require_room(target, plan.shards_nbytes(parts), files)
            _make_parts(source, target, plan, parts, report)
            made = len(parts)
            integrity.seal(target, report=report)
    opened = Cache.open(target)
    return Recoded(
        path=target,
        cache_id=opened.id,
        codec=name,
        source=source.path,
        source_id=source.id,
        source_codec=source.plan.codec,
        made=made,
        total=plan.part_count,
        nbytes=opened.nbytes,
        source_nbytes=source.nbytes,
        seconds=time.monotonic() - begun,
        fidelity=opened.fidelity,
    )


def _forget_damaged(target: Path, plan: Plan, report: Reporter) -> None:
    """Take back the receipts of parts that are not what was written."""
    found = integrity.verify(target, report=report).problems
    problems = [problem for problem in found if problem.key.split("/")[0] != WORK]
    parts, beyond = integrity.damaged_parts(plan, problems)
    if beyond:
        raise CacheCorrupt(
            f"{target}: what was written first is damaged too: {beyond[0]}; recode to another "
            "target"
        )
    integrity.forget(target, parts)


def _make_plan(source: Cache, target: Path, name: CodecName, wanted: SourcePlan) -> Plan:
    """The source's plan but for the codec."""
    plan = source.plan
    statistics = Statistics(source.mean, source.std)
    sample = _sample(source, name)
    if not learns(name):
        # The windows before these are those that the source's mean and std were taken from.
        held_out = -(-HELD_OUT_GROUPS // plan.windows.stored)
        sample = sample[-max(1, min(len(sample) // 4, held_out)) :]
    found = calibrate(name, plan.teacher.dtype, sample, given=statistics)
    lost = found.fidelity
    if name == "exact":  # of a teacher that computes: here values may have to be rounded
        stored = found.codec.encode(sample, source.mean, source.std)
        lost = fidelity(sample, found.codec.decode(*stored, source.mean, source.std))
    described = plan.model_dump(mode="json")
    for follows in ("splits", "statistics", "contents"):
        del described[follows]
    return writer.create(
        target,
        described={**described, "codec": name, "source": wanted.model_dump(mode="json")},
        splits=_splits(source),
        statistics=statistics,
        fidelity=lost,
        codebook=found.codec.codebook,
    )


def _splits(source: Cache) -> dict[str, writer.SplitData]:
    """All that was planned of each split, held against the digests in the plan."""
    plan = source.plan
    tables = _tables(source)
    found = {}
    for split, of_split in plan.splits.items():
        seen: dict[int, list[Any]] = {view: [] for view in of_split.views}
        for part in plan.parts():
            if part.split == split:
                seen[part.view].append(source.seen(part))
        columns = {
            view: [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
            for view, parts in seen.items()
        }
        for view, (kmer_id, mask, reverse) in columns.items():
            _check_contents(source, f"{split}/kmer_id", writer.digest(kmer_id))
            _check_contents(source, f"{split}/{view}/mask", writer.digest(mask))
            _check_contents(source, f"{split}/{view}/reversed", writer.digest(reverse))
        found[split] = writer.SplitData(
            table=tables[split],
            kmer_id=columns[of_split.views[0]][0],
            mask={view: arrays[1] for view, arrays in columns.items()},
            reversed={view: arrays[2] for view, arrays in columns.items()},
        )
    return found


def _tables(source: Cache) -> dict[str, writer.WindowTable]:
    """Where the windows of each split lie."""
    genomes = {genome.name: number for number, genome in enumerate(source.plan.genomes)}
    contigs: dict[str, int] = {}
    columns: dict[str, list[npt.NDArray[np.int64]]] = {split: [] for split in source.plan.splits}
    digest = hashlib.sha256()
    with WindowTable(source.path, source.plan) as table:
        for lines in table.lines():
            digest.update(lines)
            rows = [line.split("\t") for line in lines.decode().split("\n")[:-1]]
            numbers = np.array(
                [
                    (genomes[row[2]], contigs.setdefault(row[3], len(contigs)), *map(int, row[4:]))
                    for row in rows
                ],
                dtype=np.int64,
            )
            of_split = np.array([row[0] for row in rows])
            for split, found in columns.items():
                found.append(numbers[of_split == split])
    _check_contents(source, "windows", digest.hexdigest())
    tables = {}
    for split, found in columns.items():
        genome, contig, start, soft, index = np.concatenate(found).T
        tables[split] = writer.WindowTable(
            genome=genome.astype(np.int32),
            contig=contig.astype(np.int32),
            contigs=list(contigs),
            start=start,
            soft_masked_bases=soft.astype(np.int32),
            index=index,
        )
    return tables


def _make_parts(
    source: Cache, target: Path, plan: Plan, parts: list[Part], report: Reporter
) -> None:
    """Decode and encode parts, some at once, and commit each."""
    found = integrity.numerics_class(source.path, source.plan)
    assert found is not None
    numerics = {**found, "recoded": f"numpy {np.__version__}"}
    others = integrity.numerics_class(target, plan)
    if others is not None and others != numerics:
        raise CacheMismatch(
            f"{target}: its parts were recoded with {others.get('recoded')}, this is "
            f"{numerics['recoded']}; one cache holds one class of arithmetic only: go on with "
            "that, or start again at another path"
        )
    begun, done = time.monotonic(), plan.part_count - len(parts)
    stopped = threading.Event()
    codec = Cache.open(target, incomplete=True).codec

    def make(part: Part) -> None:
        first, windows = part.number * plan.part, plan.part_windows(part)
        some = max(1, _AT_ONCE // (plan.windows.stored * plan.teacher.channels))
        with writer.PartWriter(target, plan, part, numerics=numerics) as out:
            for start in range(0, windows, some):
                if stopped.is_set():
                    return
                rows = np.arange(first + start, first + min(start + some, windows))
                x = _decoded(source, part.split, part.view, rows)
                stored = codec.encode(x, source.mean, source.std)
                out.append(*(array for array in stored if array is not None))
            out.sync()
            out.commit()

    threads = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(threads, thread_name_prefix="had-pipe recoding") as pool:
        try:
            making = [pool.submit(make, part) for part in parts]
            for number, finished in enumerate(as_completed(making), start=1):
                finished.result()
                report(
                    Progress(
                        what="recoding",
                        done=done + number,
                        begun=done,
                        total=plan.part_count,
                        unit="parts",
                        seconds=time.monotonic() - begun,
                    )
                )
        except BaseException:
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _sample(source: Cache, name: CodecName) -> npt.NDArray[np.float32]:
    """Embeddings (W, G, D) of the rows that extraction calibrates with: rows are in random order,
    so the first ones are a random sample."""
    plan = source.plan
    splits = plan.splits
    split = "train" if "train" in splits else max(splits, key=lambda s: splits[s].windows)
    windows = -(-sample_groups(name, given=False) // plan.windows.stored)
    windows = min(splits[split].windows, windows)
    return _decoded(source, split, splits[split].views[0], np.arange(windows))


def _decoded(
    source: Cache, split: str, view: int, rows: npt.NDArray[np.int64]
) -> npt.NDArray[np.float32]:
    """What the source says of some windows, (W, G, D), each held against its CRC."""
    block = source.allocate(len(rows))
    source.read(split, view, rows, block)
    decoded: npt.NDArray[np.float32] = source.codec.decode(
        block.value, block.scale, source.mean, source.std
    )
    return decoded


def _check_contents(source: Cache, name: str, found: str) -> None:
    if found != source.plan.contents.get(name):
        raise CacheCorrupt(
            f"{source.path}: {name} is not what its plan says; `had-pipe cache verify "
            f"{source.path}` finds all damage"
        )


# The target


def _check_apart(source: Path, target: Path) -> None:
    here, there = source.resolve(), target.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise RecipeError(f"{target}: inside {source}, or around it; use a target of its own")


@contextmanager
def _target(target: Path, making: str, ours: Callable[[Plan], bool]) -> Iterator[None]:
    """Hold a folder that is free, or that a stopped call for the same has begun.

    One that is finished, and by its plan `ours`, is to be mended: its manifest goes, to be written
    again at the end.
    """
    note = target / WORK / _MAKING
    finished = (target / MANIFEST).exists()
    if finished and not ours(read_plan(target, archived=True)[0]):
        raise _other(target, "another cache", making)
    if not finished:
        _check_free(target, making)
    with held(target, lock=f"{WORK}/lock", doing="recoding into this folder"):
        if not finished:
            _check_free(target, making)
        if not note.exists():
            write_file(note, f"{making}\n".encode(), aside=note.parent)
        if finished:
            integrity.forget(target, ())
        yield


def _check_free(target: Path, making: str) -> None:
    """Whatever else is in the folder stays as it is."""
    above = next(folder for folder in (target, *target.parents) if folder.exists())
    if not above.is_dir():
        raise CacheRefused(f"{above}: not a folder; use another target")
    if above != target:
        return
    note = target / WORK / _MAKING
    if note.exists():
        found = read_small(note).decode("utf-8", "replace").strip()
        if found != making:
            raise _other(target, f"begun: {found}", making)
        return
    if {entry.name for entry in target.iterdir()} - {WORK}:
        raise CacheRefused(
            f"{target}: not empty, and not begun by this command; use another target"
        )
    if {path.name.partition(".")[0] for path in target.glob(f"{WORK}/*")} - {"lock", _MAKING}:
        raise CacheRefused(f"{target}: somebody else's work has begun here; use another target")


def _other(target: Path, found: str, wanted: str) -> CacheMismatch:
    return CacheMismatch(f"{target}: holds {found}, not {wanted}; use another target")


def _tidy(target: Path) -> None:
    """Remove what a call left that was killed between the manifest and the end."""
    if (target / WORK).exists():
        with held(target, lock=f"{WORK}/lock", doing="recoding into this folder"):
            integrity.clear_work(target)


def _nbytes(folder: Path) -> int:
    """Bytes of the files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
