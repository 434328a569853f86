"""A stranger's store: refused, soon and with little memory, and nothing outside it touched."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import strangers
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_cache import build_cache

from had_pipe.cache import Cache, integrity, layout, loci, reader
from had_pipe.errors import CacheCorrupt, CacheError, CacheRefused, HadPipeError

MOST_NBYTES = 64 << 20
MOST_SECONDS = 2.0

Opener = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("strangers").resolve()
    for name, codec, channels in (
        ("sound", "int8", strangers.CHANNELS),
        ("learnt", "compact", strangers.LEARNT_CHANNELS),
    ):
        build_cache(
            root / name / "cache",
            windows=strangers.WINDOWS,
            valid=strangers.VALID,
            kmers=strangers.KMERS,
            channels=channels,
            part=strangers.PART,
            codec=codec,
        )
    shutil.copytree(root / "sound", root / "begun")
    (root / "begun" / "cache" / "manifest.json").unlink()
    return root


@pytest.fixture(scope="module")
def opener(root: Path) -> Iterator[Opener]:
    """Makes a store and has it opened in every way; the costs of all are printed at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, str(Path(strangers.__file__)), str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    costs: dict[str, tuple[float, int]] = {}
    numbers = itertools.count()

    def try_one(name: str, change: strangers.Change, base: str = "sound") -> dict[str, Any]:
        folder = root / str(next(numbers))
        (folder / "outside").mkdir(parents=True)
        (folder / "outside" / "secret").write_text("secret")
        shutil.copytree(root / base / "cache", folder / "cache")
        change(folder / "cache")
        before = state(folder)
        process.stdin.write(f"{folder.name}\n")
        process.stdin.flush()
        answer: dict[str, Any] = json.loads(process.stdout.readline())
        assert "broken" not in answer, answer
        assert state(folder) == before
        costs[name] = answer["seconds"], answer["nbytes"]
        shutil.rmtree(folder)
        return answer

    yield try_one
    process.stdin.close()
    assert process.wait(30) == 0
    process.stdout.close()
    slowest = max(costs, key=lambda name: costs[name][0])
    largest = max(costs, key=lambda name: costs[name][1])
    print(
        f"\n{len(costs)} stores; slowest {costs[slowest][0]:.2f} s ({slowest}); "
        f"most memory {costs[largest][1] / 1e6:.0f} MB ({largest})"
    )


