"""What a teacher computes in: type, threads, batches, compiled kernels, and what each moves."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from had_pipe.teachers import numerics
from had_pipe.teachers.ntv2 import NTv2, NTv2Config, NTv2Teacher, random_model
from had_pipe.teachers.ntv2_checkpoint import load_checkpoint
from had_pipe.teachers.numerics import compute_dtype, fit_threads, usable_processors

CPU = torch.device("cpu")
SMALL = NTv2Config(
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    layer_norm_eps=1e-5,
)
"""The oracle's shape: what another test compiled serves here too."""
OTHER = NTv2Config(hidden_size=40, num_hidden_layers=2, num_attention_heads=2, intermediate_size=56)
"""A shape that no test compiles."""
WIDE = NTv2Config(
    hidden_size=512, num_hidden_layers=2, num_attention_heads=16, intermediate_size=2048
)
"""The width of the 50m checkpoint, whose inner sums are the first that MKL may divide."""


def a_teacher(
    model: NTv2,
    *,
    device: torch.device = CPU,
    compute: torch.dtype = torch.float32,
    compiled: bool | None = None,
) -> NTv2Teacher:
    return NTv2Teacher(
        model,
        name="one",
        revision=None,
        weights_sha256="0" * 64,
        licence="MIT",
        layer=-1,
        device=device,
        compute=compute,
        compiled=compiled,
    )


def some_windows(windows: int, kmers: int) -> tuple[np.ndarray, np.ndarray]:
    """K-mers, the first window nothing but poly-A, and some hidden ones."""
    generator = np.random.default_rng(0)
    kmer_id_WT = generator.integers(0, 4096, (windows, kmers)).astype(np.uint16)
    kmer_id_WT[0] = 0
    return kmer_id_WT, generator.random((windows, kmers)) < 0.15


def in_batches(teacher: NTv2Teacher, *, of: int, windows: int = 16, kmers: int = 85) -> np.ndarray:
    kmer_id_WT, hidden_WT = some_windows(windows, kmers)
    parts = [
        teacher.embed(kmer_id_WT[i : i + of], hidden_WT[i : i + of]).float().cpu()
        for i in range(0, windows, of)
    ]
    return torch.cat(parts).numpy()


# --- the type of products ------------------------------------------------------------------------


def test_auto_is_bfloat16_on_cuda_and_where_a_cpu_has_tiles_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for tiles, expected in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=tiles: has)
        assert compute_dtype(CPU) == expected
        assert compute_dtype(torch.device("cuda")) == torch.bfloat16
        assert compute_dtype(CPU, "float32") == torch.float32
        assert compute_dtype(torch.device("cuda"), "float32") == torch.float32
        assert compute_dtype(CPU, "bfloat16") == torch.bfloat16


def test_two_builds_of_one_torch_for_a_gpu_are_two_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "one")
    told = []
    for build in ("12.8", "13.0"):
        monkeypatch.setattr(torch.version, "cuda", build)
        told.append(numerics.numerics(torch.device("cuda"), compute=torch.bfloat16, kernels="sdpa"))
    assert [one.pop("cuda") for one in map(dict, told)] == ["12.8", "13.0"]
    assert told[0]["device"] == told[1]["device"] == "cuda:one"


