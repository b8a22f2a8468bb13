"""Blocks larger than a page: fewer of them can be clones, and the bytes are the same."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import moeconv
from moeconv.api.run import Result
from moeconv.engine.copy import methods
from tests.engine.cloning import big, mounted_if_can_be, share, used
from tests.filesystems import MAKE
from tests.helpers import tree_sha256

KIB = 1024


@pytest.fixture(scope="module", params=[16, 64])
def large_blocks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """A mounted XFS with blocks of so many KiB."""
    make = [*MAKE["XFS"], "-b", f"size={request.param * KIB}"]
    with mounted_if_can_be(make, tmp_path_factory.mktemp(f"xfs{request.param}k")) as place:
        yield place


@pytest.mark.parametrize("align", ["page", "source"])
@pytest.mark.parametrize("digests", ["now", "later"])
def test_large_blocks_make_the_same_bytes(
    large_blocks: Path, tmp_path: Path, align: str, digests: str
) -> None:
    def ways(place: Path) -> list[Result]:
        src, fused, again = big(place / "src"), place / "fused", place / "again"
        return [
            moeconv.fuse(src, fused, align=align, digests=digests),
            moeconv.fuse(fused, again, align=align, digests=digests),
            moeconv.shard(fused, place / "ranks", ep_size=2, align=align, digests=digests),
            moeconv.merge(place / "ranks", place / "merged"),
        ]

    place = large_blocks / f"{align}-{digests}"
    found = ways(place)
    ways(tmp_path)
    for result in found:
        assert result.methods is not None
        assert used(result) == {methods.REFLINK}
        assert result.methods.block == os.statvfs(place).f_bsize
        assert result.disk_space.shared <= result.methods.tally.cloned
    # the same places in both files, so all whole blocks; elsewhere it is luck
    assert share(found[1]) > 0.9
    assert tree_sha256(place) == tree_sha256(tmp_path)
    shutil.rmtree(place)
