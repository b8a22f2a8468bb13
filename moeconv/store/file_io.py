"""Complete reads and writes: the only calls of `os` that move the bytes of a file.

A system call may transfer less than it was asked to: at the end of a file, on a full disk, at a
limit, before a bad sector, or for no reason. The count it returns is checked here only.
`engine.copy.syscalls` has the copies inside the kernel, whose rest goes through these functions.
"""

from __future__ import annotations

import errno
import os
from typing import Final

_STEP_BYTES: Final = 1 << 24  # of one read into new memory


class FileEnded(OSError):
    """A file ends before bytes that it had when it was looked at, or that its header claims."""

    def __init__(self, offset: int) -> None:
        super().__init__(errno.ENODATA, f"the file ends at byte {offset:,}")


def read_available(descriptor: int, view: memoryview, offset: int) -> int:
    """Fill `view` with the bytes from `offset` on, as far as the file goes; how many there were.

    Fewer than `len(view)` only where the file ends. Raises OSError.
    """
    done, size = 0, len(view)
    while done < size:
        count = os.preadv(descriptor, [view[done:] if done else view], offset + done)
        if not count:
            break
        done += count
    return done


def read_into(descriptor: int, view: memoryview, offset: int) -> None:
    """Fill `view` with the bytes from `offset` on. Raises FileEnded, OSError."""
    done = os.preadv(descriptor, [view], offset)
    if done == len(view):
        return
    if done:
        done += read_available(descriptor, view[done:], offset + done)
    if done < len(view):
        raise FileEnded(offset + done)


def read_bytes(descriptor: int, nbytes: int, offset: int = 0) -> bytes:
    """The `nbytes` bytes from `offset` on. Raises FileEnded, OSError.

    Memory is taken as they arrive, not for what was asked.
    """
    first = os.pread(descriptor, min(nbytes, _STEP_BYTES), offset)
    if len(first) == nbytes:
        return first
    out = bytearray(first)
    while len(out) < nbytes:
        data = os.pread(descriptor, min(nbytes - len(out), _STEP_BYTES), offset + len(out))
        if not data:
            raise FileEnded(offset + len(out))
        out += data
    return bytes(out)


def write_at(descriptor: int, view: memoryview, offset: int) -> None:
    """Write all of `view` at `offset`. Raises OSError."""
    done, size = 0, len(view)
    while done < size:
        count = os.pwrite(descriptor, view[done:] if done else view, offset + done)
        _refuse_none(count)
        done += count


def write_blocks(descriptor: int, view: memoryview, offset: int, block: int) -> int:
    """Write whole blocks to a descriptor that takes nothing else; how many bytes were written.

    Fewer than `len(view)` where the system wrote a part of a block: it takes no more then.
    Raises OSError.
    """
    done, size = 0, len(view)
    while done < size:
        count = os.pwrite(descriptor, view[done:], offset + done)
        done += count
        if not count or count % block:
            break
    return done


def append(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of `data` where the descriptor's own position is. Raises OSError."""
    view = memoryview(data)
    while view:
        count = os.write(descriptor, view)
        _refuse_none(count)
        view = view[count:]


def _refuse_none(count: int) -> None:
    if count <= 0:
        raise OSError(errno.EIO, "the system wrote none of the bytes and reported no error")
