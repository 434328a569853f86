"""A teacher at work on one planned cache: part after part embedded, and written behind it.

A part needs the cache and the teacher, nothing else: what to embed was planned. Which parts to
make, and who else is at it, is the caller's to know; a lease passed in is given back with the
commit.

W windows of a batch, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from had_pipe.cache import Cache, Part, Plan, integrity, layout, writer
from had_pipe.cache.layout import Receipt
from had_pipe.dna.kmers import reverse_complement
from had_pipe.durable import storage, sync_folder, write_file
from had_pipe.errors import CacheMismatch, NonFiniteError
from had_pipe.hold import Lease
from had_pipe.teachers.teacher import Teacher

# A batch is large enough to keep the device busy and small enough for its memory.
_WINDOWS_ON_CPU = 16
_KMERS_ON_CUDA = 1 << 15

_WAITING_BATCHES = 4  # of a part, embedded and not yet written
_LOOK_SECONDS = 0.2

_NUMERICS = "numerics.json"
_THREADS = " (OMP_NUM_THREADS sets the threads; Dask's own workers want MKL_NUM_THREADS as well)"


def batch_windows(teacher: Teacher, *, kmers: int, part: int) -> int:
    """Windows the teacher sees at once: one number for the whole cache."""
    on_cuda = str(teacher.numerics.get("device", "")).startswith("cuda")
    limit = _KMERS_ON_CUDA // kmers if on_cuda else _WINDOWS_ON_CPU
    return max(1, min(limit, part))


def lease_of(cache: Path, part: Part) -> Lease:
    """Whoever makes a part should hold this. Receipts decide; a lease only saves double work."""
    return Lease(cache / layout.WORK / "leases" / f"{part.stem}.lock")


def lock_of(cache: Path, what: str) -> Lease:
    """The lease on what is done once for the whole cache: "plan" or "seal"."""
    return Lease(cache / layout.WORK / f"{what}.lock")


@dataclass(frozen=True)
class _Batch:
    """Some windows of a part as they are stored: one array (B, ...) per signal."""

    stored: list[npt.NDArray[Any]]
    last: bool
    """Whether the part is whole with it."""


_Batches = queue.Queue[_Batch | None]
"""Batches of one part on their way to the disk; None: the rest will not come."""


class PartMaker:
    """Embeds parts of one cache and commits them, the writing hidden behind the next forward pass.

    A context: leaving it commits what was embedded whole, and discards the rest. Threads may share
    it: one embeds at a time, the others' parts are written meanwhile.
    """

    def __init__(self, cache: Path, teacher: Teacher, *, threads: int = 2) -> None:
        """Raises CacheMismatch where teacher or class of arithmetic are not the cache's."""
        self._cache = Cache.open(cache, incomplete=True)
        with storage(cache):
            sync_folder(cache)  # whoever just renamed the plan may not have come to it
        self.plan = self._cache.plan
        check_teacher_of(cache, self.plan, teacher)
        self._teacher = teacher
        self._batch = batch_windows(teacher, kmers=self.plan.windows.kmers, part=self.plan.part)
        self.numerics = {**teacher.numerics, "batch": self._batch}
        """The class of arithmetic that the receipts state."""
        _settle_numerics(cache, self.plan, self.numerics)
        self._embedding = threading.Lock()
        self._statistics: tuple[Any, Any] | None = None
        # Hashing is what takes the time, and a part is hashed in one go: two parts, two cores.
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="had-pipe writer")

    def __enter__(self) -> PartMaker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True)

    def make(
        self, part: Part, lease: Lease | None = None, tick: Callable[[int], None] = lambda _: None
    ) -> Future[Receipt | None]:
        """Embed a part now; its receipt once it is committed, None where the lease was lost.

        `tick` is told the windows of every batch. Raises NonFiniteError, and whatever stopped an
        earlier batch of this part from being written.
        """
        batches: _Batches = queue.Queue(_WAITING_BATCHES)
        with self._embedding:
            written: Future[Receipt | None] | None = None
            try:
                written = self._pool.submit(self._write, part, lease, batches)
                for batch in self._stored(part):
                    if not _put(batches, batch, written):
                        break  # what ended its writer comes with the result
                    tick(len(batch.stored[0]))
            except BaseException:
                if written is None:  # a signal came while the writer's thread was being started
                    batches.put_nowait(None)
                    if lease is not None:
                        lease.release()
                else:
                    _put(batches, None, written)
                raise
        return written

    def _stored(self, part: Part) -> Iterator[_Batch]:
        cache, plan = self._cache, self.plan
        kmer_id, mask, reverse = cache.seen(part)
        for start in range(0, len(kmer_id), self._batch):
            some = slice(start, start + self._batch)
            embedding = embed_batch(
                self._teacher,
                kmer_id[some],
                mask[some],
                reverse[some],
                store=plan.windows.store,
                shown=plan.teacher.input,
                batch=self._batch,
            )
            if self._statistics is None:
                self._statistics = _like(cache.mean, embedding), _like(cache.std, embedding)
            bad = not_finite(embedding)
            if bad is not None:
                _refuse_window(cache, part, part.number * plan.part + start + bad)
            stored = cache.codec.encode(embedding, *self._statistics)
            yield _Batch(
                [to_numpy(array) for array in stored if array is not None],
                last=start + self._batch >= len(kmer_id),
            )

    def _write(self, part: Part, lease: Lease | None, batches: _Batches) -> Receipt | None:
        cache = self._cache.path
        try:
            if lease is not None:
                writer.clear_temporaries(cache, part)
            with writer.PartWriter(cache, self.plan, part, numerics=self.numerics) as out:
                whole = False
                while not whole:
                    batch = batches.get()
                    if batch is None:
                        return None
                    out.append(*batch.stored)
                    whole = batch.last
                out.sync()
                # Whoever slept so long that others took over must not touch what they committed.
                if lease is not None and lease.lost:
                    return None
                return out.commit()
        except FileNotFoundError:
            if lease is not None and lease.lost:  # whoever took it over swept our temporaries away
                return None
            raise
        finally:
            if lease is not None:
                lease.release()


