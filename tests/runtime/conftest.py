"""Sets made for the occasion."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

import moeconv
import moeconv.runtime
from tests.helpers import write_checkpoint
from tests.runtime.handmade import Made, write_set
from tests.runtime.versions import EP, EXPERTS, HIDDEN, OTHER, OWN, STACKS, WIDTH, Sets

Opened = Callable[..., moeconv.runtime.Shard]


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    """A rank of a set made for the occasion."""

    def make(made: Made, rank: int = 0) -> moeconv.runtime.Shard:
        number = len(list(tmp_path.iterdir()))
        out = write_set(tmp_path / f"set{number}", made)
        return moeconv.runtime.open(out, ep_rank=rank, ep_size=made.ep)

    return make


@pytest.fixture(scope="module", params=["fused", "per-expert"])
def sets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sets:
    made = Sets(tmp_path_factory.mktemp(request.param))
    rnd = random.Random(request.param)
    for version in ("a", "b"):
        tensors = {"model.norm.weight": ("BF16", (HIDDEN,), rnd.randbytes(2 * HIDDEN))}
        for layer, stack in enumerate(STACKS):
            for e in range(EXPERTS):
                for p in ("gate", "up", "down"):
                    shape = (HIDDEN, WIDTH) if p == "down" else (WIDTH, HIDDEN)
                    raw = rnd.randbytes(2 * HIDDEN * WIDTH)
                    tensors[f"{stack}.{e}.{p}_proj.weight"] = ("BF16", shape, raw)
                    made.owner[raw] = (version, layer, e)
        src = write_checkpoint(made.folder / version, tensors, {"model_type": "qwen3_moe"})
        for name, row in (("own", OWN), ("other", OTHER)):
            moeconv.shard(
                src,
                made.folder / f"{version}-{name}",
                ep_size=EP,
                placement=dict.fromkeys(STACKS, row),
                layout=request.param,
            )
    return made
