"""Caches that a stranger made up, and a process that opens them under watch.

A store is a small sound cache and one change to it. The stranger is thorough: where a change would
be given away by a digest, receipts and manifest are forged to fit (`forge`).

Run as a program, `strangers.py FOLDER`, it reads names of caches below FOLDER from stdin, opens
each in a process of its own in every way there is, and writes a line of JSON for each. It is forked
after all imports, so that what a store costs is not hidden by what Python costs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import crc32c
import numpy as np

from had_pipe.cache import layout

PART, KMERS, CHANNELS, WINDOWS, VALID = 3, 12, 4, 6, 3
LEARNT_CHANNELS = 32
VALUE = "data.zarr/train/0/embedding/value/c/1/0/0"
SCALE = "data.zarr/train/0/embedding/scale/c/1/0"
RECEIPT = "parts/train/0/00001.json"
MEAN = "data.zarr/statistics/embedding/mean/c/0"
BOOK = "data.zarr/statistics/embedding"
STD = "data.zarr/statistics/embedding/std/c/0"
KMER = "data.zarr/train/kmer_id/c/1/0"
MASK = "data.zarr/train/0/mask/c/1/0"
REVERSED = "data.zarr/train/0/reversed/c/1"
TABLE = "windows.parquet"
ROOT = "data.zarr/zarr.json"

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\u202e"

Change = Callable[[Path], None]


# -- what a stranger does --------------------------------------------------------------------------


def forge(cache: Path) -> None:
    """Make receipts and manifest say of every object what it now is."""
    plan = json.loads((cache / "plan.json").read_bytes())
    plan_id = hashlib.sha256((cache / "plan.json").read_bytes()).hexdigest()
    for path in sorted(cache.glob("parts/*/*/*.json")):
        if path.stat().st_size > 1 << 24:
            continue
        receipt = json.loads(path.read_bytes())
        receipt["plan"] = plan_id
        for key, record in receipt["objects"].items():
            if (cache / key).is_file():
                record.update(_entry(cache / key))
        path.write_bytes(layout.canonical_json(receipt))
    objects = {
        path.relative_to(cache).as_posix(): _entry(path)
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name != "manifest.json"
    }
    write_manifest(cache, {"format": plan["format"], "objects": objects, "plan": plan_id})


def write_manifest(cache: Path, manifest: dict[str, Any]) -> None:
    manifest.pop("id", None)
    manifest["id"] = hashlib.sha256(layout.canonical_json(manifest)).hexdigest()
    (cache / "manifest.json").write_bytes(layout.canonical_json(manifest))


def _entry(path: Path) -> dict[str, Any]:
    nbytes = path.stat().st_size
    if nbytes > 1 << 24:  # a hole of a terabyte is not hashed, only claimed
        return {"nbytes": nbytes, "sha256": "0" * 64}
    return {"nbytes": nbytes, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def plan(change: Callable[[dict[str, Any]], object]) -> Change:
    """Edit plan.json, and forge the rest to fit."""

    def made(cache: Path) -> None:
        value = json.loads((cache / "plan.json").read_bytes())
        change(value)
        (cache / "plan.json").write_bytes(layout.canonical_json(value))
        forge(cache)

    return made


def manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    """Edit manifest.json and give it its right id."""

    def made(cache: Path) -> None:
        value = json.loads((cache / "manifest.json").read_bytes())
        change(value)
        write_manifest(cache, value)

    return made


def receipt(change: Callable[[dict[str, Any]], object]) -> Change:
    """Edit a receipt, and forge the manifest to fit."""

    def made(cache: Path) -> None:
        value = json.loads((cache / RECEIPT).read_bytes())
        change(value)
        (cache / RECEIPT).write_bytes(layout.canonical_json(value))
        whole = json.loads((cache / "manifest.json").read_bytes())
        whole["objects"][RECEIPT] = _entry(cache / RECEIPT)
        write_manifest(cache, whole)

    return made


def text(name: str, old: bytes, new: bytes) -> Change:
    """Put other bytes into a file of text, as an editor does."""

    def made(cache: Path) -> None:
        raw = (cache / name).read_bytes()
        assert raw.count(old) == 1
        (cache / name).write_bytes(raw.replace(old, new))

    return made


def raw(name: str, data: bytes, *, forged: bool = False) -> Change:
    """Another file altogether."""

    def made(cache: Path) -> None:
        (cache / name).write_bytes(data)
        if forged:
            forge(cache)

    return made


def hole(name: str, nbytes: int, *, start: bytes = b"", forged: bool = False) -> Change:
    """A file of any length that takes no room."""

    def made(cache: Path) -> None:
        (cache / name).write_bytes(start)
        os.truncate(cache / name, nbytes)
        if forged:
            forge(cache)

    return made


def special(name: str, kind: str) -> Change:
    """No ordinary file where one belongs."""

    def made(cache: Path) -> None:
        path = cache / name
        outside = cache.parent / "outside" / Path(name).name
        match kind:
            case "link":
                shutil.move(path, outside)
                path.symlink_to(outside)
            case "dangling link":
                path.unlink()
                path.symlink_to(cache.parent / "nowhere")
            case "link to itself":
                path.unlink()
                path.symlink_to(path.name)
            case "link to a device":
                path.unlink()
                path.symlink_to("/dev/zero")
            case "fifo":
                path.unlink()
                os.mkfifo(path)
            case "socket":
                path.unlink()
                here = Path.cwd()
                os.chdir(path.parent)  # a socket's name has 107 bytes at most
                with socket.socket(socket.AF_UNIX) as server:
                    server.bind(path.name)
                os.chdir(here)
            case "device":
                path.unlink()
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))
            case "folder":
                path.unlink()
                path.mkdir()

    return made


def array(key: str, change: Callable[[bytearray], object]) -> Change:
    """Other bytes in a plan-time chunk, its CRC, digests and the plan forged to fit."""

    def made(cache: Path) -> None:
        data = bytearray((cache / key).read_bytes()[:-4])
        change(data)
        (cache / key).write_bytes(data + crc32c.crc32c(bytes(data)).to_bytes(4, "little"))
        value = json.loads((cache / "plan.json").read_bytes())
        name = key.removeprefix("data.zarr/").partition("/c/")[0]
        width = len(data) // PART if "statistics" not in key else len(data)
        rows = {"statistics": 1}.get(name.partition("/")[0], WINDOWS)
        chunks = sorted((cache / "data.zarr" / name / "c").rglob("*"))
        whole = b"".join(path.read_bytes()[:-4] for path in chunks if path.is_file())
        value["contents"][name] = hashlib.sha256(whole[: rows * width]).hexdigest()
        both = (cache / MEAN).read_bytes()[:-4] + (cache / STD).read_bytes()[:-4]
        value["statistics"] = hashlib.sha256(both).hexdigest()
        (cache / "plan.json").write_bytes(layout.canonical_json(value))
        forge(cache)

    return made


def floats(key: str, value: float) -> Change:
    return array(key, lambda data: data.__setitem__(slice(4, 8), struct.pack("<f", value)))


def shard(key: str, change: Callable[[bytearray, int], object]) -> Change:
    """Other bytes in a shard; `change` gets where its index begins. CRCs are forged to fit."""

    def made(cache: Path) -> None:
        data = bytearray((cache / key).read_bytes())
        start = len(data) - 16 * PART - 4
        change(data, start)
        data[-4:] = crc32c.crc32c(bytes(data[start:-4])).to_bytes(4, "little")
        stride = start // PART
        rows = [bytes(data[i * stride : (i + 1) * stride - 4]) for i in range(PART)]
        crc = np.array([crc32c.crc32c(row) for row in rows], dtype="<u4")
        for i in range(PART):
            data[(i + 1) * stride - 4 : (i + 1) * stride] = crc[i].tobytes()
        (cache / key).write_bytes(data)
        told = json.loads((cache / RECEIPT).read_bytes())
        told["objects"][key]["crc32c"] = base64.b64encode(crc.tobytes()).decode()
        (cache / RECEIPT).write_bytes(layout.canonical_json(told))
        forge(cache)

    return made


def index(row: int, offset: int, length: int) -> Change:
    """One entry of a shard's index, the index's CRC fitting."""

    def change(data: bytearray, start: int) -> None:
        data[start + 16 * row : start + 16 * row + 16] = struct.pack("<QQ", offset, length)

    return shard(VALUE, change)


def scales(value: float) -> Change:
    half = np.float16(value).tobytes()
    return shard(SCALE, lambda data, _: data.__setitem__(slice(0, 2), half))


def attributes(change: Callable[[dict[str, Any]], object]) -> Change:
    """Edit the root group's zarr.json."""

    def made(cache: Path) -> None:
        value = json.loads((cache / ROOT).read_bytes())
        change(value)
        (cache / ROOT).write_text(json.dumps(value))
        forge(cache)

    return made


