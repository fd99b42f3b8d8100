"""How a night batch is told to stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self


class Stop:
    """SIGTERM and SIGINT end the batch at once, as an interrupted command, but never in the middle of a commit."""

    def __init__(self) -> None:
        self.asked = False
        self._held = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
        if not self._held:
            raise KeyboardInterrupt

    @contextmanager
    def held(self) -> Iterator[None]:
        """What is begun here is ended before the batch stops."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        self.check()

    def hold(self) -> None:
        """From here on nothing is interrupted: the batch ends anyway."""
        self._held = True

    def check(self) -> None:
        """Stops if that was asked for: a library may have swallowed the interruption."""
        if self.asked:
            raise KeyboardInterrupt
