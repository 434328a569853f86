"""Writing and reading a cache, against zarr-python, xarray, and the page's words in plain code."""

from __future__ import annotations

import base64
import errno
import gc
import hashlib
import json
import math
import os
import resource
import struct
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import xarray
import zarr
from small_cache import build_cache
from test_draws import philox4x64
from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

from had_pipe.cache import Block, Cache, Part, reader
from had_pipe.dna import kmers as dna
from had_pipe.draws import Purpose, permutation
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete

Rows = npt.NDArray[np.int64]

CACHES: Mapping[str, Mapping[str, Any]] = {
    "int8": {"views": 2},
    "int8-masked": {"store": "masked"},
    "compact": {"codec": "compact"},
    "tiny": {"codec": "tiny", "dtype": "bfloat16", "views": 2},
    "float32": {"codec": "exact", "store": "all"},
    "float16": {"codec": "exact", "dtype": "float16", "views": 2},
    "bfloat16": {"codec": "exact", "dtype": "bfloat16"},
}
SHAPE: Mapping[str, Any] = {"windows": 11, "valid": 5, "kmers": 12, "channels": 6, "part": 4}


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return {name: build_cache(folder / name, **SHAPE, **kind) for name, kind in CACHES.items()}


def read(cache: Cache, split: str, view: int, rows: Rows) -> Block:
    block = cache.allocate(len(rows))
    for array in (block.kmer_id, block.mask, block.value, block.scale):
        if array is not None:
            array.view(np.uint8)[:] = 1
    cache.read(split, view, rows, block)
    return block


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def bits(array: npt.NDArray[Any]) -> bytes:
    return np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("opener", ["zarr", "xarray"])
def test_every_value_is_what_other_software_reads(
    kind: str, opener: str, caches: Mapping[str, Path]
) -> None:
    cache = Cache.open(caches[kind])
    rng = np.random.default_rng(0)
    for split in cache.plan.splits:
        for view in cache.views(split):
            windows = cache.rows(split)
            orders = [np.arange(windows), np.arange(windows)[::-1], rng.integers(0, windows, 40)]
            for rows in orders:
                block = read(cache, split, view, rows)
                for name, ours in (
                    ("kmer_id", block.kmer_id),
                    (f"{view}/mask", block.mask),
                    (f"{view}/reversed", block.reversed),
                    (f"{view}/embedding/value", block.value),
                    (f"{view}/embedding/scale", block.scale),
                ):
                    if ours is None:
                        continue
                    theirs = other(cache.path, opener, f"{split}/{name}")
                    assert theirs.dtype == ours.dtype
                    assert bits(theirs[rows]) == bits(ours)
    for name, ours in (("mean", cache.mean), ("std", cache.std)):
        assert bits(other(cache.path, opener, f"statistics/embedding/{name}")) == bits(ours)


def other(cache: Path, opener: str, name: str) -> npt.NDArray[Any]:
    """A whole array through other software."""
    if opener == "zarr":
        array = zarr.open_array(cache / "data.zarr", path=name, mode="r")[:]
        assert isinstance(array, np.ndarray)
        return array
    group, _, variable = name.rpartition("/")
    with xarray.open_zarr(
        cache / "data.zarr", group=group, consolidated=False, mask_and_scale=False, chunks=None
    ) as opened:
        values: npt.NDArray[Any] = opened[variable].values
    return values


def test_xarray_opens_the_whole_tree_with_dimension_names(caches: Mapping[str, Path]) -> None:
    with xarray.open_datatree(
        caches["int8"] / "data.zarr", engine="zarr", consolidated=False, mask_and_scale=False
    ) as tree:
        value = tree["train/1/embedding/value"]
        assert value.dims == ("window", "group", "channel")
        assert tree["train/1/embedding/scale"].dims == ("window", "group")
        assert tree["valid/kmer_id"].dims == ("window", "kmer")
        assert tree["statistics/embedding/mean"].dims == ("channel",)
        assert value.shape == (11, 10, 6)