def metadata(change: Callable[[dict[str, Any]], object]) -> Change:
    """Edit the zarr.json of the embeddings."""
    name = "data.zarr/train/0/embedding/value/zarr.json"

    def made(cache: Path) -> None:
        value = json.loads((cache / name).read_bytes())
        change(value)
        (cache / name).write_text(json.dumps(value))
        forge(cache)

    return made


def moved_folder(key: str) -> Change:
    """The very bytes, but beyond a link to a folder outside."""

    def made(cache: Path) -> None:
        outside = cache.parent / "outside" / "folder"
        shutil.move(cache / key, outside)
        (cache / key).symlink_to(outside)

    return made


def wrong_index_crc(cache: Path) -> None:
    (cache / VALUE).write_bytes((cache / VALUE).read_bytes()[:-1] + b"\0")
    forge(cache)


def cut(cache: Path) -> None:
    os.truncate(cache / VALUE, 100)
    forge(cache)


def hard_linked(cache: Path) -> None:
    outside = cache.parent / "outside" / "value"
    os.link(cache / VALUE, outside)


def old_zarr(cache: Path) -> None:
    """Zarr 2 metadata with a filter that unpickles, beside ours."""
    told = {
        "zarr_format": 2,
        "shape": [WINDOWS],
        "chunks": [1],
        "dtype": "|O",
        "compressor": None,
        "fill_value": None,
        "order": "C",
        "filters": [{"id": "pickle", "protocol": 5}],
    }
    (cache / "data.zarr/train/0/embedding/value/.zarray").write_text(json.dumps(told))
    (cache / "data.zarr/.zgroup").write_text('{"zarr_format": 2}')
    forge(cache)


