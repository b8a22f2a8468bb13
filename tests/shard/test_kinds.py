"""Stacks of several kinds, small global tensors, maps of other systems: what goes where."""

import json
import struct
from pathlib import Path

import pytest

import moeconv
from tests.badinput.builders import config, dense, qwen, write
from tests.helpers import write_checkpoint
from tests.shard.reading import tensors_by_rank

STACK = "model.layers.0.mlp.experts"
MTP = "model.layers.3.mlp.experts"


def deep(tmp_path: Path) -> Path:
    """Layers 1 and 2 have experts, layer 0 is dense, layer 3 is MTP: three hidden layers."""
    tensors = {name: spec for name, spec in qwen(layers=4).items() if ".layers.0." not in name}
    tensors |= dense(0)
    return write(tmp_path / "src", tensors, config=config("deepseek_v3", num_hidden_layers=3))


def placement_of(out: Path) -> dict[str, list[int] | None]:
    """The rows that the root says, by stack."""
    root = json.loads((out / "moeconv.json").read_bytes().partition(b"\n")[0])
    return {s["name"]: s.get("physical_to_logical") for s in root["stacks"]}


@pytest.mark.parametrize(
    "text",
    [
        '{"physical_to_logical_map": [[0,1,2,3],[3,2,1,0],[1,0,3,2]]}',  # all hidden layers
        "[[3,2,1,0],[1,0,3,2]]",  # one for each MoE layer
        '{"phy2log": [[3,2,1,0],[1,0,3,2]]}',
    ],
)
def test_each_system_counts_layers_its_own_way(tmp_path: Path, text: str):
    done = moeconv.shard(deep(tmp_path), tmp_path / "out", ep_size=2, placement=text)
    assert placement_of(tmp_path / "out") == {
        "model.layers.1.mlp.experts": [3, 2, 1, 0],
        "model.layers.2.mlp.experts": [1, 0, 3, 2],
        MTP: [0, 1, 2, 3],  # no map names it: trivial
    }
    assert "row" in done.plan.notes[0]  # what was assumed is said


def test_trtllm_and_ascend_maps(tmp_path: Path):
    src = deep(tmp_path)
    (tmp_path / "map.yaml").write_text(
        "initial_global_assignments:\n  1: [3, 2, 1, 0]\n  2: [1, 0, 3, 2]\n"
        "num_slots: 4\nlayer_updates_per_iter: 0\n"
    )
    devices = [[[3, 2], [1, 0]], [[1, 0], [3, 2]]]
    ascend = {
        "moe_layer_count": 2,
        "layer_list": [
            {
                "layer_id": n,
                "device_count": 2,
                "device_list": [
                    {"device_id": d, "device_expert": ids} for d, ids in enumerate(layer)
                ],
            }
            for n, layer in enumerate(devices)
        ],
    }
    (tmp_path / "map.json").write_text(json.dumps(ascend))
    for name in ("yaml", "json"):
        moeconv.shard(src, tmp_path / name, ep_size=2, placement=tmp_path / f"map.{name}")
    assert placement_of(tmp_path / "yaml") == placement_of(tmp_path / "json")
    assert placement_of(tmp_path / "yaml")["model.layers.1.mlp.experts"] == [3, 2, 1, 0]


def test_stacks_that_do_not_divide_stay_in_the_common_files(tmp_path: Path):
    tensors = qwen(experts=8, layers=3) | {
        name.replace("model.layers.0", "vision.layers.0"): spec
        for name, spec in qwen(experts=3).items()
        if ".layers." in name
    }
    src = write(tmp_path / "src", tensors, config={"model_type": "qwen3_moe"})
    done = moeconv.shard(src, tmp_path / "out", ep_size=4)
    held = tensors_by_rank(tmp_path / "out")
    assert held[None]["vision.layers.0.mlp.experts.gate_up_proj"][1] == (3, 16, 24)
    assert placement_of(tmp_path / "out")["vision.layers.0.mlp.experts"] is None
    assert any("vision.layers.0" in note and "common" in note for note in done.plan.notes)
    assert moeconv.verify(tmp_path / "out", level="source", source=src).ok
    moeconv.merge(tmp_path / "out", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        src / "model.safetensors"
    ).read_bytes()


def test_resharding_without_a_placement_is_trivial(tmp_path: Path):
    src = deep(tmp_path)
    moeconv.shard(src, tmp_path / "a", ep_size=2, placement="[[3,2,1,0],[1,0,3,2]]")
    moeconv.shard(tmp_path / "a", tmp_path / "b", ep_size=4)
    assert set(map(str, placement_of(tmp_path / "b").values())) == {"[0, 1, 2, 3]"}


GLOBAL = """
name = "small"
stack = "{prefix}{layer}.mlp.experts"
[layouts.per-expert]
up = "{stack}.{expert}.up_proj.{component}: O K"
down = "{stack}.{expert}.down_proj.{component}: O K"
[layouts.fused]
up = "{stack}.up_proj{suffix}: E O K"
down = "{stack}.down_proj{suffix}: E O K"
[components]
weight = { axes = "O K", suffix = "" }
input_scale = { axes = "", suffix = "_input_scale" }
"""


@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_small_global_tensors_are_kept_for_all_experts(tmp_path: Path, layout: str):
    """Runtimes reduce a per-tensor scale over all experts, so no rank may lack one."""
    (tmp_path / "small.toml").write_text(GLOBAL)
    tensors = {}
    for e in range(4):
        for n, p in enumerate(("up_proj", "down_proj")):
            shape = (3, 5) if n == 0 else (5, 3)
            tensors[f"{STACK}.{e}.{p}.weight"] = ("U8", shape, bytes(range(e * 15, e * 15 + 15)))
            scale = struct.pack("<f", e + n / 10)
            tensors[f"{STACK}.{e}.{p}.input_scale"] = ("F32", (), scale)
    src = write_checkpoint(tmp_path / "src", tensors, {})
    out = tmp_path / "out"
    moeconv.shard(
        src,
        out,
        ep_size=2,
        placement={STACK: (3, 1, 0, 2, 3, 0)},
        recipe=tmp_path / "small.toml",
        layout=layout,
    )
    held = tensors_by_rank(out)
    in_order = [struct.pack("<f", e) for e in range(4)]
    if layout == "fused":
        assert held[None][f"{STACK}.up_proj_input_scale"] == ("F32", (4,), b"".join(in_order))
    else:
        assert [held[None][f"{STACK}.{e}.up_proj.input_scale"][2] for e in range(4)] == in_order
    assert not [n for r in (0, 1) for n in held[r] if "scale" in n]
    assert moeconv.verify(out, level="source", source=src, recipe=tmp_path / "small.toml").ok
    moeconv.shard(out, tmp_path / "one", ep_size=1)
    moeconv.merge(tmp_path / "one", tmp_path / "back")
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        src / "model.safetensors"
    ).read_bytes()
