"""MosaicML Streaming: MDS shards of 64 MiB, StreamingDataset in torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from peer import Array, Peer, serve
from torch.utils.data import DataLoader

try:
    import torchvision  # noqa: F401  # what streaming imports for columns of images
except RuntimeError:
    # Built for CUDA, beside a torch built without: its operators are not there, nor needed here.
    OPERATORS = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        OPERATORS.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

from streaming import MDSWriter, StreamingDataset


class Mds(Peer):
    packages = ("mosaicml-streaming", "torch")

    def prepare(self) -> None:
        shape = ",".join(map(str, self.job.window))
        with MDSWriter(
            out=f"{self.job.folder}/mds", columns={"value": f"ndarray:int8:{shape}"}
        ) as out:
            for window in self.job.source():
                out.write({"value": np.ascontiguousarray(window)})

    def open(self) -> None:
        torch.set_num_threads(1)
        dataset = StreamingDataset(
            local=f"{self.job.folder}/mds", batch_size=self.job.batch, shuffle=True
        )
        self._loader = DataLoader(
            dataset,
            batch_size=self.job.batch,
            num_workers=self.job.threads,
            persistent_workers=True,
        )

    def epoch(self) -> Iterator[Array]:
        for batch in self._loader:
            yield batch["value"].numpy()


if __name__ == "__main__":
    serve(Mds)
