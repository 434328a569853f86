"""Stage one: what lies in the cache is what the teacher says, whatever happened on the way."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
import pytest
import zarr
from conftest import ECOLI
from numpy_teacher import CHANNELS, NumpyTeacher, embed_one
from test_corpus import TURNED, random_letters, write_fasta

from had_pipe.cache import Cache, integrity, layout
from had_pipe.cache.layout import Part
from had_pipe.errors import (
    CacheCorrupt,
    CacheMismatch,
    CacheRefused,
    Interrupted,
    NonFiniteError,
    RecipeError,
    StorageError,
)
from had_pipe.extract import ExtractSummary, Share, extract
from had_pipe.parts import PartMaker, lease_of
from had_pipe.progress import Progress, silent
from had_pipe.recipe import Recipe
from had_pipe.survey import survey

BASES, KMERS, PART = 60, 10, 20
FEW = {"valid": ["held_out"]}


def genome_letters() -> dict[str, str]:
    rng = np.random.default_rng(21)
    return {"one": random_letters(rng, 6_500), "held_out": random_letters(rng, 2_000)}


@pytest.fixture(scope="module")
def genome(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_fasta(tmp_path_factory.mktemp("genome") / "g.fa", genome_letters())


def a_recipe(genome: Path, path: Path, /, **changed: Mapping[str, Any]) -> Recipe:
    """A recipe of two views and two splits; a keyword changes keys of the table of that name."""
    tables: dict[str, Any] = {
        "teacher": {"name": "/there/is/none", "input": "masked"},
        "genome": {"name": "g", "path": str(genome), "splits": FEW},
        "windows": {"bases": BASES, "stride": BASES, "views": 2, "mask_ratio": 0.25, "seed": 3},
        "cache": {"path": str(path), "part": PART},
    }
    for name, keys in changed.items():
        tables[name] = {**tables[name], **keys}
    tables["genome"] = [tables["genome"]]
    return Recipe.model_validate(tables)


def make(genome: Path, path: Path, /, **changed: Mapping[str, Any]) -> ExtractSummary:
    return extract(a_recipe(genome, path, **changed), teacher=NumpyTeacher())


@pytest.fixture(scope="module")
def whole(genome: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache that an undisturbed run makes."""
    path = tmp_path_factory.mktemp("whole") / "cache"
    make(genome, path)
    return path


def tree(path: Path) -> dict[str, bytes]:
    files = (file for file in path.rglob("*") if not file.is_dir())
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


def assert_same_bytes(path: Path, other: Path) -> None:
    one, two = tree(path), tree(other)
    assert one.keys() == two.keys()
    assert [key for key in one if one[key] != two[key]] == []


# What lies in the cache


def shown(letters: str, reverse: bool) -> npt.NDArray[np.uint16]:
    """K-mer ids of a window as the teacher reads it, by spelling."""
    text = letters.upper()
    text = text.translate(TURNED)[::-1] if reverse else text
    kmers = [text[i : i + 6] for i in range(0, len(text), 6)]
    return np.array([int(k.translate(str.maketrans("ACGT", "0123")), 4) for k in kmers], np.uint16)


def said_of(
    path: Path, letters: Mapping[str, str], split: str, view: int, *, masked_is_hidden: bool
) -> Iterator[npt.NDArray[np.float32]]:
    """What the teacher says of all k-mers of every window, from the genome's letters alone."""
    group = zarr.open_group(path / "data.zarr", mode="r")[f"{split}/{view}"]
    rows = [r for r in pq.read_table(path / "windows.parquet").to_pylist() if r["split"] == split]
    for row, mask, reverse in zip(rows, group["mask"][:], group["reversed"][:], strict=True):
        window = letters[row["contig"]][row["start"] : row["start"] + BASES]
        yield embed_one(
            shown(window, bool(reverse)), mask if masked_is_hidden else np.zeros_like(mask)
        )


def by_hand(
    emb_GD: npt.NDArray[np.float32], mean: npt.NDArray[np.float32], std: npt.NDArray[np.float32]
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float16]]:
    """int8 as docs/cache-format.md has it, one group at a time."""
    values, scales = [], []
    for x in emb_GD:
        z = (x - mean) / std
        scale = np.float16(max(abs(float(v)) for v in z) / 127)
        values.append([max(-127, min(127, round(float(v / np.float32(scale))))) for v in z])
        scales.append(scale)
    return np.array(values, np.int8), np.array(scales, np.float16)


