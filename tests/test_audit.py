"""A cache held against its teacher: lies are found, honest differences of arithmetic are none."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from conftest import ECOLI
from numpy_teacher import NumpyTeacher

from had_pipe.audit import Audit, audit
from had_pipe.cache import Block, Cache, Codec, Part, integrity, layout, writer
from had_pipe.cache.codec import Statistics
from had_pipe.cache.recode import _splits, recode
from had_pipe.dna.kmers import LETTERS, reverse_complement
from had_pipe.dna.reference import read_contigs
from had_pipe.errors import CacheIncomplete, CacheMismatch, RecipeError
from had_pipe.extract import extract
from had_pipe.recipe import Recipe

ALL = 10_000
TRAIN = Part("train", 0, 1)


def a_recipe(folder: Path, cache: Path, **cached: Any) -> Recipe:
    fasta = folder / "g.fa"
    if not fasta.exists():
        rng = np.random.default_rng(4)
        letters = {"one": 4_000, "held_out": 1_500}
        fasta.write_text(
            "".join(f">{n}\n{''.join(rng.choice(list('ACGT'), k))}\n" for n, k in letters.items())
        )
    return Recipe.model_validate(
        {
            "teacher": {"name": "/there/is/none"},
            "genome": [{"name": "g", "path": str(fasta), "splits": {"valid": ["held_out"]}}],
            "windows": {"bases": 60, "stride": 60, "views": 2, "mask_ratio": 0.25},
            "cache": {"path": str(cache), "part": 20, **cached},
        }
    )


CODECS = ("int8", "exact", "compact", "tiny")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("caches")
    for codec in CODECS:
        extract(a_recipe(folder, folder / codec, codec=codec), teacher=NumpyTeacher())
    return {codec: folder / codec for codec in CODECS}


@pytest.fixture
def cache(caches: dict[str, Path], tmp_path: Path) -> Path:
    """One to lie in."""
    return Path(shutil.copytree(caches["int8"], tmp_path / "cache"))


def resealed(cache: Path, part: Part, change: Callable[[Block], None]) -> str:
    """What a liar does: a part's values changed, every digest and id made to fit; the new id."""
    opened = Cache.open(cache)
    plan, numerics = opened.plan, opened.receipt(part).numerics
    rows = np.arange(plan.part_windows(part)) + part.number * plan.part
    block = opened.allocate(len(rows))
    opened.read(part.split, part.view, rows, block)
    change(block)
    (cache / layout.MANIFEST).unlink()
    with writer.PartWriter(cache, plan, part, numerics=numerics) as out:
        out.append(*(array for array in (block.value, block.scale) if array is not None))
        out.sync()
        out.commit()
    integrity.seal(cache)
    assert integrity.verify(cache).problems == ()
    return Cache.open(cache).id


@pytest.mark.parametrize("codec", CODECS)
def test_an_honest_cache_passes_byte_for_byte(caches: dict[str, Path], codec: str) -> None:
    before = {path: path.stat().st_mtime_ns for path in caches[codec].rglob("*")}

    found = audit(caches[codec], NumpyTeacher(), windows=64)

    plan = Cache.open(caches[codec]).plan
    assert found.passed
    assert found.failures == ()
    assert (found.windows, found.equal_windows, found.bytes_expected) == (64, 64, True)
    assert found.windows_total == sum(plan.part_windows(part) for part in plan.parts())
    assert (found.parts, found.parts_total) == (plan.part_count, plan.part_count)
    assert found.worst_cosine == 1.0
    assert found.doubts == ()
    assert found.loss == pytest.approx(found.loss_said, rel=0.5)
    assert {path: path.stat().st_mtime_ns for path in caches[codec].rglob("*")} == before


def test_windows_are_drawn_by_the_seed_without_repeats_and_evenly_over_parts(
    caches: dict[str, Path],
) -> None:
    def shown(seed: int, windows: int) -> list[bytes]:
        teacher = Listening()
        audit(caches["int8"], teacher, windows=windows, seed=seed)
        return teacher.heard

    every = shown(0, ALL)
    total = Cache.open(caches["int8"]).plan
    assert len(set(every)) == sum(total.part_windows(part) for part in total.parts())
    assert shown(1, 20) == shown(1, 20)
    assert len(set(shown(1, 20))) == 20
    assert set(shown(1, 20)) != set(shown(2, 20))
    for windows in (1, 3, total.part_count):
        found = audit(caches["int8"], NumpyTeacher(), windows=windows, seed=windows)
        assert (found.windows, found.parts) == (windows, windows)