def state(folder: Path) -> dict[str, object]:
    """All that is there: kinds, lengths, links, and contents where they are short."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        small = path.is_file() and not path.is_symlink() and about.st_size < 1 << 20
        found[str(path)] = (
            about.st_mode,
            about.st_size,
            about.st_mtime_ns,
            path.readlink() if path.is_symlink() else None,
            hashlib.sha256(path.read_bytes()).digest() if small else None,
        )
    return found


def check_watch(answer: dict[str, Any]) -> None:
    """Nothing outside was touched, nothing but our own errors came out, and it cost little."""
    assert answer["seen"] == []
    for way, told in answer["ways"].items():
        assert not (isinstance(told, dict) and "escaped" in told), (way, told)
        said = json.dumps(told, ensure_ascii=False)
        assert "\x1b" not in said, way
        assert "\\u001b" not in said, way
        assert "\u202e" not in said, way
        assert hashlib.sha256(b"secret").hexdigest()[:12] not in said, way
    assert answer["seconds"] < MOST_SECONDS
    assert answer["nbytes"] < MOST_NBYTES


def sayings(answer: dict[str, Any]) -> dict[str, str]:
    """What each way said that was not content: a refusal, or the problems of `verify`."""
    said = {}
    for way, told in answer["ways"].items():
        if isinstance(told, dict):
            said[way] = told["refused"]
        elif isinstance(told, list) and told:
            said[way] = "\n".join(told)
        elif isinstance(told, str) and told.startswith("refused"):
            said[way] = told
    return said


# Each is opened in seven ways; every other one can wait for the slow suite.
EVERY = [*strangers.STORES, *strangers.LEARNT]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (i % 2)) for i, name in enumerate(EVERY)],
)
def test_a_strangers_store_is_refused(name: str, opener: Opener) -> None:
    change, expected = {**strangers.STORES, **strangers.LEARNT}[name]
    if "is a device" in name and os.geteuid():
        pytest.skip("only root makes device nodes")

    answer = opener(name, change, "learnt" if name in strangers.LEARNT else "sound")

    check_watch(answer)
    said = sayings(answer)
    assert said, "nothing was refused"
    pattern = re.compile(expected)
    assert any(pattern.search(text) for text in said.values()), said
    assert all(len(text) < 20_000 for text in said.values())
    # What cannot be opened is never called sound. (What a window holds is judged as it is read.)
    assert "verify" in said or "inspect" not in said


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (i % 2))
        for i, name in enumerate(strangers.BEGUN)
    ],
)
def test_a_strangers_store_that_is_not_sealed_is_refused_by_verification(
    name: str, opener: Opener
) -> None:
    answer = opener(name, strangers.BEGUN[name][0])
    check_watch(answer)
    said = sayings(answer)
    assert "manifest" in said["read"] or "expected" in said["read"]
    assert "verify" in said
    assert len(said["verify"]) < 20_000


@pytest.mark.parametrize("name", strangers.HARMLESS)
def test_what_only_looks_bad_is_read_and_does_nothing(name: str, opener: Opener) -> None:
    answer = opener(name, strangers.HARMLESS[name])
    check_watch(answer)
    assert sayings(answer) == {}


@pytest.mark.parametrize("name", strangers.FOREIGN)
def test_what_is_a_trap_for_other_readers_is_nothing_to_ours(name: str, opener: Opener) -> None:
    answer = opener(name, strangers.FOREIGN[name])
    check_watch(answer)
    said = sayings(answer)
    assert set(said) <= {"read", "compare", "locus", "train", "inspect", "verify"}
    if name == "zarr 2 beside zarr 3":
        assert "does not list what the plan implies" in said["read"]
    else:
        assert not {"read", "compare", "locus", "train"} & set(said)


# -- while it is looked at -------------------------------------------------------------------------


@pytest.fixture
def cache(root: Path, tmp_path: Path) -> Path:
    shutil.copytree(root / "sound" / "cache", tmp_path / "cache")
    return tmp_path / "cache"


def everything(folder: Path) -> None:
    opened = Cache.open(folder)
    opened.read("train", 0, np.arange(6), opened.allocate(6))


@pytest.mark.parametrize("key", [strangers.VALUE, strangers.MASK, strangers.RECEIPT, "plan.json"])
def test_a_link_swapped_in_after_the_look_is_not_followed(
    key: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stranger is as fast as can be: between our look at a file and our opening it."""
    secret = cache.parent / "secret"
    shutil.copyfile(cache / key, secret)
    look = os.stat
    swapped: list[Path] = []

    def stat_and_swap(path: Any, **options: Any) -> os.stat_result:
        found = look(path, **options)
        if path == Path(key).name and options.get("dir_fd") is not None and not swapped:
            (cache / key).unlink()
            (cache / key).symlink_to(secret)
            swapped.append(cache / key)
        return found

    monkeypatch.setattr(os, "stat", stat_and_swap)
    with pytest.raises(CacheRefused, match="found a link"):
        everything(cache)
    assert swapped


