"""A teacher's folder that a stranger made: refused with little memory, and nothing of it run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from had_pipe.errors import HadPipeError, InputError
from had_pipe.teachers.ntv2 import NTv2Config, random_model
from had_pipe.teachers.ntv2_checkpoint import save_checkpoint
from had_pipe.teachers.teacher import Teacher, load_teacher

SHAPE = NTv2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(random_model(SHAPE, seed=1), tmp_path / "teacher")
    return tmp_path / "teacher"


def load(folder: Path) -> Teacher:
    return load_teacher(str(folder), revision=None, layer=-1, device="cpu", offline=True)


def config(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        told = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(told))

    return change


def raw(name: str, data: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(data)

    return change


def hole(name: str) -> Callable[[Path], None]:
    return lambda folder: os.truncate(folder / name, 1 << 40)


def fifo(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


class Code:
    """What a pickle can hold: a call."""

    def __init__(self, folder: Path) -> None:
        self.made = folder / "was-run"

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.made),)


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"a": Code(folder)}))


def pickled_by_torch(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": Code(folder)}, folder / "pytorch_model.bin")


def zip_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as entries:
        entries.writestr("archive/data.pkl", bytes(1 << 26))


def promised_tensor(folder: Path) -> None:
    header = {"a": {"dtype": "F32", "shape": [10**9, 10**6], "data_offsets": [0, 4 * 10**15]}}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)


def long_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((10**18).to_bytes(8, "little") + b"{}")


def extra_tensor(folder: Path) -> None:
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    safetensors.torch.save_file(
        {**stored, "esm.\x1b[2J": torch.zeros(1)}, folder / "model.safetensors"
    )


STRANGERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "10^9 layers": (config(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected"),
    "width 10^12": (config(hidden_size=10**12), "hidden_size is 1000000000000, expected a whole"),
    "10^30 tokens": (config(vocab_size=10**30), "vocab_size is 10{30}, expected"),
    "the widest that is let through": (
        config(hidden_size=1 << 16, num_hidden_layers=1 << 10, vocab_size=1 << 20),
        "(is missing|is 4107 x 16, expected|expected 1048576)",
    ),
    "true layers": (config(num_hidden_layers=True), "num_hidden_layers is true, expected"),
    "negative heads": (config(num_attention_heads=-2), "num_attention_heads is -2, expected"),
    "a list for a number": (
        config(hidden_size=[[]] * 10**5),
        "hidden_size is .*, expected a whole",
    ),
    "deep config": (raw("config.json", b'{"a":' * 100_000), "not readable as JSON"),
    "config of a terabyte": (hole("config.json"), "more than 4,194,304 bytes"),
    "config is a fifo": (fifo("config.json"), "expected an ordinary file"),
    "config that is no UTF-8": (raw("config.json", b"\xff\xfe{}"), "not readable as JSON"),
    "config with a number of 10^5 digits": (
        raw("config.json", b'{"hidden_size":' + b"9" * 100_000 + b"}"),
        "not readable as JSON",
    ),
    "weights are a fifo": (fifo("model.safetensors"), "no weights"),
    "weights of a terabyte of nothing": (hole("model.safetensors"), "damaged or not a checkpoint"),
    "weights that promise a petabyte": (promised_tensor, "damaged or not a checkpoint"),
    "weights with an endless header": (long_header, "damaged or not a checkpoint"),
    "weights that run code": (pickled, "damaged or not a checkpoint"),
    "weights that run code, by torch": (pickled_by_torch, "damaged or not a checkpoint"),
    "weights that are a zip bomb": (zip_bomb, "compressed entries, which torch never writes"),
    "a tensor whose name steers": (extra_tensor, r"esm\.\\x1b\[2J is not a key of an NT-v2"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", STRANGERS)
def test_a_strangers_teacher_is_refused_and_nothing_of_it_is_run(case: str, folder: Path) -> None:
    change, expected = STRANGERS[case]
    change(folder)
    begun = peak_nbytes()
    with pytest.raises(InputError, match=expected) as caught:
        load(folder)
    assert peak_nbytes() - begun < 128 << 20
    assert not Code(folder).made.exists()
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


def peak_nbytes() -> int:
    """Most memory this process has had; the first pays for what is made once."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) << 10
    raise AssertionError("no such line")


@pytest.mark.parametrize(
    "card", [b"\xff\xfe", b"---\nlicense: a\x1b[2J\n---\n", b"---\nlicense: " + b"x" * 70_000]
)
def test_a_card_that_is_no_text_tells_no_licence(card: bytes, folder: Path) -> None:
    (folder / "README.md").write_bytes(card)
    assert load(folder).licence == "unknown"


@pytest.mark.parametrize(
    "licence", ["a\x1b[2J", "\u202eTIM", "x" * 10**6, 7, ["MIT"], {"a": 1}, ""]
)
def test_a_licence_that_is_none_is_unknown(licence: object, folder: Path) -> None:
    config(licence=licence)(folder)
    assert load(folder).licence == "unknown"


def test_a_sound_folder_is_loaded(folder: Path) -> None:
    try:
        assert load(folder).channels == 16
    except HadPipeError as error:
        raise AssertionError("a sound teacher was refused") from error
