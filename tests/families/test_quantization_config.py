"""Names of expert modules in quantization_config: new ones in OUT, the old file from unfuse."""

import json
from pathlib import Path

import pytest

import moeconv
from moeconv.quantconfig.document import changed_lists, quant_texts
from tests.families.listing import PROJECTIONS, STACK, checkpoint, config_of, modules
from tests.helpers import Spec, tree_sha256, write_checkpoint


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
def test_what_the_new_names_cannot_express_is_left_and_reported(names: list[str], tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"modules_to_not_convert": names})
    result = moeconv.fuse(src, tmp_path / "out")
    assert any("left as it is" in note for note in result.plan.notes)
    assert tree_sha256(tmp_path / "out")["config.json"] == tree_sha256(src)["config.json"]


@pytest.mark.parametrize(
    "quantization",
    [
        {"ignore": ["lm_head", "experts", "model.layers.0.mlp.shared_experts.up_proj"]},
        {"targets": "Linear"},
        {"ignore": []},
        {},
    ],
)
def test_lists_without_names_of_experts_are_not_touched(
    quantization: dict[str, object], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", quantization)
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    assert not any("config.json" in note for note in plan.notes)
    assert tree_sha256(tmp_path / "out")["config.json"] == tree_sha256(src)["config.json"]


def test_names_and_patterns_of_one_list_count_together(tmp_path: Path):
    texts = [*modules(0, "gate_proj"), r"re:.*layers\.0\.mlp\.experts\.\d+\.up_proj", "lm_head"]
    src = checkpoint(tmp_path / "src", {"ignore": texts})
    moeconv.fuse(src, tmp_path / "out")
    assert config_of(tmp_path / "out")["ignore"] == [f"{STACK.format(0)}.gate_up_proj", *texts[-2:]]


def test_a_name_that_is_there_already_is_not_written_twice(tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"ignore": [STACK.format(0), *modules(0), *modules(1)]})
    moeconv.fuse(src, tmp_path / "out")
    assert config_of(tmp_path / "out")["ignore"] == [STACK.format(0), STACK.format(1)]


def test_keys_that_are_names_of_experts(tmp_path: Path):
    """modelopt says the format of each layer; where gate and up have two, no new name has both."""
    fp8, fp4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4", "group_size": 16}
    layers = {"lm_head": fp8} | dict.fromkeys(modules(0), fp8)
    layers |= dict.fromkeys(modules(1, "gate_proj", "up_proj"), fp4)
    layers |= dict.fromkeys(modules(1, "down_proj"), fp8)
    src = checkpoint(tmp_path / "src", {"quantized_layers": layers})
    moeconv.fuse(src, tmp_path / "out")
    assert config_of(tmp_path / "out")["quantized_layers"] == {
        "lm_head": fp8,
        STACK.format(0): fp8,
        f"{STACK.format(1)}.gate_up_proj": fp4,
        f"{STACK.format(1)}.down_proj": fp8,
    }
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
    layers |= dict.fromkeys(modules(0, "up_proj"), fp4)
    mixed = checkpoint(tmp_path / "mixed", {"quantized_layers": layers})
    plan = moeconv.fuse(mixed, tmp_path / "other").plan
    assert any("only some experts of a stack" in note for note in plan.notes)
    made = config_of(tmp_path / "other")["quantized_layers"]
    assert made.keys() >= {*modules(0)}


MODELOPT = "hf_quant_config.json"


def modelopt(src: Path, *excluded: str) -> Path:
    """The sidecar of modelopt, beside a config.json that says nothing."""
    doc = {"quantization": {"quant_algo": "FP8", "exclude_modules": list(excluded)}}
    (src / MODELOPT).write_text(f"{json.dumps(doc, indent=4)}\n")
    return src


def test_the_sidecar_of_modelopt_goes_the_same_way(tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"ignore": modules(0)})
    modelopt(src, "lm_head", *modules(1), "model.layers.0.mlp.experts.?.*", "*.mlp.gate")
    result = moeconv.fuse(src, tmp_path / "out")
    made = json.loads((tmp_path / "out" / MODELOPT).read_bytes())["quantization"]
    assert made == {
        "quant_algo": "FP8",
        "exclude_modules": [
            "lm_head",
            STACK.format(1),
            "model.layers.0.mlp.experts.?.*",
            "*.mlp.gate",
        ],
    }
    place = f"{MODELOPT}, `quantization.exclude_modules`"
    assert sum(note.startswith(f"{place}: 9 names") for note in result.plan.notes) == 1
    left = f"{place}: `model.layers.0.mlp.experts.?.*` left as written"
    assert sum(note.startswith(left) for note in result.plan.notes) == 1
    assert [r.name for r in result.plan.rewrites] == ["config.json", MODELOPT]
    assert moeconv.verify(tmp_path / "out").problems == ()
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.shard(tmp_path / "out", tmp_path / "ranks", ep_size=3, layout="kn")
    for last in ("out", "ranks"):
        moeconv.merge(tmp_path / last, tmp_path / f"{last}-back") if last == "ranks" else (
            moeconv.unfuse(tmp_path / last, tmp_path / f"{last}-back")
        )
        assert tree_sha256(tmp_path / f"{last}-back") == tree_sha256(src)
    moeconv.unfuse(tmp_path / "ranks", tmp_path / "alone", layout="per-expert")
    assert (tmp_path / "alone" / MODELOPT).read_bytes() == (src / MODELOPT).read_bytes()


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[" * 5000, b'{"exclude_modules": [NaN'])
def test_a_sidecar_that_is_not_json_is_copied(raw: bytes, tmp_path: Path):
    src = checkpoint(tmp_path / "src", {"ignore": modules(0)})
    (src / MODELOPT).write_bytes(raw)
    moeconv.fuse(src, tmp_path / "out")
    assert (tmp_path / "out" / MODELOPT).read_bytes() == raw
    assert config_of(tmp_path / "out") == {"ignore": [STACK.format(0)]}


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


def test_from_output_to_output_and_by_ranks(tmp_path: Path):
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
        # keys are a list where they are names, each with its value; no key is written twice
        (
            '{"quantization_config":{"a.b": 1,"c":1 , "d":1}}',
            '{"quantization_config":{"z": 1}}',
        ),
        (
            '{"quantization_config":{"a":1,"c.d":["x"]}}',
            '{"quantization_config":{"a":1,"c.d":["z"]}}',
        ),
    ],
)
def test_lists_in_place(text: str, wanted: str):
    def change(_: str, texts: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
        return (("z",), *[()] * (len(texts) - 1))

    assert changed_lists(text, quant_texts(text), change)[0] == wanted
