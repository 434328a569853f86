"""How fast parts reach the disk, and how fast a cache is verified.

    python benchmarks/store.py [--quick | --full] [--json] [--folder DIR] [--threads N]

A cache of the shape NT-v2-500M makes of 1,020-base windows (144 visible groups, 1,024 channels,
int8) is built in a temporary folder. First its bytes are checked: every object against hashlib,
rows against what was handed in, and a flipped bit against `verify`. Then rounds of

    write and fsync     the shards' bytes, one file after another, and each file's folder
    writer, one part    the same bytes by the part writer: CRCs, SHA-256, index, receipt, renames
    writer, two parts   two parts at a time, as extraction has them written (on a GPU, three)

    sha256              every file of the cache by hashlib, as many at once as there are cores
    verify              the same files by `cache verify`, with all else that it looks at

are interleaved, the order turned every round. What a part's bytes cost at each step is told beside
it: where one core's SHA-256 is slower than the disk, the writer cannot be faster than that on one
part. Every figure is the median over rounds, every ratio the median of the rounds' own ratios. What
is hashed comes from the page cache: this measures software, not a disk.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import crc32c
import numpy as np
from measuring import commit, machine
from synthetic import CHANNELS, VISIBLE, build

import had_pipe
from had_pipe.cache import Cache, Part, integrity, writer
from had_pipe.cache.layout import MANIFEST, WORK, read_manifest
from had_pipe.durable import make_folder, sync_folder

BATCH = 16


@dataclass(frozen=True)
class Size:
    windows: int
    part: int
    rounds: int


QUICK = Size(windows=2048, part=256, rounds=5)
FULL = Size(windows=16_384, part=1024, rounds=9)


def check(path: Path) -> None:
    """Stop unless verification is right; what is fast and blind is not worth timing."""
    found = integrity.verify(path)
    assert found.problems == ()
    manifest = read_manifest(path, Cache.open(path).plan)
    assert manifest is not None
    assert found.nbytes == sum(record.nbytes for record in manifest.objects.values())
    for key, record in manifest.objects.items():
        assert hashlib.sha256((path / key).read_bytes()).hexdigest() == record.sha256, key
    shard = path / next(key for key in manifest.objects if "embedding/value/c/" in key)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    spoilt = [problem.key for problem in integrity.verify(path).problems]
    assert spoilt == [shard.relative_to(path).as_posix()]
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)


class Contenders:
    """Each writes, or reads, all parts, and tells its bytes a second."""

    def __init__(self, path: Path, folder: Path, *, size: Size, threads: int) -> None:
        self._path, self._folder, self._threads = path, folder, threads
        cache = Cache.open(path)
        self._plan = cache.plan
        self._parts = list(cache.plan.parts())
        self._files = [file for file in path.rglob("*") if file.is_file()]
        # A part in memory, written again and again as each of them.
        block = cache.allocate(size.part)
        cache.read("train", 0, np.arange(size.part), block)
        assert block.scale is not None
        self._arrays = (block.value, block.scale)
        first = Part("train", 0, 0)
        self._shards = [
            (path / first.shard_key(signal)).read_bytes() for signal in cache.plan.signals
        ]
        self.part_nbytes = sum(map(len, self._shards))
        self._target = folder / "written"
        shutil.copytree(path, self._target)
        (self._target / MANIFEST).unlink()
        make_folder(self._target / WORK)

    def plainly(self) -> float:
        aside = self._folder / "plain"
        aside.mkdir()
        begun = perf_counter()
        for part in self._parts:
            for number, data in enumerate(self._shards):
                with (aside / f"{part.number}-{number}").open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                sync_folder(aside)
        seconds = perf_counter() - begun
        shutil.rmtree(aside)
        return len(self._parts) * self.part_nbytes / seconds

    def writer(self, at_once: int) -> float:
        for part in self._parts:
            (self._target / part.receipt_key).unlink()
            for signal in self._plan.signals:
                (self._target / part.shard_key(signal)).unlink()
        begun = perf_counter()
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(self._write, self._parts))
        seconds = perf_counter() - begun
        for signal, data in zip(self._plan.signals, self._shards, strict=True):
            assert (self._target / self._parts[-1].shard_key(signal)).read_bytes() == data
        return len(self._parts) * self.part_nbytes / seconds

    def _write(self, part: Part) -> None:
        numerics = {"device": "none"}
        with writer.PartWriter(self._target, self._plan, part, numerics=numerics) as out:
            for first in range(0, self._plan.part, BATCH):
                out.append(*(array[first : first + BATCH] for array in self._arrays))
            out.sync()
            out.commit()

    def sha256(self) -> float:
        def digest(path: Path) -> int:
            with path.open("rb") as file:
                hashlib.file_digest(file, "sha256")
            return path.stat().st_size

        begun = perf_counter()
        with ThreadPoolExecutor(self._threads) as pool:
            nbytes = sum(pool.map(digest, self._files))
        return nbytes / (perf_counter() - begun)

    def verify(self) -> float:
        begun = perf_counter()
        found = integrity.verify(self._path, threads=self._threads)
        seconds = perf_counter() - begun
        assert found.problems == ()
        return found.nbytes / seconds

    def steps(self) -> dict[str, float]:
        """Bytes a second of each thing that is done to a part's bytes, alone on one core."""
        value = self._arrays[0]
        rows = np.empty((len(value), value[0].nbytes + 4), dtype=np.uint8)
        flat = value.view(np.uint8).reshape(len(value), -1)
        data = self._shards[0]
        aside = self._folder / "step"

        def copy() -> None:
            rows[:, :-4] = flat

        def crcs() -> None:
            for row in flat:
                crc32c.crc32c(row.data)

        def digest() -> None:
            hashlib.sha256(data)

        def write() -> None:
            with aside.open("wb") as file:
                file.write(data)

        def sync() -> None:
            descriptor = os.open(aside, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)

        spent: dict[str, list[float]] = {}
        for _ in range(5):
            for step in (copy, crcs, digest, write, sync):
                begun = perf_counter()
                step()
                spent.setdefault(step.__name__, []).append(perf_counter() - begun)
            aside.unlink()
        return {name: len(data) / statistics.median(some) for name, some in spent.items()}


