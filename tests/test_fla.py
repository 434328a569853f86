"""flash-linear-attention's own Triton kernels, interpreted on a CPU: `make test-kernels`.

Interpreted, they take no half precision (their bfloat16 is garbage) and cannot be timed, so the
autotuner's choice is made for it. What a compiler makes of them on a GPU is checked there, by
`find_fault`, when they first run.
"""

from __future__ import annotations

import builtins
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import Script
from test_delta_rule import NAMES, largest_error, some_inputs, step_by_step, with_gradients
from torch import Tensor

from had_pipe.students import HADConfig, HADModel, delta_rule, fla_backend
from had_pipe.students.delta_rule import choose, find_fault
from had_pipe.students.fla_backend import Shape, gradients_around_states
from had_pipe.students.had import BidirectionalGDN

if os.environ.get("TRITON_INTERPRET") != "1" or find_spec("triton") is None:
    pytest.skip(
        "needs Triton's interpreter and flash-linear-attention: make test-kernels",
        allow_module_level=True,
    )

CPU = torch.device("cpu")
# One head of the student: the interpreter takes its time.
SHAPE = Shape(heads=1, key=32, value=64)


class Step(int):
    """A number of a loop, as the kernels expect it of the compiler: with `.to`."""

    def to(self, dtype: Any) -> Step:
        return self


@pytest.fixture(scope="module", autouse=True)
def _interpreted() -> None:
    """Triton's interpreter lacks two things that these kernels need."""
    from triton.runtime.autotuner import Autotuner

    made = Autotuner.__init__

    def with_one_choice(
        self: Any, fn: Any, arg_names: Any, configs: Any, *more: Any, **k: Any
    ) -> None:
        made(self, fn, arg_names, configs[:1], *more, **k)

    Autotuner.__init__ = with_one_choice
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that a CPU is no GPU
        import fla.layers  # noqa: F401

    for name, module in list(sys.modules.items()):
        if name.startswith(("fla.ops", "fla.modules")):
            module.range = lambda *bounds: map(Step, builtins.range(*bounds))


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> None:
    """fla as it is on Hopper with Triton 3.4 to 3.7.0."""
    from fla.ops.common import chunk_o

    monkeypatch.setattr(chunk_o, "IS_NVIDIA_HOPPER", True)
    monkeypatch.setattr(chunk_o, "TRITON_ABOVE_3_7_1", False)


@pytest.fixture
def taken() -> Iterator[None]:
    fla_backend.take_over(CPU, SHAPE)
    yield
    fla_backend.give_back(CPU, SHAPE)


def fault_at(*lengths: int) -> str | None:
    return find_fault(
        delta_rule._fla_rule, device=CPU, shape=SHAPE, lengths=lengths, dtypes=[torch.float32]
    )