def parquet(make: Callable[[Path, Any, Any, Any], None]) -> Change:
    """Another windows.parquet, forged to fit; `make` gets the path, pyarrow, parquet, the table."""

    def made(cache: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pq.read_table(cache / TABLE)
        make(cache / TABLE, pa, pq, table)
        forge(cache)

    return made


def column(name: str, values: Callable[[Any, Any], Any]) -> Change:
    """One other column in windows.parquet."""

    def make(path: Path, pa: Any, pq: Any, table: Any) -> None:
        at = table.schema.get_field_index(name)
        table = table.set_column(at, name, values(pa, table))
        with pq.ParquetWriter(path, table.schema, compression="zstd") as file:
            for first, count in ((0, WINDOWS), (WINDOWS, VALID)):
                file.write_table(table.slice(first, count))

    return parquet(make)


def _whole(path: Path, pq: Any, table: Any, **options: Any) -> None:
    with pq.ParquetWriter(path, table.schema, **{"compression": "zstd", **options}) as file:
        for first, count in ((0, WINDOWS), (WINDOWS, VALID)):
            file.write_table(table.slice(first, count))


def page_bomb(path: Path, pa: Any, pq: Any, table: Any) -> None:
    """One name of 128 MB, which packs to some kilobytes."""
    at = table.schema.get_field_index("contig")
    same = pa.DictionaryArray.from_arrays(pa.array([0] * len(table), pa.int32()), ["a" * (1 << 27)])
    table = table.set_column(at, "contig", same)
    _whole(path, pq, table, write_statistics=False)


def promised_dictionary(path: Path, pa: Any, pq: Any, table: Any) -> None:
    """A dictionary page that says it holds 2**31 - 1 names."""
    _whole(path, pq, table, write_statistics=False)
    data = path.read_bytes()
    chunk = pq.read_metadata(path).row_group(0).column(0)
    at = chunk.dictionary_page_offset
    # Field 7 (DictionaryPageHeader), its field 1 (num_values): one name, so zigzag 2.
    place = data.index(b"\x15\x02", data.index(b"\x4c", at))
    grown = data[:place] + b"\x15\xfe\xff\xff\xff\x0f" + data[place + 2 :]
    path.write_bytes(grown)


def many_groups(path: Path, pa: Any, pq: Any, table: Any) -> None:
    with pq.ParquetWriter(path, table.schema, compression="zstd") as file:
        for _ in range(3000):
            file.write_table(table.slice(0, 1))


def nested(path: Path, pa: Any, pq: Any, table: Any) -> None:
    kind = pa.int64()
    for _ in range(50):
        kind = pa.list_(kind)
    value: Any = []
    for _ in range(49):
        value = [value]
    at = table.schema.get_field_index("start")
    _whole(path, pq, table.set_column(at, "start", pa.array([value] * len(table), type=kind)))


def extension_type(path: Path, pa: Any, pq: Any, table: Any) -> None:
    """Metadata that old readers unpickled to learn a type (CVE-2023-47248)."""
    at = table.schema.get_field_index("contig")
    told = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": b"cos\nsystem\n(S'touch pwned'\ntR.",
    }
    field = pa.field("contig", pa.string(), metadata=told)
    _whole(path, pq, table.set_column(at, field, table["contig"]))


def longer_footer(path: Path, pa: Any, pq: Any, table: Any) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-8] + struct.pack("<I", 2**32 - 1) + b"PAR1")


def lengthened(cache: Path) -> None:
    """CRCs of ten million windows, where three are."""

    def change(told: dict[str, Any]) -> None:
        for record in told["objects"].values():
            record["crc32c"] = "A" * (1 << 24)

    receipt(change)(cache)


def endless_manifest(cache: Path) -> None:
    """A hundred thousand objects more, each a key that leads out."""

    def change(told: dict[str, Any]) -> None:
        entry = {"nbytes": 1, "sha256": "0" * 64}
        told["objects"].update({f"../../{i}": entry for i in range(100_000)})

    manifest(change)(cache)


def case_folded(told: dict[str, Any]) -> None:
    told["objects"][VALUE.upper()] = told["objects"][VALUE]


def _entry_of(key: str) -> Change:
    return manifest(lambda told: told["objects"].update({key: {"nbytes": 6, "sha256": "0" * 64}}))


def _splits(name: str) -> Change:
    return plan(lambda p: p["splits"].update({name: {"windows": 3, "views": [0]}}))


DEEP = b'{"a":' * 200_000
KINDS = ("link", "dangling link", "link to a device", "fifo", "socket", "device", "folder")
SOME_KINDS = ("link", "fifo", "device", "folder")

