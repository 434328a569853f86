"""A cache behind a URL is the cache, whatever servers and networks do; and nothing else is."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty_server import Fault, FaultyServer, serving
from small_cache import build_cache

from had_pipe.cache import Cache, Part, open_cache
from had_pipe.cache.fetch import fetch_cache
from had_pipe.cache.mirror import Mirror, MirrorStats
from had_pipe.errors import (
    CacheCorrupt,
    CacheMismatch,
    CacheRefused,
    HadPipeError,
    NetworkError,
    RecipeError,
    StorageError,
)
from had_pipe.stream import Stream

SHARD = "data.zarr/train/0/embedding/value/c/0/0/0"
OTHER = "data.zarr/train/0/embedding/value/c/1/0/0"
THIRD = "data.zarr/train/0/embedding/value/c/2/0/0"
SHARD_NBYTES = 42_244


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six parts of 64 windows."""
    folder = tmp_path_factory.mktemp("served") / "cache"
    build_cache(folder, windows=384, valid=32, part=64, channels=64)
    assert (folder / SHARD).stat().st_size == SHARD_NBYTES
    return folder


@pytest.fixture
def server(cache: Path) -> Iterator[FaultyServer]:
    with serving(cache) as server:
        yield server


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy") or name.startswith(
            ("AWS_", "GOOGLE_", "AZURE_", "HAD_")
        ):
            monkeypatch.delenv(name)


def mirrored(server: FaultyServer, folder: Path, **options: Any) -> Mirror:
    return Mirror(server.url, folder=folder, **{"patience": 10.0, "pause": 0.01, **options})


def contents(mirror: Mirror, key: str) -> bytes:
    with os.fdopen(mirror.open(key), "rb") as file:
        return file.read()


def windows(cache: Cache) -> list[np.ndarray]:
    """Everything of a cache that a stream reads."""
    out = cache.allocate(cache.rows("train"))
    cache.read("train", 0, np.arange(cache.rows("train")), out)
    assert out.scale is not None
    return [out.kmer_id, out.mask, out.reversed, out.value, out.scale]


# The cache is the cache


