"""The command line: what it says, where it says it, and which exit code it leaves."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import torch
import typer.main
import zarr
from conftest import REPOSITORY
from numpy_teacher import NumpyTeacher
from small_cache import build_cache
from typer.testing import CliRunner, Result
from written_runs import a_run

from had_pipe import __version__, cli, errors
from had_pipe.cli import shown
from had_pipe.progress import Progress

TINY = """
[student]
hidden_size = 32
layers = 1
gdn_heads = 2
head_dim = 16
expand_v = 1
attention_heads = 2
mlp = 32

[train]
out = "run"
steps = 6
batch = 8
log_every = 2
validate_every = 3
validation_windows = 16
checkpoint_every = 3
"""


def had_pipe(*words: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(word) for word in words], prog_name="had-pipe")


def in_a_process(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The installed command, its streams kept apart."""
    return subprocess.run(
        [str(Path(sys.executable).with_name("had-pipe")), *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("caches") / "one", windows=64, part=32)


@pytest.fixture
def recipe(tmp_path: Path, cache: Path) -> Path:
    path = tmp_path / "x.toml"
    path.write_text(f"[cache]\npath = {json.dumps(str(cache))}\n{TINY}", "utf-8")
    return path


def test_help_loads_nothing_heavy_and_costs_less_than_half_a_second() -> None:
    code = (
        "import sys\nfrom had_pipe import cli\nsys.argv = ['had-pipe', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "print('loaded', *sys.modules)"
    )
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        # Time of the processor, not of the clock: this machine may have other work.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5
    loaded = set(done.stdout.rpartition("loaded")[2].split())
    assert "had_pipe.cli" in loaded
    heavy = {"torch", "transformers", "zarr", "numpy", "pyarrow", "matplotlib", "jinja2", "gtars"}
    assert not loaded & heavy
    assert not loaded & {"had_pipe.recipe", "had_pipe.cache", "had_pipe.report"}


def test_the_command_line_is_the_documented_one_and_no_more() -> None:
    def options(command: Any) -> set[str]:
        return {o for p in command.params for o in p.opts if o.startswith("--")} - {"--help"}

    group = typer.main.get_command(cli.app)
    assert {name: options(command) for name, command in group.commands.items()} == {
        "plan": {"--device", "--offline", "--json"},
        "extract-teacher": {
            *("--device", "--offline", "--share", "--workers", "--scheduler", "--repair"),
        },
        "distill": {
            *("--cache", "--mirror", "--mirror-size", "--prefetch", "--direct", "--through-zarr"),
            "--device",
        },
        "embed": {"--student", "--out", "--per", "--window", "--overlap", "--device"},
        "report": {"--cache", "--annotation", "--out"},
        "compare": {"--out", "--json"},
        "doctor": {"--json"},
        "cache": set(),
        "teachers": {"--in", "--json"},
    }
    fetched = group.commands["teachers"].commands
    assert {name: options(command) for name, command in fetched.items()} == {
        "fetch": {"--folder", "--json"}
    }
    below = group.commands["cache"].commands
    assert {name: options(command) for name, command in below.items()} == {
        "inspect": {"--locus", "--json"},
        "fetch": set(),
        "verify": {"--level", "--share", "--threads", "--json"},
        "audit": {"--windows", "--seed", "--device", "--offline", "--json"},
        "compare": {"--json"},
        "recode": {"--codec", "--repair"},
    }


def test_the_version_is_told() -> None:
    assert had_pipe("--version").output == f"had-pipe {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [["distill"], ["frobnicate"], ["plan", "x.toml", "--device", "tpu"], ["cache", "verify"]],
    ids=" ".join,
)
def test_a_line_that_is_no_command_exits_with_2(words: list[str]) -> None:
    result = had_pipe(*words)
    assert result.exit_code == 2
    assert "Usage: had-pipe" in result.stderr
    assert not result.stdout


@pytest.mark.parametrize("verb", ["plan", "extract-teacher", "distill"])
def test_a_fault_of_the_recipe_exits_with_2_and_keeps_its_brackets(
    verb: str, tmp_path: Path
) -> None:
    path = tmp_path / "x.toml"
    path.write_text('[cache]\npath = "c"\n[train]\nout = "r"\nstep = 1\nbatch = 1\n', "utf-8")
    result = had_pipe(verb, path)
    assert result.exit_code == 2
    assert f"had-pipe: {path}: [train] missing key 'steps'\n" in result.stderr
    assert f"{path}: [train] unknown key 'step'; did you mean 'steps'?" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_recipe_without_the_tables_of_a_stage_says_which_is_missing(
    tmp_path: Path, cache: Path
) -> None:
    path = tmp_path / "x.toml"
    path.write_text(f"[cache]\npath = {json.dumps(str(cache))}\n", "utf-8")
    for verb, table in (("distill", "train"), ("plan", "teacher"), ("extract-teacher", "teacher")):
        result = had_pipe(verb, path)
        assert result.exit_code == 2, result.output
        assert f"[{table}]" in result.stderr


