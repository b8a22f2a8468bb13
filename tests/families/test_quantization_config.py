"""Names of expert modules in quantization_config: new ones in OUT, the old file from unfuse."""

import json
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.checkpoint.quantlists import changed_lists
from tests.helpers import Spec, tree_sha256, write_checkpoint

STACK = "model.layers.{}.mlp.experts"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


def modules(layer: int, *projections: str) -> list[str]:
    return [f"{STACK.format(layer)}.{e}.{p}" for e in range(3) for p in projections or PROJECTIONS]


def checkpoint(root: Path, quantization: dict[str, Any]) -> Path:
    """Two layers of three experts; config.json as no program of ours would write it."""
    tensors: dict[str, Spec] = {
        f"{STACK.format(layer)}.{e}.{p}.weight": ("BF16", (2, 2), bytes([layer * 9 + e] * 8))
        for layer in (0, 1)
        for e in range(3)
        for p in PROJECTIONS
    }
    write_checkpoint(root, tensors, {})
    text = json.dumps(quantization, indent=3)
    (root / "config.json").write_text(
        '{ "model_type":"qwen3_moe",\n\t"rms_norm_eps": 1e-06, "limit": Infinity,\n'
        f'"quantization_config" : {text} , "x": [ "a" ]}}'
    )
    return root


def config_of(root: Path) -> Any:
    return json.loads((root / "config.json").read_bytes())["quantization_config"]


def test_whole_stacks_become_the_module_around_them(tmp_path: Path):
    names = ["lm_head", *modules(1), "model.layers.0.mlp.gate", *modules(0)]
    src = checkpoint(tmp_path / "src", {"ignore": names, "bits": 8})
    result = moeconv.fuse(src, tmp_path / "out")
    assert config_of(tmp_path / "out") == {
        "ignore": ["lm_head", STACK.format(1), "model.layers.0.mlp.gate", STACK.format(0)],
        "bits": 8,
    }
    assert any("`quantization_config.ignore`: 18 names" in note for note in result.plan.notes)
    assert moeconv.verify(tmp_path / "out").problems == ()
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


def test_nothing_else_of_the_file_changes(tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"ignore": modules(0), "eps": 1e-06})
    moeconv.fuse(src, tmp_path / "out")
    before, after = ((root / "config.json").read_text() for root in (src, tmp_path / "out"))
    start, stop = before.index("["), before.index("]")
    assert after.startswith(before[:start])
    assert after.endswith(before[stop:])
    assert after[len(before[:start]) : -len(before[stop:])].split() == ["[", f'"{STACK.format(0)}"']


def test_one_projection_becomes_its_tensor(tmp_path: Path):
    groups = {"group_0": {"targets": modules(1, "down_proj"), "weights": {"num_bits": 8}}}
    src = checkpoint(
        tmp_path / "src", {"config_groups": groups, "ignore": modules(0, "gate_proj", "up_proj")}
    )
    moeconv.fuse(src, tmp_path / "out")
    made = config_of(tmp_path / "out")
    assert made["config_groups"]["group_0"]["targets"] == [f"{STACK.format(1)}.down_proj"]
    assert made["ignore"] == [f"{STACK.format(0)}.gate_up_proj"]


@pytest.mark.parametrize("names", [modules(0)[:-1], modules(0, "gate_proj"), modules(1)[:1]])
def test_what_the_new_names_cannot_say_is_left_and_said(names: list[str], tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"modules_to_not_convert": names})
    result = moeconv.fuse(src, tmp_path / "out")
    assert any("left as it is" in note for note in result.plan.notes)
    assert tree_sha256(tmp_path / "out")["config.json"] == tree_sha256(src)["config.json"]


