"""Genomes: what is read, what is refused and how, and the names they get."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
import struct
import sys
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from had_pipe.dna.reference import OTHER, Contig, collection_digest, read_contigs
from had_pipe.errors import InputError

pytest.importorskip("dnaio", reason="stage one is not installed: pip install 'had-pipe[extract]'")
pytest.importorskip("gtars", reason="stage one is not installed: pip install 'had-pipe[extract]'")
pytest.importorskip("py2bit", reason="stage one is not installed: pip install 'had-pipe[extract]'")

BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")

# -- writers, by the formats' descriptions ---------------------------------------------------------


def bgzip(data: bytes, *, block: int = 1000) -> bytes:
    """BGZF: gzip members that know their own size, and an empty one at the end."""
    out = b""
    for at in range(0, len(data), block):
        piece = data[at : at + block]
        packer = zlib.compressobj(wbits=-15)
        packed = packer.compress(piece) + packer.flush()
        out += b"\x1f\x8b\x08\x04\0\0\0\0\0\xff\x06\0BC\x02\0"
        out += struct.pack("<H", len(packed) + 25) + packed
        out += struct.pack("<II", zlib.crc32(piece), len(piece))
    return out + BGZIP_END


def blocks_of(flags: list[bool]) -> list[tuple[int, int]]:
    """(start, size) of the runs of True."""
    runs: list[tuple[int, int]] = []
    for at, flag in enumerate(flags):
        if flag and runs and sum(runs[-1]) == at:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        elif flag:
            runs.append((at, 1))
    return runs


def twobit(records: list[tuple[str, str]]) -> bytes:
    """A 2bit file of letters A, C, G, T, N in either case."""
    at = 16 + sum(5 + len(name) for name, _ in records)
    index, body = b"", b""
    for name, text in records:
        index += struct.pack("<B", len(name)) + name.encode() + struct.pack("<I", at + len(body))
        body += struct.pack("<I", len(text))
        for runs in (
            blocks_of([letter in "nN" for letter in text]),
            blocks_of([letter.islower() for letter in text]),
        ):
            body += struct.pack("<I", len(runs))
            body += b"".join(struct.pack("<I", start) for start, _ in runs)
            body += b"".join(struct.pack("<I", size) for _, size in runs)
        body += struct.pack("<I", 0)
        two = ["TCAGN".index(letter.upper()) % 4 for letter in text]
        two += [0] * (-len(two) % 4)
        body += bytes(
            a << 6 | b << 4 | c << 2 | d
            for a, b, c, d in zip(*(two[i::4] for i in range(4)), strict=True)
        )
    return struct.pack("<IIII", 0x1A412743, 0, len(records), 0) + index + body


def sha512t24u(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha512(data).digest()[:24]).decode()


def check_against_letters(contig: Contig, name: str, text: str) -> None:
    upper = text.upper()
    assert contig.name == name
    assert contig.base.dtype == np.uint8
    assert contig.base.tolist() == ["ACGT".find(c) if c in "ACGT" else OTHER for c in upper]
    assert contig.soft_masked.tolist() == [c in "acgt" for c in text]
    assert contig.digest == "SQ." + sha512t24u(upper.encode())
    assert contig.other == {c: n for c, n in Counter(upper).items() if c not in "ACGT"}


PACK: dict[str, Callable[[bytes], bytes]] = {
    "plain": lambda data: data,
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bgzip": bgzip,
}


# -- what is read ----------------------------------------------------------------------------------

GOOD = {
    "one line": (b">a\nACGT\n", [("a", "ACGT")]),
    "several records and lines": (
        b">a first\nAC\nGT\nA\n>b\tsecond\nTTTT\n",
        [("a", "ACGTA"), ("b", "TTTT")],
    ),
    "CRLF": (b">a\r\nACGT\r\nAC\r\n>b\r\nGG\r\n", [("a", "ACGTAC"), ("b", "GG")]),
    "old Mac line ends": (b">a\rACGT\rAC\r>b\rGG\r", [("a", "ACGTAC"), ("b", "GG")]),
    "no final newline": (b">a\nACGT\n>b\nGGT", [("a", "ACGT"), ("b", "GGT")]),
    "ragged lines": (b">a\nACGTAC\nA\nCGTACGTACGT\n", [("a", "ACGTACACGTACGTACGT")]),
    "blank lines": (b"\n>a\n\nACGT\n\n\n>b\nGG\n\n\n", [("a", "ACGT"), ("b", "GG")]),
    "lower case": (b">a\nACgtACgt\n", [("a", "ACgtACgt")]),
    "every IUPAC code": (
        b">a\nACGTNRYSWKMBDHVacgtnryswkmbdhv\n",
        [("a", "ACGTNRYSWKMBDHVacgtnryswkmbdhv")],
    ),
    "N only": (b">a\nNNnn\n", [("a", "NNnn")]),
    "names with signs": (
        b">gi|9626243|ref|NC_001416.1| lambda\nAC\n>b1|chr22:5-7:+\nGT\n",
        [("gi|9626243|ref|NC_001416.1|", "AC"), ("b1|chr22:5-7:+", "GT")],
    ),
    "a space after the mark": (b"> a b\nAC\n", [("a", "AC")]),
    "comments": (b"# made by hand\n>a\nAC\n#GG\nGT\n", [("a", "ACGT")]),
    "names that differ in case": (b">a\nAC\n>A\nGT\n", [("a", "AC"), ("A", "GT")]),
}


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("case", GOOD)
def test_a_sound_fasta_is_read_letter_by_letter(tmp_path: Path, case: str, packing: str) -> None:
    data, expected = GOOD[case]
    path = tmp_path / "genome"  # no suffix: the kind is told by content
    path.write_bytes(PACK[packing](data))
    contigs = list(read_contigs(path))
    assert len(contigs) == len(expected)
    for contig, (name, text) in zip(contigs, expected, strict=True):
        check_against_letters(contig, name, text)


def test_gzip_members_one_after_the_other_are_one_file(tmp_path: Path) -> None:
    path = tmp_path / "two.fa.gz"
    path.write_bytes(gzip.compress(b">a\nAC\n") + gzip.compress(b"GT\n>b\nTT\n"))
    assert [(c.name, c.base.size) for c in read_contigs(path)] == [("a", 4), ("b", 2)]


def test_a_bgzip_file_of_many_blocks_is_read_across_them(tmp_path: Path) -> None:
    text = "".join("ACGT"[n * n % 4] for n in range(5_000))
    path = tmp_path / "long.fa"
    path.write_bytes(bgzip(b">a\n" + text.encode() + b"\n", block=777))
    (contig,) = read_contigs(path)
    check_against_letters(contig, "a", text)


letters = st.text("ACGTNacgtn", min_size=1, max_size=60)
names = st.text("abcXYZ019_.|:-", min_size=1, max_size=12)
genomes = st.lists(st.tuples(names, letters), min_size=1, max_size=4, unique_by=lambda r: r[0])
each_example_writes_its_own_file = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None
)


@each_example_writes_its_own_file
@given(genome=genomes, width=st.integers(1, 70))
def test_fasta_and_2bit_of_one_genome_are_the_same(
    tmp_path: Path, genome: list[tuple[str, str]], width: int
) -> None:
    fasta, two = tmp_path / "genome.fa", tmp_path / "genome.2bit"
    fasta.write_text(
        "".join(
            f">{name} text\n"
            + "".join(text[i : i + width] + "\n" for i in range(0, len(text), width))
            for name, text in genome
        )
    )
    two.write_bytes(twobit(genome))
    for path in (fasta, two):
        contigs = list(read_contigs(path))
        assert [contig.name for contig in contigs] == [name for name, _ in genome]
        for contig, (name, text) in zip(contigs, genome, strict=True):
            check_against_letters(contig, name, text)


def test_a_2bit_reader_of_others_gives_the_same_letters(
    shared: Callable[[str], Path],
) -> None:
    twobitreader = pytest.importorskip("twobitreader", reason="the second 2bit reader is not here")
    path = shared("genomes/human_chrM_rCRS.2bit")
    other = twobitreader.TwoBitFile(str(path))  # kept alive: it closes its file when dropped
    (contig,) = read_contigs(path)
    check_against_letters(contig, "chrM", str(other["chrM"]))
    other.close()


def test_known_genomes_have_their_known_lengths_and_case(shared: Callable[[str], Path]) -> None:
    (ecoli,) = read_contigs(shared("genomes/ecoli_K12_MG1655.2bit"))
    assert (ecoli.name, ecoli.base.size, ecoli.other) == ("K-12-MG1655", 4_639_675, {})
    assert not ecoli.soft_masked.any()
    (chrm,) = read_contigs(shared("genomes/human_chrM_rCRS.2bit"))
    assert (chrm.base.size, chrm.other) == (16_569, {"N": 1})
    (phage,) = read_contigs(shared("genomes/lambda_phage.2bit"))
    assert (phage.name, phage.base.size) == ("gi|9626243|ref|NC_001416.1|", 48_502)
    yeast = list(read_contigs(shared("genomes/yeast_R64-1-1.2bit")))
    assert len(yeast) == 17
    assert sum(contig.base.size for contig in yeast) == 12_157_105


@pytest.mark.slow
def test_human_chromosomes_have_their_known_lengths_and_case(
    shared: Callable[[str], Path],
) -> None:
    (chr21,) = read_contigs(shared("genomes/human_hg19_chr21.2bit"))
    assert chr21.base.size == 48_129_895
    assert chr21.other == {"N": 48_129_895 - 35_106_642}
    assert int(chr21.soft_masked.sum()) == 16_810_167 - 50  # the others are n
    blocks = list(read_contigs(shared("genomes/human_hg19_chr22_epo_blocks.2bit")))
    assert len(blocks) == 9_627
    assert sum(int(block.soft_masked.sum()) for block in blocks) == 9_987_657 - 14


# -- digests ---------------------------------------------------------------------------------------


def test_digests_are_those_of_the_specifications(tmp_path: Path) -> None:
    """GA4GH refget 2.0 and sequence collections 1.0: their own worked examples."""
    path = tmp_path / "base.fa"
    path.write_text(">chrX\nTTGGGGAA\n>chr1\nGGAA\n>chr2\nGCGC\n>x\nACGT\n")
    *base, x = read_contigs(path)
    assert x.digest == "SQ.aKF498dAxcJAqme6QYQ7EZ07-fiw8Kw2"
    assert [contig.digest for contig in base] == [
        "SQ.iYtREV555dUFKg2_agSJW6suquUyPpMw",
        "SQ.YBbVX0dLKG1ieEDCiMmkrTZFt_Z5Vdaj",
        "SQ.AcLxtBuKEPk_7PGE_H4dGElwZHCujwH6",
    ]
    collection = [(contig.name, contig.base.size, contig.digest) for contig in base]
    assert collection_digest(collection) == "XZlrcEGi6mlopZ2uD8ObHkQB1d0oDwKk"


def test_a_collection_is_its_names_and_sequences_in_order() -> None:
    def by_hand(contigs: list[tuple[str, int, str]]) -> str:
        level_1 = {
            "names": sha512t24u(
                json.dumps([n for n, _, _ in contigs], separators=(",", ":")).encode()
            ),
            "sequences": sha512t24u(
                json.dumps([d for _, _, d in contigs], separators=(",", ":")).encode()
            ),
        }
        return sha512t24u(json.dumps(level_1, separators=(",", ":"), sort_keys=True).encode())

    contigs = [("chr1", 4, "SQ.a"), ("chr2", 8, "SQ.b")]
    assert collection_digest(contigs) == by_hand(contigs)
    assert collection_digest(contigs[::-1]) == by_hand(contigs[::-1]) != by_hand(contigs)
    assert collection_digest([("1", 4, "SQ.a"), ("2", 8, "SQ.b")]) != by_hand(contigs)


def test_the_digest_ignores_case(tmp_path: Path) -> None:
    path = tmp_path / "case.fa"
    path.write_text(">a\nACGTN\n>b\nacgtn\n")
    a, b = read_contigs(path)
    assert a.digest == b.digest


# -- what is refused -------------------------------------------------------------------------------

# Contents, and the whole message after the file's name.
BAD_FASTA = {
    "empty file": (b"", "holds no record; expected at least one line that starts with '>'"),
    "blank file": (b"\n\n", "holds no record; expected at least one line that starts with '>'"),
    "comments only": (b"#a\n", "holds no record; expected at least one line that starts with '>'"),
    "duplicate names": (
        b">a\nAC\n>b\nAC\n>a again\nGT\n",
        "record 'a', line 5: the name is already that of the record on line 1; "
        "every record needs its own name (the first word after '>')",
    ),
    "empty record between": (
        b">a\nAC\n>b text\n>c\nGT\n",
        "record 'b', line 3: no sequence follows the header '>b text'; "
        "remove the record, or get the file again if it should have one",
    ),
    "empty record at the end": (
        b">a\nAC\n\n>b\n\n",
        "record 'b', line 4: no sequence follows the header '>b'; "
        "remove the record, or get the file again if it should have one",
    ),
    "header without a name": (
        b">a\nAC\n>\nGT\n",
        "line 3: header without a name; expected '>' and a name",
    ),
    "sequence before the first header": (
        b"ACGT\n>a\nAC\n",
        "line 1: starts with 'ACGT'; expected '>' and a name: this is neither FASTA nor 2bit",
    ),
    "FASTQ": (
        b"@r1\nACGT\n+\nIIII\n",
        "line 1: starts with '@', as FASTQ reads do; expected '>': a genome is needed, not reads",
    ),
    "protein": (
        b">p\nMKVA\nMEEPQSD\n",
        "record 'p', line 3, column 2: 'E' is no nucleotide; expected A, C, G, T or an IUPAC code "
        "(N R Y S W K M B D H V): is this a protein?",
    ),
    "stop sign": (
        b">p\nACG*\n",
        "record 'p', line 2, column 4: '*' is no nucleotide; expected A, C, G, T or an IUPAC code "
        "(N R Y S W K M B D H V): is this a protein?",
    ),
    "X for masked": (
        b">a\nACXXG\n",
        "record 'a', line 2, column 3: 'X' is no nucleotide; expected A, C, G, T or an IUPAC code "
        "(N R Y S W K M B D H V): is this a protein?",
    ),
    "gap": (
        b">a\nAC\n>b\nAC-GT\n",
        "record 'b', line 4, column 3: '-': a gap, as alignments have; "
        "expected a genome without gaps",
    ),
    "dot": (
        b">a\nAC.GT\n",
        "record 'a', line 2, column 3: '.': a gap, as alignments have; "
        "expected a genome without gaps",
    ),
    "RNA": (
        b">r\nACGU\n",
        "record 'r', line 2, column 4: 'U': this is RNA; expected DNA: replace U by T",
    ),
    "RNA in lower case": (
        b">r\nacgu\n",
        "record 'r', line 2, column 4: 'U': this is RNA; expected DNA: replace U by T",
    ),
    "NUL": (
        b">a\nAC\nAC\0GT\n",
        "record 'a', line 3, column 3: a NUL byte in the sequence; "
        "the file is damaged: copy it again",
    ),
    "space inside a line": (
        b">a\nAC GT\n",
        "record 'a', line 2, column 3: a space inside a line of sequence; "
        "remove it, or copy the file again",
    ),
    "tab inside a line": (
        b">a\nACG\tT\n",
        "record 'a', line 2, column 4: a space inside a line of sequence; "
        "remove it, or copy the file again",
    ),
    "numbers": (
        b">a\n61 ACGT\n",
        "record 'a', line 2, column 1: '6' is no nucleotide; expected A, C, G, T or an IUPAC code",
    ),
    "header inside a line": (
        b">a\nACGT>b\nGG\n",
        "record 'a', line 2, column 5: '>' is no nucleotide; expected A, C, G, T or an IUPAC code",
    ),
    "FASTQ after FASTA": (
        b">a\nACGT\n@r1\nACGT\n",
        "record 'a', line 3, column 1: '@' is no nucleotide; expected A, C, G, T or an IUPAC code",
    ),
    "old comment": (
        b">a\nACGT\n;text\nACGT\n",
        "record 'a', line 3, column 1: ';' is no nucleotide; expected A, C, G, T or an IUPAC code",
    ),
    "UTF-8 byte order mark": (
        b"\xef\xbb\xbf>a\nACGT\n",
        "line 1: starts with a byte order mark; expected '>': save the file as plain ASCII text",
    ),
    "UTF-16": (
        ">a\nACGT\n".encode("utf-16"),
        "line 1: starts with a byte order mark; expected '>': save the file as plain ASCII text",
    ),
    "letters beyond ASCII": (
        b">a\nACGT\n>b\nAC\xc3\xa9T\n",
        "record number 2, line 4: byte 0xc3 is not ASCII; expected plain ASCII text",
    ),
    "bytes that are no text": (
        b">a\nACGT\n>b\nAC\xff\xfe\n",
        "record number 2, line 4: byte 0xff is not ASCII; expected plain ASCII text",
    ),
    "name beyond ASCII": (
        ">a\nACGT\n>é\nAC\n".encode(),
        "record number 2, line 3: byte 0xc3 is not ASCII; expected plain ASCII text",
    ),
    "picture": (
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        "line 1: starts with '\\x89PNG'; expected '>' and a name: this is neither FASTA nor 2bit",
    ),
    "GenBank": (
        b"LOCUS       NC_001416  48502 bp\nORIGIN\n 1 acgt\n//\n",
        "line 1: starts with 'LOCUS       NC_00141'; expected '>' and a name: "
        "this is neither FASTA nor 2bit",
    ),
    "GFF": (
        b"##gff-version 3\nchr1\t.\tgene\n",
        "line 2: starts with 'chr1\\t.\\tgene'; expected '>' and a name: "
        "this is neither FASTA nor 2bit",
    ),
    "web page": (
        b"<!DOCTYPE html>\n<html>",
        "line 1: starts with '<!DOCTYPE html>'; expected '>' and a name: "
        "this is neither FASTA nor 2bit",
    ),
    "BAM": (
        b"BAM\1\0\0\0\0",
        "line 1: starts with 'BAM\\x01\\x00\\x00\\x00\\x00'; expected '>' and a name: "
        "this is neither FASTA nor 2bit",
    ),
}


def refusal(path: Path) -> str:
    """The message with which a file is refused, less the file's name."""
    with pytest.raises(InputError) as caught:
        list(read_contigs(path))
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("packing", PACK)
@pytest.mark.parametrize("case", BAD_FASTA)
def test_a_bad_fasta_is_refused_by_file_record_and_line(
    tmp_path: Path, case: str, packing: str
) -> None:
    data, expected = BAD_FASTA[case]
    path = tmp_path / "genome.fa"
    path.write_bytes(PACK[packing](data))
    assert refusal(path) == expected


