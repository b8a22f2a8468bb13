"""Formats with names of one family alone, and blocks that are not full: dequantised, too."""

from pathlib import Path

import numpy as np
import pytest

import moeconv
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint
from tests.quantised.packing import E2M1, Array, Floats, e4m3, e8m0, nibbles, spread

E, I, H = 2, 32, 64  # noqa: E741 - the letters of the notation
RNG = np.random.default_rng(0)


def spec(dtype: str, data: Array) -> Spec:
    return dtype, data.shape, data.tobytes()


def array(found: Spec, items: str = "u1") -> Array:
    return np.frombuffer(found[2], items).reshape(found[1])


def random_bytes(*shape: int) -> Array:
    return RNG.integers(0, 256, shape).astype("u1")


def powers(*shape: int) -> Array:
    return RNG.integers(110, 140, shape).astype("u1")


def fp4(codes: Array, scales: Array) -> Floats:
    """Two values a byte, a power of two for 32 of them."""
    values = E2M1[nibbles(codes, of=2, axis=codes.ndim - 1)]
    return np.asarray(values * np.repeat(e8m0(scales), 32, axis=-1))


def same(one: Floats, other: Floats) -> bool:
    return one.shape == other.shape and one.tobytes() == other.tobytes()


@pytest.mark.parametrize("layout", ["fused", "sglang", "stacked", "up-gate"])
def test_fp4_of_deepseek_v4(layout: str, tmp_path: Path):
    stack = "layers.0.ffn.experts"
    tensors: dict[str, Spec] = {}
    true: dict[tuple[int, str], Floats] = {}
    for e in range(E):
        for p, n, k in (("w1", I, H), ("w3", I, H), ("w2", H, I)):
            codes, scales = random_bytes(n, k // 2), powers(n, k // 32)
            true[e, p] = fp4(codes, scales)
            tensors[f"{stack}.{e}.{p}.weight"] = spec("I8", codes)
            tensors[f"{stack}.{e}.{p}.scale"] = spec("F8_E8M0", scales)
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "deepseek_v4"})
    moeconv.fuse(src, tmp_path / "out", layout=layout)
    made = read_tensors(tmp_path / "out")

    def read(weight: str, scale: str) -> Floats:
        return fp4(array(made[f"{stack}.{weight}"]), array(made[f"{stack}.{scale}"]))

    if layout == "sglang":
        gate_up = read("w13_weight", "w13_weight_scale_inv")
    elif layout == "stacked":
        parts = [read(f"{p}_proj", f"{p}_proj_scale_inv") for p in ("gate", "up")]
        gate_up = np.concatenate(parts, 1)
    else:
        name = "gate_up_proj" if layout == "fused" else "up_gate_proj"
        gate_up = read(name, f"{name}_scale_inv")
    order = ("w3", "w1") if layout == "up-gate" else ("w1", "w3")
    for e in range(E):
        for half, p in zip(np.split(gate_up[e], 2), order, strict=True):
            assert same(half, true[e, p])
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("shape", [(E, 2), (E,), (E, 2, 1), (E, 1, 1)])
def test_one_scale_for_a_matrix_of_deepseek_v4(shape: tuple[int, ...], tmp_path: Path):
    """As numbers or as grids of one block, of each of gate and up or of both."""
    stack = "layers.0.ffn.experts"
    both = RNG.random(shape).astype("f4")
    down = RNG.random((E, 1, 1) if len(shape) == 3 else (E,)).astype("f4")
    tensors = {
        f"{stack}.gate_up_proj": spec("F8_E4M3", random_bytes(E, 2 * I, H)),
        f"{stack}.gate_up_proj_scale_inv": spec("F32", both),
        f"{stack}.down_proj": spec("F8_E4M3", random_bytes(E, H, I)),
        f"{stack}.down_proj_scale_inv": spec("F32", down),
    }
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "deepseek_v4"})
    moeconv.unfuse(src, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    for e in range(E):
        for place, p in enumerate(("w1", "w3")):
            half = both[e].reshape(-1)[min(place, both[e].size - 1)]
            assert made[f"{stack}.{e}.{p}.scale"][2] == half.tobytes()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_mxfp4_of_gpt_oss(tmp_path: Path):
    """Rows alternate, and blocks of 32 are a dimension of their own: [E, 2I, H/32, 16]."""
    stack = "model.layers.0.mlp.experts"
    held = {
        "gate_up_proj": (random_bytes(E, 2 * I, H // 32, 16), powers(E, 2 * I, H // 32)),
        "down_proj": (random_bytes(E, H, I // 32, 16), powers(E, H, I // 32)),
    }
    tensors = {}
    for name, (blocks, scales) in held.items():
        tensors[f"{stack}.{name}_blocks"] = spec("U8", blocks)
        tensors[f"{stack}.{name}_scales"] = spec("U8", scales)
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "gpt_oss"})
    true = {n: fp4(b.reshape(*b.shape[:2], -1), s) for n, (b, s) in held.items()}
    moeconv.unfuse(src, tmp_path / "out", layout="per-expert")
    made = read_tensors(tmp_path / "out")
    for e in range(E):
        for p in ("gate", "up", "down"):
            blocks = array(made[f"{stack}.{e}.{p}_proj.blocks"])
            scales = array(made[f"{stack}.{e}.{p}_proj.scales"])
            alone = fp4(blocks.reshape(len(blocks), -1), scales)
            rows = {"gate": slice(0, None, 2), "up": slice(1, None, 2), "down": slice(None)}[p]
            assert same(alone, true["down_proj" if p == "down" else "gate_up_proj"][e, rows])
    moeconv.fuse(tmp_path / "out", tmp_path / "again")
    assert read_tensors(tmp_path / "again") == tensors
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("hidden", [200, 72])
def test_blocks_that_are_not_full_at_the_edge(hidden: int, tmp_path: Path):
    """Of 200 columns in blocks of 128, the second holds 72: its scale is one like the others."""
    width, block = 256, (128, 128)
    stack = "model.layers.0.mlp.experts"
    tensors: dict[str, Spec] = {}
    true: dict[tuple[int, str], Floats] = {}
    for e in range(E):
        for p, n, k in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
            codes = (random_bytes(n, k) & 0x77).astype("u1")
            scales = (RNG.random((-(-n // 128), -(-k // 128))) + 0.5).astype("f4")
            true[e, p] = np.asarray(e4m3(codes) * spread(scales, n, k, block))
            tensors[f"{stack}.{e}.{p}_proj.weight"] = spec("F8_E4M3", codes)
            tensors[f"{stack}.{e}.{p}_proj.weight_scale_inv"] = spec("F32", scales)
    config = {
        "model_type": "qwen3_moe",
        "quantization_config": {"quant_method": "fp8", "weight_block_size": list(block)},
    }
    src = write_checkpoint(tmp_path / "src", tensors, config)
    moeconv.fuse(src, tmp_path / "out")
    made = read_tensors(tmp_path / "out")
    for e in range(E):
        for name, parts in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
            codes = array(made[f"{stack}.{name}"])[e]
            scales = array(made[f"{stack}.{name}_scale_inv"], "f4")[e]
            whole = np.asarray(e4m3(codes) * spread(scales, *codes.shape, block))
            assert same(whole, np.concatenate([true[e, p] for p in parts]))
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