def test_what_was_given_is_what_is_read(tmp_path: Path) -> None:
    """Down to the teacher's numbers: float32 kept exactly, against the builder's own formula."""
    cache = Cache.open(build_cache(tmp_path / "c", **SHAPE, codec="exact", store="visible"))
    map_4D = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    block = read(cache, "train", 0, np.arange(11))
    for row in range(11):
        spelled = "".join(
            "ACGT"[int(k) // 4**place % 4] for k in block.kmer_id[row] for place in range(5, -1, -1)
        )
        if block.reversed[row]:
            spelled = spelled[::-1].translate(str.maketrans("ACGT", "TGCA"))
        kmers = [spelled[first : first + 6] for first in range(0, 72, 6)]
        emb = np.float32([[kmer.count(base) for base in "ACGT"] for kmer in kmers]) @ map_4D
        emb[1:] = emb[1:] + 0.5 * emb[:-1].copy()
        stored = [t for t in range(12) if not block.mask[row, t]]
        assert np.allclose(block.value[row], emb[stored], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_a_shard_is_byte_for_byte_what_zarr_python_writes(
    kind: str, caches: Mapping[str, Path], tmp_path: Path
) -> None:
    cache = Cache.open(caches[kind])
    for signal in cache.plan.signals:
        source = zarr.open_array(cache.path / "data.zarr", path=f"train/0/{signal.path}", mode="r")
        ours = np.asarray(source[:])
        copy = zarr.create_array(
            tmp_path / "copy.zarr",
            overwrite=True,
            shape=ours.shape,
            chunks=(4, *signal.window),
            dtype=ours.dtype,
            fill_value=source.fill_value,
            filters=None,
            compressors=None,
            serializer=ShardingCodec(
                chunk_shape=(1, *signal.window),
                codecs=[BytesCodec(), Crc32cCodec()],
                index_codecs=[BytesCodec(), Crc32cCodec()],
            ),
            config={"write_empty_chunks": True},
        )
        copy[:] = ours
        for number in range(3):
            zeros = "/0" * len(signal.window)
            theirs = (tmp_path / f"copy.zarr/c/{number}{zeros}").read_bytes()
            assert (cache.path / Part("train", 0, number).shard_key(signal)).read_bytes() == theirs


@pytest.mark.parametrize("kind", CACHES)
def test_a_shard_is_what_the_page_says_byte_by_byte(kind: str, caches: Mapping[str, Path]) -> None:
    root = caches[kind]
    plan = json.loads((root / "plan.json").read_bytes())
    groups, channels = plan["windows"]["stored"], plan["teacher"]["channels"]
    if plan["codec"] != "exact":
        value = {"int8": channels, "compact": channels // 2 - 2, "tiny": 1}[plan["codec"]]
        signals = {"value": groups * value, "scale": groups * 2}
    else:
        signals = {"value": groups * channels * (4 if kind == "float32" else 2)}
    for split, of_split in plan["splits"].items():
        for view in of_split["views"]:
            for number in range(math.ceil(of_split["windows"] / 4)):
                rows = min(4 * (number + 1), of_split["windows"]) - 4 * number
                receipt = json.loads(
                    (root / f"parts/{split}/{view}/{number:05d}.json").read_bytes()
                )
                for name, n in signals.items():
                    array = zarr.open_array(
                        root / "data.zarr", path=f"{split}/{view}/embedding/{name}", mode="r"
                    )
                    payloads = [bits(np.asarray(array[4 * number + i])) for i in range(rows)]
                    assert {len(payload) for payload in payloads} == {n}
                    expected = b"".join(p + struct.pack("<I", crc32c.crc32c(p)) for p in payloads)
                    index = b"".join(struct.pack("<QQ", i * (n + 4), n + 4) for i in range(rows))
                    index += struct.pack("<QQ", 2**64 - 1, 2**64 - 1) * (4 - rows)
                    expected += index + struct.pack("<I", crc32c.crc32c(index))
                    key = f"data.zarr/{split}/{view}/embedding/{name}/c/{number}/0"
                    key += "/0" if name == "value" else ""
                    assert (root / key).read_bytes() == expected
                    record = receipt["objects"][key]
                    assert record["nbytes"] == len(expected)
                    assert record["sha256"] == hashlib.sha256(expected).hexdigest()
                    crcs = struct.unpack(f"<{rows}I", base64.b64decode(record["crc32c"]))
                    assert list(crcs) == [crc32c.crc32c(payload) for payload in payloads]


@pytest.mark.parametrize("kind", CACHES)
def test_ids_and_digests_are_those_the_page_describes(
    kind: str, caches: Mapping[str, Path]
) -> None:
    root = caches[kind]

    def canonical(value: object) -> bytes:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode() + b"\n"

    raw_plan = (root / "plan.json").read_bytes()
    plan = json.loads(raw_plan)
    assert raw_plan == canonical(plan)
    manifest = json.loads((root / "manifest.json").read_bytes())
    cache_id = manifest.pop("id")
    assert cache_id == hashlib.sha256(canonical(manifest)).hexdigest()
    assert manifest["plan"] == hashlib.sha256(raw_plan).hexdigest()
    there = files(root)
    del there["manifest.json"]
    assert manifest["objects"] == {
        key: {"nbytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        for key, raw in there.items()
    }

    table = pq.read_table(root / "windows.parquet").to_pylist()
    names = ("split", "window", "genome", "contig", "start", "soft_masked_bases", "index")
    lines = "".join("\t".join(str(row[name]) for name in names) + "\n" for row in table)
    found = {"windows": hashlib.sha256(lines.encode()).hexdigest()}
    statistics = ["mean", "std"]
    if plan["codec"] in ("compact", "tiny"):
        statistics += ["rotation", "spread", "stretch", "level", "byte"]
    arrays = [f"statistics/embedding/{name}" for name in statistics]
    for split, of_split in plan["splits"].items():
        arrays.append(f"{split}/kmer_id")
        for view in of_split["views"]:
            arrays += [f"{split}/{view}/mask", f"{split}/{view}/reversed"]
    for name in arrays:
        array = zarr.open_array(root / "data.zarr", path=name, mode="r")
        found[name] = hashlib.sha256(bits(np.asarray(array[:]))).hexdigest()
    assert plan["contents"] == found
    mean, std = (
        np.asarray(zarr.open_array(root / "data.zarr", path=name, mode="r")[:])
        for name in arrays[:2]
    )
    assert plan["statistics"] == hashlib.sha256(bits(mean) + bits(std)).hexdigest()

    attributes = zarr.open_group(root / "data.zarr", mode="r").attrs
    assert set(attributes) == {"format", "plan", "licence", "decode", "orientation", "fidelity"}
    assert attributes["plan"] == manifest["plan"]


def page_draw(purpose: int, seed: int, stream: int, row: int, columns: int, column: int) -> int:
    """The page's sentence on draws, word for word."""
    counter = row * math.ceil(columns / 4) + column // 4 + 1
    return philox4x64((counter, 0, 0, 0), (seed, stream * 256 + purpose))[column % 4]


def test_masks_and_strands_are_drawn_as_the_page_says(caches: Mapping[str, Path]) -> None:
    root = caches["int8"]
    table = pq.read_table(root / "windows.parquet").to_pylist()
    masked = math.floor(0.15 * 12 + 0.5)
    for split, view in (("train", 0), ("train", 1), ("valid", 0)):
        group = zarr.open_group(root / "data.zarr", path=f"{split}/{view}", mode="r")
        mask, turned = (np.asarray(group[name][:]) for name in ("mask", "reversed"))
        for row in (row for row in table if row["split"] == split):
            keys = [page_draw(1, 0, view, row["index"], 12, c) for c in range(12)]
            smallest = sorted(range(12), key=lambda c: (keys[c], c))[:masked]
            assert np.flatnonzero(mask[row["window"]]).tolist() == sorted(smallest)
            flip = (page_draw(2, 0, view, row["index"], 1, 0) >> 11) * 2.0**-53 < 0.5
            assert turned[row["window"]] == flip


def test_the_order_is_drawn_as_the_page_says() -> None:
    keys = [page_draw(3, 9, 1, row, 1, 0) for row in range(25)]

    assert permutation(Purpose.DISK_ORDER, 9, 1, 25).tolist() == sorted(
        range(25), key=lambda row: (keys[row], row)
    )


@pytest.mark.parametrize("kind", ["int8", "float16"])
def test_writing_twice_gives_equal_bytes(
    kind: str, caches: Mapping[str, Path], tmp_path: Path
) -> None:
    again = build_cache(tmp_path / "elsewhere", **SHAPE, **CACHES[kind])

    assert files(again) == files(caches[kind])


def test_a_locus_is_the_row_of_the_window_table(caches: Mapping[str, Path]) -> None:
    cache = Cache.open(caches["int8"])
    for row in pq.read_table(cache.path / "windows.parquet").to_pylist():
        locus = cache.locus(row["split"], row["window"])
        assert (locus.genome, locus.contig, locus.start) == (
            row["genome"],
            row["contig"],
            row["start"],
        )
        assert locus.soft_masked_bases == row["soft_masked_bases"]
    with pytest.raises(AssertionError):
        cache.locus("train", 11)  # which is the first of valid in the file


def test_many_loci_are_those_of_one_window_after_another(caches: Mapping[str, Path]) -> None:
    cache = Cache.open(caches["int8"])
    rows = [10, 0, 3, 3, 9]
    assert cache.loci("train", rows) == [cache.locus("train", row) for row in rows]
    assert cache.loci("train", []) == []


def test_kmers_can_be_read_alone(caches: Mapping[str, Path]) -> None:
    cache = Cache.open(caches["int8"])
    rows = np.array([10, 0, 3, 4, 4, 9])
    whole = zarr.open_array(cache.path / "data.zarr", path="train/kmer_id", mode="r")[:]
    assert bits(cache.read_kmers("train", rows)) == bits(np.asarray(whole)[rows])
    with pytest.raises(AssertionError):
        cache.read_kmers("train", np.array([11]))  # padding of the last chunk


def test_windows_go_where_the_caller_says(caches: Mapping[str, Path]) -> None:
    """Into arrays of the caller, longer than asked for, of which the rest stays as it was."""
    cache = Cache.open(caches["int8"])
    rows = np.array([10, 2, 2, 9, 0, 7])
    whole = read(cache, "train", 1, np.arange(11))
    big = cache.allocate(9)
    for array in (big.kmer_id, big.mask, big.reversed, big.value, big.scale):
        assert array is not None
        array.view(np.uint8)[:] = 1
    arrays = [big.value, big.kmer_id]

    cache.read("train", 1, rows, big)

    assert big.value is arrays[0]
    assert big.kmer_id is arrays[1]
    assert bits(big.value[:6]) == bits(whole.value[rows])
    assert bits(big.kmer_id[:6]) == bits(whole.kmer_id[rows])
    assert (big.value[6:] == 1).all()
    assert (big.kmer_id[6:].view(np.uint8) == 1).all()


def test_arrays_of_another_type_are_refused_before_a_byte_is_read(
    caches: Mapping[str, Path],
) -> None:
    cache = Cache.open(caches["int8"], check="never")
    block = cache.allocate(2)
    wide = Block(block.kmer_id, block.mask, block.reversed, block.value.astype("f4"), block.scale)
    with pytest.raises(AssertionError):
        cache.read("train", 0, np.array([0, 1]), wide)


def test_reading_no_rows_reads_nothing(caches: Mapping[str, Path]) -> None:
    cache = Cache.open(caches["int8"])
    cache.read("train", 0, np.array([], dtype=np.int64), cache.allocate(0))
    assert cache.read_kmers("train", np.array([], dtype=np.int64)).shape == (0, 12)


def test_what_is_not_there_is_named(caches: Mapping[str, Path]) -> None:
    cache = Cache.open(caches["int8"])
    with pytest.raises(CacheError, match=r"no split 'test' here; it has train, valid"):
        cache.read("test", 0, np.array([0]), cache.allocate(1))
    with pytest.raises(CacheError, match=r"'valid' has views \[0\], not 1"):
        cache.read("valid", 1, np.array([0]), cache.allocate(1))


def test_an_unfinished_cache_is_refused_unless_asked_for(tmp_path: Path) -> None:
    root = build_cache(tmp_path / "c", **SHAPE, parts=2)
    whole = Cache.open(build_cache(tmp_path / "whole", **SHAPE))

    with pytest.raises(CacheIncomplete, match=r"2 of 5 parts are there.*extract-teacher"):
        Cache.open(root)
    cache = Cache.open(root, incomplete=True)

    assert not cache.sealed
    assert [cache.has(part) for part in cache.plan.parts()] == [True, True, False, False, False]
    expected = read(whole, "train", 0, np.arange(8))
    assert bits(read(cache, "train", 0, np.arange(8)).value) == bits(expected.value)
    for split, row in (("train", 8), ("valid", 0)):
        with pytest.raises(CacheIncomplete, match="is not there yet"):
            read(cache, split, 0, np.array([row]))
    # What was planned is known of every part.
    kmer_id, mask, turned = cache.seen(Part("train", 0, 2))
    later = read(whole, "train", 0, np.arange(8, 11))
    assert bits(kmer_id) == bits(later.kmer_id)
    assert bits(mask) == bits(later.mask)
    assert bits(turned) == bits(later.reversed)


@pytest.fixture
def damaged(tmp_path: Path) -> tuple[Path, int]:
    """A cache of which one byte of training window 5 is wrong, and where that byte lies."""
    root = build_cache(tmp_path / "damaged", **SHAPE)
    offset = 64 + 7  # row 1 of part 1: ten groups of six channels, and four bytes of CRC
    flip(root / "data.zarr/train/0/embedding/value/c/1/0/0", offset)
    return root, offset


def flip(path: Path, offset: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def test_a_wrong_window_is_named_and_its_neighbours_are_read(damaged: tuple[Path, int]) -> None:
    root, offset = damaged
    for check in ("first", "always"):
        cache = Cache.open(root, check=check)
        read(cache, "train", 0, np.array([0, 4, 6, 7, 10]))
        for _ in range(2):
            with pytest.raises(CacheCorrupt, match=r"value/c/1/0/0: window 1 of this shard"):
                read(cache, "train", 0, np.array([3, 4, 5, 6]))
    flip(root / "data.zarr/train/0/embedding/value/c/1/0/0", offset)
    read(Cache.open(root), "train", 0, np.arange(11))


def test_first_checks_a_window_once_always_each_time_and_never_not(
    damaged: tuple[Path, int],
) -> None:
    root, offset = damaged
    shard = root / "data.zarr/train/0/embedding/value/c/1/0/0"
    flip(shard, offset)  # mended
    rows = np.array([4, 5, 6])
    first, always, never = (Cache.open(root, check=c) for c in ("first", "always", "never"))
    good = [read(cache, "train", 0, rows).value for cache in (first, always, never)]
    assert bits(good[0]) == bits(good[1]) == bits(good[2])

    flip(shard, offset)

    read(first, "train", 0, rows)
    with pytest.raises(CacheCorrupt, match="window 1"):
        read(always, "train", 0, rows)
    changed = read(never, "train", 0, rows).value
    assert np.count_nonzero(changed != good[2]) == 1
    flip(shard, offset + 2 * 64)  # window 7, which none has read
    with pytest.raises(CacheCorrupt, match="window 3"):
        read(first, "train", 0, np.array([7]))


def test_every_mode_gives_the_same_bits(caches: Mapping[str, Path]) -> None:
    rows = np.random.default_rng(1).integers(0, 11, 50)
    blocks = [
        read(Cache.open(caches["int8"], check=check), "train", 1, rows)
        for check in ("first", "always", "never")
    ]
    for block in blocks[1:]:
        assert bits(block.value) == bits(blocks[0].value)


def test_a_read_that_comes_in_pieces_is_put_together(
    caches: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(Cache.open(caches["float32"]), "train", 0, np.arange(11))
    real, calls = os.preadv, 0

    def short(fd: int, buffers: list[Any], offset: int) -> int:
        nonlocal calls
        calls += 1
        return real(fd, [memoryview(buffers[0])[:7]], offset)

    monkeypatch.setattr(os, "preadv", short)
    pieces = read(Cache.open(caches["float32"]), "train", 0, np.arange(11))

    assert calls > 11 * 12 * 6 * 4 / 7
    assert bits(pieces.value) == bits(whole.value)


def test_a_shard_cut_short_while_it_is_open_is_noticed(tmp_path: Path) -> None:
    root = build_cache(tmp_path / "c", **SHAPE)
    cache = Cache.open(root, check="never")
    read(cache, "train", 0, np.array([0]))
    os.truncate(root / "data.zarr/train/0/embedding/value/c/0/0/0", 64 * 2 + 9)

    read(cache, "train", 0, np.array([1]))
    with pytest.raises(CacheCorrupt, match="became shorter"):
        read(cache, "train", 0, np.array([1, 2, 3]))


def test_a_disk_that_cannot_be_read_is_named(
    caches: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fd: int, buffers: list[Any], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cache = Cache.open(caches["int8"])
    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CacheCorrupt, match=r"c/0/0: cannot be read \(Input/output error\)"):
        read(cache, "train", 0, np.array([0]))


@pytest.mark.slow
def test_a_part_may_be_as_large_as_the_format_allows(tmp_path: Path) -> None:
    """Its chunk of k-mer ids has 75 MB, more than any JSON file may have."""
    root = build_cache(
        tmp_path / "c", windows=3, valid=0, kmers=36, channels=2, part=1 << 20, store="masked"
    )
    whole = zarr.open_array(root / "data.zarr", path="train/kmer_id", mode="r")[:]
    assert bits(read(Cache.open(root), "train", 0, np.arange(3)).kmer_id) == bits(np.asarray(whole))


def test_long_runs_go_beyond_what_one_call_takes(tmp_path: Path) -> None:
    root = build_cache(tmp_path / "c", windows=1500, valid=0, kmers=6, channels=2, part=1500)
    cache = Cache.open(root)
    whole = np.asarray(zarr.open_array(root / "data.zarr", path="train/0/embedding/value")[:])
    assert bits(read(cache, "train", 0, np.arange(3, 1499)).value) == bits(whole[3:1499])


@pytest.fixture(scope="module")
def many_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("many")
    return build_cache(folder / "c", windows=300, valid=0, kmers=6, channels=4, part=2)


def test_eight_threads_read_what_one_reads(many_parts: Path) -> None:
    parts = 150
    assert parts > reader._OPEN_PARTS
    cache = Cache.open(many_parts)
    group = zarr.open_group(many_parts / "data.zarr", path="train", mode="r")
    value = np.asarray(group["0/embedding/value"][:])
    scale = np.asarray(group["0/embedding/scale"][:])
    kmer_id = np.asarray(group["kmer_id"][:])
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = np.random.default_rng(seed)
        block = cache.allocate(64)
        try:
            for _ in range(12):
                rows = rng.integers(0, 300, 64)
                cache.read("train", 0, rows, block)
                assert block.scale is not None
                if not (
                    bits(block.value) == bits(value[rows])
                    and bits(block.scale) == bits(scale[rows])
                    and bits(block.kmer_id) == bits(kmer_id[rows])
                ):
                    wrong.append(rows)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert wrong == []
    assert len(cache._parts) <= reader._OPEN_PARTS


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_more_files_are_open_than_parts_are_kept_and_none_after(
    many_parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Or caches that other tests have open would leave this one a smaller share.
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1 << 20, 1 << 20))
    gc.collect()
    before = descriptors()
    cache = Cache.open(many_parts)
    read(cache, "train", 0, np.arange(300))
    assert descriptors() - before == reader._OPEN_PARTS
    del cache
    gc.collect()
    assert descriptors() == before


def test_a_refused_shard_leaves_no_file_open(damaged: tuple[Path, int]) -> None:
    root, _ = damaged
    shard = root / "data.zarr/train/0/embedding/value/c/0/0/0"
    os.truncate(shard, shard.stat().st_size - 1)
    cache = Cache.open(root)
    gc.collect()
    before = descriptors()
    for _ in range(5):
        with pytest.raises(CacheCorrupt, match=r"expected"):
            read(cache, "train", 0, np.array([0]))
    gc.collect()
    assert descriptors() == before


def test_a_cache_says_what_it_is(caches: Mapping[str, Path]) -> None:
    cache = Cache.open(caches["int8"])
    assert cache.id == json.loads((cache.path / "manifest.json").read_bytes())["id"]
    assert (cache.rows("train"), cache.rows("valid")) == (11, 5)
    assert (cache.views("train"), cache.views("valid")) == ((0, 1), (0,))
    assert cache.nbytes == sum(
        len(raw) for key, raw in files(cache.path).items() if key != "manifest.json"
    )
    assert cache.fidelity == {"relative": 0.0}
    assert cache.plan.part_count == sum(1 for _ in cache.plan.parts()) == 8
    assert dna.masked_groups(0.15, 12) == cache.plan.windows.masked
