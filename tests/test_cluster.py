"""Stage one on Dask: the same bytes, whatever dies; blame for those alone who deserve it."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import dask
import numpy as np
import pytest
from cluster_teachers import Diary, first_seen, lines
from distributed import Client, LocalCluster
from numpy_teacher import NumpyTeacher
from test_corpus import write_fasta
from test_extract import a_recipe, assert_same_bytes

from had_pipe import cluster as cluster_module
from had_pipe import hold
from had_pipe.cache import Cache, Part, integrity
from had_pipe.cluster import (
    ATTEMPTS,
    Attempt,
    Attempts,
    Bench,
    Told,
    _Making,
    extract_on_cluster,
)
from had_pipe.errors import (
    CacheMismatch,
    Interrupted,
    NetworkError,
    QuarantineError,
    RecipeError,
    StorageError,
)
from had_pipe.extract import ensure_plan, extract
from had_pipe.job import Job
from had_pipe.parts import lease_of
from had_pipe.progress import Progress
from had_pipe.recipe import Recipe

# Dask leaves some sockets to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

PART = 2


@dataclass(frozen=True)
class Place:
    """A recipe whose cache is planned, the parts of it, and what a run alone makes of it."""

    recipe: Recipe
    whole: Path
    diary: Path

    @property
    def path(self) -> Path:
        return self.recipe.cache.path

    def teacher(self, **changed: Any) -> Callable[[], Diary]:
        return functools.partial(Diary, path=self.diary, **changed)

    def first_seen(self, number: int) -> str:
        """What the teacher is shown first of a part."""
        cache = Cache.open(self.whole)
        return first_seen(cache, list(cache.plan.parts())[number])


def a_place(folder: Path, *, parts: int) -> Place:
    """So many parts: of one view of a contig, and two of a held-out one."""
    rng = np.random.default_rng(11)
    bases = {"one": 60 * PART * (parts - 2), "held_out": 60 * PART * 2}
    letters = {name: "".join(rng.choice(list("ACGT"), count)) for name, count in bases.items()}
    genome = write_fasta(folder / "g.fa", letters)

    def recipe(name: str) -> Recipe:
        return a_recipe(genome, folder / name, windows={"views": 1}, cache={"part": PART})

    # Planned beforehand, so that teachers that fail at a window meet it in its part alone.
    ensure_plan(Job.of(recipe("cache")), NumpyTeacher())
    shutil.copytree(folder / "cache", folder / "whole")
    extract(recipe("whole"), teacher=NumpyTeacher())
    (folder / "diary").touch()
    return Place(recipe("cache"), folder / "whole", folder / "diary")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return a_place(tmp_path_factory.mktemp("small"), parts=12)


@pytest.fixture
def place(small: Place, tmp_path: Path) -> Place:
    """Twelve parts, planned and not begun."""
    shutil.copytree(small.path, tmp_path / "cache")
    return a_copy(small, tmp_path)


def a_copy(place: Place, folder: Path) -> Place:
    """The same, to be made in another folder."""
    cache = place.recipe.cache.model_copy(update={"path": folder / "cache"})
    (folder / "diary").touch()
    return Place(place.recipe.model_copy(update={"cache": cache}), place.whole, folder / "diary")


def parts_of(place: Place) -> list[Part]:
    return list(Cache.open(place.whole).plan.parts())


def attempts_left(place: Place) -> list[str]:
    return sorted(path.name for path in (place.path / ATTEMPTS).glob("*.json"))


# In one process, without a cluster


def a_bench(place: Place, teacher: Callable[[], Any] | None = None, **changed: Any) -> Bench:
    """A bench as a worker has it."""
    asked = Job.of(place.recipe)
    bench = Bench(asked, "cpu", False, teacher or place.teacher(), local=True)
    for name, value in changed.items():
        setattr(bench, name, value)
    bench.setup(cast(Any, SimpleNamespace(address="inproc://here", name=0, periodic_callbacks={})))
    return bench


def died(place: Place, part: Part, *, alone: bool, process: str = "process 7 on gone") -> None:
    """As a worker that was killed at work on a part leaves it."""
    attempts = Attempts(place.path, part)
    attempts.say(attempts.place(), Attempt(process, alone))


def test_a_part_is_made_once_and_leaves_no_attempt_behind(place: Place) -> None:
    bench, part = a_bench(place), parts_of(place)[3]
    assert bench.make(part, wait=0, limit=3) == Told("made", "inproc://here")
    assert bench.make(part, wait=0, limit=3) == Told("there", "inproc://here")
    assert len(lines(place.diary, "begun")) == 1
    assert len(lines(place.diary, "loaded")) == 1
    assert attempts_left(place) == []


def test_a_part_that_raises_is_blamed_with_what_it_said(place: Place) -> None:
    part = parts_of(place)[3]
    bench = a_bench(place, place.teacher(raises=frozenset({place.first_seen(3)})))
    for number in (1, 2, 3):
        told = bench.make(part, wait=0, limit=3)
        assert told.outcome == "failed"
        assert [attempt.blamed for attempt in told.attempts] == [True] * number
        assert "a window that cannot be" in str(told.attempts[0])
        assert told.attempts[0].process == f"process {os.getpid()} on {os.uname().nodename}"
    assert bench.make(part, wait=0, limit=3).outcome == "failed"
    assert len(lines(place.diary, "begun")) == 3
    assert lease_of(place.path, part).take()


def test_a_part_whose_process_died_beside_others_is_tried_alone_and_not_blamed(
    place: Place,
) -> None:
    """Three threads: one part under suspicion, and a part before and after it."""
    bench = a_bench(place, place.teacher(seconds=0.3))
    first, suspect, last = parts_of(place)[:3]
    for _ in range(5):
        died(place, suspect, alone=False)
    threads = []
    for part in (first, suspect, last):
        threads.append(
            threading.Thread(target=bench.make, args=[part], kwargs={"wait": 0, "limit": 3})
        )
        threads[-1].start()
        wait_until(lease_of(place.path, part).path.exists)
        wait_until(lambda: lines(place.diary, "begun"))
    for thread in threads:
        thread.join()
    missing = integrity.missing_parts(place.path, Cache.open(place.whole).plan)
    assert not {first, suspect, last} & set(missing)
    begun = [when for _, _, when in lines(place.diary, "begun")]
    order = [what for what, _, _ in lines(place.diary, "begun")]
    assert order == [place.first_seen(number) for number in (0, 1, 2)]
    # The receipt of each stands before the next begins.
    for part, after in ((first, begun[1]), (suspect, begun[2])):
        written = (place.path / part.receipt_key).stat().st_mtime - time.time() + time.monotonic()
        assert written <= after + 0.02
    assert attempts_left(place) == []


def test_three_deaths_alone_are_the_parts_own(place: Place) -> None:
    bench, part = a_bench(place), parts_of(place)[3]
    for number in (1, 2, 3):
        died(place, part, alone=True, process=f"process {number} on gone")
    told = bench.make(part, wait=0, limit=3)
    assert (told.outcome, len(told.attempts)) == ("failed", 3)
    assert str(told.attempts[0]).endswith("on gone: it died")
    assert lines(place.diary, "begun") == []
    assert bench.make(part, wait=0, limit=4).outcome == "made"


def test_what_others_hold_is_left_to_them_and_taken_when_they_are_done(place: Place) -> None:
    bench, part = a_bench(place), parts_of(place)[0]
    theirs = lease_of(place.path, part)
    assert theirs.take()
    assert bench.make(part, wait=0, limit=3).outcome == "held"
    threading.Timer(0.7, theirs.release).start()
    assert bench.make(part, wait=30, limit=3).outcome == "made"


def test_a_worker_that_is_sent_away_takes_its_attempt_back(place: Place) -> None:
    bench, part = a_bench(place, place.teacher(seconds=0.3)), parts_of(place)[0]
    at_work = threading.Thread(target=bench.make, args=[part], kwargs={"wait": 0, "limit": 3})
    at_work.start()
    while not attempts_left(place):
        time.sleep(0.005)
    bench.teardown(cast(Any, None))
    assert attempts_left(place) == []
    at_work.join()


def test_what_is_wrong_with_the_run_is_no_fault_of_a_part(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = parts_of(place)[0]
    with pytest.raises(CacheMismatch, match="planned for another teacher"):
        a_bench(place, functools.partial(NumpyTeacher, layer=3)).make(part, wait=0, limit=3)
    monkeypatch.setattr("had_pipe.extract.free_nbytes", lambda path: 0)
    with pytest.raises(StorageError, match="are still to be written"):
        a_bench(place).make(part, wait=0, limit=3)
    monkeypatch.undo()
    full = StorageError("the disk is full")
    teacher = place.teacher(raises=frozenset({place.first_seen(0)}), error=full)
    with pytest.raises(StorageError, match="the disk is full"):
        a_bench(place, teacher).make(part, wait=0, limit=3)
    assert attempts_left(place) == []
    assert lease_of(place.path, part).take()


def test_another_version_and_another_file_system_are_refused(place: Place) -> None:
    part = parts_of(place)[0]
    with pytest.raises(RecipeError, match=r"whoever asks it 9\.9; install one version everywhere"):
        a_bench(place, _version="9.9").make(part, wait=0, limit=3)
    with pytest.raises(RecipeError, match=r"finds no plan at /nowhere; all workers"):
        a_bench(place, path=Path("/nowhere")).make(part, wait=0, limit=3)


def test_a_scheduler_file_that_is_just_being_written_is_waited_for(tmp_path: Path) -> None:
    file = tmp_path / "scheduler.json"
    file.write_text('{"address": "tcp://127.')

    def write() -> None:
        time.sleep(0.3)
        file.write_text('{"address": "tcp://127.0.0.1:8786"}')

    writing = threading.Thread(target=write)
    writing.start()
    assert cluster_module._address(str(file)) == "tcp://127.0.0.1:8786"
    writing.join()


@pytest.mark.parametrize("scheduler", ["nowhere", "/there/is/none.json"])
def test_a_scheduler_is_an_address_or_a_file(place: Place, scheduler: str) -> None:
    with pytest.raises(RecipeError, match="neither an address"):
        extract_on_cluster(place.recipe, scheduler=scheduler)
    for address in ("foo:bar", "http://here:80"):
        with pytest.raises(RecipeError, match=f"--scheduler {address}: no address of a scheduler"):
            extract_on_cluster(place.recipe, scheduler=address)
    file = place.path.with_name("scheduler.json")
    for written in ("", "[]", "{}", '{"address": 3}'):
        file.write_text(written)
        with pytest.raises(RecipeError, match="not a file that a scheduler wrote"):
            extract_on_cluster(place.recipe, scheduler=str(file))
    with pytest.raises(RecipeError, match="--workers 0: expected at least 1"):
        extract_on_cluster(place.recipe, workers=0)


class Crew:
    """As many workers as are named, who make everything at once, and write nothing."""

    def __init__(self, path: Path, *workers: str) -> None:
        self.path, self.workers = path, workers
        self._out: list[object] = []

    def send(self, *_: object, **__: object) -> object:
        self._out.append(object())
        return self._out[-1]

    def next(self) -> object | None:
        return self._out.pop(0) if self.workers else None

    def result(self, _: object) -> Told:
        return Told("made")


@pytest.mark.timeout(30)
@pytest.mark.parametrize(("workers", "made"), [((), 0), (("here",), 3)])
def test_asked_to_stop_it_deals_out_no_more_and_tells_of_what_is_made_alone(
    place: Place, monkeypatch: pytest.MonkeyPatch, workers: tuple[str, ...], made: int
) -> None:
    monkeypatch.setattr(cluster_module, "_LOOK_SECONDS", 0.0)
    told: list[Progress] = []
    asked = iter([False])  # once parts were dealt out: stop
    crew = cast(Any, Crew(place.path, *workers))
    plan = Cache.open(place.path, incomplete=True).plan
    making = _Making(crew, plan, lambda: next(asked, True), told.append)
    with pytest.raises(Interrupted, match=r"12 of 12 are still to be made"):
        making.run()
    assert told[-1].done == made * PART
    assert told[-1].total == 12 * PART


# On clusters


@pytest.fixture
def cluster() -> Iterator[Callable[..., LocalCluster]]:
    """Clusters of this machine, as somebody else would run them."""
    made: list[LocalCluster] = []
    patient = dask.config.set({"distributed.deploy.lost-worker-timeout": "1 hour"})

    def make(workers: int, **options: Any) -> LocalCluster:
        options = {"resources": {"GPU": 1}, "threads_per_worker": 2, **options}
        made.append(
            LocalCluster(
                n_workers=workers,
                processes=True,
                memory_limit=0,
                dashboard_address="127.0.0.1:0",
                silence_logs=50,
                **options,
            )
        )
        return made[-1]

    with patient:
        yield make
        for one in made:
            one.close()


def on(place: Place, cluster: LocalCluster, teacher: Callable[[], Any], **options: Any) -> Any:
    return extract_on_cluster(
        place.recipe, scheduler=cluster.scheduler_address, teacher=teacher, **options
    )


@pytest.mark.timeout(240)
def test_two_workers_make_the_bytes_that_one_process_makes(small: Place, tmp_path: Path) -> None:
    """The plan included, and workers that know nothing yet."""
    place = a_copy(small, tmp_path)
    told: list[Progress] = []
    made = extract_on_cluster(place.recipe, workers=2, teacher=place.teacher(), report=told.append)
    assert_same_bytes(place.path, place.whole)
    assert made.cache_id == Cache.open(place.whole).id
    assert (made.parts_made, made.parts_left, made.parts_total) == (12, 0, 12)
    # Each process loads its teacher once, and the client none.
    loaded = [process for _, process, _ in lines(place.diary, "loaded")]
    assert len(set(loaded)) == len(loaded) <= 2
    assert os.getpid() not in loaded
    said = {progress.what for progress in told}
    assert {"calibrating", "extracting", "sealing"} <= said
    assert told[-1].done == told[-1].total


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("workers", [1, 4])
def test_any_number_of_workers_makes_the_same_bytes(
    small: Place, tmp_path: Path, workers: int
) -> None:
    place = a_copy(small, tmp_path)
    extract_on_cluster(place.recipe, workers=workers, teacher=place.teacher())
    assert_same_bytes(place.path, place.whole)


class Killer(threading.Thread):
    """Kills whoever began the latest part, again and again, as often as it is told to."""

    def __init__(self, diary: Path, *, kills: int, every: int, seed: int = 0) -> None:
        super().__init__(daemon=True)
        self.killed: list[int] = []
        self._diary, self._kills, self._every = diary, kills, every
        self._draw = random.Random(seed)

    def run(self) -> None:
        seen = 0
        while len(self.killed) < self._kills:
            time.sleep(self._draw.uniform(0.01, 0.05))
            begun = lines(self._diary, "begun")
            if len(begun) >= seen + self._every:
                seen = len(begun)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(begun[-1][1], signal.SIGKILL)
                    self.killed.append(begun[-1][1])


def assert_made_in_spite_of(place: Place, kills: int) -> int:
    """The bytes are those of a run alone, and little was done twice; parts begun in all."""
    assert_same_bytes(place.path, place.whole)
    begun = len(lines(place.diary, "begun"))
    assert begun <= len(parts_of(place)) + 2 * kills
    return begun


@pytest.mark.parametrize(
    ("parts", "kills"),
    [
        pytest.param(200, 10, marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
        pytest.param(2_000, 200, marks=[pytest.mark.soak, pytest.mark.timeout(4 * 3600)]),
    ],
)
def test_killed_workers_lose_no_part_and_no_bystander_is_blamed(
    tmp_path: Path, parts: int, kills: int
) -> None:
    place = a_place(tmp_path, parts=parts)
    killer = Killer(place.diary, kills=kills, every=int(0.85 * parts / kills))
    killer.start()
    made = extract_on_cluster(place.recipe, workers=2, teacher=place.teacher(seconds=0.02))
    assert len(killer.killed) == kills
    assert (made.parts_made, made.parts_left) == (parts, 0)
    begun = assert_made_in_spite_of(place, kills)
    # The teacher once in each process that worked.
    loaded = [process for _, process, _ in lines(place.diary, "loaded")]
    assert len(set(loaded)) == len(loaded)
    print(f"{parts} parts, {kills} workers killed, {begun} parts begun")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_part_that_raises_and_one_that_kills_are_given_up_and_the_others_made(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    parts = parts_of(place)
    bad = {"raises": frozenset({place.first_seen(4)}), "kills": frozenset({place.first_seen(7)})}
    running = cluster(2)
    with pytest.raises(QuarantineError) as refusal:
        on(place, running, place.teacher(seconds=0.05, **bad))
    assert refusal.value.exit_code == 8
    said = str(refusal.value)
    assert "parts that failed 3 times were given up (2; in all 2 of 12 are not made):" in said
    assert said.count("a window that cannot be") == 3
    assert said.count("it died") == 3
    assert len([line for line in said.splitlines() if line.startswith("  ")]) == 2
    assert "run the same command again, which tries them afresh" in said
    begun = Counter(window for window, _, _ in lines(place.diary, "begun"))
    assert begun[place.first_seen(4)] == 3
    # Once beside another, which is not held against it, and three times alone.
    assert begun[place.first_seen(7)] in (3, 4)
    raised = {
        process
        for window, process, _ in lines(place.diary, "begun")
        if window == place.first_seen(4)
    }
    assert len(raised) >= 2
    assert set(integrity.missing_parts(place.path, Cache.open(place.whole).plan)) == {
        parts[4],
        parts[7],
    }
    stems = (parts[4].stem, parts[7].stem)
    assert not [name for name in attempts_left(place) if name.startswith(stems)]
    made = on(place, running, place.teacher())
    assert made.parts_made == 2
    assert_same_bytes(place.path, place.whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_teacher_that_fails_everywhere_ends_the_run_early(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    everything = frozenset(place.first_seen(number) for number in range(12))
    with pytest.raises(QuarantineError, match=r"\(3; in all 12 of 12 are not made\)"):
        on(place, cluster(1), place.teacher(raises=everything))
    # Three parts three times, and what was dealt out meanwhile; not every part again and again.
    assert len(lines(place.diary, "begun")) <= 3 * 3 + 6


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_worker_that_sleeps_is_done_without_and_does_no_harm_when_it_wakes(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    sleeper = place.first_seen(3)
    # The scheduler gives a silent worker up after these seconds; a lease is another's after two.
    with dask.config.set({"distributed.scheduler.worker-ttl": "4s"}):
        running = cluster(2)
    with patience_of_leases(running, 2.0):
        made = on(place, running, place.teacher(sleeps=frozenset({sleeper})))
    assert (made.parts_made, made.parts_left) == (12, 0)
    begun = [process for window, process, _ in lines(place.diary, "begun") if window == sleeper]
    assert len(set(begun)) == 2
    with contextlib.suppress(ProcessLookupError):
        os.kill(begun[0], signal.SIGCONT)
    time.sleep(2)
    assert_same_bytes(place.path, place.whole)


@contextlib.contextmanager
def patience_of_leases(running: LocalCluster, seconds: float) -> Iterator[None]:
    """All that work on a cache agree on how long a silent holder keeps its lease; here less."""
    with Client(running) as client, pytest.MonkeyPatch.context() as patch:
        client.run(setattr, hold, "LEASE_SECONDS", seconds)
        patch.setattr(hold, "LEASE_SECONDS", seconds)
        yield


CLIENT = """
import functools, pickle, sys
from pathlib import Path
from cluster_teachers import Diary
from had_pipe.cluster import extract_on_cluster

