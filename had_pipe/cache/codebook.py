"""Normalised embeddings as a few bytes: turned to their principal components, each component coded
with as many levels as it is worth.

Learnt from a calibration sample. Levels are the means of what is coded as them, stretched until
decoded components lie on the line through the true ones: rounding that is right on average is
learnt away by a student, a target that is drawn towards the mean is not.

What is stored must not depend on how many groups are coded at once, nor on the device, so encoding
is exact until it compares: z and the rotation as whole numbers whose products add up in float64
without rounding, whatever the order. Arrays are NumPy or torch ones.
Formulas: docs/cache-format.md, Codecs.

N groups, D channels and as many components, C bytes a group.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = Any
"""A NumPy array or a torch tensor."""

BYTE_VALUES = 255
"""Values of a byte that are written; the last is the fill value."""

MOST_CHANNELS = 1 << 13
"""The rotation has as many squared, and sums over so many stay exact."""

_ROTATION_UNIT = 2.0**20  # the rotation's numbers are multiples of one by this
_VALUE_UNIT = 2.0**24  # z keeps so many steps below its group's power of two
_SQUARE_UNIT = 2.0**15  # and components so many when their squares are added
_SCALES = (2.0**-24, 65504.0)  # float16 without 0 and infinity
_AT_ONCE = 1 << 22  # elements encoded in one go

# The fit
_SPREAD_FLOOR = 1e-3  # least variance of a component, as a share of the mean one
_SHOWN = 1 << 15  # groups that levels are learnt from
_ROUNDS = 40  # of Lloyd's algorithm
_MOST_STRETCHED = 2.0
_CLIPPED = 64.0  # stds: one mad value must not turn the axes
_COVARIANCE_UNIT = 256.0
# What is not coded at all is not learnt at all: worse than noise of the same size. Measured.
_UNCODED = 3.0


@dataclass(frozen=True, eq=False)
class Codebook:
    """How the bytes of a group are read, all float32 but `byte`."""

    rotation: npt.NDArray[np.float32]
    """(D, D): components are rows, from the largest."""
    spread: npt.NDArray[np.float32]
    """(D): a component's size in the calibration sample; what a scale is measured against."""
    stretch: npt.NDArray[np.float32]
    """(D): what a component is multiplied with before its nearest level is looked for."""
    level: npt.NDArray[np.float32]
    """(256, D): the component, by its scale, of a group whose byte `byte[d]` has such a value."""
    byte: npt.NDArray[np.uint16]
    """(D): the byte that a component is coded in."""
    _elsewhere: dict[str, _Tables] = field(init=False, default_factory=dict, repr=False)

    @staticmethod
    def shapes(channels: int) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Element type and shape of each array."""
        return {
            "rotation": ("float32", (channels, channels)),
            "spread": ("float32", (channels,)),
            "stretch": ("float32", (channels,)),
            "level": ("float32", (256, channels)),
            "byte": ("uint16", (channels,)),
        }

    @property
    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """By name, as they are stored."""
        return {name: getattr(self, name) for name in self.shapes(len(self.byte))}

    @staticmethod
    def fit(sample_ND: npt.NDArray[np.float32], nbytes: int) -> Codebook:
        """The codebook of a calibration sample in normalised space, `nbytes` a group."""
        channels = sample_ND.shape[1]
        assert 0 < nbytes <= channels <= MOST_CHANNELS
        rotation = _principal(sample_ND)
        turned = _turned(rotation)
        every = -(-len(sample_ND) // _SHOWN)
        size_D = np.zeros(channels)
        shown = []
        for block in _blocks(sample_ND):
            y = _components(sample_ND[block], turned)
            size_D += (y**2).sum(axis=0)
            shown.append(y[(-block.start) % every :: every])
        size_D /= len(sample_ND)
        floor = max(_SPREAD_FLOOR * float(size_D.mean()), 1e-30)
        spread = np.sqrt(np.maximum(size_D, floor)).astype(np.float32)
        y_ND = np.concatenate(shown)
        scaled_DN = _scaled(y_ND, _scale(y_ND, spread.astype(np.float64))).T
        byte, count = _share_out(size_D, nbytes)
        level = np.zeros((256, channels), dtype=np.float32)
        stretch = np.ones(channels, dtype=np.float32)
        radix = np.ones(nbytes, dtype=np.int64)
        for d in range(channels):
            found, stretch[d] = _levels(np.sort(scaled_DN[d]), int(count[d]))
            level[:, d] = found[np.arange(256) // radix[byte[d]] % len(found)]
            radix[byte[d]] *= len(found)
        return Codebook(rotation, spread, stretch, level, byte)

    def encode(self, z_ND: Array) -> tuple[Array, Array]:
        """Bytes (N, C) and float16 scale (N) of normalised embeddings; the same for any N."""
        tables = self._on(z_ND)
        done = [tables.encode(z_ND[block]) for block in _blocks(z_ND)]
        if len(done) == 1:
            return done[0]
        join = np.concatenate if isinstance(z_ND, np.ndarray) else _torch(z_ND).cat
        return join([code for code, _ in done]), join([scale for _, scale in done])

    def decode(self, code_NC: Array, scale_N: Array) -> Array:
        """Normalised embeddings (N, D) in float32."""
        tables = self._on(code_NC)
        return tables.decode(code_NC, scale_N)

    def _on(self, array: Array) -> _Tables:
        """The tables in the library and on the device of an array."""
        place = "numpy" if isinstance(array, np.ndarray) else str(array.device)
        if place not in self._elsewhere:
            tables = self._tables
            if place != "numpy":
                torch = _torch(array)
                moved = {
                    name: torch.from_numpy(np.array(value)).to(array.device)
                    for name, value in vars(tables).items()
                }
                tables = _Tables(**moved)
            self._elsewhere[place] = tables
        return self._elsewhere[place]

    @cached_property
    def _tables(self) -> _Tables:
        channels = len(self.byte)
        radix = np.zeros(channels, dtype=np.int64)
        borders = []
        for d in range(channels):
            levels, digit = np.unique(self.level[:, d], return_inverse=True)
            middle = (levels[1:].astype(np.float64) + levels[:-1]) / 2
            borders.append((middle / self.stretch[d]).astype(np.float32))
            # Of a component with one level, nothing is written.
            radix[d] = int(np.argmax(digit.reshape(-1) == 1)) if len(levels) > 1 else 0
        above = np.full((channels, max(map(len, borders))), np.inf, dtype=np.float32)
        for d, border in enumerate(borders):
            above[d, : len(border)] = border
        return _Tables(
            turned=_turned(self.rotation),
            spread=self.spread.astype(np.float64),
            above=above,
            borders=np.array([len(border) for border in borders]),
            radix=radix,
            byte=self.byte.astype(np.int64),
            rotation=self.rotation,
            level=np.ascontiguousarray(self.level.T).reshape(-1),
            first=np.arange(channels, dtype=np.int64) * 256,
            bytes=np.zeros(int(self.byte.max()) + 1, dtype=np.int64),
        )


@dataclass(frozen=True, eq=False)
class _Tables:
    """A codebook made ready, in one library on one device."""

    turned: Array
    """(D, D) float64: the rotation's transpose in its units."""
    spread: Array
    above: Array
    """(D, most levels less one): a value above so many of them has that digit."""
    borders: Array
    """(D): how many of them there are."""
    radix: Array
    """(D): what a digit counts in its byte."""
    byte: Array
    rotation: Array
    level: Array
    """(D * 256)"""
    first: Array
    """(D): where the levels of a component begin."""
    bytes: Array
    """(C): empty."""

    def encode(self, z_ND: Array) -> tuple[Array, Array]:
        y_ND = _components(z_ND, self.turned)
        scale_N = _scale(y_ND, self.spread)
        y_ND = _scaled(y_ND, scale_N)
        if isinstance(y_ND, np.ndarray):
            y_DN = np.ascontiguousarray(y_ND.T)
            code_CN = np.zeros((len(self.bytes), len(y_ND)), dtype=np.int64)
            for d in np.flatnonzero(self.radix).tolist():
                digit_N = np.searchsorted(self.above[d, : self.borders[d]], y_DN[d])
                code_CN[self.byte[d]] += digit_N * self.radix[d]
            return np.ascontiguousarray(code_CN.T.astype(np.uint8)), scale_N
        torch = _torch(y_ND)
        digit_DN = torch.searchsorted(self.above, y_ND.T.contiguous())
        code_CN = self.bytes[:, None].repeat(1, len(y_ND))
        code_CN.index_add_(0, self.byte, digit_DN * self.radix[:, None])
        return code_CN.T.contiguous().to(torch.uint8), scale_N

    def decode(self, code_NC: Array, scale_N: Array) -> Array:
        if isinstance(code_NC, np.ndarray):
            place_ND = code_NC.take(self.byte, axis=-1) + self.first
            y_ND = self.level.take(place_ND)
        else:
            place_ND = code_NC.index_select(-1, self.byte) + self.first
            y_ND = self.level.take(place_ND)
        y_ND *= _cast(scale_N, "float32")[:, None]
        return y_ND @ self.rotation


