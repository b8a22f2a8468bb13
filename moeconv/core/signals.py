"""Steps that an interruption must not part: what was made, and the note that it was."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


def _nothing() -> None:
    """What to do where nothing is to be done."""


@contextmanager
def undisturbed(then: Callable[[], None] = _nothing) -> Iterator[None]:
    """What SIGINT and SIGTERM raise, in Ctrl-C or otherwise, is raised at the end of the block.

    Their handlers run at once. then: called when one of them raised, to end the block soon.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    put_off: list[BaseException] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    handlers = {n: handler for n, handler in before.items() if callable(handler)}

    def later(number: int, frame: FrameType | None) -> None:
        try:
            handlers[signal.Signals(number)](number, frame)
        except BaseException as problem:  # noqa: BLE001 - put off, whatever it is
            put_off.append(problem)
            then()

    try:
        for one in handlers:
            signal.signal(one, later)
        yield
    finally:
        # either handler may raise as soon as it is back: the other one must come back all the same
        try:
            if signal.SIGTERM in handlers:
                signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])
        finally:
            if signal.SIGINT in handlers:
                signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        if put_off:
            raise put_off[0]
