"""Sizes that config.json says of one layer: each is held against its own, and against no other."""

from pathlib import Path

import pytest

import moeconv
from moeconv.errors import ConfigMismatch
from tests.families.plain import QWEN, planned
from tests.phantoms import phantom, rows


def nemotron(name: str, experts: int, width: int) -> str:
    return (
        f"{name}.mixer.experts.{{0-{experts - 1}}}.up_proj.weight BF16 {width},16\n"
        f"{name}.mixer.experts.{{0-{experts - 1}}}.down_proj.weight BF16 16,{width}\n"
    )


def blocks(*sizes: tuple[int, int] | None) -> list[dict[str, object]]:
    """A block for each layer: E and I, or something without experts."""
    return [
        {"block_type": "moe", "n_routed_experts": s[0], "moe_intermediate_size": s[1]}
        if s
        else {"block_type": "mamba"}
        for s in sizes
    ]


PUZZLE: dict[str, object] = {
    "model_type": "nemotron_h_puzzle",
    "n_routed_experts": 4,
    "moe_intermediate_size": 8,
    "hidden_size": 16,
}


def test_each_layer_of_a_puzzle_has_sizes_of_its_own(tmp_path: Path):
    """What is said of one layer counts; MTP has its own list, or what is said of all."""
    text = nemotron("model.layers.1", 4, 8) + nemotron("model.layers.3", 2, 24)
    text += nemotron("mtp.layers.1", 3, 40)
    right = blocks(None, (4, 8), None, (2, 24))
    config = PUZZLE | {"block_configs": right, "mtp_block_configs": blocks(None, (3, 40))}
    result = planned(tmp_path / "right", text, config)
    sizes = [(s.experts, s.width) for s in result.plan.stacks]
    assert sizes == [(4, 8), (2, 24), (3, 40)]
    for name, lie, at in (
        ("e", {"block_configs": blocks(None, (4, 8), None, (3, 24))}, "block_configs.3.n_routed"),
        ("i", {"block_configs": blocks(None, (4, 9), None, (2, 24))}, "block_configs.1.moe_inter"),
        ("m", {"mtp_block_configs": blocks(None, (4, 40))}, "mtp_block_configs.1.n_routed"),
        ("0", {"block_configs": blocks(None, (4, 8), None, (0, 24))}, "block_configs.3.n_routed"),
    ):
        with pytest.raises(ConfigMismatch, match=at):
            planned(tmp_path / name, text, config | lie)
    # without lists, what is said of all layers is held against each
    with pytest.raises(ConfigMismatch):
        planned(tmp_path / "none", text, PUZZLE)


def test_the_layers_of_mtp_are_not_the_main_ones(tmp_path: Path):
    text = nemotron("model.layers.0", 2, 24) + nemotron("mtp.layers.0", 4, 8)
    result = planned(tmp_path, text, PUZZLE | {"block_configs": blocks((2, 24))})
    assert [(s.experts, s.width) for s in result.plan.stacks] == [(2, 24), (4, 8)]


def test_the_last_experts_of_a_layer_are_missed_by_its_own_number(tmp_path: Path):
    text = nemotron("model.layers.0", 4, 8) + nemotron("model.layers.1", 2, 8)
    planned(tmp_path / "two", text, PUZZLE | {"block_configs": blocks((4, 8), (2, 8))})
    with pytest.raises(ConfigMismatch, match=r"block_configs\.1\.n_routed_experts"):
        planned(tmp_path / "three", text, PUZZLE | {"block_configs": blocks((4, 8), (3, 8))})


TWO_LAYERS = QWEN + "\n" + QWEN.replace("layers.0", "layers.1").replace("{0-11}", "{0-5}")


