"""Numbers of bytes as people write them, both ways."""

from __future__ import annotations

import re

from had_pipe.errors import RecipeError

_UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("KMGTP", start=1)},
    **{f"{prefix}IB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
_WRITTEN = re.compile(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str, *, option: str) -> int:
    """Bytes of `200GB`, `1.5TiB`, `64 MB`; RecipeError names `option` where it is no such thing.

    A unit is asked for: 200 alone might mean gigabytes to whoever wrote it.
    """
    found = _WRITTEN.fullmatch(text)
    unit = found[2].upper() if found else ""
    if found is None or (unit and unit not in _UNITS):
        raise RecipeError(
            f"{option} {text}: not a size; write a number and a unit, such as 200GB, 1.5TB or "
            "512MiB"
        )
    if not unit:
        raise RecipeError(f"{option} {text}: of what? Add a unit, such as {text.strip()}GB")
    whole, _, digits = found[1].partition(".")
    # Whole numbers throughout: a float would round a petabyte.
    nbytes: int = int(whole + digits) * _UNITS[unit] // 10 ** len(digits)
    if nbytes == 0:
        raise RecipeError(f"{option} {text}: must be at least one byte")
    return nbytes


def size(nbytes: float) -> str:
    """Bytes in decimal units, three digits."""
    if nbytes < 1000:
        return f"{nbytes:,.0f} bytes"
    for unit in ("kB", "MB", "GB"):
        nbytes /= 1000
        if nbytes < 999.5:  # beyond it three digits would round to 1e+03
            return f"{nbytes:.3g} {unit}"
    nbytes /= 1000
    return f"{nbytes:.3g} TB" if nbytes < 999.5 else f"{nbytes:,.0f} TB"
