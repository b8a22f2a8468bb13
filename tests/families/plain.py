"""A layer of Qwen's experts in its plainest form, and a look at what would be made of tensors."""

from pathlib import Path

import moeconv
from moeconv.api.run import Result
from tests.phantoms import phantom, rows

QWEN = """model.layers.0.mlp.experts.{0-11}.gate_proj.weight BF16 8,16
model.layers.0.mlp.experts.{0-11}.up_proj.weight BF16 8,16
model.layers.0.mlp.experts.{0-11}.down_proj.weight BF16 16,8
model.layers.0.mlp.gate.weight BF16 12,16"""


def planned(tmp_path: Path, text: str, config: dict[str, object]) -> Result:
    """A dry run of fusing a phantom."""
    src = phantom(tmp_path / "src", rows(text), config)
    return moeconv.fuse(src, tmp_path / "out", dry_run=True)
