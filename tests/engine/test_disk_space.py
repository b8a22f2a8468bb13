"""What clones are said to share with the source: never more than they do, and not less."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import moeconv
from moeconv.api.run import Result
from moeconv.engine.copy.worker import CLONED_TILE_BYTES
from tests.engine.cloning import phased, source

BLOCK = 4096


def cloned(result: Result) -> int:
    """The bytes that were cloned."""
    assert result.methods is not None
    return result.methods.tally.cloned


def test_subvolumes_are_one_file_system(cloning: Path, tmp_path: Path) -> None:
    if not cloning.parent.name.startswith("btrfs"):
        pytest.skip("only btrfs has subvolumes")
    here, there = cloning / "here", cloning / "there"
    for place in (here, there):
        subprocess.run(["btrfs", "-q", "subvolume", "create", place], check=True)
    moeconv.fuse(source(tmp_path / "src"), here / "fused")
    assert (here / "fused").stat().st_dev != there.stat().st_dev
    near = moeconv.shard(here / "fused", here / "ranks", ep_size=4)
    far = moeconv.shard(here / "fused", there / "ranks", ep_size=4)
    assert far.disk_space.shared == near.disk_space.shared > far.disk_space.needed * 0.8
    assert cloned(far) == cloned(near) >= far.disk_space.shared
    for place in (here, there):
        subprocess.run(["btrfs", "-q", "subvolume", "delete", place], check=True)


def test_a_source_elsewhere_shares_nothing(cloning: Path, tmp_path: Path) -> None:
    moeconv.fuse(source(tmp_path / "src"), tmp_path / "fused")
    result = moeconv.shard(tmp_path / "fused", cloning / "ranks", ep_size=4)
    assert result.disk_space.shared == 0 == cloned(result)
    shutil.rmtree(cloning / "ranks")


def test_of_a_mixed_source_only_what_is_near_is_shared(
    cloning: Path,
    tmp_path: Path,
) -> None:
    """Some shards may be on another disk."""
    moeconv.fuse(source(tmp_path / "src"), cloning / "fused", max_shard_size=1_000_000)
    whole = moeconv.shard(cloning / "fused", cloning / "ranks", ep_size=4, dry_run=True)
    files = sorted((cloning / "fused").glob("*.safetensors"))
    assert len(files) > 1
    shutil.copy(files[0], tmp_path / "elsewhere")
    subprocess.run(["mount", "--bind", tmp_path / "elsewhere", files[0]], check=True)
    try:
        mixed = moeconv.shard(cloning / "fused", cloning / "ranks", ep_size=4)
    finally:
        subprocess.run(["umount", files[0]], check=True)
    assert 0 < mixed.disk_space.shared < whole.disk_space.shared
    assert mixed.disk_space.shared <= cloned(mixed) < whole.disk_space.needed
    shutil.rmtree(cloning / "fused")
    shutil.rmtree(cloning / "ranks")


def test_the_edges_of_a_foreign_source_are_not_shared(
    cloning: Path,
) -> None:
    """Where a tensor begins within a block, its first and last blocks are copied."""
    made = phased(cloning / "src")
    page = moeconv.fuse(made, cloning / "page", dry_run=True)
    assert page.disk_space.shared == 0  # beginnings differ: no block is alike
    aligned = moeconv.fuse(made, cloning / "aligned", align="source")
    assert aligned.disk_space.shared == cloned(aligned)
    tiles = [t for f in aligned.plan.files for t in f.tiles if t.nbytes >= CLONED_TILE_BYTES]
    assert aligned.disk_space.shared == sum(t.nbytes - BLOCK for t in tiles)
    shutil.rmtree(cloning / "src")
    shutil.rmtree(cloning / "aligned")
