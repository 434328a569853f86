"""Stage two's input: windows in their order (had_pipe.order), read ahead, decoded on the device.

It does not know how a cache lies on disk (had_pipe.cache), nor what a batch is for
(had_pipe.distill).

P places, B windows of a batch, T k-mers, G stored groups, D teacher channels.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from had_pipe.cache import Block, Cache
from had_pipe.dna import kmers
from had_pipe.errors import CacheMismatch, RecipeError
from had_pipe.order import Corpus, Order, Rows

Space = Literal["raw", "normalised"]

_SLOTS = 4
"""Batches read ahead at most; more only holds memory."""
_DECODED_AT_ONCE = 1 << 18
"""Elements of an embedding decoded in one go on a CPU."""


@dataclass(frozen=True)
class Span:
    """Consecutive windows of a batch that come from one cache under one view."""

    cache: int
    """Which of the stream's caches."""
    epoch: int
    view: int
    row: Rows
    """Rows of the split, ascending, (P,)."""


@dataclass(frozen=True)
class Batch:
    """What one training step reads, on the device."""

    kmer_id: Tensor
    """int64 (B, T), in the orientation the teacher saw."""
    mask: Tensor
    """bool (B, T), True where the teacher did not see the group; the same orientation."""
    target: Tensor
    """float32 (B, G, D): the stored groups in their order in the window."""
    position: int
    spans: tuple[Span, ...]
    """Where its windows come from, in their order."""


