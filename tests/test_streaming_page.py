"""The page on streaming does what it shows: its blocks are run as they stand, one after another."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from small_cache import build_cache
from torch.utils.data import DataLoader

from had_pipe.stream import Batch, Stream

PAGE = REPOSITORY / "docs" / "streaming.md"
URL = "https://lab.example.org/caches"
FIRST = "Train on a cache with your own loop"


def sections() -> dict[str, list[str]]:
    """The page's blocks of Python, by heading."""
    found = {}
    for part in re.split(r"^##? ", PAGE.read_text("utf-8"), flags=re.M)[1:]:
        heading = part.split("\n", 1)[0]
        found[heading] = re.findall(r"^```python\n(.*?)^```", part, flags=re.M | re.S)
    return found


SECTIONS = sections()
LOOP = [FIRST, "A training loop", "Saving and going on"]
"""What the other sections build on."""


def run(heading: str, names: dict[str, Any], *, caches: str = "") -> dict[str, Any]:
    """Run a section's blocks with the names that those before it made; its own names too."""
    blocks = SECTIONS[heading]
    assert blocks, heading
    names = dict(names)
    for block in blocks:
        text = block.replace(URL, caches) if caches else block
        exec(compile(text, f"{PAGE.name}: {heading}", "exec"), names)
    return names


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "cache").mkdir()
    build_cache(folder / "cache" / "demo", windows=96, views=2)
    build_cache(folder / "cache" / "other", windows=64, seed=1)
    return folder


@pytest.fixture(autouse=True)
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


@pytest.fixture(scope="module")
def names(folder: Path) -> dict[str, Any]:
    """What the first sections made; the student has learnt."""
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        torch.manual_seed(0)
        names: dict[str, Any] = {"__name__": "page"}
        for heading in LOOP:
            names = run(heading, names)
    return names


def test_the_loop_learns(names: dict[str, Any]) -> None:
    assert names["loss"].item() < 0.5 * names["batch"].target.var().item()
    assert names["position"] == 100


@pytest.mark.parametrize(
    "heading", ["Several caches", "NumPy only", "As a data set of PyTorch", "See what it does"]
)
def test_a_section_runs(heading: str, names: dict[str, Any]) -> None:
    run(heading, names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks, where there are threads
def test_worker_processes_are_refused(names: dict[str, Any]) -> None:
    windows = run("As a data set of PyTorch", names)["Windows"]
    with Stream(["cache/demo"], batch=32, seed=0) as stream:
        loader = DataLoader(
            windows(stream, 1), batch_size=None, num_workers=1, multiprocessing_context="fork"
        )
        with pytest.raises(AssertionError, match="num_workers=0"):
            next(iter(loader))


def windows_of(batch: Batch) -> Counter[tuple[int, int]]:
    return Counter((span.epoch, int(row)) for span in batch.spans for row in span.row)


def test_processes_share_a_batch(names: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with Stream(["cache/demo"], batch=32, seed=0, start=100) as stream:
        whole = windows_of(next(stream))
    for ranks in (1, 2):
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        found: Counter[tuple[int, int]] = Counter()
        for rank in range(ranks):
            monkeypatch.setenv("RANK", str(rank))
            found += windows_of(run("Several GPUs", names)["batch"])
        assert found == whole


def test_accelerate_trains(names: dict[str, Any]) -> None:
    before = names["student"][2].weight.detach().clone()
    run("With accelerate", names)
    assert not torch.equal(names["student"][2].weight, before)


# Lightning's own: what it takes from torch goes out of use, and it knows srun and no worker better.
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_trains_and_goes_on(names: dict[str, Any]) -> None:
    names = {**names, **run("As a data set of PyTorch", names)}
    before = names["student"][2].weight.detach().clone()
    names = run("With Lightning", names)
    assert names["trainer"].global_step == 10
    assert not torch.equal(names["student"][2].weight, before)
    lightning = names["lightning"]
    read: list[int] = []

    class Watched(names["Distilled"]):  # type: ignore[misc]
        def training_step(self, batch: Any) -> Any:
            read.append(self.trainer.global_step)
            with Stream(["cache/demo"], batch=32, seed=0, start=read[-1]) as stream:
                assert torch.equal(batch[2], next(stream).target)
            return super().training_step(batch)

    def fit(**settings: Any) -> None:
        trainer = lightning.Trainer(
            max_steps=7, logger=False, enable_progress_bar=False, enable_model_summary=False
        )
        trainer.callbacks.append(
            lightning.callbacks.ModelCheckpoint(
                "saved", filename="{step}", every_n_train_steps=4, save_top_k=-1
            )
        )
        trainer.fit(Watched(names["student"]), weights_only=False, **settings)

    fit()
    fit(ckpt_path="saved/step=4.ckpt")
    assert read == [*range(7), *range(4, 7)]


def in_processes(
    words: list[str], headings: list[str], last: str, *, change: str = ""
) -> list[Any]:
    """What two processes that run some sections say in the end, as JSON."""
    text = "\n".join(block for heading in headings for block in SECTIONS[heading])
    if change:
        assert "lightning.Trainer(" in text
        text = text.replace("lightning.Trainer(", f"lightning.Trainer({change}, ")
    Path("script.py").write_text(f"{text}\nimport json\nprint('said', json.dumps({last}))\n")
    done = subprocess.run(
        [sys.executable, *words, "script.py"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in re.findall(r"^said (.*)$", done.stdout, flags=re.M)]
    assert len(said) == 2
    return said


@pytest.mark.slow
def test_two_processes_of_accelerate_share_every_batch() -> None:
    said = in_processes(
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        [FIRST, "A training loop", "With accelerate"],
        "[batch.position, [[s.epoch, r] for s in batch.spans for r in s.row.tolist()]]",
    )
    with Stream(["cache/demo"], batch=32, seed=0, start=9) as stream:
        whole = windows_of(next(stream))
    assert [position for position, _ in said] == [9, 9]
    assert [len(windows) for _, windows in said] == [16, 16]
    assert Counter((epoch, row) for _, windows in said for epoch, row in windows) == whole


@pytest.mark.slow
def test_two_processes_of_lightning_learn_as_one() -> None:
    said = in_processes(
        [],
        [FIRST, "A training loop", "As a data set of PyTorch", "With Lightning"],
        "[trainer.global_rank, trainer.world_size, trainer.global_step,"
        " [float(p.sum()) for p in student.parameters()]]",
        change="accelerator='cpu', devices=2, strategy='ddp'",
    )
    assert sorted(rank for rank, *_ in said) == [0, 1]
    assert said[0][1:] == said[1][1:]
    assert said[0][1:3] == [2, 10]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """The folder of caches behind a URL."""
    server = ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(_Quiet, directory=str(folder / "cache"))
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_cache_behind_a_url_gives_the_same_batches(
    names: dict[str, Any], served: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("obstore", reason="the extra `remote` is not installed")
    monkeypatch.setenv("HAD_PIPE_MIRROR", str(tmp_path / "mirror"))
    batch = run("A cache behind a URL", names, caches=served)["batch"]
    with Stream(["cache/demo"], batch=32, seed=0) as stream:
        local = next(stream)
    assert torch.equal(batch.target, local.target)
    assert torch.equal(batch.kmer_id, local.kmer_id)


def test_every_block_of_the_page_is_run_here() -> None:
    tested = {*LOOP, "Several GPUs", "With accelerate", "With Lightning", "A cache behind a URL"}
    tested |= {"Several caches", "NumPy only", "As a data set of PyTorch", "See what it does"}
    assert {heading for heading, blocks in SECTIONS.items() if blocks} == tested
