"""A killed run goes on: what was finished stays, what was damaged is made anew, nothing differs."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
from moeconv.engine.output.journal import JOURNAL_NAME, JournalFile, read_journal
from moeconv.errors import CannotResume, IoFailed, UsageProblem, WouldOverwrite
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import untouched
from tests.cli.run import ROOT, environment
from tests.cli.run import moeconv as command
from tests.helpers import tree_sha256

HOW_OFTEN = [pytest.param(20), pytest.param(200, marks=pytest.mark.soak)]
SAME = {"ep_size": 2, "redundant": 2, "max_shard_size": 150_000}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Six experts in three layers."""
    return write(
        tmp_path / "src", qwen(6, 64, 96, layers=3), config=config(experts=6, width=64, hidden=96)
    )


def killed(src: Path, out: Path, times: int, seed: int = 7) -> list[Path]:
    """What so many runs left that were killed at some moment; `whole` beside is defer_signals."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed", src, out, str(seed), str(times)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    return [Path(json.loads(line)["out"]) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("times", HOW_OFTEN)
def test_resumed_runs_end_as_uninterrupted_ones(
    src: Path, tmp_path: Path, times: int, record_property: Callable[[str, object], None]
) -> None:
    rng = random.Random(3)
    kept = redone = 0
    for out in killed(src, tmp_path / "out", times):
        journal = read_journal(out) if out.exists() else None
        finished = sorted(journal.finished) if journal else []
        before = {name: identity(out / name) for name in finished}
        # of a set that is finished nothing is read again: `verify` is there for that
        torn = bool(finished) and not (out / "moeconv.json").exists()
        victim = rng.choice(finished) if torn and rng.random() < 0.4 else None
        if victim is not None:
            flip_last_byte(out / victim)
        moeconv.shard(src, out, resume=True, **SAME)
        assert tree_sha256(out) == tree_sha256(tmp_path / "whole")
        for name, was in before.items():
            same = identity(out / name) == was
            assert same == (name != victim)
            kept, redone = kept + same, redone + (not same)
        shutil.rmtree(out)
    record_property("kills", times)
    record_property("files kept", kept)
    record_property("damaged files made anew", redone)
    assert kept > times / 2
    assert redone


def identity(path: Path) -> tuple[int, int]:
    """Inode and time of the last write: the number alone is given again to the next file."""
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns


def flip_last_byte(path: Path) -> None:
    """Damage a file as a bad disk does: its size and name stay."""
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def half_done(src: Path, out: Path) -> Path:
    """An output whose run came to its end after some files and before the manifest."""
    with pytest.MonkeyPatch.context() as patch:
        fail_after(patch, 3)
        with pytest.raises(IoFailed):
            moeconv.shard(src, out, resume=True, jobs=1, **SAME)
    journal = read_journal(out)
    assert journal is not None
    assert journal.finished
    assert not (out / "moeconv.json").exists()
    return out


def test_without_resume_it_is_named_as_such(src: Path, tmp_path: Path) -> None:
    out = half_done(src, tmp_path / "out")
    with untouched(out):
        done = command("shard", src, "-o", out, "--ep", "2", "--redundant", "2")
    assert done.code == 6
    assert "is unfinished" in done.err
    assert "`--resume`" in done.err


@pytest.mark.parametrize(
    "other",
    [
        {"redundant": 4},
        {"placement": "round-robin"},
        {"max_shard_size": 300_000},
    ],
    ids=str,
)
def test_another_plan_is_refused(src: Path, tmp_path: Path, other: dict[str, object]) -> None:
    out = half_done(src, tmp_path / "out")
    with untouched(out), pytest.raises(CannotResume, match="different plan"):
        moeconv.shard(src, out, resume=True, **{**SAME, **other})


def test_another_source_is_refused(src: Path, tmp_path: Path) -> None:
    out = half_done(src, tmp_path / "out")
    flip_last_byte(src / "model.safetensors")
    with untouched(out), pytest.raises(CannotResume):
        moeconv.shard(src, out, resume=True, **SAME)


def test_a_finished_output_is_done_at_once(src: Path, tmp_path: Path) -> None:
    moeconv.shard(src, tmp_path / "out", **SAME)
    with untouched(tmp_path / "out"):
        moeconv.shard(src, tmp_path / "out", resume=True, **SAME)
        with pytest.raises(CannotResume, match="finished output of another plan"):
            moeconv.shard(src, tmp_path / "out", resume=True, ep_size=4, redundant=2)


def test_a_run_that_was_killed_after_its_commit_is_ended(src: Path, tmp_path: Path) -> None:
    moeconv.shard(src, tmp_path / "whole", **SAME)
    moeconv.shard(src, tmp_path / "out", **SAME)
    (tmp_path / "out" / "moeconv" / "journal").write_bytes(b'{"plan":"","names":[]}\n')
    moeconv.shard(src, tmp_path / "out", resume=True, **SAME)
    assert tree_sha256(tmp_path / "out") == tree_sha256(tmp_path / "whole")


def test_a_run_that_lives_is_not_taken_for_one_that_barely_began(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the lock of its journal and the first line in it."""
    real, out = JournalFile.begin, tmp_path / "out"

    def begin(self: JournalFile, plan: str, names: tuple[str, ...], aside: int | None) -> None:
        monkeypatch.setattr(JournalFile, "begin", real)
        with pytest.raises(WouldOverwrite, match="another run"):
            moeconv.shard(src, out, resume=True, **SAME)
        real(self, plan, names, aside)

    monkeypatch.setattr(JournalFile, "begin", begin)
    moeconv.shard(src, out, **SAME)
    moeconv.shard(src, tmp_path / "whole", **SAME)
    assert tree_sha256(out) == tree_sha256(tmp_path / "whole")


