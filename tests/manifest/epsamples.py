"""Tiny expert-parallel sets, one of each kind, to be broken.

Two ranks; a stack of four experts on six slots, a scale for each matrix that is kept for all
ranks, and a stack of three experts that the ranks do not share.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Final

import moeconv
from tests.badinput.builders import Tensors, write

MAIN: Final = "model.layers.0.mlp.experts"
EXTRA: Final = "mtp.layers.0.mlp.experts"
ROW: Final = (3, 1, 0, 2, 1, 3)
COMMON: Final = "moeconv/common.json"
RANK_0: Final = "moeconv/rank-00000-of-00002.json"
RANK_1: Final = "moeconv/rank-00001-of-00002.json"
COMMON_FILE: Final = "common-00001-of-00001.safetensors"
RANK_0_FILE: Final = "rank-00000-of-00002-00001-of-00001.safetensors"
RANK_1_FILE: Final = "rank-00001-of-00002-00001-of-00001.safetensors"
SOURCE_FILE: Final = "model.safetensors"
KINDS: Final = ("fused", "per-expert", "virtual", "virtual-per-expert")
RECIPE: Final = """
name = "tiny"
stack = "{prefix}{layer}.mlp.experts"
fuse = "fused"
unfuse = "per-expert"

[layouts.per-expert]
gate = "{stack}.{expert}.gate.{component}: O K"
up = "{stack}.{expert}.up.{component}: O K"
down = "{stack}.{expert}.down.{component}: O K"

[layouts.fused]
gate_up = "{stack}.gate_up{suffix}: E (G O) K"
down = "{stack}.down{suffix}: E O K"

[components]
weight = { axes = "O K", suffix = "" }
scale = { axes = "", suffix = "_scale" }
"""


def source_tensors() -> Tensors:
    """Width 2, hidden size 4, per expert."""
    out: Tensors = {"model.embed": ("BF16", (8, 4)), "model.norm": ("F32", (4,))}
    for stack, experts in ((MAIN, 4), (EXTRA, 3)):
        for expert in range(experts):
            for name, shape in (("gate", (2, 4)), ("up", (2, 4)), ("down", (4, 2))):
                out[f"{stack}.{expert}.{name}.weight"] = ("BF16", shape)
                if stack == MAIN:
                    out[f"{stack}.{expert}.{name}.scale"] = ("F32", ())
    return out


def build(root: Path, kind: str) -> Path:
    """A set of a kind in `root`/set, made from `root`/source."""
    source = write(root / "source", source_tensors(), config={"model_type": "tiny"})
    recipe = root / "tiny.toml"
    recipe.write_text(RECIPE)
    moeconv.shard(
        source,
        root / "set",
        ep_size=2,
        placement={MAIN: ROW},
        virtual="virtual" in kind,
        layout="per-expert" if "per-expert" in kind else "fused",
        recipe=recipe,
        jobs=1,
    )
    return root / "set"


@cache
def files_of(kind: str) -> dict[str, bytes]:
    """Every file of a set that has its own bytes."""
    with tempfile.TemporaryDirectory() as folder:
        made = build(Path(folder), kind)
        return {
            p.relative_to(made).as_posix(): p.read_bytes() for p in made.rglob("*") if p.is_file()
        }


def fresh(root: Path, kind: str) -> Path:
    """A set of a kind in `root`/set, with nothing wrong."""
    if "virtual" in kind:  # it knows where its source is
        return build(root, kind)
    made = root / "set"
    (made / "moeconv").mkdir(parents=True)
    for name, raw in files_of(kind).items():
        (made / name).write_bytes(raw)
    return made