# --- threads -------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("quotas", "usable"),
    [
        ({}, 8),
        ({"job": "max 100000"}, 8),
        ({"job": "200000 100000"}, 2),
        ({"job": "150000 100000"}, 2),
        ({"job": "50000 100000"}, 1),
        ({".": "300000 100000", "job": "max 100000"}, 3),
        ({"job": "400000 100000", "job/task": "900000 100000"}, 4),
    ],
    ids=["none", "max", "two", "one-and-a-half", "half", "above", "several"],
)
def test_usable_processors_follow_the_quotas_of_the_cgroup_and_of_those_above_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quotas: dict[str, str], usable: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    (tmp_path / "groups" / "job" / "task").mkdir(parents=True)
    for group, quota in quotas.items():
        (tmp_path / "groups" / group / "cpu.max").write_text(quota + "\n")
    (tmp_path / "cpu.max").write_text("100000 100000\n")  # outside: no group of ours
    own = tmp_path / "own"
    own.write_text("12:cpu:/other\n0::/job/task\n")
    assert usable_processors(cgroups=tmp_path / "groups", own=own) == usable
    own.unlink()
    assert usable_processors(cgroups=tmp_path / "groups", own=own) == 8


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_usable_processors_follow_the_affinity() -> None:
    one = min(os.sched_getaffinity(0))
    code = (
        f"import os; os.sched_setaffinity(0, {{{one}}}); "
        "from had_pipe.teachers.numerics import usable_processors; print(usable_processors())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.stdout == "1\n"


@pytest.mark.usefixtures("threads")
def test_threads_are_held_to_usable_processors_unless_somebody_said_how_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(numerics, "usable_processors", lambda: 2)
    monkeypatch.setenv("MKL_NUM_THREADS", "")
    for name, said, counted, expected in (
        ("OMP_NUM_THREADS", "", 3, 2),
        ("OMP_NUM_THREADS", "", 1, 1),
        ("OMP_NUM_THREADS", "3", 3, 3),
        ("MKL_NUM_THREADS", "3", 3, 3),
    ):
        monkeypatch.setenv("OMP_NUM_THREADS", "")
        monkeypatch.setenv(name, said)
        torch.set_num_threads(counted)
        fit_threads()
        assert torch.get_num_threads() == expected


# --- the size of a batch -------------------------------------------------------------------------


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("of", ["demo", "wide"])
def test_on_one_thread_a_window_has_the_same_bits_in_any_batch(
    of: str, compute: torch.dtype
) -> None:
    torch.set_num_threads(1)
    demo = REPOSITORY / "pipelines" / "demo" / "teacher"
    model = load_checkpoint(demo) if of == "demo" else random_model(WIDE, seed=0)
    teacher = a_teacher(model, compute=compute)
    together = in_batches(teacher, of=16)
    for batch in (1, 3):
        assert np.array_equal(in_batches(teacher, of=batch), together)


@pytest.mark.slow
@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch is built without MKL here")
def test_mkl_told_to_sum_in_one_order_gives_the_same_bits_on_several_threads() -> None:
    """The first check shows that it has to be told: two threads share the longest sums."""
    code = """
import numpy as np, torch
from test_numerics import WIDE, a_teacher, in_batches, random_model
teacher = a_teacher(random_model(WIDE, seed=0))
together = in_batches(teacher, of=16)
far = max(float(np.abs(in_batches(teacher, of=of) - together).max()) for of in (1, 3))
print(teacher.numerics.get("mkl"), teacher.numerics["threads"], far)
"""
    for told, largest in (("AUTO,STRICT", 0.0), (None, 1e-5)):
        env = {**os.environ, "OMP_NUM_THREADS": "2", "PYTHONPATH": str(REPOSITORY / "tests")}
        for name in ("MKL_CBWR", "MKL_NUM_THREADS"):  # Dask sets the second in whoever uses it
            env.pop(name, None)
        done = subprocess.run(
            [sys.executable, "-c", code],
            check=True,
            cwd=REPOSITORY,
            env=env | ({"MKL_CBWR": told} if told else {}),
            capture_output=True,
            text=True,
        )
        mkl, threads, far = done.stdout.split()
        assert (mkl, threads) == (str(told), "2")
        assert float(far) <= largest


# --- compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("threads")
def test_compiled_a_window_has_the_same_bits_in_any_batch_and_blocks_share_one_graph() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("no C++ compiler here")
    from torch._dynamo.utils import counters

    torch.set_num_threads(1)
    teacher = a_teacher(random_model(SMALL, seed=0), compiled=True)
    assert teacher.numerics["kernels"] == "sdpa+compile"
    before = counters["stats"]["unique_graphs"]
    together = in_batches(teacher, of=16, kmers=20)
    assert counters["stats"]["unique_graphs"] == before + 1
    assert np.array_equal(in_batches(teacher, of=1, kmers=20), together)
    plain = in_batches(a_teacher(random_model(SMALL, seed=0)), of=16, kmers=20)
    assert float(np.abs(plain - together).max()) < 2e-5


@pytest.mark.parametrize("why", ["no compiler", "TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_where_compiling_fails_the_log_says_so_once_and_numerics_too(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    from torch._dynamo import config as dynamo
    from torch._inductor import config as inductor

    told = contextlib.nullcontext()
    if why == "no compiler":
        told = inductor.patch({"cpp.cxx": (None, "no-such-compiler"), "force_disable_caches": True})
    elif why == "TORCH_COMPILE_DISABLE":  # read when torch is loaded
        told = dynamo.patch(disable=True)
    else:
        monkeypatch.setenv(why, "1")
    with told, caplog.at_level(logging.WARNING):
        teacher = a_teacher(random_model(OTHER, seed=0), compiled=True)
        found = in_batches(teacher, of=4, windows=4, kmers=20)
    (said,) = [record.message for record in caplog.records if record.name.startswith("had_pipe")]
    assert "could not be compiled and run uncompiled" in said
    assert {"no compiler": "no-such-compiler"}.get(why, why) in said
    plain = a_teacher(random_model(OTHER, seed=0))
    assert teacher.numerics == plain.numerics
    assert np.array_equal(found, in_batches(plain, of=4, windows=4, kmers=20))


# --- CUDA ----------------------------------------------------------------------------------------


@pytest.fixture
def cuda() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return torch.device("cuda")


DEEP = NTv2Config(
    hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=1024
)


def cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    a, b = one.astype(np.float64), other.astype(np.float64)
    product = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.asarray((a * b).sum(-1) / product)


@pytest.mark.gpu
def test_cuda_is_compiled_and_in_bfloat16_unless_told_otherwise(cuda: torch.device) -> None:
    model = random_model(SMALL, seed=0)
    teacher = NTv2Teacher(
        model,
        name="one",
        revision=None,
        weights_sha256="0" * 64,
        licence="MIT",
        layer=-1,
        device=cuda,
    )
    assert teacher.numerics["kernels"] == "sdpa+compile"
    assert teacher.dtype == teacher.numerics["dtype"] == "bfloat16"
    kmer_id_WT, hidden_WT = some_windows(2, 20)
    feat_WTD = teacher.embed(kmer_id_WT, hidden_WT)
    assert (feat_WTD.device.type, feat_WTD.dtype) == ("cuda", torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_cuda_in_float32_equals_the_cpu(cuda: torch.device, fused: bool) -> None:
    here = in_batches(a_teacher(random_model(DEEP, seed=0)), of=4, windows=4)
    teacher = a_teacher(random_model(DEEP, seed=0), device=cuda, compiled=fused)
    there = in_batches(teacher, of=4, windows=4)
    print("largest difference", np.abs(there - here).max())
    assert float(np.abs(there - here).max()) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_cuda_in_bfloat16_keeps_the_direction_of_every_token(
    cuda: torch.device, fused: bool
) -> None:
    here = in_batches(a_teacher(random_model(DEEP, seed=0)), of=4, windows=4)
    teacher = a_teacher(
        random_model(DEEP, seed=0), device=cuda, compute=torch.bfloat16, compiled=fused
    )
    there = cosine(in_batches(teacher, of=4, windows=4), here)
    print("cosine with float32: least", there.min(), "mean", there.mean())
    assert there.mean() >= 0.999


@pytest.mark.gpu
def test_cuda_compiled_equals_eager_but_for_rounding_and_itself_in_every_bit(
    cuda: torch.device,
) -> None:
    fused, plain = (
        a_teacher(random_model(DEEP, seed=0), device=cuda, compute=torch.bfloat16, compiled=fused)
        for fused in (True, False)
    )
    assert (fused.numerics["kernels"], plain.numerics["kernels"]) == ("sdpa+compile", "sdpa")
    found = in_batches(fused, of=8)
    near = cosine(found, in_batches(plain, of=8))
    print("cosine with eager: least", near.min(), "mean", near.mean())
    assert near.mean() >= 0.9999
    assert np.array_equal(in_batches(fused, of=8), found)
    again = a_teacher(
        random_model(DEEP, seed=0), device=cuda, compute=torch.bfloat16, compiled=True
    )
    assert np.array_equal(in_batches(again, of=8), found)
    for batch in (1, 3):
        far = np.abs(in_batches(fused, of=batch) - found)
        print("batches of", batch, "largest difference", far.max(), "equal", (far == 0).mean())
        assert cosine(in_batches(fused, of=batch), found).mean() >= 0.9999


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "compiled"])
def test_cuda_is_never_waited_for_and_wants_no_more_memory_by_and_by(
    cuda: torch.device, fused: bool
) -> None:
    teacher = a_teacher(
        random_model(DEEP, seed=0), device=cuda, compute=torch.bfloat16, compiled=fused
    )
    kmer_id_WT, hidden_WT = some_windows(16, 170)
    for _ in range(3):  # compiled, tables made, memory taken
        teacher.embed(kmer_id_WT, hidden_WT)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            teacher.embed(kmer_id_WT, hidden_WT)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    first = torch.cuda.max_memory_allocated()
    assert torch.cuda.memory_allocated() == before
    for _ in range(20):
        teacher.embed(kmer_id_WT, hidden_WT)
    assert torch.cuda.max_memory_allocated() == first