# Exact arithmetic


def _turned(rotation: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    return np.ascontiguousarray((rotation.astype(np.float64) * _ROTATION_UNIT).T)


def _components(z_ND: Array, turned: Array) -> Array:
    """z by the rotation in float64, exact but for z's own rounding to 24 bits of its largest.

    |z| has at most 24 bits, rows of the rotation are 20 bits long, so that no sum of their products
    comes near 2**53.
    """
    z = _cast(z_ND, "float64")
    mantissa, _ = _library(z).frexp(_largest(z))
    power = _largest(z) / mantissa  # of two: exact
    whole = (z / power[:, None] * _VALUE_UNIT).round()
    y: Array = (whole @ turned) * (power / (_VALUE_UNIT * _ROTATION_UNIT))[:, None]
    return y


def _scale(y_ND: Array, spread: Array) -> Array:
    """How large a group is beside the calibration sample, component by component, in float16."""
    w = y_ND / spread
    largest = _largest(w)
    square = ((w / largest[:, None] * _SQUARE_UNIT).round() ** 2).sum(-1)  # whole numbers: exact
    scale: Array = largest * ((square / w.shape[-1]) ** 0.5 / _SQUARE_UNIT)
    # By way of float32, as torch goes, so that both round alike.
    return _cast(_cast(scale.clip(*_SCALES), "float32"), "float16")


def _scaled(y_ND: Array, scale_N: Array) -> Array:
    return _cast(y_ND / _cast(scale_N, "float64")[:, None], "float32")


def _largest(x_ND: Array) -> Array:
    return _library(x_ND).amax(abs(x_ND), -1).clip(1e-300)


# Learning


def _principal(sample_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The sample's principal axes as rows, largest first, in the rotation's units."""
    from threadpoolctl import threadpool_limits

    channels = sample_ND.shape[1]
    second = np.zeros((channels, channels))
    for block in _blocks(sample_ND):
        # Whole numbers below 2**14: exact in any order.
        whole = (sample_ND[block].astype(np.float64).clip(-_CLIPPED, _CLIPPED)) * _COVARIANCE_UNIT
        whole = whole.round()
        second += whole.T @ whole
    with threadpool_limits(limits=1):  # or the last bits would depend on how many threads there are
        _, axis = np.linalg.eigh(second)
    rotation: npt.NDArray[np.float64] = axis[:, ::-1].T
    largest = np.take_along_axis(rotation, abs(rotation).argmax(axis=1)[:, None], axis=1)
    rotation = rotation * np.where(largest < 0, -1.0, 1.0)
    return ((rotation * _ROTATION_UNIT).round() / _ROTATION_UNIT).astype(np.float32)


def _noise() -> npt.NDArray[np.float64]:
    """What n levels cost of a component's variance, n = 1 to 255: errors that are right on average.

    d of a normal variable's variance is lost by its n best levels (Max, 1960; Panter and Dite for
    many): stretched until they are right on average, they cost d / (1 - d).
    """
    n = np.arange(1, BYTE_VALUES + 1)
    lost = np.pi * math.sqrt(3) / 2 / (n + 0.85) ** 2
    lost[1:4] = 0.3634, 0.1902, 0.1175
    cost: npt.NDArray[np.float64] = lost / (1 - lost)
    cost[0] = _UNCODED
    return cost


def _share_out(
    size_D: npt.NDArray[np.float64], nbytes: int
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
    """The byte of each component, and how many levels it gets there."""
    noise, bits = _noise(), np.log2(np.arange(1, BYTE_VALUES + 1))
    size_D = np.maximum(size_D, 1e-30)
    # The price of a bit at which all of them cost what there is.
    low, high = 1e-30, 4 * float(size_D.max())
    wanted = np.zeros(len(size_D))
    for _ in range(100):
        price = math.sqrt(low * high)
        wanted = bits[np.argmin(size_D[:, None] * noise + price * bits, axis=1)]
        low, high = (price, high) if wanted.sum() > bits[-1] * nbytes else (low, price)
    # The largest first, each into the byte that has most room.
    byte = np.zeros(len(size_D), dtype=np.uint16)
    room = [(0.0, at) for at in range(nbytes)]
    for d in np.argsort(-wanted, kind="stable").tolist():
        taken, at = heapq.heappop(room)
        byte[d] = at
        heapq.heappush(room, (taken + wanted[d], at))
    count = np.ones(len(size_D), dtype=np.int64)
    for at in range(nbytes):
        inside = np.flatnonzero(byte == at)
        count[inside] = _fill_byte(size_D[inside], noise, bits)
    return byte, count


def _fill_byte(
    size: npt.NDArray[np.float64], noise: npt.NDArray[np.float64], bits: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """Levels of the components of one byte: one more where it helps most, while they fit."""
    count = np.ones(len(size), dtype=np.int64)
    while True:
        free = math.prod(count.tolist()) // count * (count + 1) <= BYTE_VALUES
        if not free.any():
            return count
        here = count - 1
        more = np.minimum(count, BYTE_VALUES - 1)
        worth = size * (noise[here] - noise[more]) / (bits[more] - bits[here]).clip(1e-9)
        count[np.argmax(np.where(free, worth, -1.0))] += 1


def _levels(value: npt.NDArray[np.float32], count: int) -> tuple[npt.NDArray[np.float32], float]:
    """At most `count` levels for ascending values, and how far they are stretched."""
    none = np.zeros(1, dtype=np.float32), 1.0
    if count == 1 or value[0] == value[-1]:
        return none
    sums = np.concatenate([[0.0], np.cumsum(value, dtype=np.float64)])
    level = np.unique(value[((np.arange(count) + 0.5) / count * len(value)).astype(np.int64)])
    level = level.astype(np.float64)
    for _ in range(_ROUNDS):
        edge = np.searchsorted(value, (level[1:] + level[:-1]) / 2)
        edge = np.concatenate([[0], edge, [len(value)]])
        many, total = np.diff(edge), np.diff(sums[edge])
        level = np.where(many > 0, total / np.maximum(many, 1), level)
    along = float((level * total).sum())
    stretch = float((value.astype(np.float64) ** 2).sum()) / max(along, 1e-30)
    stretch = min(max(stretch, 1.0), _MOST_STRETCHED)
    found = np.unique((level * stretch).astype(np.float32))
    return (found, stretch) if len(found) > 1 else none


# Either library


def _library(x: Array) -> Any:
    return sys.modules[type(x).__module__.partition(".")[0]]


_torch = _library


def _cast(x: Array, dtype: str) -> Array:
    kind = getattr(_library(x), dtype)
    return x.astype(kind, copy=False) if isinstance(x, np.ndarray) else x.to(kind)


def _blocks(x_ND: Array) -> Iterator[slice]:
    """Some groups at a time, so that what is computed on the way fits into memory."""
    step = max(1, _AT_ONCE // x_ND.shape[1])
    for first in range(0, max(1, len(x_ND)), step):
        yield slice(first, first + step)
