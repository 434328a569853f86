"""How fast shuffled batches leave a cache, against other ways to read the same bytes.

    python benchmarks/stream.py [--quick | --full] [--json] [--folder DIR] [--threads N]

A cache of the shape NT-v2-500M makes of 1,020-base windows (144 visible groups, 1,024 channels,
int8) is built in a temporary folder. First the batches are checked: every window once an epoch,
equal to what zarr-python reads and to NumPy's decoding. Then rounds of

    raw read            the shard files from end to end, `preadv` into reused batch buffers
    memcpy              the same bytes from memory to memory
    stream              shuffled batches as stored, CRC on first touch (all touched before)
    stream, always      the same, CRC at every read, as in the first epoch of a run
    stream, decoded     the same, decoded to float32 on the CPU (a GPU does this in training)
    np.memmap           np.take of the same rows from one flat file into a reused buffer
    zarr-python         the same rows through its array API, a slice for each run of neighbours
                        (its orthogonal selection of the same rows was ten times slower)

are interleaved; a stream's time begins when it runs at its steady pace. Every figure is the median
over rounds, every ratio the median of the rounds' own ratios. All read from the page cache: this
measures software, not a disk. Each contender has the same threads, except that np.memmap has one
and zarr-python its own pool. At last a student trains for some steps, for the share of its time
that it waits for data.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
import zarr

import had_pipe
from had_pipe.cache import Cache, integrity, writer
from had_pipe.cache.codec import Statistics
from had_pipe.cache.layout import Part
from had_pipe.dna import kmers
from had_pipe.objectives import HADObjective
from had_pipe.stream import Stream
from had_pipe.students import HADConfig, HADModel, spell

KMERS, MASKED, CHANNELS = 170, 26, 1024
VISIBLE = KMERS - MASKED
WINDOW_NBYTES = VISIBLE * CHANNELS
AHEAD = 4
"""Batches a stream reads before its time is taken: no more than it reads ahead at any time."""


@dataclass(frozen=True)
class Size:
    windows: int
    part: int
    rounds: int
    batch: int
    zarr_batches: int
    """zarr-python reads so many batches a round: it would take all the time."""
    steps: int


QUICK = Size(windows=2048, part=256, rounds=5, batch=256, zarr_batches=1, steps=3)
FULL = Size(windows=16_384, part=1024, rounds=9, batch=256, zarr_batches=4, steps=16)


def build(folder: Path, *, windows: int, part: int) -> Path:
    """A sealed cache of random numbers, of the real shape."""
    rng = np.random.default_rng(0)
    kmer_id = rng.integers(0, kmers.KMERS, (windows, KMERS), dtype=np.uint16)
    settings: dict[str, Any] = {"seed": 0, "view": 0, "first": 0, "windows": windows}
    mask = kmers.group_masks(**settings, kmers=KMERS, masked=MASKED)
    index = np.arange(windows)
    zeros = np.zeros(windows, dtype=np.int32)
    table = writer.WindowTable(
        genome=zeros,
        contig=zeros,
        contigs=["random"],
        start=index * KMERS * kmers.K,
        soft_masked_bases=zeros,
        index=index,
    )
    described = {
        "format": "had-cache/1",
        "genomes": [
            {
                "name": "random",
                "digest": "0" * 32,
                "contigs": 1,
                "bases": windows * KMERS * kmers.K,
                "splits": None,
                "include": None,
                "exclude": None,
                "sensitive": False,
            }
        ],
        "windows": {
            "bases": KMERS * kmers.K,
            "stride": KMERS * kmers.K,
            "kmers": KMERS,
            "masked": MASKED,
            "mask_ratio": 0.15,
            "stored": VISIBLE,
            "store": "visible",
            "views": 1,
            "reverse_complement": 0.5,
            "seed": 0,
            "algorithm": 1,
        },
        "part": part,
        "teacher": {
            "name": "random numbers",
            "revision": None,
            "weights_sha256": "0" * 64,
            "layer": -1,
            "input": "masked",
            "channels": CHANNELS,
            "dtype": "float32",
            "licence": "CC0-1.0",
        },
        "codec": "int8",
        "licence": "CC0-1.0",
        "licence_reason": None,
    }
    plan = writer.create(
        folder,
        described=described,
        splits={
            "train": writer.SplitData(
                table=table,
                kmer_id=kmer_id,
                mask={0: mask},
                reversed={0: kmers.strand_flips(**settings, probability=0.5)},
            )
        },
        statistics=Statistics(
            mean=rng.normal(size=CHANNELS).astype(np.float32),
            std=rng.uniform(0.5, 2, size=CHANNELS).astype(np.float32),
        ),
        fidelity={},
    )
    for place in plan.parts():
        rows = plan.part_windows(place)
        shape = (rows, VISIBLE, CHANNELS)
        with writer.PartWriter(folder, plan, place, numerics={"device": "none"}) as opened:
            opened.append(
                rng.integers(-127, 128, shape, dtype=np.int8),
                rng.uniform(0.005, 0.02, shape[:2]).astype(np.float16),
            )
            opened.sync()
            opened.commit()
    integrity.seal(folder)
    return folder


def check(cache: Cache, *, batch: int) -> None:
    """Stop unless the batches are right; what is fast and wrong is not worth timing."""
    root = zarr.open_group(cache.path / "data.zarr", mode="r")
    value, scale = (root[f"train/0/embedding/{name}"] for name in ("value", "scale"))
    windows = cache.rows("train")
    with Stream([cache], batch=batch, seed=0) as stream:
        places = [stream.spans(position) for position in range(windows // batch)]
        rows = np.concatenate([span.row for spans in places for span in spans])
        assert windows % batch == 0
        assert np.array_equal(np.sort(rows), np.arange(windows))
        for read in islice(stream, 2):
            row = read.spans[0].row
            stored = value.oindex[row].astype(np.float32)
            stored *= scale.oindex[row].astype(np.float32)[..., None]
            np.testing.assert_allclose(
                read.target.numpy(), stored * cache.std + cache.mean, rtol=1e-5, atol=1e-5
            )


class Contenders:
    """Each reads an epoch of windows, or what it is given, and tells its bytes a second."""

    def __init__(self, cache: Cache, folder: Path, *, size: Size, threads: int) -> None:
        self._size, self._threads = size, threads
        plan = cache.plan
        shards = [
            cache.path / Part("train", 0, number).shard_key(plan.signals[0])
            for number in range(-(-size.windows // size.part))
        ]
        self._files = [os.open(path, os.O_RDONLY) for path in shards]
        self._pool = ThreadPoolExecutor(threads)
        shape = (size.batch, VISIBLE, CHANNELS)
        # All write into memory of one batch a thread, as the stream does.
        self._buffers = [np.zeros(shape, dtype=np.int8) for _ in range(threads)]
        with Stream([cache], batch=size.batch, seed=0) as stream:
            self._rows = [
                stream.spans(position)[0].row for position in range(size.windows // size.batch)
            ]
        self._first = Cache.open(cache.path)
        self._always = Cache.open(cache.path, check="always")
        flat = folder / "flat.bin"
        with flat.open("wb") as file:
            for first in range(0, size.windows, size.batch):
                # Every window is touched here, so that the first touch is over.
                block = self._first.allocate(size.batch)
                rows = np.arange(first, first + size.batch)
                self._first.read("train", 0, rows, block)
                file.write(block.value.tobytes())
        self._flat = np.memmap(flat, dtype=np.int8, mode="r", shape=(size.windows, *shape[1:]))
        self._source = np.fromfile(flat, dtype=np.int8, count=size.windows // 4 * WINDOW_NBYTES)
        self._zarr: Any = zarr.open_array(
            cache.path / "data.zarr/train/0/embedding/value", mode="r"
        )
        rows = self._rows[0]
        self.zarr_python()
        last = self._rows[size.zarr_batches - 1]
        assert np.array_equal(self._buffers[0], self._flat[last])
        assert np.array_equal(self._zarr.oindex[rows[:4]], self._flat[rows[:4]])

    def raw_read(self) -> float:
        def read(worker: int) -> int:
            buffer, done = self._buffers[worker], 0
            for file in self._files[worker :: self._threads]:
                offset = 0
                while got := os.preadv(file, [buffer], offset):
                    offset += got
                done += offset
            return done

        begun = perf_counter()
        return sum(self._pool.map(read, range(self._threads))) / (perf_counter() - begun)

    def memcpy(self) -> float:
        nbytes = self._buffers[0].nbytes
        pieces = self._source[: len(self._source) // nbytes * nbytes].reshape(
            -1, *self._buffers[0].shape
        )

        def copy(worker: int) -> int:
            mine = pieces[worker :: self._threads]
            for piece in mine:
                np.copyto(self._buffers[worker], piece)
            return mine.nbytes

        begun = perf_counter()
        return sum(self._pool.map(copy, range(self._threads))) / (perf_counter() - begun)

    def stream(self) -> float:
        return self._stream(self._first)

    def stream_always(self) -> float:
        return self._stream(self._always)

    def _stream(self, cache: Cache) -> float:
        with self._open(cache) as stream:
            blocks = stream.blocks()
            for _ in range(AHEAD):
                next(blocks)
            begun, done = perf_counter(), 0
            for batch in islice(blocks, len(self._rows)):
                done += sum(block.value.nbytes for block in batch)
            return done / (perf_counter() - begun)

    def stream_decoded(self) -> float:
        """In bytes as stored, to compare."""
        with self._open(self._first) as stream:
            next(stream)
            begun, done = perf_counter(), 0
            for batch in islice(stream, max(1, len(self._rows) // 4)):
                done += len(batch.target) * WINDOW_NBYTES
            return done / (perf_counter() - begun)

    def memmap(self) -> float:
        taken, begun = self._buffers[0], perf_counter()
        for rows in self._rows:
            np.take(self._flat, rows, axis=0, out=taken, mode="clip")
        return len(self._rows) * taken.nbytes / (perf_counter() - begun)

    def zarr_python(self) -> float:
        taken, begun = self._buffers[0], perf_counter()
        for rows in self._rows[: self._size.zarr_batches]:
            breaks = np.flatnonzero(np.diff(rows) != 1) + 1
            for first, end in pairwise([0, *breaks, len(rows)]):
                taken[first:end] = self._zarr[rows[first] : rows[first] + end - first]
        return self._size.zarr_batches * taken.nbytes / (perf_counter() - begun)

    def _open(self, cache: Cache) -> Stream:
        return Stream([cache], batch=self._size.batch, seed=0, threads=self._threads)


def rounds(contenders: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Bytes a second of each contender in each round, in turn, the order turned every round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(count + 1):
        names = list(contenders)
        for name in names if number % 2 else reversed(names):
            rate = contenders[name]()
            if number:  # the first round warms up
                found[name].append(rate)
    return found


def ratio(found: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(found[one], found[other], strict=True))


def wait_share(cache: Cache, *, steps: int) -> float:
    """Of the time of training steps of the default student, 16 windows each."""
    torch.manual_seed(0)
    student = HADModel(HADConfig())
    objective = HADObjective(hidden_size=128, channels=CHANNELS)
    optimiser = torch.optim.AdamW([*student.parameters(), *objective.parameters()], lr=1e-3)
    with Stream([cache], batch=16, seed=0) as stream:
        begun, waited = perf_counter(), 0.0
        for step, batch in enumerate(islice(stream, steps + 1)):
            optimiser.zero_grad()
            feat = student(spell(batch.kmer_id, batch.mask)).last_hidden_state
            objective(feat, batch.kmer_id, batch.mask, batch.target).total.backward()
            optimiser.step()
            if step == 0:
                begun, waited = perf_counter(), stream.wait_seconds
        return (stream.wait_seconds - waited) / (perf_counter() - begun)


def machine() -> dict[str, Any]:
    """What a later version must be held against."""
    cpu = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
    }


def commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown"


def measure(size: Size, *, threads: int, folder: Path) -> dict[str, Any]:
    cache = Cache.open(build(folder / "cache", windows=size.windows, part=size.part))
    check(cache, batch=size.batch)
    contenders = Contenders(cache, folder, size=size, threads=threads)
    found = rounds(
        {
            "raw read": contenders.raw_read,
            "memcpy": contenders.memcpy,
            "stream": contenders.stream,
            "stream, always": contenders.stream_always,
            "stream, decoded": contenders.stream_decoded,
            "np.memmap": contenders.memmap,
            "zarr-python": contenders.zarr_python,
        },
        size.rounds,
    )
    return {
        "benchmark": "stream",
        "ratio_raw_read": ratio(found, "stream", "raw read"),
        "ratio_raw_read_always": ratio(found, "stream, always", "raw read"),
        "ratio_raw_read_decoded": ratio(found, "stream, decoded", "raw read"),
        "ratio_memcpy": ratio(found, "stream", "memcpy"),
        "ratio_peers": {
            name: ratio(found, "stream", name) for name in ("np.memmap", "zarr-python")
        },
        "wait_share": wait_share(cache, steps=size.steps),
        "gigabytes_per_second": {
            name: statistics.median(rates) / 1e9 for name, rates in found.items()
        },
        "windows": size.windows,
        "nbytes": size.windows * WINDOW_NBYTES,
        "batch": size.batch,
        "rounds": size.rounds,
        "threads": threads,
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


def table(result: dict[str, Any]) -> str:
    rates = result["gigabytes_per_second"]
    lines = [
        f"{result['nbytes'] / 1e9:.2f} GB in {result['windows']:,} windows, batches of "
        f"{result['batch']}, {result['threads']} threads, median of {result['rounds']} rounds",
        "",
        f"{'':<18}{'GB/s':>8}{'x raw read':>12}",
        *(
            f"{name:<18}{rate:>8.2f}{rate / rates['raw read']:>12.3f}"
            for name, rate in rates.items()
        ),
        "",
        f"stream / raw read    {result['ratio_raw_read']:.3f}   "
        f"(CRC always {result['ratio_raw_read_always']:.3f}, "
        f"decoded on the CPU {result['ratio_raw_read_decoded']:.3f})",
        f"stream / memcpy      {result['ratio_memcpy']:.3f}",
        *(f"stream / {name:<12}{value:.2f}" for name, value in result["ratio_peers"].items()),
        f"a training step waits {result['wait_share']:.2%} of its time (16 windows, on the CPU)",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast batches leave a cache.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="0.3 GB (the default)")
    sizes.add_argument("--full", action="store_true", help="2.4 GB")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where to build the cache (a fast disk)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="readers (one a core)"
    )
    chosen = parser.parse_args(arguments)
    size = FULL if chosen.full else QUICK
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-stream-", dir=chosen.folder))
    try:
        result = measure(size, threads=chosen.threads, folder=folder)
    finally:
        shutil.rmtree(folder)
    print(table(result))
    if chosen.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
