"""benchmarks/teacher.py and online_vs_cached.py: the peer is right, and so is what they count."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Script
from test_ntv2 import ORACLE, hub_weights, random_weights
from torch.utils.flop_counter import FlopCounterMode

from had_pipe.teachers.ntv2 import NTv2Config
from had_pipe.teachers.ntv2_checkpoint import hub_shapes

CPU = torch.device("cpu")
SMALL = NTv2Config(
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=80,
)


def eager(
    script: Script,
    weights: Mapping[str, np.ndarray],
    config: NTv2Config,
    *,
    dtype: torch.dtype = torch.float32,
) -> Callable[[torch.Tensor], torch.Tensor]:
    peer: Callable[[torch.Tensor], torch.Tensor] = script("eager_ntv2").EagerNTv2(
        {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in weights.items()},
        heads=config.num_attention_heads,
        eps=config.layer_norm_eps,
        device=CPU,
        dtype=dtype,
    )
    return peer


def test_the_peer_equals_the_reference_implementation(
    script: Script, shared: Callable[[str], Path]
) -> None:
    oracle = dict(np.load(shared("oracle/ntv2_reference.npz")))
    peer = eager(script, hub_weights(oracle), ORACLE)
    rows = [(oracle["ids_long"], oracle["outlong/embeddings_3"])]
    for ids, out in (("ids", "out"), ("ids_masked", "outmasked")):
        for token, expected in zip(oracle[ids], oracle[f"{out}/embeddings_3"], strict=True):
            real = int((token != 1).sum())  # padding stands at the end
            rows.append((token[None, :real], expected[None, :real]))
    for token, expected in rows:
        found = peer(torch.from_numpy(token.astype(np.int64)))
        assert np.abs(found.numpy() - expected).max() < 2e-5


def test_the_peer_equals_ours_in_float32_and_is_near_in_bfloat16(
    script: Script, tmp_path: Path
) -> None:
    teacher = script("teacher")
    checkpoint = teacher.Checkpoint("small", SMALL, tmp_path, CPU)
    windows = teacher.some_windows(4, 80, device=CPU)
    ours, peers = (
        [make(dtype) for dtype in (torch.float32, torch.bfloat16)]
        for make in (checkpoint.ours, checkpoint.peer)
    )
    expected = ours[0].embed(windows.kmer_id, windows.hidden)
    found = peers[0](windows.token)[:, 1:]
    assert float((found - expected).abs().max()) < 2e-5
    # In half precision they round in different places: neither is the other's.
    for rounded in (
        ours[1].embed(windows.kmer_id, windows.hidden),
        peers[1](windows.token)[:, 1:],
    ):
        assert rounded.dtype == torch.bfloat16
        cosine = torch.cosine_similarity(rounded.float(), expected, dim=-1)
        assert 0.995 < float(cosine.min()) < 1


def test_what_is_counted_is_what_the_peer_multiplies(script: Script) -> None:
    teacher = script("teacher")
    peer = eager(script, random_weights(SMALL, seed=1), SMALL)
    token = torch.arange(6, 6 + 3 * 31).reshape(3, 31)
    with FlopCounterMode(display=False) as counted:
        peer(token)
    flops = teacher.flops_per_token(SMALL, tokens=31)
    assert counted.get_total_flops() == flops * token.numel()


@pytest.mark.parametrize(
    ("tokens", "megaflops"), [(175, 993.9), (172, 993.5), (344, 1013.9), (2001, 1210.8)]
)
def test_a_token_of_the_largest_shape_costs_what_is_known_of_it(
    script: Script, tokens: int, megaflops: float
) -> None:
    teacher = script("teacher")
    found = teacher.flops_per_token(teacher.SHAPES["500m"], tokens=tokens)
    assert found / 1e6 == pytest.approx(megaflops, abs=0.06)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("50m", 55_904_972), ("100m", 97_889_132), ("250m", 235_120_780), ("500m", 498_345_436)],
)
def test_the_shapes_are_the_published_ones(script: Script, name: str, parameters: int) -> None:
    shapes = hub_shapes(script("teacher").SHAPES[name])
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


def test_features_that_are_wrong_are_not_timed(script: Script) -> None:
    teacher = script("teacher")
    reference = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    teacher.check("same", reference, reference, reference)
    wrong = reference.clone()
    wrong[1, 3, 2] += 0.01
    with pytest.raises(AssertionError):
        teacher.check("off", wrong, reference, reference)
    turned = reference.bfloat16()
    teacher.check("rounded", turned, turned, reference)
    turned[0, 1] = turned[0, 1].roll(1)
    with pytest.raises(AssertionError):
        teacher.check("off", turned, turned, reference)


def test_the_teachers_benchmark_runs_and_tells_what_it_found(
    script: Script, tmp_path: Path
) -> None:
    teacher = script("teacher")
    size = teacher.Size(
        (teacher.Cell("50m", 120, 3, variants=False),),
        rounds=2,
        seconds=0.0,
        product=64,
        numerics_shape="50m",
        numerics_windows=4,
        compiled=False,
    )
    result = teacher.measure(size, tmp_path, device=CPU, shapes={"50m": SMALL})
    assert json.loads(json.dumps(result)) == result
    (cell,) = result["cells"]
    ways = cell["dtypes"][result["dtype"]]["ways"]
    assert set(ways) == {"peer", "ours"}
    assert ways["peer"]["ratio_eager"] == 1
    assert result["ratio_eager"] == ways["ours"]["ratio_eager"] > 0
    assert result["peak_share"] > 0
    rate = ways["ours"]["tokens_per_second"]
    assert ways["ours"]["bases_per_second"] == pytest.approx(rate * 120 / 21)
    assert ways["ours"]["minutes_for_genome"] * 60 * rate * 120 / 21 == pytest.approx(3.1e9)
    found = result["numerics"]["found"]
    assert found["bfloat16 against float32"]["lowest_cosine"] > 0.99
    # In bfloat16, which a CPU with tiles computes in, a rounding is as large as this.
    largest = 2e-5 if result["dtype"] == "float32" else 0.1
    assert found[f"{result['dtype']}: batches of 1 against 4"]["largest"] < largest
    told = teacher.table(result)
    assert "50m, 120 bases: 3 windows of 21 tokens" in told
    assert all(name in told for name in ways)


@pytest.mark.gpu
def test_on_cuda_the_peer_and_a_graph_say_what_the_teacher_says(
    script: Script, tmp_path: Path
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    teacher, cuda = script("teacher"), torch.device("cuda")
    config = replace(SMALL, hidden_size=64)  # heads that every kernel takes
    checkpoint = teacher.Checkpoint("small", config, tmp_path, cuda)
    windows = teacher.some_windows(6, 80, device=cuda)
    exact = checkpoint.peer(torch.float32)(windows.token)[:, 1:]
    found = checkpoint.ours(torch.float32).embed(windows.kmer_id, windows.hidden)
    assert float((found - exact).abs().max()) < 1e-4
    half = checkpoint.ours(torch.bfloat16).embed(windows.kmer_id, windows.hidden)
    play = teacher.replayed(checkpoint.model(), windows, dtype=torch.bfloat16)
    play()
    for rounded, expected in ((half, exact), (play(), half.float())):
        assert rounded.dtype == torch.bfloat16
        cosine = torch.cosine_similarity(rounded.float(), expected, dim=-1)
        assert float(cosine.mean()) > 0.999


def test_online_and_cached_steps_are_held_against_each_other(
    script: Script, tmp_path: Path
) -> None:
    online = script("online_vs_cached")
    size = online.Size((online.Case("50m", 120, batch=2, windows=8, steps=2),), rounds=1)
    result = online.measure(size, tmp_path, device=CPU, shapes={"50m": SMALL})
    assert json.loads(json.dumps(result)) == result
    (case,) = result["cases"]
    assert case["check"]["largest_difference"] <= 1e-6
    assert case["check"]["equal_targets"] == 1
    assert result["ratio_step"] == case["ratio_step"] > 0
    assert set(case["ratio_runs"]) == {"1", "2", "5", "10"}
    assert f"x {case['ratio_step']:.2f}" in online.table(result)


def test_a_teacher_that_says_something_else_than_the_cache_stops_the_comparison(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = script("online_vs_cached")
    true = online.Online.batch

    def shifted(self: object, number: int) -> object:
        batch = true(self, number)
        batch.target[0] += 0.1
        return batch

    monkeypatch.setattr(online.Online, "batch", shifted)
    size = online.Size((online.Case("50m", 120, batch=2, windows=8, steps=2),), rounds=1)
    with pytest.raises(AssertionError, match="losses differ"):
        online.measure(size, tmp_path, device=CPU, shapes={"50m": SMALL})
