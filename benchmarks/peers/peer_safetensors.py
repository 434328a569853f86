"""safetensors: a tensor a file of one shard's windows, read by slices of it."""

from __future__ import annotations

from collections.abc import Iterator

from peer import Array, Job, Peer, serve
from safetensors import safe_open
from safetensors.numpy import save_file


class Safetensors(Peer):
    packages = ("safetensors",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._taken = job.buffer()

    def prepare(self) -> None:
        windows = self.job.source()
        for first in range(0, self.job.windows, self.job.part):
            shard = windows[first : first + self.job.part]
            save_file({"value": shard}, self.folder / f"{first // self.job.part}.safetensors")

    def open(self) -> None:
        shards = range(-(-self.job.windows // self.job.part))
        self._files = [
            safe_open(self.folder / f"{number}.safetensors", framework="numpy") for number in shards
        ]
        self._slices = [file.get_slice("value") for file in self._files]

    def epoch(self) -> Iterator[Array]:
        part = self.job.part
        for rows in self.job.rows:
            for place, first, end in self.job.runs(rows):
                base = first // part * part
                read = self._slices[first // part][first - base : end - base]
                self._taken[place : place + end - first] = read
            yield self._taken[: len(rows)]


if __name__ == "__main__":
    serve(Safetensors)
