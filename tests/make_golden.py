"""Make the small caches in tests/data: once per format, before its first release.

They are kept for ever and never made again: that today's code writes something else would be no
reason to change them, and that it cannot read them is a bug. `python tests/make_golden.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from small_cache import build_cache

from had_pipe.cache.codec import CodecName
from had_pipe.cache.recode import recode


def make_golden(folder: Path) -> None:
    build_cache(folder / "int8", windows=5, valid=2, kmers=8, channels=6, part=3, views=2)
    build_cache(
        folder / "bfloat16",
        windows=5,
        valid=2,
        kmers=8,
        channels=6,
        part=3,
        codec="exact",
        dtype="bfloat16",
        store="all",
        seed=3,
    )
    learnt: tuple[CodecName, ...] = ("compact", "tiny")
    for codec in learnt:
        build_cache(
            folder / codec,
            windows=5,
            valid=2,
            kmers=8,
            channels=16,
            part=3,
            codec=codec,
            seed=5,
        )


def make_golden_archive(folder: Path, cache: Path) -> None:
    recode(cache / "bfloat16", folder / "bfloat16", codec="archive")


if __name__ == "__main__":
    make_golden(Path(sys.argv[1]) / "cache-v1")
    make_golden_archive(Path(sys.argv[1]) / "archive-v1", Path(sys.argv[1]) / "cache-v1")
