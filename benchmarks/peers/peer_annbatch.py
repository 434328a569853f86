"""annbatch: its own sharded writer, and its Loader through zarrs, as its documentation says.

A window is a dense observation, a chunk 32 of them, as the documentation's example fetches them.
Chunks are not compressed: what is random has nothing to compress. Rows were shuffled before they
were written, as annbatch asks for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import anndata as ad
import numpy as np
import zarr
from annbatch import Loader, write_sharded
from peer import Array, Job, Peer, serve

CHUNK = 32
CHUNKS = 16
"""Fetched at once: two batches of 256."""


class Annbatch(Peer):
    packages = ("annbatch", "anndata", "zarr", "zarrs")

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        warnings.filterwarnings("ignore")
        zarr.config.set(
            {
                "codec_pipeline.path": "zarrs.ZarrsCodecPipeline",
                "threading.max_workers": job.threads,
            }
        )

    def prepare(self) -> None:
        part = self.job.part
        windows = self.job.source().reshape(self.job.windows, -1)
        for number in range(-(-self.job.windows // part)):
            some = np.ascontiguousarray(windows[number * part : (number + 1) * part])
            group = zarr.open_group(f"{self.job.folder}/{number}.zarr", mode="w")
            write_sharded(
                group, ad.AnnData(X=some), n_obs_per_chunk=CHUNK, shard_size=part, compressors=()
            )

    def open(self) -> None:
        self._arrays = [
            zarr.open_array(f"{self.job.folder}/{number}.zarr/X", mode="r")
            for number in range(-(-self.job.windows // self.job.part))
        ]
        self._loader = Loader(
            batch_size=self.job.batch,
            chunk_size=CHUNK,
            preload_nchunks=CHUNKS,
            shuffle=True,
            preload_to_gpu=False,
            to=None,
        )
        for array in self._arrays:
            self._loader.add_dataset(array)

    def epoch(self) -> Iterator[Array]:
        for batch in self._loader:
            yield np.ascontiguousarray(batch["X"]).reshape(-1, *self.job.window)


if __name__ == "__main__":
    serve(Annbatch)
