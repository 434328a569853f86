"""The gated delta rule (Yang, Kautz and Hatamizadeh 2025, arXiv 2412.06464), forward and backward.

The rule, for one head, state S (V, K), zero before the first position:

    S_t = a_t S_{t-1} (I - b_t k_t k_t^T) + b_t v_t k_t^T,    o_t = S_t q_t / sqrt(K)

Ours is plain torch on any device: positions are cut into chunks; within a chunk the rule is one
triangular system, between chunks a linear recurrence of K x K matrices. On CUDA the kernels of
flash-linear-attention take over where a comparison with ours, gradients included, comes out equal.
It does not know what queries, keys and values are made from.

B sequences, S positions, H heads, K key width, V value width, N chunks of C positions.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 32
"""Positions a chunk: the fastest of 16, 32 and 64 on a CPU at K = 32."""

_log = logging.getLogger(__name__)

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Which implementation of the rule runs on a device, and why."""

    name: str
    """`torch-chunked` or `fla`."""
    reason: str
    """One sentence for the log and for `had-pipe doctor`."""


def gated_delta_rule(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """Outputs (B, S, H, V) in the dtype of the values; any length.

    Queries and keys come L2-normalised, log_decay is log a_t (at most 0), beta is b_t in [0, 1].
    The torch path computes in float32, float64 where the queries are; `chunk` is of that path and
    changes rounding alone.
    """
    if q_BSHK.is_cuda and kernel(q_BSHK.device).name == "fla":
        return _fla_rule(q_BSHK, k_BSHK, v_BSHV, log_decay_BSH, beta_BSH)
    return chunked_rule(q_BSHK, k_BSHK, v_BSHV, log_decay_BSH, beta_BSH, chunk=chunk)


def kernel(device: torch.device | str) -> Kernel:
    """The implementation `gated_delta_rule` uses on `device`; the answer is found once."""
    device = torch.device(device)
    if device.type != "cuda":
        return Kernel(name="torch-chunked", reason=f"other kernels need CUDA, not {device.type}")
    return _cuda_kernel(torch.cuda.current_device() if device.index is None else device.index)


def chunked_rule(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    *,
    chunk: int = CHUNK,
) -> Tensor:
    """The rule in torch alone, on any device: what every kernel is compared with."""
    precise = torch.float64 if q_BSHK.dtype == torch.float64 else torch.float32
    # Autocast would run these products in half precision, and the state must not be.
    with torch.autocast(q_BSHK.device.type, enabled=False):
        o_BSHV = _chunked(
            q_BSHK.to(precise),
            k_BSHK.to(precise),
            v_BSHV.to(precise),
            log_decay_BSH.to(precise),
            beta_BSH.to(precise),
            chunk,
        )
    return o_BSHV.to(v_BSHV.dtype)


def _chunked(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    log_decay_BSH: Tensor,
    beta_BSH: Tensor,
    chunk: int,
) -> Tensor:
    B, S, H, K = q_BSHK.shape
    V = v_BSHV.shape[-1]
    N = -(-S // chunk)
    C = chunk

    # Everything below is batched over X = N B H chunk matrices; rows are positions of a chunk.
    # Padding writes nothing (key, value and beta 0) and lies behind all that is read.
    def cut(t_BSH: Tensor) -> Tensor:
        rest = t_BSH.shape[3:]
        if N * C > S:
            t_BSH = F.pad(t_BSH, (0, 0) * len(rest) + (0, 0, 0, N * C - S))
        t_NBHC = t_BSH.view(B, N, C, H, *rest).transpose(2, 3).transpose(0, 1)
        return t_NBHC.reshape(N * B * H, C, *rest)

    q_XCK, k_XCK, v_XCV = cut(q_BSHK), cut(k_BSHK), cut(v_BSHV)
    beta_XC1 = cut(beta_BSH).unsqueeze(-1)
    total_XC = cut(log_decay_BSH).cumsum(-1)  # log decay since the chunk's start
    decay_XC1 = total_XC.exp().unsqueeze(-1)
    k_XKC = k_XCK.mT

    # between_ij: the decay from position j to i. The upper triangle is silenced before the
    # exponential, where it could overflow.
    lower_CC = torch.ones(C, C, dtype=torch.bool, device=q_BSHK.device).tril()
    between_XCC = (
        (total_XC.unsqueeze(-1) - total_XC.unsqueeze(-2)).masked_fill(~lower_CC, -math.inf).exp()
    )

    # What position i really writes, u_i = b_i (v_i - a.. S k_i - what earlier positions of the
    # chunk wrote along k_i), is a unit lower triangular system. Solved by substitution: Neumann
    # series and products of doublings explode where keys repeat, as in poly-A.
    overlap_XCC = (beta_XC1 * between_XCC * torch.bmm(k_XCK, k_XKC)).tril(-1)
    eye_CC = torch.eye(C, dtype=q_XCK.dtype, device=q_XCK.device)
    solve_XCC = torch.linalg.solve_triangular(
        overlap_XCC, eye_CC.expand_as(overlap_XCC), upper=False, unitriangular=True
    )
    # u = own - seen S_0^T, with S_0 the state before the chunk.
    rows_XCD = torch.cat([k_XCK * (beta_XC1 * decay_XC1), v_XCV * beta_XC1], dim=-1)
    seen_XCK, own_XCV = torch.split(torch.bmm(solve_XCC, rows_XCD), [K, V], dim=-1)

    # The states between chunks, transposed: S_{n+1}^T = carry_n S_n^T + write_n.
    to_end_XKC = (k_XCK * (total_XC[:, -1:] - total_XC).exp().unsqueeze(-1)).mT
    eye_KK = torch.eye(K, dtype=q_XCK.dtype, device=q_XCK.device)
    carry_XKK = torch.baddbmm(decay_XC1[:, -1:] * eye_KK, to_end_XKC, seen_XCK, alpha=-1)
    write_XKV = torch.bmm(to_end_XKC, own_XCV)
    state_NYKV: Tensor = _States.apply(carry_XKK.view(N, -1, K, K), write_XKV.view(N, -1, K, V))  # type: ignore[no-untyped-call]
    state_XKV = state_NYKV.view(-1, K, V)

    u_XCV = torch.baddbmm(own_XCV, seen_XCK, state_XKV, alpha=-1)
    q_XCK = q_XCK * K**-0.5
    inside_XCV = torch.bmm(between_XCC * torch.bmm(q_XCK, k_XKC), u_XCV)
    o_XCV = torch.baddbmm(inside_XCV, q_XCK * decay_XC1, state_XKV)
    o_BSHV = o_XCV.view(N, B, H, C, V).permute(1, 0, 3, 2, 4).reshape(B, N * C, H, V)
    return o_BSHV[:, :S]


class _States(torch.autograd.Function):
    """The state before each chunk: h_0 = 0, h_{n+1} = carry_n h_n + write_n.

    By hand because autograd through the loop would add full-size gradients N times.
    """

    @staticmethod
    def forward(ctx: Any, carry_NYKK: Tensor, write_NYKV: Tensor) -> Tensor:
        state_NYKV = torch.empty_like(write_NYKV)
        state_NYKV[0] = 0
        for n in range(len(write_NYKV) - 1):
            torch.baddbmm(write_NYKV[n], carry_NYKK[n], state_NYKV[n], out=state_NYKV[n + 1])
        ctx.save_for_backward(carry_NYKK, state_NYKV)
        return state_NYKV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_state_NYKV: Tensor) -> tuple[Tensor, Tensor]:
        carry_NYKK, state_NYKV = ctx.saved_tensors
        # d_write[n] is the whole gradient of state n + 1; nobody reads what the last chunk leaves.
        d_write_NYKV = torch.empty_like(d_state_NYKV)
        d_write_NYKV[-1] = 0
        for n in range(len(d_state_NYKV) - 1, 0, -1):
            torch.baddbmm(
                d_state_NYKV[n], carry_NYKK[n].mT, d_write_NYKV[n], out=d_write_NYKV[n - 1]
            )
        return torch.matmul(d_write_NYKV, state_NYKV.mT), d_write_NYKV


def _fla_rule(
    q_BSHK: Tensor, k_BSHK: Tensor, v_BSHV: Tensor, log_decay_BSH: Tensor, beta_BSH: Tensor
) -> Tensor:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    # The kernel wants one dtype for q, k, v and beta; gates are summed in float32.
    dtype = v_BSHV.dtype
    o_BSHV, _ = chunk_gated_delta_rule(
        q_BSHK.to(dtype),
        k_BSHK.to(dtype),
        v_BSHV.contiguous(),
        log_decay_BSH.float(),
        beta_BSH.to(dtype),
        scale=q_BSHK.shape[-1] ** -0.5,
    )
    assert isinstance(o_BSHV, Tensor)
    return o_BSHV


@functools.cache
def _cuda_kernel(index: int) -> Kernel:
    device = torch.device("cuda", index)
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # noqa: F401
    except ImportError as error:
        reason = f"flash-linear-attention is not installed ({error}); the extra `cuda` brings it"
        return Kernel(name="torch-chunked", reason=reason)
    fault = find_fault(_fla_rule, device=device)
    if fault is None:
        reason = "flash-linear-attention agrees with the torch path, gradients included"
        return Kernel(name="fla", reason=reason)
    reason = f"flash-linear-attention is not right on {torch.cuda.get_device_name(device)}: {fault}"
    _log.warning("%s; the slower torch path runs instead", reason)
    return Kernel(name="torch-chunked", reason=reason)


def find_fault(rule: Rule, *, device: torch.device) -> str | None:
    """What is wrong with another implementation of the rule; None where it agrees with ours.

    Compared are outputs and all gradients in float32, at lengths that do not fill a chunk, with
    keys at random and with one key throughout (poly-A). Triton 3.4 to 3.7.0 gives wrong gradients
    of keys, decays and betas on Hopper, silently, so no kernel is trusted before this.
    """
    tolerance = 2e-2  # of the largest value; kernels may round products to 10 bits (tf32)
    for S in (90, 150):
        for keys in ("random", "equal"):
            try:
                # The first call may come from inside an evaluation; the check needs gradients.
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    torch.autocast(device.type, enabled=False),
                ):
                    fault = _compare(rule, device=device, S=S, keys=keys, tolerance=tolerance)
            # A kernel of another library may refuse or fail in any way; all mean: not this one.
            except Exception as error:
                return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            if fault is not None:
                return f"{fault} ({S} positions, {keys} keys)"
    return None


def _compare(
    rule: Rule, *, device: torch.device, S: int, keys: str, tolerance: float
) -> str | None:
    B, H, K, V = 2, 3, 32, 64
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    k_BSHK = F.normalize(normal(B, 1 if keys == "equal" else S, H, K), dim=-1).expand(B, S, H, K)
    inputs = [
        F.normalize(normal(B, S, H, K), dim=-1),
        k_BSHK,
        normal(B, S, H, V),
        -0.1 * F.softplus(normal(B, S, H)),
        torch.sigmoid(normal(B, S, H) + 2),
    ]
    inputs = [t.contiguous().to(device).requires_grad_() for t in inputs]
    weight = normal(B, S, H, V).to(device)
    found, expected = (
        [o, *torch.autograd.grad((o * weight).sum(), inputs)]
        for o in (rule(*inputs), chunked_rule(*inputs))
    )
    names = ("the output", *(f"the gradient of {x}" for x in ("q", "k", "v", "log_decay", "beta")))
    for name, a, b in zip(names, found, expected, strict=True):
        error = float(((a - b).abs().max() / b.abs().max()).detach())
        if not error <= tolerance:  # NaN is a fault too
            return f"{name} is off by {error:.2g} of its largest value"
    return None