@pytest.mark.parametrize("seen", ["masked", "full"])
@pytest.mark.parametrize(("store", "groups"), [("visible", 7), ("masked", 3), ("all", 10)])
def test_every_row_is_the_coded_answer_of_the_teacher_to_its_locus(
    genome: Path, tmp_path: Path, store: str, groups: int, seen: str
) -> None:
    path = tmp_path / "cache"
    # More windows a part than a batch, and no multiple of it; the last part is short as well.
    made = make(genome, path, windows={"store": store}, teacher={"input": seen})
    root = zarr.open_group(path / "data.zarr", mode="r")
    mean, std = (root[f"statistics/embedding/{name}"][:] for name in ("mean", "std"))
    total = parts = 0
    for split, views in (("train", (0, 1)), ("valid", (0,))):
        for view in views:
            group = root[f"{split}/{view}"]
            value, scale = (group[f"embedding/{name}"][:] for name in ("value", "scale"))
            mask = group["mask"][:]
            kept = {"visible": ~mask, "masked": mask, "all": mask | True}[store]
            answers = said_of(
                path, genome_letters(), split, view, masked_is_hidden=seen == "masked"
            )
            for row, answer in enumerate(answers):
                expected_value, expected_scale = by_hand(answer[kept[row]], mean, std)
                assert value[row].shape == (groups, CHANNELS)
                np.testing.assert_array_equal(value[row], expected_value)
                np.testing.assert_array_equal(scale[row], expected_scale)
                total += 1
            parts += -(-len(mask) // PART)
            assert group["reversed"][:].any()
            assert not group["reversed"][:].all()
    assert made.windows == total
    assert made.parts_made == made.parts_total == parts


def test_channel_statistics_and_fidelity_are_those_of_the_sample_in_double_precision(
    genome: Path, whole: Path
) -> None:
    root = zarr.open_group(whole / "data.zarr", mode="r")
    mask = root["train/0/mask"][:]
    answers = list(said_of(whole, genome_letters(), "train", 0, masked_is_hidden=True))
    groups = [answer[~hidden] for answer, hidden in zip(answers, mask, strict=True)]
    # The corpus is smaller than the sample asked for: the last quarter is held out.
    known = len(groups) - len(groups) // 4
    sample = np.concatenate(groups[:known]).astype(np.float64)
    mean = [math.fsum(channel) / len(channel) for channel in sample.T]
    std = [
        math.sqrt(math.fsum((channel - m) ** 2) / len(channel))
        for channel, m in zip(sample.T, mean, strict=True)
    ]
    np.testing.assert_allclose(root["statistics/embedding/mean"][:], mean, rtol=1e-6)
    np.testing.assert_allclose(root["statistics/embedding/std"][:], std, rtol=1e-6)

    held_out = np.concatenate(groups[known:]).astype(np.float64)
    group = root["train/0/embedding"]
    stored = group["value"][known:].astype(np.float32)
    stored *= group["scale"][known:].astype(np.float32)[..., None]
    error = (stored * np.float32(std) + np.float32(mean)).reshape(held_out.shape) - held_out
    told = root.attrs["fidelity"]
    assert told["groups"] == len(held_out)
    assert told["relative"] == pytest.approx(
        np.linalg.norm(error) / np.linalg.norm(held_out), rel=1e-3
    )
    assert 0 < told["relative"] < 0.01


def test_a_masked_teacher_never_sees_what_is_masked_and_a_full_one_does(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    """Bases under the mask of every view are exchanged; only a full teacher notices."""
    mask = {v: zarr.open_group(whole / "data.zarr", mode="r")[f"train/{v}"] for v in (0, 1)}
    rows = pq.read_table(whole / "windows.parquet").to_pylist()
    letters = {contig: list(text) for contig, text in genome_letters().items()}
    exchanged = 0
    for row in (r for r in rows if r["split"] == "train"):
        hidden = np.ones(KMERS, dtype=np.bool_)
        for group in mask.values():
            own = group["mask"][row["window"]]
            hidden &= own[::-1] if group["reversed"][row["window"]] else own
        for t in np.flatnonzero(hidden).tolist():
            for i in range(row["start"] + 6 * t, row["start"] + 6 * t + 6):
                letters[row["contig"]][i] = letters[row["contig"]][i].translate(TURNED)
            exchanged += 1
    assert exchanged > 5
    other = write_fasta(tmp_path / "h.fa", {c: "".join(text) for c, text in letters.items()})

    def values(path: Path) -> list[npt.NDArray[Any]]:
        root = zarr.open_group(path / "data.zarr", mode="r")
        return [root[f"train/{view}/embedding/value"][:] for view in (0, 1)]

    make(other, tmp_path / "masked")
    for view, (one, two) in enumerate(zip(values(whole), values(tmp_path / "masked"), strict=True)):
        np.testing.assert_array_equal(one, two, err_msg=f"view {view}")
    make(genome, tmp_path / "full", teacher={"input": "full"})
    make(other, tmp_path / "other", teacher={"input": "full"})
    assert (values(tmp_path / "full")[0] != values(tmp_path / "other")[0]).any()


def test_the_teacher_sees_one_batch_shape_only(genome: Path, tmp_path: Path) -> None:
    teacher = NumpyTeacher()
    extract(a_recipe(genome, tmp_path / "cache"), teacher=teacher)
    assert teacher.shapes == {(16, KMERS)}
    narrow = NumpyTeacher()
    extract(a_recipe(genome, tmp_path / "narrow", cache={"part": 7}), teacher=narrow)
    assert narrow.shapes == {(7, KMERS)}


def test_how_windows_are_parted_changes_no_embedding(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    make(genome, tmp_path / "cache", cache={"part": 33})
    for name in ("train/0", "train/1", "valid/0"):
        for array in ("value", "scale"):
            one, two = (
                zarr.open_group(path / "data.zarr", mode="r")[f"{name}/embedding/{array}"][:]
                for path in (whole, tmp_path / "cache")
            )
            np.testing.assert_array_equal(one, two)


class TorchTeacher(NumpyTeacher):
    """The same numbers as tensors, in any of torch's types."""

    def embed(self, kmer_id_WT: Any, hidden_WT: Any) -> Any:
        import torch

        emb = np.stack([embed_one(*one) for one in zip(kmer_id_WT, hidden_WT, strict=True)])
        return torch.from_numpy(emb).to(getattr(torch, self.dtype))


def test_tensors_give_the_same_cache_as_arrays(genome: Path, whole: Path, tmp_path: Path) -> None:
    extract(a_recipe(genome, tmp_path / "cache"), teacher=TorchTeacher())
    assert_same_bytes(tmp_path / "cache", whole)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_exact_keeps_the_bits_of_the_teacher(genome: Path, tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "cache"
    extract(
        a_recipe(genome, path, cache={"codec": "exact"}, windows={"store": "all"}),
        teacher=TorchTeacher(dtype=dtype),
    )
    value = zarr.open_group(path / "data.zarr", mode="r")["train/1/embedding/value"][:]
    answers = np.stack(list(said_of(path, genome_letters(), "train", 1, masked_is_hidden=True)))
    if dtype == "bfloat16":
        # The upper half of a float32, rounded to even.
        bits = answers.view(np.uint32).astype(np.uint64)
        expected = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    else:
        expected = answers.astype(dtype)
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected)
    assert Cache.open(path).fidelity["relative"] == 0


def test_statistics_of_another_cache_make_one_space(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "second"
    other = {"seed": 8, "store": "all"}
    given = {"statistics": str(whole)}
    make(genome, path, windows=other, cache=given)
    one, two = Cache.open(whole), Cache.open(path)
    assert one.plan.statistics == two.plan.statistics
    np.testing.assert_array_equal(one.mean, two.mean)
    np.testing.assert_array_equal(one.std, two.std)
    assert 0 < two.fidelity["relative"] < 0.01
    assert make(genome, path, windows=other, cache=given).parts_made == 0

    make(genome, tmp_path / "third", windows=other)
    with pytest.raises(CacheMismatch, match="statistics"):
        make(genome, tmp_path / "third", windows=other, cache=given)
    with pytest.raises(CacheMismatch, match=r"layer: there -1, here 3"):
        extract(a_recipe(genome, tmp_path / "fourth", cache=given), teacher=NumpyTeacher(layer=3))
    assert not (tmp_path / "fourth").exists()


def test_the_licence_is_the_teachers_unless_a_reason_is_recorded(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    assert Cache.open(whole).plan.licence == "CC-BY-4.0"
    make(genome, tmp_path / "c", cache={"licence": "MIT", "licence_reason": "we are its authors"})
    cache = Cache.open(tmp_path / "c")
    assert (cache.plan.licence, cache.plan.licence_reason) == ("MIT", "we are its authors")
    assert cache.plan.teacher.licence == "CC-BY-4.0"
    assert cache.attributes["licence"] == "MIT"


# Again, and continued


def test_equal_work_gives_equal_bytes(genome: Path, whole: Path, tmp_path: Path) -> None:
    make(genome, tmp_path / "elsewhere")
    assert_same_bytes(tmp_path / "elsewhere", whole)
    assert integrity.verify(whole).problems == ()


def stamps(path: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for file in path.rglob("*"):
        status = file.stat()
        found[file.relative_to(path).as_posix()] = (status.st_ino, status.st_mtime_ns)
    return found


def test_a_finished_cache_is_left_alone_and_its_teacher_not_asked(
    genome: Path, whole: Path
) -> None:
    before, teacher = stamps(whole), NumpyTeacher()
    made = extract(a_recipe(genome, whole), teacher=teacher)
    assert made.parts_made == 0
    assert made.parts_total == sum(1 for _ in Cache.open(whole).plan.parts())
    assert made.cache_id == Cache.open(whole).id
    assert teacher.batches == 0
    assert stamps(whole) == before


def spoilt(whole: Path, part: Part, row: int) -> NumpyTeacher:
    """A teacher that says NaN of one window under one view."""
    kmer_id, _, reverse = Cache.open(whole).seen(part)
    target = kmer_id[row]
    if reverse[row]:
        target = np.array([int(rc(k), 4) for k in target[::-1]], np.uint16)
    return NumpyTeacher(spoil=lambda seen: (seen == target).all(axis=1))


def rc(kmer: int) -> str:
    """The reverse complement of a k-mer id, in digits of base 4."""
    digits = [(kmer >> shift) & 3 for shift in range(10, -1, -2)]
    return "".join(str(3 - digit) for digit in reversed(digits))


def unfinished(genome: Path, path: Path, whole: Path, **changed: Mapping[str, Any]) -> list[Part]:
    """A cache stopped by NaN in its last part; the parts it has."""
    teacher = spoilt(whole, Part("valid", 0, 1), 3)
    with pytest.raises(NonFiniteError):
        extract(a_recipe(genome, path, **changed), teacher=teacher)
    plan = Cache.open(path, incomplete=True).plan
    return [part for part in plan.parts() if (path / part.receipt_key).exists()]


def test_nan_stops_with_the_locus_and_a_good_teacher_continues(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path, part = tmp_path / "cache", Part("valid", 0, 1)
    with pytest.raises(NonFiniteError) as told:
        extract(a_recipe(genome, path), teacher=spoilt(whole, part, 3))
    locus = Cache.open(whole).locus("valid", PART + 3)
    assert f"g held_out:{locus.start}-{locus.start + BASES}" in str(told.value)
    assert f"window {PART + 3} of valid, view 0" in str(told.value)
    missing = integrity.missing_parts(path, Cache.open(path, incomplete=True).plan)
    assert missing == [part]
    assert not list((path / ".work").glob("*.tmp"))
    assert integrity.verify(path).problems == ()
    assert make(genome, path).parts_made == 1
    assert_same_bytes(path, whole)


def test_nan_while_calibrating_stops_before_there_is_a_plan(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    with pytest.raises(NonFiniteError) as told:
        extract(a_recipe(genome, path), teacher=spoilt(whole, Part("train", 0, 1), 2))
    locus = Cache.open(whole).locus("train", PART + 2)
    assert f"one:{locus.start} " in str(told.value)
    assert not (path / "plan.json").exists()
    make(genome, path)
    assert_same_bytes(path, whole)


def test_another_recipe_is_refused_with_each_differing_key_and_both_values(
    genome: Path, whole: Path
) -> None:
    before = stamps(whole)
    changes: dict[str, dict[str, Any]] = {
        "windows": {"seed": 4, "views": 1},
        "cache": {"part": 10, "codec": "exact"},
        "teacher": {"input": "full"},
        "genome": {"splits": {"valid": ["one"]}},
    }
    recipe = a_recipe(genome, whole, **changes)
    with pytest.raises(CacheMismatch) as told:
        extract(recipe, teacher=NumpyTeacher(weights_sha256="6" * 64))
    lines = [line.split() for line in str(told.value).splitlines()[1:-1]]
    assert {line[0]: " ".join(line[1:]) for line in lines} == {
        "windows.seed": "here 3 recipe 4",
        "windows.views": "here 2 recipe 1",
        "part": "here 20 recipe 10",
        "codec": "here 'int8' recipe 'exact'",
        "teacher.input": "here 'masked' recipe 'full'",
        "teacher.weights_sha256": f"here '{'5' * 56}... recipe '{'6' * 56}...",
        "genomes[g].splits.valid": "here ['held_out'] recipe ['one']",
    }
    with pytest.raises(CacheMismatch, match="was made from something else"):
        extract(recipe, teacher=NumpyTeacher(), repair=True)
    assert survey_state(recipe) == "another recipe's: extract-teacher refuses it"
    assert stamps(whole) == before


def test_the_order_of_genomes_is_part_of_the_recipe(genome: Path, tmp_path: Path) -> None:
    second = write_fasta(tmp_path / "h.fa", {"x": genome_letters()["one"][::-1]})
    recipe = a_recipe(genome, tmp_path / "cache")
    more = recipe.genome[0].model_copy(update={"name": "h", "path": second, "splits": None})
    first = (recipe.genome[0], more)
    extract(recipe.model_copy(update={"genome": first}), teacher=NumpyTeacher())
    with pytest.raises(CacheMismatch, match=r"here \['g', 'h'\]\s+recipe \['h', 'g'\]"):
        extract(recipe.model_copy(update={"genome": first[::-1]}), teacher=NumpyTeacher())


def test_another_class_of_arithmetic_does_not_continue(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    unfinished(genome, path, whole)
    before = tree(path)
    with pytest.raises(CacheMismatch) as told:
        extract(a_recipe(genome, path), teacher=NumpyTeacher(numerics={"device": "abacus"}))
    assert "device: there 'numpy', here 'abacus'" in str(told.value)
    assert tree(path) == before
    make(genome, path)
    assert_same_bytes(path, whole)


def test_a_folder_of_something_else_is_left_alone(genome: Path, tmp_path: Path) -> None:
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("all that I have")
    with pytest.raises(CacheRefused, match=r"chapter\.tex"):
        make(genome, folder)
    assert list(tree(folder)) == ["chapter.tex"]
    (folder / ".work").mkdir()
    with pytest.raises(CacheRefused, match=r"chapter\.tex"):
        make(genome, folder)
    with pytest.raises(CacheRefused, match=r"chapter\.tex: not a folder"):
        make(genome, folder / "chapter.tex" / "cache")
    assert list(tree(folder)) == ["chapter.tex"]


def test_windows_longer_than_the_context_are_refused_before_anything_is_made(
    genome: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=r"at most 9; take windows of at most 54 bases"):
        extract(a_recipe(genome, tmp_path / "cache"), teacher=NumpyTeacher(context=9))
    with pytest.raises(RecipeError, match="k-mers have 3 bases, not 6"):
        extract(a_recipe(genome, tmp_path / "cache"), teacher=NumpyTeacher(k=3))
    assert not (tmp_path / "cache").exists()


# The disk


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("parts_before", "slow_disk"),
    [
        pytest.param(3, False, id="with batches still to come"),
        pytest.param(3, True, id="while the teacher waits for room in the queue"),
        pytest.param(-1, False, id="in the last part, when no batch comes after it"),
    ],
)
def test_a_disk_that_fails_in_the_writers_thread_stops_the_run_and_it_continues(
    genome: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    parts_before: int,
    slow_disk: bool,
) -> None:
    path = tmp_path / "cache"
    plan = Cache.open(whole).plan
    sound = list(plan.parts())[:parts_before]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    sync = os.fsync

    def break_disk() -> None:
        # The system itself refuses to write more than 100 bytes into a file.
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))

    def are_there() -> bool:
        # All: two parts are written at a time, and the later one may be committed first.
        return all((path / part.receipt_key).exists() for part in sound)

    syncs = itertools.count()

    def slow(descriptor: int) -> None:
        sync(descriptor)
        # The first is that of a receipt's folder, the next in the middle of the next part.
        if are_there() and next(syncs) == 1:
            break_disk()
            time.sleep(0.3)  # the queues are full by then

    def limit(progress: Progress) -> None:
        if progress.what == "extracting" and progress.done >= sum(map(plan.part_windows, sound)):
            while not are_there():
                time.sleep(0.001)
            break_disk()

    if slow_disk:
        monkeypatch.setattr(os, "fsync", slow)
    try:
        with pytest.raises(StorageError) as told:
            extract(
                a_recipe(genome, path),
                teacher=NumpyTeacher(),
                report=silent if slow_disk else limit,
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "larger than allowed" in str(told.value)
    assert "run the same command again" in str(told.value)
    assert not list((path / ".work").glob("*.tmp"))
    assert integrity.verify(path).problems == ()
    left = integrity.missing_parts(path, plan)
    assert not set(sound) & set(left)
    monkeypatch.undo()
    assert make(genome, path).parts_made == len(left) > 0
    assert_same_bytes(path, whole)


def test_too_little_room_is_told_before_the_first_part(
    genome: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    shards = [file for file in (whole / "data.zarr").rglob("embedding/*/c/**/0") if file.is_file()]
    needed = sum(file.stat().st_size for file in shards if "statistics" not in file.parts)
    path, teacher = tmp_path / "cache", NumpyTeacher()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6, needed - 1))
        with pytest.raises(StorageError, match="are still to be written"):
            extract(a_recipe(genome, path), teacher=teacher)
    assert not (path / "parts").exists()
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: usage(10**6, 10**6, needed))
        make(genome, path)
    assert_same_bytes(path, whole)


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("key", "part"),
    [
        pytest.param("data.zarr/train/1/embedding/value/c/2/0/0", Part("train", 1, 2), id="values"),
        pytest.param("data.zarr/valid/0/embedding/scale/c/0/0", Part("valid", 0, 0), id="scales"),
        pytest.param("parts/train/0/00001.json", Part("train", 0, 1), id="receipt"),
        pytest.param("manifest.json", None, id="manifest"),
    ],
)
def test_a_flipped_bit_is_found_and_only_its_part_made_again(
    genome: Path, whole: Path, tmp_path: Path, key: str, part: Part | None
) -> None:
    path = tmp_path / "cache"
    make(genome, path)
    flip(path / key, 300)
    before = stamps(path)
    if part:
        assert {problem.key for problem in integrity.verify(path).problems} == {key}
    else:
        with pytest.raises(CacheRefused, match=r"manifest\.json"):
            integrity.verify(path)
    teacher = NumpyTeacher()
    made = extract(a_recipe(genome, path), repair=True, teacher=teacher)
    assert made.parts_made == (part is not None)
    assert teacher.batches == 2 * (part is not None)  # 20 windows, 16 at once
    assert made.cache_id == Cache.open(whole).id
    assert_same_bytes(path, whole)
    again = {"manifest.json"}
    if part:
        signals = Cache.open(path).plan.signals
        again |= {part.receipt_key, *(part.shard_key(signal) for signal in signals)}
    after = stamps(path)
    assert {name for name in tree(path) if after[name] != before[name]} == again


def test_repairing_what_is_whole_changes_nothing(genome: Path, whole: Path) -> None:
    before, teacher = stamps(whole), NumpyTeacher()
    made = extract(a_recipe(genome, whole), repair=True, teacher=teacher)
    assert (made.parts_made, teacher.batches) == (0, 0)
    after = stamps(whole)
    assert {k: v for k, v in after.items() if k != "."} == before


def test_damage_to_the_plans_own_arrays_is_mended_by_repair_alone(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    """How, and when it cannot be: tests/test_damage.py."""
    path, key = tmp_path / "cache", "data.zarr/train/0/mask/c/0/0"
    make(genome, path)
    flip(path / key, 5)
    assert make(genome, path).parts_made == 0
    assert [problem.key for problem in integrity.verify(path).problems] == [key]
    extract(a_recipe(genome, path), repair=True, teacher=NumpyTeacher())
    assert_same_bytes(path, whole)


# Killed


def committed(path: Path) -> dict[str, tuple[int, int]]:
    """Receipts and the shards they tell of, as they lie on disk."""
    if not (path / "plan.json").exists():
        return {}
    plan, _ = layout.read_plan(path)
    found = {}
    for part in plan.parts():
        if (path / part.receipt_key).exists():
            for key in (part.receipt_key, *(part.shard_key(signal) for signal in plan.signals)):
                status = (path / key).stat()
                found[key] = (status.st_ino, status.st_mtime_ns)
    return found


def in_a_fork(recipe: Recipe, *, seconds: float, die_after: int = 0) -> int:
    """Start extraction in a child; it kills itself before its nth change of the cache's folder."""
    child = os.fork()
    if child:
        return child
    changes = itertools.count(1)
    within = str(recipe.cache.path)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            opened, mode, flags = arguments
            changing = "w" in (mode or "") or bool(flags & (os.O_CREAT | os.O_WRONLY))
        else:
            opened, changing = arguments[0] if arguments else "", event in CHANGES
        if changing and within in str(opened) and next(changes) == die_after:
            os.kill(os.getpid(), signal.SIGKILL)

    if die_after:
        sys.addaudithook(hook)
    try:
        extract(recipe, teacher=NumpyTeacher(seconds=seconds))
    except BaseException as error:
        print(f"the child failed: {error!r}", file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir"}


def ended(child: int) -> bool:
    """Whether the child got through; it may only have been killed otherwise."""
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return not os.WIFSIGNALED(status)


def killed_at_random(genome: str, folder: str, kills: int, seed: int) -> None:
    """Half of the kills at a random moment, half before a random change; then to the end."""
    draw = random.Random(seed)
    path = Path(folder)
    recipe = a_recipe(Path(genome), path)
    killed, kept = 0, committed(path)
    while killed < kills:
        if killed % 2:
            child = in_a_fork(recipe, seconds=0.0, die_after=draw.randrange(1, 50))
        else:
            child = in_a_fork(recipe, seconds=0.01)
            time.sleep(draw.uniform(0, 0.5))
            os.kill(child, signal.SIGKILL)
        if ended(child):
            # It was through before its time: begin again elsewhere.
            assert (path / "manifest.json").exists()
            path = path.with_name(path.name + "x")
            recipe, kept = a_recipe(Path(genome), path), {}
            continue
        killed += 1
        now = committed(path)
        assert kept.items() <= now.items(), "a part that was there was made again"
        kept = now
    assert ended(in_a_fork(recipe, seconds=0.0))
    assert kept.items() <= committed(path).items(), "a part that was there was made again"
    print(path)


SMALL: dict[str, dict[str, Any]] = {"windows": {"views": 1}, "cache": {"part": 64}}


def killed_before_every_third_change(genome: str, folder: str) -> None:
    """Each time in a fresh folder."""
    for moment in itertools.count(1, 3):
        path = Path(folder) / str(moment)
        recipe = a_recipe(Path(genome), path, **SMALL)
        through = ended(in_a_fork(recipe, seconds=0.0, die_after=moment))
        kept = committed(path)
        assert ended(in_a_fork(recipe, seconds=0.0))
        assert kept.items() <= committed(path).items()
        print(path)
        if through:
            return


def forking(call: str) -> list[Path]:
    """Call a function of this file in a process without threads, which may fork."""
    done = subprocess.run(
        [sys.executable, "-c", f"import test_extract; test_extract.{call}"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return [Path(line) for line in done.stdout.split()]


@pytest.mark.timeout(120)
def test_killed_at_any_moment_the_same_command_makes_the_same_bytes(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    made = forking(f"killed_at_random({str(genome)!r}, {str(path)!r}, kills=20, seed=0)")
    for one in made:
        assert_same_bytes(one, whole)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_killed_before_any_change_of_the_folder_the_same_command_makes_the_same_bytes(
    genome: Path, tmp_path: Path
) -> None:
    make(genome, tmp_path / "whole", **SMALL)
    made = forking(f"killed_before_every_third_change({str(genome)!r}, {str(tmp_path)!r})")
    assert len(made) > 50
    for path in made:
        assert_same_bytes(path, tmp_path / "whole")


def test_a_kill_between_sealing_and_tidying_up_leaves_nothing_behind(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    make(genome, path)
    (path / ".work").mkdir()
    (path / ".work" / "owner").write_text("process 1 on elsewhere")
    assert make(genome, path).parts_made == 0
    assert_same_bytes(path, whole)


def test_what_a_killed_process_left_half_written_is_removed_by_whoever_makes_that_part(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    made = unfinished(genome, path, whole)
    again, other = made[1], Part("valid", 0, 1)
    for part in (again, other):
        (path / ".work" / f"{part.stem}.embedding-value.77.tmp").write_bytes(b"half")
    (path / again.receipt_key).unlink()
    extract(a_recipe(genome, path), teacher=NumpyTeacher(), share=share_with(path, again, other))
    assert [file.name for file in (path / ".work").glob("*.tmp")] == [
        f"{other.stem}.embedding-value.77.tmp"
    ]
    make(genome, path)
    assert_same_bytes(path, whole)


def share_with(path: Path, part: Part, without: Part) -> Share:
    """A share that holds the one part and not the other."""
    parts = list(Cache.open(path, incomplete=True).plan.parts())
    place, not_place = parts.index(part), parts.index(without)
    of = next(n for n in range(2, len(parts) + 1) if place % n != not_place % n)
    return Share(place % of + 1, of)


# Side by side


@contextlib.contextmanager
def busy(genome: Path, path: Path, *, batches: int) -> Iterator[None]:
    """Another extraction into the cache, which stands still once it has embedded some batches."""
    waiting, go_on = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    class Waiting(NumpyTeacher):
        def embed(self, kmer_id_WT: Any, hidden_WT: Any) -> Any:
            if self.batches == batches:
                waiting.set()
                assert go_on.wait(60)
            return super().embed(kmer_id_WT, hidden_WT)

    def run() -> None:
        try:
            extract(a_recipe(genome, path), teacher=Waiting())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert waiting.wait(60)
        yield
    finally:
        go_on.set()
        thread.join()
    assert failed == []


class Watched:
    """A reporter that remembers, and can be waited for."""

    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self._waits = threading.Event()

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        if progress.what.startswith("waiting"):
            self._waits.set()

    def wait(self) -> Progress:
        assert self._waits.wait(60)
        return next(seen for seen in self.seen if seen.what.startswith("waiting"))


def helping(genome: Path, path: Path, watched: Watched) -> threading.Thread:
    thread = threading.Thread(
        target=extract,
        args=(a_recipe(genome, path),),
        kwargs={"teacher": NumpyTeacher(), "report": watched},
    )
    thread.start()
    return thread


@pytest.mark.timeout(120)
def test_whoever_comes_while_another_plans_waits_for_the_plan_and_is_told_why(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path, watched = tmp_path / "cache", Watched()
    with busy(genome, path, batches=0):  # calibration
        helper = helping(genome, path, watched)
        assert watched.wait().what == (
            f"waiting for process {os.getpid()} on {socket.gethostname()}, which is planning"
        )
        assert not (path / "plan.json").exists()
    helper.join(60)
    assert_same_bytes(path, whole)


@pytest.mark.timeout(120)
def test_whoever_comes_while_another_extracts_makes_all_parts_but_the_one_in_work(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path, watched = tmp_path / "cache", Watched()
    plan = Cache.open(whole).plan
    calibration = batches_of_calibration(genome, tmp_path)
    with busy(genome, path, batches=calibration + 1):
        helper = helping(genome, path, watched)
        told = watched.wait()
        left = integrity.missing_parts(path, plan)
        assert len(left) == 1
        assert told.facts == {
            "for": f"process {os.getpid()} on {socket.gethostname()} at {left[0]}"
        }
        assert helper.is_alive()
    helper.join(60)
    assert_same_bytes(path, whole)


def batches_of_calibration(genome: Path, tmp_path: Path) -> int:
    """How often the teacher is asked before the first part."""
    teacher, first = NumpyTeacher(), []

    def note(progress: Progress) -> None:
        if progress.what == "extracting":
            first.append(teacher.batches)

    extract(a_recipe(genome, tmp_path / "counted"), teacher=teacher, report=note)
    return first[0] - 1


def test_shares_in_any_split_and_order_make_the_cache_of_one_process(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    for split in (["1/1"], ["2/2", "1/2"], ["3/3", "1/3", "2/3"], ["1/2", "2/3", "1/3", "3/3"]):
        path = tmp_path / "-".join(split).replace("/", "of")
        total = Cache.open(whole).plan.part_count
        made = []
        for place, text in enumerate(split):
            done = extract(a_recipe(genome, path), teacher=NumpyTeacher(), share=Share.parse(text))
            made.append(done.parts_made)
            last = sum(made) == total
            assert done.parts_left == total - sum(made)
            assert (done.cache_id is not None) == last
            assert (path / "manifest.json").exists() == last
            assert last == (place == len(split) - 1)
        assert sum(made) == total
        assert_same_bytes(path, whole)


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", " 1/2", "a/b", ""])
def test_a_share_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="expected I/N with I from 1 to N"):
        Share.parse(text)


def test_asked_to_stop_it_finishes_the_parts_in_work_and_no_more(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path, asked = tmp_path / "cache", threading.Event()

    def ask(progress: Progress) -> None:
        if progress.what == "extracting" and progress.done > PART:
            asked.set()

    with pytest.raises(Interrupted, match="run the same command again") as told:
        extract(a_recipe(genome, path), teacher=NumpyTeacher(), report=ask, stopping=asked.is_set)
    missing = integrity.missing_parts(path, Cache.open(path, incomplete=True).plan)
    assert f"{len(missing)} of {Cache.open(whole).plan.part_count} are still" in str(told.value)
    assert len(missing) == Cache.open(whole).plan.part_count - 2
    assert not list((path / ".work").glob("*.tmp"))
    assert not list((path / ".work" / "leases").iterdir())
    make(genome, path)
    assert_same_bytes(path, whole)


def test_a_sleeper_whose_lease_was_taken_over_commits_nothing(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    missing = Part("valid", 0, 1)
    unfinished(genome, path, whole)
    lease = lease_of(path, missing)
    other = lease_of(path, missing)
    assert lease.take()

    def taken_over(kmer_id_WT: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
        """What happens to whoever sleeps too long: its file is another's, its temporaries gone."""
        if other.lost:
            lease.path.unlink()
            assert other.take()
            for leftover in (path / ".work").glob("*.tmp"):
                leftover.unlink()
        return np.zeros(len(kmer_id_WT), dtype=bool)

    with PartMaker(path, NumpyTeacher(spoil=taken_over)) as maker:
        assert maker.make(missing, lease).result() is None
    assert not (path / missing.receipt_key).exists()
    assert not other.lost
    other.release()
    assert make(genome, path).parts_made == 1
    assert_same_bytes(path, whole)


def test_a_class_of_arithmetic_that_made_nothing_binds_nobody_once_it_is_gone(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path, asked = tmp_path / "cache", threading.Event()
    asked.set()
    with pytest.raises(Interrupted):
        extract(
            a_recipe(genome, path),
            teacher=NumpyTeacher(numerics={"device": "slide rule"}),
            stopping=asked.is_set,
        )
    at_work = lease_of(path, Part("train", 0, 0))
    assert at_work.take()
    with pytest.raises(CacheMismatch, match="device: there 'slide rule', here 'numpy'"):
        make(genome, path)
    at_work.release()
    make(genome, path)
    assert_same_bytes(path, whole)


def test_a_damaged_plan_is_told_from_another_recipes(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(whole, tmp_path / "cache"))
    plan = (path / "plan.json").read_bytes()
    (path / "plan.json").write_bytes(plan.replace(b'"seed":3', b'"seed":1'))
    for repair in (False, True):
        with pytest.raises(CacheCorrupt, match=r"plan\.json is damaged"):
            extract(a_recipe(genome, path), teacher=NumpyTeacher(), repair=repair)
    (path / "plan.json").write_bytes(plan)
    with pytest.raises(CacheMismatch, match=r"windows\.seed +here 3 +recipe 1"):
        make(genome, path, windows={"seed": 1})


def test_shares_do_not_repair(genome: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="repair without --share"):
        extract(
            a_recipe(genome, tmp_path / "cache"),
            teacher=NumpyTeacher(),
            repair=True,
            share=Share(1, 2),
        )


def test_a_teacher_that_is_not_the_plans_makes_no_part(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    path = tmp_path / "cache"
    unfinished(genome, path, whole)
    with pytest.raises(CacheMismatch, match=r"planned for another teacher \(weights_sha256"):
        PartMaker(path, NumpyTeacher(weights_sha256="6" * 64))


# Told beforehand


def survey_state(recipe: Recipe) -> str:
    return told_of(recipe, NumpyTeacher()).state


def told_of(recipe: Recipe, teacher: NumpyTeacher) -> Any:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("had_pipe.survey._PROBE_SECONDS", 0.05)
        patched.setattr("had_pipe.job.load_teacher", lambda *_, **__: teacher)
        return survey(recipe)


@pytest.mark.parametrize("codec", ["int8", "exact", "compact", "tiny"])
def test_what_is_told_beforehand_is_what_is_made(genome: Path, tmp_path: Path, codec: str) -> None:
    path = tmp_path / "cache"
    recipe = a_recipe(genome, path, cache={"codec": codec})
    told = told_of(recipe, NumpyTeacher())
    assert not path.exists()
    assert told.state == "new"
    made = extract(recipe, teacher=NumpyTeacher())
    files = tree(path)
    assert told.files == len(files)
    arrays = sum(len(data) for key, data in files.items() if "/c/" in key)
    assert told.codecs[codec].nbytes == arrays
    rest = sum(map(len, files.values())) - arrays
    assert rest < 1000 * len([key for key in files if "zarr.json" in key]) + 300 * made.windows
    assert told.parts == made.parts_total
    cache = Cache.open(path)
    assert dict(told.windows) == {split: cache.rows(split) for split in ("train", "valid")}
    assert dict(told.views) == {"train": 2, "valid": 1}
    assert told.kmers == made.windows * KMERS
    assert told.stored_groups == made.windows * 7
    letters = "".join(genome_letters().values()).upper()
    assert sum(told.covered_bases.values()) + sum(told.dropped_bases.values()) == len(letters)
    assert dict(told.other_letters) == {x: letters.count(x) for x in "NR"}
    assert told.teacher == cache.plan.teacher.model_dump(mode="json")
    assert (told.licence, told.batch, told.channels) == ("CC-BY-4.0", 16, CHANNELS)
    assert told_of(recipe, NumpyTeacher()).state == "finished"


def test_how_far_an_unfinished_cache_is_is_told(genome: Path, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    there = len(unfinished(genome, path, whole))
    before = stamps(path)
    total = sum(1 for _ in Cache.open(whole).plan.parts())
    assert survey_state(a_recipe(genome, path)) == f"begun: {there} of {total} parts"
    assert stamps(path) == before


def test_room_is_asked_for_what_is_still_to_be_made_and_no_more(
    genome: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, usage = tmp_path / "cache", namedtuple("usage", "total used free")
    unfinished(genome, path, whole)
    plan = Cache.open(whole).plan
    needed = plan.shards_nbytes([Part("valid", 0, 1)])
    for folder, free, short in (
        (tmp_path / "new", needed, True),
        (path, needed - 1, True),
        (path, needed, False),
        (whole, 0, False),
    ):
        told_free = usage(10**6, 10**6, free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, told_free=told_free: told_free)
        notes = told_of(a_recipe(genome, folder), NumpyTeacher()).notes
        assert any("too little room" in note for note in notes) == short, folder


def test_the_probe_measures_the_teacher(genome: Path, tmp_path: Path) -> None:
    told = told_of(a_recipe(genome, tmp_path / "cache"), NumpyTeacher(seconds=0.02))
    assert 100 < told.windows_per_second < 16 / 0.02
    windows = told.windows["train"] * 2 + told.windows["valid"]
    assert told.seconds == pytest.approx(windows / told.windows_per_second)


def test_what_a_person_should_know_is_noted(genome: Path, tmp_path: Path) -> None:
    recipe = a_recipe(
        genome, tmp_path / "cache", windows={"stride": 42}, genome={"sensitive": True}
    )
    told = told_of(recipe, NumpyTeacher(licence="CC-BY-NC-SA-4.0"))
    assert "marked non-commercial like the teacher" in told.licence_implies
    for word in ("up to 2 times", "sensitive"):
        assert sum(word in note for note in told.notes) == 1
    assert not told_of(a_recipe(genome, tmp_path / "cache"), NumpyTeacher()).notes


def test_statistics_of_another_teacher_are_refused_beforehand_too(
    genome: Path, whole: Path, tmp_path: Path
) -> None:
    recipe = a_recipe(genome, tmp_path / "cache", cache={"statistics": str(whole)})
    assert told_of(recipe, NumpyTeacher()).state == "new"
    with pytest.raises(CacheMismatch, match=r"layer: there -1, here 3"):
        told_of(recipe, NumpyTeacher(layer=3))


def test_a_recipe_for_training_alone_cannot_extract(tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"cache": {"path": str(tmp_path / "cache")}})
    with pytest.raises(RecipeError, match=r"no \[teacher\] table"):
        extract(recipe)


# The whole stage, by the installed command and a real network


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random NT-v2, a piece of E. coli, and a recipe."""
    if not ECOLI.exists():
        pytest.skip("the demo genome is not here: it lies in the repository, not in a package")
    from had_pipe.dna.kmers import LETTERS
    from had_pipe.dna.reference import read_contigs
    from had_pipe.teachers.ntv2 import NTv2Config, random_model
    from had_pipe.teachers.ntv2_checkpoint import save_checkpoint

    folder = tmp_path_factory.mktemp("real")
    base = next(iter(read_contigs(ECOLI))).base[:30_000]
    write_fasta(folder / "piece.fa", {"piece": "".join(LETTERS[b] for b in base)})
    config = NTv2Config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    save_checkpoint(
        random_model(config, seed=5, head="language"), folder / "ntv2", extra={"licence": "MIT"}
    )
    (folder / "x.toml").write_text(
        """
[teacher]
name = "./ntv2"
dtype = "float32"
unchecked = true

[[genome]]
name = "piece"
path = "piece.fa"
splits = { blocks = 3_000, valid = 0.2 }

[windows]
bases = 120
stride = 120
views = 10

[cache]
path = "cache"
part = 16
"""
    )
    return folder


def command(*words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("had-pipe")), *words]


@pytest.mark.timeout(240)
def test_the_command_stops_on_signals_continues_and_stores_what_the_network_says(
    real: Path,
) -> None:
    recipe, path = real / "x.toml", real / "cache"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    receipts = 0
    for kind in (signal.SIGINT, signal.SIGTERM):
        with subprocess.Popen(
            command("extract-teacher", str(recipe), "--device", "cpu"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        ) as running:
            while running.poll() is None and len(list(path.glob("parts/*/*/*.json"))) == receipts:
                time.sleep(0.002)
            running.send_signal(kind)
            _, said = running.communicate(timeout=60)
        assert running.returncode == 75, said
        assert "run the same command again to continue" in said
        assert "Traceback" not in said
        now = len(list(path.glob("parts/*/*/*.json")))
        assert receipts < now
        receipts = now
        assert not (path / "manifest.json").exists()
        assert not list((path / ".work").glob("*.tmp"))
    done = subprocess.run(
        command("extract-teacher", str(recipe), "--device", "cpu"),
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    parts = sum(1 for _ in Cache.open(path).plan.parts())
    assert f"{parts - receipts} parts of {parts}" in done.stdout
    assert Cache.open(path).id in done.stdout
    assert integrity.verify(path).problems == ()
    assert_stores_what_the_network_says(real)


def assert_stores_what_the_network_says(real: Path) -> None:
    """Held against the float64 forward pass, by way of letters and the hub's own vocabulary."""
    import ntv2_float64
    from safetensors.numpy import load_file

    path = real / "cache"
    weights = load_file(real / "ntv2" / "model.safetensors")
    token = {"".join(kmer): 6 + n for n, kmer in enumerate(itertools.product("ATCG", repeat=6))}
    letters = (real / "piece.fa").read_text().split("\n")[1]
    table = pq.read_table(path / "windows.parquet").to_pylist()
    root = zarr.open_group(path / "data.zarr", mode="r")
    mean, std = (root[f"statistics/embedding/{name}"][:] for name in ("mean", "std"))
    checked = 0
    for split, view in (("train", 0), ("train", 3), ("valid", 0)):
        group = root[f"{split}/{view}"]
        for row in (0, 7, 29):
            place = next(r for r in table if (r["split"], r["window"]) == (split, row))
            text = letters[place["start"] : place["start"] + 120]
            if group["reversed"][row]:
                text = text.translate(TURNED)[::-1]
            mask = group["mask"][row]
            ids = [token[text[i : i + 6]] for i in range(0, 120, 6)]
            ids = [2 if hidden else one for one, hidden in zip(ids, mask, strict=True)]
            outputs = ntv2_float64.forward(
                np.array([3, *ids]), weights, layers=2, heads=2, eps=1e-12
            )
            expected = outputs.final[1:][~mask]
            scale = group["embedding/scale"][row].astype(np.float32)[:, None]
            found = group["embedding/value"][row] * scale * std + mean
            # Half a step, what rounding the scale to float16 clips, and float32 for float64.
            assert (abs(found - expected) <= 0.57 * scale * std + 2e-5).all()
            checked += 1
    assert checked == 9
