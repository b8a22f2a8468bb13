"""Recipe files of one's own: every problem of a file at once, with its key and a suggestion."""

import time
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import BadRecipe
from moeconv.layout.recipe_toml import parse_recipe
from tests.badinput.builders import qwen, write
from tests.badinput.checks import holds, refused, untouched

GOOD = """
name = "mine"
model_types = ["mine_moe"]
stack = "{prefix}{layer}.mlp.experts"
fuse = "fused"
unfuse = "per-expert"

[config]
experts = ["num_experts"]

[config.granules]
block = ["quantization_config.weight_block_size"]

[layouts.per-expert]
gate = "{stack}.{expert}.gate_proj.{component}: O K"
up = "{stack}.{expert}.up_proj.{component}: O K"
down = "{stack}.{expert}.down_proj.{component}: O K"

[layouts.fused]
gate_up = "{stack}.gate_up_proj{suffix}: E (G O) K"
down = "{stack}.down_proj{suffix}: E O K"

[components]
weight = { axes = "O K", suffix = "" }
weight_scale_inv = { axes = "O/block.0 K/block.1", suffix = "_scale_inv" }
"""


def _refused(text: str, *facts: str) -> None:
    with pytest.raises(BadRecipe) as caught:
        parse_recipe(text, where="mine.toml")
    holds(caught.value, BadRecipe, "`mine.toml`", *facts)


def _with(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def test_the_good_recipe_is_good(src: Path, out: Path, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(GOOD)
    write(src, qwen())
    moeconv.fuse(src, out, recipe=tmp_path / "mine.toml")
    assert moeconv.verify(out).ok


# --- the file ----------------------------------------------------------------------------------
def test_a_recipe_that_is_not_there(src: Path, out: Path):
    write(src, qwen())
    refused(
        BadRecipe,
        "`nothing.toml`",
        "No such file",
        "qwen3_moe",
        src=src,
        out=out,
        recipe="nothing.toml",
    )


def test_a_recipe_that_is_a_directory(src: Path, out: Path, tmp_path: Path):
    write(src, qwen())
    refused(BadRecipe, "directory", src=src, out=out, recipe=tmp_path)


def test_a_recipe_that_is_not_utf_8(src: Path, out: Path, tmp_path: Path):
    (tmp_path / "mine.toml").write_bytes(b"name = '\xff'")
    write(src, qwen())
    refused(BadRecipe, "UTF-8", "mine.toml", src=src, out=out, recipe=tmp_path / "mine.toml")


def test_a_recipe_of_two_megabytes(src: Path, out: Path, tmp_path: Path):
    (tmp_path / "mine.toml").write_bytes(b"#" * 2_000_000)
    write(src, qwen())
    refused(BadRecipe, "mine.toml", "128 KiB", src=src, out=out, recipe=tmp_path / "mine.toml")


def test_a_bad_recipe_refuses_the_conversion(src: Path, out: Path, tmp_path: Path):
    (tmp_path / "mine.toml").write_text(_with("stack =", "stak ="))
    write(src, qwen())
    with untouched(tmp_path / "mine.toml"):
        refused(BadRecipe, "stak", src=src, out=out, recipe=tmp_path / "mine.toml")


@pytest.mark.parametrize("text", ["name =", "name = 1\nname = 2", "[" * 5000, "a = 1e", "= 1"])
def test_a_recipe_that_is_not_toml(text: str):
    _refused(text, "1 problem")


def test_an_empty_recipe():
    _refused("", "name", "stack", "layouts", "components")


# --- keys --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("old", "new", "meant"),
    [
        ("stack =", "stak =", "stack"),
        ("model_types", "model_typs", "model_types"),
        ("[components]", "[component]", "components"),
        ("[config]\nexperts", "[config]\nexpert", "experts"),
        ("[config.granules]", "[config.granule]", "granules"),
        ("unfuse =", "unfuze =", "unfuse"),
        ("gate_up =", "gateup =", "gate_up"),
        ('suffix = ""', 'sufix = ""', "suffix"),
        ("weight = { axes", "weight = { axis", "axes"),
    ],
)
def test_a_misspelt_key(old: str, new: str, meant: str):
    _refused(_with(old, new), f"did you mean `{meant}`?")


def test_an_annotation_is_fine():
    parse_recipe(_with("name =", 'x-note = "tried it"\nname ='), where="mine.toml")


@pytest.mark.parametrize("name", ['"Mine"', '""', '"../x"', "1", '"a b"', "[]"])
def test_an_invalid_name(name: str):
    _refused(_with('"mine"', name), "name: ")


def test_a_text_where_a_list_should_be():
    _refused(_with('["mine_moe"]', '"mine_moe"'), "model_types: must be a list")


@pytest.mark.parametrize(
    "stack",
    [
        "{prefix}.mlp.experts",
        "{layer}.mlp.experts",
        "x{prefix}{layer}.mlp",
        "{prefix}{layer}{x}",
        "",
    ],
)
def test_a_stack_without_its_placeholders(stack: str):
    _refused(_with("{prefix}{layer}.mlp.experts", stack), "stack: ")


def test_a_verb_that_names_no_layout():
    _refused(_with('fuse = "fused"', 'fuse = "fsued"'), "fuse: `fsued` is not a layout", "fused")


def test_a_block_size_that_config_does_not_name():
    _refused(_with("[config.granules]\nblock", "[config.granules]\nblok"), "lacks `block.0`")


@pytest.mark.parametrize(
    "path", ["x.{layer}", "{key}", "{key}.{layer}.{layer}", "{key}.{layer}.{x}"]
)
def test_a_size_of_one_layer_takes_both_placeholders(path: str):
    bad = f'[config.layers]\n"mtp." = ["{path}"]\n\n[config.granules]'
    _refused(_with("[config.granules]", bad), "layers.mtp.", "`{layer}` and `{key}`")


# --- axes --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("axes", "fact"),
    [
        ("E (G O K", "unmatched parenthesis"),
        ("E G O) K", "unmatched parenthesis"),
        ("E ((G O) K)", "parenthesis"),
        ("E (G O) () K", "empty group"),
        ("E (G O) K K", "names an axis twice"),
        ("E (G O) Q", "`Q`"),
        ("E (G O) K/0", "block below 1"),
        ("E (G O) K/", "`K/`"),
        ("E (G O) K/-3", "`K/-3`"),
        ("(G O) K", "neither `{expert}` in its name nor an axis E"),
        ("(G O) E K", "E must come first"),
        ("E O K", "joins projections but has no axis G"),
        ("E (G O)", "both O and K"),
        ("", "both O and K"),
    ],
)
def test_invalid_axes(axes: str, fact: str):
    _refused(_with("E (G O) K", axes), "layouts.fused.gate_up: ", fact)


