"""`--align source`: how much of a foreign checkpoint's bytes stand where they could be cloned."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeconv
from moeconv.plan.values import CopyTile, OutputFile
from tests.badinput.builders import config, qwen, two_files, write
from tests.bench.make_checkpoint import write_phantom

PAGE = 4096


def planned(source: Path, *, size: int = 5_000_000_000) -> tuple[OutputFile, ...]:
    """The files that a fused output would have."""
    out = source.parent / "out"
    result = moeconv.fuse(source, out, align="source", max_shard_size=size, dry_run=True)
    return result.plan.files


def clonable(files: tuple[OutputFile, ...]) -> float:
    """The part of all data bytes that are whole blocks at one place in source and target."""
    nbytes = whole = 0
    for tile in (t for f in files for t in f.tiles):
        nbytes += tile.nbytes
        if isinstance(tile, CopyTile) and (tile.offset - tile.start) % PAGE == 0:
            whole += max(tile.nbytes - PAGE, 0)
    return whole / nbytes


def misaligned(files: tuple[OutputFile, ...]) -> list[str]:
    """Tensors of BF16 or F32 that do not start at a multiple of their dtype's size."""
    size = {"U8": 1, "BF16": 2, "F32": 4}
    return [t.name for f in files for t in f.tensors if t.offset % size[t.dtype]]


def test_a_model_in_one_file_is_clonable_but_for_edges(tmp_path: Path) -> None:
    write_phantom(tmp_path / "src", "qwen3-30b-a3b", shard_bytes=10**12)
    files = planned(tmp_path / "src")
    assert clonable(files) > 0.997  # a tile of 3 MB has an edge of 4 KB
    assert len(files) == 13  # no more than 61 GB need
    assert misaligned(files) == []


def test_published_files_lose_the_layers_that_they_cut_in_two(tmp_path: Path) -> None:
    """Of such a stack only the larger part can be cloned: it is one tensor in one phase."""
    write_phantom(tmp_path / "src", "qwen3-30b-a3b")
    assert len(list((tmp_path / "src").glob("*.safetensors"))) == 13
    files = planned(tmp_path / "src")
    assert clonable(files) > 0.88
    assert len(files) <= 14


SIZES = config(experts=8, width=64, hidden=512, num_hidden_layers=2)


@pytest.mark.parametrize("odd", [1, 2, 3, 30])
def test_a_tensor_of_odd_size_misplaces_nobody(tmp_path: Path, odd: int) -> None:
    """Here it stands first, and everything behind it at an odd place already in the source."""
    tensors = {"model.layers.0.odd": ("U8", (odd,)), **qwen(8, 64, 512, layers=2)}
    files = planned(write(tmp_path / "src", tensors, config=SIZES))
    assert misaligned(files) == []


def test_small_files_share_one_of_ours(tmp_path: Path) -> None:
    files = planned(write(tmp_path / "src", two_files(qwen(8, 64, 512, layers=2)), config=SIZES))
    assert len(files) == 1
    names = [t.name for f in files for t in f.tensors]
    assert len(names) == len(set(names)) == 7  # two stacks of two, two routers, the embedding
