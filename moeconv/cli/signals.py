"""Ctrl-C and SIGTERM: one line, an exit code, and time to take back what was made."""

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
ENDED: Final = frozenset({EXIT_INTERRUPTED, EXIT_TERMINATED})


class Terminated(KeyboardInterrupt):
    """SIGTERM: schedulers send it, and it must end a run as cleanly as Ctrl-C does."""


_PROBLEMS: Final = {int(signal.SIGINT): KeyboardInterrupt, int(signal.SIGTERM): Terminated}


def end_when_told() -> None:
    """SIGINT and SIGTERM end the process with their line, until a verb is at work."""
    _answer(_end)


def hear_no_more() -> None:
    """What is done is done: no signal turns it into something else on the way out."""
    for number in _PROBLEMS:
        signal.signal(number, signal.SIG_IGN)


def _end(problem: KeyboardInterrupt) -> NoReturn:
    # not the exception itself: typer would take it, and end without a word
    raise SystemExit(interrupted(problem))


def _raise(problem: KeyboardInterrupt) -> NoReturn:
    raise problem


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, both signals are raised as they are: what was made can be taken back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread is ever interrupted
        return
    before = [(number, signal.getsignal(number)) for number in _PROBLEMS]
    _answer(_raise)
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _answer(what: Callable[[KeyboardInterrupt], NoReturn]) -> None:
    """What to do when a signal comes; those that are ignored, as under `nohup`, stay so."""

    def told(number: int, frame: FrameType | None) -> NoReturn:
        what(_PROBLEMS[number]())

    for number in _PROBLEMS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, told)


def interrupted(problem: KeyboardInterrupt) -> int:
    """Say in one line that a run was ended, and what became of its files; the exit code."""
    terminated = isinstance(problem, Terminated)
    said = ["terminated" if terminated else "interrupted", *getattr(problem, "__notes__", [])]
    sys.stderr.write(f"{'; '.join(said)}\n")
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
