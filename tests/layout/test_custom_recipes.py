"""Recipes of a user's own, with axes in any legal order: held against plain NumPy, both ways."""

import tempfile
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moeconv
from moeconv.errors import (
    AmbiguousLayout,
    BadRecipe,
    LayoutContradiction,
    MoeconvError,
    StraddlingBlock,
)
from tests.helpers import nbytes, read_tensors, tree_sha256, write_checkpoint
from tests.recipes import Case, Layout, cases
from tests.reference import fingerprint

# recipes differ more than checkpoints do
MANY = settings(max_examples=2 * settings().max_examples)


def prepared(root: Path, case: Case, layout: Layout) -> tuple[Path, Path]:
    """A checkpoint in `layout`, and the recipe's file."""
    recipe = root / "custom.toml"
    recipe.write_text(case.toml, "utf-8")
    return write_checkpoint(root / "src", case.tensors(layout), case.config), recipe


@MANY
@given(cases())
def test_any_layout_to_any_layout_and_back(case: Case):
    first, second = case.layouts
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src, recipe = prepared(root, case, first)
        if case.straddles():
            with pytest.raises(StraddlingBlock):
                moeconv.fuse(src, root / "out", recipe=recipe, layout="b", from_layout="a")
            assert not (root / "out").exists()
            return
        moeconv.fuse(src, root / "out", recipe=recipe, layout="b", from_layout="a")
        assert read_tensors(root / "out") == case.tensors(second)
        assert moeconv.verify(root / "out").problems == ()
        options = {"recipe": recipe, "from_layout": "a"}
        assert moeconv.verify(root / "out", level="source", source=src, **options).problems == ()
        wanted = fingerprint(case.stacks, case.others)
        assert moeconv.fingerprint(root / "out") == wanted
        assert moeconv.fingerprint(src, **options) == wanted
        moeconv.unfuse(root / "out", root / "back")
        assert tree_sha256(root / "back") == tree_sha256(src)
        moeconv.fuse(root / "out", root / "again", layout="a")
        assert read_tensors(root / "again") == case.tensors(first)


@given(cases(), st.sampled_from(("E I H", "E", "")))
def test_without_from_layout_it_is_right_or_refused(case: Case, said: str):
    """However little config.json says, and where both layouts have the same names."""
    first, second = case.layouts
    config = {k: v for k, v in case.config.items() if k == "block" or k in said.split()}
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        src, recipe = prepared(root, replace(case, config=config), first)
        try:
            moeconv.fuse(src, root / "out", recipe=recipe, layout="b")
        except (AmbiguousLayout, LayoutContradiction, StraddlingBlock):
            assert not (root / "out").exists()
            return
        assert read_tensors(root / "out") == case.tensors(second)


STACK = "model.layers.0.ffn"
SIZES = {"E": 2, "I": 2, "H": 3}


def small_recipe(up: str, *, zeros: str, listed: str | None = None) -> str:
    """Per expert, and stacked with `up` as the axes of up; zeros are a companion of up."""
    lines = [
        'name = "small"',
        'stack = "{prefix}{layer}.ffn"',
        "[config]",
        *(f'{k} = ["{v}"]' for k, v in (("experts", "E"), ("width", "I"), ("hidden", "H"))),
        "[layouts.alone]",
        'up = "{stack}.{expert}.up.{component}: O K"',
        'down = "{stack}.{expert}.down.{component}: O K"',
        "[layouts.stacked]",
        f'up = "{{stack}}.up{{suffix}}: {up}"',
        'down = "{stack}.down{suffix}: E O K"',
        *(["[layouts.stacked.axes.up]", f'zeros = "{listed}"'] if listed else []),
        "[components]",
        'weight = { axes = "O K", suffix = "" }',
        f'zeros = {{ axes = "{zeros}", suffix = "_zeros" }}',
    ]
    return "\n".join(lines)


def small_checkpoint(root: Path, *, zeros: tuple[int, ...]) -> Path:
    """Two experts, up [2, 3] and down [3, 2], in bytes that count up."""
    count = iter(range(256))
    # 16-bit weights, which mean something without zeros: down has none
    entries = {
        "up.weight": ("F16", (2, 3)),
        "down.weight": ("F16", (3, 2)),
        "up.zeros": ("U8", zeros),
    }
    tensors = {
        f"{STACK}.{e}.{name}": (dtype, shape, bytes(islice(count, nbytes(dtype, shape))))
        for e in range(2)
        for name, (dtype, shape) in entries.items()
    }
    return write_checkpoint(root / "src", tensors, SIZES)


def test_a_companion_whose_experts_are_not_outermost(tmp_path: Path):
    """Derived from `K O` beside `(E O) K`: E comes first, because a rank takes whole experts."""
    (tmp_path / "r.toml").write_text(small_recipe("(E O) K", zeros="K O"))
    src = small_checkpoint(tmp_path, zeros=(3, 2))
    moeconv.fuse(src, tmp_path / "out", recipe=tmp_path / "r.toml", layout="stacked")
    one, two = (read_tensors(src)[f"{STACK}.{e}.up.zeros"][2] for e in range(2))
    made = read_tensors(tmp_path / "out")
    assert made[f"{STACK}.up_zeros"] == ("U8", (2, 3, 2), one + two)
    assert moeconv.verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("up", "listed"),
    [
        ("E O K b", None),  # the weight has a packing axis in one layout only
        ("E O K", "E O"),  # zeros lose their K
        ("E O K", "E K/2 O"),  # zeros count K in blocks in one layout only
    ],
)
def test_layouts_that_describe_different_matrices_are_refused(
    up: str, listed: str | None, tmp_path: Path
):
    (tmp_path / "r.toml").write_text(small_recipe(up, zeros="K O", listed=listed))
    src = small_checkpoint(tmp_path, zeros=(3, 2))
    with pytest.raises(BadRecipe):
        moeconv.fuse(src, tmp_path / "out", recipe=tmp_path / "r.toml", layout="stacked")
    assert not (tmp_path / "out").exists()


