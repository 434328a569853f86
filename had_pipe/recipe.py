"""The recipe: one TOML file that says everything which changes a result.

Strict on purpose: an unknown key, a wrong type or an impossible value is refused with the key, the
value, what was expected and the nearest known key. Paths are relative to the recipe's folder. What
may differ between machines (device, workers, how loudly) is a flag of a command, never a key here.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from had_pipe.dna.kmers import K, masked_groups
from had_pipe.errors import RecipeError


def _path(value: object, info: ValidationInfo) -> Path:
    if isinstance(value, Path):
        return value
    if not isinstance(value, str) or not value:
        raise ValueError("must be a path in quotes")
    if _URL.match(value):
        raise ValueError("must be a path on this machine: only [cache] path may be a URL")
    folder: Path = (info.context or {}).get("folder", Path())
    try:
        return (folder / Path(value).expanduser()).resolve()
    except RuntimeError as error:  # an unknown ~user, or links in a circle
        raise ValueError(f"must be a path that can be followed: {error}") from error


RecipePath = Annotated[Path, BeforeValidator(_path)]

_URL = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def _path_or_url(value: object, info: ValidationInfo) -> Path | str:
    return value if isinstance(value, str) and _URL.match(value) else _path(value, info)


PathOrURL = Annotated[Path | str, PlainValidator(_path_or_url)]

Splits = Path | Mapping[str, tuple[str, ...] | float]
"""A BED file; contig names by split; or {"blocks": bases, split: share, ...}."""

Seed = Annotated[int, Field(ge=0, lt=2**63)]

_SPLIT_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")


def _splits(value: object, info: ValidationInfo) -> Splits:
    if isinstance(value, str):
        return _path(value, info)
    if not isinstance(value, Mapping) or not value:
        raise ValueError(
            'must be { valid = ["chr8"] }, a BED file, or { blocks = 100_000, valid = 0.1 }'
        )
    names = [name for name in value if name != "blocks"]
    for name in names:
        if not _SPLIT_NAME.fullmatch(name):
            raise ValueError(f"split {name!r}: a name is lower-case letters, digits and _")
        if name == "train":
            raise ValueError("split 'train' is what the others leave: do not name it")
    if "blocks" not in value:
        for name in names:
            contigs = value[name]
            if not isinstance(contigs, list) or not all(isinstance(c, str) for c in contigs):
                raise ValueError(f"split {name!r} must be a list of contig names")
        return {name: tuple(value[name]) for name in names}
    blocks = value["blocks"]
    if not isinstance(blocks, int) or isinstance(blocks, bool) or blocks < 1:
        raise ValueError(f"blocks = {blocks!r}: must be a number of bases")
    if not names:
        raise ValueError("blocks without a split: add the share of one, such as valid = 0.1")
    shares = [value[name] for name in names]
    if not all(isinstance(s, float) and 0 < s < 1 for s in shares) or not 0 < sum(shares) < 1:
        raise ValueError("the share of each split must be between 0 and 1, and all below 1")
    return {"blocks": blocks, **{name: float(value[name]) for name in names}}


class Section(BaseModel):
    """One table of the recipe."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Teacher(Section):
    """`[teacher]`: the frozen model whose embeddings are cached."""

    name: Annotated[str, Field(min_length=1)]
    """A hub name, or a folder written with a leading `./`, `../` or `/`."""
    revision: Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")] | None = None
    """The hub commit, 40 digits; a branch moves, so it is refused. A folder has none."""
    layer: int = -1
    """Whose output is kept: k for block k, -1 for the output of the final norm."""
    input: Literal["masked", "full"] = "masked"
    """What the teacher sees at masked groups: its mask token, or the k-mers themselves."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What its matrix products are in; "auto": bfloat16 on CUDA and on a CPU with tiles for it
    (AMX), else float32. Norms, angles and sums stay float32; the cache records the outcome."""
    unchecked: bool = False
    """True takes a teacher that knows hidden 6-mers no better than their frequency does, or that
    cannot be asked; the cache records it."""

    @field_validator("name")
    @classmethod
    def _resolve_folder(cls, name: str, info: ValidationInfo) -> str:
        if name.startswith(("./", "../", "/", "~")):
            return str(_path(name, info))
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(
                "must be a hub name such as 'org/model', or a folder such as './model'"
            )
        return name

    @property
    def is_folder(self) -> bool:
        return self.name.startswith("/")

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if self.is_folder and self.revision is not None:
            raise ValueError("revision: a folder has none (its weights are identified by SHA-256)")
        if not self.is_folder and self.revision is None:
            raise ValueError("revision: missing; a hub name needs its 40-digit commit")
        return self


