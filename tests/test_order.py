"""The order of windows, tested on numbers: against lists, and against golden vectors."""

from __future__ import annotations

import hashlib
import json
import threading
import time
import tracemalloc
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any

import naive_order
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_cache import build_cache

from had_pipe.cache import Cache
from had_pipe.draws import Purpose, permutation
from had_pipe.errors import RecipeError
from had_pipe.order import ORDER_VERSION, Corpus, Mix, Need, Order, _Epoch
from had_pipe.stream import Stream

corpora = st.lists(
    st.builds(Corpus, windows=st.integers(1, 700), part=st.integers(1, 150)),
    min_size=1,
    max_size=3,
)
seeds = st.integers(0, 2**63)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[list[Corpus], list[int] | None]:
    """Some caches, with or without weights."""
    drawn = draw(corpora)
    weight = st.lists(st.integers(1, 5), min_size=len(drawn), max_size=len(drawn))
    return drawn, draw(st.none() | weight)


def sizes(corpora: Sequence[Corpus]) -> list[naive_order.Sizes]:
    return [(corpus.windows, corpus.part) for corpus in corpora]


def listed(mix: Mix, first: int, count: int) -> list[naive_order.Place]:
    found = mix.at(first, count)
    assert found.cache_P.dtype == found.epoch_P.dtype == found.row_P.dtype == np.int64
    return list(
        zip(found.cache_P.tolist(), found.epoch_P.tolist(), found.row_P.tolist(), strict=True)
    )


# One epoch of all


