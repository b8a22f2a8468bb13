"""Steps that an interruption must not part: what was made, and the note that it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def undisturbed() -> Iterator[None]:
    """Let Ctrl-C, and SIGTERM where it raises, wait for the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    came: list[int] = []

    def later(number: int, _: FrameType | None) -> None:
        came.append(number)

    handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    ours = {n: handler for n, handler in handlers.items() if callable(handler)}
    for one in ours:
        signal.signal(one, later)
    try:
        yield
    finally:
        for one, handler in ours.items():
            signal.signal(one, handler)
        for number in came[:1]:
            ours[signal.Signals(number)](number, None)
