"""What else may lie in a directory: links, pipes, folders, names that are no names, pickles."""

import json
import os
import shutil
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    MoeconvError,
    NameCollision,
    NoCheckpoint,
    SourceMissing,
    Unfinished,
    UnsafePath,
)
from tests.badinput.builders import (
    INDEX,
    SHARD,
    Tensors,
    config,
    index_doc,
    qwen,
    shard_bytes,
    two_files,
    write,
)
from tests.badinput.checks import refused, tree, untouched, within

EXTRA: Tensors = {"extra": ("F32", (1,))}


@pytest.fixture
def good(src: Path) -> Path:
    """A source that nothing is wrong with."""
    return write(src, qwen())


def _moved_out(path: Path) -> Path:
    """Put a link where the file was; the file itself is now outside."""
    outside = path.parent.parent / "outside"
    outside.mkdir()
    target = outside / path.name
    shutil.move(path, target)
    path.symlink_to(target)
    return target


# --- links -------------------------------------------------------------------------------------
def test_a_shard_that_is_a_link_out_of_the_directory(good: Path, out: Path):
    target = _moved_out(good / SHARD)
    with untouched(target.parent):
        refused(UnsafePath, f"`{SHARD}`", str(target), "links to a file outside", src=good, out=out)


def test_an_indexed_shard_that_is_a_link_out_of_the_directory(src: Path, out: Path):
    write(src, two_files(qwen()))
    target = _moved_out(src / "model-00002-of-00002.safetensors")
    refused(UnsafePath, target.name, str(target), src=src, out=out)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_another_file_that_is_a_link_out_of_the_directory(src: Path, out: Path, name: str):
    write(src, two_files(qwen()))
    target = _moved_out(src / name)
    refused(UnsafePath, f"`{name}`", str(target), src=src, out=out)


def test_a_link_to_a_file_that_everybody_may_read(good: Path, out: Path):
    (good / "notes.txt").symlink_to("/etc/passwd")
    refused(UnsafePath, "`notes.txt`", "/etc/passwd", src=good, out=out)


def test_a_link_to_a_directory(good: Path, out: Path):
    (good / "more").mkdir()
    (good / "again").symlink_to("more")
    refused(UnsafePath, "`again`", "not a regular file", "--exclude", src=good, out=out)


def test_a_link_to_nowhere(good: Path, out: Path):
    (good / "notes.txt").symlink_to("nowhere")
    refused(SourceMissing, "`notes.txt`", "--exclude", src=good, out=out)


def test_a_link_to_itself(good: Path, out: Path):
    (good / "notes.txt").symlink_to("notes.txt")
    refused(SourceMissing, "`notes.txt`", "--exclude", src=good, out=out)


@pytest.mark.parametrize("target", ["/usr/lib", "/nope", "moeconv"])
def test_a_link_named_like_our_folder_can_be_left_out(good: Path, out: Path, target: str):
    (good / "moeconv").symlink_to(target)
    moeconv.fuse(good, out, exclude=("moeconv",))
    assert moeconv.verify(out).ok


def test_config_beside_a_single_file_that_is_a_link_out(good: Path, out: Path):
    target = _moved_out(good / "config.json")
    refused(UnsafePath, "`config.json`", str(target), src=good / SHARD, out=out)


def test_a_link_inside_the_directory_is_fine(good: Path, out: Path):
    (good / "notes.txt").symlink_to("tokenizer.json")
    moeconv.fuse(good, out)
    assert not (out / "notes.txt").is_symlink()
    assert (out / "notes.txt").read_bytes() == (good / "tokenizer.json").read_bytes()


