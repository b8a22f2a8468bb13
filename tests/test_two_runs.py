"""Two runs, one OUT; an OUT behind a link; a user's files in OUT: nothing of anybody's is lost."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import pytest

import moeconv
from moeconv.cli.demo_checkpoint import make_checkpoint
from moeconv.errors import ConfigMismatch, IoFailed, NoCheckpoint, UsageProblem, WouldOverwrite
from tests.helpers import tree_sha256


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The demo's checkpoint."""
    make_checkpoint(tmp_path / "source")
    return tmp_path / "source"


def test_a_second_run_into_one_out_is_refused_and_harms_nothing(
    source: Path, tmp_path: Path
) -> None:
    out, wanted = tmp_path / "out", tmp_path / "wanted"
    moeconv.fuse(source, wanted)
    started, refused = threading.Event(), threading.Event()

    def hold(_done: int, _total: int) -> None:
        started.set()
        assert refused.wait(30)

    first = threading.Thread(target=moeconv.fuse, args=(source, out), kwargs={"progress": hold})
    first.start()
    assert started.wait(30)
    try:
        for overwrite in (False, True):
            with pytest.raises(WouldOverwrite):
                moeconv.fuse(source, out, overwrite=overwrite)
    finally:
        refused.set()
        first.join()
    assert tree_sha256(out) == tree_sha256(wanted)


def test_a_file_that_appears_in_out_is_not_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(_done: int, _total: int) -> None:
        (out / "config.json").write_text("mine")

    with pytest.raises(IoFailed, match=r"config\.json"):
        moeconv.fuse(source, out, progress=appear)
    assert [p.name for p in out.iterdir()] == ["config.json"]
    assert (out / "config.json").read_text() == "mine"


def test_overwrite_through_a_link_keeps_the_link(source: Path, tmp_path: Path) -> None:
    moeconv.fuse(source, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    moeconv.fuse(source, tmp_path / "link", overwrite=True, max_shard_size=500_000)
    assert (tmp_path / "link").is_symlink()
    assert moeconv.verify(tmp_path / "real").files > 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "real", "source"]


def test_overwrite_of_the_working_directory_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moeconv.fuse(source, tmp_path / "out")
    before = tree_sha256(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    with pytest.raises(UsageProblem):
        moeconv.fuse(source, ".", overwrite=True)
    assert tree_sha256(tmp_path / "out") == before


def test_an_edited_sidecar_is_the_users_own(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moeconv.fuse(source, out)
    (out / "config.json").write_text("{}")
    with pytest.raises(WouldOverwrite, match=r"config\.json"):
        moeconv.fuse(source, out, overwrite=True)
    assert (out / "config.json").read_text() == "{}"


def test_files_added_to_an_output_are_reported(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moeconv.fuse(source, out)
    (out / "notes.txt").write_text("mine")
    (warning,) = moeconv.open_source(out).checkpoint.warnings
    assert "`notes.txt`" in warning


def test_source_level_names_every_tensor_that_differs(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(source, other)
    for shard in other.glob("*.safetensors"):
        raw = bytearray(shard.read_bytes())
        start = 8 + int.from_bytes(raw[:8], "little")
        raw[start:] = bytes(b ^ 1 for b in raw[start:])
        shard.write_bytes(raw)
    moeconv.fuse(source, tmp_path / "out")
    report = moeconv.verify(tmp_path / "out", level="source", source=other)
    assert len(report.problems) == 117


def test_messages_name_the_shard_and_not_the_blob_of_a_hub_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    (repo / "blobs").mkdir(parents=True)
    (repo / "snapshots" / "abc").mkdir(parents=True)
    (repo / "blobs" / "d1gest").write_bytes(b"\xff" * 100)
    shard = repo / "snapshots" / "abc" / "model.safetensors"
    shard.symlink_to("../../blobs/d1gest")
    with pytest.raises(moeconv.MoeconvError, match=r"`model\.safetensors`"):
        moeconv.open_source(repo / "snapshots" / "abc")


def test_one_shard_of_several_is_not_a_checkpoint(source: Path, tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint, match="one of 3 shards"):
        moeconv.fuse(source / "model-00001-of-00003.safetensors", tmp_path / "out")


def test_a_lost_last_expert_shows_among_its_fellows(source: Path, tmp_path: Path) -> None:
    # no gap, and nothing in config.json: only the other layers know how many there should be
    config = json.loads((source / "config.json").read_text())
    del config["num_experts"]
    (source / "config.json").write_text(json.dumps(config))
    tensors = moeconv.open_source(source).checkpoint.tensors
    lost = {t.name for t in tensors if "layers.0.mlp.experts.15." in t.name}
    (source / "model.safetensors.index.json").unlink()
    for shard in source.glob("*.safetensors"):
        raw = shard.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        header, data, kept = json.loads(raw[8:end]), b"", {}
        for name, entry in header.items():
            if name == "__metadata__" or name in lost:
                continue
            start, stop = entry["data_offsets"]
            kept[name] = entry | {"data_offsets": [len(data), len(data) + stop - start]}
            data += raw[end + start : end + stop]
        text = json.dumps(kept).encode()
        shard.write_bytes(len(text).to_bytes(8, "little") + text + data)
    with pytest.raises(ConfigMismatch, match="15 experts, others 16"):
        moeconv.fuse(source, tmp_path / "out")
