"""A cache from a cache: what extraction would have written, the same bytes after any kill; and the
archival form, which unpacks to what went in and trusts nobody.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from numcodecs import Zstd
from numpy_teacher import NumpyTeacher
from small_cache import build_cache
from threadpoolctl import threadpool_limits

from had_pipe.cache import Cache, archive, integrity, layout
from had_pipe.cache.recode import recode
from had_pipe.errors import (
    CacheCorrupt,
    CacheError,
    CacheIncomplete,
    CacheMismatch,
    CacheRefused,
    HadPipeError,
    HeldError,
    RecipeError,
    StorageError,
)
from had_pipe.extract import extract
from had_pipe.hold import held
from had_pipe.recipe import Recipe

SHAPE: Mapping[str, Any] = {"windows": 40, "valid": 9, "kmers": 12, "channels": 16, "part": 16}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "float32": {"codec": "exact"},
    "float16": {"codec": "exact", "dtype": "float16"},
    "bfloat16": {"codec": "exact", "dtype": "bfloat16"},
    "int8": {"views": 2},
    "compact": {"codec": "compact"},
}
VALUE = "data.zarr/train/0/embedding/value/c/1/0/0"
APART = ("archive.json", "manifest.json")
"""Not counted as bytes of an archive."""


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    return {name: build_cache(folder / name, **SHAPE, **kind) for name, kind in KINDS.items()}


@pytest.fixture(scope="module")
def archives(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archives")
    for name, cache in caches.items():
        recode(cache, folder / name, codec="archive")
    return {name: folder / name for name in caches}


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of three parts and some fifty files."""
    shape = {"windows": 4, "valid": 2, "kmers": 6, "channels": 16, "part": 3}
    folder = tmp_path_factory.mktemp("few") / "cache"
    return build_cache(folder, **shape, codec="exact", dtype="bfloat16")


@pytest.fixture
def packed(archives: dict[str, Path], tmp_path: Path) -> Path:
    """An archive to damage."""
    return Path(shutil.copytree(archives["bfloat16"], tmp_path / "archive"))


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def values(folder: Path) -> npt.NDArray[np.float32]:
    """Everything decoded, by the six lines' way: zarr-python and the formula, in NumPy."""
    root = zarr.open_group(folder / "data.zarr", mode="r")
    plan, _ = layout.read_plan(folder)
    mean, std = (root[f"statistics/embedding/{name}"][:] for name in ("mean", "std"))
    found = []
    for split, of_split in plan.splits.items():
        for view in of_split.views:
            e = root[f"{split}/{view}/embedding"]
            value = e["value"][:]
            if plan.codec in ("compact", "tiny"):
                names = ("rotation", "level", "byte")
                rotation, level, byte = (root[f"statistics/embedding/{n}"][:] for n in names)
                y = level[value[..., byte], np.arange(len(byte))]
                x = (y * e["scale"][:].astype("f4")[..., None]) @ rotation * std + mean
            elif plan.codec == "int8":
                x = value.astype("f4") * e["scale"][:].astype("f4")[..., None] * std + mean
            elif plan.teacher.dtype == "bfloat16":
                x = (value.astype("u4") << 16).view("f4")
            else:
                x = value.astype("f4")
            found.append(x.reshape(-1))
    return np.concatenate(found)


# Another codec


GENOME = {"one": 3_000, "held_out": 1_200}