def _put(batches: _Batches, item: _Batch | None, written: Future[Receipt | None]) -> bool:
    """Hand on a batch, unless its writer has ended."""
    while not written.done():
        try:
            batches.put(item, timeout=_LOOK_SECONDS)
        except queue.Full:
            continue
        return True
    return False


def embed_batch(
    teacher: Teacher,
    kmer_id_WT: npt.NDArray[np.uint16],
    mask_WT: npt.NDArray[np.bool_],
    reversed_W: npt.NDArray[np.bool_],
    *,
    store: str,
    shown: str,
    batch: int,
) -> Any:
    """Embeddings of the stored groups (W, G, D), on the teacher's device.

    `store` and `shown` are the plan's `windows.store` and `teacher.input`. A short batch is filled
    up with its last window, so that the teacher sees one shape only: on a GPU another shape may
    mean another kernel and other bits.
    """
    kept = stored_groups(store, mask_WT)
    seen = np.where(reversed_W[:, None], reverse_complement(kmer_id_WT), kmer_id_WT)
    hidden = mask_WT if shown == "masked" else np.zeros_like(mask_WT)
    windows = len(seen)
    fill = np.minimum(np.arange(batch), windows - 1)
    embedding = teacher.embed(seen[fill], hidden[fill])
    rows = np.arange(windows)[:, None]
    if isinstance(embedding, np.ndarray):
        return embedding[rows, kept]
    import torch

    device = embedding.device
    return embedding[torch.from_numpy(rows).to(device), torch.from_numpy(kept).to(device)]


