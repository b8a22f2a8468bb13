"""File systems in files, mounted for a while; needs root and loop devices."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAKE = {"XFS": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}
"""Those that clone: the command that makes one, but for the file."""


def image_of(place: Path) -> Path:
    """The file that holds what is mounted there."""
    return place.with_suffix(".image")


@contextmanager
def mounted(make: list[str], folder: Path, size: int) -> Iterator[Path]:
    """A new file system of so many bytes in a file of the folder, which keeps holes as holes.

    Raises CalledProcessError where it cannot be made or mounted.
    """
    place = folder / "mounted"
    image = image_of(place)
    place.mkdir()
    try:
        with image.open("wb") as stream:
            stream.truncate(size)
        subprocess.run([*make, image], check=True, capture_output=True)
        mount = ["mount", "-o", "loop", image, place]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield place
        finally:
            subprocess.run(["umount", place], check=True)
    finally:
        image.unlink(missing_ok=True)
        place.rmdir()
