"""OUT: where it may be, what it may hold, and what `--overwrite` may replace."""

import shutil
import sys
from pathlib import Path

import pytest

import moeconv
from moeconv.engine import commit
from moeconv.engine.output.transaction import OutputTransaction
from moeconv.errors import IoFailed, MoeconvError, UnsafeOutput, WouldOverwrite
from tests.badinput.builders import SHARD, qwen, shard_bytes, write
from tests.badinput.checks import refused, tree, untouched


@pytest.fixture
def good(src: Path) -> Path:
    """A source that nothing is wrong with."""
    return write(src, qwen())


# --- OUT is not empty --------------------------------------------------------------------------
def test_out_is_not_empty(good: Path, out: Path):
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    refused(WouldOverwrite, str(out), "not empty", "`notes.txt`", src=good, out=out)


def test_out_holds_an_earlier_output(good: Path, out: Path):
    moeconv.fuse(good, out)
    refused(WouldOverwrite, str(out), "and 5 more", "--overwrite", src=good, out=out)


def test_out_holds_an_unfinished_output(good: Path, out: Path):
    moeconv.fuse(good, out)
    (out / "moeconv.json").unlink()
    refused(WouldOverwrite, "is unfinished", "neither `moeconv.json` nor", src=good, out=out)


def test_out_is_a_file(good: Path, out: Path):
    out.write_text("mine")
    refused(WouldOverwrite, str(out), "is a file", src=good, out=out)


def test_out_is_a_link_to_nowhere(good: Path, out: Path):
    out.symlink_to("nowhere")
    refused(WouldOverwrite, str(out), src=good, out=out)


def test_out_is_below_a_file(good: Path, out: Path):
    out.write_text("mine")
    refused(IoFailed, str(out), src=good, out=out / "deeper")


def test_out_that_is_empty_is_fine(good: Path, out: Path):
    out.mkdir()
    moeconv.fuse(good, out)
    assert moeconv.verify(out).ok


def test_folders_above_out_are_made(good: Path, out: Path):
    moeconv.fuse(good, out / "a" / "b")
    assert moeconv.verify(out / "a" / "b").ok


