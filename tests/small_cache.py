"""Small caches for tests: real ones, by the real writer, of invented embeddings.

A group's embedding is a fixed linear map of how many A, C, G and T it has, plus half of that of the
group before it: what a student of bases with some context can learn, and a k-mer table cannot.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from had_pipe.cache import Codec, Statistics, integrity, writer
from had_pipe.cache.codec import CodecName
from had_pipe.dna import kmers as dna


def build_cache(
    folder: Path,
    *,
    windows: int = 96,
    valid: int = 32,
    kmers: int = 12,
    channels: int = 16,
    part: int = 32,
    views: int = 1,
    seed: int = 0,
    statistics_seed: int = 0,
    codec: CodecName = "int8",
    store: Literal["visible", "masked", "all"] = "visible",
    spoilt: int | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    parts: int | None = None,
    licence: str = "CC-BY-NC-SA-4.0",
    soft_masked: bool = False,
) -> Path:
    """A sealed cache of random windows; two of equal shape have one teacher, whatever their seed.

    `spoilt` is a training window whose embeddings are NaN; no writer of ours would let it pass.
    With `parts`, only so many parts are made and the cache is left unsealed. `soft_masked` windows
    have every share of lower case from none to all.
    """
    map_4D = np.random.default_rng(0).normal(size=(4, channels)).astype(np.float32)
    masked = dna.masked_groups(0.15, kmers)
    stored = {"visible": kmers - masked, "masked": masked, "all": kmers}[store]
    rng = np.random.default_rng([seed, 1])
    splits: dict[str, writer.SplitData] = {}
    for split, count, seen in (("train", windows, range(views)), ("valid", valid, range(1))):
        if not count:
            continue
        first = windows if split == "valid" else 0
        index = np.arange(first, first + count)
        zeros = np.zeros(count, dtype=np.int32)
        splits[split] = writer.SplitData(
            table=writer.WindowTable(
                genome=zeros,
                contig=zeros,
                contigs=["one"],
                start=index * kmers * dna.K,
                soft_masked_bases=(
                    (index % 5 * kmers * dna.K // 4).astype(np.int32) if soft_masked else zeros
                ),
                index=index,
            ),
            kmer_id=rng.integers(0, dna.KMERS, (count, kmers), dtype=np.uint16),
            mask={
                view: dna.group_masks(
                    seed=seed, view=view, first=first, windows=count, kmers=kmers, masked=masked
                )
                for view in seen
            },
            reversed={
                view: dna.strand_flips(
                    seed=seed, view=view, first=first, windows=count, probability=0.5
                )
                for view in seen
            },
        )
    calibration = np.random.default_rng([statistics_seed, 2]).normal(size=(500, channels))
    statistics = Statistics.of(calibration * 2)
    encoder = Codec.fit(codec, dtype, statistics, (calibration * 2)[None])
    plan = writer.create(
        folder,
        described={
            "format": "had-cache/1",
            "genomes": [
                {
                    "name": f"random-{seed}",
                    "digest": f"SQ.random-{seed}",
                    "contigs": 1,
                    "bases": (windows + valid) * kmers * dna.K,
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
                "stored": stored,
                "store": store,
                "views": views,
                "reverse_complement": 0.5,
                "seed": seed,
                "algorithm": 1,
            },
            "part": part,
            "teacher": {
                "name": "invented/teacher",
                "revision": None,
                "weights_sha256": "7" * 64,
                "layer": -1,
                "input": "full",
                "channels": channels,
                "dtype": dtype,
                "licence": licence,
            },
            "codec": codec,
            "licence": licence,
            "licence_reason": None,
        },
        splits=splits,
        statistics=statistics,
        fidelity={"relative": 0.0},
        codebook=encoder.codebook,
    )
    for place in islice(plan.parts(), parts):
        data = splits[place.split]
        rows = slice(place.number * part, place.number * part + plan.part_windows(place))
        ids, turned = data.kmer_id[rows], data.reversed[place.view][rows]
        mask = data.mask[place.view][rows]
        ids = np.where(turned[:, None], dna.reverse_complement(ids), ids)
        base = dna.decode_kmers(ids).reshape(*ids.shape, dna.K)
        count_WT4 = np.stack([(base == b).sum(-1) for b in range(4)], axis=-1).astype(np.float32)
        emb = count_WT4 @ map_4D
        emb[:, 1:] += 0.5 * emb[:, :-1]
        if spoilt is not None and place.split == "train" and spoilt in range(windows)[rows]:
            emb[spoilt - rows.start] = np.nan
        kept = {"visible": ~mask, "masked": mask, "all": np.ones_like(mask)}[store]
        teacher = emb[kept].reshape(len(ids), stored, channels)
        if codec == "exact" and dtype == "bfloat16":
            arrays = ((teacher.view(np.uint32) >> 16).astype(np.uint16), None)
        else:
            arrays = encoder.encode(
                teacher.astype(dtype) if codec == "exact" else teacher,
                statistics.mean,
                statistics.std,
            )
        with writer.PartWriter(folder, plan, place, numerics={"device": "none"}) as opened:
            opened.append(*(array for array in arrays if array is not None))
            opened.sync()
            opened.commit()
    if parts is None:
        integrity.seal(folder)
    return folder
