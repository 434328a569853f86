"""How rows come from a shard: in runs, checked in pieces, past the page cache, through Zarr."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import resource
import shutil
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_cache import build_cache
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from had_pipe.cache import Block, Cache, Part, reader, shard
from had_pipe.errors import CacheCorrupt, CacheRefused, StorageError

Rows = npt.NDArray[np.int64]

# Rows of 8,640 bytes: none begins at a block, one spans three of them.
SHAPE: Mapping[str, Any] = {"windows": 45, "valid": 5, "kmers": 12, "channels": 864, "part": 20}
VALUE = "data.zarr/train/0/embedding/value/c/{}/0/0"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("shard") / "c", **SHAPE)


@pytest.fixture
def copied(root: Path, tmp_path: Path) -> Path:
    return shutil.copytree(root, tmp_path / "copied")


@pytest.fixture(scope="module")
def whole(root: Path) -> Mapping[str, npt.NDArray[Any]]:
    """The training split as zarr-python reads it."""
    group = zarr.open_group(root / "data.zarr", path="train", mode="r")
    names = {
        "kmer_id": "kmer_id",
        "mask": "0/mask",
        "reversed": "0/reversed",
        "value": "0/embedding/value",
        "scale": "0/embedding/scale",
    }
    return {field: np.asarray(group[name][:]) for field, name in names.items()}


def read(cache: Cache, rows: Rows) -> Block:
    block = cache.allocate(len(rows))
    block.value.view(np.uint8)[:] = 1
    cache.read("train", 0, rows, block)
    return block


def assert_read(block: Block, whole: Mapping[str, npt.NDArray[Any]], rows: Rows) -> None:
    for name, expected in whole.items():
        assert getattr(block, name).tobytes() == expected[rows].tobytes(), name


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def descriptors() -> int:
    gc.collect()
    return len(list(Path("/proc/self/fd").iterdir()))


# -- in runs ---------------------------------------------------------------------------------------

some_rows = st.one_of(
    st.lists(st.integers(0, 44), max_size=60),
    st.tuples(st.integers(0, 44), st.integers(0, 45)).map(lambda ends: list(range(*ends))),
    st.lists(st.tuples(st.integers(0, 44), st.integers(1, 9)), max_size=6).map(
        lambda runs: [row for first, n in runs for row in range(first, min(first + n, 45))]
    ),
)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=some_rows,
    a_call=st.integers(1, 50),
    checked=st.sampled_from([1, 20_000, 1 << 20]),
    bounced=st.sampled_from([4096, 8192, 1 << 20]),
    check=st.sampled_from(["first", "always", "never"]),
    direct=st.booleans(),
)
def test_any_rows_come_in_any_pieces_by_either_way(
    rows: list[int],
    a_call: int,
    checked: int,
    bounced: int,
    check: reader.Check,
    direct: bool,
    root: Path,
    whole: Mapping[str, npt.NDArray[Any]],
) -> None:
    wanted = np.array(rows, dtype=np.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "_ROWS_A_CALL", a_call)
        patch.setattr(shard, "_CHECKED_AT_ONCE", checked)
        patch.setattr(shard, "_BOUNCED", bounced)
        patch.setattr(shard, "_LOCAL", shard._Local())
        with Cache.open(root, check=check, direct=direct) as cache:
            assert_read(read(cache, wanted), whole, wanted)
            assert_read(read(cache, wanted), whole, wanted)


def test_parts_of_a_block_are_the_same_memory(root: Path, whole: Mapping[str, Any]) -> None:
    rows = np.arange(30, 40)
    with Cache.open(root) as cache:
        block = cache.allocate(40)
        part = block.part(7, 17)
        cache.read("train", 0, rows, part)
        assert part.rows == block.rows[7:17]
        assert_read(block.part(7, 17), whole, rows)


# -- checked ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("direct", [False, True])
def test_of_a_run_only_the_rows_not_yet_read_are_checked(copied: Path, direct: bool) -> None:
    path, stride = copied / VALUE.format(0), 10 * 864 + 4
    with Cache.open(copied, direct=direct) as cache:
        read(cache, np.array([2, 3, 7]))
        flip(path, 3 * stride + 5)
        flip(path, 7 * stride + 5)
        read(cache, np.array([1, 2, 3, 4]))
        flip(path, 9 * stride + 8639)  # the last byte of a row not read so far
        for _ in range(2):
            with pytest.raises(CacheCorrupt, match="window 9 of this shard is not what"):
                read(cache, np.arange(6, 12))
        flip(path, 9 * stride + 8639)
        read(cache, np.arange(20))
        assert cache._checked == {Part("train", 0, 0): None}  # all of them, told in one word
    with (
        Cache.open(copied, direct=direct, check="always") as cache,
        pytest.raises(CacheCorrupt, match="window 3"),
    ):
        read(cache, np.arange(20))


def test_threads_that_read_the_same_rows_leave_none_unchecked(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[int] = Counter()
    real = crc32c.crc32c

    class Counting:
        @staticmethod
        def crc32c(data: Any) -> int:
            found = int(real(data))
            counted[found] += 1  # of 45 windows, no two have one CRC
            return found

    monkeypatch.setattr(shard, "crc32c", Counting)
    cache = Cache.open(root)
    barrier, failed = threading.Barrier(4), list[BaseException]()

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        try:
            barrier.wait()
            for _ in range(30):
                first = int(rng.integers(0, 40))
                read(cache, np.arange(first, min(first + 9, 45)))
            read(cache, np.arange(45))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    of_windows = {row: real(read(cache, np.array([row])).value.data) for row in range(45)}
    assert all(1 <= counted[crc] <= 4 for crc in of_windows.values())
    assert set(cache._checked.values()) == {None}
    cache.close()


def test_a_scale_that_was_changed_is_named_by_its_window(copied: Path) -> None:
    flip(copied / "data.zarr/train/0/embedding/scale/c/1/0", 3 * 24 + 1)
    with Cache.open(copied) as cache:
        read(cache, np.arange(20))
        with pytest.raises(CacheCorrupt, match="scale/c/1/0: window 3 of this shard"):
            read(cache, np.array([20]))


# -- past the page cache ---------------------------------------------------------------------------


def test_a_file_system_that_cannot_read_directly_is_named(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.fcntl

    def refusing(fd: int, command: int, *rest: Any) -> Any:
        if command == fcntl.F_SETFL:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, command, *rest)

    monkeypatch.setattr(fcntl, "fcntl", refusing)
    before = descriptors()
    with (
        Cache.open(root, direct=True) as cache,
        pytest.raises(StorageError, match=r"c/0/0/0: .* past the page cache .* without `--direct`"),
    ):
        read(cache, np.array([0]))
    del cache
    assert descriptors() == before


@pytest.mark.parametrize("left", [0, 4096, 8644 * 2 + 9])
def test_a_shard_that_shrinks_is_noticed_past_the_page_cache(copied: Path, left: int) -> None:
    with Cache.open(copied, direct=True, check="never") as cache:
        read(cache, np.array([0]))
        os.truncate(copied / VALUE.format(0), left)
        with pytest.raises(CacheCorrupt, match="became shorter"):
            read(cache, np.arange(20))


def test_reading_directly_asks_only_for_whole_blocks(
    root: Path, whole: Mapping[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a disk may insist on, whether or not this one does."""
    asked: list[tuple[int, int, int]] = []
    real = os.preadv

    def watched(fd: int, buffers: list[Any], offset: int) -> int:
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT:
            (buffer,) = buffers
            address = np.frombuffer(buffer, dtype=np.uint8).ctypes.data
            asked.append((address % 4096, len(buffer) % 4096, offset % 4096))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", watched)
    rows = np.array([1, 2, 3, 19, 20, 44])
    with Cache.open(root, direct=True) as cache:
        assert_read(read(cache, rows), whole, rows)
    assert len(asked) == 4
    assert set(asked) == {(0, 0, 0)}