class Genome(Section):
    """`[[genome]]`: one reference, and how it is divided."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """A short name, unique in the recipe; it appears in the cache instead of the path."""
    path: RecipePath
    """FASTA (plain, gzip, bgzip) or 2bit."""
    digest: str | None = None
    """GA4GH sequence-collection digest; checked when given."""
    splits: Annotated[Splits, PlainValidator(_splits)] | None = None
    """Contigs by split, a 4-column BED, or seeded blocks; without it all is `train`."""
    include: RecipePath | None = None
    """BED: only windows inside these regions."""
    exclude: RecipePath | None = None
    """BED: no window that touches these regions."""
    sensitive: bool = False
    """True for a controlled-access genome: the cache holds its k-mers and must not be shared."""


class Windows(Section):
    """`[windows]`: what one example is, and how often and how it is seen."""

    bases: Annotated[int, Field(gt=0, le=2**20)]
    """Length of a window, a multiple of 6."""
    stride: Annotated[int, Field(gt=0, le=2**40)]
    """Distance between window starts, in bases."""
    views: Annotated[int, Field(gt=0, le=2**20)] = 1
    """Fresh masks and strands of each training window; epoch e reads view e mod views."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Share of groups masked; their number is rounded half up and equal in every window."""
    store: Literal["visible", "masked", "all"] = "visible"
    """Which groups' embeddings are kept."""
    reverse_complement: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Share of windows a view sees on the other strand."""
    seed: Seed = 0
    """Seed of masks, strands, order and block splits."""

    @field_validator("bases")
    @classmethod
    def _whole_kmers(cls, bases: int) -> int:
        if bases % K:
            raise ValueError(f"must be a multiple of {K}, the teacher's k-mer")
        return bases

    @model_validator(mode="after")
    def _something_on_both_sides(self) -> Self:
        if not 0 < self.masked < self.kmers:
            raise ValueError(
                f"mask_ratio = {self.mask_ratio} masks {self.masked} of {self.kmers} groups: "
                "at least one must be masked and one visible"
            )
        return self

    @property
    def kmers(self) -> int:
        """Groups in a window."""
        return self.bases // K

    @property
    def masked(self) -> int:
        """Masked groups in a window."""
        return masked_groups(self.mask_ratio, self.kmers)

    @property
    def stored(self) -> int:
        """Groups of a window whose embeddings are kept."""
        return {
            "visible": self.kmers - self.masked,
            "masked": self.masked,
            "all": self.kmers,
        }[self.store]


class Cache(Section):
    """`[cache]`: where the cache lies and how embeddings are stored in it."""

    path: PathOrURL
    """The cache's folder. A recipe that only distils may name the URL of a shared cache."""
    codec: Literal["int8", "exact", "compact", "tiny"] = "int8"
    """`int8`: channel-normalised, one scale a token; `exact`: the teacher's own bits; `compact`,
    `tiny`: a fourth and an eighth of float16, with levels learnt from a sample."""
    part: Annotated[int, Field(gt=0, le=2**20)] = 1024
    """Windows in a part: one shard, one receipt, one unit of resume."""
    statistics: RecipePath | None = None
    """Another cache whose channel mean and std are used, so that both share one space."""
    licence: str | None = None
    """SPDX id; inherited from the teacher unless a reason is recorded."""
    licence_reason: str | None = None
    """Why the licence differs from the teacher's."""

    @model_validator(mode="after")
    def _reasoned(self) -> Self:
        if (self.licence is None) != (self.licence_reason is None):
            raise ValueError("licence and licence_reason go together")
        return self

    @property
    def folder(self) -> Path:
        """Where a cache is made. Raises RecipeError where the recipe names a URL."""
        if isinstance(self.path, Path):
            return self.path
        raise RecipeError(
            "[cache] path is a URL: from there caches are only read, by distill; give the folder "
            "to make the cache in, or `had-pipe cache fetch URL FOLDER` to have a copy of that one"
        )


