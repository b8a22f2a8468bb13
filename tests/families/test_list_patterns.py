"""Patterns of names in quantization_config: what they meant they mean still, or it is said."""

import time
from pathlib import Path

import pytest

import moeconv
from tests.families.listing import STACK, checkpoint, lists, modules
from tests.helpers import tree_sha256


@pytest.mark.parametrize(
    ("place", "texts"),
    [
        ("ignore", ["lm_head", "re:.*mlp.experts.*"]),
        ("ignore", [r"re:.*\.mlp\..*"]),
        ("ignore", [r"re:model\.layers\.(0|1)\.mlp\.experts\.[a-z0-9_.]+$"]),
        ("ignore", [r"re:.*\.(gate|up|gate_up|down)_proj$"]),
        ("ignore", [r"re:.*\.experts\..*down_proj"]),
        ("ignore", [r"re:.*gate_proj", r"re:.*up_proj", r"re:.*down_proj"]),
        ("ignore", ["re:.*shared_experts.*", "re:.*mlp.gate$", "re:.*self_attn.*"]),
        ("ignore", [r"re:(?!.*self_attn).*"]),
        ("exclude_modules", ["*.mlp.experts.*", "lm_head"]),
        ("exclude_modules", ["model.layers.0.mlp.experts*"]),
        ("exclude_modules", ["model.layers.?.mlp*"]),
        ("dynamic", [r"-:.*experts.*"]),
        ("modules_to_not_convert", [r"model\.layers\.[01]\.mlp"]),
        ("modules_to_not_convert", [r"model.layers.\d+.mlp.experts"]),
    ],
)
def test_a_pattern_that_is_true_of_the_new_names_stays(
    place: str, texts: list[str], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", lists(place, *texts))
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    assert not any("config.json" in note for note in plan.notes)
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()


@pytest.mark.parametrize(
    ("place", "texts"),
    [
        ("ignore", [r"re:.*\.experts\.\d+\..*", "lm_head"]),
        ("ignore", [r"re:.*layers\.1\.mlp\.experts\.[0-9]+\.(gate|up|down)_proj"]),
        ("targets", [r"re:.*experts\.\d+\.(gate|up)_proj$"]),
        ("ignore", [r"re:.*experts\.\d+\.gate_proj", r"re:.*experts\.\d+\.up_proj"]),
        ("ignore", [r"re:.*experts\.\d+\.down_proj"]),
        ("ignore", [r"re:(?!.*self_attn).*experts\.\d+"]),
        ("exclude_modules", ["model.layers.0.mlp.experts.?.*"]),
        ("exclude", ["*experts.0.*", "*experts.1.*", "*experts.2.*"]),
        ("dynamic", [r"-:.*experts\.\d+"]),
        ("dynamic", [r".*experts\.\d+\."]),
        ("modules_to_not_convert", [r"model.layers.1.mlp.experts.\d"]),
        ("modules_to_not_convert", [r"model.layers.1.mlp.experts.\d+.\w+"]),
    ],
)
def test_a_pattern_that_no_new_name_matches_is_left_and_reported(
    place: str, texts: list[str], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", lists(place, *texts))
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    (note,) = [note for note in plan.notes if "config.json" in note]
    assert note.startswith(f"config.json, `quantization_config.{place}`: ")
    assert "left as written" in note
    count = len([text for text in texts if text != "lm_head"])
    assert (f"and {count - 1} more" in note) == (count > 1)
    assert moeconv.verify(tmp_path / "out", level="source", source=src).problems == ()
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


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
def test_a_pattern_of_some_experts_is_left_and_reported(
    place: str, texts: list[str], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", lists(place, *texts))
    plan = moeconv.fuse(src, tmp_path / "out").plan
    assert plan.rewrites == ()
    (note,) = [n for n in plan.notes if "config.json" in n]
    assert note.startswith(
        f"config.json, `quantization_config.{place}`: names only some experts of"
    )


@pytest.mark.parametrize(
    ("quantization", "place", "text"),
    [
        # what is invalid, or may take too long
        ({"ignore": [r"re:.*experts(?i)"]}, "ignore", "re:.*experts"),
        ({"ignore": [r"re:.*(experts|mlp)+"]}, "ignore", "experts"),
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
def test_other_patterns_are_left_and_reported(
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
