"""What may befall workers: kills, signals, each other, any order, disks that fill up or fail.

Each driver runs in a fork of the nursery, leaves nothing behind and answers in JSON; under `wrong`
it lists what must not be.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from disturbed import (
    BEGUN,
    EMBED,
    HEAD,
    LAST,
    MOMENTS,
    PLANNING,
    PLANS,
    SEALED,
    SEALS,
    Board,
    Step,
    Stop,
    Worker,
    by_command,
    committed,
    differences,
    exchange,
    log_of,
    parts_of,
    step_of,
    tables,
    tree,
)

from had_pipe import extract as stage_one
from had_pipe.cache import Part, integrity, layout

# Kills


def kill_until_done(
    genome: str, planned: str, sound: str, folder: str, *, kills: int, seed: int
) -> dict[str, Any]:
    """Kill extraction again and again, half at random moments and half at named ones.

    Only kills between a first part's start and the seal count. After each, what was committed must
    still lie there untouched; each cache ends as its undisturbed twin.
    """
    draw = random.Random(seed)
    expected = tree(Path(sound))
    told = Counter[str]()
    wrong: list[str] = []
    lost: list[int] = []
    for number in itertools.count():
        path = Path(folder) / f"killed-{number}"
        shutil.copytree(planned, path)
        asked = tables(Path(genome), path)
        board = Board(parts_of(path))
        kept = committed(path)
        while True:
            last = len(lost) >= kills
            code = _one_life(asked, board, draw, undisturbed=last)
            now = committed(path)
            wrong += [
                f"{path.name}: {key} was made again" for key in kept if kept[key] != now.get(key)
            ]
            fresh = sum(key.startswith(layout.RECEIPTS) for key in now.keys() - kept.keys())
            kept = now
            if code == 0:
                break
            if code != -signal.SIGKILL:
                wrong.append(f"{path.name}: a worker ended with {code}")
                break
            if board.begun.any() and not (path / layout.MANIFEST).exists():
                lost.append(int(board(0)[BEGUN]) - fresh)
                told[str(step_of(int(board(0)[LAST])))] += 1
        told["caches"] += 1
        wrong += [f"{path.name}: {key} differs" for key in differences(path, expected)]
        shutil.rmtree(path)
        if wrong or len(lost) >= kills:
            break
    return {
        "kills": len(lost),
        "caches": told.pop("caches"),
        "wrong": wrong,
        "most_lost": max(lost, default=0),
        "mean_lost": sum(lost) / max(1, len(lost)),
        "moments": dict(told.most_common()),
    }


def _one_life(
    asked: Mapping[str, Any], board: Board, draw: random.Random, *, undisturbed: bool
) -> int:
    """Work until done or killed; the exit code."""
    worker = Worker(asked=asked, board=board(0), parts=board.parts)
    board(0)[BEGUN] = 0
    if undisturbed:
        return worker.start().ended()
    if draw.random() < 0.5:
        worker.stop = Stop(draw.choice(MOMENTS), draw.randrange(1, 5))
        return worker.start().ended()
    worker.seconds = 0.004
    worker.start()
    while (
        not board(0)[BEGUN]
        and os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
    ):
        time.sleep(0.0005)
    time.sleep(draw.uniform(0, 0.12))
    with contextlib.suppress(ProcessLookupError):
        os.kill(worker.pid, signal.SIGKILL)
    return worker.ended()


# Signals at named moments, by the command itself


def signal_at_every_moment(
    genome: str, planned: str, sound: str, folder: str, *, times: int, every: int
) -> dict[str, Any]:
    """A signal at each moment of planning, making, sealing and tidying up; then the command again.

    Every n-th pair of signal and moment, each the first to the `times`-th time that it comes. Told:
    how often the command ended with which code, and what was wrong then.
    """
    expected = tree(Path(sound))
    codes, wrong = Counter[str](), []
    moments = itertools.product((*PLANNING, *MOMENTS, *SEALED), SIGNALS, range(1, times + 1))
    for step, name, come in itertools.islice(moments, 0, None, every):
        where = f"{name} {step} ({come})"
        path = Path(folder) / where.replace(" ", "-")
        if step not in PLANNING:
            shutil.copytree(planned, path)
        asked = tables(Path(genome), path)
        stop = Stop(step, come, signal.Signals[name])
        worker = Worker(asked=asked, stop=stop, run=by_command)
        code = worker.start().ended()
        codes[f"{name} {code}"] += 1
        # What comes too late finds the work done; what does not come so often, as well.
        late = name == "SIGUSR2" or come > 1
        if code != SIGNALS[name] and not (late and code == 0):
            wrong.append(f"{where}: ended with {code}: {log_of(worker)}")
        if name != "SIGKILL":
            wrong += [f"{where}: left {one}" for one in _left_in_work(path)]
        kept = committed(path)
        again = Worker(asked=asked, quiet=False).start().ended()
        if again:
            wrong.append(f"{where}: then ended with {again}")
        now = committed(path)
        wrong += [f"{where}: {key} was made again" for key in kept if kept[key] != now.get(key)]
        wrong += [f"{where}: {key} differs" for key in differences(path, expected)]
        shutil.rmtree(path)
    return {"codes": dict(codes), "wrong": wrong}


SIGNALS = {"SIGKILL": -signal.SIGKILL, "SIGTERM": 75, "SIGUSR2": 75, "SIGINT": 75}
"""What a worker is sent, and what the command then ends with."""


def _left_in_work(path: Path) -> list[str]:
    """Temporaries that somebody left who had time to tidy up, and leases but for one.

    One may have been in the making: it binds nobody, since its process is gone.
    """
    work = path / layout.WORK
    left = [str(one.relative_to(path)) for one in work.rglob("*.tmp")]
    leases = [str(one.relative_to(path)) for one in work.rglob("*.lock")]
    return left + leases[1:]


# Several at once


def race(
    genome: str, planned: str, sound: str, folder: str, *, kind: str, workers: int, seed: int
) -> dict[str, Any]:
    """Workers let go at once on one cache; which codes they end with, who did what, what is wrong.

    `kind` is one of the keys of RACES.
    """
    path = Path(folder) / f"{kind}-{workers}-{seed}".replace(" ", "-")
    fresh = kind in ("planning", "beside a sleeping planner")
    if not fresh:
        shutil.copytree(planned, path)
    asked, draw = tables(Path(genome), path), random.Random(seed)
    board = Board(parts_of(Path(sound)), workers=workers + 1)
    odd = Worker(asked=asked, board=board(workers), parts=board.parts)
    if kind == "after a killed holder":
        odd.stop = Stop(draw.choice(HOLDING), draw.randrange(1, 4))
        assert odd.start().ended() == -signal.SIGKILL
    elif kind in SLEEPING:
        moments = PLANNING if fresh else (*HOLDING, *MOMENTS)
        come = 1 if fresh else draw.randrange(1, 4)
        odd.stop = Stop(draw.choice(moments), come, signal.SIGSTOP)
        odd.start()
        os.waitid(os.P_PID, odd.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    gate, opened = os.pipe()

    def before() -> None:
        os.close(opened)
        os.read(gate, 1)
        RACES[kind]()

    group = [
        Worker(asked=asked, board=board(n), parts=board.parts, before=before, quiet=False)
        for n in range(workers)
    ]
    for worker in group:
        worker.start()
    begun = time.monotonic()
    os.close(opened)
    codes = [worker.ended() for worker in group]
    seconds = time.monotonic() - begun
    os.close(gate)
    if kind in SLEEPING:
        with contextlib.suppress(ProcessLookupError):
            os.kill(odd.pid, signal.SIGCONT)
        codes.append(odd.ended())
    if kind == "without leases":
        codes.append(Worker(asked=asked, quiet=False).start().ended())
    wrong = [f"{path.name}: {key} differs" for key in differences(path, tree(Path(sound)))]
    shutil.rmtree(path)
    return {
        "codes": codes,
        "plans": board.count(PLANS),
        "seals": board.count(SEALS),
        "parts": len(board.parts),
        "begun": int(board.begun.sum()),
        "each": [int(board(n)[HEAD:].sum()) for n in range(workers + 1)],
        "busy": sum(bool(board(n)[BEGUN]) for n in range(workers)),
        "seconds": seconds,
        "wrong": wrong,
    }


HOLDING = (EMBED, Step("shard", "open"), Step("shard", "replace"), Step("receipt", "replace"))
"""Moments at which a worker has the lease of a part."""


class _Everybodys:
    """A part's lease that is given to whoever asks, and so keeps nobody from double work."""

    def __init__(self, cache: Path, _: Part) -> None:
        self._work = cache / layout.WORK

    def take(self) -> bool:
        self._work.mkdir(exist_ok=True)
        return True

    def release(self) -> None:
        pass


