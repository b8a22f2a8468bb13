"""The two streams: what is said must be printed or fail in words, talk may be lost."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from moeconv.errors import IoFailed

EXIT_PIPE: Final = 141  # as if the closed pipe's signal had ended us


class Data(io.TextIOWrapper):
    """Standard output. Raises IoFailed; SystemExit where whoever read it has left."""

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
            self._give_up()
            raise SystemExit(EXIT_PIPE) from None
        except OSError as problem:
            self._give_up()
            raise IoFailed(
                "cannot print the result",
                at="standard output",
                cause=problem.strerror,
                fix="what is on the disk is as it should be; send the output elsewhere",
            ) from None

    def _give_up(self) -> None:
        """What still waits to be written would fail once more at the end."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)


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
    # the lower number first: a file that we open must not get it
    sys.stdout = _like(Data, sys.stdout)
    sys.stderr = _like(Talk, sys.stderr)


def _like(kind: type[io.TextIOWrapper], stream: object) -> io.TextIOWrapper:
    if not isinstance(stream, io.TextIOWrapper):
        return kind(io.FileIO(os.devnull, "w"), encoding="utf-8")
    return kind(
        stream.buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
    )
