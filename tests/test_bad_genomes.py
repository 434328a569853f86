"""Bad input to stage one, as files are: each has one verdict, and the verdict names the remedy.

What may stand wrong inside a FASTA, a 2bit or a BED file is in test_reference.py and
test_windows.py; here are files that are no files, that change, that lie about their length.
"""

from __future__ import annotations

import errno
import gzip
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_reference import BAD_FASTA, BAD_TWOBIT, PACK, SOUND, bgzip, twobit
from test_windows import BAD_BED

from had_pipe import corpus
from had_pipe.dna import reference
from had_pipe.dna.reference import Contig, read_contigs
from had_pipe.dna.windows import read_bed
from had_pipe.errors import InputError
from had_pipe.progress import silent
from had_pipe.recipe import Genome, Windows

FASTA = b">a\n" + b"ACGTTGCA" * 300 + b"\n>b\n" + b"GGCATTAC" * 100 + b"\n"
BED = b"a\t0\t600\ntrack name=x\nbrowser position a\n#c\nb\t0\t300\n"


def verdict(
    path: Path, read: Callable[[Path], object] = lambda path: list(read_contigs(path))
) -> str:
    """The message with which a file is refused, less the file's name."""
    with pytest.raises(InputError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


# -- no ordinary file ------------------------------------------------------------------------------


def folder(path: Path) -> None:
    path.mkdir()


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's name has 107 bytes at most
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path.name)
    os.chdir(here)


def link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def below_a_file(path: Path) -> None:
    path.parent.rmdir()
    path.parent.write_bytes(b"")


NO_FILES: dict[Callable[[Path], None], tuple[str, str]] = {
    folder: ("is a folder; expected a {kind} file", ""),
    link_to_itself: ("cannot be read: Too many levels of symbolic links", ""),
    dangling_link: ("no such file; expected a {kind} file", ""),
    fifo: ("is not a regular file; write the {what} to a file first", ""),
    unix_socket: ("is not a regular file; write the {what} to a file first", ""),
    link_to_a_device: ("is not a regular file; write the {what} to a file first", ""),
    below_a_file: ("cannot be read: Not a directory", ""),
}


