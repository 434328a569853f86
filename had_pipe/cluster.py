"""Stage one on a Dask cluster: one on this machine made for the purpose, or one that runs already.

Dask deals out parts and starts workers; it is not believed. Receipts say which parts exist, leases
keep two workers off one part, and what was tried and failed is counted on disk, so that a scheduler
or a client may die and the same command goes on. Making a part, and sealing, is stage one's own.

Dask blames a worker's death on every task it held. Here a part is blamed when it raised, or when
its process died while it was alone in it; whatever was at work beside another is tried again alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import queue
import socket
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Self

import dask
from distributed import Client, Future, LocalCluster, Worker, WorkerPlugin, get_worker
from distributed.scheduler import KilledWorker, NoValidWorkerError
from distributed.system import MEMORY_LIMIT

from had_pipe import __version__, hold
from had_pipe.cache import Part, Plan, integrity, layout
from had_pipe.durable import make_folder, storage, write_file
from had_pipe.errors import (
    CacheError,
    HadPipeError,
    InputError,
    Interrupted,
    NetworkError,
    QuarantineError,
    RecipeError,
    StorageError,
)
from had_pipe.extract import ExtractSummary, check_room, ensure_plan, seal_if_whole, summary
from had_pipe.hold import Lease
from had_pipe.job import Job
from had_pipe.parts import PartMaker, lease_of
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.teachers.teacher import Teacher

THREADS = 2
"""Parts that a worker holds: one is embedded while the other is written."""

_RESOURCES = {"GPU": 1 / THREADS}
_PER_WORKER = 3  # parts dealt out at a time: two in work, one that waits
_FAILURES = 3
_SHOWN = 5

_LOOK_SECONDS = 0.5  # between two looks for something that may change at any moment
_CALM_SECONDS = 5.0  # between two looks at the workers, while there are some
_WRITING_SECONDS = 2.0  # for a scheduler file that is there but not whole
_GONE_SECONDS = 30.0

ATTEMPTS = f"{layout.WORK}/attempts"


def extract_on_cluster(
    recipe: Recipe,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    device: str = "auto",
    offline: bool = False,
    repair: bool = False,
    patience: float = 600.0,
    stopping: Callable[[], bool] = lambda: False,
    report: Reporter = silent,
    teacher: Callable[[], Teacher] | None = None,
) -> ExtractSummary:
    """As `extract`, on `workers` processes of this machine or on the cluster of a `scheduler`.

    Exactly one of them is given; a scheduler is an address or a scheduler file. The teacher is
    loaded in workers alone, on this machine each on its own CUDA device as long as there are
    enough. Without any worker for `patience` seconds it gives up. `teacher` is called in each
    worker instead of loading the recipe's. Raises QuarantineError where parts failed again and
    again, once all others are made; any other HadPipeError at once. What was committed stays.
    """
    assert (workers is None) != (scheduler is None)
    asked = Job.of(recipe)
    path = asked.path
    bench = Bench(asked, device, offline, teacher, local=scheduler is None)
    made, windows, seconds = 0, 0, 0.0
    with _client(workers, scheduler) as client, _Crew(client, bench, patience, report) as crew:
        plan = _plan_by(crew, repair, stopping)
        if not (path / layout.MANIFEST).exists():
            begun = time.monotonic()
            made, windows = _Making(crew, plan, stopping, report).run()
            seconds = time.monotonic() - begun
    seal_if_whole(path, plan, report=report)
    return summary(path, made=made, windows=windows, seconds=seconds)


@contextlib.contextmanager
def _client(workers: int | None, scheduler: str | None) -> Iterator[Client]:
    """A client of a running cluster, or of one that ends with it."""
    if workers is not None:
        if workers < 1:
            raise RecipeError(f"--workers {workers}: expected at least 1")
        # Workers compute with the threads that a run without a cluster would have: on a CPU
        # another number may mean other bits.
        inherited = {
            f"distributed.nanny.pre-spawn-environ.{name}": None
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        }
        # Dask would let a worker go for good if it were dead again this long after its last death.
        patient = {"distributed.deploy.lost-worker-timeout": "1000 days"}
        with (
            dask.config.set({**inherited, **patient}),
            LocalCluster(
                n_workers=workers,
                threads_per_worker=THREADS,
                processes=True,
                resources={"GPU": 1},
                memory_limit=MEMORY_LIMIT // workers,
                dashboard_address="127.0.0.1:0",
                scheduler_kwargs={"dashboard": False},
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    assert scheduler is not None
    try:
        client = Client(_address(scheduler))
    except (OSError, TimeoutError) as error:
        raise NetworkError(
            f"--scheduler {scheduler}: no scheduler answers there ({error}); start one with "
            "`dask scheduler`, or mend the address"
        ) from error
    except ValueError as error:
        raise RecipeError(
            f"--scheduler {scheduler}: no address of a scheduler ({error}); such as tcp://HOST:8786"
        ) from error
    with client:
        yield client


def _address(scheduler: str) -> str:
    """Where a scheduler is that was named by address or file."""
    if not Path(scheduler).is_file():
        if ":" not in scheduler:
            raise RecipeError(
                f"--scheduler {scheduler}: neither an address, such as tcp://HOST:8786, nor a "
                "scheduler file that exists"
            )
        return scheduler
    address, until = None, time.monotonic() + _WRITING_SECONDS
    while True:
        try:
            address = json.loads(Path(scheduler).read_text("utf-8"))["address"]
        except ValueError:
            # Dask writes it in place: one that has just begun is there before its text is.
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
        except (KeyError, TypeError):
            pass
        break
    if not isinstance(address, str):
        raise RecipeError(
            f"--scheduler {scheduler}: not a file that a scheduler wrote; take that of `dask "
            "scheduler --scheduler-file FILE`, or an address, such as tcp://HOST:8786"
        )
    return address


# In a worker


@dataclass(frozen=True)
class Attempt:
    """One time that work on a part began and did not end well, as it lies on disk."""

    process: str
    alone: bool
    """Whether nothing else was at work in its process from beginning to end."""
    error: str | None = None
    """None where the process died."""

    @property
    def blamed(self) -> bool:
        return self.alone or self.error is not None

    def __str__(self) -> str:
        return f"{self.process}: {self.error or 'it died'}"


class Attempts:
    """What was tried of one part: a file for each attempt that began, gone where it ended well."""

    def __init__(self, cache: Path, part: Part) -> None:
        self._folder = cache / ATTEMPTS
        self._stem = part.stem

    def read(self) -> list[Attempt]:
        found = []
        for path in sorted(self._folder.glob(f"{self._stem}.*.json")):
            with contextlib.suppress(FileNotFoundError, ValueError, TypeError):
                found.append(Attempt(**json.loads(path.read_text("utf-8"))))
        return found

    def place(self) -> Path:
        """Where another attempt is to be written."""
        return self._folder / f"{self._stem}.{uuid.uuid4().hex}.json"

    def say(self, path: Path, attempt: Attempt) -> None:
        make_folder(self._folder)
        write_file(path, layout.canonical_json(asdict(attempt)), aside=self._folder)

    def forget(self) -> None:
        with storage(self._folder):
            for path in self._folder.glob(f"{self._stem}.*"):
                path.unlink(missing_ok=True)


class _Room:
    """Who is at work in this process: some beside each other, or one alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._loners = 0  # within, or waiting for the others to go

    @contextlib.contextmanager
    def within(self, *, alone: bool) -> Iterator[None]:
        with self._changed:
            if alone:
                self._loners += 1
                self._changed.wait_for(lambda: not self._inside)
            else:
                self._changed.wait_for(lambda: not self._loners)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._loners -= alone
                self._changed.notify_all()


