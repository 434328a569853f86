"""How long work tells where it stands: one value, handed to whoever shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Progress:
    """One moment of one piece of work."""

    what: str
    """The work, as a participle: "extracting", "training", "verifying"."""
    done: int
    total: int
    """0 while it is not known."""
    unit: str
    """What `done` counts: "windows", "steps", "bytes"."""
    begun: int = 0
    """How much was done before this process started; the rate leaves it out."""
    seconds: float
    """Since this process started the work."""
    facts: Mapping[str, float | str] = field(default_factory=dict)
    """What else is worth showing: a loss, a share of waiting."""

    @property
    def rate(self) -> float:
        """Units a second in this process; 0 while unknown."""
        return (self.done - self.begun) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimate, or None while nothing is known."""
        return (self.total - self.done) / self.rate if self.total and self.rate > 0 else None


Reporter = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """Show nothing."""
