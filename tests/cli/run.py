"""Running the real command, in a pipe or on a screen of a given width."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class Done:
    """What a finished command left: its status and both streams."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """The environment of a user, with this checkout importable."""
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    return {**kept, "PYTHONPATH": str(ROOT), **more}


def moeconv(*arguments: str | Path, cwd: Path | None = None, **env: str) -> Done:
    """Run `moeconv ARGUMENTS` with both streams in pipes."""
    done = subprocess.run(
        [sys.executable, "-m", "moeconv", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=environment(**env),
    )
    return Done(done.returncode, done.stdout, done.stderr)


def on_screen(*arguments: str | Path, columns: int = 80) -> tuple[int, str]:
    """Run it with both streams on a pseudo-terminal; status and everything it showed."""
    pid, terminal = pty.fork()
    if pid == 0:  # the child: a process of its own, with the terminal as its streams
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        env = environment(TERM="xterm")
        os.execvpe(sys.executable, [sys.executable, "-m", "moeconv", *map(str, arguments)], env)
    shown = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            data = os.read(terminal, 65536)
        except OSError:  # the terminal of a child that has ended
            break
        if not data:
            break
        shown += data
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status), shown.decode()
