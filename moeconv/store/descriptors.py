"""A bounded pool of open files: idle ones are closed and opened again when needed."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import Final

# for files of the caller, directories to be synced, what a library opens for a moment
_SPARE: Final = 12
_TOO_MANY: Final = frozenset({errno.EMFILE, errno.ENFILE})


def descriptors_left(wanted: int) -> int:
    """How many more files this process may open, less a few that are reserved for other uses.

    The soft limit is raised, up to the hard one, as far as `wanted` files need; never lowered.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = _open_now() + wanted + _SPARE
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with suppress(ValueError, OSError):  # where the system forbids it, the old limit holds
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(raised, soft), hard))
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(soft - _open_now() - _SPARE, 0)


def _open_now() -> int:
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - numbers, not paths
    except OSError:  # without /proc, or with no descriptor left to list it
        return _SPARE


class DescriptorPool:
    """Descriptors of numbered files, at most `most` of them, shared by threads.

    A descriptor in use is never closed. Of the others, the least recently used one is closed when
    another file needs its place.
    """

    def __init__(
        self, open_file: Callable[[int], int], leave: Callable[[int, int], None], *, most: int
    ) -> None:
        """open_file: gives the descriptor of a file, and raises OSError where it cannot.

        leave: is called with number and descriptor before one is closed to make space.
        """
        self._open_file = open_file
        self._leave = leave
        self.most = max(most, 1)
        self._open: OrderedDict[int, int] = OrderedDict()  # held least recently first
        self._holders: dict[int, int] = {}
        self._lock = threading.Lock()

    @property
    def open(self) -> dict[int, int]:
        """The descriptors that are open now, by number."""
        with self._lock:
            return dict(self._open)

    def take(self, number: int) -> int:
        """The descriptor of a file, held until it is given back.

        Raises OSError, and what `open_file` and `leave` raise.
        """
        with self._lock:
            found = self._open.get(number)
            if found is None:
                found = self._open[number] = self._opened(number)
            else:
                self._open.move_to_end(number)
            self._holders[number] = self._holders.get(number, 0) + 1
            return found

    def give_back(self, number: int) -> None:
        """End one hold of a file."""
        with self._lock:
            self._holders[number] -= 1

    def _opened(self, number: int) -> int:
        while len(self._open) >= self.most and self._close_one():
            continue
        while True:
            try:
                return self._open_file(number)
            except OSError as problem:
                # others of this process opened files meanwhile
                if problem.errno not in _TOO_MANY or not self._close_one():
                    raise

    def _close_one(self) -> bool:
        """Close a file that is not in use; return whether there was one."""
        number = next((n for n in self._open if not self._holders.get(n)), None)
        if number is None:
            return False
        self._leave(number, self._open[number])
        _close(self._open.pop(number))
        return True

    def close(self) -> None:
        """Close all files; none is in use any more."""
        with self._lock:
            while self._open:
                _close(self._open.popitem()[1])
            self._holders.clear()


def _close(descriptor: int) -> None:
    with suppress(OSError):  # it was only read from
        os.close(descriptor)


class Lease:
    """One thread's hold on one file of a pool at a time: another costs the first."""

    def __init__(self, pool: DescriptorPool) -> None:
        self._pool = pool
        self.number = -1
        self.descriptor = -1

    def on(self, number: int) -> int:
        """The descriptor of a file, until the next call. Raises what the pool raises."""
        if number != self.number:
            self.close()
            self.descriptor = self._pool.take(number)
            self.number = number
        return self.descriptor

    def close(self) -> None:
        """Give back the held descriptor, if any."""
        if self.number >= 0:
            number, self.number, self.descriptor = self.number, -1, -1
            self._pool.give_back(number)