def test_a_fifo_swapped_in_after_the_look_holds_nobody_up(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = os.stat

    def stat_and_swap(path: Any, **options: Any) -> os.stat_result:
        found = look(path, **options)
        if path == "plan.json" and options.get("dir_fd") is not None:
            (cache / path).unlink()
            os.mkfifo(cache / path)
        return found

    monkeypatch.setattr(os, "stat", stat_and_swap)
    with pytest.raises(CacheRefused, match="found a FIFO"):
        Cache.open(cache)


@pytest.mark.parametrize("nbytes", [0, 10, 1 << 34])
def test_a_file_that_changes_its_length_meanwhile_is_noticed(
    nbytes: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shrunk or grown between our asking for its length and our reading it."""
    ask, asked = os.fstat, list[int]()

    def fstat_and_change(descriptor: int) -> os.stat_result:
        found = ask(descriptor)
        if found.st_ino == (cache / strangers.MASK).stat().st_ino:
            asked.append(descriptor)
            if len(asked) == 2:  # once for its kind, once for its length
                os.truncate(cache / strangers.MASK, nbytes)
        return found

    opened = Cache.open(cache)
    monkeypatch.setattr(os, "fstat", fstat_and_change)
    if nbytes > 1000:  # what was there is what is read
        opened.read("train", 0, np.arange(6), opened.allocate(6))
    else:
        with pytest.raises(CacheCorrupt, match="mask/c/1/0"):
            opened.read("train", 0, np.arange(6), opened.allocate(6))


def test_open_parts_hold_no_more_memory_together_than_is_meant(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's parts may be as large as the format allows, and there may be many."""
    monkeypatch.setattr(reader, "_OPEN_NBYTES", 1)
    opened = Cache.open(cache)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for row in (0, 3, 0, 5):
        opened.read("train", 0, np.array([row]), opened.allocate(1))
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 1  # the shard of one part


# -- fuzz ------------------------------------------------------------------------------------------

FILES = ("plan.json", "manifest.json", strangers.RECEIPT, strangers.ROOT)
TOKENS = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"true", b"-1", b"0", b"1e999", b"NaN"),
    *(b"9" * 30, b'"../x"', b'"\\ud800"', b"\xff", b"\0", b'""', b"{}", b"[]", b"1.5", b"\\u0000"),
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """A few changes of the kinds that parsers trip over."""
    raw = bytearray(data)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(raw) + 1)
        match rng.randrange(5):
            case 0 if at < len(raw):
                raw[at] ^= 1 << rng.randrange(8)
            case 1:
                raw[at : at + rng.randrange(20)] = b""
            case 2:
                raw[at:at] = rng.choice(TOKENS)
            case 3:
                # A whole value exchanged: what stands between two separators.
                ends = [i for i, byte in enumerate(raw) if byte in b':,[]{}"']
                if ends:
                    first = rng.randrange(len(ends))
                    last = min(len(ends) - 1, first + 1)
                    raw[ends[first] + 1 : ends[last]] = rng.choice(TOKENS)
            case 4:
                other = rng.randrange(len(raw) + 1)
                raw[at:at] = raw[other : other + rng.randrange(40)]
    return bytes(raw)


def read_mutated(cache: Path, key: str, raw: bytes) -> str:
    """What is said of a cache with other bytes in one file; fails on anything but our errors."""
    (cache / key).write_bytes(raw)
    try:
        opened = Cache.open(cache, incomplete=True)
        opened.attributes, opened.fidelity  # noqa: B018  (read)
        opened.read("train", 0, np.arange(6), opened.allocate(6))
    except HadPipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("key", FILES)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "unsealed"])
def test_whatever_stands_in_a_json_file_only_our_errors_come_out(
    key: str, sealed: bool, cache: Path
) -> None:
    if not sealed and key == "manifest.json":
        pytest.skip("an unsealed cache has none")
    if not sealed:
        (cache / "manifest.json").unlink()
    fuzz(cache, key, rounds=100, seed=0)


@pytest.mark.soak
@pytest.mark.timeout(0)
@pytest.mark.parametrize("key", FILES)
def test_a_million_random_changes_to_json_files_bring_out_only_our_errors(
    key: str, cache: Path
) -> None:
    (cache / "manifest.json").unlink()
    seed = int.from_bytes(os.urandom(4), "little")
    rounds = int(os.environ.get("HAD_PIPE_FUZZ", "1000000")) // len(FILES)
    refused = fuzz_parsers(cache, key, rounds=rounds, seed=seed)
    print(f"\n{key}: {rounds:,} changes from seed {seed}, {refused:,} refused")


def fuzz(cache: Path, key: str, *, rounds: int, seed: int) -> None:
    original = (cache / key).read_bytes() if (cache / key).exists() else b"{}"
    rng = random.Random(f"{seed} {key}")
    refused = 0
    for number in range(rounds):
        raw = mutated(original, rng)
        try:
            refused += bool(read_mutated(cache, key, raw))
        except Exception as error:
            raise AssertionError(f"seed {seed}, {key}, change {number}: {raw!r}") from error
    if key != strangers.ROOT:
        assert refused > rounds * 0.9


