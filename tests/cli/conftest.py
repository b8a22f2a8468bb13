"""One small checkpoint and its fused form for all tests of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeconv
from moeconv.cli.demo_checkpoint import make_checkpoint


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's checkpoint: 3 files, 117 tensors, 2 stacks of 16 experts."""
    folder = tmp_path_factory.mktemp("cli") / "source"
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def fused(source: Path) -> Path:
    """The same, fused."""
    out = source.parent / "fused"
    moeconv.fuse(source, out)
    return out