def test_sound_contigs_before_a_bad_one_are_given(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(b">a\nACGT\n>b\nAC!\n")
    contigs = read_contigs(path)
    assert next(contigs).name == "a"
    with pytest.raises(InputError, match=r"record 'b', line 4, column 3: '!'"):
        next(contigs)


def test_a_gzip_file_cut_anywhere_is_refused(tmp_path: Path) -> None:
    text = "".join("ACGT"[n * n * n % 7 % 4] for n in range(4_000))
    whole = gzip.compress(b">a\n" + text.encode() + b"\n", mtime=0)
    path = tmp_path / "genome.fa.gz"
    for nbytes in (3, 10, 20, len(whole) * 2 // 3, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:nbytes])
        assert re.fullmatch(
            r"gzip data that is cut or damaged \(.+\): copy the file again", refusal(path)
        )


def test_a_gzip_file_with_a_flipped_bit_is_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b">a\n" + b"ACGTTGCA" * 50 + b"\n", mtime=0)
    path = tmp_path / "genome.fa.gz"
    for at in range(10, len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        refusal(path)


def test_a_gzip_file_with_a_tail_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa.gz"
    path.write_bytes(gzip.compress(b">a\nACGT\n") + b">b\nACGT\n")
    assert "gzip data that is cut or damaged" in refusal(path)


def test_a_bgzip_file_without_its_last_block_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genome.fa.gz"
    whole = bgzip(b">a\n" + b"ACGTTGCA" * 500 + b"\n")
    for lost in (28, 27, 1, 40, len(whole) // 3):
        path.write_bytes(whole[: len(whole) - lost])
        assert refusal(path) == (
            "bgzip file without its end-of-file block; the file was probably cut while it was "
            "copied: copy it again"
        )


@pytest.mark.parametrize(
    ("magic", "kind"),
    [
        (b"BZh91AY", "bzip2"),
        (b"\xfd7zXZ\0", "xz"),
        (b"\x28\xb5\x2f\xfd", "zstd"),
        (b"PK\3\4", "zip"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_packings_are_refused_by_name(tmp_path: Path, magic: bytes, kind: str) -> None:
    path = tmp_path / "genome.fa"
    path.write_bytes(magic + bytes(40))
    assert refusal(path) == (
        f"{kind} file; expected FASTA (plain, gzip, bgzip) or 2bit: convert it first"
    )


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "none.fa") == "no such file; expected a FASTA or 2bit file"
    assert refusal(tmp_path) == "is a folder; expected a FASTA or 2bit file"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert refusal(pipe) == "is not a regular file; write the genome to a file first"


SOUND = twobit([("chr1", "ACGTNNnacgtACGTA"), ("chr2", "GGGGTTTTA")])
CUT = "it was probably cut while it was copied: copy it again"


def with_word(at: int, value: int) -> bytes:
    """The sound 2bit file with another 32-bit word at one place."""
    return SOUND[:at] + struct.pack("<I", value) + SOUND[at + 4 :]


CHR1 = struct.unpack_from("<I", SOUND, 21)[0]
BAD_TWOBIT = {
    "big-endian": (
        SOUND[3::-1] + SOUND[4:],
        "2bit file written on a big-endian machine; expected little-endian: "
        "make it again with faToTwoBit",
    ),
    "version 1": (with_word(4, 1), "2bit version 1; expected 0: make it again without -long"),
    "no record": (twobit([]), "2bit file without a record; expected at least one"),
    "signature only": (SOUND[:4], f"2bit data reaches byte 16, but the file ends at 4; {CUT}"),
    "cut in the index": (SOUND[:20], f"2bit data reaches byte 21, but the file ends at 20; {CUT}"),
    "more records than there are": (
        with_word(8, 9),
        f"record number 3: {SOUND[CHR1 + 1 : CHR1 + 17].decode()!r} is no name; "
        "the file is damaged: copy it again",
    ),
    "offset beyond the file": (
        with_word(21, 10_000),
        f"record 'chr1': 2bit data reaches byte 10004, but the file ends at {len(SOUND)}; {CUT}",
    ),
    "length beyond the file": (
        with_word(CHR1, 10_000),
        f"record 'chr1': 2bit data reaches byte {CHR1 + 32 + 2500}, but the file ends at "
        f"{len(SOUND)}; {CUT}",
    ),
    "block count beyond the file": (
        with_word(CHR1 + 4, 2**31),
        f"record 'chr1': 2bit data reaches byte {CHR1 + 8 + 2**34}, but the file ends at "
        f"{len(SOUND)}; {CUT}",
    ),
    "N block beyond the record": (
        with_word(CHR1 + 12, 500),
        "record 'chr1': a block of N bases ends beyond the record's 16 bases; "
        "the file is damaged: copy it again",
    ),
    "mask block beyond the record": (
        with_word(CHR1 + 24, 500),
        "record 'chr1': a block of soft-masked bases ends beyond the record's 16 bases; "
        "the file is damaged: copy it again",
    ),
    "duplicate names": (
        twobit([("a", "ACGT"), ("a", "GGGG")]),
        "record 'a' (number 2): the name occurs twice; every record needs its own name",
    ),
    "empty record": (
        twobit([("a", "ACGT"), ("b", "")]),
        "record 'b': no sequence; remove the record, or get the file again if it should have one",
    ),
    "last byte lost": (
        SOUND[:-1],
        f"record 'chr2': 2bit data reaches byte {len(SOUND)}, but the file ends at "
        f"{len(SOUND) - 1}; {CUT}",
    ),
}


@pytest.mark.parametrize("case", BAD_TWOBIT)
def test_a_bad_2bit_is_refused_by_file_and_record(tmp_path: Path, case: str) -> None:
    data, expected = BAD_TWOBIT[case]
    path = tmp_path / "genome.2bit"
    path.write_bytes(data)
    assert refusal(path) == expected


def test_a_2bit_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "genome.2bit"
    for nbytes in range(4, len(SOUND)):
        path.write_bytes(SOUND[:nbytes])
        assert refusal(path).endswith(CUT)


def test_without_stage_one_installed_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "genome.fa"
    path.write_text(">a\nACGT\n")
    for package, module in (("dnaio", "dnaio"), ("gtars", "gtars.refget")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(
                InputError,
                match=rf"need the package '{package}'.*pip install 'had-pipe\[extract\]'",
            ):
                list(read_contigs(path))
