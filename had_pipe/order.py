"""Which windows come when: integer arithmetic on counter-based draws, the same on every machine.

It knows no cache, only how many windows there are and how many a shard holds. Nothing as long as
an epoch is kept: what is drawn for is a run of rows, and places are computed from the runs.

S shards, N runs of rows, C streams, P places, M places of a cycle.
"""

from __future__ import annotations

import heapq
import math
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from had_pipe.draws import Purpose, draws, permutation
from had_pipe.errors import RecipeError

Rows = npt.NDArray[np.int64]

ORDER_VERSION = 1
"""Changes whenever a seed would give another order: a run goes on only with the order it began."""

# Eight streams spread a batch over eight shards; two shards of each are mixed at a time, so a
# reader (or a download) is never further ahead than 16 shards. Rows were shuffled when the cache
# was planned, so this is as good as random access, and a run of 32 rows is one long read.
_STREAMS = 8
_GROUP = 2
_RUN = 32

_BLOCK = 1 << 15
"""Places computed in one go."""
_EPOCHS = 4
"""Epochs kept: those around the one in use, and one where `needs` looks ahead."""
_MOST_WINDOWS = 1 << 31
"""Of an epoch: twice its square must be an int64."""
_LONGEST_CYCLE = 10_000


@dataclass(frozen=True)
class Corpus:
    """What the order needs to know of one cache: how many windows, and how many a shard holds."""

    windows: int
    part: int


@dataclass(frozen=True)
class Places:
    """What lies at some consecutive places of the order."""

    cache_P: Rows
    epoch_P: Rows
    row_P: Rows


class Need(NamedTuple):
    """A shard that is needed in one epoch, from one place to another."""

    cache: int
    epoch: int
    shard: int
    first: int
    last: int


