"""How fast shuffled batches leave a cache, against other ways to read the same bytes.

    python benchmarks/stream.py [--quick | --full] [--json] [--folder DIR] [--threads N]
        [--cache CACHE] [--only SECTION ...] [--peers NAME ...] [--soak [SECONDS]]

A cache of the shape NT-v2-500M makes of 1,020-base windows (144 visible groups, 1,024 channels,
int8) is built in a temporary folder; --cache takes one that is there, the demo's for example. First
the batches are checked: every window once an epoch, equal to what zarr-python reads and to NumPy's
decoding. Then come five sections, each of interleaved rounds:

local    against the hardware, in batches of 256 and of 1,024, from the page cache (warm) and not
         (cold: the kernel is told to forget the files before every pass, and what it still holds
         is told; below it a hypervisor may hold them all the same):
           raw read        the shard files from end to end, `preadv` into reused batch buffers
           memcpy          the same bytes from memory to memory
           np.memmap       np.take of the same rows from one flat file
           stream          shuffled batches as stored, CRC on first touch (all touched before)
           stream, always  CRC at every read, as in the first epoch of a run
           stream, never   no CRC
           stream, decoded to float32 on the CPU (a GPU does this in training)
         All have the same threads and read into as many buffers of the same size, in turn.
peers    against other loaders on the same windows, each as its own documentation recommends, in a
         process and an environment of its own (benchmarks/peers; `make bench-peers` makes them
         all): a peer proves itself by one epoch held by CRC; then its epochs and the stream's take
         turns. An epoch begins when its first batch is asked for, workers and files being ready;
         the stream, which knows no pause between epochs, has its second one timed, with as much
         read ahead when it ends as when it began.
wait     the share of training steps of the default student spent waiting for data, and the same
         steps on a batch that lies in memory; on the CPU, and on a GPU where there is one
remote   the cache behind a link with 20 ms to every answer, as fast as the loopback and of
         2 Gbit/s: plain GETs of the same objects over 4 connections, the stream's first epoch
         and its second
growth   seconds a batch from caches of 1, 10 and 100 shards

--soak streams for SECONDS (480) and fits a line to the memory that the process holds.

Every rate is the median over rounds, every ratio the median of the rounds' own ratios. CPU seconds
are those of the process with its threads and children.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any

import against_peers
import numpy as np
import numpy.typing as npt
import torch
import zarr
from against_peers import HEAD, PeerFailed, PeerProcess, Windows
from measuring import Clock, Pass, commit, evict, machine, ratios, resident, rounds, summary
from stream_report import text
from synthetic import build

import had_pipe
from had_pipe.cache import Cache, open_cache
from had_pipe.cache.layout import Part
from had_pipe.objectives import HADObjective
from had_pipe.stream import Batch, Stream
from had_pipe.students import HADConfig, HADModel, spell

SECTIONS = ("local", "peers", "wait", "remote", "growth")
BATCH = 256
PREFETCH = 256 << 20
"""What a stream may read ahead, its default; so many buffers have all the others too."""
DECODED_NBYTES = 1 << 28
"""As stored: what a pass of decoding on the CPU reads, which is slow."""
LATENCY = 0.02
RATE = 250e6
"""Of the slower link, bytes a second."""
CONNECTIONS = 4


@dataclass(frozen=True)
class Size:
    windows: int
    part: int
    rounds: int
    cold_rounds: int
    pass_nbytes: float
    """A warm pass reads at least so much, if need be in several epochs."""
    peer_rounds: int
    peer_seconds: float
    """A peer's pass takes about so long at most; one slower reads less than an epoch."""
    wait_batch: int
    steps: int
    wait_rounds: int
    remote_rounds: int
    growth_rounds: int