# Name -> (change, what some refusal says).
STORES: Mapping[str, tuple[Change, str]] = {
    # plan.json: numbers
    "plan of 10^15 windows": (
        plan(lambda p: p["splits"]["train"].update(windows=10**15)),
        "windows: Input should be less",
    ),
    "plan of endless parts": (
        plan(lambda p: p["splits"]["train"].update(windows=1 << 28)),
        "parts, more than 262,144",
    ),
    "plan of parts of nothing": (plan(lambda p: p.update(part=0)), "part: Input should be greater"),
    "plan of parts of 10^15": (plan(lambda p: p.update(part=10**15)), "part: Input should be less"),
    "plan of parts of huge chunks": (
        plan(
            lambda p: (
                p.update(part=1 << 20),
                p["windows"].update(bases=6 << 17, kmers=1 << 17, stored=(1 << 17) - 2),
            )
        ),
        "pieces of 274,877,906,944 bytes",
    ),
    "plan of 10^15 channels": (
        plan(lambda p: p["teacher"].update(channels=10**15)),
        "channels: Input should be less",
    ),
    "plan of windows of a terabyte": (
        plan(
            lambda p: (
                p["teacher"].update(channels=1 << 20),
                p["windows"].update(bases=6 << 17, kmers=1 << 17, stored=(1 << 17) - 2),
            )
        ),
        "pieces of .* bytes, more than",
    ),
    "plan of 10^5 views": (
        plan(lambda p: p["splits"]["train"].update(views=list(range(100_000)))),
        "the manifest only|parts, more than",
    ),
    "plan with a view twice": (
        plan(lambda p: p["splits"]["train"].update(views=[0, 0])),
        "views that do not ascend",
    ),
    "plan with view -1": (
        plan(lambda p: p["splits"]["train"].update(views=[-1])),
        "views.0: Input should be greater",
    ),
    "plan without splits": (plan(lambda p: p["splits"].clear()), "splits: "),
    "plan of 20,000 splits": (
        plan(
            lambda p: p["splits"].update(
                {f"s{i}": {"windows": 1 << 28, "views": [0]} for i in range(20_000)}
            )
        ),
        "parts, more than",
    ),
    "plan that contradicts itself": (
        plan(lambda p: p["windows"].update(stored=1)),
        "1 groups stored",
    ),
    "plan with a fraction of windows": (
        plan(lambda p: p["splits"]["train"].update(windows=6.0)),
        "windows: Input should be a valid integer",
    ),
    "plan with true for a number": (plan(lambda p: p.update(part=True)), "part: Input should be"),
    "plan with text for a number": (plan(lambda p: p.update(part="3")), "part: Input should be"),
    "plan with a number of 5,000 digits": (
        text("plan.json", b'"part":3', b'"part":1' + b"0" * 5000),
        "Exceeds the limit",
    ),
    "plan with a number of 4,000 digits": (
        text("plan.json", b'"seed":0', b'"seed":1' + b"0" * 4000),
        "seed: ",
    ),
    "plan with NaN": (text("plan.json", b'"mask_ratio":0.15', b'"mask_ratio":NaN'), "no JSON"),
    "plan with -Infinity": (
        text("plan.json", b'"mask_ratio":0.15', b'"mask_ratio":-Infinity'),
        "no JSON",
    ),
    "plan with 1e999": (text("plan.json", b'"mask_ratio":0.15', b'"mask_ratio":1e999'), "mask_rat"),
    # plan.json: names
    "split ../x": (_splits("../x"), "String should match pattern"),
    "split /etc": (_splits("/etc"), "String should match pattern"),
    "split a/b": (_splits("a/b"), "String should match pattern"),
    "split with NUL": (_splits("a\0"), "String should match pattern"),
    "split with a line's end": (_splits("a\n"), "String should match pattern"),
    "split of another case": (_splits("Train"), "String should match pattern"),
    "split CON of 300 letters": (_splits("c" * 300), "String should match pattern"),
    "plan of an unknown codec": (plan(lambda p: p.update(codec="blosc")), "codec: Input should be"),
    "plan of an unknown type": (
        plan(lambda p: p["teacher"].update(dtype="object")),
        "dtype: Input should be",
    ),
    "plan of the future": (plan(lambda p: p.update(format="had-cache/2")), "had-cache/2"),
    "plan with an unknown key": (plan(lambda p: p.update(run="id")), "run: Extra inputs"),
    "plan with a key that steers": (
        plan(lambda p: p.update({ESCAPES: 1})),
        r"\\x1b\]0;owned\\x07\\x1b\[2J\\r\\u202e: Extra",
    ),
    "teacher whose name steers": (
        plan(lambda p: p["teacher"].update(name=f"a/b{ESCAPES}")),
        "control characters are no text",
    ),
    "licence that steers": (
        plan(lambda p: p.update(licence=f"MIT{ESCAPES}")),
        "control characters are no text",
    ),
    "genome whose name turns round": (
        plan(lambda p: p["genomes"][0].update(name="\u202egnorw")),
        "control characters are no text",
    ),
    "teacher whose name has a megabyte": (
        plan(lambda p: p["teacher"].update(name="x" * 1_000_000)),
        "at most 4096 characters",
    ),
    "plan with a key twice": (
        text("plan.json", b'"codec":"int8"', b'"codec":"int8","codec":"int8"'),
        "a key stands twice",
    ),
    # plan.json: bytes
    "plan 200,000 deep": (raw("plan.json", DEEP), "plan.json: not what format 1 says"),
    "plan of a megabyte of brackets": (
        raw("plan.json", b'{"a":[' + b"[]," * 340_000 + b"[]]}\n"),
        "plan.json: format None",
    ),
    "plan of a gigabyte": (hole("plan.json", 1 << 30, start=b"{"), "1,073,741,824 bytes"),
    "plan of a terabyte": (hole("plan.json", 1 << 40), "1,099,511,627,776 bytes"),
    "plan that is no UTF-8": (
        text("plan.json", b'"name":"invented/teacher"', b'"name":"\xff\xfe"'),
        "not what format 1 says: 'utf-8'",
    ),
    "plan with half a character": (
        text("plan.json", b'"name":"invented/teacher"', b'"name":"\\ud800"'),
        "unicode",
    ),
    "plan with a byte order mark": (
        text("plan.json", b'{"codec"', b'\xef\xbb\xbf{"codec"'),
        "not what format 1 says",
    ),
    "plan in UTF-16": (
        raw("plan.json", '{"format":"had-cache/1"}\n'.encode("utf-16")),
        "not what format 1 says",
    ),
    "plan that is pickled": (raw("plan.json", b"\x80\x04cos\nsystem\n."), "not what format 1 says"),
    "plan that is empty": (raw("plan.json", b""), "not what format 1 says"),
    "plan in another spelling": (
        text("plan.json", b'"codec":"int8"', b'"codec" : "int8"'),
        "not canonical JSON",
    ),
    **{
        f"plan is a {kind}": (special("plan.json", kind), "plan.json: expected an ordinary file")
        for kind in (*KINDS, "link to itself")
    },
    # manifest.json
    "manifest with ../secret": (_entry_of("../outside/secret"), r"\.\./outside/secret"),
    "manifest with /etc/passwd": (_entry_of("/etc/passwd"), "/etc/passwd"),
    "manifest with ./ and //": (_entry_of(f"./{VALUE.replace('/', '//')}"), "data.zarr//train"),
    "manifest with a URL": (_entry_of("https://127.0.0.1:9/x"), "https://127"),
    "manifest with a file URL": (_entry_of("file:///etc/passwd"), "file:///etc"),
    "manifest with a key that steers": (_entry_of(ESCAPES), r"\\x1b\]0;owned"),
    "manifest with a key of another case": (manifest(case_folded), "DATA.ZARR/TRAIN"),
    "manifest without a shard": (
        manifest(lambda told: told["objects"].pop(VALUE)),
        VALUE,
    ),
    "manifest of 100,000 keys": (endless_manifest, "manifest.json: .* bytes, expected at most"),
    "manifest of a gigabyte": (
        hole("manifest.json", 1 << 30, start=b'{"format":'),
        "manifest.json: 1,073,741,824 bytes",
    ),
    "manifest 5,000 deep": (raw("manifest.json", DEEP[:25_000]), "not what format 1 says"),
    "manifest of shards of 10^15 bytes": (
        manifest(lambda told: told["objects"][VALUE].update(nbytes=10**15)),
        "SHA-256|1,000,000,000,000,000",
    ),
    "manifest of shards of -1 bytes": (
        manifest(lambda told: told["objects"][VALUE].update(nbytes=-1)),
        "nbytes: Input should be greater",
    ),
    "manifest with another's id": (
        text("manifest.json", b'"id":"', b'"id":"0'),
        "String should match pattern",
    ),
    "manifest edited": (text("manifest.json", b'"plan.json"', b'"plan.jsom"'), "its id is"),
    "manifest of another plan": (manifest(lambda told: told.update(plan="0" * 64)), "of plan 0000"),
    **{
        f"manifest is a {kind}": (
            special("manifest.json", kind),
            "manifest.json: expected an ordinary file",
        )
        for kind in ("dangling link", *SOME_KINDS)
    },
    # receipts
    "receipt with keys that lead out": (
        receipt(
            lambda told: told.update(objects={f"../{key}": r for key, r in told["objects"].items()})
        ),
        "not the part's shards",
    ),
    "receipt of another part": (receipt(lambda told: told.update(part=0)), "belongs elsewhere"),
    "receipt of a part of 10^18": (
        receipt(lambda told: told.update(windows=10**18)),
        "belongs elsewhere",
    ),
    "receipt of shards of 10^15 bytes": (
        receipt(lambda told: told["objects"][VALUE].update(nbytes=10**15)),
        "is said to have 1,000,000,000,000,000 bytes",
    ),
    "receipt of ten million CRCs": (lengthened, "bytes, expected at most"),
    "receipt whose CRCs are no base64": (
        receipt(lambda told: told["objects"][VALUE].update(crc32c="@@@@")),
        "crc32c: ",
    ),
    "receipt whose arithmetic steers": (
        receipt(lambda told: told.update(numerics={"device": ESCAPES})),
        "control characters are no text",
    ),
    "receipt of a gigabyte": (
        hole(RECEIPT, 1 << 30, start=b"{", forged=True),
        "1,073,741,824 bytes",
    ),
    "receipt 5,000 deep": (raw(RECEIPT, DEEP[:25_000], forged=False), "SHA-256|not what format 1"),
    **{
        f"receipt is a {kind}": (special(RECEIPT, kind), "00001.json: expected an ordinary file")
        for kind in SOME_KINDS
    },
    "receipts beyond a link": (moved_folder("parts/train"), "expected an ordinary folder"),
    # shards
    "index past the end": (index(1, 1 << 40, 52), "row order"),
    "index past all numbers": (index(1, 2**64 - 2, 2**64 - 2), "row order"),
    "index of overlapping rows": (index(1, 8, 52), "row order"),
    "index of a row twice": (index(1, 0, 52), "row order"),
    "index of a long row": (index(0, 0, 1 << 40), "row order"),
    "index of an absent row": (index(2, 2**64 - 1, 2**64 - 1), "row order"),
    "index with a wrong CRC": (wrong_index_crc, "row order"),
    "shard of a terabyte": (hole(VALUE, 1 << 40, forged=True), "1,099,511,627,776 bytes"),
    "shard that is cut": (cut, "100 bytes"),
    "scale NaN": (scales(np.nan), "a scale that is not finite and positive"),
    "scale infinite": (scales(np.inf), "a scale that is not finite and positive"),
    "scale 0": (scales(0), "a scale that is not finite and positive"),
    "scale below 0": (scales(-1), "a scale that is not finite and positive"),
    **{
        f"shard is a {kind}": (special(VALUE, kind), "c/1/0/0: expected an ordinary file")
        for kind in KINDS
    },
    "shards beyond a link": (
        moved_folder(VALUE.rpartition("/c/")[0]),
        "value: expected an ordinary folder",
    ),
    "data beyond a link": (moved_folder("data.zarr"), "data.zarr: expected an ordinary folder"),
    # what was made at plan time
    "mean NaN": (floats(MEAN, np.nan), "no mean: they must be finite"),
    "mean infinite": (floats(MEAN, -np.inf), "no mean: they must be finite"),
    "std NaN": (floats(STD, np.nan), "no std: they must be finite"),
    "std 0": (floats(STD, 0), "are no std|std positive|must be"),
    "std below 0": (floats(STD, -1), "are no std|std positive|must be"),
    "mean of another type": (raw(MEAN, bytes(8 * CHANNELS + 4), forged=True), "36 bytes"),
    "mean of a terabyte": (hole(MEAN, 1 << 40, forged=True), "1,099,511,627,776 bytes"),
    "k-mer 4096": (
        array(KMER, lambda data: data.__setitem__(slice(0, 2), b"\x00\x10")),
        "a k-mer id of 4,096",
    ),
    "k-mers of a terabyte": (hole(KMER, 1 << 40, forged=True), "1,099,511,627,776 bytes"),
    "k-mers as bytes": (raw(KMER, bytes(PART * KMERS + 4), forged=True), "40 bytes"),
    "a group more masked": (
        array(MASK, lambda data: data.__setitem__(slice(0, KMERS), b"\1" * KMERS)),
        "masked groups, as the plan says",
    ),
    "mask of 2 and 0": (
        array(MASK, lambda data: data.__setitem__(slice(0, KMERS), b"\2" + bytes(KMERS - 1))),
        "neither true nor false",
    ),
    "strands of 255": (
        array(REVERSED, lambda data: data.__setitem__(0, 255)),
        "neither true nor false",
    ),
    "mask is a fifo": (special(MASK, "fifo"), "mask/c/1/0: expected an ordinary file"),
    "mean is a device": (special(MEAN, "device"), "mean/c/0: expected an ordinary file"),
    # zarr.json
    "attributes of a gigabyte": (hole(ROOT, 1 << 30, start=b"{", forged=True), "1,073,741,824"),
    "attributes 200,000 deep": (
        raw(ROOT, DEEP, forged=True),
        "not the JSON of a Zarr group",
    ),
    "attributes that are a list": (
        attributes(lambda group: group.update(attributes=[1])),
        "not the JSON of a Zarr group",
    ),
    "fidelity that is a list": (
        attributes(lambda group: group["attributes"].update(fidelity=["x"])),
        "tells no fidelity",
    ),
    "fidelity of NaN": (
        attributes(lambda group: group["attributes"].update(fidelity={"a": float("nan")})),
        "not the JSON of a Zarr group",
    ),
    "fidelity of more digits than a number has": (
        attributes(lambda group: group["attributes"].update(fidelity={"a": 10**400})),
        "not the JSON of a Zarr group",
    ),
    "fidelity beyond any number": (
        raw(ROOT, b'{"attributes":{"fidelity":{"a":1e400}}}', forged=True),
        "not the JSON of a Zarr group",
    ),
    "attributes are a fifo": (special(ROOT, "fifo"), "zarr.json: expected an ordinary file"),
    # windows.parquet
    "table that is none": (raw(TABLE, b"PAR1 and some more PAR1", forged=True), "windows.parquet"),
    "table of a terabyte": (hole(TABLE, 1 << 40, start=b"PAR1", forged=True), "1,099,511,627,776"),
    "table with an endless footer": (parquet(longer_footer), "a footer of 4,294,967,295 bytes"),
    "table of 3,000 row groups": (parquet(many_groups), "footer|row groups"),
    "table of lists in lists": (parquet(nested), "has columns|footer|damaged"),
    "table of one name of 128 MB": (parquet(page_bomb), "pages|damaged"),
    "table of 2^31 promised names": (parquet(promised_dictionary), "pages|damaged"),
    "table with a column of another type": (
        column("start", lambda pa, table: table["start"].cast(pa.float64())),
        "has columns",
    ),
    "table with a column of holes": (
        column("index", lambda pa, table: pa.nulls(len(table), pa.int64())),
        "lacks values",
    ),
    "table with a column less": (
        parquet(lambda path, pa, pq, table: _whole(path, pq, table.drop_columns(["index"]))),
        "has columns",
    ),
    "table packed otherwise": (
        parquet(lambda path, pa, pq, table: _whole(path, pq, table, compression="gzip")),
        "another compression",
    ),
    "table with a contig that steers": (
        column("contig", lambda pa, table: pa.array([ESCAPES] * len(table))),
        "a name that is none",
    ),
    "table of other windows": (
        column("window", lambda pa, table: pa.array([7] * len(table), pa.int64())),
        "at its place",
    ),
    **{
        f"table is a {kind}": (special(TABLE, kind), "windows.parquet: expected an ordinary file")
        for kind in SOME_KINDS
    },
}

