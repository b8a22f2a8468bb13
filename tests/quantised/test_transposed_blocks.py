"""Block fp8 of weights that are stored turned: scales turned with them, or not."""

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


def test_the_hubs_layout_is_written_transposed_as_a_whole(tmp_path: Path):
    src = write_checkpoint(tmp_path / "src", tensors(weights=False, scales=False), CONFIG)
    moeconv.fuse(src, tmp_path / "out", layout="hub")
    assert read_tensors(tmp_path / "out") == tensors(weights=True, scales=True)
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_a_square_grid_alone_is_ambiguous(tmp_path: Path):
    """Where down is of 16 bits, its scales are not there to say it."""
    square = 2 * I
    gate_up = {
        f"{STACK}.gate_up_proj": ("F8_E4M3", (E, square, square), bytes(E * square**2)),
        f"{STACK}.gate_up_proj_scale_inv": ("F32", (E, 4, 4), bytes(E * 16 * 4)),
        f"{STACK}.down_proj": ("BF16", (E, I, square), bytes(E * I * square * 2)),
    }
    config = {**CONFIG, "text_config": {"num_experts": E}}
    src = write_checkpoint(tmp_path / "src", gate_up, config)
    with pytest.raises(AmbiguousLayout, match="may or may not be transposed") as refusal:
        moeconv.fuse(src, tmp_path / "out", from_layout="hub")
    assert "`E K/4 (G O/4)` and `E (G O/4) K/4`" in str(refusal.value)
    assert not (tmp_path / "out").exists()


FUSED = {
    "llama4_text": ("model.layers.0.feed_forward.experts", "gate_up_proj", "down_proj"),
    "aria_text": ("model.layers.0.mlp.experts", "gate_up_proj", "down_proj"),
    "openai_privacy_filter": ("model.layers.0.mlp.experts", "gate_up_proj", "down_proj"),
}
SIZES = {
    "num_local_experts": E,
    "moe_num_experts": E,
    "intermediate_size": I,
    "hidden_size": H,
}


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("family", FUSED)
def test_where_the_fused_form_is_transposed(family: str, scales: bool, tmp_path: Path):
    """transformers has the blocks of the tensor as it lies; others turned the weights alone."""
    stack, *parts = FUSED[family]
    given = {}
    for part, known in zip(parts, SHAPES, strict=True):
        given[f"{stack}.{part}"] = stored(WEIGHTS[known], turned=True)
        given[f"{stack}.{part}_scale_inv"] = stored(SCALES[known], turned=scales)
    config = {**CONFIG, **SIZES, "model_type": family}
    src = write_checkpoint(tmp_path / "src", given, config)
    moeconv.unfuse(src, tmp_path / "alone", layout="per-expert")
    alone = read_tensors(tmp_path / "alone")
    grid = alone[f"{stack}.1.up_proj.weight_scale_inv"]
    assert grid == ("F32", (I // B, H // B), SCALES["gate_up_proj"][1, I // B :].tobytes())
    grid = alone[f"{stack}.1.down_proj.weight_scale_inv"]
    assert grid == ("F32", (H // B, I // B), SCALES["down_proj"][1].tobytes())
    moeconv.unfuse(tmp_path / "alone", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
    apart = write_checkpoint(tmp_path / "apart", alone, config)
    moeconv.fuse(apart, tmp_path / "again")
    again = read_tensors(tmp_path / "again")
    assert again[f"{stack}.{parts[0]}_scale_inv"] == stored(SCALES["gate_up_proj"], turned=True)


@pytest.mark.parametrize("flat", [True, False])
def test_dbrxs_down_is_transposed(flat: bool, tmp_path: Path):
    stack = "transformer.blocks.0.ffn.experts"
    grid = SCALES["down_proj"].transpose(0, 2, 1).reshape(-1, H // B) if flat else None
    tensors = {}
    for part, half in (("w1", slice(0, I)), ("v1", slice(I, 2 * I))):
        blocks = slice(half.start // B, half.stop // B)
        tensors[f"{stack}.mlp.{part}"] = stored(
            WEIGHTS["gate_up_proj"][:, half].reshape(-1, H), turned=False
        )
        tensors[f"{stack}.mlp.{part}_scale_inv"] = stored(
            SCALES["gate_up_proj"][:, blocks].reshape(-1, H // B), turned=False
        )
    down = WEIGHTS["down_proj"].transpose(0, 2, 1).reshape(-1, H)
    tensors[f"{stack}.mlp.w2"] = stored(down, turned=False)
    tensors[f"{stack}.mlp.w2_scale_inv"] = stored(
        SCALES["down_proj"] if grid is None else grid, turned=False
    )
    sizes = {"d_model": H, "ffn_config": {"moe_num_experts": E, "ffn_hidden_size": I}}
    src = write_checkpoint(tmp_path / "src", tensors, {**CONFIG, **sizes, "model_type": "dbrx"})
    moeconv.unfuse(src, tmp_path / "alone", layout="per-expert")
    alone = read_tensors(tmp_path / "alone")
    scale = alone[f"{stack}.1.w2.weight_scale_inv"]
    assert scale == ("F32", (H // B, I // B), SCALES["down_proj"][1].tobytes())
