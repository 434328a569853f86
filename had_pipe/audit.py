"""A cache held against its teacher: whether what is stored is what the teacher says.

How one lab checks another's cache, or its own. Digests prove that a cache is as it was sealed; only
the teacher can tell whether what was sealed is true. Nothing is modified.

W windows, T k-mers per window, G stored groups, D channels.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from had_pipe.batches import embed_batch, enough_memory, fit_batch, to_numpy
from had_pipe.cache import Block, Cache, Part, Plan, integrity
from had_pipe.cache.codec import STD_FLOOR
from had_pipe.cache.reader import GroupLocus
from had_pipe.draws import Purpose, permutation
from had_pipe.errors import CacheMismatch, RecipeError
from had_pipe.parts import batch_of, differences
from had_pipe.progress import Progress, Reporter, silent
from had_pipe.recipe import Recipe
from had_pipe.teachers.teacher import Teacher, load_teacher

LIMITS: Mapping[str, float] = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.998}
"""Least cosine of a group between two classes of arithmetic, by the coarser type of the two.

In normalised space, once what the codec itself loses of the group is taken off. A teacher's own
bfloat16 arithmetic moves a group by about one part in a hundred; the limit allows six.
"""

_OWN = 1.25
"""What is taken off for the codec's own error of a group: near a border it rounds either way."""

_MOSTLY = 0.9
"""So many windows of equal bytes show that those here are made as those there were."""

_SOURCE_ERROR: Mapping[str, float] = {"exact": 0.0, "int8": 0.05, "compact": 0.5, "tiny": 1.0}
"""Of a recoded cache: what its source's codec may have lost of a group, as a share of its norm."""

_ENOUGH = 16
"""Windows from which on codec and statistics are judged too: on fewer, channels may stand still."""

_NOTHING = 0.95
"""A loss, in units of a channel's std, of vectors that tell nothing: the mean has 1."""

_OTHERWISE = 3.0, 10.0
"""A mean off by so many stds, or a std off by such a factor, is of other vectors than these."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A window that is not what the teacher says."""

    part: str
    split: str
    view: int
    row: int
    cosine: float
    """Of its worst group; -1 where one of the two is not finite."""
    locus: GroupLocus
    """Of that group."""
    found: str


@dataclass(frozen=True, kw_only=True)
class Audit:
    """What `audit` looked at and found."""

    path: Path
    cache_id: str
    teacher: str
    windows: int
    """Windows looked at, each with a part, view and strand of its own."""
    windows_total: int
    parts: int
    """Parts that they lie in."""
    parts_total: int
    here: Mapping[str, str | int]
    """The class of arithmetic of this audit, and of the cache."""
    there: Mapping[str, str | int]
    bytes_expected: bool
    """Whether every window had to be of equal bytes: of one class, and nine in ten were."""
    equal_windows: int
    """Of equal bytes."""
    limit: float
    worst_cosine: float
    """The least of all groups, less what the codec loses."""
    loss: float
    """A channel's root mean square error, decoded against the teacher, in units of its std on these
    windows, averaged over channels: nothing that the cache says of itself is in it."""
    loss_said: float
    """What the cache says of it; of a recoded one, against its source."""
    source_codec: str | None
    """Of a recoded cache: the codec that it came by way of."""
    failures: tuple[Failure, ...]
    doubts: tuple[str, ...]
    """What else is not as the cache says: of all windows together."""
    seconds: float

    @property
    def passed(self) -> bool:
        return not (self.failures or self.doubts)

    def share_found(self, share: float) -> float:
        """The chance that an audit like this meets at least one of so large a share of windows."""
        return 1.0 - (1.0 - share) ** self.windows


