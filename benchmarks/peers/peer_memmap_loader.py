"""torch's DataLoader over np.memmap, with a worker for each core that others have threads for.

`window` is what most people write: a window an item, collated by the loader. `batch` is what
torch's documentation advises where whole batches can be read at once: a sampler of batches and
`batch_size=None`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import torch
from peer import Array, Job, Peer, serve
from torch.utils.data import DataLoader, Dataset, Sampler


class Windows(Dataset[torch.Tensor]):
    def __init__(self, job: Job) -> None:
        self._windows = np.memmap(
            f"{job.folder}/windows.bin", dtype=np.int8, mode="r", shape=(job.windows, *job.window)
        )

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, row: int | list[int]) -> torch.Tensor:
        if isinstance(row, list):
            return torch.from_numpy(np.take(self._windows, row, axis=0))
        return torch.from_numpy(self._windows[row].copy())


class Batches(Sampler[list[int]]):
    def __init__(self, rows: list[list[int]]) -> None:
        self._rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


class MemmapLoader(Peer):
    packages = ("torch",)

    def __init__(self, job: Job, item: str) -> None:
        super().__init__(job)
        self._whole = item == "batch"
        torch.set_num_threads(1)

    def prepare(self) -> None:
        self.job.source().tofile(f"{self.job.folder}/windows.bin")

    def open(self) -> None:
        windows, workers = Windows(self.job), self.job.threads
        if self._whole:
            self._loader = DataLoader(
                windows,
                batch_size=None,
                sampler=Batches(self.job.rows),
                num_workers=workers,
                persistent_workers=True,
            )
        else:
            self._loader = DataLoader(
                windows,
                batch_size=self.job.batch,
                shuffle=True,
                num_workers=workers,
                persistent_workers=True,
            )

    def epoch(self) -> Iterator[Array]:
        for batch in self._loader:
            yield batch.numpy()


if __name__ == "__main__":
    serve(MemmapLoader, sys.argv[1])