def test_blocks_beside_a_packing_axis_are_in_one_matrix(tmp_path: Path):
    """`(O/2 b) K`: no other matrix is in that dimension, so nothing straddles."""
    (tmp_path / "r.toml").write_text(small_recipe("E O K", zeros="(O/2 b) K"))
    src = small_checkpoint(tmp_path, zeros=(4, 3))
    moeconv.fuse(src, tmp_path / "out", recipe=tmp_path / "r.toml", layout="stacked")
    both = b"".join(read_tensors(src)[f"{STACK}.{e}.up.zeros"][2] for e in range(2))
    assert read_tensors(tmp_path / "out")[f"{STACK}.up_zeros"] == ("U8", (2, 4, 3), both)


# One family's fused form under two interpretations; `here` is what qwen3_moe calls `fused`.
TWO_READINGS = """
name = "interpretations"
stack = "{prefix}{layer}.mlp.experts"
[layouts.here]
gate_up = "{stack}.gate_up_proj{suffix}: E (G O) K"
down = "{stack}.down_proj{suffix}: E O K"
[layouts.there]
gate_up = "{stack}.gate_up_proj{suffix}: E (O G) K"
down = "{stack}.down_proj{suffix}: E O K"
[components]
weight = { axes = "O K", suffix = "" }
"""


def test_an_output_states_its_layout_whatever_the_recipe(tmp_path: Path):
    recipe = tmp_path / "r.toml"
    recipe.write_text(TWO_READINGS)
    stack = "model.layers.0.mlp.experts"
    tensors = {
        f"{stack}.gate_up_proj": ("U8", (2, 6, 4), bytes(range(48))),
        f"{stack}.down_proj": ("U8", (2, 4, 3), bytes(range(100, 124))),
    }
    src = write_checkpoint(tmp_path / "src", tensors, {})
    out = tmp_path / "out"
    moeconv.fuse(src, out, recipe=recipe, from_layout="here", layout="there")
    # the recipe and from_layout are for the source; the set has a manifest
    options = {"recipe": recipe, "from_layout": "here"}
    assert moeconv.verify(out, level="source", source=src, **options).problems == ()
    assert {d.mark for d in moeconv.diff(src, out, **options)} == {"="}
    moeconv.fuse(out, tmp_path / "again", recipe=recipe, layout="here")
    assert read_tensors(tmp_path / "again") == tensors


def test_the_way_back_survives_another_recipe(tmp_path: Path):
    """A set keeps its origin's layout; a recipe that lacks it must not cut the way back."""
    (tmp_path / "r.toml").write_text(TWO_READINGS)
    names = [f"model.layers.0.mlp.experts.{e}.{p}" for e in range(2) for p in ("gate", "up")]
    tensors = {f"{name}_proj.weight": ("U8", (3, 4), bytes(range(12))) for name in names} | {
        f"model.layers.0.mlp.experts.{e}.down_proj.weight": ("U8", (4, 3), bytes(range(12)))
        for e in range(2)
    }
    src = write_checkpoint(tmp_path / "src", tensors, {"model_type": "qwen3_moe"})
    moeconv.fuse(src, tmp_path / "fused")
    options = {"recipe": tmp_path / "r.toml", "from_layout": "here", "layout": "there"}
    try:
        moeconv.fuse(tmp_path / "fused", tmp_path / "other", **options)
    except MoeconvError:
        return  # refused is fine, a set without a way back is not
    moeconv.unfuse(tmp_path / "other", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("key", ["gate", "up"])
def test_blocks_across_experts_are_refused_for_each_projection(key: str, tmp_path: Path):
    """Three rows in blocks of two, experts one below the other, in one of two projections."""
    axes = {"gate": "E O K", "up": "E O K", key: "(E O) K"}
    (tmp_path / "r.toml").write_text(f"""
name = "rows"
stack = "{{prefix}}{{layer}}.ffn"
[config]
experts = ["E"]
[layouts.apart]
gate = "{{stack}}.gate.{{component}}: {axes["gate"]}"
up = "{{stack}}.up.{{component}}: {axes["up"]}"
down = "{{stack}}.down.{{component}}: E O K"
[layouts.joined]
gate_up = "{{stack}}.gate_up.{{component}}: E O K G"
down = "{{stack}}.down.{{component}}: E O K"
[components]
weight = {{ axes = "O K", suffix = "" }}
scale = {{ axes = "O/2 K", suffix = "_scale" }}
""")
    tensors = {
        f"{STACK}.{part}.{name}": (dtype, shape, bytes(nbytes(dtype, shape)))
        for part, lead, rows in (("gate", axes["gate"], 3), ("up", axes["up"], 3))
        for name, dtype, shape in (
            ("weight", "U8", (2 * rows, 4) if lead[0] == "(" else (2, rows, 4)),
            ("scale", "F16", (4, 4) if lead[0] == "(" else (2, 2, 4)),
        )
    }
    tensors |= {f"{STACK}.down.weight": ("U8", (2, 4, 3), bytes(24))}
    tensors |= {f"{STACK}.down.scale": ("F16", (2, 2, 3), bytes(24))}
    src = write_checkpoint(tmp_path / "src", tensors, {"E": 2})
    with pytest.raises(StraddlingBlock, match="blocks of 2"):
        moeconv.fuse(src, tmp_path / "out", recipe=tmp_path / "r.toml", layout="joined")
