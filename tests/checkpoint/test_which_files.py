"""Which files of a directory are the checkpoint: what the index does not name, names in folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import DuplicateTensor, NotVirtual, TensorNotInIndex, UnsafePath, UsageProblem
from tests.badinput.builders import INDEX, STACK, Tensors, index_doc, qwen, two_files, write
from tests.badinput.checks import refused
from tests.helpers import read_tensors, tree_sha256

ALL = qwen()
FILES = two_files(ALL)
FIRST, SECOND = FILES
MTP = "mtp.safetensors"
HEAD: Tensors = {
    name.replace("model.layers.0", "mtp.layers.0"): t for name, t in qwen().items() if STACK in name
}


def _there_and_back(src: Path, tmp: Path, **options: object) -> None:
    """Fused and restored, sharded and merged: the source's own files, bit for bit."""
    moeconv.fuse(src, tmp / "fused", **options)
    assert moeconv.verify(tmp / "fused", source=src, **options).ok
    moeconv.unfuse(tmp / "fused", tmp / "back")
    assert tree_sha256(tmp / "back") == tree_sha256(src)
    moeconv.shard(src, tmp / "ranks", ep_size=2, **options)
    moeconv.merge(tmp / "ranks", tmp / "merged")
    assert tree_sha256(tmp / "merged") == tree_sha256(src)
    moeconv.shard(src, tmp / "virtual", ep_size=2, virtual=True, **options)
    moeconv.merge(tmp / "virtual", tmp / "again")
    assert tree_sha256(tmp / "again") == tree_sha256(src)


# --- weight files beside the index -------------------------------------------------------------
@pytest.fixture
def with_mtp(src: Path) -> Path:
    write(src, {**FILES, MTP: HEAD}, index=index_doc(FILES))
    return src


def test_a_weight_file_beside_the_index_is_converted_like_the_others(
    with_mtp: Path, tmp_path: Path
) -> None:
    result = moeconv.fuse(with_mtp, tmp_path / "out", dry_run=True)
    assert any(
        MTP in w and "converted like all others" in w for w in result.source.checkpoint.warnings
    )
    assert {s.name for s in result.source.detection.stacks} >= {"mtp.layers.0.mlp.experts"}
    _there_and_back(with_mtp, tmp_path)
    assert not any(n.endswith("experts.0.up_proj.weight") for n in read_tensors(tmp_path / "fused"))


def test_its_tensors_are_compared_and_fingerprinted(with_mtp: Path, tmp_path: Path) -> None:
    other = shutil.copytree(with_mtp, tmp_path / "other")
    assert moeconv.fingerprint(other) == moeconv.fingerprint(with_mtp)
    raw = bytearray((other / MTP).read_bytes())
    raw[-5] ^= 1
    (other / MTP).write_bytes(raw)
    assert moeconv.fingerprint(other) != moeconv.fingerprint(with_mtp)
    changed = [d.address for d in moeconv.diff(with_mtp, other) if d.mark == "*"]
    assert len(changed) == 1
    assert changed[0].startswith("mtp.layers.0")


@pytest.mark.parametrize("options", [{"exclude": (MTP,)}, {"only_index": True}])
def test_it_can_be_left_out(with_mtp: Path, tmp_path: Path, options: dict[str, object]) -> None:
    moeconv.fuse(with_mtp, tmp_path / "out", **options)
    (with_mtp / MTP).unlink()
    moeconv.fuse(with_mtp, tmp_path / "without")
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "without")


def test_a_stray_copy_of_the_model_is_ambiguous(src: Path, out: Path) -> None:
    stray = "model.safetensors"
    write(src, {**FILES, stray: qwen()}, index=index_doc(FILES))
    refused(DuplicateTensor, stray, "--exclude", "--only-index", src=src, out=out)
    for n, options in enumerate(({"exclude": (stray,)}, {"only_index": True})):
        moeconv.fuse(src, out.with_name(f"out{n}"), **options)
    (src / stray).unlink()
    moeconv.fuse(src, out)
    for n in (0, 1):
        assert tree_sha256(out.with_name(f"out{n}")) == tree_sha256(out)


def test_files_of_another_index_are_sidecars(src: Path, tmp_path: Path) -> None:
    # one publisher has its own program's names and index beside those of transformers
    own = "consolidated-00001-of-00001.safetensors"
    named = {name.replace("model.", "m."): t for name, t in qwen().items()}
    write(src, {**FILES, own: named}, index=index_doc(FILES))
    (src / "consolidated.safetensors.index.json").write_text(json.dumps(index_doc({own: named})))
    moeconv.fuse(src, tmp_path / "out")
    assert (tmp_path / "out" / own).read_bytes() == (src / own).read_bytes()
    moeconv.fuse(src, tmp_path / "alone", only_index=True)
    assert not [p for p in (tmp_path / "alone").iterdir() if "consolidated" in p.name]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "consolidated.safetensors"])