def test_a_folder_that_is_no_cache_or_no_run_is_refused_with_its_code(tmp_path: Path) -> None:
    inspected = had_pipe("cache", "inspect", tmp_path)
    assert inspected.exit_code == 4
    assert str(tmp_path) in inspected.stderr
    assert had_pipe("cache", "verify", tmp_path).exit_code == 4
    reported = had_pipe("report", tmp_path)
    assert reported.exit_code == 3
    assert "not a run" in reported.stderr


def test_inspect_says_what_a_cache_is(cache: Path) -> None:
    result = had_pipe("cache", "inspect", cache)
    assert result.exit_code == 0
    told = had_pipe("cache", "inspect", cache, "--json")
    facts = json.loads(told.stdout)
    plan = facts["plan"]
    assert facts["sealed"] is True
    assert facts["parts_missing"] == 0
    assert facts["nbytes"] == sum(p.stat().st_size for p in cache.rglob("*") if p.is_file())
    for said in (
        facts["id"],
        plan["teacher"]["name"],
        plan["teacher"]["weights_sha256"],
        plan["genomes"][0]["digest"],
        f"{plan['genomes'][0]['bases']:,} bases",
        plan["licence"],
        f"sealed, {facts['parts']} parts",
        *(f"{name}: {split['windows']:,} window" for name, split in plan["splits"].items()),
        *(name.replace("_", " ") for name in facts["fidelity"]),
    ):
        assert said in result.stdout, said


def test_a_copy_whose_manifest_did_not_arrive_does_not_pass_verification(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "copy", windows=64, part=32)
    assert had_pipe("cache", "verify", path).exit_code == 0
    (path / "manifest.json").unlink()
    result = had_pipe("cache", "verify", path)
    assert result.exit_code == 4
    assert "there is no manifest" in result.stderr


def test_inspect_of_an_unfinished_cache_says_how_much_is_missing(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "part", windows=64, part=32)
    (path / "manifest.json").unlink()
    receipt = next((path / "parts" / "train").rglob("*.json"))
    receipt.unlink()
    result = had_pipe("cache", "inspect", path)
    assert result.exit_code == 0
    assert "not sealed: 1 of " in result.stdout
    facts = json.loads(had_pipe("cache", "inspect", path, "--json").stdout)
    assert facts["sealed"] is False
    assert facts["parts_missing"] == 1


def test_a_row_of_an_embedding_is_traced_to_its_bases(cache: Path) -> None:
    """Against the arrays as zarr-python reads them and the lines of docs/cache-format.md."""
    root = zarr.open_group(cache / "data.zarr", mode="r")
    table = pq.read_table(cache / "windows.parquet").to_pylist()
    kmers, seen = root["train/kmer_id"].shape[1], set()
    for row, group in [(0, 0), (5, 2), (40, 1), (33, 3), (17, 0), (21, 4)]:
        told = had_pipe("cache", "inspect", cache, "--locus", f"train:{row}:0:{group}", "--json")
        assert told.exit_code == 0, told.output
        found = json.loads(told.stdout)
        (window,) = (x for x in table if (x["split"], x["window"]) == ("train", row))
        turned = bool(root["train/0/reversed"][row])
        column = [t for t in range(kmers) if not root["train/0/mask"][row, t]][group]
        place = kmers - 1 - column if turned else column
        letters = "".join(
            "ACGT"[int(root["train/kmer_id"][row, place]) // 4**n % 4] for n in (5, 4, 3, 2, 1, 0)
        )
        if turned:
            letters = letters[::-1].translate(str.maketrans("ACGT", "TGCA"))
        assert (found["contig"], found["start"]) == (window["contig"], window["start"])
        assert found["group_start"] == window["start"] + 6 * place
        assert found["group_end"] == found["group_start"] + 6
        assert (found["strand"], found["kmer"]) == ("-" if turned else "+", letters)
        assert found["masked"] is False
        shown = had_pipe("cache", "inspect", cache, "--locus", f"train:{row}:0:{group}").stdout
        assert f"{window['contig']}:{found['group_start']}-{found['group_end']}\n" in shown
        assert f"k-mer      {letters}, on the {'reverse' if turned else 'forward'} strand" in shown
        seen.add(turned)
    assert seen == {True, False}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("train", "expected SPLIT:ROW or SPLIT:ROW:VIEW:GROUP"),
        ("train:1:0", "expected SPLIT:ROW"),
        ("train:-1", "expected SPLIT:ROW"),
        ("train:x", "expected SPLIT:ROW"),
        ("test:0", "no split 'test'"),
        ("train:64", "train has 64 windows, counted from 0"),
        ("train:0:7:0", "no view 7 of train; it has 0"),
        ("train:0:0:9999", "stored groups, counted from 0"),
    ],
)
def test_a_place_that_is_not_in_the_cache_is_refused_with_2(
    cache: Path, asked: str, said: str
) -> None:
    result = had_pipe("cache", "inspect", cache, "--locus", asked)
    assert result.exit_code == 2
    assert f"--locus {asked}: " in result.stderr
    assert said in result.stderr


