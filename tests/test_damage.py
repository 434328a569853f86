"""Damage of every kind to a real cache: found by reading and by verifying, named, and mended.

The cache is what stage one makes of a small genome with a NumPy teacher. A piece of damage is told
by every object it spoils; what extraction can mend is made again by `--repair`, and then the cache
must be byte for byte what it was. The soak does more of the same and prints its figures:

    pytest -m soak -s tests/test_damage.py
"""

from __future__ import annotations

import random
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy_teacher import NumpyTeacher
from test_corpus import random_letters, write_fasta

from had_pipe.cache import Cache, Plan, integrity, layout, writer
from had_pipe.errors import CacheCorrupt, CacheError, HadPipeError, Interrupted
from had_pipe.extract import extract
from had_pipe.progress import Progress
from had_pipe.recipe import Recipe

BASES, PART = 30, 12


class LouderTeacher(NumpyTeacher):
    """Another teacher of the same shape: what it writes is valid, and is not what was written."""

    def embed(self, *seen: Any) -> Any:
        said = super().embed(*seen)
        return said * abs(said)


@dataclass
class Sample:
    """A sealed cache to be damaged, and all that is needed to say whether it is whole again."""

    path: Path
    recipe: Recipe
    plan: Plan
    files: Mapping[str, bytes]
    """As they lie on disk while nothing is wrong."""
    foreign: Mapping[str, bytes]
    """A cache of the same recipe over another genome."""
    older: Mapping[str, bytes]
    """A cache of the same recipe by another teacher."""
    read: list[bytes] = field(default_factory=list)

    @property
    def shards(self) -> list[str]:
        return [
            part.shard_key(signal) for part in self.plan.parts() for signal in self.plan.signals
        ]

    @property
    def receipts(self) -> list[str]:
        return [part.receipt_key for part in self.plan.parts()]

    def restore(self) -> None:
        """Put back what is not as it was, by hand."""
        there = tree(self.path)
        for key in there.keys() - self.files.keys():
            clear(self.path / key)
        for key, raw in self.files.items():
            if there.get(key) != raw:
                clear(self.path / key)
                (self.path / key).parent.mkdir(parents=True, exist_ok=True)
                (self.path / key).write_bytes(raw)
        for folder in sorted(self.path.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def tree(path: Path) -> dict[str, bytes | None]:
    """Every file, and None for what is neither file nor folder."""
    found: dict[str, bytes | None] = {}
    for entry in path.rglob("*"):
        if entry.is_symlink() or not (entry.is_dir() or entry.is_file()):
            found[entry.relative_to(path).as_posix()] = None
        elif entry.is_file():
            found[entry.relative_to(path).as_posix()] = entry.read_bytes()
    return found


def clear(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def a_recipe(folder: Path, genome: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "teacher": {"name": "/there/is/none", "input": "masked"},
            "genome": [
                {"name": "g", "path": str(genome), "splits": {"valid": ["held_out"]}},
            ],
            "windows": {
                "bases": BASES,
                "stride": BASES,
                "views": 2,
                "mask_ratio": 0.25,
                "seed": 3,
            },
            "cache": {"path": str(folder), "part": PART},
        }
    )


def made(folder: Path, *, seed: int, teacher: NumpyTeacher) -> Recipe:
    rng = np.random.default_rng(seed)
    letters = {"one": random_letters(rng, 20 * BASES), "held_out": random_letters(rng, 10 * BASES)}
    recipe = a_recipe(folder / "cache", write_fasta(folder / "g.fa", letters))
    extract(recipe, teacher=teacher)
    return recipe


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folders = {name: tmp_path_factory.mktemp(name) for name in ("sound", "foreign", "older")}
    recipe = made(folders["sound"], seed=0, teacher=NumpyTeacher())
    made(folders["foreign"], seed=1, teacher=NumpyTeacher())
    made(folders["older"], seed=0, teacher=LouderTeacher())
    trees = {name: tree(folder / "cache") for name, folder in folders.items()}
    path = folders["sound"] / "cache"
    sample = Sample(
        path=path,
        recipe=recipe,
        plan=layout.read_plan(path)[0],
        files=trees["sound"],
        foreign=trees["foreign"],
        older=trees["older"],
        read=everything(path),
    )
    assert trees["sound"].keys() == trees["foreign"].keys() == trees["older"].keys()
    assert len(sample.shards) == 2 * (2 * 2 + 1)
    return sample


@pytest.fixture
def sample(samples: Sample) -> Iterator[Sample]:
    yield samples
    samples.restore()
    assert tree(samples.path) == samples.files


def everything(folder: Path) -> list[bytes]:
    """Every number and name that a reader can get; raises as reading does."""
    cache = Cache.open(folder)
    found = [cache.mean.tobytes(), cache.std.tobytes(), repr(cache.attributes).encode()]
    for split in cache.plan.splits:
        rows = np.arange(cache.rows(split))
        found.append(cache.read_kmers(split, rows).tobytes())
        found.append(repr(cache.locus(split, len(rows) - 1)).encode())
        for view in cache.views(split):
            block = cache.allocate(len(rows))
            cache.read(split, view, rows, block)
            arrays = [getattr(block, each.name) for each in fields(block)]
            found += [array.tobytes() for array in arrays if array is not None]
    return found


def said_by_verify(sample: Sample) -> tuple[str, tuple[integrity.Problem, ...]]:
    """All that verification says, or the refusal, and the problems."""
    try:
        problems = integrity.verify(sample.path).problems
    except CacheError as error:
        return str(error), ()
    return "\n".join(map(str, problems)), problems


@dataclass
class Figures:
    """What became of so many pieces of damage of one kind."""

    tried: int = 0
    unnamed: list[object] = field(default_factory=list)
    """By verification."""
    misread: list[object] = field(default_factory=list)
    """Reading went through, and gave something else."""
    refused: int = 0
    """Reading said so; else what is damaged is not read, and everything read was right."""
    mended: int = 0
    not_mended: list[object] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.tried:,} tried, {self.tried - len(self.unnamed):,} named by verify, "
            f"{self.refused:,} refused on reading, {len(self.misread)} misread, "
            f"{self.mended:,} mended by --repair, {len(self.not_mended)} not"
        )

    def note(self, sample: Sample, what: object, keys: set[str], *, repair: bool) -> None:
        """Look at one piece of damage, and with `repair` have it mended."""
        self.tried += 1
        before = tree(sample.path)
        said, problems = said_by_verify(sample)
        assert tree(sample.path) == before, what
        # A plan or manifest that is not itself is refused whole, and named in the refusal.
        if not all(key in said for key in keys):
            self.unnamed.append((what, keys, said))
        try:
            read = everything(sample.path)
        except CacheError:
            self.refused += 1
        else:
            if read != sample.read:
                self.misread.append(what)
        if repair:
            self.mend(sample, what, problems)

    def mend(self, sample: Sample, what: object, problems: tuple[integrity.Problem, ...]) -> None:
        """As verification says: remove what does not belong there, then `--repair`."""
        for problem in sorted(problems, key=lambda problem: problem.key, reverse=True):
            if problem.remedy.startswith("remove it"):
                clear(sample.path / problem.key)
        try:
            extract(sample.recipe, repair=True, teacher=NumpyTeacher())
        except HadPipeError as error:
            self.not_mended.append((what, str(error)))
            return
        if tree(sample.path) == sample.files:
            self.mended += 1
        else:
            self.not_mended.append(what)