def _hub_cache(root: Path) -> Path:
    """The tree that huggingface_hub makes: every file a link into `blobs`."""
    made = write(root / "plain", two_files(qwen()))
    repository = root / "models--org--name"
    snapshot = repository / "snapshots" / ("0123abcd" * 5)
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, path in enumerate(sorted(made.iterdir())):
        blob = repository / "blobs" / f"{number:040x}"
        path.rename(blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    made.rmdir()
    return snapshot


def test_a_snapshot_in_the_hub_s_cache_is_fine(tmp_path: Path, out: Path):
    snapshot = _hub_cache(tmp_path)
    with untouched(tmp_path / "models--org--name"):
        moeconv.fuse(snapshot, out)
    assert moeconv.verify(out, level="source", source=snapshot).ok
    assert not any(path.is_symlink() for path in out.rglob("*"))


def test_a_single_file_in_the_hub_s_cache_is_fine(tmp_path: Path, out: Path):
    snapshot = _hub_cache(tmp_path)
    for path in snapshot.glob("*.safetensors"):
        path.unlink()
    write(tmp_path / "whole", qwen())
    blobs = snapshot.parents[1] / "blobs"
    shutil.move(tmp_path / "whole" / SHARD, blobs / "ffff")
    (snapshot / SHARD).symlink_to("../../blobs/ffff")
    moeconv.fuse(snapshot / SHARD, out)
    assert (out / "config.json").exists()


def test_a_snapshot_whose_link_leaves_the_repository(tmp_path: Path, out: Path):
    snapshot = _hub_cache(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (other / "secret").write_text("{}")
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../../../models--org--other/blobs/secret")
    refused(UnsafePath, "`tokenizer.json`", str(other), src=snapshot, out=out)


def test_a_directory_that_is_itself_a_link_is_fine(good: Path, out: Path):
    (good.parent / "alias").symlink_to(good)
    moeconv.fuse(good.parent / "alias", out)
    assert moeconv.verify(out).ok


# --- things that are no files ------------------------------------------------------------------
def test_a_sidecar_that_is_a_pipe(good: Path, out: Path):
    os.mkfifo(good / "pipe")
    with within(5):
        refused(UnsafePath, "`pipe`", "not a regular file", "--exclude", src=good, out=out)


def test_a_sidecar_that_is_a_pipe_can_be_left_out(good: Path, out: Path):
    os.mkfifo(good / "pipe")
    with within(5):
        moeconv.fuse(good, out, exclude=("pipe",))


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX])
def test_a_file_of_the_checkpoint_that_is_a_pipe(good: Path, out: Path, name: str):
    (good / name).unlink(missing_ok=True)
    os.mkfifo(good / name)
    with within(2), untouched(good, out), pytest.raises(MoeconvError) as caught:
        moeconv.fuse(good, out)
    assert name in str(caught.value)


def test_config_beside_a_single_file_that_is_a_pipe(good: Path, out: Path):
    (good / "config.json").unlink()
    os.mkfifo(good / "config.json")
    with within(2), untouched(good, out), pytest.raises(MoeconvError):
        moeconv.fuse(good / SHARD, out)


@pytest.mark.parametrize("name", [SHARD, "config.json", INDEX])
def test_a_file_of_the_checkpoint_that_is_a_directory(good: Path, out: Path, name: str):
    (good / name).unlink(missing_ok=True)
    (good / name).mkdir()
    with untouched(good, out), pytest.raises(MoeconvError) as caught:
        moeconv.fuse(good, out)
    assert name in str(caught.value)


# --- names -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["a\\b.txt", "a:b", "con", "x\x1b[2J", "\u202etxt.exe", b"\xff"])
def test_a_sidecar_with_a_name_that_is_not_safe(good: Path, out: Path, name: str | bytes):
    (good / os.fsdecode(name)).write_text("x")
    refused(UnsafePath, "--exclude", src=good, out=out)


@pytest.mark.parametrize("name", ["a\\b", "a:b", "con", "x\x1b[2J", "\u202ex", b"\xff"])
def test_a_shard_with_a_name_that_is_not_safe(src: Path, out: Path, name: str | bytes):
    # without an index, the directory alone says what a shard is called
    write(src, qwen())
    (src / SHARD).rename(src / (os.fsdecode(name) + ".safetensors"))
    refused(UnsafePath, ".safetensors", src=src, out=out)


@pytest.mark.parametrize("name", ["a:b", b"\xff"])
def test_a_single_file_with_a_name_that_is_not_safe(src: Path, out: Path, name: str | bytes):
    # the output must be able to give that name back
    write(src, qwen())
    file = src / (os.fsdecode(name) + ".safetensors")
    (src / SHARD).rename(file)
    try:
        moeconv.fuse(file, out)
    except MoeconvError:
        assert tree(out) is None
        return
    assert moeconv.verify(out).ok


