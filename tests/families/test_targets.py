"""The layouts that every family can be written in, against plain NumPy."""

from pathlib import Path

import numpy as np
import pytest

import moeconv
from moeconv.errors import AmbiguousLayout, UnknownLayout
from moeconv.layout.shipped import shipped_recipes
from tests.helpers import Spec, read_tensors, tree_sha256, write_checkpoint
from tests.phantoms import phantom, rows
from tests.recipes import shared_layouts

STACK = "model.layers.0.mlp.experts"
E, I, H = 3, 4, 5  # noqa: E741 - the letters of the notation
RNG = np.random.default_rng(0)
GATE, UP = (RNG.integers(0, 2**16, (E, I, H)).astype("u2") for _ in range(2))
DOWN = RNG.integers(0, 2**16, (E, H, I)).astype("u2")
BIAS_G, BIAS_U = (RNG.integers(0, 2**16, (E, I)).astype("u2") for _ in range(2))
BIAS_D = RNG.integers(0, 2**16, (E, H)).astype("u2")


def bf16(array: np.ndarray) -> Spec:
    return "BF16", array.shape, array.tobytes()


def turned(array: np.ndarray) -> np.ndarray:
    return array.transpose(0, 2, 1)


GATED = {
    "sglang": {
        "w13_weight": np.concatenate([GATE, UP], 1),
        "w13_weight_bias": np.concatenate([BIAS_G, BIAS_U], 1),
        "w2_weight": DOWN,
        "w2_weight_bias": BIAS_D,
    },
    "stacked": {
        "gate_proj": GATE,
        "gate_proj_bias": BIAS_G,
        "up_proj": UP,
        "up_proj_bias": BIAS_U,
        "down_proj": DOWN,
        "down_proj_bias": BIAS_D,
    },
    "megablocks": {
        "mlp.w1": GATE.reshape(E * I, H),
        "mlp.w1_bias": BIAS_G.reshape(E * I),
        "mlp.v1": UP.reshape(E * I, H),
        "mlp.v1_bias": BIAS_U.reshape(E * I),
        "mlp.w2": turned(DOWN).reshape(E * I, H),
        "mlp.w2_bias": BIAS_D,
    },
    "kn": {
        "gate_up_kn": np.concatenate([turned(GATE), turned(UP)], 2),
        "gate_up_kn_bias": np.concatenate([BIAS_G, BIAS_U], 1),
        "down_kn": turned(DOWN),
        "down_kn_bias": BIAS_D,
    },
    "up-gate": {
        "up_gate_proj": np.concatenate([UP, GATE], 1),
        "up_gate_proj_bias": np.concatenate([BIAS_U, BIAS_G], 1),
        "down_proj": DOWN,
        "down_proj_bias": BIAS_D,
    },
}
PLAIN = {
    "sglang": {"w13_weight": UP, "w2_weight": DOWN},
    "megablocks": {"mlp.w1": UP.reshape(E * I, H), "mlp.w2": turned(DOWN).reshape(E * I, H)},
    "kn": {"up_kn": turned(UP), "down_kn": turned(DOWN)},
}


def gated(root: Path) -> Path:
    parts = {
        "gate_proj.weight": GATE,
        "gate_proj.bias": BIAS_G,
        "up_proj.weight": UP,
        "up_proj.bias": BIAS_U,
        "down_proj.weight": DOWN,
        "down_proj.bias": BIAS_D,
    }
    tensors = {f"{STACK}.{e}.{p}": bf16(a[e]) for p, a in parts.items() for e in range(E)}
    return write_checkpoint(root, tensors, {"model_type": "qwen3_moe"})


@pytest.mark.parametrize("layout", shared_layouts())
def test_gated_experts(layout: str, tmp_path: Path):
    src = gated(tmp_path / "src")
    moeconv.fuse(src, tmp_path / "out", layout=layout)
    wanted = {f"{STACK}.{n}": bf16(np.ascontiguousarray(a)) for n, a in GATED[layout].items()}
    assert read_tensors(tmp_path / "out") == wanted
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("layout", shared_layouts())
def test_a_foreign_checkpoint_in_that_layout_is_read(layout: str, tmp_path: Path):
    """The names say which layout it is, but for one that others use otherwise."""
    tensors = {f"{STACK}.{n}": bf16(np.ascontiguousarray(a)) for n, a in GATED[layout].items()}
    config = {"model_type": "qwen3_moe", "num_experts": E}
    src = write_checkpoint(tmp_path / "src", tensors, config)
    asked = None
    if layout == "up-gate":
        with pytest.raises(AmbiguousLayout, match="ERNIE has the name, too, and gate first"):
            moeconv.unfuse(src, tmp_path / "out")
        asked = layout
    moeconv.unfuse(src, tmp_path / "out", from_layout=asked)
    assert read_tensors(tmp_path / "out") == read_tensors(gated(tmp_path / "gated"))


