"""The class of arithmetic: what of a machine and of libraries decides a teacher's last bits."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def compute_dtype(device: torch.device) -> torch.dtype:
    """What matrix products are in.

    Half precision is for the tensor cores; on a CPU it is slower and less exact.
    """
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def numerics(device: torch.device, *, kernels: str, **more: str) -> Mapping[str, str | int]:
    """The class as plain data; `more` names other libraries that compute."""
    return {
        "torch": torch.__version__.split("+")[0],
        **more,
        "kernels": kernels,
        "dtype": dtype_name(compute_dtype(device)),
        **_machine(device),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _machine(device: torch.device) -> dict[str, str | int]:
    """What of a device decides the last bits of its sums."""
    if device.type == "cuda":
        return {"device": f"cuda:{torch.cuda.get_device_name(device)}"}
    return {
        "device": device.type,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
