"""The sink that writes a data file: under a partial name, from several threads, then durably."""

from __future__ import annotations

import errno
import os
import queue
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Final, TypeAlias

from moeconv.engine.copy.buffers import PAGE_BYTES, begins_page
from moeconv.engine.copy.methods import CopyMethods, whole_blocks
from moeconv.engine.copy.sink import Digests, Sink, SourcePosition
from moeconv.engine.copy.syscalls import (
    drop_cached,
    is_btrfs,
    open_direct,
    reserve,
    start_writeback,
)
from moeconv.engine.output.atomic_file import NEW_FILE, partial_path, writing
from moeconv.plan.model import OutputFile
from moeconv.store.file_io import write_at, write_blocks
from moeconv.store.open_files import OpenFile

# Writes past the page cache are of whole pages, and long enough to be worth waiting for the disk.
DIRECT_BYTES: Final = 256 * 1024

# Shorter copies in the kernel cost more than writing what is in a buffer already.
KERNEL_BYTES: Final = 64 * 1024

# Fewer bytes in the page cache can wait for the fsync at the end.
MIN_WRITEBACK_BYTES: Final = 4 * 1024 * 1024

# What the disk is still busy with stays cached in any case, and each request walks the cache.
BEHIND_BYTES: Final = 192 * 1024 * 1024

Finished: TypeAlias = Callable[[OutputFile, Path, Digests], None]


class Writeback:
    """Early writeback of one file on btrfs, in a thread of its own; fsync does what is left.

    btrfs allocates and checksums in the thread that starts the writeback: a worker would wait
    meanwhile, and a fsync at the end would do all of it at once. What is on the disk is dropped
    from the page cache, so that the next bytes reuse those pages: fresh pages cost more than the
    copy into them, and the pages of other programs stay cached.
    """

    def __init__(self, descriptor: int, first: int) -> None:
        """Start the thread. first: where the first range will begin."""
        self._descriptor = descriptor
        self._started_to = first  # writeback was started for everything before this offset
        self._started: dict[int, int] = {}  # ranges beyond that, stop by start
        self._ranges: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._over = threading.Event()
        self._ended = threading.Event()
        try:
            threading.Thread(target=self._work, daemon=True).start()
        except RuntimeError:  # no more threads: fsync does it all
            self._over.set()
            self._ended.set()

    def begin(self, offset: int, nbytes: int) -> None:
        """Queue a range for writeback."""
        self._ranges.put((offset, nbytes))

    def end(self) -> None:
        """Stop the thread before the descriptor is closed; queued ranges are left to fsync."""
        self._over.set()
        self._ranges.put(None)
        # not `join`, which before 3.13 takes a thread for dead when a signal arrives
        self._ended.wait()

    def _work(self) -> None:
        try:
            while (asked := self._ranges.get()) is not None and not self._over.is_set():
                start_writeback(self._descriptor, *asked)
                self._started[asked[0]] = sum(asked)
                # only up to the first gap: pages beside it are still being filled
                while (stop := self._started.pop(self._started_to, None)) is not None:
                    self._started_to = stop
                if (behind := self._started_to - BEHIND_BYTES) > 0:
                    drop_cached(self._descriptor, behind)
        finally:
            self._ended.set()