def fuzz_parsers(cache: Path, key: str, *, rounds: int, seed: int) -> int:
    """The parsers alone, for a great many changes; how many were refused."""
    plan, original = layout.read_plan(cache)
    part = layout.Part("train", 0, 1)
    if key == "manifest.json":
        built = layout.Manifest.build(plan, {"a": layout.ObjectRecord(nbytes=1, sha256="0" * 64)})
        original = built.to_json()
    elif key != "plan.json":
        original = (cache / key).read_bytes()
    rng = random.Random(f"{seed} {key}")
    opened = Cache.open(cache, incomplete=True)
    refused = 0
    for number in range(rounds):
        raw = mutated(original, rng)
        try:
            match key:
                case "plan.json":
                    layout.parse_plan(cache, raw)
                case "manifest.json":
                    layout.parse_manifest(cache, raw)
                case strangers.RECEIPT:
                    layout.parse_receipt(cache, part, raw)
                case _:
                    (cache / key).write_bytes(raw)
                    opened.attributes, opened.fidelity  # noqa: B018  (read)
        except HadPipeError as error:
            refused += 1
            said = str(error)
            if "\x1b" in said or len(said) > 5000:
                raise AssertionError(f"seed {seed}, {key}, change {number}: {said!r}") from error
        except Exception as error:
            raise AssertionError(f"seed {seed}, {key}, change {number}: {raw!r}") from error
    return refused


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data(), value=json_values)
def test_any_value_at_any_place_of_a_plan_is_taken_or_refused(
    cache: Path, data: st.DataObject, value: object
) -> None:
    _, raw = layout.read_plan(cache)
    document = json.loads(raw)
    place: Any = document
    while True:
        key = data.draw(
            st.sampled_from(list(place) if isinstance(place, dict) else range(len(place)))
        )
        if isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = value
        break
    text = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    try:
        found = layout.parse_plan(cache, text.encode(errors="surrogatepass") + b"\n")
    except CacheError as error:
        said = str(error)
    else:
        said = ""
        assert found.part_count <= 1 << 18
        assert json.loads(found.to_json()) == document
    assert len(said) < 2000


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
def test_a_window_table_with_any_change_is_read_as_it_was_or_refused(
    root: Path, cache: Path, seed: int
) -> None:
    rng = random.Random(seed)
    original = (root / "sound" / "cache" / strangers.TABLE).read_bytes()
    (cache / strangers.TABLE).write_bytes(mutated(original, rng))
    (cache / "manifest.json").unlink(missing_ok=True)
    opened = Cache.open(cache, incomplete=True)
    for row in range(6):
        with contextlib.suppress(CacheError):
            opened.locus("train", row)
    integrity.verify(cache)


def test_a_window_table_of_an_unheard_of_compression_is_refused(root: Path, cache: Path) -> None:
    # Arrow 26 ends the process when it is asked for the name of such a compression.
    original = (root / "sound" / "cache" / strangers.TABLE).read_bytes()
    footer = len(original) - 8 - int.from_bytes(original[-8:-4], "little")
    (cache / "manifest.json").unlink(missing_ok=True)
    zstd, codecs = 6 << 1, 0  # as Thrift writes a small number
    for at in range(footer, len(original) - 8):
        if original[at] != zstd:
            continue
        spoilt = bytearray(original)
        spoilt[at] = 60 << 1
        (cache / strangers.TABLE).write_bytes(spoilt)
        opened = Cache.open(cache, incomplete=True)
        try:
            opened.locus("train", 0)
        except CacheError as error:
            codecs += "another compression" in str(error)
    assert codecs >= 7


def test_lists_within_lists_of_a_footer_are_not_followed_for_ever() -> None:
    with pytest.raises(ValueError, match="deep"):
        loci._thrift_struct(b"\x19" * 100_000 + b"\0", 0, depth=12)
