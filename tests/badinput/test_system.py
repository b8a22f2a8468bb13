"""What the operating system refuses ends in our own errors: rights, names, depths, and any call."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import moeconv
import moeconv.runtime
from moeconv.checkpoint.output_files import filled_name, hidden_name
from moeconv.core.system_errors import system_errors
from moeconv.engine.output.atomic_file import write_single
from moeconv.errors import IoFailed, MoeconvError, SourceMissing, UsageProblem
from moeconv.store.paths import files_below
from tests.badinput.builders import qwen, write
from tests.badinput.checks import holds, refused, tree, untouched
from tests.calls import around
from tests.cli.run import Done, environment
from tests.cli.run import moeconv as command

LONG = "a" * 300
_NO_RIGHTS = "-dac_override,-dac_read_search"


@pytest.fixture
def good(src: Path) -> Path:
    """A source that nothing is wrong with."""
    return write(src, qwen())


# --- rights ------------------------------------------------------------------------------------
def plain_user(*words: object) -> Done:
    """The command as somebody who has no more rights than the files give; skips where root must."""
    run = [sys.executable, "-m", "moeconv", *map(str, words)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("needs setpriv to lay root's rights down")
        bounds = [f"--bounding-set={_NO_RIGHTS}", f"--inh-caps={_NO_RIGHTS}"]
        run = ["setpriv", *bounds, "--", *run]
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment())
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def closed(request: pytest.FixtureRequest) -> Iterator[Callable[[Path], None]]:
    """Takes all rights from a path, and gives them back in the end."""
    paths: list[Path] = []

    def close(path: Path) -> None:
        paths.append(path)
        path.chmod(0)

    yield close
    for path in paths:
        path.chmod(0o755)


def test_a_folder_that_may_not_be_read(good: Path, out: Path, closed: Callable[[Path], None]):
    (good / "runs").mkdir()
    closed(good / "runs")
    done = plain_user("fuse", good, "-o", out)
    assert done.code == 3
    assert "error[not-found]: cannot list `runs`" in done.err
    assert "--exclude 'runs/*'" in done.err
    assert plain_user("fuse", good, "-o", out, "--exclude", "runs/*").code == 0


def test_a_folder_of_the_file_system_is_never_a_sidecar(
    good: Path, out: Path, closed: Callable[[Path], None]
):
    (good / "lost+found").mkdir()
    closed(good / "lost+found")
    assert plain_user("fuse", good, "-o", out).code == 0


def test_an_unreadable_directory_in_an_output_is_named(
    good: Path, out: Path, closed: Callable[[Path], None]
):
    moeconv.fuse(good, out)
    (out / "runs").mkdir()
    closed(out / "runs")
    done = plain_user("unfuse", out, "-o", out.with_name("back"))
    assert done.code == 0
    assert "`runs/` is not part of this output" in done.err


@pytest.mark.parametrize("verb", ["verify", "inspect"])
def test_parts_that_may_not_be_read(
    good: Path, out: Path, closed: Callable[[Path], None], verb: str
):
    moeconv.fuse(good, out)
    closed(out / "moeconv")
    done = plain_user(verb, out)
    assert done.code in ({1, 3} if verb == "verify" else {3})
    assert "Permission denied" in done.err


def test_a_source_that_may_not_be_entered(good: Path, out: Path, closed: Callable[[Path], None]):
    closed(good)
    done = plain_user("fuse", good, "-o", out)
    assert (done.code, "Permission denied" in done.err) == (3, True)


# --- folders that are left out, or deep --------------------------------------------------------
@pytest.mark.parametrize(
    ("glob", "entered"),
    [("runs*", False), ("runs/*", False), ("*", False), ("runs", True), ("*.log", True)],
)
def test_folders_of_which_nothing_is_wanted_are_not_entered(
    good: Path, monkeypatch: pytest.MonkeyPatch, glob: str, *, entered: bool
):
    (good / "runs").mkdir()
    (good / "runs" / "log").touch()
    listed: list[str] = []
    real = os.scandir

    def scandir(path: Path) -> object:
        listed.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found, unread = files_below(good, exclude=(glob,))
    assert ("runs" in listed) == entered == ("runs/log" in found)
    assert not unread


def deep(root: Path, levels: int) -> None:
    """So many folders, each in the one before; their path may be longer than the system takes."""
    here = os.open(".", os.O_RDONLY)
    os.chdir(root)
    try:
        for _ in range(levels):
            os.mkdir("d")  # noqa: PTH102 - relative, the whole path would be too long
            os.chdir("d")
    finally:
        os.fchdir(here)
        os.close(here)


@pytest.mark.parametrize(("levels", "code"), [(1100, 0), (2200, 3)])
def test_folders_that_are_thousands_deep(good: Path, out: Path, levels: int, code: int):
    deep(good, levels)
    try:
        if not code:
            assert [s.name for s in moeconv.open_source(good).checkpoint.sidecars]
            return
        with pytest.raises(SourceMissing, match="too long") as caught:
            moeconv.fuse(good, out)
        assert "--exclude" in str(caught.value)
    finally:
        subprocess.run(["rm", "-rf", good / "d"], check=True)


# --- names -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "words",
    [
        ("inspect", LONG),
        ("fuse", "SRC", "-o", LONG),
        ("fuse", "SRC", "-o", f"{LONG}/o", "--overwrite"),
        ("verify", LONG),
        ("diff", "SRC", LONG),
        ("fingerprint", LONG),
        ("shard", "SRC", "-o", "o", "--ep", "2", "--placement", LONG),
        ("fuse", "SRC", "-o", "o", "--recipe", LONG),
        ("placement", "show", LONG),
        ("recipes", "check", LONG),
        ("demo", "-o", LONG),
    ],
    ids=" ".join,
)
def test_names_that_no_file_can_have(good: Path, words: tuple[str, ...]):
    done = command(*(str(good) if word == "SRC" else word for word in words), cwd=good.parent)
    assert 2 <= done.code <= 6, done.err
    assert "fix: " in done.err


@pytest.mark.parametrize("path", ["a\0b", "a\ud800b"], ids=ascii)
def test_texts_that_are_not_paths(good: Path, out: Path, path: str):
    with pytest.raises(SourceMissing, match="does not exist"):
        moeconv.fuse(path, out)
    with pytest.raises(UsageProblem, match="is not a path"):
        moeconv.fuse(good, path)


@pytest.mark.parametrize("length", [246, 247, 255])
def test_the_longest_names_are_restored(src: Path, out: Path, length: int):
    name = "m" * (length - len(".safetensors")) + ".safetensors"
    sidecar = "é" * (length // 2)
    write(src, {name: qwen()}, index=False)
    (src / sidecar).write_text("mine")
    moeconv.shard(src, out, ep_size=2)
    moeconv.merge(out, out.with_name("back"))
    assert tree(out.with_name("back")) == tree(src)


@pytest.mark.parametrize("length", [246, 255])
def test_an_out_of_the_longest_name_is_overwritten(good: Path, tmp_path: Path, length: int):
    out = tmp_path / ("o" * length)
    moeconv.fuse(good, out)
    moeconv.shard(good, out, ep_size=2, overwrite=True)
    assert moeconv.verify(out).ok
    assert sorted(p.name for p in tmp_path.iterdir()) == [out.name, "src"]


def test_stand_ins_have_names_of_their_own():
    names = ["m" * 240 + c for c in "abc"] + ["é" * 127, "short"]
    for suffix in (".partial", ".filled", ".replaced"):
        hidden = [hidden_name(name, suffix) for name in names]
        assert len(set(hidden)) == len(names)
        assert all(len(os.fsencode(h)) <= 255 and h.endswith(suffix) for h in hidden)
    assert hidden_name("short", ".partial") == ".short.partial"
    assert filled_name("moeconv/common.json") == "moeconv/.common.json.filled"


def test_a_single_file_of_the_longest_name(tmp_path: Path):
    path = tmp_path / ("p" * 255)
    write_single(path, b"map")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(IoFailed) as caught:
        write_single(tmp_path / LONG, b"map")
    holds(caught.value, IoFailed, "File name too long", "shorter")


def test_a_result_whose_path_is_not_text_is_printed(good: Path, tmp_path: Path):
    out = os.fsdecode(os.fsencode(tmp_path) + b"/\xff")
    run = [sys.executable, "-m", "moeconv", "fuse", "-q", good, "-o", out]
    for more in ((), ("--overwrite", "--json")):
        done = subprocess.run([*run, *more], capture_output=True, check=True, env=environment())
        assert (b"/\xff\n" if not more else b"/\\udcff") in done.stdout


# --- any call ----------------------------------------------------------------------------------
CALLS = ("stat", "lstat", "scandir", "listdir", "open", "readlink", "unlink", "rmdir", "statvfs")
CODES = (errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.ENOTDIR, errno.ESTALE)


class Failing:
    """Counts the calls of `os` that ask about a file, and lets one of them fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.last, self.code = 0, -1, errno.EACCES
        for name in CALLS:
            monkeypatch.setattr(os, name, around(getattr(os, name), before=self._before))

    def _before(self) -> None:
        self.done += 1
        if self.done == self.last:
            raise OSError(self.code, os.strerror(self.code))


