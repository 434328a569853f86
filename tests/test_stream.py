"""The stream, tested against the cache it reads."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Made

from had_pipe.cache import Cache, Part
from had_pipe.cache.codec import CodecName
from had_pipe.dna import kmers
from had_pipe.errors import CacheMismatch, RecipeError
from had_pipe.stream import Batch, Stream, first_windows, require_alike


def expected(caches: Sequence[Cache], batch: Batch) -> dict[str, np.ndarray[Any, Any]]:
    """The batch read slowly: window by window, decoded by NumPy, complemented as letters."""
    ids, masks, targets = [], [], []
    for span in batch.spans:
        cache = caches[span.cache]
        for row in span.row:
            block = cache.allocate(1)
            cache.read("train", span.view, np.array([row]), block)
            text = "".join(kmers.spell(int(k)) for k in block.kmer_id[0])
            if block.reversed[0]:
                text = text[::-1].translate(str.maketrans("ACGT", "TGCA"))
            base = np.array([["ACGT".index(letter) for letter in text]], dtype=np.uint8)
            ids.append(kmers.encode_kmers(base)[0])
            masks.append(block.mask[0])
            targets.append(cache.codec.decode(block.value, block.scale, cache.mean, cache.std)[0])
    return {"kmer_id": np.stack(ids), "mask": np.stack(masks), "target": np.stack(targets)}


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"codec": "int8"}, id="int8"),
        pytest.param({"codec": "exact"}, id="exact"),
        pytest.param({"codec": "compact"}, id="compact"),
        pytest.param({"codec": "tiny", "channels": 32}, id="tiny"),
    ],
)
def test_a_batch_holds_what_the_cache_holds(made: Made, settings: dict[str, Any]) -> None:
    cache = made(windows=96, part=32, views=2, **settings)
    with Stream([cache], batch=20, seed=1) as stream:
        batches = list(islice(stream, 12))
    assert any(len({span.view for span in batch.spans}) == 2 for batch in batches)
    # Compared only now: batches stay what they were while later ones are read.
    for batch in batches:
        slow = expected([cache], batch)
        assert batch.kmer_id.dtype == torch.int64
        assert np.array_equal(batch.kmer_id.numpy(), slow["kmer_id"])
        assert np.array_equal(batch.mask.numpy(), slow["mask"])
        np.testing.assert_allclose(batch.target.numpy(), slow["target"], rtol=1e-6, atol=1e-5)


def test_epochs_take_views_in_turn_and_every_window_once(made: Made) -> None:
    cache = made(windows=60, part=16, views=2)
    with Stream([cache], batch=7, seed=1) as stream:
        seen: Counter[tuple[int, int]] = Counter()
        for batch in islice(stream, 60 * 4 // 7 + 1):
            for span in batch.spans:
                assert span.view == span.epoch % 2
                seen.update((span.epoch, int(row)) for row in span.row)
    for epoch in range(4):
        assert [seen[epoch, row] for row in range(60)] == [1] * 60


@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_any_number_of_ranks_reads_the_same_global_batches(made: Made, ranks: int) -> None:
    cache = made(windows=50, part=16)

    def windows_of(batch: Batch) -> list[tuple[int, int]]:
        return [(span.epoch, int(row)) for span in batch.spans for row in span.row]

    with Stream([cache], batch=12, seed=5) as one:
        whole = [sorted(windows_of(batch)) for batch in islice(one, 9)]
    shares = []
    for rank in range(ranks):
        with Stream([cache], batch=12, seed=5, rank=rank, ranks=ranks) as stream:
            shares.append([windows_of(batch) for batch in islice(stream, 9)])
    assert all(len(windows) == 12 // ranks for share in shares for windows in share)
    assert whole == [
        sorted(window for part in parts for window in part) for parts in zip(*shares, strict=True)
    ]


def test_a_batch_may_hold_more_windows_than_there_are(made: Made) -> None:
    caches = [
        made(windows=5, part=32),
        made(windows=1, part=1, seed=4),
    ]
    seen: Counter[tuple[int, int, int]] = Counter()
    with Stream(caches, batch=14, seed=0) as stream:
        for batch in islice(stream, 9):
            assert len(batch.kmer_id) == len(batch.target) == 14
            for span in batch.spans:
                seen.update((span.epoch, span.cache, row) for row in span.row.tolist())
    every = [(0, row) for row in range(5)] + [(1, 0)]
    assert seen == Counter((epoch, *window) for epoch in range(21) for window in every)


def test_a_stream_goes_on_at_any_batch(made: Made) -> None:
    cache = made(windows=50, part=16)
    with Stream([cache], batch=12, seed=5) as stream:
        whole = list(islice(stream, 10))
    with Stream([cache], batch=12, seed=5, start=6) as stream:
        for batch, again in zip(whole[6:], stream, strict=False):
            assert batch.position == again.position
            assert torch.equal(batch.kmer_id, again.kmer_id)
            assert torch.equal(batch.mask, again.mask)
            assert torch.equal(batch.target, again.target)


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("prefetch", [1, 1 << 20])
def test_threads_and_read_ahead_change_nothing(made: Made, threads: int, prefetch: int) -> None:
    cache = made(windows=50, part=16)
    with Stream([cache], batch=12, seed=5, threads=1) as stream:
        whole = list(islice(stream, 8))
    with Stream([cache], batch=12, seed=5, threads=threads, prefetch=prefetch) as stream:
        for batch, again in zip(whole, stream, strict=False):
            assert torch.equal(batch.target, again.target)
            assert torch.equal(batch.kmer_id, again.kmer_id)


@pytest.mark.parametrize("codec", ["int8", "tiny"])
def test_several_caches_make_one_epoch_also_where_statistics_differ(
    made: Made, codec: CodecName
) -> None:
    caches = [
        made(windows=50, part=16, seed=0, codec=codec),
        made(windows=30, part=16, seed=1, codec=codec, statistics_seed=9),
        made(windows=20, part=20, seed=2, codec=codec, statistics_seed=8),
    ]
    with Stream(caches, batch=10, seed=5) as stream:
        assert stream.order.windows == 100
        batches = list(islice(stream, 10))
    seen = Counter(
        (span.cache, int(row)) for batch in batches for span in batch.spans for row in span.row
    )
    assert seen == Counter(
        (i, row) for i, windows in enumerate((50, 30, 20)) for row in range(windows)
    )
    for batch in batches:
        np.testing.assert_allclose(
            batch.target.numpy(), expected(caches, batch)["target"], rtol=1e-6, atol=1e-5
        )


def test_normalised_targets_are_the_raw_ones_less_mean_over_std(made: Made) -> None:
    cache = made(windows=50, part=16)
    with Stream([cache], batch=25, seed=5, space="normalised") as stream:
        batch = next(stream)
    raw = expected([cache], batch)["target"]
    np.testing.assert_allclose(
        batch.target.numpy(), (raw - cache.mean) / cache.std, rtol=1e-4, atol=1e-5
    )


def test_first_windows_are_the_first_of_each_cache_by_its_share(made: Made) -> None:
    caches = [
        made(valid=30, part=16, seed=0),
        made(valid=10, part=16, seed=1),
    ]

    def rows(windows: int) -> tuple[list[int], list[int]]:
        found: tuple[list[int], list[int]] = ([], [])
        for batch in first_windows(caches, split="valid", windows=windows, batch=8):
            assert len(batch.kmer_id) == sum(len(span.row) for span in batch.spans) <= 8
            for span in batch.spans:
                found[span.cache].extend(span.row.tolist())
        return found

    assert rows(20) == (list(range(15)), list(range(5)))
    assert rows(1000) == (list(range(30)), list(range(10)))


def test_first_windows_tell_ahead_of_exactly_the_parts_they_read(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = [made(valid=30, part=16, seed=0), made(valid=10, part=16, seed=1)]
    told: dict[Any, list[Part]] = {}
    monkeypatch.setattr(Cache, "coming", lambda self, parts: told.update({self.path: list(parts)}))
    for windows, ahead, counts in ((40, False, ()), (20, True, (1, 1)), (40, True, (2, 1))):
        told.clear()
        read = first_windows(caches, split="valid", windows=windows, batch=8, ahead=ahead)
        assert sum(len(batch.kmer_id) for batch in read) == windows
        assert [told[cache.path] for cache in caches if told] == [
            [Part("valid", 0, number) for number in range(count)] for count in counts
        ]


def test_an_unlike_cache_is_refused_naming_each_difference(made: Made) -> None:
    one = made(channels=16, kmers=12)
    other = made(channels=24, kmers=20, codec="exact", licence="MIT")
    with pytest.raises(CacheMismatch) as refusal:
        Stream([one, other], batch=4, seed=0)
    assert str(refusal.value) == (
        f"{one.path} and {other.path} cannot be trained on together:\n"
        "  teacher.channels   16 and 24\n"
        "  windows.kmers   12 and 20\n"
        "  windows.masked   2 and 3\n"
        "  codec   int8 and exact\n"
        "  licence   CC-BY-NC-SA-4.0 and MIT\n"
        "Give caches that agree in these."
    )


def test_statistics_must_agree_in_normalised_space_only(made: Made) -> None:
    one = made(seed=0)
    other = made(seed=1, statistics_seed=9)
    require_alike([one, other], space="raw")
    with pytest.raises(CacheMismatch, match=r"(?s)statistics   .* and .*agree in these"):
        require_alike([one, other], space="normalised")


def test_the_same_cache_twice_is_refused(made: Made) -> None:
    cache = made()
    with pytest.raises(CacheMismatch, match="given twice"):
        Stream([cache, Cache.open(cache.path)], batch=4, seed=0)


def test_a_split_without_windows_is_refused(made: Made) -> None:
    cache = made(windows=32, valid=0)
    with pytest.raises(CacheMismatch, match=r"no window in split 'valid'; it has train \(32 win"):
        next(first_windows([cache], split="valid", windows=4, batch=2))


def test_a_batch_must_divide_among_the_ranks(made: Made) -> None:
    cache = made()
    with pytest.raises(RecipeError, match=r"\[train\] batch = 10: must be a multiple of the 3"):
        Stream([cache], batch=10, seed=0, ranks=3)


@pytest.mark.parametrize(
    ("given", "said"),
    [({"space": "normalized"}, "space='normalized', not one of"), ({"threads": -1}, "threads")],
)
def test_a_setting_that_is_none_is_not_taken_for_another(
    made: Made, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(AssertionError, match=said):
        Stream([made()], batch=8, seed=0, **given)


def test_a_cache_alone_is_not_taken_for_a_list_of_letters(made: Made) -> None:
    path = made().path
    for cache in (path, str(path)):
        with pytest.raises(AssertionError, match="caches is a list"):
            Stream(cache, batch=8, seed=0)  # type: ignore[arg-type]


def test_waiting_is_counted_and_working_is_not(made: Made) -> None:
    cache = made()
    with Stream([cache], batch=8, seed=0) as stream:
        begun = time.perf_counter()
        for _ in range(5):
            next(stream)
            time.sleep(0.02)
        spent = time.perf_counter() - begun
        assert 0 < stream.stats().wait_seconds <= spent - 0.1
