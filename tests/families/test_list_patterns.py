"""Patterns of names in quantization_config: what they meant they mean still, or it is said."""

import time
from pathlib import Path

import pytest

import moeconv
from tests.families.listing import STACK, checkpoint, config_of, lists, modules
from tests.helpers import tree_sha256

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
    quantization: dict[str, object], place: str, text: str, tmp_path: Path
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