def test_a_run_that_ends_between_the_opening_of_its_journal_and_the_lock(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = half_done(src, tmp_path / "out")
    real = JournalFile._lock

    def lock(self: JournalFile) -> None:
        monkeypatch.setattr(JournalFile, "_lock", real)
        moeconv.shard(src, out, resume=True, **SAME)  # the other one, to its end
        real(self)

    monkeypatch.setattr(JournalFile, "_lock", lock)
    with pytest.raises(WouldOverwrite, match="another run"):
        moeconv.shard(src, out, resume=True, **SAME)
    moeconv.shard(src, tmp_path / "whole", **SAME)
    assert tree_sha256(out) == tree_sha256(tmp_path / "whole")


def test_nothing_to_resume_is_a_plain_start(src: Path, tmp_path: Path) -> None:
    moeconv.shard(src, tmp_path / "a", resume=True, **SAME)
    moeconv.shard(src, tmp_path / "b", **SAME)
    assert tree_sha256(tmp_path / "a") == tree_sha256(tmp_path / "b")


@pytest.mark.parametrize("journal", [None, b"", b'{"names":["common-'])
def test_a_run_killed_before_its_first_word_is_a_plain_start(
    src: Path, tmp_path: Path, journal: bytes | None
) -> None:
    (tmp_path / "a" / "moeconv").mkdir(parents=True)
    if journal is not None:
        (tmp_path / "a" / "moeconv" / "journal").write_bytes(journal)
    moeconv.shard(src, tmp_path / "a", resume=True, **SAME)
    moeconv.shard(src, tmp_path / "b", **SAME)
    assert tree_sha256(tmp_path / "a") == tree_sha256(tmp_path / "b")


def test_a_foreign_directory_is_not_resumed(src: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with untouched(tmp_path / "out"), pytest.raises(WouldOverwrite):
        moeconv.shard(src, tmp_path / "out", resume=True, **SAME)


def test_resume_and_overwrite_are_two_things(src: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageProblem, match="--overwrite"):
        moeconv.shard(src, tmp_path / "out", resume=True, overwrite=True, **SAME)


def test_a_failing_run_keeps_what_can_be_resumed(src: Path, tmp_path: Path) -> None:
    """With `--resume` a full disk costs the file at hand, not the night's work."""
    out = half_done(src, tmp_path / "out")
    journal = read_journal(out)
    assert journal is not None
    inodes = {name: (out / name).stat().st_ino for name in journal.finished}
    assert len(inodes) >= 2
    assert not (out / "moeconv.json").exists()
    moeconv.shard(src, out, resume=True, **SAME)
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    moeconv.shard(src, tmp_path / "whole", **SAME)
    assert tree_sha256(out) == tree_sha256(tmp_path / "whole")


def fail_after(monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    """The disk fills up when so many data files are finished."""
    from moeconv.engine.copy import disk_sink

    real: Callable[..., None] = disk_sink.DiskSink.open
    opened = 0

    def open_(self: disk_sink.DiskSink) -> None:
        nonlocal opened
        opened += 1
        if opened > files:
            raise IoFailed("cannot write", cause="No space left on device", fix="make room")
        real(self)

    monkeypatch.setattr(disk_sink.DiskSink, "open", open_)


def test_a_journal_of_tensors_without_digests_is_read(tmp_path: Path):
    """A line of empty lists only is longer in lists than any other document of ours."""
    rows: list[list[str]] = [[] for _ in range(20_000)]
    lines = [{"plan": "0" * 32, "names": ["a"]}, {"file": "a", "digests": rows}, {"file": "b"}]
    (tmp_path / JOURNAL_NAME).parent.mkdir()
    text = "\n".join(json.dumps(line, separators=(",", ":")) for line in lines)
    (tmp_path / JOURNAL_NAME).write_text(text)
    journal = read_journal(tmp_path)
    assert journal is not None
    assert journal.finished == {"a": rows}


@pytest.mark.parametrize("where", ["model.safetensors", "tokenizer.json"])
@pytest.mark.parametrize("verb", ["fuse", "shard"])
def test_a_finished_output_of_an_older_source_is_not_done(
    tmp_path: Path, verb: str, where: str
) -> None:
    """As where a run with `--overwrite` was killed before it had put the old output aside."""
    src = write(tmp_path / "src", qwen(4, 16, 24), config=config(width=16))
    out, more = tmp_path / "out", {"ep_size": 2} if verb == "shard" else {}
    make = getattr(moeconv, verb)
    make(src, out, **more)
    os.utime(src / where)  # the same bytes are the same source, whatever the times say
    make(src, out, resume=True, **more)
    raw = bytearray((src / where).read_bytes())
    raw[-1] ^= 1
    (src / where).write_bytes(raw)
    with untouched(out), pytest.raises(CannotResume, match="of another source"):
        make(src, out, resume=True, **more)


def test_a_finished_output_of_another_output_is_not_done(tmp_path: Path) -> None:
    """Their digests are recorded: no times are needed to tell them apart."""
    src = write(tmp_path / "src", qwen(4, 16, 24), config=config(width=16))
    moeconv.fuse(src, tmp_path / "first")
    raw = bytearray((src / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (src / "model.safetensors").write_bytes(raw)
    moeconv.fuse(src, tmp_path / "second")
    moeconv.shard(tmp_path / "second", tmp_path / "out", ep_size=2)
    moeconv.shard(tmp_path / "second", tmp_path / "out", ep_size=2, resume=True)
    with pytest.raises(CannotResume, match="of another source"):
        moeconv.shard(tmp_path / "first", tmp_path / "out", ep_size=2, resume=True)


def test_a_finished_output_without_digests_is_done(tmp_path: Path) -> None:
    src = write(tmp_path / "src", qwen(4, 16, 24), config=config(width=16))
    moeconv.fuse(src, tmp_path / "ours")
    for source in (src, tmp_path / "ours"):
        out = tmp_path / f"of-{source.name}"
        for resume in (False, True):
            moeconv.shard(source, out, ep_size=2, digests="later", resume=resume)
