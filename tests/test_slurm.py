"""The SLURM scripts: they say what they should, and make one cache whatever the queue does."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from test_corpus import random_letters, write_fasta
from test_extract import assert_same_bytes

from had_pipe.cache import Cache

SLURM = REPOSITORY / "pipelines" / "slurm"

pytestmark = pytest.mark.skipif(
    not SLURM.exists(), reason="the pipelines lie in the repository, not in a package"
)

SCRIPTS = ("extract.sbatch", "finish.sbatch", "submit.sh", "distill.sbatch")


def directives(name: str) -> dict[str, str]:
    """What a script asks SLURM for."""
    text = (SLURM / name).read_text()
    return dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", text, re.MULTILINE))


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_shell_reads_the_scripts_and_shellcheck_has_nothing_to_say(name: str) -> None:
    subprocess.run(["bash", "-n", SLURM / name], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SLURM / name], check=True)


@pytest.mark.parametrize("name", ["extract.sbatch", "finish.sbatch"])
def test_jobs_are_warned_in_time_and_may_come_back(name: str) -> None:
    asked = directives(name)
    assert asked["signal"] == "B:USR2@120"
    assert "requeue" in asked
    assert asked["open-mode"] == "append"
    assert asked["gres"] == "gpu:1"


@pytest.mark.parametrize(
    ("given", "finish"),
    [
        ([], []),
        (["--array=1-4"], []),
        (["--array", "1-4", "--partition=gpu"], ["--partition=gpu"]),
        (["-p", "gpu", "-a", "1-4", "-A", "lab"], ["-p", "gpu", "-A", "lab"]),
        (["-a1-4", "--time=1:00"], ["--time=1:00"]),
    ],
)
def test_the_job_that_finishes_is_none_of_the_array(
    tmp_path: Path, given: list[str], finish: list[str]
) -> None:
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\necho "$@" >> {tmp_path}/asked\necho 7\n')
    (tmp_path / "sbatch").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run([SLURM / "submit.sh", "r", "c", *given], env=environment, check=True)
    array, last = (line.split() for line in (tmp_path / "asked").read_text().splitlines())
    assert array == ["--parsable", *given, str(SLURM / "extract.sbatch"), "r"]
    script = str(SLURM / "finish.sbatch")
    assert last == ["--parsable", *finish, "--dependency=afterany:7", script, "r", "c"]


# A queue of one machine: jobs run one after another, are warned once, and come back when they ask.

FAKE = r"""
import json, os, pathlib, re, signal, subprocess, sys, threading, time

state = pathlib.Path(__file__).parent
if pathlib.Path(sys.argv[0]).name == "scontrol":
    assert sys.argv[1] == "requeue", sys.argv
    (state / f"requeued-{sys.argv[2]}").touch()
    sys.exit(0)

options, rest = [], sys.argv[1:]
while rest[0].startswith("-"):
    options.append(rest.pop(0))
script = pathlib.Path(rest[0])
given = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", script.read_text(), re.MULTILINE))
given |= dict((option[2:] + "=").split("=")[:2] for option in options)
number = len(list(state.glob("job-*"))) + 1
(state / f"job-{number}").write_text(json.dumps({"given": given, "script": script.name}))
first, last = map(int, given.get("array", "0-0").split("-"))


def warn(process):
    while not list(pathlib.Path(os.environ["FAKE_CACHE"]).glob("parts/*/*/*.json")):
        time.sleep(0.01)
    process.send_signal(signal.SIGUSR2)


for task in range(first, last + 1):
    name = f"{number}_{task}" if "array" in given else str(number)
    environment = {**os.environ, "SLURM_JOB_ID": str(number)}
    if "array" in given:
        environment |= {
            "SLURM_ARRAY_JOB_ID": str(number),
            "SLURM_ARRAY_TASK_ID": str(task),
            "SLURM_ARRAY_TASK_COUNT": str(last - first + 1),
        }
    while True:
        with (state / f"log-{name}").open("ab") as log:
            job = subprocess.Popen(
                ["bash", *map(str, rest)], env=environment, stdout=log, stderr=log
            )
            if task == 1 and not (state / "warned").exists():
                (state / "warned").touch()
                threading.Thread(target=warn, args=[job], daemon=True).start()
            code = job.wait()
        with (state / "ended").open("a") as ended:
            ended.write(f"{name} {code}\n")
        if not (state / f"requeued-{name}").exists():
            break
        (state / f"requeued-{name}").unlink()
