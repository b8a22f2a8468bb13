"""No family of transformers that has routed experts is left out of the tests."""

import re
from pathlib import Path

import transformers
from transformers.models.auto import modeling_auto

from tests.oracle.tiny import IMPOSSIBLE, MODEL_TYPES

MODELS = Path(transformers.__file__).parent / "models"
CASES = set(MODEL_TYPES) - IMPOSSIBLE.keys()
EXPERTS = re.compile(
    r"class \w*Experts?\b|class \w+MoE\w*\(|num_experts|gate_up_proj = nn\.Parameter"
)
OWN_TYPE = re.compile(r'^    model_type(?:: str)? = "([^"]+)"', re.MULTILINE)

# What speaks of experts and routes to none, with what shows it.
NOT_ROUTED = {
    "doge": "self.num_keys = math.floor(math.sqrt(self.num_experts))",  # keys of an embedding
    "bamba": "num_experts = 1",
    "vitpose_backbone": "dataset_index",  # the caller says which head an image is for
}


def types_with_experts() -> dict[str, tuple[set[str], str]]:
    """The model types of each modelling file that speaks of experts, and its text."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        text = path.read_text()
        config = path.with_name(path.name.replace("modeling_", "configuration_"))
        if EXPERTS.search(text) and config.is_file():
            found[path.parent.name] = (set(OWN_TYPE.findall(config.read_text())), text)
    return found


def test_each_family_with_experts_is_a_case():
    found = types_with_experts()
    assert len(found) > 60
    without = {name for name, (types, _) in found.items() if types.isdisjoint(CASES)}
    assert without == NOT_ROUTED.keys()
    for name, shows in NOT_ROUTED.items():
        assert shows in found[name][1], name


def test_a_type_that_is_not_a_case_is_only_a_part_of_one_that_is():
    """A config with experts beside a case's: no Auto class makes a model of it alone."""
    parts = set()
    for name, (types, _) in types_with_experts().items():
        for model_type in sorted(types - CASES):
            if model_type not in transformers.CONFIG_MAPPING or name in NOT_ROUTED:
                continue
            if routes(transformers.CONFIG_MAPPING[model_type]()):
                parts.add(model_type)
                assert not any(model_type in names for names in auto_names()), model_type
    assert {"qwen3_omni_moe_talker_text", "step3p5"} <= parts


def routes(config: object) -> bool:
    """Whether a config says that tokens are routed to experts."""
    keys = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
    return any(getattr(config, key, None) for key in keys)


def auto_names() -> list[dict[str, str]]:
    """Model types and classes, as the Auto classes know them."""
    return [
        modeling_auto.MODEL_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    ]
