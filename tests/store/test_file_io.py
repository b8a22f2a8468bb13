"""Bytes of files come and go whole, and only one module asks the system for them."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moeconv
from moeconv.core.digest import digest
from moeconv.engine.output.atomic_file import write_single
from moeconv.errors import IoFailed
from moeconv.store import file_io
from moeconv.store.documents import file_digest, read_document
from moeconv.store.file_io import FileEnded
from moeconv.store.local import LocalFile
from tests.badinput.builders import qwen, write
from tests.badinput.checks import holds, tree

PACKAGE: Final = Path(moeconv.__file__).parent
RAW: Final = frozenset(
    ("read", "pread", "preadv", "readv", "write", "pwrite", "pwritev", "writev", "fdopen")
) | {"copy_file_range", "sendfile", "splice"}
WHOLE_FILES: Final = frozenset({"read_bytes", "write_bytes", "write_text"})
# the demo makes its own source, with a stock writer: nothing of it may rest on this code
ALLOWED: Final = {
    ("store/file_io.py", "pread"),
    ("store/file_io.py", "preadv"),
    ("store/file_io.py", "pwrite"),
    ("store/file_io.py", "write"),
    ("engine/copy/syscalls.py", "copy_file_range"),
    ("cli/demo_checkpoint.py", "write_text"),
    ("cli/demo.py", "read_bytes"),
}


def raw_calls(path: Path) -> Iterator[str]:
    """Whatever in a module may move a part of the bytes, and say so to nobody."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            yield from (a.name for a in node.names if a.name in RAW)
        elif isinstance(node, ast.Attribute):
            of_os = isinstance(node.value, ast.Name) and node.value.id == "os"
            if node.attr in (RAW if of_os else WHOLE_FILES):
                yield node.attr
        elif isinstance(node, ast.keyword) and node.arg == "buffering":
            yield "buffering"


def test_one_module_has_the_calls_that_move_bytes() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PACKAGE.rglob("*.py")
        for name in raw_calls(path)
    }
    assert found == ALLOWED


@given(
    data=st.binary(max_size=300),
    cuts=st.lists(st.integers(1, 40), max_size=60),
    at=st.integers(0, 50),
)
def test_all_bytes_through_calls_of_any_length(data: bytes, cuts: list[int], at: int) -> None:
    """Each call moves as many bytes as the next cut says, and all of them once there is none."""
    lengths = iter(cuts)
    real = {name: getattr(os, name) for name in ("pread", "preadv", "pwrite", "write")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "pread", lambda d, n, o: real["pread"](d, min(n, next(lengths, n)), o))
        patch.setattr(
            os, "pwrite", lambda d, v, o: real["pwrite"](d, v[: next(lengths, len(v))], o)
        )
        patch.setattr(os, "write", lambda d, v: real["write"](d, v[: next(lengths, len(v))]))
        patch.setattr(
            os, "preadv", lambda d, b, o: real["preadv"](d, [b[0][: next(lengths, len(b[0]))]], o)
        )
        descriptor = os.memfd_create("bytes")
        try:
            file_io.append(descriptor, b"\0" * at)
            file_io.append(descriptor, data)
            assert file_io.read_bytes(descriptor, len(data), at) == data
            view = memoryview(bytearray(len(data)))
            file_io.write_at(descriptor, memoryview(data[::-1]), at)
            file_io.read_into(descriptor, view, at)
            assert view == data[::-1]
            assert file_io.read_available(descriptor, memoryview(bytearray(400)), at) == len(data)
            with pytest.raises(FileEnded, match=f"ends at byte {at + len(data):,}"):
                file_io.read_bytes(descriptor, len(data) + 1, at)
        finally:
            os.close(descriptor)


WRITERS: dict[str, Callable[[Path], object]] = {
    "pwrite": lambda path: moeconv.fuse(path / "src", path / "out"),
    "write": lambda path: write_single(path / "map.json", b"{}"),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_write_of_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Not a loop without end."""
    write(tmp_path / "src", qwen())
    before = tree(tmp_path)
    monkeypatch.setattr(os, name, lambda *_: 0)
    with pytest.raises(IoFailed) as caught:
        WRITERS[name](tmp_path)
    holds(caught.value, IoFailed, "cannot write", "wrote none of the bytes")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("left", [0, 1, 4999])
def test_a_file_that_is_cut_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: int
) -> None:
    """After it was opened, so that its size is known, and before its bytes are."""
    path, data = tmp_path / "config.json", os.urandom(5000)
    readers: tuple[Callable[[], object], ...] = (
        lambda: read_document(LocalFile.at(path, name=path.name), 1 << 20),
        lambda: file_digest(path, name=path.name),
    )
    real = {name: getattr(os, name) for name in ("pread", "preadv")}

    def cut(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            os.truncate(path, left)
            return real[name](*arguments)

        return call

    for name in real:
        monkeypatch.setattr(os, name, cut(name))
    for reader in readers:
        path.write_bytes(data)
        with pytest.raises(IoFailed) as caught:
            reader()
        holds(caught.value, IoFailed, "cannot read `config.json`", f"ends at byte {left:,}")
    monkeypatch.undo()
    path.write_bytes(data)
    assert [reader() for reader in readers] == [data, digest(data)]
