"""Names of expert modules in quantization_config: new ones in OUT, the old file from unfuse."""

import json
import time
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


def lists(place: str, *texts: str) -> dict[str, Any]:
    """A quantization_config with a list, or with an object that has these keys."""
    keys = place in {"dynamic", "quantized_layers"}
    return {place: {t: {"bits": 4} for t in texts} if keys else list(texts)}


# of two layers; what a pattern means of both, or of the first
BOTH = [STACK.format(0), STACK.format(1)]
DYNAMIC = [r"model\.layers\.0\.mlp\.experts", r"model\.layers\.1\.mlp\.experts"]


@pytest.mark.parametrize(
    ("place", "texts", "wanted"),
    [
        # still true of the new names
        ("ignore", ["lm_head", "re:.*mlp.experts.*"], []),
        ("ignore", [r"re:.*\.mlp\..*"], []),
        ("ignore", [r"re:model\.layers\.(0|1)\.mlp\.experts\.[a-z0-9_.]+$"], []),
        ("ignore", [r"re:.*\.(gate|up|gate_up|down)_proj$"], []),
        ("ignore", [r"re:.*\.experts\..*down_proj"], []),
        ("ignore", [r"re:.*gate_proj", r"re:.*up_proj", r"re:.*down_proj"], []),
        ("ignore", ["re:.*shared_experts.*", "re:.*mlp.gate$", "re:.*self_attn.*"], []),
        ("exclude_modules", ["*.mlp.experts.*", "lm_head"], []),
        ("exclude_modules", ["model.layers.0.mlp.experts*"], []),
        ("exclude_modules", ["model.layers.?.mlp*"], []),
        ("dynamic", [r"-:.*experts.*"], []),
        ("modules_to_not_convert", [r"model\.layers\.[01]\.mlp"], []),
        ("modules_to_not_convert", [r"model.layers.\d+.mlp.experts"], []),
        # not any more
        ("ignore", [r"re:.*\.experts\.\d+\..*", "lm_head"], BOTH),
        ("ignore", [r"re:.*layers\.1\.mlp\.experts\.[0-9]+\.(gate|up|down)_proj"], BOTH[1:]),
        ("targets", [r"re:.*experts\.\d+\.(gate|up)_proj$"], [f"{s}.gate_up_proj" for s in BOTH]),
        (
            "ignore",
            [r"re:.*experts\.\d+\.gate_proj", r"re:.*experts\.\d+\.up_proj"],
            [f"{s}.gate_up_proj" for s in BOTH],
        ),
        ("ignore", [r"re:.*experts\.\d+\.down_proj"], [f"{s}.down_proj" for s in BOTH]),
        ("exclude_modules", ["model.layers.0.mlp.experts.?.*"], BOTH[:1]),
        ("exclude", ["*experts.0.*", "*experts.1.*", "*experts.2.*"], BOTH),
        ("dynamic", [r"-:.*experts\.\d+"], [f"-:{name}" for name in DYNAMIC]),
        ("dynamic", [r".*experts\.\d+\."], DYNAMIC),
        ("modules_to_not_convert", [r"model.layers.1.mlp.experts.\d"], BOTH[1:]),
        ("modules_to_not_convert", [r"model.layers.1.mlp.experts.\d+.\w+"], BOTH[1:]),
    ],
)
def test_a_pattern_of_whole_stacks_means_them_under_their_new_names(
    place: str, texts: list[str], wanted: list[str], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", lists(place, *texts))
    plan = moeconv.fuse(src, tmp_path / "out").plan
    found = list(config_of(tmp_path / "out")[place])
    assert [t for t in found if t not in wanted] == texts
    assert [t for t in found if t not in texts] == wanted
    notes = [note for note in plan.notes if "config.json" in note]
    added = f"config.json, `quantization_config.{place}`: {len(wanted)} names added"
    assert [n.startswith(added) for n in notes] == [True] * bool(wanted)
    if not wanted:
        assert plan.rewrites == ()
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
    # and the names that were added are no more where the layout is the first one again
    moeconv.unfuse(tmp_path / "out", tmp_path / "alone", layout="per-expert")
    assert tree_sha256(tmp_path / "alone")["config.json"] == tree_sha256(src)["config.json"]


@pytest.mark.parametrize(
    ("place", "texts"),
    [
        ("ignore", [r"re:.*mlp\.experts\.\d+\.up_proj"]),
        ("ignore", [r"re:.*mlp\.experts\.[01]\..*"]),
        ("ignore", [r"re:.*gate_proj"]),
        ("exclude_modules", ["model.layers.0.mlp.experts.1.*"]),
        ("dynamic", [r"-:model\.layers\.0\.mlp\.experts\.0"]),
        ("modules_to_not_convert", [r"model\.layers\.1\.mlp\.experts\.2"]),
    ],
)
def test_a_pattern_of_some_experts_is_left_and_said(place: str, texts: list[str], tmp_path: Path):
    src = checkpoint(tmp_path / "src", lists(place, *texts))
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    (note,) = [n for n in plan.notes if "config.json" in n]
    assert note.startswith(f"config.json, `quantization_config.{place}`: names some experts of")


@pytest.mark.parametrize(
    ("quantization", "place", "text"),
    [
        # what is not regular, or takes too long
        ({"ignore": [r"re:(?!.*experts).*"]}, "ignore", "re:(?!"),
        ({"ignore": [r"re:(.)experts\1"]}, "ignore", "experts"),
        ({"ignore": ["re:.*experts[" + "a" * 2000]}, "ignore", "re:.*experts"),
        ({"ignore": [f"re:{'(experts|' * 15}a{'){1,90}' * 15}"]}, "ignore", "re:(experts"),
        # what means other experts under the new names
        ({"ignore": [r"re:.*\.gate_up_proj$"]}, "ignore", "gate_up_proj"),
        ({"ignore": [r"re:.*experts\.(\d+\.down|gate_up)_proj"]}, "ignore", "gate_up"),
        # names of tensors, lists in lists, a text alone
        ({"ignore": [f"{n}.weight" for n in modules(0)]}, "ignore", "and 8 more"),
        ({"x": [["mlp.experts.0.up_proj"]]}, "x", "mlp.experts.0.up_proj"),
        ({"targets": r"re:.*experts\.\d+"}, "targets", "experts"),
        ({"unheard_of": ["*experts.?.*"]}, "unheard_of", "experts"),
        # of none: a part of a module's name is no module
        (
            {"modules_to_not_convert": [r"model.layers.1.mlp.experts.\d+.(gate|up|down)"]},
            "modules_to_not_convert",
            "experts",
        ),
        # of none, but of all where experts are joined
        ({"ignore": [STACK.format(0)]}, "ignore", STACK.format(0)),
        ({"ignore": [r"re:.*mlp\.experts$"]}, "ignore", "experts"),
    ],
)
def test_other_patterns_are_left_and_said(
    quantization: dict[str, Any], place: str, text: str, tmp_path: Path
):
    src = checkpoint(tmp_path / "src", quantization)
    plan = moeconv.fuse(src, tmp_path / "out").plan
    (note,) = [n for n in plan.notes if f"`quantization_config.{place}`" in n and "left" in n]
    assert text in note
    assert "left as written" in note
    plan = moeconv.unfuse(src, tmp_path / "same").plan
    assert not any("left as written" in note for note in plan.notes)


HOSTILE = ["(x+x+)+y", "(.*.*.*)*$", "(a|a)*b", "([a-z.0-9]+)*Z", "(((.{1,9}){1,9}){1,9}){1,9}!"]


@pytest.mark.parametrize("pattern", HOSTILE)
def test_no_pattern_takes_long(pattern: str, tmp_path: Path):
    """Python's `re` tries every way through such a pattern."""
    names = [f"re:.*experts.{pattern}{n}" for n in range(20)]
    src = checkpoint(tmp_path / "src", {"ignore": names})
    started = time.process_time()
    moeconv.fuse(src, tmp_path / "out")
    assert time.process_time() - started < 20


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
    assert any("some experts of a stack only" in note for note in plan.notes)
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
            STACK.format(0),
            "*.mlp.gate",
        ],
    }
    place = f"{MODELOPT}, `quantization.exclude_modules`"
    assert sum(note.startswith(f"{place}: 9 names") for note in result.plan.notes) == 1
    assert sum(note.startswith(f"{place}: 1 names added") for note in result.plan.notes) == 1
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
def test_a_sidecar_that_is_no_json_is_copied(raw: bytes, tmp_path: Path):
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

    assert changed_lists(text.encode(), change)[0].decode() == wanted
