"""The chunked rule against the rule itself: a step-by-step loop in float64, written here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from had_pipe.students import delta_rule, fla_backend
from had_pipe.students.delta_rule import (
    CHUNK,
    choose,
    chunked_rule,
    find_fault,
    gated_delta_rule,
    kernel,
)
from had_pipe.students.fla_backend import Shape, gradients_around_states

CPU = torch.device("cpu")
SHAPE = Shape(heads=3, key=32, value=64)
NAMES = ("output", "d_q", "d_k", "d_v", "d_log_decay", "d_beta")


def step_by_step(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, log_decay_BSH: Tensor, beta_BSH: Tensor
) -> Tensor:
    """S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T; o_t = S_t q_t / sqrt(K)."""
    B, S, H, K = q_BSHK.shape
    eye = torch.eye(K, dtype=q_BSHK.dtype)
    state_BHVK = q_BSHK.new_zeros(B, H, v_BSHV.shape[-1], K)
    outputs = []
    for t in range(S):
        k, v = k_BSHK[:, t], v_BSHV[:, t]
        b = beta_BSH[:, t, :, None, None]
        forget = eye - b * k.unsqueeze(-1) * k.unsqueeze(-2)
        a = log_decay_BSH[:, t, :, None, None].exp()
        state_BHVK = a * state_BHVK @ forget + b * v.unsqueeze(-1) * k.unsqueeze(-2)
        outputs.append((state_BHVK @ q_BSHK[:, t].unsqueeze(-1)).squeeze(-1) * K**-0.5)
    return torch.stack(outputs, dim=1)


def some_inputs(*, S: int, keys: str = "random", B: int = 2, H: int = 2, K: int = 8, V: int = 12):
    """Inputs in float64. `keys` repeat with period 1 (poly-A) or 2 (a dinucleotide repeat)."""
    random = torch.Generator().manual_seed(S)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    k = F.normalize(normal(B, S, H, K), dim=-1)
    log_decay, beta = -F.softplus(normal(B, S, H)) * 0.2, torch.sigmoid(normal(B, S, H))
    if keys != "random":
        period = {"poly-A": 1, "dinucleotide": 2}[keys]
        k = k[:, torch.arange(S) % min(period, S)]
        # Nothing forgets: what a Neumann series makes of this grows without bound.
        log_decay, beta = torch.zeros(B, S, H, dtype=torch.float64), torch.full((B, S, H), 0.9)
    return [
        F.normalize(normal(B, S, H, K), dim=-1),
        k,
        normal(B, S, H, V),
        log_decay,
        beta.double(),
    ]


def with_gradients(rule, inputs: list[Tensor], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    output = rule(*leaves)
    weight = torch.linspace(-1, 1, output.numel(), dtype=dtype).view_as(output).cos()
    return [output, *torch.autograd.grad((output * weight).sum(), leaves)]


def largest_error(found: Tensor, expected: Tensor) -> float:
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-3))


@pytest.mark.parametrize("S", [1, 5, 31, 32, 33, 63, 90, 170])
def test_output_and_all_gradients_equal_the_loop_at_any_length(S: int) -> None:
    inputs = some_inputs(S=S)
    expected = with_gradients(step_by_step, inputs)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-6)):
        found = with_gradients(gated_delta_rule, inputs, dtype)
        for name, a, b in zip(NAMES, found, expected, strict=True):
            assert a.dtype == dtype
            assert largest_error(a, b) < tolerance, (name, dtype)


@pytest.mark.parametrize("keys", ["poly-A", "dinucleotide"])
@pytest.mark.parametrize("S", [33, 170])
def test_repeats_do_not_explode(S: int, keys: str) -> None:
    inputs = some_inputs(S=S, keys=keys)
    expected = with_gradients(step_by_step, inputs)
    for chunk in (32, 64):
        found = with_gradients(
            lambda *x, chunk=chunk: gated_delta_rule(*x, chunk=chunk), inputs, torch.float32
        )
        for name, a, b in zip(NAMES, found, expected, strict=True):
            assert largest_error(a, b) < 2e-5, (name, chunk)


@pytest.mark.parametrize("S", [510, 1020, 2048])
def test_a_whole_window_equals_the_loop_at_the_real_head_width(S: int) -> None:
    inputs = some_inputs(S=S, B=1, H=3, K=32, V=64)
    expected = with_gradients(step_by_step, inputs)
    found = with_gradients(gated_delta_rule, inputs, torch.float32)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert largest_error(a, b) < 5e-6, name


def test_chunks_change_rounding_alone() -> None:
    inputs = some_inputs(S=100)
    by_chunk = [
        with_gradients(lambda *x, chunk=chunk: chunked_rule(*x, chunk=chunk), inputs)
        for chunk in (1, 7, 16, 32, 64, 128)
    ]
    for one, other in itertools.pairwise(by_chunk):
        for name, a, b in zip(NAMES, one, other, strict=True):
            assert largest_error(a, b) < 1e-12, name


def test_the_hardest_forgetting_stays_finite() -> None:
    q, k, v, _, beta = some_inputs(S=70)
    found = with_gradients(
        gated_delta_rule, [q, k, v, torch.full((2, 70, 2), -90.0), beta], torch.float32
    )
    assert all(bool(torch.isfinite(x).all()) for x in found)
    # With the past gone, a position reads only what it wrote itself.
    alone = (q * k).sum(-1, keepdim=True) * beta.unsqueeze(-1) * v * q.shape[-1] ** -0.5
    assert largest_error(found[0], alone) < 1e-5


def test_later_positions_never_reach_back() -> None:
    inputs = some_inputs(S=70)
    before = gated_delta_rule(*inputs)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, 40:] *= 0.5
    after = gated_delta_rule(*changed)
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_under_autocast_the_state_stays_in_single_precision() -> None:
    inputs = [x.float() for x in some_inputs(S=90)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = with_gradients(gated_delta_rule, inputs, torch.float32)
    for a, b in zip(inside, with_gradients(gated_delta_rule, inputs, torch.float32), strict=True):
        assert torch.equal(a, b)
    half = [x.bfloat16() for x in inputs[:3]]
    assert gated_delta_rule(*half, *inputs[3:]).dtype == torch.bfloat16


def other_chunks(*inputs: Tensor) -> Tensor:
    return chunked_rule(*inputs, chunk=2 * CHUNK)


def test_the_self_check_passes_a_right_kernel() -> None:
    assert find_fault(other_chunks, device=CPU, shape=SHAPE) is None


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_the_self_check_needs_no_gradients_around_it(around: Callable[[], Any]) -> None:
    with around(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_fault(other_chunks, device=CPU, shape=SHAPE) is None


@pytest.mark.parametrize(
    ("position", "name"), [(1, "the gradient of k"), (3, "log_decay"), (4, "beta")]
)
def test_the_self_check_finds_a_wrong_gradient_behind_a_right_output(
    position: int, name: str
) -> None:
    def miscompiled(*inputs: Tensor) -> Tensor:
        inputs_wrong = list(inputs)
        x = inputs[position]
        # The value of x with twice its gradient: what the Hopper fault looks like from outside.
        inputs_wrong[position] = 2 * x - x.detach()
        return chunked_rule(*inputs_wrong)

    fault = find_fault(miscompiled, device=CPU, shape=SHAPE)
    assert fault is not None
    assert name in fault


def test_the_self_check_finds_a_series_that_explodes_on_repeats() -> None:
    def explodes(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
        same = bool((k == k[:, :1]).all())
        return chunked_rule(q, k, v, log_decay, beta) * (1e16 if same else 1)

    fault = find_fault(explodes, device=CPU, shape=SHAPE)
    assert fault is not None
    assert "equal keys, torch.float32" in fault


def test_the_self_check_survives_a_kernel_that_refuses() -> None:
    def refuses(*inputs: Tensor) -> Tensor:
        raise RuntimeError("Triton >= 3.4.0 on Hopper is not supported\nsee the issue")

    fault = find_fault(refuses, device=CPU, shape=SHAPE)
    assert fault == "RuntimeError: Triton >= 3.4.0 on Hopper is not supported"


def test_without_cuda_the_torch_path_runs_and_says_so() -> None:
    assert kernel("cpu").name == "torch-chunked"
    assert "CUDA" in kernel("cpu").reason


@pytest.mark.parametrize("S", [1, 7, 8, 21])
def test_the_part_that_fla_borrows_gives_the_gradients_of_its_three_formulas(S: int) -> None:
    chunk, B, H, K, V, scale = 8, 2, 3, 4, 6, 0.5
    N = -(-S // chunk)
    random = torch.Generator().manual_seed(S)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q, k, w = (normal(B, S, H, K).requires_grad_() for _ in range(3))
    u, d_o, d_u = (normal(B, S, H, V) for _ in range(3))
    h, d_h = (normal(B, N, H, K, V) for _ in range(2))
    # A decay of 2^-300 over a chunk: a path from 0 to it would overflow.
    g = torch.cat(
        [(-40 * normal(B, len(x), H).abs()).cumsum(1) for x in torch.arange(S).split(chunk)], 1
    ).requires_grad_()

    total = torch.zeros((), dtype=torch.float64)
    for b, n, a in itertools.product(range(B), range(N), range(H)):
        start, end = n * chunk, min(n * chunk + chunk, S)
        last = g[b, end - 1, a]
        state = last.exp2() * h[b, n, a]
        for i in range(start, end):
            o = g[b, i, a].exp2() * q[b, i, a] @ h[b, n, a]
            for j in range(start, i + 1):
                mix = (g[b, i, a] - g[b, j, a]).exp2() * (q[b, i, a] @ k[b, j, a])
                o = o + mix * u[b, j, a]
            state = state + (last - g[b, i, a]).exp2() * torch.outer(k[b, i, a], u[b, i, a])
            total = total + scale * (o @ d_o[b, i, a]) - (w[b, i, a] @ h[b, n, a]) @ d_u[b, i, a]
        total = total + (state * d_h[b, n, a]).sum()
    d_q, d_k, d_w, d_g = torch.autograd.grad(total, [q, k, w, g])

    with torch.no_grad():
        found = gradients_around_states(
            q_BSHK=q,
            k_BSHK=k,
            u_BSHV=u,
            d_o_BSHV=d_o,
            h_BNHKV=h,
            d_h_BNHKV=d_h,
            d_u_BSHV=d_u,
            g_BSH=g,
            scale=scale,
            chunk=chunk,
        )
    # Decays come in units of the natural logarithm, of which 2^g holds ln 2.
    for name, a, b in zip(
        ("q", "k", "w", "g"), found, (d_q, d_k, d_w, d_g / math.log(2)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=name)


def faults(*told: str | None) -> Callable[[], str | None]:
    """A check that says one after the other."""
    left = iter(told)
    return lambda: next(left)


def test_fla_runs_as_it_is_where_it_is_right() -> None:
    chosen = choose(faults(None), device=CPU, name="a card", shape=SHAPE)
    assert chosen.name == "fla"
    assert (CPU, SHAPE) not in fla_backend._taken


def test_where_our_part_cannot_be_offered_the_torch_path_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def absent() -> None:
        raise ImportError("cannot import name 'register' from 'fla.backends'")

    monkeypatch.setattr(fla_backend, "_register", absent)
    chosen = choose(faults("it refuses"), device=CPU, name="a card", shape=SHAPE)
    assert chosen.name == "torch-chunked"
    assert "it refuses" in chosen.reason
    assert "cannot import name 'register'" in chosen.reason
    assert chosen.reason in caplog.text


@pytest.fixture
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.mark.gpu
@pytest.mark.parametrize("keys", ["random", "poly-A", "dinucleotide"])
@pytest.mark.parametrize("S", [90, 170, 1020, 2048])
def test_on_a_gpu_whatever_runs_equals_the_loop(gpu: torch.device, S: int, keys: str) -> None:
    inputs = some_inputs(S=S, keys=keys, B=1, H=3, K=32, V=64)
    if keys != "random":
        # What never forgets amplifies a kernel's rounding (tf32) with every position.
        inputs[3] = torch.full_like(inputs[3], -0.1)
    expected = with_gradients(step_by_step, inputs)

    def on_gpu(*leaves: Tensor) -> Tensor:
        return gated_delta_rule(*(x.to(gpu) for x in leaves)).cpu()

    found = with_gradients(on_gpu, inputs, torch.float32)
    tolerance = 1e-4 if kernel(gpu).name == "torch-chunked" else 2e-2 if keys == "random" else 1e-1
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert largest_error(a, b) < tolerance, (name, kernel(gpu))


@pytest.mark.gpu
def test_on_a_gpu_fla_is_right_with_our_part(gpu: torch.device) -> None:
    pytest.importorskip("fla.ops.gated_delta_rule", reason="flash-linear-attention is not here")
    needed = kernel(gpu).name == "fla+torch"
    fla_backend.take_over(gpu, SHAPE)
    try:
        assert find_fault(delta_rule._fla_rule, device=gpu, shape=SHAPE) is None
    finally:
        if not needed:
            fla_backend.give_back(gpu, SHAPE)