@pytest.mark.parametrize(
    "quantization",
    [
        {"ignore": ["lm_head", "experts", "model.layers.0.mlp.shared_experts.up_proj"]},
        {"ignore": [STACK.format(0)]},
        {"targets": "Linear"},
        {"ignore": []},
        {},
    ],
)
def test_lists_without_names_of_experts_are_not_touched(
    quantization: dict[str, Any], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", quantization)
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    assert not any("config.json" in note for note in plan.notes)
    assert tree_sha256(tmp_path / "out")["config.json"] == tree_sha256(src)["config.json"]


@pytest.mark.parametrize(
    ("quantization", "place", "text"),
    [
        ({"ignore": ["lm_head", r"re:.*mlp\.experts\.\d+\.up_proj"]}, "ignore", "re:.*mlp"),
        ({"exclude_modules": ["model.layers.0.mlp.experts.*"]}, "exclude_modules", "experts.*"),
        ({"dynamic": {r"-:model\.layers\.0\.mlp\.experts\.0": {}}}, "dynamic", "-:model"),
        ({"ignore": [f"{n}.weight" for n in modules(0)]}, "ignore", "and 8 more"),
        ({"x": [["mlp.experts.0.up_proj"]]}, "x", "mlp.experts.0.up_proj"),
    ],
)
def test_patterns_that_name_experts_are_left_and_said(
    quantization: dict[str, Any], place: str, text: str, tmp_path: Path
):
    src = checkpoint(tmp_path / "src", quantization)
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    (note,) = [n for n in plan.notes if f"`quantization_config.{place}`" in n]
    assert text in note
    assert "left as written" in note
    plan = moeconv.unfuse(src, tmp_path / "same").plan
    assert not any("left as written" in note for note in plan.notes)


def test_the_list_of_modelopt_is_left_and_said(tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"ignore": modules(0)})
    (src / "hf_quant_config.json").write_text(
        json.dumps({"quantization": {"exclude_modules": ["lm_head", f"{STACK.format(0)}.*"]}})
    )
    notes = moeconv.fuse(src, tmp_path / "out").plan.notes
    (note,) = [n for n in notes if "left as written" in n]
    assert note.startswith("hf_quant_config.json, `quantization.exclude_modules`")


def test_a_router_beside_the_experts_does_not_come_along(tmp_path: Path):
    block = "model.layers.0.block_sparse_moe"
    names = [f"{block}.experts.{e}.{p}" for e in range(2) for p in PROJECTIONS]
    tensors: dict[str, Spec] = {f"{n}.weight": ("BF16", (2, 2), bytes(8)) for n in names}
    tensors[f"{block}.router.layer.weight"] = ("BF16", (2, 2), bytes(8))
    config = {"model_type": "granitemoe", "quantization_config": {"ignore": names}}
    src = write_checkpoint(tmp_path / "src", tensors, config)
    moeconv.fuse(src, tmp_path / "out", layout="hub")
    linears = [f"{block}.input_linear", f"{block}.output_linear"]
    assert config_of(tmp_path / "out") == {"ignore": linears}
    moeconv.fuse(src, tmp_path / "fused")
    assert config_of(tmp_path / "fused") == {"ignore": [f"{block}.experts"]}


def test_from_set_to_set_and_by_ranks(tmp_path: Path):
    """The first config.json stays the one that all start from, and the way back."""
    src = checkpoint(tmp_path / "src", {"ignore": modules(0, "gate_proj", "up_proj")})
    moeconv.unfuse(src, tmp_path / "alone")  # already per expert: nothing to rename
    assert config_of(tmp_path / "alone") == config_of(src)
    steps = {"fused": "gate_up_proj", "kn": "gate_up_kn", "up-gate": "up_gate_proj"}
    last = tmp_path / "alone"
    for layout, name in steps.items():
        moeconv.fuse(last, tmp_path / layout, layout=layout)
        last = tmp_path / layout
        assert config_of(last) == {"ignore": [f"{STACK.format(0)}.{name}"]}
        assert moeconv.verify(last, level="source", source=src).problems == ()
        moeconv.unfuse(last, tmp_path / f"{layout}-back")
        assert tree_sha256(tmp_path / f"{layout}-back") == tree_sha256(src)
    moeconv.unfuse(last, tmp_path / "again", layout="per-expert")
    assert config_of(tmp_path / "again") == config_of(src)
    moeconv.shard(last, tmp_path / "ranks", ep_size=3, layout="fused")
    assert config_of(tmp_path / "ranks") == {"ignore": [f"{STACK.format(0)}.gate_up_proj"]}
    moeconv.merge(tmp_path / "ranks", tmp_path / "merged")
    assert tree_sha256(tmp_path / "merged") == tree_sha256(src)


def test_a_damaged_origin_is_found(tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"ignore": modules(0)})
    moeconv.fuse(src, tmp_path / "out")
    origin = tmp_path / "out" / "moeconv" / "origin"
    raw = origin.read_bytes()
    assert raw.endswith((src / "config.json").read_bytes())
    origin.write_bytes(raw[:-2] + b"x}")
    assert not moeconv.verify(tmp_path / "out", level="structure").ok


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"quantization_config":{"a":["x","y"]}}', '{"quantization_config":{"a":["z"]}}'),
        ('{"a":["x"],"quantization_config":null}', '{"a":["x"],"quantization_config":null}'),
        (
            ' {"t":{"quantization_config":{"b":{"c":[ "x" ,\n"y"\n]}}},"d":[{}]} ',
            ' {"t":{"quantization_config":{"b":{"c":[ "z"\n]}}},"d":[{}]} ',
        ),
        ('{"quantization_config":{"a":["x",1],"b":[["x"]]}}',) * 2,
    ],
)
def test_lists_in_place(text: str, wanted: str):
    assert changed_lists(text.encode(), lambda *_: ("z",)).decode() == wanted