# Single bits


def kind_of(sample: Sample, key: str, byte: int) -> str:
    """What a byte of an object is, in words."""
    for part in sample.plan.parts():
        windows = sample.plan.part_windows(part)
        for signal in sample.plan.signals:
            if key == part.shard_key(signal):
                name = f"{signal.path.rpartition('/')[2]} shard, "
                if byte < windows * signal.stride:
                    inside = byte % signal.stride < signal.nbytes
                    return name + ("payload" if inside else "CRC of a window")
                last = len(sample.files[key]) - layout.CRC_NBYTES
                return name + ("index" if byte < last else "CRC of the index")
    if key.startswith(layout.RECEIPTS):
        return "receipt"
    name = key.rpartition("/")[2]
    if name in ("zarr.json", layout.WINDOWS, layout.PLAN, layout.MANIFEST):
        return name
    chunk = key.removeprefix(f"{layout.DATA}/").partition("/c/")[0]
    return f"chunk of {chunk.rpartition('/')[2]}"


def bits(sample: Sample) -> dict[str, list[tuple[str, int]]]:
    """Every byte of the cache, by kind."""
    found: dict[str, list[tuple[str, int]]] = {}
    for key, raw in sample.files.items():
        for byte in range(len(raw)):
            found.setdefault(kind_of(sample, key, byte), []).append((key, byte))
    return found


