"""Lists of names in which old and new names, values or signs meet: nothing is lost or turned."""

import json
from pathlib import Path

import pytest

import moeconv
from moeconv.core.strict_json import Json
from moeconv.quantconfig.document import changed_lists, quant_texts
from tests.families.listing import checkpoint, config_of, modules
from tests.phantoms import phantom
from tests.quantised.test_half_apart import CONFIG, HALVES, rows

STACK = "model.layers.0.mlp.experts"


def test_names_that_both_layouts_have_stay(tmp_path: Path):
    """Only the scales of half-apart experts move: their modules' names are what they were."""
    names = ["lm_head", *modules(0)]
    quantization = {"modules_to_not_convert": names, "quant_method": "fp8"}
    src = phantom(tmp_path / "src", rows(HALVES), CONFIG | {"quantization_config": quantization})
    moeconv.unfuse(src, tmp_path / "out", layout="per-expert")
    assert config_of(tmp_path / "out") == quantization


def test_what_some_names_are_for_is_put_beside_those_that_stay(tmp_path: Path):
    """hunyuan joins gate and up, and has down in both layouts."""
    experts = f"{STACK}.{{0-2}}"
    tensors = f"{experts}.gate_and_up_proj.weight BF16 8,6\n{experts}.down_proj.weight BF16 6,4"
    parts = [f"{STACK}.{e}.{p}" for e in range(3) for p in ("gate_and_up_proj", "down_proj")]
    config = {"model_type": "hunyuan", "num_experts": 3, "quantization_config": {"ignore": parts}}
    src = phantom(tmp_path / "src", rows(tensors), config)
    moeconv.unfuse(src, tmp_path / "out", layout="per-expert")
    found = config_of(tmp_path / "out")["ignore"]
    assert sorted(found) == sorted(modules(0))


def test_a_member_whose_name_is_spelled_by_numbers_is_one_all_the_same(tmp_path: Path):
    plain = checkpoint(tmp_path / "plain", {"ignore": modules(0)})
    moeconv.fuse(plain, tmp_path / "wanted")
    src = checkpoint(tmp_path / "src", {"ignore": modules(0)})
    path = src / "config.json"
    text = path.read_text()
    assert text.count('"quantization_config"') == 1
    path.write_text(text.replace('"quantization_config"', r'"quantiz\u0061tion_config"'))
    moeconv.fuse(src, tmp_path / "out")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "wanted") != {"ignore": modules(0)}


def replaced(
    document: dict[str, Json], new: dict[str, tuple[str, ...]]
) -> tuple[Json, tuple[tuple[str, str], ...]]:
    """A document with some names replaced, and the places that were left."""
    raw = json.dumps({"quantization_config": document})
    after, left = changed_lists(
        raw, quant_texts(raw), lambda _, texts: tuple(new.get(t, (t,)) for t in texts)
    )
    return json.loads(after)["quantization_config"], left


def test_a_key_with_two_values_leaves_the_object_as_it_is():
    layers = {"a.all": {"bits": 8}, "a.0": {"bits": 4}, "a.1": {"bits": 4}}
    new = {"a.0": ("a.all",), "a.1": ()}
    assert replaced({"layers": layers}, new) == (
        {"layers": layers},
        (("quantization_config.layers", "a.all"),),
    )
    same = {"a.all": {"bits": 4}, "a.0": {"bits": 4}, "a.1": {"bits": 4}}
    assert replaced({"layers": same}, new) == ({"layers": {"a.all": {"bits": 4}}}, ())


@pytest.mark.parametrize(
    "dynamic",
    [
        {r"-:.*experts\.\d+\.gate_proj": {}, r"+:.*experts\.\d+\.up_proj": {}},
        {r"-:.*gate_proj": {}, r"+:.*up_proj": {"bits": 8}, r"-:.*up_proj": {}},
        {r"+:.*experts\.0\..*": {"bits": 8}, r"-:.*experts\.\d+": {}},
    ],
)
def test_the_first_match_counts_so_mixed_rules_are_left_and_reported(
    dynamic: dict[str, dict[str, int]], tmp_path: Path
):
    src = checkpoint(tmp_path / "src", {"dynamic": dynamic})
    result = moeconv.fuse(src, tmp_path / "out")
    assert config_of(tmp_path / "out") == {"dynamic": dynamic}
    assert any("left as" in note for note in result.plan.notes)
