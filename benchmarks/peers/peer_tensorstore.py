"""tensorstore on the cache's own store: a batch's runs read together, as its Batch is for."""

from __future__ import annotations

from collections.abc import Iterator

import tensorstore as ts
from peer import Array, Job, Peer, serve


class Tensorstore(Peer):
    packages = ("tensorstore",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._taken = job.buffer()

    def open(self) -> None:
        self._array = ts.open(
            {
                "driver": "zarr3",
                "kvstore": {
                    "driver": "file",
                    "path": f"{self.job.cache}/data.zarr/train/0/embedding/value/",
                },
                "context": {
                    "data_copy_concurrency": {"limit": self.job.threads},
                    "file_io_concurrency": {"limit": self.job.threads},
                },
            },
            open=True,
            read=True,
        ).result()

    def epoch(self) -> Iterator[Array]:
        for rows in self.job.rows:
            with ts.Batch() as batch:
                reads = [
                    (place, self._array[first:end].read(batch=batch))
                    for place, first, end in self.job.runs(rows)
                ]
            for place, read in reads:
                some = read.result()
                self._taken[place : place + len(some)] = some
            yield self._taken[: len(rows)]


if __name__ == "__main__":
    serve(Tensorstore)
