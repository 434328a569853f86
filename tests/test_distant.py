"""Stage two from a URL: the run is the one from a folder, whatever the network does."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_server import Fault, FaultyServer, serving
from small_cache import build_cache
from test_distill import a_recipe, assert_same_run, untimed
from typer.testing import CliRunner, Result

from had_pipe import cli
from had_pipe.cache import Cache
from had_pipe.distill import DistillSummary, distill
from had_pipe.errors import CacheMismatch, Interrupted, NetworkError
from had_pipe.progress import Progress
from had_pipe.recipe import Recipe
from had_pipe.report import write_report
from had_pipe.run import read_metrics

# Batches of 8 of 64 windows: eight steps an epoch, two views, so sixteen until all has been seen.
WINDOWS = {"windows": 64, "part": 16, "views": 2}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("caches") / "one", **WINDOWS)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, cache: Path) -> DistillSummary:
    """Twenty steps from the folder."""
    return distill(a_recipe(cache, tmp_path_factory.mktemp("runs") / "straight"))


@pytest.fixture
def server(cache: Path) -> Iterator[FaultyServer]:
    with serving(cache.parent) as opened:
        yield opened


def remote(server: FaultyServer, out: Path, **train: object) -> Recipe:
    recipe = a_recipe(out, out, **train)
    url = recipe.cache.model_copy(update={"path": f"{server.url}/one"})
    return recipe.model_copy(update={"cache": url})


def had_pipe(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="had-pipe")


def shards(server: FaultyServer) -> list[str]:
    return [asked.path for asked in server.asked if "/c/" in asked.path]


def test_a_run_from_a_url_is_the_run_from_the_folder_and_asks_for_each_object_once(
    tmp_path: Path, straight: DistillSummary, server: FaultyServer
) -> None:
    server.url = server.url.replace("://", "://me:secret@")
    run = distill(remote(server, tmp_path / "run"), mirror=tmp_path / "mirror").run
    assert_same_run(run, straight)
    assert len(shards(server)) == len(set(shards(server))) > 10
    lines = [line for line in read_metrics(run) if line["kind"] == "train"]
    held = sum(p.stat().st_size for p in (tmp_path / "mirror").rglob("*") if p.is_file())
    # The floors' objects too; but for plan and manifest, and what came after the last line.
    assert held / 2 < sum(line["mirror_downloaded_bytes"] for line in lines) < held
    hits, misses = (sum(line[f"mirror_{what}"] for line in lines) for what in ("hits", "misses"))
    assert hits + misses >= len(set(shards(server)))
    told = json.loads((run / "run.json").read_text())["caches"][0]["url"]
    assert told == f"{server.url.replace('me:secret@', '')}/one"
    assert "one" in write_report(run).read_text("utf-8")
    for path in (*run.rglob("*"), *(tmp_path / "mirror").rglob("*")):
        assert not path.is_file() or b"secret" not in path.read_bytes(), path


def test_a_run_goes_on_from_a_url_where_it_was_stopped_from_a_folder(
    tmp_path: Path, cache: Path, straight: DistillSummary, server: FaultyServer
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("had_pipe.distill.Stream.__next__", _raise)
        with pytest.raises(NetworkError):
            distill(a_recipe(cache, tmp_path / "run"))
    distill(remote(server, tmp_path / "run"), mirror=tmp_path / "mirror")
    assert_same_run(tmp_path / "run", straight)


def _raise(_: object) -> None:
    raise NetworkError("gone")


def test_a_signal_while_a_server_hangs_is_obeyed_in_seconds_and_nothing_is_lost(
    tmp_path: Path, cache: Path, straight: DistillSummary, server: FaultyServer
) -> None:
    # A shard of the second view: the server sends a little of it, then nothing more.
    hanging = sorted(p for p in (cache / "data.zarr/train/1").rglob("value/c/*/*/*"))[1]
    key = f"one/{hanging.relative_to(cache).as_posix()}"
    server.always[key] = Fault(stall_after=100)
    sent: list[float] = []

    def send() -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    def report(progress: Progress) -> None:
        # It trains on what is there, at most two steps more, then waits.
        if progress.what == "training" and progress.done == 8:
            threading.Timer(1.5, send).start()

    recipe = remote(server, tmp_path / "run")
    with pytest.raises(Interrupted, match="stopped by SIGTERM after step "):
        distill(recipe, mirror=tmp_path / "mirror", report=report)
    assert time.monotonic() - sent[0] < 20  # the server's silence would be borne for 30
    assert server.count(key) >= 1
    server.always.clear()
    distill(recipe, mirror=tmp_path / "mirror")
    assert_same_run(tmp_path / "run", straight)


def test_several_caches_come_from_folders_and_urls_alike(
    tmp_path: Path, cache: Path, server: FaultyServer
) -> None:
    other = build_cache(tmp_path / "other", windows=32, seed=1)
    runs = [
        distill(
            a_recipe(cache, tmp_path / name, steps=6, weights=[1, 2]),
            caches=[first, other],
            mirror=tmp_path / "mirror",
        ).run
        for name, first in (("folders", cache), ("urls", f"{server.url}/one"))
    ]
    assert untimed(runs[0]) == untimed(runs[1])
    caches = json.loads((runs[1] / "run.json").read_text())["caches"]
    assert ["url" in told for told in caches] == [True, False]


def test_a_cache_given_twice_is_refused_also_by_way_of_its_url(
    tmp_path: Path, cache: Path, server: FaultyServer
) -> None:
    with pytest.raises(CacheMismatch, match="the same cache is given twice"):
        distill(
            a_recipe(cache, tmp_path / "run"),
            caches=[cache, f"{server.url}/one"],
            mirror=tmp_path / "mirror",
        )


# The command line


def a_lab(folder: Path, url: str) -> Path:
    """A recipe of a lab that only distils."""
    recipe = a_recipe(folder, folder / "run", steps=4, warmup=1)
    student = "\n".join(f"{key} = {value}" for key, value in recipe.student.model_dump().items())
    path = folder / "lab.toml"
    path.write_text(
        f'[cache]\npath = "{url}"\n\n[student]\n{student}\n\n[train]\nout = "run"\nsteps = 4\n'
        "batch = 8\nvalidation_windows = 16\n",
        "utf-8",
    )
    return path


def test_a_lab_that_only_distils_needs_nothing_but_the_url(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAD_PIPE_MIRROR", str(tmp_path / "mirror"))
    recipe = a_lab(tmp_path, f"{server.url}/one")
    done = had_pipe("distill", recipe, "--mirror-size", "1GB", "--prefetch", "1MB")
    assert done.exit_code == 0, done.stderr
    assert "4 steps in" in done.stdout
    assert "read " in done.stderr
    assert "mirror " in done.stderr
    assert (tmp_path / "mirror").is_dir()
    again = had_pipe("distill", recipe)
    assert "nothing was left to do: all 4 steps were done" in again.stdout
    for verb in ("plan", "extract-teacher"):
        assert had_pipe(verb, recipe).exit_code == 2


def test_stage_one_refuses_to_make_a_cache_behind_a_url(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        '[teacher]\nname = "./t"\n[[genome]]\nname = "g"\npath = "g.fa"\n'
        '[windows]\nbases = 60\nstride = 60\n[cache]\npath = "https://host/x"\n',
        "utf-8",
    )
    for verb in ("plan", "extract-teacher"):
        refused = had_pipe(verb, path)
        assert refused.exit_code == 2
        assert "[cache] path is a URL: from there caches are only read" in refused.stderr


@pytest.mark.parametrize("option", ["--mirror-size", "--prefetch"])
def test_a_size_that_is_none_is_refused_before_anything_is_asked(
    tmp_path: Path, server: FaultyServer, option: str
) -> None:
    recipe = a_lab(tmp_path, f"{server.url}/one")
    refused = had_pipe("distill", recipe, option, "5 gigs")
    assert refused.exit_code == 2
    assert f"{option} 5 gigs: not a size" in refused.stderr
    assert not server.asked


def test_what_is_not_there_exits_with_9_and_names_the_url(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAD_PIPE_MIRROR", str(tmp_path / "mirror"))
    url = f"{server.url}/none"
    for words in (
        ("distill", a_lab(tmp_path, url)),
        ("cache", "inspect", url),
        ("cache", "fetch", url, tmp_path / "copy"),
    ):
        refused = had_pipe(*words)
        assert refused.exit_code == 9, refused.stderr
        assert url in refused.stderr
        assert "404" in refused.stderr
    assert not (tmp_path / "copy").exists()


def test_fetch_of_a_folder_says_that_it_is_no_url(tmp_path: Path, cache: Path) -> None:
    refused = had_pipe("cache", "fetch", cache, tmp_path / "copy")
    assert refused.exit_code == 2
    assert "had-pipe: a name that is no URL: a cache can be read from http://" in refused.stderr


def test_fetch_copies_a_cache_and_says_so_again(
    tmp_path: Path, cache: Path, server: FaultyServer
) -> None:
    url = f"{server.url}/one"
    fetched = had_pipe("cache", "fetch", url, tmp_path / "copy")
    assert fetched.exit_code == 0, fetched.stderr
    opened = Cache.open(cache)
    assert opened.id in fetched.stdout
    assert "fetching" in fetched.stderr
    files = {p.relative_to(cache): p.read_bytes() for p in cache.rglob("*") if p.is_file()}
    assert files == {
        path.relative_to(tmp_path / "copy"): path.read_bytes()
        for path in (tmp_path / "copy").rglob("*")
        if path.is_file()
    }
    again = had_pipe("cache", "fetch", url, tmp_path / "copy")
    assert again.exit_code == 0
    assert f"nothing was left to do: all {len(files) - 1} objects were there" in again.stdout


def test_inspect_says_the_same_of_a_url_and_downloads_no_embedding(
    tmp_path: Path, cache: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAD_PIPE_MIRROR", str(tmp_path / "mirror"))
    url = f"{server.url}/one"
    near, far = (had_pipe("cache", "inspect", where, "--json") for where in (cache, url))
    assert far.exit_code == 0, far.stderr
    assert json.loads(far.stdout) == json.loads(near.stdout)
    assert url in had_pipe("cache", "inspect", url).stdout
    locus = ("--locus", "train:17:0:3")
    assert (
        had_pipe("cache", "inspect", url, *locus).stdout
        == had_pipe("cache", "inspect", cache, *locus).stdout
    )
    assert not [asked.path for asked in server.asked if "/value/c/" in asked.path]


def test_doctor_says_where_the_mirror_lies_and_how_full_it_is(
    tmp_path: Path, server: FaultyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HAD_PIPE_MIRROR", str(tmp_path / "mirror"))
    told = json.loads(had_pipe("doctor", "--json").stdout)["mirror"]
    assert told == {"folder": str(tmp_path / "mirror"), "caches": 0, "nbytes": 0}
    assert had_pipe("cache", "inspect", f"{server.url}/one").exit_code == 0
    told = json.loads(had_pipe("doctor", "--json").stdout)["mirror"]
    held = [p for p in (tmp_path / "mirror").rglob("*") if p.is_file() and p.parent.name[0] != "."]
    assert told["caches"] == 1
    assert told["nbytes"] == sum(p.stat().st_size for p in held if p.name != ".usage") > 0
    assert f"{tmp_path / 'mirror'}, " in had_pipe("doctor").stdout
    assert "obstore" in had_pipe("doctor").stdout