Outcome = Literal["planned", "made", "there", "held", "failed", "unprepared"]


@dataclass(frozen=True)
class Told:
    """What became of one errand."""

    outcome: Outcome
    worker: str = ""
    attempts: tuple[Attempt, ...] = ()

    @classmethod
    def of(cls, event: Mapping[str, Any]) -> Self:
        attempts = tuple(Attempt(**attempt) for attempt in event["attempts"])
        return cls(event["outcome"], event["worker"], attempts)


class Bench(WorkerPlugin):
    """A worker's place of work: the teacher, loaded once in each process, and what is at work."""

    def __init__(
        self,
        asked: Job,
        device: str,
        offline: bool,
        teacher: Callable[[], Teacher] | None,
        *,
        local: bool,
    ) -> None:
        self.asked = asked
        self.path = asked.path
        self._device, self._offline, self._teacher_of, self._local = device, offline, teacher, local
        self._version = __version__
        # One recipe, one bench: whoever comes again replaces what a dead client left.
        meant = repr((asked, device, offline, local))
        self.name = f"had-pipe-{hashlib.sha256(meant.encode()).hexdigest()[:16]}"

    def setup(self, worker: Worker) -> None:
        """In the worker, at its start and at every restart. The first task loads the teacher, so
        that what goes wrong reaches whoever asked."""
        # Dask's profiler looks at all threads' frames a hundred times a second; where a collection
        # falls into that while a thread ends, some Pythons stand still for ever (seen with 3.11.7;
        # CPython issue 106883), and every lease has a thread.
        profiler = worker.periodic_callbacks.pop("profile", None)
        if profiler is not None:
            profiler.stop()
        self.process = f"process {os.getpid()} on {socket.gethostname()}"
        self._address, self._number = worker.address, worker.name
        self._loading = threading.Lock()
        self._teacher: Teacher | None = None
        self._maker: PartMaker | None = None
        self._room = _Room()
        self._begun: set[Path] = set()
        self._leaving = False

    def teardown(self, worker: Worker) -> None:
        """A worker that is sent away while it works has not failed."""
        self._leaving = True
        for path in list(self._begun):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
        self._maker = self._teacher = None

    @classmethod
    def here(cls, name: str) -> Self | None:
        found = get_worker().plugins.get(name)
        assert found is None or isinstance(found, cls)
        return found

    def teacher(self) -> Teacher:
        with self._loading:
            if self._teacher is None:
                if self._version != __version__:
                    raise RecipeError(
                        f"{self.process} runs had-pipe {__version__}, whoever asks it "
                        f"{self._version}; install one version everywhere"
                    )
                self._teacher = self._load()
            return self._teacher

    def _load(self) -> Teacher:
        if self._teacher_of is not None:
            return self._teacher_of()
        device = self._device
        if self._local and device in ("auto", "cuda"):
            import torch

            if devices := torch.cuda.device_count():
                device = f"cuda:{int(self._number) % devices}"
        return self.asked.load(device, self._offline)

    def maker(self) -> PartMaker:
        teacher = self.teacher()
        with self._loading:
            if self._maker is None:
                if not (self.path / layout.PLAN).is_file():
                    raise RecipeError(
                        f"{self.process} finds no plan at {self.path}; all workers, and whoever "
                        "asks them, must see the cache at one path of a shared file system"
                    )
                self._maker = PartMaker(self.path, teacher, at_once=THREADS)
            return self._maker

    def make(self, part: Part, *, wait: float, limit: int) -> Told:
        """Make a part, unless it is there, with others, or was blamed `limit` times.

        Others' lease is watched for `wait` seconds, so that one whose holder is gone is taken over.
        """
        maker = self.maker()
        lease = lease_of(self.path, part)
        until = time.monotonic() + wait
        while not lease.take():
            if self._is_there(part):
                return self._told("there")
            if time.monotonic() >= until:
                return self._told("held")
            time.sleep(_LOOK_SECONDS)
        try:
            if self._is_there(part):
                return self._told("there")
            attempts = Attempts(self.path, part)
            # Whoever else began it has lost its lease, so it died, or sleeps.
            earlier = attempts.read()
            if sum(attempt.blamed for attempt in earlier) >= limit:
                return self._told("failed", earlier)
            alone = any(attempt.error is None for attempt in earlier)
            with self._room.within(alone=alone):
                return self._make(maker, part, lease, attempts, alone=alone)
        finally:
            lease.release()

    def _make(
        self, maker: PartMaker, part: Part, lease: Lease, attempts: Attempts, *, alone: bool
    ) -> Told:
        check_room(self.path, maker.plan, [part])
        attempt = Attempt(self.process, alone)
        record = attempts.place()
        self._begun.add(record)  # before it is there: whoever sees it may send this worker away
        attempts.say(record, attempt)
        if self._leaving:
            record.unlink(missing_ok=True)
        try:
            receipt = maker.make(part, lease).result()
        except (StorageError, CacheError, RecipeError, InputError):
            record.unlink(missing_ok=True)  # of the whole run: no fault of the part
            raise
        except Exception as error:
            said = str(error) if isinstance(error, HadPipeError) else repr(error)
            attempts.say(record, replace(attempt, error=said))
            return self._told("failed", attempts.read())
        finally:
            self._begun.discard(record)
        if receipt is None:
            record.unlink(missing_ok=True)
            return self._told("held")
        attempts.forget()
        return self._told("made")

    def _is_there(self, part: Part) -> bool:
        return (self.path / part.receipt_key).is_file()

    def _told(self, outcome: Outcome, attempts: Sequence[Attempt] = ()) -> Told:
        return Told(outcome, self._address, tuple(attempts))