class Student(Section):
    """`[student]`: the layout; the defaults make 1,070,512 parameters."""

    hidden_size: Annotated[int, Field(gt=0)] = 128
    """Width of the residual stream."""
    layers: Annotated[int, Field(gt=0)] = 4
    """Bidirectional Gated DeltaNet layers."""
    gdn_heads: Annotated[int, Field(gt=0)] = 3
    """Heads of a Gated DeltaNet layer."""
    head_dim: Annotated[int, Field(gt=0)] = 32
    """Key width of a head; 48 and 64 are miscompiled on Hopper by Triton 3.4 to 3.7.0."""
    expand_v: Annotated[int, Field(gt=0)] = 2
    """Value width of a head, in key widths."""
    attention_heads: Annotated[int, Field(ge=0)] = 4
    """Heads of the one self-attention layer; 0 leaves the layer out."""
    mlp: Annotated[int, Field(gt=0)] = 512
    """Inner width of the gated MLP."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.attention_heads and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"attention_heads = {self.attention_heads}: must divide hidden_size = "
                f"{self.hidden_size}"
            )
        return self


class Objective(Section):
    """`[objective]`: the two terms of HAD's loss."""

    align: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the alignment of groups with the teacher."""
    reconstruct: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the reconstruction of masked bases (cross-entropy)."""
    target: Literal["raw", "normalised"] = "raw"
    """The teacher's own space, or each channel with mean 0 and std 1."""
    align_on: Literal["visible", "masked", "all"] = "visible"
    """Which groups are aligned; the cache must hold them (`[windows] store`)."""
    pool: Literal["mean", "concat", "per_base"] = "mean"
    """Six features to one group: their mean, all six side by side, or each compared by itself."""
    error: Literal["mse", "smooth_l1"] = "mse"
    """Of the alignment: the squared error, or the same up to 1 and a straight line beyond."""
    masking: Literal["group", "base"] = "group"
    """What the student does not see: the cache's masked groups, or as many bases drawn singly."""
    mask_tokens: Literal["kept", "dropped"] = "kept"
    """Masked bases are mask symbols to the student, or are left out of what it reads."""
    decoder_heads: Annotated[int, Field(gt=0)] = 4
    """Heads of the cross-attention that reconstructs masked bases."""

    @model_validator(mode="after")
    def _something_to_learn(self) -> Self:
        if self.align == 0 and self.reconstruct == 0:
            raise ValueError("align and reconstruct are both 0: nothing would be learnt")
        return self

    @model_validator(mode="after")
    def _pools_whole_groups(self) -> Self:
        if self.mask_tokens == "dropped" and self.align_on != "visible":
            raise ValueError(
                f"mask_tokens = 'dropped' leaves masked groups without features, so align_on = "
                f"{self.align_on!r} has nothing to align: use align_on = 'visible', or "
                "mask_tokens = 'kept'"
            )
        if self.mask_tokens == "dropped" and self.masking == "base":
            raise ValueError(
                "mask_tokens = 'dropped' leaves whole groups out, but masking = 'base' hides "
                "single bases: use masking = 'group', or mask_tokens = 'kept'"
            )
        return self


class Train(Section):
    """`[train]`: one training."""

    out: RecipePath
    """The run's folder: metrics, checkpoints, the student, the report."""
    steps: Annotated[int, Field(gt=0)]
    """Optimiser steps."""
    batch: Annotated[int, Field(gt=0)]
    """Windows a step, over all processes."""
    micro_batch: Annotated[int, Field(gt=0)] | None = None
    """Windows that one process takes through the student at a time, for less memory; gradients are
    summed up to `batch`. Without it a process takes its whole share of the batch."""
    weights: (
        Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(strict=False, min_length=1)]
        | None
    ) = None
    """For several caches, one number for each `--cache` in their order: `[3, 1]` takes three
    windows of the first for one of the second. Without it every window comes equally often."""
    lr: Annotated[float, Field(gt=0)] = 2e-3
    """Peak learning rate of AdamW."""
    lr_final: Annotated[float, Field(ge=0)] = 1e-4
    """Learning rate at the end of the cosine."""
    warmup: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """AdamW weight decay; none on norms, biases, embeddings, A_log and dt_bias."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest global gradient norm."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the student; bfloat16 is autocast with float32 weights."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999. It is then what is
    validated and published. It warms up: after step t the decay is at most (1 + t) / (10 + t)."""
    seed: Seed = 0
    """Seed of the student's first weights and of the order of windows."""
    log_every: Annotated[int, Field(gt=0)] = 10
    """Steps between lines of metrics."""
    validate_every: Annotated[int, Field(gt=0)] = 500
    """Steps between validations; the last step always validates."""
    validation_windows: Annotated[int, Field(gt=0)] = 1024
    """Held-out windows a validation reads (at most; the first ones of the split)."""
    validation_split: str = "valid"
    """The split that is held out; without it in the cache nothing is validated."""
    checkpoint_every: Annotated[int, Field(gt=0)] = 500
    """Steps between checkpoints; the last step always makes one."""
    keep: Annotated[int, Field(gt=0)] = 2
    """Checkpoints kept: the newest, and those before it to fall back to."""
    track: tuple[Literal["tensorboard", "wandb"], ...] = Field(default=(), strict=False)
    """Who else is told of the metrics: "tensorboard" writes into the run's folder, "wandb" follows
    WANDB_MODE and its fellows. Both come with the extra `track`."""

    @model_validator(mode="after")
    def _schedule(self) -> Self:
        if self.micro_batch is not None and self.batch % self.micro_batch:
            raise ValueError(f"micro_batch = {self.micro_batch}: must divide batch = {self.batch}")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup = {self.warmup}: must be less than steps = {self.steps}")
        if self.lr_final > self.lr:
            raise ValueError(f"lr_final = {self.lr_final}: must not exceed lr = {self.lr}")
        return self