def test_verify_names_a_flipped_byte_and_exits_with_4(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "flipped", windows=64, part=32)
    sound = had_pipe("cache", "verify", path)
    assert sound.exit_code == 0
    assert "problem  none" in sound.stdout
    shard = max(
        (path / "data.zarr" / "train").rglob("value/c/*/*/*"), key=lambda p: p.stat().st_size
    )
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    result = had_pipe("cache", "verify", path)
    key = shard.relative_to(path).as_posix()
    assert result.exit_code == 4
    assert f"problem  {key}: SHA-256" in result.stdout
    assert "1 problem found" in result.stderr
    told = had_pipe("cache", "verify", path, "--json")
    assert told.exit_code == 4
    assert [problem["key"] for problem in json.loads(told.stdout)["problems"]] == [key]
    # By names, lengths and JSON alone it cannot be seen.
    assert had_pipe("cache", "verify", path, "--level", "structure").exit_code == 0


def test_shares_of_a_verification_read_every_object_once(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "shared", windows=160, part=32)
    whole = json.loads(had_pipe("cache", "verify", path, "--json").stdout)
    lone = json.loads(had_pipe("cache", "verify", path, "--level", "structure", "--json").stdout)
    shares = [
        json.loads(
            had_pipe(
                "cache", "verify", path, "--share", f"{i}/3", "--threads", "2", "--json"
            ).stdout
        )
        for i in (1, 2, 3)
    ]
    assert [found["share"] for found in shares] == [[1, 3], [2, 3], [3, 3]]
    # What `structure` reads, every share reads.
    large = whole["objects"] - lone["objects"]
    assert large == sum(1 for file in path.rglob("c/**/*") if file.is_file()) > 20
    assert sum(found["objects"] - lone["objects"] for found in shares) == large
    assert "share 2/3" in had_pipe("cache", "verify", path, "--share", "2/3").stdout
    shard = next((path / "data.zarr" / "train").rglob("value/c/2/*/*"))
    shard.write_bytes(bytes(shard.stat().st_size))
    codes = [had_pipe("cache", "verify", path, "--share", f"{i}/3").exit_code for i in (1, 2, 3)]
    assert sorted(codes) == [0, 0, 4]


@pytest.mark.parametrize(
    "share", ["0/3", "4/3", "1/0", "3", "1/3/5", "-1/3", "a/b", "1/1000000000"]
)
@pytest.mark.parametrize("words", [["cache", "verify"], ["extract-teacher"]], ids=" ".join)
def test_a_share_that_is_none_is_refused_with_2(words: list[str], share: str) -> None:
    result = had_pipe(*words, "x", f"--share={share}")
    assert result.exit_code == 2
    assert f"--share {share}: expected I/N with I from 1 to N" in result.stderr


def test_a_cache_goes_to_other_codecs_and_an_archive_and_back(cache: Path, tmp_path: Path) -> None:
    facts = json.loads(had_pipe("cache", "inspect", cache, "--json").stdout)
    for codec in ("exact", "archive"):
        made = had_pipe("cache", "recode", cache, tmp_path / codec, "--codec", codec)
        assert made.exit_code == 0, made.output
        assert f"target    {tmp_path / codec}, {codec}, " in made.stdout
        assert "nothing lost: every value is the source's" in made.stdout
        again = had_pipe("cache", "recode", cache, tmp_path / codec, "--codec", codec)
        assert again.exit_code == 0
        assert "nothing was left to do: all " in again.stdout
    inspected = had_pipe("cache", "inspect", tmp_path / "exact")
    assert f"source    recoded from int8, cache {facts['id']}" in inspected.stdout

    archive = had_pipe("cache", "inspect", tmp_path / "archive")
    assert archive.exit_code == 4
    assert f"had-pipe cache recode {tmp_path / 'archive'}" in archive.stderr
    back = had_pipe("cache", "recode", tmp_path / "archive", tmp_path / "back")
    assert back.exit_code == 0, back.output
    assert facts["id"] in back.stdout
    assert had_pipe("cache", "verify", tmp_path / "back").exit_code == 0

    refused = had_pipe("cache", "recode", cache, tmp_path / "x", "--codec", "zip")
    assert refused.exit_code == 2
    assert "--codec zip: expected one of " in refused.stderr
    assert not (tmp_path / "x").exists()