class Mix:
    """The order of the windows of several caches: what is at which place, for ever.

    Without weights all windows of all caches make one epoch. With them every cache has an order
    and epochs of its own, and a fixed cycle says which cache a place belongs to: after any number
    of places no cache is a whole window away from its share, and every stretch as long as a cycle
    has exactly that of each.
    """

    def __init__(
        self, corpora: Sequence[Corpus], *, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        """RecipeError where weights are no weights, or no small whole numbers."""
        self.windows = sum(corpus.windows for corpus in corpora)
        if weights is None:
            self._orders = [Order(corpora, seed=seed)]
            cycle = [0]
        else:
            cycle = _cycle(whole_weights(weights, len(corpora)))
            self._orders = [Order([one], seed=seed, key=i) for i, one in enumerate(corpora)]
        self._caches = len(corpora)
        self._cycle_M = np.array(cycle, dtype=np.int64)
        each = [self._cycle_M == i for i in range(len(self._orders))]
        self._slots = [np.flatnonzero(mine_M) for mine_M in each]
        self._before = [np.concatenate([[0], np.cumsum(mine_M)]) for mine_M in each]
        self._first_window = np.cumsum([0, *(corpus.windows for corpus in corpora)])
        self._first_shard = np.cumsum([0, *(-(-one.windows // one.part) for one in corpora)])

    def at(self, first: int, count: int) -> Places:
        """What lies at places `first` to `first + count`."""
        if len(self._orders) == 1:
            epoch_P, number_P = self._orders[0].at(first, count)
            if self._caches == 1:
                return Places(np.zeros(count, dtype=np.int64), epoch_P, number_P)
            cache_P = np.searchsorted(self._first_window, number_P, side="right") - 1
            return Places(cache_P, epoch_P, number_P - self._first_window[cache_P])
        # A stretch of places is a stretch of every cache's own order.
        cache_P = self._cycle_M[np.arange(first, first + count) % len(self._cycle_M)]
        epoch_P, row_P = np.empty_like(cache_P), np.empty_like(cache_P)
        for i, order in enumerate(self._orders):
            begin, end = self._passed(i, first), self._passed(i, first + count)
            if begin < end:
                mine_P = cache_P == i
                epoch_P[mine_P], row_P[mine_P] = order.at(begin, end - begin)
        return Places(cache_P, epoch_P, row_P)

    def epochs(self, places: int) -> float:
        """Epochs passed after so many places; with weights, of the cache that is seen slowest."""
        return min(self._passed(i, places) / order.windows for i, order in enumerate(self._orders))

    def coming(self, first: int) -> Iterator[Need]:
        """The shards that places from `first` on need, by the first of these places; endless.

        A shard comes once in every epoch; `first` of it is no place before `first`.
        """
        return heapq.merge(
            *(self._needs(i, first) for i in range(len(self._orders))), key=attrgetter("first")
        )

    def _passed(self, i: int, places: int) -> int:
        """How many of so many places belong to an order."""
        cycles, rest = divmod(places, len(self._cycle_M))
        return cycles * len(self._slots[i]) + int(self._before[i][rest])

    def _needs(self, i: int, first: int) -> Iterator[Need]:
        slots = self._slots[i]

        def place(own: Rows) -> list[int]:
            """Of windows of this order: their places among all."""
            found: list[int] = (
                own // len(slots) * len(self._cycle_M) + slots[own % len(slots)]
            ).tolist()
            return found

        for epoch, shard_S, begin_S, end_S in self._orders[i].needs(self._passed(i, first)):
            cache_S = np.full_like(shard_S, i)
            if len(self._orders) == 1:
                cache_S = np.searchsorted(self._first_shard, shard_S, side="right") - 1
                shard_S = shard_S - self._first_shard[cache_S]
            for cache, shard, begin, end in zip(
                cache_S.tolist(), shard_S.tolist(), place(begin_S), place(end_S), strict=True
            ):
                yield Need(cache, epoch, shard, begin, end)


class Order:
    """Every epoch a permutation of all windows; any place of any epoch without those before it.

    Windows are numbered through: those of the first corpus, then those of the second. Per epoch
    the shards are permuted and dealt to at most eight streams; within a stream, groups of two
    shards are cut into runs of 32 rows and the runs permuted; the streams are merged in
    proportion to their lengths, so that every stretch takes its share of every stream. All of it
    is integer arithmetic on counter-based draws keyed by (seed, key, epoch). Safe to share
    between threads.
    """

    def __init__(self, corpora: Sequence[Corpus], *, seed: int, key: int = 0) -> None:
        """`key` tells orders of one seed apart."""
        self.windows = sum(corpus.windows for corpus in corpora)
        assert 0 < self.windows < _MOST_WINDOWS
        assert 0 <= key < 1 << 16
        self._seed = seed
        self._key = key
        self._rows_S = np.concatenate(
            [
                np.minimum(corpus.part, corpus.windows - np.arange(0, corpus.windows, corpus.part))
                for corpus in corpora
            ]
        )
        self._known: OrderedDict[int, _Epoch] = OrderedDict()
        self._ahead: tuple[int, threading.Thread] | None = None
        self._lock = threading.Lock()
        self._block = (-1, -1, np.empty(0, dtype=np.int64))

    def epoch(self, epoch: int) -> Rows:
        """The numbers of all windows in the order of one epoch, (P,)."""
        return self._epoch(epoch).numbers(0, self.windows)

    def at(self, first: int, count: int) -> tuple[Rows, Rows]:
        """The epochs and the window numbers of places `first` to `first + count`, both (P,)."""
        epoch_P, number_P = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, place = divmod(first + done, self.windows)
            number = self._numbers(epoch, place)[: count - done]
            epoch_P[done : done + len(number)] = epoch
            number_P[done : done + len(number)] = number
            done += len(number)
        return epoch_P, number_P

    def needs(self, first: int) -> Iterator[tuple[int, Rows, Rows, Rows]]:
        """From place `first` on, epoch by epoch: its number; the shards in the order of their
        first need, and the places of their first and last, numbered through all epochs, each (S,).
        """
        epoch, place = divmod(first, self.windows)
        while True:
            shard_S, begin_S, end_S = self._epoch(epoch).needs(place)
            yield epoch, shard_S, begin_S + epoch * self.windows, end_S + epoch * self.windows
            epoch, place = epoch + 1, 0

    def _numbers(self, epoch: int, place: int) -> Rows:
        """Some of an epoch's numbers from a place on: to the end of their block."""
        first = place - place % _BLOCK
        known_epoch, known_first, numbers = self._block
        if (known_epoch, known_first) != (epoch, first):
            end = min(first + _BLOCK, self.windows)
            numbers = self._epoch(epoch).numbers(first, end)
            self._block = (epoch, first, numbers)  # as one: threads may share us
            if 4 * end >= 3 * self.windows > 3 * _BLOCK:  # a small one is made sooner than a thread
                self._begin(epoch + 1)
        return numbers[place - first :]

    def _epoch(self, epoch: int) -> _Epoch:
        with self._lock:
            ahead = self._ahead
        if ahead is not None and ahead[0] == epoch:
            ahead[1].join()
        with self._lock:
            known = self._known.get(epoch)
            if known is not None:
                self._known.move_to_end(epoch)
                return known
        # Outside the lock: two threads may both make it, which only costs time.
        known = self._permute(epoch)
        self._keep(epoch, known)
        return known

    def _begin(self, epoch: int) -> None:
        """Make an epoch in the background, so that no step waits for it."""
        with self._lock:
            if epoch in self._known or (self._ahead is not None and self._ahead[0] == epoch):
                return
            # It ends by itself: there is nothing to close.
            thread = threading.Thread(
                target=self._prepare, args=(epoch,), name="had-pipe-order", daemon=True
            )
            thread.start()
            self._ahead = (epoch, thread)

    def _prepare(self, epoch: int) -> None:
        try:
            made = self._permute(epoch)
        except MemoryError:
            return  # whoever needs it makes it then, and says what is wrong
        self._keep(epoch, made)

    def _keep(self, epoch: int, made: _Epoch) -> None:
        with self._lock:
            self._known[epoch] = made
            while len(self._known) > _EPOCHS:
                self._known.popitem(last=False)

    def _permute(self, epoch: int) -> _Epoch:
        assert 0 <= epoch < 1 << 40 or self._key == 0
        address = (self._key << 40) + epoch
        shards = len(self._rows_S)
        streams = min(_STREAMS, shards)
        dealt_S = np.empty(shards, dtype=np.int64)
        dealt_S[permutation(Purpose.EPOCH_SHARDS, self._seed, address, shards)] = np.arange(shards)
        stream_S, group_S = dealt_S % streams, dealt_S // streams // _GROUP
        runs_S = -(-self._rows_S // _RUN)
        shard_N = np.repeat(np.arange(shards), runs_S)
        key_N = draws(
            Purpose.EPOCH_RUNS, self._seed, address, first=0, rows=len(shard_N), columns=1
        )[:, 0]
        # The last key is the first to decide; lexsort is stable, so equal draws keep their order.
        run_N = np.lexsort((key_N, (stream_S * shards + group_S)[shard_N]))
        shard_N = shard_N[run_N]
        within_N = (run_N - (np.cumsum(runs_S) - runs_S)[shard_N]) * _RUN
        first_S = np.cumsum(self._rows_S) - self._rows_S
        return _Epoch(
            length_C=[int(self._rows_S[stream_S == c].sum()) for c in range(streams)],
            shard_N=shard_N.astype(np.int32),
            first_N=(first_S[shard_N] + within_N).astype(np.int32),
            rows_N=np.minimum(_RUN, self._rows_S[shard_N] - within_N),
        )


class _Epoch:
    """One permutation: runs of neighbouring windows, stream after stream.

    Window i of a stream of L is due at (2i + 1) W / L, rounded down; windows stand by when they
    are due, those due at once by their stream. So how many windows of each stream come before a
    place, and at which place a window comes, is computed from lengths alone.
    """

    def __init__(
        self,
        *,
        length_C: Sequence[int],
        shard_N: npt.NDArray[np.int32],
        first_N: npt.NDArray[np.int32],
        rows_N: Rows,
    ) -> None:
        self._windows = sum(length_C)
        self._length_C = length_C
        length = np.array(length_C, dtype=np.int64)
        self._base_C: Rows = np.cumsum(length) - length
        self._shard_N, self._first_N = shard_N, first_N
        self._begin_N = (np.cumsum(rows_N) - rows_N).astype(np.int32)
        """Where a run begins, counted through all streams."""

    def numbers(self, first: int, end: int) -> Rows:
        """The numbers of the windows at places `first` to `end`."""
        windows = self._windows
        due, through = [], []
        for length, base, begin, stop in zip(
            self._length_C, self._base_C, self._counts(first), self._counts(end), strict=True
        ):
            own = np.arange(begin, stop, dtype=np.int64)
            due.append((2 * own + 1) * windows // length)
            through.append(own + base)
        through_P = np.concatenate(through)[np.argsort(np.concatenate(due), kind="stable")]
        run_P = np.searchsorted(self._begin_N, through_P, side="right") - 1
        numbers: Rows = through_P + (self._first_N[run_P] - self._begin_N[run_P])
        return numbers

    def needs(self, place: int) -> tuple[Rows, Rows, Rows]:
        """Shards needed from a place on, by the first, and the places of the first and last."""
        from_C = self._base_C + self._counts(place)
        begin_N = self._begin_N.astype(np.int64)
        end_N = np.append(begin_N[1:], self._windows)
        stream_N = np.searchsorted(self._base_C, begin_N, side="right") - 1
        left_N = end_N > from_C[stream_N]
        stream_N, shard_N = stream_N[left_N], self._shard_N[left_N]
        begin_S = np.full(int(self._shard_N.max()) + 1, self._windows, dtype=np.int64)
        end_S = np.zeros_like(begin_S)
        stream_S = np.zeros_like(begin_S)
        np.minimum.at(begin_S, shard_N, np.maximum(begin_N[left_N], from_C[stream_N]))
        np.maximum.at(end_S, shard_N, end_N[left_N] - 1)
        stream_S[shard_N] = stream_N
        shard_S = np.unique(shard_N).astype(np.int64)
        stream_S = stream_S[shard_S]
        begin_S = self._places(stream_S, begin_S[shard_S])
        end_S = self._places(stream_S, end_S[shard_S])
        by = np.argsort(begin_S)
        return shard_S[by], begin_S[by], end_S[by]

    def _counts(self, place: int) -> list[int]:
        """How many windows of each stream come before a place."""

        def before(due: int) -> list[int]:
            # (2i + 1) W < due L: so many i; rounding down changes nothing, as due is whole.
            return [
                min(length, -(-due * length // self._windows) // 2) for length in self._length_C
            ]

        # Each stream is within half a window of its share, so the answer is near 2 * place.
        slack = len(self._length_C) + 2
        dues = range(max(0, 2 * place - slack), 2 * place + slack)
        due = dues[bisect_right(dues, place, key=lambda due: sum(before(due))) - 1]
        counts = before(due)
        left = place - sum(counts)
        for c, after in enumerate(before(due + 1)):
            if left and after > counts[c]:  # its next one is due now, at most one of a stream
                counts[c] += 1
                left -= 1
        assert not left
        return counts

    def _places(self, stream_K: Rows, through_K: Rows) -> Rows:
        """At which places some windows come, given by their streams and counted through all."""
        windows, length_C = self._windows, np.array(self._length_C, dtype=np.int64)
        own_K = through_K - self._base_C[stream_K]
        due_K = (2 * own_K + 1) * windows // length_C[stream_K]
        place_K = own_K.copy()
        for c, length in enumerate(self._length_C):
            # Of streams before ours also what is due at once.
            due = due_K + (c < stream_K)
            others = np.minimum(length, -(-due * length // windows) // 2)
            place_K += np.where(stream_K == c, 0, others)
        return place_K


def whole_weights(weights: Sequence[float], caches: int) -> list[int]:
    """Weights as the smallest whole numbers in their proportion; RecipeError if there are none."""
    told = f"[train] weights = [{', '.join(str(weight) for weight in weights)}]"
    if len(weights) != caches:
        raise RecipeError(
            f"{told}: {len(weights)} for {caches} caches; give one for each, in their order"
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise RecipeError(f"{told}: must be finite and above 0; leave out a cache that weighs 0")
    # As they are written: 0.1 is a tenth, not the nearest double.
    exact = [Fraction(str(weight)) for weight in weights]
    unit = math.lcm(*(weight.denominator for weight in exact))
    whole = [int(weight * unit) for weight in exact]
    whole = [weight // math.gcd(*whole) for weight in whole]
    if sum(whole) > _LONGEST_CYCLE:
        raise RecipeError(
            f"{told}: as whole numbers these add up to {sum(whole):,}, and at most "
            f"{_LONGEST_CYCLE:,} can be kept to; give small whole numbers, such as [3, 1]"
        )
    return whole


def _cycle(weights: Sequence[int]) -> list[int]:
    """Which cache each of sum(weights) places belongs to, spread evenly.

    Window k of a cache of weight w may come from k M / w on and has to before (k + 1) M / w. Of
    those that may, the one that has to soonest comes, which always keeps to all.
    """
    length = sum(weights)
    cycle: list[int] = []
    done = [0] * len(weights)
    waiting = [(0, i) for i in range(len(weights))]
    ready: list[tuple[int, int]] = []
    for place in range(length):
        while waiting and waiting[0][0] <= place:
            _, i = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(done[i] + 1) * length // weights[i]), i))
        _, i = heapq.heappop(ready)
        cycle.append(i)
        done[i] += 1
        if done[i] < weights[i]:
            heapq.heappush(waiting, (done[i] * length // weights[i], i))
    return cycle