# -- what the kernel is told -----------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Advice given, as (kind, offset, length)."""
    given: list[tuple[int, int, int]] = []
    real = os.posix_fadvise

    def watched(fd: int, offset: int, length: int, advice: int) -> None:
        given.append((advice, offset, length))
        real(fd, offset, length, advice)

    monkeypatch.setattr(os, "posix_fadvise", watched)
    return given


def test_rows_to_come_are_asked_for_in_short_pieces_unless_they_are_there(
    root: Path, told: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "_ADVISED_AT_ONCE", 5000)
    rows, stride = np.array([3, 4, 5, 30]), 8644
    with Cache.open(root) as cache:
        monkeypatch.setattr(shard.Shard, "_is_cached", lambda self, offset: False)
        cache.advise("train", 0, rows)
        assert {kind for kind, _, _ in told} == {os.POSIX_FADV_WILLNEED}
        assert all(0 < length <= 5000 for _, _, length in told)
        covered = [at for _, offset, length in told for at in range(offset, offset + length)]
        assert covered == [*range(3 * stride, 6 * stride), *range(10 * stride, 11 * stride)]
        del told[:]
        monkeypatch.setattr(shard.Shard, "_is_cached", lambda self, offset: True)
        cache.advise("train", 0, rows)
    assert told == []