def test_weights_for_other_programs_are_sidecars(src: Path, tmp_path: Path, name: str) -> None:
    other: Tensors = {f"{STACK}.0.up_proj.lora_A.weight": ("BF16", (4, 4))}
    write(src, {**FILES, name: other}, index=index_doc(FILES))
    moeconv.fuse(src, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == (src / name).read_bytes()


def test_verify_leaves_out_what_fuse_left_out(with_mtp: Path, tmp_path: Path) -> None:
    stray = "stray.safetensors"
    write(tmp_path / "more", {stray: {"stray.weight": ("BF16", (2, 2))}}, index=False)
    shutil.copy(tmp_path / "more" / stray, with_mtp / stray)
    moeconv.fuse(with_mtp, tmp_path / "out", exclude=(stray,))
    assert not moeconv.verify(tmp_path / "out", source=with_mtp).ok
    assert moeconv.verify(tmp_path / "out", source=with_mtp, exclude=(stray,)).ok


@pytest.mark.parametrize("raw", ['{"weight_map": {}}', "[", ""])
def test_another_index_that_is_damaged_is_a_sidecar(src: Path, tmp_path: Path, raw: str) -> None:
    write(src, FILES)
    other = "adapter.safetensors.index.json"
    (src / other).write_text(raw)
    moeconv.fuse(src, tmp_path / "out")
    assert (tmp_path / "out" / other).read_text() == raw


def test_only_index_needs_an_index(src: Path, out: Path) -> None:
    write(src, ALL)
    refused(UsageProblem, "--only-index", src=src, out=out, only_index=True)


# --- tensors that the index leaves out -----------------------------------------------------------
@pytest.fixture
def incomplete(src: Path) -> Path:
    left_out = next(n for n in FILES[FIRST] if STACK not in n)
    named = {name: spec for name, spec in FILES[FIRST].items() if name != left_out}
    write(src, FILES, index=index_doc({FIRST: named, SECOND: FILES[SECOND]}))
    return src


def test_a_tensor_that_the_index_leaves_out(incomplete: Path, out: Path) -> None:
    problem = refused(TensorNotInIndex, FIRST, "--only-index", src=incomplete, out=out)
    assert "download" not in str(problem.fix)
    assert "never" not in str(problem)


def test_only_index_leaves_it_out_and_restores_the_rest(incomplete: Path, tmp_path: Path) -> None:
    wanted = read_tensors(incomplete)
    index = json.loads((incomplete / INDEX).read_text())
    wanted = {name: wanted[name] for name in index["weight_map"]}
    moeconv.fuse(incomplete, tmp_path / "fused", only_index=True)
    assert moeconv.verify(tmp_path / "fused", source=incomplete, only_index=True).ok
    moeconv.unfuse(tmp_path / "fused", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == wanted
    assert (tmp_path / "back" / INDEX).read_bytes() == (incomplete / INDEX).read_bytes()
    assert moeconv.fingerprint(tmp_path / "back") == moeconv.fingerprint(tmp_path / "fused")
    moeconv.shard(incomplete, tmp_path / "ranks", ep_size=2, only_index=True)
    moeconv.merge(tmp_path / "ranks", tmp_path / "merged")
    assert tree_sha256(tmp_path / "merged") == tree_sha256(tmp_path / "back")


def test_an_empty_tensor_may_be_what_is_left_out(src: Path, tmp_path: Path) -> None:
    empty: Tensors = {"model.empty": ("F32", (0,))}
    write(src, {FIRST: {**FILES[FIRST], **empty}, SECOND: FILES[SECOND]}, index=index_doc(FILES))
    moeconv.fuse(src, tmp_path / "fused", only_index=True)
    moeconv.unfuse(tmp_path / "fused", tmp_path / "back")
    assert read_tensors(tmp_path / "back").keys() == ALL.keys()
    with pytest.raises(NotVirtual):
        moeconv.shard(src, tmp_path / "out", ep_size=2, virtual=True, only_index=True)


def test_a_virtual_output_needs_whole_files(incomplete: Path, out: Path) -> None:
    with pytest.raises(NotVirtual, match="cannot refer to this source"):
        moeconv.shard(incomplete, out, ep_size=2, virtual=True, only_index=True)
    assert not out.exists()


def test_the_index_decides_between_two_tensors_of_one_name(src: Path, tmp_path: Path) -> None:
    # a shard of another revision, with tensors that the new index has elsewhere
    wanted = read_tensors(write(tmp_path / "right", FILES))
    stale = {name: ("F8_E4M3", spec[1]) for name, spec in list(FILES[SECOND].items())[:3]}
    write(src, {FIRST: {**FILES[FIRST], **stale}, SECOND: FILES[SECOND]}, index=index_doc(FILES))
    refused(DuplicateTensor, "--only-index", src=src, out=tmp_path / "out")
    moeconv.unfuse(src, tmp_path / "out", only_index=True)
    assert read_tensors(tmp_path / "out") == wanted


def test_an_index_may_not_name_files_where_ours_are_written(src: Path, out: Path) -> None:
    files = {FIRST: FILES[FIRST], "moeconv/x.safetensors": FILES[SECOND]}
    write(src, files, index=index_doc(files))
    refused(UnsafePath, "moeconv/x.safetensors", src=src, out=out)


# --- names with folders --------------------------------------------------------------------------
def test_an_index_may_name_files_in_folders(src: Path, tmp_path: Path) -> None:
    places = {FIRST: "a/layer.safetensors", SECOND: "b/layer.safetensors"}
    files = {places[name]: tensors for name, tensors in FILES.items()}
    write(src, files, index=index_doc(files))
    _there_and_back(src, tmp_path)
    assert read_tensors(tmp_path / "back").keys() == ALL.keys()
