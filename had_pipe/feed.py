"""Planned batches, read ahead by a few threads and handed over in order, decoded where wanted.

It neither knows in which order windows come (had_pipe.stream says which make a batch), nor how a
cache lies on disk (had_pipe.cache).

Threads, not processes: reading releases the interpreter lock, and memory is shared without a copy.
What is read for a GPU, or as it is stored, goes into slots, memory used again and again; what a
CPU decodes is read a few windows at a time and decoded at once into memory of its own.

P places, B windows of a batch, T k-mers, G stored groups, D teacher channels.
"""

from __future__ import annotations

import ctypes
import itertools
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from time import monotonic, perf_counter
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from had_pipe.cache import Block, Cache, Codec
from had_pipe.dna import kmers

Rows = npt.NDArray[np.int64]
Space = Literal["raw", "normalised"]

_READ_AT_ONCE = 1 << 20
"""Bytes that a thread reads before it decodes them: they stay in a core's cache."""
_IDLE = 2
"""Targets given back that are kept to be filled again: new memory costs as much as decoding."""
_ADVISED = 64
"""Batches told to the caches beyond those being read, at most."""
_LEAVE = 2.0
"""Seconds to wait for the threads at the end; one that waits for a network ends when that does."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """Consecutive windows of a batch that come from one cache under one view."""

    cache: int
    """Which of the stream's caches."""
    epoch: int
    view: int
    row: Rows
    """Rows of the split, ascending, (P,)."""


Plan = tuple[int, tuple[Span, ...]]
"""A batch's number, and its windows in their order."""


@dataclass(frozen=True)
class Arrays:
    """What one training step reads, in memory."""

    kmer_id: npt.NDArray[np.int64]
    """(B, T), in the orientation the teacher saw."""
    mask: npt.NDArray[np.bool_]
    """(B, T), True where the teacher did not see the group; the same orientation."""
    target: npt.NDArray[np.float32]
    """(B, G, D): the stored groups in their order in the window."""
    position: int
    spans: tuple[Span, ...]
    """Where its windows come from, in their order."""


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


