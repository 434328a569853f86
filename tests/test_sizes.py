"""Bytes as people write them: what is read, what is refused, what is said."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from had_pipe.errors import RecipeError
from had_pipe.sizes import parse_size, size


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("200GB", 200 * 10**9), ("1.5TiB", 3 * 2**39), ("64 MB", 64 * 10**6), ("512mib", 2**29),
     (" 1b ", 1), ("0.1kB", 100), ("3PB", 3 * 10**15)],
)  # fmt: skip
def test_a_size_is_a_number_and_a_unit(text: str, nbytes: int) -> None:
    assert parse_size(text, option="--mirror-size") == nbytes


@given(
    number=st.decimals(min_value=1, max_value=10**9, places=6, allow_nan=False),
    unit=st.sampled_from(["kB", "MB", "GB", "TB", "PB", "KiB", "MiB", "GiB", "TiB", "PiB"]),
)
def test_sizes_are_exact_whatever_their_digits(number: object, unit: str) -> None:
    base = 1024 if "i" in unit else 1000
    exact = Fraction(str(number)) * base ** (1 + "KMGTP".index(unit[0].upper()))
    assert parse_size(f"{number}{unit}", option="x") == exact.__floor__()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not a size"),
        ("GB", "not a size"),
        ("-1GB", "not a size"),
        ("1e3GB", "not a size"),
        ("1,5GB", "not a size"),
        ("5 gigs", "not a size"),
        ("5GBit", "not a size"),
        ("infGB", "not a size"),
        ("\u0665GB", "not a size"),
        ("9" * 40 + "GB", "not a size"),
        ("200", "of what? Add a unit, such as 200GB"),
        ("0GB", "must be at least one byte"),
        ("0.1B", "must be at least one byte"),
    ],
)
def test_what_is_no_size_is_refused_naming_the_option(text: str, said: str) -> None:
    with pytest.raises(RecipeError, match=f"^--prefetch {text}: ") as refusal:
        parse_size(text, option="--prefetch")
    assert said in str(refusal.value)


@pytest.mark.parametrize(
    ("nbytes", "said"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (1_234_567, "1.23 MB"),
     (999_600_000, "1 GB"),
     (5.3e11, "530 GB"), (1.05e12, "1.05 TB"), (2e15, "2,000 TB")],
)  # fmt: skip
def test_sizes_are_said_in_decimal_units(nbytes: float, said: str) -> None:
    assert size(nbytes) == said
