"""Arrow: an IPC file mapped into memory and taken from without a copy, or Parquet by row groups.

In IPC a column is one tensor of fixed shape and np.take reads rows out of its mapped memory. In
Parquet a row group holds as many windows as the stream's runs (32), plain and uncompressed: what
is random has nothing to compress or to look up.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from peer import Array, Job, Peer, serve

RUN = 32


class Ipc(Peer):
    packages = ("pyarrow",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        self._taken = job.buffer()

    def prepare(self) -> None:
        windows = self.job.source()
        kind = pa.fixed_shape_tensor(pa.int8(), self.job.window)
        schema = pa.schema([("value", kind)])
        with (
            pa.OSFile(f"{self.job.folder}/windows.arrow", "wb") as file,
            pa.ipc.new_file(file, schema) as writer,
        ):
            for first in range(0, self.job.windows, self.job.part):
                some = np.ascontiguousarray(windows[first : first + self.job.part])
                column = pa.FixedShapeTensorArray.from_numpy_ndarray(some)
                writer.write_batch(pa.record_batch([column], schema=schema))

    def open(self) -> None:
        self._map = pa.memory_map(f"{self.job.folder}/windows.arrow", "r")
        table = pa.ipc.open_file(self._map).read_all()
        self._shards = [
            chunk.to_numpy_ndarray().reshape(len(chunk), *self.job.window)
            for chunk in table.column("value").chunks
        ]

    def epoch(self) -> Iterator[Array]:
        part = self.job.part
        for rows in self.job.rows:
            for place, first, end in self.job.runs(rows):
                base = first // part * part
                shard = self._shards[first // part]
                self._taken[place : place + end - first] = shard[first - base : end - base]
            yield self._taken[: len(rows)]


class Parquet(Peer):
    packages = ("pyarrow",)

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        pa.set_cpu_count(job.threads)
        self._taken = job.buffer()

    def prepare(self) -> None:
        windows = self.job.source()
        schema = pa.schema([("value", pa.binary(self.job.nbytes))])
        with pq.ParquetWriter(
            f"{self.job.folder}/windows.parquet", schema, compression="none", use_dictionary=False
        ) as writer:
            for first in range(0, self.job.windows, RUN):
                some = np.ascontiguousarray(windows[first : first + RUN])
                column = pa.FixedSizeBinaryArray.from_buffers(
                    schema.field("value").type, len(some), [None, pa.py_buffer(some)]
                )
                writer.write_table(pa.table([column], schema=schema), row_group_size=RUN)

    def open(self) -> None:
        self._file = pq.ParquetFile(f"{self.job.folder}/windows.parquet", memory_map=True)

    def epoch(self) -> Iterator[Array]:
        nbytes = self.job.nbytes
        for rows in self.job.rows:
            row = np.array(rows)
            groups = np.unique(row // RUN)
            held = (groups[:, None] * RUN + np.arange(RUN)).reshape(-1)
            wanted = np.isin(held, row)
            column = self._file.read_row_groups(groups.tolist()).column("value")
            read = place = 0
            for chunk in column.chunks:
                first = chunk.offset * nbytes
                flat = np.frombuffer(chunk.buffers()[1], dtype=np.int8)
                some = flat[first : first + len(chunk) * nbytes].reshape(-1, *self.job.window)
                here = wanted[read : read + len(chunk)]
                end = place + np.count_nonzero(here)
                self._taken[place:end] = some if here.all() else some[here]
                read, place = read + len(chunk), end
            yield self._taken[:place]


if __name__ == "__main__":
    serve({"ipc": Ipc, "parquet": Parquet}[sys.argv[1]])
