"""Kill the writer anywhere: nobody takes what is left for a set until its manifest is there."""

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
import moeconv.runtime
from moeconv.errors import MoeconvError, Unfinished, WouldOverwrite
from tests.badinput.builders import config, qwen, write
from tests.cli.run import ROOT, environment

HOW_OFTEN = [pytest.param(15), pytest.param(400, marks=pytest.mark.soak)]


@pytest.mark.parametrize("times", HOW_OFTEN)
def test_a_torn_output_never_opens(
    tmp_path: Path, times: int, record_property: Callable[[str, object], None]
) -> None:
    src = write(
        tmp_path / "src", qwen(6, 64, 96, layers=3), config=config(experts=6, width=64, hidden=96)
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.killed", src, tmp_path / "out", "7", str(times)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(runs) == times
    whole = tmp_path / "whole"
    finished = 0
    for run in runs:
        assert run["status"] == signal.SIGKILL
        out = Path(run["out"])
        if (out / "moeconv.json").exists():
            # killed after the commit: everything must be there
            finished += 1
            assert moeconv.verify(out).ok
            assert moeconv.fingerprint(out) == moeconv.fingerprint(whole)
            moeconv.runtime.open(out, ep_rank=1, ep_size=2)
        else:
            refused_by_all(src, out)
        shutil.rmtree(out, ignore_errors=True)
    record_property("kills", times)
    record_property("after the commit", finished)
    assert finished < times / 2


def refused_by_all(src: Path, out: Path) -> None:
    """The loader, the verbs and a second run: each says no, and the right thing."""
    for rank in range(2):
        with pytest.raises(MoeconvError):
            moeconv.runtime.open(out, ep_rank=rank, ep_size=2)
    if not out.exists() or not list(out.iterdir()):
        return
    if (out / "moeconv").is_dir() and list((out / "moeconv").iterdir()):
        with pytest.raises(Unfinished):
            moeconv.runtime.open(out, ep_rank=0, ep_size=2)
        with pytest.raises(Unfinished):
            moeconv.open_source(out)
    with pytest.raises(WouldOverwrite):
        moeconv.shard(src, out, ep_size=2)
