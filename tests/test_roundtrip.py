"""Any checkpoint of a shipped family, to any layout and back: the same files, the same model."""

import json
import re
import tempfile
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import moeconv
from moeconv.errors import MoeconvError, StraddlingBlock, SubByteAxis
from tests.helpers import (
    BITS,
    Spec,
    nbytes,
    read_header,
    read_tensors,
    tree_sha256,
    write_checkpoint,
)
from tests.models import FAMILIES, Disk, Model, disks, models
from tests.reference import Place, arranged, random_part, stored

PAGE = 4096


@given(models(), disks(), st.data())
def test_there_and_back_is_the_identity(model: Model, disk: Disk, data: st.DataObject):
    source, target = (
        data.draw(st.sampled_from(list(FAMILIES[model.family].layouts))) for _ in range(2)
    )
    # stacks are detected one by one: the last one may be stored in another way
    odd_one = (
        data.draw(st.sampled_from((source, "per-expert"))) if len(model.stacks) > 1 else source
    )
    size = data.draw(st.sampled_from((1, 2 * PAGE, 10**9)))
    jobs = data.draw(st.sampled_from((1, 3)))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        tensors = model.tensors(source, odd_one=odd_one)
        src = disk.write(root / "src", tensors, model.config)
        before = tree_sha256(src)
        moeconv.fuse(
            src,
            root / "out",
            layout=target,
            from_layout=source,
            max_shard_size=size,
            max_memory=1,
            jobs=jobs,
        )
        assert read_tensors(root / "out") == model.tensors(target)
        assert_tidy(root / "out")
        assert moeconv.fingerprint(root / "out") == model.fingerprint
        for level in ("structure", "digest"):
            assert moeconv.verify(root / "out", level=level, jobs=jobs).problems == ()
        moeconv.unfuse(root / "out", root / "back", jobs=jobs)
        assert tree_sha256(root / "back") == before
        assert tree_sha256(src) == before


@given(models(), disks(), st.data())
def test_a_foreign_checkpoint_says_the_same_in_every_layout(
    model: Model, disk: Disk, data: st.DataObject
):
    source, target = (
        data.draw(st.sampled_from(list(FAMILIES[model.family].layouts))) for _ in range(2)
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(source), model.config)
        moeconv.fuse(src, root / "out", layout=target, from_layout=source)
        strange = copytree(
            root / "out", root / "strange", ignore=ignore_patterns("moeconv", "moeconv.json")
        )
        for place, layout in ((src, source), (strange, target)):
            assert moeconv.fingerprint(place, from_layout=layout) == model.fingerprint
        # proofs read the source's layout where only from_layout can say which one it is
        report = moeconv.verify(root / "out", level="source", source=src, from_layout=source)
        assert report.problems == ()
        marks = [d.mark for d in moeconv.diff(src, root / "out", from_layout=source)]
        assert set(marks) == {"="}
        moeconv.fuse(strange, root / "again", layout=source, from_layout=target)
        assert read_tensors(root / "again") == model.tensors(source)


@given(models(), disks())
def test_the_output_depends_on_nothing_but_the_model(model: Model, disk: Disk):
    """Two ways to one layout, any number of workers: the same files to the last byte."""
    layouts = list(FAMILIES[model.family].layouts)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(layouts[0]), model.config)
        moeconv.fuse(src, root / "a", layout=layouts[1], from_layout=layouts[0], jobs=1)
        moeconv.fuse(src, root / "b", layout=layouts[1], from_layout=layouts[0], jobs=5)
        assert tree_sha256(root / "a") == tree_sha256(root / "b")
        moeconv.fuse(root / "a", root / "same", layout=layouts[1])
        assert tree_sha256(root / "same") == tree_sha256(root / "a")
        moeconv.unfuse(root / "a", root / "c", layout=layouts[0])
        moeconv.fuse(root / "c", root / "d", layout=layouts[1])
        assert tree_sha256(root / "d") == tree_sha256(root / "a")
        moeconv.unfuse(root / "d", root / "back")
        assert tree_sha256(root / "back") == tree_sha256(src)


@given(models(), disks(), st.data())
def test_any_flipped_byte_of_the_data_is_found(model: Model, disk: Disk, data: st.DataObject):
    source, target = list(FAMILIES[model.family].layouts)[:2]
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src = disk.write(root / "src", model.tensors(source), model.config)
        moeconv.fuse(src, root / "out", layout=target, from_layout=source)
        victim = data.draw(st.sampled_from(sorted((root / "out").glob("model-*.safetensors"))))
        raw = bytearray(victim.read_bytes())
        raw[data.draw(st.integers(read_header(victim)[0], len(raw) - 1))] ^= 0x10
        victim.write_bytes(raw)
        assert len(moeconv.verify(root / "out").problems) == 1
        report = moeconv.verify(root / "out", level="source", source=src, from_layout=source)
        assert not report.ok
        with pytest.raises(MoeconvError):
            moeconv.unfuse(root / "out", root / "back")
        assert not (root / "back").exists()


