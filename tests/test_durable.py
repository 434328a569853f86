"""Whole or absent: the order on disk, a full disk, and a kill at every step of the way."""

from __future__ import annotations

import errno
import os
import re
import resource
import shutil
import signal
import subprocess
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_cache import build_cache

from had_pipe import durable
from had_pipe.cache import Cache, Part, integrity, writer
from had_pipe.errors import CacheIncomplete, CacheRefused, StorageError

SHAPE: dict[str, Any] = {"windows": 7, "valid": 3, "kmers": 6, "channels": 4, "part": 3}
STEPS = ("fsync", "replace", "mkdir", "unlink", "rmdir")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("sound") / "cache", **SHAPE)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("planned") / "cache", **SHAPE, parts=0)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("begun") / "cache", **SHAPE, parts=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, sound: Path) -> Path:
    """Every part is there, and no seal."""
    folder = Path(shutil.copytree(sound, tmp_path_factory.mktemp("whole") / "cache"))
    (folder / "manifest.json").unlink()
    (folder / ".work").mkdir()
    (folder / ".work" / "left.1.tmp").write_text("by a process that was killed")
    return folder


def make(folder: Path, part: Part, source: Path) -> None:
    """A part as a run would make it, window by window, of what another cache holds."""
    other = Cache.open(source)
    plan = Cache.open(folder, incomplete=True).plan
    with writer.PartWriter(folder, plan, part, numerics={"device": "none"}) as out:
        for row in range(plan.part_windows(part)):
            block = other.allocate(1)
            rows = np.array([part.number * plan.part + row])
            other.read(part.split, part.view, rows, block)
            assert block.scale is not None
            out.append(block.value, block.scale)
        out.sync()
        out.commit()


def files(folder: Path, *, work: bool = False) -> dict[str, bytes]:
    found = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    return {key: raw for key, raw in found.items() if work or not key.startswith(".work/")}


@contextmanager
def traced(step: Callable[[str, Path], None]) -> Iterator[None]:
    """Tell of every step that a power cut could come before, with the path it is about."""

    def watch(name: str, real: Any) -> Any:
        def watched(target: Any, *rest: Any, **options: Any) -> Any:
            path = Path(f"/proc/self/fd/{target}").readlink() if name == "fsync" else Path(target)
            # zarr-python writes from threads of its own, in any order, what is synced afterwards.
            if name == "fsync" or not re.search(r"\.work/plan-\w+/data\.zarr/", path.as_posix()):
                step(name, Path(rest[0]) if name == "replace" else path)
            return real(target, *rest, **options)

        return watched

    with pytest.MonkeyPatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, watch(name, getattr(os, name)))
        yield


@contextmanager
def trace() -> Iterator[list[tuple[str, Path]]]:
    events: list[tuple[str, Path]] = []
    with traced(lambda name, path: events.append((name, path))):
        yield events


def test_a_file_is_synced_then_renamed_then_its_folder_is_synced(tmp_path: Path) -> None:
    (tmp_path / "aside").mkdir()
    final = tmp_path / "file.json"
    final.write_bytes(b"old")

    with trace() as events:
        durable.write_file(final, b"new", aside=tmp_path / "aside")

    temporary = events[0][1]
    assert temporary.parent == tmp_path / "aside"
    assert events == [("fsync", temporary), ("replace", final), ("fsync", tmp_path)]
    assert final.read_bytes() == b"new"
    assert not temporary.exists()


def test_each_new_folder_is_synced_into_its_parent(tmp_path: Path) -> None:
    with trace() as events:
        durable.make_folder(tmp_path / "a" / "b")
        durable.make_folder(tmp_path / "a" / "b")

    assert events == [
        ("mkdir", tmp_path / "a"),
        ("fsync", tmp_path),
        ("mkdir", tmp_path / "a/b"),
        ("fsync", tmp_path / "a"),
    ]


def test_a_tree_is_synced_whole_folders_after_what_they_hold(tmp_path: Path) -> None:
    for name in ("x/1", "x/y/2", "3"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)

    with trace() as events:
        durable.sync_tree(tmp_path)

    places = {path: place for place, (_, path) in enumerate(events)}
    assert set(places) == {tmp_path, *tmp_path.rglob("*")}
    assert all(places[path] < places[path.parent] for path in tmp_path.rglob("*"))


