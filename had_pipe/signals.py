"""A wish to stop, granted where nothing is half done. A second one is obeyed at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, TypeVar

from had_pipe.errors import Interrupted

_T = TypeVar("_T")


class Stopped(KeyboardInterrupt):
    """A signal came while something was waited for."""


class Signals:
    """Catches SIGINT, SIGTERM and SIGUSR2, by which batch systems warn that time is nearly up.

    Only the main thread may receive signals: elsewhere this does nothing.
    """

    _HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)

    def __init__(self, let_go: Callable[[], None] | None = None) -> None:
        """`let_go` makes other threads give up what they wait for; nothing is read after it."""
        self.caught: str | None = None
        self._let_go = let_go
        self._waiting = False
        # To this process itself: of what was caught it may have been told.
        self._came = False

    def __enter__(self) -> Signals:
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in self._HANDLED}
            for number in self._HANDLED:
                signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _: FrameType | None) -> None:
        if self._came:
            raise KeyboardInterrupt
        self._came = True
        if self.caught:
            # The same that came to others a moment before: what is being saved is saved to the end.
            return
        self.caught = signal.Signals(number).name
        if self._waiting:
            self._release()
            raise Stopped

    def wait_for(self, get: Callable[[], _T]) -> _T:
        """What `get` returns, however long it takes; raises Stopped where a signal comes first."""
        self._waiting = True
        try:
            if self.caught:
                self.obey(self.number)
            return get()
        finally:
            self._waiting = False

    @property
    def number(self) -> int:
        """Of the signal that came; 0 before one does."""
        return signal.Signals[self.caught].value if self.caught else 0

    def obey(self, number: int) -> NoReturn:
        """Raise Stopped for a signal that came here, or to a process that this one works with."""
        self.caught = self.caught or signal.Signals(number).name
        self._release()
        raise Stopped

    @contextmanager
    def interrupting(self, where: str) -> Iterator[None]:
        """Raise Interrupted where Stopped comes out of the block."""
        try:
            yield
        except Stopped:
            self.stop(where)

    def stop(self, where: str) -> None:
        """Raise Interrupted if a signal came."""
        if self.caught:
            self._release()
            raise Interrupted(
                f"stopped by {self.caught} {where}: run the same command again to go on"
            )

    def _release(self) -> None:
        if self._let_go is not None:
            # In a thread: whoever was interrupted may hold a lock that this needs.
            threading.Thread(target=self._let_go, daemon=True).start()
            self._let_go = None
