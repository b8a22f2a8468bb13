"""Verbs other than a plain `shard`, killed at random moments, and resumed."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.badinput.builders import config, qwen, write
from tests.badinput.checks import tree
from tests.cli.run import environment, moeconv
from tests.helpers import tree_sha256

COMMANDS = {
    "fuse --overwrite": ("fuse", "SRC", "--max-shard-size", "3MB", "--overwrite"),
    "merge": ("merge", "RANKS"),
    "shard --virtual": ("shard", "SRC", "--ep", "2", "--virtual"),
    "fuse --align source": ("fuse", "SRC", "--align", "source", "--max-shard-size", "3MB"),
}


@pytest.mark.parametrize("cloning", ["XFS"], indirect=True)
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("times", [pytest.param(3), pytest.param(50, marks=pytest.mark.soak)])
def test_killed_and_resumed(
    cloning: Path,
    tmp_path: Path,
    name: str,
    times: int,
    record_property: Callable[[str, object], None],
) -> None:
    place = cloning if "align" in name else tmp_path
    src = write(
        place / "src",
        qwen(6, 512, 512, layers=2),
        config=config(experts=6, width=512, hidden=512, num_hidden_layers=2),
    )
    ranks, out, old = place / "ranks", place / "out", place / "old"
    assert moeconv("shard", src, "-o", ranks, "--ep", "2", "--max-shard-size", "3MB").code == 0
    if "--overwrite" in name:
        assert moeconv("fuse", src, "-o", old).code == 0
    given = {"SRC": str(src), "RANKS": str(ranks)}
    words = [given.get(word, word) for word in COMMANDS[name]]
    plain = [word for word in words if word != "--overwrite"]
    began = time.monotonic()
    assert moeconv(*plain, "-o", place / "whole").code == 0
    seconds, wanted = time.monotonic() - began, tree_sha256(place / "whole")
    rng, begun = random.Random(name), 0
    for number in range(times):
        if old.exists():
            shutil.copytree(old, out)
        before = tree(out)
        with subprocess.Popen(
            [sys.executable, "-m", "moeconv", *words, "-o", out, "--jobs", "1"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment(),
        ) as process:
            if number % 2:
                time.sleep(rng.uniform(0, seconds))
            else:
                while process.poll() is None and not (out / "moeconv" / "journal").exists():
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.02))
            process.kill()
        now = tree(out)
        begun += now != before
        # where nothing was begun, or all was restored, there is nothing to resume
        whole = out.exists() and tree_sha256(out) == wanted
        again = words if now == before else [*plain, "--resume"]
        if not whole:
            done = moeconv(*again, "-o", out, "--jobs", "3")
            assert done.code == 0, done.err
        assert tree_sha256(out) == wanted
        if not whole:
            assert not (place / ".out.replaced").exists()
        shutil.rmtree(out)
        shutil.rmtree(place / ".out.replaced", ignore_errors=True)
    record_property("kills of runs that had begun", begun)
    for path in (src, ranks, old, place / "whole"):
        shutil.rmtree(path, ignore_errors=True)
