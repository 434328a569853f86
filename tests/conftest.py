"""What every test file shares: where real data lies, and how a test says that it does not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# As the command line does, before torch is loaded: spinning threads make a busy machine crawl.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
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
