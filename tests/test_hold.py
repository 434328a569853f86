"""A folder is one holder's at a time, and free again however its holder ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from had_pipe.errors import HeldError
from had_pipe.hold import held

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