# Tasks return nothing: whoever gathers results from a worker that just died makes the scheduler
# send its nanny home as well. What there is to tell goes by the scheduler, before the task ends.


def _plan_there(name: str, topic: str, errand: str, repair: bool) -> None:
    """In a worker: make sure that the plan stands."""
    worker, bench = get_worker(), Bench.here(name)
    told = Told("unprepared", worker.address)
    if bench is not None:
        said: dict[str, float] = {}

        def report(progress: Progress) -> None:
            if progress.seconds - said.get(progress.what, -1.0) >= _LOOK_SECONDS:
                said[progress.what] = progress.seconds
                worker.log_event(topic, {"progress": asdict(progress)})

        ensure_plan(bench.asked, bench.teacher(), repair=repair, report=report)
        told = replace(told, outcome="planned")
    worker.log_event(topic, {"errand": errand, "told": asdict(told)})


def _make_there(name: str, topic: str, errand: str, part: Part, wait: float, limit: int) -> None:
    """In a worker: make a part."""
    worker, bench = get_worker(), Bench.here(name)
    told = Told("unprepared", worker.address)
    if bench is not None:
        told = bench.make(part, wait=wait, limit=limit)
    worker.log_event(topic, {"errand": errand, "told": asdict(told)})


# Beside the scheduler


