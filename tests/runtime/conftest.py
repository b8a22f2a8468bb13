"""Sets made for the occasion."""

from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv.runtime
from tests.runtime.handmade import Made, write_set

Opened = Callable[..., moeconv.runtime.Shard]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A rank of a set made for the occasion."""

    def make(made: Made, rank: int = 0) -> moeconv.runtime.Shard:
        number = len(list(tmp_path.iterdir()))
        out = write_set(tmp_path / f"set{number}", made)
        return moeconv.runtime.open(out, ep_rank=rank, ep_size=made.ep)

    return make