NEVER_READ = {
    "zarr.json",  # but the root's
    "value shard, CRC of a window",  # the receipt's is compared
    "scale shard, CRC of a window",
}


def flip_bits(sample: Sample, count: int, *, seed: int, repairs: int) -> dict[str, Figures]:
    """So many single bits, kind by kind in turn; every so many-th that can be is mended."""
    places, draw = bits(sample), random.Random(seed)
    figures = {kind: Figures() for kind in places}
    for number in range(count):
        kind = list(places)[number % len(places)]
        key, byte = draw.choice(places[kind])
        bit = draw.randrange(8)
        raw = bytearray(sample.files[key])
        raw[byte] ^= 1 << bit
        (sample.path / key).write_bytes(raw)
        again = kind != layout.PLAN  # which says what a whole cache is: it can only be copied
        repair = again and number // len(places) % repairs == 0
        what = f"bit {bit} of byte {byte} of {key}"
        figures[kind].note(sample, what, {key}, repair=repair)
        (sample.path / key).write_bytes(sample.files[key])
        if repair and figures[kind].not_mended:
            sample.restore()
    return figures


def assert_none_missed(figures: Mapping[str, Figures]) -> None:
    for kind, found in figures.items():
        assert found.tried, kind
        assert found.unnamed == [], kind
        assert found.misread == [], kind
        assert found.not_mended == [], kind


@pytest.mark.timeout(240)
def test_every_flipped_bit_is_named_and_none_is_read(sample: Sample) -> None:
    figures = flip_bits(sample, 300, seed=0, repairs=10)

    assert len(figures) == 18
    assert_none_missed(figures)
    for kind, found in figures.items():
        assert kind in NEVER_READ or found.refused == found.tried, kind
    assert sum(found.mended for found in figures.values()) >= 20


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_of_five_thousand_flipped_bits_none_is_missed(sample: Sample) -> None:
    figures = flip_bits(sample, 5000, seed=1, repairs=1)
    tell("one bit flipped in: ", figures)
    assert_none_missed(figures)


def tell(what: str, figures: Mapping[str, Figures]) -> None:
    total: Counter[str] = Counter()
    for kind, found in figures.items():
        print(f"{what}{kind}: {found}")
        total += Counter(
            tried=found.tried,
            refused=found.refused,
            mended=found.mended,
            missed=len(found.unnamed) + len(found.misread) + len(found.not_mended),
        )
    print(f"{what}all: {dict(total)}")


# Whole objects


Damage = Callable[[Sample, random.Random], set[str]]
"""Spoils the cache and tells the keys that must be named."""


def spoil(sample: Sample, key: str, raw: bytes) -> set[str]:
    assert raw != sample.files[key]
    (sample.path / key).write_bytes(raw)
    return {key}


def truncated(sample: Sample, draw: random.Random) -> set[str]:
    key = draw.choice(sample.shards + sample.receipts)
    return spoil(sample, key, sample.files[key][: draw.randrange(1, len(sample.files[key]))])


def with_a_zero_tail(sample: Sample, draw: random.Random) -> set[str]:
    key = draw.choice(sample.shards)
    raw = sample.files[key]
    kept = draw.randrange(len(raw) - 1)
    return spoil(sample, key, raw[:kept] + bytes(len(raw) - kept))