@pytest.fixture
def arguments(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """What fla's backward pass hands its function, at a length, with such keys."""
    from fla.ops.gated_delta_rule import chunk

    def caught(*, S: int, keys: str) -> dict[str, Any]:
        seen: list[dict[str, Any]] = []
        original = chunk.chunk_bwd_dqkwg

        def watched(**given: Any) -> Any:
            seen.append(given)
            return original(**given)

        with monkeypatch.context() as patch:
            patch.setattr(chunk, "chunk_bwd_dqkwg", watched)
            inputs = some_inputs(S=S, keys=keys, B=1, H=1, K=32, V=64)
            with_gradients(delta_rule._fla_rule, inputs, torch.float32)
        (given,) = seen
        return given

    return caught


@pytest.mark.parametrize("keys", ["random", "poly-A", "dinucleotide"])
@pytest.mark.parametrize("S", [64, 90])
def test_the_part_in_torch_gives_what_flas_own_kernel_gives(
    arguments: Callable[..., dict[str, Any]], S: int, keys: str
) -> None:
    from fla.ops.common.chunk_o import chunk_bwd_dqkwg

    given = arguments(S=S, keys=keys)
    expected = chunk_bwd_dqkwg(**given)
    found = gradients_around_states(
        q_BSHK=given["q"],
        k_BSHK=given["k"],
        u_BSHV=given["v"],
        d_o_BSHV=given["do"],
        h_BNHKV=given["h"],
        d_h_BNHKV=given["dh"],
        d_u_BSHV=given["dv"],
        g_BSH=given["g"],
        scale=given["scale"],
        chunk=given["chunk_size"],
    )
    for name, a, b in zip(("q", "k", "w", "g"), found, expected, strict=True):
        assert a.shape == b.shape
        assert largest_error(a, b.double()) < 2e-6, name


@pytest.mark.parametrize("keys", ["random", "poly-A", "dinucleotide"])
@pytest.mark.parametrize("ours", [False, True])
def test_fla_equals_the_loop_with_and_without_our_part(
    request: pytest.FixtureRequest, ours: bool, keys: str
) -> None:
    if ours:
        request.getfixturevalue("refusing")
        request.getfixturevalue("taken")
    inputs = some_inputs(S=90, keys=keys, B=1, H=1, K=32, V=64)
    expected = with_gradients(step_by_step, inputs)
    found = with_gradients(delta_rule._fla_rule, inputs, torch.float32)
    for name, a, b in zip(NAMES, found, expected, strict=True):
        assert largest_error(a, b) < 1e-4, name


def test_where_fla_is_right_it_runs_as_it_is() -> None:
    assert choose(lambda: fault_at(90), device=CPU, name="a card", shape=SHAPE).name == "fla"


def test_where_fla_refuses_it_runs_with_our_part(refusing: None) -> None:
    assert "Hopper" in str(fault_at(90))
    try:
        chosen = choose(lambda: fault_at(90), device=CPU, name="a card", shape=SHAPE)
    finally:
        fla_backend.give_back(CPU, SHAPE)
    assert chosen.name == "fla+torch"
    assert "Triton >= 3.4.0" in chosen.reason


def test_where_fla_stays_wrong_the_torch_path_runs(
    refusing: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fla.ops.gated_delta_rule import chunk

    right = chunk.prepare_wy_repr_bwd

    def miscompiled(**given: Any) -> tuple[Tensor, ...]:
        d_k, d_v, d_beta, d_g = right(**given)
        return d_k, d_v, 2 * d_beta, d_g

    monkeypatch.setattr(chunk, "prepare_wy_repr_bwd", miscompiled)
    chosen = choose(lambda: fault_at(90), device=CPU, name="a card", shape=SHAPE)
    assert chosen.name == "torch-chunked"
    assert "Triton >= 3.4.0" in chosen.reason
    assert "the gradient of beta" in chosen.reason
    assert chosen.reason in caplog.text
    assert "Hopper" in str(fault_at(90)), "our part was given back"


def test_other_shapes_and_other_calls_stay_flas_own(refusing: None, taken: None) -> None:
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    with pytest.raises(RuntimeError, match="Hopper"):
        with_gradients(delta_rule._fla_rule, some_inputs(S=20, H=2, K=32, V=64), torch.float32)

    def of_packed_sequences(*inputs: Tensor) -> Tensor:
        ends = torch.tensor([0, 12, 20])
        return chunk_gated_delta_rule(*inputs, cu_seqlens=ends)[0]

    with pytest.raises(RuntimeError, match="Hopper"):
        with_gradients(of_packed_sequences, some_inputs(S=20, B=1, H=1, K=32, V=64), torch.float32)


def test_a_length_of_several_chunks_passes_the_self_check_with_our_part(
    refusing: None, taken: None
) -> None:
    assert fault_at(170) is None


def test_flas_layer_with_our_weights_is_our_layer(script: Script) -> None:
    config = HADConfig(hidden_size=16, gdn_heads=1, head_dim=16)
    torch.manual_seed(0)
    ours = BidirectionalGDN(config)
    HADModel(config)._init_weights(ours.forwards)
    HADModel(config)._init_weights(ours.backwards)
    theirs = script("student").fla_layer(ours, config)
    told = []
    for layer in (ours, theirs):
        x_BSE = torch.randn(1, 70, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        y_BSE = layer(x_BSE)
        told.append((y_BSE.detach(), *torch.autograd.grad(y_BSE.square().sum(), x_BSE)))
    for a, b in zip(*told, strict=True):
        assert largest_error(b, a.double()) < 1e-5
