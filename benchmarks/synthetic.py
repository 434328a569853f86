"""Caches of random numbers, in the shape that NT-v2-500M makes of 1,020-base windows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from had_pipe.cache import integrity, writer
from had_pipe.cache.codec import Statistics
from had_pipe.dna import kmers as dna

KMERS, MASKED, CHANNELS = 170, 26, 1024
VISIBLE = KMERS - MASKED


def build(
    folder: Path,
    *,
    windows: int,
    part: int,
    kmers: int = KMERS,
    masked: int = MASKED,
    channels: int = CHANNELS,
    seed: int = 0,
) -> Path:
    """A sealed cache of random numbers, by default of the real shape."""
    visible = kmers - masked
    rng = np.random.default_rng(seed)
    kmer_id = rng.integers(0, dna.KMERS, (windows, kmers), dtype=np.uint16)
    settings: dict[str, Any] = {"seed": seed, "view": 0, "first": 0, "windows": windows}
    mask = dna.group_masks(**settings, kmers=kmers, masked=masked)
    index = np.arange(windows)
    zeros = np.zeros(windows, dtype=np.int32)
    table = writer.WindowTable(
        genome=zeros,
        contig=zeros,
        contigs=["random"],
        start=index * kmers * dna.K,
        soft_masked_bases=zeros,
        index=index,
    )
    described = {
        "format": "had-cache/1",
        "genomes": [
            {
                "name": "random",
                "digest": "0" * 32,
                "contigs": 1,
                "bases": windows * kmers * dna.K,
                "splits": None,
                "include": None,
                "exclude": None,
                "sensitive": False,
            }
        ],
        "windows": {
            "bases": kmers * dna.K,
            "stride": kmers * dna.K,
            "kmers": kmers,
            "masked": masked,
            "mask_ratio": 0.15,
            "stored": visible,
            "store": "visible",
            "views": 1,
            "reverse_complement": 0.5,
            "seed": seed,
            "algorithm": 1,
        },
        "part": part,
        "teacher": {
            "name": "random numbers",
            "revision": None,
            "weights_sha256": "0" * 64,
            "layer": -1,
            "input": "masked",
            "channels": channels,
            "dtype": "float32",
            "licence": "CC0-1.0",
        },
        "codec": "int8",
        "licence": "CC0-1.0",
        "licence_reason": None,
    }
    plan = writer.create(
        folder,
        described=described,
        splits={
            "train": writer.SplitData(
                table=table,
                kmer_id=kmer_id,
                mask={0: mask},
                reversed={0: dna.strand_flips(**settings, probability=0.5)},
            )
        },
        statistics=Statistics(
            mean=rng.normal(size=channels).astype(np.float32),
            std=rng.uniform(0.5, 2, size=channels).astype(np.float32),
        ),
        fidelity={},
    )
    for place in plan.parts():
        rows = plan.part_windows(place)
        shape = (rows, visible, channels)
        with writer.PartWriter(folder, plan, place, numerics={"device": "none"}) as opened:
            opened.append(
                rng.integers(-127, 128, shape, dtype=np.int8),
                rng.uniform(0.005, 0.02, shape[:2]).astype(np.float16),
            )
            opened.sync()
            opened.commit()
    integrity.seal(folder)
    return folder
