"""Damage: every flip found, every trick refused by name, and nothing changed by looking."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_cache import build_cache

from had_pipe.cache import Block, Cache, Part, integrity, layout
from had_pipe.errors import CacheCorrupt, CacheError, CacheIncomplete, CacheRefused
from had_pipe.progress import Progress

SHAPE: Mapping[str, Any] = {"windows": 7, "valid": 3, "kmers": 6, "channels": 4, "part": 3}

VALUE = "data.zarr/train/0/embedding/value/c/{}/0/0"
RECEIPT = "parts/train/0/{:05d}.json"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_cache(tmp_path_factory.mktemp("sound") / "cache", **SHAPE)


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound cache of the same shape, of other windows."""
    return build_cache(tmp_path_factory.mktemp("stranger") / "cache", **SHAPE, seed=1)


@pytest.fixture
def cache(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "cache"))


@pytest.fixture
def begun(tmp_path: Path) -> Path:
    """A cache of which two parts of four are there."""
    return build_cache(tmp_path / "begun", **SHAPE, parts=2)


def state(folder: Path) -> dict[str, tuple[str, int]]:
    """Everything about the files of a folder that a writer would change."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[path.relative_to(folder).as_posix()] = (digest, path.stat().st_mtime_ns)
        else:
            found[path.relative_to(folder).as_posix()] = ("", path.lstat().st_mtime_ns)
    return found


def everything(folder: Path, *, incomplete: bool = False) -> list[bytes]:
    """Every number a reader can get, read in every way; raises as reading does."""
    cache = Cache.open(folder, incomplete=incomplete)
    found = [cache.mean.tobytes(), cache.std.tobytes()]
    for split in cache.plan.splits:
        rows = np.arange(cache.rows(split))
        found.append(cache.read_kmers(split, rows).tobytes())
        for view in cache.views(split):
            block = cache.allocate(len(rows))
            cache.read(split, view, rows, block)
            found += flat(block)
        found.append(repr(cache.locus(split, len(rows) - 1)).encode())
    found.append(repr(cache.attributes).encode())
    return found


def flat(block: Block) -> list[bytes]:
    assert block.scale is not None
    arrays = (block.kmer_id, block.mask, block.reversed, block.value, block.scale)
    return [array.tobytes() for array in arrays]


def found_by_verify(cache: Path, level: integrity.Level = "everything") -> str:
    """The problems as text, or the refusal."""
    try:
        problems = integrity.verify(cache, level=level).problems
    except CacheError as error:
        return str(error)
    return "\n".join(map(str, problems))


def flip(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def test_a_sound_cache_verifies_at_every_level_and_stays_as_it_is(cache: Path) -> None:
    before = state(cache)
    sizes = {key: (cache / key).stat().st_size for key in before if (cache / key).is_file()}
    del sizes["manifest.json"]

    reports = {
        level: integrity.verify(cache, level=level)
        for level in ("structure", "sample", "everything")
    }

    assert state(cache) == before
    whole = reports["everything"]
    assert (whole.objects, whole.nbytes) == (len(sizes), sum(sizes.values()))
    small = [key for key in sizes if key.endswith(".json") or key == "windows.parquet"]
    assert reports["structure"].objects == len(small)
    assert reports["structure"].nbytes == sum(sizes[key] for key in small)
    large = len(sizes) - len(small)
    assert reports["sample"].objects == len(small) + -(-large // 20)
    for report in reports.values():
        assert report.problems == ()
        assert report.sealed
        assert report.cache_id == json.loads((cache / "manifest.json").read_bytes())["id"]


def test_every_flip_in_a_receipt_is_found_before_sealing_too(begun: Path) -> None:
    """In an unsealed cache nothing but the plan and the receipt itself can tell."""
    receipt = begun / RECEIPT.format(1)
    original = receipt.read_bytes()
    right = everything_there(begun)
    rng = np.random.default_rng(6)
    for bit in rng.integers(0, len(original) * 8, 80).tolist():
        flip(receipt, bit)
        found_by_verify(begun)  # never a traceback
        with suppress(CacheError):
            assert everything_there(begun) == right
        receipt.write_bytes(original)


def everything_there(folder: Path) -> list[bytes]:
    cache = Cache.open(folder, incomplete=True)
    block = cache.allocate(6)
    cache.read("train", 0, np.arange(6), block)
    return flat(block)


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], *, seal: bool = False) -> None:
    """Edit a JSON file and write it canonically; with `seal`, give a manifest its right id."""
    value = json.loads(path.read_bytes())
    change(value)
    if seal:
        value.pop("id")
        value["id"] = hashlib.sha256(layout.canonical_json(value)).hexdigest()
    path.write_bytes(layout.canonical_json(value))


def admit(cache: Path, *keys: str) -> None:
    """Make the manifest say of some objects what they now are: a forger's work, or a mix-up."""

    def change(manifest: dict[str, Any]) -> None:
        for key in keys:
            raw = (cache / key).read_bytes()
            entry = {"nbytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
            manifest["objects"][key] = entry

    rewrite(cache / "manifest.json", change, seal=True)


def truncated(cache: Path, _: Path) -> None:
    path = cache / VALUE.format(1)
    os.truncate(path, path.stat().st_size - 1)


def zero_tail(cache: Path, _: Path) -> None:
    path = cache / VALUE.format(1)
    nbytes = path.stat().st_size
    os.truncate(path, nbytes - 40)
    os.truncate(path, nbytes)


def zero_rows(cache: Path, _: Path) -> None:
    path = cache / VALUE.format(1)
    raw = path.read_bytes()
    path.write_bytes(bytes(30) + raw[30:])


def longer(cache: Path, _: Path) -> None:
    with (cache / VALUE.format(1)).open("ab") as file:
        file.write(b"\0")


def missing(cache: Path, _: Path) -> None:
    (cache / VALUE.format(1)).unlink()


def empty(cache: Path, _: Path) -> None:
    (cache / VALUE.format(1)).write_bytes(b"")


def swapped(cache: Path, _: Path) -> None:
    one, two = cache / VALUE.format(0), cache / VALUE.format(1)
    raw = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(raw)


def of_another_cache(cache: Path, stranger: Path) -> None:
    shutil.copyfile(stranger / VALUE.format(1), cache / VALUE.format(1))


def older(cache: Path, _: Path) -> None:
    """A whole, valid shard of the same part, as another teacher wrote it."""
    path = cache / VALUE.format(1)
    raw = path.read_bytes()
    rows, stride = [], 5 * 4 + 4
    for row in range(3):
        payload = bytes(reversed(raw[row * stride : row * stride + 20]))
        rows.append(payload + crc32c.crc32c(payload).to_bytes(4, "little"))
    path.write_bytes(b"".join(rows) + raw[3 * stride :])


def rows_in_another_order(cache: Path, _: Path) -> None:
    """Valid Zarr, but not row order: two rows exchanged, and the index says so."""
    path = cache / VALUE.format(1)
    raw, n = path.read_bytes(), 24
    index = raw[-52:-4]
    index = index[16:32] + index[:16] + index[32:]
    body = raw[n : 2 * n] + raw[:n] + raw[2 * n : 3 * n]
    path.write_bytes(body + index + crc32c.crc32c(index).to_bytes(4, "little"))


def symlinked(cache: Path, stranger: Path) -> None:
    (cache / VALUE.format(1)).unlink()
    (cache / VALUE.format(1)).symlink_to(stranger / VALUE.format(1))


def symlinked_to_itself_elsewhere(cache: Path, _: Path) -> None:
    """The very bytes, but beyond a link: a reader leaves the folder for nothing."""
    outside = cache.parent / "outside"
    folder = (cache / VALUE.format(1)).parent
    shutil.move(folder, outside)
    folder.symlink_to(outside)


def fifo(cache: Path, _: Path) -> None:
    (cache / VALUE.format(1)).unlink()
    os.mkfifo(cache / VALUE.format(1))


def folder_as_shard(cache: Path, _: Path) -> None:
    (cache / VALUE.format(1)).unlink()
    (cache / VALUE.format(1)).mkdir()


def receipt_missing(cache: Path, _: Path) -> None:
    (cache / RECEIPT.format(1)).unlink()


def receipt_foreign(cache: Path, stranger: Path) -> None:
    shutil.copyfile(stranger / RECEIPT.format(1), cache / RECEIPT.format(1))


def receipt_of_another_part(cache: Path, _: Path) -> None:
    shutil.copyfile(cache / RECEIPT.format(0), cache / RECEIPT.format(1))


def receipt_fifo(cache: Path, _: Path) -> None:
    (cache / RECEIPT.format(1)).unlink()
    os.mkfifo(cache / RECEIPT.format(1))


def receipt_spoilt_base64(cache: Path, _: Path) -> None:
    def change(receipt: dict[str, Any]) -> None:
        for record in receipt["objects"].values():
            record["crc32c"] = "@" + record["crc32c"][1:]

    rewrite(cache / RECEIPT.format(1), change)


def receipt_with_a_fifth_byte(cache: Path, _: Path) -> None:
    def change(receipt: dict[str, Any]) -> None:
        for record in receipt["objects"].values():
            record["crc32c"] = "QUJDREU="

    rewrite(cache / RECEIPT.format(1), change)


def kmers_missing(cache: Path, _: Path) -> None:
    (cache / "data.zarr/train/kmer_id/c/1/0").unlink()


def kmers_swapped(cache: Path, _: Path) -> None:
    one, two = (cache / f"data.zarr/train/kmer_id/c/{n}/0" for n in (0, 1))
    raw = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(raw)


def mask_fifo(cache: Path, _: Path) -> None:
    (cache / "data.zarr/train/0/mask/c/1/0").unlink()
    os.mkfifo(cache / "data.zarr/train/0/mask/c/1/0")


DAMAGE: Mapping[Callable[[Path, Path], None], tuple[type[CacheError], str, str]] = {
    truncated: (CacheCorrupt, "expected", VALUE.format(1)),
    zero_tail: (CacheCorrupt, "row order", VALUE.format(1)),
    zero_rows: (CacheCorrupt, "wrong CRC32C", VALUE.format(1)),
    longer: (CacheCorrupt, "expected", VALUE.format(1)),
    missing: (CacheCorrupt, "cannot be opened", VALUE.format(1)),
    empty: (CacheCorrupt, "has 0 bytes", VALUE.format(1)),
    swapped: (CacheCorrupt, "another shard's", VALUE.format(1)),
    of_another_cache: (CacheCorrupt, "another shard's", VALUE.format(1)),
    older: (CacheCorrupt, "another shard's", VALUE.format(1)),
    rows_in_another_order: (CacheCorrupt, "row order", VALUE.format(1)),
    symlinked: (CacheRefused, "a link", VALUE.format(1)),
    symlinked_to_itself_elsewhere: (CacheRefused, "a link", VALUE.format(1).rpartition("/")[0]),
    fifo: (CacheRefused, "ordinary file", VALUE.format(1)),
    folder_as_shard: (CacheRefused, "ordinary file", VALUE.format(1)),
    receipt_missing: (CacheCorrupt, "is missing", RECEIPT.format(1)),
    receipt_foreign: (CacheCorrupt, "SHA-256", RECEIPT.format(1)),
    receipt_of_another_part: (CacheCorrupt, "SHA-256", RECEIPT.format(1)),
    receipt_fifo: (CacheRefused, "ordinary file", RECEIPT.format(1)),
    receipt_spoilt_base64: (CacheCorrupt, "SHA-256", RECEIPT.format(1)),
    kmers_missing: (CacheCorrupt, "is missing", "data.zarr/train/kmer_id/c/1/0"),
    kmers_swapped: (CacheCorrupt, "SHA-256", "data.zarr/train/kmer_id/c/"),
    mask_fifo: (CacheRefused, "ordinary file", "data.zarr/train/0/mask/c/1/0"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_refused_on_reading_and_named_by_verify(
    damage: Callable[[Path, Path], None], cache: Path, stranger: Path
) -> None:
    error, reason, key = DAMAGE[damage]
    damage(cache, stranger)
    before = state(cache)

    with pytest.raises(CacheError) as caught:
        everything(cache)
    said = found_by_verify(cache)

    assert type(caught.value) is error
    assert reason in str(caught.value)
    assert (VALUE.format(0) if damage is swapped else key) in str(caught.value)
    assert key in said
    assert state(cache) == before


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_structure_sees_what_can_be_seen_without_reading_all(
    damage: Callable[[Path, Path], None], cache: Path, stranger: Path
) -> None:
    damage(cache, stranger)
    contents_only = {zero_tail, zero_rows, swapped, of_another_cache, older, kmers_swapped}
    contents_only.add(rows_in_another_order)

    assert bool(found_by_verify(cache, "structure")) == (damage not in contents_only)


def test_sample_hashes_some_large_objects_and_always_the_same(cache: Path) -> None:
    large = [
        path
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.suffix not in (".json", ".parquet")
    ]
    hit = []
    for path in large:
        original = path.read_bytes()
        flip(path, 3)
        said = [bool(found_by_verify(cache, "sample")) for _ in range(2)]
        assert said[0] == said[1]
        hit.append(said[0])
        path.write_bytes(original)
    assert sum(hit) == -(-len(large) // integrity.SAMPLE)


@pytest.mark.parametrize(
    "damage",
    [
        receipt_foreign,
        receipt_of_another_part,
        receipt_spoilt_base64,
        receipt_with_a_fifth_byte,
        of_another_cache,
        older,
    ],
    ids=lambda damage: damage.__name__,
)
def test_an_unsealed_cache_notices_too(
    damage: Callable[[Path, Path], None], begun: Path, stranger: Path
) -> None:
    damage(begun, stranger)

    with pytest.raises(CacheError, match=r"belongs elsewhere|base64|another shard's"):
        everything_there(begun)

    assert "train/0/" in found_by_verify(begun)


def edited_plan(cache: Path) -> None:
    rewrite(cache / "plan.json", lambda plan: plan["windows"].update(seed=1))


def spaced_plan(cache: Path) -> None:
    path = cache / "plan.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True) + "\n")


def spaced_manifest(cache: Path) -> None:
    path = cache / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_bytes()), sort_keys=True) + "\n")


def edited_manifest(cache: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["objects"][VALUE.format(1)]["nbytes"] += 1

    rewrite(cache / "manifest.json", change)


def forged_manifest(cache: Path) -> None:
    """A made-up key that leads out of the folder, and a right id."""

    def change(manifest: dict[str, Any]) -> None:
        manifest["objects"]["../secret"] = {"nbytes": 6, "sha256": "0" * 64}

    (cache.parent / "secret").write_text("secret")
    rewrite(cache / "manifest.json", change, seal=True)


def thin_manifest(cache: Path) -> None:
    rewrite(
        cache / "manifest.json", lambda m: m["objects"].pop(VALUE.format(1)) and None, seal=True
    )


def manifest_of_another_plan(cache: Path) -> None:
    rewrite(cache / "manifest.json", lambda manifest: manifest.update(plan="0" * 64), seal=True)


def endless_plan(cache: Path) -> None:
    rewrite(cache / "plan.json", lambda plan: plan["splits"]["train"].update(windows=1 << 28))
    plan_id = hashlib.sha256((cache / "plan.json").read_bytes()).hexdigest()
    admit(cache, "plan.json")
    rewrite(cache / "manifest.json", lambda manifest: manifest.update(plan=plan_id), seal=True)


def contradiction(**said: int) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        rewrite(cache / "plan.json", lambda plan: plan["windows"].update(said))

    return change


def raw(name: str, text: bytes) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        (cache / name).write_bytes(text)

    return change


def put(name: str, old: bytes, new: bytes) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        text = (cache / name).read_bytes()
        assert text.count(old) == 1
        (cache / name).write_bytes(text.replace(old, new))

    return change


def enormous(name: str, nbytes: int) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        os.truncate(cache / name, nbytes)  # sparse

    return change


def linked(name: str) -> Callable[[Path], None]:
    def change(cache: Path) -> None:
        shutil.move(cache / name, cache.parent / "moved")
        (cache / name).symlink_to(cache.parent / "moved")

    return change


def dangling(cache: Path) -> None:
    (cache / "manifest.json").unlink()
    (cache / "manifest.json").symlink_to(cache.parent / "nowhere")


REFUSALS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "edited plan": (edited_plan, r"manifest is of plan|plan\.json: SHA-256"),
    "plan in another spelling": (spaced_plan, r"plan\.json: not canonical"),
    "manifest in another spelling": (spaced_manifest, r"manifest\.json: not canonical"),
    "edited manifest": (edited_manifest, r"manifest\.json: its id is"),
    "forged manifest": (forged_manifest, r"\.\./secret"),
    "thin manifest": (thin_manifest, r"train/0/embedding/value/c/1/0/0"),
    "manifest of another plan": (manifest_of_another_plan, r"of plan 000000000000"),
    "endless plan": (endless_plan, "parts, more than 262,144"),
    "bases that are not the k-mers'": (contradiction(bases=6), r"windows: .* of 6 bases"),
    "groups stored that are not the visible": (contradiction(stored=1), "1 groups stored"),
    "all groups masked": (contradiction(masked=1 << 17), "131072 masked"),
    "a key twice": (
        put("plan.json", b'"codec":"int8"', b'"codec":"int8","codec":"int8"'),
        r"plan\.json: .* a key stands twice",
    ),
    "NaN": (put("plan.json", b'"mask_ratio":0.15', b'"mask_ratio":NaN'), "NaN is no JSON"),
    "infinity": (put("plan.json", b'"mask_ratio":0.15', b'"mask_ratio":1e999'), "mask_ratio"),
    "a string for a number": (put("plan.json", b'"part":3', b'"part":"3"'), "part: Input should"),
    "an unknown key": (put("plan.json", b'"part":3', b'"pact":3,"part":3'), "pact: Extra inputs"),
    "half a character": (
        put("plan.json", b'"name":"invented/teacher"', b'"name":"\\ud800"'),
        r"plan\.json: not what format 1 says: .*unicode",
    ),
    "a number of many digits": (
        put("plan.json", b'"part":3', b'"part":' + b"9" * 10_000),
        r"plan\.json: not what format 1 says",
    ),
    "deep plan": (raw("plan.json", b"[" * 200_000), r"plan\.json: not what format 1 says"),
    "deep manifest": (
        raw("manifest.json", b'{"a":' * 5_000),
        r"manifest\.json: not what format 1 says",
    ),
    "no JSON": (raw("plan.json", b"\x80\x02"), r"plan\.json: not what format 1 says"),
    "a list": (raw("plan.json", b"[1]\n"), r"plan\.json: not what format 1 says"),
    "the future": (
        put("plan.json", b'"format":"had-cache/1"', b'"format":"had-cache/2"'),
        r"plan\.json: format 'had-cache/2'; this version of had-pipe reads 'had-cache/1'",
    ),
    "a long format": (
        raw("plan.json", b'{"format":"' + b"x" * 100_000 + b'"}\n'),
        r"plan\.json: format 'x{59}; this",
    ),
    "enormous plan": (enormous("plan.json", 1 << 40), r"plan\.json: 1,099,511,627,776 bytes"),
    "enormous manifest": (enormous("manifest.json", 1 << 40), r"manifest\.json: 1,099,511,627,776"),
    "linked plan": (linked("plan.json"), r"plan\.json: expected an ordinary file"),
    "linked manifest": (linked("manifest.json"), r"manifest\.json: expected an ordinary file"),
    "dangling manifest": (dangling, r"manifest\.json: expected an ordinary file"),
    "no plan": (lambda cache: (cache / "plan.json").unlink(), r"no plan\.json here"),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("case", REFUSALS)
def test_a_plan_or_manifest_that_is_not_ours_is_refused_at_the_door(case: str, cache: Path) -> None:
    change, said = REFUSALS[case]
    change(cache)
    before = state(cache) if "enormous" not in case else {}

    with pytest.raises(CacheRefused, match=said) as caught:
        Cache.open(cache)
    report = found_by_verify(cache)

    assert len(str(caught.value)) < 1000
    assert report
    assert "SHA-256 2bb80d537b1d" not in report  # that of the word "secret"
    assert (state(cache) if before else {}) == before


def test_an_endless_plan_of_an_unsealed_cache_is_refused(begun: Path) -> None:
    rewrite(begun / "plan.json", lambda plan: plan["splits"]["train"].update(windows=1 << 28))
    with pytest.raises(CacheRefused, match="parts, more than 262,144"):
        Cache.open(begun, incomplete=True)


def test_a_mask_with_another_number_of_groups_is_not_used(begun: Path) -> None:
    plan, _ = layout.read_plan(begun)
    part = next(part for part in plan.parts() if (begun / part.receipt_key).exists())
    chunk = begun / f"data.zarr/{part.split}/{part.view}/mask/c/{part.number}/0"
    mask = bytearray(chunk.read_bytes()[:-4])
    mask[0] ^= 1
    chunk.write_bytes(mask + crc32c.crc32c(bytes(mask)).to_bytes(4, "little"))
    cache = Cache.open(begun, incomplete=True)
    row = np.array([part.number * cache.plan.part])
    with pytest.raises(CacheCorrupt, match="masked groups, as the plan says"):
        cache.read(part.split, part.view, row, cache.allocate(1))


def test_a_receipt_that_is_enormous_is_not_read(begun: Path) -> None:
    os.truncate(begun / RECEIPT.format(1), 1 << 40)
    with pytest.raises(CacheRefused, match=r"00001\.json: 1,099,511,627,776 bytes"):
        everything_there(begun)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_what_does_not_belong_in_the_folder_is_named(kind: str, cache: Path) -> None:
    path = cache / "data.zarr/train/notes.txt"
    match kind:
        case "file":
            path.write_text("mine")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(cache / "plan.json")
        case "fifo":
            os.mkfifo(path)

    for level in ("structure", "everything"):
        problems = integrity.verify(cache, level=level).problems
        assert [problem.key for problem in problems] == ["data.zarr/train/notes.txt"]
        assert "remove it" in str(problems[0])


def test_a_key_of_another_case_is_a_missing_one_and_a_stray_one(cache: Path) -> None:
    shutil.move(cache / "data.zarr/train/0/mask", cache / "data.zarr/train/0/Mask")

    said = found_by_verify(cache, "structure")

    assert "data.zarr/train/0/mask/c/0/0: missing" in said
    assert "data.zarr/train/0/Mask/c/0/0: a file" in said
    with pytest.raises(CacheCorrupt, match="mask/c/0/0 is missing"):
        everything(cache)


def test_sealing_waits_for_every_part(begun: Path) -> None:
    before = state(begun)
    with pytest.raises(CacheIncomplete, match=r"2 parts are missing, train/0/00002 first"):
        integrity.seal(begun)
    assert state(begun) == before


def test_sealing_refuses_arrays_that_rotted_since_the_plan(begun: Path, sound: Path) -> None:
    finish(begun, sound)
    for key in (
        "data.zarr/train/kmer_id/c/1/0",
        "data.zarr/valid/0/reversed/c/0",
        "data.zarr/statistics/embedding/std/c/0",
    ):
        original = (begun / key).read_bytes()
        flip(begun / key, len(original) * 4)
        with pytest.raises(CacheCorrupt):
            integrity.seal(begun)
        assert found_by_verify(begun)
        (begun / key).write_bytes(original)
    # Exchanged whole, CRC and all.
    mean, std = (begun / f"data.zarr/statistics/embedding/{n}/c/0" for n in ("mean", "std"))
    originals = mean.read_bytes(), std.read_bytes()
    mean.write_bytes(originals[1])
    std.write_bytes(originals[0])
    with pytest.raises(CacheCorrupt, match="mean/c/0 is not what the plan says"):
        integrity.seal(begun)
    mean.write_bytes(originals[0])
    std.write_bytes(originals[1])
    original = (begun / "windows.parquet").read_bytes()
    table = pq.read_table(begun / "windows.parquet")
    starts = pa.array([start + 6 for start in table["start"].to_pylist()])
    column = table.schema.get_field_index("start")
    pq.write_table(table.set_column(column, "start", starts), begun / "windows.parquet")
    with pytest.raises(CacheCorrupt, match=r"windows\.parquet: contents .* expected"):
        integrity.seal(begun)
    (begun / "windows.parquet").write_bytes(original)
    assert found_by_verify(begun) == ""

    manifest = integrity.seal(begun)

    assert manifest.id == Cache.open(sound).id
    assert {k: v[0] for k, v in state(begun).items()} == {k: v[0] for k, v in state(sound).items()}


def finish(begun: Path, sound: Path) -> None:
    """The rest of the parts, as the sound twin has them."""
    for path in sound.rglob("*"):
        copy = begun / path.relative_to(sound)
        if path.is_file() and not copy.exists() and path.name != "manifest.json":
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def test_one_cache_holds_one_class_of_arithmetic(begun: Path, sound: Path) -> None:
    finish(begun, sound)
    rewrite(begun / RECEIPT.format(2), lambda receipt: receipt.update(numerics={"device": "cuda"}))

    with pytest.raises(CacheCorrupt, match=r"train/0/00002 was made by .*cuda"):
        integrity.seal(begun)


def test_sealing_refuses_a_shard_of_another_length(begun: Path, sound: Path) -> None:
    finish(begun, sound)
    truncated(begun, sound)
    with pytest.raises(CacheCorrupt, match=r"value/c/1/0/0 has .* bytes, its receipt says"):
        integrity.seal(begun)


def test_damage_is_sorted_into_parts_to_make_again_and_what_no_one_can(
    cache: Path, sound: Path
) -> None:
    truncated(cache, sound)
    flip(cache / RECEIPT.format(0), 100)
    kmers_missing(cache, sound)
    plan = Cache.open(cache).plan

    parts, beyond = integrity.damaged_parts(plan, integrity.verify(cache).problems)

    assert parts == [Part("train", 0, 0), Part("train", 0, 1)]
    assert [problem.key for problem in beyond] == ["data.zarr/train/kmer_id/c/1/0"]


def test_forgetting_a_part_takes_the_seal_and_its_receipt_and_no_more(cache: Path) -> None:
    before = state(cache)

    integrity.forget(cache, [Part("train", 0, 1)])

    assert set(before) - set(state(cache)) == {"manifest.json", RECEIPT.format(1)}
    plan = Cache.open(cache, incomplete=True).plan
    assert integrity.missing_parts(cache, plan) == [Part("train", 0, 1)]
    assert integrity.numerics_class(cache, plan) == {"device": "none"}
    integrity.forget(cache, plan.parts())
    assert integrity.missing_parts(cache, plan) == list(plan.parts())
    assert integrity.numerics_class(cache, plan) is None


def test_verify_tells_how_far_it_is(cache: Path) -> None:
    told = []
    report = integrity.verify(cache, report=told.append)
    assert [one.done for one in told] == sorted(one.done for one in told)
    assert told[-1].done == told[-1].total == report.nbytes


# Together: threads, shares, and others at work


def large_keys(cache: Path) -> set[str]:
    files = (path for path in cache.rglob("*") if path.is_file())
    return {
        path.relative_to(cache).as_posix()
        for path in files
        if path.suffix not in (".json", ".parquet")
    }


@pytest.mark.parametrize("count", [2, 5])
def test_shares_look_at_structure_each_and_at_every_large_object_once(
    count: int, cache: Path
) -> None:
    shares = [(number + 1, count) for number in range(count)]
    small = integrity.verify(cache, level="structure")
    whole = integrity.verify(cache)
    found = [integrity.verify(cache, share=share) for share in shares]
    assert [report.share for report in found] == shares
    assert sum(r.objects - small.objects for r in found) == whole.objects - small.objects
    assert sum(r.nbytes - small.nbytes for r in found) == whole.nbytes - small.nbytes
    for key in sorted(large_keys(cache))[::3]:
        original = (cache / key).read_bytes()
        flip(cache / key, 9)
        named = [
            [problem.key for problem in integrity.verify(cache, share=share).problems]
            for share in shares
        ]
        assert sorted(named) == [[]] * (count - 1) + [[key]]
        (cache / key).write_bytes(original)
    (cache / RECEIPT.format(0)).unlink()
    for share in shares:
        problems = integrity.verify(cache, share=share).problems
        assert [problem.key for problem in problems] == [RECEIPT.format(0)]


def test_shares_of_parts_are_alike_in_size_whatever_the_count(cache: Path) -> None:
    """Thirty parts of one view: no share has more than one part more than another."""
    plan = Cache.open(cache).plan
    signal = plan.signals[0]
    keys = [Part("train", 0, number).shard_key(signal) for number in range(30)]
    for count in (2, 7, 8, 30, 31):
        taken = [
            len(list(integrity._chosen(dict.fromkeys(keys), "everything", (number + 1, count))))
            for number in range(count)
        ]
        assert sum(taken) == 30
        assert max(taken) - min(taken) <= 1


def test_however_many_threads_hash_the_same_is_said(cache: Path, stranger: Path) -> None:
    for damage in (truncated, older, kmers_swapped, receipt_foreign):
        damage(cache, stranger)
    reports = [integrity.verify(cache, threads=threads) for threads in (1, 2, 5)]
    assert reports[0] == reports[1] == reports[2]
    assert len(reports[0].problems) == 4


def test_files_of_any_length_are_hashed_as_hashlib_does(tmp_path: Path) -> None:
    """Around the buffer's length, and the bytes that threads take together."""
    edge = integrity._BUFFER
    lengths = [0, 1, edge - 1, edge, edge + 1, 2 * edge, 5 * edge + 7, *range(100)]
    named = {}
    for number, nbytes in enumerate(lengths):
        raw = np.random.default_rng(number).bytes(nbytes)
        (tmp_path / str(number)).write_bytes(raw)
        named[str(number)] = layout.ObjectRecord(
            nbytes=nbytes, sha256=hashlib.sha256(raw).hexdigest()
        )
    told: list[Progress] = []
    read = integrity._hashed(
        tmp_path,
        {key: record.nbytes for key, record in named.items()},
        what="reading",
        threads=3,
        report=told.append,
    )
    assert read == named
    assert told[-1].done == told[-1].total == sum(lengths)
    assert {one.unit for one in told} == {"bytes"}


def test_a_disk_that_fails_is_named_and_the_rest_is_read(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = integrity.open_object

    def failing(folder: Path, key: str) -> int:
        if key == VALUE.format(1):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(folder, key)

    flip(cache / VALUE.format(0), 77)
    monkeypatch.setattr(integrity, "open_object", failing)
    problems = integrity.verify(cache).problems
    assert [problem.key for problem in problems] == [VALUE.format(0), VALUE.format(1)]
    assert problems[1].found == "cannot be read (Input/output error)"


def test_an_interrupted_verification_stops_at_once(cache: Path) -> None:
    """Ctrl-C comes to the thread that tells how far it is."""

    def stop(progress: Progress) -> None:
        raise KeyboardInterrupt

    for path in (cache / VALUE.format(0), cache / VALUE.format(1)):
        with path.open("ab") as file:
            file.truncate(1 << 36)  # sparse: a minute to hash
    lengths = {VALUE.format(number): 1 << 36 for number in (0, 1)}
    since = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        integrity._hashed(cache, lengths, what="verifying", threads=2, report=stop)
    assert time.monotonic() - since < 15
    assert not [t for t in threading.enumerate() if t.name.startswith("had-pipe hash")]


def test_a_part_that_comes_while_an_unsealed_cache_is_verified_is_no_damage(
    begun: Path, sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two steps: it is either not seen, or seen whole."""
    plan, _ = layout.read_plan(begun)
    part = Part("train", 0, 2)
    keys = [*(part.shard_key(signal) for signal in plan.signals), part.receipt_key]
    for step in ("_planned_problems", "made_parts", "_part_problems", "_look_around", "_hashed"):
        real = getattr(integrity, step)

        def committing(*args: Any, real: Any = real, **named: Any) -> Any:
            for key in keys:
                (begun / key).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(sound / key, begun / key)
            return real(*args, **named)

        with monkeypatch.context() as patched:
            patched.setattr(integrity, step, committing)
            report = integrity.verify(begun)
        assert report.problems == (), step
        assert report.parts in (2, 3)
        assert integrity.verify(begun).parts == 3
        for key in reversed(keys):
            (begun / key).unlink()


def test_a_part_that_is_taken_back_meanwhile_is_no_damage(
    begun: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process repairs: the receipt goes, then the shard is replaced."""
    receipt, shard = begun / RECEIPT.format(1), begun / VALUE.format(1)
    raw = shard.read_bytes()
    for step in ("_part_problems", "_look_around", "_hashed"):
        real, kept = getattr(integrity, step), receipt.read_bytes()

        def repairing(*args: Any, real: Any = real, **named: Any) -> Any:
            receipt.unlink(missing_ok=True)
            shard.write_bytes(raw[:-9])
            return real(*args, **named)

        with monkeypatch.context() as patched:
            patched.setattr(integrity, step, repairing)
            assert integrity.verify(begun).problems == (), step
        receipt.write_bytes(kept)
        assert [problem.key for problem in integrity.verify(begun).problems] == [VALUE.format(1)]
        shard.write_bytes(raw)


@pytest.mark.timeout(60)
def test_a_cache_verified_over_and_over_while_it_grows_is_never_found_damaged(
    begun: Path, sound: Path
) -> None:
    """Parts come in the order of a commit, go again, and come again."""
    plan, _ = layout.read_plan(begun)
    left = list(integrity.missing_parts(begun, plan))
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            for part in left:
                for key in (*(part.shard_key(s) for s in plan.signals), part.receipt_key):
                    aside = begun / layout.WORK / "x.tmp"
                    aside.parent.mkdir(exist_ok=True)
                    shutil.copyfile(sound / key, aside)
                    (begun / key).parent.mkdir(parents=True, exist_ok=True)
                    aside.replace(begun / key)
            for part in left:
                (begun / part.receipt_key).unlink()
            time.sleep(0.01)  # a file made within a tick of the clock can look like the one before

    worker = threading.Thread(target=work)
    worker.start()
    try:
        seen = {integrity.verify(begun) for _ in range(40)}
    finally:
        stop.set()
        worker.join()
    assert {report.problems for report in seen} == {()}
    assert len({report.parts for report in seen}) > 1


def test_what_does_not_belong_in_an_unsealed_cache_is_named_too(begun: Path) -> None:
    (begun / "data.zarr/train/0/notes.txt").write_text("mine")
    (begun / ".work").mkdir(exist_ok=True)
    (begun / ".work/train-0-00002.embedding-value.77.tmp").write_bytes(b"another's")
    shard = begun / VALUE.format(2)  # published, and its receipt not yet: a commit in the middle
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"whatever")
    problems = integrity.verify(begun).problems
    assert [problem.key for problem in problems] == ["data.zarr/train/0/notes.txt"]
    assert "remove it" in problems[0].remedy


def test_what_is_left_of_work_in_a_sealed_cache_is_told_once(cache: Path) -> None:
    (cache / ".work/leases").mkdir(parents=True)
    (cache / ".work/leases/train-0-00000.lock").write_text("pid=7")
    (problem,) = integrity.verify(cache).problems
    assert problem.key == ".work"
    assert "run the same extract-teacher command again" in problem.remedy
    integrity.clear_work(cache)
    assert integrity.verify(cache).problems == ()


# Clearing up


@pytest.mark.timeout(60)
def test_clearing_up_bears_others_that_come_and_go(cache: Path) -> None:
    stop = threading.Event()

    def others() -> None:
        number = 0
        while not stop.is_set():
            number = (number + 1) % 50
            with suppress(OSError):
                (cache / ".work/leases").mkdir(parents=True, exist_ok=True)
                lease = cache / f".work/leases/{number}.lock"
                lease.write_text("pid=7")
                if number % 2:
                    lease.unlink()

    for _ in range(3):
        (cache / ".work/leases").mkdir(parents=True, exist_ok=True)
        workers = [threading.Thread(target=others) for _ in range(2)]
        for worker in workers:
            worker.start()
        time.sleep(0.01)
        integrity.clear_work(cache)
        stop.set()
        for worker in workers:
            worker.join()
        stop.clear()
    integrity.clear_work(cache)
    assert not (cache / ".work").exists()


def test_clearing_up_leaves_what_a_network_disk_still_holds_for_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a removed file that somebody has open comes back under another name."""
    work = cache / ".work"
    work.mkdir()
    (work / "seal.lock").write_text("pid=7")
    (work / "x.tmp").write_text("left over")
    real = os.unlink

    def silly(path: Any, *args: Any, **named: Any) -> None:
        real(path, *args, **named)
        if Path(path).name != "x.tmp":
            (work / ".nfs0001").write_text("pid=7")

    monkeypatch.setattr(integrity, "_CLEAR_SECONDS", (0.0, 0.0))
    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", silly)
        patched.setattr("pathlib.os.unlink", silly)
        integrity.clear_work(cache)
    assert [path.name for path in work.iterdir()] == [".nfs0001"]
    integrity.clear_work(cache)
    assert not work.exists()


def test_clearing_up_follows_no_link(cache: Path) -> None:
    outside = cache.with_name("outside")
    outside.mkdir()
    (outside / "mine.txt").write_text("a thesis")
    (cache / ".work").mkdir()
    (cache / ".work/leases").symlink_to(outside)
    integrity.clear_work(cache)
    assert not (cache / ".work").exists()
    assert (outside / "mine.txt").exists()


def test_forgetting_makes_room_for_the_parts_to_come(cache: Path) -> None:
    """A shard is replaced whole, but a folder cannot be, and a link must not be written through."""
    plan = Cache.open(cache).plan
    parts = list(plan.parts())[:3]
    outside = cache.with_name("outside")
    outside.write_text("mine")
    shards = [cache / part.shard_key(plan.signals[0]) for part in parts]
    for shard in shards:
        shard.unlink()
    shards[0].mkdir()
    os.mkfifo(shards[1])
    shards[2].symlink_to(outside)
    kept = cache / parts[0].shard_key(plan.signals[1])

    integrity.forget(cache, parts)

    assert not any(os.path.lexists(shard) for shard in shards)
    assert outside.read_text() == "mine"
    assert kept.exists()
    assert [p for p in parts if (cache / p.receipt_key).exists()] == []
    shards[0].mkdir()
    (shards[0] / "mine.txt").write_text("a thesis")
    with pytest.raises(CacheCorrupt, match="a folder with something in it"):
        integrity.forget(cache, parts)


# What a key names


def test_a_key_alone_tells_what_it_names(tmp_path: Path) -> None:
    cache = build_cache(tmp_path / "cache", **SHAPE, views=2)
    plan = Cache.open(cache).plan
    objects = integrity._Objects(plan)
    known = integrity.expected_keys(plan)
    folders = {str(parent) for key in known for parent in Path(key).parents}
    of_parts = {}
    for part in plan.parts():
        for key in (part.receipt_key, *(part.shard_key(signal) for signal in plan.signals)):
            of_parts[key] = part
    for key in known:
        assert objects.is_file(key)
        assert objects.part(key) == of_parts.get(key)
    assert all(objects.is_folder(folder) for folder in folders)
    numbers = ("0", "1", "2", "3", "00", "01", "-1", "7", "x", "", "c", "٣", "1" * 30, "00001")
    words = {word for key in known for word in key.split("/")}
    for key in sorted(known | folders)[::3]:
        pieces = key.split("/")
        for place, word in enumerate(pieces):
            swaps = {*numbers, *(f"{number}.json" for number in numbers), word.upper(), *words}
            for swap in swaps:
                for other in (
                    [*pieces[:place], swap, *pieces[place + 1 :]],
                    [*pieces[:place], swap, *pieces[place:]],
                    [*pieces[:place], *pieces[place + 1 :]],
                ):
                    made_up = "/".join(other)
                    assert objects.is_file(made_up) == (made_up in known), made_up
                    assert objects.is_folder(made_up) == (made_up in folders), made_up
                    assert objects.part(made_up) == of_parts.get(made_up), made_up


def test_missing_parts_are_those_without_a_receipt(begun: Path) -> None:
    plan, _ = layout.read_plan(begun)
    (begun / "parts/train/0/00002.json.tmp").write_text("{}")
    (begun / "parts/train/0/00003.json").mkdir()
    (begun / "parts/notes.txt").write_text("mine")
    missing = [part for part in plan.parts() if not (begun / part.receipt_key).is_file()]
    assert integrity.missing_parts(begun, plan) == missing
    assert len(missing) == 2
    shutil.rmtree(begun / "parts")
    assert integrity.missing_parts(begun, plan) == list(plan.parts())
    assert integrity.numerics_class(begun, plan) is None


def test_metadata_is_held_against_the_plan_before_sealing_too(begun: Path, sound: Path) -> None:
    """No manifest protects it yet; one bit in each, then all that a flip can spell otherwise."""
    plan, _ = layout.read_plan(begun)
    rng = np.random.default_rng(8)
    for key in plan.metadata_keys():
        original = (begun / key).read_bytes()
        assert original == (sound / key).read_bytes()
        for bit in rng.integers(0, 8 * len(original), 4).tolist():
            flip(begun / key, bit)
            assert found_by_verify(begun), (key, bit)
            (begun / key).write_bytes(original)
    finish(begun, sound)
    key = "data.zarr/train/0/embedding/value/zarr.json"
    original = (begun / key).read_bytes()
    rewrite(begun / key, lambda array: array.update(fill_value=127))
    (problem,) = integrity.verify(begun).problems
    assert problem.key == key
    with pytest.raises(CacheCorrupt, match=r"value/zarr\.json: other metadata"):
        integrity.seal(begun)
    # Spelt otherwise it says the same: another version of Zarr may have written it.
    rewrite(begun / key, lambda array: array.update(fill_value=-128))
    assert (begun / key).read_bytes() != original
    assert integrity.verify(begun).problems == ()


@pytest.mark.parametrize("size", [1, 3, 4, 7, 24, 50, 123, 1000])
def test_the_crcs_of_a_shard_are_seen_however_it_is_cut_into_pieces(cache: Path, size: int) -> None:
    plan = Cache.open(cache).plan
    for part in plan.parts():
        receipt, _ = layout.read_receipt(cache, plan, part)
        for signal in plan.signals:
            raw = (cache / part.shard_key(signal)).read_bytes()
            pieces = [
                integrity._crcs_within(
                    memoryview(raw)[at : at + size], at, signal, plan.part_windows(part)
                )
                for at in range(0, len(raw), size)
            ]
            record = receipt.objects[part.shard_key(signal)]
            assert b"".join(pieces) == record.crcs().tobytes()


@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_a_receipt_with_another_crc_than_its_shard_is_named(
    cache: Path, begun: Path, sealed: bool
) -> None:
    """Sealed by one who made the digests fit: only the shard can tell."""
    folder = cache if sealed else begun
    key = RECEIPT.format(1)

    def change(receipt: dict[str, Any]) -> None:
        record = receipt["objects"][VALUE.format(1)]
        crc = layout.ShardRecord.model_validate(record).crcs().copy()
        crc[2] ^= 1
        record["crc32c"] = layout.ShardRecord.pack(crc)

    rewrite(folder / key, change)
    if sealed:
        admit(folder, key)
    (problem,) = integrity.verify(folder).problems
    assert problem.key == key
    assert problem.found == f"other CRCs than {VALUE.format(1)} holds"