if __name__ == "__main__":
    recipe = pickle.loads(Path(sys.argv[1]).read_bytes())
    where = {"workers": 2} if sys.argv[3] == "workers" else {"scheduler": sys.argv[3]}
    teacher = functools.partial(Diary, path=Path(sys.argv[2]), seconds=float(sys.argv[4]))
    extract_on_cluster(recipe, teacher=teacher, **where)
"""


def a_client(place: Place, where: str, *, seconds: float) -> subprocess.Popen[str]:
    """Somebody else's process that asks for the cache."""
    folder = place.diary.parent
    (folder / "client.py").write_text(CLIENT)
    (folder / "recipe").write_bytes(pickle.dumps(place.recipe))
    words = [folder / "client.py", folder / "recipe", place.diary, where, str(seconds)]
    return subprocess.Popen(
        [sys.executable, *map(str, words)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_until(true: Callable[[], object], *, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("whose", ["its own cluster", "a cluster that outlives it"])
def test_after_the_death_of_a_client_the_same_command_goes_on(
    cluster: Callable[..., LocalCluster], place: Place, whose: str
) -> None:
    running = cluster(2) if whose == "a cluster that outlives it" else None
    where = running.scheduler_address if running else "workers"
    with a_client(place, where, seconds=0.3) as client:
        wait_until(lambda: len(lines(place.diary, "embedded")) >= 3)
        client.kill()
    # At once: what the dead left running is still at it.
    made = extract_on_cluster(
        place.recipe,
        teacher=place.teacher(),
        **({"scheduler": where} if running else {"workers": 2}),  # type: ignore[arg-type]
    )
    assert 0 < made.parts_made < 12
    assert made.parts_left == 0
    assert_made_in_spite_of(place, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_after_the_death_of_a_scheduler_it_is_told_and_the_same_command_goes_on(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("had_pipe.cluster._GONE_SECONDS", 3.0)
    file = tmp_path / "scheduler.json"
    with (
        dask_process("scheduler", "--scheduler-file", str(file), "--port", "0") as scheduler,
        dask_process("worker", "--scheduler-file", str(file), *OFFER) as worker,
    ):

        def kill() -> None:
            wait_until(lambda: len(lines(place.diary, "embedded")) >= 3)
            scheduler.kill()

        wait_until(file.exists)
        threading.Thread(target=kill).start()
        with pytest.raises(NetworkError, match=r"the scheduler at tcp://\S+ (is gone|has not)"):
            extract_on_cluster(
                place.recipe, scheduler=str(file), teacher=place.teacher(seconds=0.3)
            )
        worker.kill()
    file.unlink()
    made = len([p for p in parts_of(place) if (place.path / p.receipt_key).exists()])
    assert 0 < made < 12
    with (
        dask_process("scheduler", "--scheduler-file", str(file), "--port", "0"),
        dask_process("worker", "--scheduler-file", str(file), *OFFER),
    ):
        wait_until(file.exists)
        extract_on_cluster(place.recipe, scheduler=str(file), teacher=place.teacher())
    assert_made_in_spite_of(place, 1)


OFFER = ("--nthreads", "2", "--resources", "GPU=1", "--no-dashboard", "--memory-limit", "0")


@contextlib.contextmanager
def dask_process(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A part of a cluster, started as a person would."""
    with subprocess.Popen(
        [str(Path(sys.executable).with_name("dask")), *words],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()  # or leaving waits for it for ever


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_cluster_that_shrinks_to_nothing_and_grows_again_finishes(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    running = cluster(2)

    def shrink_and_grow() -> None:
        wait_until(lambda: len(lines(place.diary, "embedded")) >= 3)
        running.scale(0)
        wait_until(lambda: any(one.what == "waiting for workers" for one in told))
        running.scale(1)

    told: list[Progress] = []
    threading.Thread(target=shrink_and_grow).start()
    made = on(place, running, place.teacher(seconds=0.3), report=told.append)
    assert "waiting for workers" in {progress.what for progress in told}
    assert made.parts_left == 0
    assert len({process for _, process, _ in lines(place.diary, "loaded")}) >= 2
    assert_made_in_spite_of(place, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_adaptive_cluster_starts_workers_for_the_parts_that_wait(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    running = cluster(0)
    running.adapt(minimum=0, maximum=2, interval="200 ms")
    on(place, running, place.teacher())
    assert_same_bytes(place.path, place.whole)
    wait_until(lambda: not running.scheduler_info["workers"])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_workers_or_none_with_a_device_are_told_instead_of_waiting_for_ever(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    with pytest.raises(NetworkError, match=r"has had no worker for 1 seconds.*--resources GPU=1"):
        on(place, cluster(0), place.teacher(), patience=1)
    with pytest.raises(RecipeError, match=r"has workers \(1\), but none offers the resource GPU"):
        on(place, cluster(1, resources={}), place.teacher())
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "1s"}),
        pytest.raises(NetworkError, match="no scheduler answers there"),
    ):
        extract_on_cluster(place.recipe, scheduler="tcp://127.0.0.1:9")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_error_of_the_whole_run_reaches_whoever_asked_at_once(
    cluster: Callable[..., LocalCluster], place: Place
) -> None:
    running = cluster(1)
    with pytest.raises(CacheMismatch, match=r"teacher.layer +here -1 +recipe 3"):
        on(place, running, functools.partial(NumpyTeacher, layer=3))
    full = StorageError("the disk is full")
    teacher = place.teacher(raises=frozenset({place.first_seen(5)}), error=full)
    with pytest.raises(StorageError, match="the disk is full"):
        on(place, running, teacher)
    with pytest.raises(Interrupted, match=r"stopped .*: run the same command again"):
        on(place, running, place.teacher(), stopping=lambda: True)
    assert on(place, running, place.teacher()).parts_left == 0
    assert_same_bytes(place.path, place.whole)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_writing_hides_behind_embedding(cluster: Callable[..., LocalCluster], place: Place) -> None:
    """One worker never embeds two parts at once, and embeds while others are being written."""
    on(place, cluster(1), place.teacher(seconds=0.1))
    begun, embedded = (lines(place.diary, what) for what in ("begun", "embedded"))
    assert [window for window, _, _ in begun] == [window for window, _, _ in embedded]
    assert all(
        end <= start for (_, _, end), (_, _, start) in zip(embedded, begun[1:], strict=False)
    )
    hidden = 0
    for (window, _, _), (_, _, start) in zip(embedded, begun[1:], strict=False):
        number = next(n for n in range(12) if place.first_seen(n) == window)
        receipt = place.path / parts_of(place)[number].receipt_key
        written = receipt.stat().st_mtime - time.time() + time.monotonic()
        hidden += start < written
    assert hidden >= 6