def test_an_axis_g_without_a_pair():
    _refused(
        _with("down_proj{suffix}: E O K", "down_proj{suffix}: E (G O) K"), "joins no projections"
    )


def test_an_axis_e_beside_a_name_for_each_expert():
    text = _with("down_proj.{component}: O K", "down_proj.{component}: E O K")
    _refused(text, "layouts.per-expert.down: ", "an axis E and a name for each expert")


def test_a_component_with_axes_of_the_layout():
    _refused(_with('axes = "O K"', 'axes = "E O K"'), "components.weight.axes: ", "E and G")


def test_a_block_size_of_a_million_digits():
    _refused(_with("E (G O) K", "E (G O) K/" + "9" * 5000), "layouts.fused.gate_up: ")


# --- lines and layouts -------------------------------------------------------------------------
def test_a_line_without_axes():
    _refused(_with("gate_proj.{component}: O K", "gate_proj.{component}"), "NAME TEMPLATE: AXES")


def test_a_line_that_does_not_begin_with_the_stack():
    _refused(_with("{stack}.gate_up_proj", "gate_up_proj"), "must begin with `{stack}`")


def test_a_line_with_an_unknown_placeholder():
    _refused(
        _with("{stack}.gate_up_proj", "{stack}.{rank}.gate_up_proj"), "unknown placeholder `{rank}`"
    )


def test_a_line_with_both_component_and_suffix():
    _refused(
        _with("up_proj{suffix}", "up_proj{suffix}.{component}"), "both `{component}` and `{suffix}`"
    )


def test_a_line_that_is_nothing_but_the_stack():
    _refused(_with("{stack}.gate_up_proj{suffix}", "{stack}"), "layouts.fused.gate_up: ")


def test_a_layout_without_down():
    _refused(
        _with('down = "{stack}.{expert}.down_proj.{component}: O K"\n', ""), "needs `up` and `down`"
    )


def test_a_layout_that_stores_a_projection_twice():
    text = _with("[layouts.fused]\n", '[layouts.fused]\nup = "{stack}.up{suffix}: E O K"\n')
    _refused(text, "layouts.fused: stores one projection twice")


def test_a_layout_with_names_for_each_expert_in_some_lines_only():
    text = _with("{stack}.{expert}.down_proj.{component}: O K", "{stack}.down.{component}: E O K")
    _refused(text, "names for each expert in some lines only")


def test_layouts_that_store_different_projections():
    text = _with('gate = "{stack}.{expert}.gate_proj.{component}: O K"\n', "")
    _refused(text, "must all store the same projections")


def test_two_lines_with_one_template():
    text = _with("up_proj.{component}", "gate_proj.{component}")
    _refused(text, "layouts.per-expert")