def audit(
    path: Path,
    teacher: Teacher | Recipe | str,
    *,
    windows: int = 64,
    device: str = "auto",
    offline: bool = False,
    seed: int = 0,
    report: Reporter = silent,
) -> Audit:
    """Run the teacher again on windows drawn from as many parts as can be, and compare.

    `teacher` may be a recipe, whose [teacher] is taken, or a folder or hub name as there, loaded as
    the plan says. Windows are drawn by `seed`: whoever made the cache must not know it. Raises
    CacheMismatch where weights, layer or size are not those the cache was planned for, which says
    more than any window; what windows fail stands in the result.

    Each window is held against what the cache's codec and statistics make of the teacher's vectors;
    all together against the vectors themselves, since these too may be a lie.
    """
    assert windows > 0
    cache = Cache.open(path)
    plan = cache.plan
    if isinstance(teacher, Recipe | str):
        teacher = _load(teacher, plan, device, offline)
    _check_teacher(path, plan, teacher)
    stated = integrity.numerics_class(path, plan)
    assert stated is not None
    there = {key: value for key, value in stated.items() if key != "recoded"}
    batch = batch_of(there, teacher, part=plan.part)
    if batch is None:  # of another class, so that no batch gives its very bits
        batch = fit_batch(teacher, kmers=plan.windows.kmers, part=plan.part)
    here = {**teacher.numerics, "batch": batch}
    # What was lost on the way cannot be made again.
    by_way_of = plan.source.codec if plan.source is not None else "exact"
    one_class = here == there and by_way_of == "exact"
    again = _Again(cache, teacher, batch, by_way_of)
    places = list(_places(plan, windows, seed))
    begun, seen = time.monotonic(), []
    for first in range(0, len(places), batch):
        seen += again.look(places[first : first + batch])
        report(
            Progress(
                what="auditing",
                done=len(seen),
                total=len(places),
                unit="windows",
                seconds=time.monotonic() - begun,
            )
        )
    if one_class:
        # Among other windows the same one may come out otherwise: asked again as it was made.
        seen = [one if one.equal else again.as_made(one.place) for one in seen]
    equal = sum(one.equal for one in seen)
    # Another processor may move last bits within a class; then it does so in most windows, and none
    # is accused of it.
    bytes_expected = one_class and equal >= _MOSTLY * len(seen)
    limit = min(LIMITS[plan.teacher.dtype], LIMITS[teacher.dtype])
    failures = []
    for one in sorted(seen, key=lambda one: one.place):
        if not one.cosine >= limit:
            found = f"cosine {one.cosine:.4f}, expected at least {limit}"
        elif bytes_expected and not one.equal:
            found = "other bytes than the teacher's, in one class of arithmetic"
        else:
            continue
        failures.append(_failure(cache, one, found))
    told = cache.fidelity.get("channel_rmse")
    said = max(float(told), 0.0) if isinstance(told, int | float) else 0.0
    # The source's loss comes on top, and what the two classes of arithmetic may differ by.
    most = 2 * said + _SOURCE_ERROR[by_way_of] + float(np.sqrt(2 * (1 - limit)))
    whole = again.whole
    return Audit(
        path=path,
        cache_id=cache.id,
        teacher=plan.teacher.name,
        windows=len(places),
        windows_total=sum(plan.part_windows(part) for part in plan.parts()),
        parts=len({place.part for place in places}),
        parts_total=plan.part_count,
        here=here,
        there=there,
        bytes_expected=bytes_expected,
        equal_windows=equal,
        limit=limit,
        worst_cosine=min(one.cosine for one in seen),
        loss=whole.loss,
        loss_said=said,
        source_codec=plan.source.codec if plan.source is not None else None,
        failures=tuple(failures),
        doubts=tuple(whole.doubts(cache, most)) if len(places) >= _ENOUGH else (),
        seconds=time.monotonic() - begun,
    )


def _load(named: Recipe | str, plan: Plan, device: str, offline: bool) -> Teacher:
    if isinstance(named, Recipe):
        if named.teacher is None:
            raise RecipeError("the recipe has no [teacher] table; name a teacher's folder instead")
        name, revision = named.teacher.name, named.teacher.revision
    else:
        name = named
        revision = None if Path(name).expanduser().is_dir() else plan.teacher.revision
    # In the plan's own type: its limit is for that one. No teacher that is loaded says float16.
    dtype = "auto" if plan.teacher.dtype == "float16" else plan.teacher.dtype
    return load_teacher(
        name,
        revision=revision,
        layer=plan.teacher.layer,
        device=device,
        dtype=dtype,
        offline=offline,
    )


