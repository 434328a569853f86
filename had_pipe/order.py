"""Which windows come when: pure integer arithmetic on counter-based draws.

It knows no cache, only how many windows there are and how many a shard holds: the same numbers
give the same order on every machine.

W windows of an epoch, N runs of rows, P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from had_pipe.draws import Purpose, draws, permutation

Rows = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Changes whenever a seed would give another order: a run goes on only with the order it began."""

# Eight streams spread a batch over eight shards; two shards of each are mixed at a time, so a
# reader (or a download) is never further ahead than 16 shards. Rows were shuffled when the cache
# was planned, so this is as good as random access, and a run of 32 rows is one long read.
_STREAMS = 8
_GROUP = 2
_RUN = 32


@dataclass(frozen=True)
class Corpus:
    """What the order needs to know of one cache: how many windows, and how many a shard holds."""

    windows: int
    part: int


class Order:
    """Every epoch a permutation of all windows; any place of any epoch without those before it.

    Windows are numbered through: those of the first corpus, then those of the second. Per epoch
    the shards are permuted and dealt to at most eight streams; within a stream, groups of two
    shards are cut into runs of 32 rows and the runs permuted; the streams are merged in
    proportion to their lengths, so that every stretch takes its share of every stream. All of it
    is integer arithmetic on counter-based draws keyed by (seed, epoch).
    """

    def __init__(self, corpora: Sequence[Corpus], *, seed: int) -> None:
        self.windows = sum(corpus.windows for corpus in corpora)
        assert self.windows > 0
        self._seed = seed
        shard_first: list[int] = []
        shard_rows: list[int] = []
        for corpus in corpora:
            base = sum(shard_rows)
            for first in range(0, corpus.windows, corpus.part):
                shard_first.append(base + first)
                shard_rows.append(min(corpus.part, corpus.windows - first))
        self._shards = len(shard_rows)
        rows = np.array(shard_rows, dtype=np.int64)
        runs = -(-rows // _RUN)
        self._shard_N = np.repeat(np.arange(self._shards), runs)
        within_N = np.arange(len(self._shard_N)) - np.repeat(np.cumsum(runs) - runs, runs)
        self._first_N = np.array(shard_first, dtype=np.int64)[self._shard_N] + within_N * _RUN
        self._rows_N = np.minimum(_RUN, rows[self._shard_N] - within_N * _RUN)
        self._known: dict[int, Rows] = {}

    def epoch(self, epoch: int) -> Rows:
        """The numbers of all windows in the order of one epoch, (W,)."""
        if epoch not in self._known:
            self._known = {e: order for e, order in self._known.items() if e == epoch - 1}
            self._known[epoch] = self._permute(epoch)
        return self._known[epoch]

    def at(self, first: int, count: int) -> tuple[Rows, Rows]:
        """The epochs and the window numbers of places `first` to `first + count`, both (P,)."""
        place_P = np.arange(first, first + count, dtype=np.int64)
        epoch_P = place_P // self.windows
        number_P = np.empty(count, dtype=np.int64)
        for epoch in np.unique(epoch_P):
            here = epoch_P == epoch
            number_P[here] = self.epoch(int(epoch))[place_P[here] % self.windows]
        return epoch_P, number_P

    def _permute(self, epoch: int) -> Rows:
        dealt = np.empty(self._shards, dtype=np.int64)
        dealt[permutation(Purpose.EPOCH_SHARDS, self._seed, epoch, self._shards)] = np.arange(
            self._shards
        )
        streams = min(_STREAMS, self._shards)
        stream_N = (dealt % streams)[self._shard_N]
        group_N = (dealt // streams // _GROUP)[self._shard_N]
        key_N = draws(
            Purpose.EPOCH_RUNS, self._seed, epoch, first=0, rows=len(self._shard_N), columns=1
        )[:, 0]
        # The last key is the first to decide; lexsort is stable, so equal draws keep their order.
        run_N = np.lexsort((key_N, group_N, stream_N))
        rows_N = self._rows_N[run_N]
        place_W = np.arange(self.windows, dtype=np.int64)
        number_W = place_W + np.repeat(self._first_N[run_N] - (np.cumsum(rows_N) - rows_N), rows_N)
        stream_W = np.repeat(stream_N[run_N], rows_N)
        length = np.bincount(stream_W, minlength=streams)
        within_W = place_W - (np.cumsum(length) - length)[stream_W]
        due_W = (2 * within_W + 1) * self.windows // length[stream_W]
        order: Rows = number_W[np.argsort(due_W, kind="stable")]
        return order
