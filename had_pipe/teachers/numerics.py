"""The class of arithmetic: what of a machine and of libraries decides a teacher's last bits."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import get_args

import torch

from had_pipe.teachers.teacher import Precision

_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def compute_dtype(device: torch.device, asked: Precision = "auto") -> torch.dtype:
    """What matrix products are in; "auto" takes what is fast on the device.

    Half precision is for tensor cores and for a CPU's tiles (AMX); on another CPU it is slower and
    less exact.
    """
    assert asked in get_args(Precision)
    if asked == "auto":
        tiles = device.type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if tiles else torch.float32
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def numerics(
    device: torch.device, *, compute: torch.dtype, kernels: str, **more: str
) -> Mapping[str, str | int]:
    """The class as plain data; `more` names other libraries that compute."""
    return {
        "torch": torch.__version__.split("+")[0],
        **more,
        "kernels": kernels,
        "dtype": dtype_name(compute),
        **_machine(device),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine(device: torch.device) -> dict[str, str | int]:
    """What of a device decides the last bits of its sums."""
    if device.type == "cuda":
        # Of two builds of one torch, each brings matrix products of its own.
        build = torch.version.cuda or torch.version.hip or "unknown"
        return {"device": f"cuda:{torch.cuda.get_device_name(device)}", "cuda": build}
    # By it MKL is told to sum in one order, whatever the machine, its threads and the batch.
    mkl = os.environ.get("MKL_CBWR")
    return {
        "device": device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        **({"mkl": mkl} if mkl else {}),
    }


def fit_threads() -> None:
    """Take no more threads than this process may use processors, where nobody said how many.

    In a container torch counts the machine's: with a share of them, threads wait for each other.
    """
    if os.environ.get("OMP_NUM_THREADS") or os.environ.get("MKL_NUM_THREADS"):
        return
    usable = usable_processors()
    if usable < torch.get_num_threads():
        torch.set_num_threads(usable)


def usable_processors(*, cgroups: Path = _CGROUPS, own: Path = _OWN_CGROUPS) -> int:
    """Processors that this process may use at once, by its affinity and its cgroup's quota."""
    count = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        count = len(os.sched_getaffinity(0))
    for quota, period in _quotas(cgroups, own):
        count = min(count, math.ceil(quota / period))
    return max(1, count)


def _quotas(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Microseconds of processor time a period, of this process's cgroup and of those above it."""
    try:
        lines = own.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        if not line.startswith("0::/"):  # version 1
            continue
        here = cgroups / line[len("0::/") :]
        for folder in (here, *here.parents):
            if folder.is_relative_to(cgroups):
                try:
                    quota, period = map(int, (folder / "cpu.max").read_text().split())
                except (OSError, ValueError):  # the root has none; "max" is none
                    continue
                yield quota, period
