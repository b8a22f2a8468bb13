"""Digests that are promised, or to come later: what need not be read, and what must be."""

import shutil
from pathlib import Path

import pytest

import moeconv
from moeconv.engine.copy import disk_sink, methods, worker
from moeconv.errors import Damaged
from moeconv.plan.model import CopyTile
from tests.badinput.builders import config, qwen, write
from tests.calls import around
from tests.engine.cloning import MATRICES_BYTES, big, share, source
from tests.helpers import tree_sha256


@pytest.mark.parametrize("align", ["page", "source"])
def test_digests_that_come_later_do_so_on_every_file_system(
    cloning: Path, tmp_path: Path, align: str
) -> None:
    src = source(tmp_path / "src")
    moeconv.fuse(src, tmp_path / "out", align=align, digests="later")
    shutil.copytree(src, cloning / "src")
    moeconv.fuse(cloning / "src", cloning / "out", align=align, digests="later")
    assert tree_sha256(tmp_path / "out") == tree_sha256(cloning / "out")
    for out in ("src", "out"):
        shutil.rmtree(cloning / out)


def test_digests_later_looks_at_no_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel copies; nobody looks at the bytes of a large matrix."""
    src = big(tmp_path / "src")
    monkeypatch.setattr(disk_sink, "open_direct", lambda _: None)
    result = moeconv.fuse(src, tmp_path / "out", digests="later")
    assert result.methods is not None
    assert result.methods.tally.copied >= MATRICES_BYTES
    assert result.manifest is not None
    assert result.manifest.root.fingerprint is None
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("layout", ["stacked", "kn"])
def test_what_is_smaller_than_a_block_is_compared_with_its_known_digest(
    cloning: Path, tmp_path: Path, layout: str
) -> None:
    """Turned matrices that stay as they are, too: they are read where they cannot be cloned."""
    src = write(tmp_path / "src", qwen(8, 8, 16), config=config(experts=8, width=8, hidden=16))
    moeconv.fuse(src, cloning / "small", layout=layout)
    (data,) = (cloning / "small").glob("*.safetensors")
    raw = bytearray(data.read_bytes())
    tensors = moeconv.open_source(cloning / "small").checkpoint.tensors
    tensor = next(t for t in tensors if "experts" in t.name)
    raw[tensor.offset + 70] ^= 1
    data.write_bytes(raw)
    with pytest.raises(Damaged):
        moeconv.shard(cloning / "small", cloning / "damaged", ep_size=4, layout=layout)
    shutil.rmtree(cloning / "small")


def test_where_nothing_can_be_cloned_after_all_every_digest_is_compared(
    cloning: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    src = source(tmp_path / "src")
    moeconv.fuse(src, cloning / "fused")
    monkeypatch.setattr(methods.Reflink, "clone", lambda *_: (0, 0))
    rows: list[int] = []
    real = worker._adjacent_copies

    def seen(found: list[CopyTile]) -> None:
        rows.append(len(found))

    monkeypatch.setattr(worker, "_adjacent_copies", around(real, after=seen))
    result = moeconv.shard(cloning / "fused", cloning / "out", ep_size=4)
    assert share(result) == 0
    # each tile is looked at once, however long the row that cannot be cloned
    assert sum(rows) <= sum(len(file.tiles) for file in result.plan.files)
    assert moeconv.verify(cloning / "out").ok
    (data,) = (cloning / "fused").glob("*.safetensors")
    raw = bytearray(data.read_bytes())
    raw[-5000] ^= 1
    data.write_bytes(raw)
    with pytest.raises(Damaged):
        moeconv.shard(cloning / "fused", cloning / "again", ep_size=4)
    for out in ("fused", "out"):
        shutil.rmtree(cloning / out)