class Feed:
    """Hands over planned batches, in one of three ways: tensors, arrays, or blocks as stored."""

    def __init__(
        self,
        caches: Sequence[Cache],
        *,
        split: str,
        plans: Iterator[Plan],
        windows: int,
        space: Space,
        device: torch.device,
        prefetch: int,
        threads: int | None,
    ) -> None:
        """`plans` must not lead back here, or the threads, which hold it, would keep us alive."""
        self._caches = list(caches)
        self._split, self._space, self._device = split, space, device
        self._plans, self._windows, self._prefetch = plans, windows, prefetch
        self._threads = threads or min(4, max(2, len(os.sched_getaffinity(0))))
        self._window_nbytes = _stored_nbytes(self._caches[0].allocate(1))
        self._readers: _Readers | None = None
        self._process = os.getpid()
        self._closed = False
        self._lent: _Slot | None = None
        self._gpu = _Gpu(self._caches, device, space) if device.type == "cuda" else None
        self._staged: deque[_Staged] = deque()
        self.batches = 0
        """Handed over so far, as are the others."""
        self.windows = 0
        self.nbytes = 0
        self.wait_seconds = 0.0

    def batch(self) -> Batch | None:
        """The next batch on the device; None after the last."""
        if self._gpu is None:
            arrays = self.arrays()
            return None if arrays is None else _tensors(arrays)
        with self._waiting():
            batch = self._on_gpu(self._gpu)
        if batch is not None:
            self._count(batch.spans)
        return batch

    def arrays(self) -> Arrays | None:
        """The next batch in memory; None after the last."""
        assert self._gpu is None, "arrays are made on the CPU: give device='cpu'"
        with self._waiting():
            arrays = self._on_cpu()
        if arrays is not None:
            self._count(arrays.spans)
        return arrays

    def blocks(self) -> tuple[Block, ...] | None:
        """The next batch as stored, a block for each span; overwritten after the next call."""
        readers = self._started(_Storing)
        if self._lent is not None:
            self._lent, lent = None, self._lent
            readers.give_back(lent)
        with self._waiting():
            read = readers.take()
        if read is None:
            return None
        self._lent = read.memory
        assert self._lent is not None
        self._count(read.spans)
        blocks, first = [], 0
        for span in read.spans:
            blocks.append(self._lent.block.part(first, first + len(span.row)))
            first += len(span.row)
        return tuple(blocks)

    def stop(self) -> None:
        """Tell the threads to end; returns at once."""
        self._closed = True
        if self._readers is not None:
            self._readers.stop()

    def close(self) -> None:
        """Tell the threads to end, and wait for what is being read."""
        self.stop()
        if self._readers is not None:
            self._readers.join()

    def _on_cpu(self) -> Arrays | None:
        readers = self._started(_Decoding)
        read = readers.take()
        if read is None:
            return None
        readers.give_back(None)
        arrays = read.memory
        assert isinstance(arrays, Arrays)
        return arrays

    def _on_gpu(self, gpu: _Gpu) -> Batch | None:
        readers = self._started(_Storing)
        if not self._staged and not self._stage(gpu, readers):
            return None
        staged = self._staged.popleft()
        # The next one's copy and decoding run beside this one's step, if it has been read.
        if readers.ready():
            self._stage(gpu, readers)
        return gpu.hand_over(staged)

    def _stage(self, gpu: _Gpu, readers: _Readers) -> bool:
        read = readers.take()
        if read is None:
            return False
        slot = read.memory
        assert isinstance(slot, _Slot)
        self._staged.append(gpu.stage(slot, read.position, read.spans))
        readers.give_back(slot)
        return True

    def _started(self, kind: type[_Decoding] | type[_Storing]) -> _Readers:
        """The threads, begun when the first batch is asked for."""
        assert not self._closed, "this stream was closed"
        # Each of several would hand over every batch, and none moves the position that is saved.
        assert self._process == os.getpid(), (
            "a stream is read in the process that made it: give a DataLoader num_workers=0"
        )
        if self._readers is None:
            work: _Work
            if kind is _Storing:
                work = _Storing(
                    self._caches, self._split, self._windows, pinned=self._gpu is not None
                )
            else:
                work = _Decoding(self._caches, self._split, self._space)
            fitting = self._prefetch // max(1, work.window_nbytes * self._windows)
            self._readers = _Readers(
                self._plans,
                work,
                slots=max(2, fitting),
                advised=max(1, min(_ADVISED, fitting)),
                threads=self._threads,
            )
            # A stream that nobody holds any more ends its threads.
            weakref.finalize(self, _stop, weakref.ref(self._readers))
            self._readers.start()
        assert isinstance(self._readers.work, kind), (
            "a stream is read in one way: blocks or decoded"
        )
        return self._readers

    def _count(self, spans: Sequence[Span]) -> None:
        windows = sum(len(span.row) for span in spans)
        self.batches += 1
        self.windows += windows
        self.nbytes += windows * self._window_nbytes

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        begun = perf_counter()
        try:
            yield
        finally:
            self.wait_seconds += perf_counter() - begun


def _tensors(arrays: Arrays) -> Batch:
    return Batch(
        kmer_id=torch.from_numpy(arrays.kmer_id),
        mask=torch.from_numpy(arrays.mask),
        target=torch.from_numpy(arrays.target),
        position=arrays.position,
        spans=arrays.spans,
    )