def _check_teacher(path: Path, plan: Plan, teacher: Teacher) -> None:
    """Its type may be another one: that is for the windows to tell."""
    mine = {
        "weights_sha256": teacher.weights_sha256,
        "settings_sha256": teacher.settings_sha256,
        "layer": teacher.layer,
        "channels": teacher.channels,
    }
    if said := differences({key: getattr(plan.teacher, key) for key in mine}, mine):
        raise CacheMismatch(
            f"{path}: it was planned for another teacher ({said}); audit it with that one"
        )


@dataclass(frozen=True, order=True)
class _Place:
    part: Part
    row: int
    """In its split."""


def _places(plan: Plan, windows: int, seed: int) -> Iterator[_Place]:
    """So many windows, spread over as many parts as can be, all by the seed."""
    parts = list(plan.parts())
    order = permutation(Purpose.AUDIT_SAMPLE, seed, 0, len(parts)).tolist()
    left = min(windows, sum(plan.part_windows(part) for part in parts))
    taken = 0
    inside: dict[int, npt.NDArray[np.int64]] = {}
    while left:
        for number in order:
            part = parts[number]
            if taken >= plan.part_windows(part):
                continue
            if number not in inside:
                count = plan.part_windows(part)
                inside[number] = permutation(Purpose.AUDIT_SAMPLE, seed, 1 + number, count)
            yield _Place(part, part.number * plan.part + int(inside[number][taken]))
            left -= 1
            if not left:
                return
        taken += 1


@dataclass(frozen=True)
class _Seen:
    """One window beside what the teacher says of it now."""

    place: _Place
    equal: bool
    cosine: float
    group: int


