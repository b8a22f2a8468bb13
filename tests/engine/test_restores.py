"""A restore is held against the recorded digests: after it, nothing else could tell."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
from moeconv.api.run import Result
from moeconv.engine import commit
from moeconv.engine.copy import disk_sink
from moeconv.engine.recorded_digests import Recorded
from moeconv.errors import Damaged, UsageProblem
from moeconv.store.base import File
from tests.badinput.builders import config, qwen, two_files, write
from tests.badinput.checks import untouched
from tests.cli.run import moeconv as command
from tests.engine.cloning import big, share, source
from tests.helpers import tree_sha256
from tests.verification.forged import flip

VERBS = [moeconv.unfuse, moeconv.merge]
Verb = Callable[..., Result]


def small(folder: Path) -> Path:
    """Four experts in two files."""
    return write(folder, two_files(qwen(4, 8, 16)), config=config(width=8, hidden=16))


def refused(verb: Verb, made: Path, to: Path, **more: object) -> None:
    """A restore that must not come to an end, and leaves nothing."""
    with untouched(made), pytest.raises(Damaged):
        verb(made, to, **more)
    assert not to.exists()


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("digests", ["now", "later"])
@pytest.mark.parametrize("layout", ["fused", "kn", "ranks"])
def test_damage_is_not_restored(verb: Verb, digests: str, layout: str, tmp_path: Path) -> None:
    """Whether bytes are copied, turned or picked from ranks."""
    src, made = small(tmp_path / "src"), tmp_path / "made"
    if layout == "ranks":
        moeconv.shard(src, made, ep_size=2)
    else:
        moeconv.fuse(src, made, layout=layout)
    verb(made, tmp_path / "well", digests=digests)
    assert tree_sha256(tmp_path / "well") == tree_sha256(src)
    for data in made.glob("*.safetensors"):
        flip(data)
        refused(verb, made, tmp_path / "to", digests=digests)
        verb(made, tmp_path / "unchecked", digests=digests, unchecked=True)
        assert tree_sha256(tmp_path / "unchecked") != tree_sha256(src)
        shutil.rmtree(tmp_path / "unchecked")
        flip(data)


@pytest.mark.parametrize("digests", ["now", "later"])
def test_what_the_kernel_copies_is_read_for_it(
    digests: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk_sink, "open_direct", lambda _: None)
    moeconv.fuse(big(tmp_path / "src"), tmp_path / "made")
    flip(next((tmp_path / "made").glob("*.safetensors")), -300_000)
    for verb in VERBS:
        refused(verb, tmp_path / "made", tmp_path / "to", digests=digests)


@pytest.mark.parametrize("digests", ["now", "later"])
@pytest.mark.parametrize("sharded", [False, True])
def test_what_is_cloned_is_read_for_it(
    digests: str, sharded: bool, cloning: Path, tmp_path: Path
) -> None:
    """Sources whose data start on a page are restored by clones, damaged or not."""
    moeconv.fuse(source(tmp_path / "src"), cloning / "paged")
    shutil.copytree(cloning / "paged", cloning / "foreign", ignore=shutil.ignore_patterns("moe*"))
    (cloning / "foreign" / "model.safetensors.index.json").unlink()
    made = cloning / "made"
    if sharded:
        moeconv.shard(cloning / "foreign", made, ep_size=2)
    else:
        moeconv.fuse(cloning / "foreign", made)
    result = moeconv.merge(made, cloning / "well", digests=digests)
    assert share(result) > 0.9
    assert tree_sha256(cloning / "well") == tree_sha256(cloning / "foreign")
    flip(max(made.glob("*.safetensors")), -5000)
    for verb in VERBS:
        refused(verb, made, cloning / "to", digests=digests)
    result = moeconv.merge(made, cloning / "unchecked", unchecked=True)
    assert share(result) > 0.9
    for name in ("paged", "foreign", "made", "well", "unchecked"):
        shutil.rmtree(cloning / name)


@pytest.mark.parametrize("digests", ["now", "later"])
def test_what_an_earlier_run_kept_is_compared_with_it_too(
    digests: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal can be of a run that did not compare."""
    src, made, to = small(tmp_path / "src"), tmp_path / "made", tmp_path / "to"
    moeconv.fuse(src, made)
    flip(next(made.glob("*.safetensors")))

    def stop(_: object, sidecar: File) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Recorded, "check_file", lambda *_: None)
        patch.setattr(commit._Commit, "_sidecar", stop)
        with pytest.raises(KeyboardInterrupt):
            moeconv.unfuse(made, to, resume=True)
    assert list(to.glob("*.safetensors"))
    with pytest.raises(Damaged):
        moeconv.unfuse(made, to, resume=True, digests=digests)


@pytest.mark.parametrize("verb", [*VERBS, moeconv.fuse])
@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_sidecar_that_changes_after_it_was_looked_at(
    verb: Verb, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    moeconv.fuse(small(tmp_path / "src"), made)
    flip(made / name, -2)
    monkeypatch.setattr(Recorded, "refuse_edited", lambda *_: None)
    refused(verb, made, tmp_path / "to")


@pytest.mark.parametrize("digests", ["now", "later"])
def test_an_output_without_digests_is_restored_but_promises_nothing(
    digests: str, tmp_path: Path
) -> None:
    src = small(tmp_path / "src")
    moeconv.shard(src, tmp_path / "virtual", ep_size=2, virtual=True, layout="per-expert")
    moeconv.fuse(src, tmp_path / "later", digests="later")
    moeconv.fuse(src, tmp_path / "now")
    for name, count in (("virtual", 14), ("later", 4), ("now", 0)):
        to = tmp_path / f"{name}-back"
        result = moeconv.merge(tmp_path / name, to, digests=digests)
        assert tree_sha256(to) == tree_sha256(src)
        said = "\n".join(result.plan.notes)
        assert ("bit for bit" in said) is (count == 0)
        assert (f"{count} of {count} tensors have no recorded digest" in said) is (count > 0)


def test_unchecked_is_reported(tmp_path: Path) -> None:
    moeconv.fuse(small(tmp_path / "src"), tmp_path / "made")
    done = command("unfuse", tmp_path / "made", "-o", tmp_path / "a", "--unchecked")
    assert done.code == 0
    assert "not compared with the recorded digests" in done.err
    assert "bit for bit" not in done.err
    done = command("merge", tmp_path / "made", "-o", tmp_path / "b", "--unchecked", "--json")
    assert any("not compared with" in note for note in json.loads(done.out)["notes"])


def test_unchecked_is_for_restoring_alone(tmp_path: Path) -> None:
    src, made, to = small(tmp_path / "src"), tmp_path / "made", tmp_path / "to"
    moeconv.fuse(src, made)
    wrong: list[Callable[[], object]] = [
        lambda: moeconv.unfuse(src, to, unchecked=True),
        lambda: moeconv.unfuse(made, to, unchecked=True, layout="per-expert"),
        lambda: moeconv.merge(made, to, unchecked=True, layout="kn"),
        lambda: moeconv.merge(made, to, unchecked=True, layout="kn", dry_run=True),
    ]
    for call in wrong:
        with pytest.raises(UsageProblem, match="--unchecked"):
            call()
        assert not to.exists()
