"""A student's embeddings of sequences: what is written, stitched, kept whole, and refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import xarray
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from test_had import small_student
from typer.testing import CliRunner

from had_pipe import cli, embed, vectors
from had_pipe.embed import spans
from had_pipe.errors import InputError, NonFiniteError, RecipeError, StorageError
from had_pipe.students import HADConfig, HADModel, HADTokenizer, save_student
from had_pipe.vectors import Named, Size, writing

WINDOW, OVERLAP = 60, 20
# float32, other batches: as tests/test_had.py has it for padding.
NEAR = {"rtol": 5e-5, "atol": 5e-5}


@pytest.fixture(scope="module")
def student() -> HADModel:
    return small_student()


@pytest.fixture(scope="module")
def folder(student: HADModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("student")
    save_student(student, None, folder)
    return folder


@pytest.fixture(scope="module")
def sequences() -> dict[str, str]:
    random = np.random.default_rng(0)
    lengths = [3, 60, 13, 61, 187, 6, 60, 300, 1, 5]
    made = {f"s{i}": "".join(random.choice(list("ACGT"), n)) for i, n in enumerate(lengths)}
    made["lower"] = made["s7"].lower()
    made["unknown"] = made["s4"][:20] + "NNNRYKnn" + made["s4"][28:]
    made["nothing"] = "N" * 11
    return made


@pytest.fixture(scope="module")
def fasta(sequences: Mapping[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("fasta") / "x.fa"
    path.write_text("".join(f">{name} told {name}\n{s}\n" for name, s in sequences.items()))
    return path


@torch.no_grad()
def features(student: HADModel, letters: str) -> np.ndarray:
    """Of one sequence by itself, spelt by the tokenizer; unknown bases masked."""
    said = "".join(x if x in "ACGT" else "[MASK]" for x in letters.upper())
    ids = torch.tensor([HADTokenizer()(said)["input_ids"]])
    return student(ids).last_hidden_state[0].numpy()


def stitched(student: HADModel, letters: str) -> np.ndarray:
    """The same of a sequence of any length, base by base."""
    starts = [*range(0, max(1, len(letters) - WINDOW), WINDOW - OVERLAP)]
    if len(letters) > WINDOW:
        starts.append(len(letters) - WINDOW)
    of_window = [features(student, letters[s : s + WINDOW]) for s in starts]
    found = []
    for i in range(len(letters)):
        # Of the first window that has half an overlap behind the base, or of the last one.
        for s, feat in zip(starts, of_window, strict=True):
            if s == starts[-1] or i < s + WINDOW - OVERLAP // 2:
                found.append(feat[i - s])
                break
    return np.array(found)


def expected(student: HADModel, letters: str, per: str) -> np.ndarray:
    feat_SE = stitched(student, letters)
    if per == "kmer":
        return feat_SE[: len(letters) // 6 * 6].reshape(-1, 6, feat_SE.shape[1]).mean(1)
    if per == "sequence":
        known = [i for i, x in enumerate(letters.upper()) if x in "ACGT"] or slice(None)
        return feat_SE[known].mean(0, keepdims=True)
    return feat_SE


def read(out: Path, per: str) -> dict[str, np.ndarray]:
    """Rows by sequence, in the order of the file."""
    if out.suffix == ".zarr":
        root = zarr.open_group(out, mode="r")
        feat = root["embedding"][:]
        names = list(root["name"][:])
        at = range(len(names) + 1) if per == "sequence" else root["offset"][:]
        return {name: feat[at[i] : at[i + 1]] for i, name in enumerate(names)}
    table = pq.read_table(out)
    feat = np.stack(table["embedding"].to_numpy()) if len(table) else np.zeros((0, 16))
    names = np.array(table["name"].to_pylist())
    return {name: feat[names == name] for name in dict.fromkeys(names)}


@pytest.mark.parametrize(
    ("per", "kind", "batch_bases"),
    [
        ("base", "parquet", 100),
        ("base", "zarr", 1 << 15),
        ("kmer", "parquet", 1 << 15),
        ("kmer", "zarr", 100),
        ("sequence", "parquet", 100),
        ("sequence", "zarr", 1 << 15),
    ],
)
def test_what_is_written_is_what_the_student_says_of_each_sequence_alone(
    student: HADModel,
    folder: Path,
    fasta: Path,
    sequences: Mapping[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    per: vectors.Per,
    kind: str,
    batch_bases: int,
) -> None:
    monkeypatch.setitem(embed.BATCH_BASES, "cpu", batch_bases)
    # Several blocks of several chunks each: a block is 48 rows.
    monkeypatch.setattr(vectors, "_CHUNK", 16 * 16 * 4)
    monkeypatch.setattr(vectors, "_BLOCK", 3 * 16 * 16 * 4)
    monkeypatch.setattr(vectors, "_NAMES", 4)
    out = tmp_path / f"x.{kind}"
    made = embed.embed(
        fasta, student=folder, out=out, per=per, window=WINDOW, overlap=OVERLAP, device="cpu"
    )
    found = read(out, per)
    assert made.rows == sum(map(len, found.values()))
    assert (made.bases, made.channels) == (sum(map(len, sequences.values())), 16)
    with_rows = [name for name, s in sequences.items() if per != "kmer" or len(s) >= 6]
    assert list(found) == (list(sequences) if kind == "zarr" else with_rows)
    for name in with_rows:
        np.testing.assert_allclose(
            found[name], expected(student, sequences[name], per), err_msg=name, **NEAR
        )
    np.testing.assert_array_equal(found["lower"].shape, found["s7"].shape)
    assert {path.name for path in tmp_path.iterdir()} == {out.name}


def test_a_table_says_where_each_row_lies(
    folder: Path, fasta: Path, sequences: Mapping[str, str], tmp_path: Path
) -> None:
    for per, step in (("base", 1), ("kmer", 6)):
        out = tmp_path / f"{per}.parquet"
        embed.embed(fasta, student=folder, out=out, per=per, window=WINDOW, device="cpu")
        table = pq.read_table(out).select(["name", "start"]).to_pylist()
        assert table == [
            {"name": name, "start": start}
            for name, letters in sequences.items()
            for start in range(0, len(letters) - step + 1, step)
        ]
    out = tmp_path / "sequence.parquet"
    embed.embed(fasta, student=folder, out=out, window=WINDOW, device="cpu")
    assert pq.read_table(out).select(["name", "bases", "unknown"]).to_pylist() == [
        {
            "name": name,
            "bases": len(letters),
            "unknown": sum(x not in "ACGT" for x in letters.upper()),
        }
        for name, letters in sequences.items()
    ]


def test_other_tools_open_what_was_written(folder: Path, fasta: Path, tmp_path: Path) -> None:
    for kind in ("zarr", "parquet"):
        embed.embed(fasta, student=folder, out=tmp_path / f"x.{kind}", per="kmer", device="cpu")
    data = xarray.open_zarr(tmp_path / "x.zarr", consolidated=False)
    frame = pq.read_table(tmp_path / "x.parquet").to_pandas()
    np.testing.assert_array_equal(data["embedding"].values, np.stack(frame["embedding"]))
    assert data["embedding"].dims == ("kmer", "channel")
    assert data["name"].dims == data["bases"].dims == ("sequence",)
    first, second = data["offset"].values[4:6]
    assert set(frame["name"][first:second]) == {data["name"].values[4]}
    note = data.attrs["had_pipe"]
    assert note == json.loads(pq.read_schema(tmp_path / "x.parquet").metadata[b"had_pipe"])
    assert (note["format"], note["licence"], note["per"]) == (embed.FORMAT, "unknown", "kmer")


@given(
    length=st.integers(1, 500),
    window=st.integers(1, 90),
    share=st.floats(0, 1, exclude_max=True),
)
def test_windows_keep_every_base_once_with_as_much_around_it_as_promised(
    length: int, window: int, share: float
) -> None:
    overlap = int(share * window)
    found = list(spans(length, window=window, overlap=overlap))
    kept = [i for _, _, keep, until in found for i in range(keep, until)]
    assert kept == list(range(length))
    for start, end, keep, until in found:
        assert end - start == min(length, window)
        assert 0 <= start <= keep < until <= end <= length
        assert start == 0 or keep - start >= overlap // 2
        assert end == length or end - until >= overlap // 2
    # No more windows than it takes.
    assert len(found) == max(1, -(-(length - overlap) // (window - overlap)))


@settings(deadline=None, max_examples=10)
@given(
    lengths=st.lists(st.lists(st.integers(0, 70), max_size=4), min_size=1, max_size=8),
    kind=st.sampled_from(["parquet", "zarr"]),
)
def test_rows_come_back_however_they_were_cut(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[list[int]], kind: str
) -> None:
    out = tmp_path_factory.mktemp("rows") / f"x.{kind}"
    random = np.random.default_rng(0)
    pieces = {f"s{i}": [random.random((n, 2), np.float32) for n in cut] for i, cut in
              enumerate(lengths)}  # fmt: skip
    rows = sum(map(sum, lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vectors, "_CHUNK", 4 * 2 * 8)
        patch.setattr(vectors, "_BLOCK", 4 * 2 * 32)
        patch.setattr(vectors, "_NAMES", 3)
        size = Size(sequences=len(pieces), rows=rows, channels=2)
        with writing(out, per="base", size=size, note={}) as written:
            for name, cut in pieces.items():
                written.begin(Named(name=name, bases=0, unknown=0))
                for feat_NE in cut:
                    written.add(np.arange(len(feat_NE)), feat_NE)
    found = read(out, "base")
    for name, cut in pieces.items():
        whole = np.concatenate([np.zeros((0, 2), np.float32), *cut])
        if len(whole) or kind == "zarr":
            np.testing.assert_array_equal(found[name], whole)


def test_memory_does_not_grow_with_the_number_of_sequences(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "_BLOCK", 1 << 15)
    monkeypatch.setattr(vectors, "_CHUNK", 1 << 12)
    monkeypatch.setitem(embed.BATCH_BASES, "cpu", 1 << 12)
    random = np.random.default_rng(0)

    def peak(many: int) -> int:
        path = tmp_path / f"{many}.fa"
        letters = ["".join(random.choice(list("ACGT"), 90)) for _ in range(many)]
        path.write_text("".join(f">{i}\n{s}\n" for i, s in enumerate(letters)))
        tracemalloc.start()
        embed.embed(path, student=folder, out=tmp_path / f"{many}.parquet", per="base")
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(20)  # what is made once
    few, many = peak(50), peak(250)
    # Features of the others would be 200 * 90 * 16 * 4 bytes, 1.2 MB.
    assert many - few < 300_000


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_writes_what_a_cpu_does(fasta: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    save_student(HADModel(HADConfig(layers=2)), None, tmp_path / "student")
    found = []
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.zarr"
        embed.embed(
            fasta, student=tmp_path / "student", out=out, per="base", window=60, device=device
        )
        found.append(zarr.open_group(out, mode="r")["embedding"][:])
    # Kernels may round the factors of float32 products to 10 bits.
    np.testing.assert_allclose(found[1], found[0], rtol=2e-2, atol=2e-2)


# What is refused, and what is left


def test_what_is_there_is_done_and_what_is_there_of_something_else_is_kept(
    folder: Path, fasta: Path, tmp_path: Path
) -> None:
    for kind in ("parquet", "zarr"):
        out = tmp_path / f"x.{kind}"
        assert not embed.embed(fasta, student=folder, out=out, device="cpu").already_done
        before = sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*"))
        assert embed.embed(fasta, student=folder, out=out, device="cpu").already_done
        with pytest.raises(RecipeError, match="window is 1020 there, 50 here"):
            embed.embed(fasta, student=folder, out=out, window=50, device="cpu")
        other = tmp_path.parent / f"{tmp_path.name}.fa"
        other.write_text(">a\nACGT\n")
        with pytest.raises(RecipeError, match="sequences_sha256"):
            embed.embed(other, student=folder, out=out, device="cpu")
        assert sorted((p, p.stat().st_mtime_ns) for p in tmp_path.rglob("*")) == before
        foreign = tmp_path / f"foreign.{kind}"
        foreign.write_bytes(b"mine")
        with pytest.raises(RecipeError, match="is no embeddings of ours"):
            embed.embed(fasta, student=folder, out=foreign, device="cpu")
        assert foreign.read_bytes() == b"mine"


@pytest.mark.parametrize("kind", ["parquet", "zarr"])
def test_what_stops_on_the_way_leaves_nothing(
    folder: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real = embed._features
    calls = 0

    def stops(*args: Any) -> Iterator[Any]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setitem(embed.BATCH_BASES, "cpu", 100)
    monkeypatch.setattr(embed, "_features", stops)
    with pytest.raises(KeyboardInterrupt):
        embed.embed(fasta, student=folder, out=tmp_path / "deep" / f"x.{kind}", device="cpu")
    assert calls == 3
    assert not list((tmp_path / "deep").iterdir())


def test_a_file_that_changes_on_the_way_is_noticed(
    folder: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.fa"
    path.write_bytes(fasta.read_bytes())
    real = embed._survey

    def grows(*args: Any, **settings: Any) -> Any:
        found = real(*args, **settings)
        path.write_bytes(fasta.read_bytes() + b">more\nACGT\n")
        return found

    monkeypatch.setattr(embed, "_survey", grows)
    with pytest.raises(InputError, match="changed while it was read"):
        embed.embed(path, student=folder, out=tmp_path / "x.zarr", device="cpu")
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize("kind", ["parquet", "zarr"])
def test_a_file_that_another_process_made_meanwhile_is_kept(
    folder: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    out = tmp_path / f"x.{kind}"
    real = embed._features

    def overtaken(*args: Any) -> Iterator[Any]:
        out.write_bytes(b"theirs")
        return real(*args)

    monkeypatch.setattr(embed, "_features", overtaken)
    with pytest.raises(RecipeError, match="made by somebody else meanwhile"):
        embed.embed(fasta, student=folder, out=out, device="cpu")
    assert out.read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_no_room_is_told_before_anything_is_written(
    folder: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("had_pipe.durable.free_nbytes", lambda path: 1000)
    with pytest.raises(StorageError, match="still to be written"):
        embed.embed(fasta, student=folder, out=tmp_path / "x.zarr", per="base", device="cpu")
    assert not list(tmp_path.iterdir())


def test_features_that_are_no_numbers_are_not_written(fasta: Path, tmp_path: Path) -> None:
    student = small_student()
    with torch.no_grad():
        student.norm.weight[3] = float("nan")
    save_student(student, None, tmp_path / "student")
    with pytest.raises(NonFiniteError, match="s0: bases 0 to 3"):
        embed.embed(fasta, student=tmp_path / "student", out=tmp_path / "x.zarr", device="cpu")
    assert not (tmp_path / "x.zarr").exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"out": "x.csv"}, "ends in .parquet"),
        ({"window": 0}, "expected a window"),
        ({"window": 10, "overlap": 10}, "expected a window"),
        ({"device": "cuda"}, "no CUDA device"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    folder: Path, fasta: Path, tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    if "device" in settings and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    asked = {"out": "x.zarr", "device": "cpu", **settings}
    with pytest.raises(RecipeError, match=said):
        embed.embed(fasta, student=folder, **{**asked, "out": tmp_path / asked["out"]})
    assert not list(tmp_path.iterdir())


def test_a_place_below_a_file_is_refused(folder: Path, fasta: Path) -> None:
    with pytest.raises(RecipeError, match=f"{fasta} is not a folder"):
        embed.embed(fasta, student=folder, out=fasta / "deep" / "x.zarr", device="cpu")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (">a\nACGT\n>a\nAC\n", "the name is already that of"),
        (">a\nMKV*\n", "is this a protein"),
        (">a\nACGU\n", "this is RNA"),
        ("", "holds no record"),
    ],
)
def test_a_file_of_no_dna_is_refused_before_anything_is_embedded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    path = tmp_path / "x.fa"
    path.write_text(text)
    monkeypatch.setattr(embed, "_features", None)
    with pytest.raises(InputError, match=said):
        embed.embed(path, student=folder, out=tmp_path / "x.zarr", device="cpu")


def test_a_lab_without_the_extra_is_told_which_one(
    folder: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "dnaio", None)
    said = CliRunner().invoke(
        cli.app, ["embed", str(fasta), "--student", str(folder), "--out", str(tmp_path / "x.zarr")]
    )
    assert said.exit_code == 3
    assert "pip install 'had-pipe[extract]'" in said.stderr


def test_the_verb_says_what_it_made_and_that_nothing_is_left(
    folder: Path, fasta: Path, tmp_path: Path
) -> None:
    words = ["embed", str(fasta), "--student", str(folder), "--out", str(tmp_path / "x.parquet")]
    first, again, other = (
        CliRunner().invoke(cli.app, [*words, *more, "--device", "cpu"])
        for more in ([], [], ["--per", "kmer"])
    )
    assert first.exit_code == again.exit_code == 0, first.output
    assert "13 of 16 channels, one a sequence" in first.output
    assert "nothing was left to do" in again.output
    assert other.exit_code == 2
    assert "per is 'sequence' there, 'kmer' here" in other.stderr


def test_a_stop_says_that_nothing_was_made(
    folder: Path, fasta: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(embed, "_features", stops)
    out = tmp_path / "x.parquet"
    said = CliRunner().invoke(
        cli.app, ["embed", str(fasta), "--student", str(folder), "--out", str(out)]
    )
    assert said.exit_code == 75
    assert "was not made" in said.stderr
