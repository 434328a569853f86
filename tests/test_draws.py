"""Draws: Philox by the book, the same however they are asked for, the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from had_pipe.draws import Purpose, draws, permutation

_WORD = 2**64 - 1

GOLDEN_DRAWS = [
    [
        "46b4508c8ea85994",
        "05cc7f552d7b4e97",
        "ac0c46195c89c251",
        "8072da735467749d",
        "f4ce0241e0d605d5",
    ],
    [
        "82f04a944f529f96",
        "ad6932886ae1d2cf",
        "bb094afe53908727",
        "bb38bf2830664423",
        "2774d06ce9e96b68",
    ],
]
GOLDEN_PERMUTATION = [4, 1, 10, 9, 11, 3, 6, 0, 5, 2, 7, 8]


def philox4x64(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    """Philox4x64-10 in whole numbers, from the paper (Salmon et al., SC 2011, section 4.3)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = c0 * 0xD2E7470EE14C6C93, c2 * 0xCA5A826395121157
        c0, c1, c2, c3 = (b >> 64) ^ c1 ^ k0, b & _WORD, (a >> 64) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & _WORD, (k1 + 0xBB67AE8584CAA73B) & _WORD
    return c0, c1, c2, c3


def row_by_the_book(purpose: int, seed: int, stream: int, row: int, columns: int) -> list[int]:
    """A row of the table: the row's own run of counters, which NumPy starts at one."""
    blocks = -(-columns // 4)
    words: list[int] = []
    for block in range(blocks):
        counter = 1 + row * blocks + block
        words += philox4x64((counter, 0, 0, 0), (seed, (stream << 8) | purpose))
    return words[:columns]


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [
        pytest.param(
            (0, 0, 0, 0),
            (0, 0),
            (0x16554D9ECA36314C, 0xDB20FE9D672D0FDC, 0xD7E772CEE186176B, 0x7E68B68AEC7BA23B),
            id="zeros",
        ),
        pytest.param(
            (_WORD, _WORD, _WORD, _WORD),
            (_WORD, _WORD),
            (0x87B092C3013FE90B, 0x438C3C67BE8D0224, 0x9CC7D7C69CD777B6, 0xA09CAEBF594F0BA0),
            id="ones",
        ),
        pytest.param(
            (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
            (0x452821E638D01377, 0xBE5466CF34E90C6C),
            (0xA528F45403E61D95, 0x38C72DBD566E9788, 0xA5A1610E72FD18B5, 0x57BD43B5E52B7FE6),
            id="pi",
        ),
    ],
)
def test_the_oracle_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, int], words: tuple[int, ...]
) -> None:
    assert philox4x64(counter, key) == words


@given(
    purpose=st.sampled_from(Purpose),
    seed=st.integers(0, _WORD),
    stream=st.integers(0, 2**56 - 1),
    row=st.integers(0, 2**40),
    columns=st.integers(1, 9),
)
def test_a_row_is_philox_by_the_book(
    purpose: Purpose, seed: int, stream: int, row: int, columns: int
) -> None:
    got = draws(purpose, seed, stream, first=row, rows=1, columns=columns)
    assert got.tolist() == [row_by_the_book(purpose, seed, stream, row, columns)]


@given(
    first=st.integers(0, 2**40),
    rows=st.lists(st.integers(0, 7), min_size=1, max_size=5),
    columns=st.integers(1, 9),
)
def test_a_table_is_the_same_in_one_read_or_in_many(
    first: int, rows: list[int], columns: int
) -> None:
    whole = draws(Purpose.MASK, 5, 2, first=first, rows=sum(rows), columns=columns)
    assert whole.shape == (sum(rows), columns)
    at, pieces = first, []
    for count in rows:
        pieces.append(draws(Purpose.MASK, 5, 2, first=at, rows=count, columns=columns))
        at += count
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_draws_keep_their_values_for_ever() -> None:
    """Golden: caches made elsewhere were masked with these."""
    got = draws(Purpose.MASK, 7, 3, first=11, rows=2, columns=5)
    assert [[f"{word:016x}" for word in row] for row in got.tolist()] == GOLDEN_DRAWS


def test_permutations_keep_their_order_for_ever() -> None:
    assert permutation(Purpose.DISK_ORDER, 0, 0, 12).tolist() == GOLDEN_PERMUTATION


def test_purposes_keep_their_numbers_for_ever() -> None:
    released = {
        "MASK": 1,
        "STRAND": 2,
        "DISK_ORDER": 3,
        "BLOCK_SPLIT": 4,
        "EPOCH_SHARDS": 5,
        "EPOCH_RUNS": 6,
    }
    now = {name: int(purpose) for name, purpose in Purpose.__members__.items()}
    assert released.items() <= now.items()
    assert len(set(now.values())) == len(now)
    assert max(now.values()) < 256, "the purpose is the last byte of the key"


@given(count=st.integers(0, 300), seed=st.integers(0, 2**32), stream=st.integers(0, 9))
def test_a_permutation_holds_each_index_once_and_sorts_the_draws(
    count: int, seed: int, stream: int
) -> None:
    order = permutation(Purpose.EPOCH_RUNS, seed, stream, count)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    drawn = [row_by_the_book(Purpose.EPOCH_RUNS, seed, stream, r, 1)[0] for r in range(count)]
    assert [drawn[i] for i in order.tolist()] == sorted(drawn)


def test_every_part_of_the_address_matters() -> None:
    tables = [
        draws(purpose, seed, stream, first=first, rows=1, columns=4).tolist()
        for purpose in Purpose
        for seed in (0, 1)
        for stream in (0, 1)
        for first in (0, 1)
    ]
    assert len({str(table) for table in tables}) == len(tables)


def test_draws_fill_the_range_evenly() -> None:
    words = draws(Purpose.STRAND, 1, 0, first=0, rows=16_000, columns=1)[:, 0]
    in_bin = np.bincount((words >> np.uint64(60)).astype(np.int64), minlength=16)
    # Chi-square with 15 degrees of freedom: above 37.7 once in a thousand streams; this is one.
    assert float(((in_bin - 1000) ** 2 / 1000).sum()) < 37.7