def missing(sample: Sample, draw: random.Random) -> set[str]:
    key = draw.choice(sample.shards + sample.receipts)
    (sample.path / key).unlink()
    return {key}


def empty(sample: Sample, draw: random.Random) -> set[str]:
    return spoil(sample, draw.choice(sample.shards + sample.receipts), b"")


def swapped(sample: Sample, draw: random.Random) -> set[str]:
    """Two shards of one length, of any parts and views."""
    pairs = [
        (one, other)
        for one in sample.shards
        for other in sample.shards
        if one != other and len(sample.files[one]) == len(sample.files[other])
    ]
    one, other = draw.choice(pairs)
    return spoil(sample, one, sample.files[other]) | spoil(sample, other, sample.files[one])


def of_another_cache(sample: Sample, draw: random.Random) -> set[str]:
    key = draw.choice(sample.shards + sample.receipts)
    return spoil(sample, key, sample.foreign[key])


def of_an_older_teacher(sample: Sample, draw: random.Random) -> set[str]:
    """The same part of the same genome, whole and valid, with or without its receipt."""
    key = draw.choice(sample.shards)
    part = integrity.damaged_parts(sample.plan, [integrity.Problem(key, "", "", "")])[0][0]
    keys = spoil(sample, key, sample.older[key])
    if draw.random() < 0.5:
        for signal in sample.plan.signals:
            keys |= spoil(sample, part.shard_key(signal), sample.older[part.shard_key(signal)])
        keys |= spoil(sample, part.receipt_key, sample.older[part.receipt_key])
    return keys


def an_extra_file(sample: Sample, draw: random.Random) -> set[str]:
    """A stranger, or a copy of what is there, or what would be the next part."""
    near = draw.choice(list(sample.files))
    names = ["notes.txt", ".DS_Store", "99/0/0", "00099.json", f"{Path(near).name} (copy)", "c2/x"]
    key = (Path(near).parent / draw.choice(names)).as_posix()
    (sample.path / key).parent.mkdir(exist_ok=True, parents=True)
    (sample.path / key).write_bytes(sample.files[near])
    return {key}


def behind_a_link(sample: Sample, draw: random.Random) -> set[str]:
    """A link to the very bytes elsewhere, instead of a shard, a receipt, or a folder of them."""
    key = draw.choice(sample.shards + sample.receipts)
    if draw.random() < 0.5 and "/c/" in key:
        key = key.partition("/c/")[0] + "/c"
    outside = sample.path.with_name("outside")
    clear(outside)
    shutil.move(sample.path / key, outside)
    (sample.path / key).symlink_to(outside)
    return {key}


def of_another_case(sample: Sample, draw: random.Random) -> set[str]:
    """As a file system that folds case may give it back: the key is gone, and one like it there."""
    key = draw.choice(sample.shards + sample.receipts)
    words = key.split("/")
    at = words.index("c") if "c" in words else draw.choice((0, 1))
    folder, renamed = "/".join(words[: at + 1]), [*words]
    renamed[at] = words[at].capitalize()
    shutil.move(sample.path / folder, sample.path / "/".join(renamed[: at + 1]))
    return {key, "/".join(renamed)}


KINDS: tuple[Damage, ...] = (
    truncated,
    with_a_zero_tail,
    missing,
    empty,
    swapped,
    of_another_cache,
    of_an_older_teacher,
    an_extra_file,
    behind_a_link,
    of_another_case,
)


def spoil_objects(
    sample: Sample, damage: Damage, count: int, *, seed: int, repairs: int
) -> Figures:
    draw, figures = random.Random(f"{seed} {damage.__name__}"), Figures()
    for number in range(count):
        keys = damage(sample, draw)
        what = f"{damage.__name__} {number}: {sorted(keys)}"
        repair = number % repairs == 0
        figures.note(sample, what, keys, repair=repair)
        if not repair or figures.not_mended:
            sample.restore()
    return figures