@pytest.mark.timeout(30)
@pytest.mark.parametrize("make", NO_FILES, ids=lambda make: make.__name__)
def test_what_is_no_ordinary_file_is_refused_at_once(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "folder" / "genome"
    path.parent.mkdir()
    make(path)
    expected, _ = NO_FILES[make]
    assert verdict(path) == expected.format(kind="FASTA or 2bit", what="genome")
    assert verdict(path, read_bed) == expected.format(kind="BED", what="regions")


@pytest.mark.parametrize("trouble", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_a_file_that_cannot_be_read_is_refused(
    trouble: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(trouble, os.strerror(trouble))

    path = tmp_path / "genome.fa"
    path.write_bytes(FASTA)
    monkeypatch.setattr(Path, "open", refuse)
    assert verdict(path) == f"cannot be read: {os.strerror(trouble)}"
    assert verdict(path, read_bed) == f"cannot be read: {os.strerror(trouble)}"


# -- files that change -----------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("how", ["grows", "is touched", "is exchanged"])
def test_a_genome_that_changes_while_it_is_read_is_refused(
    how: str, packing: str, tmp_path: Path
) -> None:
    path = tmp_path / "genome"
    path.write_bytes(PACK[packing](FASTA))
    contigs = read_contigs(path)
    next(contigs)
    match how:
        case "grows":
            with path.open("ab") as file:
                file.write(PACK[packing](b">c\nACGT\n"))
        case "is touched":
            os.utime(path, ns=(1, 1))
        case "is exchanged":
            (tmp_path / "other").write_bytes(PACK[packing](FASTA + b">c\nACGT\n"))
            (tmp_path / "other").replace(path)
    with pytest.raises(InputError, match=r"changed while it was read .* then run again"):
        list(contigs)


def test_a_2bit_that_changes_while_it_is_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genome.2bit"
    path.write_bytes(SOUND)
    contigs = read_contigs(path)
    next(contigs)
    os.utime(path, ns=(1, 1))
    with pytest.raises(InputError, match="changed while it was read"):
        list(contigs)


CHANGES = {
    "another base": FASTA.replace(b"GGCATTAC", b"GGCATTAG", 1),
    "another name": FASTA.replace(b">b", b">c"),
    "a contig less": FASTA.partition(b">b")[0],
    "a contig more": FASTA + b">c\n" + b"ACGT" * 100 + b"\n",
    "another order": b">b" + FASTA.partition(b">b")[2] + FASTA.partition(b">b")[0],
}


@pytest.mark.parametrize("case", CHANGES)
@pytest.mark.parametrize("use", [corpus.survey_windows, corpus.lay_out])
def test_a_genome_that_changed_between_its_digest_and_its_windows_is_refused(
    case: str, use: Callable[[object, Windows], object], tmp_path: Path
) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(FASTA)
    genome = Genome.model_validate({"name": "g", "path": path})
    windows = Windows(bases=60, stride=60)
    read = corpus.read_reference(genome, report=silent)
    use([read], windows)
    path.write_bytes(CHANGES[case])
    with pytest.raises(InputError, match="the genome changed since it was read the first time"):
        use([read], windows)


def test_case_and_line_ends_may_change_in_between(tmp_path: Path) -> None:
    """The digest ignores them, so the cache is the same, its counts of soft-masked bases apart."""
    path = tmp_path / "genome.fa"
    path.write_bytes(FASTA)
    read = corpus.read_reference(Genome.model_validate({"name": "g", "path": path}), report=silent)
    path.write_bytes(FASTA.replace(b"\n", b"\r\n"))
    assert corpus.survey_windows([read], Windows(bases=60, stride=60)).windows == {"train": 53}


# -- files that lie about their length -------------------------------------------------------------


def bomb(path: Path, kind: str, nbytes: int) -> None:
    """Packed data of one letter, a piece at a time."""
    start = {"one record": b">a\n", "one header": b">", "one region": b"a\t0\t"}[kind]
    letter = {"one record": b"A", "one header": b"x", "one region": b"1"}[kind]
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(start)
        for _ in range(nbytes >> 20):
            file.write(letter * (1 << 20))


MEASURE = """
import resource, sys
from pathlib import Path
from had_pipe.dna.reference import read_contigs
from had_pipe.dna.windows import read_bed
from had_pipe.errors import InputError
begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_bed(Path(sys.argv[1])) if sys.argv[2] == "bed" else list(read_contigs(Path(sys.argv[1])))
except InputError as error:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begun, error)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reader"),
    [("one record", "fasta"), ("one header", "fasta"), ("one region", "bed")],
)
def test_a_gzip_bomb_is_refused_before_it_is_unpacked(
    kind: str, reader: str, tmp_path: Path
) -> None:
    path = tmp_path / "bomb.gz"
    bomb(path, kind, 2 << 30)
    assert path.stat().st_size < 16 << 20
    said = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), reader],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    ).stdout
    kilobytes, _, message = said.partition(" ")
    assert "over 100 times its length" in message
    assert int(kilobytes) << 10 < 6 * max(reference._ALWAYS_UNPACKED, 100 * path.stat().st_size)


def test_gzip_data_out_of_proportion_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_ALWAYS_UNPACKED", 1 << 16)
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(b">a\n" + b"A" * (1 << 20) + b"\n"))
    most = max(1 << 16, 100 * path.stat().st_size)
    expected = (
        f"gzip data that unpacks to more than {most:,} bytes, over 100 times its length; no genome "
        "does: if it is one, unpack it first"
    )
    assert verdict(path) == expected
    path.write_bytes(gzip.compress(b"a\t0\t1\n" * (1 << 18)))
    assert verdict(path, read_bed).startswith("gzip data that unpacks to more than")
    path.write_bytes(gzip.compress(b">a\n" + b"ACGTTGCATT" * 6000 + b"\n"))
    assert [contig.base.size for contig in read_contigs(path)] == [60_000]


def test_2bit_records_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """A thousand names for one record: a small file of endless bases."""
    one = twobit([("a", "ACGT" * 1000)])
    offset = struct.unpack_from("<I", one, 18)[0]
    names = [f"{number:04d}".encode() for number in range(1000)]
    moved = 16 + 9 * len(names)
    path = tmp_path / "genome.2bit"
    path.write_bytes(
        struct.pack("<IIII", 0x1A412743, 0, len(names), 0)
        + b"".join(b"\x04" + name + struct.pack("<I", moved) for name in names)
        + one[offset:]
    )
    nbytes = path.stat().st_size
    assert verdict(path) == (
        f"record '{nbytes // 1000:04d}' (number {nbytes // 1000 + 1}): with it, records have more "
        f"bases than the file's {nbytes:,} bytes hold: some lie over each other; the file is "
        "damaged: copy it again"
    )


# -- names -----------------------------------------------------------------------------------------

BAD_NAMES = {
    "escape sequence": (
        b">chr1\x1b[31m\nACGT\n",
        "line 1: 'chr1\\x1b[31m' is no name; expected at most 1,000 printable characters after '>'",
    ),
    "NUL": (
        b">a\nAC\n>chr\0two\nACGT\n",
        "line 3: 'chr\\x00two' is no name; expected at most 1,000 printable characters after '>'",
    ),
    "delete": (
        b">chr\x7f\nACGT\n",
        "line 1: 'chr\\x7f' is no name; expected at most 1,000 printable characters after '>'",
    ),
    "a name of 1,001 characters": (
        b">" + b"x" * 1001 + b"\nACGT\n",
        f"line 1: {'x' * 60!r} is no name; expected at most 1,000 printable characters after '>'",
    ),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("case", BAD_NAMES)
def test_a_record_whose_name_is_none_is_refused(case: str, packing: str, tmp_path: Path) -> None:
    data, expected = BAD_NAMES[case]
    path = tmp_path / "genome"
    path.write_bytes(PACK[packing](data))
    assert verdict(path) == expected


def test_a_name_of_a_thousand_characters_is_read(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(b">" + b"x" * 1000 + b"\nACGT\n")
    assert [len(contig.name) for contig in read_contigs(path)] == [1000]


# -- what each kind of file has --------------------------------------------------------------------


def test_the_tables_of_verdicts_are_as_long_as_is_told() -> None:
    """Each case of FASTA is refused plain, gzipped and bgzipped alike."""
    assert len(BAD_FASTA) + len(BAD_NAMES) >= 30
    assert len(BAD_TWOBIT) >= 14
    assert len(BAD_BED) >= 9
    assert len(PACK) == 3


def regions_of(path: Path, bed: bytes, key: str) -> Callable[[], object]:
    (path / "genome.fa").write_bytes(FASTA)
    (path / "regions.bed").write_bytes(bed)
    genome = Genome.model_validate(
        {"name": "g", "path": path / "genome.fa", key: str(path / "regions.bed")}
    )

    def use() -> object:
        read = corpus.read_reference(genome, report=silent)
        return corpus.survey_windows([read], Windows(bases=60, stride=60)).windows

    return use


BAD_REGIONS = {
    "a contig the genome lacks": (
        b"chrA\t0\t600\ttrain\n",
        "no region lies on a contig of the genome; it names 'chrA', the genome has 'a', 'b'",
    ),
    "a split beyond the end": (b"b\t0\t801\ttrain\n", "801"),
    "two splits on one base": (b"a\t0\t600\ttrain\na\t599\t900\ttest\n", "train.*test"),
    "a split that is a path": (b"a\t0\t600\t../x\n", "'../x' for a split"),
    "a split that steers": (b"a\t0\t600\tx\x1b[2J\n", r"for a split; expected a name of lower"),
    "counted from 1, one base": (b"a\t1\t1\ttrain\n", "covers no base; expected an end greater"),
    "columns of a GFF": (b"a\thavana\tgene\t1\t600\n" * 2, "'havana' is no coordinate"),
}


@pytest.mark.parametrize("case", BAD_REGIONS)
def test_a_bed_that_does_not_fit_its_genome_is_refused(case: str, tmp_path: Path) -> None:
    bed, expected = BAD_REGIONS[case]
    with pytest.raises(InputError, match=expected):
        regions_of(tmp_path, bed, "splits")()


def test_tracks_and_comments_in_a_bed_are_passed_over(tmp_path: Path) -> None:
    assert regions_of(tmp_path, BED, "include")() == {"train": 15}


def test_every_bad_file_ends_in_one_line_and_no_traceback(tmp_path: Path) -> None:
    """Each verdict is one printable line: nothing of a file's bytes reaches the terminal raw."""

    def said() -> Iterator[str]:
        for data, _ in (*BAD_FASTA.values(), *BAD_NAMES.values(), *BAD_TWOBIT.values()):
            path = tmp_path / "file"
            path.write_bytes(data)
            yield verdict(path)
        for data, _ in BAD_BED.values():
            path.write_bytes(data)
            yield verdict(path, read_bed)

    found = list(said())
    assert all(text.isprintable() for text in found)
    assert len(found) >= 57


def test_a_sound_genome_is_not_suspected(tmp_path: Path) -> None:
    path = tmp_path / "genome"
    for pack in (PACK["plain"], PACK["gzip"], bgzip):
        path.write_bytes(pack(FASTA))
        contigs: list[Contig] = list(read_contigs(path))
        assert [(contig.name, contig.base.size) for contig in contigs] == [("a", 2400), ("b", 800)]
    assert stat.S_ISREG(path.stat().st_mode)
