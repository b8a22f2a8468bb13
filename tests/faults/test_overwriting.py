"""A killed `--overwrite`: the old output is found again, and goes or comes back."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.backup import remove_output
from moeconv.engine.output.ownership import take_inventory
from moeconv.errors import IoFailed, WouldOverwrite
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import tree, untouched
from tests.calls import watched
from tests.faults.killed import count_calls, forked
from tests.faults.test_resume import fail_after

SAME: dict[str, int] = {"ep_size": 2, "max_shard_size": 100_000}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four experts in two layers."""
    return write(tmp_path / "src", qwen(4, 64, 96, layers=2), config=config(width=64, hidden=96))


@pytest.fixture
def out(src: Path, tmp_path: Path) -> Path:
    """An output that is to be overwritten; `whole` beside is what comes in its place."""
    moeconv.shard(src, tmp_path / "whole", **SAME)
    moeconv.fuse(src, tmp_path / "old")
    shutil.copytree(tmp_path / "old", tmp_path / "out")
    return tmp_path / "out"


def backup_of(out: Path) -> Path:
    """Where the old output waits."""
    return out.with_name(f".{out.name}.replaced")


def killed_at(src: Path, out: Path, limit: int | None, told: Path | None = None) -> int:
    """The wait status of an overwriting run that dies at some call."""

    def work() -> None:
        asked = count_calls(limit)
        moeconv.shard(src, out, overwrite=True, **SAME)
        if told is not None:
            told.write_text(str(asked()))

    return forked(work)


def half_done(src: Path, out: Path) -> None:
    """Overwriting, killed when some data file was finished."""

    def die(done: int, _: int) -> None:
        if any(out.glob("*.safetensors")):
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        moeconv.shard(src, out, overwrite=True, jobs=1, progress=die, **SAME)

    assert forked(work) == signal.SIGKILL
    assert backup_of(out).exists()


def failing(*_: object) -> None:
    """A progress that is a broken disk."""
    raise IoFailed("cannot write", cause="Input/output error", fix="check the disk")