def test_advice_about_what_is_damaged_says_nothing_yet(
    copied: Path, told: list[tuple[int, int, int]]
) -> None:
    (copied / VALUE.format(1)).unlink()
    with Cache.open(copied) as cache:
        cache.advise("train", 0, np.array([25]))
        assert told == []
        with pytest.raises(CacheCorrupt, match="c/1/0/0 cannot be opened"):
            read(cache, np.array([25]))


def test_what_was_just_read_is_known_to_be_in_memory(
    root: Path, told: list[tuple[int, int, int]]
) -> None:
    with Cache.open(root) as cache:
        block = read(cache, np.arange(20))
        cache.advise("train", 0, np.arange(20))
        assert told == []
        part = cache._parts[Part("train", 0, 0)]
        assert isinstance(part.value, shard.Shard)
        assert not part.value._is_cached(1 << 40)
    assert len(block.value) == 20


def test_of_a_cache_beyond_memory_a_shard_leaves_it_once_read_through(
    root: Path, told: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_SOON_READ", 0)
    monkeypatch.setattr(reader, "memory_nbytes", lambda: 2 * 45 * 8644 - 2)  # half: a byte short
    dropped = (os.POSIX_FADV_DONTNEED, 0, 0)
    with Cache.open(root) as cache:
        assert cache._passing == {"train"}
        read(cache, np.arange(0, 19))
        assert told == []
        read(cache, np.array([19]))
        assert told == [dropped]
        read(cache, np.arange(20, 30))
        assert told == [dropped]
        cache.read("valid", 0, np.arange(5), cache.allocate(5))  # small, and may stay
    assert told == [dropped] * 2  # the one that was begun, as it was closed


def test_a_cache_that_memory_holds_stays_there(
    root: Path, told: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_SOON_READ", 0)
    monkeypatch.setattr(reader, "memory_nbytes", lambda: 2 * 45 * 8644)
    with Cache.open(root) as cache:
        read(cache, np.arange(45))
    assert told == []


def test_memory_is_what_the_machine_and_the_groups_around_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 0 < shard.memory_nbytes() <= total

    texts = {
        "/proc/meminfo": "MemTotal: 9000 kB\nMemAvailable:    5000 kB\n",
        "/proc/self/cgroup": "8:cpu:/a\n4:memory:/job/step\n0::/slice/job\n",
    }
    monkeypatch.setattr(shard, "_text", lambda path: texts.get(str(path), ""))
    assert shard.memory_nbytes() == 5000 << 10
    texts["/sys/fs/cgroup/slice/job/memory.max"] = "max"
    texts["/sys/fs/cgroup/slice/memory.max"] = "4000000"
    assert shard.memory_nbytes() == 4000000
    texts["/sys/fs/cgroup/memory/memory.limit_in_bytes"] = "3000000"
    assert shard.memory_nbytes() == 3000000
    texts["/sys/fs/cgroup/memory/job/step/memory.limit_in_bytes"] = "2000000"
    assert shard.memory_nbytes() == 2000000


# -- open files ------------------------------------------------------------------------------------


def test_many_caches_together_leave_half_of_the_files_a_process_may_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roots = [
        build_cache(tmp_path / str(i), windows=28, valid=0, kmers=6, channels=2, part=2, seed=i)
        for i in range(3)
    ]
    before = descriptors()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (24, 24))
    caches = [Cache.open(root) for root in roots]
    for cache in caches:
        read(cache, np.arange(28))
        assert descriptors() - before <= 12
    for _ in range(3):
        for cache in caches:
            read(cache, np.arange(28))
    assert 9 <= descriptors() - before <= 12
    caches[0].close()
    read(caches[1], np.arange(28))
    assert descriptors() - before <= 12
    for cache in caches:
        cache.close()
    assert descriptors() == before


def test_a_closed_cache_holds_no_file_and_is_not_read(root: Path, whole: Mapping[str, Any]) -> None:
    before = descriptors()
    rows = np.arange(45)
    with Cache.open(root) as cache:
        read(cache, rows)
        assert descriptors() == before + 3
        cache.let_go(keep=1)
        assert list(cache._parts) == [Part("train", 0, 2)]
        assert descriptors() == before + 1
        cache.let_go()
        assert descriptors() == before
        assert_read(read(cache, rows), whole, rows)
    assert descriptors() == before
    with pytest.raises(AssertionError):
        read(cache, rows)
    cache.close()


# -- through Zarr ----------------------------------------------------------------------------------

LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "few windows a chunk, blosc": {"chunk": 3, "compressors": [BloscCodec(cname="lz4")]},
    "one chunk, gzip": {"chunk": 1000, "compressors": [GzipCodec()]},
    "shards, zstd": {"chunk": 4, "shard": 16, "compressors": [ZstdCodec()]},
    "plain chunks": {"chunk": 7, "compressors": None},
    "big-endian": {"chunk": 5, "compressors": None, "swapped": True},
    "zarr 2": {"chunk": 6, "zarr_format": 2},
}


