"""benchmarks/fidelity.py: what its figures are made of, against plain NumPy."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_cache import build_cache

from had_pipe.cache import Cache
from had_pipe.dna.kmers import reverse_complement
from had_pipe.dna.reference import read_contigs

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield import_module("fidelity")
    for name in ("fidelity", "measuring"):
        sys.modules.pop(name, None)


def windows_of(cache: Cache, split: str, windows: int) -> tuple[Any, Any]:
    """Visible k-mers' one-hot first bases and a one; vectors, channels normalised."""
    block = cache.allocate(windows)
    cache.read(split, 0, np.arange(windows), block)
    vector = cache.codec.decode(block.value, block.scale, cache.mean, cache.std)
    turned = reverse_complement(block.kmer_id)
    kmer = np.where(block.reversed[:, None], turned, block.kmer_id)[~block.mask]
    feature = np.concatenate([np.eye(4)[kmer >> 10], np.ones((len(kmer), 1))], axis=1)
    normalised = (vector.reshape(len(kmer), -1).astype(np.float64) - cache.mean) / cache.std
    return feature, normalised


def test_a_codecs_linear_error_is_that_of_least_squares_held_against_exact_vectors(
    tmp_path: Path, fidelity: Any
) -> None:
    caches = {
        name: Cache.open(build_cache(tmp_path / name, codec=name))  # type: ignore[arg-type]
        for name in ("exact", "int8", "tiny")
    }

    def first_base(batch: Any) -> Any:
        kmer = batch.kmer_id[~batch.mask]
        one = torch.ones(len(kmer), 1, dtype=torch.float64)
        return torch.cat((torch.eye(4, dtype=torch.float64)[kmer >> 10], one), dim=1)

    found = fidelity.linear_errors(first_base, caches, windows=96, held_out=32, device="cpu")
    feature, truth = windows_of(caches["exact"], "valid", 32)
    for name, cache in caches.items():
        known, target = windows_of(cache, "train", 96)
        solved, *_ = np.linalg.lstsq(known, target, rcond=None)
        expected = ((feature @ solved - truth) ** 2).mean()
        assert found[name] == pytest.approx(expected, rel=1e-4)
    assert found["tiny"] != found["exact"]


def test_blocks_are_drawn_once_and_hold_nothing_but_bases(tmp_path: Path, fidelity: Any) -> None:
    length = fidelity.BLOCK * fidelity.BASES
    base = np.random.default_rng(0).choice(list(b"ACGT"), 80 * length).astype(np.uint8)
    base[5 * length + 7] = ord("N")
    genome, bed = tmp_path / "g.fa", tmp_path / "b.bed"
    genome.write_bytes(b">one\n" + base.tobytes() + b"\n")
    fidelity.deal(genome, fidelity.QUICK, bed)
    rows = [line.split("\t") for line in bed.read_text().splitlines()]
    starts = [int(row[1]) for row in rows]
    assert len(set(starts)) == len(starts)
    (contig,) = read_contigs(genome)
    for _, start, end, _ in rows:
        assert (int(start) % length, int(end) - int(start)) == (0, length)
        assert (contig.base[int(start) : int(end)] < 4).all()
    assert {row[3] for row in rows} == {"train", "valid"}
    windows = sum(row[3] == "valid" for row in rows) * fidelity.BLOCK
    assert windows == fidelity.QUICK.held_out


def test_a_genome_too_short_is_refused(tmp_path: Path, fidelity: Any) -> None:
    genome = tmp_path / "g.fa"
    genome.write_bytes(b">one\n" + b"ACGT" * 10_000 + b"\n")
    with pytest.raises(SystemExit, match="give a longer genome"):
        fidelity.deal(genome, fidelity.QUICK, tmp_path / "b.bed")