# The same, of a cache whose codec learns a codebook.
LEARNT: Mapping[str, tuple[Change, str]] = {
    "a rotation of NaN": (floats(f"{BOOK}/rotation/c/0/0", np.nan), "no rotation: they must be"),
    "a level that is infinite": (floats(f"{BOOK}/level/c/0/0", np.inf), "no level: they must be"),
    "a spread of 0": (floats(f"{BOOK}/spread/c/0", 0), "no spread: they must be"),
    "a byte that no code has": (
        array(f"{BOOK}/byte/c/0", lambda data: data.__setitem__(slice(0, 2), b"\xff\xff")),
        "does not name each of the",
    ),
    "no byte but the first": (
        array(f"{BOOK}/byte/c/0", lambda data: data.__setitem__(slice(None), bytes(len(data)))),
        "does not name each of the",
    ),
    "a rotation of a terabyte": (
        hole(f"{BOOK}/rotation/c/0/0", 1 << 40, forged=True),
        "1,099,511,627,776 bytes",
    ),
    "a codebook that is a fifo": (
        special(f"{BOOK}/level/c/0/0", "fifo"),
        "level/c/0/0: expected an ordinary file",
    ),
    "a codebook of 10^6 channels": (
        plan(lambda p: p["teacher"].update(channels=10**6)),
        "which takes at most",
    ),
    "another codec's name": (plan(lambda p: p.update(codec="tiny")), "does not name each of the"),
}


