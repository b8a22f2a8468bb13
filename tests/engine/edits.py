"""What somebody may do to an output: edit its files, or only copy, touch and link them."""

import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

DATA = "model-00001-of-00003.safetensors"
Edit = Callable[[Path], object]


def flip(path: Path, at: int = -1) -> None:
    """Change one bit in place."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    with path.open("r+b") as stream:
        stream.write(raw)


def flip_in_secret(path: Path, at: int = -1) -> None:
    """Change one bit, and put the time of the last write back."""
    before = path.stat()
    flip(path, at)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def exchange(path: Path) -> None:
    """Put another file of the same size, and older, in its place."""
    size = path.stat().st_size
    new = path.with_name("new")
    new.write_bytes(bytes(size))
    os.utime(new, (1, 1))
    new.replace(path)


def exchange_data(path: Path) -> None:
    """Put other tensors under the same header in its place, and make the file look old."""
    raw = path.read_bytes()
    new = path.with_name("new")
    new.write_bytes(raw[:-64] + bytes(64))
    os.utime(new, (1, 1))
    new.replace(path)


def retitle(path: Path) -> None:
    """Say in the header that it is of another framework."""
    path.write_bytes(path.read_bytes().replace(b'"format":"pt"', b'"format":"np"', 1))


def append(path: Path) -> None:
    """Add a byte."""
    with path.open("ab") as stream:
        stream.write(b"x")


def link(path: Path) -> None:
    """Move a file away and leave a link to it."""
    away = path.parent.with_name("away")
    path.rename(away)
    path.symlink_to(away)


def folder(path: Path) -> None:
    """Put a folder in its place."""
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    """Put a pipe in its place."""
    path.unlink()
    os.mkfifo(path)


def listen(path: Path) -> None:
    """Put a socket there. Its path may be short only."""
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
    finally:
        os.chdir(here)


# --- no byte is changed --------------------------------------------------------------------------
def touch_all(out: Path) -> None:
    """Give every file a time of its own, the root the oldest."""
    for number, path in enumerate(sorted(out.rglob("*"), key=lambda p: p.name != "moeconv.json")):
        os.utime(path, (1000 + number, 1000 + number))


def chmod_all(out: Path) -> None:
    """As an administrator does."""
    for path in out.rglob("*.safetensors"):
        path.chmod(0o600)


def link_all(out: Path) -> None:
    """As a cache does; the names there stay."""
    shutil.copytree(out, out.with_name("cache"), copy_function=os.link)


def copy_all(out: Path) -> None:
    """As it comes from elsewhere: without the times, the root first."""
    away = out.with_name("elsewhere")
    out.rename(away)
    out.mkdir()
    shutil.copyfile(away / "moeconv.json", out / "moeconv.json")
    for path in sorted(away.rglob("*")):
        place = out / path.relative_to(away)
        if path.is_dir():
            place.mkdir()
        elif not place.exists():
            shutil.copyfile(path, place)


def copy_by_name(out: Path, *, times: bool = False) -> None:
    """As rsync does without `-t`: by name, so that the root comes last."""
    away = out.with_name("edited")
    out.rename(away)
    for path in sorted(away.rglob("*"), key=lambda p: (p.name == "moeconv.json", p)):
        place = out / path.relative_to(away)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            shutil.copyfile(path, place)
            if times:
                shutil.copystat(path, place)
            time.sleep(0.01)  # a tick of the file system's clock


def copy_with_a_time_put_back(out: Path) -> None:
    """As `rsync -a` does, of a file that does not look as if it was edited."""
    os.utime(out / DATA, (1, 1))
    copy_by_name(out, times=True)


def touch_by_name(out: Path) -> None:
    """As `touch *` does, a moment each."""
    for path in sorted(out.iterdir()):
        os.utime(path)
        time.sleep(0.01)
