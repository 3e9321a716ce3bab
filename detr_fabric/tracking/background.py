"""A thread for what may hang: whoever gives it something to do never waits for it to be done."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable

Action = Callable[[], object]


class Background:
    """Does things one after another in a thread of its own, which does not keep the process from ending.

    Actions must not raise. At most `capacity` of them wait; what comes then is not done.
    """

    def __init__(self, capacity: int) -> None:
        self._waiting: queue.Queue[Action | None] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def submit(self, action: Action) -> bool:
        """Whether it will be done: False where too much is waiting."""
        try:
            self._waiting.put_nowait(action)
        except queue.Full:
            return False
        return True

    def finish(self, action: Action, seconds: float) -> bool:
        """A last action. Whether that and all before it was done within so many seconds; the rest is left undone."""
        end = time.monotonic() + seconds
        try:
            for last in (action, None):
                self._waiting.put(last, timeout=max(0.0, end - time.monotonic()))
        except queue.Full:
            return False
        self._thread.join(max(0.0, end - time.monotonic()))
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (action := self._waiting.get()) is not None:
            action()