QUICK = Size(
    windows=4096,
    part=512,
    rounds=5,
    cold_rounds=2,
    pass_nbytes=6e8,
    peer_rounds=3,
    peer_seconds=1.0,
    wait_batch=4,
    steps=3,
    wait_rounds=2,
    remote_rounds=1,
    growth_rounds=5,
)
FULL = Size(
    windows=16_384,
    part=1024,
    rounds=9,
    cold_rounds=5,
    pass_nbytes=2.4e9,
    peer_rounds=4,
    peer_seconds=3.0,
    wait_batch=16,
    steps=5,
    wait_rounds=4,
    remote_rounds=3,
    growth_rounds=15,
)


class Bench:
    """A cache, the same windows in one flat file, and what every section asks of them."""

    def __init__(self, cache: Cache, folder: Path, *, threads: int) -> None:
        self.cache, self.folder, self.threads = cache, folder, threads
        self.windows = cache.rows("train")
        self.window = tuple(cache.plan.signals[0].window)
        self.dtype = np.dtype(cache.plan.signals[0].dtype)
        self.window_nbytes = cache.plan.signals[0].nbytes
        self.flat = folder / "flat.bin"
        with self.flat.open("wb") as file:
            for first in range(0, self.windows, 256):
                rows = np.arange(first, min(first + 256, self.windows))
                # Every window is touched here, so that the first touch is over.
                block = cache.allocate(len(rows))
                cache.read("train", 0, rows, block)
                file.write(block.value.tobytes())

    @property
    def nbytes(self) -> int:
        return self.windows * self.window_nbytes

    @property
    def shards(self) -> list[Path]:
        value = self.cache.plan.signals[0]
        numbers = range(-(-self.windows // self.cache.plan.part))
        return [self.cache.path / Part("train", 0, n).shard_key(value) for n in numbers]

    def rows(self, batch: int) -> list[npt.NDArray[np.int64]]:
        """The rows of each batch of the first epoch, as the stream reads them."""
        with self.stream(self.cache, batch) as stream:
            spans = [stream.spans(position) for position in range(-(-self.windows // batch))]
        # The last batch may go on in the second epoch.
        return [np.concatenate([s.row for s in some if s.epoch == 0]) for some in spans]

    def stream(self, cache: Cache, batch: int) -> Stream:
        return Stream([cache], batch=batch, seed=0, threads=self.threads, prefetch=PREFETCH)


def check(bench: Bench, *, batch: int) -> None:
    """Stop unless the batches are right; what is fast and wrong is not worth timing."""
    cache = bench.cache
    root = zarr.open_group(cache.path / "data.zarr", mode="r")
    value, *scale = (root[f"train/0/{signal.path}"] for signal in cache.plan.signals)

    def taken(array: Any, rows: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        runs = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1)
        return np.concatenate([array[int(run[0]) : int(run[-1]) + 1] for run in runs])

    rows = np.concatenate(bench.rows(batch))
    assert np.array_equal(np.sort(rows), np.arange(bench.windows))
    with bench.stream(cache, batch) as stream:
        for read in islice(stream, 2):
            row = read.spans[0].row
            stored = taken(value, row)
            scales = taken(scale[0], row) if scale else None
            expected = cache.codec.decode(stored, scales, cache.mean, cache.std, space="raw")
            if cache.plan.codec == "int8":
                assert scales is not None
                expected = stored.astype(np.float32) * scales.astype(np.float32)[..., None]
                expected = expected * cache.std + cache.mean
            np.testing.assert_allclose(
                read.target.numpy()[: len(row)], expected, rtol=1e-5, atol=1e-5
            )


class Local:
    """Each reads the windows, warm so often that it takes a while, and tells what it did."""

    def __init__(self, bench: Bench, *, batch: int, epochs: int) -> None:
        self._bench, self._batch, self._epochs = bench, batch, epochs
        self._threads = bench.threads
        self._rows = [rows for rows in bench.rows(batch) if len(rows) == batch] * epochs
        self._shape = (batch, *bench.window)
        self._dtype = bench.dtype
        self.buffer_nbytes = batch * bench.window_nbytes
        self.buffers = max(2, bench.threads, PREFETCH // self.buffer_nbytes)
        self._buffers = [np.zeros(self._shape, dtype=self._dtype) for _ in range(self.buffers)]
        self._pool = ThreadPoolExecutor(self._threads)
        source = min(bench.nbytes // 4, 1 << 29) // self.buffer_nbytes
        self._source = np.fromfile(
            bench.flat, dtype=self._dtype, count=max(1, source) * int(np.prod(self._shape))
        ).reshape(-1, *self._shape)
        self._opened = {
            how: bench.cache if how == "first" else Cache.open(bench.cache.path, check=how)
            for how in ("first", "always", "never")
        }
        taken = self._buffers[0]
        np.take(self._flat(), self._rows[0], axis=0, out=taken, mode="clip")
        with bench.stream(self._opened["always"], batch) as stream:
            (block,) = next(stream.blocks())
            assert np.array_equal(block.value, taken)

    def close(self) -> None:
        self._pool.shutdown()

    def warm(self) -> dict[str, Callable[[], Pass]]:
        return {
            "raw read": self._raw_read,
            "memcpy": self._memcpy,
            "np.memmap": self._memmap,
            "stream": lambda: self._stream("first"),
            "stream, always": lambda: self._stream("always"),
            "stream, never": lambda: self._stream("never"),
            "stream, decoded": self._decoded,
        }

    def cold(self) -> dict[str, Callable[[], Pass]]:
        def forgotten(contender: Callable[[], Pass], files: list[Path]) -> Callable[[], Pass]:
            def run() -> Pass:
                evict(files)
                return contender()

            return run

        shards = self._bench.shards
        few = max(1, len(self._rows) // 4)
        return {
            "raw read": forgotten(self._raw_read, shards),
            "np.memmap": forgotten(lambda: self._memmap(few), [self._bench.flat]),
            "stream": forgotten(lambda: self._stream("first", ahead=0), shards),
            "stream, always": forgotten(lambda: self._stream("always", ahead=0), shards),
        }

    def _mine(self, worker: int) -> Iterator[npt.NDArray[Any]]:
        """The buffers of one thread, in turn."""
        return itertools.cycle(self._buffers[worker :: self._threads])

    def _raw_read(self) -> Pass:
        files = [os.open(path, os.O_RDONLY) for path in self._bench.shards]

        def read(worker: int) -> int:
            buffers, done = self._mine(worker), 0
            for _ in range(self._epochs):
                for file in files[worker :: self._threads]:
                    offset = 0
                    while got := os.preadv(file, [next(buffers)], offset):
                        offset += got
                    done += offset
            return done

        try:
            clock = Clock()
            return clock.passed(sum(self._pool.map(read, range(self._threads))))
        finally:
            for file in files:
                os.close(file)

    def _memcpy(self) -> Pass:
        batches = len(self._rows)

        def copy(worker: int) -> int:
            buffers, done = self._mine(worker), 0
            for number in range(worker, batches, self._threads):
                buffer = next(buffers)
                np.copyto(buffer, self._source[number % len(self._source)])
                done += buffer.nbytes
            return done

        clock = Clock()
        return clock.passed(sum(self._pool.map(copy, range(self._threads))))

    def _flat(self) -> npt.NDArray[Any]:
        shape = (self._bench.windows, *self._bench.window)
        return np.memmap(self._bench.flat, dtype=self._dtype, mode="r", shape=shape)

    def _memmap(self, batches: int | None = None) -> Pass:
        rows = self._rows[:batches]
        # Mapped anew: pages that somebody maps are not forgotten.
        flat = self._flat()

        def take(worker: int) -> int:
            buffers, done = self._mine(worker), 0
            for some in rows[worker :: self._threads]:
                taken = next(buffers)
                np.take(flat, some, axis=0, out=taken, mode="clip")
                done += taken.nbytes
            return done

        clock = Clock()
        return clock.passed(sum(self._pool.map(take, range(self._threads))))

    def _stream(self, how: str, ahead: int | None = None) -> Pass:
        """Timed when it runs at its steady pace: as much is read ahead at the end as before."""
        with self._bench.stream(self._opened[how], self._batch) as stream:
            blocks = stream.blocks()
            for _ in range(2 * min(self.buffers, 16) if ahead is None else ahead):
                next(blocks)
            clock, done = Clock(), 0
            for batch in islice(blocks, len(self._rows)):
                done += sum(block.value.nbytes for block in batch)
            return clock.passed(done)

    def _decoded(self) -> Pass:
        """In bytes as stored, to compare."""
        with self._bench.stream(self._opened["first"], self._batch) as stream:
            for _ in islice(stream, 2):
                pass
            clock, done = Clock(), 0
            for batch in islice(stream, max(2, DECODED_NBYTES // self.buffer_nbytes)):
                done += len(batch.target) * self._bench.window_nbytes
            return clock.passed(done)


def told(found: dict[str, list[Pass]], against: str = "raw read") -> dict[str, Any]:
    """What each did, and how many times as fast it was as one of them."""
    return {
        name: {
            **summary(passes),
            "ratio": statistics.median(ratios(found, name, against)),
            "range": [min(ratios(found, name, against)), max(ratios(found, name, against))],
        }
        for name, passes in found.items()
    }


def local(bench: Bench, size: Size) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for batch in (BATCH, 4 * BATCH):
        if batch > bench.windows:
            continue
        contenders = Local(bench, batch=batch, epochs=-(-int(size.pass_nbytes) // bench.nbytes))
        found = rounds(contenders.warm(), size.rounds if batch == BATCH else size.rounds // 2)
        answer[f"warm, batches of {batch}"] = {
            "buffers": contenders.buffers,
            "against_raw_read": told(found),
            "against_memcpy": statistics.median(ratios(found, "stream", "memcpy")),
            "against_memmap": statistics.median(ratios(found, "stream", "np.memmap")),
        }
        contenders.close()
    contenders = Local(bench, batch=BATCH, epochs=1)
    evict(bench.shards)
    held = resident(bench.shards)
    answer[f"cold, batches of {BATCH}"] = {
        "buffers": contenders.buffers,
        "still_in_memory": held,
        "against_raw_read": told(rounds(contenders.cold(), size.cold_rounds)),
    }
    contenders.close()
    return answer


def peers(bench: Bench, size: Size, *, names: Sequence[str]) -> dict[str, Any]:
    if bench.dtype != np.int8:
        return {"peers": {}, "absent": {"all": "they are written for int8"}}
    try:
        windows = Windows(bench.flat, windows=bench.windows, window=bench.window)
    except ValueError as error:
        return {"peers": {}, "absent": {"all": str(error)}}
    rows = bench.rows(BATCH)

    def epoch() -> Pass:
        heads, done = [], 0
        with bench.stream(bench.cache, BATCH) as stream:
            blocks = stream.blocks()
            # A whole epoch before: the next one begins where it ends.
            for _ in rows:
                next(blocks)
            clock = Clock()
            for some in islice(blocks, len(rows)):
                for block in some:
                    flat = block.value.reshape(len(block.value), -1).view(np.uint8)
                    heads.append(flat[:, :HEAD].copy())
                    done += block.value.nbytes
            passed = clock.passed(done)
        delivered = np.concatenate(heads).reshape(-1).view(np.uint64)
        # Where batches do not end with the epoch, the next one's first windows are among them.
        windows.refuse_strangers(delivered, repeated=bench.windows % BATCH > 0)
        return passed

    answer: dict[str, Any] = {}
    absent: dict[str, str] = {}
    for known in against_peers.chosen(names):
        reason = against_peers.absent(known)
        if reason is not None:
            absent[known.name] = reason
            continue
        folder = Path(tempfile.mkdtemp(dir=bench.folder))
        try:
            job = against_peers.job(
                windows,
                cache=bench.cache.path,
                folder=folder,
                part=bench.cache.plan.part,
                rows=rows,
                threads=bench.threads,
            )
            peer = PeerProcess(known, windows, job, bench.folder / "peer.log")
            try:
                share = min(1.0, size.peer_seconds / peer.epoch_seconds)
                asked = min(bench.windows, max(1, round(share * len(rows))) * BATCH)

                def go(peer: PeerProcess = peer, asked: int = asked) -> Pass:
                    return peer.go(asked)

                found = rounds({"stream": epoch, known.name: go}, size.peer_rounds)
            finally:
                peer.close()
        except PeerFailed as error:
            absent[known.name] = f"failed: {error}"
            continue
        finally:
            shutil.rmtree(folder)
        against = ratios(found, "stream", known.name)
        answer[known.name] = {
            **summary(found[known.name]),
            "stream": summary(found["stream"]),
            "ratio": statistics.median(against),
            "range": [min(against), max(against)],
            "windows": asked,
            "versions": peer.versions,
        }
        print(f"  {known.name}: {statistics.median(against):.1f}", file=sys.stderr, flush=True)
    return {"peers": answer, "absent": absent}


def wait(bench: Bench, size: Size, *, device: str, batch: int) -> dict[str, Any]:
    """Training steps of the default student on the stream, and on a batch that is there."""
    torch.manual_seed(0)
    config, plan = HADConfig(), bench.cache.plan
    student = HADModel(config).to(device)
    objective = HADObjective(hidden_size=config.hidden_size, channels=plan.teacher.channels).to(
        device
    )
    optimiser = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-3)

    def step(read: Batch) -> None:
        optimiser.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            feat = student(spell(read.kmer_id, read.mask)).last_hidden_state
            objective(feat, read.kmer_id, read.mask, read.target).total.backward()
        optimiser.step()

    def settled() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    streamed, in_memory, shares = [], [], []
    for number in range(size.wait_rounds):
        with Stream([bench.cache], batch=batch, seed=number, device=device) as stream:
            kept = next(stream)
            step(kept)  # warms up
            begun, waited = settled(), stream.stats().wait_seconds
            for read in islice(stream, size.steps):
                step(read)
            taken = settled() - begun
            waited = stream.stats().wait_seconds - waited
        begun = settled()
        for _ in range(size.steps):
            step(kept)
        streamed.append(taken / size.steps)
        in_memory.append((settled() - begun) / size.steps)
        shares.append(waited / taken)
    slower = [a / b for a, b in zip(streamed, in_memory, strict=True)]
    return {
        "batch": batch,
        "step_seconds": statistics.median(streamed),
        "step_seconds_in_memory": statistics.median(in_memory),
        "ratio_in_memory": statistics.median(slower),
        "range": [min(slower), max(slower)],
        "wait_share": statistics.median(shares),
    }


@contextmanager
def link(folder: Path, *, rate: float | None) -> Iterator[int]:
    """A folder served by another process; the port."""
    script = Path(__file__).parent / "link.py"
    limit = [] if rate is None else ["--rate", str(rate)]
    process = subprocess.Popen(
        [sys.executable, script, folder, "--latency", str(LATENCY), *limit],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.stdin.close()
        process.wait(timeout=20)
        process.stdout.close()


def plain_gets(port: int, keys: Sequence[str], *, buffer: int = 1 << 20) -> Pass:
    """Every object whole, one after another over each of a few connections, into memory."""

    def get(worker: int) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", port)
        taken, done = memoryview(bytearray(buffer)), 0
        for key in keys[worker::CONNECTIONS]:
            connection.request("GET", "/" + key)
            response = connection.getresponse()
            assert response.status == 200
            while got := response.readinto(taken):
                done += got
        connection.close()
        return done

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        clock = Clock()
        return clock.passed(sum(pool.map(get, range(CONNECTIONS))))


def remote(bench: Bench, size: Size) -> dict[str, Any]:
    path, batch = bench.cache.path, BATCH
    keys = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
    nbytes = sum((path / key).stat().st_size for key in keys)
    batches = bench.windows // batch

    def epoch(stream: Stream) -> None:
        for _ in islice(stream.blocks(), batches):
            pass

    def both_epochs(port: int) -> tuple[Pass, Pass]:
        mirror = Path(tempfile.mkdtemp(dir=bench.folder))
        clock = Clock()
        cache = open_cache(f"http://127.0.0.1:{port}", mirror=mirror)
        try:
            with bench.stream(cache, batch) as stream:
                epoch(stream)
                first = clock.passed(nbytes)
                assert cache.mirror is not None
                brought = cache.mirror.stats().downloaded_nbytes
                clock = Clock()
                epoch(stream)
                second = clock.passed(bench.nbytes)
                assert cache.mirror.stats().downloaded_nbytes == brought, (
                    "the second epoch is local"
                )
        finally:
            cache.close()
            shutil.rmtree(mirror)
        return first, second

    def local_epoch() -> Pass:
        with bench.stream(bench.cache, batch) as stream:
            epoch(stream)
            clock = Clock()
            epoch(stream)
            return clock.passed(bench.nbytes)

    answer: dict[str, Any] = {}
    for name, rate in (("loopback", None), ("2 Gbit/s", RATE)):
        found: dict[str, list[Pass]] = {n: [] for n in ("link", "first", "second", "local")}
        with link(path, rate=rate) as port:
            for _ in range(size.remote_rounds):
                found["link"].append(plain_gets(port, keys))
                first, second = both_epochs(port)
                found["first"].append(first)
                found["second"].append(second)
                found["local"].append(local_epoch())
        answer[name] = {
            "link": summary(found["link"]),
            "first epoch": {
                **summary(found["first"]),
                "ratio_link": statistics.median(ratios(found, "first", "link")),
            },
            "second epoch": {
                **summary(found["second"]),
                "ratio_local": statistics.median(ratios(found, "second", "local")),
            },
        }
    return {"latency_seconds": LATENCY, "objects": len(keys), "nbytes": nbytes, "links": answer}


def growth(folder: Path, size: Size, *, threads: int) -> dict[str, Any]:
    """Small windows, so that all that is not reading weighs most."""
    part, batch, batches = 256, 256, 60
    caches = {
        shards: Cache.open(
            build(
                folder / f"growing-{shards}",
                windows=shards * part,
                part=part,
                kmers=42,
                masked=6,
                channels=256,
                seed=shards,
            )
        )
        for shards in (1, 10, 100)
    }
    seconds: dict[int, list[float]] = {shards: [] for shards in caches}
    for number in range(size.growth_rounds + 1):
        for shards, cache in caches.items():
            with Stream([cache], batch=batch, seed=0, threads=threads) as stream:
                blocks = stream.blocks()
                # One epoch first: every part opened, every window touched.
                for _ in range(shards + 20):
                    next(blocks)
                begun = perf_counter()
                for _ in range(batches):
                    next(blocks)
                if number:
                    seconds[shards].append((perf_counter() - begun) / batches)
    for cache in caches.values():
        cache.close()
    return {
        "batch": batch,
        "window_nbytes": 36 * 256,
        "batch_seconds": {str(n): statistics.median(some) for n, some in seconds.items()},
        "ratio_100_to_10": statistics.median(
            a / b for a, b in zip(seconds[100], seconds[10], strict=True)
        ),
        "ratio_100_to_1": statistics.median(
            a / b for a, b in zip(seconds[100], seconds[1], strict=True)
        ),
    }


def soak(bench: Bench, *, seconds: float) -> dict[str, Any]:
    """Stream decoded batches and watch the memory that is the process's own."""
    statm, page = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE")

    def held() -> int:
        _, whole, shared, *_ = map(int, statm.read_text().split())
        return (whole - shared) * page

    before = held()
    times: list[float] = []
    nbytes: list[int] = []
    batches = 0
    with bench.stream(bench.cache, BATCH) as stream:
        begun = perf_counter()
        while (now := perf_counter() - begun) < seconds:
            next(stream)
            batches += 1
            if not times or now - times[-1] >= seconds / 480:
                times.append(now)
                nbytes.append(held())
        stats = stream.stats()
    # The first eighth is for the slots to fill and the allocator to settle.
    settled = len(times) // 8
    slope = float(np.polyfit(times[settled:], nbytes[settled:], 1)[0])
    return {
        "benchmark": "stream, soak",
        "seconds": seconds,
        "batches": batches,
        "gigabytes": stats.nbytes / 1e9,
        "prefetch_nbytes": PREFETCH,
        "rss_before": before,
        "rss_settled": nbytes[settled],
        "rss_most": max(nbytes),
        "rss_last": nbytes[-1],
        "rss_slope_bytes_per_minute": slope * 60,
        "hardware": machine(),
        "commit": commit(),
    }


def measure(
    bench: Bench, size: Size, *, sections: Sequence[str], names: Sequence[str]
) -> dict[str, Any]:
    check(bench, batch=BATCH)
    answer: dict[str, Any] = {"benchmark": "stream"}
    began = perf_counter()

    def say(section: str) -> None:
        print(f"{perf_counter() - began:6.1f} s  {section}", file=sys.stderr, flush=True)

    if "local" in sections:
        say("local")
        found = answer["local"] = local(bench, size)
        usual = found[f"warm, batches of {BATCH}"]
        against = usual["against_raw_read"]
        answer["ratio_raw_read"] = against["stream"]["ratio"]
        answer["ratio_raw_read_always"] = against["stream, always"]["ratio"]
        answer["ratio_raw_read_never"] = against["stream, never"]["ratio"]
        answer["ratio_raw_read_decoded"] = against["stream, decoded"]["ratio"]
        answer["ratio_memcpy"] = usual["against_memcpy"]
        answer["ratio_peers"] = {"np.memmap": usual["against_memmap"]}
    if "peers" in sections:
        say("peers")
        answer.update(peers(bench, size, names=names))
        ratio = {name: told["ratio"] for name, told in answer["peers"].items()}
        answer["ratio_peers"] = {**answer.get("ratio_peers", {}), **ratio}
    if "wait" in sections:
        say("wait")
        answer["wait"] = {"cpu": wait(bench, size, device="cpu", batch=size.wait_batch)}
        if torch.cuda.is_available():
            answer["wait"]["cuda"] = wait(bench, size, device="cuda", batch=256)
        answer["wait_share"] = answer["wait"]["cpu"]["wait_share"]
    if "remote" in sections:
        say("remote")
        answer["remote"] = remote(bench, size)
    if "growth" in sections:
        say("growth")
        answer["growth"] = growth(bench.folder, size, threads=bench.threads)
    say("done")
    return {
        **answer,
        "windows": bench.windows,
        "nbytes": bench.nbytes,
        "rounds": size.rounds,
        "threads": bench.threads,
        "versions": {
            "had-pipe": had_pipe.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "torch": torch.__version__,
            "zarr": zarr.__version__,
        },
        "hardware": machine(),
        "commit": commit(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast batches leave a cache.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="0.6 GB (the default)")
    sizes.add_argument("--full", action="store_true", help="2.4 GB, more rounds")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where to build the cache (a fast disk)")
    parser.add_argument("--cache", type=Path, help="a sealed cache to read instead")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="readers (one a core)"
    )
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument(
        "--peers", nargs="+", default=(), help="their names, or plain, zarr, torch, mds"
    )
    parser.add_argument("--soak", nargs="?", type=float, const=480.0, metavar="SECONDS")
    chosen = parser.parse_args(arguments)
    size = FULL if chosen.full else QUICK
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-stream-", dir=chosen.folder))
    try:
        path = chosen.cache or build(folder / "cache", windows=size.windows, part=size.part)
        with Cache.open(path) as cache:
            bench = Bench(cache, folder, threads=chosen.threads)
            if chosen.soak is not None:
                result = soak(bench, seconds=chosen.soak)
            else:
                result = measure(bench, size, sections=chosen.only, names=chosen.peers)
    finally:
        shutil.rmtree(folder)
    if chosen.soak is None:
        print(text(result))
    if chosen.json or chosen.soak is not None:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