def test_two_caches_are_compared(cache: Path, tmp_path: Path) -> None:
    copy, recoded, other = (tmp_path / name for name in ("copy", "recoded", "other"))
    shutil.copytree(cache, copy)
    same = had_pipe("cache", "compare", cache, copy)
    assert same.exit_code == 0, same.output
    assert "train/0: 64 windows, all of equal bytes" in same.stdout
    assert "verdict     one cache: the ids are the same" in same.stdout

    assert had_pipe("cache", "recode", cache, recoded, "--codec", "exact").exit_code == 0
    shown = had_pipe("cache", "compare", cache, recoded).stdout
    assert "verdict     by its plan b was recoded from a; see above how far apart they are" in shown
    assert "train/0: 64 windows, 0 of equal bytes; relative error 0; " in shown

    build_cache(other, windows=64, part=32, seed=1)
    differing = had_pipe("cache", "compare", cache, other)
    assert differing.exit_code == 0
    assert "train/0/mask differs" in differing.stdout or "kmer_id differs" in differing.stdout
    assert "of other k-mers, mask or strand" in differing.stdout
    assert "verdict     they differ" in differing.stdout
    told = json.loads(had_pipe("cache", "compare", cache, other, "--json").stdout)
    assert (told["identical"], told["equal"]) == (False, False)
    assert told["a"]["path"] == str(cache)
    assert had_pipe("cache", "compare", cache, tmp_path / "none").exit_code == 4


def test_distill_and_report_make_a_student_and_a_page_once(recipe: Path, cache: Path) -> None:
    run = recipe.parent / "run"
    first = in_a_process("distill", recipe)
    assert first.returncode == 0, first.stderr
    assert "6 steps in" in first.stdout
    assert "loss " in first.stdout and " -> " in first.stdout  # noqa: PT018
    assert "held-out windows after step 6" in first.stdout
    assert f"next  had-pipe report {run} --cache {cache}" in first.stdout
    assert (run / "student" / "model.safetensors").is_file()
    # Progress has a line at once and the last one, on the other stream.
    assert "steps" in first.stderr
    assert "6 of 6 steps" in first.stderr
    metrics = (run / "metrics.jsonl").read_bytes()

    again = in_a_process("distill", recipe)
    assert again.returncode == 0
    assert "nothing was left to do" in again.stdout
    assert (run / "metrics.jsonl").read_bytes() == metrics

    page = in_a_process("report", run)
    assert page.returncode == 0
    assert f"page  {run / 'report.html'}" in page.stdout
    plain = (run / "report.html").read_text("utf-8")
    assert plain.startswith("<!doctype html>")
    assert "Groups by their G and C" not in plain

    bed = recipe.parent / "genes.bed"
    bed.write_text("one\t0\t99999\tgene\n", "utf-8")
    shown = in_a_process("report", run, "--cache", cache, "--annotation", bed)
    assert shown.returncode == 0, shown.stderr
    assert "32 of 32 windows" in shown.stderr
    coloured = (run / "report.html").read_text("utf-8")
    assert "Groups by their G and C" in coloured
    assert "Groups by feature" in coloured
    for words, code, told in (
        (["--annotation", bed], 2, "name the cache too"),
        (["--cache", recipe.parent], 4, "plan.json"),
        (["--cache", cache, "--annotation", recipe], 3, "ends in .bed"),
    ):
        refused = had_pipe("report", run, *words)
        assert refused.exit_code == code, refused.output
        assert told in refused.stderr
    assert (run / "report.html").read_text("utf-8") == coloured


