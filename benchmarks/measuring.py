"""What every benchmark needs: passes with their CPU seconds, rounds, and what they ran on."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import resource
import statistics
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar

import torch

Done = TypeVar("Done")


@dataclass(frozen=True)
class Pass:
    """What one contender did in one round."""

    nbytes: int
    seconds: float
    cpu_seconds: float

    @property
    def rate(self) -> float:
        return self.nbytes / self.seconds


class Clock:
    """Wall and CPU time of this process, with all its threads, since it was made."""

    def __init__(self) -> None:
        self._cpu = _cpu_seconds()
        self._begun = perf_counter()

    def passed(self, nbytes: int) -> Pass:
        seconds = perf_counter() - self._begun
        return Pass(nbytes, seconds, _cpu_seconds() - self._cpu)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def rounds(contenders: Mapping[str, Callable[[], Done]], count: int) -> dict[str, list[Done]]:
    """What each contender did in each round, in turn, the order turned every round."""
    found: dict[str, list[Done]] = {name: [] for name in contenders}
    for number in range(count + 1):
        names = list(contenders)
        for name in names if number % 2 else reversed(names):
            done = contenders[name]()
            if number:  # the first round warms up
                found[name].append(done)
    return found


def ratios(found: Mapping[str, list[Pass]], one: str, other: str) -> list[float]:
    """How many times as fast one was as the other, round by round."""
    return [a.rate / b.rate for a, b in zip(found[one], found[other], strict=True)]


def settled(device: torch.device) -> float:
    """What the clock says once a device has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter()


def summary(passes: list[Pass]) -> dict[str, float]:
    return {
        "gigabytes_per_second": statistics.median(done.rate for done in passes) / 1e9,
        "cpu_seconds_per_gigabyte": statistics.median(
            done.cpu_seconds / done.nbytes * 1e9 for done in passes
        ),
    }


def evict(paths: Iterable[Path]) -> None:
    """Ask the kernel to forget the contents of files; what is not yet on disk is written first."""
    for path in paths:
        with _opened(path) as fd:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def resident(paths: Iterable[Path]) -> float:
    """Which share of the pages of files is in memory."""
    held = whole = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for path in paths:
        nbytes = path.stat().st_size
        if not nbytes:
            continue
        pages = -(-nbytes // mmap.PAGESIZE)
        told = (ctypes.c_ubyte * pages)()
        # A private mapping that may be written is one that ctypes can take the address of.
        with _opened(path) as fd, mmap.mmap(fd, nbytes, access=mmap.ACCESS_COPY) as mapped:
            first = ctypes.c_char.from_buffer(mapped)
            failed = libc.mincore(
                ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(nbytes), told
            )
            del first
            if failed:
                raise OSError(ctypes.get_errno(), "mincore")
        held += sum(page & 1 for page in told)
        whole += pages
    return held / whole


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)


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