class Stream:
    """An endless, resumable sequence of training batches.

    Batch number p of the whole run holds places p * batch to (p + 1) * batch of the order, whoever
    reads them: rank r of R takes the r-th of R equal shares, and within a share windows are
    arranged by cache, epoch and row, so that neighbours on disk are read together. A batch may
    cross into the next epoch: nothing is dropped, every window is seen equally often.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        *,
        batch: int,
        seed: int,
        split: str = "train",
        rank: int = 0,
        ranks: int = 1,
        start: int = 0,
        space: Space = "raw",
        device: torch.device | str = "cpu",
        prefetch: int = 256 << 20,
        threads: int | None = None,
    ) -> None:
        """`start` is the number of the first batch; `prefetch` bounds the bytes read ahead."""
        assert 0 <= rank < ranks
        if batch % ranks:
            raise RecipeError(
                f"[train] batch = {batch}: must be a multiple of the {ranks} processes, so that "
                "every one has equally many windows; change batch or the number of processes"
            )
        require_alike(caches, space=space)
        for cache in caches:
            require_split(cache, split)
        self._split = split
        self._batch, self._share, self._rank = batch, batch // ranks, rank
        self._views = [cache.views(split) for cache in caches]
        counts = [cache.rows(split) for cache in caches]
        self.order = Order(
            [Corpus(n, cache.plan.part) for n, cache in zip(counts, caches, strict=True)], seed=seed
        )
        self._first_of_cache = np.cumsum([0, *counts])
        self._feed = _Feed(
            caches,
            split=split,
            batches=self._plans(start),
            windows=self._share,
            space=space,
            device=torch.device(device),
            prefetch=prefetch,
            threads=threads,
        )

    def spans(self, position: int) -> tuple[Span, ...]:
        """Which windows this rank reads in batch `position`."""
        first = position * self._batch + self._rank * self._share
        epoch_P, number_P = self.order.at(first, self._share)
        cache_P = np.searchsorted(self._first_of_cache, number_P, side="right") - 1
        row_P = number_P - self._first_of_cache[cache_P]
        spans = []
        for cache in np.unique(cache_P):
            for epoch in np.unique(epoch_P[cache_P == cache]):
                row = np.sort(row_P[(cache_P == cache) & (epoch_P == epoch)])
                views = self._views[cache]
                spans.append(Span(int(cache), int(epoch), views[int(epoch) % len(views)], row))
        return tuple(spans)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._feed)

    def blocks(self) -> Iterator[tuple[Block, ...]]:
        """The batches as they are stored, not decoded; one is overwritten after the next call."""
        return self._feed.blocks()

    @property
    def wait_seconds(self) -> float:
        """How long the caller has been kept waiting in `next`."""
        return self._feed.wait_seconds

    def close(self) -> None:
        self._feed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def _plans(self, start: int) -> Iterator[tuple[int, tuple[Span, ...]]]:
        position = start
        while True:
            yield position, self.spans(position)
            position += 1


def first_windows(
    caches: Sequence[Cache],
    *,
    split: str,
    windows: int,
    batch: int,
    space: Space = "raw",
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> Iterator[Batch]:
    """The first windows of a split, once, under its first view: at most `windows` of all caches.

    Rows were shuffled when the cache was planned, so these are a random sample of the split. Each
    cache gives its share. The last batch may be smaller.
    """
    require_alike(caches, space=space)
    for cache in caches:
        require_split(cache, split)
    views = [cache.views(split)[0] for cache in caches]
    counts = [cache.rows(split) for cache in caches]
    total = sum(counts)
    windows = min(windows, total)
    # Rounding the running sum gives each cache its share and the sum exactly.
    ends = [sum(counts[: i + 1]) * windows // total for i in range(len(counts))]
    plans = []
    for i, (first, end) in enumerate(zip([0, *ends], ends, strict=False)):
        for row in range(0, end - first, batch):
            rows = np.arange(row, min(row + batch, end - first), dtype=np.int64)
            plans.append((Span(i, 0, views[i], rows),))
    feed = _Feed(
        caches,
        split=split,
        batches=enumerate(plans),
        windows=batch,
        space=space,
        device=torch.device(device),
        prefetch=64 << 20,
        threads=threads,
    )
    try:
        yield from feed
    finally:
        feed.close()


def require_alike(caches: Sequence[Cache], *, space: Space) -> None:
    """Refuse caches that cannot be streamed together: CacheMismatch names each differing key."""
    assert caches
    first = _meaning(caches[0], space)
    for i, cache in enumerate(caches[1:], start=1):
        if any(cache.id == other.id for other in caches[:i]):
            raise CacheMismatch(
                f"{cache.path}: the same cache is given twice (id {cache.id[:12]}); name it once"
            )
        other = _meaning(cache, space)
        differing = [key for key in first if first[key] != other[key]]
        if differing:
            lines = [f"  {key}   {first[key]} and {other[key]}" for key in differing]
            raise CacheMismatch(
                "\n".join(
                    [f"{caches[0].path} and {cache.path} cannot be trained on together:", *lines]
                )
                + "\nGive caches that agree in these."
            )


def _meaning(cache: Cache, space: Space) -> dict[str, object]:
    plan = cache.plan
    meaning: dict[str, object] = {
        "teacher.name": plan.teacher.name,
        "teacher.revision": plan.teacher.revision,
        "teacher.weights_sha256": plan.teacher.weights_sha256,
        "teacher.layer": plan.teacher.layer,
        "teacher.input": plan.teacher.input,
        "teacher.channels": plan.teacher.channels,
        "windows.kmers": plan.windows.kmers,
        "windows.masked": plan.windows.masked,
        "windows.store": plan.windows.store,
        "codec": plan.codec,
        "licence": plan.licence,
    }
    if space == "normalised":
        meaning["statistics"] = plan.statistics
    return meaning


def require_split(cache: Cache, split: str) -> None:
    """Refuse a cache without windows in a split: CacheMismatch names those it has."""
    splits = cache.plan.splits
    if split not in splits or splits[split].windows == 0:
        have = ", ".join(f"{name} ({splits[name].windows} windows)" for name in splits)
        raise CacheMismatch(
            f"{cache.path}: no window in split {split!r}; it has {have or 'none'}. "
            "Name one of these, or extract a cache with that split"
        )


def _empty(shape: tuple[int, ...], dtype: npt.DTypeLike, pinned: bool) -> npt.NDArray[Any]:
    """A NumPy array, in page-locked memory where a GPU copies from it."""
    if not pinned:
        return np.empty(shape, dtype=dtype)
    nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    # The array keeps the tensor's storage alive.
    memory: npt.NDArray[Any] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True).numpy()
    return memory.view(dtype).reshape(shape)


def _like(block: Block, windows: int, pinned: bool) -> Block:
    def bigger(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return _empty((windows, *array.shape[1:]), array.dtype, pinned)

    return Block(
        kmer_id=bigger(block.kmer_id),
        mask=bigger(block.mask),
        reversed=bigger(block.reversed),
        value=bigger(block.value),
        scale=None if block.scale is None else bigger(block.scale),
    )


def _part(block: Block, first: int, end: int) -> Block:
    return replace(
        block,
        kmer_id=block.kmer_id[first:end],
        mask=block.mask[first:end],
        reversed=block.reversed[first:end],
        value=block.value[first:end],
        scale=None if block.scale is None else block.scale[first:end],
    )


class _Slot:
    """Memory for one batch, used again and again: read into, decoded from, free."""

    def __init__(self, blocks: list[Block], windows: int, kmers_: int, pinned: bool) -> None:
        self.blocks = blocks
        """By cache; caches stored alike share one."""
        self.kmer_id = _empty((windows, kmers_), np.int64, pinned)
        self.mask = _empty((windows, kmers_), np.bool_, pinned)
        self.position = -1
        self.spans: tuple[Span, ...] = ()
        self.reads: list[Future[None]] = []
        self.target: Tensor | None = None
        """Decoded by the reading threads, where there is no GPU to do it; new for every batch."""
        self.copied: torch.cuda.Event | None = None
        """Set when a GPU has been told to copy from here: not before it has may we write."""


class _Feed:
    """Reads planned batches ahead with a few threads and hands them over in order.

    Threads, not processes: reading releases the interpreter lock, and memory is shared without a
    copy. Without a GPU the same threads decode. A slot is written again only after its batch was
    handed out (with a GPU: after the copies have finished), so a batch never changes.
    """

    def __init__(
        self,
        caches: Sequence[Cache],
        *,
        split: str,
        batches: Iterable[tuple[int, tuple[Span, ...]]],
        windows: int,
        space: Space,
        device: torch.device,
        prefetch: int,
        threads: int | None,
    ) -> None:
        self._caches = list(caches)
        self._split = split
        self._batches = iter(batches)
        self._space: Space = space
        self._device = device
        self._threads = threads or min(4, max(2, os.cpu_count() or 1))
        self.wait_seconds = 0.0
        pinned = device.type == "cuda"
        templates = [cache.allocate(1) for cache in caches]
        kinds = [(t.value.dtype, t.value.shape, t.scale is None) for t in templates]
        nbytes = windows * sum(
            template.value.nbytes
            for i, template in enumerate(templates)
            if kinds.index(kinds[i]) == i
        )
        plan = self._caches[0].plan
        self._decoded = (plan.windows.stored, plan.teacher.channels)
        if not pinned:
            nbytes += windows * int(np.prod(self._decoded)) * 4  # the decoded targets
        self._free: list[_Slot] = []
        for _ in range(max(2, min(_SLOTS, prefetch // max(1, nbytes)))):
            blocks: list[Block] = []
            for i, template in enumerate(templates):
                same = kinds.index(kinds[i])
                blocks.append(blocks[same] if same < i else _like(template, windows, pinned))
            self._free.append(_Slot(blocks, windows, templates[0].kmer_id.shape[1], pinned))
        # As few pieces a batch as keep every thread at work: each piece opens its parts anew.
        self._pieces = -(-self._threads // (len(self._free) - 1))
        self._reading: deque[_Slot] = deque()
        self._staged: deque[tuple[Batch, torch.cuda.Event]] = deque()
        self._side = torch.cuda.Stream(device) if pinned else None
        self._decoding = True
        self._statistics = [
            tuple(torch.tensor(array, device=device) for array in (cache.mean, cache.std))
            for cache in (caches if pinned else [])
        ]
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="had-pipe-read")

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        begun = perf_counter()
        try:
            return self._next_on_gpu() if self._side is not None else self._next_on_cpu()
        finally:
            self.wait_seconds += perf_counter() - begun

    def blocks(self) -> Iterator[tuple[Block, ...]]:
        """Batches as stored, each span's windows a block, valid until the next is asked for."""
        assert not self._reading
        self._decoding = False
        while (slot := self._take()) is not None:
            parts, first = [], 0
            for span in slot.spans:
                parts.append(_part(slot.blocks[span.cache], first, first + len(span.row)))
                first += len(span.row)
            yield tuple(parts)
            self._free.append(slot)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _next_on_cpu(self) -> Batch:
        slot = self._take()
        if slot is None:
            raise StopIteration
        batch = self._batch(slot)
        self._free.append(slot)
        self._read_ahead()
        return batch

    def _next_on_gpu(self) -> Batch:
        # Here, not once a slot is free: by now its copy has ended, and nobody waits for it.
        self._read_ahead()
        if not self._staged:
            self._stage()
        if not self._staged:
            raise StopIteration
        batch, ready = self._staged.popleft()
        # The next one's copy and decoding run beside this one's step, if it has been read.
        if self._reading and all(read.done() for read in self._reading[0].reads):
            self._stage()
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(ready)
        for tensor in (batch.kmer_id, batch.mask, batch.target):
            # Made on the side stream: its memory must outlive what this stream does with it.
            tensor.record_stream(stream)
        return batch

    def _stage(self) -> None:
        slot = self._take()
        if slot is None:
            return
        with torch.cuda.stream(self._side):
            batch = self._batch(slot)
            ready = torch.cuda.Event()
            ready.record()
        slot.copied = ready
        self._staged.append((batch, ready))
        self._free.append(slot)

    def _read_ahead(self) -> None:
        """Set the threads to every free slot, the one free for longest first."""
        while self._free:
            try:
                position, spans = next(self._batches)
            except StopIteration:
                return
            slot = self._free.pop(0)
            if slot.copied is not None:
                slot.copied.synchronize()
                slot.copied = None
            slot.position, slot.spans = position, spans
            slot.reads = []
            slot.target = None
            if self._decoding and self._side is None:
                windows = sum(len(span.row) for span in spans)
                slot.target = torch.empty(windows, *self._decoded)
            step = -(-sum(len(span.row) for span in spans) // self._pieces)
            first = 0
            for span in spans:
                for begin in range(0, len(span.row), step):
                    rows = span.row[begin : begin + step]
                    slot.reads.append(
                        self._pool.submit(self._read, slot, span, rows, first + begin)
                    )
                first += len(span.row)
            self._reading.append(slot)

    def _take(self) -> _Slot | None:
        """The next batch's slot, read; None after the last. A reader's error is raised here."""
        self._read_ahead()
        if not self._reading:
            return None
        slot = self._reading.popleft()
        for read in slot.reads:
            read.result()
        return slot

    def _read(self, slot: _Slot, span: Span, rows: Rows, first: int) -> None:
        """In a thread: some windows of a span to the places from `first` on."""
        end, cache = first + len(rows), self._caches[span.cache]
        block = _part(slot.blocks[span.cache], first, end)
        cache.read(self._split, span.view, rows, block)
        slot.mask[first:end] = block.mask
        slot.kmer_id[first:end] = np.where(
            block.reversed[:, None], kmers.reverse_complement(block.kmer_id), block.kmer_id
        )
        if slot.target is None:
            return
        target = slot.target[first:end].numpy()
        # A few windows at a time, so that what lies between the steps of decoding stays cached;
        # by NumPy, because torch would set threads of its own to each of these.
        some = max(1, _DECODED_AT_ONCE // int(np.prod(self._decoded)))
        for i in range(0, len(rows), some):
            part = slice(i, i + some)
            scale = None if block.scale is None else block.scale[part]
            target[part] = cache.codec.decode(
                block.value[part], scale, cache.mean, cache.std, space=self._space
            )

    def _batch(self, slot: _Slot) -> Batch:
        windows = sum(len(span.row) for span in slot.spans)
        return Batch(
            kmer_id=self._owned(slot.kmer_id[:windows]),
            mask=self._owned(slot.mask[:windows]),
            target=self._decode(slot) if slot.target is None else slot.target,
            position=slot.position,
            spans=slot.spans,
        )

    def _decode(self, slot: _Slot) -> Tensor:
        """On the GPU, cache by cache."""
        targets, first = [], 0
        for i in sorted({span.cache for span in slot.spans}):
            end = first + sum(len(span.row) for span in slot.spans if span.cache == i)
            block = _part(slot.blocks[i], first, end)
            value, scale = (
                None if a is None else torch.from_numpy(a).to(self._device, non_blocking=True)
                for a in (block.value, block.scale)
            )
            mean, std = self._statistics[i]
            codec = self._caches[i].codec
            targets.append(codec.decode(value, scale, mean, std, space=self._space))
            first = end
        return targets[0] if len(targets) == 1 else torch.cat(targets)

    def _owned(self, array: npt.NDArray[Any]) -> Tensor:
        """A tensor on the device that does not share the slot's memory."""
        tensor = torch.from_numpy(array)
        if self._side is None:
            return tensor.clone()
        return tensor.to(self._device, non_blocking=True)
