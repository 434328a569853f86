"""The way into a cache's folder leaves nothing behind and touches nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from had_pipe.cache.door import open_object


@pytest.mark.parametrize("after", [1, 2])
def test_a_signal_between_two_folders_closes_no_descriptor_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_bytes(b"here")
    close, closed = os.close, list[int]()

    def interrupted(descriptor: int) -> None:
        close(descriptor)
        closed.append(descriptor)
        if len(closed) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", interrupted)
        with pytest.raises(KeyboardInterrupt):
            open_object(tmp_path, "a/b/file")
    # A second close of one would have failed, or hit whoever got its number.
    assert len(closed) == after + 1