def test_no_layouts():
    text = GOOD[: GOOD.index("[layouts.per-expert]")] + GOOD[GOOD.index("[components]") :]
    _refused(text, "layouts: must have at least one layout")


def test_no_weight_among_the_components():
    _refused(_with('weight = { axes = "O K", suffix = "" }\n', ""), "components.weight: is missing")


def test_two_components_with_one_suffix():
    _refused(_with('suffix = "_scale_inv"', 'suffix = ""'), "two have the same suffix")


# --- all at once -------------------------------------------------------------------------------
def test_all_problems_are_reported_at_once():
    text = _with("stack =", "stak =").replace("E (G O) K", "E (G O K")
    text = text.replace('fuse = "fused"', 'fuse = "x"', 1).replace('suffix = ""', 'sufix = ""')
    facts = (
        "stak: unknown key",
        "stack: is missing",
        "unmatched parenthesis",
        "`x` is not a layout",
    )
    _refused(text, *facts, "components.weight.suffix: is missing", "did you mean `stack`?")


def test_the_number_of_problems_is_reported():
    _refused(_with("stack =", "stak ="), "2 problems")


@pytest.mark.parametrize(
    "where", ['"\\u001b[2J" = 1', 'stack = "{\\u001b[2J}"', "fuse = '\\u001b'"]
)
def test_nothing_of_a_recipe_is_printed_raw(where: str):
    # `holds` looks for control characters in the message
    _refused(where, "problem")


def test_control_characters_in_axes_are_not_printed_raw():
    _refused(_with("E (G O) K", "E (G O) \\u001b[2J"), "is not an axis")


# --- what would take for ever ------------------------------------------------------------------
@pytest.mark.parametrize(
    "text",
    [
        "a" + ".a" * 16 + " = 1\n",
        "[a" + " . a" * 16 + "]\n",
        '"\\"x"' + '."\\"x"' * 16 + " = 1\n",
        "x = {'a'" + ".'a'" * 16 + " = 1}\n",
    ],
)
def test_a_key_of_many_parts(text: str):
    _refused(GOOD + text, "a key of more than 16 parts", "1 problem")


@pytest.mark.parametrize("piece", ['\\"', "\\'", '"\\"', "'", '\\""'])
def test_quotes_without_end_are_read_once(piece: str):
    """Each could begin a key; 60 seconds for the first of these if each were looked through."""
    began = time.process_time()
    _refused(piece * (100_000 // len(piece)), "1 problem")
    assert time.process_time() - began < 5


def test_texts_with_many_dots_are_not_keys():
    parse_recipe(_with("name =", f'title = "{"..." * 100} v1.2.3.4"\nname ='), where="mine.toml")


def test_a_recipe_in_a_manifest_is_not_longer_than_a_file():
    _refused(GOOD + "#" * (128 * 1024), "longer than 131,072 characters")


@pytest.mark.parametrize(
    "stack",
    ["{prefix}{prefix}{layer}.mlp.experts", "{prefix}{layer}.{layer}.experts",
     "{prefix}a{prefix}b{prefix}{layer}"],
)  # fmt: skip
def test_a_placeholder_that_appears_twice(stack: str):
    _refused(_with("{prefix}{layer}.mlp.experts", stack), "stack: ", "each once")


def test_more_of_anything_than_a_family_has():
    many = ", ".join('"{prefix}{layer}.mlp.experts"' for _ in range(101))
    _refused(_with('"{prefix}{layer}.mlp.experts"', f"[{many}]"), "stack: has 101 name patterns")
    more = "".join(f'c{n} = {{ axes = "O K", suffix = "_{n}" }}\n' for n in range(1000))
    _refused(GOOD + more, "components: has 1,002 entries, more than 1,000")


@pytest.mark.parametrize("number", ["9" * 5000, "0x" + "f" * 5000])
def test_a_number_of_thousands_of_digits(number: str):
    _refused(_with('"mine"', number), "1 problem" if number[0] == "9" else "name: must be a string")


def test_parts_that_can_be_read_in_too_many_ways(src: Path, out: Path, tmp_path: Path):
    """Twenty parts of two readings each: a million ways together, of which none is tried."""
    extra = "".join(f'x{n} = {{ axes = ["O K", "K O"], suffix = "_x{n}" }}\n' for n in range(20))
    (tmp_path / "mine.toml").write_text(GOOD + extra)
    tensors = qwen()
    for name, (_, shape) in list(qwen().items()):
        if ".experts." in name:
            stem = name.removesuffix("weight")
            tensors |= {f"{stem}x{n}": ("U8", shape) for n in range(20)}
    write(src, tensors)
    facts = ("`mine`", "combinations of axes", "under `axes`")
    refused(BadRecipe, *facts, src=src, out=out, recipe=tmp_path / "mine.toml")
