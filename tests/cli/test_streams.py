"""Standard output that is full, closed or left by its reader; standard error likewise."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
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
def test_a_full_standard_output_is_reported(arguments: list[str]) -> None:
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
def test_a_reader_who_leaves_ends_it_silently(arguments: list[str], tmp_path: Path) -> None:
    done = shell(" ".join(arguments), "| true", tmp_path)
    assert (done.returncode, done.stderr) == (141, "")


RUNS = (("recipes list", 0), ("--help", 0), ("inspect nothing", 3), ("fuse --nope", 2))


@pytest.mark.parametrize("rest", ["2>&-", "2>/dev/full", ">&- 2>&-", ">&- 2>/dev/full"])
def test_messages_that_cannot_be_printed_change_no_exit_code(rest: str, tmp_path: Path) -> None:
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


def full_pipe() -> tuple[int, int]:
    """A pipe whose reader does not read, with no room for a byte more."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return reader, writer


@pytest.mark.parametrize("arguments", [["--help"], ["recipes", "list"]])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_reader_who_does_not_read_keeps_nobody(
    arguments: list[str], number: int, code: int
) -> None:
    reader, writer = full_pipe()
    command = [sys.executable, "-m", "moeconv", *arguments]
    process = subprocess.Popen(
        command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment()
    )
    while Path(f"/proc/{process.pid}/wchan").read_text() not in {"pipe_write", "anon_pipe_write"}:
        time.sleep(0.02)
    process.send_signal(number)
    _, talk = process.communicate(timeout=20)
    os.close(reader)
    os.close(writer)
    assert process.returncode == code
    assert talk in {"interrupted\n", "terminated\n"}


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_disk_that_takes_a_part_of_it_is_reported(unbuffered: str, tmp_path: Path) -> None:
    """A file of 1,024 bytes at most: `ulimit` counts in blocks."""
    line = f"ulimit -f 1; exec {sys.executable} -m moeconv recipes show qwen3_moe > f"
    env = {**environment(), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 3
    assert "File too large" in done.stderr


HOSTS = {
    "what waits is said first": "print('hello')",
    "its own wrapper": "sys.stdout = io.TextIOWrapper(sys.stdout.buffer); print('hello')",
    "a codec": "sys.stdout = codecs.getwriter('utf-8')(sys.stdout.buffer); print('hello')",
}


@pytest.mark.parametrize("host", HOSTS)
def test_a_program_that_calls_it_loses_none_of_its_output(host: str) -> None:
    code = f"import codecs, io, sys; {HOSTS[host]}; sys.argv = ['moeconv', 'recipes', 'list']"
    code += "; from moeconv.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("hello\nrecipe ")


def test_a_name_that_is_not_a_text_changes_no_exit_code(tmp_path: Path) -> None:
    for rest in ("2>&-", "2>/dev/null"):
        assert shell("inspect --nope$'\\xff'", rest, tmp_path).returncode == 2


def test_no_file_gets_the_number_of_a_stream(tmp_path: Path) -> None:
    code = "import os, sys; from moeconv.cli.process import open_streams; open_streams();"
    code += (
        f"print(os.open('{tmp_path}/x', os.O_CREAT | os.O_RDWR), file=open('{tmp_path}/n', 'w'))"
    )
    subprocess.run(
        ["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], check=True, env=environment()
    )
    assert int((tmp_path / "n").read_text()) > 2