class _Crew:
    """The workers of a cluster, each with its bench, and the errands they are on."""

    def __init__(self, client: Client, bench: Bench, patience: float, report: Reporter) -> None:
        self.path = bench.path
        self._client, self._bench, self._patience = client, bench, patience
        self._report = report
        assert client.scheduler is not None
        self._where = f"the scheduler at {client.scheduler.address}"
        self._topic = f"had-pipe-{uuid.uuid4().hex}"
        self._errands = 0
        self._told: dict[str, Told] = {}
        self._out: dict[Future[Any], frozenset[str]] = {}
        """Errands, and the workers one of whom is to do it; none for any."""
        self._taken_back: set[Future[Any]] = set()
        self._done: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
        self.workers: tuple[str, ...] = ()
        """Addresses of those that offer a device."""
        self._looked = -_LOOK_SECONDS
        self._seen_scheduler = self._seen_workers = time.monotonic()

    def __enter__(self) -> Self:
        self._client.subscribe_topic(self._topic, self._hear)
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        """Take back what has not begun, and let workers forget the teacher."""
        # Where this is not to be had, leases and receipts keep what goes on from doing harm. A
        # worker that does not answer must not keep whoever asked.
        leaving = threading.Thread(target=self._leave, name="had-pipe leaving", daemon=True)
        leaving.start()
        leaving.join(_GONE_SECONDS)

    def _leave(self) -> None:
        with contextlib.suppress(Exception):
            if self._client.status == "running":
                self._client.cancel(list(self._out), force=True)
                self._client.unsubscribe_topic(self._topic)
                self._client.unregister_worker_plugin(self._bench.name)

    def prepare(self) -> None:
        """Give every worker, those to come as well, its bench."""
        self._client.register_plugin(self._bench, name=self._bench.name)

    def _hear(self, event: tuple[float, Mapping[str, Any]]) -> None:
        """What a worker tells by way of the scheduler; called in the client's own thread."""
        _, said = event
        if "progress" in said:
            self._report(Progress(**said["progress"]))
        else:
            self._told[said["errand"]] = Told.of(said["told"])

    def send(
        self, errand: Callable[..., Any], *arguments: Any, name: str, among: Iterable[str] = ()
    ) -> Future[Any]:
        """Give an errand to any worker, or to one of some. Ends in `next`."""
        self._errands += 1
        key = f"{name}-{self._topic[-8:]}-{self._errands}"
        addresses = frozenset(among)
        future = self._client.submit(
            errand,
            self._bench.name,
            self._topic,
            key,
            *arguments,
            key=key,
            resources=_RESOURCES,
            retries=0,
            workers=list(addresses) or None,
        )
        self._out[future] = addresses
        future.add_done_callback(self._done.put)
        return future

    def next(self) -> Future[Any] | None:
        """An errand that ended, or None after a while. Raises where nobody is there to do any."""
        now = time.monotonic()
        if now - self._looked >= (_CALM_SECONDS if self.workers else _LOOK_SECONDS):
            self._look(now)
            self._looked = time.monotonic()
        try:
            future = self._done.get(timeout=_LOOK_SECONDS)
        except queue.Empty:
            return None
        self._out.pop(future, None)
        return future

    def result(self, future: Future[Any]) -> Told | None:
        """What an errand came to, None where that was not heard; its error is raised."""
        told = self._told.pop(str(future.key), None)
        try:
            if future.status == "error":
                error = future.exception()
                assert error is not None
                raise error
            if future.status == "cancelled" and future not in self._taken_back:
                raise NetworkError(
                    f"{self._where} is gone. What was committed is kept: start it again, then run "
                    "the same command again"
                )
        except NoValidWorkerError as error:
            raise self._nobody() from error
        finally:
            self._taken_back.discard(future)
            with contextlib.suppress(Exception):  # a scheduler that is gone
                future.release()
        return told

    def _look(self, now: float) -> None:
        found = None
        with contextlib.suppress(OSError, TimeoutError):
            if self._client.status == "running":
                found = self._client.scheduler_info(n_workers=-1)["workers"]
        if found is None:
            self.workers = ()
            if now - self._seen_scheduler > _GONE_SECONDS:
                raise NetworkError(
                    f"{self._where} has not answered for {_GONE_SECONDS:.0f} seconds. What was "
                    "committed is kept: start it again, then run the same command again"
                )
            return
        self._seen_scheduler = now
        needed = _RESOURCES["GPU"]
        self.workers = tuple(
            address for address, one in found.items() if one["resources"].get("GPU", 0) >= needed
        )
        for future, among in self._out.items():
            # The scheduler would wait for their addresses for ever, which a restart changes.
            if among and not among & set(self.workers) and future not in self._taken_back:
                self._taken_back.add(future)
                future.cancel()
        if self.workers:
            self._seen_workers = now
        elif found:
            raise RecipeError(
                f"{self._where} has workers ({len(found)}), but none offers the resource GPU, "
                f"which parts ask for; start them with --nthreads {THREADS} --resources GPU=1, one "
                "for each device (on CPUs as well)"
            )
        elif now - self._seen_workers > self._patience:
            raise self._nobody()

    def _nobody(self) -> NetworkError:
        return NetworkError(
            f"{self._where} has had no worker for {self._patience:.0f} seconds, and "
            f"{len(self._out)} errands wait. What was committed is kept: start workers (dask "
            f"worker ADDRESS --nthreads {THREADS} --resources GPU=1), or see what your queue says "
            "of their jobs, then run the same command again"
        )


