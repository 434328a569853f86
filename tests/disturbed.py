"""Workers forked from one warmed process, watched step by step, and stopped where it is asked.

A test talks to a `Nursery`: a process that has imported everything and started no thread. Each call
runs in a fork of it, which may fork workers in turn; so a kill lands in work and never in imports.
Steps are seen by wrapping `os` and by an audit hook in the worker: the product knows nothing of it.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy_teacher import NumpyTeacher

from had_pipe import extract as stage_one
from had_pipe import hold
from had_pipe.cache import Part, layout
from had_pipe.errors import HadPipeError
from had_pipe.recipe import Recipe

KMERS, WINDOWS_A_PART = 10, 8

LEASE_SECONDS = 2.0
"""Instead of a minute, so that a silent holder's work is taken over while a test looks on."""


# What is made: 14 parts of two splits and two views


def write_genome(path: Path, *, bases: int = 2_700) -> Path:
    """Random letters, most of them a contig for training and some held out."""
    rng = np.random.default_rng(21)
    contigs = {"one": bases, "held_out": bases // 3}
    letters = {name: "".join(rng.choice(list("ACGT"), count)) for name, count in contigs.items()}
    path.write_text("".join(f">{name}\n{text}\n" for name, text in letters.items()))
    return path


def tables(genome: Path, path: Path, /, **changed: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a recipe; a keyword changes keys of the table of that name."""
    bases = 6 * KMERS
    found: dict[str, Any] = {
        "teacher": {"name": "/there/is/none"},
        "genome": {"name": "g", "path": str(genome), "splits": {"valid": ["held_out"]}},
        "windows": {"bases": bases, "stride": bases, "views": 2, "mask_ratio": 0.25, "seed": 3},
        "cache": {"path": str(path), "part": WINDOWS_A_PART},
    }
    for name, keys in changed.items():
        found[name] = {**found[name], **keys}
    found["genome"] = [found["genome"]]
    return found


def a_recipe(genome: Path, path: Path, /, **changed: Mapping[str, Any]) -> Recipe:
    return Recipe.model_validate(tables(genome, path, **changed))


def tree(path: Path) -> dict[str, bytes | None]:
    """Everything below a folder: a file's bytes, None for a folder."""
    return {
        one.relative_to(path).as_posix(): None if one.is_dir() else one.read_bytes()
        for one in path.rglob("*")
    }


def differences(path: Path, sound: Mapping[str, bytes | None]) -> list[str]:
    """Files and folders that one has and the other has not, or not of the same bytes."""
    found = tree(path)
    return sorted(
        key
        for key in {*found, *sound}
        if (key in found, found.get(key)) != (key in sound, sound.get(key))
    )


def parts_of(path: Path) -> list[Part]:
    return list(layout.read_plan(path)[0].parts())


def wait_for(path: Path, *, seconds: float = 60) -> None:
    begun = time.monotonic()
    while not path.exists():
        assert time.monotonic() - begun < seconds, path
        time.sleep(0.002)


def committed(path: Path) -> dict[str, tuple[int, int]]:
    """Receipts and the shards they tell of, as they lie on disk: inode and time."""
    if not (path / layout.PLAN).exists():
        return {}
    plan, found = layout.read_plan(path)[0], {}
    for part in plan.parts():
        if (path / part.receipt_key).exists():
            for key in (part.receipt_key, *(part.shard_key(s) for s in plan.signals)):
                with contextlib.suppress(FileNotFoundError):
                    status = (path / key).stat()
                    found[key] = (status.st_ino, status.st_mtime_ns)
    return found


# Steps


@dataclass(frozen=True)
class Step:
    """A change on disk, or a batch shown to the teacher, just before or just after it."""

    what: str
    """shard, receipt, manifest, plan, lease, work (anything else of `.work/`), or embedding."""
    doing: str
    """The call: open, fsync, replace, mkdir, unlink, rmdir, folder (a folder synced), embed."""
    when: str = "before"

    def __str__(self) -> str:
        return f"{self.when} {self.doing} of {self.what}"


EMBED = Step("embedding", "embed")


def what_of(path: str) -> str:
    """What kind of thing of a cache a path (below the cache) is."""
    parts = path.split("/")
    name = parts[-1]
    if parts[0] == layout.WORK:
        if "leases" in parts:
            return "lease"
        if len(parts) > 1 and parts[1].startswith("plan"):
            return "plan"
        if name.startswith(("manifest.json", "seal.lock")):
            return "manifest"
        if name.endswith(".tmp"):
            return "receipt" if ".json" in name else "shard"
        return "work"
    if parts[0] == layout.RECEIPTS:
        return "receipt"
    if "embedding" in parts and "c" in parts:
        return "shard"
    return "manifest" if name == layout.MANIFEST else "plan"


def watch(cache: Path, seen: Callable[[Step, str], None]) -> None:
    """From now on tell, in this process, of every change below a folder."""
    root = f"{cache}/"

    def tell(path: str, doing: str, when: str, old: str = "") -> None:
        if path == root[:-1] or path.startswith(root):
            key = path.removeprefix(root[:-1]).removeprefix("/") or "."
            told = f"{key}\t{old.removeprefix(root)}" if old else key
            seen(Step(what_of(key), doing, when), told)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path, mode, flags = arguments
            if (mode and set(mode) & set("wxa+")) or flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
                tell(path, "open", "before")

    sys.addaudithook(hook)
    for name in ("fsync", "fdatasync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir"):
        setattr(os, name, _wrapped(name, getattr(os, name), tell))


_SAME = {"rename": "replace", "remove": "unlink", "fdatasync": "fsync"}


def _wrapped(name: str, real: Callable[..., Any], tell: Callable[..., None]) -> Any:
    def wrapped(target: Any, *rest: Any, **options: Any) -> Any:
        doing, old = _SAME.get(name, name), ""
        if isinstance(target, int):
            path = os.readlink(f"/proc/self/fd/{target}")  # noqa: PTH115
            doing = "folder" if os.path.isdir(path) else doing  # noqa: PTH112
        else:
            path = os.fspath(rest[0] if doing == "replace" else target)
            old = os.fspath(target) if doing == "replace" else ""
        folder = options.get("dir_fd")
        if folder is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)  # noqa: PTH115, PTH118
        tell(path, doing, "before", old)
        result = real(target, *rest, **options)
        tell(path, doing, "after", old)
        return result

    return wrapped


# Workers


class Board:
    """Memory shared by a driver and its workers, which outlives a SIGKILL."""

    def __init__(self, parts: Sequence[Part], *, workers: int = 1) -> None:
        self.parts = list(parts)
        self._memory = mmap.mmap(-1, 8 * workers * (HEAD + len(parts)))
        self._cells = np.frombuffer(self._memory, np.int64).reshape(workers, -1)

    def __call__(self, worker: int) -> Any:
        """One worker's row: see BEGUN and what follows it; then how often it began each part."""
        return self._cells[worker]

    @property
    def begun(self) -> Any:
        """How often each part was begun, by anybody."""
        return self._cells[:, HEAD:].sum(axis=0)

    def count(self, what: int) -> int:
        """The sum of one cell over all workers."""
        return int(self._cells[:, what].sum())


BEGUN, LAST, PLANS, SEALS, HEAD = range(5)
"""Parts begun in this life, the last step, plans and manifests renamed into place."""


def known(step: Step) -> int:
    """A number for a step that fits into shared memory."""
    return WHATS.index(step.what) * 100 + DOINGS.index(step.doing) * 10 + (step.when == "after")


def step_of(number: int) -> Step:
    return Step(
        WHATS[number // 100], DOINGS[number // 10 % 10], "after" if number % 10 else "before"
    )


WHATS = ("embedding", "shard", "receipt", "manifest", "plan", "lease", "work")
DOINGS = ("embed", "open", "fsync", "replace", "mkdir", "unlink", "rmdir", "folder")


@dataclass(frozen=True)
class Stop:
    """At which step, and at which time that it comes, a worker signals itself."""

    step: Step
    time: int = 1
    signal: int = signal.SIGKILL


@dataclass(kw_only=True)
class Worker:
    """One process that extracts."""

    asked: Mapping[str, Any]
    """The recipe's tables."""
    seconds: float = 0.0
    """What a batch takes at least."""
    stop: Stop | None = None
    fail: tuple[Step, int] | None = None
    """A step that fails whenever it comes, and with which errno."""
    board: Any = None
    """Its row of a `Board`, and the board's parts."""
    parts: Sequence[Part] = ()
    before: Callable[[], object] = lambda: None
    """Called in the child before anything."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of `extract`."""
    run: Callable[[Worker, NumpyTeacher], object] | None = None
    """Instead of `extract`."""
    logs: Path | None = None
    """Where what the command says is kept; None for beside the cache."""
    quiet: bool = True
    pid: int = 0

    @property
    def path(self) -> Path:
        return Path(self.asked["cache"]["path"])

    def start(self) -> Worker:
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = self._live()
            for thread in threading.enumerate():  # as the interpreter waits for them when it ends
                if thread is not threading.current_thread() and not thread.daemon:
                    thread.join()
            os._exit(code)
        return self

    def _live(self) -> int:
        hold.LEASE_SECONDS = LEASE_SECONDS
        try:
            self.before()
            self._watch()
            teacher = _Counted(seconds=self.seconds, told=self._seen)
            if self.run is not None:
                self.run(self, teacher)
            else:
                stage_one.extract(
                    Recipe.model_validate(self.asked), teacher=teacher, **self.options
                )
            return 0
        except HadPipeError as error:
            if not self.quiet:
                print(error, file=sys.stderr, flush=True)
            return error.exit_code
        except SystemExit as error:
            return int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            return 1

    def _watch(self) -> None:
        self._left = self.stop.time if self.stop else 0
        self._lock = threading.Lock()
        if self.board is not None:
            self.board[BEGUN] = 0
            _tell_of_parts(self)
        watch(self.path, self._seen)

    def _seen(self, step: Step, path: str) -> None:
        if self.board is not None:
            self.board[LAST] = known(step)
            self.board[PLANS] += path.startswith(f"{layout.PLAN}\t") and step.when == "after"
            self.board[SEALS] += step == SEALED[0]
        if self.fail is not None and step == self.fail[0]:
            raise OSError(self.fail[1], os.strerror(self.fail[1]), path)
        if self.stop is not None and step == self.stop.step:
            with self._lock:
                self._left -= 1
                due = self._left == 0
            if due:
                os.kill(os.getpid(), self.stop.signal)

    def ended(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@dataclass(kw_only=True)
class _Counted(NumpyTeacher):
    """Tells of every batch that it is shown."""

    told: Callable[[Step, str], None]

    def embed(self, kmer_id_WT: Any, hidden_WT: Any) -> Any:
        self.told(EMBED, "")
        return super().embed(kmer_id_WT, hidden_WT)


def _tell_of_parts(worker: Worker) -> None:
    """Count on the board, in this process, the parts whose making begins."""
    from had_pipe.parts import PartMaker

    place = {part: number for number, part in enumerate(worker.parts)}
    real = PartMaker.make

    def make(self: PartMaker, part: Part, *rest: Any, **options: Any) -> Any:
        worker.board[BEGUN] += 1
        worker.board[HEAD + place[part]] += 1
        return real(self, part, *rest, **options)

    exchange(PartMaker, "make", make)


def exchange(owner: Any, name: str, value: object) -> None:
    """Put something else in the place of what must be there, in this process."""
    assert hasattr(owner, name), name
    setattr(owner, name, value)


# Moments

MOMENTS = (
    EMBED,
    Step("lease", "open"),
    Step("shard", "open"),
    Step("shard", "fsync"),
    Step("shard", "fsync", "after"),
    Step("shard", "replace"),
    Step("shard", "replace", "after"),
    Step("shard", "folder", "after"),
    Step("receipt", "open"),
    Step("receipt", "fsync"),
    Step("receipt", "fsync", "after"),
    Step("receipt", "replace"),
    Step("receipt", "replace", "after"),
    Step("receipt", "folder", "after"),
    Step("lease", "unlink"),
    Step("lease", "unlink", "after"),
    Step("manifest", "open"),
    Step("manifest", "fsync"),
    Step("manifest", "replace"),
)
"""Between the first part's start and the seal."""


PLANNING = (
    Step("plan", "open"),
    Step("plan", "mkdir", "after"),
    Step("plan", "fsync"),
    Step("plan", "replace"),
    Step("plan", "replace", "after"),
    Step("plan", "folder", "after"),
)
SEALED = (
    Step("manifest", "replace", "after"),
    Step("work", "unlink"),
    Step("lease", "rmdir"),
    Step("work", "rmdir"),
)
"""After the seal: only `.work/` still has to go."""


# The command


def by_command(worker: Worker, teacher: NumpyTeacher) -> None:
    """What `had-pipe extract-teacher` does, in this process, with a teacher of ours."""
    import had_pipe.cli
    import had_pipe.job

    folder, name = worker.logs or worker.path.parent, worker.path.name
    written = folder / f"{name}.{os.getpid()}.toml"
    write_toml(written, worker.asked)
    with (folder / f"{name}.{os.getpid()}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    exchange(had_pipe.job, "load_teacher", lambda *_, **__: teacher)
    sys.argv = ["had-pipe", "extract-teacher", str(written), "--device", "cpu"]
    had_pipe.cli.main()


def write_toml(path: Path, asked: Mapping[str, Any]) -> None:
    """The tables of a recipe as a file."""
    lines = []
    for name, table in asked.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {_toml(value)}" for key, value in one.items()]
    path.write_text("\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


def log_of(worker: Worker) -> str:
    """What a worker that ran the command has said."""
    folder = worker.logs or worker.path.parent
    return (folder / f"{worker.path.name}.{worker.pid}.log").read_text()


def in_a_fork(told: Callable[[], Any]) -> Any:
    """What a function says in a process of its own, which may start threads."""
    receive, send = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receive)
        code = 1
        with contextlib.suppress(BaseException), os.fdopen(send, "w") as file:
            json.dump(told(), file)
            code = 0
        os._exit(code)
    os.close(send)
    with os.fdopen(receive) as file:
        text = file.read()
    assert os.waitpid(child, 0)[1] == 0
    return json.loads(text)


# The nursery itself


class Nursery:
    """A warmed process beside the tests, whose forks do what they ask."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-u", "-c", "import disturbed; disturbed.serve()"],
            cwd=Path(__file__).parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        )

    def __call__(self, driver: Callable[..., Any], *arguments: object, **more: object) -> Any:
        """The answer, in JSON, of a driver called in a fork; paths are given as text."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        words = [str(one) if isinstance(one, Path) else one for one in arguments]
        call = json.dumps([driver.__module__, driver.__name__, words, more])
        print(call, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, "the nursery died"
        told = json.loads(answer)
        assert "failed" not in told, told["failed"]
        return told["answer"]

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


_WARMED = (
    *("pyarrow.parquet", "zarr.codecs", "had_pipe.cli.stage_one", "had_pipe.dna.reference"),
    *("disturbances", "durable_order", "any_order"),
)
"""What extraction imports on the way, so that no worker has to, and the drivers."""


def serve() -> None:
    """Read calls, a line of JSON each, and fork a driver for every one."""
    for name in _WARMED:
        importlib.import_module(name)
    for line in sys.stdin:
        module, name, arguments, more = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                told = {"answer": getattr(sys.modules[module], name)(*arguments, **more)}
            except BaseException:
                told = {"failed": traceback.format_exc()}
            print(json.dumps(told), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