@pytest.mark.timeout(240)
@pytest.mark.parametrize("damage", KINDS, ids=lambda damage: damage.__name__)
def test_a_spoilt_object_is_named_never_read_and_made_again(sample: Sample, damage: Damage) -> None:
    figures = spoil_objects(sample, damage, 15, seed=0, repairs=5)

    assert_none_missed({damage.__name__: figures})
    # What does not belong there is nothing a reader comes by.
    assert figures.refused == (0 if damage is an_extra_file else figures.tried)


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_of_a_hundred_spoilt_objects_of_each_kind_none_is_missed(sample: Sample) -> None:
    figures = {
        damage.__name__: spoil_objects(sample, damage, 100, seed=1, repairs=1) for damage in KINDS
    }
    tell("", figures)
    assert_none_missed(figures)


def test_repair_makes_exactly_the_damaged_parts_again(sample: Sample) -> None:
    """Damage of every kind at once, one part spared of two."""
    draw = random.Random(4)
    parts = list(sample.plan.parts())
    spoilt = parts[::2]
    for place, part in enumerate(spoilt):
        keys = [part.receipt_key, *(part.shard_key(signal) for signal in sample.plan.signals)]
        key = keys[place % len(keys)]
        raw = bytearray(sample.files[key])
        raw[draw.randrange(len(raw))] ^= 4
        (sample.path / key).write_bytes(raw[: -(place % 2) or None])
    spared = {
        key: (sample.path / key).stat() for part in parts[1::2] for key in keys_of(sample, part)
    }

    summary = extract(sample.recipe, repair=True, teacher=NumpyTeacher())

    assert summary.parts_made == len(spoilt)
    assert tree(sample.path) == sample.files
    for key, status in spared.items():
        now = (sample.path / key).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns), key


def keys_of(sample: Sample, part: layout.Part) -> list[str]:
    return [part.receipt_key, *(part.shard_key(signal) for signal in sample.plan.signals)]