def _plan_by(crew: _Crew, repair: bool, stopping: Callable[[], bool]) -> Plan:
    """See that the plan stands: a worker makes it, or holds it against the recipe."""
    path = crew.path
    told = None
    while told is None or told.outcome != "planned":
        crew.send(_plan_there, repair, name="plan")
        while (future := crew.next()) is None:
            if stopping():
                raise Interrupted(f"{path}: stopped while planning: run the same command again")
        try:
            told = crew.result(future)
        except KilledWorker as error:
            raise QuarantineError(
                f"{path}: every worker that was to plan died of it; look into their logs: most "
                "often their memory is too small for the teacher"
            ) from error
        if told is not None and told.outcome == "unprepared":
            crew.prepare()
    if not (path / layout.PLAN).is_file():
        raise RecipeError(
            f"{path}: planned by a worker, but not to be seen from here; workers, and whoever asks "
            "them, must see the cache at one path of a shared file system"
        )
    return layout.read_plan(path)[0]


@dataclass
class _Case:
    """A part that is not made yet, and what was tried."""

    part: Part
    sent: bool = False
    """Whether a worker was asked to make it."""
    held: bool = False
    """Whether others were at it."""
    wait: float = 0.0
    limit: int = _FAILURES
    given_up: int = 0
    """How often Dask gave it up because worker after worker died."""
    failed_at: set[str] = field(default_factory=set)
    """Workers where it failed."""
    attempts: Sequence[Attempt] = ()

    def __str__(self) -> str:
        blamed = [str(attempt) for attempt in self.attempts if attempt.blamed]
        return f"{self.part}: {'; '.join(blamed) or 'its workers died before it began'}"