def test_a_part_is_committed_shards_first_receipt_last_all_synced(
    begun: Path, sound: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "cache"))
    part = Part("train", 0, 1)

    with trace() as events:
        make(folder, part, sound)

    renamed = [path for name, path in events if name == "replace"]
    signals = Cache.open(sound).plan.signals
    shards = [folder / part.shard_key(signal) for signal in signals]
    receipt = folder / part.receipt_key
    assert renamed == [*shards, receipt]
    synced_files = [
        place
        for place, (name, path) in enumerate(events)
        if name == "fsync" and path.suffix == ".tmp"
    ]
    assert len(synced_files) == 3
    first_rename = events.index(("replace", shards[0]))
    assert synced_files[1] < first_rename
    for final in renamed:
        place = events.index(("replace", final))
        assert events[place + 1] == ("fsync", final.parent)
    for made in [path for name, path in events if name == "mkdir"]:
        later = events[events.index(("mkdir", made)) :]
        assert later[1] == ("fsync", made.parent)
    assert synced_files[2] > events.index(("fsync", shards[1].parent))
    after = events[events.index(("replace", receipt)) + 1 :]
    assert after[0] == ("fsync", receipt.parent)
    assert {name for name, _ in after[1:]} == {"unlink"}  # of temporaries long renamed


def test_a_plan_is_published_last_after_all_it_speaks_of(tmp_path: Path) -> None:
    with trace() as events:
        folder = build_cache(tmp_path / "cache", **SHAPE, parts=0)

    places = {event: place for place, event in enumerate(events)}
    data, windows, plan = (
        places["replace", folder / name] for name in ("data.zarr", "windows.parquet", "plan.json")
    )
    assert data < windows < plan
    aside = next(path for name, path in events if name == "mkdir" and "plan-" in path.name)
    for path in (folder / "data.zarr").rglob("*"):
        assert places["fsync", aside / path.relative_to(folder)] < data
    assert places["fsync", aside / "windows.parquet"] < windows
    assert events[plan + 1] == ("fsync", folder)


def test_the_seal_is_set_before_the_work_folder_goes(whole: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "cache"))

    with trace() as events:
        integrity.seal(folder)

    manifest = events.index(("replace", folder / "manifest.json"))
    assert events[manifest - 1][0] == "fsync"
    assert events[manifest + 1] == ("fsync", folder)
    removals = [place for place, (name, _) in enumerate(events) if name in ("unlink", "rmdir")]
    assert min(removals) > manifest + 1
    assert events[-1] == ("fsync", folder)


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Run in a process of its own that is killed before its n-th step; whether it came so far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child starts no thread of ours
        child = os.fork()
    if child == 0:
        left = step

        def count(name: str, path: Path) -> None:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

        try:
            with traced(count):
                work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0
    return False


def test_a_part_killed_at_any_step_is_missing_never_torn_and_made_again_the_same(
    begun: Path, sound: Path, tmp_path: Path
) -> None:
    part, expected = Part("train", 0, 1), {}
    reference = Path(shutil.copytree(begun, tmp_path / "reference"))
    make(reference, part, sound)
    expected = files(reference)
    there = []
    step = 0
    while True:
        folder = Path(shutil.copytree(begun, tmp_path / f"killed-{step}"))
        if not killed_before(step, lambda folder=folder: make(folder, part, sound)):
            break
        assert integrity.verify(folder).problems == ()
        cache = Cache.open(folder, incomplete=True)
        there.append(cache.has(part))
        block = cache.allocate(3)
        if cache.has(part):
            cache.read("train", 0, np.array([3, 4, 5]), block)
        else:
            with pytest.raises(CacheIncomplete):
                cache.read("train", 0, np.array([3, 4, 5]), block)
        cache.read("train", 0, np.array([0, 1, 2]), block)

        writer.clear_temporaries(folder, part)
        make(folder, part, sound)

        # A receipt killed aside goes with `.work/`, at the seal.
        found = files(folder, work=True)
        found = {key: raw for key, raw in found.items() if ".work/00001.json." not in key}
        assert found == expected, step
        step += 1
    assert step > 15
    # Once there, it stays; and it is there only when all but the last sync is done.
    assert there == sorted(there)
    assert not all(there)
    assert any(there)
    shards = Cache.open(sound).plan.signals
    assert there.count(True) <= 1 + 2 * len(shards)  # what follows is clearing away temporaries


