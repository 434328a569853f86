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
import itertools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from had_pipe.students import fla_backend
from had_pipe.students.fla_backend import Shape

CHUNK = 32
"""Positions a chunk: the fastest of 16, 32 and 64 on a CPU at K = 32."""

LENGTHS = (90, 170, 1020, 2048)
"""Lengths that kernels are tried at: the first three do not fill their last chunk. Kernels are not
compiled for a length."""

# Keys of a trial, and by how large a share of the largest value each result may be off. Kernels may
# round the factors of float32 products to 10 bits (tf32), which keys that repeat amplify: fla's,
# rounded so in Triton's interpreter, are off by 1e-3 and, with equal keys, 9e-3; rounded to the 7
# bits of bfloat16, by 6e-3 and 9e-2. A miscompiled gradient is off by more than its own size.
TRIALS = {
    torch.float32: {"random": 2e-2, "equal": 1e-1, "dinucleotide": 1e-1},
    torch.bfloat16: {"random": 1e-1, "equal": 3e-1, "dinucleotide": 3e-1},
}

_log = logging.getLogger(__name__)

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Which implementation of the rule runs on a device, and why."""

    name: str
    """`torch-chunked`, `fla`, or `fla+torch`: fla but for one function of its backward pass."""
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
    if q_BSHK.is_cuda:
        heads, key = q_BSHK.shape[2:]
        found = kernel(q_BSHK.device, heads=heads, key=key, value=v_BSHV.shape[-1])
        if found.name != "torch-chunked":
            return _fla_rule(q_BSHK, k_BSHK, v_BSHV, log_decay_BSH, beta_BSH)
    return chunked_rule(q_BSHK, k_BSHK, v_BSHV, log_decay_BSH, beta_BSH, chunk=chunk)


def kernel(device: torch.device | str, *, heads: int = 3, key: int = 32, value: int = 64) -> Kernel:
    """The implementation `gated_delta_rule` uses on `device`; the answer is found once a shape.

    The shape is that of the default student unless given.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return Kernel(name="torch-chunked", reason=f"other kernels need CUDA, not {device.type}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return _cuda_kernel(index, Shape(heads=heads, key=key, value=value))


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
        o_BSHV: Tensor = _ChunkedRule.apply(  # type: ignore[no-untyped-call]
            q_BSHK.to(precise),
            k_BSHK.to(precise),
            v_BSHV.to(precise),
            log_decay_BSH.to(precise),
            beta_BSH.to(precise),
            chunk,
        )
    return o_BSHV.to(v_BSHV.dtype)


class _ChunkedRule(torch.autograd.Function):
    """The rule chunk by chunk, its backward pass by hand: on a CPU 1.5 times as fast as
    autograd's.

    All is batched over X = N B H chunk matrices; rows are positions of a chunk. With g the log
    decay since the chunk's start and h the transposed state before the chunk, position i writes
    u_i along k_i and

        u = T (R_v - R_k h)    T = (I + A)^-1, A_ij = b_i e^(g_i - g_j) k_i k_j for j < i
        h' = e^(g_C) h + E^T u
        o = Q h + P u          P_ij = e^(g_i - g_j) q_i k_j / sqrt(K) for j <= i

    where R_k = b e^g k, R_v = b v, E = e^(g_C - g) k and Q = e^g q / sqrt(K), row by row.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BSHK: Tensor,
        k_BSHK: Tensor,
        v_BSHV: Tensor,
        log_decay_BSH: Tensor,
        beta_BSH: Tensor,
        chunk: int,
    ) -> Tensor:
        B, S, H, K = q_BSHK.shape
        V, N = v_BSHV.shape[-1], -(-S // chunk)
        q_XCK, k_XCK, v_XCV = (_cut(t, chunk) for t in (q_BSHK, k_BSHK, v_BSHV))
        beta_XC1 = _cut(beta_BSH.unsqueeze(-1), chunk)
        g_XC1 = _cut(log_decay_BSH.unsqueeze(-1), chunk).cumsum(1)
        start_XC1, end_XC1 = g_XC1.exp(), (g_XC1[:, -1:] - g_XC1).exp()
        # The upper triangle is silenced before the exponential, where it could overflow.
        above_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=q_BSHK.device).triu(1)
        decay_XCC = (g_XC1 - g_XC1.mT).masked_fill_(above_CC, -math.inf).exp_()

        # Solved by substitution: Neumann series and products of doublings explode where keys
        # repeat, as in poly-A.
        overlap_XCC = torch.bmm(k_XCK, k_XCK.mT).mul_(decay_XCC).tril_(-1)
        eye_CC = torch.eye(chunk, dtype=q_XCK.dtype, device=q_XCK.device).expand_as(overlap_XCC)
        solve_XCC = torch.linalg.solve_triangular(
            overlap_XCC * beta_XC1, eye_CC, upper=False, unitriangular=True
        )
        # u = own - seen h
        seen_XCK = torch.bmm(solve_XCC, k_XCK * (beta_XC1 * start_XC1))
        own_XCV = torch.bmm(solve_XCC, v_XCV * beta_XC1)

        # Put in, u makes the states a linear recurrence: h' = carry h + E^T own.
        e_XKC = (k_XCK * end_XC1).mT
        carry_XKK = torch.bmm(e_XKC, seen_XCK).neg_()
        carry_XKK.diagonal(dim1=1, dim2=2).add_(start_XC1[:, -1])
        h_NYKV = q_XCK.new_empty(N, B * H, K, V)
        h_NYKV[0] = 0
        later = (N - 1) * B * H
        torch.bmm(e_XKC[:later], own_XCV[:later], out=h_NYKV[1:].view(later, K, V))
        carry_NYKK = carry_XKK.view(N, -1, K, K)
        for n in range(N - 1):
            h_NYKV[n + 1].baddbmm_(carry_NYKK[n], h_NYKV[n])
        h_XKV = h_NYKV.view(-1, K, V)

        u_XCV = own_XCV.baddbmm_(seen_XCK, h_XKV, alpha=-1)
        mix_XCC = torch.bmm(q_XCK, k_XCK.mT).mul_(decay_XCC).mul_(K**-0.5)
        o_XCV = torch.bmm(mix_XCC, u_XCV)
        o_XCV.baddbmm_(q_XCK * (start_XC1 * K**-0.5), h_XKV)
        ctx.save_for_backward(
            q_XCK, k_XCK, v_XCV, beta_XC1, start_XC1, end_XC1, decay_XCC,
            overlap_XCC, solve_XCC, seen_XCK, carry_XKK, h_XKV, u_XCV, mix_XCC,
        )  # fmt: skip
        ctx.shape = (B, S, H, N)
        return _join(o_XCV, B, S, H)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_o_BSHV: Tensor) -> tuple[Tensor | None, ...]:
        with torch.autocast(d_o_BSHV.device.type, enabled=False):
            return (*_ChunkedRule._gradients(ctx, d_o_BSHV), None)

    @staticmethod
    def _gradients(ctx: Any, d_o_BSHV: Tensor) -> tuple[Tensor, ...]:
        (
            q_XCK, k_XCK, v_XCV, beta_XC1, start_XC1, end_XC1, decay_XCC,
            overlap_XCC, solve_XCC, seen_XCK, carry_XKK, h_XKV, u_XCV, mix_XCC,
        ) = ctx.saved_tensors  # fmt: skip
        B, S, H, N = ctx.shape
        C, K = k_XCK.shape[1:]
        scale = K**-0.5
        d_o_XCV = _cut(d_o_BSHV, C)

        # Through the states, last chunk first; nobody reads what the last one leaves.
        d_u_XCV = torch.bmm(mix_XCC.mT, d_o_XCV)
        Y, V = B * H, d_o_XCV.shape[-1]
        d_h_NYKV = torch.empty(N + 1, Y, K, V, dtype=d_o_XCV.dtype, device=d_o_XCV.device)
        d_h_NYKV[N] = 0
        d_h_XKV = d_h_NYKV[:N].view(-1, K, V)
        torch.bmm((q_XCK * (start_XC1 * scale)).mT, d_o_XCV, out=d_h_XKV)
        d_h_XKV.baddbmm_(seen_XCK.mT, d_u_XCV, alpha=-1)
        carry_NYKK = carry_XKK.view(N, Y, K, K)
        for n in range(N - 1, 0, -1):
            d_h_NYKV[n].baddbmm_(carry_NYKK[n].mT, d_h_NYKV[n + 1])
        after_XKV = d_h_NYKV[1:].view(-1, K, V)

        # Through u, the triangular system and the two products of keys and queries.
        d_u_XCV.baddbmm_(k_XCK * end_XC1, after_XKV)
        d_rv_XCV = torch.bmm(solve_XCC.mT, d_u_XCV)
        d_rk_XCK = torch.bmm(d_rv_XCV, h_XKV.mT).neg_()
        d_overlap_XCC = torch.bmm(d_rv_XCV, u_XCV.mT).neg_()
        d_mix_XCC = torch.bmm(d_o_XCV, u_XCV.mT)
        by_overlap_XCC = d_overlap_XCC * overlap_XCC
        by_decay_XCC = torch.addcmul(by_overlap_XCC * beta_XC1, d_mix_XCC, mix_XCC)
        d_kk_XCC = d_overlap_XCC.mul_(decay_XCC).mul_(beta_XC1).tril_(-1)
        d_qk_XCC = d_mix_XCC.mul_(decay_XCC).mul_(scale)

        d_q_XCK = torch.bmm(d_o_XCV, h_XKV.mT).mul_(start_XC1 * scale)
        d_g_XC1 = (d_q_XCK * q_XCK).sum(-1, keepdim=True)
        d_q_XCK.baddbmm_(d_qk_XCC, k_XCK)

        d_k_XCK = torch.bmm(u_XCV, after_XKV.mT).mul_(end_XC1)
        by_end_XC1 = (d_k_XCK * k_XCK).sum(-1, keepdim=True)
        by_start_XC1 = (d_rk_XCK * k_XCK).sum(-1, keepdim=True).mul_(start_XC1)
        d_k_XCK.addcmul_(d_rk_XCK, beta_XC1 * start_XC1)
        d_k_XCK.baddbmm_(d_kk_XCC + d_kk_XCC.mT, k_XCK)
        d_k_XCK.baddbmm_(d_qk_XCC.mT, q_XCK)

        d_beta_XC1 = by_overlap_XCC.sum(-1, keepdim=True).add_(by_start_XC1)
        d_beta_XC1.add_((d_rv_XCV * v_XCV).sum(-1, keepdim=True))
        d_v_XCV = d_rv_XCV.mul_(beta_XC1)

        d_g_XC1.addcmul_(by_start_XC1, beta_XC1).sub_(by_end_XC1)
        d_g_XC1.add_(by_decay_XCC.sum(2, keepdim=True)).sub_(by_decay_XCC.sum(1).unsqueeze(-1))
        kept_X1 = (after_XKV * h_XKV).sum((1, 2)).unsqueeze(-1)
        d_g_XC1[:, -1] += torch.addcmul(by_end_XC1.sum(1), start_XC1[:, -1], kept_X1)
        d_log_decay_XC1 = d_g_XC1.flip(1).cumsum(1).flip(1)

        return (
            *(_join(t, B, S, H) for t in (d_q_XCK, d_k_XCK, d_v_XCV)),
            *(_join(t, B, S, H).squeeze(-1) for t in (d_log_decay_XC1, d_beta_XC1)),
        )


def _cut(t_BSHF: Tensor, chunk: int) -> Tensor:
    """(B, S, H, F) as (N B H, C, F), with zeros behind the end, which write nothing."""
    B, S, H, width = t_BSHF.shape
    full, rest = divmod(S, chunk)
    t_NBHCF = t_BSHF.new_empty(full + (rest > 0), B, H, chunk, width)
    t_BNCHF = t_NBHCF.permute(1, 0, 3, 2, 4)
    t_BNCHF[:, :full] = t_BSHF[:, : full * chunk].unflatten(1, (full, chunk))
    if rest:
        t_BNCHF[:, full, :rest] = t_BSHF[:, full * chunk :]
        t_BNCHF[:, full, rest:] = 0
    return t_NBHCF.view(-1, chunk, width)


def _join(t_XCF: Tensor, B: int, S: int, H: int) -> Tensor:
    """What `_cut` cut, without the zeros."""
    C, width = t_XCF.shape[1:]
    full, rest = divmod(S, C)
    t_BNCHF = t_XCF.view(-1, B, H, C, width).permute(1, 0, 3, 2, 4)
    t_BSHF = t_XCF.new_empty(B, S, H, width)
    t_BSHF[:, : full * C].unflatten(1, (full, C)).copy_(t_BNCHF[:, :full])
    if rest:
        t_BSHF[:, full * C :] = t_BNCHF[:, full, :rest]
    return t_BSHF


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
def _cuda_kernel(index: int, shape: Shape) -> Kernel:
    device = torch.device("cuda", index)
    try:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # noqa: F401
    except ImportError as error:
        reason = f"flash-linear-attention is not installed ({error}); the extra `cuda` brings it"
        return Kernel(name="torch-chunked", reason=reason)
    # It looks for devices and compilers as it is imported, which may fail in any way.
    except Exception as error:
        reason = f"flash-linear-attention cannot be imported: {_in_a_line(error)}"
        _log.warning("%s; the slower torch path runs instead", reason)
        return Kernel(name="torch-chunked", reason=reason)
    return choose(
        lambda: find_fault(_fla_rule, device=device, shape=shape),
        device=device,
        name=torch.cuda.get_device_name(device),
        shape=shape,
    )


def choose(
    fault: Callable[[], str | None], *, device: torch.device, name: str, shape: Shape
) -> Kernel:
    """Whether fla is used on a device called `name`: as it is, with our part, or not at all.

    `fault` says what is wrong with `_fla_rule` as it would run now, None where nothing is.
    """
    alone = fault()
    if alone is None:
        reason = "flash-linear-attention agrees with the torch path, gradients included"
        return Kernel(name="fla", reason=reason)
    try:
        fla_backend.take_over(device, shape)
        together = fault()
    # Another release may not ask backends, or ask them otherwise.
    except Exception as error:
        together = _in_a_line(error)
    if together is None:
        reason = (
            f"flash-linear-attention is not right on {name} by itself ({alone}); with one "
            "function of its backward pass in torch it agrees with the torch path"
        )
        _log.info("%s", reason)
        return Kernel(name="fla+torch", reason=reason)
    fla_backend.give_back(device, shape)
    reason = f"flash-linear-attention is not right on {name}: {alone}"
    if together != alone:
        reason += f"; with one function of its backward pass in torch: {together}"
    _log.warning("%s; the slower torch path runs instead", reason)
    return Kernel(name="torch-chunked", reason=reason)


def find_fault(
    rule: Rule,
    *,
    device: torch.device,
    shape: Shape,
    lengths: Sequence[int] = LENGTHS,
    dtypes: Sequence[torch.dtype] = tuple(TRIALS),
) -> str | None:
    """What is wrong with another implementation of the rule; None where it agrees with ours.

    Compared are outputs and all gradients, with keys at random, with one key throughout (poly-A)
    and with two in turn. Triton 3.4 to 3.7.0 gives wrong gradients of keys, decays and betas on
    Hopper, silently, so no kernel is trusted before this.
    """
    for S, dtype in itertools.product(lengths, dtypes):
        for keys, tolerance in TRIALS[dtype].items():
            try:
                # The first call may come from inside an evaluation; the check needs gradients.
                with (
                    torch.inference_mode(False),
                    torch.enable_grad(),
                    torch.autocast(device.type, enabled=False),
                ):
                    inputs, weight = _trial(shape, S=S, keys=keys, dtype=dtype, device=device)
                    fault = _compare(rule, inputs, weight, tolerance=tolerance)
            # A kernel of another library may refuse or fail in any way; all mean: not this one.
            except Exception as error:
                return _in_a_line(error)
            if fault is not None:
                return f"{fault} ({S} positions, {keys} keys, {dtype})"
    return None


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _trial(
    shape: Shape, *, S: int, keys: str, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], Tensor]:
    """Inputs of the rule, and what its output is summed with."""
    B, H, K, V = 2, shape.heads, shape.key, shape.value
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    period = {"random": S, "equal": 1, "dinucleotide": 2}[keys]
    k_BSHK = F.normalize(normal(B, period, H, K), dim=-1)[:, torch.arange(S) % period]
    qkv = [F.normalize(normal(B, S, H, K), dim=-1), k_BSHK, normal(B, S, H, V)]
    gates = [-0.1 * F.softplus(normal(B, S, H)), torch.sigmoid(normal(B, S, H) + 2)]
    inputs = [t.to(device, dtype) for t in qkv] + [t.to(device) for t in gates]
    return [t.requires_grad_() for t in inputs], normal(B, S, H, V).to(device)


def _compare(rule: Rule, inputs: list[Tensor], weight: Tensor, *, tolerance: float) -> str | None:
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
