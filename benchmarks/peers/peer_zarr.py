"""zarr-python's array API on the cache's own store: with its default codec pipeline, or another.

A slice for each run of neighbours: on these rows ten times as fast as one orthogonal selection.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import zarr
from peer import Array, Job, Peer, serve

PIPELINES = {
    "default": None,
    "fused": "zarr.core.codec_pipeline.FusedCodecPipeline",
    "zarrs": "zarrs.ZarrsCodecPipeline",
}


class Zarr(Peer):
    packages = ("zarr", "numcodecs")

    def __init__(self, job: Job, pipeline: str) -> None:
        super().__init__(job)
        settings: dict[str, object] = {"threading.max_workers": job.threads}
        path = PIPELINES[pipeline]
        if path is not None:
            settings["codec_pipeline.path"] = path
        if pipeline == "fused":
            settings["codec_pipeline.max_workers"] = job.threads
        if pipeline == "zarrs":
            self.packages = (*self.packages, "zarrs")
        zarr.config.set(settings)
        self._taken = job.buffer()

    def open(self) -> None:
        self._array = zarr.open_array(
            f"{self.job.cache}/data.zarr/train/0/embedding/value", mode="r"
        )

    def epoch(self) -> Iterator[Array]:
        for rows in self.job.rows:
            for place, first, end in self.job.runs(rows):
                self._taken[place : place + end - first] = self._array[first:end]
            yield self._taken[: len(rows)]


if __name__ == "__main__":
    serve(Zarr, sys.argv[1])
