"""`--overwrite` removes unchanged files that moeconv wrote; all others stay and are named."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeconv
from moeconv.engine import commit
from moeconv.engine.copy.pool import Limits
from moeconv.engine.output.ownership import take_inventory
from moeconv.errors import WouldOverwrite
from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import tree, untouched
from tests.engine.edits import (
    DATA,
    Edit,
    append,
    chmod_all,
    copy_all,
    copy_by_name,
    copy_with_a_time_put_back,
    exchange,
    exchange_data,
    flip,
    flip_in_secret,
    folder,
    link,
    link_all,
    listen,
    pipe,
    retitle,
    touch_all,
    touch_by_name,
)
from tests.faults.killed import forked

LIMITS = Limits(1, 1 << 20)


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts, and a sidecar in a folder."""
    place = write(
        tmp_path_factory.mktemp("inventory") / "src", qwen(4, 16, 24), config=config(width=16)
    )
    (place / "assets").mkdir()
    (place / "assets" / "logo.svg").write_text("<svg/>")
    return place


@pytest.fixture(scope="module")
def made(src: Path) -> dict[str, Path]:
    """Outputs of each kind, by its name."""
    kinds = {
        name: src.parent / name for name in ("whole", "ranks", "later", "virtual", "half-done")
    }
    moeconv.fuse(src, kinds["whole"], max_shard_size=10_000)
    moeconv.shard(src, kinds["ranks"], ep_size=2)
    moeconv.fuse(src, kinds["later"], digests="later", max_shard_size=10_000)
    moeconv.shard(src, kinds["virtual"], ep_size=2, virtual=True)

    def die(*_: object) -> None:
        if len(list(kinds["half-done"].glob("rank*"))) > 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        moeconv.shard(src, kinds["half-done"], ep_size=2, jobs=1, progress=die)

    assert forked(work) == signal.SIGKILL
    return kinds


@pytest.fixture
def out(made: dict[str, Path], tmp_path: Path) -> Path:
    """A whole set, to be changed by a test."""
    shutil.copytree(made["whole"], tmp_path / "out", symlinks=True)
    return tmp_path / "out"