def stored_groups(store: str, mask_WT: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Which groups of each window are stored, (W, G)."""
    kept = {"visible": ~mask_WT, "masked": mask_WT, "all": np.ones_like(mask_WT)}[store]
    return np.nonzero(kept)[1].reshape(len(mask_WT), -1)


def not_finite(embedding: Any) -> int | None:
    """The first window with NaN or infinity, or None."""
    if isinstance(embedding, np.ndarray):
        good = np.isfinite(embedding).all(axis=(1, 2))
    else:
        good = embedding.isfinite().flatten(1).all(1).cpu().numpy()
    return None if good.all() else int(np.argmin(good))


def _refuse_window(cache: Cache, part: Part, row: int) -> None:
    locus = cache.locus(part.split, row)
    end = locus.start + cache.plan.windows.bases
    raise NonFiniteError(
        f"the teacher gives NaN or infinity for {locus.genome} {locus.contig}:{locus.start}-{end} "
        f"(0-based, half-open), window {row} of {part.split}, view {part.view}. Parts before it "
        "are kept; look at the teacher's weights, layer and arithmetic"
    )


def _like(array: npt.NDArray[np.float32], embedding: Any) -> Any:
    """float32 values in the array library and on the device of `embedding`."""
    if isinstance(embedding, np.ndarray):
        return array
    import torch

    return torch.from_numpy(array.copy()).to(embedding.device)


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """An array or tensor on the host; bfloat16, which NumPy lacks, as float32."""
    if isinstance(array, np.ndarray):
        return array
    if str(array.dtype) == "torch.bfloat16":
        array = array.float()
    host: npt.NDArray[Any] = array.cpu().numpy()
    return host


# One teacher, one class of arithmetic


def differences(there: Mapping[str, object], here: Mapping[str, object]) -> str:
    """What differs between a cache and this process, both values of each; empty where nothing."""
    return "; ".join(
        f"{key}: there {there.get(key)!r}, here {here.get(key)!r}"
        for key in dict.fromkeys([*here, *there])
        if there.get(key) != here.get(key)
    )


def check_teacher_of(cache: Path, plan: Plan, teacher: Teacher) -> None:
    """Raises CacheMismatch where a teacher is not the one the cache was planned for."""
    mine = {
        "weights_sha256": teacher.weights_sha256,
        "settings_sha256": teacher.settings_sha256,
        "layer": teacher.layer,
        "channels": teacher.channels,
        "dtype": teacher.dtype,
    }
    if said := differences({key: getattr(plan.teacher, key) for key in mine}, mine):
        raise CacheMismatch(
            f"{cache}: it was planned for another teacher ({said}); take that one, or another "
            "[cache] path"
        )


def _settle_numerics(cache: Path, plan: Plan, numerics: Mapping[str, str | int]) -> None:
    """Be of the cache's class of arithmetic, or the first to set it."""
    found = integrity.numerics_class(cache, plan)
    while found is None:
        # Whoever had to wait may find parts, or all of them, and `.work/` swept away.
        with waiting(lock_of(cache, "plan")), suppress(FileNotFoundError):
            found = integrity.numerics_class(cache, plan) or _noted_numerics(cache, numerics)
    if said := differences(found, numerics):
        raise CacheMismatch(
            f"{cache}: its parts are made by another class of arithmetic ({said}); one cache holds "
            "one class only: continue where it was begun, or start again at another path"
            + (_THREADS if "threads" in said else "")
        )


def _noted_numerics(cache: Path, numerics: Mapping[str, str | int]) -> Mapping[str, str | int]:
    """The class that those at work have noted, or else this one, noted."""
    note = cache / layout.WORK / _NUMERICS
    if note.is_file() and _at_work(cache):  # it may have gone before it made anything
        noted: Mapping[str, str | int] = json.loads(layout.read_small(note))
        return noted
    write_file(note, layout.canonical_json(dict(numerics)), aside=note.parent)
    return numerics


def _at_work(cache: Path) -> bool:
    """Whether somebody holds a part."""
    for path in (cache / layout.WORK / "leases").glob("*.lock"):
        lease = Lease(path)
        if not lease.take():
            return True
        lease.release()
    return False


@contextmanager
def waiting(lease: Lease, look: Callable[[Lease], None] = lambda _: None) -> Iterator[None]:
    """Hold a lease until the block ends; `look` is called, again and again, until it is free."""
    pause = threading.Event()
    while not lease.take():
        look(lease)
        pause.wait(_LOOK_SECONDS)
    try:
        yield
    finally:
        lease.release()
