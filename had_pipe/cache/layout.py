"""Format 1 in code: what lies where, of which shape, and what the JSON files say.

docs/cache-format.md is normative. This module neither reads nor writes arrays.

W windows of a split, T k-mers per window, G stored groups per window, D channels, P windows a part.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import numpy as np
import numpy.typing as npt
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from had_pipe.cache.codebook import MOST_CHANNELS, Codebook
from had_pipe.cache.codec import CodecName, code_nbytes, learns
from had_pipe.cache.door import read_object
from had_pipe.dna.kmers import K
from had_pipe.errors import CacheCorrupt, CacheRefused, RecipeError, shown

FORMAT = "had-cache/1"
PLAN = "plan.json"
MANIFEST = "manifest.json"
ARCHIVE = "archive.json"
WINDOWS = "windows.parquet"
DATA = "data.zarr"
RECEIPTS = "parts"
WORK = ".work"

CRC_NBYTES = 4
ABSENT = 2**64 - 1
"""Offset and length of a row that a shard does not hold."""

# Ceilings for what a stranger may have made. JSON takes some twenty times its length once parsed;
# what grows with the cache is bounded by what the plan implies.
LARGEST_PLAN = 1 << 20
_LARGEST_MANIFEST = 1 << 28
_LARGEST_NOTE = 1 << 16
_LARGEST_ARRAY = 1 << 28
"""Bytes of a window as stored, and of a chunk made at plan time."""

_MOST_PARTS = 1 << 18
_MOST_WINDOWS = 1 << 28

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]


def _plain(text: str) -> str:
    if shown(text) != text:
        raise ValueError("control characters are no text")
    return text


Text = Annotated[str, Field(max_length=4096), AfterValidator(_plain)]
"""What is printed where a cache is described."""
Count = Annotated[int, Field(ge=0, le=2**53)]


class _Document(BaseModel):
    """Part of a JSON file of the format: nothing unknown, nothing converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def to_json(self) -> bytes:
        """The document as it lies on disk."""
        return canonical_json(self.model_dump(mode="json"))


class GenomePlan(_Document):
    """One reference, named by content."""

    name: Text
    digest: Text
    """GA4GH sequence-collection digest."""
    contigs: Count
    bases: Count
    splits: Text | dict[SplitName, list[Text] | float] | None
    """The recipe's rule; a BED file as the SHA-256 of its bytes."""
    include: Sha256 | None
    exclude: Sha256 | None
    sensitive: bool


class WindowsPlan(_Document):
    """What one example is."""

    bases: Annotated[int, Field(gt=0, le=1 << 20)]
    stride: Annotated[int, Field(gt=0, le=2**53)]
    kmers: Annotated[int, Field(gt=0, le=1 << 18)]
    masked: Annotated[int, Field(gt=0)]
    mask_ratio: float
    stored: Annotated[int, Field(gt=0, le=1 << 18)]
    store: Literal["visible", "masked", "all"]
    views: Annotated[int, Field(gt=0, le=1 << 20)]
    reverse_complement: float
    seed: Annotated[int, Field(ge=-(2**64), le=2**64)]
    algorithm: Literal[1]
    """Order, masks and strands as docs/cache-format.md numbers them."""

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        """A stranger's numbers are used as they stand, so they must not contradict each other."""
        kept = {"visible": self.kmers - self.masked, "masked": self.masked, "all": self.kmers}
        if self.bases != K * self.kmers or not 0 < self.masked < self.kmers:
            raise ValueError(f"{self.kmers} k-mers, {self.masked} masked, of {self.bases} bases")
        if self.stored != kept[self.store]:
            raise ValueError(f"{self.stored} groups stored, {self.store!r} are {kept[self.store]}")
        return self