@pytest.mark.parametrize("then", ["resumed", "anew", "anew, and that fails"])
@pytest.mark.parametrize("times", [pytest.param(12), pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_any_call(  # noqa: PLR0917 - fixtures
    src: Path,
    out: Path,
    tmp_path: Path,
    then: str,
    times: int,
    record_property: Callable[[str, object], None],
) -> None:
    told, whole, old = tmp_path / "calls", tree(tmp_path / "whole"), tree(tmp_path / "old")
    assert killed_at(src, out, None, told) == 0
    assert tree(out) == whole
    calls, rng, found = int(told.read_text()), random.Random(then), 0
    for number in range(times):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(tmp_path / "old", out)
        # half of them while the old output is a backup
        killed_at(src, out, rng.randint(1, calls if number % 2 else 12))
        found += backup_of(out).exists()
        before = tree(out)
        if then == "anew, and that fails":
            with pytest.raises(IoFailed):
                moeconv.shard(src, out, overwrite=True, progress=failing, **SAME)
            stood = before is not None and "./moeconv.json" in before
            assert tree(out) == (before if stood else old)
        elif then == "anew" or before == old:
            moeconv.shard(src, out, overwrite=True, **SAME)
            assert tree(out) == whole
        else:
            moeconv.shard(src, out, resume=True, **SAME)
            assert tree(out) == whole
        assert not os.path.lexists(backup_of(out))
    record_property("backups of old outputs", found)
    assert found > times / 3


def test_the_error_says_where_the_old_output_is(src: Path, out: Path) -> None:
    half_done(src, out)
    with untouched(out), pytest.raises(WouldOverwrite, match="is unfinished") as caught:
        moeconv.shard(src, out, **SAME)
    assert str(backup_of(out)) in str(caught.value)


def test_a_resumed_run_that_fails_says_so_too_and_the_next_one_ends_it(
    src: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half_done(src, out)
    fail_after(monkeypatch, 1)
    with pytest.raises(IoFailed) as caught:
        moeconv.shard(src, out, resume=True, jobs=1, **SAME)
    assert "`--resume` continues" in str(caught.value)
    assert str(backup_of(out)) in str(caught.value)
    assert tree(backup_of(out)) == tree(tmp_path / "old")
    monkeypatch.undo()
    moeconv.shard(src, out, resume=True, **SAME)
    assert tree(out) == tree(tmp_path / "whole")
    assert not backup_of(out).exists()


@pytest.mark.parametrize("more", [{"resume": True}, {"overwrite": True}], ids=str)
def test_the_new_output_was_complete_already(
    src: Path, out: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    """Killed while the old one was being removed: what is left of it goes."""
    moeconv.shard(src, out, overwrite=True, **SAME)
    shutil.copytree(tmp_path / "old", backup_of(out))
    (backup_of(out) / "config.json").unlink()
    moeconv.shard(src, out, **more, **SAME)
    assert tree(out) == tree(tmp_path / "whole")
    assert not backup_of(out).exists()


def with_notes(old: Path) -> None:
    """Somebody puts a file of their own there."""
    (old / "notes.txt").write_text("mine")


def edited(old: Path) -> None:
    """Somebody changes a file of ours."""
    (old / "config.json").write_text("{}")


def another(old: Path) -> None:
    """Somebody moves it away, and a directory of theirs comes in its place."""
    shutil.copytree(old, old.with_name("copy"))
    old.rename(old.with_name("moved"))
    old.with_name("copy").rename(old)


def a_link(old: Path) -> None:
    """Somebody moves it to a larger disk."""
    old.rename(old.with_name("moved"))
    old.symlink_to("moved")


@pytest.mark.parametrize("change", [with_notes, edited, another, a_link])
def test_what_is_not_ours_stays(
    src: Path, out: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    half_done(src, out)
    change(backup_of(out))
    with untouched(backup_of(out), out), pytest.raises(WouldOverwrite, match="in the way"):
        moeconv.shard(src, out, overwrite=True, **SAME)
    with untouched(backup_of(out)):
        moeconv.shard(src, out, resume=True, **SAME)
    assert tree(out) == tree(tmp_path / "whole")


def test_what_says_whose_it_is_goes_last(
    src: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone: list[str] = []

    def note(path: Path, **_: object) -> None:
        gone.append(str(path))

    monkeypatch.setattr(os, "unlink", watched(os.unlink, note))
    remove_output(take_inventory(out, Limits(1, 1 << 20)))
    assert gone[-1].endswith("moeconv.json")
    documents = [n for n, path in enumerate(gone) if "/moeconv/" in path]
    assert documents == list(range(len(gone) - 1 - len(documents), len(gone) - 1))
    assert not out.exists()


def test_a_plain_run_does_not_take_the_place_of_a_backup(src: Path, tmp_path: Path) -> None:
    """Else nothing would know of the old one any more, and `--overwrite` would not either."""
    out = tmp_path / "out"
    moeconv.fuse(src, out)
    out.rename(backup_of(out))
    for there in (False, True):
        if there:
            out.mkdir()
        with (
            untouched(backup_of(out)),
            pytest.raises(WouldOverwrite, match="a backup of") as caught,
        ):
            moeconv.fuse(src, out)
        assert "`--overwrite`" in str(caught.value)
    moeconv.fuse(src, out, overwrite=True)
    assert moeconv.verify(out).ok
    assert not backup_of(out).exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_foreign_files_in_the_backup_are_not_called_ours(
    src: Path, tmp_path: Path, kind: str
) -> None:
    out = tmp_path / "out"
    moeconv.fuse(src, out)
    if kind == "folder":
        backup_of(out).mkdir()
        (backup_of(out) / "notes").write_text("mine")
    else:
        backup_of(out).write_text("mine")
    with untouched(backup_of(out).parent), pytest.raises(WouldOverwrite) as caught:
        moeconv.fuse(src, out)
    assert "removes the rest" not in str(caught.value)
    with untouched(backup_of(out).parent), pytest.raises(WouldOverwrite, match="something else"):
        moeconv.fuse(src, out, overwrite=True)
    done = moeconv.fuse(src, out, resume=True)
    assert "is kept" in done.plan.notes[-1]
    assert os.path.lexists(backup_of(out))


@pytest.mark.parametrize("verb", ["fuse", "unfuse"])
@pytest.mark.parametrize("there", [False, True])
def test_a_file_that_another_program_changes_is_not_part_of_an_output(
    src: Path, tmp_path: Path, verb: str, *, there: bool
) -> None:
    """The first of many files stands there for hours before the run says that all is well."""
    out, ours = tmp_path / "out", tmp_path / "ours"
    origin = moeconv.fuse(src, ours, max_shard_size=50_000).out
    if verb == "unfuse":
        shutil.rmtree(ours / "moeconv")
        (ours / "moeconv.json").unlink()
        origin = moeconv.unfuse(ours, tmp_path / "again", layout="per-expert").out
    if there:
        moeconv.fuse(src, out, digests="later")
    before = tree(out)
    changed: list[Path] = []

    def meanwhile(*_: object) -> None:
        data = sorted(out.glob("*.safetensors"))
        if data and not changed and not (out / "moeconv.json").exists():
            with data[0].open("r+b") as stream:
                stream.seek(-1, os.SEEK_END)
                stream.write(b"!")
            changed.append(data[0])

    work = moeconv.fuse if verb == "fuse" else moeconv.unfuse
    more = {} if verb == "unfuse" else {"max_shard_size": 50_000}
    source = src if verb == "fuse" else origin
    with pytest.raises(IoFailed, match="was changed in OUT"):
        work(source, out, jobs=1, overwrite=there, progress=meanwhile, **more)
    assert changed
    assert [p for p in out.rglob("*") if p.is_file()] == changed
    assert changed[0].read_bytes().endswith(b"!")
    assert tree(backup_of(out)) == before