class Listening(NumpyTeacher):
    """Remembers every window it was shown, once each; a batch is filled up with its last."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[bytes] = []

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Any:
        for kmers, hidden in zip(kmer_id_WT, hidden_WT, strict=True):
            spelt = kmers.tobytes() + hidden.tobytes()
            if not self.heard or self.heard[-1] != spelt:
                self.heard.append(spelt)
        return super().embed(kmer_id_WT, hidden_WT)


# Lies


def test_another_teachers_weights_layer_or_size_are_told_before_any_window(cache: Path) -> None:
    for other in (
        NumpyTeacher(weights_sha256="6" * 64),
        NumpyTeacher(layer=3),
        NumpyTeacher(channels=13),
    ):
        with pytest.raises(CacheMismatch, match=r"another teacher .*there .*, here "):
            audit(cache, other)
        assert other.batches == 0


def test_a_cache_made_with_other_weights_under_the_right_name_fails_everywhere(
    cache: Path, tmp_path: Path
) -> None:
    class Other(NumpyTeacher):
        def embed(
            self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
        ) -> Any:
            return super().embed((kmer_id_WT + 1) % 4096, hidden_WT)

    path = tmp_path / "other"
    extract(a_recipe(tmp_path, path), teacher=Other())

    found = audit(path, NumpyTeacher(), windows=16)

    assert len(found.failures) == 16
    assert not found.bytes_expected  # nothing is equal: the least one may ask is not met either
    assert found.worst_cosine < 0.9


def test_one_altered_window_in_a_resealed_cache_is_named_with_its_place(cache: Path) -> None:
    def change(block: Block) -> None:
        block.value[7, 2] = -block.value[7, 2]

    before = Cache.open(cache).id
    assert resealed(cache, TRAIN, change) != before

    found = audit(cache, NumpyTeacher(), windows=ALL)

    (failure,) = found.failures
    assert (failure.part, failure.split, failure.view, failure.row) == ("train/0/00001", *PLACE)
    assert failure.cosine < found.limit
    assert failure.locus == Cache.open(cache).group_locus("train", 27, view=0, group=2)
    assert found.equal_windows == found.windows - 1
    assert not found.passed


PLACE = ("train", 0, 27)


@pytest.mark.parametrize("codec", CODECS)
def test_the_least_change_of_one_value_is_found_where_bytes_can_be_asked_for(
    caches: dict[str, Path], tmp_path: Path, codec: str
) -> None:
    path = Path(shutil.copytree(caches[codec], tmp_path / "cache"))

    def change(block: Block) -> None:
        block.value.view(np.uint8)[7, 2, 0] ^= 1

    resealed(path, TRAIN, change)

    found = audit(path, NumpyTeacher(), windows=ALL)

    (failure,) = found.failures
    assert (failure.split, failure.view, failure.row) == PLACE
    if codec in ("int8", "exact"):  # too little for any other sign
        assert failure.found == "other bytes than the teacher's, in one class of arithmetic"


def test_a_shuffled_part_is_found_and_no_other(cache: Path) -> None:
    def shuffle(block: Block) -> None:
        order = np.roll(np.arange(len(block.value)), 1)
        block.value[:] = block.value[order]
        assert block.scale is not None
        block.scale[:] = block.scale[order]

    resealed(cache, TRAIN, shuffle)

    found = audit(cache, NumpyTeacher(), windows=ALL)

    assert {failure.part for failure in found.failures} == {"train/0/00001"}
    assert len(found.failures) == 20
    assert audit(cache, NumpyTeacher(), windows=len(list(Cache.open(cache).plan.parts()))).failures


def test_values_that_are_not_finite_fail(caches: dict[str, Path], tmp_path: Path) -> None:
    path = Path(shutil.copytree(caches["exact"], tmp_path / "cache"))

    def spoil(block: Block) -> None:
        block.value[7, 2, 3] = np.nan

    resealed(path, TRAIN, spoil)

    (failure,) = audit(path, NumpyTeacher(), windows=ALL).failures

    assert (failure.split, failure.view, failure.row) == PLACE
    assert failure.cosine == -1


def test_a_teacher_that_says_nan_now_fails_where_it_says_so(cache: Path) -> None:
    opened = Cache.open(cache)
    ids, _, turned = opened.seen(TRAIN)
    wanted = reverse_complement(ids[7:8])[0] if turned[7] else ids[7]
    teacher = NumpyTeacher(spoil=lambda shown: (shown == wanted).all(axis=1))

    found = audit(cache, teacher, windows=ALL)

    assert {(f.split, f.row) for f in found.failures} <= {("train", 27)}
    assert all(failure.cosine == -1 for failure in found.failures)


def forged(
    source: Path,
    target: Path,
    *,
    codec: str,
    statistics: Statistics,
    said: float = 0.0,
    by_way_of: str | None = None,
) -> Path:
    """A sealed cache of a true one's windows in which every vector is 0, or true of `exact`."""
    opened = Cache.open(source)
    described = opened.plan.model_dump(mode="json")
    for follows in ("splits", "statistics", "contents"):
        del described[follows]
    if by_way_of is not None:
        described["source"] = {"cache": "0" * 64, "codec": by_way_of}
    (target / layout.WORK).mkdir(parents=True)
    plan = writer.create(
        target,
        described={**described, "codec": codec},
        splits=_splits(opened),
        statistics=statistics,
        fidelity={"channel_rmse": said},
    )
    numerics = opened.receipt(TRAIN).numerics
    for part in plan.parts():
        rows = np.arange(plan.part_windows(part)) + part.number * plan.part
        block = opened.allocate(len(rows))
        opened.read(part.split, part.view, rows, block)
        x = block.value if by_way_of is None and codec == "exact" else block.value * 0
        stored = Codec(plan.codec, "float32").encode(x, statistics.mean, statistics.std)
        with writer.PartWriter(target, plan, part, numerics=numerics) as out:
            out.append(*(array for array in stored if array is not None))
            out.sync()
            out.commit()
    integrity.seal(target)
    assert integrity.verify(target).problems == ()
    return target