class _Slot:
    """Memory for a batch as stored, used again and again."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.copied: torch.cuda.Event | None = None
        """Set when a GPU was told to copy from here: not before it has may anyone write."""


class _Work(Protocol):
    """What threads do for a batch. Held by them, so it must not hold the feed."""

    window_nbytes: int
    """Memory of a window of a batch read ahead."""

    def begin(self, plan: Plan, slot: _Slot | None) -> _Slot | Arrays:
        """The memory for a batch; `slot` was given back by an earlier one, None at first."""

    def read(self, memory: Any, span: Span, rows: Rows, first: int) -> None:
        """Some windows of a span to the places from `first` on."""

    def advise(self, span: Span) -> None:
        """These windows will be read soon."""


class _Storing:
    """Reads windows as they are stored into slots, in page-locked memory for a GPU."""

    def __init__(self, caches: Sequence[Cache], split: str, windows: int, *, pinned: bool) -> None:
        self._caches, self._split = caches, split
        self._windows, self._pinned = windows, pinned
        one = caches[0].allocate(1)
        self.window_nbytes = _stored_nbytes(one) + _seen_nbytes(one)

    def begin(self, plan: Plan, slot: _Slot | None) -> _Slot:
        if slot is None:
            return _Slot(self._allocate())
        if slot.copied is not None:
            slot.copied.synchronize()
            slot.copied = None
        return slot

    def read(self, memory: _Slot, span: Span, rows: Rows, first: int) -> None:
        block = memory.block.part(first, first + len(rows))
        self._caches[span.cache].read(self._split, span.view, rows, block)

    def advise(self, span: Span) -> None:
        self._caches[span.cache].advise(self._split, span.view, span.row)

    def _allocate(self) -> Block:
        if not self._pinned:
            return self._caches[0].allocate(self._windows)
        one = self._caches[0].allocate(1)

        def pinned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
            # The array keeps the tensor's storage alive.
            memory = torch.empty(self._windows * array.nbytes, dtype=torch.uint8, pin_memory=True)
            return memory.numpy().view(array.dtype).reshape(self._windows, *array.shape[1:])

        return Block(
            kmer_id=pinned(one.kmer_id),
            mask=pinned(one.mask),
            reversed=pinned(one.reversed),
            value=pinned(one.value),
            scale=None if one.scale is None else pinned(one.scale),
        )


class _Decoding:
    """Reads a few windows at a time and decodes them while they are in a core's cache."""

    def __init__(self, caches: Sequence[Cache], split: str, space: Space) -> None:
        self._caches, self._split, self._space = caches, split, space
        plan = caches[0].plan
        self._kmers = plan.windows.kmers
        self._shape = (plan.windows.stored, plan.teacher.channels)
        one = caches[0].allocate(1)
        self._some = max(1, _READ_AT_ONCE // max(1, one.value.nbytes))
        self.window_nbytes = int(np.prod(self._shape)) * 4 + 9 * self._kmers
        self._lending = _Lending()
        self._own = threading.local()

    def begin(self, plan: Plan, slot: _Slot | None) -> Arrays:
        position, spans = plan
        windows = sum(len(span.row) for span in spans)
        return Arrays(
            kmer_id=np.empty((windows, self._kmers), dtype=np.int64),
            mask=np.empty((windows, self._kmers), dtype=np.bool_),
            target=self._lending.lend((windows, *self._shape)),
            position=position,
            spans=spans,
        )

    def read(self, memory: Arrays, span: Span, rows: Rows, first: int) -> None:
        cache = self._caches[span.cache]
        if not hasattr(self._own, "block"):
            self._own.block = cache.allocate(self._some)
        for begin in range(0, len(rows), self._some):
            some = rows[begin : begin + self._some]
            block = self._own.block.part(0, len(some))
            cache.read(self._split, span.view, some, block)
            places = slice(first + begin, first + begin + len(some))
            turned = kmers.reverse_complement(block.kmer_id)
            memory.kmer_id[places] = np.where(block.reversed[:, None], turned, block.kmer_id)
            memory.mask[places] = block.mask
            cache.codec.decode(
                block.value,
                block.scale,
                cache.mean,
                cache.std,
                space=self._space,
                out=memory.target[places],
            )

    def advise(self, span: Span) -> None:
        self._caches[span.cache].advise(self._split, span.view, span.row)


class _Lending:
    """Memory for decoded targets, filled again when nobody can see what was in it any more."""

    def __init__(self) -> None:
        self._idle: deque[npt.NDArray[np.float32]] = deque(maxlen=_IDLE)

    def lend(self, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        count = int(np.prod(shape))
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = np.empty(count, dtype=np.float32)
        if len(memory) != count:
            memory = np.empty(count, dtype=np.float32)
        # Every array and tensor made of what is lent keeps `lent` alive, whatever becomes of the
        # first one: NumPy looks through arrays for the owner of memory, but not through this.
        lent: Any = (ctypes.c_char * memory.nbytes).from_buffer(memory.data)
        weakref.finalize(lent, self._idle.append, memory).atexit = False
        array: npt.NDArray[np.float32] = np.frombuffer(lent, dtype=np.float32).reshape(shape)
        return array


class _Reading:
    """A batch that is being read."""

    def __init__(self, plan: Plan, memory: Any, pieces: int) -> None:
        self.position, self.spans = plan
        self.memory = memory
        self.pieces = pieces
        """Of it that are not yet read."""
        self.error: BaseException | None = None


class _Readers:
    """Threads that read batches ahead, each begun in its turn as soon as there is room for it.

    A batch is one piece of work where there is room for one a thread, else several. The first
    error is raised in its batch's turn, and again whenever one asks for more.
    """

    def __init__(
        self, plans: Iterator[Plan], work: _Work, *, slots: int, advised: int, threads: int
    ) -> None:
        self.work = work
        self._plans = plans
        self._coming: deque[Plan] = deque()
        self._hints: deque[Span] = deque()
        self._advised = advised
        self._cut = -(-threads // (slots - 1))
        self._slots = slots
        # Reading ahead begins shallow and gets deeper with every batch taken: a run of a few small
        # batches does not read thousands that nobody wants.
        self._room = min(slots, threads + 1)
        self._begun = 0
        self._free: deque[_Slot | None] = deque()
        self._pieces: deque[tuple[_Reading, Span, Rows, int]] = deque()
        self._reading: deque[_Reading] = deque()
        self._ended = self._stopped = False
        # The first is for whoever begins batches, the other for what is written above. It may be
        # asked for again by whoever has it: a stream can be found to be garbage at any moment.
        self._beginning = threading.Lock()
        lock = threading.RLock()
        self._freed, self._done = threading.Condition(lock), threading.Condition(lock)
        self._threads = [
            threading.Thread(target=self._run, name=f"had-pipe-read-{i}", daemon=True)
            for i in range(threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def take(self) -> _Reading | None:
        """The next batch, waited for; None after the last."""
        with self._done:
            while not (self._reading and self._reading[0].pieces == 0):
                if self._ended and not self._reading:
                    return None
                assert not self._stopped, "the stream was closed while one waited for a batch"
                self._done.wait()
            error = self._reading[0].error
            if error is not None:
                self.stop()
                raise error
            self._room = min(self._slots, self._room + 1)
            self._freed.notify()
            return self._reading.popleft()

    def ready(self) -> bool:
        """Whether `take` would neither wait nor raise."""
        with self._done:
            if not self._reading:
                return False
            return self._reading[0].pieces == 0 and self._reading[0].error is None

    def give_back(self, slot: _Slot | None) -> None:
        """What a batch that was taken was read into, which may now be written again."""
        with self._freed:
            self._free.append(slot)
            self._freed.notify()

    def stop(self) -> None:
        with self._freed:
            self._stopped = True
            self._freed.notify_all()
            self._done.notify_all()

    def join(self) -> None:
        until = monotonic() + _LEAVE
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - monotonic()))

    def _run(self) -> None:
        while (piece := self._next_piece()) is not None:
            reading, span, rows, first = piece
            error = None
            try:
                self._advise()
                if reading.error is None:
                    self.work.read(reading.memory, span, rows, first)
            except BaseException as caught:
                error = caught
            with self._done:
                reading.error = reading.error or error
                reading.pieces -= 1
                if reading.pieces == 0:
                    self._done.notify()
            # Nothing of a batch may outlive it here while there is nothing to do.
            del piece, reading, span, rows, error

    def _advise(self) -> None:
        """Make known what will be read soon."""
        while not self._stopped:
            try:
                span = self._hints.popleft()
            except IndexError:
                return
            self.work.advise(span)

    def _next_piece(self) -> tuple[_Reading, Span, Rows, int] | None:
        with self._beginning:
            if not self._pieces and not self._ended:
                slot = self._wait_for_room()
                if not self._stopped:
                    self._begin(slot)
            return None if self._stopped or not self._pieces else self._pieces.popleft()

    def _wait_for_room(self) -> _Slot | None:
        with self._freed:
            while not self._stopped:
                if self._free:
                    return self._free.popleft()
                if self._begun < self._room:
                    self._begun += 1
                    return None
                self._freed.wait()
            return None

    def _begin(self, slot: _Slot | None) -> None:
        """Cut the next batch into pieces."""
        reading = None
        try:
            plan = self._plan()
            if plan is not None:
                reading = _Reading(plan, self.work.begin(plan, slot), pieces=0)
                self._cut_up(reading)
        except BaseException as caught:
            reading = _Reading((-1, ()), None, pieces=0)
            reading.error = caught
        with self._done:
            if reading is not None:
                self._reading.append(reading)
            if reading is None or reading.error is not None:
                self._ended = True
            self._done.notify()

    def _plan(self) -> Plan | None:
        """The next batch; those after it are to be made known to the caches."""
        while len(self._coming) <= self._advised:
            plan = next(self._plans, None)
            if plan is None:
                break
            self._coming.append(plan)
            self._hints.extend(plan[1])
        return self._coming.popleft() if self._coming else None

    def _cut_up(self, reading: _Reading) -> None:
        step = -(-sum(len(span.row) for span in reading.spans) // self._cut)
        first = 0
        for span in reading.spans:
            for begin in range(0, len(span.row), step):
                rows = span.row[begin : begin + step]
                self._pieces.append((reading, span, rows, first + begin))
                reading.pieces += 1
            first += len(span.row)


def _stop(readers: weakref.ref[_Readers]) -> None:
    alive = readers()
    if alive is not None:
        alive.stop()


# The device


@dataclass(frozen=True)
class _Stored:
    """A batch as stored, on the device."""

    kmer_id: Tensor
    """int16"""
    mask: Tensor
    reversed: Tensor
    value: Tensor
    scale: Tensor | None


class _Gpu:
    """Copies and decodes on a stream of its own, beside the step that trains on the batch before.

    The host waits for nothing here: whoever trains waits on the device, and a slot's copy is
    waited for by the thread that is to write into it.
    """

    def __init__(self, caches: Sequence[Cache], device: torch.device, space: Space) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device)
        self._decode = Decode(caches, device, space)

    def stage(self, slot: _Slot, position: int, spans: tuple[Span, ...]) -> _Staged:
        windows = sum(len(span.row) for span in spans)
        with torch.cuda.stream(self._side):
            stored = _on_device(slot.block, windows, self._device)
            slot.copied = torch.cuda.Event()
            slot.copied.record()
            batch = self._decode(stored, position, spans)
            ready = torch.cuda.Event()
            ready.record()
        return _Staged(batch, ready)

    def hand_over(self, staged: _Staged) -> Batch:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(staged.ready)
        batch = staged.batch
        for tensor in (batch.kmer_id, batch.mask, batch.target):
            # Made on the side stream: its memory must outlive what this stream does with it.
            tensor.record_stream(stream)
        return batch


@dataclass(frozen=True)
class _Staged:
    """A batch being copied and decoded by a GPU."""

    batch: Batch
    ready: torch.cuda.Event


def _on_device(block: Block, windows: int, device: torch.device) -> _Stored:
    def moved(array: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(array[:windows]).to(device, non_blocking=True)

    return _Stored(
        kmer_id=moved(block.kmer_id.view(np.int16)),  # torch does little with uint16
        mask=moved(block.mask),
        reversed=moved(block.reversed),
        value=moved(block.value),
        scale=None if block.scale is None else moved(block.scale),
    )


class Decode:
    """Makes batches of what is stored, on any device; by one fused kernel where there is one."""

    def __init__(self, caches: Sequence[Cache], device: torch.device, space: Space) -> None:
        self._space: Space = space
        plan = caches[0].plan
        self._shape = (plan.windows.stored, plan.teacher.channels)
        every = kmers.reverse_complement(np.arange(kmers.KMERS, dtype=np.uint16)[:, None])[:, 0]
        self._complement = torch.tensor(every.astype(np.int64), device=device)
        self._codecs = [cache.codec for cache in caches]
        self._statistics = [
            (torch.tensor(cache.mean, device=device), torch.tensor(cache.std, device=device))
            for cache in caches
        ]
        # A learnt codec brings its tables to the device now, not while its decoding is traced.
        one = caches[0].allocate(1)
        for codec, (mean, std) in zip(self._codecs, self._statistics, strict=True):
            stored = _on_device(one, 1, device)
            codec.decode(stored.value, stored.scale, mean, std)

    def __call__(self, stored: _Stored, position: int, spans: tuple[Span, ...]) -> Batch:
        device = stored.value.device
        # Whatever the caller computes with: autocast would round what is decoded.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            kmer_id = stored.kmer_id.long()
            turned = self._complement[kmer_id.flip(1)]
            target = torch.empty((len(kmer_id), *self._shape), device=device)
            first = 0
            for i, group in itertools.groupby(spans, key=attrgetter("cache")):
                end = first + sum(len(span.row) for span in group)
                _fused(
                    target[first:end],
                    self._codecs[i],
                    stored.value[first:end],
                    None if stored.scale is None else stored.scale[first:end],
                    *self._statistics[i],
                    self._space,
                )
                first = end
            return Batch(
                kmer_id=torch.where(stored.reversed[:, None], turned, kmer_id),
                mask=stored.mask,
                target=target,
                position=position,
                spans=spans,
            )


def decode_into(
    out: Tensor,
    codec: Codec,
    value: Tensor,
    scale: Tensor | None,
    mean: Tensor,
    std: Tensor,
    space: Space,
) -> None:
    """Operation by operation; what `torch.compile` makes one kernel of."""
    out.copy_(codec.decode(value, scale, mean, std, space=space))


class Fused:
    """`decode_into` as one kernel; as it is where the compiler fails, which is said once."""

    def __init__(self) -> None:
        self._compiled: Callable[..., None] | None = None
        self.failed = False

    def __call__(self, *arguments: Any) -> None:
        if not self.failed:
            try:
                if self._compiled is None:
                    # No multiplication and addition in one rounding: the same bits as without.
                    self._compiled = torch.compile(
                        decode_into, options={"emulate_precision_casts": True}
                    )
                self._compiled(*arguments)
                return
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                self.failed = True
                lines = str(error).strip().splitlines()
                log.warning(
                    "torch.compile cannot fuse the decoding of embeddings here (%s: %s); "
                    "decoding goes on operation by operation, which is slower and the same",
                    type(error).__name__,
                    lines[0] if lines else "",
                )
        decode_into(*arguments)


_fused = Fused()


def _stored_nbytes(block: Block) -> int:
    return block.value.nbytes + (0 if block.scale is None else block.scale.nbytes)


def _seen_nbytes(block: Block) -> int:
    return block.kmer_id.nbytes + block.mask.nbytes + block.reversed.nbytes
