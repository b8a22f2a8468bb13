"""Block fp8 of Qwen3-VL as the Hub has its weights, turned: scales turned with them, or not."""

from pathlib import Path

import numpy as np
import pytest

import moeconv
from moeconv.errors import AmbiguousLayout
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint

STACK = "model.language_model.layers.0.mlp.experts"
E, I, H, B = 2, 8, 24, 4  # noqa: E741 - the letters of the notation
CONFIG = {
    "model_type": "qwen3_vl_moe",
    "text_config": {"num_experts": E, "moe_intermediate_size": I, "hidden_size": H},
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [B, B]},
}
RNG = np.random.default_rng(0)
SHAPES = {"gate_up_proj": (2 * I, H), "down_proj": (H, I)}
# unturned, as [out, in]
WEIGHTS = {p: RNG.integers(0, 256, (E, *s)).astype("u1") for p, s in SHAPES.items()}
SCALES = {p: RNG.random((E, s[0] // B, s[1] // B)).astype("f4") for p, s in SHAPES.items()}


def stored(array: np.ndarray, *, turned: bool) -> Spec:
    array = np.ascontiguousarray(array.transpose(0, 2, 1) if turned else array)
    return {1: "F8_E4M3", 4: "F32"}[array.itemsize], array.shape, array.tobytes()


def tensors(*, weights: bool, scales: bool) -> dict[str, Spec]:
    made = {f"{STACK}.{p}": stored(a, turned=weights) for p, a in WEIGHTS.items()}
    return made | {f"{STACK}.{p}_scale_inv": stored(a, turned=scales) for p, a in SCALES.items()}


@pytest.mark.parametrize("scales", [True, False])
def test_both_are_read(scales: bool, tmp_path: Path):
    src = write_checkpoint(tmp_path / "src", tensors(weights=True, scales=scales), CONFIG)
    moeconv.fuse(src, tmp_path / "out")
    assert read_tensors(tmp_path / "out") == tensors(weights=False, scales=False)
    moeconv.unfuse(src, tmp_path / "alone")
    alone = read_tensors(tmp_path / "alone")
    grid = alone[f"{STACK}.1.up_proj.weight_scale_inv"]
    assert grid == ("F32", (I // B, H // B), SCALES["gate_up_proj"][1, I // B :].tobytes())
    for out in ("out", "alone"):
        moeconv.unfuse(tmp_path / out, tmp_path / f"{out}-back")
        assert tree_sha256(tmp_path / f"{out}-back") == tree_sha256(src)


def test_the_hubs_layout_is_written_turned_as_a_whole(tmp_path: Path):
    src = write_checkpoint(tmp_path / "src", tensors(weights=False, scales=False), CONFIG)
    moeconv.fuse(src, tmp_path / "out", layout="hub")
    assert read_tensors(tmp_path / "out") == tensors(weights=True, scales=True)
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_a_square_grid_alone_does_not_tell(tmp_path: Path):
    """Where down is of 16 bits, its scales are not there to say it."""
    square = 2 * I
    gate_up = {
        f"{STACK}.gate_up_proj": ("F8_E4M3", (E, square, square), bytes(E * square**2)),
        f"{STACK}.gate_up_proj_scale_inv": ("F32", (E, 4, 4), bytes(E * 16 * 4)),
        f"{STACK}.down_proj": ("BF16", (E, I, square), bytes(E * I * square * 2)),
    }
    config = {**CONFIG, "text_config": {"num_experts": E}}
    src = write_checkpoint(tmp_path / "src", gate_up, config)
    with pytest.raises(AmbiguousLayout, match="may be turned or not") as refusal:
        moeconv.fuse(src, tmp_path / "out", from_layout="hub")
    assert "`E K/4 (G O/4)` and `E (G O/4) K/4`" in str(refusal.value)
    assert not (tmp_path / "out").exists()
