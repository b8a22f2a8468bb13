"""The tiny set on disk, fresh for each test."""

from pathlib import Path

import pytest

from tests.manifest.samples import unpack


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A fused set that nothing is wrong with, to be broken."""
    return unpack(tmp_path / "set")
