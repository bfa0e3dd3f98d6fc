"""What happens between two steps: deciding what is due, and stopping when asked to."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType
from typing import Any


def is_due(done: int, interval: int, total: int) -> bool:
    """Whether something that happens every ``interval`` steps happens after step ``done``.

    Whatever the interval (0 included), it happens after the last step.
    """
    return done == total or (interval > 0 and done % interval == 0)


class StopRequest:
    """Turns SIGINT and SIGTERM into a flag, so that a run ends between two steps.

    A second signal of the same kind has its usual effect: whoever presses Ctrl-C twice means it.
    Outside the main thread, where Python cannot install handlers, nothing is caught.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __bool__(self) -> bool:
        return self.number is not None

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._previous[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread
                break
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number in list(self._previous):
            self._restore(number)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.number = number
        self._restore(signal.Signals(number))

    def _restore(self, number: signal.Signals) -> None:
        signal.signal(number, self._previous.pop(number))
