"""Randomness with an address: every draw depends on named integers, never on how many came before.

Philox4x64-10 (Salmon et al., SC 2011) through NumPy's bit generator, of which only `random_raw` is
used: NumPy keeps that stream stable across versions, not the methods of `Generator`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import numpy.typing as npt


class Purpose(IntEnum):
    """What a draw is for. A value, once released, keeps its meaning for ever."""

    MASK = 1
    STRAND = 2
    DISK_ORDER = 3
    BLOCK_SPLIT = 4
    EPOCH_SHARDS = 5
    EPOCH_RUNS = 6
    VERIFY_SAMPLE = 7
    AUDIT_SAMPLE = 8
    BASE_MASK = 9


def draws(
    purpose: Purpose, seed: int, stream: int, *, first: int, rows: int, columns: int
) -> npt.NDArray[np.uint64]:
    """Uniform 64-bit draws for rows `first` to `first + rows` of an endless table, (rows, columns).

    The row's number is part of the address: asking for one row or for a million gives the same
    values. `stream` separates tables of one purpose (a view, an epoch).
    """
    assert min(seed, stream, first) >= 0
    blocks = -(-columns // 4)  # Philox gives four words a counter value
    bits = np.random.Philox(
        key=np.array([seed, (stream << 8) | purpose], dtype=np.uint64), counter=first * blocks
    )
    raw = bits.random_raw(rows * blocks * 4).reshape(rows, blocks * 4)
    return np.ascontiguousarray(raw[:, :columns], dtype=np.uint64)


def permutation(purpose: Purpose, seed: int, stream: int, count: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count): its indices sorted by one draw each, ties by index."""
    keys = draws(purpose, seed, stream, first=0, rows=count, columns=1)[:, 0]
    return np.argsort(keys, kind="stable").astype(np.int64, copy=False)
