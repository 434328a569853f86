"""One function of flash-linear-attention's backward pass, in torch, for where its own is wrong.

On Hopper, Triton 3.4 to 3.7.0 miscompiles `chunk_bwd_dqkwg`: gradients of keys, decays and betas
come out wrong, and flash-linear-attention 0.6 refuses to run it there. All its other kernels are
right. It asks backends registered for such functions before its own; ours takes only calls of the
shapes that `take_over` names, on their device: nobody else's calls in this process change.

B sequences, S positions, H heads, K key width, V value width, N chunks of C positions.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What kernels are compiled for, whatever the batch and the length are."""

    heads: int
    key: int
    """Key width of a head."""
    value: int
    """Value width of a head."""


_taken: set[tuple[torch.device, Shape]] = set()


def take_over(device: torch.device, shape: Shape) -> None:
    """From now on flash-linear-attention computes this function by ours, for calls of the shape."""
    _register()
    _taken.add((device, shape))


def give_back(device: torch.device, shape: Shape) -> None:
    """flash-linear-attention computes it by itself again."""
    _taken.discard((device, shape))


def gradients_around_states(
    *,
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    u_BSHV: Tensor,
    d_o_BSHV: Tensor,
    h_BNHKV: Tensor,
    d_h_BNHKV: Tensor,
    d_u_BSHV: Tensor,
    g_BSH: Tensor,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of queries, keys, w and log decays, given those of outputs, states and u.

    A chunk begins with the state h (K, V), has written u when it ends, and g is the log2 of the
    decay since its start. Position by position, with P_ij = 2^(g_i - g_j) q_i k_j for j <= i:

        o = scale (2^g q h + P u)    h' = 2^(g_C) h + (2^(g_C - g) k)^T u    u = ... - w h

    `d_h` is the gradient of h', and the gradients of keys and decays are those of these three
    alone: the triangular system adds its own. Decays' are in units of the natural logarithm, still
    to be summed from the chunk's end.
    """
    B, S, H, _ = k_BSHK.shape
    N = -(-S // chunk)
    precise = torch.promote_types(k_BSHK.dtype, torch.float32)

    def cut(t_BSHF: Tensor) -> Tensor:
        """(B, S, H, F) as (B, N, H, C, F), with zeros behind the end."""
        t_BSHF = F.pad(t_BSHF.to(precise), (0, 0, 0, 0, 0, N * chunk - t_BSHF.shape[1]))
        return t_BSHF.view(B, N, chunk, H, -1).transpose(2, 3)

    def join(t_BNHCF: Tensor) -> Tensor:
        return t_BNHCF.transpose(2, 3).flatten(1, 2)[:, :S]

    q_BNHCK, k_BNHCK, u_BNHCV, d_o_BNHCV = (cut(t) for t in (q_BSHK, k_BSHK, u_BSHV, d_o_BSHV))
    h_BNHKV, d_h_BNHKV = h_BNHKV.to(precise), d_h_BNHKV.to(precise)
    ends_N = torch.arange(chunk, N * chunk + 1, chunk, device=k_BSHK.device).clamp_(max=S) - 1
    # Behind the end g stays what it was: the way from 0 to it could overflow.
    behind_BSH = g_BSH[:, -1:].expand(B, N * chunk - S, H)
    g_BNHC1 = cut(torch.cat([g_BSH, behind_BSH], dim=1).unsqueeze(-1))
    g_end_BNH11 = g_BSH[:, ends_N, :, None, None].to(precise)
    above_CC = torch.ones(chunk, chunk, dtype=torch.bool, device=k_BSHK.device).triu(1)
    decay_BNHCC = (g_BNHC1 - g_BNHC1.mT).masked_fill_(above_CC, -math.inf).exp2_()

    d_w_BNHCK = (cut(d_u_BSHV) @ h_BNHKV.mT).neg_()
    d_q_BNHCK = (d_o_BNHCV @ h_BNHKV.mT).mul_(g_BNHC1.exp2().mul_(scale))
    d_k_BNHCK = (u_BNHCV @ d_h_BNHKV.mT).mul_((g_end_BNH11 - g_BNHC1).exp2_())
    kept_BNH = (h_BNHKV * d_h_BNHKV).sum((-2, -1)) * g_end_BNH11.exp2()[..., 0, 0]
    d_g_end_BNH = kept_BNH + (d_k_BNHCK * k_BNHCK).sum((-2, -1))
    d_p_BNHCC = (d_o_BNHCV @ u_BNHCV.mT).mul_(decay_BNHCC).mul_(scale)
    d_q_BNHCK += d_p_BNHCC @ k_BNHCK
    d_k_BNHCK += d_p_BNHCC.mT @ q_BNHCK
    d_g_BNHC1 = (d_q_BNHCK * q_BNHCK - d_k_BNHCK * k_BNHCK).sum(-1, keepdim=True)
    d_g_BSH = join(d_g_BNHC1).squeeze(-1).contiguous()
    d_g_BSH[:, ends_N] += d_g_end_BNH
    return join(d_q_BNHCK), join(d_k_BNHCK), join(d_w_BNHCK), d_g_BSH


@functools.cache
def _register() -> None:
    from fla.backends import BaseBackend, register

    @register("common")
    class GradientsAroundStates(BaseBackend):  # type: ignore[misc]
        """What flash-linear-attention asks: by the function's name, with the call's arguments."""

        backend_type = "had_pipe"
        priority = -1  # the lowest is asked first

        def chunk_bwd_dqkwg_verifier(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            do: Tensor,
            h: Tensor,
            dh: Tensor,
            w: Tensor | None = None,
            g: Tensor | None = None,
            g_gamma: Tensor | None = None,
            dv: Tensor | None = None,
            scale: float | None = None,
            state_v_first: bool = False,
            cu_seqlens: Tensor | None = None,
            **unused: Any,
        ) -> tuple[bool, str | None]:
            if g is None or dv is None or w is None or g_gamma is not None:
                return False, "only the gated delta rule's calls are taken"
            if state_v_first or cu_seqlens is not None or q.shape[2] != v.shape[2]:
                return False, "only states (K, V) of equal sequences and as many heads are taken"
            shape = Shape(heads=q.shape[2], key=q.shape[3], value=v.shape[3])
            if (q.device, shape) not in _taken:
                return False, "nobody asked for it on this device, for this shape"
            return True, None

        def chunk_bwd_dqkwg(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            do: Tensor,
            h: Tensor,
            dh: Tensor,
            *,
            w: Tensor,
            g: Tensor,
            dv: Tensor,
            scale: float | None = None,
            chunk_size: int = 64,
            **unused: Any,
        ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
            # The backward pass runs under the autocast of the forward one.
            with torch.autocast(q.device.type, enabled=False):
                d_q, d_k, d_w, d_g = gradients_around_states(
                    q_BSHK=q,
                    k_BSHK=k,
                    u_BSHV=v,
                    d_o_BSHV=do,
                    h_BNHKV=h,
                    d_h_BNHKV=dh,
                    d_u_BSHV=dv,
                    g_BSH=g,
                    scale=k.shape[-1] ** -0.5 if scale is None else scale,
                    chunk=chunk_size,
                )
            # The kernels that go on from here read these as if they were contiguous.
            return (
                d_q.to(q.dtype).contiguous(),
                d_k.to(k.dtype).contiguous(),
                d_w.to(w.dtype).contiguous(),
                d_g.float().contiguous(),
            )
