"""What every test file shares: where real data lies, and how a test says that it does not."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from had_pipe.cache import Cache

Made = Callable[..., "Cache"]
Script = Callable[[str], ModuleType]

# As the command line does, before torch is loaded: spinning threads make a busy machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
BENCHMARKS = REPOSITORY / "benchmarks"
ECOLI = REPOSITORY / "pipelines" / "demo" / "ecoli_K12_MG1655.2bit"


@pytest.fixture(scope="session")
def shared() -> Callable[[str], Path]:
    """`shared("genomes/x.2bit")`: a file of the shared folder beside the repository, or a skip."""

    def find(name: str) -> Path:
        path = SHARED / name
        if not path.exists():
            pytest.skip(f"../shared/{name} is not here: real data for this test is kept apart")
        return path

    return find


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """`made(codec="tiny")`: such a small cache, opened anew; each kind is built once.

    Nothing may be written to one. `check` is how it is opened.
    """
    from small_cache import build_cache

    from had_pipe.cache import Cache

    paths: dict[str, Path] = {}

    def opened(*, check: Any = "first", **settings: Any) -> Cache:
        kind = repr(sorted(settings.items()))
        if kind not in paths:
            paths[kind] = build_cache(tmp_path_factory.mktemp("made") / "cache", **settings)
        return Cache.open(paths[kind], check=check)

    return opened


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """`script("stream")`: a module of benchmarks/, which are no package."""
    known = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module
    for name in set(sys.modules) - known:
        if (BENCHMARKS / f"{name}.py").exists():
            del sys.modules[name]