def lay_out_anew(
    root: Path,
    *,
    chunk: int,
    shard: int | None = None,
    swapped: bool = False,
    only: str = "",
    zarr_format: Any = 3,
    **options: Any,
) -> None:
    """What another tool may make of data.zarr: the same values in another layout."""
    old, new = root / "data.zarr", root / "new.zarr"
    source = zarr.open_group(old, mode="r")
    target = zarr.create_group(new, zarr_format=zarr_format, attributes=dict(source.attrs))
    for name, array in source.members(max_depth=None):
        if not isinstance(array, zarr.Array):
            continue
        values = np.asarray(array[:])
        if swapped and values.dtype.itemsize > 1:
            values = values.astype(values.dtype.newbyteorder(">"))
        target.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=(min(chunk, len(values)), *values.shape[1:]),
            shards=None if shard is None or len(values) <= shard else (shard, *values.shape[1:]),
            fill_value=0,
            **options,
        )[:] = values
        if only and only in name:
            shutil.rmtree(old / name)
            shutil.move(new / name, old / name)
    if only:
        shutil.rmtree(new)
    else:
        shutil.rmtree(old)
        new.rename(old)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(name, marks=[] if name[:6] in ("shards", "zarr 2") else pytest.mark.slow)
        for name in LAYOUTS
    ],
)
def test_a_store_laid_out_anew_is_read_through_zarr_and_only_if_asked(
    layout: str, copied: Path, whole: Mapping[str, npt.NDArray[Any]]
) -> None:
    lay_out_anew(copied, **LAYOUTS[layout])
    with pytest.raises(CacheRefused, match=r"anew\. If you trust .* `--through-zarr`"):
        read(Cache.open(copied), np.arange(45))

    with Cache.open(copied, through_zarr=True) as cache:
        rng = np.random.default_rng(0)
        for rows in (np.arange(45), rng.integers(0, 45, 20), np.array([19, 20, 44])):
            assert_read(read(cache, rows), whole, rows)
        assert cache.read_kmers("train", np.array([41])).tobytes() == whole["kmer_id"][41].tobytes()
        assert cache.fidelity == {"relative": 0.0}
        cache.advise("train", 0, np.arange(45))


@pytest.mark.parametrize("kind", [pytest.param("compact", marks=pytest.mark.slow), "bfloat16"])
def test_other_codecs_of_ours_are_read_through_zarr_too(kind: str, tmp_path: Path) -> None:
    codec = {"codec": "exact", "dtype": "bfloat16"} if kind == "bfloat16" else {"codec": kind}
    root = build_cache(tmp_path / "c", windows=9, valid=3, channels=32, part=4, **codec)
    with Cache.open(root) as cache:
        block = read(cache, np.arange(9))
        expected = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)
    lay_out_anew(root, chunk=4, compressors=[ZstdCodec()])
    with Cache.open(root, through_zarr=True) as cache:
        block = read(cache, np.arange(9))
        found = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)
    assert found.tobytes() == expected.tobytes()