print(number)
"""


def a_recipe_to_run(folder: Path, *, views: int) -> Path:
    """A recipe with a small random network, for the installed command."""
    from had_pipe.teachers.ntv2 import NTv2Config, random_model
    from had_pipe.teachers.ntv2_checkpoint import save_checkpoint

    letters = {"piece": random_letters(np.random.default_rng(3), 12_000)}
    write_fasta(folder / "piece.fa", letters)
    config = NTv2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    save_checkpoint(
        random_model(config, seed=5, head="language"), folder / "ntv2", extra={"licence": "MIT"}
    )
    (folder / "x.toml").write_text(
        f"""
[teacher]
name = "./ntv2"
dtype = "float32"
unchecked = true

[[genome]]
name = "piece"
path = "piece.fa"
splits = {{ blocks = 3_000, valid = 0.2 }}

[windows]
bases = 120
stride = 120
views = {views}

[cache]
path = "cache"
part = 4
"""
    )
    return folder / "x.toml"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_array_that_is_warned_comes_back_and_makes_the_cache_of_one_process(
    tmp_path: Path,
) -> None:
    queue = tmp_path / "queue"
    queue.mkdir()
    for name in ("sbatch", "scontrol"):
        (queue / name).write_text(f"#!{sys.executable}{FAKE}")
        (queue / name).chmod(0o755)
    folder = tmp_path / "here"
    folder.mkdir()
    recipe = a_recipe_to_run(folder, views=10)
    programs = Path(sys.executable).parent
    environment = {
        **os.environ,
        "PATH": f"{queue}:{programs}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "FAKE_CACHE": str(folder / "cache"),
    }
    said = subprocess.run(
        [SLURM / "submit.sh", recipe, folder / "cache", "--array=1-2", "--partition=gpu"],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert said == "array 1, then 2\n"
    logs = {path.name: path.read_text() for path in queue.glob("log-*")}
    # Warned in the middle, put back, done; then the second share, and the job that finishes.
    ended = (queue / "ended").read_text().splitlines()
    assert ended == ["1_1 75", "1_1 0", "1_2 0", "2 0"]
    assert "put back into the queue: 1_1" in logs["log-1_1"]
    assert "run the same command again" in logs["log-1_1"]
    assert "Traceback" not in "".join(logs.values())
    assert '"dependency": "afterany:1"' in (queue / "job-2").read_text()
    assert '"array"' not in (queue / "job-2").read_text()
    cache = Cache.open(folder / "cache")
    assert cache.id in logs["log-2"]

    (tmp_path / "alone").mkdir()
    for name in ("x.toml", "piece.fa"):
        shutil.copy(folder / name, tmp_path / "alone" / name)
    shutil.copytree(folder / "ntv2", tmp_path / "alone" / "ntv2")
    subprocess.run(
        [programs / "had-pipe", "extract-teacher", tmp_path / "alone" / "x.toml"],
        env=environment,
        check=True,
        capture_output=True,
    )
    assert_same_bytes(folder / "cache", tmp_path / "alone" / "cache")


# dask-jobqueue


def test_the_jobs_of_dask_jobqueue_offer_a_device_and_end_before_slurm_ends_them() -> None:
    jobqueue = pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    example = load(SLURM / "dask_slurm.py")
    script = jobqueue.slurm.SLURMJob(
        scheduler="tcp://login:8786", name="worker", queue="gpu", account="lab", **example.OPTIONS
    ).job_script()
    asked = dict(re.findall(r"^#SBATCH (-{1,2}[A-Za-z-]+)[= ]?(.*)$", script, re.MULTILINE))
    assert asked["-p"] == "gpu"
    assert asked["-A"] == "lab"
    assert asked["--gres"] == "gpu:1"
    assert asked["-t"] == "04:00:00"
    worker = script[script.index("dask_worker") :].split()
    told = {word: worker[i + 1] for i, word in enumerate(worker[:-1]) if word.startswith("--")}
    assert told["--resources"] == "GPU=1"
    assert told["--nthreads"] == "2"
    minutes = int(told["--lifetime"].rstrip("m")) + int(told["--lifetime-stagger"].rstrip("m"))
    assert minutes < 4 * 60
    without = jobqueue.slurm.SLURMJob(
        scheduler="tcp://login:8786",
        name="worker",
        **{**example.OPTIONS, "job_directives_skip": ["--mem"]},
    ).job_script()
    assert "--mem=" in script
    assert "--mem=" not in without


def load(path: Path) -> Any:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
