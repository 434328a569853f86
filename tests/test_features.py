"""Features of a student beside its teacher's: against a loop over windows, groups and genome."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cache import build_cache

from had_pipe import features
from had_pipe.cache import Cache
from had_pipe.dna import kmers as dna
from had_pipe.dna.annotation import Annotation
from had_pipe.dna.windows import Region
from had_pipe.errors import CacheMismatch, InputError
from had_pipe.features import measure_features
from had_pipe.progress import Progress
from had_pipe.run import RunRecord, read_run
from had_pipe.spaces import Space, turned
from had_pipe.students import HADConfig, HADModel, save_student, spell

TINY = {
    "hidden_size": 32,
    "layers": 1,
    "gdn_heads": 2,
    "head_dim": 16,
    "expand_v": 1,
    "attention_heads": 2,
    "mlp": 32,
}
GENES = [
    Region("one", 7000, 8000, "gene"),
    Region("one", 7200, 7263, "exon"),
    Region("one", 7950, 8100, "gene"),
    Region("elsewhere", 0, 9999, "gene"),
]


def a_run(
    folder: Path, *caches: Cache, seed: int = 0, student: bool = True, **objective: Any
) -> Path:
    """A finished run of a student that learnt nothing."""
    run = {
        "format": "had-run/1",
        "order": 1,
        "recipe": {
            "student": TINY,
            "objective": objective,
            "train": {"steps": 5, "batch": 8, "seed": 0, "validation_split": "valid"},
        },
        "caches": [
            {"id": cache.id, "plan": cache.plan.model_dump(mode="json")} for cache in caches
        ],
    }
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(run), "utf-8")
    if student:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            (folder / "student").mkdir()
            save_student(HADModel(HADConfig(**TINY)), None, folder / "student")
    return folder


class Looked:
    """Every group of the held-out windows, one after the other, by another way to all of it."""

    def __init__(self, record: RunRecord, cache: Cache, *, dropped: bool = False) -> None:
        student = HADModel.from_pretrained(record.folder / "student").eval()
        teacher, own, ids, loci, soft = [], [], [], [], []
        stored = cache.plan.windows.stored
        for row in range(cache.rows("valid")):
            block = cache.allocate(1)
            cache.read("valid", 0, np.array([row]), block)
            emb_GD = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)[0]
            id_T = block.kmer_id
            if block.reversed[0]:
                id_T = dna.reverse_complement(id_T)
            mask_1T = torch.from_numpy(block.mask)
            id_1T = torch.from_numpy(id_T.astype(np.int64))
            if dropped:
                id_1T = id_1T[~mask_1T][None]
                mask_1T = torch.zeros_like(id_1T, dtype=torch.bool)
            with torch.inference_mode():
                feat_SE = student(spell(id_1T, mask_1T)).last_hidden_state[0].numpy()
            columns = list(np.flatnonzero(~block.mask[0]))
            for group in range(stored):
                locus = cache.group_locus("valid", row, view=0, group=group)
                if locus.masked and cache.plan.windows.store != "masked":
                    continue
                if cache.plan.windows.store == "visible":
                    column = columns[group]
                elif cache.plan.windows.store == "all":
                    column = group
                else:
                    column = int(np.flatnonzero(block.mask[0])[group])
                place = columns.index(column) if dropped else column
                teacher.append(emb_GD[group])
                own.append(np.mean(feat_SE[6 * place : 6 * place + 6], axis=0))
                ids.append(locus.kmer_id)
                loci.append(locus)
                soft.append(cache.locus("valid", row).soft_masked_bases / cache.plan.windows.bases)
        self.teacher, self.student = np.array(teacher), np.array(own)
        self.ids, self.loci, self.soft = ids, loci, soft
        self.gc = np.array([sum(letter in "GC" for letter in dna.spell(one)) for one in ids])

    def kinds(self, regions: list[Region]) -> list[str]:
        found = []
        for locus in self.loci:
            middle = locus.start + 3
            over = [
                (r.end - r.start, r.name)
                for r in regions
                if r.contig == locus.contig and r.start <= middle < r.end
            ]
            found.append(min(over)[1] if over else "none")
        return found


def levels(values: list[Any]) -> np.ndarray:
    return np.unique(np.array(values, dtype=str), return_inverse=True)[1]


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        ({"soft_masked": True}, {}),
        ({"store": "all"}, {}),
        ({"store": "masked", "views": 2}, {"align": 0.0}),
        ({"store": "all"}, {"mask_tokens": "dropped"}),
    ],
    ids=["visible", "all", "masked", "dropped"],
)
def test_every_figure_is_that_of_a_loop_over_groups(
    made: Any, tmp_path: Path, kind: dict[str, Any], objective: dict[str, Any]
) -> None:
    cache = made(valid=12, **kind)
    record = read_run(a_run(tmp_path / "run", cache, **objective))
    told: list[Progress] = []
    found = measure_features(
        record, [cache], annotation=Annotation(Path("a.bed"), GENES), report=told.append
    )
    assert found is not None
    naive = Looked(record, cache, dropped=objective.get("mask_tokens") == "dropped")
    assert found.groups == len(naive.ids) == len(found.teacher_P2)
    assert found.kind == ("masked" if kind.get("store") == "masked" else "visible")
    assert (found.windows, found.caches) == (12, (cache.id,))
    assert (told[-1].done, told[-1].total) == (12, 12)

    teacher, student = Space(naive.teacher), Space(naive.student)
    along = sorted(range(len(naive.loci)), key=lambda i: naive.loci[i].start)
    for explained, level_P in (
        (found.gc, naive.gc),
        (found.soft, np.ceil(np.array(naive.soft) * 4)),
        (found.feature, levels(naive.kinds(GENES))),
    ):
        assert explained is not None
        moved = []
        for turn in range(1, 6):
            shift = turn * len(along) // 6
            moved_P = np.empty_like(level_P)
            for place, i in enumerate(along):
                moved_P[i] = level_P[along[place - shift]]
            moved.append(moved_P)
        for space, whose in ((teacher, "teacher"), (student, "student")):
            share = getattr(explained.share, whose)
            assert share == pytest.approx(space.explained(level_P), rel=1e-3, abs=1e-9)
            shifted = np.mean([space.explained(moved_P) for moved_P in moved])
            assert getattr(explained.shifted, whose) == pytest.approx(shifted, rel=1e-3)
    assert found.share.teacher == pytest.approx(teacher.share, rel=1e-3)
    assert found.share.student == pytest.approx(student.share, rel=1e-3)
    planes = teacher.plane(naive.teacher), student.plane(naive.student)
    assert found.agreement == pytest.approx(turned(planes[1], planes[0])[1], rel=1e-2)

    # The same points in another order, each with its own colours.
    assert Counter(found.gc_P.tolist()) == Counter(naive.gc.tolist())
    assert found.feature_P is not None
    names = [found.features[i] for i in found.feature_P]
    assert Counter(names) == Counter(naive.kinds(GENES))
    assert found.features[-2:] == ("another", "none")
    assert len(set(names)) > 1
    expected = sorted(zip(planes[0].round(3).tolist(), naive.gc.tolist(), strict=True))
    drawn = sorted(zip(found.teacher_P2.round(3).tolist(), found.gc_P.tolist(), strict=True))
    np.testing.assert_allclose([at for at, _ in drawn], [at for at, _ in expected], atol=2e-3)
    if kind.get("soft_masked"):
        assert set(found.soft_level_P.tolist()) == {0, 1, 2, 3, 4}


def test_mean_features_of_kmers_are_those_of_a_loop(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made(valid=12)
    record = read_run(a_run(tmp_path / "run", cache))
    found = measure_features(record, [cache])
    assert found is not None
    assert found.kmers is None  # of 4,096 hardly one is seen four times
    assert (found.features, found.feature_P, found.feature) == ((), None, None)

    monkeypatch.setattr(features, "_LEAST", 1)
    found = measure_features(record, [cache])
    assert found is not None
    assert found.kmers is not None
    naive = Looked(record, cache)
    seen: dict[int, list[int]] = defaultdict(list)
    for i, one in enumerate(naive.ids):
        seen[one].append(i)
    apart: dict[str, list[float]] = {"teacher": [], "student": [], "bases": []}
    means = {}
    for whose in ("teacher", "student"):
        x_PD = getattr(naive, whose)
        z_PD = (x_PD - x_PD.mean(0)) / x_PD.std(0)
        means[whose] = {one: z_PD[places].mean(0) for one, places in seen.items()}
    for a, b in combinations(seen, 2):
        for whose, mean in means.items():
            apart[whose].append(float(np.linalg.norm(mean[a] - mean[b])))
        pairs = zip(dna.spell(a), dna.spell(b), strict=True)
        apart["bases"].append(sum(x != y for x, y in pairs))
    assert len(found.kmers.gc_K) == len(seen)
    for name, figure in (
        ("student", found.kmers.correlation),
        ("bases", found.kmers.correlation_of_bases),
    ):
        expected = np.corrcoef(apart["teacher"], apart[name])[0, 1]
        assert figure == pytest.approx(expected, abs=1e-3)
    assert found.kmers.least == min(map(len, seen.values()))


def test_a_sample_of_the_groups_is_enough_and_the_same_each_time(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = made()
    record = read_run(a_run(tmp_path / "run", cache))
    whole = measure_features(record, [cache])
    monkeypatch.setattr(features, "_GROUPS", 200)
    monkeypatch.setattr(features, "_DRAWN", 50)
    monkeypatch.setattr(features, "_BASES", 72 * 30)
    some, again = (measure_features(record, [cache]) for _ in range(2))
    assert whole is not None
    assert some is not None
    assert again is not None
    assert (some.windows, some.groups, len(some.gc_P)) == (30, 200, 50)
    np.testing.assert_array_equal(some.student_P2, again.student_P2)
    assert some.gc.share.teacher == pytest.approx(whole.gc.share.teacher, abs=0.1)


def test_without_a_student_or_held_out_windows_there_is_nothing_to_look_at(
    made: Any, tmp_path: Path
) -> None:
    cache, blind = made(), made(valid=0)
    going_on = read_run(a_run(tmp_path / "going-on", cache, student=False))
    assert measure_features(going_on, [cache]) is None
    assert measure_features(read_run(a_run(tmp_path / "blind", blind)), [blind]) is None


def test_another_cache_and_another_genome_are_refused(made: Any, tmp_path: Path) -> None:
    cache = made()
    other = Cache.open(build_cache(tmp_path / "other", seed=1))
    record = read_run(a_run(tmp_path / "run", cache))
    with pytest.raises(CacheMismatch, match=f"has id {other.id[:12]}, but this student was"):
        measure_features(record, [other])
    elsewhere = Annotation(Path("a.bed"), [Region("chr1", 0, 9, "gene")])
    with pytest.raises(InputError, match=r"contigs of these windows \(one\); it names chr1"):
        measure_features(record, [cache], annotation=elsewhere)
    both = read_run(a_run(tmp_path / "both", cache, other))
    with pytest.raises(InputError, match="contig one is of several genomes here"):
        measure_features(both, [cache, other], annotation=Annotation(Path("a.bed"), GENES))
    found = measure_features(both, [cache, other])
    assert found is not None
    assert (found.windows, found.caches) == (64, (cache.id, other.id))
