"""What a teacher is, and how one is loaded by name.

Nothing here imports torch before a teacher is loaded: the protocol asks only for arrays, so that
anything that maps k-mer ids to vectors can stand in.

W windows, T k-mers, D channels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Literal,
    Protocol,
    TypedDict,
    cast,
    get_args,
    runtime_checkable,
)

import numpy as np
import numpy.typing as npt

from had_pipe.errors import InputError, RecipeError

if TYPE_CHECKING:
    import torch

Precision = Literal["auto", "float32", "bfloat16"]
"""What matrix products are in; "auto": as the device is fast."""


class Teacher(Protocol):
    """A frozen model that turns k-mers into vectors."""

    @property
    def name(self) -> str:
        """As in the recipe: a hub name, or a folder's own name without the path to it."""

    @property
    def revision(self) -> str | None:
        """The commit of a hub name, 40 hexadecimal digits; None for a folder."""

    @property
    def weights_sha256(self) -> str:
        """Of the weight file as it lies on disk; of several, see `teachers.folder`."""

    @property
    def settings_sha256(self) -> str | None:
        """Of its tokens and settings, where others may stand beside the same weights; else None."""

    @property
    def licence(self) -> str:
        """An SPDX identifier, or "unknown"."""

    @property
    def k(self) -> int:
        """Bases in a k-mer."""

    @property
    def channels(self) -> int:
        """D."""

    @property
    def layer(self) -> int:
        """Whose output is given: k for block k, -1 for the final norm."""

    @property
    def context(self) -> int:
        """Most k-mers a window may have."""

    @property
    def dtype(self) -> str:
        """What `embed` returns: "float32", "float16" or "bfloat16"."""

    @property
    def numerics(self) -> Mapping[str, str | int]:
        """The class of arithmetic: within one, equal input gives equal bits at one batch shape."""

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Any:
        """Vectors (W, T, D) on the teacher's own device.

        `hidden_WT` is True where the teacher must not see the k-mer.
        """


@runtime_checkable
class LanguageModel(Protocol):
    """A teacher that can be asked how well it knows DNA, by its language head."""

    @property
    def token_bases(self) -> int:
        """Bases of one token."""

    def masked_loss(
        self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
    ) -> npt.NDArray[np.float64] | None:
        """Cross-entropy in nats of every hidden k-mer, windows one after the other; of several
        tokens their sum. None where the checkpoint has no language head.
        """


def load_teacher(
    name: str,
    *,
    revision: str | None,
    layer: int,
    device: str = "auto",
    dtype: str = "auto",
    offline: bool = False,
) -> Teacher:
    """The teacher in a folder, or of a hub name at a pinned commit.

    An NT-v2 runs on our own code, any other masked language model on transformers' own classes.
    `device` is "auto" (CUDA where there is some), "cpu", "cuda" or "cuda:N". `dtype` says what
    matrix products are in: "float32", "bfloat16" or "auto", which is bfloat16 on CUDA and on a CPU
    with tiles for it (AMX), else float32. `offline` takes a hub name from the local hub cache
    alone. Torch is held to the processors it may use, see `numerics.fit_threads`.
    """
    from had_pipe.teachers.folder import read_config_file
    from had_pipe.teachers.hub import HUB_NAME, snapshot
    from had_pipe.teachers.ntv2 import NTv2Teacher
    from had_pipe.teachers.ntv2_checkpoint import is_ntv2, load_checkpoint, read_config
    from had_pipe.teachers.numerics import compute_dtype, fit_threads

    if dtype not in get_args(Precision):
        raise RecipeError(
            f"[teacher] dtype = {dtype!r}: expected {', '.join(get_args(Precision))}."
        )
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise RecipeError(
                f"[teacher] revision: {name} is a folder, which has no commit; "
                "leave revision out (the weights' SHA-256 tells which they are)."
            )
        shown = folder.resolve().name
    elif HUB_NAME.fullmatch(name):
        shown = name
        folder = snapshot(name, revision, offline=offline)
    else:
        raise InputError(
            f"[teacher] name: {name!r} is neither a folder that exists nor a hub name of the form "
            "'organisation/model'; mend the path or the name."
        )
    on = _device(device)
    compute = compute_dtype(on, cast(Precision, dtype))
    fit_threads()
    if is_ntv2(read_config_file(folder)):
        _check_layer(shown, layer, read_config(folder).num_hidden_layers)
        ours = load_checkpoint(folder, head="stored")
        return NTv2Teacher(
            ours, **_identity(shown, revision, folder, layer), device=on, compute=compute
        )
    from had_pipe.teachers.masked_lm import MaskedLMTeacher, load_model, read_shape

    shape = read_shape(folder)
    _check_layer(shown, layer, shape.blocks)
    model, has_head = load_model(folder, shape)
    return MaskedLMTeacher(
        model,
        shape,
        has_head=has_head,
        **_identity(shown, revision, folder, layer),
        device=on,
        compute=compute,
    )


class _Identity(TypedDict):
    """What a teacher is called, whatever it is made of."""

    name: str
    revision: str | None
    weights_sha256: str
    licence: str
    layer: int


def _identity(shown: str, revision: str | None, folder: Path, layer: int) -> _Identity:
    from had_pipe.teachers.folder import licence, weight_files, weights_sha256

    return {
        "name": shown,
        "revision": revision,
        "weights_sha256": weights_sha256(weight_files(folder)),
        "licence": licence(shown, folder),
        "layer": layer,
    }


def _check_layer(shown: str, layer: int, blocks: int) -> None:
    if layer != -1 and not 1 <= layer <= blocks:
        raise RecipeError(
            f"[teacher] layer = {layer}: {shown} has blocks 1 to {blocks}; name one of them, "
            "or -1 for the output of the final norm."
        )


def _device(device: str) -> torch.device:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise RecipeError(f"device {device!r}: expected auto, cpu, cuda or cuda:N.")
    if device != "cpu":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(device.partition(":")[2] or 0) >= found:
            raise RecipeError(
                f"device {device!r}: torch {torch.__version__} finds {found} CUDA devices here; "
                "use another device, or auto."
            )
    return torch.device(device)