def failure(work: Callable[[], object], disk: Failing, last: int) -> MoeconvError | None:
    """What a run failed with at its `last` call; anything but our own class goes through."""
    disk.done, disk.last = 0, last
    try:
        work()
    except MoeconvError as problem:
        return problem
    finally:
        disk.last = -1
    return None


@pytest.mark.parametrize("times", [pytest.param(25), pytest.param(1000, marks=pytest.mark.soak)])
@pytest.mark.parametrize("verb", ["inspect", "verify", "overwrite", "restore", "load"])
def test_any_question_about_a_file_may_be_refused(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str, times: int
):
    old, out, ours = tmp_path / "old", tmp_path / "out", tmp_path / "ours"
    moeconv.shard(good, old, ep_size=2)
    moeconv.fuse(good, ours)
    work: dict[str, Callable[[], object]] = {
        "inspect": lambda: moeconv.open_source(good),
        "verify": lambda: moeconv.verify(old),
        "overwrite": lambda: moeconv.fuse(good, out, overwrite=True),
        "restore": lambda: moeconv.unfuse(ours, out),
        "load": lambda: moeconv.runtime.open(old, ep_rank=0, ep_size=2),
    }

    def anew() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(tmp_path / ".out.replaced", ignore_errors=True)
        if verb == "overwrite":
            shutil.copytree(old, out)

    anew()
    work[verb]()  # what is read once only, such as recipes, is not counted
    whole = tree(out)
    anew()
    disk, rng, failed = Failing(monkeypatch), random.Random(verb), 0
    work[verb]()
    calls = disk.done
    for last in range(1, calls + 1, max(1, calls // times)):
        anew()
        before, disk.code = tree(out), rng.choice(CODES)
        with untouched(good, old, ours):
            problem = failure(work[verb], disk, last)
            if problem is None:
                assert tree(out) == whole
                continue
            failed += 1
            assert problem.exit_code != 70
            assert problem.fix
            assert tree(out) == before or os.path.lexists(tmp_path / ".out.replaced")
    assert failed  # links are followed by calls whose failures mean nothing


def test_an_error_without_a_name_has_a_fix_all_the_same():
    with pytest.raises(IoFailed) as caught, system_errors():
        raise FileNotFoundError(errno.ENOENT, "No such file or directory")
    assert "the current directory" in str(caught.value)


def test_links_in_a_circle(good: Path, out: Path):
    (good / "a").symlink_to("b")
    (good / "b").symlink_to("a")
    refused(SourceMissing, "symbolic links", "--exclude", src=good, out=out)