# --- edits -------------------------------------------------------------------------------------
CHANGES: dict[str, tuple[str, Edit, str]] = {
    "a bit of a tensor": (DATA, flip, "its tensors are not"),
    "a bit of a tensor, the time put back": (DATA, flip_in_secret, "its tensors are not"),
    "other tensors in an older file": (DATA, exchange_data, "its tensors are not"),
    "a bit of a header": (DATA, lambda p: flip(p, 8), "its header cannot be compared"),
    "a word of a header": (DATA, retitle, "its header is not the one"),
    "zeros of the same size": (DATA, exchange, "its header cannot be compared"),
    "a longer data file": (DATA, append, "its size"),
    "a data file that is a link": (DATA, link, "not a regular file"),
    "a data file that is a folder": (DATA, folder, "did not make"),
    "a data file that is a pipe": (DATA, pipe, "not a regular file"),
    "a sidecar of the same size": ("config.json", flip_in_secret, "its bytes"),
    "a longer sidecar": ("tokenizer.json", append, "its size"),
    "a sidecar in a folder": ("assets/logo.svg", flip, "its bytes"),
    "a sidecar that is a link": ("tokenizer.json", link, "not a regular file"),
    "a part": (f"moeconv/{DATA}.json", flip_in_secret, "its bytes"),
    "the index": ("model.safetensors.index.json", flip_in_secret, "its bytes"),
    "the origin": ("moeconv/origin", flip_in_secret, "its bytes"),
    "the root": ("moeconv.json", flip, "cannot be relied on"),
    "the root as a link": ("moeconv.json", link, "it "),
    "a file of somebody": ("notes.txt", Path.touch, "did not make"),
    "a hidden file beside the parts": ("moeconv/.notes", Path.touch, "did not make"),
    "an empty folder": ("runs", Path.mkdir, "did not make"),
    "an empty folder in one of ours": ("assets/more", Path.mkdir, "did not make"),
    "a socket": ("agent", listen, "did not make"),
    "a link to nowhere": ("latest", lambda p: p.symlink_to("nowhere"), "did not make"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_changed_is_named_and_stays(src: Path, out: Path, name: str) -> None:
    victim, change, reason = CHANGES[name]
    change(out / victim)
    with untouched(out, out.with_name("away")), pytest.raises(WouldOverwrite) as caught:
        moeconv.fuse(src, out, overwrite=True)
    assert f"`{victim}" in str(caught.value)
    assert reason in str(caught.value)


@pytest.mark.skipif(
    os.geteuid() != 0, reason="needs root, who may do it in a folder without rights"
)
def test_foreign_directories_are_named_whatever_their_rights(src: Path, out: Path) -> None:
    (out / "lost+found").mkdir(mode=0)
    with untouched(out), pytest.raises(WouldOverwrite, match="did not make") as caught:
        moeconv.fuse(src, out, overwrite=True)
    assert "`lost+found/`" in str(caught.value)


# --- what changes no byte ----------------------------------------------------------------------
@pytest.mark.parametrize("again", [copy_by_name, copy_with_a_time_put_back, touch_by_name])
def test_an_edit_is_found_after_a_copy_whose_root_is_the_newest(
    src: Path, out: Path, again: Edit
) -> None:
    flip(out / DATA)
    again(out)
    newest = (out / "moeconv.json").stat()
    assert (out / DATA).stat().st_mtime_ns < newest.st_mtime_ns
    assert (out / DATA).stat().st_ctime_ns < newest.st_ctime_ns
    with untouched(out), pytest.raises(WouldOverwrite, match="its tensors are not"):
        moeconv.fuse(src, out, overwrite=True)


def test_an_output_as_it_was_written_is_not_read(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moeconv.fuse(src, out, max_shard_size=10_000)
    inventory = take_inventory(out, LIMITS)
    assert DATA in inventory.trusted
    assert len(inventory.compared) <= 1  # the last may share a tick of the clock with a document


@pytest.mark.parametrize("kind", ["whole", "ranks", "virtual"])
@pytest.mark.parametrize("change", [touch_all, chmod_all, link_all, copy_all])
def test_other_times_rights_and_names_refuse_nothing(
    src: Path, made: dict[str, Path], tmp_path: Path, kind: str, change: Edit
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made[kind], out)
    change(out)
    inventory = take_inventory(out, LIMITS)
    assert not inventory.foreign
    if change is not link_all:  # of its times nobody knows which are newer
        assert bool(inventory.compared) == (kind != "virtual")
    moeconv.fuse(src, out, overwrite=True)
    assert moeconv.verify(out).ok
    assert not out.with_name(".out.replaced").exists()


def test_what_was_not_compared_is_reported(src: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    moeconv.fuse(src, out, max_shard_size=10_000)
    for path in out.glob("*.safetensors"):
        os.utime(path, (1000, 1000))  # an older time is no reason to doubt
    facts = (out / "moeconv.json").read_bytes()
    (out / "moeconv.json").unlink()
    (out / "moeconv.json").write_bytes(facts)  # a tick later than anything else
    inventory = take_inventory(out, LIMITS)
    done = moeconv.fuse(src, out, overwrite=True)
    said = "\n".join(done.plan.notes)
    for files, words in (
        (inventory.trusted, "not the tensors' bytes"),
        (inventory.compared, "read and compared"),
    ):
        assert (f"{len(files)} data file" in said and words in said) == bool(files)
    assert len({*inventory.trusted, *inventory.compared}) == 3


def test_newer_files_without_digests_are_refused(
    src: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    """Nothing can tell whether somebody changed them."""
    out = tmp_path / "out"
    shutil.copytree(made["later"], out)
    os.utime(out / DATA)
    with untouched(out), pytest.raises(WouldOverwrite, match=DATA) as caught:
        moeconv.fuse(src, out, overwrite=True)
    assert "has no digests of it" in str(caught.value)


def test_outputs_without_digests_are_replaced_at_once(src: Path, tmp_path: Path) -> None:
    """Small ones are written within one tick of the file system's clock."""
    for _ in range(8):
        moeconv.fuse(src, tmp_path / "out", digests="later", overwrite=True)


def test_the_index_may_lack_and_a_part_too(src: Path, out: Path) -> None:
    (out / "model.safetensors.index.json").unlink()
    shutil.copystat(out / "config.json", out / "moeconv.json")
    moeconv.fuse(src, out, overwrite=True)
    assert moeconv.verify(out).ok


@pytest.mark.parametrize("name", [DATA, "config.json", "moeconv/origin"])
def test_an_empty_file_has_nothing_to_lose(src: Path, out: Path, name: str) -> None:
    (out / name).write_bytes(b"")
    moeconv.fuse(src, out, overwrite=True)
    assert moeconv.verify(out).ok


# --- while the new output is written -----------------------------------------------------------
def test_what_comes_while_the_new_output_is_written_stays(src: Path, out: Path) -> None:
    """The old one waits beside it for hours, and somebody has a file of it open."""
    old = out.with_name(".out.replaced")

    def meanwhile(*_: object) -> None:
        if not (old / "notes.txt").exists():
            (old / "notes.txt").write_text("mine")
            append(old / "tokenizer.json")
            flip_in_secret(old / DATA)

    done = moeconv.fuse(src, out, overwrite=True, progress=meanwhile)
    assert moeconv.verify(out).ok
    assert {p.name for p in old.iterdir()} == {"notes.txt", "tokenizer.json", DATA}
    assert str(old) in done.plan.notes[-1]
    with untouched(old, out), pytest.raises(WouldOverwrite, match="in the way"):
        moeconv.fuse(src, out, overwrite=True)


# --- an unfinished run -------------------------------------------------------------------------
@pytest.mark.parametrize("verb", ["overwrite", "resume"])
def test_a_file_under_a_name_that_was_announced_only(
    src: Path, made: dict[str, Path], tmp_path: Path, verb: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made["half-done"], out)
    assert not (out / "config.json").exists()
    (out / "config.json").write_text("mine")
    with untouched(out), pytest.raises(WouldOverwrite, match=r"config\.json"):
        moeconv.shard(src, out, ep_size=2, jobs=1, **{verb: True})


def test_documents_that_were_changed_are_not_rewritten_by_a_resumed_run(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def work() -> None:
        monkeypatch.setattr(commit, "root_bytes", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        moeconv.fuse(src, out)

    assert forked(work) == signal.SIGKILL
    append(out / "config.json")
    with untouched(out), pytest.raises(WouldOverwrite, match=r"config\.json") as caught:
        moeconv.fuse(src, out, resume=True)
    assert "changed after the unfinished run made it" in str(caught.value)
    (out / "config.json").unlink()
    moeconv.fuse(src, out, resume=True)
    assert moeconv.verify(out).ok


# --- anything in any order ---------------------------------------------------------------------
PATHS = st.sampled_from(
    f"""config.json tokenizer.json assets/logo.svg moeconv.json moeconv/origin {DATA} notes
    moeconv/common.json rank-00000-of-00002-00001-of-00001.safetensors assets/notes assets/new
    common-00001-of-00001.safetensors moeconv/notes""".split()
)
EDITS: dict[str, Edit] = {
    "flip": flip,
    "flip in secret": flip_in_secret,
    "append": append,
    "exchange": exchange,
    "exchange data": exchange_data,
    "touch": os.utime,
    "age": lambda p: os.utime(p, (1, 1)),
    "chmod": lambda p: p.chmod(0o600),
    "remove": Path.unlink,
    "rewrite": lambda p: p.write_bytes(p.read_bytes()),
    "link": link,
    "folder": folder,
    "new": lambda p: p.write_text("mine"),
    "new folder": Path.mkdir,
}
HARMLESS = {"touch", "age", "chmod", "rewrite"}


@settings(max_examples=40)
@given(
    kind=st.sampled_from(["whole", "ranks", "half-done"]),
    edits=st.lists(st.tuples(st.sampled_from(sorted(EDITS)), PATHS), min_size=1, max_size=3),
)
def test_foreign_files_are_never_removed(
    src: Path,
    made: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    edits: list[tuple[str, str]],
) -> None:
    """The oracle: every entry that is not in the pristine output, byte for byte, is theirs."""
    pristine = tree(made[kind]) or {}
    place = tmp_path_factory.mktemp("edited")
    out = place / "out"
    shutil.copytree(made[kind], out, symlinks=True)
    done = set()
    for what, name in edits:
        path = out / name
        new = what.startswith("new")
        fits = path.parent.is_dir() if new else path.is_file() and path.stat().st_size > 64
        if kind == "half-done" and "secret" in what:
            continue  # of an unfinished output size and time are known, and no more
        if fits and new != os.path.lexists(path):
            EDITS[what](path)
            done.add(what)
    now = tree(out) or {}
    theirs = {name for name, what in now.items() if pristine.get(name) != what}
    try:
        with untouched(place / "away"):
            moeconv.fuse(src, out, overwrite=True)
    except WouldOverwrite:
        assert tree(out) == now
        assert theirs or not done <= HARMLESS or kind == "half-done"
    else:
        assert not theirs, f"{theirs} went with {done}"
        assert moeconv.verify(out, level="structure").ok
    shutil.rmtree(place)
