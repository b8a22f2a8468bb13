"""In which order things come to the disk: a power cut at any moment leaves no set that lies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TypeAlias

import pytest

import moeconv
from moeconv.engine.output.journal import JOURNAL_NAME
from tests.badinput.builders import config, qwen, write
from tests.calls import watched

Name: TypeAlias = str | os.PathLike[str]
ROOT, INDEX = "moeconv.json", "model.safetensors.index.json"


class Steps:
    """What is synced, named and unlinked, in order; a file by its name in OUT, or by its inode."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, out: Path) -> None:
        self.out = out
        self.made: list[tuple[str, str]] = []
        looks = {"fsync": self._synced, "unlink": self._unlinked}
        looks |= dict.fromkeys(("rename", "replace"), self._named)
        for name, look in looks.items():
            monkeypatch.setattr(os, name, watched(getattr(os, name), look))

    def _synced(self, descriptor: int) -> None:
        self._add("sync", os.readlink(f"/proc/self/fd/{descriptor}"))  # noqa: PTH115 - a name

    def _unlinked(self, path: Name, **_: object) -> None:
        self._add("unlink", path)

    def _named(self, source: Name, target: Name, **_: object) -> None:
        self._add("from", source)
        self._add("name", target)

    def _add(self, what: str, path: Name) -> None:
        self.made.append((what, os.path.relpath(path, self.out)))

    def first(self, what: str, name: str, since: int = 0) -> int:
        """Where a step comes next; fails where it does not."""
        assert (what, name) in self.made[since:], f"no {what} of {name} after step {since}"
        return self.made.index((what, name), since)

    @property
    def names(self) -> list[str]:
        """The final names, in order."""
        return [name for what, name in self.made if what == "name"]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four experts in two layers; a sidecar in a folder of its own."""
    made = write(tmp_path / "src", qwen(4, 64, 96, layers=2), config=config(width=64, hidden=96))
    (made / "more").mkdir()
    (made / "more" / "notes.txt").write_text("notes")
    return made


def each_file_is_there_before_its_name(steps: Steps) -> None:
    """Its bytes are on the disk before the name is, and the name before whatever follows it."""
    for at, (what, name) in enumerate(steps.made):
        if what == "name":
            _, partial = steps.made[at - 1]
            assert ("sync", partial) in steps.made[: at - 1], f"{name} was not synced"
            steps.first("sync", os.path.dirname(name) or ".", at)  # noqa: PTH120 - a name


def test_an_output(src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    steps = Steps(monkeypatch, out)
    moeconv.fuse(src, out, max_shard_size=100_000, jobs=1)
    monkeypatch.undo()
    there = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    assert sorted(steps.names) == sorted(there)  # each named once
    assert "more/notes.txt" in there
    each_file_is_there_before_its_name(steps)
    # the index when all else has its name, the manifest when that has, each with its folder
    assert steps.names[-2:] == [INDEX, ROOT]
    index, root = steps.first("name", INDEX), steps.first("name", ROOT)
    for name in steps.names[:-2]:
        at = steps.first("name", name)
        assert steps.first("sync", os.path.dirname(name) or ".", at) < index  # noqa: PTH120
    assert steps.first("sync", ".", index) < root
    # a data file is noted when its name is on the disk
    journal = steps.first("sync", JOURNAL_NAME)
    for name in (n for n in steps.names if n.endswith(".safetensors")):
        at = steps.first("name", name)
        assert journal < at
        assert steps.first("sync", JOURNAL_NAME, steps.first("sync", ".", at)) < root
    # the journal stands until the manifest does
    gone = steps.first("unlink", JOURNAL_NAME)
    assert steps.first("sync", ".", root) < gone
    steps.first("sync", ".", gone)
    steps.first("sync", "..", gone)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_restored_source(
    tmp_path: Path, src: Path, monkeypatch: pytest.MonkeyPatch, *, indexed: bool
) -> None:
    """What makes it whole comes last: the index, or without one the data files themselves."""
    if indexed:
        moeconv.fuse(src, tmp_path / "split", max_shard_size=100_000)
        src = tmp_path / "split"
        shutil.rmtree(src / "moeconv")  # a foreign one from here on
        (src / ROOT).unlink()
    moeconv.shard(src, tmp_path / "ranks", ep_size=2)
    out = tmp_path / "back"
    steps = Steps(monkeypatch, out)
    moeconv.merge(tmp_path / "ranks", out)
    monkeypatch.undo()
    each_file_is_there_before_its_name(steps)
    last = steps.names[-1]
    assert last == (INDEX if indexed else "model.safetensors")
    gone = steps.first("unlink", JOURNAL_NAME)
    assert steps.first("sync", ".", steps.first("name", last)) < gone
    steps.first("sync", ".", gone)


def test_an_overwritten_output_is_kept_until_the_new_one_is_on_the_disk(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    moeconv.fuse(src, out)
    steps = Steps(monkeypatch, out)
    moeconv.shard(src, out, ep_size=2, overwrite=True)
    monkeypatch.undo()
    stood = steps.first("sync", ".", steps.first("name", ROOT))
    old = [at for at, (what, name) in enumerate(steps.made) if what == "unlink" and "ed/" in name]
    assert len(old) > 3
    assert min(old) > stood
