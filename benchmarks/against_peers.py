"""Other loaders on the same windows, each in a process and an environment of its own.

A peer's process checks itself first: one whole epoch, every window once, held by CRC against the
windows that it was given. Then its passes and the stream's take turns. Every pass tells which
windows it delivered; one that delivers a window twice, or one that is none, is no measurement.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from measuring import Pass

REPOSITORY = Path(__file__).resolve().parents[1]
PEERS = Path(__file__).resolve().parent / "peers"
HEAD = 8


@dataclass(frozen=True)
class Known:
    """A peer: its name, its script with arguments, the environment that it lives in."""

    name: str
    script: str
    arguments: tuple[str, ...] = ()
    environment: str = "plain"

    @property
    def python(self) -> Path:
        if self.environment == "plain":
            return Path(sys.executable)
        return REPOSITORY / f".venv-peers-{self.environment}" / "bin" / "python"


PEERS_KNOWN = (
    Known("zarr-python", "peer_zarr.py", ("default",)),
    Known("DataLoader, memmap, by window", "peer_memmap_loader.py", ("window",)),
    Known("DataLoader, memmap, by batch", "peer_memmap_loader.py", ("batch",)),
    Known("safetensors", "peer_safetensors.py"),
    Known("Arrow IPC, mapped", "peer_arrow.py", ("ipc",)),
    Known("Parquet", "peer_arrow.py", ("parquet",)),
    Known("zarr-python 3.4", "peer_zarr.py", ("default",), "zarr"),
    Known("zarr-python 3.4, fused", "peer_zarr.py", ("fused",), "zarr"),
    Known("zarrs", "peer_zarr.py", ("zarrs",), "zarr"),
    Known("tensorstore", "peer_tensorstore.py", (), "zarr"),
    Known("annbatch", "peer_annbatch.py", (), "zarr"),
    Known("LitData", "peer_litdata.py", (), "torch"),
    Known("WebDataset", "peer_webdataset.py", (), "torch"),
    Known("HF datasets", "peer_hf_datasets.py", (), "torch"),
    Known("MosaicML MDS", "peer_mds.py", (), "mds"),
)


class PeerFailed(Exception):
    """A peer that did not answer as it should; what it said last."""


class Windows:
    """The windows that everybody must deliver, in a plain file, and what tells them apart."""

    def __init__(self, raw: Path, *, windows: int, window: tuple[int, ...]) -> None:
        self.raw, self.count, self.window = raw, windows, window
        flat = np.memmap(raw, dtype=np.uint8, mode="r", shape=(windows, int(np.prod(window))))
        head = _numbers(flat[:, :HEAD].tobytes())
        if len(np.unique(head)) != windows:
            raise ValueError("windows of this cache begin alike: what a peer reads cannot be told")
        order = np.argsort(head)
        self._head = head[order]
        crcs = np.fromiter((zlib.crc32(row) for row in flat), dtype=np.uint32, count=windows)
        self._crc = crcs[order]

    def refuse_strangers(
        self, heads: npt.NDArray[np.uint64], *, repeated: bool = False
    ) -> npt.NDArray[np.int64]:
        """Places of the windows so told among ours; all must be ours, none told twice."""
        place = np.minimum(np.searchsorted(self._head, heads), self.count - 1)
        if not np.array_equal(self._head[place], heads):
            raise PeerFailed("a window that it was not given")
        if not repeated and len(np.unique(place)) != len(place):
            raise PeerFailed("a window twice in a pass")
        return place

    def check_epoch(self, heads: npt.NDArray[np.uint64], crcs: npt.NDArray[np.uint32]) -> None:
        place = self.refuse_strangers(heads)
        if len(place) != self.count:
            raise PeerFailed(f"{len(place):,} windows in an epoch of {self.count:,}")
        if not np.array_equal(self._crc[place], crcs):
            raise PeerFailed("windows whose bytes are not what it was given")


class PeerProcess:
    """A peer at work: prepared and checked when it is made, then a pass each time it is told."""

    def __init__(self, known: Known, windows: Windows, job: dict[str, Any], log: Path) -> None:
        self._windows = windows
        self._log = log
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [known.python, PEERS / known.script, *known.arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                # No library has anything to ask of a network here.
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            )
        try:
            self.versions: dict[str, str] = self._ask(job)["versions"]
            self._ask({"do": "prepare"})
            checked = self._ask({"do": "check"})
            windows.check_epoch(
                _numbers(base64.b64decode(checked["heads"])),
                np.frombuffer(base64.b64decode(checked["crcs"]), dtype=np.uint32),
            )
            self.epoch_seconds: float = checked["seconds"]
        except BaseException:
            self.close()
            raise

    def go(self, windows: int) -> Pass:
        told = self._ask({"do": "go", "windows": windows})
        heads = _numbers(base64.b64decode(told["heads"]))
        self._windows.refuse_strangers(heads)
        assert len(heads) >= windows
        return Pass(told["nbytes"], told["seconds"], told["cpu_seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has said why, or its log has
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"error": self._last_words()}
        if "error" in answer:
            raise PeerFailed(answer["error"])
        found: dict[str, Any] = answer
        return found

    def _last_words(self) -> str:
        lines = self._log.read_text("utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it ended without a word"


def absent(known: Known) -> str | None:
    """Why a peer cannot run here, or None."""
    if not known.python.exists():
        return f"no environment {known.environment!r} here: make bench-peers"
    return None


def chosen(names: Sequence[str]) -> list[Known]:
    """Peers by name or by the name of their environment; all where none is named."""
    if not names:
        return list(PEERS_KNOWN)
    found = [known for known in PEERS_KNOWN if known.name in names or known.environment in names]
    unknown = set(names) - {known.name for known in found} - {k.environment for k in found}
    if unknown:
        told = ", ".join(repr(known.name) for known in PEERS_KNOWN)
        raise SystemExit(f"no peer {sorted(unknown)}; there are {told}")
    return found


def job(
    windows: Windows,
    *,
    cache: Path,
    folder: Path,
    part: int,
    rows: Sequence[npt.NDArray[np.int64]],
    threads: int,
) -> dict[str, Any]:
    """What a peer is told first."""
    return {
        "raw": str(windows.raw),
        "cache": str(cache),
        "folder": tempfile.mkdtemp(dir=folder),
        "windows": windows.count,
        "window": list(windows.window),
        "part": part,
        "batch": len(rows[0]),
        "rows": [row.tolist() for row in rows],
        "threads": threads,
    }


def _numbers(raw: bytes) -> npt.NDArray[np.uint64]:
    return np.frombuffer(raw, dtype=np.uint64)
