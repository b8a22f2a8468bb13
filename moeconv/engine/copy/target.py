"""A data file on disk: made under a partial name, written from many threads, then durable."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, TypeAlias

from moeconv.engine.copy.buffers import PAGE_BYTES, begins_page
from moeconv.engine.copy.methods import KERNEL, REFLINK, Methods
from moeconv.engine.copy.sources import SourceFile
from moeconv.engine.copy.syscalls import (
    clone_range,
    copy_in_kernel,
    is_btrfs,
    open_direct,
    reserve,
    start_writeback,
)
from moeconv.engine.copy.worker import Digests, Origin, whole_blocks
from moeconv.engine.copy.writeback import Writeback
from moeconv.engine.output.atomic_file import NEW_FILE, partial_path, writing
from moeconv.plan.model import OutputFile
from moeconv.store.file_io import write_at, write_blocks

# Writes past the page cache: in whole pages, and long enough to be worth waiting for the disk.
DIRECT_BYTES: Final = 256 * 1024

# shorter copies in the kernel cost more than to write what is in a buffer already
KERNEL_BYTES: Final = 64 * 1024

# fewer bytes in the page cache than that can wait for the end
MIN_WRITEBACK_BYTES: Final = 4 * 1024 * 1024

Finished: TypeAlias = Callable[[OutputFile, Path, Digests], None]


class DiskSink:
    """One output file; `finished` gets it once all of it is on the disk, to name it."""

    def __init__(self, file: OutputFile, out: Path, methods: Methods, finished: Finished) -> None:
        self._file = file
        self._path = out / file.name
        self._partial = partial_path(out, file.name)
        self._methods = methods
        self._finished = finished
        self._descriptor = -1
        self._direct: int | None = None
        self._serial = is_btrfs(out)
        self._writeback: Writeback | None = None
        self._refused = False  # writes past the page cache, by the device
        self._cached_bytes = 0  # in the page cache; a hint, so read without the lock
        self._writing = threading.Lock()

    @property
    def clones(self) -> bool:
        """Whether blocks of a source can be had without a copy."""
        return REFLINK in self._methods.found.values()

    def clonable(self, file: int, offset: int, at: int, nbytes: int) -> bool:
        """Whether some of a run of bytes of source file `file` can be had without a copy."""
        first, last = whole_blocks(offset, at, nbytes, self._methods.block)
        return first < last and self._methods.of_file(file) == REFLINK

    @property
    def serial(self) -> bool:
        """Whether a file of copied bytes is best written in order, by one worker."""
        return self._serial

    def open(self) -> None:
        """Create the file, at its full size where that helps, with its header.

        Raises IoFailed, DiskFull.
        """
        with writing(self._path):
            self._descriptor = os.open(self._partial, NEW_FILE, 0o666)
            if self._serial:  # it grows: a write inside a file looks for what was there
                self._writeback = Writeback(self._descriptor, len(self._file.header))
            elif self.clones:  # blocks of its own would only be thrown away again
                os.truncate(self._descriptor, self._file.size)
            else:
                reserve(self._descriptor, self._file.size)
            self._direct = open_direct(self._partial)
        self.write(memoryview(self._file.header), 0)

    def write(self, view: memoryview, offset: int, origin: Origin | None = None) -> None:
        """Write `view` at `offset`, by the quickest way that is open. Raises IoFailed, DiskFull."""
        first, last = self._write_direct(view, offset)
        for start, stop in ((0, first), (last, len(view))):
            done = start
            if origin is not None and stop - start >= KERNEL_BYTES and not self._serial:
                source, begin = origin
                done += self._copy(source, begin + start, offset + start, stop - start)
            if done < stop:
                self._write_cached(view[done:stop], offset + done)

    def _write_cached(self, view: memoryview, offset: int) -> None:
        # the kernel lets one thread at a time write to a file, and the others spin meanwhile:
        # here they sleep, or rather read and hash what comes next
        with self._writing, writing(self._path):
            write_at(self._descriptor, view, offset)
            self._cached_bytes += len(view)
        self._methods.tally.add(written=len(view))

    def _write_direct(self, view: memoryview, offset: int) -> tuple[int, int]:
        """What of `view` went past the page cache, [first, last): not copied, and without a lock.

        Whole pages can, if they are pages of memory, too.
        """
        first = min(-offset % PAGE_BYTES, len(view))
        whole = (len(view) - first) // PAGE_BYTES * PAGE_BYTES
        if self._direct is None or self._refused or whole < DIRECT_BYTES:
            return 0, 0
        if not begins_page(view[first:]):
            return 0, 0
        pages = view[first : first + whole]
        with writing(self._path):
            try:
                done = write_blocks(self._direct, pages, offset + first, PAGE_BYTES)
            except OSError as problem:
                if problem.errno != errno.EINVAL:
                    raise
                self._refused, done = True, 0  # a device with stricter rules
        self._methods.tally.add(direct=done)
        return first, first + done

    def copy(self, source: SourceFile, offset: int, at: int, nbytes: int) -> int:
        """Bytes that the kernel copied by itself, all or a first part; 0 where it does not."""
        past = self._direct is not None and not self._refused
        if past and nbytes >= DIRECT_BYTES + PAGE_BYTES:
            return 0  # to read and write them past the page cache is quicker
        return self._copy(source, offset, at, nbytes)

    def _copy(self, source: SourceFile, offset: int, at: int, nbytes: int) -> int:
        if self._methods.of_file(source.number) not in (KERNEL, REFLINK):
            return 0
        with self._writing, writing(self._path):
            done = copy_in_kernel(source.descriptor, offset, self._descriptor, at, nbytes)
            self._cached_bytes += done
        self._methods.tally.add(copied=done)
        return done

    def clone(self, source: SourceFile, offset: int, at: int, nbytes: int) -> tuple[int, int]:
        """What of a run is now in place without a copy: [first, last) of its bytes.

        Whole blocks can be, where both sides stand alike in theirs; the edges are left to write.
        """
        first, last = whole_blocks(offset, at, nbytes, self._methods.block)
        if first == last or self._methods.of_file(source.number) != REFLINK:
            return 0, 0
        with writing(self._path):
            done = clone_range(
                source.descriptor, offset + first, self._descriptor, at + first, last - first
            )
        if not done:
            return 0, 0
        self._methods.tally.add(cloned=last - first)
        return first, last

    def settle(self, offset: int, nbytes: int) -> None:
        """Let the disk begin on a batch while the next one is copied.

        Not for the edges of clones: each would be a write of its own, with somebody waiting.
        """
        if self.clones and self._cached_bytes < MIN_WRITEBACK_BYTES:
            return
        self._cached_bytes = 0
        if self._writeback is not None:
            self._writeback.begin(offset, nbytes)
        else:
            start_writeback(self._descriptor, offset, nbytes)

    def finish(self, digests: Digests) -> None:
        """Bring it to the disk. Raises IoFailed, DiskFull."""
        with writing(self._path):
            os.fsync(self._descriptor)
        self._finished(self._file, self._partial, digests)

    def close(self) -> None:
        """Close all descriptors, whatever the system says of one. Raises IoFailed, DiskFull."""
        descriptors = [d for d in (self._direct, self._descriptor) if d is not None and d >= 0]
        writeback, self._writeback = self._writeback, None
        self._direct, self._descriptor = None, -1
        with writing(self._path), ExitStack() as stack:
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            if writeback is not None:
                stack.callback(writeback.end)  # before them
