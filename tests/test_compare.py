"""Two caches side by side: what differs is counted and named, and nothing else is."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from small_cache import build_cache

from had_pipe.cache import Cache, Part, integrity, layout, writer
from had_pipe.cache import compare as module
from had_pipe.cache.codec import fidelity
from had_pipe.cache.compare import Comparison, Values, compare
from had_pipe.cache.recode import recode
from had_pipe.dna import kmers as dna
from had_pipe.errors import CacheCorrupt, CacheRefused

SHAPE: Mapping[str, Any] = {"windows": 23, "valid": 7, "kmers": 12, "channels": 8, "part": 8}


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("exact") / "cache", **SHAPE, codec="exact", views=2)


def of(comparison: Comparison, split: str, view: int = 0) -> Values:
    (found,) = (v for v in comparison.values if (v.split, v.view) == (split, view))
    return found


def altered(cache: Path, part: Part, row: int, group: int, by: float, scale: float = 1) -> None:
    """One group of a sealed cache moved, and everything else made to fit."""
    opened = Cache.open(cache)
    rows = np.arange(opened.plan.part_windows(part)) + part.number * opened.plan.part
    numerics = opened.receipt(part).numerics
    block = opened.allocate(len(rows))
    opened.read(part.split, part.view, rows, block)
    block.value[row - rows[0], group] += np.asarray(by, block.value.dtype)
    if block.scale is not None:
        block.scale[row - rows[0], group] *= np.float16(scale)
    (cache / layout.MANIFEST).unlink()
    with writer.PartWriter(cache, opened.plan, part, numerics=numerics) as out:
        out.append(*(array for array in (block.value, block.scale) if array is not None))
        out.sync()
        out.commit()
    integrity.seal(cache)


def decoded(cache: Path, split: str, view: int) -> npt.NDArray[np.float32]:
    opened = Cache.open(cache)
    block = opened.allocate(opened.rows(split))
    opened.read(split, view, np.arange(opened.rows(split)), block)
    x: npt.NDArray[np.float32] = opened.codec.decode(
        block.value, block.scale, opened.mean, opened.std
    )
    return x


def test_a_copy_is_identical(exact: Path, tmp_path: Path) -> None:
    shutil.copytree(exact, tmp_path / "copy")

    found = compare(exact, tmp_path / "copy")

    assert found.identical
    assert found.equal
    assert found.meaning == found.contents == found.only_in_a == found.only_in_b == ()
    assert [(v.split, v.view, v.windows, v.equal_windows) for v in found.values] == [
        ("train", 0, 23, 23),
        ("train", 1, 23, 23),
        ("valid", 0, 7, 7),
    ]
    for values in found.values:
        assert (values.relative, values.channel_rmse, values.worst_cosine) == (0, 0, 1)
        assert values.worst_locus is None


def test_one_altered_group_is_found_with_its_place(exact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exact, tmp_path / "other"))
    altered(other, Part("train", 1, 2), row=19, group=3, by=2.0)

    found = compare(exact, other)

    assert not found.identical
    assert not found.equal
    assert found.meaning == found.contents == ()
    for values in found.values:
        touched = (values.split, values.view) == ("train", 1)
        assert values.equal_windows == values.windows - touched
        assert (values.worst_cosine < 1) == (values.relative > 0) == touched
    values = of(found, "train", 1)
    assert values.worst_row == 19
    assert values.worst_locus == Cache.open(exact).group_locus("train", 19, view=1, group=3)


@pytest.mark.parametrize("codec", ["int8", "compact"])
@pytest.mark.parametrize("at_once", [1, 500, 1 << 20])
def test_errors_between_codecs_are_those_of_the_whole_arrays_in_double_precision(
    exact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str, at_once: int
) -> None:
    """Added up over pieces of any size, against one sum over everything."""
    monkeypatch.setattr(module, "_AT_ONCE", at_once)
    recode(exact, tmp_path / "to", codec=codec)

    found = compare(exact, tmp_path / "to")

    changed = {difference.key: (difference.a, difference.b) for difference in found.meaning}
    source = Cache.open(exact)
    assert changed == {
        "codec": ("exact", codec),
        "source.cache": (None, source.id),
        "source.codec": (None, "exact"),
    }
    assert not found.equal
    for values in found.values:
        x, y = (decoded(path, values.split, values.view) for path in (exact, tmp_path / "to"))
        expected = fidelity(x, y)
        for key in ("relative", "channel_rmse", "worst_channel_rmse", "worst_cosine"):
            assert getattr(values, key) == pytest.approx(expected[key], rel=1e-9), key
        cosines = [
            [
                float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
                for a, b in zip(u, v, strict=True)
            ]
            for u, v in zip(x.astype(float), y.astype(float), strict=True)
        ]
        row, group = np.unravel_index(int(np.argmin(cosines)), np.shape(cosines))
        assert values.worst_row == row
        assert values.worst_locus == source.group_locus(
            values.split, int(row), view=values.view, group=int(group)
        )


def test_recoding_to_what_it_came_from_gives_equal_values(exact: Path, tmp_path: Path) -> None:
    recode(exact, tmp_path / "int8", codec="int8")
    recode(tmp_path / "int8", tmp_path / "exact", codec="exact")

    found = compare(tmp_path / "int8", tmp_path / "exact")

    for values in found.values:
        assert values.equal_windows == 0
        assert (values.relative, values.worst_cosine) == (0, 1)


def test_equal_codes_of_another_scale_are_other_bytes(tmp_path: Path) -> None:
    one = build_cache(tmp_path / "one", **SHAPE)
    two = Path(shutil.copytree(one, tmp_path / "two"))
    altered(two, Part("train", 0, 1), row=10, group=2, by=0, scale=2)

    values = of(compare(one, two), "train")

    assert (values.windows, values.equal_windows) == (23, 22)
    assert values.worst_row == 10


def test_windows_on_the_other_strand_are_other_windows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build_cache(tmp_path / "one", **SHAPE)
    real = dna.strand_flips
    monkeypatch.setattr(dna, "strand_flips", lambda **given: real(**given) ^ (given["first"] == 0))
    two = build_cache(tmp_path / "two", **SHAPE)

    found = compare(one, two)

    assert [difference.key for difference in found.contents] == ["train/0/reversed"]
    assert (of(found, "train").windows, of(found, "train").unlike_windows) == (0, 23)
    assert (of(found, "valid").windows, of(found, "valid").unlike_windows) == (7, 0)


def test_equal_bytes_under_other_statistics_are_other_values(tmp_path: Path) -> None:
    for seed in (0, 1):
        build_cache(tmp_path / str(seed), **SHAPE, statistics_seed=seed)

    found = compare(tmp_path / "0", tmp_path / "1")

    assert {difference.key for difference in found.contents} == {
        "statistics/embedding/mean",
        "statistics/embedding/std",
    }
    assert not found.equal
    assert all(values.relative > 0 for values in found.values)


def test_windows_of_other_bases_are_counted_and_not_compared(tmp_path: Path) -> None:
    for seed in (0, 1):
        build_cache(tmp_path / str(seed), **SHAPE, seed=seed)

    found = compare(tmp_path / "0", tmp_path / "1")

    assert {difference.key for difference in found.meaning} >= {"windows.seed"}
    assert {difference.key for difference in found.contents} >= {"train/kmer_id", "train/0/mask"}
    for values in found.values:
        assert (values.windows, values.equal_windows) == (0, 0)
        assert values.unlike_windows == {"train": 23, "valid": 7}[values.split]
        assert values.worst_locus is None
    assert not found.equal


@pytest.mark.parametrize("change", [{"kmers": 10}, {"channels": 9}, {"store": "all"}])
def test_caches_of_another_shape_are_compared_as_far_as_they_go(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    build_cache(tmp_path / "a", **SHAPE)
    build_cache(tmp_path / "b", **{**SHAPE, **change})

    found = compare(tmp_path / "a", tmp_path / "b")

    assert found.meaning
    assert [values.unlike_windows for values in found.values] == [23, 7]
    assert not found.equal


def test_parts_that_only_one_has_are_named(exact: Path, tmp_path: Path) -> None:
    """An unfinished cache, another number of views, another size of parts."""
    unfinished = build_cache(tmp_path / "begun", **SHAPE, codec="exact", views=2, parts=2)
    one_view = build_cache(tmp_path / "one", **SHAPE, codec="exact")
    large = build_cache(tmp_path / "large", **{**SHAPE, "part": 20}, codec="exact", views=2)

    found = compare(exact, unfinished)
    assert not found.b.sealed
    assert found.b.numerics == found.a.numerics == {"device": "none"}
    every = list(Cache.open(exact).plan.parts())
    assert found.only_in_a == tuple(every[2:])
    assert found.only_in_b == ()
    values = of(found, "train")
    assert (values.windows, values.equal_windows, values.only_in_a) == (16, 16, 7)
    assert (of(found, "valid").windows, of(found, "valid").only_in_a) == (0, 7)
    assert not found.equal

    found = compare(one_view, exact)
    assert found.only_in_b == tuple(part for part in every if part.view == 1)
    assert of(found, "train", 1).only_in_b == 23

    found = compare(exact, large)
    assert found.only_in_a == found.only_in_b == ()
    assert [difference.key for difference in found.meaning] == ["part"]
    assert found.equal
    assert not found.identical


def test_a_window_that_is_not_finite_is_the_worst(exact: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(exact, tmp_path / "other"))
    altered(other, Part("valid", 0, 0), row=4, group=1, by=float("nan"))

    values = of(compare(exact, other), "valid")

    assert (values.worst_cosine, values.worst_row) == (-1, 4)
    assert np.isnan(values.relative)


def test_damage_and_archives_are_refused_and_nothing_is_changed(
    exact: Path, tmp_path: Path
) -> None:
    other = Path(shutil.copytree(exact, tmp_path / "other"))
    key = "data.zarr/train/1/embedding/value/c/1/0/0"
    raw = bytearray((other / key).read_bytes())
    raw[40] ^= 4
    (other / key).write_bytes(raw)
    before = {path: path.stat().st_mtime_ns for path in other.rglob("*")}

    with pytest.raises(CacheCorrupt, match=r"train/1/embedding/value/c/1.*CRC32C"):
        compare(exact, other)
    recode(exact, tmp_path / "archive", codec="archive")
    with pytest.raises(CacheRefused, match="archival form"):
        compare(exact, tmp_path / "archive")

    assert {path: path.stat().st_mtime_ns for path in other.rglob("*")} == before
    assert asdict(compare(exact, exact))["a"]["cache_id"] == Cache.open(exact).id
