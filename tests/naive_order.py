"""The order of windows as its description reads: with lists and fractions, a place at a time.

Slow, and nothing of had_pipe.order is used, but for its draws. `python tests/naive_order.py FOLDER`
wrote the golden vectors of tests/data/order-v1: once, before their first release, and never again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice
from math import ceil, floor
from pathlib import Path
from typing import Any

from had_pipe.draws import Purpose, draws, permutation

Sizes = tuple[int, int]
"""Windows of a cache, and of a shard."""
Place = tuple[int, int, int]
"""Cache, epoch, row."""


def epoch_order(sizes: Sequence[Sizes], seed: int, epoch: int, key: int = 0) -> list[int]:
    """One epoch: windows numbered through all caches."""
    shards: list[list[int]] = []
    base = 0
    for windows, part in sizes:
        rows = list(range(base, base + windows))
        shards += [rows[i : i + part] for i in range(0, len(rows), part)]
        base += windows
    runs = [
        (i, shard[first : first + 32])
        for i, shard in enumerate(shards)
        for first in range(0, len(shard), 32)
    ]
    address = key * 2**40 + epoch
    drawn = draws(Purpose.EPOCH_RUNS, seed, address, first=0, rows=len(runs), columns=1)
    drawn_run = drawn[:, 0].tolist()
    dealt = permutation(Purpose.EPOCH_SHARDS, seed, address, len(shards)).tolist()
    due: list[tuple[int, int, int]] = []
    streams = min(8, len(shards))
    for stream in range(streams):
        mine = dealt[stream::streams]
        numbers: list[int] = []
        for first in range(0, len(mine), 2):
            group = mine[first : first + 2]
            chosen = sorted((drawn_run[n], n) for n, (i, _) in enumerate(runs) if i in group)
            numbers += [number for _, n in chosen for number in runs[n][1]]
        for i, number in enumerate(numbers):
            due.append(((2 * i + 1) * base // len(numbers), stream, number))
    return [number for _, _, number in sorted(due, key=lambda item: item[:2])]


def endless(sizes: Sequence[Sizes], seed: int, key: int = 0) -> Iterator[Place]:
    """Epoch after epoch of all caches together."""
    owner = [(cache, row) for cache, (windows, _) in enumerate(sizes) for row in range(windows)]
    epoch = 0
    while True:
        for number in epoch_order(sizes, seed, epoch, key):
            cache, row = owner[number]
            yield cache, epoch, row
        epoch += 1


def turns(weights: Sequence[int]) -> list[int]:
    """Whose turn it is: window k of a cache may come from k M / w on and must before (k + 1) M / w;
    of those that may, the one comes that must soonest, of equals the first."""
    cycle: list[int] = []
    for place in range(sum(weights)):
        candidates = []
        for cache, weight in enumerate(weights):
            every = Fraction(sum(weights), weight)
            had = cycle.count(cache)
            if had < weight and place >= floor(had * every):
                candidates.append((ceil((had + 1) * every), cache))
        cycle.append(min(candidates)[1])
    return cycle


def places(
    sizes: Sequence[Sizes], seed: int, weights: Sequence[int] | None = None
) -> Iterator[Place]:
    """What lies at place 0, 1, 2, ..."""
    if weights is None:
        yield from endless(sizes, seed)
        return
    own = [endless([one], seed, key) for key, one in enumerate(sizes)]
    cycle = turns(weights)
    while True:
        for cache in cycle:
            _, epoch, row = next(own[cache])
            yield cache, epoch, row


def shares(found: Sequence[Place], *, batch: int, ranks: int) -> list[list[list[Place]]]:
    """Of every whole batch, the windows of every rank, arranged as one reads them."""
    size = batch // ranks
    return [
        [sorted(found[p + r * size : p + (r + 1) * size]) for r in range(ranks)]
        for p in range(0, len(found) - batch + 1, batch)
    ]


CASES: dict[str, dict[str, Any]] = {
    "one": {"sizes": [(1000, 128)], "seed": 0, "weights": None, "count": 2300},
    "two": {"sizes": [(300, 64), (200, 50)], "seed": 7, "weights": None, "count": 1600},
    "weighted": {
        "sizes": [(300, 64), (90, 30), (40, 64)],
        "seed": 2**63 + 11,
        "weights": [5, 2, 1],
        "count": 1600,
    },
}
BATCH = 16
RANKS = (8, 4, 16)


def golden(case: dict[str, Any]) -> dict[str, Any]:
    """A case and what it comes to: all its places, and who reads what of the first batches."""
    found = list(islice(places(case["sizes"], case["seed"], case["weights"]), case["count"]))
    return {
        "order_version": 1,
        **case,
        "places": found,
        "batch": BATCH,
        "shares": {
            str(ranks): shares(found[: 3 * BATCH], batch=BATCH, ranks=ranks) for ranks in RANKS
        },
    }


if __name__ == "__main__":
    for name, case in CASES.items():
        text = json.dumps(golden(case), separators=(",", ":"))
        (Path(sys.argv[1]) / f"{name}.json").write_text(text + "\n", "utf-8")
