"""Which bytes are gate and which are up: each layout of each recipe, against a table by hand.

What engines and the Hub say of their own names, not what the recipes say: where gate and up are
swapped in one of them, everything loads and the model talks nonsense.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

import moeconv
from moeconv.layout.shipped import shipped_recipes
from tests.helpers import Spec, read_tensors, write_checkpoint

E, I, H = 2, 3, 5  # noqa: E741 - the letters of the notation
RNG = np.random.default_rng(0)
Array = np.ndarray
GATE, UP = (RNG.integers(0, 2**16, (E, I, H)).astype("u2") for _ in range(2))
DOWN = RNG.integers(0, 2**16, (E, H, I)).astype("u2")


def turned(array: Array) -> Array:
    return array.transpose(0, 2, 1)


def rows(gate_up: str, down: str) -> dict[str, Array]:
    """Gate's rows, then up's."""
    return {gate_up: np.concatenate([GATE, UP], 1), down: DOWN}


def rows_up_first(gate_up: str, down: str) -> dict[str, Array]:
    return {gate_up: np.concatenate([UP, GATE], 1), down: DOWN}


def alternating_rows(gate_up: str, down: str) -> dict[str, Array]:
    """`x[::2]` is gate, `x[1::2]` is up."""
    return {gate_up: np.stack([GATE, UP], 2).reshape(E, 2 * I, H), down: DOWN}


def columns(gate_up: str, down: str) -> dict[str, Array]:
    return {gate_up: np.concatenate([turned(GATE), turned(UP)], 2), down: turned(DOWN)}


def alternating_columns(gate_up: str, down: str) -> dict[str, Array]:
    joined = alternating_rows("gate_up", "down")["gate_up"]
    return {gate_up: turned(joined), down: turned(DOWN)}


def apart(gate: str, up: str, down: str) -> dict[str, Array]:
    return {gate: GATE, up: UP, down: DOWN}


def flat(gate: str, up: str, down: str) -> dict[str, Array]:
    """Two dimensions; down is turned."""
    return {
        gate: GATE.reshape(E * I, H),
        up: UP.reshape(E * I, H),
        down: turned(DOWN).reshape(E * I, H),
    }


def alone(gate: str, up: str, down: str, *, first: int = 0) -> dict[str, Array]:
    """A tensor for each expert; names with `{}` for its number."""
    named = ((gate, GATE), (up, UP), (down, DOWN))
    return {name.format(first + e): array[e] for name, array in named for e in range(E)}


def alone_up_first(gate_up: str, down: str) -> dict[str, Array]:
    both = rows_up_first("both", "down")["both"]
    return {n.format(e): a[e] for n, a in ((gate_up, both), (down, DOWN)) for e in range(E)}


Made = dict[str, Array]
GUD = ("gate_proj", "up_proj", "down_proj")
W132 = ("w1", "w3", "w2")


@dataclass(frozen=True)
class Family:
    """One recipe: its layer's name, where experts lie in it, and what is special of its layouts.

    at: where fused tensors go; each: names of one expert's, if they are elsewhere. own: layouts
    that other families have in another way or not at all; lacks: shared ones that it has not.
    """

    model_type: str
    at: str
    each: str = ""
    words: tuple[str, str, str] = GUD
    own: dict[str, Callable[[str], Made]] = field(default_factory=dict)
    lacks: frozenset[str] = frozenset()
    config: dict[str, object] = field(default_factory=dict)
    first: int = 0

    def source(self) -> Made:
        return alone(
            *(f"{self.each or self.at + '.{}'}.{word}.weight" for word in self.words),
            first=self.first,
        )

    def layouts(self) -> dict[str, Made]:
        at = self.at
        shared = {
            "per-expert": self.source(),
            "fused": rows(f"{at}.gate_up_proj", f"{at}.down_proj"),
            "sglang": rows(f"{at}.w13_weight", f"{at}.w2_weight"),
            "stacked": apart(f"{at}.gate_proj", f"{at}.up_proj", f"{at}.down_proj"),
            "megablocks": flat(f"{at}.mlp.w1", f"{at}.mlp.v1", f"{at}.mlp.w2"),
            "kn": columns(f"{at}.gate_up_kn", f"{at}.down_kn"),
            "up-gate": rows_up_first(f"{at}.up_gate_proj", f"{at}.down_proj"),
        }
        own = {name: make(at) for name, make in self.own.items()}
        return {n: made for n, made in (shared | own).items() if n not in self.lacks}


def joined(kind: Callable[[str, str], Made], gate_up: str, down: str) -> Callable[[str], Made]:
    return lambda at: kind(f"{at}.{gate_up}", f"{at}.{down}")


VL = {"text_config": {"moe_num_experts": [E, E]}}
LAYER, MLP = "model.layers.0", "model.layers.0.mlp.experts"
TURNED = joined(columns, "gate_up_proj", "down_proj")
FAMILIES = {
    "aria": Family("aria", MLP, own={
        "hub": joined(columns, "fc1.weight", "fc2.weight"), "fused": TURNED}),
    "dbrx": Family("dbrx", "transformer.blocks.0.ffn.experts", words=("w1", "v1", "w2"), own={
        "fused": lambda at: flat(f"{at}.mlp.w1", f"{at}.mlp.v1", f"{at}.mlp.w2")},
        lacks=frozenset({"megablocks"})),
    "deepseek_v4": Family("deepseek_v4", "layers.0.ffn.experts", words=W132),
    "dots3_vision": Family(
        "dots3_note", "vision_tower.blocks.0.mlp.experts", words=("fc1", "fc3", "fc2")),
    "ernie4_5_vl_text": Family("ernie4_5_vl_moe", f"{LAYER}.mlp.text_moe.experts",
        f"{LAYER}.mlp.experts.{{}}", config=VL),
    "ernie4_5_vl_vision": Family("ernie4_5_vl_moe", f"{LAYER}.mlp.vision_moe.experts",
        f"{LAYER}.mlp.experts.{{}}", config=VL, first=E),
    "fused_on_the_hub": Family("mistral4", MLP),
    "gemma4": Family("gemma4", f"{LAYER}.experts"),
    "gpt_oss": Family("gpt_oss", MLP, own={
        "fused": joined(alternating_columns, "gate_up_proj", "down_proj"),
        "sglang": joined(alternating_rows, "w13_weight", "w2_weight")}),
    "granitemoe": Family("granitemoe", f"{LAYER}.block_sparse_moe.experts", own={
        "hub": lambda at: rows(f"{at.removesuffix('.experts')}.input_linear.weight",
                               f"{at.removesuffix('.experts')}.output_linear.weight")}),
    "grok1": Family("grok-1", f"{LAYER}.moe_block.experts",
        words=("linear", "linear_v", "linear_1")),
    "hunyuan": Family("hunyuan", MLP, own={"hub": lambda at: alone_up_first(
        f"{at}.{{}}.gate_and_up_proj.weight", f"{at}.{{}}.down_proj.weight")}),
    "inkling": Family("inkling_mm_model", MLP, own={
        "hub": joined(alternating_rows, "w13_weight", "w2_weight")}, lacks=frozenset({"sglang"})),
    "jamba": Family("jamba", f"{LAYER}.feed_forward.experts"),
    "jetmoe": Family("jetmoe", f"{LAYER}.mlp.experts", own={
        "fused": lambda at: rows(f"{at.removesuffix('.experts')}.input_linear.weight",
                                 f"{at.removesuffix('.experts')}.output_linear.weight")}),
    "kimi_k3": Family("kimi_k3", f"{LAYER}.block_sparse_moe.experts", words=W132),
    "lfm2_moe": Family("lfm2_moe", f"{LAYER}.feed_forward.experts", words=W132),
    "llama4": Family("llama4", f"{LAYER}.feed_forward.experts", own={"fused": TURNED}),
    "mistral_large4": Family("mistral_large4", "layers.0.experts", words=W132),
    "mixtral": Family("mixtral", f"{LAYER}.block_sparse_moe.experts", words=W132),
    "openai_privacy_filter": Family("openai_privacy_filter", MLP, own={"fused": TURNED}),
    "qwen3_moe": Family("qwen3_moe", MLP),
    "qwen3_vl_moe": Family("qwen3_vl_moe", MLP, own={"hub": TURNED}),
    "step3": Family("step3p5", MLP, f"{LAYER}.moe.experts.{{}}", own={"hub": lambda _: apart(
        *(f"{LAYER}.moe.{p}.weight" for p in GUD))}),
}  # fmt: skip
UNGATED = {"nemo_speechlm", "nemotron_h", "nllb_moe", "switch_transformers"}
EACH = [(name, layout) for name, family in FAMILIES.items() for layout in family.layouts()]


def specs(made: Made) -> dict[str, Spec]:
    return {n: ("BF16", a.shape, np.ascontiguousarray(a).tobytes()) for n, a in made.items()}


def test_the_table_has_each_layout_of_each_recipe():
    written = {
        (recipe.name, layout.name)
        for recipe in shipped_recipes()
        for layout in recipe.layouts
        if not layout.read_only and recipe.name not in UNGATED
    }
    assert written == set(EACH)
    for recipe in shipped_recipes():
        gated = any("gate" in layout.projections for layout in recipe.layouts)
        assert gated == (recipe.name not in UNGATED)


@pytest.mark.parametrize(("name", "layout"), EACH)
def test_gate_and_up_are_where_the_table_has_them(name: str, layout: str, tmp_path: Path):
    family = FAMILIES[name]
    source = specs(family.source())
    if name.startswith("ernie4_5_vl"):  # text and vision share one row of ids
        others = {"ernie4_5_vl_text", "ernie4_5_vl_vision"} - {name}
        source |= specs(FAMILIES[others.pop()].source())
    config = {"model_type": family.model_type} | family.config
    src = write_checkpoint(tmp_path / "src", source, config)
    result = moeconv.fuse(src, tmp_path / "out", layout=layout)
    assert name in {stack.recipe for stack in result.plan.stacks}
    wanted = specs(family.layouts()[layout])
    made = read_tensors(tmp_path / "out")
    assert {n: t for n, t in made.items() if n in wanted} == wanted