@given(corpora=corpora, seed=seeds, epoch=st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_an_epoch_is_every_window_exactly_once(
    corpora: Sequence[Corpus], seed: int, epoch: int
) -> None:
    order = Order(corpora, seed=seed)
    assert order.windows == sum(corpus.windows for corpus in corpora)
    assert np.array_equal(np.sort(order.epoch(epoch)), np.arange(order.windows))


@given(corpora=corpora, seed=seeds, first=st.integers(0, 3000), count=st.integers(0, 900))
@settings(max_examples=60, deadline=None)
def test_any_place_is_known_without_those_before_it(
    corpora: Sequence[Corpus], seed: int, first: int, count: int
) -> None:
    whole = Order(corpora, seed=seed)
    epochs = -(-(first + count) // whole.windows)
    numbers = np.concatenate([whole.epoch(epoch) for epoch in range(epochs)] or [np.empty(0)])
    epoch_P, number_P = Order(corpora, seed=seed).at(first, count)
    assert np.array_equal(number_P, numbers[first : first + count])
    assert np.array_equal(epoch_P, np.arange(first, first + count) // whole.windows)


@given(corpora=corpora, seed=seeds, epoch=st.integers(0, 2**40))
@settings(max_examples=40, deadline=None)
def test_the_order_is_the_one_described(corpora: Sequence[Corpus], seed: int, epoch: int) -> None:
    found = Order(corpora, seed=seed).epoch(epoch)
    assert found.tolist() == naive_order.epoch_order(sizes(corpora), seed, epoch)


def test_places_are_the_same_however_they_are_asked_for() -> None:
    # More than one block of places to an epoch, and blocks that end within a run.
    corpora = [Corpus(70_001, 640), Corpus(9_999, 77)]
    order = Order(corpora, seed=5)
    whole = np.concatenate([order.epoch(epoch) for epoch in range(3)])
    for count in (1, 257, 5_000, 32_768, 40_000, 200_000):
        for first in (0, 1, 32_767, 32_768, 79_990, 80_000, 130_003):
            _, number_P = order.at(first, min(count, len(whole) - first))
            assert np.array_equal(number_P, whole[first : first + count])


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


def test_seeds_epochs_and_keys_give_orders_of_their_own() -> None:
    orders = [
        Order([Corpus(600, 32)], seed=seed, key=key).epoch(epoch).tobytes()
        for seed in (0, 1)
        for key in (0, 1)
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


def close_pairs(index_P: np.ndarray[Any, Any], *, batch: int, closer: int) -> int:
    """How many pairs within a batch lie closer together on the genome than so many windows."""
    found = 0
    for first in range(0, len(index_P) - batch + 1, batch):
        index = np.sort(index_P[first : first + batch])
        found += int(
            (np.searchsorted(index, index + closer, side="left") - np.arange(batch) - 1).sum()
        )
    return found


def test_neighbours_on_the_genome_meet_in_a_batch_no_oftener_than_by_chance() -> None:
    windows = 200_000
    # Where on the genome a row's window lies: rows were shuffled when the cache was planned.
    index_of_row = permutation(Purpose.DISK_ORDER, 11, 0, windows)
    chance = np.random.default_rng(1).permutation(windows)
    uniform = close_pairs(chance, batch=256, closer=64)
    # About 16,000 pairs by chance: a standard deviation is 0.8 %.
    assert uniform == pytest.approx(windows // 256 * 256 * 255 / 2 * 126 / windows, rel=0.04)
    for epoch in (0, 1):
        order = Order([Corpus(windows, 1024)], seed=11).epoch(epoch)
        assert close_pairs(index_of_row[order], batch=256, closer=64) / uniform == pytest.approx(
            1, abs=0.05
        )
        # What the shuffle at plan time is for; and the measure does see neighbours.
        assert close_pairs(order, batch=256, closer=64) > 100 * uniform


# Golden vectors

GOLDEN = Path(__file__).parent / "data" / "order-v1"


@pytest.fixture(scope="module", params=sorted(naive_order.CASES))
def golden(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / f"{request.param}.json").read_text("utf-8"))
    return found


def mix_of(golden: dict[str, Any]) -> Mix:
    caches = [Corpus(*of) for of in golden["sizes"]]
    return Mix(caches, seed=golden["seed"], weights=golden["weights"])


def test_every_place_is_the_golden_one(golden: dict[str, Any]) -> None:
    assert golden["order_version"] == ORDER_VERSION
    found = listed(mix_of(golden), 0, len(golden["places"]))
    assert [list(place) for place in found] == golden["places"]


def test_golden_vectors_are_what_the_description_says() -> None:
    for name, case in naive_order.CASES.items():
        made = json.loads(json.dumps(naive_order.golden(case)))
        assert made == json.loads((GOLDEN / f"{name}.json").read_text("utf-8")), name


def test_streams_of_8_4_and_16_ranks_read_the_golden_shares(
    golden: dict[str, Any], tmp_path: Path
) -> None:
    caches = [
        Cache.open(
            build_cache(
                tmp_path / str(i), windows=n, part=part, seed=i, valid=0, kmers=8, channels=4
            )
        )
        for i, (n, part) in enumerate(golden["sizes"])
    ]
    for ranks, batches in golden["shares"].items():
        for rank in (0, int(ranks) - 1):
            with Stream(
                caches,
                batch=golden["batch"],
                seed=golden["seed"],
                rank=rank,
                ranks=int(ranks),
                **({} if golden["weights"] is None else {"weights": golden["weights"]}),
            ) as stream:
                for batch, expected in zip(stream, batches, strict=False):
                    found = [
                        [span.cache, span.epoch, int(row)]
                        for span in batch.spans
                        for row in span.row
                    ]
                    assert found == expected[rank]


# Several caches


@given(mixture=mixtures(), seed=seeds, first=st.integers(0, 2000), count=st.integers(0, 600))
@settings(max_examples=50, deadline=None)
def test_a_mixture_is_the_one_described(
    mixture: tuple[list[Corpus], list[int] | None], seed: int, first: int, count: int
) -> None:
    corpora, weights = mixture
    if weights is not None:
        divisor = int(np.gcd.reduce(weights))
        reduced = [weight // divisor for weight in weights]
    else:
        reduced = None
    expected = islice(naive_order.places(sizes(corpora), seed, reduced), first, first + count)
    assert listed(Mix(corpora, seed=seed, weights=weights), first, count) == list(expected)


@given(mixture=mixtures(), seed=seeds)
@settings(max_examples=30, deadline=None)
def test_every_window_of_every_cache_comes_once_in_each_epoch_of_it(
    mixture: tuple[list[Corpus], list[int] | None], seed: int
) -> None:
    corpora, weights = mixture
    mix = Mix(corpora, seed=seed, weights=weights)
    places = 2 * mix.windows * (sum(weights) if weights else 1)  # at least two of every cache
    assert mix.epochs(places) >= 2
    seen = Counter(listed(mix, 0, places))
    assert set(seen.values()) == {1}
    for cache, corpus in enumerate(corpora):
        for epoch in (0, 1):
            rows = sorted(row for c, e, row in seen if (c, e) == (cache, epoch))
            assert rows == list(range(corpus.windows))


@given(
    weights=st.lists(st.integers(1, 300), min_size=1, max_size=8)
    # One heavy cache beside many light ones, which are all due in the middle of a cycle.
    | st.integers(1, 60).map(lambda n: [100, *[1] * n])
)
@settings(max_examples=30, deadline=None)
def test_weights_are_kept_to_within_a_window_at_any_place(weights: list[int]) -> None:
    mix = Mix([Corpus(50, 10)] * len(weights), seed=0, weights=weights)
    cycle = sum(weights) // int(np.gcd.reduce(weights))
    cache_P = mix.at(0, 3 * cycle).cache_P
    for cache, weight in enumerate(weights):
        came = np.cumsum(cache_P == cache)
        due = np.arange(1, 3 * cycle + 1) * weight
        assert (np.abs(came * sum(weights) - due) < sum(weights)).all()
        # And in every stretch as long as a cycle exactly.
        assert set((came[cycle:] - came[:-cycle]).tolist()) == {weight * cycle // sum(weights)}


@pytest.mark.parametrize(
    ("weights", "like"),
    [
        ([3, 1], [3, 1]),
        ([0.75, 0.25], [3, 1]),
        ([300, 100], [3, 1]),
        ([0.1, 0.3], [1, 3]),  # tenths, although no double is one
        ([np.float64(0.1), np.float32(0.2)], [1, 2]),
        ([1e-7, 2e-7], [1, 2]),
        ([9_999, 1], [9_999, 1]),
    ],
)
def test_weights_are_taken_as_they_are_written(
    weights: Sequence[float], like: Sequence[float]
) -> None:
    corpora = [Corpus(40, 16), Corpus(60, 16)]
    found, expected = (Mix(corpora, seed=3, weights=of) for of in (weights, like))
    assert listed(found, 0, 300) == listed(expected, 0, 300)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1], r"weights = \[1\]: 1 for 2 caches; give one for each"),
        ([1, 0], r"weights = \[1, 0\]: must be finite and above 0; leave out"),
        ([1, -2.5], r"above 0"),
        ([1, float("nan")], r"finite"),
        ([1, float("inf")], r"finite"),
        ([1, 10_000], r"add up to 10,001, and at most 10,000 can be kept to; .* such as \[3, 1\]"),
        ([1 / 3, 1 / 2], r"add up to [\d,]+, and"),
    ],
)
def test_weights_that_are_none_are_refused(weights: list[float], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Mix([Corpus(40, 16), Corpus(60, 16)], seed=3, weights=weights)


def test_a_cache_alone_comes_as_it_does_without_weights() -> None:
    corpus = Corpus(500, 64)
    assert listed(Mix([corpus], seed=4, weights=[7]), 0, 1200) == listed(
        Mix([corpus], seed=4), 0, 1200
    )


def test_caches_alike_take_orders_of_their_own() -> None:
    found = Mix([Corpus(400, 64)] * 2, seed=4, weights=[1, 1]).at(0, 800)
    first, second = (found.row_P[found.cache_P == cache] for cache in (0, 1))
    assert sorted(first) == sorted(second)
    assert first.tolist() != second.tolist()


def test_epochs_are_those_of_the_cache_seen_slowest() -> None:
    corpora = [Corpus(100, 16), Corpus(50, 16)]
    plain, weighted = Mix(corpora, seed=0), Mix(corpora, seed=0, weights=[1, 3])
    assert plain.windows == weighted.windows == 150
    assert [plain.epochs(places) for places in (0, 75, 150, 450)] == [0, 0.5, 1, 3]
    assert [weighted.epochs(places) for places in (0, 200, 400)] == [0, 0.5, 1]


# Ranks


@given(
    mixture=mixtures(),
    seed=seeds,
    changes=st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.integers(1, 12)), min_size=2, max_size=4
    ),
)
@settings(max_examples=30, deadline=None)
def test_changing_the_number_of_ranks_in_mid_epoch_changes_nothing(
    mixture: tuple[list[Corpus], list[int] | None],
    seed: int,
    changes: list[tuple[int, int]],
) -> None:
    corpora, weights = mixture
    batch, position = 48, 0
    found: list[naive_order.Place] = []
    for ranks, batches in changes:
        share = batch // ranks
        # Every rank begins anew, knowing nothing but the number of the batch.
        mixes = [Mix(corpora, seed=seed, weights=weights) for _ in range(ranks)]
        for _ in range(batches):
            for rank, mix in enumerate(mixes):
                mine = listed(mix, position * batch + rank * share, share)
                assert len(mine) == share
                found += mine
            position += 1
    assert found == listed(Mix(corpora, seed=seed, weights=weights), 0, position * batch)


# What is needed when


@given(mixture=mixtures(), seed=seeds, first=st.integers(0, 2500))
@settings(max_examples=40, deadline=None)
def test_shards_come_in_the_order_of_their_first_need(
    mixture: tuple[list[Corpus], list[int] | None], seed: int, first: int
) -> None:
    corpora, weights = mixture
    mix = Mix(corpora, seed=seed, weights=weights)
    end = first + 2 * mix.windows + 50
    uses: dict[tuple[int, int, int], list[int]] = {}
    for place, (cache, epoch, row) in enumerate(listed(mix, first, end - first), start=first):
        uses.setdefault((cache, epoch, row // corpora[cache].part), []).append(place)
    found = list(takewhile(lambda need: need.first < end, mix.coming(first)))
    assert [need.first for need in found] == sorted(need.first for need in found)
    assert {(n.cache, n.epoch, n.shard): n.first for n in found} == {
        key: places[0] for key, places in uses.items()
    }
    assert len(found) == len(uses)
    for need in found:
        if need.last < end:
            assert need.last == uses[need.cache, need.epoch, need.shard][-1]
        else:
            later = listed(mix, need.last, 1)[0]
            part = corpora[need.cache].part
            assert (later[0], later[1], later[2] // part) == (need.cache, need.epoch, need.shard)


def test_no_more_than_sixteen_shards_are_in_use_at_once() -> None:
    mix = Mix([Corpus(100 * 64, 64)], seed=2)
    needs = list(takewhile(lambda need: need.epoch < 1, mix.coming(0)))
    assert len(needs) == 100
    for place in range(0, mix.windows, 50):
        assert sum(need.first <= place <= need.last for need in needs) <= 16


def test_what_comes_is_told_without_making_a_list_of_it() -> None:
    coming = Mix([Corpus(100_000 * 32, 32)], seed=2).coming(1_000_000)
    assert isinstance(coming, Iterator)
    begun = time.process_time()
    assert next(coming).first == 1_000_000
    assert time.process_time() - begun < 5
    assert all(isinstance(need, Need) for need in islice(coming, 100))


# Memory and threads


def test_places_are_computed_a_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = _Epoch.numbers

    def watched(self: _Epoch, first: int, end: int) -> Any:
        computed.append(end - first)
        return real(self, first, end)

    monkeypatch.setattr(_Epoch, "numbers", watched)
    order = Order([Corpus(100_000, 1024)], seed=1)
    for first in range(0, 200_000, 256):
        order.at(first, 256)
    # A last batch may reach into a third epoch.
    assert len(computed) <= 9
    assert sum(computed[:8]) == 200_000


def order_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "had-pipe-order"]


def test_an_order_takes_less_than_a_byte_for_a_window() -> None:
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        mix = Mix([Corpus(3_000_000, 1024)], seed=1)
        for place in range(0, mix.windows, 100_000):
            mix.at(place, 256)
        for thread in order_threads():
            thread.join(10)
        now, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert now - before < 3_000_000
    assert most - before < 20_000_000


def test_the_next_epoch_is_made_before_it_is_due_and_no_thread_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: list[tuple[int, str]] = []
    real = Order._permute

    def watched(self: Order, epoch: int) -> Any:
        made.append((epoch, threading.current_thread().name))
        return real(self, epoch)

    monkeypatch.setattr(Order, "_permute", watched)
    order = Order([Corpus(100_000, 64)], seed=1)
    found = np.concatenate([order.at(place, 1000)[1] for place in range(0, 300_000, 1000)])
    main = threading.current_thread().name
    assert made[0] == (0, main)
    # Each once; the one begun at the end is not needed yet.
    assert made[1:] == [(epoch, "had-pipe-order") for epoch in range(1, len(made))]
    assert 3 <= len(made) <= 4
    for thread in order_threads():
        thread.join(10)
    assert not order_threads()
    monkeypatch.undo()
    again = Order([Corpus(100_000, 64)], seed=1)
    assert np.array_equal(found, np.concatenate([again.epoch(epoch) for epoch in range(3)]))


def test_an_epoch_that_the_background_could_not_make_is_made_when_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = Order([Corpus(100_000, 64)], seed=1).at(0, 250_000)[1]
    real = Order._permute

    def starved(self: Order, epoch: int) -> Any:
        if threading.current_thread().name == "had-pipe-order":
            raise MemoryError
        return real(self, epoch)

    monkeypatch.setattr(Order, "_permute", starved)
    assert np.array_equal(Order([Corpus(100_000, 64)], seed=1).at(0, 250_000)[1], expected)


def test_threads_that_share_an_order_see_the_same() -> None:
    order = Order([Corpus(120_000, 256)], seed=9)
    expected = np.concatenate([Order([Corpus(120_000, 256)], seed=9).epoch(e) for e in range(3)])
    wrong: list[int] = []

    def ask(seed: int) -> None:
        for first in np.random.default_rng(seed).integers(0, 350_000, 40).tolist():
            if not np.array_equal(order.at(first, 999)[1], expected[first : first + 999]):
                wrong.append(first)

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
