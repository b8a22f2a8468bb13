"""What a worker does with the bytes of an output file: the sink that takes them, and digests.

Each unit of a file, a logical matrix or another whole tensor, gets its digest by a `DigestPlan`:
computed from its bytes, known, or left for later.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from moeconv.plan.model import OutputFile
from moeconv.store.open_files import OpenFile

SourcePosition: TypeAlias = tuple[OpenFile, int]  # an open source file and an offset in it

Digests: TypeAlias = list[list[str]]  # [tensor][unit]; empty where a digest is left for later


@dataclass(frozen=True, slots=True)
class DigestSource:
    """How one unit gets its digest: `TAKE`, `LATER` or a `known` one.

    value: the recorded digest of a known one, otherwise empty.
    """

    how: Literal["take", "later", "known"]
    value: str = ""


TAKE: Final = DigestSource("take")  # read the bytes and compute it
LATER: Final = DigestSource("later")  # leave it out; `verify --fill` adds it


def known(value: str) -> DigestSource:
    """Return a digest that the source's manifest records: the bytes need not be read for it."""
    return DigestSource("known", value)


DigestPlan: TypeAlias = Callable[[int, int], DigestSource]  # (tensor, unit) of one output file


def take_all(_tensor: int, _unit: int) -> DigestSource:
    """Take every digest of a file."""
    return TAKE


class Sink:
    """The base of all sinks: it receives every byte through `write` and keeps nothing.

    `open`, `finish` and `close` are called once each; the rest by several workers at once.
    """

    @property
    def clones(self) -> bool:
        """Whether `clone` may do anything."""
        return False

    @property
    def serial(self) -> bool:
        """Whether a file of copied bytes is best written in order, by one worker."""
        return False

    def can_clone(self, file: int, offset: int, at: int, nbytes: int) -> bool:
        """Return whether some of a run of bytes of source file number `file` can be cloned."""
        return False

    def open(self) -> None:
        """Prepare for the first byte; called by whichever worker comes first."""

    def write(self, view: memoryview, offset: int, origin: SourcePosition | None = None) -> None:
        """Take bytes that belong at `offset`.

        origin: where the same bytes are in a source file, if they are there in one run.
        """

    def copy(self, source: OpenFile, offset: int, at: int, nbytes: int) -> int:
        """Take bytes from a source file without reading them; return how many, from the first."""
        return 0

    def clone(self, source: OpenFile, offset: int, at: int, nbytes: int) -> tuple[int, int]:
        """Share blocks with a source file; return which bytes are in place: [first, last)."""
        return 0, 0

    def batch_written(self, offset: int, nbytes: int) -> None:
        """Note that a batch of tiles, which is this range of the file, is written."""

    def finish(self, digests: Digests) -> None:
        """Complete the file after its last byte."""

    def close(self) -> None:
        """Release everything, whether the file was finished or not."""


class HashSink(Sink):
    """A sink that keeps nothing but the digests, in `found` by the file's name."""

    def __init__(self, file: OutputFile, found: dict[str, Digests]) -> None:
        self._file = file
        self._found = found

    def finish(self, digests: Digests) -> None:
        """Keep the file's digests."""
        self._found[self._file.name] = digests
