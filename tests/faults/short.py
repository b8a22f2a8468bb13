"""Calls of `os` that move fewer bytes than they were asked to, one at a time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any, Final

import pytest

READS: Final = ("read", "pread", "preadv")
WRITES: Final = ("write", "pwrite", "copy_file_range")


class ShortCalls:
    """Counts the calls that move two bytes or more, and lets number `last` move a part of them.

    part: of how many it was asked for, how many it moves. final: whether nothing comes after it:
    the file that was read ends there, or the disk that was written to is full. made: the calls.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[str] = []
        self.last: int | None = None
        self.part: Callable[[int], int] = lambda asked: asked // 2
        self.final = False
        self.kind = ""  # of the call that was short
        self._ends: dict[tuple[int, int], int] = {}
        self._full = False
        self._real: dict[str, Callable[..., Any]] = {}
        for name in (*READS, *WRITES):
            self._real[name] = getattr(os, name)
            monkeypatch.setattr(os, name, getattr(self, f"_{name}"))

    def start(self, last: int | None, part: Callable[[int], int], *, final: bool) -> None:
        """Begin to count anew."""
        self.last, self.part, self.final = last, part, final
        self.kind, self._full = "", False
        self.made.clear()
        self._ends.clear()

    def stop(self) -> None:
        """All is well again."""
        self.start(None, self.part, final=False)

    def _turn(self, name: str, asked: int) -> bool:
        if asked > 1:
            self.made.append(name)
        due = asked > 1 and len(self.made) == self.last
        self.kind = name if due else self.kind
        return due

    def _readable(self, name: str, descriptor: int, asked: int, offset: int) -> int:
        """How many bytes this read may return."""
        facts = os.fstat(descriptor)
        file = (facts.st_dev, facts.st_ino)
        there = min(asked, facts.st_size - offset)  # a short read is one of bytes that are there
        if self._turn(name, there):
            there = self.part(there)
            if self.final:
                self._ends[file] = offset + there
            return there
        return max(min(asked, self._ends.get(file, offset + asked) - offset), 0)

    def _writable(self, name: str, asked: int) -> int:
        """How many bytes this write may take."""
        if self._full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._turn(name, asked):
            self._full = self.final
            return self.part(asked)
        return asked

    def _read(self, descriptor: int, asked: int) -> bytes:
        try:
            offset = os.lseek(descriptor, 0, os.SEEK_CUR)
        except OSError:  # a pipe
            return self._real["read"](descriptor, asked)  # type: ignore[no-any-return]
        return self._real["read"](descriptor, self._readable("read", descriptor, asked, offset))  # type: ignore[no-any-return]

    def _pread(self, descriptor: int, asked: int, offset: int) -> bytes:
        count = self._readable("pread", descriptor, asked, offset)
        return self._real["pread"](descriptor, count, offset)  # type: ignore[no-any-return]

    def _preadv(self, descriptor: int, buffers: list[memoryview], offset: int) -> int:
        (view,) = buffers
        count = self._readable("preadv", descriptor, len(view), offset)
        return self._real["preadv"](descriptor, [view[:count]], offset)  # type: ignore[no-any-return]

    def _write(self, descriptor: int, data: bytes | memoryview) -> int:
        return self._real["write"](descriptor, data[: self._writable("write", len(data))])  # type: ignore[no-any-return]

    def _pwrite(self, descriptor: int, data: memoryview, offset: int) -> int:
        count = self._writable("pwrite", len(data))
        return self._real["pwrite"](descriptor, data[:count], offset)  # type: ignore[no-any-return]

    def _copy_file_range(self, source: int, target: int, asked: int, *offsets: int) -> int:
        count = self._writable("copy_file_range", asked)
        facts = os.fstat(source)
        end = self._ends.get((facts.st_dev, facts.st_ino))
        if end is not None:
            count = max(min(count, end - offsets[0]), 0)
        return self._real["copy_file_range"](source, target, count, *offsets) if count else 0