def test_a_codec_that_keeps_nothing_is_found_though_the_bytes_are_what_it_makes(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    true = Cache.open(caches["exact"])
    wide = Statistics(np.zeros_like(true.mean), np.full_like(true.std, 1e30))
    path = forged(caches["exact"], tmp_path / "cache", codec="int8", statistics=wide)

    found = audit(path, NumpyTeacher(), windows=64)

    assert (found.equal_windows, found.failures, found.passed) == (64, (), False)
    assert found.loss > 0.95
    assert "off by" in found.doubts[0]


def test_a_source_that_is_said_to_have_lost_all_excuses_no_empty_vectors(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    true = Cache.open(caches["exact"])
    path = forged(
        caches["exact"],
        tmp_path / "cache",
        codec="exact",
        statistics=Statistics(true.mean, true.std),
        by_way_of="tiny",
        said=1e9,
    )

    found = audit(path, NumpyTeacher(), windows=64)

    assert (found.passed, found.source_codec, found.loss_said) == (False, "tiny", 1e9)


@pytest.mark.parametrize(("shift", "factor"), [(5.0, 1.0), (0.0, 20.0), (0.0, 0.05)])
def test_statistics_of_other_vectors_are_found_beside_true_ones(
    caches: dict[str, Path], tmp_path: Path, shift: float, factor: float
) -> None:
    true = Cache.open(caches["exact"])
    false = Statistics(true.mean + np.float32(shift) * true.std, true.std * np.float32(factor))
    path = forged(caches["exact"], tmp_path / "cache", codec="exact", statistics=false)

    found = audit(path, NumpyTeacher(), windows=64)

    assert (found.loss, found.equal_windows, found.failures) == (0, 64, ())
    assert not found.passed
    (doubt,) = found.doubts
    assert "stds from that of these windows" in doubt


# Honest differences


class Elsewhere(NumpyTeacher):
    """Another class of arithmetic: each value off by about so large a share."""

    def __init__(self, noise: float, **given: Any) -> None:
        super().__init__(numerics={"device": "elsewhere"}, **given)
        self._noise = noise

    def embed(self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]) -> Any:
        emb = super().embed(kmer_id_WT, hidden_WT).astype(np.float32)
        spread = emb.reshape(-1, emb.shape[-1]).std(axis=0)
        rng = np.random.default_rng(int(kmer_id_WT.sum()))
        return (emb + self._noise * spread * rng.normal(size=emb.shape)).astype(self.dtype)


@pytest.mark.parametrize("codec", CODECS)
def test_another_class_of_arithmetic_is_allowed_its_rounding_and_no_more(
    caches: dict[str, Path], codec: str
) -> None:
    for noise, passes in ((1e-3, True), (0.3, False)):
        found = audit(caches[codec], Elsewhere(noise), windows=64)
        assert found.passed == passes
        assert not found.bytes_expected
        assert found.here["device"] == "elsewhere"
        assert found.there["device"] == "numpy"
        assert found.limit == 0.9999


@pytest.mark.parametrize(("dtype", "noise"), [("float16", 1e-3), ("float32", 1e-3)])
def test_a_half_precision_cache_may_be_audited_with_more(
    tmp_path: Path, dtype: str, noise: float
) -> None:
    path = tmp_path / "cache"
    extract(a_recipe(tmp_path, path, codec="exact"), teacher=NumpyTeacher(dtype="float16"))

    found = audit(path, Elsewhere(noise, dtype=dtype), windows=64)

    assert found.passed
    assert found.limit == 0.999


@pytest.mark.parametrize("codec", CODECS)
def test_lies_are_found_in_another_class_too(
    caches: dict[str, Path], tmp_path: Path, codec: str
) -> None:
    path = Path(shutil.copytree(caches[codec], tmp_path / "cache"))

    def swap(block: Block) -> None:
        block.value[7], block.value[8] = block.value[8].copy(), block.value[7].copy()

    resealed(path, TRAIN, swap)

    found = audit(path, Elsewhere(1e-3), windows=ALL)

    assert [failure.row for failure in found.failures] == [27, 28]
    assert {failure.part for failure in found.failures} == {"train/0/00001"}


@pytest.mark.parametrize(
    ("source", "codec"),
    [("exact", "int8"), ("exact", "tiny"), ("int8", "tiny"), ("compact", "exact")],
)
def test_a_recoded_cache_is_allowed_what_its_source_had_lost(
    caches: dict[str, Path], tmp_path: Path, source: str, codec: str
) -> None:
    recode(caches[source], tmp_path / "to", codec=codec)

    found = audit(tmp_path / "to", NumpyTeacher(), windows=64)

    assert found.passed
    assert found.bytes_expected == (source == "exact")
    if source == "exact":
        assert found.equal_windows == 64


def test_a_window_is_judged_among_those_it_was_embedded_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arithmetic where the place in a batch moves last bits, as a matrix library's may."""

    class Placed(NumpyTeacher):
        def embed(
            self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
        ) -> Any:
            emb = super().embed(kmer_id_WT, hidden_WT)
            emb[8:] = np.nextafter(emb[8:], np.float32(np.inf))
            return emb

    path = tmp_path / "cache"
    extract(a_recipe(tmp_path, path, codec="exact"), teacher=Placed())

    found = audit(path, Placed(), windows=64)

    assert (found.passed, found.equal_windows) == (True, 64)


def test_last_bits_that_move_in_many_windows_accuse_none(tmp_path: Path) -> None:
    """As another processor's may within one class; one window that moved alone would be accused."""

    class Another(NumpyTeacher):
        def embed(
            self, kmer_id_WT: npt.NDArray[np.uint16], hidden_WT: npt.NDArray[np.bool_]
        ) -> Any:
            emb = super().embed(kmer_id_WT, hidden_WT)
            some = kmer_id_WT.sum(axis=1, dtype=np.int64) % 4 == 0
            emb[some] = np.nextafter(emb[some], np.float32(np.inf))
            return emb

    path = tmp_path / "cache"
    extract(a_recipe(tmp_path, path, codec="exact"), teacher=NumpyTeacher())

    found = audit(path, Another(), windows=ALL)

    assert (found.passed, found.bytes_expected) == (True, False)
    assert 0.5 < found.equal_windows / found.windows < 0.9


# Around it


def test_the_chance_to_find_a_lie_is_told(cache: Path) -> None:
    found: Audit = audit(cache, NumpyTeacher(), windows=64)
    assert found.share_found(1.0) == 1.0
    assert found.share_found(0.01) == pytest.approx(1 - 0.99**64)


def test_an_unfinished_cache_and_a_recipe_without_a_teacher_are_refused(
    cache: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="no \\[teacher\\] table"):
        audit(cache, Recipe.model_validate({"cache": {"path": str(cache)}}))
    (cache / "manifest.json").unlink()
    with pytest.raises(CacheIncomplete):
        audit(cache, NumpyTeacher())


def test_a_real_network_passes_by_recipe_and_by_folder(tmp_path: Path) -> None:
    """Windows of E. coli, the demo's teacher as torch computes it."""
    if not ECOLI.exists():
        pytest.skip("the demo's genome and teacher lie in the repository, not in a package")
    teacher = ECOLI.parent / "teacher"
    base = next(iter(read_contigs(ECOLI))).base[:6_000]
    piece = tmp_path / "piece.fa"
    piece.write_text(f">piece\n{''.join(LETTERS[b] for b in base)}\n")
    tables: Mapping[str, Any] = {
        "teacher": {"name": str(teacher)},
        "genome": [{"name": "piece", "path": str(piece)}],
        "windows": {"bases": 240, "stride": 240},
        "cache": {"path": str(tmp_path / "cache"), "part": 12},
    }
    recipe = Recipe.model_validate(tables)
    extract(recipe, device="cpu")

    for named in (recipe, str(teacher)):
        found = audit(tmp_path / "cache", named, windows=8, device="cpu")
        assert (found.passed, found.bytes_expected, found.equal_windows) == (True, True, 8)


def test_every_codec_is_allowed_for() -> None:
    from had_pipe.audit import _SOURCE_ERROR, LIMITS

    assert set(_SOURCE_ERROR) == set(CODECS)
    assert set(LIMITS) == {"float32", "float16", "bfloat16"}
    assert Codec("int8", "float32").name in CODECS
