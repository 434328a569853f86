"""WebDataset: tar files of one shard's windows, a shuffle buffer, batches made in the workers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import webdataset as wds
from peer import Array, Peer, serve

BUFFER = 512


class WebDataset(Peer):
    packages = ("webdataset", "torch")

    def prepare(self) -> None:
        with wds.ShardWriter(
            f"{self.job.folder}/%06d.tar", maxcount=self.job.part, verbose=0
        ) as writer:
            for row, window in enumerate(self.job.source()):
                writer.write({"__key__": f"{row:09d}", "npy": np.ascontiguousarray(window)})

    def open(self) -> None:
        torch.set_num_threads(1)
        shards = -(-self.job.windows // self.job.part)
        urls = f"{self.job.folder}/{{000000..{shards - 1:06d}}}.tar"
        dataset = (
            wds.WebDataset(urls, shardshuffle=shards)
            .shuffle(BUFFER)
            .decode()
            .to_tuple("npy")
            .map_tuple(torch.from_numpy)
            .batched(self.job.batch)
        )
        self._loader = wds.WebLoader(
            dataset, batch_size=None, num_workers=self.job.threads, persistent_workers=True
        )

    def epoch(self) -> Iterator[Array]:
        for (batch,) in self._loader:
            yield batch.numpy()


if __name__ == "__main__":
    serve(WebDataset)