def rounds(contenders: dict[str, Callable[[], float]], count: int) -> dict[str, list[float]]:
    """Bytes a second of each contender in each round, in turn, the order turned every round."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(count + 1):
        for name in contenders if number % 2 else reversed(contenders):
            rate = contenders[name]()
            if number:  # the first round warms up
                found[name].append(rate)
    return found


def ratios(found: dict[str, list[float]], one: str, other: str) -> list[float]:
    return [a / b for a, b in zip(found[one], found[other], strict=True)]


def measure(size: Size, folder: Path, *, threads: int) -> dict[str, Any]:
    path = build(folder / "cache", windows=size.windows, part=size.part)
    check(path)
    contenders = Contenders(path, folder, size=size, threads=threads)
    found = rounds(
        {
            "write and fsync": contenders.plainly,
            "writer, one part": lambda: contenders.writer(1),
            "writer, two parts": lambda: contenders.writer(2),
            "sha256": contenders.sha256,
            "verify": contenders.verify,
        },
        size.rounds,
    )
    written = ratios(found, "writer, two parts", "write and fsync")
    alone = ratios(found, "writer, one part", "write and fsync")
    verified = ratios(found, "verify", "sha256")
    return {
        "benchmark": "store",
        "ratio_raw_write": statistics.median(written),
        "ratio_raw_write_one_part": statistics.median(alone),
        "ratio_sha256": statistics.median(verified),
        "ranges": {
            "ratio_raw_write": [min(written), max(written)],
            "ratio_raw_write_one_part": [min(alone), max(alone)],
            "ratio_sha256": [min(verified), max(verified)],
        },
        "gigabytes_per_second": {
            name: statistics.median(rates) / 1e9 for name, rates in found.items()
        },
        "step_gigabytes_per_second": {
            name: rate / 1e9 for name, rate in contenders.steps().items()
        },
        "nbytes": len(list(Cache.open(path).plan.parts())) * contenders.part_nbytes,
        "bytes_per_window": VISIBLE * CHANNELS,
        "windows": size.windows,
        "part": size.part,
        "rounds": size.rounds,
        "threads": threads,
        "versions": {
            "had-pipe": had_pipe.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "hardware": machine(),
        "commit": commit(),
    }


def table(result: dict[str, Any]) -> str:
    rates, ranges = result["gigabytes_per_second"], result["ranges"]

    def against(name: str, key: str) -> str:
        low, high = ranges[key]
        return f"{name:<20}{rates[name]:>6.2f}   x {result[key]:.3f}   ({low:.3f} to {high:.3f})"

    steps = ", ".join(f"{k} {v:.2f}" for k, v in result["step_gigabytes_per_second"].items())
    return "\n".join(
        [
            f"{result['nbytes'] / 1e9:.2f} GB in parts of {result['part']} windows, "
            f"{result['threads']} threads, median of {result['rounds']} rounds",
            "",
            f"{'':<20}{'GB/s':>6}",
            f"{'write and fsync':<20}{rates['write and fsync']:>6.2f}",
            against("writer, one part", "ratio_raw_write_one_part"),
            against("writer, two parts", "ratio_raw_write"),
            f"  a core's GB/s     {steps}",
            "",
            f"{'sha256':<20}{rates['sha256']:>6.2f}",
            against("verify", "ratio_sha256"),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Writing parts, and verifying a cache.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="0.3 GB (the default)")
    sizes.add_argument("--full", action="store_true", help="2.4 GB")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--folder", type=Path, help="where to write (a fast disk)")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="hashing (one a core)"
    )
    chosen = parser.parse_args(arguments)
    folder = Path(tempfile.mkdtemp(prefix="had-pipe-store-", dir=chosen.folder))
    try:
        result = measure(FULL if chosen.full else QUICK, folder, threads=chosen.threads)
    finally:
        shutil.rmtree(folder)
    print(table(result))
    if chosen.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