def a_recipe(folder: Path, cache: Path, codec: str) -> Recipe:
    fasta = folder / "g.fa"
    if not fasta.exists():
        rng = np.random.default_rng(2)
        letters = {name: "".join(rng.choice(list("ACGT"), n)) for name, n in GENOME.items()}
        fasta.write_text("".join(f">{name}\n{text}\n" for name, text in letters.items()))
    return Recipe.model_validate(
        {
            "teacher": {"name": "/there/is/none"},
            "genome": [{"name": "g", "path": str(fasta), "splits": {"valid": ["held_out"]}}],
            "windows": {"bases": 60, "stride": 60, "views": 2, "mask_ratio": 0.25},
            "cache": {"path": str(cache), "part": 20, "codec": codec},
        }
    )


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_int8_from_exact_is_what_extraction_would_have_written(tmp_path: Path, dtype: str) -> None:
    for codec in ("exact", "int8"):
        extract(a_recipe(tmp_path, tmp_path / codec, codec), teacher=NumpyTeacher(dtype=dtype))

    made = recode(tmp_path / "exact", tmp_path / "recoded", codec="int8")

    here, there = tree(tmp_path / "recoded"), tree(tmp_path / "int8")
    shards = [key for key in there if key.startswith("data.zarr/") and "/c/" in key]
    assert len(shards) > 20
    assert here.keys() == there.keys()
    assert [key for key in shards if here[key] != there[key]] == []
    assert here["windows.parquet"] == there["windows.parquet"]
    plans = [json.loads(files["plan.json"]) for files in (here, there)]
    exact = Cache.open(tmp_path / "exact")
    assert plans[0].pop("source") == {"cache": exact.id, "codec": "exact"}
    assert plans[0] == plans[1]
    opened = Cache.open(tmp_path / "int8")
    assert made.fidelity == opened.fidelity
    assert Cache.open(tmp_path / "recoded").attributes["decode"] == opened.attributes["decode"]


PAIRS = {
    "float32": ["int8", "compact", "tiny"],
    "float16": ["int8", "tiny"],
    "bfloat16": ["compact"],
    "int8": ["exact", "tiny"],
    "compact": ["exact", "int8"],
}
# Of embeddings that lie in few dimensions, as these do.
LOSES = {"exact": 1e-6, "int8": 0.02, "compact": 0.2, "tiny": 0.5}


@pytest.mark.parametrize(("name", "codec"), [(n, codec) for n in PAIRS for codec in PAIRS[n]])
def test_what_is_recoded_is_the_sources_values_once_more_coded(
    caches: dict[str, Path], tmp_path: Path, name: str, codec: str
) -> None:
    before = tree(caches[name])

    made = recode(caches[name], tmp_path / "to", codec=codec)

    assert integrity.verify(tmp_path / "to").problems == ()
    assert tree(caches[name]) == before
    source, target = Cache.open(caches[name]), Cache.open(tmp_path / "to")
    assert (made.cache_id, made.source_id) == (target.id, source.id)
    assert (made.made, made.total) == (target.plan.part_count, target.plan.part_count)
    manifest = (tmp_path / "to/manifest.json").stat().st_size
    assert made.nbytes == sum(map(len, tree(tmp_path / "to").values())) - manifest
    assert target.plan.source is not None
    assert (target.plan.source.cache, target.plan.source.codec) == (source.id, source.plan.codec)
    for key, digest in source.plan.contents.items():
        if key in target.plan.contents:  # a codebook is in one of them only
            assert target.plan.contents[key] == digest
    assert target.plan.licence == "CC-BY-NC-SA-4.0"
    numerics = target.receipt(next(target.plan.parts())).numerics
    assert numerics == {"device": "none", "recoded": f"numpy {np.__version__}"}
    assert made.coded_twice == (name in ("int8", "compact"))
    assert made.fidelity is not None
    x, y = values(caches[name]), values(tmp_path / "to")
    relative = np.linalg.norm(x - y) / np.linalg.norm(x)
    assert relative <= LOSES[codec]
    assert made.fidelity["relative"] <= 1.5 * LOSES[codec]
    assert made.lossless == (codec == "exact")
    assert (made.fidelity["relative"] == 0) == made.lossless


def test_what_is_recoded_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    source = build_cache(tmp_path / "from", codec="compact", kmers=64, channels=128, windows=64)
    ids = []
    for threads in (1, 2):
        with threadpool_limits(limits=threads):
            ids.append(recode(source, tmp_path / f"{threads}", codec="int8").cache_id)
    assert ids[0] == ids[1]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_exact_of_a_lossy_cache_is_rounded_once_to_the_teachers_type(
    tmp_path: Path, dtype: Any
) -> None:
    torch = pytest.importorskip("torch")
    source = build_cache(tmp_path / "from", **SHAPE, dtype=dtype)

    made = recode(source, tmp_path / "to", codec="exact")

    expected = torch.from_numpy(values(source)).to(getattr(torch, dtype)).float().numpy()
    assert values(tmp_path / "to").tobytes() == expected.tobytes()
    assert not made.lossless
    assert made.coded_twice


