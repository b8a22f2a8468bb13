"""Defer SIGINT and SIGTERM across steps that must happen together; wait without missing them."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from types import FrameType
from typing import Final, TypeVar

Item = TypeVar("Item")
_WAIT_SECONDS: Final = 0.2


def _nothing() -> None:
    """Do nothing: the default for `then`."""


@contextmanager
def defer_signals(then: Callable[[], None] = _nothing) -> Iterator[None]:
    """Raise what the handlers of SIGINT and SIGTERM raise only at the end of the block.

    The handlers themselves run at once. then: called when one of them raised, so that the block
    can end early. Outside the main thread, which alone is interrupted, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    deferred: list[BaseException] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    handlers = {n: handler for n, handler in before.items() if callable(handler)}

    def run_handler(number: int, frame: FrameType | None) -> None:
        try:
            handlers[signal.Signals(number)](number, frame)
        except BaseException as problem:  # noqa: BLE001 - deferred, whatever it is
            deferred.append(problem)
            then()

    try:
        for one in handlers:
            signal.signal(one, run_handler)
        yield
    finally:
        # a restored handler may raise at once: the other one must be restored all the same
        try:
            if signal.SIGTERM in handlers:
                signal.signal(signal.SIGTERM, handlers[signal.SIGTERM])
        finally:
            if signal.SIGINT in handlers:
                signal.signal(signal.SIGINT, handlers[signal.SIGINT])
        if deferred:
            raise deferred[0]


def take_from(queue: SimpleQueue[Item]) -> Item:
    """The next item of a queue that other threads fill.

    A signal that arrives just before a wait without end would be handled only after it.
    """
    while True:
        with suppress(Empty):
            return queue.get(timeout=_WAIT_SECONDS)
