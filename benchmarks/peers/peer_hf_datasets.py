"""HF datasets: an Arrow dataset of 2-D arrays, shuffled as an IterableDataset in a DataLoader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, disable_progress_bars, load_from_disk
from peer import Array, Peer, serve
from torch.utils.data import DataLoader


class HfDatasets(Peer):
    packages = ("datasets", "pyarrow", "torch")

    def prepare(self) -> None:
        disable_progress_bars()
        features = Features({"value": Array2D(self.job.window, "int8")})

        def windows() -> Iterator[dict[str, Array]]:
            for window in self.job.source():
                yield {"value": np.asarray(window)}

        dataset = Dataset.from_generator(
            windows, features=features, cache_dir=f"{self.job.folder}/made", writer_batch_size=64
        )
        dataset.save_to_disk(f"{self.job.folder}/saved", num_shards=8)

    def open(self) -> None:
        torch.set_num_threads(1)
        dataset = load_from_disk(f"{self.job.folder}/saved").with_format("torch", dtype=torch.int8)
        self._loader = DataLoader(
            dataset,
            batch_size=self.job.batch,
            shuffle=True,
            num_workers=self.job.threads,
            persistent_workers=True,
        )

    def epoch(self) -> Iterator[Array]:
        for batch in self._loader:
            yield batch["value"].numpy()


if __name__ == "__main__":
    serve(HfDatasets)