class Recipe(Section):
    """A whole recipe. Stage one needs the first four tables, stage two the last four."""

    teacher: Teacher | None = None
    genome: tuple[Genome, ...] = Field(default=(), strict=False)
    windows: Windows | None = None
    cache: Cache
    student: Student = Student()
    objective: Objective = Objective()
    train: Train | None = None

    @field_validator("genome")
    @classmethod
    def _unique(cls, genomes: tuple[Genome, ...]) -> tuple[Genome, ...]:
        names = [genome.name for genome in genomes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two [[genome]] tables are named {name!r}")
        return genomes

    @model_validator(mode="after")
    def _decoder_divides(self) -> Self:
        heads, width = self.objective.decoder_heads, self.student.hidden_size
        if self.objective.reconstruct and width % heads:
            raise ValueError(
                f"[objective] decoder_heads = {heads}: must divide [student] hidden_size = {width}"
            )
        return self


def read_recipe(path: Path) -> Recipe:
    """Read and check one recipe. Raises RecipeError with every fault found, one a line."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not a TOML file: it is not UTF-8 text") from error
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{path}: not valid TOML: {error}") from error
    try:
        return Recipe.model_validate(tables, context={"folder": path.resolve().parent})
    except ValidationError as error:
        faults = [_explain(fault, tables) for fault in error.errors(include_url=False)]
        raise RecipeError("\n".join(f"{path}: {fault}" for fault in faults)) from error


_SECTIONS: dict[str, type[Section]] = {
    "teacher": Teacher,
    "genome": Genome,
    "windows": Windows,
    "cache": Cache,
    "student": Student,
    "objective": Objective,
    "train": Train,
}

_EXPECTED = {
    "int_type": "int",
    "float_type": "a number",
    "string_type": "a string in quotes",
    "bool_type": "true or false",
    "path_type": "a path in quotes",
    "model_type": "a table",
}


def _explain(fault: ErrorDetails, tables: Mapping[str, Any]) -> str:
    """One fault as a sentence: table, key, value, what was expected, the nearest known key."""
    location = [part for part in fault["loc"] if part not in ("function-plain", "constrained-str")]
    table, key = "", ""
    known = list(Recipe.model_fields)
    if location:
        head = str(location[0])
        rest = location[1:]
        if head == "genome" and rest and isinstance(rest[0], int):
            table, rest = f"[[genome]] number {rest[0] + 1}: ", rest[1:]
        elif head in _SECTIONS and (rest or isinstance(tables.get(head), Mapping)):
            table = f"[{head}] "
        else:
            rest = location
        if rest:
            key = str(rest[0])
        if table:
            known = list(_SECTIONS[head].model_fields)
    kind, value = fault["type"], fault["input"]
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
        what = "key" if table else ("table" if isinstance(value, (dict, list)) else "key")
        return f"{table}unknown {what} {key!r}; {hint}"
    if kind == "missing":
        return f"{table}missing key {key!r}" if table else f"missing table [{key}]"
    if kind == "value_error":
        message = str(fault.get("ctx", {}).get("error", fault["msg"]))
        if not key or isinstance(value, (dict, list)):
            return f"{table}{key + ': ' if key else ''}{message}"
        return f"{table}{key} = {_show(value)}: {message}"
    if table and not key:
        return f"{table}must be {_requirement(fault)}: write [[{location[0]}]]"
    return f"{table}{key} = {_show(value)}: must be {_requirement(fault)}"


def _requirement(fault: ErrorDetails) -> str:
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    if kind == "finite_number" or (isinstance(value, float) and not math.isfinite(value)):
        return "finite"
    if kind == "literal_error":
        return f"one of {str(context['expected']).replace(' or ', ', ')}"
    if kind == "string_pattern_mismatch":
        if "40" in context["pattern"]:
            return "a 40-digit commit hash"
        return "letters, digits, '.', '_' and '-'"
    if kind == "tuple_type":
        of = "tables" if len(fault["loc"]) == 1 else "numbers"
        return f"a list of {of}, not {type(value).__name__}"
    if kind == "too_short":
        return "a list of at least one"
    if kind in _EXPECTED:
        return f"{_EXPECTED[kind]}, not {type(value).__name__}"
    bounds = {
        "greater_than": "more than {gt}",
        "greater_than_equal": "at least {ge}",
        "less_than": "less than {lt}",
        "less_than_equal": "at most {le}",
    }
    if kind in bounds:
        return bounds[kind].format(**context)
    return fault["msg"][:1].lower() + fault["msg"][1:]


def _show(value: object) -> str:
    if isinstance(value, str) and (scheme := _URL.match(value)):
        return repr(f"{scheme[0]}...")  # the rest may hold a password or a signature
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