class _Making:
    """Every part made, by whomever: a bounded number is dealt out, the rest waits here."""

    def __init__(
        self, crew: _Crew, plan: Plan, stopping: Callable[[], bool], report: Reporter
    ) -> None:
        self._crew, self._plan, self._path = crew, plan, crew.path
        self._stopping, self._report = stopping, report
        self._waiting: deque[_Case] = deque()
        self._held: list[_Case] = []
        """With other processes; asked for again when nothing else is left."""
        self._out: dict[Future[Any], _Case] = {}
        self._quarantined: list[_Case] = []
        self._made: list[Part] = []
        self._total = self._windows(plan.parts())
        self._begun = 0
        self._since = self._told = time.monotonic()

    def run(self) -> tuple[int, int]:
        """Parts and windows made here. Raises QuarantineError once all else is made."""
        missing = integrity.missing_parts(self._path, self._plan)
        check_room(self._path, self._plan, missing)
        self._begun = self._total - self._windows(missing)
        while missing:
            self._waiting.extend(_Case(part) for part in missing)
            while self._waiting or self._held or self._out:
                self._deal_out()
                future = self._crew.next()
                if future is not None:
                    self._settle(self._out.pop(future), future)
                self._tell()
            given_up = {case.part for case in self._quarantined}
            missing = [
                part
                for part in integrity.missing_parts(self._path, self._plan)
                if part not in given_up
            ]
            if missing:  # a network file system may show receipts late
                time.sleep(_LOOK_SECONDS)
        if self._quarantined:
            raise self._quarantine()
        return len(self._made), self._windows(self._made)

    def _deal_out(self) -> None:
        if self._stopping():
            if not self._out or not self._crew.workers:  # nothing is in anybody's work
                missing = len(integrity.missing_parts(self._path, self._plan))
                raise Interrupted(
                    f"{self._path}: stopped after the parts in work; {missing:,} of "
                    f"{self._plan.part_count:,} are still to be made: run the same command again"
                )
            return
        if not self._waiting and not self._out:
            # Nothing else is left: wait for others, and take over from whoever went silent.
            for case in self._held:
                case.wait = hold.LEASE_SECONDS + _GONE_SECONDS
            self._waiting.extend(self._held)
            self._held.clear()
        crew = self._crew
        while self._waiting and len(self._out) < _PER_WORKER * max(1, len(crew.workers)):
            case = self._waiting.popleft()
            if (self._path / case.part.receipt_key).is_file():
                if case.sent and not case.held:
                    self._made.append(case.part)
                continue
            case.sent = True
            others = [one for one in crew.workers if one not in case.failed_at]
            future = crew.send(
                _make_there,
                case.part,
                case.wait,
                case.limit,
                name=f"part-{case.part.stem}",
                among=others if case.failed_at else (),
            )
            self._out[future] = case

    def _settle(self, case: _Case, future: Future[Any]) -> None:
        try:
            told = self._crew.result(future)
        except KilledWorker:
            case.given_up += 1
            case.attempts = Attempts(self._path, case.part).read()
            self._judge(case, hopeless=case.given_up >= _FAILURES)
            return
        if told is None:
            self._waiting.append(case)
        # A part that is there was most often made here, and its worker died before it could say so.
        elif told.outcome == "made" or (told.outcome == "there" and not case.held):
            self._made.append(case.part)
        elif told.outcome == "held":
            case.held = True
            self._held.append(case)
        elif told.outcome == "unprepared":  # another client of this recipe left, and cleared up
            self._crew.prepare()
            self._waiting.append(case)
        elif told.outcome == "failed":
            case.attempts = told.attempts
            case.failed_at.add(told.worker)
            blamed = [attempt for attempt in case.attempts if attempt.blamed]
            hopeless = len(blamed) >= case.limit
            processes = {attempt.process for attempt in blamed}
            if hopeless and len(processes) < 2 and case.limit == _FAILURES:
                # One more chance, where there is another process to try it.
                case.limit += 1
                hopeless = not set(self._crew.workers) - case.failed_at
            self._judge(case, hopeless=hopeless)

    def _judge(self, case: _Case, *, hopeless: bool) -> None:
        if not hopeless:
            self._waiting.appendleft(case)  # next, so that a run that cannot be ends early
            return
        self._quarantined.append(case)
        if not self._made and len(self._quarantined) >= _FAILURES:
            raise self._quarantine()  # it is not the parts: the others would go the same way

    def _quarantine(self) -> QuarantineError:
        """Say which, and forget what was tried: the next call tries them afresh."""
        for case in self._quarantined:
            Attempts(self._path, case.part).forget()
        missing = len(integrity.missing_parts(self._path, self._plan))
        shown = "".join(f"\n  {case}" for case in self._quarantined[:_SHOWN])
        more = len(self._quarantined) - _SHOWN
        return QuarantineError(
            f"{self._path}: parts that failed {_FAILURES} times were given up "
            f"({len(self._quarantined):,}; in all {missing:,} of {self._plan.part_count:,} are not "
            f"made):{shown}" + (f"\n  and {more:,} more" if more > 0 else "") + "\n"
            "What was committed is kept. Mend what they have in common, then run the same command "
            "again, which tries them afresh."
        )

    def _windows(self, parts: Iterable[Part]) -> int:
        return sum(self._plan.part_windows(part) for part in parts)

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told < _LOOK_SECONDS and (self._waiting or self._held or self._out):
            return
        self._told = now
        facts: dict[str, float | str] = {"workers": float(len(self._crew.workers))}
        if self._quarantined:
            facts["failed_parts"] = float(len(self._quarantined))
        undone = [*self._waiting, *self._held, *self._out.values(), *self._quarantined]
        self._report(
            Progress(
                what="extracting" if self._crew.workers else "waiting for workers",
                done=self._total - self._windows(case.part for case in undone),
                begun=self._begun,
                total=self._total,
                unit="windows",
                seconds=now - self._since,
                facts=facts,
            )
        )