def test_a_plan_killed_at_any_step_is_no_cache_and_made_again_the_same(
    planned: Path, tmp_path: Path
) -> None:
    expected, stops = files(planned), 0
    # Some of the steps, most of them syncs of small files, and all of the publishing.
    with trace() as events:
        build_cache(tmp_path / "counted", **SHAPE, parts=0)
    published = [
        place
        for place, (name, path) in enumerate(events)
        if name == "replace" and path.parent == tmp_path / "counted"
    ]
    assert len(published) == 3
    steps = sorted({*range(0, len(events), 40), *range(published[0], published[-1] + 3)})
    for step in steps:
        folder = tmp_path / f"killed-{step}"

        stops += killed_before(step, lambda folder=folder: build_cache(folder, **SHAPE, parts=0))

        if not (folder / "plan.json").exists():
            with pytest.raises(CacheRefused, match=r"no plan\.json"):
                Cache.open(folder, incomplete=True)
            build_cache(folder, **SHAPE, parts=0)
        assert files(folder) == expected, step
    assert stops == len(steps)


def test_a_seal_killed_at_any_step_stands_or_not_and_is_set_again_the_same(
    whole: Path, sound: Path, tmp_path: Path
) -> None:
    step = 0
    sealed = []
    while True:
        folder = Path(shutil.copytree(whole, tmp_path / f"killed-{step}"))
        if not killed_before(step, lambda folder=folder: integrity.seal(folder)):
            break
        assert set(files(folder)) - set(files(sound)) == set()
        sealed.append(Cache.open(folder, incomplete=True).sealed)

        integrity.seal(folder)

        assert files(folder, work=True) == files(sound)
        step += 1
    assert sealed == sorted(sealed)
    assert {*sealed} == {False, True}


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Every write beyond fails, with EFBIG: a full disk that needs no rights to set up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 8, 40, 100])
def test_a_part_that_cannot_be_written_says_so_and_leaves_all_else(
    nbytes: int, begun: Path, sound: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "cache"))
    before = files(folder, work=True)

    with (
        pytest.raises(StorageError, match=r"larger than allowed.*committed so far is intact"),
        files_of_at_most(nbytes),
    ):
        make(folder, Part("train", 0, 1), sound)

    assert files(folder, work=True) == before
    assert integrity.verify(folder).problems == ()


def test_a_full_device_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"cache: no space is left on the disk.*same command"),
        durable.storage(tmp_path / "cache"),
        Path("/dev/full").open("wb", buffering=0) as file,
    ):
        file.write(b"x")


@pytest.mark.parametrize("number", sorted(durable.TROUBLE))
def test_what_a_failing_disk_says_becomes_a_sentence(number: int) -> None:
    with (
        pytest.raises(StorageError, match=r"^here: .*mend that, then run") as caught,
        durable.storage(Path("here")),
    ):
        raise OSError(number, os.strerror(number))
    assert isinstance(caught.value.__cause__, OSError)


def test_an_error_that_is_not_the_disks_keeps_its_name() -> None:
    with pytest.raises(FileNotFoundError), durable.storage(Path("here")):
        raise OSError(errno.ENOENT, "no such file")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB that is really full when it is full."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("no right to mount a small file system here")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_costs_the_part_in_hand_only(small_disk: Path, tmp_path: Path) -> None:
    shape = {"windows": 60, "valid": 0, "kmers": 12, "channels": 1000, "part": 30}
    sound = build_cache(tmp_path / "sound", **shape)
    folder = build_cache(small_disk / "cache", **shape, parts=1)
    part = Part("train", 0, 1)
    before = files(folder, work=True)
    filler = small_disk / "filler"
    needed = sum((sound / part.shard_key(s)).stat().st_size for s in Cache.open(sound).plan.signals)
    for free in (0, needed // 3, needed - 4096):
        found = os.statvfs(small_disk)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_bsize - free)

        with pytest.raises(StorageError, match="no space is left"):
            make(folder, part, sound)

        assert files(folder, work=True) == before
        filler.unlink()
    cache = Cache.open(folder, incomplete=True)
    cache.read("train", 0, np.arange(30), cache.allocate(30))

    make(folder, part, sound)

    integrity.seal(folder)
    assert files(folder, work=True) == files(sound)