def _without_leases() -> None:
    from had_pipe.parts import PartMaker

    real = PartMaker.make
    exchange(stage_one, "lease_of", _Everybodys)
    exchange(PartMaker, "make", lambda self, part, _, tick: real(self, part, None, tick))
    # Nobody tidies up: it would take away what others, without a lease to lose, are writing.
    exchange(integrity, "clear_work", lambda *_: None)


def _without_flock() -> None:
    import fcntl

    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    exchange(fcntl, "flock", refused)
    exchange(fcntl, "lockf", refused)


def _as_it_is() -> None:
    pass


RACES: Mapping[str, Callable[[], None]] = {
    "making": _as_it_is,
    "planning": _as_it_is,
    "without leases": _without_leases,
    "without flock": _without_flock,
    "after a killed holder": _as_it_is,
    "beside a sleeper": _as_it_is,
    "beside a sleeping planner": _as_it_is,
}
SLEEPING = ("beside a sleeper", "beside a sleeping planner")


# Orders and shares


def in_any_way(genome: str, planned: str, sound: str, folder: str, *, every: int) -> dict[str, Any]:
    """One cache made in ways that must not matter, every n-th of them: what came out otherwise."""
    shares = (["1/1"], ["1/2", "2/2"], ["2/3", "1/3", "3/3"], ["1/2", "1/1", "2/3"])
    ways: dict[str, list[list[Worker]]] = {}

    def workers(name: str, **more: Any) -> Worker:
        path = Path(folder) / name.replace(" ", "-").replace("/", "-")
        return Worker(asked=tables(Path(genome), path), quiet=False, **more)

    for seed in range(10):
        name = f"order {seed}"
        ways[name] = [[workers(name, before=lambda seed=seed: _shuffle(seed))]]
    for count in (1, 2, 4):
        name = f"{count} processes"
        ways[name] = [[workers(name, seconds=0.01) for _ in range(count)]]
    for share in shares:
        name = f"shares {' '.join(share)}"
        one_by_one = [[workers(name, options={"share": stage_one.Share.parse(x)})] for x in share]
        ways[name] = one_by_one
        name = f"shares {' '.join(share)} at once"
        ways[name] = [[workers(name, options={"share": stage_one.Share.parse(x)}) for x in share]]
    expected, wrong = tree(Path(sound)), []
    ways = dict(itertools.islice(ways.items(), 0, None, every))
    for name, steps in ways.items():
        path = steps[0][0].path
        shutil.copytree(planned, path)
        for step in steps:
            codes = [worker.ended() for worker in [worker.start() for worker in step]]
            wrong += [f"{name}: a worker ended with {code}" for code in codes if code]
        wrong += [f"{name}: {key} differs" for key in differences(path, expected)]
        shutil.rmtree(path)
    return {"ways": len(ways), "wrong": wrong}


