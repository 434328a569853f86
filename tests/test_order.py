"""The order of windows, tested on numbers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from had_pipe.draws import Purpose, draws, permutation
from had_pipe.order import Corpus, Order

corpora = st.lists(
    st.builds(Corpus, windows=st.integers(1, 700), part=st.integers(1, 150)),
    min_size=1,
    max_size=3,
)
seeds = st.integers(0, 2**63)


@given(corpora=corpora, seed=seeds, epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_every_window_exactly_once(
    corpora: Sequence[Corpus], seed: int, epoch: int
) -> None:
    order = Order(corpora, seed=seed)
    assert order.windows == sum(corpus.windows for corpus in corpora)
    assert np.array_equal(np.sort(order.epoch(epoch)), np.arange(order.windows))


@given(corpora=corpora, seed=seeds, first=st.integers(0, 3000), count=st.integers(1, 900))
@settings(max_examples=60, deadline=None)
def test_any_place_is_known_without_those_before_it(
    corpora: Sequence[Corpus], seed: int, first: int, count: int
) -> None:
    whole = Order(corpora, seed=seed)
    epochs = -(-(first + count) // whole.windows)
    numbers = np.concatenate([whole.epoch(epoch) for epoch in range(epochs)])
    epoch_P, number_P = Order(corpora, seed=seed).at(first, count)
    assert np.array_equal(number_P, numbers[first : first + count])
    assert np.array_equal(epoch_P, np.arange(first, first + count) // whole.windows)


def by_hand(corpora: Sequence[Corpus], seed: int, epoch: int) -> list[int]:
    """One epoch as its description reads, with lists."""
    shards: list[list[int]] = []
    base = 0
    for corpus in corpora:
        rows = list(range(base, base + corpus.windows))
        shards += [rows[i : i + corpus.part] for i in range(0, len(rows), corpus.part)]
        base += corpus.windows
    runs = [
        (i, shard[first : first + 32])
        for i, shard in enumerate(shards)
        for first in range(0, len(shard), 32)
    ]
    key = draws(Purpose.EPOCH_RUNS, seed, epoch, first=0, rows=len(runs), columns=1)[:, 0].tolist()
    dealt = permutation(Purpose.EPOCH_SHARDS, seed, epoch, len(shards)).tolist()
    due: list[tuple[int, int, int]] = []
    streams = min(8, len(shards))
    for stream in range(streams):
        mine = dealt[stream::streams]
        windows: list[int] = []
        for first in range(0, len(mine), 2):
            group = mine[first : first + 2]
            chosen = sorted((key[n], n) for n, (shard, _) in enumerate(runs) if shard in group)
            windows += [window for _, n in chosen for window in runs[n][1]]
        for i, window in enumerate(windows):
            due.append(((2 * i + 1) * base // len(windows), stream, window))
    return [window for _, _, window in sorted(due, key=lambda item: item[:2])]


@given(corpora=corpora, seed=seeds, epoch=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_the_order_is_the_one_described(corpora: Sequence[Corpus], seed: int, epoch: int) -> None:
    assert Order(corpora, seed=seed).epoch(epoch).tolist() == by_hand(corpora, seed, epoch)


def test_the_order_of_version_1_stays_what_it_is() -> None:
    order = Order([Corpus(1000, 128)], seed=0)
    assert order.epoch(0)[:24].tolist() == [
        800, 672, 128, 448, 320, 512, 96, 960, 801, 673, 129, 449,
        321, 513, 97, 961, 802, 674, 130, 450, 322, 514, 98, 962,
    ]  # fmt: skip
    assert order.epoch(1)[:8].tolist() == [576, 32, 640, 480, 256, 160, 864, 992]
    two = Order([Corpus(300, 64), Corpus(200, 50)], seed=7)
    assert two.epoch(0)[:12].tolist() == [332, 64, 128, 224, 382, 400, 482, 288, 333, 334, 65, 129]
    large = Order([Corpus(100_003, 1024), Corpus(5_000, 512)], seed=2**63 + 11)
    found = hashlib.sha256(large.epoch(123).astype("<i8").tobytes()).hexdigest()
    assert found == ("2f497c8a44aab26ef43cf6c33c03c925731b173510047bc2c2caf4a7343e4b4d")


def test_seeds_and_epochs_give_orders_of_their_own() -> None:
    orders = [
        Order([Corpus(600, 32)], seed=seed).epoch(epoch).tobytes()
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    ]
    assert len(set(orders)) == len(orders)


def test_every_stretch_takes_its_share_of_every_eighth_of_the_shards() -> None:
    order = Order([Corpus(16 * 256, 256)], seed=3).epoch(0)
    for first in range(0, len(order), 256):
        shards = Counter((order[first : first + 256] // 256).tolist())
        # Eight streams of two shards: 32 windows of each stream, from whichever of its shards.
        assert len(shards) >= 8
        assert max(shards.values()) <= 32


def test_reads_are_long_runs_of_neighbours() -> None:
    order = Order([Corpus(16 * 1024, 1024)], seed=3).epoch(0)
    stretches = [np.sort(order[first : first + 256]) for first in range(0, len(order), 256)]
    runs = np.mean([np.count_nonzero(np.diff(rows) != 1) + 1 for rows in stretches])
    assert runs <= 16  # 256 windows in at most 16 reads
