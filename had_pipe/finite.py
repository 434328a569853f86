"""Numbers that are none: whose they are, told in the words of caches."""

from __future__ import annotations

from collections.abc import Sequence

from had_pipe.cache import Cache
from had_pipe.errors import NonFiniteError
from had_pipe.stream import Batch


def require_finite(batch: Batch, caches: Sequence[Cache], split: str, when: str) -> None:
    """Refuse a batch whose targets are not finite: NonFiniteError names the windows."""
    bad_B = (~batch.target.isfinite()).flatten(1).any(1).tolist()
    if any(bad_B):
        raise NonFiniteError(
            f"{when}: the cache holds numbers that are not finite: "
            f"{named_windows(batch, caches, split, chosen=bad_B)}. No writer of ours lets these "
            "pass: get the cache again, or extract it again"
        )


def named_windows(
    batch: Batch, caches: Sequence[Cache], split: str, *, chosen: Sequence[bool] | None = None
) -> str:
    """Where a batch's windows, or the chosen ones, come from: at most eight rows of each view."""
    names, first = [], 0
    for span in batch.spans:
        rows = [
            row
            for i, row in enumerate(span.row.tolist(), start=first)
            if chosen is None or chosen[i]
        ]
        if rows:
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            names.append(f"{caches[span.cache].path} {split} view {span.view} rows {shown}")
        first += len(span.row)
    return "; ".join(names)