# --- OUT and SRC -------------------------------------------------------------------------------
@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_src(good: Path, *, overwrite: bool):
    refused(UnsafeOutput, "OUT is SRC", str(good), src=good, out=good, overwrite=overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_out_is_src_under_another_name(good: Path, out: Path, *, overwrite: bool):
    out.symlink_to(good)
    refused(UnsafeOutput, "OUT is SRC", str(good), src=good, out=out, overwrite=overwrite)


def test_out_is_inside_src(good: Path):
    refused(UnsafeOutput, "inside SRC", str(good), src=good, out=good / "deep" / "out")


@pytest.mark.parametrize("overwrite", [False, True])
def test_src_is_inside_out(out: Path, *, overwrite: bool):
    src = write(out / "deep" / "src", qwen())
    refused(UnsafeOutput, "OUT contains SRC", str(src), src=src, out=out, overwrite=overwrite)


def test_our_own_output_may_not_become_its_own_source(good: Path, out: Path):
    moeconv.fuse(good, out)
    refused(UnsafeOutput, "OUT is SRC", src=out, out=out, verb=moeconv.unfuse, overwrite=True)


def test_out_is_the_folder_of_a_single_file(good: Path):
    refused(UnsafeOutput, str(good), src=good / SHARD, out=good, overwrite=True)


def test_out_beside_a_single_file_is_fine(tmp_path: Path):
    # `moeconv fuse model.safetensors -o fused`, typed where the file lies
    (tmp_path / SHARD).write_bytes(shard_bytes(qwen()))
    moeconv.fuse(tmp_path / SHARD, tmp_path / "fused", recipe="qwen3_moe")
    assert moeconv.verify(tmp_path / "fused").ok


def test_a_neighbour_whose_name_begins_alike_is_fine(good: Path):
    moeconv.fuse(good, good.with_name("src2"))
    assert moeconv.verify(good.with_name("src2")).ok


# --- overwrite ---------------------------------------------------------------------------------
def test_overwrite_replaces_our_own_output(good: Path, out: Path):
    moeconv.fuse(good, out, max_shard_size=5000)
    assert len(list(out.glob("*.safetensors"))) > 1
    moeconv.fuse(good, out, overwrite=True)
    assert [p.name for p in out.glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]
    assert moeconv.verify(out).ok


def test_overwrite_of_nothing_is_fine(good: Path, out: Path):
    moeconv.fuse(good, out, overwrite=True)
    assert moeconv.verify(out).ok


def test_overwrite_refuses_a_foreign_directory(good: Path, out: Path):
    write(out, qwen())
    refused(
        WouldOverwrite,
        str(out),
        "did not make",
        "`config.json` and 2 more",
        src=good,
        out=out,
        overwrite=True,
    )


def test_overwrite_refuses_a_foreign_file_in_our_output(good: Path, out: Path):
    moeconv.fuse(good, out)
    (out / "notes.txt").write_text("mine")
    refused(WouldOverwrite, "did not make", "`notes.txt`", src=good, out=out, overwrite=True)


def test_overwrite_refuses_a_foreign_file_deep_in_our_output(good: Path, out: Path):
    moeconv.fuse(good, out)
    (out / "runs" / "1").mkdir(parents=True)
    (out / "runs" / "1" / "log").write_text("mine")
    refused(WouldOverwrite, "`runs/1/log`", src=good, out=out, overwrite=True)


def test_overwrite_refuses_a_foreign_file_beside_our_documents(good: Path, out: Path):
    moeconv.fuse(good, out)
    (out / "moeconv" / "notes.txt").write_text("mine")
    refused(WouldOverwrite, "`moeconv/notes.txt`", src=good, out=out, overwrite=True)


def test_overwrite_refuses_a_directory_that_only_holds_one_called_moeconv(good: Path, out: Path):
    # a folder of clones, say: the name alone does not make it ours
    (out / "moeconv" / ".git").mkdir(parents=True)
    (out / "moeconv" / ".git" / "HEAD").write_text("ref: refs/heads/main")
    (out / "moeconv" / "README.md").write_text("a week's work")
    refused(WouldOverwrite, "moeconv/", src=good, out=out, overwrite=True)


def test_overwrite_refuses_an_output_whose_manifest_is_damaged(good: Path, out: Path):
    # then nothing says which of its files are ours
    moeconv.fuse(good, out)
    (out / "moeconv.json").write_bytes((out / "moeconv.json").read_bytes()[:-5])
    refused(WouldOverwrite, str(out), src=good, out=out, overwrite=True)


def test_overwrite_replaces_an_unfinished_output(
    good: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    # a killed run leaves all but the manifest, at worst, and the journal of what it would make
    monkeypatch.setattr(OutputTransaction, "roll_back", lambda _: None)
    with monkeypatch.context() as killed:
        killed.setattr(commit, "root_bytes", lambda _: sys.exit("killed"))
        with pytest.raises(SystemExit):
            moeconv.fuse(good, out)
    assert (out / "config.json").exists()
    assert not (out / "moeconv.json").exists()
    monkeypatch.undo()
    moeconv.fuse(good, out, overwrite=True)
    assert moeconv.verify(out).ok


def test_overwrite_replaces_a_run_that_was_killed_in_its_first_file(good: Path, out: Path):
    (out / "moeconv").mkdir(parents=True)
    (out / "moeconv" / ".model-00001-of-00001.safetensors.partial").write_bytes(b"half")
    moeconv.fuse(good, out, overwrite=True)
    assert moeconv.verify(out).ok
    assert not list(out.rglob("*.partial"))


def test_overwrite_refuses_a_foreign_directory_with_our_mark(good: Path, out: Path):
    write(out, qwen())
    (out / "moeconv").mkdir()
    (out / "moeconv" / "origin").write_bytes(b"")
    refused(WouldOverwrite, "did not make", src=good, out=out, overwrite=True)


def test_a_failing_run_with_overwrite_leaves_the_old_output(good: Path, out: Path):
    moeconv.fuse(good, out)

    def give_up(done: int, total: int) -> None:
        raise InterruptedError

    with untouched(good, out), pytest.raises((InterruptedError, MoeconvError)):
        moeconv.fuse(good, out, overwrite=True, progress=give_up)


def test_a_dry_run_with_overwrite_touches_nothing(good: Path, out: Path):
    moeconv.fuse(good, out)
    with untouched(good, out):
        moeconv.fuse(good, out, overwrite=True, dry_run=True)


def test_a_dry_run_makes_nothing(good: Path, out: Path):
    with untouched(good, out):
        moeconv.fuse(good, out, dry_run=True)
    assert tree(out) is None


def test_an_output_is_the_same_after_overwrite(good: Path, out: Path):
    moeconv.fuse(good, out)
    first = tree(out)
    moeconv.fuse(good, out, overwrite=True)
    assert tree(out) == first


def test_an_output_that_lost_a_file_can_be_overwritten(good: Path, out: Path):
    moeconv.fuse(good, out)
    shutil.rmtree(out / "moeconv")
    moeconv.fuse(good, out, overwrite=True)
    assert moeconv.verify(out).ok
