"""Trainings by several processes, for tests: forked from one that has torch loaded.

Each line of JSON on stdin asks for one training; each line on stdout tells, rank by rank, how it
ended. The store by which ranks meet is the parent's, as under torchrun, so that no port is guessed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

import torch
import torch.distributed as dist

from had_pipe import learner
from had_pipe.distill import distill
from had_pipe.errors import NetworkError
from had_pipe.recipe import Recipe
from had_pipe.stream import Batch


def trouble(kind: str) -> None:
    """What befalls a rank."""
    if kind == "network":
        raise NetworkError("the host is gone")
    if kind == "bug":
        raise ZeroDivisionError("a bug")
    os.kill(os.getpid(), signal.Signals[kind])


def one_rank(asked: dict[str, Any], rank: int) -> dict[str, Any]:
    """Train as this rank; how it ended."""
    kind, at = asked["troubles"].get(str(rank), (None, 0))
    learn = learner.Learner.learn

    def troubled(self: learner.Learner, step: int, batch: Batch) -> None:
        if step == at:
            trouble(kind)
        learn(self, step, batch)

    learner.Learner.learn = troubled  # type: ignore[method-assign]
    recipe = asked["recipes"][rank % len(asked["recipes"])]
    told: list[tuple[str, int]] = []
    try:
        made = distill(
            Recipe.model_validate(recipe),
            device=asked["device"],
            report=lambda now: told.append((now.what, now.done)),
        )
    except BaseException as error:
        traceback.print_exc()
        return {"error": type(error).__name__, "said": str(error), "told": told}
    return {
        "error": None,
        "already_done": made.already_done,
        "last": made.last,
        "validation": made.validation,
        "told": told,
    }


def train(asked: dict[str, Any]) -> list[Any]:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    children = []
    for rank in range(asked["world"]):
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.environ |= {
                "RANK": str(rank),
                "WORLD_SIZE": str(asked["world"]),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(store.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": "0",
            }
            with os.fdopen(writing, "w") as pipe:
                json.dump(one_rank(asked, rank), pipe)
            os._exit(0)
        os.close(writing)
        children.append((child, reading))
    ends = []
    for child, reading in children:
        with os.fdopen(reading) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        ends.append(json.loads(said) if said else None)  # None: it was killed
    return ends


if __name__ == "__main__":
    torch.set_num_threads(1)
    # Ranks find each other by the host's name, which need not be known to anybody.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    for line in sys.stdin:
        print(json.dumps(train(json.loads(line))), flush=True)
