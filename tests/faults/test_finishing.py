"""Killed at each call that changes the disk: whatever is left, the same command finishes it."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moeconv
import moeconv.runtime
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.atomic_file import write_single
from moeconv.engine.output.ownership import take_inventory
from moeconv.errors import WouldOverwrite
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import tree, untouched
from tests.cli.run import moeconv as command
from tests.faults.killed import count_calls, forked

Record = Callable[[str, object], None]
AS_MANY = [pytest.param(8), pytest.param(10**6, marks=pytest.mark.soak)]
SMALL: dict[str, int] = {"max_shard_size": 20_000}


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four experts in two layers."""
    return write(tmp_path / "src", qwen(4, 16, 24, layers=2), config=config(width=16))


def backup_of(out: Path) -> Path:
    """Where an old output waits."""
    return out.with_name(f".{out.name}.replaced")


def killed(
    work: Callable[[], object], anew: Callable[[], None], times: int, *, last: int | None = None
) -> Iterator[int]:
    """Kill `work` at calls evenly drawn from all, or from the `last` ones, each after `anew`.

    Yields the number of the call that was not made.
    """
    counter = Path("calls").absolute()

    def counted(limit: int | None) -> None:
        asked = count_calls(limit)
        work()
        if limit is None:
            counter.write_text(str(asked()))

    anew()
    assert forked(lambda: counted(None)) == 0
    total = int(counter.read_text())
    first = 1 if last is None else max(1, total - last + 1)
    step = max(1, (total - first + 1) // times)
    for number in range(first, total + 1, step):
        anew()
        assert forked(lambda: counted(number)) == signal.SIGKILL  # noqa: B023 - used at once
        yield number


def copied(source: Path, out: Path) -> Callable[[], None]:
    """Put a copy of a directory in OUT's place, times and all; nothing else stays beside it."""

    def anew() -> None:
        for place in (out, backup_of(out)):
            shutil.rmtree(place, ignore_errors=True)
        if source.exists():
            shutil.copytree(source, out)

    return anew


# --- verify --fill -----------------------------------------------------------------------------
@pytest.mark.parametrize("times", AS_MANY)
@pytest.mark.parametrize("kind", ["later", "virtual"])
def test_an_interrupted_fill_leaves_a_valid_output(  # noqa: PLR0917 - fixtures
    src: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    times: int,
    record_property: Record,
) -> None:
    """Between the root and its parts, too: every verb reads it, the loader as well."""
    monkeypatch.chdir(tmp_path)
    bare, out = tmp_path / "bare", tmp_path / "out"
    if kind == "virtual":
        moeconv.shard(src, bare, ep_size=2, virtual=True)
    else:
        moeconv.shard(src, bare, ep_size=2, digests="later")

    def fill() -> object:
        return moeconv.verify(out, level="source", source=src, fill=True)

    copied(bare, out)()
    assert fill().ok  # type: ignore[attr-defined]
    whole, fingerprint, done = tree(out), moeconv.fingerprint(out), 0
    for _ in killed(fill, copied(bare, out), times):
        done += 1
        report = moeconv.verify(out)
        assert report.ok or [p.code for p in report.problems] == ["digests-missing"]
        assert moeconv.verify(out, level="structure").ok
        assert not moeconv.open_source(out).checkpoint.warnings
        foreign = take_inventory(out, Limits(1, 1 << 20)).foreign
        assert not [name for name in foreign if name.startswith("moeconv")]
        for rank in range(2):
            moeconv.runtime.open(out, ep_rank=rank, ep_size=2)
        assert moeconv.fingerprint(out) == fingerprint
        assert fill().ok  # type: ignore[attr-defined]
        assert tree(out) == whole
    record_property("kills", done)


# --- the removal of the old output -------------------------------------------------------------
@pytest.mark.parametrize("times", AS_MANY)
@pytest.mark.parametrize("old", ["ranks", "whole", "virtual", "half-done"])
def test_the_old_output_goes_in_the_end(  # noqa: PLR0917 - fixtures
    src: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    times: int,
    record_property: Record,
) -> None:
    monkeypatch.chdir(tmp_path)
    out, kept = tmp_path / "out", tmp_path / "old"
    moeconv.fuse(src, tmp_path / "new")
    if old == "whole":
        moeconv.fuse(src, kept, **SMALL)
    else:
        moeconv.shard(src, kept, ep_size=2, virtual=old == "virtual")
    if old == "half-done":
        shutil.rmtree(kept)

        def half() -> None:
            moeconv.shard(src, kept, ep_size=2, jobs=1, progress=die_after_a_file)

        def die_after_a_file(*_: object) -> None:
            if list(kept.glob("*.safetensors")):
                os.kill(os.getpid(), signal.SIGKILL)

        assert forked(half) == signal.SIGKILL
        assert (kept / "moeconv" / "journal").exists()
    wanted, before, met = tree(tmp_path / "new"), tree(kept), 0
    entries = sum(1 for _ in kept.rglob("*"))

    def overwrite() -> None:
        moeconv.fuse(src, out, overwrite=True)

    for number in killed(overwrite, copied(kept, out), times, last=entries + 6):
        if backup_of(out).exists():
            met += tree(backup_of(out)) != before
        stood = (out / "moeconv.json").exists()
        assert moeconv.verify(out).ok if stood else True
        if number % 2:
            moeconv.fuse(src, out, resume=True)
        else:
            overwrite()
        assert tree(out) == wanted
        assert not os.path.lexists(backup_of(out))
    record_property("removals that were killed midway", met)
    assert met


def test_a_refused_plain_run_names_the_command_that_ends_the_removal(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    out, kept = tmp_path / "out", tmp_path / "old"
    moeconv.shard(src, kept, ep_size=2)

    def overwrite() -> None:
        moeconv.fuse(src, out, overwrite=True)

    for _ in killed(overwrite, copied(kept, out), 1, last=3):
        assert backup_of(out).exists()
        with pytest.raises(WouldOverwrite) as caught:
            moeconv.fuse(src, out)
        assert str(backup_of(out)) in str(caught.value)
        assert "`--resume` removes the rest" in str(caught.value)


# --- restores ----------------------------------------------------------------------------------
@pytest.mark.parametrize("times", AS_MANY)
@pytest.mark.parametrize("files", ["one", "several"])
@pytest.mark.parametrize("there", ["nothing", "an old output"])
def test_a_restore_is_resumed_to_its_end(  # noqa: PLR0917 - fixtures
    src: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    files: str,
    there: str,
    times: int,
    record_property: Record,
) -> None:
    monkeypatch.chdir(tmp_path)
    out, old, origin = tmp_path / "out", tmp_path / "old", src
    if files == "several":
        origin = tmp_path / "origin"
        moeconv.unfuse(src, origin, layout="per-expert", **SMALL)
        shutil.rmtree(origin / "moeconv")
        (origin / "moeconv.json").unlink()
    moeconv.shard(origin, tmp_path / "ranks", ep_size=2)
    if there == "an old output":
        moeconv.fuse(src, old)

    def restore() -> None:
        moeconv.merge(tmp_path / "ranks", out, overwrite=old.exists())

    wanted, whole = tree(origin), 0
    before = tree(old)
    for number in killed(restore, copied(old, out), times):
        whole += tree(out) == wanted
        if tree(out) == before:
            restore()
        else:
            moeconv.merge(tmp_path / "ranks", out, resume=True)
        assert tree(out) == wanted, number
        assert not os.path.lexists(backup_of(out)), number
    record_property("restores that were whole when they were killed", whole)


@pytest.mark.parametrize("left", ["nothing", "an empty moeconv/"])
def test_a_restore_that_had_come_to_its_end_is_done(src: Path, tmp_path: Path, left: str) -> None:
    moeconv.fuse(src, tmp_path / "ours")
    moeconv.unfuse(tmp_path / "ours", tmp_path / "out")
    if left != "nothing":
        (tmp_path / "out" / "moeconv").mkdir()
    plain = command("unfuse", tmp_path / "ours", "-o", tmp_path / "out")
    assert (plain.code, "`--resume`" in plain.err) == (6, True)
    with untouched(tmp_path / "out"):
        dry = command("unfuse", tmp_path / "ours", "-o", tmp_path / "out", "--resume", "-n")
    assert dry.code == 0
    done = command("unfuse", tmp_path / "ours", "-o", tmp_path / "out", "--resume")
    assert done.code == 0, done.err
    assert tree(tmp_path / "out") == tree(src)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_restore_that_was_changed_is_not_done(src: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    moeconv.fuse(src, tmp_path / "ours")
    moeconv.unfuse(tmp_path / "ours", out)
    raw = bytearray((out / name).read_bytes())
    raw[-1] ^= 1
    (out / name).write_bytes(raw)
    with untouched(out), pytest.raises(WouldOverwrite):
        moeconv.unfuse(tmp_path / "ours", out, resume=True)


def test_a_restore_of_an_output_without_digests_is_compared_with_it(
    src: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moeconv.fuse(src, tmp_path / "ours", digests="later")
    moeconv.unfuse(tmp_path / "ours", out)
    moeconv.unfuse(tmp_path / "ours", out, resume=True)
    raw = bytearray((out / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (out / "model.safetensors").write_bytes(raw)
    with untouched(out), pytest.raises(WouldOverwrite):
        moeconv.unfuse(tmp_path / "ours", out, resume=True)


# --- one file ----------------------------------------------------------------------------------
def test_a_single_file_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / ("m" * 250 + ".json")

    def anew() -> None:
        path.unlink(missing_ok=True)

    for _ in killed(lambda: write_single(path, b"map" * 100), anew, 10**6):
        if not path.exists():
            write_single(path, b"map" * 100)
        assert path.read_bytes() == b"map" * 100
