"""Several processes at one training: what they tell each other, and how they end alike.

A launcher (torchrun, srun) starts the same command on every device, and says to each which one it
is by RANK, WORLD_SIZE and LOCAL_RANK. Alone, a process talks to nobody and every call returns at
once. It does not know what is trained.

Words go from host to host (gloo), sums of gradients from device to device (NCCL): a process that
cannot go on says so before the others wait for it on their devices, where nothing wakes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from had_pipe import errors
from had_pipe.errors import HadPipeError, NetworkError, RecipeError
from had_pipe.signals import Signals, Stopped

_T = TypeVar("_T")

_PATIENCE = timedelta(hours=1)
"""How long one process waits for another, which may be measuring floors over a slow network."""
_PATIENCE_TO_MEET = timedelta(minutes=10)
"""And at the start, where one may have failed before it could say so."""
_PATIENCE_OF_DEVICES = timedelta(minutes=10)
"""And one device for another: their processes have just agreed to go on."""
_FAILED = 1 << 10
"""Added to the rank of a process that failed: more than any signal's number."""


@dataclass(frozen=True)
class Place:
    """Which of how many processes this one is, and which on its machine."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @staticmethod
    def of(environment: Mapping[str, str] = os.environ) -> Place:
        """As a launcher says; alone where none does. Raises RecipeError."""
        if environment.get("WORLD_SIZE", "1") == "1":
            return Place()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        said = {name: environment.get(name, "") for name in names}
        if not all(text.isdecimal() and text.isascii() for text in said.values()) or not (
            int(said["RANK"]) < int(said["WORLD_SIZE"])
        ):
            told = ", ".join(f"{name}={text!r}" for name, text in said.items())
            raise RecipeError(
                f"WORLD_SIZE asks for several processes, but the environment says {told}: expected "
                "a RANK from 0 to WORLD_SIZE - 1 and the LOCAL_RANK on this machine; start them "
                "with torchrun, or unset WORLD_SIZE"
            )
        return Place(*(int(said[name]) for name in names))


class Processes:
    """This process among those of its training."""

    def __init__(self, place: Place) -> None:
        self.rank, self.world = place.rank, place.world
        self._devices: dist.ProcessGroup | None = None
        self._lost: NetworkError | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that reads and writes for all."""
        return self.rank == 0

    def use(self, device: torch.device) -> None:
        """Where the tensors of `average` lie."""
        if self.world > 1 and device.type == "cuda":
            torch.cuda.set_device(device)
            self._devices = self._answered(
                lambda: dist.new_group(backend="nccl", timeout=_PATIENCE_OF_DEVICES)
            )

    @contextmanager
    def together(self, signals: Signals | None = None) -> Iterator[None]:
        """All leave this block alike: where it fails in one process, it fails in every one.

        So does a signal: all raise Stopped. Within the block no process may wait for another.
        """
        failed: Exception | None = None
        try:
            yield
        except Stopped:
            assert signals is not None
        except Exception as error:
            failed = error
        outcome = signals.number if signals is not None else 0
        if failed is not None:
            outcome = _FAILED + self.rank
        worst = self.most(outcome)
        if worst >= _FAILED:
            told = self.share(_words(failed) if failed else b"", source=worst - _FAILED)
            if failed is None:
                raise _another(told, rank=worst - _FAILED, world=self.world)
            raise failed
        if worst:
            assert signals is not None
            signals.obey(worst)

    def most(self, number: float) -> int:
        """The largest of the numbers that the processes give; whole ones."""
        return int(self._reduced(torch.tensor([float(number)]).double(), dist.ReduceOp.MAX)[0])

    def largest(self, numbers: Tensor) -> Tensor:
        """The largest of each number, float64, on the CPU."""
        return self._reduced(numbers, dist.ReduceOp.MAX)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of each number over the processes, float64, on the CPU."""
        return self._reduced(numbers, dist.ReduceOp.SUM)

    def average(self, tensor: Tensor) -> None:
        """Make a tensor on the device the mean over the processes: the same bits in all of them."""
        if self.world > 1:
            self._answered(lambda: dist.all_reduce(tensor, group=self._devices))
            tensor /= self.world

    def share(self, data: bytes, *, source: int = 0) -> bytes:
        """What one process gives, in every one; what the others give is not looked at."""
        if self.world == 1:
            return data
        length = torch.tensor([len(data)])
        self._answered(lambda: dist.broadcast(length, source))
        held = torch.zeros(int(length), dtype=torch.uint8)
        if self.rank == source and data:
            held = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        if len(held):
            self._answered(lambda: dist.broadcast(held, source))
        return held.numpy().tobytes()

    def _reduced(self, numbers: Tensor, how: dist.ReduceOp.RedOpType) -> Tensor:
        reduced = numbers.detach().cpu().double().clone()
        if self.world > 1:
            self._answered(lambda: dist.all_reduce(reduced, op=how))
        return reduced

    def _answered(self, ask: Callable[[], _T]) -> _T:
        """What was asked of the other processes; once one does not answer, none is asked again."""
        if self._lost is not None:
            raise self._lost
        try:
            return ask()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            self._lost = NetworkError(
                f"rank {self.rank} of {self.world}: another process of this training has ended or "
                f"cannot be reached ({reason}): see what it said, then start all of them again"
            )
            raise self._lost from error


ALONE = Processes(Place())


@contextmanager
def joined(place: Place) -> Iterator[Processes]:
    """Meet the other processes, and part from them at the end. Raises NetworkError."""
    if place.world == 1:
        yield ALONE
        return
    address, port = (os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if not address or not port:
        raise RecipeError(
            f"rank {place.rank} of {place.world}: MASTER_ADDR={address!r}, MASTER_PORT={port!r}: "
            "expected where rank 0 can be reached; torchrun sets both"
        )
    try:
        store, *_ = next(rendezvous("env://", place.rank, place.world, timeout=_PATIENCE_TO_MEET))
        dist.init_process_group(
            "gloo", store=store, rank=place.rank, world_size=place.world, timeout=_PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise NetworkError(
            f"rank {place.rank} of {place.world}: the processes of this training did not meet at "
            f"{address}:{port} ({str(error).splitlines()[0]}): see that all were started, and that "
            "this host reaches that one"
        ) from error
    try:
        yield Processes(place)
    finally:
        dist.destroy_process_group()


def _words(error: Exception) -> bytes:
    """An error as another process can raise it."""
    if isinstance(error, HadPipeError):
        return json.dumps([type(error).__name__, str(error)]).encode()
    said = f"{type(error).__name__}: {error}; its own output says where"
    return json.dumps([HadPipeError.__name__, said]).encode()


def _another(told: bytes, *, rank: int, world: int) -> HadPipeError:
    """The error of another process, as this one raises it."""
    name, said = json.loads(told)
    kind = getattr(errors, name)
    assert issubclass(kind, HadPipeError)
    error: HadPipeError = kind(f"rank {rank} of {world}: {said}")
    return error