@pytest.mark.parametrize("layout", PLAIN)
def test_experts_without_a_gate(layout: str, tmp_path: Path):
    stack = "backbone.layers.1.mixer.experts"
    tensors = {f"{stack}.{e}.up_proj.weight": bf16(UP[e]) for e in range(E)}
    tensors |= {f"{stack}.{e}.down_proj.weight": bf16(DOWN[e]) for e in range(E)}
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "nemotron_h"})
    moeconv.fuse(src, tmp_path / "out", layout=layout)
    wanted = {f"{stack}.{n}": bf16(np.ascontiguousarray(a)) for n, a in PLAIN[layout].items()}
    assert read_tensors(tmp_path / "out") == wanted


def test_sglang_has_its_own_names_for_the_scales_of_deepseek_v4(tmp_path: Path):
    parts = {"weight": "I8 16,32", "scale": "F8_E8M0 16,2"}
    text = "\n".join(
        f"layers.0.ffn.experts.{{0-1}}.{p}.{part} {said if p != 'w2' else turned_text[part]}"
        for p in ("w1", "w3", "w2")
        for turned_text in ({"weight": "I8 64,8", "scale": "F8_E8M0 64,1"},)
        for part, said in parts.items()
    )
    src = phantom(tmp_path / "src", rows(text), {"model_type": "deepseek_v4"})
    moeconv.fuse(src, tmp_path / "out", layout="sglang")
    names = {n.rpartition(".")[2] for n in read_tensors(tmp_path / "out")}
    assert names == {f"{w}_{p}" for w in ("w13", "w2") for p in ("weight", "weight_scale_inv")}
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_sglang_has_gate_and_up_of_gpt_oss_alternating(tmp_path: Path):
    gate_up, bias = np.stack([GATE, UP], 2).reshape(E, 2 * I, H), np.stack([BIAS_G, BIAS_U], 2)
    tensors = {
        "gate_up_proj": turned(gate_up),
        "gate_up_proj_bias": bias.reshape(E, 2 * I),
        "down_proj": turned(DOWN),
        "down_proj_bias": BIAS_D,
    }
    src = write_checkpoint(
        tmp_path / "src",
        {f"{STACK}.{n}": bf16(np.ascontiguousarray(a)) for n, a in tensors.items()},
        {"model_type": "gpt_oss", "num_local_experts": E, "hidden_size": H},
    )
    moeconv.fuse(src, tmp_path / "out", layout="sglang")
    wanted = {
        "w13_weight": gate_up,
        "w13_weight_bias": bias.reshape(E, 2 * I),
        "w2_weight": DOWN,
        "w2_weight_bias": BIAS_D,
    }
    assert read_tensors(tmp_path / "out") == {
        f"{STACK}.{n}": bf16(np.ascontiguousarray(a)) for n, a in wanted.items()
    }
    moeconv.fuse(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(src)


@pytest.mark.parametrize("layout", ["sglang", "kn", "megablocks"])
def test_mxfp4_of_gpt_oss_has_no_such_layout(layout: str, tmp_path: Path):
    text = f"""{STACK}.gate_up_proj_blocks U8 2,64,2,16
{STACK}.gate_up_proj_scales U8 2,64,2
{STACK}.down_proj_blocks U8 2,64,1,16
{STACK}.down_proj_scales U8 2,64,1"""
    src = phantom(tmp_path / "src", rows(text), {"model_type": "gpt_oss"})
    with pytest.raises(UnknownLayout, match=r"these work: .*`per-expert`"):
        moeconv.fuse(src, tmp_path / "out", layout=layout)


def test_a_family_that_nothing_reads_fused_has_none_of_them(tmp_path: Path):
    name = "model.encoder.layers.3.ffn.experts.expert_{}.{}.{}"
    tensors: dict[str, Spec] = {}
    for e in range(2):
        tensors[name.format(e, "fc1", "weight")] = bf16(UP[e])
        tensors[name.format(e, "fc1", "bias")] = bf16(BIAS_U[e])
        tensors[name.format(e, "fc2", "weight")] = bf16(DOWN[e])
        tensors[name.format(e, "fc2", "bias")] = bf16(BIAS_D[e])
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "nllb-moe"})
    result = moeconv.fuse(src, tmp_path / "out")
    assert any("copied through" in note for note in result.plan.notes)
    assert read_tensors(tmp_path / "out") == tensors
    with pytest.raises(UnknownLayout):
        moeconv.fuse(src, tmp_path / "other", layout="sglang")


def test_every_fusable_family_has_them_under_its_own_names_or_theirs():
    for recipe in shipped_recipes():
        names = {layout.name for layout in recipe.layouts}
        gate = any("gate" in la.projections for la in recipe.layouts)
        if recipe.fuse is None:
            assert names.isdisjoint(shared_layouts())
        elif gate:
            lacking = set(shared_layouts()) - names
            assert lacking <= {"dbrx": {"megablocks"}, "inkling": {"sglang"}}.get(
                recipe.name, set()
            ), recipe.name