def test_compare_puts_runs_in_a_table_and_on_a_page(tmp_path: Path) -> None:
    runs = [
        a_run(tmp_path / name, seed=seed, objective=objective, align=0.5 + seed / 10)
        for name, seed, objective in (
            *(("had-0", 0, {}), ("had-1", 1, {})),
            ("alone", 0, {"reconstruct": 0.0}),
        )
    ]
    told = had_pipe("compare", *runs)
    assert told.exit_code == 0, told.output
    lines = told.stdout.splitlines()
    assert lines[0].startswith("held out: the first 128 windows of split 'valid' of cache")
    assert lines[1].split()[:3] == ["run", "objective.reconstruct", "seed"]
    names = [line.split("  ")[0] for line in lines[2:9]]
    assert names == [
        *("had-0", "had-1", "mean ± sd of 2 seeds", "alone"),
        *("floor: k-mer table", "floor: the mean", "floor: base frequencies"),
    ]
    assert "0.5500 ± 0.0707" in lines[4]
    assert "total losses weigh their terms differently" in told.stdout
    page = tmp_path / "compare.html"
    assert f"page  {page}" in told.stdout
    assert page.read_text("utf-8").startswith("<!doctype html>")

    elsewhere = tmp_path / "pages" / "a.html"
    as_json = json.loads(had_pipe("compare", *runs, "--out", elsewhere, "--json").stdout)
    assert as_json["keys"] == ["objective.reconstruct"]
    assert as_json["page"] == str(elsewhere)
    had, alone = as_json["tables"][0]["settings"]
    assert had["mean"]["align"] == pytest.approx(0.55)
    assert [run["name"] for run in had["runs"]] == ["had-0", "had-1"]
    assert alone["spread"] == {}
    assert elsewhere.read_bytes() == page.read_bytes()
    assert had_pipe("compare", runs[0]).exit_code == 2
    assert had_pipe("compare", runs[0], tmp_path).exit_code == 3


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR2], ids=lambda n: n.name
)
def test_a_training_that_is_stopped_exits_with_75_and_goes_on_where_it_was(
    recipe: Path, number: signal.Signals
) -> None:
    text = recipe.read_text("utf-8")
    recipe.write_text(text.replace("steps = 6", "steps = 20_000"), "utf-8")
    metrics = recipe.parent / "run" / "metrics.jsonl"
    command = [str(Path(sys.executable).with_name("had-pipe")), "distill", str(recipe)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as work:
        while work.poll() is None and not (metrics.is_file() and '"train"' in metrics.read_text()):
            time.sleep(0.05)
        work.send_signal(number)
        _, said = work.communicate(timeout=60)
    assert work.returncode == 75, said
    assert "run the same command again" in said.lower()
    assert "Traceback" not in said
    assert list((recipe.parent / "run" / "checkpoints").iterdir())


def test_distill_takes_the_caches_that_it_is_given(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(f'[cache]\npath = "nowhere"\n{TINY}', "utf-8")
    refused = had_pipe("distill", path)
    assert refused.exit_code == 4
    assert str(tmp_path / "nowhere") in refused.stderr
    result = had_pipe("distill", path, "--cache", cache)
    assert result.exit_code == 0, result.output
    told = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    facts = json.loads(had_pipe("cache", "inspect", cache, "--json").stdout)
    assert [one["id"] for one in told["caches"]] == [facts["id"]]


def test_a_run_begun_by_another_recipe_is_refused_with_2(recipe: Path) -> None:
    assert had_pipe("distill", recipe).exit_code == 0
    recipe.write_text(recipe.read_text("utf-8").replace("batch = 8", "batch = 4"), "utf-8")
    result = had_pipe("distill", recipe)
    assert result.exit_code == 2
    assert "batch" in result.stderr
    assert "8" in result.stderr


# Stage one, on a genome of one kilobase and the demo's teacher


@pytest.fixture
def stage_one(tmp_path: Path) -> Path:
    """A recipe whose cache takes a second to make."""
    base = np.random.default_rng(0).integers(0, 4, 3_000)
    sequence = "".join("ACGT"[b] for b in base)
    (tmp_path / "g.fa").write_text(f">one\n{sequence}\n>two\n{sequence[:1500]}NN\n", "utf-8")
    path = tmp_path / "x.toml"
    path.write_text(
        f"""
[teacher]
name = {json.dumps(str(REPOSITORY / "pipelines" / "demo" / "teacher"))}
unchecked = true  # it knows no random DNA
[[genome]]
name = "small"
path = "g.fa"
splits = {{ valid = ["two"] }}
[windows]
bases = 120
stride = 120
[cache]
path = "cache"
part = 8
{TINY}""",
        "utf-8",
    )
    return path


def test_plan_tells_everything_and_writes_nothing(stage_one: Path) -> None:
    before = sorted(stage_one.parent.iterdir())
    result = had_pipe("plan", stage_one, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert sorted(stage_one.parent.iterdir()) == before
    for said in (
        *("25", "12", "small", "int8", "exact", "free"),
        "Apache-2.0: any use, commercial too",
        "int8               130",  # bytes of 128 channels and a scale
        "what they lose is not known: 1,",
    ):
        assert said in result.stdout, result.stdout
    assert f"next  had-pipe extract-teacher {stage_one}" in result.stdout
    told = had_pipe("plan", stage_one, "--device", "cpu", "--json")
    assert told.exit_code == 0
    found = json.loads(told.stdout)
    assert found["codecs"]["int8"]["group_nbytes"] == 130
    assert found["codecs"]["int8"]["fidelity"] is None


def test_stage_one_makes_a_cache_once_and_stage_two_takes_it(stage_one: Path) -> None:
    cache = stage_one.parent / "cache"
    first = had_pipe("extract-teacher", stage_one, "--device", "cpu")
    assert first.exit_code == 0, first.output
    assert f"cache     {cache}\n" in first.stdout
    assert f"next  had-pipe distill {stage_one}" in first.stdout
    again = had_pipe("extract-teacher", stage_one, "--device", "cpu")
    assert again.exit_code == 0
    assert "nothing was left to do" in again.stdout
    assert had_pipe("cache", "verify", cache).exit_code == 0
    trained = had_pipe("distill", stage_one, "--device", "cpu")
    assert trained.exit_code == 0, trained.output

    changed = stage_one.read_text("utf-8").replace("[windows]", "[windows]\nseed = 1")
    stage_one.write_text(changed, "utf-8")
    refused = had_pipe("extract-teacher", stage_one, "--device", "cpu")
    assert refused.exit_code == 4
    assert "seed" in refused.stderr


def test_repair_makes_again_what_a_flipped_byte_spoilt(stage_one: Path) -> None:
    cache = stage_one.parent / "cache"
    assert had_pipe("extract-teacher", stage_one, "--device", "cpu").exit_code == 0
    shard = next((cache / "data.zarr" / "train").rglob("value/c/1/*/*"))
    sound = shard.read_bytes()
    shard.write_bytes(bytes([sound[0] ^ 1]) + sound[1:])
    assert had_pipe("cache", "verify", cache).exit_code == 4
    mended = had_pipe("extract-teacher", stage_one, "--device", "cpu", "--repair")
    assert mended.exit_code == 0, mended.output
    assert shard.read_bytes() == sound
    assert had_pipe("cache", "verify", cache).exit_code == 0


@pytest.mark.slow
def test_workers_make_the_cache_that_one_process_makes(stage_one: Path) -> None:
    cache = stage_one.parent / "cache"
    made = in_a_process("extract-teacher", stage_one, "--device", "cpu", "--workers", "2")
    assert made.returncode == 0, made.stderr
    assert f"next  had-pipe distill {stage_one}" in made.stdout
    id_of_workers = json.loads(had_pipe("cache", "inspect", cache, "--json").stdout)["id"]
    shutil.rmtree(cache)
    assert in_a_process("extract-teacher", stage_one, "--device", "cpu").returncode == 0
    assert json.loads(had_pipe("cache", "inspect", cache, "--json").stdout)["id"] == id_of_workers


def test_an_audit_holds_a_cache_against_its_teacher(stage_one: Path) -> None:
    cache = stage_one.parent / "cache"
    assert had_pipe("extract-teacher", stage_one, "--device", "cpu").exit_code == 0
    teacher = REPOSITORY / "pipelines" / "demo" / "teacher"
    result = had_pipe("cache", "audit", cache, stage_one, "--windows", "9", "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert "9 of equal bytes" in result.stdout
    assert "failed        none" in result.stdout
    words = ("--windows", "3", "--seed", "7", "--device", "cpu", "--json")
    found = json.loads(had_pipe("cache", "audit", cache, teacher, *words).stdout)
    assert (found["seed"], found["passed"], found["windows"]) == (7, True, 3)
    told = json.loads(had_pipe("cache", "inspect", cache, "--json").stdout)["plan"]["teacher"]
    plan = (cache / "plan.json").read_text("utf-8")
    forged = plan.replace(told["weights_sha256"], "0" * 64)
    assert forged != plan
    (cache / "plan.json").write_text(forged, "utf-8")
    (cache / "manifest.json").unlink()
    assert had_pipe("cache", "audit", cache, teacher, "--device", "cpu").exit_code == 4


@pytest.mark.parametrize(
    "words",
    [
        ["--share", "1/2", "--workers", "2"],
        ["--share", "1/2", "--scheduler", "tcp://h:1"],
        ["--workers", "2", "--scheduler", "tcp://h:1"],
    ],
    ids=" ".join,
)
def test_two_ways_of_sharing_the_work_exclude_each_other(stage_one: Path, words: list[str]) -> None:
    result = had_pipe("extract-teacher", stage_one, *words)
    assert result.exit_code == 2
    assert f"{words[0]} and {words[2]} exclude each other" in result.stderr
    assert not (stage_one.parent / "cache").exists()


def test_shares_make_the_cache_that_one_job_makes(stage_one: Path) -> None:
    cache = stage_one.parent / "cache"
    whole = had_pipe("extract-teacher", stage_one, "--device", "cpu")
    assert whole.exit_code == 0, whole.output
    before = {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()}
    shutil.rmtree(cache)

    words = ["extract-teacher", stage_one, "--device", "cpu", "--share"]
    first = had_pipe(*words, "2/2")
    assert first.exit_code == 0, first.output
    assert "3 parts of 6 in " in first.stdout
    assert "; 3 parts still missing" in first.stdout
    assert "next " not in first.stdout
    again = had_pipe(*words, "2/2")
    assert "nothing was left to do in share 2/2; 3 parts still missing" in again.stdout
    assert "not sealed: 3 of 6 parts missing" in had_pipe("cache", "inspect", cache).stdout
    last = had_pipe(*words, "1/2")
    assert last.exit_code == 0, last.output
    assert f"next  had-pipe distill {stage_one}" in last.stdout
    assert {file: file.read_bytes() for file in cache.rglob("*") if file.is_file()} == before


def test_a_warning_that_time_is_up_ends_after_the_part_in_work_with_75(
    stage_one: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibration, shown = 4, 0

    def warn(kmer_id: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
        nonlocal shown
        shown += 1
        if shown == calibration + 2:
            os.kill(os.getpid(), signal.SIGUSR2)
        return np.zeros(len(kmer_id), dtype=np.bool_)

    monkeypatch.setattr("had_pipe.job.load_teacher", lambda *_, **__: NumpyTeacher(spoil=warn))
    before = signal.getsignal(signal.SIGUSR2)
    result = had_pipe("extract-teacher", stage_one)
    assert result.exit_code == 75, result.output
    assert "run the same command again" in result.stderr
    assert signal.getsignal(signal.SIGUSR2) == before
    cache = stage_one.parent / "cache"
    made = sum(1 for _ in (cache / "parts").rglob("*.json"))
    assert 2 <= made < 6
    assert not list((cache / ".work" / "leases").glob("*.lock"))
    assert had_pipe("extract-teacher", stage_one).exit_code == 0
    assert had_pipe("cache", "verify", cache).exit_code == 0


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ('path = "g.fa"', 'path = "h.fa"', 3, "h.fa"),
        ('path = "g.fa"', 'path = "x.toml"', 3, "x.toml"),
        ("bases = 120", "bases = 6000", 2, "at most 1,020 bases"),
        ("bases = 120", "bases = 960\ninclude = 3", 2, "include"),
        ("demo/teacher", "demo/nobody", 3, "nobody"),
        ('["two"]', '["three"]', 2, "three"),
    ],
    ids=["no genome", "no FASTA", "beyond the teacher", "unknown key", "no teacher", "no contig"],
)
def test_bad_input_of_stage_one_is_told_and_leaves_nothing(
    stage_one: Path, old: str, new: str, code: int, said: str
) -> None:
    text = stage_one.read_text("utf-8")
    assert old in text
    stage_one.write_text(text.replace(old, new), "utf-8")
    result = had_pipe("extract-teacher", stage_one, "--device", "cpu")
    assert result.exit_code == code, result.output
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert not (stage_one.parent / "cache" / "plan.json").exists()


def test_doctor_says_which_kernel_runs_and_why() -> None:
    result = had_pipe("doctor")
    assert result.exit_code == 0
    assert "torch-chunked on cpu: " in result.stdout
    told = json.loads(had_pipe("doctor", "--json").stdout)
    assert told["had_pipe"] == __version__
    assert told["packages"]["torch"].startswith("2.")
    assert told["delta_rule"]["cpu"]["name"] == "torch-chunked"


def test_output_that_is_kept_in_a_file_has_no_colours(cache: Path) -> None:
    for environment in ({}, {"NO_COLOR": "1"}):
        done = in_a_process("cache", "inspect", cache, **environment)
        assert "\x1b" not in done.stdout + done.stderr


# What goes wrong: one small command that raises, behind the same door as every verb


def answer(error: BaseException) -> Result:
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    @shown.answering
    def fail() -> None:
        raise error

    return CliRunner().invoke(app, [])


def every_error() -> list[type[errors.HadPipeError]]:
    found = [errors.HadPipeError]
    for cls in found:
        found += cls.__subclasses__()
    return [cls for cls in found if cls.__module__ == "had_pipe.errors"][1:]


@pytest.mark.parametrize("cls", every_error(), ids=lambda cls: cls.__name__)
def test_every_error_is_a_message_and_its_exit_code(cls: type[errors.HadPipeError]) -> None:
    result = answer(cls("x.toml: [windows] bases = 7: must be [bold]6[/bold]"))
    assert result.exit_code == cls.exit_code
    assert result.stderr == "had-pipe: x.toml: [windows] bases = 7: must be [bold]6[/bold]\n"


def test_a_device_without_memory_is_a_message_and_not_a_bug() -> None:
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.25 GiB is free. Try else."
    result = answer(torch.OutOfMemoryError(said))
    assert result.exit_code == errors.StorageError.exit_code
    assert "1.25 GiB is free). What was finished is kept" in result.stderr
    assert "Try else" not in result.stderr
    assert isinstance(answer(RuntimeError("shapes differ")).exception, RuntimeError)


def test_ctrl_c_says_how_to_continue_and_exits_with_75() -> None:
    result = answer(KeyboardInterrupt())
    assert result.exit_code == 75
    assert "run the same command again to continue" in result.stderr


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EDQUOT, "the disk quota is used up"),
        (errno.EIO, "the disk reports an input/output error"),
        (errno.EROFS, "the file system is read-only"),
        (errno.ESTALE, "the network file system lost the file"),
        (errno.EACCES, "permission is denied"),
    ],
    ids=lambda x: errno.errorcode[x] if isinstance(x, int) else "",
)
def test_a_failing_disk_exits_with_6(number: int, said: str) -> None:
    result = answer(OSError(number, os.strerror(number), "/cache/x"))
    assert result.exit_code == 6
    assert result.stderr == (
        f"had-pipe: /cache/x: {said}. Everything committed so far is intact; mend that, then run "
        "the same command again\n"
    )
    assert answer(OSError(number, os.strerror(number))).stderr.startswith(f"had-pipe: {said}.")


def test_a_missing_extra_is_named_with_the_line_that_installs_it() -> None:
    result = answer(ModuleNotFoundError("No module named 'gtars'", name="gtars.refget"))
    assert result.exit_code == 2
    assert "pip install 'had-pipe[extract]'" in result.stderr


def test_a_bug_keeps_its_traceback_and_exits_with_1(tmp_path: Path) -> None:
    for bug in (ValueError("bug"), OSError(errno.ENOENT, "x"), ModuleNotFoundError(name="torch")):
        result = answer(bug)
        assert result.exit_code == 1
        assert result.exception is bug


# Progress


def a_moment(done: int, **changed: Any) -> Progress:
    return Progress(
        **{
            "what": "training",
            "total": 100,
            "unit": "steps",
            "seconds": 2.0 * done,
            "done": done,
            **changed,
        }
    )


def test_a_log_has_the_first_moment_one_a_minute_and_the_last() -> None:
    said: list[str] = []
    now = 0.0
    lines = shown.Lines(said.append, clock=lambda: now)
    for second in range(200):
        now = float(second)
        lines(a_moment(second // 2, seconds=now))
    assert [line.split("  ")[1] for line in said] == [
        "0 of 100 steps",
        "30 of 100 steps",
        "60 of 100 steps",
        "90 of 100 steps",
    ]
    lines.finish()
    assert said[-1].startswith("training  99 of 100 steps")
    lines.finish()
    assert len(said) == 5


def test_a_log_has_the_end_of_each_piece_of_work_at_once() -> None:
    said: list[str] = []
    lines = shown.Lines(said.append, clock=lambda: 0.0)
    lines(a_moment(1, total=0))
    lines(a_moment(2, total=0))
    lines(a_moment(3, what="validating"))
    lines(a_moment(100, what="validating"))
    assert [line.split("  ")[:2] for line in said] == [
        ["training", "1 steps"],
        ["training", "2 steps"],
        ["validating", "3 of 100 steps"],
        ["validating", "100 of 100 steps"],
    ]
    for _ in range(4):  # what is still to be put away says so again
        lines(a_moment(100, what="validating"))
    assert len(said) == 4
    lines(a_moment(1, total=2))
    lines(a_moment(2, total=2))
    assert [line.split("  ")[1] for line in said[-2:]] == ["1 of 2 steps", "2 of 2 steps"]


def test_a_line_of_progress_has_rate_time_left_and_facts() -> None:
    moment = Progress(
        what="extracting", done=1042, begun=42, total=7466, unit="windows", seconds=50.0,
        facts={"loss": 1.23456, "device": "cpu"},
    )  # fmt: skip
    assert shown.describe(moment) == (
        "extracting  1,042 of 7,466 windows  50 s  20 windows/s  5 min 21 s left  "
        "loss 1.235  device cpu"
    )
    assert shown.describe(a_moment(0)) == "training  0 of 100 steps  0.0 s"
    assert shown.describe(a_moment(3, total=0)) == "training  3 steps  6.0 s  0.5 steps/s"
    hashing = a_moment(1_000_000, what="verifying", total=4_000_000, unit="bytes", seconds=2.0)
    assert shown.describe(hashing) == "verifying  1 MB of 4 MB  2.0 s  500 kB/s  6.0 s left"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (60, "1 min 0 s"), (3599, "59 min 59 s"),
     (3600, "1 h 0 min"), (23040, "6 h 24 min")],
)  # fmt: skip
def test_time_is_said_in_two_units_at_most(seconds: float, said: str) -> None:
    assert shown.duration(seconds) == said