def _shuffle(seed: int) -> None:
    """From now on this process goes through parts in another order."""
    real = stage_one.parts_of

    def shuffled(plan: Any, share: Any) -> list[Part]:
        parts = real(plan, share)
        random.Random(seed).shuffle(parts)
        return parts

    exchange(stage_one, "parts_of", shuffled)


def interrupted_parts(genome: str, folder: str, *, part: int, kills: int) -> dict[str, Any]:
    """A cache of parts of so many windows, made at once and made through kills: what differs."""
    twin, path = Path(folder) / f"twin-{part}", Path(folder) / f"killed-{part}"
    changed = {"cache": {"part": part}}
    assert Worker(asked=tables(Path(genome), twin, **changed)).start().ended() == 0
    draw, codes = random.Random(part), []
    for _ in range(kills):
        stop = Stop(draw.choice(MOMENTS), draw.randrange(1, 6))
        codes.append(Worker(asked=tables(Path(genome), path, **changed), stop=stop).start().ended())
    codes.append(Worker(asked=tables(Path(genome), path, **changed)).start().ended())
    return {"codes": codes, "wrong": differences(path, tree(twin))}


# Disks that fill up or fail

LARGER: dict[str, dict[str, Any]] = {"cache": {"part": 64, "codec": "exact"}}
"""Parts of some pages, so that a disk can fill up in the midst of one."""