class _Whole:
    """All vectors looked at, by channel, in the teacher's own units."""

    def __init__(self, channels: int) -> None:
        self._groups = 0
        self._sum_D, self._square_D, self._error_D = np.zeros((3, channels))

    def add(self, x_WGD: npt.NDArray[np.float32], decoded_WGD: npt.NDArray[np.float32]) -> None:
        """The teacher's vectors, and the stored ones decoded."""
        finite = np.isfinite(x_WGD).all(axis=-1)  # others fail by themselves
        x = x_WGD[finite].astype(np.float64)
        error = np.nan_to_num(decoded_WGD[finite]) - x
        self._groups += len(x)
        self._sum_D += x.sum(axis=0)
        self._square_D += (x**2).sum(axis=0)
        self._error_D += (error**2).sum(axis=0)

    @property
    def _mean_std(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        groups = max(1, self._groups)
        mean = self._sum_D / groups
        std = np.sqrt(np.maximum(self._square_D / groups - mean**2, 0.0))
        return mean, np.maximum(std, max(STD_FLOOR * float(np.median(std)), 1e-12))

    @property
    def loss(self) -> float:
        """As `Audit` has it."""
        _, std = self._mean_std
        return float((np.sqrt(self._error_D / max(1, self._groups)) / std).mean())

    def doubts(self, cache: Cache, most: float) -> Iterator[str]:
        """What is not as the cache says; `most`: the loss that it may have."""
        if not self.loss <= min(most, _NOTHING):
            yield (
                f"what is stored is off by {self.loss:.3g} of a channel's std, expected at most "
                f"{min(most, _NOTHING):.3g} by what the cache says of its codec"
            )
        mean, std = self._mean_std
        off = float(np.sqrt((((cache.mean - mean) / std) ** 2).mean()))
        factor = float(np.median(cache.std / std))
        furthest, largest = _OTHERWISE
        if self._groups and not (off <= furthest and 1 / largest <= factor <= largest):
            yield (
                f"its mean is {off:.3g} stds from that of these windows, its std {factor:.3g} "
                f"times theirs; expected at most {furthest:g}, and a factor below {largest:g}"
            )


class _Again:
    """The teacher at work on windows of a cache once more."""

    def __init__(self, cache: Cache, teacher: Teacher, batch: int, by_way_of: str) -> None:
        self._cache, self._teacher, self._batch = cache, teacher, batch
        self._source_error = _SOURCE_ERROR[by_way_of]
        self.whole = _Whole(cache.plan.teacher.channels)

    def look(self, places: Sequence[_Place]) -> list[_Seen]:
        """Windows from anywhere, embedded together."""
        block = self._cache.allocate(len(places))
        for number, place in enumerate(places):
            one = self._cache.allocate(1)
            rows = np.array([place.row])
            self._cache.read(place.part.split, place.part.view, rows, one)
            _put(block, number, one)
        x = self._embedded(block)
        with np.errstate(all="ignore"):  # whatever a stranger's numbers come to
            decoded = self._cache.codec.decode(
                block.value, block.scale, self._cache.mean, self._cache.std
            )
            self.whole.add(x, decoded)
        return self._compare(places, block, x)

    def as_made(self, place: _Place) -> _Seen:
        """One window among those that it was embedded with."""
        plan, part = self._cache.plan, place.part
        first = part.number * plan.part
        start = first + (place.row - first) // self._batch * self._batch
        rows = np.arange(start, min(start + self._batch, first + plan.part_windows(part)))
        block = self._cache.allocate(len(rows))
        self._cache.read(part.split, part.view, rows, block)
        places = [_Place(part, row) for row in rows.tolist()]
        return self._compare(places, block, self._embedded(block))[place.row - start]

    def _embedded(self, block: Block) -> npt.NDArray[np.float32]:
        """What the teacher says of a block's windows."""
        plan = self._cache.plan
        with enough_memory(f"auditing in batches of {self._batch} windows"):
            embedding = embed_batch(
                self._teacher,
                block.kmer_id,
                block.mask,
                block.reversed,
                store=plan.windows.store,
                shown=plan.teacher.input,
                batch=self._batch,
            )
        x: npt.NDArray[np.float32] = to_numpy(embedding).astype(np.float32)
        return x

    def _compare(
        self, places: Sequence[_Place], block: Block, x: npt.NDArray[np.float32]
    ) -> list[_Seen]:
        cache = self._cache
        with np.errstate(invalid="ignore"):  # what is not finite is told, not warned of
            value, scale = cache.codec.encode(x, cache.mean, cache.std)
            equal = _same_bytes(value, block.value)
            if scale is not None and block.scale is not None:
                equal &= _same_bytes(scale, block.scale)
            z = ((x - cache.mean) / cache.std).astype(np.float64)
            norm = np.maximum(np.linalg.norm(z, axis=-1), 1e-30)
            own = np.linalg.norm(self._decode(value, scale) - z, axis=-1)
            if cache.codec.name == "exact":
                own = np.zeros_like(own)  # rounding to another type than the teacher's is no codec
            found = np.linalg.norm(self._decode(block.value, block.scale) - z, axis=-1)
            error = np.maximum(found - _OWN * own - self._source_error * norm, 0.0) / norm
        cosine = np.nan_to_num(np.maximum(1 - error**2 / 2, -1.0), nan=-1.0)
        group = cosine.argmin(axis=1)
        return [
            _Seen(place, bool(equal[w]), float(cosine[w, group[w]]), int(group[w]))
            for w, place in enumerate(places)
        ]

    def _decode(self, value: Any, scale: Any) -> npt.NDArray[np.float64]:
        cache = self._cache
        z: npt.NDArray[np.float32] = cache.codec.decode(
            value, scale, cache.mean, cache.std, space="normalised"
        )
        return z.astype(np.float64)


def _put(block: Block, number: int, one: Block) -> None:
    for name in ("kmer_id", "mask", "reversed", "value", "scale"):
        array = getattr(one, name)
        if array is not None:
            getattr(block, name)[number] = array[0]


def _same_bytes(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    windows = len(a)
    flat = [np.ascontiguousarray(array).reshape(windows, -1).view(np.uint8) for array in (a, b)]
    same: npt.NDArray[np.bool_] = (flat[0] == flat[1]).all(axis=1)
    return same


def _failure(cache: Cache, one: _Seen, found: str) -> Failure:
    part, row = one.place.part, one.place.row
    return Failure(
        part=str(part),
        split=part.split,
        view=part.view,
        row=row,
        cosine=one.cosine,
        locus=cache.group_locus(part.split, row, view=part.view, group=one.group),
        found=found,
    )
