"""What may befall stage one on its way, and the same bytes in the end.

Every count stands in docs/reliability.md. `-m slow` and `-m soak` run the same drivers longer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import any_order
import disturbances
import disturbed
import durable_order
import pytest
from disturbed import Nursery, a_recipe
from numpy_teacher import NumpyTeacher

from had_pipe import hold
from had_pipe.extract import extract


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return disturbed.write_genome(tmp_path_factory.mktemp("genome") / "g.fa")


@pytest.fixture(scope="module")
def sound(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that one undisturbed process makes."""
    path = tmp_path_factory.mktemp("sound") / "cache"
    extract(a_recipe(genome, path), teacher=NumpyTeacher())
    return path


@pytest.fixture(scope="module")
def planned(sound: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, planned, with no part yet."""
    path = Path(shutil.copytree(sound, tmp_path_factory.mktemp("planned") / "cache"))
    shutil.rmtree(path / "parts")
    (path / "manifest.json").unlink()
    for folder in (path / "data.zarr").glob("*/*/embedding/*/c"):
        shutil.rmtree(folder)
    return path


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def unharmed(told: dict[str, Any]) -> dict[str, Any]:
    """What a driver told, printed for the table of figures; nothing may have gone wrong."""
    assert told.pop("wrong") == []
    print(told)
    return told


# Kills and signals


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(50, marks=pytest.mark.timeout(300)),
        pytest.param(500, marks=[pytest.mark.soak, pytest.mark.timeout(7200)]),
    ],
)
def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(
    nursery: Nursery, genome: Path, planned: Path, sound: Path, tmp_path: Path, kills: int
) -> None:
    told = unharmed(
        nursery(
            disturbances.kill_until_done, genome, planned, sound, tmp_path, kills=kills, seed=kills
        )
    )
    assert told["kills"] == kills
    # One being embedded, and one being written; the next is not begun before.
    assert told["most_lost"] <= 2
    assert len(told["moments"]) >= 10


@pytest.mark.parametrize(
    ("times", "every"),
    [
        pytest.param(1, 11, marks=pytest.mark.timeout(300)),
        pytest.param(1, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(4, 1, marks=[pytest.mark.soak, pytest.mark.timeout(36000)]),
    ],
)
def test_a_signal_at_any_moment_ends_with_its_code_and_leaves_what_goes_on(
    nursery: Nursery,
    genome: Path,
    planned: Path,
    sound: Path,
    tmp_path: Path,
    times: int,
    every: int,
) -> None:
    told = unharmed(
        nursery(
            disturbances.signal_at_every_moment,
            *(genome, planned, sound, tmp_path),
            times=times,
            every=every,
        )
    )
    assert {"SIGKILL -9", "SIGTERM 75", "SIGUSR2 75", "SIGINT 75"} <= told["codes"].keys()


# What a power cut could show


def test_what_is_recorded_is_durable_before_even_where_others_come_in_between(
    nursery: Nursery, genome: Path, tmp_path: Path
) -> None:
    for workers, slow in ((1, 0.0), (3, 0.1)):
        (tmp_path / str(workers)).mkdir()
        folder = tmp_path / str(workers)
        told = nursery(durable_order.trace_of, genome, folder, workers=workers, slow=slow)
        assert told["codes"] == [0] * workers
        assert unharmed(told)["events"] > 500


@pytest.mark.slow
def test_the_system_sees_that_order_too(genome: Path, sound: Path, tmp_path: Path) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    if subprocess.run(["strace", "-f", "true"], capture_output=True, check=False).returncode:
        pytest.skip("processes may not be traced here")
    path = tmp_path / "cache"
    code = (
        "import sys; from pathlib import Path; from disturbed import a_recipe;"
        "from numpy_teacher import NumpyTeacher; from had_pipe.extract import extract;"
        "extract(a_recipe(Path(sys.argv[1]), Path(sys.argv[2])), teacher=NumpyTeacher())"
    )
    command = [sys.executable, "-c", code, str(genome), str(path)]
    events = durable_order.strace_of(command, tmp_path / "trace", path)
    assert disturbed.differences(path, disturbed.tree(sound)) == []
    assert durable_order.disorder(events, path) == []
    renamed = [
        event
        for event in events
        if (event.when, event.doing) == ("after", "replace") and ".work/plan-" not in event.key[:11]
    ]
    parts = len(disturbed.parts_of(path))
    assert len([event for event in renamed if event.key.startswith("parts/")]) == parts
    assert len(renamed) == 3 * parts + 5  # plan, its data and windows, class of arithmetic, seal
    print({"events": len(events)})


def test_an_order_that_is_wrong_is_seen(nursery: Nursery, genome: Path, tmp_path: Path) -> None:
    """The check itself: a trace that lacks one kind of sync."""
    told = nursery(durable_order.trace_of, genome, tmp_path, workers=1, slow=0.0)
    assert (told["codes"], told["wrong"]) == ([0], [])
    path, events = tmp_path / "cache", durable_order.read_trace(tmp_path / "trace")
    parts = len(disturbed.parts_of(path))
    for lacking in ("fsync", "folder"):
        kept = [event for event in events if event.doing != lacking]
        assert len(durable_order.disorder(kept, path)) >= parts
    # Nobody syncs the folder that folders of parts are made in, as when another just made it.
    kept = [
        event for event in events if not (event.doing == "folder" and event.key[-5:] == "value")
    ]
    assert len(durable_order.disorder(kept, path)) == parts


# Several at once


@pytest.mark.parametrize(
    ("seeds", "workers"),
    [
        pytest.param(1, (3,), marks=pytest.mark.timeout(300)),
        pytest.param(4, (2, 5), marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(42, (2, 5), marks=[pytest.mark.soak, pytest.mark.timeout(36000)]),
    ],
)
@pytest.mark.parametrize("kind", disturbances.RACES)
def test_workers_let_go_at_once_make_one_cache(
    nursery: Nursery,
    genome: Path,
    planned: Path,
    sound: Path,
    tmp_path: Path,
    kind: str,
    seeds: int,
    workers: tuple[int, ...],
) -> None:
    begun = races = 0
    for seed in range(seeds):
        for count in workers:
            told = nursery(
                disturbances.race,
                *(genome, planned, sound, tmp_path),
                kind=kind,
                workers=count,
                seed=seed,
            )
            assert told["wrong"] == []
            assert set(told["codes"]) == {0}
            # The board counts whoever renames; a sleeper may wake to do it again, alike.
            assert told["plans"] == ("planning" in kind) or kind in disturbances.SLEEPING
            assert told["seals"] == 1
            begun, races = begun + told["begun"], races + 1
    print({"races": races, "parts": races * told["parts"], "begun": begun})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_twenty_processes_starting_one_recipe_plan_once_and_all_end_well(
    nursery: Nursery, genome: Path, planned: Path, sound: Path, tmp_path: Path
) -> None:
    told = unharmed(
        nursery(
            disturbances.race,
            *(genome, planned, sound, tmp_path),
            kind="planning",
            workers=20,
            seed=0,
        )
    )
    assert told["codes"] == [0] * 20
    assert (told["plans"], told["seals"]) == (1, 1)
    assert told["begun"] >= told["parts"]


def test_a_lease_left_empty_by_a_kill_is_taken_over_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hold, "LEASE_SECONDS", 0.3)
    path = tmp_path / "part.lock"
    path.write_bytes(b"")
    lease = hold.Lease(path)
    assert not lease.take()
    clock = hold.time.monotonic()
    while not lease.take():
        assert hold.time.monotonic() - clock < 30
        hold.time.sleep(0.05)
    assert hold.time.monotonic() - clock >= 0.25
    assert str(os.getpid()) in lease.holder
    lease.release()


# Orders, shares, sizes


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(6, marks=pytest.mark.timeout(300)),
        pytest.param(1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
    ],
)
def test_in_whatever_order_and_shares_it_is_made_the_bytes_are_the_same(
    nursery: Nursery, genome: Path, planned: Path, sound: Path, tmp_path: Path, every: int
) -> None:
    unharmed(nursery(disturbances.in_any_way, genome, planned, sound, tmp_path, every=every))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", [1, 7, 20])
def test_parts_of_any_size_survive_kills(
    nursery: Nursery, genome: Path, tmp_path: Path, part: int
) -> None:
    told = unharmed(nursery(disturbances.interrupted_parts, genome, tmp_path, part=part, kills=10))
    assert told["codes"][-1] == 0
    assert told["codes"].count(-9) >= 2


# Disks


@pytest.fixture
def may_mount(tmp_path: Path) -> None:
    disk = tmp_path / "may"
    disk.mkdir()
    if os.geteuid() or not shutil.which("mount"):
        pytest.skip("no right to mount a small file system here")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no small file system can be mounted here")
    subprocess.run(["umount", disk], check=True)


@pytest.mark.usefixtures("may_mount")
@pytest.mark.parametrize(
    "percents",
    [
        pytest.param([40, 85], marks=pytest.mark.timeout(300)),
        pytest.param([*range(5, 100, 5)], marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.parametrize(
    ("option", "surprised"),
    [
        pytest.param("size", False, id="bytes, told beforehand"),
        pytest.param("size", True, id="bytes, used up by others meanwhile"),
        pytest.param("nr_inodes", True, id="inodes, used up by others meanwhile"),
    ],
)
def test_a_full_disk_is_told_costs_nothing_committed_and_work_goes_on_when_it_grows(
    nursery: Nursery, tmp_path: Path, percents: list[int], option: str, surprised: bool
) -> None:
    genome = disturbed.write_genome(tmp_path / "large.fa", bases=20_000)
    whole = tmp_path / "whole"
    extract(a_recipe(genome, whole, **disturbances.LARGER), teacher=NumpyTeacher())
    told = unharmed(
        nursery(
            disturbances.on_small_disks,
            *(genome, whole, tmp_path / "disk"),
            percents=percents,
            option=option,
            surprised=surprised,
        )
    )
    assert len(told["told"]) == len(percents)
    said = " ".join(sentence for _, _, sentence in told["told"])
    assert ("bytes are still to be written" in said) == (not surprised)
    assert "no space is left on the disk" in said or not surprised


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(11, marks=pytest.mark.timeout(300)),
        pytest.param(3, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param(1, marks=[pytest.mark.soak, pytest.mark.timeout(36000)]),
    ],
)
def test_a_disk_that_fails_at_any_step_is_told_and_work_goes_on_when_it_is_mended(
    nursery: Nursery, genome: Path, planned: Path, sound: Path, tmp_path: Path, every: int
) -> None:
    told = unharmed(
        nursery(disturbances.failing_at_every_step, genome, planned, sound, tmp_path, every=every)
    )
    assert {code.split()[1] for code in told["codes"]} == {"6"}
    assert len(told["codes"]) == 5


# Anything, in any order


@pytest.mark.parametrize(
    ("examples", "steps"),
    [
        pytest.param(3, 8, marks=pytest.mark.timeout(300)),
        pytest.param(15, 20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)]),
        pytest.param(200, 50, marks=[pytest.mark.soak, pytest.mark.timeout(36000)]),
    ],
)
def test_whatever_is_done_in_whatever_order_a_cache_is_what_its_model_says(
    nursery: Nursery, tmp_path: Path, examples: int, steps: int
) -> None:
    genome = disturbed.write_genome(tmp_path / "small.fa", bases=1_100)
    extract(a_recipe(genome, tmp_path / "sound"), teacher=NumpyTeacher())
    (tmp_path / "any").mkdir()
    told = nursery(
        any_order.anything_in_any_order,
        *(genome, tmp_path / "sound", tmp_path / "any"),
        examples=examples,
        steps=steps,
        seed=steps,
    )
    print(told)
    assert told["caches"] >= examples