class SplitPlan(_Document):
    """One split: how many windows, seen how often."""

    windows: Annotated[int, Field(gt=0, le=_MOST_WINDOWS)]
    views: Annotated[list[Annotated[int, Field(ge=0, le=1 << 20)]], Field(min_length=1)]

    @model_validator(mode="after")
    def _each_view_once(self) -> Self:
        if sorted(set(self.views)) != self.views:
            raise ValueError("views that do not ascend")
        return self


class TeacherPlan(_Document):
    """The frozen model, named by content."""

    name: Text
    revision: Text | None
    weights_sha256: Text
    settings_sha256: Sha256 | None = None
    """Of the tokens and settings beside the weights; absent from the JSON of an NT-v2's plan."""
    layer: Annotated[int, Field(ge=-1, le=1 << 20)]
    input: Literal["masked", "full"]
    channels: Annotated[int, Field(gt=0, le=1 << 20)]
    dtype: Literal["float32", "float16", "bfloat16"]
    licence: Text
    unchecked: Literal[True] | None = None
    """True where a recipe left out the check that it knows the DNA; else absent from the JSON."""

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = fields(self)
        optional = {"settings_sha256", "unchecked"}
        return {key: written[key] for key in written if key not in optional or written[key]}


class SourcePlan(_Document):
    """The cache that a recoded one was made from, and what that one had kept of the teacher."""

    cache: Sha256
    codec: Annotated[str, Field(pattern=r"^[a-z][a-z0-9]{0,15}$")]