def test_an_index_with_a_name_that_is_not_safe(src: Path, out: Path):
    write(src, two_files(qwen()))
    (src / INDEX).rename(src / "a:b.safetensors.index.json")
    refused(UnsafePath, "a:b", src=src, out=out)


def test_a_sidecar_with_the_name_of_an_output_file(src: Path, out: Path):
    # the file of another index: a second copy of the model, for another program
    stale = "model-00001-of-00001.safetensors"
    write(src, {SHARD: qwen()}, index=index_doc({SHARD: qwen()}))
    (src / stale).write_bytes(shard_bytes(EXTRA))
    other = json.dumps(index_doc({stale: EXTRA}))
    (src / "other.safetensors.index.json").write_text(other)
    refused(NameCollision, f"`{stale}`", f"--exclude '{stale}'", src=src, out=out)


def test_a_sidecar_with_the_name_of_an_output_file_can_be_left_out(src: Path, out: Path):
    stale = "model-00001-of-00001.safetensors"
    write(src, {SHARD: qwen()}, index=index_doc({SHARD: qwen()}))
    (src / stale).write_bytes(shard_bytes(EXTRA))
    moeconv.fuse(src, out, exclude=(stale,))
    assert moeconv.verify(out).ok


def test_a_partial_file_among_the_sidecars(good: Path, out: Path):
    # the writer's own temporary names must not run into the source's files
    (good / ".config.json.partial").write_text("old")
    moeconv.fuse(good, out)
    assert (out / ".config.json.partial").read_text() == "old"
    assert moeconv.verify(out, level="source", source=good).ok


# --- no checkpoint -----------------------------------------------------------------------------
def test_src_does_not_exist(src: Path, out: Path):
    refused(SourceMissing, str(src), "hf://", src=src, out=out)


def test_an_empty_directory(src: Path, out: Path):
    src.mkdir()
    refused(NoCheckpoint, str(src), "0 entries", src=src, out=out)


def test_a_directory_with_pickles_only(src: Path, out: Path):
    src.mkdir()
    (src / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x02}q\0.")
    (src / "config.json").write_text("{}")
    refused(NoCheckpoint, "pytorch_model-00001-of-00002.bin", "pickle", src=src, out=out)


def test_config_given_for_a_shard(good: Path, out: Path):
    refused(NoCheckpoint, "`config.json`", "`.json`", src=good / "config.json", out=out)


@pytest.mark.parametrize("alone", [False, True])
def test_one_of_several_shards_and_no_index(src: Path, out: Path, *, alone: bool):
    """Its name says that there are more, which is said; names of published shards may lie."""
    write(src, qwen())
    name = "model-00001-of-00003.safetensors"
    (src / SHARD).rename(src / name)
    found = moeconv.fuse(src / name if alone else src, out, dry_run=True).source.checkpoint
    (said,) = (w for w in found.warnings if "shards" in w)
    assert said.startswith("`model` has 1 of the 3 shards")
    (src / name).rename(src / "model-00001-of-00001.safetensors")
    again = moeconv.fuse(src, out, dry_run=True).source.checkpoint
    assert not any("shards" in w for w in again.warnings)


def test_an_unfinished_output_of_ours(good: Path, out: Path):
    moeconv.fuse(good, out)
    (out / "moeconv.json").unlink()
    with untouched(out):
        refused(
            Unfinished, "moeconv.json", "written last", "--overwrite",
            src=out, out=out.with_name("x"),
        )  # fmt: skip


def test_git_and_cache_folders_are_never_copied(good: Path, out: Path):
    for folder in (".git", ".cache"):
        (good / folder).mkdir()
        os.mkfifo(good / folder / "pipe")
    moeconv.fuse(good, out)
    assert not (out / ".git").exists()
    assert not (out / ".cache").exists()


def test_config_may_be_absent_where_a_recipe_is_given(src: Path, out: Path):
    write(src, qwen(), config={})
    done = moeconv.fuse(src, out, recipe="qwen3_moe")
    assert any("no config.json" in said for said in done.source.checkpoint.warnings)


def test_config_of_another_model_is_not_taken_from_elsewhere(src: Path, out: Path):
    # the one beside the file counts, also where the working directory has another
    write(src, qwen(), config=config(width=16))
    with pytest.raises(MoeconvError, match="says 16"):
        moeconv.fuse(src / SHARD, out)