def _unsealed(change: Change) -> Change:
    def made(cache: Path) -> None:
        change(cache)
        (cache / "manifest.json").unlink()

    return made


def _lengthened(cache: Path) -> None:
    """Very many parts, of which few are there."""
    plan(lambda p: p["splits"]["train"].update(windows=PART * ((1 << 16) - 1)))(cache)
    (cache / "manifest.json").unlink()


# Not sealed, so that no manifest tells what is there: `verify` and `inspect` have the last word.
BEGUN: Mapping[str, tuple[Change, str]] = {
    "65,536 parts, not sealed": (_lengthened, "kmer_id|windows.parquet"),
    **{
        f"{name}, not sealed": (_unsealed(STORES[name][0]), STORES[name][1])
        for name in (
            *("receipt of a gigabyte", "receipt of ten million CRCs", "receipt is a fifo"),
            *("receipt with keys that lead out", "receipts beyond a link", "data beyond a link"),
            *("shard of a terabyte", "shard is a fifo", "shards beyond a link", "mean NaN"),
            *("k-mers of a terabyte", "k-mer 4096", "mask of 2 and 0", "attributes of a gigabyte"),
            *("attributes 200,000 deep", "attributes are a fifo", "table is a fifo"),
            *("table of a terabyte", "table of one name of 128 MB", "table of 3,000 row groups"),
            *("table of 2^31 promised names", "table with a contig that steers"),
        )
    },
}

