"""What recipes say of layouts and components decides, whatever these are called."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import BadRecipe, MissingScale, UnknownLayout
from moeconv.layout.recipe_toml import parse_recipe
from tests.badinput.builders import Tensors, write
from tests.helpers import tree_sha256

STACK = "model.layers.{layer}.mlp.experts"
FP8 = {"quant_method": "fp8"}
# no name of a layout or a component here is one that a shipped recipe has
RECIPE = """
name = "mine"
model_types = ["mine_moe"]
stack = "{prefix}{layer}.mlp.experts"
fuse = "one"

[config]
experts = ["num_experts"]

[layouts.alone]
gate = "{stack}.{expert}.gate_proj.{component}: O K"
up = "{stack}.{expert}.up_proj.{component}: O K"
down = "{stack}.{expert}.down_proj.{component}: O K"

[layouts.one]
gate_up = "{stack}.gate_up{suffix}: E (G O) K"
down = "{stack}.down{suffix}: E O K"

[layouts.toy]
gate_up = "{stack}.toy_gate_up{suffix}: E K (G O)"
down = "{stack}.toy_down{suffix}: E K O"

[components]
weight = { axes = "O K", suffix = "" }
amax = { axes = "O 1", suffix = "_amax" }
seen = { axes = "1", suffix = "_seen" }
tiles = { axes = "O/2 K/2", suffix = "_tiles" }
"""


def _recipe(tmp_path: Path, **said: str) -> Path:
    """RECIPE, where a component or layout named in `said` says that, too."""
    text = RECIPE
    for name, field in said.items():
        text = text.replace(f"\n{name} = {{ ", f"\n{name} = {{ {field}, ")
        text = text.replace(f"\n[layouts.{name}]\n", f"\n[layouts.{name}]\n{field}\n")
    assert len(said) == 0 or text != RECIPE
    (tmp_path / "mine.toml").write_text(text)
    return tmp_path / "mine.toml"


def _source(tmp_path: Path, companions: dict[str, tuple[int, ...]], *, layers: int = 1) -> Path:
    """fp8 experts of `mine_moe`; companions: shape by component, for all layers but layer 1."""
    tensors: Tensors = {}
    for layer in range(layers):
        for expert in range(2):
            for projection in ("gate", "up", "down"):
                name = f"{STACK.format(layer=layer)}.{expert}.{projection}_proj"
                tensors[f"{name}.weight"] = ("F8_E4M3", (4, 4))
                if layer != 1:
                    tensors |= {f"{name}.{c}": ("F32", s) for c, s in companions.items()}
    config = {"model_type": "mine_moe", "num_experts": 2, "quantization_config": FP8}
    write(tmp_path / "src", tensors, config=config)
    return tmp_path / "src"


def test_a_scale_is_what_its_recipe_calls_one(tmp_path: Path):
    src = _source(tmp_path, {"amax": (4, 1)})
    recipe = _recipe(tmp_path, amax="scales = true")
    moeconv.fuse(src, tmp_path / "out", recipe=recipe)
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)
    with pytest.raises(MissingScale, match="no scales") as caught:
        moeconv.fuse(src, tmp_path / "other", recipe=_recipe(tmp_path))
    assert "`scales = true`" in caught.value.fix


@pytest.mark.parametrize(("said", "lacking"), [("inputs = true", False), ("", True)])
def test_a_layer_may_lack_only_what_is_about_inputs(said: str, tmp_path: Path, *, lacking: bool):
    src = _source(tmp_path, {"seen": (1,)}, layers=3)
    config = (src / "config.json").read_text().replace('"fp8"', '"of our own"')
    (src / "config.json").write_text(config)
    recipe = _recipe(tmp_path, **({"seen": said} if said else {}))
    if lacking:
        with pytest.raises(MissingScale, match="`seen`"):
            moeconv.fuse(src, tmp_path / "out", recipe=recipe)
    else:
        moeconv.fuse(src, tmp_path / "out", recipe=recipe)


def test_a_layout_that_takes_plain_weights_only_takes_no_blocks_under_any_name(tmp_path: Path):
    src = _source(tmp_path, {"tiles": (2, 2)})
    recipe = _recipe(tmp_path, tiles="scales = true", toy='takes = "plain"')
    with pytest.raises(UnknownLayout) as caught:
        moeconv.fuse(src, tmp_path / "out", recipe=recipe, layout="toy")
    assert "`tiles` has one value for a block or group" in str(caught.value.cause)
    recipe = _recipe(tmp_path, tiles="scales = true")
    moeconv.fuse(src, tmp_path / "out", recipe=recipe, layout="toy")
    assert moeconv.verify(tmp_path / "out").ok


def test_one_without_blocks_is_written_in_it(tmp_path: Path):
    src = _source(tmp_path, {"amax": (4, 1)})
    recipe = _recipe(tmp_path, amax="scales = true", toy='takes = "plain"')
    moeconv.fuse(src, tmp_path / "out", recipe=recipe, layout="toy")
    assert moeconv.verify(tmp_path / "out").ok


@pytest.mark.parametrize(
    ("name", "field", "said"),
    [
        ("amax", "scales = 1", "components.amax.scales: must be true or false"),
        ("amax", "scale = true", "`scales`"),
        ("amax", "scales = true, inputs = true", "components.amax.inputs"),
        ("amax", "weight = true, scales = true", "components.amax.scales"),
        ("amax", "weight = true, inputs = true", "components.amax.inputs"),
        ("toy", 'takes = "all"', "layouts.toy.takes: must be one of anything, matrices, plain"),
        ("toy", "takes = true", "layouts.toy.takes: must be a string"),
    ],
)
def test_the_fields_are_checked(name: str, field: str, said: str, tmp_path: Path):
    with pytest.raises(BadRecipe) as caught:
        parse_recipe(_recipe(tmp_path, **{name: field}).read_text(), where="mine.toml")
    assert said in str(caught.value.cause)


def test_all_problems_of_the_fields_are_reported_at_once(tmp_path: Path):
    path = _recipe(tmp_path, amax="scales = 1", seen='inputs = "yes"', toy='takes = "all"')
    with pytest.raises(BadRecipe) as caught:
        parse_recipe(path.read_text(), where="mine.toml")
    for place in ("components.amax.scales", "components.seen.inputs", "layouts.toy.takes"):
        assert place in str(caught.value.cause)


def test_sizes_are_where_the_language_model_has_them_unless_the_recipe_says_otherwise():
    assert parse_recipe(RECIPE, where="mine").config.sections_of(STACK)[0] == "text_config"
    own = RECIPE.replace("[layouts.alone]", '[config.sections]\n"" = ["mine"]\n\n[layouts.alone]')
    assert parse_recipe(own, where="mine").config.sections_of(STACK) == ("mine",)
