"""Reading ahead: that it gives the right bytes whatever happens, and takes no more than its share.

pytest -m soak -s tests/test_feed.py    # memory over HAD_PIPE_SOAK_SECONDS, 480 by default
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_cache import build_cache

from had_pipe import feed
from had_pipe.cache import Block, Cache, Part
from had_pipe.dna import kmers
from had_pipe.errors import CacheCorrupt, CacheMismatch
from had_pipe.order import Corpus, Mix
from had_pipe.stream import Arrays, Batch, Stream

CODECS = [
    pytest.param({"codec": "int8"}, id="int8"),
    pytest.param({"codec": "exact"}, id="exact"),
    pytest.param({"codec": "exact", "dtype": "bfloat16"}, id="exact-bfloat16"),
    pytest.param({"codec": "compact"}, id="compact"),
    pytest.param({"codec": "tiny", "channels": 32}, id="tiny"),
]

Window = tuple[int, int, int]
"""Cache, epoch and row."""


def windows_of(batch: Batch | Arrays) -> list[Window]:
    return [(s.cache, s.epoch, row) for s in batch.spans for row in s.row.tolist()]


def contents(batch: Arrays) -> dict[Window, tuple[bytes, bytes, bytes]]:
    """What a batch says of each of its windows."""
    each = zip(batch.kmer_id, batch.mask, batch.target, strict=True)
    return dict(
        zip(windows_of(batch), (tuple(a.tobytes() for a in arrays) for arrays in each), strict=True)
    )


def whole(cache: Cache) -> list[tuple[Any, Any, Any]]:
    """All training windows of a cache by view, read in one go: k-mers as seen, mask, target."""
    views = []
    for view in cache.views("train"):
        rows = np.arange(cache.rows("train"))
        block = cache.allocate(len(rows))
        cache.read("train", view, rows, block)
        turned = kmers.reverse_complement(block.kmer_id)
        seen = np.where(block.reversed[:, None], turned, block.kmer_id).astype(np.int64)
        target = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)
        views.append((seen, block.mask, target))
    return views


def readers() -> int:
    return sum(thread.name.startswith("had-pipe-read") for thread in threading.enumerate())


def soon(true: Callable[[], bool], seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while not true():
        if time.monotonic() > until:
            return False
        time.sleep(0.005)
    return True


class Slow:
    """Lets a cache's reads through one by one, or all; counts the windows read."""

    def __init__(self, cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
        self.windows = 0
        self._permits = threading.Semaphore(0)
        self._open = False
        read = cache.read

        def slow(split: str, view: int, rows: Any, out: Any) -> None:
            if not self._open:
                self._permits.acquire()
            read(split, view, rows, out)
            self.windows += len(rows)

        monkeypatch.setattr(cache, "read", slow)

    def open(self) -> None:
        self._open = True
        self._permits.release(1000)


class LateCopy:
    """Stands in for a GPU's event: nothing is copied before one waits for the copy."""

    def __init__(self, block: Block, windows: int) -> None:
        self._block, self._windows = block, windows
        self._stored: Any = None
        self._lock = threading.Lock()

    def synchronize(self) -> None:
        with self._lock:
            if self._stored is None:
                seen = feed._on_device(self._block, self._windows, torch.device("cpu"))
                arrays = {name: None if x is None else x.clone() for name, x in vars(seen).items()}
                self._stored = feed._Stored(**arrays)

    @property
    def stored(self) -> Any:
        self.synchronize()
        return self._stored


class LateGpu:
    """Stands in for a GPU that does everything as late as it may."""

    def __init__(self, caches: Sequence[Cache], device: torch.device, space: feed.Space) -> None:
        self._decode = feed.Decode(caches, torch.device("cpu"), space)
        self.staged = 0

    def stage(self, slot: Any, position: int, spans: tuple[feed.Span, ...]) -> Any:
        slot.copied = LateCopy(slot.block, sum(len(span.row) for span in spans))
        self.staged += 1
        return slot.copied, position, spans

    def hand_over(self, staged: Any) -> Batch:
        copied, position, spans = staged
        return self._decode(copied.stored, position, spans)


@pytest.fixture
def late_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Streams on "cuda" then use it, and memory that is not page-locked."""
    plain = feed.Fused()
    plain.failed = True
    monkeypatch.setattr(feed, "_fused", plain)
    monkeypatch.setattr(feed, "_Gpu", LateGpu)
    allocate = feed._Storing._allocate

    def unpinned(storing: Any) -> Block:
        storing._pinned = False
        return allocate(storing)

    monkeypatch.setattr(feed._Storing, "_allocate", unpinned)


# What is read


def test_a_run_may_change_its_number_of_ranks_at_any_batch(made: Made) -> None:
    caches = [
        made(windows=96, part=32, views=2),
        made(windows=40, part=16, seed=3, views=2),
    ]
    options: dict[str, Any] = {"batch": 16, "seed": 5, "weights": [3, 1], "threads": 1}
    with Stream(caches, **options) as one:
        alone = [contents(batch) for batch in islice(one.arrays(), 14)]
    together: list[dict[Window, Any]] = []
    for ranks, batches in ((8, 3), (4, 5), (16, 6)):
        shares = []
        for rank in range(ranks):
            with Stream(caches, rank=rank, ranks=ranks, start=len(together), **options) as stream:
                shares.append([contents(batch) for batch in islice(stream.arrays(), batches)])
                assert stream.position == len(together) + batches
        for parts in zip(*shares, strict=True):
            assert [len(part) for part in parts] == [16 // ranks] * ranks
            together.append({window: said for part in parts for window, said in part.items()})
    assert together == alone
    assert len({window[1] for batch in alone for window in batch}) >= 2  # epochs


KINDS: list[dict[str, Any]] = [
    {"windows": 50, "part": 16, "views": 2},
    {"windows": 33, "part": 8, "seed": 1, "statistics_seed": 3},
    {"windows": 1, "part": 1, "seed": 2, "views": 2},
]


@pytest.fixture(scope="module")
def several(made: Made) -> list[Cache]:
    return [made(**kind) for kind in KINDS]


@given(data=st.data())
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_stream_gives_what_stands_at_its_places_of_the_order(
    several: list[Cache], data: st.DataObject
) -> None:
    caches = data.draw(st.permutations(several))[: data.draw(st.integers(1, 3))]
    weights = data.draw(st.none() | st.lists(st.integers(1, 9), min_size=3, max_size=3))
    weights = weights and weights[: len(caches)]
    ranks = data.draw(st.integers(1, 4))
    rank = data.draw(st.integers(0, ranks - 1))
    batch = ranks * data.draw(st.integers(1, 20))
    seed = data.draw(st.integers(0, 2**40))
    start = data.draw(st.integers(0, 90))
    every = [whole(cache) for cache in caches]
    mix = Mix([Corpus(c.rows("train"), c.plan.part) for c in caches], seed=seed, weights=weights)
    with Stream(
        caches,
        batch=batch,
        seed=seed,
        weights=weights,
        rank=rank,
        ranks=ranks,
        start=start,
        threads=data.draw(st.integers(1, 3)),
        prefetch=data.draw(st.sampled_from([1, 20_000, 1 << 20])),
    ) as stream:
        for position, read in enumerate(islice(stream.arrays(), 5), start=start):
            share = batch // ranks
            places = mix.at(position * batch + rank * share, share)
            columns = (places.cache_P, places.epoch_P, places.row_P)
            wanted = sorted(zip(*(column.tolist() for column in columns), strict=True))
            assert read.position == position
            assert windows_of(read) == wanted
            for i, (cache, epoch, row) in enumerate(wanted):
                kmer_id, mask, target = every[cache][epoch % len(every[cache])]
                assert np.array_equal(read.kmer_id[i], kmer_id[row])
                assert np.array_equal(read.mask[i], mask[row])
                assert np.array_equal(read.target[i], target[row])


@pytest.mark.parametrize("threads", [1, 3])
def test_tensors_arrays_and_blocks_are_the_same_batches(made: Made, threads: int) -> None:
    cache = made(windows=96, part=32, views=2)
    options: dict[str, Any] = {"batch": 20, "seed": 1, "threads": threads}
    with (
        Stream([cache], **options) as one,
        Stream([cache], **options) as two,
        Stream([cache], **options) as three,
    ):
        for tensors, arrays, blocks in islice(
            zip(one, two.arrays(), three.blocks(), strict=True), 12
        ):
            assert tensors.position == arrays.position == three.position - 1
            for name in ("kmer_id", "mask", "target"):
                assert np.array_equal(getattr(tensors, name).numpy(), getattr(arrays, name))
            assert [len(block.value) for block in blocks] == [len(s.row) for s in arrays.spans]
            value, scale, mask = (
                np.concatenate([getattr(block, name) for block in blocks])
                for name in ("value", "scale", "mask")
            )
            assert np.array_equal(mask, arrays.mask)
            decoded = cache.codec.decode(value, scale, cache.mean, cache.std)
            assert np.array_equal(decoded, arrays.target)


def test_a_path_is_opened_like_a_cache(made: Made) -> None:
    cache = made(windows=50, part=16)
    with (
        Stream([cache], batch=10, seed=2) as one,
        Stream([str(cache.path)], batch=10, seed=2) as two,
    ):
        for batch, again in islice(zip(one, two, strict=True), 3):
            assert torch.equal(batch.target, again.target)


# What is handed over stays


def test_whatever_is_kept_of_a_batch_stays_what_it_was(made: Made) -> None:
    cache = made(windows=96, part=32)
    kept: list[tuple[Any, Any]] = []
    # Of most batches only a part of a part is kept, in many ways; of some nothing.
    ways: list[Callable[[Any], Any]] = [
        lambda b: b.target,
        lambda b: in_memory(b.target)[1:, ::2],
        lambda b: b.target[3].reshape(-1)[5:9],
        lambda b: memoryview(in_memory(b.target)[2:3]),
        lambda b: b.kmer_id[4],
        lambda b: None,
    ]
    for read in (iter, Stream.arrays):
        with Stream([cache], batch=12, seed=0, threads=2, prefetch=1) as stream:
            batches: Iterator[Any] = read(stream)  # type: ignore[operator]
            for i, batch in enumerate(islice(batches, 60)):
                some = ways[i % len(ways)](batch)
                if some is not None:
                    kept.append((some, np.array(in_memory(some))))
                del batch
    for some, then in kept:
        assert np.array_equal(in_memory(some), then)


def in_memory(some: Any) -> Any:
    return some.numpy() if isinstance(some, torch.Tensor) else np.asarray(some)


def test_memory_is_lent_again_only_when_nobody_can_see_it() -> None:
    lending = feed._Lending()
    first = lending.lend((5, 7))
    address = first.ctypes.data
    seen = first[1:3].T
    del first
    second = lending.lend((5, 7))
    assert not np.shares_memory(second, seen)
    tensor = torch.from_numpy(seen)
    del seen
    assert not np.shares_memory(lending.lend((5, 7)), tensor.numpy())
    del tensor, second
    again = [lending.lend((5, 7)) for _ in range(2)]
    assert address in [array.ctypes.data for array in again]
    assert lending.lend((3, 7)).shape == (3, 7)


# Reading ahead, and no further


def test_so_many_batches_are_read_ahead_as_fit_the_prefetch(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(windows=96, part=32)
    block = cache.allocate(8)
    arrays = (block.value, block.scale, block.kmer_id, block.mask, block.reversed)
    nbytes = sum(array.nbytes for array in arrays if array is not None)
    slow = Slow(cache, monkeypatch)
    slow.open()
    with Stream([cache], batch=8, seed=0, threads=2, prefetch=6 * nbytes + 5) as stream:
        blocks = stream.blocks()
        for taken in range(1, 20):
            next(blocks)
            # It begins with three and takes one more with every batch, up to six.
            ahead = min(6, 3 + taken) - 1
            assert soon(lambda wanted=(taken + ahead) * 8: slow.windows >= wanted)  # type: ignore[misc]
            time.sleep(0.01)
            assert slow.windows == (taken + ahead) * 8


def test_memory_stays_within_the_prefetch_whatever_the_cache(made: Made) -> None:
    # 20 MB of values; batches of 0.16 MB, or 0.6 decoded.
    cache = made(windows=2048, part=256, kmers=24, channels=512)
    prefetch, batch = 1 << 20, 16
    nbytes = cache.rows("train") * 20 * 512
    assert nbytes > 10 * prefetch
    for read in (Stream.blocks, Stream.arrays, iter):
        with Stream([cache], batch=batch, seed=0, prefetch=prefetch) as stream:
            batches: Iterator[Any] = read(stream)  # type: ignore[operator]
            next(batches)
            tracemalloc.start()
            try:
                for _ in islice(batches, 160):
                    pass
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            # Two batches at least, one in the caller's hands, one lent again, what threads read
            # into before they decode, and the small arrays of open parts.
            one = batch * 20 * 512 * 4
            assert peak < max(prefetch, 2 * one) + 2 * one + (6 << 20)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_memory_stays_flat_for_minutes(tmp_path: Path) -> None:
    psutil = pytest.importorskip("psutil")
    seconds = float(os.environ.get("HAD_PIPE_SOAK_SECONDS", "480"))
    cache = Cache.open(
        build_cache(tmp_path / "a", windows=16_384, part=512, kmers=60, channels=256)
    )
    nbytes = cache.rows("train") * 51 * 256
    prefetch = 16 << 20
    assert nbytes > 10 * prefetch
    process = psutil.Process()
    times, sizes, batches = [], [], 0
    begun = time.monotonic()
    with Stream([cache], batch=64, seed=0, prefetch=prefetch) as stream:
        before = process.memory_info().rss
        for _ in stream:
            batches += 1
            if batches % 50 == 0:
                times.append(time.monotonic() - begun)
                sizes.append(process.memory_info().rss)
                if times[-1] > seconds:
                    break
    settled = len(times) // 4
    slope = np.polyfit(times[settled:], sizes[settled:], 1)[0]
    epochs = batches * 64 / cache.rows("train")
    print(
        f"\n{times[-1]:.0f} s, {batches} batches, {epochs:.1f} epochs of {nbytes / 1e6:.0f} MB: "
        f"RSS grew by {(max(sizes) - before) / 1e6:.1f} MB at most, then by {slope / 1e3:.2f} kB/s"
    )
    # Memory comes in steps of a batch's 3 MB, and the last of them may come late.
    assert max(sizes) - before < prefetch + (96 << 20)
    assert slope * (times[-1] - times[settled]) < 12 << 20


def test_caches_are_told_what_will_be_read_before_it_is(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(windows=96, part=32, views=2)
    told: list[str] = []
    advise, read = cache.advise, cache.read

    def advised(split: str, view: int, rows: Any) -> None:
        told.extend(f"advise {split} {view} {row}" for row in rows)
        advise(split, view, rows)

    def reading(split: str, view: int, rows: Any, out: Any) -> None:
        told.extend(f"read {split} {view} {row}" for row in rows)
        read(split, view, rows, out)

    monkeypatch.setattr(cache, "advise", advised)
    monkeypatch.setattr(cache, "read", reading)
    with Stream([cache], batch=12, seed=0, threads=1, prefetch=20_000) as stream:
        # One epoch of each view: what is told in it is told once.
        list(islice(stream.arrays(), 16 - 4))
    when = {line: i for i, line in reversed(list(enumerate(told)))}
    for line, i in when.items():
        if line.startswith("read"):
            assert when[line.replace("read", "advise")] < i


def test_a_mirror_is_told_the_parts_in_the_order_in_which_they_are_needed(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [made(windows=200, part=16, views=2), made(windows=90, part=16, seed=1, views=2)]
    told: list[list[Any]] = [[], []]
    for cache, heard in zip(caches, told, strict=True):
        monkeypatch.setattr(cache, "coming", heard.append)
    stream = Stream(caches, batch=10, seed=0, start=9, weights=[2, 1])
    coming = [list(islice(heard[0], 20)) for heard in told]
    needed: list[list[Part]] = [[], []]
    for position in range(9, 40):
        # Within a batch the order does not matter to a reader, but to nobody else either.
        places = stream.order.at(position * 10, 10)
        for cache_, epoch, row in zip(places.cache_P, places.epoch_P, places.row_P, strict=True):
            part = Part("train", int(epoch) % 2, int(row) // 16)
            if part not in needed[cache_]:
                needed[cache_].append(part)
    for heard, wanted in zip(coming, needed, strict=True):
        assert heard[: len(wanted)] == wanted[:20]
    stream.close()
    assert [list(heard[-1]) for heard in told] == [[], []]


def test_a_stream_closes_what_it_opened_and_nothing_else(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[Path] = []
    monkeypatch.setattr(Cache, "close", lambda cache: closed.append(cache.path))
    mine, other = made(windows=96, part=32), made(seed=5)
    stream = Stream([mine, other.path], batch=8, seed=0)
    next(stream)
    stream.close()
    assert closed == [other.path]
    with pytest.raises(CacheMismatch, match="no window in split 'test'"):
        Stream([mine, other.path], batch=8, seed=0, split="test")
    assert closed == [other.path] * 2
    stream = Stream([mine, other.path], batch=8, seed=0)
    next(stream)
    del stream
    gc.collect()
    assert closed == [other.path] * 3


# When something goes wrong


def damaged(folder: Path, *, row: int) -> Path:
    """A cache with a wrong byte in one training window."""
    path = build_cache(folder, windows=96, part=32)
    shard = path / f"data.zarr/train/0/embedding/value/c/{row // 32}/0/0"
    stride = 10 * 16 + 4
    data = bytearray(shard.read_bytes())
    data[row % 32 * stride + 100] ^= 1
    shard.write_bytes(data)
    return path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("prefetch", [1, 1 << 20])
def test_a_readers_error_is_raised_in_its_batchs_turn_and_again(
    tmp_path: Path, late_gpu: None, prefetch: int, device: str
) -> None:
    before = readers()
    path = damaged(tmp_path / "a", row=40)
    stream = Stream([path], batch=8, seed=0, threads=3, prefetch=prefetch, device=device)
    bad = next(p for p in range(12) if (0, 0, 40) in windows_of_spans(stream, p))
    assert 0 < bad < 11
    for position in range(bad):
        batch = next(stream)
        assert batch.position == position
        time.sleep(0.02)  # what comes next has been read by then
    for _ in range(3):
        with pytest.raises(CacheCorrupt, match="window 8 of this shard"):
            next(stream)
        assert stream.position == bad
    # Nobody reads on after an error, closed or not.
    assert soon(lambda: readers() == before)
    stream.close()
    stream.close()


@pytest.mark.parametrize("read", [iter, Stream.arrays, Stream.blocks])
def test_an_error_comes_again_however_one_reads(tmp_path: Path, read: Any) -> None:
    with Stream([damaged(tmp_path / "a", row=40)], batch=8, seed=0) as stream:
        batches = read(stream)
        for _ in range(2):
            with pytest.raises(CacheCorrupt, match="window 8 of this shard"):
                list(islice(batches, 13))
            assert stream.position < 12


def windows_of_spans(stream: Stream, position: int) -> list[Window]:
    return [(s.cache, s.epoch, row) for s in stream.spans(position) for row in s.row.tolist()]


def test_what_is_missing_is_said_no_sooner_than_it_is_needed(tmp_path: Path) -> None:
    # Caches are told what comes many batches ahead, and open it then.
    path = build_cache(tmp_path / "a", windows=512, part=32)
    cache = Cache.open(path)
    with Stream([cache], batch=8, seed=0) as stream:
        first: dict[int, int] = {}
        for position in range(64):
            for _, _, row in windows_of_spans(stream, position):
                first.setdefault(row // 32, position)
        shard, needed = max(first.items(), key=lambda item: item[1])
        assert needed > 8
        (path / f"data.zarr/train/0/embedding/value/c/{shard}/0/0").unlink()
        for position in range(needed):
            assert next(stream).position == position
        with pytest.raises(CacheCorrupt, match=f"c/{shard}/0/0 cannot be opened"):
            next(stream)


def test_an_error_of_the_order_reaches_the_caller(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Stream([made()], batch=8, seed=0)

    def broken(first: int, count: int) -> Any:
        raise MemoryError("no room for the order")

    monkeypatch.setattr(stream.order, "at", broken)
    for _ in range(2):
        with pytest.raises(MemoryError, match="no room"):
            next(stream)
    stream.close()


def test_an_interrupt_while_waiting_loses_no_batch(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(windows=50, part=16)
    with Stream([cache], batch=10, seed=5) as stream:
        whole = [batch.target for batch in islice(stream, 3)]
    slow = Slow(cache, monkeypatch)
    before = signal.signal(signal.SIGUSR1, signal.default_int_handler)
    try:
        with Stream([cache], batch=10, seed=5) as stream:
            for _ in range(3):
                timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR1))
                timer.start()
                with pytest.raises(KeyboardInterrupt):
                    next(stream)
                timer.join()
            slow.open()
            for batch, again in zip(whole, stream, strict=False):
                assert torch.equal(batch, again.target)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_closing_does_not_wait_long_for_a_read_that_does_not_end(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "_LEAVE", 0.2)
    before = readers()
    cache = made()
    slow = Slow(cache, monkeypatch)
    stream = Stream([cache], batch=8, seed=0, threads=2)

    def wait() -> None:
        with pytest.raises(AssertionError, match="closed"):
            next(stream)

    thread = threading.Thread(target=wait)
    thread.start()
    assert soon(lambda: readers() > before)
    begun = time.monotonic()
    stream.close()
    assert time.monotonic() - begun < 5
    thread.join(10)
    assert not thread.is_alive()
    slow.open()
    assert soon(lambda: readers() == before)


def test_closing_ends_the_threads(made: Made) -> None:
    before = readers()
    with Stream([made()], batch=8, seed=0, threads=3) as stream:
        assert readers() == before  # begun with the first batch
        next(stream)
        assert readers() == before + 3
    assert readers() == before
    with pytest.raises(AssertionError, match="closed"):
        next(stream)


@pytest.mark.parametrize("failed", [False, True])
def test_a_stream_that_is_forgotten_leaves_no_thread(tmp_path: Path, failed: bool) -> None:
    gc.collect()
    before = readers()
    path = damaged(tmp_path / "a", row=40)
    stream = Stream([path], batch=8, seed=0, threads=3)
    blocks = stream.blocks()
    next(blocks)
    if failed:
        with pytest.raises(CacheCorrupt):
            list(islice(blocks, 12))
    else:
        assert readers() > before
    del stream, blocks
    gc.collect()
    assert soon(lambda: readers() == before)


def test_a_process_may_end_with_a_stream_open(made: Made) -> None:
    script = (
        "import sys\n"
        "from had_pipe.stream import Stream\n"
        "kept = [Stream([sys.argv[1]], batch=32, seed=0, threads=3) for _ in range(4)]\n"
        "for stream in kept:\n"
        "    next(stream)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", script, str(made(windows=96, part=32).path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (ended.returncode, ended.stderr) == (0, "")


# What is told


def test_statistics_tell_of_what_was_handed_over(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(windows=96, part=32)
    slow = Slow(cache, monkeypatch)
    window = 10 * 16 + 10 * 2  # groups by channels, and their scales
    with Stream([cache], batch=12, seed=0) as stream:
        begun = stream.stats()
        assert (begun.batches, begun.windows, begun.nbytes, begun.wait_seconds) == (0, 0, 0, 0)
        assert begun.mirror is None
        opening = threading.Timer(0.2, slow.open)
        opening.start()
        list(islice(stream, 3))
        first = stream.stats()
        assert (first.batches, first.windows, first.nbytes) == (3, 36, 36 * window)
        assert 0.15 < first.wait_seconds <= first.seconds
        time.sleep(0.05)
        list(islice(stream, 2))
        later = stream.stats().since(first)
        assert (later.batches, later.windows, later.nbytes) == (2, 24, 24 * window)
        assert 0 <= later.wait_seconds <= later.seconds - 0.05
        assert later.bytes_per_second == pytest.approx(later.nbytes / later.seconds)
        assert later.wait_share == pytest.approx(later.wait_seconds / later.seconds)


# The device


def on(
    device: str, caches: Sequence[Cache], stream: Stream, batches: int
) -> Iterator[tuple[Arrays, Batch]]:
    """A stream's batches, and what a device makes of the same as stored."""
    decode = feed.Decode(caches, torch.device(device), "raw")
    storing = feed._Storing(caches, "train", 20, pinned=False)
    for arrays in islice(stream.arrays(), batches):
        slot = storing.begin((arrays.position, arrays.spans), None)
        first = 0
        for span in arrays.spans:
            storing.read(slot, span, span.row, first)
            first += len(span.row)
        stored = feed._on_device(slot.block, first, torch.device(device))
        yield arrays, decode(stored, arrays.position, arrays.spans)


def assert_alike(arrays: Arrays, batch: Batch, codec: str) -> None:
    assert batch.position == arrays.position
    assert windows_of(batch) == windows_of(arrays)
    assert batch.kmer_id.dtype == torch.int64
    assert np.array_equal(batch.kmer_id.cpu().numpy(), arrays.kmer_id)
    assert np.array_equal(batch.mask.cpu().numpy(), arrays.mask)
    assert batch.target.dtype == torch.float32
    target = batch.target.cpu().numpy()
    if codec in ("int8", "exact"):
        assert np.array_equal(target, arrays.target)
    else:  # a product of matrices, which no two libraries add up alike
        np.testing.assert_allclose(target, arrays.target, rtol=1e-5, atol=2e-5)


def alike(made: Made, kind: dict[str, Any]) -> list[Cache]:
    """Two caches with statistics of their own."""
    return [
        made(windows=96, part=32, views=2, **kind),
        made(windows=40, part=16, seed=1, statistics_seed=9, **kind),
    ]


@pytest.mark.parametrize("kind", CODECS)
def test_a_device_makes_of_what_is_stored_what_numpy_makes(
    made: Made, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = feed.Fused()
    plain.failed = True
    monkeypatch.setattr(feed, "_fused", plain)
    caches = alike(made, kind)
    with Stream(caches, batch=20, seed=1) as stream, torch.autocast("cpu", dtype=torch.bfloat16):
        for arrays, batch in on("cpu", caches, stream, 8):
            assert_alike(arrays, batch, kind["codec"])


# torch's compiler uses what torch says not to use any more.
compiles = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@compiles
@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", CODECS)
def test_decoding_in_one_kernel_gives_the_same_bits(
    made: Made, kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    fused = feed.Fused()
    monkeypatch.setattr(feed, "_fused", fused)
    caches = alike(made, kind)
    decode = feed.Decode(caches, torch.device("cpu"), "raw")
    with Stream(caches, batch=20, seed=1) as stream:
        for position, blocks in enumerate(islice(stream.blocks(), 8)):
            for span, block in zip(stream.spans(position), blocks, strict=True):
                stored = feed._on_device(block, len(span.row), torch.device("cpu"))
                both = []
                for fused.failed in (True, False):
                    both.append(decode(stored, position, (span,)).target)
                assert torch.equal(*both)
    assert not fused.failed  # it was compiled, not given up


def test_where_nothing_can_be_compiled_decoding_is_as_it_was_and_says_so_once(
    made: Made, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no compiler found\nwith many more lines")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    monkeypatch.setattr(feed, "_fused", feed.Fused())
    caches = alike(made, {"codec": "int8"})
    with Stream(caches, batch=20, seed=1) as stream, caplog.at_level(logging.WARNING):
        for arrays, batch in on("cpu", caches, stream, 4):
            assert_alike(arrays, batch, "int8")
    assert [record.getMessage() for record in caplog.records] == [
        "torch.compile cannot fuse the decoding of embeddings here (RuntimeError: no compiler "
        "found); decoding goes on operation by operation, which is slower and the same"
    ]


@pytest.mark.parametrize("prefetch", [1, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_slot_is_written_before_a_gpu_has_copied_it(
    made: Made, late_gpu: None, prefetch: int, threads: int
) -> None:
    caches = alike(made, {"codec": "int8"})
    options: dict[str, Any] = {"batch": 20, "seed": 1, "weights": [2, 1], "prefetch": prefetch}
    with (
        Stream(caches, **options) as here,
        Stream(caches, device="cuda", threads=threads, **options) as there,
    ):
        for arrays, batch in islice(zip(here.arrays(), there, strict=True), 40):
            assert_alike(arrays, batch, "int8")
            assert there.position == batch.position + 1
            gpu: Any = there._feed._gpu
            # One is copied and decoded beside the step of the one handed over.
            assert gpu.staged - there.stats().batches in (0, 1)
        readers: Any = there._feed._readers
        assert soon(
            lambda: (
                len(there._feed._staged) + sum(r.pieces == 0 for r in list(readers._reading)) > 1
            )
        )
        next(there)
        assert gpu.staged - there.stats().batches == 1


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@compiles
@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", CODECS)
def test_a_gpu_gets_what_a_cpu_gets(made: Made, kind: dict[str, Any]) -> None:
    caches = alike(made, kind)
    options: dict[str, Any] = {"batch": 20, "seed": 1, "weights": [2, 1]}
    with (
        Stream(caches, **options) as here,
        Stream(caches, device="cuda", prefetch=1, **options) as there,
    ):
        for arrays, batch in islice(zip(here.arrays(), there, strict=True), 30):
            assert batch.target.device.type == "cuda"
            assert np.array_equal(batch.kmer_id.cpu().numpy(), arrays.kmer_id)
            assert np.array_equal(batch.mask.cpu().numpy(), arrays.mask)
            np.testing.assert_allclose(
                batch.target.cpu().numpy(), arrays.target, rtol=1e-5, atol=2e-5
            )


@compiles
@pytest.mark.gpu
@needs_cuda
def test_a_slow_gpu_does_not_see_slots_written_again(made: Made) -> None:
    cache = made(windows=96, part=32, views=2)
    with Stream([cache], batch=20, seed=1) as stream:
        here = [batch.target for batch in islice(stream, 40)]
    with Stream([cache], batch=20, seed=1, device="cuda", prefetch=1) as stream:
        there = []
        for batch in islice(stream, 40):
            # The side stream, too, is held up: copies come long after they were asked for.
            torch.cuda._sleep(10_000_000)
            with torch.cuda.stream(stream._feed._gpu._side):  # type: ignore[union-attr]
                torch.cuda._sleep(10_000_000)
            there.append(batch.target * 1)
    for target, again in zip(here, there, strict=True):
        torch.testing.assert_close(target, again.cpu(), rtol=1e-5, atol=2e-5)


@compiles
@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@needs_cuda
def test_the_host_waits_for_no_gpu_once_a_stream_runs(made: Made) -> None:
    cache = made(windows=96, part=32, views=2)
    with Stream([cache], batch=20, seed=1, device="cuda") as stream:
        list(islice(stream, 5))
        torch.cuda.set_sync_debug_mode("error")
        try:
            list(islice(stream, 20))
        finally:
            torch.cuda.set_sync_debug_mode("default")
