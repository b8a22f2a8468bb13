"""A small checkpoint whose matrices are square, and what is made of it."""

from pathlib import Path

import pytest

import moeconv
from tests.badinput.builders import config, qwen, write


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four experts in two layers; their matrices are square, so no shape tells them apart."""
    tensors = qwen(4, 8, 8, layers=2)
    return write(tmp_path / "src", tensors, config=config(width=8, hidden=8, num_hidden_layers=2))


@pytest.fixture
def out(src: Path, tmp_path: Path) -> Path:
    """The same, fused."""
    moeconv.fuse(src, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def ranks(src: Path, tmp_path: Path) -> Path:
    """The same, for two ranks."""
    moeconv.shard(src, tmp_path / "ranks", ep_size=2)
    return tmp_path / "ranks"
