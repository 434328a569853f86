"""The figures of reading in a line of metrics: since the line before, validation left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from had_pipe.cache.mirror import MirrorStats
from had_pipe.pace import Pace, shown
from had_pipe.stream import StreamStats


def stats(*, nbytes: int, waited: float, hits: int | None = None) -> StreamStats:
    return StreamStats(
        batches=1,
        windows=8,
        nbytes=nbytes,
        seconds=9.0,
        wait_seconds=waited,
        mirror=None
        if hits is None
        else MirrorStats(
            hits=hits,
            misses=2,
            downloaded_nbytes=7 * hits,
            evicted_nbytes=0,
            waiting_seconds=0.0,
            retries=0,
        ),
    )


def paced(*seen: StreamStats) -> Any:
    return Pace(SimpleNamespace(stats=iter(seen).__next__))  # type: ignore[arg-type]


def test_a_line_tells_what_was_read_since_the_one_before() -> None:
    second = stats(nbytes=150, waited=0.0, hits=8)
    pace = paced(stats(nbytes=100, waited=0.0, hits=3), second, second, second)
    first = pace.reading()
    assert (first["read_bytes"], first["mirror_hits"], first["mirror_misses"]) == (100, 3, 2)
    pace.restart()
    assert pace.reading()["read_bytes"] == 0
    pace = paced(stats(nbytes=100, waited=0.0, hits=3), second)
    pace.restart()
    line = pace.reading()
    assert (line["read_bytes"], line["mirror_hits"], line["mirror_misses"]) == (50, 5, 0)
    assert line["mirror_downloaded_bytes"] == 35


def test_validation_is_no_training_and_no_share_exceeds_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 100.0
    monkeypatch.setattr("had_pipe.pace.perf_counter", lambda: now)
    pace = paced(stats(nbytes=1, waited=5.0))
    now = 101.0
    with pace.aside():
        now = 131.0
    now = 133.0
    assert pace.seconds == 3.0
    line = pace.reading()
    assert line["wait_share"] == 1.0
    assert not any(key.startswith("mirror") for key in line)


@pytest.mark.parametrize(
    ("mirror", "said"),
    [
        ({}, {}),
        ({"mirror_hits": 0, "mirror_misses": 0}, {}),
        ({"mirror_hits": 49, "mirror_misses": 1}, {"mirror": "98%"}),
    ],
)
def test_progress_says_it_in_few_words(mirror: dict[str, float], said: dict[str, str]) -> None:
    reading = {"wait_share": 0.0012, "read_bytes_per_second": 1.2e9, **mirror}
    assert shown(reading) == {"wait": "0.1%", "read": "1.2 GB/s", **said}
