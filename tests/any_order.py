"""Anything, in any order, against a model: the undisturbed cache."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
from disturbed import (
    MOMENTS,
    PLANNING,
    SEALED,
    Step,
    Stop,
    Worker,
    committed,
    differences,
    in_a_fork,
    tables,
    tree,
)
from hypothesis import stateful, strategies

from had_pipe import extract as stage_one
from had_pipe.cache import Cache, Part, integrity, layout
from had_pipe.errors import CacheError


def anything_in_any_order(
    genome: str, sound: str, folder: str, *, examples: int, steps: int, seed: int
) -> dict[str, Any]:
    """Hypothesis runs, kills, spoils, verifies, reads and heals a cache, and compares with a model.

    The model is the undisturbed cache: an object is right if it has those bytes. Told: how often
    each thing was done.
    """
    expected, plan = tree(Path(sound)), layout.read_plan(Path(sound))[0]
    parts = list(plan.parts())
    keys = {part: [part.receipt_key, *(part.shard_key(s) for s in plan.signals)] for part in parts}
    of_key = {key: part for part, some in keys.items() for key in some}
    values = in_a_fork(lambda: _values(Path(sound), parts))
    done, number = Counter[str](), itertools.count()
    stops = strategies.one_of(
        strategies.none(),
        strategies.builds(
            Stop,
            strategies.sampled_from((*MOMENTS, *SEALED)),
            strategies.integers(1, 4),
            strategies.sampled_from([signal.SIGKILL]),
        ),
    )

    class AnyOrder(stateful.RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.path = Path(folder) / str(next(number))
            self.asked = tables(Path(genome), self.path)

        def teardown(self) -> None:
            self.healed()
            shutil.rmtree(self.path)

        # What is so

        @property
        def planned(self) -> bool:
            return (self.path / layout.PLAN).exists()

        @property
        def sealed(self) -> bool:
            return (self.path / layout.MANIFEST).exists()

        def wrong(self) -> set[str]:
            """Objects that are not right, of parts that are there or should be."""
            found = set()
            for part, some in keys.items():
                if self.sealed or (self.path / part.receipt_key).exists():
                    found |= {key for key in some if self.bytes_of(key) != expected[key]}
            return found

        def bytes_of(self, key: str) -> bytes | None:
            path = self.path / key
            return path.read_bytes() if path.exists() else None

        def work(self, **more: Any) -> int:
            code = Worker(asked=self.asked, **more).start().ended()
            done[f"ended with {code}"] += 1
            return code

        def healed(self) -> None:
            if self.wrong():
                assert self.work(options={"repair": True}) == 0
            assert self.work(quiet=False) == 0
            assert differences(self.path, expected) == []

        # What happens

        @stateful.rule(stop=strategies.sampled_from(PLANNING))
        @stateful.precondition(lambda self: not self.planned)
        def plan_and_die(self, stop: Step) -> None:
            done["plan killed"] += 1
            assert self.work(stop=Stop(stop)) == -signal.SIGKILL

        @stateful.rule(stop=stops, share=strategies.sampled_from([None, "1/2", "2/2", "2/3"]))
        def extract(self, stop: Stop | None, share: str | None) -> None:
            done["extract"] += 1
            spoilt, sealed = self.wrong(), self.sealed
            kept = {key: stat for key, stat in committed(self.path).items() if self.planned}
            code = self.work(
                stop=stop,
                options={"share": stage_one.Share.parse(share)} if share else {},
            )
            # What was spoilt may stand in the way of the seal; then that is said.
            allowed = {0} | ({-signal.SIGKILL} if stop else set()) | ({4} if spoilt else set())
            assert code in allowed, (code, spoilt)
            now = committed(self.path)
            assert all(now.get(key) == kept[key] for key in kept), "made again"
            if code == 0 and not share and not spoilt:
                assert differences(self.path, expected) == []
            if sealed:
                assert self.wrong() == spoilt

        @stateful.rule(
            at=strategies.integers(0, 10**9),
            bit=strategies.integers(0, 7),
            how=strategies.sampled_from(["flip", "flip", "flip", "cut", "empty", "remove", "swap"]),
        )
        @stateful.precondition(lambda self: committed(self.path))
        def spoil(self, at: int, bit: int, how: str) -> None:
            there = sorted(committed(self.path))
            key = there[at % len(there)]
            path = self.path / key
            data = bytearray(path.read_bytes()) if path.exists() else bytearray()
            if not data:
                return
            done[how] += 1
            if how == "flip":
                data[at // 7 % len(data)] ^= 1 << bit
                path.write_bytes(data)
            elif how == "cut":
                path.write_bytes(data[: at // 7 % len(data)])
            elif how == "empty":
                path.write_bytes(b"")
            elif how == "remove":
                path.unlink()
            else:
                other = self.path / there[at // 7 % len(there)]
                if other.exists():
                    path.write_bytes(other.read_bytes())
                    other.write_bytes(data)

        @stateful.rule()
        @stateful.precondition(lambda self: self.planned)
        def verify(self) -> None:
            done["verify"] += 1
            named = set(in_a_fork(lambda: _named(self.path)))
            wrong = self.wrong()
            named_parts = {of_key[key] for key in named if key in of_key}
            assert named_parts == {of_key[key] for key in wrong}, (named, wrong)
            # What a receipt that is wrong itself says of its shards, nobody can know.
            told = {of_key[key] for key in wrong if key.startswith(layout.RECEIPTS)}
            assert {key for key in wrong if of_key[key] not in told} <= named, (named, wrong)

        @stateful.rule()
        @stateful.precondition(lambda self: self.planned)
        def read(self) -> None:
            done["read"] += 1
            wrong = {of_key[key] for key in self.wrong()}
            for part, found in zip(
                parts, in_a_fork(lambda: _values(self.path, parts)), strict=True
            ):
                right = values[parts.index(part)]
                assert found is None or found == right, part
                if part not in wrong and (self.path / part.receipt_key).exists():
                    assert found == right, part

        @stateful.rule(stop=stops)
        @stateful.precondition(lambda self: self.planned)
        def heal(self, stop: Stop | None) -> None:
            done["heal"] += 1
            code = self.work(stop=stop, options={"repair": True})
            assert code in ((0, -signal.SIGKILL) if stop else (0,))
            if code == 0:
                assert differences(self.path, expected) == []

    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
        phases=[hypothesis.Phase.generate],
    )
    stateful.run_state_machine_as_test(hypothesis.seed(seed)(AnyOrder), settings=settings)
    return {"done": dict(done), "caches": next(number)}


def _named(path: Path) -> list[str]:
    return [problem.key for problem in integrity.verify(path).problems]


def _values(path: Path, parts: Sequence[Part]) -> list[str | None]:
    """What reading each part gives, as a digest; None where it is refused."""
    found: list[str | None] = []
    for part in parts:
        try:
            cache = Cache.open(path, incomplete=True)
            rows = np.arange(cache.plan.part_windows(part)) + part.number * cache.plan.part
            block = cache.allocate(len(rows))
            cache.read(part.split, part.view, rows, block)
            assert block.scale is not None
            raw = block.value.tobytes() + block.scale.tobytes()
            found.append(hashlib.sha256(raw).hexdigest())
        except CacheError:
            found.append(None)
    return found
