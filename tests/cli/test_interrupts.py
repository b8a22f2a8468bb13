"""Ctrl-C and closed pipes: exit as told, leave nothing that looks finished."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.run import environment, moeconv

SLOW = """
import sys, time
import moeconv.engine.copy.worker as tiles
real = tiles.TileRunner._copy_small
def slow(self, *rest):
    time.sleep(0.05)
    return real(self, *rest)
tiles.TileRunner._copy_small = slow
from moeconv.cli.main import main
sys.argv = ["moeconv", *sys.argv[1:]]
main()
"""


SIGNALS = pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)

# the signal comes as a function is called: MODULE NAME NUMBER, and then the command
AT_A_CALL = """
import importlib, os, sys
from moeconv.cli.main import main
module, name, number = sys.argv[1:4]
*owner, name = name.split(".")
place = importlib.import_module(module)
for part in owner:
    place = getattr(place, part)
real = getattr(place, name)
def told(*args, **more):
    os.kill(os.getpid(), int(number))
    return real(*args, **more)
setattr(place, name, told)
sys.argv = ["moeconv", *sys.argv[4:]]
main()
"""


@SIGNALS
@pytest.mark.parametrize("existed", [True, False])
def test_interrupt_leaves_out_as_it_was(
    source: Path, tmp_path: Path, *, existed: bool, number: int, code: int, said: str
) -> None:
    out = tmp_path / "out"
    if existed:
        out.mkdir()
    # no shell between us and the command: the signal must reach Python itself
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, "fuse", str(source), "-o", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 30
    while not (out / "moeconv").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    _, talk = process.communicate(timeout=30)
    assert process.returncode == code
    assert talk.endswith(f"{said}; what was written has been removed\n")
    assert out.exists() == existed
    assert not existed or not list(out.iterdir())


def test_a_reader_that_leaves_is_not_an_error(source: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.run(
        [sys.executable, "-m", "moeconv", "inspect", str(source), "--tensors", "*"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=environment(),
    )
    os.close(writer)
    assert process.returncode == 141
    assert process.stderr == ""


def test_demo_can_be_kept(tmp_path: Path) -> None:
    done = moeconv("demo", "-o", tmp_path / "kept")
    assert done.code == 0
    assert (tmp_path / "kept" / "fused" / "moeconv.json").exists()
    assert moeconv("demo", "-o", tmp_path / "kept").code == 6


@SIGNALS
@pytest.mark.parametrize(
    "place",
    [
        ("typer.main", "get_command"),  # before the command line is read
        ("typer.core", "TyperGroup.parse_args"),
        ("moeconv.cli.ui", "Ui"),  # before the verb has begun
        ("moeconv.api.verify", "verify"),
        ("moeconv.cli.ui", "Ui.data"),
    ],
    ids=lambda place: place[1],
)
def test_at_any_moment_it_is_one_line(  # noqa: PLR0917 - parameters
    source: Path, tmp_path: Path, place: tuple[str, str], number: int, code: int, said: str
) -> None:
    assert moeconv("fuse", source, "-o", tmp_path / "out").code == 0
    done = subprocess.run(
        [sys.executable, "-c", AT_A_CALL, *place, str(int(number)), "verify", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.splitlines()[-1] == said  # nothing was written: nothing is taken back
    assert "Traceback" not in done.stderr


def test_signals_that_are_ignored_stay_so(source: Path, tmp_path: Path) -> None:
    """As under `nohup`, and for what a shell runs in the background."""
    assert moeconv("fuse", source, "-o", tmp_path / "out").code == 0
    ignoring = f"import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n{AT_A_CALL}"
    place = ("moeconv.api.verify", "verify", str(int(signal.SIGINT)))
    done = subprocess.run(
        [sys.executable, "-c", ignoring, *place, "verify", tmp_path / "out"],
        capture_output=True,
        text=True,
        check=False,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ok: ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_on_the_way_out_changes_nothing(number: int) -> None:
    """What was done was done: nobody must be told to do it again."""
    command = [sys.executable, "-c", AT_A_CALL, "os", "_exit", str(int(number)), "recipes", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    assert (done.returncode, done.stderr) == (0, "")