class Plan(_Document):
    """plan.json: what a cache means; never where, when or by whom it was made."""

    format: Literal["had-cache/1"]
    genomes: Annotated[list[GenomePlan], Field(min_length=1)]
    windows: WindowsPlan
    splits: Annotated[dict[SplitName, SplitPlan], Field(min_length=1)]
    part: Annotated[int, Field(gt=0, le=1 << 20)]
    teacher: TeacherPlan
    codec: CodecName
    licence: Text
    licence_reason: Text | None
    statistics: Sha256
    contents: dict[Text, Sha256]
    source: SourcePlan | None = None
    """Absent from the JSON where a teacher made the cache."""

    @model_serializer(mode="wrap")
    def _without_absent(self, fields: SerializerFunctionWrapHandler) -> dict[str, Any]:
        written: dict[str, Any] = fields(self)
        return {key: written[key] for key in written if key != "source" or self.source is not None}

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.part_count > _MOST_PARTS:
            raise ValueError(f"{self.part_count:,} parts, more than {_MOST_PARTS:,}")
        if learns(self.codec) and self.teacher.channels > MOST_CHANNELS:
            raise ValueError(
                f"{self.teacher.channels:,} channels as {self.codec!r}, which takes at most "
                f"{MOST_CHANNELS:,}"
            )
        largest = max(2 * self.part * self.windows.kmers, *(s.nbytes for s in self.signals))
        if largest > _LARGEST_ARRAY:
            raise ValueError(
                f"an array in pieces of {largest:,} bytes, more than {_LARGEST_ARRAY:,}"
            )
        return self

    @staticmethod
    def new(described: Mapping[str, Any]) -> Plan:
        """A plan to be written. Raises RecipeError where no reader would take it."""
        try:
            plan = Plan.model_validate(described)
        except ValidationError as error:
            raise RecipeError(f"no cache can be made of this recipe: {_fault(error)}") from error
        nbytes = len(plan.to_json())
        if nbytes > LARGEST_PLAN:
            raise RecipeError(
                f"no cache can be made of this recipe: {PLAN} would have {nbytes:,} bytes, more "
                f"than {LARGEST_PLAN:,}; name fewer genomes or contigs"
            )
        return plan

    @cached_property
    def id(self) -> str:
        """The plan id: SHA-256 of plan.json."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @cached_property
    def meaning(self) -> dict[str, Any]:
        """What a recipe decides, flat: key -> value. Two plans of one meaning are one cache."""
        return meaning(self.model_dump(mode="json"))

    @property
    def made_by(self) -> str:
        """The command that makes a cache of this plan."""
        return "had-pipe extract-teacher" if self.source is None else "had-pipe cache recode"

    def parts(self) -> Iterator[Part]:
        """Every part of the cache, split by split, view by view."""
        for split, of_split in self.splits.items():
            for view in of_split.views:
                for number in range(-(-of_split.windows // self.part)):
                    yield Part(split, view, number)

    def part_windows(self, part: Part) -> int:
        """Windows in a part; the last of a split may be short."""
        return min(self.part, self.splits[part.split].windows - part.number * self.part)

    @property
    def part_count(self) -> int:
        """How many parts there are, without walking through them: a stranger's plan may be huge."""
        return sum(-(-s.windows // self.part) * len(s.views) for s in self.splits.values())

    def shards_nbytes(self, parts: Iterable[Part]) -> int:
        """Bytes of the shards of some parts."""
        return sum(
            shard_nbytes(signal, windows=self.part_windows(part), part=self.part)
            for part in parts
            for signal in self.signals
        )

    @property
    def table_nbytes(self) -> int:
        """Most bytes of windows.parquet, packed or not: names of contigs have any length."""
        return (1 << 22) + 256 * sum(split.windows for split in self.splits.values())

    @property
    def largest_nbytes(self) -> int:
        """Most bytes of any object, but for the manifest: no plan of ours implies a longer one."""
        of_arrays = (shard_nbytes(s, windows=self.part, part=self.part) for s in self.signals)
        of_json = LARGEST_PLAN + 6 * self.part * len(self.signals) + 256 * self.teacher.channels
        chunk = 2 * self.part * self.windows.kmers + CRC_NBYTES
        statistics = (
            int(np.prod(shape)) * np.dtype(dtype).itemsize + CRC_NBYTES
            for dtype, shape in self.statistics_arrays.values()
        )
        return max(*of_arrays, of_json, chunk, *statistics, self.table_nbytes)

    @property
    def signals(self) -> tuple[Signal, ...]:
        """The sharded arrays of a view, in the order in which they are written."""
        return signals(
            self.codec,
            self.teacher.dtype,
            groups=self.windows.stored,
            channels=self.teacher.channels,
        )

    @property
    def statistics_arrays(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Element type and shape of what decoding needs besides a window: one chunk each."""
        channels = self.teacher.channels
        of_channels = {"mean": ("float32", (channels,)), "std": ("float32", (channels,))}
        return {**of_channels, **(Codebook.shapes(channels) if learns(self.codec) else {})}

    def keys(self) -> Iterator[str]:
        """Every data object and receipt a sealed cache holds, metadata and manifest apart."""
        for split, of_split in self.splits.items():
            numbers = range(-(-of_split.windows // self.part))
            yield from (f"{DATA}/{split}/kmer_id/c/{number}/0" for number in numbers)
            for view in of_split.views:
                yield from (f"{DATA}/{split}/{view}/mask/c/{number}/0" for number in numbers)
                yield from (f"{DATA}/{split}/{view}/reversed/c/{number}" for number in numbers)
        for part in self.parts():
            yield part.receipt_key
            yield from (part.shard_key(signal) for signal in self.signals)
        for name, (_, shape) in self.statistics_arrays.items():
            yield f"{DATA}/{statistic_key(name, shape)}"

    def metadata_keys(self) -> Iterator[str]:
        """Every zarr.json a cache holds."""
        yield f"{DATA}/zarr.json"
        for group in ("statistics", "statistics/embedding"):
            yield f"{DATA}/{group}/zarr.json"
        for name in self.statistics_arrays:
            yield f"{DATA}/statistics/embedding/{name}/zarr.json"
        for split, of_split in self.splits.items():
            yield f"{DATA}/{split}/zarr.json"
            yield f"{DATA}/{split}/kmer_id/zarr.json"
            for view in of_split.views:
                yield f"{DATA}/{split}/{view}/zarr.json"
                yield f"{DATA}/{split}/{view}/embedding/zarr.json"
                for array in ("mask", "reversed", *(signal.path for signal in self.signals)):
                    yield f"{DATA}/{split}/{view}/{array}/zarr.json"


def statistic_key(name: str, shape: tuple[int, ...]) -> str:
    """Where the one chunk of an array of statistics lies, below data.zarr."""
    return f"statistics/embedding/{name}/c{'/0' * len(shape)}"


@dataclass(frozen=True)
class Signal:
    """A sharded array of a view: its path below the view, element type and shape of one window."""

    path: str
    dtype: str
    window: tuple[int, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of one window, its CRC apart."""
        return math.prod(self.window) * np.dtype(self.dtype).itemsize

    @property
    def stride(self) -> int:
        """Bytes from one window to the next in a shard."""
        return self.nbytes + CRC_NBYTES


def signals(codec: str, dtype: str, *, groups: int, channels: int) -> tuple[Signal, ...]:
    """What a codec stores of a teacher that computes in `dtype`."""
    if codec != "exact":
        value = Signal("embedding/value", "int8", (groups, channels))
        if learns(codec):
            value = Signal("embedding/value", "uint8", (groups, code_nbytes(codec, channels)))
        return (value, Signal("embedding/scale", "float16", (groups,)))
    stored = "uint16" if dtype == "bfloat16" else dtype
    return (Signal("embedding/value", stored, (groups, channels)),)


@dataclass(frozen=True, order=True)
class Part:
    """A fixed run of windows of one split under one view."""

    split: str
    view: int
    number: int

    def __str__(self) -> str:
        return f"{self.split}/{self.view}/{self.number:05d}"

    @property
    def stem(self) -> str:
        """Its name where it is one of many files in a folder."""
        return str(self).replace("/", "-")

    @property
    def receipt_key(self) -> str:
        return f"{RECEIPTS}/{self}.json"

    def shard_key(self, signal: Signal) -> str:
        zeros = "/0" * len(signal.window)
        return f"{DATA}/{self.split}/{self.view}/{signal.path}/c/{self.number}{zeros}"


def shard_index(signal: Signal, *, windows: int, part: int) -> npt.NDArray[np.uint64]:
    """The index of a shard that holds the first `windows` of `part` rows, (part, 2)."""
    index = np.full((part, 2), ABSENT, dtype="<u8")
    index[:windows, 0] = np.arange(windows, dtype=np.uint64) * np.uint64(signal.stride)
    index[:windows, 1] = signal.stride
    return index


def shard_nbytes(signal: Signal, *, windows: int, part: int) -> int:
    """Length of a shard object: rows, then the index and its CRC."""
    return windows * signal.stride + part * 16 + CRC_NBYTES


def _crc_list(text: str) -> str:
    raw = base64.b64decode(text, validate=True)
    if len(raw) % CRC_NBYTES or base64.b64encode(raw).decode("ascii") != text:
        raise ValueError("no whole number of CRCs in plain base64")
    return text


class ShardRecord(_Document):
    """What a receipt says of one shard."""

    nbytes: Annotated[int, Field(ge=0)]
    sha256: Sha256
    crc32c: Annotated[str, AfterValidator(_crc_list)]
    """CRC32C of each window's payload: little-endian uint32, base64."""

    @staticmethod
    def pack(crc: npt.NDArray[np.uint32]) -> str:
        return base64.b64encode(crc.astype("<u4").tobytes()).decode("ascii")

    def crcs(self) -> npt.NDArray[np.uint32]:
        raw = base64.b64decode(self.crc32c, validate=True)
        return np.frombuffer(raw, dtype="<u4").astype(np.uint32, copy=False)


class Receipt(_Document):
    """parts/SPLIT/VIEW/PPPPP.json: the record that makes a part exist."""

    format: Literal["had-cache/1"]
    plan: Sha256
    split: SplitName
    view: Annotated[int, Field(ge=0)]
    part: Annotated[int, Field(ge=0)]
    windows: Annotated[int, Field(gt=0)]
    numerics: dict[Text, Text | int]
    objects: dict[str, ShardRecord]


class ObjectRecord(_Document):
    """One file of a sealed cache."""

    nbytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Archive(_Document):
    """archive.json: that the folder is a cache's archival form, and which files are compressed."""

    format: Literal["had-archive/1"]
    cache: Sha256
    """The id of the cache it unpacks to."""
    packed: dict[str, ObjectRecord]
    """The shards that are compressed, as they lie in the archive; all else is as in the cache."""


class Manifest(_Document):
    """manifest.json: every file of a sealed cache, and the cache id."""

    format: Literal["had-cache/1"]
    plan: Sha256
    objects: dict[str, ObjectRecord]
    id: Sha256

    @staticmethod
    def build(plan: Plan, objects: Mapping[str, ObjectRecord]) -> Manifest:
        ordered = dict(sorted(objects.items()))
        draft = Manifest(format="had-cache/1", plan=plan.id, objects=ordered, id="0" * 64)
        return draft.model_copy(update={"id": draft.computed_id})

    @property
    def computed_id(self) -> str:
        """SHA-256 of the canonical JSON of everything but `id`."""
        rest = canonical_json(self.model_dump(mode="json", exclude={"id"}))
        return hashlib.sha256(rest).hexdigest()


def meaning(document: Mapping[str, Any]) -> dict[str, Any]:
    """A plan's fields that a recipe decides, flat, without those that follow from them."""
    derived = ("contents", "splits", "statistics")
    flat = dict(_flatten({k: v for k, v in document.items() if k not in derived}, ""))
    # How the teacher was looked at before says nothing of what was asked of it.
    flat.pop("teacher.unchecked", None)
    return flat


def canonical_json(value: object) -> bytes:
    """One spelling for one value: keys sorted, no spaces, UTF-8, one newline at the end."""
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode() + b"\n"


def read_plan(cache: Path, *, archived: bool = False) -> tuple[Plan, bytes]:
    """plan.json, checked, and its bytes. Raises CacheRefused, also for an archive not meant."""
    if not archived and os.path.lexists(cache / ARCHIVE):
        raise CacheRefused(
            f"{cache}: a cache in its archival form, which cannot be read in place; "
            f"`had-pipe cache recode {cache} TARGET` unpacks it"
        )
    try:
        raw = _read_json(cache, PLAN, limit=LARGEST_PLAN)
    except (FileNotFoundError, NotADirectoryError):
        raise CacheRefused(
            f"{cache}: no {PLAN} here, so this is no cache; expected a folder that "
            "`had-pipe extract-teacher` made"
        ) from None
    return parse_plan(cache, raw), raw


def parse_plan(cache: Path, raw: bytes) -> Plan:
    """A plan from its bytes. Raises CacheRefused."""
    return _parse(Plan, raw, cache / PLAN)


def read_manifest(cache: Path, plan: Plan) -> Manifest | None:
    """manifest.json, its id checked, or None where the cache is not sealed. Raises CacheRefused."""
    try:
        raw = _read_json(cache, MANIFEST, limit=manifest_limit(plan))
    except FileNotFoundError:
        return None
    return parse_manifest(cache, raw)


def manifest_limit(plan: Plan) -> int:
    """Most bytes that a plan's manifest can have: 256 hold an object's entry."""
    # Beside the parts' objects there are those of metadata and splits.
    views = sum(len(split.views) for split in plan.splits.values())
    entries = (len(plan.signals) + 4) * plan.part_count + 16 * (views + len(plan.splits)) + 64
    return min(_LARGEST_MANIFEST, 256 * entries)


def parse_manifest(cache: Path, raw: bytes) -> Manifest:
    """A manifest from its bytes, its id checked. Raises CacheRefused."""
    path = cache / MANIFEST
    manifest = _parse(Manifest, raw, path)
    if manifest.computed_id != manifest.id:
        raise CacheRefused(
            f"{path}: its id is {manifest.id[:12]}..., its contents make "
            f"{manifest.computed_id[:12]}...; it was edited or damaged: copy it again"
        )
    return manifest


def read_archive(archive: Path, plan: Plan) -> Archive:
    """archive.json, checked for form. Raises CacheRefused."""
    # 256 bytes hold an object's entry.
    limit = min(_LARGEST_MANIFEST, 256 * (plan.part_count * len(plan.signals) + 64))
    try:
        raw = _read_json(archive, ARCHIVE, limit=limit)
    except FileNotFoundError:
        raise CacheRefused(f"{archive}: no {ARCHIVE} here, so this is no archive") from None
    return _parse(Archive, raw, archive / ARCHIVE)


def read_receipt(cache: Path, plan: Plan, part: Part) -> tuple[Receipt, bytes]:
    """One receipt, checked for form, and its bytes. Raises CacheRefused, or CacheCorrupt where
    there is none; the caller checks more.
    """
    try:
        raw = _read_json(cache, part.receipt_key, limit=receipt_limit(plan, part))
    except FileNotFoundError:
        raise CacheCorrupt(
            f"{cache / part.receipt_key}: is missing; run extract-teacher again to make the part"
        ) from None
    return parse_receipt(cache, part, raw), raw


def receipt_limit(plan: Plan, part: Part) -> int:
    """Most bytes that a part's receipt can have: a CRC is less than 6 in base64."""
    return _LARGEST_NOTE + 6 * plan.part_windows(part) * len(plan.signals)


def parse_receipt(cache: Path, part: Part, raw: bytes) -> Receipt:
    """A receipt from its bytes. Raises CacheRefused."""
    return _parse(Receipt, raw, cache / part.receipt_key)


def read_small(path: Path, *, limit: int = _LARGEST_NOTE) -> bytes:
    """A file's bytes, if it is an ordinary file of a sane length."""
    return read_object(path.parent, path.name, limit=limit)


def _read_json(cache: Path, key: str, *, limit: int) -> bytes:
    """The bytes of a JSON object. Raises CacheRefused; FileNotFoundError where there is none."""
    try:
        return read_object(cache, key, limit=limit, start=b"{")
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CacheRefused(f"{cache / key}: cannot be read ({error.strerror})") from error


_Model = TypeVar("_Model", bound=_Document)


def _parse(model: type[_Model], raw: bytes, path: Path) -> _Model:
    try:
        value = json.loads(raw, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        found = value.get("format") if isinstance(value, dict) else None
        (known,) = get_args(model.model_fields["format"].annotation)
        if found != known:
            raise CacheRefused(
                f"{path}: format {repr(found)[:60]}; this version of had-pipe reads {known!r}"
            )
        document = model.model_validate(value)
        canonical = document.to_json()
    except (ValueError, RecursionError) as error:
        reason = _fault(error) if isinstance(error, ValidationError) else str(error)
        raise CacheRefused(f"{path}: not what format 1 says: {reason}; copy it again") from error
    # Or the ids, which are hashes of these bytes, would depend on the spelling.
    if canonical != raw:
        raise CacheRefused(f"{path}: not canonical JSON, so it was edited; restore the original")
    return document


def _fault(error: ValidationError) -> str:
    """Where and what, of the first thing that is wrong."""
    fault = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in fault["loc"])
    return f"{where[:200]}: {fault['msg'][:500]}"


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _flatten(value: object, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, inner in enumerate(value):
            label = inner.get("name", number)
            yield from _flatten(inner, f"{prefix}[{label}]")
    else:
        yield prefix, value