@pytest.mark.timeout(120)
def test_a_repair_while_another_seals_leaves_no_seal_on_what_it_took_back(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    (sample.path / layout.MANIFEST).unlink()
    (sample.path / sample.shards[0]).write_bytes(bytes(len(sample.files[sample.shards[0]])))
    about_to_seal, taken_back = threading.Event(), threading.Event()

    def wait_at_the_seal(progress: Progress) -> None:
        if progress.what == "sealing":
            about_to_seal.set()
            taken_back.wait(1)

    sealing = threading.Thread(
        target=extract,
        args=(sample.recipe,),
        kwargs={"teacher": NumpyTeacher(), "report": wait_at_the_seal},
    )
    forget = integrity.forget

    def forget_and_dawdle(*what: Any) -> None:
        forget(*what)
        taken_back.set()
        sealing.join()

    monkeypatch.setattr(integrity, "forget", forget_and_dawdle)
    sealing.start()
    assert about_to_seal.wait(60)

    made = extract(sample.recipe, repair=True, teacher=NumpyTeacher())

    assert made.parts_made == 1
    assert tree(sample.path) == sample.files


PLANNED = (
    "windows.parquet",
    "data.zarr/zarr.json",
    "data.zarr/statistics/embedding/std/c/0",
    "data.zarr/train/kmer_id/c/1/0",
    "data.zarr/valid/0/mask/c/0/0",
    "data.zarr/train/1/embedding/value/zarr.json",
)


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_what_was_planned_is_planned_again_where_it_differs(sample: Sample, sealed: bool) -> None:
    """And nothing else is touched; what is not sealed is then sealed."""
    if not sealed:
        (sample.path / layout.MANIFEST).unlink()
    for key in PLANNED[1:]:
        spoil(sample, key, sample.files[key][:-2])
    (sample.path / PLANNED[0]).unlink()
    whole = [key for key in sample.files if key not in (*PLANNED, layout.MANIFEST)]
    before = {key: (sample.path / key).stat() for key in whole}

    made = extract(sample.recipe, repair=True, teacher=NumpyTeacher())

    assert made.parts_made == 0
    assert tree(sample.path) == sample.files
    for key, status in before.items():
        now = (sample.path / key).stat()
        assert (now.st_ino, now.st_mtime_ns) == (status.st_ino, status.st_mtime_ns), key


def test_repair_by_another_version_of_arrow_mends_what_it_can(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = writer._write_windows

    def otherwise(path: Path, *what: Any) -> None:
        write(path, *what)
        pq.write_table(pq.read_table(path), path, compression="none")

    monkeypatch.setattr(writer, "_write_windows", otherwise)
    mask = "data.zarr/train/0/mask/c/0/0"
    (sample.path / mask).write_bytes(sample.files[mask][:-1])
    extract(sample.recipe, repair=True, teacher=NumpyTeacher())
    assert tree(sample.path) == sample.files

    (sample.path / "windows.parquet").unlink()
    with pytest.raises(CacheCorrupt, match=r"windows\.parquet is damaged.*another version of Zarr"):
        extract(sample.recipe, repair=True, teacher=NumpyTeacher())


class Recalibrated(NumpyTeacher):
    """The same weights on another kind of device: other bits, so other statistics."""

    def embed(self, *seen: Any) -> Any:
        return super().embed(*seen) * np.float32(1 + 2**-20)


def test_where_planning_again_gives_something_else_nothing_is_touched(sample: Sample) -> None:
    key = "data.zarr/train/0/mask/c/0/0"
    (sample.path / key).write_bytes(sample.files[key][:-1])
    (sample.path / sample.shards[0]).unlink()
    before = {key: raw for key, raw in tree(sample.path).items() if not key.startswith(".work")}
    with pytest.raises(CacheCorrupt, match="planning again gives another plan"):
        extract(sample.recipe, repair=True, teacher=Recalibrated())
    after = {key: raw for key, raw in tree(sample.path).items() if not key.startswith(".work")}
    assert after == before
    # What was tried there is not taken for what is right, by whoever can mend it.
    extract(sample.recipe, repair=True, teacher=NumpyTeacher())
    assert tree(sample.path) == sample.files


def test_what_a_killed_repair_planned_elsewhere_is_not_put_in_place(sample: Sample) -> None:
    (sample.path / layout.MANIFEST).unlink()
    again = sample.path / layout.WORK / "again"
    moved = {**sample.recipe.cache.model_dump(), "path": again}
    elsewhere = sample.recipe.model_copy(update={"cache": type(sample.recipe.cache)(**moved)})
    with pytest.raises(Interrupted):
        extract(elsewhere, teacher=Recalibrated(), stopping=lambda: True)
    key = "data.zarr/train/0/mask/c/0/0"
    (sample.path / key).write_bytes(sample.files[key][:-1])

    extract(sample.recipe, repair=True, teacher=NumpyTeacher())

    assert tree(sample.path) == sample.files


def test_a_folder_of_what_was_planned_behind_a_link_is_not_written_through(
    sample: Sample,
) -> None:
    outside = sample.path.with_name("elsewhere")
    shutil.move(sample.path / "data.zarr/train/0/mask", outside)
    (outside / "c/0/0").write_bytes(b"mine")
    (sample.path / "data.zarr/train/0/mask").symlink_to(outside)
    before = tree(outside)
    with pytest.raises(CacheCorrupt, match="a link"):
        extract(sample.recipe, repair=True, teacher=NumpyTeacher())
    assert tree(outside) == before


def test_a_folder_with_something_in_it_where_a_shard_belongs_is_left_to_its_owner(
    sample: Sample,
) -> None:
    shard = sample.path / sample.shards[0]
    shard.unlink()
    shard.mkdir()
    (shard / "mine.txt").write_text("a thesis")
    with pytest.raises(CacheCorrupt, match=r"mine\.txt: a file.*remove it"):
        extract(sample.recipe, repair=True, teacher=NumpyTeacher())
    assert (shard / "mine.txt").read_text() == "a thesis"
    (shard / "mine.txt").unlink()
    extract(sample.recipe, repair=True, teacher=NumpyTeacher())
    assert shard.is_file()
    assert tree(sample.path) == sample.files