class DiskSink(Sink):
    """One output file; `finished` gets it once all of it is on the disk, to give it its name."""

    def __init__(
        self, file: OutputFile, out: Path, methods: CopyMethods, finished: Finished
    ) -> None:
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
        """Whether blocks of any source file can be shared."""
        return self._methods.share_blocks

    def can_clone(self, file: int, offset: int, at: int, nbytes: int) -> bool:
        """Return whether a run of source file number `file` has blocks that can be shared."""
        first, last = whole_blocks(offset, at, nbytes, self._methods.block)
        return first < last and self._methods.of_file(file).shares_blocks

    @property
    def serial(self) -> bool:
        """Whether the output is on btrfs, where several workers on one file wait for each other."""
        return self._serial

    def open(self) -> None:
        """Create the file, at its full size where that helps, with its header.

        Raises IoFailed, DiskFull.
        """
        with writing(self._path):
            self._descriptor = os.open(self._partial, NEW_FILE, 0o666)
            if self._serial:  # let it grow: a write inside a file looks up the old blocks
                self._writeback = Writeback(self._descriptor, len(self._file.header))
            elif self.clones:  # clones would replace blocks reserved now
                os.truncate(self._descriptor, self._file.size)
            else:
                reserve(self._descriptor, self._file.size)
            self._direct = open_direct(self._partial)
        self.write(memoryview(self._file.header), 0)

    def write(self, view: memoryview, offset: int, origin: SourcePosition | None = None) -> None:
        """Write `view` at `offset` by the fastest way there is. Raises IoFailed, DiskFull."""
        first, last = self._write_direct(view, offset)
        for start, stop in ((0, first), (last, len(view))):
            done = start
            if origin is not None and stop - start >= KERNEL_BYTES and not self._serial:
                source, begin = origin
                done += self._copy(source, begin + start, offset + start, stop - start)
            if done < stop:
                self._write_cached(view[done:stop], offset + done)

    def _write_cached(self, view: memoryview, offset: int) -> None:
        # the kernel lets one thread at a time write to a file while the others spin; with a lock
        # they sleep, and meanwhile the one that has it lets others read and hash
        with self._writing, writing(self._path):
            write_at(self._descriptor, view, offset)
            self._cached_bytes += len(view)
        self._methods.tally.add(written=len(view))

    def _write_direct(self, view: memoryview, offset: int) -> tuple[int, int]:
        """Write whole pages past the page cache, uncopied and without a lock; return which bytes.

        [first, last) of `view`. File offset and memory address must both begin a page.
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

    def copy(self, source: OpenFile, offset: int, at: int, nbytes: int) -> int:
        """Copy in the kernel, where that is faster; return how many bytes, from the first."""
        past = self._direct is not None and not self._refused
        if past and nbytes >= DIRECT_BYTES + PAGE_BYTES:
            return 0  # reading them and writing past the page cache is faster
        return self._copy(source, offset, at, nbytes)

    def _copy(self, source: OpenFile, offset: int, at: int, nbytes: int) -> int:
        method = self._methods.of_file(source.number)
        if method.reads_bytes:
            return 0
        with self._writing, writing(self._path):
            done = method.copy(source.descriptor, offset, self._descriptor, at, nbytes)
            self._cached_bytes += done
        self._methods.tally.add(copied=done)
        return done

    def clone(self, source: OpenFile, offset: int, at: int, nbytes: int) -> tuple[int, int]:
        """Share the blocks that can be shared; return which bytes are in place: [first, last).

        The edges are left to be written.
        """
        method = self._methods.of_file(source.number)
        if not method.shares_blocks:
            return 0, 0
        with writing(self._path):
            first, last = method.clone(
                source.descriptor, offset, self._descriptor, at, nbytes, self._methods.block
            )
        if first < last:
            self._methods.tally.add(cloned=last - first)
        return first, last

    def batch_written(self, offset: int, nbytes: int) -> None:
        """Start writeback of a batch while the next one is copied.

        Not for the edges of clones: each would be a write of its own that a worker waits for.
        """
        if self.clones and self._cached_bytes < MIN_WRITEBACK_BYTES:
            return
        self._cached_bytes = 0
        if self._writeback is not None:
            self._writeback.begin(offset, nbytes)
        else:
            start_writeback(self._descriptor, offset, nbytes)

    def finish(self, digests: Digests) -> None:
        """Fsync the file and hand it over to be named. Raises IoFailed, DiskFull."""
        with writing(self._path):
            os.fsync(self._descriptor)
        self._finished(self._file, self._partial, digests)

    def close(self) -> None:
        """Close all descriptors, even where closing one fails. Raises IoFailed, DiskFull."""
        descriptors = [d for d in (self._direct, self._descriptor) if d is not None and d >= 0]
        writeback, self._writeback = self._writeback, None
        self._direct, self._descriptor = None, -1
        with writing(self._path), ExitStack() as stack:
            for descriptor in descriptors:
                stack.callback(os.close, descriptor)
            if writeback is not None:
                stack.callback(writeback.end)  # runs before they are closed
