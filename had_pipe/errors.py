"""Everything that can go wrong and is not a bug, grouped by what the reader does next.

HadPipeError
├── RecipeError          2   edit the recipe (or the command line)
│   └── RunMismatch      2   the run on disk was started by another recipe: use another [train] out
├── InputError           3   get the right file: a genome, a BED, a checkpoint
├── CacheError           4   a cache cannot be used as asked
│   ├── CacheMismatch    4   it was made from something else: another path, or restore the values
│   ├── CacheIncomplete  4   extraction has not finished: run extract-teacher again
│   ├── CacheCorrupt     4   what is stored is not what was written: repair or copy again
│   └── CacheRefused     4   it is not a cache of ours, or not safe to open
├── NonFiniteError       5   look at the numbers: NaN or infinity where there must be none
├── StorageError         6   make room on disk or device, or mend the disk, then run again
├── HeldError            7   another process is at it: wait, or stop it
├── QuarantineError      8   some parts failed again and again: mend what they share, run again
├── NetworkError         9   a host could not be reached, or the network may not be used
└── Interrupted         75   a signal stopped the work: run the same command again

A message says where, what was found and what was expected, and what to do. Anything that is not a
HadPipeError is a bug: it keeps its traceback and exits with 1.
"""

from __future__ import annotations

import re
from typing import ClassVar

# Control characters, marks that turn the direction of text, and halves of characters.
_STEERING = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def shown(text: str) -> str:
    """Text of unknown origin as a terminal may have it: what would steer it stands escaped."""
    return _STEERING.sub(lambda found: ascii(found[0])[1:-1], text)


class HadPipeError(Exception):
    """An error whose message is meant for the person who ran the command."""

    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        # Names of files, records and keys are quoted, and a stranger may have chosen them.
        return "\n".join(map(shown, super().__str__().split("\n")))


class RecipeError(HadPipeError):
    """The recipe or the command line asks for something that cannot be."""

    exit_code = 2


class RunMismatch(RecipeError):
    """The run on disk was started from another recipe or another cache."""


class InputError(HadPipeError):
    """A genome, BED file or checkpoint is missing, malformed or not the one expected."""

    exit_code = 3


class CacheError(HadPipeError):
    """A cache cannot be used as asked."""

    exit_code = 4


class CacheMismatch(CacheError):
    """The cache was made from something else than what is asked for."""


class CacheIncomplete(CacheError):
    """The cache is not sealed: parts are still missing."""


class CacheCorrupt(CacheError):
    """What is stored is not what was written."""


class CacheRefused(CacheError):
    """The folder is not a cache of a known format, or is not safe to open."""


class NonFiniteError(HadPipeError):
    """NaN or infinity where there must be none."""

    exit_code = 5


class StorageError(HadPipeError):
    """The disk is full or failed, or a device's memory is; everything committed is intact."""

    exit_code = 6


class HeldError(HadPipeError):
    """Another process is working on the same cache or run."""

    exit_code = 7


class QuarantineError(HadPipeError):
    """Some parts failed again and again and were left out; the others are made."""

    exit_code = 8


class NetworkError(HadPipeError):
    """A host could not be reached, or the network was not allowed."""

    exit_code = 9


class Interrupted(HadPipeError):
    """A signal stopped the work; what was committed is kept."""

    exit_code = 75
