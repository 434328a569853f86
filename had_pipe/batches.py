"""What a teacher is shown at once, and how its answer comes to the host.

How many windows fit into its device's memory, embedding them, and copies that a GPU makes while it
goes on computing. Knows no cache.

W windows of a batch, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from had_pipe.dna.kmers import reverse_complement
from had_pipe.errors import StorageError
from had_pipe.teachers.teacher import Teacher

# A batch is large enough to keep the device busy and small enough for its memory.
_WINDOWS_ON_CPU = 16
_KMERS_ON_CPU = _WINDOWS_ON_CPU * 170
_KMERS_ON_CUDA = 1 << 15

_BUDGET = 0.9
"""Share of a device's memory that a forward pass may take: the rest is for what follows it, and
for what the allocator cannot use."""


# How many


class Memory(Protocol):
    """A device's memory, as far as `fit_batch` asks."""

    def clear(self) -> None:
        """Give back what nothing holds any more, and begin to watch."""

    def used(self, array: Any) -> tuple[int, int]:
        """Most bytes held at once since then, and bytes that could be, on an array's device."""


def fit_batch(teacher: Teacher, *, kmers: int, part: int, memory: Memory | None = None) -> int:
    """Windows to show a teacher at once, at most a part's.

    On a CPU it follows from `kmers` alone. On CUDA the teacher is run on as many as keep a GPU
    busy, and on half of them again and again until they fit; `memory` has any device tried so.
    Raises StorageError where one window does not fit.
    """
    if memory is None:
        if not on_cuda(teacher):
            return max(1, min(_WINDOWS_ON_CPU, _KMERS_ON_CPU // kmers, part))
        memory = _CudaMemory()
    windows = _evenly(part, _KMERS_ON_CUDA // kmers)
    while (too_many := _what_is_short(teacher, windows, kmers, memory)) is not None:
        if windows == 1:
            raise StorageError(
                f"{teacher.name}: not even one window of {kmers:,} k-mers fits into the memory of "
                f"its device ({too_many}); end what else runs there, or take shorter windows "
                "([windows] bases), a smaller teacher or a larger device"
            )
        windows = halved(windows, part)
    return windows


def on_cuda(teacher: Teacher) -> bool:
    return str(teacher.numerics.get("device", "")).startswith("cuda")


def halved(windows: int, part: int) -> int:
    """Half a batch, or one window."""
    return _evenly(part, windows // 2)


def _evenly(part: int, limit: int) -> int:
    """A batch of at most `limit`, such that the last of a part is hardly ever much shorter."""
    batches = -(-part // max(1, min(limit, part)))
    return -(-part // batches)


def _what_is_short(teacher: Teacher, windows: int, kmers: int, memory: Memory) -> str | None:
    """Run so many windows for the sake of memory alone: what there was too little of, or None."""
    shown = np.zeros((windows, kmers), dtype=np.uint16)
    memory.clear()
    try:
        peak, room = memory.used(teacher.embed(shown, np.zeros(shown.shape, dtype=np.bool_)))
    except Exception as error:
        if not out_of_memory(error):
            raise
        return in_short(error)
    if peak <= _BUDGET * room:
        return None
    return f"{peak / 1e9:,.2f} GB are needed, {room / 1e9:,.2f} GB could be had"


class _CudaMemory:
    """CUDA's, by torch's own allocator."""

    def clear(self) -> None:
        import torch

        torch.cuda.empty_cache()
        for device in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(device)

    def used(self, array: Any) -> tuple[int, int]:
        import torch

        if isinstance(array, np.ndarray):  # a teacher that brings its vectors home by itself
            return 0, 1
        torch.cuda.synchronize(array.device)
        free, _ = torch.cuda.mem_get_info(array.device)
        peak = torch.cuda.max_memory_allocated(array.device)
        return peak, free + torch.cuda.memory_reserved(array.device)


def out_of_memory(error: BaseException) -> bool:
    """Whether a device had too little memory."""
    torch = sys.modules.get("torch")  # where it is not loaded, nobody raises its errors
    return torch is not None and isinstance(error, torch.OutOfMemoryError)


def in_short(error: BaseException) -> str:
    """What torch says of memory, without its advice."""
    told = str(error).splitlines()[:1] or [type(error).__name__]
    head, free, _ = told[0].partition(" is free")
    return (head + free)[:300].rstrip(".")


@contextmanager
def enough_memory(doing: str) -> Iterator[None]:
    """Raises StorageError in the place of torch's error where a device's memory does not do."""
    try:
        yield
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise StorageError(
            f"{doing}: the device ran out of memory ({in_short(error)}); end what else runs there, "
            "then run the same command again"
        ) from error


# Embedding them


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
    if isinstance(embedding, np.ndarray):
        return embedding[np.arange(windows)[:, None], kept]
    import torch

    row = torch.arange(windows, device=embedding.device)
    return embedding[row[:, None], like(kept, embedding)]


def stored_groups(store: str, mask_WT: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Which groups of each window are stored, (W, G)."""
    kept = {"visible": ~mask_WT, "masked": mask_WT, "all": np.ones_like(mask_WT)}[store]
    return np.nonzero(kept)[1].reshape(len(mask_WT), -1)


def finite_windows(embedding: Any) -> Any:
    """Which windows hold numbers only, (W), in the library and on the device of an embedding."""
    if isinstance(embedding, np.ndarray):
        return np.isfinite(embedding).all(axis=(1, 2))
    return embedding.isfinite().flatten(1).all(1)


def not_finite(embedding: Any) -> int | None:
    """The first window with NaN or infinity, or None; waits for the device."""
    return first_without(to_numpy(finite_windows(embedding)))


def first_without(good_W: npt.NDArray[np.bool_]) -> int | None:
    return None if good_W.all() else int(np.argmin(good_W))


# To the device and back


def like(array: npt.NDArray[Any], other: Any) -> Any:
    """An array in the library and on the device of another; nobody waits for that."""
    if isinstance(other, np.ndarray):
        return array
    import torch

    here = torch.from_numpy(array.copy())
    if not other.is_cuda:
        return here.to(other.device)
    return here.pin_memory().to(other.device, non_blocking=True)


def to_numpy(array: Any) -> npt.NDArray[Any]:
    """An array or tensor on the host; bfloat16, which NumPy lacks, as float32."""
    if isinstance(array, np.ndarray):
        return array
    if str(array.dtype) == "torch.bfloat16":
        array = array.float()
    host: npt.NDArray[Any] = array.cpu().numpy()
    return host


Arrival = Callable[[], Sequence[npt.NDArray[Any]]]
"""Waits for arrays that are on their way to the host, and gives them."""


class SideStream:
    """Copies from a CUDA device to the host beside what it computes.

    Whoever sends waits for nothing; whoever wants the arrays waits for their copies alone.
    """

    def __init__(self, device: Any) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, arrays: Sequence[Any]) -> Arrival:
        """Start the way of tensors that the current stream is about to compute."""
        import torch

        # A teacher's tensors may be those of inference mode, and stay so.
        with torch.inference_mode():
            there = [array.contiguous() for array in arrays]
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            arrived = torch.cuda.Event(blocking=True)  # whoever waits sleeps
            with torch.cuda.stream(self._stream):
                here = []
                for array in there:
                    # From torch's cache of pinned memory, where it goes back once it was written.
                    host = torch.empty(array.shape, dtype=array.dtype, pin_memory=True)
                    here.append(host.copy_(array, non_blocking=True))
                    array.record_stream(self._stream)  # its memory is not anybody's before that
                arrived.record(self._stream)

        def arrays_here() -> Sequence[npt.NDArray[Any]]:
            arrived.synchronize()
            return [host.numpy() for host in here]

        return arrays_here


def side_stream(embedding: Any) -> SideStream | None:
    """For what is computed where an embedding lies; None on the host, where nothing travels."""
    if isinstance(embedding, np.ndarray) or not embedding.is_cuda:
        return None
    return SideStream(embedding.device)
