"""File systems that clone, mounted for a test; checkpoints to clone from; the ways to copy."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from moeconv.api.run import Result
from moeconv.engine.copy import disk_sink, methods
from tests.badinput.builders import config, qwen, write
from tests.filesystems import MAKE, mounted

IMAGE_BYTES = 400 * 1024 * 1024
MATRICES_BYTES = 4 * 3 * 256 * 1024 * 2  # of `big`
WAYS = ("kernel", "buffer", "short")


@pytest.fixture(scope="module", params=sorted(MAKE))
def cloning(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A mounted file system that clones."""
    with mounted_if_can_be(MAKE[request.param], tmp_path_factory.mktemp(request.param)) as place:
        yield place


@contextmanager
def mounted_if_can_be(make: list[str], folder: Path) -> Iterator[Path]:
    """A file system in a file of the folder; skips the test where there can be none."""
    if os.geteuid() or shutil.which(make[0]) is None:
        pytest.skip(f"needs root, loop devices and {make[0]}")
    with ExitStack() as stack:
        try:
            place = stack.enter_context(mounted(make, folder, IMAGE_BYTES))
        except subprocess.CalledProcessError as problem:
            said = problem.stderr.decode().strip()
            pytest.skip(f"`{' '.join(make)}` and a loop device do not work here: {said}")
        yield place


def source(folder: Path) -> Path:
    """Eight experts in two layers, a matrix 64 KiB."""
    tensors = qwen(8, 64, 512, layers=2)
    return write(
        folder, tensors, config=config(experts=8, width=64, hidden=512, num_hidden_layers=2)
    )


def share(result: Result) -> float:
    """The part of the data that was cloned."""
    assert result.methods is not None
    return result.methods.tally.cloned / result.plan.tensor_bytes


def used(result: Result) -> set[str]:
    """The methods that were found."""
    assert result.methods is not None
    return set(result.methods.found.values())


def phased(folder: Path, make: Callable[[Path], Path] = source) -> Path:
    """A foreign source whose data starts 8 bytes beyond a page's middle, as others' may."""
    made = make(folder)
    path = made / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    wanted = size + (2056 - 8 - size) % 4096
    path.write_bytes(
        wanted.to_bytes(8, "little") + raw[8 : 8 + size].ljust(wanted) + raw[8 + size :]
    )
    return made


def big(folder: Path) -> Path:
    """Four experts of one layer, a matrix 512 KiB."""
    return write(folder, qwen(4, 256, 1024), config=config(width=256, hidden=1024))


def go_by(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the kernel copy all it is asked for, nothing (`buffer`), or a part of it (`short`)."""
    real = methods.copy_in_kernel

    def short(source: int, offset: int, target: int, at: int, nbytes: int) -> int:
        return real(source, offset, target, at, max(nbytes // 3, 1))

    monkeypatch.setattr(disk_sink, "open_direct", lambda _: None)
    if way == "short":
        monkeypatch.setattr(methods, "copy_in_kernel", short)
    if way == "buffer":
        monkeypatch.setattr(methods, "copy_in_kernel", lambda *_: 0)
