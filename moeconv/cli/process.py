"""The process of a command: its standard streams, and SIGINT and SIGTERM.

A result that cannot be printed is an error; a message may be lost. A signal ends a command with one
line and an exit code, after what it wrote has been removed.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Final, NoReturn, TextIO

from moeconv.errors import IoFailed

EXIT_PIPE: Final = 141  # as if the closed pipe's signal had ended us
_LAST_STREAM: Final = 2
_ERRORS: Final = "moeconv"  # the name of our codec error handler
EXIT_INTERRUPTED: Final = 130
EXIT_TERMINATED: Final = 143  # as if SIGTERM had ended us
SIGNAL_EXITS: Final = frozenset({EXIT_INTERRUPTED, EXIT_TERMINATED})


# --- streams -------------------------------------------------------------------------------------
def _encode_anyway(problem: UnicodeError) -> tuple[str | bytes, int]:
    """Print the bytes of paths that are not valid text as they are, all else as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(problem)
    except UnicodeError:
        return codecs.backslashreplace_errors(problem)


codecs.register_error(_ERRORS, _encode_anyway)


class ResultStream(io.TextIOWrapper):
    """Standard output. Raises IoFailed, or SystemExit if the reader closed the pipe."""

    def discard(self) -> None:
        """Drop what is still buffered: it would fail again at exit, or block for ever."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)

    def write(self, text: str) -> int:
        """As in the base class."""
        with self._printing():
            return super().write(text)

    def flush(self) -> None:
        """As in the base class."""
        with self._printing():
            super().flush()

    @contextmanager
    def _printing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.discard()
            raise SystemExit(EXIT_PIPE) from None
        except OSError as problem:
            self.discard()
            raise IoFailed(
                "cannot print the result",
                at="standard output",
                cause=problem.strerror,
                fix="the files on disk are complete; send stdout somewhere else",
            ) from None


class MessageStream(io.TextIOWrapper):
    """Standard error. Errors are ignored: a closed stderr must not fail the run."""

    def write(self, text: str) -> int:
        """As in the base class; errors are ignored."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """As in the base class; errors are ignored."""
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Replace both streams with moeconv's own; one that was closed (`>&-`) goes to /dev/null."""
    # no file of ours may get the descriptor of a closed stream: others print to it
    while (number := os.open(os.devnull, os.O_RDWR)) <= _LAST_STREAM:
        continue
    os.close(number)
    sys.stdout = _rewrap(ResultStream, sys.stdout)
    sys.stderr = _rewrap(MessageStream, sys.stderr)


def _rewrap(kind: type[io.TextIOWrapper], stream: TextIO | None) -> TextIO:
    """Return the same stream as a `kind`; a stream that is not a plain text file stays as it is."""
    if stream is None:
        return kind(io.FileIO(os.devnull, "w"), encoding="utf-8", errors=_ERRORS)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        stream.flush()
        number = stream.fileno()
    except OSError:  # it has no descriptor
        return stream
    # buffered: a raw file may write only a part of its data, and TextIOWrapper would ignore that
    return kind(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=_ERRORS if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )


# --- signals -------------------------------------------------------------------------------------
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
    """Print one line: a run was interrupted, and what became of its files; return the exit code."""
    terminated = isinstance(problem, Terminated)
    words = ["terminated" if terminated else "interrupted", *getattr(problem, "__notes__", [])]
    sys.stderr.write(f"{'; '.join(words)}\n")
    return EXIT_TERMINATED if terminated else EXIT_INTERRUPTED