@pytest.mark.parametrize("form", ["per_layer_config", "list"])
def test_a_list_with_a_number_of_experts_for_each_layer(form: str, tmp_path: Path):
    def config(first: int, second: int) -> dict[str, object]:
        sizes: dict[str, object] = {"num_experts": [first, second]}
        if form != "list":  # of transformers: only layers that differ from the rest
            sizes = {"num_experts": first, "per_layer_config": {"1": {"num_experts": second}}}
        return {"model_type": "qwen3_moe", "num_hidden_layers": 2} | sizes

    result = planned(tmp_path / "right", TWO_LAYERS, config(12, 6))
    assert [s.experts for s in result.plan.stacks] == [12, 6]
    experts_alone = "\n".join(row for row in TWO_LAYERS.splitlines() if "mlp.gate" not in row)
    with pytest.raises(ConfigMismatch, match=r"the tensors have 6 experts"):
        planned(tmp_path / "second", experts_alone, config(12, 7))
    with pytest.raises(ConfigMismatch, match=r"the tensors have 12 experts"):
        planned(tmp_path / "first", experts_alone, config(13, 6))


def test_a_list_of_main_layers_says_nothing_of_those_of_mtp(tmp_path: Path):
    text = TWO_LAYERS + "\n" + QWEN.replace("model.layers.0", "mtp.layers.1")
    config = {"model_type": "qwen3_next", "num_hidden_layers": 2, "num_experts": [12, 6]}
    assert [s.experts for s in planned(tmp_path, text, config).plan.stacks] == [12, 6, 12]


@pytest.mark.parametrize("layers", [{}, {"num_hidden_layers": 3}])
def test_a_list_of_another_length_is_not_one_of_layers(layers: dict[str, object], tmp_path: Path):
    config = {"model_type": "qwen3_moe", "num_experts": [64, 32]} | layers
    text = f"{TWO_LAYERS}\nmodel.layers.2.input_layernorm.weight BF16 16"
    assert len(planned(tmp_path, text, config).plan.stacks) == 2


def test_the_layers_of_dots3_vision_are_compared_with_their_list(tmp_path: Path):
    text = "\n".join(
        f"vision_encoder.blocks.{n}.mlp.experts.{{0-{e - 1}}}.fc{p}.weight BF16 {shape}"
        for n, e in ((1, 4), (2, 8))
        for p, shape in ((1, "8,16"), (3, "8,16"), (2, "16,8"))
    )
    text += "\nvision_encoder.blocks.0.norm1.weight BF16 16"
    for name, pyramid in (("right", [-1, 4, 8]), ("lie", [-1, 4, 9]), ("dense", [-1, 4, -1])):
        vision = {"num_hidden_layers": 3, "pyramid_num_routed": pyramid, "num_local_experts": 64}
        config: dict[str, object] = {"model_type": "dots3_note", "vision_config": vision}
        if name == "right":
            assert [s.experts for s in planned(tmp_path, text, config).plan.stacks] == [4, 8]
        else:
            with pytest.raises(ConfigMismatch, match=r"pyramid_num_routed\.2"):
                planned(tmp_path / name, text, config)


@pytest.mark.parametrize(
    "more",
    [
        {"intermediate_size": [64, 64]},
        {"per_layer_config": {"0": {"intermediate_size": 96}}},
    ],
)
def test_a_dense_layer_s_width_is_not_that_of_the_experts(more: dict[str, object], tmp_path: Path):
    """The first key of a width counts, whatever the others say of a layer."""
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 2, "moe_intermediate_size": 8}
    text = "\n".join(
        f"model.layers.0.mlp.experts.{{0-1}}.{p}_proj.weight BF16 {shape}"
        for p, shape in (("gate", "8,16"), ("up", "8,16"), ("down", "16,8"))
    )
    text += "\nmodel.layers.1.input_layernorm.weight BF16 16"
    src = phantom(tmp_path / "src", rows(text), config | more)
    moeconv.fuse(src, tmp_path / "out", dry_run=True)
    wrong = phantom(tmp_path / "wrong", rows(text), config | more | {"moe_intermediate_size": 9})
    with pytest.raises(ConfigMismatch):
        moeconv.fuse(wrong, tmp_path / "out", dry_run=True)