def test_a_store_of_which_only_the_embeddings_were_laid_out_anew(
    copied: Path, whole: Mapping[str, npt.NDArray[Any]]
) -> None:
    lay_out_anew(copied, chunk=4, only="embedding/value", compressors=[ZstdCodec()])
    with pytest.raises(CacheRefused, match="--through-zarr"):
        read(Cache.open(copied), np.arange(45))
    with Cache.open(copied, through_zarr=True) as cache:
        assert_read(read(cache, np.arange(45)), whole, np.arange(45))


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("train/kmer_id", "first"),
        pytest.param("train/0/mask", "first", marks=pytest.mark.slow),
        ("train/0/reversed", "first"),
        ("train/0/embedding/value", "never"),
        pytest.param("train/0/embedding/value", "first", marks=pytest.mark.slow),
        pytest.param("train/0/embedding/scale", "never", marks=pytest.mark.slow),
        pytest.param("statistics/embedding/mean", "first", marks=pytest.mark.slow),
    ],
)
def test_a_chunk_that_is_missing_or_changed_never_reads_as_data(
    name: str, check: reader.Check, copied: Path
) -> None:
    lay_out_anew(copied, chunk=10, compressors=None)
    chunks = sorted(p for p in (copied / "data.zarr" / name / "c").rglob("*") if p.is_file())
    original = chunks[0].read_bytes()
    for change in (bytes(len(original)), bytes([original[0] ^ 1]) + original[1:], None):
        if change is None:
            chunks[0].unlink()
        else:
            chunks[0].write_bytes(change)
        with pytest.raises(CacheCorrupt, match=name):
            read(Cache.open(copied, through_zarr=True, check=check), np.arange(45))


@pytest.mark.parametrize("name", ["reversed", "embedding/value"])
def test_a_chunk_that_goes_missing_later_is_noticed(name: str, copied: Path) -> None:
    """Whatever was checked before: Zarr would fill it in without a word."""
    lay_out_anew(copied, chunk=10, compressors=None)
    with Cache.open(copied, through_zarr=True) as cache:
        read(cache, np.arange(45))
        for path in (copied / "data.zarr/train/0" / name / "c").rglob("*"):
            if path.is_file():
                path.unlink()
        cache.let_go()
        with pytest.raises(CacheCorrupt, match=name):
            read(cache, np.arange(45))


def test_values_of_another_type_or_shape_are_not_read_through_zarr(copied: Path) -> None:
    path = copied / "data.zarr/train/0/embedding/value"
    values = np.asarray(zarr.open_array(path, mode="r")[:])
    for other, said in ((values.astype("i2"), "int16"), (values[:, :, 1:], r"\(10, 863\)")):
        shutil.rmtree(path)
        zarr.create_array(path, data=other)
        with pytest.raises(CacheCorrupt, match=f"{said}.* the plan says int8 of"):
            read(Cache.open(copied, through_zarr=True), np.arange(45))


def test_a_chunk_that_no_codec_reads_is_an_error_of_ours(copied: Path) -> None:
    lay_out_anew(copied, chunk=10, compressors=[GzipCodec()])
    for path in (copied / "data.zarr/train/0/embedding/value/c").rglob("*"):
        if path.is_file():
            path.write_bytes(b"no gzip")
    with (
        Cache.open(copied, through_zarr=True) as cache,
        pytest.raises(CacheCorrupt, match="value: zarr-python cannot read it"),
    ):
        read(cache, np.arange(45))


def test_a_damaged_store_is_not_taken_for_one_laid_out_anew(copied: Path) -> None:
    """A shard that is gone, or metadata that is no array's: another tool has done neither."""
    (copied / VALUE.format(0)).unlink()
    with pytest.raises(CacheCorrupt, match=r"cannot be opened .*; .*copy the cache again"):
        read(Cache.open(copied), np.array([0]))
    (copied / "data.zarr/train/0/embedding/value/zarr.json").write_bytes(b"[1]")
    with pytest.raises(CacheCorrupt, match=r"cannot be opened .*; .*copy the cache again"):
        read(Cache.open(copied), np.array([0]))
