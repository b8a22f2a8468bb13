"""Standard output that is full, closed or left by its reader; standard error likewise."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.run import environment

WORDS = [["--help"], ["fuse", "--help"], ["recipes", "list"], ["--version"]]


def shell(arguments: str, rest: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The command in a shell, which opens and closes streams for it; its own exit code."""
    line = f"{sys.executable} -m moeconv {arguments} {rest}; exit ${{PIPESTATUS[0]}}"
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True, text=True, check=False, cwd=folder, env=environment(),
    )  # fmt: skip


@pytest.mark.parametrize("arguments", WORDS)
def test_a_full_standard_output_is_said(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "moeconv", *arguments],
            stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=environment(),
        )  # fmt: skip
    assert done.returncode == 3
    said = done.stderr.splitlines()
    assert said[:2] == ["error[io]: cannot print the result", "  at: standard output"]
    assert said[2] == "  cause: No space left on device"


@pytest.mark.parametrize("arguments", WORDS)
def test_a_reader_who_leaves_ends_it_without_a_word(arguments: list[str], tmp_path: Path) -> None:
    done = shell(" ".join(arguments), "| true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


RUNS = (("recipes list", 0), ("--help", 0), ("inspect nothing", 3), ("fuse --nope", 2))


@pytest.mark.parametrize("rest", ["2>&-", "2>/dev/full", ">&- 2>&-", ">&- 2>/dev/full"])
def test_talk_that_nobody_hears_changes_no_exit_code(rest: str, tmp_path: Path) -> None:
    for arguments, code in RUNS:
        done = shell(arguments, rest, tmp_path)
        assert (arguments, done.returncode) == (arguments, code)
        assert done.stderr == ""


def test_a_closed_standard_output_is_silence(tmp_path: Path) -> None:
    for arguments, code in RUNS:
        done = shell(arguments, ">&-", tmp_path)
        assert (arguments, done.returncode) == (arguments, code)
        assert done.stdout == ""


def test_other_files_are_not_taken_for_standard_output() -> None:
    env = {**environment(), "HOME": "/proc/nothing"}
    command = [sys.executable, "-m", "moeconv", "--install-completion", "bash"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 3
    assert "/proc/nothing" in done.stderr


def test_a_verb_is_alone_and_the_end_is_quick(tmp_path: Path) -> None:
    """The flags of other verbs are not looked at; what Python would tidy up is left."""
    code = (
        "import atexit, sys\n"
        "from moeconv.cli import main\n"
        "def end(code):\n"
        "    print(len(main.app.registered_commands), len(main.app.registered_groups), code)\n"
        "    real(code)\n"
        "real, main.os._exit = main.os._exit, end\n"
        "atexit.register(print, 'tidied')\n"
        "sys.stdout.reconfigure(line_buffering=True)\n"
        "main.main()"
    )
    for arguments, said in ((["inspect", "--help"], "1 0 0\n"), (["recipes", "list"], "9 2 0\n")):
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=tmp_path, env=environment()
        )
        assert done.stdout.endswith(said)
