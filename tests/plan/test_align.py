"""`--align source`: how much of a foreign checkpoint's bytes stand where they could be cloned."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeconv
from moeconv.plan.align import SourcePosition, by_source_position
from moeconv.plan.model import CopyTile, OutputFile
from moeconv.plan.tensors import PlannedTensor
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


MIB = 1 << 20


def grouped(*positions: tuple[float, SourcePosition]) -> list[int]:
    """The number of tensors in each file, of tensors of so many MiB at these positions."""
    return [len(group) for group in groups(*positions)]


def groups(*positions: tuple[float, SourcePosition]) -> list[list[int]]:
    """The numbers of the tensors in each file."""
    sizes = [int(size * MIB) for size, _ in positions]
    planned = [PlannedTensor(f"t{n}", "U8", (size,), size) for n, size in enumerate(sizes)]
    found = by_source_position(
        planned, {f"t{n}": source_position for n, (_, source_position) in enumerate(positions)}
    )
    return [[int(tensor.name[1:]) for tensor in group] for group in found]


def test_another_file_begins_only_where_it_pays_for_both() -> None:
    turned, here, there = (
        SourcePosition(0, 0),
        SourcePosition(0, 70 * MIB, 8),
        SourcePosition(1, 0, 16),
    )
    assert grouped((70, here), (70, there)) == [1, 1]
    assert grouped((70, turned), (70, here)) == [2]  # what wants no start agrees with any
    assert grouped((63, here), (70, there)) == [2]
    assert grouped((70, here), (63, there)) == [2]
    # bytes that want nothing pay for nothing
    assert grouped(
        (1, here), (70, SourcePosition(0, 71 * MIB)), (1, there), (70, SourcePosition(1, MIB))
    ) == [4]
    assert grouped(
        (70, here), (1, there), (70, SourcePosition(1, MIB, 8)), (70, SourcePosition(2, 0, 16))
    ) == [3, 1]
    # and a file that ends as a later part wants to begin goes on with it
    assert grouped(
        (70, here), (70, there), (70, SourcePosition(2, 0, 8)), (70, SourcePosition(3, 0, 16))
    ) == [2, 2]
    # an odd size between two source files keeps nobody from a file of its own
    assert grouped((70, here), (4 / MIB, SourcePosition(0, 70 * MIB)), (70, there)) == [2, 1]
    # but no file can start at 4 mod 8
    assert grouped((70, here), (70, SourcePosition(1, 0, 12))) == [2]


def test_of_two_files_that_end_alike_the_first_goes_on() -> None:
    eight = 8 / MIB
    rows = groups(
        (70, SourcePosition(0, 0, 8)),
        (70 + eight, SourcePosition(1, 0, 0)),
        (70, SourcePosition(2, 0, 800)),
        (70, SourcePosition(3, 0, 8)),
    )
    assert rows == [[0, 3], [1], [2]]


def test_data_at_4_mod_8_in_the_source_is_clonable_too(tmp_path: Path) -> None:
    """As behind an odd number of scalar scales: the file starts at a multiple of 8 all the same."""
    tensors = {"model.layers.0.scale": ("F32", (1,)), **qwen(4, 64, 1024)}
    src = padded(write(tmp_path / "src", tensors, config=config(width=64, hidden=1024)))
    assert clonable(planned(src)) > 0.9


def padded(made: Path) -> Path:
    """With a header of a multiple of 8 bytes, as safetensors writes it."""
    data = made / "model.safetensors"
    raw = data.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    head = raw[8 : 8 + size].ljust(size + -size % 8)
    data.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + size :])
    return made


def test_where_the_source_s_order_misplaces_it_is_that_of_other_files(tmp_path: Path) -> None:
    own = {"model.c": ("U8", (3,)), "model.z": ("BF16", (3,)), "model.b": ("BF16", (3,))}
    files = planned(write(tmp_path / "src", {**own, **qwen()}))
    names = [t.name for f in files for t in f.tensors]
    assert [n for n in names if n in own] == ["model.b", "model.z", "model.c"]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("outer", [0, 1])
def test_a_stack_is_where_its_first_byte_is(tmp_path: Path, outer: int, whole: bool) -> None:
    """Not where its first expert does, or its last; whether it can be cloned or not."""
    plain = qwen(2, 64, 512, layers=2)
    parts = {n: s for n, s in plain.items() if ".experts." in n}
    first = "model.layers.{}.mlp.experts.{}."
    inner = 1 - outer
    pairs = ((outer, outer), (inner, inner), (inner, outer), (outer, inner))  # layer, expert
    order = [first.format(*pair) for pair in pairs]
    tensors = {n: s for stem in order for n, s in parts.items() if n.startswith(stem)}
    tensors |= plain
    said = config(experts=2, width=64, hidden=512, num_hidden_layers=2)
    src = write(tmp_path / "src", tensors, config=said)
    if whole:
        padded(src)
    files = planned(src)
    assert (clonable(files) > 0) == whole
    names = [t.name for f in files for t in f.tensors if "experts" in t.name]
    assert [int(n.split(".")[2]) for n in names] == [outer, outer, inner, inner]


def test_ranks_have_few_files_though_what_is_between_is_not_theirs(tmp_path: Path) -> None:
    """Norms of 256 bytes are common: a rank's layers want eight phases in turn, not 48."""
    write_phantom(tmp_path / "src", "qwen3-30b-a3b", shard_bytes=10**12)
    result = moeconv.shard(
        tmp_path / "src", tmp_path / "out", ep_size=8, align="source", layout="fused", dry_run=True
    )
    ranks = tuple(f for f in result.plan.files if f.rank is not None)
    assert clonable(ranks) > 0.997
    assert len(ranks) == 8 * 8
