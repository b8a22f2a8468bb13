"""SIGINT and SIGTERM: print one line, exit with a code, and remove what was written."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143  # as if SIGTERM had ended us
SIGNAL_EXITS: Final = frozenset({EXIT_INTERRUPTED, EXIT_TERMINATED})


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers send; it ends a run as cleanly as Ctrl-C does."""


_PROBLEMS: Final = {int(signal.SIGINT): KeyboardInterrupt, int(signal.SIGTERM): Terminated}


def install_handlers() -> None:
    """Exit with one line on SIGINT and SIGTERM, until a command is running."""
    _handle_with(_exit)


def ignore_signals() -> None:
    """Ignore further signals: the exit code is decided."""
    for number in _PROBLEMS:
        signal.signal(number, signal.SIG_IGN)


def _exit(problem: KeyboardInterrupt) -> NoReturn:
    # not the exception itself: typer would catch it and exit without a message
    raise SystemExit(report_interrupt(problem))


def _raise(problem: KeyboardInterrupt) -> NoReturn:
    raise problem


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise both signals as exceptions within the block, so that outputs can be removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    before = [(number, signal.getsignal(number)) for number in _PROBLEMS]
    _handle_with(_raise)
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _handle_with(action: Callable[[KeyboardInterrupt], NoReturn]) -> None:
    """Call `action` on a signal; signals that are ignored, as under `nohup`, stay ignored."""

    def handler(number: int, frame: FrameType | None) -> NoReturn:
        action(_PROBLEMS[number]())

    for number in _PROBLEMS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handler)


def report_interrupt(problem: KeyboardInterrupt) -> int:
    """Print in one line that a run was ended and what became of its files; the exit code."""
    terminated = isinstance(problem, Terminated)
    words = ["terminated" if terminated else "interrupted", *getattr(problem, "__notes__", [])]
    sys.stderr.write(f"{'; '.join(words)}\n")
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
