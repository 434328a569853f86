"""LitData: `optimize` into chunks of 64 MB, StreamingDataset and StreamingDataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import litdata
import numpy as np
import torch
from peer import Array, Job, Peer, serve


def window(job: Job, row: int) -> dict[str, torch.Tensor]:
    return {"value": torch.from_numpy(np.array(job.source()[row]))}


class LitData(Peer):
    packages = ("litdata", "torch")

    def prepare(self) -> None:
        litdata.optimize(
            fn=partial(window, self.job),
            inputs=list(range(self.job.windows)),
            output_dir=f"{self.job.folder}/chunks",
            chunk_bytes="64MB",
            num_workers=self.job.threads,
        )

    def open(self) -> None:
        torch.set_num_threads(1)
        dataset = litdata.StreamingDataset(f"{self.job.folder}/chunks", shuffle=True)
        self._loader = litdata.StreamingDataLoader(
            dataset,
            batch_size=self.job.batch,
            num_workers=self.job.threads,
            persistent_workers=True,
        )

    def epoch(self) -> Iterator[Array]:
        for batch in self._loader:
            yield batch["value"].numpy()


if __name__ == "__main__":
    serve(LitData)
