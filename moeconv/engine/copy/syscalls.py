"""Linux system calls for copying; each does nothing, and reports it, where it is unsupported."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Final

# what a file system answers if it cannot copy between these two files in the kernel
_CANNOT: Final = frozenset(
    {errno.EXDEV, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EBADF}
)
# only the target can cause these; any other failure of a copy may be the source's, and reading and
# writing the bytes instead will show which
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
    """Set a new file's size, and allocate its blocks if the file system can. Raises OSError.

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
    """Start writing a range to the disk without waiting, so that the final fsync is short."""
    call = getattr(_libc, "sync_file_range", None)
    if call is not None:
        call(descriptor, _offset(offset), _offset(nbytes), ctypes.c_uint(_WRITE_NOW))


def drop_cached(descriptor: int, nbytes: int) -> None:
    """Drop a file's first bytes from the page cache, as far as they are on the disk.

    It does not wait: a wait would report, and so clear, the write error that fsync must report.
    """
    with suppress(OSError):
        os.posix_fadvise(descriptor, 0, nbytes, os.POSIX_FADV_DONTNEED)


def is_btrfs(path: Path) -> bool:
    """Return whether a file is on btrfs, where two optimisations are slower than plain writes.

    Several workers on one file wait for each other, and each write inside a file looks up the old
    blocks. Copies in the kernel of bytes that were just read go through a pipe, 64 KiB at a time.
    """
    return _kind(path) == _BTRFS


def open_direct(path: Path) -> int | None:
    """Open a file again for writes past the page cache (O_DIRECT); None where they are slower.

    Offsets, lengths and memory addresses must be multiples of 4096 bytes. Raises OSError.
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
    """Return whether a file system's kind can share blocks; only `clone_range` knows for sure."""
    return _kind(path) in _CLONING_FILE_SYSTEMS


def file_system(path: Path) -> int | bytes:
    """Return an id of a path's file system: `clone_range` needs the same one. Raises OSError.

    On btrfs it is not the device: that differs by subvolume, as does `f_fsid` of statfs(2).
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
    """Return the file system's magic number."""
    facts = (ctypes.c_long * 64)()
    call = getattr(_libc, "statfs", None)
    return facts[0] if call is not None and call(os.fsencode(path), facts) == 0 else None


def clone_range(source: int, offset: int, target: int, at: int, nbytes: int) -> bool:
    """Share whole blocks of one file with another (ioctl_ficlonerange(2)); False if it cannot.

    Offsets and length are in bytes, multiples of the block size. Raises OSError (ENOSPC) if the
    disk is full.
    """
    try:
        fcntl.ioctl(target, _CLONE_RANGE, struct.pack("=qQQQ", source, offset, nbytes, at))
    except OSError as problem:
        if problem.errno in _NO_SPACE:
            raise
        return False
    return True


def copy_in_kernel(source: int, offset: int, target: int, at: int, nbytes: int) -> int:
    """Copy bytes between two files with copy_file_range(2); return how many, from the first.

    May copy less than `nbytes`. Raises OSError (ENOSPC) if the disk is full.
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