def on_small_disks(
    genome: str, sound: str, folder: str, *, percents: Sequence[int], option: str, surprised: bool
) -> dict[str, Any]:
    """Extract onto file systems that hold a percentage of what is needed; then they grow.

    `option` is what a percentage is of: size (bytes) or nr_inodes. Where `surprised`, room is not
    looked for beforehand, as where others fill the disk meanwhile.
    """
    expected = tree(Path(sound))
    sizes = [len(data) for data in expected.values() if data is not None]
    need = sum(-(-n // 4096) * 4096 for n in sizes) if option == "size" else len(expected)
    disk, wrong, told = Path(folder), [], []
    disk.mkdir()
    for percent in percents:
        where = f"{percent} % of {option}"
        given = max(4096 if option == "size" else 3, need * percent // 100)
        _mount(disk, f"{option}={given}")
        try:
            asked = tables(Path(genome), disk / "cache", **LARGER)
            before = _look_for_no_room if surprised else _as_it_is
            worker = Worker(asked=asked, run=by_command, logs=disk.parent, before=before)
            code = worker.start().ended()
            said = log_of(worker).strip().splitlines()[-1]
            if code != 6 or "run the same command again" not in said:
                wrong.append(f"{where}: ended with {code}: {log_of(worker)}")
            kept = committed(disk / "cache")
            wrong += [f"{where}: {one}" for one in _unsound(disk / "cache", expected)]
            told.append([percent, sum(key.startswith(layout.RECEIPTS) for key in kept), said])
            _mount(disk, f"remount,{option}={4 * need}")
            code = Worker(asked=asked, quiet=False).start().ended()
            if code:
                wrong.append(f"{where}: after growth ended with {code}")
            now = committed(disk / "cache")
            wrong += [f"{where}: {key} was made again" for key in kept if kept[key] != now.get(key)]
            wrong += [f"{where}: {key} differs" for key in differences(disk / "cache", expected)]
        finally:
            subprocess.run(["umount", disk], check=True)
    return {"told": told, "wrong": wrong}


def _unsound(path: Path, expected: Mapping[str, bytes | None]) -> list[str]:
    """Committed files that are not what an undisturbed process writes."""
    return [
        f"{key} is unsound" for key in committed(path) if (path / key).read_bytes() != expected[key]
    ]


def _mount(disk: Path, option: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", option, "tmpfs", disk], check=True)


def _look_for_no_room() -> None:
    exchange(stage_one, "check_room", lambda *_: None)


FAILING = (
    *(Step("plan", doing) for doing in ("mkdir", "open", "fsync", "replace", "folder")),
    Step("lease", "open"),
    *(Step("shard", doing) for doing in ("open", "fsync", "mkdir", "replace", "folder")),
    *(Step("receipt", doing) for doing in ("open", "fsync", "mkdir", "replace", "folder")),
    *(Step("manifest", doing) for doing in ("open", "fsync", "replace")),
)


def failing_at_every_step(
    genome: str, planned: str, sound: str, folder: str, *, every: int
) -> dict[str, Any]:
    """A disk that answers a kind of step with an errno; then it is mended and work goes on.

    Every n-th pair of step and errno. Told: how often the command ended with which code.
    """
    expected, wrong, codes = tree(Path(sound)), [], Counter[str]()
    pairs = itertools.product(FAILING, ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE"))
    for step, name in itertools.islice(pairs, 0, None, every):
        path = Path(folder) / f"{name}-{step}".replace(" ", "-")
        if step.what != "plan":
            shutil.copytree(planned, path)
        asked = tables(Path(genome), path)
        worker = Worker(asked=asked, run=by_command, fail=(step, getattr(errno, name)))
        code = worker.start().ended()
        codes[f"{name} {code}"] += 1
        said = log_of(worker)
        if code != 6 or "run the same command again" not in said:
            wrong.append(f"{name} {step}: ended with {code}: {said}")
        wrong += [f"{name} {step}: {one}" for one in _unsound(path, expected)]
        code = Worker(asked=asked, quiet=False).start().ended()
        if code:
            wrong.append(f"{name} {step}: mended, it ended with {code}")
        wrong += [f"{name} {step}: {key} differs" for key in differences(path, expected)]
        shutil.rmtree(path)
    return {"codes": dict(codes), "wrong": wrong}