def test_a_cache_behind_a_url_holds_the_windows_of_the_cache(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(open_cache(server.url, mirror=tmp_path)) as remote:
        local = Cache.open(cache)
        assert remote.id == local.id
        assert remote.mirror is not None
        assert remote.mirror.path == tmp_path / local.id
        for ours, theirs in zip(windows(remote), windows(local), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert remote.locus("train", 5) == local.locus("train", 5)


def test_batches_over_a_mirror_are_those_of_the_local_cache_and_the_second_epoch_asks_nothing(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    epoch = 384 // 32
    with closing(open_cache(server.url, mirror=tmp_path)) as remote:
        near, far = (
            Stream([opened], batch=32, seed=3, prefetch=1 << 20) for opened in (cache, remote)
        )
        with closing(near), closing(far):
            for number in range(2 * epoch):
                ours, theirs = next(far), next(near)
                assert ours.target.equal(theirs.target)
                assert ours.kmer_id.equal(theirs.kmer_id)
                assert ours.mask.equal(theirs.mask)
                if number == epoch + 1:  # what is read ahead has come by then
                    asked = len(server.asked)
        assert len(server.asked) == asked
        assert server.count("embedding/value/c/3/0/0") == 1


def test_what_a_mirror_holds_is_not_asked_for_again(server: FaultyServer, tmp_path: Path) -> None:
    with closing(mirrored(server, tmp_path)) as mirror:
        first = contents(mirror, SHARD)
        assert mirror.stats() == MirrorStats(
            hits=0,
            misses=1,
            downloaded_nbytes=len(first),
            evicted_nbytes=0,
            waiting_seconds=mirror.stats().waiting_seconds,
            retries=0,
        )
    server.asked.clear()
    with closing(mirrored(server, tmp_path)) as again:
        assert contents(again, SHARD) == first
        assert (again.stats().hits, again.stats().misses) == (1, 0)
    assert sorted(asked.path for asked in server.asked) == ["manifest.json", "plan.json"]


def test_a_cache_behind_a_url_can_be_read_past_the_page_cache_but_not_through_zarr(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(open_cache(server.url, mirror=tmp_path, direct=True)) as remote:
        for ours, theirs in zip(windows(remote), windows(Cache.open(cache)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(RecipeError, match="only a local store"):
        open_cache(server.url, mirror=tmp_path, through_zarr=True)


def test_two_urls_of_one_cache_share_a_mirror(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    shutil.copytree(cache, tmp_path / "there" / "copy")
    with serving(tmp_path / "there") as other:
        with closing(mirrored(server, tmp_path / "mirror")) as mirror:
            contents(mirror, SHARD)
        url = f"{other.url}/copy/"
        with closing(Mirror(url, folder=tmp_path / "mirror")) as again:
            contents(again, SHARD)
    assert other.count("0/0") == 0


def test_what_is_no_object_of_the_cache_is_not_asked_for(
    server: FaultyServer, tmp_path: Path
) -> None:
    with closing(mirrored(server, tmp_path)) as mirror:
        for key in ("../outside", "data.zarr/train/0/embedding/value/c/99/0/0", "manifest.json"):
            with pytest.raises(FileNotFoundError):
                mirror.open(key)
    assert len(server.asked) == 2


# Faults that pass


@pytest.mark.parametrize(
    ("faults", "retries"),
    [
        ([Fault(status=500), Fault(status=503)], 2),
        ([Fault(status=429, headers={"Retry-After": "0"}), Fault(status=408)], 2),
        ([Fault(reset_after=0)], 1),
        ([Fault(reset_after=20_000)], 1),
        ([Fault(short_by=1)], 1),
        ([Fault(short_by=30_000), Fault(reset_after=5_000), Fault(short_by=1)], 3),
        ([Fault(stall_after=10_000)], 1),
        ([Fault(flip=True)], 1),
        ([Fault(body=b"<html>Please log in</html>")], 1),
        ([Fault(etag='W/"weak"', reset_after=9_000)], 1),
        ([Fault(etag='"old"', flip=True, reset_after=9_000)], 1),
        ([Fault(drip_seconds=0.01)], 1),
    ],
    ids=lambda value: None if isinstance(value, list) else str(value),
)
def test_what_passes_is_borne(
    cache: Path, server: FaultyServer, tmp_path: Path, faults: list[Fault], retries: int
) -> None:
    server.faults[SHARD] = list(faults)
    silent = any(fault.stall_after or fault.drip_seconds for fault in faults)
    with closing(mirrored(server, tmp_path, patience=0.5 if silent else 10.0)) as mirror:
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()
        assert mirror.stats().retries == retries
    assert not server.faults[SHARD]


def test_a_download_goes_on_where_it_was_cut_off(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.faults[SHARD] = [Fault(reset_after=20_000)]
    with closing(mirrored(server, tmp_path)) as mirror:
        contents(mirror, SHARD)
    ranges = [asked.range for asked in server.asked if asked.path == SHARD]
    assert ranges == [None, "bytes=20000-"]


def test_an_object_that_changed_is_begun_anew(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    # The tag of the first answer is not the tag of the second: nothing of the two is put together.
    server.faults[SHARD] = [Fault(etag='"old"', body=bytes(SHARD_NBYTES), reset_after=20_000)]
    with closing(mirrored(server, tmp_path)) as mirror:
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


def test_a_redirect_on_the_same_host_is_followed(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.faults[SHARD] = [Fault(status=302, headers={"Location": f"/{OTHER}"})]
    server.faults[OTHER] = [Fault(body=(cache / SHARD).read_bytes())]
    with closing(mirrored(server, tmp_path)) as mirror:
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


def test_a_server_without_ranges_and_tags_will_do(cache: Path, tmp_path: Path) -> None:
    done = subprocess.Popen(
        [sys.executable, "-u", "-m", "http.server", "0", "--bind", "127.0.0.1"],
        cwd=cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert done.stdout is not None
        port = done.stdout.readline().split(" port ")[1].split()[0]
        with closing(Mirror(f"http://127.0.0.1:{port}", folder=tmp_path)) as mirror:
            assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()
    finally:
        done.kill()
        done.communicate()


# Faults that do not


def nothing_came(mirror: Mirror, key: str) -> None:
    assert not (mirror.path / key).exists()
    assert list((mirror.folder / ".parts").iterdir()) == []


@pytest.mark.parametrize(
    ("fault", "error", "told", "requests"),
    [
        (Fault(status=404), NetworkError, "404 Not Found: it is not there", 1),
        (Fault(status=403), NetworkError, "403 Forbidden: access is refused", 1),
        (Fault(status=418), NetworkError, "418", 1),
        (Fault(status=500), NetworkError, r"500 Internal Server Error \(after 6 attempts\)", 6),
        (Fault(reset_after=100), NetworkError, r"connection failed|cut off|ended after", 6),
        (Fault(flip=True), CacheCorrupt, "SHA-256 is .*, the manifest says .*asked for twice", 2),
        (Fault(body=b"<html>"), CacheCorrupt, "6 bytes, the manifest says", 2),
        (Fault(endless=True), CacheCorrupt, "more than the .* bytes", 2),
        (Fault(headers={"Content-Encoding": "gzip"}), NetworkError, "'gzip' encoding", 1),
        (Fault(status=302, headers={"Location": f"/{SHARD}"}), NetworkError, "more than 5", 5),
        (Fault(status=302, headers={"Location": "http://[::"}), NetworkError, "no URL", 1),
        (Fault(status=302, headers={"Location": "ftp://127.0.0.1/"}), NetworkError, "not named", 1),
        (Fault(status=302, headers={"Location": "/\u00e9 {"}), NetworkError, "404", 1),
    ],
    ids=lambda value: None if isinstance(value, type | int) else str(value)[:60],
)
def test_what_does_not_pass_is_told_at_once_or_soon(
    server: FaultyServer,
    tmp_path: Path,
    fault: Fault,
    error: type[HadPipeError],
    told: str,
    requests: int,
) -> None:
    server.always[SHARD] = fault
    with closing(mirrored(server, tmp_path, pause=0.001)) as mirror:
        with pytest.raises(error, match=told) as caught:
            mirror.open(SHARD)
        assert str(caught.value).startswith(f"{server.url}/{SHARD}: ")
        assert server.count(SHARD) == requests
        nothing_came(mirror, SHARD)


def test_a_server_that_drips_for_ever_is_given_up(server: FaultyServer, tmp_path: Path) -> None:
    server.always[SHARD] = Fault(drip_seconds=0.01)
    with closing(mirrored(server, tmp_path, patience=0.2, pause=0.001)) as mirror:
        with pytest.raises(NetworkError, match=r"only .* bytes came in|nothing came for"):
            mirror.open(SHARD)
        assert server.count(SHARD) == 6


@pytest.mark.parametrize(
    "answer",
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\n", b"X-More: 1\r\n"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n", b"X: 1\r\n"),
        (
            b"HTTP/1.1 200 OK\r\nConnection: close\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n",
            b"X: 1\r\n",
        ),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"),
        (b"", b"x"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", b"x"),
    ],
    ids=[
        *("continue", "headers", "trailers", "last trailers", "chunk length", "noise"),
        "negative length",
    ],
)
def test_a_server_that_talks_for_ever_is_given_up(
    tmp_path: Path, answer: tuple[bytes, ...]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError):
                        connection.recv(1 << 16)
                        connection.sendall(answer[0])
                        while True:
                            connection.sendall(answer[-1])
                            time.sleep(0.002)

        thread = threading.Thread(target=talk, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with pytest.raises((NetworkError, CacheCorrupt)):
            Mirror(url, folder=tmp_path, patience=0.1, pause=0.001)
        listening.shutdown(socket.SHUT_RDWR)
        thread.join(20)
    assert not thread.is_alive()


def test_another_host_is_never_asked(cache: Path, server: FaultyServer, tmp_path: Path) -> None:
    with serving(cache) as other:
        for place in (f"{other.url}/{SHARD}", f"//{other.url.partition('//')[2]}/{SHARD}"):
            server.faults[SHARD] = [Fault(status=307, headers={"Location": place})]
            with (
                closing(mirrored(server, tmp_path)) as mirror,
                pytest.raises(NetworkError, match="which was not named"),
            ):
                mirror.open(SHARD)
        assert other.asked == []


def test_a_page_in_place_of_a_plan_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    server.always["plan.json"] = Fault(body=b"<html>Please log in</html>")
    with pytest.raises(CacheRefused, match=r"http://127.*/plan.json: not what format 1 says"):
        mirrored(server, tmp_path)


@pytest.mark.parametrize("name", ["plan.json", "manifest.json"])
def test_an_endless_description_is_cut_short(
    server: FaultyServer, tmp_path: Path, name: str
) -> None:
    server.always[name] = Fault(endless=True)
    with pytest.raises(CacheCorrupt, match=r"more than [0-9,]+ bytes"):
        mirrored(server, tmp_path)


def test_a_url_without_a_cache_is_told(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"plan.json: .*expected the URL of a finished cache"):
        Mirror(f"{server.url}/elsewhere", folder=tmp_path)
    assert not any(tmp_path.iterdir())


def test_a_manifest_cannot_name_what_the_plan_does_not_imply(cache: Path, tmp_path: Path) -> None:
    from had_pipe.cache.layout import Manifest, ObjectRecord, read_manifest, read_plan

    plan, _ = read_plan(cache)
    manifest = read_manifest(cache, plan)
    assert manifest is not None
    hostile = [
        {**manifest.objects, "../../outside": ObjectRecord(nbytes=1, sha256="0" * 64)},
        {**manifest.objects, SHARD: ObjectRecord(nbytes=1 << 50, sha256="0" * 64)},
        {key: record for key, record in manifest.objects.items() if key != SHARD},
    ]
    for number, objects in enumerate(hostile):
        there = tmp_path / str(number)
        there.mkdir()
        shutil.copy(cache / "plan.json", there)
        (there / "manifest.json").write_bytes(Manifest.build(plan, objects).to_json())
        with serving(there) as server:
            with pytest.raises(CacheRefused, match=r"does not list|more than the|objects"):
                mirrored(server, tmp_path / "mirror")
            assert len(server.asked) == 2
    assert not (tmp_path / "mirror").exists()


def test_a_host_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match=r"Connection refused\) \(after 6 attempts\)"):
        Mirror("http://127.0.0.1:9", folder=tmp_path, pause=0.001)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/cache",
        "file:///etc",
        "http://",
        "https://exa mple.org/",
        "http://example.org:99999/",
        "s3://key:hidden@bucket/cache",
        "s3://bucket/cache?X-Amz-Signature=hidden",
    ],
)
def test_what_is_no_url_of_a_cache_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Mirror(url, folder=tmp_path)
    assert "hidden" not in str(caught.value)


# Secrets


def test_a_secret_in_a_url_is_used_and_never_told(
    cache: Path,
    server: FaultyServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    server.password = "alice:hunter2"
    url = server.url.replace("//", "//alice:hunter2@") + "/?X-Amz-Signature=hunter2&x=1"
    faults = [
        Fault(status=404),
        Fault(status=403),
        Fault(status=500),
        Fault(flip=True),
        Fault(reset_after=10),
        Fault(stall_after=10),
        Fault(status=302, headers={"Location": "http://bob:hunter2@elsewhere/?Signature=hunter2"}),
        Fault(status=302, headers={"Location": "http://elsewhere:hunter2/"}),
    ]
    told = ""
    with closing(Mirror(url, folder=tmp_path / "m", patience=0.05, pause=0.001)) as mirror:
        contents(mirror, OTHER)
        for fault in faults:
            server.always[SHARD] = fault
            try:
                mirror.open(SHARD)
            except HadPipeError as error:
                told += "".join(traceback.format_exception(error))
                told += repr(error) + repr(error.__cause__) + repr(error.__context__)
    server.password = "changed"
    with pytest.raises(NetworkError, match="401") as caught:
        Mirror(url, folder=tmp_path / "m")
    told += "".join(traceback.format_exception(caught.value))
    with pytest.raises(NetworkError) as caught:
        fetch_cache(url, tmp_path / "whole")
    told += str(caught.value)

    assert all(asked.query == "X-Amz-Signature=hunter2&x=1" for asked in server.asked)
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    names = " ".join(map(str, tmp_path.rglob("*")))
    out, err = capfd.readouterr()
    for place in (told, caplog.text, names, out, err, mirror.url):
        assert "hunter2" not in place
        assert "alice" not in place
    assert b"hunter2" not in written


# Sharing and crashing


_READ = """
import os, sys
from pathlib import Path
from had_pipe.cache.mirror import Mirror
mirror = Mirror(sys.argv[1], folder=Path(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
for key in sys.argv[3:]:
    with os.fdopen(mirror.open(key), "rb") as file:
        print(len(file.read()), flush=True)
mirror.close()
"""


def reading(url: str, folder: Path, *keys: str, times: int = 1) -> list[subprocess.Popen[str]]:
    """Processes that open a mirror at one time, and are ready to read."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _READ, url, str(folder), *keys],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(times)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    return processes


def test_processes_and_threads_share_one_download(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    keys = (SHARD, OTHER, THIRD)
    others = reading(server.url, tmp_path, *keys, times=3)
    server.latency = 0.15
    with closing(mirrored(server, tmp_path)) as mirror:
        found: list[bytes] = []
        threads = [
            threading.Thread(target=lambda: found.extend(contents(mirror, key) for key in keys))
            for _ in range(4)
        ]
        for other in others:
            assert other.stdin is not None
            other.stdin.write("\n")
            other.stdin.flush()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        told = [other.communicate(timeout=60)[0].split() for other in others]
    whole = [str((cache / key).stat().st_size) for key in keys]
    assert told == [whole] * 3
    assert sorted(found) == sorted([(cache / key).read_bytes() for key in keys] * 4)
    assert [server.count(key) for key in keys] == [1, 1, 1]


def test_a_process_killed_while_it_downloads_leaves_nothing_that_looks_whole(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.faults[SHARD] = [Fault(stall_after=30_000)]
    (other,) = reading(server.url, tmp_path, SHARD)
    assert other.stdin is not None
    other.stdin.write("\n")
    other.stdin.flush()
    parts = tmp_path / ".parts"
    deadline = time.monotonic() + 20
    while not any(path.stat().st_size for path in parts.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    assert [path.name.endswith(".part") for path in parts.iterdir()] == [True]
    with closing(mirrored(server, tmp_path)) as mirror:
        assert list(parts.iterdir()) == []
        assert not (mirror.path / SHARD).exists()
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


_READ_AND_DIE = """
import os, random, sys
from pathlib import Path
from had_pipe.cache.mirror import Mirror
url, folder, limit, *keys = sys.argv[1:]
while True:
    worker = os.fork()
    if worker == 0:
        chosen = random.Random(os.getpid())
        mirror = Mirror(url, folder=Path(folder), limit_nbytes=int(limit))
        mirror.coming(chosen.choices(keys, k=500))
        while True:
            with os.fdopen(mirror.open(chosen.choice(keys)), "rb") as file:
                file.read()
    print(worker, flush=True)
    sys.stdin.readline()
    os.kill(worker, 9)
    os.waitpid(worker, 0)
"""


@pytest.mark.slow
def test_what_lies_in_a_mirror_is_whole_whoever_was_killed_when(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    expected = objects_of(cache)
    keys = list(expected)
    limit, kills, chosen = 4 * SHARD_NBYTES, 0, random.Random(1)
    command = [sys.executable, "-c", _READ_AND_DIE, server.url, str(tmp_path), str(limit), *keys]
    readers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for _ in range(3)
    ]
    try:
        deadline = time.monotonic() + 12
        while time.monotonic() < deadline:
            for reader in chosen.sample(readers, 3):
                assert reader.stdin is not None
                assert reader.stdout is not None
                assert reader.stdout.readline().strip().isdigit()  # another one begins
                time.sleep(chosen.uniform(0.01, 0.1))
                reader.stdin.write("\n")
                reader.stdin.flush()
                kills += 1
            for key in keys:
                for path in tmp_path.glob(f"[0-9a-f]*/{key}"):
                    with suppress(FileNotFoundError):
                        assert path.read_bytes() == expected[key]
    finally:
        for reader in readers:
            os.killpg(reader.pid, signal.SIGKILL)
            reader.communicate()
    with closing(mirrored(server, tmp_path, limit_nbytes=limit)) as mirror:
        assert list((tmp_path / ".parts").iterdir()) == []
        assert held_nbytes(tmp_path) == int((tmp_path / ".usage").read_bytes())
        for key in keys:
            assert contents(mirror, key) == expected[key]
        assert held_nbytes(tmp_path) <= limit
    assert kills > 20
    print(f"{kills} kills")


def test_a_download_under_way_elsewhere_is_not_swept_away(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(mirrored(server, tmp_path)) as mirror:
        server.held.add(SHARD)
        thread = threading.Thread(target=contents, args=(mirror, SHARD))
        thread.start()
        settled(lambda: server.count(SHARD))
        with closing(mirrored(server, tmp_path)):
            assert len(list((tmp_path / ".parts").iterdir())) == 1
        server.held.clear()
        thread.join()
    assert server.count(SHARD) == 1


def test_an_object_of_another_length_is_brought_anew(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(mirrored(server, tmp_path)) as mirror:
        contents(mirror, SHARD)
        with (mirror.path / SHARD).open("ab") as file:
            file.write(b"more")
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


@pytest.mark.parametrize("key", [SHARD, "data.zarr/train/0/mask/c/0/0"])
def test_damage_done_to_a_mirror_is_told_with_what_mends_it(
    cache: Path, server: FaultyServer, tmp_path: Path, key: str
) -> None:
    local = Cache.open(cache)
    with closing(open_cache(server.url, mirror=tmp_path)) as remote:
        windows(remote)
    damaged = tmp_path / local.id / key
    with damaged.open("r+b") as file:
        file.seek(5)
        byte = file.read(1)[0]
        file.seek(5)
        file.write(bytes([byte ^ 1]))
    with (
        closing(open_cache(server.url, mirror=tmp_path)) as remote,
        pytest.raises(CacheCorrupt, match="remove it from this mirror, and the next run") as told,
    ):
        windows(remote)
    assert key in str(told.value)
    damaged.unlink()
    with closing(open_cache(server.url, mirror=tmp_path)) as remote:
        for ours, theirs in zip(windows(remote), windows(local), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_a_link_in_the_mirror_is_refused(cache: Path, server: FaultyServer, tmp_path: Path) -> None:
    with closing(mirrored(server, tmp_path / "m")) as mirror:
        contents(mirror, SHARD)
        (mirror.path / SHARD).unlink()
        (mirror.path / SHARD).symlink_to(cache / SHARD)
        with pytest.raises(CacheRefused, match="found a link"):
            mirror.open(SHARD)


def test_a_description_that_was_changed_in_the_mirror_is_written_anew(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(mirrored(server, tmp_path)) as mirror:
        (mirror.path / "plan.json").write_bytes(b"{}")
    with closing(mirrored(server, tmp_path)) as mirror:
        assert (mirror.path / "plan.json").read_bytes() == (cache / "plan.json").read_bytes()


def test_a_file_system_without_locks_is_told(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(fd: int, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(StorageError, match=r"has no locks .*--mirror"):
        mirrored(server, tmp_path)


# Room


def held_nbytes(folder: Path) -> int:
    return sum(
        path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".usage"
    )


def test_the_least_recently_used_goes_and_the_limit_is_kept(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    shard = (cache / SHARD).stat().st_size
    described = sum((cache / name).stat().st_size for name in ("plan.json", "manifest.json"))
    limit = described + int(3.5 * shard)
    keys = [SHARD.replace("c/0", f"c/{number}") for number in range(6)]
    with closing(mirrored(server, tmp_path, limit_nbytes=limit)) as mirror:
        for key in (*keys[:3], keys[0], keys[3]):
            assert contents(mirror, key) == (cache / key).read_bytes()
            assert held_nbytes(tmp_path) <= limit
            time.sleep(0.01)
        assert [(mirror.path / key).exists() for key in keys[:4]] == [True, False, True, True]
        assert mirror.stats().evicted_nbytes == shard


def test_what_is_being_read_is_never_evicted(
    cache: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = (cache / SHARD).stat().st_size
    described = sum((cache / name).stat().st_size for name in ("plan.json", "manifest.json"))
    keys = [SHARD.replace("c/0", f"c/{number}") for number in range(6)]
    limit = described + int(3.5 * shard)
    with closing(mirrored(server, tmp_path, limit_nbytes=limit)) as mirror:
        opened = mirror.open(keys[0])
        for key in keys[1:]:
            contents(mirror, key)
        assert (mirror.path / keys[0]).exists()
        more = [mirror.open(keys[1]), mirror.open(keys[2])]
        monkeypatch.setattr(mirror, "_patience", 0.2)
        with pytest.raises(StorageError, match=r"are being read, and .* needs .* more; allow"):
            mirror.open(keys[3])
        os.close(more.pop())
        os.close(mirror.open(keys[3]))
        with os.fdopen(opened, "rb") as file:
            assert file.read() == (cache / keys[0]).read_bytes()
        os.close(more.pop())


def test_another_process_does_not_evict_what_is_read_here(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(mirrored(server, tmp_path)) as mirror:
        opened = mirror.open(SHARD)
        contents(mirror, OTHER)
        limit = held_nbytes(tmp_path) + 100
        with closing(mirrored(server, tmp_path, limit_nbytes=limit)) as small:
            contents(small, THIRD)
        assert (mirror.path / SHARD).exists()
        assert not (mirror.path / OTHER).exists()
        os.close(opened)


def test_a_cache_reads_on_in_a_mirror_too_small_for_it(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    whole = Cache.open(cache)
    with closing(
        open_cache(server.url, mirror=tmp_path, mirror_nbytes=held_nbytes(cache) // 2)
    ) as remote:
        for _ in range(2):
            for ours, theirs in zip(windows(remote), windows(whole), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert remote.mirror is not None
        assert remote.mirror.stats().evicted_nbytes > 0
        assert held_nbytes(tmp_path) <= remote.mirror.limit_nbytes


def test_a_limit_below_all_use_is_refused(server: FaultyServer, tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"needs at least 84\.5 kB"):
        mirrored(server, tmp_path, limit_nbytes=50_000)


def test_nothing_but_caches_is_ever_removed(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(bytes(1000))
    (tmp_path / "note").write_bytes(bytes(1000))
    with closing(mirrored(server, tmp_path, limit_nbytes=130_000)) as mirror:
        for number in range(6):
            contents(mirror, SHARD.replace("c/0", f"c/{number}"))
        assert mirror.stats().evicted_nbytes > 0
    assert (tmp_path / "precious" / "file").exists()
    assert (tmp_path / "note").exists()


def test_a_full_disk_is_told_and_leaves_nothing(
    cache: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(mirrored(server, tmp_path)) as mirror:
        before = held_nbytes(tmp_path)
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(StorageError, match="no space is left"):
                mirror.open(SHARD)
        nothing_came(mirror, SHARD)
        assert held_nbytes(tmp_path) == before == int((tmp_path / ".usage").read_bytes())
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


def test_a_disk_that_others_fill_holds_less_of_a_cache_and_ends_no_run(
    cache: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Within the limit, but there is room on the disk for two and a half shards.
    described = sum((cache / name).stat().st_size for name in ("plan.json", "manifest.json"))
    disk = described + int(2.5 * SHARD_NBYTES) + (1 << 16)  # which is left free
    monkeypatch.setattr(
        "had_pipe.cache.mirror.free_nbytes", lambda folder: disk - held_nbytes(folder)
    )
    with closing(mirrored(server, tmp_path, limit_nbytes=10**9)) as mirror:
        for key in (SHARD, OTHER, THIRD, SHARD):
            assert contents(mirror, key) == (cache / key).read_bytes()
            assert held_nbytes(tmp_path) <= disk
        assert mirror.stats().evicted_nbytes == 2 * SHARD_NBYTES
        opened = [mirror.open(SHARD), mirror.open(OTHER)]
        monkeypatch.setattr(mirror, "_patience", 0.02)
        with pytest.raises(StorageError, match=r"disk is full, and all .* is being read"):
            mirror.open(THIRD)
        for descriptor in opened:
            os.close(descriptor)


def test_a_mirror_cannot_lie_in_a_file(server: FaultyServer, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "m"):
        with pytest.raises(RecipeError, match="not a folder; name another"):
            mirrored(server, folder)


def test_many_threads_in_a_small_mirror_over_a_bad_network_read_what_is_there(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    expected = objects_of(cache)
    keys = list(expected)
    bad = [Fault(status=503), Fault(reset_after=7), Fault(flip=True), Fault(short_by=1)]
    failed: list[BaseException] = []

    def read(seed: int) -> None:
        chosen = random.Random(seed)
        try:
            for _ in range(30):
                key = chosen.choice(keys)
                if chosen.random() < 0.2:
                    server.faults[key] = [chosen.choice(bad)]  # one at a time: two are no accident
                with os.fdopen(mirror.open(key), "rb") as file:
                    time.sleep(chosen.choice((0, 0, 0.01)))
                    assert file.read() == expected[key]
        except BaseException as error:
            failed.append(error)

    with closing(mirrored(server, tmp_path, limit_nbytes=5 * SHARD_NBYTES)) as mirror:
        mirror.coming(random.Random(9).choices(keys, k=200))
        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failed == []
        assert mirror.stats().evicted_nbytes > 0
    # What was just renamed may be counted twice, until somebody looks around again.
    assert held_nbytes(tmp_path) <= int((tmp_path / ".usage").read_bytes()) <= 5 * SHARD_NBYTES
    with closing(mirrored(server, tmp_path)):
        assert held_nbytes(tmp_path) == int((tmp_path / ".usage").read_bytes())


@pytest.mark.timeout(60)
def test_readers_waiting_for_room_do_not_keep_each_other_from_it(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    # Room for two shards: each of eight threads goes from part to part.
    with (
        closing(open_cache(server.url, mirror=tmp_path, mirror_nbytes=100_000)) as remote,
        closing(Stream([remote], batch=128, seed=3, threads=8, prefetch=1 << 20)) as far,
        closing(Stream([cache], batch=128, seed=3)) as near,
    ):
        for _ in range(9):
            assert next(far).target.equal(next(near).target)


@pytest.mark.timeout(60)
def test_caches_that_share_a_small_mirror_make_room_for_each_other(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    there = tmp_path / "there"
    for seed in (1, 2, 3):
        build_cache(there / str(seed), windows=384, valid=0, part=64, channels=64, seed=seed)
    with serving(there) as several:
        caches = [
            open_cache(f"{several.url}/{seed}", mirror=tmp_path / "m", mirror_nbytes=300_000)
            for seed in (1, 2, 3)
        ]
        for opened in caches:  # as many parts of each as it may keep
            assert len(windows(opened)) == 5
        with (
            closing(Stream(caches, batch=96, seed=3, weights=[1, 1, 1], prefetch=1)) as far,
            closing(
                Stream([there / "1", there / "2", there / "3"], batch=96, seed=3, weights=[1, 1, 1])
            ) as near,
        ):
            for _ in range(2):
                assert next(far).target.equal(next(near).target)
        for opened in caches:
            opened.close()


_READ_AND_REST = """
import sys
from pathlib import Path
import numpy as np
from had_pipe.cache import open_cache
url, folder, limit, first = sys.argv[1:]
cache = open_cache(url, mirror=Path(folder), mirror_nbytes=int(limit))
cache.coming(())
cache.read("train", 0, np.arange(128) + int(first), cache.allocate(128))
print(len(cache._parts), flush=True)
sys.stdin.readline()
"""


@pytest.mark.timeout(60)
def test_processes_that_stand_still_make_room_for_those_that_read(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    limit = 4 * SHARD_NBYTES + 40_000
    resting = [
        subprocess.Popen(
            [sys.executable, "-c", _READ_AND_REST, server.url, str(tmp_path), str(limit), first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for first in ("0", "128")
    ]
    try:
        for other in resting:
            assert other.stdout is not None
            assert other.stdout.readline() == "2\n"  # parts that it keeps open
        mirror = mirrored(server, tmp_path, limit_nbytes=limit)
        with closing(Cache.open(mirror.path, mirror=mirror)) as remote:
            mirror.let_go = remote.let_go
            for ours, theirs in zip(windows(remote), windows(Cache.open(cache)), strict=True):
                np.testing.assert_array_equal(ours, theirs)
        assert [other.poll() for other in resting] == [None, None]
    finally:
        for other in resting:
            other.communicate("\n")


# What is to come


def objects_of(cache: Path) -> dict[str, bytes]:
    """All objects of a cache but those that describe it."""
    return {
        str(path.relative_to(cache)): path.read_bytes()
        for path in cache.rglob("*")
        if path.is_file() and path.name not in ("plan.json", "manifest.json")
    }


def settled(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_comes_is_brought_ahead_in_its_order(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    keys = [SHARD.replace("c/0", f"c/{number}") for number in (4, 1, 5, 0)]
    with closing(mirrored(server, tmp_path, connections=1)) as mirror:
        mirror.coming(keys)
        settled(lambda: all((mirror.path / key).exists() for key in keys))
        assert [asked.path for asked in server.asked if asked.path.endswith("/0/0")] == keys
        contents(mirror, keys[2])
        assert (mirror.stats().hits, mirror.stats().misses) == (1, 0)


def test_no_more_is_brought_ahead_than_half_of_the_limit(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    keys = [SHARD.replace("c/0", f"c/{number}") for number in range(6)]
    shard = (cache / SHARD).stat().st_size

    def endless() -> Iterator[str]:
        while True:
            yield from keys

    with closing(mirrored(server, tmp_path, connections=1, limit_nbytes=6 * shard)) as mirror:
        mirror.coming(endless())
        settled(lambda: mirror.stats().downloaded_nbytes == 3 * shard)
        time.sleep(0.1)
        assert server.count("/0/0") == 3
        for turn in range(4):
            for number, key in enumerate(keys):
                contents(mirror, key)
                if turn == 0 and number == 1:
                    settled(lambda: mirror.stats().downloaded_nbytes == 5 * shard)
        assert mirror.stats().downloaded_nbytes < 24 * shard
        assert held_nbytes(tmp_path) <= 6 * shard


def test_what_was_to_come_can_be_said_anew(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(mirrored(server, tmp_path, connections=2)) as mirror:
        for _ in range(20):
            mirror.coming([SHARD] * 5)
        mirror.coming([OTHER, THIRD])
        settled(lambda: (mirror.path / OTHER).exists() and (mirror.path / THIRD).exists())


def closes_soon(server: FaultyServer, mirror: Mirror) -> None:
    """Close a mirror while one thread waits for a shard that does not come."""
    failed: list[BaseException] = []

    def read() -> None:
        try:
            mirror.open(SHARD)
        except NetworkError as error:
            failed.append(error)

    thread = threading.Thread(target=read)
    thread.start()
    settled(lambda: server.count(SHARD))
    begun = time.monotonic()
    mirror.close()
    thread.join(10)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 10
    assert len(failed) == 1
    nothing_came(mirror, SHARD)


@pytest.mark.parametrize("last", [False, True], ids=["kept", "last answer"])
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secure"])
def test_a_mirror_closes_in_the_middle_of_everything(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool, last: bool
) -> None:
    context, authority = certified(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(authority))
    stall = Fault(stall_after=5, headers={"Connection": "close"} if last else {})
    with serving(cache, tls=context if secure else None) as server:
        server.always[SHARD] = server.always[OTHER] = stall
        mirror = mirrored(server, tmp_path / "m", patience=30)
        mirror.coming([OTHER])
        settled(lambda: server.count(OTHER))
        closes_soon(server, mirror)


def test_a_cache_tells_its_mirror_what_comes(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    with closing(open_cache(server.url, mirror=tmp_path)) as remote:
        assert remote.mirror is not None
        remote.coming([Part("train", 0, 3)])
        for key in remote._keys(Part("train", 0, 3)):  # brought in any order
            settled((tmp_path / remote.id / key).exists)
        out = remote.allocate(1)
        asked = len(server.asked)
        remote.read("train", 0, np.array([3 * 64]), out)
        assert len(server.asked) == asked
    Cache.open(cache).coming([Part("train", 0, 3)])  # a local cache has no use for it


# Other ways to a server


def test_a_proxy_of_the_environment_is_used(
    cache: Path, server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url.replace("//", "//user:pass@"))
    with closing(Mirror("http://nowhere.invalid/", folder=tmp_path)) as mirror:
        assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


def test_a_certificate_must_be_trusted(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context, authority = certified(tmp_path)
    with serving(cache, tls=context) as server:
        with pytest.raises(NetworkError, match="certificate is not to be trusted"):
            mirrored(server, tmp_path / "m")
        monkeypatch.setenv("SSL_CERT_FILE", str(authority))
        with closing(mirrored(server, tmp_path / "m")) as mirror:
            assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


def certified(folder: Path) -> tuple[Any, Path]:
    """A server's TLS context for 127.0.0.1, and the certificate that vouches for it."""
    import datetime
    import ipaddress
    import ssl

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a test")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    secret, public = folder / "key.pem", folder / "certificate.pem"
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    public.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(public, secret)
    return context, public


# The whole cache


def test_a_whole_cache_is_fetched_under_its_id(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    done = fetch_cache(
        server.url, tmp_path / "copy", report=lambda told: seen.append((told.done, told.total))
    )
    assert done.cache_id == Cache.open(tmp_path / "copy").id == Cache.open(cache).id
    assert done.made == done.total
    assert seen[-1] == (done.nbytes, done.nbytes)
    for path in cache.rglob("*"):
        if path.is_file():
            there = tmp_path / "copy" / path.relative_to(cache)
            assert there.read_bytes() == path.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
    server.asked.clear()
    assert fetch_cache(server.url, tmp_path / "copy").made == 0
    assert len(server.asked) == 2


def test_fetching_goes_on_where_it_stopped_and_shows_nothing_unfinished(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.always[THIRD] = Fault(status=403)
    with pytest.raises(NetworkError, match="403"):
        fetch_cache(server.url, tmp_path / "copy", connections=1)
    assert not (tmp_path / "copy").exists()
    server.always.clear()
    assert server.count(SHARD) == 1
    done = fetch_cache(server.url, tmp_path / "copy")
    assert 0 < done.made < done.total
    assert server.count(SHARD) == 1
    assert Cache.open(tmp_path / "copy").id == done.cache_id


def test_a_target_that_can_be_no_folder_is_refused_before_anything_comes(
    server: FaultyServer, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    for target, told in (
        ("file/in", "no folder can be made"),
        ("file", "not empty"),
        ("link", "a link"),
    ):
        with pytest.raises(CacheRefused, match=told):
            fetch_cache(server.url, tmp_path / target)
    assert server.count("c/0/0/0") == 0


def test_fetching_another_cache_into_the_same_place_is_refused(
    cache: Path, server: FaultyServer, tmp_path: Path
) -> None:
    server.always[THIRD] = Fault(status=403)
    with pytest.raises(NetworkError):
        fetch_cache(server.url, tmp_path / "copy")
    other = build_cache(tmp_path / "other", windows=64, valid=0, part=32, seed=9)
    with serving(other) as others:
        with pytest.raises(CacheMismatch, match="another cache was begun"):
            fetch_cache(others.url, tmp_path / "copy")
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "file").touch()
        for target in ("full", "full/file"):
            with pytest.raises(CacheRefused, match="use another target"):
                fetch_cache(others.url, tmp_path / target)
        shutil.copytree(cache, tmp_path / "finished")
        with pytest.raises(CacheRefused, match="use another target"):
            fetch_cache(others.url, tmp_path / "finished")
        (tmp_path / "empty").mkdir()
        assert fetch_cache(others.url, tmp_path / "empty").made > 0


# Object stores


@pytest.fixture(scope="module")
def bucket(cache: Path) -> Iterator[str]:
    """A cache in a bucket of a server that speaks S3; the server's address."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    client = boto3.client(
        "s3",
        endpoint_url=endpoint,
        region_name="us-east-1",
        aws_access_key_id="key",
        aws_secret_access_key="hunter2",
    )
    client.create_bucket(Bucket="caches")
    for path in cache.rglob("*"):
        if path.is_file():
            for folder, acl in (("one/cache", "private"), ("public", "public-read")):
                key = f"{folder}/{path.relative_to(cache)}"
                client.put_object(Bucket="caches", Key=key, Body=path.read_bytes(), ACL=acl)
    client.close()
    yield endpoint
    server.stop()


@pytest.mark.parametrize("signed", [True, False])
def test_a_cache_in_a_bucket_is_the_cache(
    cache: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signed: bool
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", bucket)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    if signed:
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    url = f"s3://caches/{'one/cache' if signed else 'public/'}"
    with closing(open_cache(url, mirror=tmp_path)) as remote:
        for ours, theirs in zip(windows(remote), windows(Cache.open(cache)), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    told, place = "it is not there", "one"
    if not signed:
        told, place = "not to be had without credentials; set AWS_ACCESS_KEY_ID", "one/cache"
    with pytest.raises(NetworkError, match=f"s3://caches/{place}/plan.json: .*{told}"):
        open_cache(f"s3://caches/{place}", mirror=tmp_path)


@pytest.mark.parametrize(
    ("faults", "told"),
    [
        ([Fault(status=500), Fault(status=503)], None),
        ([Fault(reset_after=20_000)], None),
        ([Fault(short_by=1)], None),
        ([Fault(stall_after=10_000)], None),
        ([Fault(flip=True)], None),
        ([Fault(etag='"old"', body=bytes(SHARD_NBYTES), reset_after=20_000)], None),
        ([Fault(status=403)], "s3://caches/.*: access is refused: not to be had without"),
        ([Fault(status=500)] * 6, r"s3://caches/.*: the store answers 500 \(after 6"),
        ([Fault(flip=True)] * 2, r"SHA-256 is .* \(asked for twice\)"),
    ],
    ids=str,
)
def test_a_bucket_may_fail_as_a_server_may(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    faults: list[Fault],
    told: str | None,
) -> None:
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3" / "caches").symlink_to(cache)
    with serving(tmp_path / "s3") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        mirror = Mirror("s3://caches", folder=tmp_path / "m", patience=0.5, pause=0.001)
        with closing(mirror):
            server.faults[f"caches/{SHARD}"] = list(faults)
            if told is None:
                assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()
            else:
                with pytest.raises(HadPipeError, match=told):
                    mirror.open(SHARD)
        assert not server.faults[f"caches/{SHARD}"]


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("gs://caches", {"GOOGLE_BASE_URL": ""}),
        ("az://caches", {"AZURE_STORAGE_ENDPOINT": "", "AZURE_STORAGE_ACCOUNT_NAME": "someone"}),
    ],
)
def test_other_clouds_will_do_too(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, named: dict[str, str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "cloud").mkdir()
    (tmp_path / "cloud" / "caches").symlink_to(cache)
    with serving(tmp_path / "cloud") as server:
        for name, value in named.items():
            monkeypatch.setenv(name, value or server.url)
        server.faults[f"caches/{SHARD}"] = [Fault(status=503), Fault(reset_after=20_000)]
        with closing(Mirror(url, folder=tmp_path / "m", pause=0.001)) as mirror:
            assert contents(mirror, SHARD) == (cache / SHARD).read_bytes()


def test_a_bucket_closes_while_it_is_waited_for(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s3").mkdir()
    (tmp_path / "s3" / "caches").symlink_to(cache)
    with serving(tmp_path / "s3") as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        mirror = Mirror("s3://caches", folder=tmp_path / "m")
        server.always[f"caches/{SHARD}"] = Fault(stall_after=5)
        closes_soon(server, mirror)


def test_a_bucket_that_cannot_be_is_told_without_the_secrets_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GOOGLE_SERVICE_ACCOUNT_KEY", "hunter2")
    with pytest.raises(RecipeError, match="no store can be made") as caught:
        Mirror("gs://caches", folder=tmp_path)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_a_bucket_without_obstore_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(RecipeError, match=r"pip install 'had-pipe\[remote\]'"):
        Mirror("s3://bucket/cache", folder=tmp_path)


def test_retrying_leaves_the_random_numbers_of_others_alone(
    server: FaultyServer, tmp_path: Path
) -> None:
    random.seed(7)
    before = random.getstate()
    server.faults[SHARD] = [Fault(status=500)]
    with closing(mirrored(server, tmp_path)) as mirror:
        contents(mirror, SHARD)
    assert random.getstate() == before


def test_the_folder_of_mirrors_is_the_environments_or_the_users(
    server: FaultyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with closing(open_cache(server.url)) as remote:
        assert remote.path.parent == tmp_path / "home/.cache/had-pipe/mirror"
    monkeypatch.setenv("HAD_PIPE_MIRROR", str(tmp_path / "there"))
    with closing(open_cache(server.url)) as remote:
        assert remote.path.parent == tmp_path / "there"
        assert json.loads((remote.path / "plan.json").read_text())["part"] == 64
