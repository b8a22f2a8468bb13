"""No family of transformers that has routed experts is left out of the tests."""

import re
from pathlib import Path

import transformers

from tests.oracle.tiny import MODEL_TYPES

MODELS = Path(transformers.__file__).parent / "models"
EXPERTS = re.compile(
    r"class \w*Experts?\b|class \w+MoE\w*\(|num_experts|gate_up_proj = nn\.Parameter"
)
OWN_TYPE = re.compile(r'^    model_type(?:: str)? = "([^"]+)"', re.MULTILINE)

# What speaks of experts and routes to none, with what shows it.
NOT_ROUTED = {
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
    without = {name for name, (types, _) in found.items() if types.isdisjoint(MODEL_TYPES)}
    assert without == NOT_ROUTED.keys()
    for name, shows in NOT_ROUTED.items():
        assert shows in found[name][1], name