def assert_tidy(out: Path) -> None:
    """What the format promises of data files, and that stock safetensors opens them."""
    index = json.loads((out / "model.safetensors.index.json").read_bytes())
    files = sorted(set(index["weight_map"].values()))
    count = len(files)
    assert files == [f"model-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    total = 0
    in_shards: list[str] = []
    for file in files:
        start, tensors = read_header(out / file)
        assert start % PAGE == 0
        for dtype, _, begin, end in tensors.values():
            assert begin % items_bytes(dtype) == 0
            total += end - begin
        by_place = sorted(tensors, key=lambda n: tensors[n][2:])
        assert by_place == sorted(tensors, key=lambda n: place_in_file(n, *tensors[n]))
        in_shards += sorted(tensors, key=natural)
        with safe_open(out / file, framework="numpy") as opened:
            assert set(opened.keys()) == tensors.keys()
    assert in_shards == sorted(in_shards, key=natural)
    assert index["metadata"]["total_size"] == total


def items_bytes(dtype: str) -> int:
    """At whose multiples a tensor starts."""
    return max(BITS[dtype] // 8, 1)


def natural(name: str) -> list[tuple[int, int, str]]:
    """`layers.2` before `layers.10`."""
    parts = re.split("([0-9]+)", name)
    return [(0, int(p), p) if p.isdigit() else (1, 0, p) for p in parts if p]


def place_in_file(name: str, dtype: str, _: object, begin: int, end: int) -> tuple[object, ...]:
    """Whole pages first, then larger items, then natural names."""
    return ((end - begin) % PAGE != 0, -items_bytes(dtype), natural(name))


def test_a_single_file_is_a_source_too(tmp_path: Path):
    tensors = _experts("model.layers.0.mlp.experts", experts=3, width=4, hidden=5)
    write_checkpoint(tmp_path / "dir", tensors, {"model_type": "qwen3_moe"})
    (tmp_path / "dir" / "README.md").write_text("not asked for")
    moeconv.fuse(tmp_path / "dir" / "model.safetensors", tmp_path / "out")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    wanted = tree_sha256(tmp_path / "dir")
    del wanted["README.md"]
    assert tree_sha256(tmp_path / "back") == wanted


def test_a_block_across_gate_and_up_is_refused(tmp_path: Path):
    """I = 6 in blocks of 4: the halves look even, the third block would belong to both."""
    stack = "model.layers.0.mlp.experts"
    tensors = _experts(stack, experts=2, width=6, hidden=8)
    for e in range(2):
        for p, shape in (("gate", (2, 2)), ("up", (2, 2)), ("down", (2, 2))):
            name = f"{stack}.{e}.{p}_proj.weight_scale_inv"
            tensors[name] = ("F32", shape, bytes(nbytes("F32", shape)))
    config = {"model_type": "qwen3_moe", "quantization_config": {"weight_block_size": [4, 4]}}
    write_checkpoint(tmp_path / "src", tensors, config)
    with pytest.raises(StraddlingBlock):
        moeconv.fuse(tmp_path / "src", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_half_bytes_are_never_transposed(tmp_path: Path):
    stack = "model.layers.0.mlp.experts"
    tensors = {
        f"{stack}.{name}": ("F4", shape, bytes(nbytes("F4", shape)))
        for name, shape in (("gate_up_proj", (2, 4, 8)), ("down_proj", (2, 4, 4)))
    }
    write_checkpoint(tmp_path / "src", tensors, {"model_type": "gpt_oss"})
    with pytest.raises(SubByteAxis):
        moeconv.unfuse(tmp_path / "src", tmp_path / "out", layout="per-expert")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe"])
def test_sizes_beyond_every_buffer(family: str, tmp_path: Path):
    """Matrices larger than a copy buffer, a file larger than a batch, edges in no block's step."""
    rng = np.random.default_rng(0)
    stack, experts = "model.layers.0.mlp.experts", 5
    parts = {
        (p, "weight"): random_part(rng, "BF16", "OK", experts, {"O": o, "K": k})
        for p, o, k in (("gate", 1030, 2053), ("up", 1030, 2053), ("down", 2053, 1030))
    }
    model = Model(family, {stack: parts}, {}, {"model_type": family})
    layouts = list(FAMILIES[family].layouts)
    first, last = layouts[0], layouts[-1]
    write_checkpoint(tmp_path / "src", model.tensors(first), model.config)
    moeconv.fuse(tmp_path / "src", tmp_path / "out", layout=last)
    assert read_tensors(tmp_path / "out") == model.tensors(last)
    assert moeconv.fingerprint(tmp_path / "out") == model.fingerprint
    assert moeconv.verify(tmp_path / "out").ok
    assert moeconv.verify(tmp_path / "out", level="source", source=tmp_path / "src").ok
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


def _experts(stack: str, *, experts: int, width: int, hidden: int) -> dict[str, Spec]:
    rng = np.random.default_rng(1)
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {
        f"{stack}.{e}.{p}_proj.weight": ("BF16", shape, rng.bytes(nbytes("BF16", shape)))
        for e in range(experts)
        for p, shape in sizes.items()
    }


def test_the_reference_itself_by_hand():
    """Two experts of 1x2 and 2x1: what the tests above hold moeconv against, written out."""
    gate_up = np.array([[[[1, 2]], [[3, 4]]], [[[5, 6]], [[7, 8]]]], dtype=np.uint8)  # E G O K
    by_hand = {
        "E (G O) K": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
        "E K (G O)": [[[1, 3], [2, 4]], [[5, 7], [6, 8]]],
        "(E O) 1 (K G)": [[[1, 3, 2, 4]], [[5, 7, 6, 8]]],
        "E G (O K)": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]],
    }
    for axes, wanted in by_hand.items():
        assert arranged(gate_up, "EGOK", axes).tolist() == wanted
    rng = np.random.default_rng(0)
    parts = {(p, "weight"): random_part(rng, "F4", "OK", 2, {"O": 1, "K": 2}) for p in ("a", "b")}
    place = Place("{e}.x", ("a", "b"), "weight", "(G O) K")
    low, high = parts["b", "weight"].items[1, 0]
    assert stored(parts, [place])["1.x"][2][1] == low | high << 4