# What looks bad and is harmless: nothing is refused, and nothing is done beyond reading the cache.
HARMLESS: Mapping[str, Change] = {
    "a shard that is a hard link": hard_linked,
    "a table with a type that old readers unpickle": parquet(extension_type),
    "names that are addresses": plan(
        lambda p: (
            p["teacher"].update(name="https://127.0.0.1:9/x"),
            p["genomes"][0].update(name="file:///etc/passwd"),
        )
    ),
    "attributes that name modules": attributes(
        lambda group: group["attributes"].update(__reduce__="os.system", decode={"numpy": "exit()"})
    ),
    "fidelity that steers": attributes(
        lambda group: group["attributes"].update(fidelity={f"a{ESCAPES}": 1.0, "b": {"c": [1]}})
    ),
}

# What other readers would trip over and ours never looks at; `verify` may name it.
FOREIGN: Mapping[str, Change] = {
    "zarr 2 beside zarr 3": old_zarr,
    "a codec that unpickles": metadata(
        lambda array: array.update(codecs=[{"name": "pickle", "configuration": {}}])
    ),
    "10^15 rows in zarr.json": metadata(lambda array: array.update(shape=[10**15, 10, 4])),
    "a storage transformer": metadata(
        lambda array: array.update(storage_transformers=[{"name": "http://127.0.0.1:9/"}])
    ),
    "another type in zarr.json": metadata(lambda array: array.update(data_type="complex128")),
}


