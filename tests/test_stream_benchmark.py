"""benchmarks/stream.py: what it times is right, and what is not right is not timed."""

from __future__ import annotations

import http.client
import json
import threading
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import Script

from had_pipe.cache import Cache

WINDOWS, PART, BATCH = 300, 50, 64


@pytest.fixture
def cache(script: Script, tmp_path: Path) -> Path:
    built: Path = script("synthetic").build(
        tmp_path / "cache", windows=WINDOWS, part=PART, kmers=12, masked=2, channels=16
    )
    return built


@pytest.fixture
def job(script: Script, cache: Path, tmp_path: Path) -> tuple[Any, Any]:
    """The windows of a cache, and a peer's first line: rows in batches that cut shards and runs."""
    peers = script("against_peers")
    with Cache.open(cache) as opened:
        block = opened.allocate(WINDOWS)
        opened.read("train", 0, np.arange(WINDOWS), block)
    raw = tmp_path / "raw.bin"
    raw.write_bytes(block.value.tobytes())
    windows = peers.Windows(raw, windows=WINDOWS, window=block.value.shape[1:])
    rows = np.random.default_rng(0).permutation(WINDOWS)
    line = peers.job(
        windows,
        cache=cache,
        folder=tmp_path,
        part=PART,
        rows=[np.sort(rows[i : i + BATCH]) for i in range(0, WINDOWS, BATCH)],
        threads=2,
    )
    return windows, line


@pytest.mark.parametrize(
    "name",
    [
        "zarr-python",
        "safetensors",
        "Arrow IPC, mapped",
        "Parquet",
        pytest.param("DataLoader, memmap, by window", marks=pytest.mark.slow),
        pytest.param("DataLoader, memmap, by batch", marks=pytest.mark.slow),
    ],
)
def test_a_peer_delivers_every_window_once_and_tells_what_it_took(
    name: str, script: Script, job: tuple[Any, Any], tmp_path: Path
) -> None:
    peers, (windows, line) = script("against_peers"), job
    (known,) = peers.chosen([name])
    peer = peers.PeerProcess(known, windows, line, tmp_path / "log")
    try:
        done = peer.go(WINDOWS)
        fewer = peer.go(BATCH)
    finally:
        peer.close()
    assert done.nbytes == windows.raw.stat().st_size
    assert 0 < fewer.nbytes < done.nbytes
    assert done.seconds > 0
    assert done.cpu_seconds >= 0


def test_a_peer_that_fails_says_why(script: Script, job: tuple[Any, Any], tmp_path: Path) -> None:
    peers = script("against_peers")
    known = peers.Known("none", "peer_arrow.py", ("no such way",))
    with pytest.raises(peers.PeerFailed, match="no such way"):
        peers.PeerProcess(known, *job, tmp_path / "log")


def test_who_delivers_a_strange_window_or_one_twice_or_wrong_bytes_is_not_timed(
    script: Script, job: tuple[Any, Any]
) -> None:
    peers, (windows, _) = script("against_peers"), job
    raw = np.fromfile(windows.raw, dtype=np.uint8).reshape(WINDOWS, -1)
    head = np.ascontiguousarray(raw[:, : peers.HEAD]).view(np.uint64)[:, 0]
    crc = np.array([peers.zlib.crc32(row) for row in raw], dtype=np.uint32)
    order = np.random.default_rng(0).permutation(WINDOWS)
    windows.check_epoch(head[order], crc[order])
    twice = order.copy()
    twice[0] = twice[1]
    wrong = crc[order]
    wrong[7] ^= 1
    for heads, crcs, why in (
        (head[order] ^ np.uint64(1 << 63), crc[order], "not given"),
        (head[twice], crc[twice], "twice"),
        (head[order][:-1], crc[order][:-1], f"{WINDOWS - 1} windows"),
        (head[order], wrong, "bytes"),
    ):
        with pytest.raises(peers.PeerFailed, match=why):
            windows.check_epoch(heads, crcs)


def test_the_benchmark_runs_and_its_page_and_plot_say_what_it_found(
    script: Script,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stream, report = script("stream"), script("stream_report")
    monkeypatch.setattr(stream, "PREFETCH", 1 << 20)
    monkeypatch.setattr(stream, "DECODED_NBYTES", 1 << 16)
    peers = script("against_peers")
    nowhere = peers.Known("none", "peer_litdata.py", (), "that nobody made")
    monkeypatch.setattr(peers, "PEERS_KNOWN", (*peers.PEERS_KNOWN, nowhere))
    size = replace(
        stream.QUICK, rounds=2, cold_rounds=1, pass_nbytes=1e5, remote_rounds=1, peer_rounds=1
    )
    with Cache.open(cache) as opened:
        bench = stream.Bench(opened, tmp_path, threads=2)
        result = stream.measure(
            bench, size, sections=["local", "peers", "remote"], names=["safetensors", "none"]
        )
    assert json.loads(json.dumps(result)) == result
    assert set(result["peers"]) | set(result["absent"]) == {"safetensors", "none"}
    assert result["ratio_peers"]["safetensors"] > 0
    assert result["ratio_raw_read"] > 0
    assert all(told["first epoch"]["ratio_link"] > 0 for told in result["remote"]["links"].values())
    for reader in result["local"]["warm, batches of 256"]["against_raw_read"]:
        assert f"| {reader} |" in report.markdown(result)
        assert reader in report.text(result)
    plot = ElementTree.fromstring(report.svg(result))
    drawn = {text.text for text in plot.iter("{http://www.w3.org/2000/svg}text")}
    assert {"memcpy", "stream", "safetensors"} <= drawn
    apart = [{k: v for k, v in result.items() if k != left} for left in ("local", "remote")]
    assert report.joined(apart) == [result]
    assert report.joined([result, {**result, "nbytes": 1}]) == [result, {**result, "nbytes": 1}]
    page = "before\n<!-- stream: begin -->\nold\n<!-- stream: end -->\nafter\n"
    assert report.put(page, "new") == page.replace("old", "new")
    with pytest.raises(SystemExit):
        report.put("no marks", "new")


def test_the_link_answers_late_and_no_faster_than_its_rate(script: Script, tmp_path: Path) -> None:
    link = script("link")
    content = np.random.default_rng(0).bytes(1 << 20)
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "object").write_bytes(content)
    (tmp_path / "secret").write_bytes(b"outside")
    server = link.Server(tmp_path / "inside", latency=0.05, rate=4e6)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1])

        def get(path: str, **headers: str) -> tuple[int, bytes, float]:
            begun = perf_counter()
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), perf_counter() - begun

        status, body, seconds = get("/object")
        assert (status, body) == (200, content)
        assert seconds >= 0.05 + (len(content) - link.PIECE) / 4e6 - 0.06
        status, body, seconds = get("/object", Range="bytes=100-199")
        assert (status, body) == (206, content[100:200])
        assert seconds >= 0.05
        assert get("/../secret")[:2] == (404, b"")
        connection.close()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_was_read_is_known_to_lie_in_memory(script: Script, tmp_path: Path) -> None:
    measuring = script("measuring")
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    assert measuring.resident([file]) == 1
    measuring.evict([file])
    assert 0 <= measuring.resident([file]) <= 1
    assert file.read_bytes() == bytes(1 << 20)
