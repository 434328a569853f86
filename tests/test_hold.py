"""A folder is one holder's at a time, and free again however its holder ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from had_pipe import hold
from had_pipe.errors import HeldError
from had_pipe.hold import Lease, held

HOLD = """
import sys, time
from pathlib import Path
from had_pipe.hold import held

with held(Path(sys.argv[1]), lock="deep/lock", doing="waiting"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_whoever_comes_second_is_told_who_holds_it(tmp_path: Path) -> None:
    with held(tmp_path, lock=".lock", doing="training this run"):
        with (
            pytest.raises(HeldError) as refusal,
            held(tmp_path, lock=".lock", doing="training this run"),
        ):
            pass
        with held(tmp_path, lock="another", doing="looking"):
            pass  # another lock is another matter
    assert str(refusal.value) == (
        f"{tmp_path}: process {os.getpid()} on {socket.gethostname()} is training this run; wait "
        "until it is done, or stop it and run the same command again"
    )


def test_an_error_within_frees_it_and_is_the_one_that_is_seen(tmp_path: Path) -> None:
    def fail() -> None:
        with held(tmp_path, lock=".lock", doing="failing"):
            (tmp_path / ".lock.holder").unlink()
            raise ValueError("within")

    with pytest.raises(ValueError, match="within"):
        fail()
    with held(tmp_path, lock=".lock", doing="going on"):
        assert (tmp_path / ".lock.holder").exists()
    assert not (tmp_path / ".lock.holder").exists()


def test_a_killed_holder_leaves_it_free_and_a_living_one_does_not(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(HeldError, match=f"process {holder.pid} on .* is waiting"),
            held(tmp_path, lock="deep/lock", doing="waiting"),
        ):
            pass
        holder.send_signal(signal.SIGKILL)
    # Its name is still there; the lock is not.
    assert (tmp_path / "deep" / "lock.holder").exists()
    with held(tmp_path, lock="deep/lock", doing="waiting"):
        assert f"process {os.getpid()} " in (tmp_path / "deep" / "lock.holder").read_text()


@pytest.mark.parametrize("name", [None, b"", b"\xff"], ids=["none", "empty", "damaged"])
def test_a_holder_without_a_name_holds_all_the_same(tmp_path: Path, name: bytes | None) -> None:
    with held(tmp_path, lock=".lock", doing="hiding"):
        (tmp_path / ".lock.holder").unlink()
        if name is not None:
            (tmp_path / ".lock.holder").write_bytes(name)
        with (
            pytest.raises(HeldError, match=": another process is hiding;"),
            held(tmp_path, lock=".lock", doing="hiding"),
        ):
            pass


LEASE = """
import sys, time
from pathlib import Path
from had_pipe import hold

hold.LEASE_SECONDS = float(sys.argv[2])
lease = hold.Lease(Path(sys.argv[1]))
assert lease.take()
print("taken", flush=True)
sys.stdin.readline()
print("lost" if lease.lost else "kept", flush=True)
"""


def leasing(path: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that has taken the lease, and says what became of it when it is asked."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEASE, str(path), str(seconds)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "taken\n"
    return process


def test_a_lease_is_one_holders_names_it_and_is_free_once_released(tmp_path: Path) -> None:
    first, second = (Lease(tmp_path / "deep" / "x.lock") for _ in range(2))
    assert first.take()
    assert not second.take()
    assert second.holder == f"process {os.getpid()} on {socket.gethostname()}"
    assert not first.lost
    first.release()
    assert not (tmp_path / "deep" / "x.lock").exists()
    assert second.take()
    assert first.lost
    second.release()


def test_a_lease_of_a_killed_process_is_taken_at_once_and_of_a_living_one_never(
    tmp_path: Path,
) -> None:
    path = tmp_path / "x.lock"
    with leasing(path, 60) as holder:
        lease = Lease(path)
        assert not lease.take()
        assert lease.holder.startswith(f"process {holder.pid} on ")
        holder.kill()
        holder.wait()
        assert lease.take()
    lease.release()


@pytest.mark.timeout(60)
def test_a_sleeping_holder_is_replaced_after_a_while_and_finds_out_when_it_wakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lock"
    monkeypatch.setattr(hold, "LEASE_SECONDS", 1.0)
    with leasing(path, 1.0) as holder:
        holder.send_signal(signal.SIGSTOP)
        lease = Lease(path)
        watched = time.monotonic()
        while not lease.take():
            time.sleep(0.05)
        assert time.monotonic() - watched >= 0.9
        holder.send_signal(signal.SIGCONT)
        said, _ = holder.communicate("\n", timeout=30)
        assert said == "lost\n"
        assert not lease.lost  # the sleeper left alone what is no longer its own
    lease.release()


@pytest.mark.timeout(60)
def test_a_busy_holder_is_heard_of_and_keeps_its_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.lock"
    monkeypatch.setattr(hold, "LEASE_SECONDS", 4.0)
    with leasing(path, 4.0) as holder:
        lease = Lease(path)
        until = time.monotonic() + 7
        while time.monotonic() < until:
            assert not lease.take()
            time.sleep(0.05)
        said, _ = holder.communicate("\n", timeout=30)
        assert said == "kept\n"


def test_a_folder_swept_away_is_neither_taken_nor_kept(tmp_path: Path) -> None:
    path = tmp_path / "work" / "x.lock"
    lease = Lease(path)
    assert lease.take()
    path.unlink()
    path.parent.rmdir()
    assert lease.lost
    assert lease.holder == "another process"
    lease.release()
    assert Lease(path).take()