def test_a_second_call_finds_nothing_left_and_changes_nothing(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    for codec, target in (("int8", tmp_path / "to"), ("archive", tmp_path / "archive")):
        first = recode(caches["float32"], target, codec=codec)
        stamps = {path: path.stat().st_mtime_ns for path in target.rglob("*")}

        again = recode(caches["float32"], target, codec=codec)

        assert {path: path.stat().st_mtime_ns for path in target.rglob("*")} == stamps
        assert again.made == 0
        assert (again.cache_id, again.total, again.nbytes) == (
            first.cache_id,
            first.total,
            first.nbytes,
        )
        assert again.fidelity == first.fidelity


# Stopped at any moment


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def killed_before_every_change(source: str, folder: str, codec: str | None, step: int) -> None:
    """Killed before its nth change of the target, for every `step`-th n; then to the end."""
    for moment in itertools.count(1, step):
        path = Path(folder) / str(moment)
        through = ended(in_a_fork(source, path, codec, die_after=moment))
        assert ended(in_a_fork(source, path, codec, die_after=0))
        print(path)
        if through:
            return


def in_a_fork(source: str, target: Path, codec: str | None, *, die_after: int) -> int:
    child = os.fork()
    if child:
        return child
    changes = itertools.count(1)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opened, mode, flags = arguments
            changing = "w" in (mode or "") or bool(flags & (os.O_CREAT | os.O_WRONLY))
        else:
            opened, changing = arguments[0] if arguments else "", event in CHANGES
        if changing and str(target) in str(opened) and next(changes) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        recode(Path(source), target, codec=codec)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def ended(child: int) -> bool:
    """Whether the child got through; it may only have been killed otherwise."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def forking(call: str) -> list[Path]:
    """Call a function of this file in a process without threads, which may fork."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_recode; test_recode.{call}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [Path(line) for line in done.stdout.split()]


@pytest.mark.parametrize("step", [101, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("form", ["codec", "archive", "cache"])
@pytest.mark.timeout(1200)
def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(
    few: Path, tmp_path: Path, form: str, step: int
) -> None:
    source, codec = few, {"codec": "int8", "archive": "archive", "cache": None}[form]
    if form == "cache":
        source = tmp_path / "archive"
        recode(few, source, codec="archive")
    recode(source, tmp_path / "sound", codec=codec)
    sound = tree(tmp_path / "sound")
    (tmp_path / "killed").mkdir()

    arguments = f"{str(source)!r}, {str(tmp_path / 'killed')!r}, {codec!r}, step={step}"
    made = forking(f"killed_before_every_change({arguments})")

    assert len(made) > 150 // step
    for path in made:
        assert tree(path) == sound


def test_no_part_that_is_there_is_made_again(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that cannot be read any more stops it; mended, the rest follows."""
    source = Path(shutil.copytree(caches["float32"], tmp_path / "from"))
    held_out = "data.zarr/valid/0/embedding/value/c/0/0/0"  # no window that is calibrated with
    raw = bytearray((source / held_out).read_bytes())
    raw[100] ^= 1
    (source / held_out).write_bytes(raw)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})  # one thread: in order

    with pytest.raises(CacheCorrupt, match=r"value/c/0.*window 0.*CRC32C"):
        recode(source, tmp_path / "to", codec="int8")

    plan, _ = layout.read_plan(tmp_path / "to")
    missing = integrity.missing_parts(tmp_path / "to", plan)
    assert missing == [layout.Part("valid", 0, 0)]
    with pytest.raises(CacheIncomplete, match="same `had-pipe cache recode` command again"):
        Cache.open(tmp_path / "to")
    shutil.copy(caches["float32"] / held_out, source / held_out)
    assert recode(source, tmp_path / "to", codec="int8").made == 1
    recode(caches["float32"], tmp_path / "other", codec="int8")
    assert tree(tmp_path / "to") == tree(tmp_path / "other")


# Refused before anything is done


def test_targets_that_cannot_be_are_refused(
    caches: dict[str, Path], archives: dict[str, Path], tmp_path: Path
) -> None:
    source = caches["float32"]
    with pytest.raises(RecipeError, match="expected one of int8, exact, compact, tiny, archive"):
        recode(source, tmp_path / "to", codec="zip")
    with pytest.raises(RecipeError, match="exact already"):
        recode(source, tmp_path / "to", codec="exact")
    with pytest.raises(RecipeError, match="inside"):
        recode(source, source / "inside", codec="int8")
    with pytest.raises(RecipeError, match="inside"):
        recode(source, source.parent, codec="archive")
    with pytest.raises(RecipeError, match=r"archive of 'exact'.*without --codec"):
        recode(archives["float32"], tmp_path / "to", codec="int8")
    unfinished = build_cache(tmp_path / "unfinished", **SHAPE, parts=1)
    for codec in ("exact", "archive"):
        with pytest.raises(CacheIncomplete):
            recode(unfinished, tmp_path / "to", codec=codec)
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CacheRefused, match="not a folder"):
        recode(source, tmp_path / "file" / "to", codec="int8")
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("codec", ["int8", "archive", None])
def test_what_somebody_else_has_there_is_left_alone(
    caches: dict[str, Path], archives: dict[str, Path], tmp_path: Path, codec: str | None
) -> None:
    source = caches["float32"] if codec else archives["float32"]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "planning" / ".work" / "plan").mkdir(parents=True)
    other = {"int8": caches["int8"], "archive": archives["float16"], None: caches["float16"]}[codec]
    shutil.copytree(other, tmp_path / "other")
    shutil.copytree(caches["bfloat16"], tmp_path / "another")
    before = {name: tree(tmp_path / name) for name in ("full", "planning", "other", "another")}

    for name in before:
        with pytest.raises(CacheError, match="use another target"):
            recode(source, tmp_path / name, codec=codec)

    assert {name: tree(tmp_path / name) for name in before} == before


def test_what_was_begun_from_another_cache_is_not_gone_on_with(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for codec in ("int8", "archive"):
        with monkeypatch.context() as patch:
            patch.setattr("had_pipe.durable.free_nbytes", lambda path: 10)
            with pytest.raises(StorageError, match="make room, then run the same command again"):
                recode(caches["float32"], tmp_path / codec, codec=codec)
        with pytest.raises(CacheMismatch, match=r"begun: .*use another target"):
            recode(caches["float16"], tmp_path / codec, codec=codec)
        recode(caches["float32"], tmp_path / codec, codec=codec)


def test_too_few_inodes_are_told_beforehand(
    caches: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("had_pipe.durable.free_files", lambda path: 3)
    with pytest.raises(StorageError, match="room for 3"):
        recode(caches["float32"], tmp_path / "to", codec="int8")


def test_a_second_process_is_refused(caches: dict[str, Path], tmp_path: Path) -> None:
    with held(tmp_path / "to", lock=".work/lock", doing="testing"), pytest.raises(HeldError):
        recode(caches["float32"], tmp_path / "to", codec="int8")


# The archival form


@pytest.mark.parametrize("name", KINDS)
def test_an_archive_unpacks_to_the_very_cache(
    caches: dict[str, Path], archives: dict[str, Path], tmp_path: Path, name: str
) -> None:
    made = recode(archives[name], tmp_path / "cache")

    assert tree(tmp_path / "cache") == tree(caches[name])
    assert made.cache_id == Cache.open(caches[name]).id
    assert made.lossless
    small, large = (sum(map(len, tree(path).values())) for path in (archives[name], caches[name]))
    assert small < large
    assert made.source_nbytes == small - sum((archives[name] / k).stat().st_size for k in APART)


def test_shards_that_do_not_get_smaller_stay_as_they_are(
    caches: dict[str, Path], archives: dict[str, Path]
) -> None:
    """And every other file is the cache's own."""
    for name, folder in archives.items():
        packed = json.loads((folder / "archive.json").read_bytes())["packed"]
        whole, small = tree(caches[name]), tree(folder)
        assert small.keys() == {*whole, "archive.json"}
        for key in whole:
            if key in packed:
                assert len(small[key]) == packed[key]["nbytes"] < len(whole[key])
            else:
                assert small[key] == whole[key]


def test_another_zstandard_reads_a_packed_shard(
    caches: dict[str, Path], archives: dict[str, Path]
) -> None:
    """By pyarrow's, and bytes unshuffled one by one, against zarr-python's array."""
    raw = (archives["float32"] / VALUE).read_bytes()
    assert raw[-4:] == bytes.fromhex("b1ea928f")  # the seekable format's mark
    frames = struct.unpack("<I", raw[-9:-5])[0]
    plain = pa.CompressedInputStream(pa.BufferReader(raw), "zstd").read()
    array = zarr.open_array(caches["float32"] / "data.zarr", path="train/0/embedding/value")
    expected = np.ascontiguousarray(array[16:32]).tobytes()
    assert frames == 1
    count = len(expected) // 4
    found = bytearray(len(expected))
    for element in range(count):
        for byte in range(4):
            found[4 * element + byte] = plain[byte * count + element]
    assert bytes(found) == expected


def test_large_shards_are_packed_in_frames_that_can_be_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_FRAME_NBYTES", 1500)  # a window has 640 bytes: 2 a frame
    source = build_cache(tmp_path / "from", **SHAPE, codec="exact")

    recode(source, tmp_path / "archive", codec="archive")
    recode(tmp_path / "archive", tmp_path / "to")

    raw = (tmp_path / "archive" / VALUE).read_bytes()
    frames = struct.unpack("<I", raw[-9:-5])[0]
    assert frames == 8
    sizes = np.frombuffer(raw[-9 - 8 * frames : -9], "<u4").reshape(-1, 2)
    assert sizes[:, 1].tolist() == [1280] * 8
    at = 0
    for size in sizes[:, 0]:
        assert len(Zstd().decode(raw[at : at + size])) == 1280
        at += int(size)
    assert tree(tmp_path / "to") == tree(source)


def test_an_archive_of_a_released_format_unpacks_to_the_cache_it_was_made_of(
    tmp_path: Path,
) -> None:
    """Kept since it was made, like the cache beside it."""
    golden = Path(__file__).parent / "data"
    recode(golden / "archive-v1" / "bfloat16", tmp_path / "cache")
    assert tree(tmp_path / "cache") == tree(golden / "cache-v1" / "bfloat16")


def sound_archive(folder: Path) -> bool:
    """Whether `verify` finds nothing in an archive, not even the start of one."""
    try:
        return not archive.verify(folder).problems
    except CacheError:
        return False


def test_an_archive_is_verified_where_it_lies(
    caches: dict[str, Path], archives: dict[str, Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(archives["bfloat16"], tmp_path / "archive"))
    before = tree(folder)

    found = archive.verify(folder)

    assert (found.problems, found.cache_id) == ((), Cache.open(caches["bfloat16"]).id)
    assert found.nbytes == sum(len(raw) for k, raw in before.items() if k not in APART)
    assert tree(folder) == before
    packed = json.loads(before["archive.json"])["packed"]
    lost, shortened = sorted(packed)[:2]
    (folder / lost).unlink()
    (folder / shortened).write_bytes(before[shortened][:-1])
    (folder / "windows.parquet").unlink()
    os.mkfifo(folder / "windows.parquet")
    problems = {problem.key: problem.found for problem in archive.verify(folder).problems}
    assert set(problems) == {lost, shortened, "windows.parquet"}
    assert "cannot be read (No such file" in problems[lost]
    assert f"{len(before[shortened]) - 1:,} bytes, expected" in problems[shortened]
    assert "found a FIFO" in problems["windows.parquet"]


def test_an_archive_is_no_cache_and_says_how_to_get_one(archives: dict[str, Path]) -> None:
    for attempt in (Cache.open, integrity.verify):
        with pytest.raises(CacheRefused, match=r"archival form.*`had-pipe cache recode .* TARGET`"):
            attempt(archives["int8"])


def test_a_damaged_cache_is_not_archived(caches: dict[str, Path], tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    keys = sorted(set(tree(caches["bfloat16"])) - {"manifest.json"})
    for number, key in enumerate(rng.permutation(keys)[:16]):
        source = Path(shutil.copytree(caches["bfloat16"], tmp_path / f"from{number}"))
        raw = bytearray((source / key).read_bytes())
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        (source / key).write_bytes(raw)

        with pytest.raises(CacheError):
            recode(source, tmp_path / f"to{number}", codec="archive")

        assert not (tmp_path / f"to{number}" / "manifest.json").exists()


def test_two_sound_shards_that_changed_places_are_not_archived(few: Path, tmp_path: Path) -> None:
    """Their CRCs and index are right; only the manifest tells."""
    source = Path(shutil.copytree(build_cache(tmp_path / "sound", **SHAPE), tmp_path / "from"))
    one, two = (source / VALUE.replace("/1/0/0", f"/{n}/0/0") for n in (0, 1))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)

    with pytest.raises(CacheCorrupt, match="not what the manifest says"):
        recode(source, tmp_path / "to", codec="archive")


@pytest.mark.parametrize("array", ["kmer_id", "0/mask", "0/reversed"])
def test_a_source_whose_plan_and_arrays_disagree_is_refused_though_its_manifest_fits(
    few: Path, tmp_path: Path, array: str
) -> None:
    source = Path(shutil.copytree(few, tmp_path / "from"))
    key = f"data.zarr/train/{array}/c/0" + ("" if array == "0/reversed" else "/0")
    raw = bytearray((source / key).read_bytes())
    # Two k-mers exchanged, the masked group moved, or a window turned: all as could be.
    if array == "0/mask":
        raw[:6] = raw[1:6] + raw[:1]
    elif array == "kmer_id":
        raw[:2], raw[2:4] = raw[2:4], raw[:2]
    else:
        raw[0] ^= 1
    raw[-4:] = crc32c.crc32c(bytes(raw[:-4])).to_bytes(4, "little")
    (source / key).write_bytes(raw)
    plan, _ = layout.read_plan(source)
    manifest = layout.read_manifest(source, plan)
    assert manifest is not None
    forged = layout.ObjectRecord(nbytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    forged_manifest = layout.Manifest.build(plan, {**manifest.objects, key: forged})
    (source / "manifest.json").write_bytes(forged_manifest.to_json())

    with pytest.raises(CacheCorrupt, match=rf"train/{array} is not what its plan says"):
        recode(source, tmp_path / "to", codec="int8")

    assert not (tmp_path / "to" / "plan.json").exists()


@pytest.mark.parametrize("flips", [30, pytest.param(800, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_every_flipped_bit_of_an_archive_is_found_or_changes_nothing(
    few: Path, tmp_path: Path, flips: int
) -> None:
    folder = tmp_path / "archive"
    recode(few, folder, codec="archive")
    sound = tree(few)
    rng = np.random.default_rng(flips)
    keys, found = sorted(tree(folder)), 0
    for number in range(flips):
        key = keys[number % len(keys)]
        whole = (folder / key).read_bytes()
        raw = bytearray(whole)
        raw[rng.integers(len(raw))] ^= 1 << int(rng.integers(8))
        (folder / key).write_bytes(raw)
        target = tmp_path / f"to{number}"
        assert not sound_archive(folder)
        try:
            recode(folder, target)
        except CacheError:
            found += 1
        else:
            # The record of a packed file's own SHA-256, for whoever checks without unpacking.
            assert key == "archive.json"
            assert tree(target) == sound
        (folder / key).write_bytes(whole)
        shutil.rmtree(target, ignore_errors=True)
    assert found > 0.9 * flips


# Archives that strangers made


def rewritten(folder: Path, key: str, change: Callable[[Any], None]) -> None:
    """A JSON file changed, and canonical as before."""
    document = json.loads((folder / key).read_bytes())
    change(document)
    (folder / key).write_bytes(layout.canonical_json(document))


def put(folder: Path, key: str, raw: bytes) -> None:
    """A packed file exchanged, and its record with it."""
    (folder / key).write_bytes(raw)
    rewritten(folder, "archive.json", lambda d: d["packed"][key].update(nbytes=len(raw)))


def table(sizes: list[tuple[int, int]]) -> bytes:
    entries = b"".join(struct.pack("<II", *size) for size in sizes)
    footer = struct.pack("<IB", len(sizes), 0) + bytes.fromhex("b1ea928f")
    return bytes.fromhex("5e2a4d18") + struct.pack("<I", len(entries + footer)) + entries + footer


PAYLOAD = 16 * 10 * 16 * 2
"""Bytes of a part's values in bfloat16."""


def bomb_of_zeros() -> bytes:
    """64 MiB in a frame that does not say so: blocks of one byte, repeated."""
    sizes = [(1 << 17) << 3 | 1 << 1 | last for last in [0] * 511 + [1]]
    blocks = b"".join(size.to_bytes(3, "little") + b"\0" for size in sizes)
    return bytes.fromhex("28b52ffd 00 38") + blocks


def declared(nbytes: int) -> bytes:
    """The frame of many zeros, with their number in its header."""
    return bytes(Zstd(level=1).encode(bytes(nbytes)))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a frame longer than the plan says": lambda f: put(
        f, VALUE, declared(1 << 24) + table([(len(declared(1 << 24)), PAYLOAD)])
    ),
    "a frame shorter than the plan says": lambda f: put(
        f, VALUE, declared(100) + table([(len(declared(100)), PAYLOAD)])
    ),
    "two frames where one belongs": lambda f: put(
        f, VALUE, declared(PAYLOAD) * 2 + table([(2 * len(declared(PAYLOAD)), PAYLOAD)])
    ),
    "other values of the right length": lambda f: put(
        f, VALUE, declared(PAYLOAD) + table([(len(declared(PAYLOAD)), PAYLOAD)])
    ),
    "a table of more frames": lambda f: put(
        f, VALUE, declared(PAYLOAD) + table([(len(declared(PAYLOAD)), PAYLOAD), (0, 0)])
    ),
    "a table whose frames end elsewhere": lambda f: put(
        f, VALUE, declared(PAYLOAD) + table([(1 << 31, PAYLOAD)])
    ),
    "no table": lambda f: put(f, VALUE, declared(PAYLOAD)),
    "an empty file": lambda f: put(f, VALUE, b""),
    "no zstandard": lambda f: put(f, VALUE, b"PK" * 50 + table([(100, PAYLOAD)])),
    "a missing file": lambda f: (f / VALUE).unlink(),
    "a link": lambda f: (
        (f / VALUE).rename(f.with_name("elsewhere")),
        (f / VALUE).symlink_to(f.with_name("elsewhere")),
    ),
    "a linked folder": lambda f: (
        (f / "parts").rename(f.with_name("elsewhere")),
        (f / "parts").symlink_to(f.with_name("elsewhere")),
    ),
    "a FIFO": lambda f: ((f / VALUE).unlink(), os.mkfifo(f / VALUE)),
    "a longer plain file": lambda f: (f / "windows.parquet").write_bytes(bytes(1 << 20)),
    "a key outside": lambda f: rewritten(
        f, "archive.json", lambda d: d["packed"].update({"../../x": d["packed"][VALUE]})
    ),
    "a key that is packed never": lambda f: rewritten(
        f, "archive.json", lambda d: d["packed"].update({"windows.parquet": d["packed"][VALUE]})
    ),
    "a packed file larger than its shard": lambda f: rewritten(
        f, "archive.json", lambda d: d["packed"][VALUE].update(nbytes=1 << 40)
    ),
    "another cache's id": lambda f: rewritten(
        f, "archive.json", lambda d: d.update(cache="0" * 64)
    ),
    "another format": lambda f: rewritten(
        f, "archive.json", lambda d: d.update(format="had-archive/2")
    ),
    "an unknown key": lambda f: rewritten(
        f, "archive.json", lambda d: d.update(codec={"id": "pickle"})
    ),
    "JSON that is not canonical": lambda f: (f / "archive.json").write_bytes(
        (f / "archive.json").read_bytes() + b" "
    ),
    "an index that is a link": lambda f: (
        (f / "archive.json").rename(f.with_name("elsewhere")),
        (f / "archive.json").symlink_to(f.with_name("elsewhere")),
    ),
    "no manifest": lambda f: (f / "manifest.json").unlink(),
    "no plan": lambda f: (f / "plan.json").unlink(),
    "a manifest without a key": lambda f: rewritten(
        f, "manifest.json", lambda d: d["objects"].pop(VALUE)
    ),
}


@pytest.mark.parametrize("trick", HOSTILE)
def test_a_strangers_archive_is_refused_and_nothing_comes_of_it(
    packed: Path, tmp_path: Path, trick: str
) -> None:
    HOSTILE[trick](packed)

    with pytest.raises(HadPipeError):
        recode(packed, tmp_path / "to")

    assert not (tmp_path / "to" / "plan.json").exists()
    assert not (tmp_path / "to" / "manifest.json").exists()
    assert {path.name for path in tmp_path.iterdir()} <= {"archive", "to", "elsewhere"}


def test_a_bomb_is_refused_before_it_is_lit(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that do not say how much they hold would be inflated without end."""
    bomb = bomb_of_zeros()
    assert Zstd().decode(bomb) == bytes(1 << 26)  # and this is what would happen
    assert len(bomb) < (packed / VALUE).stat().st_size
    put(packed, VALUE, bomb + table([(len(bomb), PAYLOAD)]))

    real = numcodecs.Zstd.decode

    def watched(codec: Any, frame: bytes, out: Any = None) -> Any:
        assert bytes(frame) != bomb, "inflated"
        return real(codec, frame, out)

    monkeypatch.setattr(numcodecs.Zstd, "decode", watched)
    with pytest.raises(CacheCorrupt, match="says it holds None bytes"):
        recode(packed, tmp_path / "to")


@given(nbytes=st.integers(0, 1 << 20), level=st.sampled_from([-5, 1, 3, 19]))
def test_a_frames_own_length_is_read_as_it_was_written(nbytes: int, level: int) -> None:
    assert archive._declared_nbytes(Zstd(level=level).encode(bytes(nbytes))) == nbytes


@given(raw=st.binary(max_size=40))
def test_no_frame_header_is_read_past_its_end(raw: bytes) -> None:
    for frame in (raw, bytes.fromhex("28b52ffd") + raw):
        found = archive._declared_nbytes(frame)
        assert found is None or 0 <= found < 1 << 64


@given(
    windows=st.integers(1, 9),
    nbytes=st.integers(1, 300),
    itemsize=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 99),
)
def test_any_payload_comes_back(windows: int, nbytes: int, itemsize: int, seed: int) -> None:
    payload = np.random.default_rng(seed).integers(0, 4, (windows, nbytes * itemsize), np.uint8)
    frame = archive._deflate(payload, itemsize)
    assert archive._inflate(frame, payload.shape, itemsize).tobytes() == payload.tobytes()


# Damage to what was made


@pytest.mark.parametrize("form", ["codec", "archive", "cache"])
def test_repair_makes_again_what_is_damaged_and_nothing_else(
    few: Path, tmp_path: Path, form: str
) -> None:
    source, codec = few, {"codec": "tiny", "archive": "archive", "cache": None}[form]
    if form == "cache":
        source = tmp_path / "archive"
        recode(few, source, codec="archive")
    target = tmp_path / "to"
    recode(source, target, codec=codec)
    sound = tree(target)
    value = "data.zarr/train/0/embedding/value/c/{}/0/0"
    for key in (value.format(1), "parts/valid/0/00000.json"):
        raw = bytearray((target / key).read_bytes())
        raw[len(raw) // 2] ^= 1
        (target / key).write_bytes(raw)
    (target / value.format(0)).unlink()
    if form != "codec":
        (target / "windows.parquet").write_bytes(b"PAR1")

    made = recode(source, target, codec=codec, repair=True)

    assert tree(target) == sound
    assert made.made == {"codec": 3, "archive": 4, "cache": 4}[form]
    again = recode(source, target, codec=codec, repair=True)
    assert (again.made, again.cache_id) == (0, made.cache_id)
    assert tree(target) == sound


def test_what_repair_cannot_mend_and_what_is_not_its_own_is_refused(
    caches: dict[str, Path], few: Path, tmp_path: Path
) -> None:
    recode(few, tmp_path / "to", codec="int8")
    (tmp_path / "to" / "windows.parquet").write_bytes(b"PAR1")
    with pytest.raises(CacheCorrupt, match=r"windows\.parquet.*recode to another target"):
        recode(few, tmp_path / "to", codec="int8", repair=True)

    for number, codec in enumerate(("int8", "archive")):
        other = Path(shutil.copytree(caches["int8"], tmp_path / f"other{number}"))
        before = tree(other)
        with pytest.raises(CacheMismatch, match="use another target"):
            recode(few, other, codec=codec, repair=True)
        assert tree(other) == before


def test_verify_names_the_command_that_heals_a_recoded_cache(few: Path, tmp_path: Path) -> None:
    target = tmp_path / "to"
    recode(few, target, codec="int8")
    key = "data.zarr/train/0/embedding/value/c/1/0/0"
    (target / key).write_bytes(bytes(len((target / key).read_bytes())))

    (problem,) = integrity.verify(target).problems

    assert problem.key == key
    assert f"`had-pipe cache recode SOURCE {target} --codec int8 --repair`" in problem.remedy
    assert "extract-teacher" not in problem.remedy
