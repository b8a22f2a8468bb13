"""Linux calls that copy, each with the plain way out where a system or file system lacks it."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

# what a file system answers that cannot copy between these two files in the kernel
_CANNOT: Final = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF}
)
# what only the file that is written to can be the cause of; any other failure of a copy may be the
# source's, and to read it and write it tells which
_NO_SPACE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_CLONE_RANGE: Final = 0x4020940D  # FICLONERANGE: _IOW(0x94, 13, struct file_clone_range)
# BTRFS_IOC_FS_INFO: _IOR(0x94, 31, struct btrfs_ioctl_fs_info_args), 1024 bytes, fsid from 16 on
_FS_INFO: Final = 0x8400941F
_FS_INFO_BYTES: Final = 1024
_FSID: Final = slice(16, 32)
_WRITE_NOW: Final = 2  # SYNC_FILE_RANGE_WRITE: start writing, do not wait
# statfs(2), f_type
_EXT4: Final = 0xEF53
_XFS: Final = 0x58465342
_BTRFS: Final = 0x9123683E
# where many threads may write past the page cache to one file at once; others lock or pretend
_DIRECT_FILE_SYSTEMS: Final = frozenset({_EXT4, _XFS})
_CLONING_FILE_SYSTEMS: Final = frozenset({_XFS, _BTRFS})

_libc = ctypes.CDLL(None, use_errno=True)
_offset = ctypes.c_int64


def reserve(descriptor: int, size: int) -> None:
    """Give a new file its size, and its blocks where that costs nothing. Raises OSError.

    Not `os.posix_fallocate`: where the file system cannot, the C library writes every block.
    """
    os.truncate(descriptor, size)
    call = getattr(_libc, "fallocate", None)
    if call is None or size == 0:
        return
    if call(descriptor, 0, _offset(0), _offset(size)) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise OSError(code, os.strerror(code))


def start_writeback(descriptor: int, offset: int, nbytes: int) -> None:
    """Let the disk begin on these bytes, so that the fsync at the end finds little to do."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:
        call(descriptor, _offset(offset), _offset(nbytes), ctypes.c_uint(_WRITE_NOW))


def drop_cached(descriptor: int, nbytes: int) -> None:
    """Take a file's first bytes out of the page cache, as far as they are on the disk.

    A hint, and it waits for nothing: a wait would be told of a failed write in fsync's place.
    """
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, nbytes, os.POSIX_FADV_DONTNEED)


def is_btrfs(path: Path) -> bool:
    """Whether a file is on btrfs, where what pays elsewhere costs more than it saves.

    Many workers on one file: they wait for one another, and each write inside a file looks for
    what was there before. And copies in the kernel of what was just read: these go through a pipe,
    64 KiB each.
    """
    return _kind(path) == _BTRFS


def open_direct(path: Path) -> int | None:
    """A second descriptor of a file, for writes past the page cache; None where they do not pay.

    Offsets, lengths and memory then are multiples of 4096 bytes. Raises OSError.
    """
    flag = getattr(os, "O_DIRECT", 0)
    if not flag or _kind(path) not in _DIRECT_FILE_SYSTEMS:
        return None
    try:
        return os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW | flag)
    except OSError as problem:
        if problem.errno in _CANNOT:
            return None
        raise


def may_clone(path: Path) -> bool:
    """Whether a file system is of a kind that can share blocks; only `clone_range` knows."""
    return _kind(path) in _CLONING_FILE_SYSTEMS


def file_system(path: Path) -> int | bytes:
    """What is alike for two files between which `clone_range` may do. Raises OSError.

    Not the device on btrfs: each subvolume says another one, and statfs(2) another `f_fsid`, too.
    """
    if _kind(path) == _BTRFS:
        facts = bytearray(_FS_INFO_BYTES)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(descriptor, _FS_INFO, facts)
            return bytes(facts[_FSID])
        except OSError as problem:
            if problem.errno not in _CANNOT and problem.errno != errno.ENOTTY:
                raise
        finally:
            os.close(descriptor)
    return path.stat().st_dev


def _kind(path: Path) -> int | None:
    """The file system's magic number."""
    facts = (ctypes.c_long * 64)()
    call = getattr(_libc, "statfs", None)
    return facts[0] if call is not None and call(os.fsencode(path), facts) == 0 else None


def clone_range(source: int, offset: int, target: int, at: int, nbytes: int) -> bool:
    """Let whole blocks of one file be those of the other, without a copy; False where it cannot.

    Offsets and length count bytes and are multiples of the block size. The caller copies what was
    not cloned. Raises OSError where there is no space. Source: ioctl_ficlonerange(2).
    """
    try:
        fcntl.ioctl(target, _CLONE_RANGE, struct.pack("=qQQQ", source, offset, nbytes, at))
    except OSError as problem:
        if problem.errno in _NO_SPACE:
            raise
        return False
    return True


def copy_in_kernel(source: int, offset: int, target: int, at: int, nbytes: int) -> int:
    """Bytes that the kernel copied from one file into the other: all, some or none.

    The caller reads and writes the rest itself. Raises OSError where there is no space.
    """
    done = 0
    while done < nbytes:
        try:
            count = os.copy_file_range(source, target, nbytes - done, offset + done, at + done)
        except OSError as problem:
            if problem.errno in _NO_SPACE:
                raise
            return done
        if count == 0:
            return done
        done += count
    return done
