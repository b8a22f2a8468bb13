"""Where each test of this folder has its checkpoint and its output."""

from pathlib import Path

import pytest


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """A directory that a test fills; it is not there yet."""
    return tmp_path / "src"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where an output would go; nothing is there."""
    return tmp_path / "out"
