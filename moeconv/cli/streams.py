"""The two streams: what is said must be printed or fail in words, talk may be lost."""

from __future__ import annotations

import codecs
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, TextIO

from moeconv.errors import IoFailed

EXIT_PIPE: Final = 141  # as if the closed pipe's signal had ended us
_LAST_STREAM: Final = 2
_ERRORS: Final = "moeconv"  # the name of our own answer to what an encoding lacks


def _as_it_was_given(problem: UnicodeError) -> tuple[str | bytes, int]:
    """Paths that are not text are printed as the bytes that they are, all else as escapes."""
    try:
        return codecs.lookup_error("surrogateescape")(problem)
    except UnicodeError:
        return codecs.backslashreplace_errors(problem)


codecs.register_error(_ERRORS, _as_it_was_given)


class Data(io.TextIOWrapper):
    """Standard output. Raises IoFailed; SystemExit where whoever read it has left."""

    def give_up(self) -> None:
        """What still waits to be written would fail once more at the end, or wait for ever."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)

    def write(self, text: str) -> int:
        """As any stream's."""
        with self._printing():
            return super().write(text)

    def flush(self) -> None:
        """As any stream's."""
        with self._printing():
            super().flush()

    @contextmanager
    def _printing(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            self.give_up()
            raise SystemExit(EXIT_PIPE) from None
        except OSError as problem:
            self.give_up()
            raise IoFailed(
                "cannot print the result",
                at="standard output",
                cause=problem.strerror,
                fix="what is on the disk is as it should be; send the output elsewhere",
            ) from None


class Talk(io.TextIOWrapper):
    """Standard error: a run does not fail for want of somebody who listens."""

    def write(self, text: str) -> int:
        """As any stream's, or nothing."""
        with suppress(OSError):
            super().write(text)
        return len(text)

    def flush(self) -> None:
        """As any stream's, or nothing."""
        with suppress(OSError):
            super().flush()


def open_streams() -> None:
    """Make both what they are here; one that was closed (`>&-`) is silence."""
    # a file of ours must not get the number of a stream, to which others may print
    while (number := os.open(os.devnull, os.O_RDWR)) <= _LAST_STREAM:
        continue
    os.close(number)
    sys.stdout = _like(Data, sys.stdout)
    sys.stderr = _like(Talk, sys.stderr)


def _like(kind: type[io.TextIOWrapper], stream: TextIO | None) -> TextIO:
    """The same stream as such a kind; one that a host put there is left as it is."""
    if stream is None:
        return kind(io.FileIO(os.devnull, "w"), encoding="utf-8", errors=_ERRORS)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    try:
        stream.flush()
        number = stream.fileno()
    except OSError:  # of no file
        return stream
    # with a buffer of its own: a raw file may take a part of what it is given and say so to nobody
    return kind(
        io.BufferedWriter(io.FileIO(number, "w", closefd=False)),
        encoding=stream.encoding,
        errors=_ERRORS if stream.errors == "strict" else stream.errors,
        line_buffering=stream.line_buffering or stream.write_through,
    )