# -- the watch -------------------------------------------------------------------------------------

_FORBIDDEN = (
    *("subprocess", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty."),
    # An event loop has a pair of sockets of its own, connected to nothing.
    *("socket.connect", "socket.bind", "socket.get", "socket.send"),
    *("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime", "os.setxattr", "shutil", "pickle", "marshal"),
    # The stream wraps memory of its own in a ctypes array to see when nobody uses it any more.
    *("ctypes.dl", "ctypes.call", "ctypes.string_at", "ctypes.wstring_at", "ctypes.seh"),
    *("urllib", "ftplib", "http", "tempfile", "webbrowser", "code.__new__"),
)


def _watch(root: Path, sound: Path, seen: list[str]) -> None:
    """Note everything that is done outside a folder, or to it, from here on."""
    own = f"{root}{os.sep}"
    python = tuple(
        {str(sound), sys.prefix, sys.base_prefix, *filter(None, sys.path), "/usr/lib", "/proc/self"}
    )

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            seen.append(f"{event} {args!r}"[:200])
        elif event in ("open", "os.listdir", "os.scandir"):
            path, flags = args[0], args[2] if event == "open" else 0
            if isinstance(path, int):
                return  # a descriptor that was opened before
            name = os.fsdecode(path)
            if event == "open" and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                seen.append(f"open {name} to write")
            elif os.sep not in name and flags & os.O_NOFOLLOW and name not in ("..", "."):
                return  # one step down from a folder that was opened
            elif name != str(root) and not name.startswith((own, *python)):
                seen.append(f"{event} {name}")

    sys.addaudithook(hook)


def _ways(path: Path, sound: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every way to open a cache; each returns what it prints or reports."""
    from had_pipe import stream
    from had_pipe.cache import Cache, integrity
    from had_pipe.cache.compare import compare
    from had_pipe.cli import caches

    def read() -> str:
        cache = Cache.open(path)
        for split in cache.plan.splits:
            rows = np.arange(cache.rows(split))
            for view in cache.views(split):
                cache.read(split, view, rows, cache.allocate(len(rows)))
            cache.read_kmers(split, rows)
        return f"{cache.attributes['licence']} {cache.fidelity}"

    def locus() -> str:
        return repr(Cache.open(path).locus("train", WINDOWS - 1))

    def train() -> str:
        with stream.Stream([Cache.open(path)], batch=4, seed=0) as batches:
            for _ in range(3):
                next(batches)
        return ""

    def verify() -> list[str]:
        return [str(problem) for problem in integrity.verify(path).problems]

    def inspect() -> str:
        out = StringIO()
        with redirect_stdout(out), redirect_stderr(out):
            try:
                caches.inspect(str(path))
            except BaseException as error:
                if type(error).__name__ != "Exit":
                    raise
                return "\n".join(["refused", out.getvalue()])
        return out.getvalue()

    def hold_against() -> str:
        found = compare(sound, path)
        return f"{found.meaning} {found.values} {found.b}"

    yield "read", read
    yield "compare", hold_against
    yield "locus", locus
    yield "train", train
    yield "inspect", inspect
    yield "verify", verify


def _memory(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) << 10
    raise AssertionError(name)


def _try_all(path: Path, sound: Path) -> dict[str, Any]:
    """Open one cache in every way; what came of each, and what it cost."""
    import resource
    import time

    from had_pipe.errors import HadPipeError

    seen: list[str] = []
    begun = _memory("VmHWM")
    most = _memory("VmData") + (1 << 30)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    ways = list(_ways(path, sound))
    _watch(path, sound, seen)
    told: dict[str, Any] = {}
    slowest = 0.0
    for name, way in ways:
        at, clock = time.process_time(), time.monotonic()
        signal.alarm(20)
        try:
            told[name] = way()
        except HadPipeError as error:
            told[name] = {"refused": str(error), "code": error.exit_code}
        except BaseException as error:
            told[name] = {"escaped": f"{type(error).__name__}: {error}"[:500]}
        signal.alarm(0)
        slowest = max(slowest, min(time.process_time() - at, time.monotonic() - clock))
    return {
        "ways": told,
        "seen": seen,
        "seconds": slowest,
        "nbytes": _memory("VmHWM") - begun,
    }


def main(root: Path) -> None:
    """Answer for each cache named on stdin, a process each."""
    import pyarrow.parquet  # noqa: F401
    import torch  # noqa: F401

    sound = root / "sound" / "cache"
    for name in ("sound", "learnt", "begun"):
        for way, use in _ways(root / name / "cache", sound):
            if name != "begun" or way == "verify":
                use()  # whatever is imported or made once is not a store's to pay for
    for line in sys.stdin:
        name = line.strip()
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            try:
                answer = _try_all(root / name / "cache", sound)
            except BaseException as error:
                answer = {"broken": f"{type(error).__name__}: {error}"}
            with os.fdopen(write, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            said = pipe.read()
        os.waitpid(child, 0)
        print(said or json.dumps({"broken": "died"}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
