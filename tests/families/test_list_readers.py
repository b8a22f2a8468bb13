"""Each list is read as its own reader reads it; what moeconv does not understand is said."""

import json
import time
from pathlib import Path

import pytest

import moeconv
from moeconv.api.run import Result
from tests.phantoms import phantom, rows

STACK = "model.layers.{}.mlp.experts"
PROJECTIONS = ("gate", "up", "down")
ALONE = "\n".join(
    f"{STACK.format(n)}.{{0-2}}.{p}_proj.weight BF16 4,4" for n in (0, 1) for p in PROJECTIONS
)
FUSED = "\n".join(
    f"{STACK.format(n)}.gate_up_proj BF16 3,8,4\n{STACK.format(n)}.down_proj BF16 3,4,4"
    for n in (0, 1)
)
STEP = "\n".join(
    f"model.layers.3.moe.{p}_proj.weight BF16 {s}"
    for p, s in (("gate", "2,4,6"), ("up", "2,4,6"), ("down", "2,6,4"))
)
GRANITE = """model.layers.0.block_sparse_moe.input_linear.weight BF16 2,8,6
model.layers.0.block_sparse_moe.output_linear.weight BF16 2,6,4"""
JET = """model.layers.0.mlp.input_linear.weight BF16 2,8,6
model.layers.0.mlp.output_linear.weight BF16 2,6,4"""
MIXTRAL = "\n".join(
    f"model.layers.0.block_sparse_moe.experts.{{0-2}}.{w}.weight BF16 4,4"
    for w in ("w1", "w2", "w3")
)
KIMI = "\n".join(f"language_model.{row}" for row in ALONE.splitlines())
QWEN = {"model_type": "qwen3_moe", "num_experts": 3}


def alone(layer: int, experts: range = range(3)) -> list[str]:
    """A stack's single matrices, in natural order."""
    return [f"{STACK.format(layer)}.{e}.{p}_proj" for e in experts for p in ("down", "gate", "up")]


def converted(
    root: Path,
    text: str,
    quantization: dict[str, object],
    config: dict[str, object] | None = None,
    *,
    layout: str = "fused",
) -> Result:
    src = phantom(
        root / "src", rows(text), (config or QWEN) | {"quantization_config": quantization}
    )
    verb = moeconv.unfuse if layout == "per-expert" else moeconv.fuse
    return verb(src, root / "out", layout=layout)


def now(result: Result) -> dict[str, object]:
    """The `quantization_config` of an output."""
    config = json.loads((result.out / "config.json").read_bytes())
    found: dict[str, object] = config["quantization_config"]
    return found


def texts_now(result: Result, key: str) -> list[str]:
    """A list of it."""
    found = now(result)[key]
    assert isinstance(found, list)
    return found


def notes(result: Result) -> list[str]:
    return [note for note in result.plan.notes if "config.json" in note]


@pytest.mark.parametrize("place", ["ignore", "exclude_modules", "ignored_layers"])
def test_the_name_of_joined_experts_becomes_each_of_them(place: str, tmp_path: Path):
    result = converted(tmp_path, FUSED, {place: [STACK.format(0)]}, layout="per-expert")
    assert texts_now(result, place) == alone(0)


def test_the_name_of_joined_experts_becomes_that_of_the_module_within(tmp_path: Path):
    result = converted(tmp_path, FUSED, {"ignore": [STACK.format(0)]}, layout="megablocks")
    assert texts_now(result, "ignore") == [f"{STACK.format(0)}.mlp"]


def test_the_name_of_joined_experts_stays_where_they_stay_joined(tmp_path: Path):
    result = converted(tmp_path, FUSED, {"ignore": [STACK.format(0)]}, layout="sglang")
    assert texts_now(result, "ignore") == [STACK.format(0)]
    assert notes(result) == []


def test_a_format_of_joined_experts_becomes_that_of_each(tmp_path: Path):
    src = phantom(tmp_path / "src", rows(FUSED), QWEN)
    fp8, fp4 = {"quant_algo": "FP8"}, {"quant_algo": "NVFP4"}
    layers = {STACK.format(0): fp8, STACK.format(1): fp4}
    (src / "hf_quant_config.json").write_text(json.dumps({"quantized_layers": layers}))
    moeconv.unfuse(src, tmp_path / "out", layout="per-expert")
    made = json.loads((tmp_path / "out" / "hf_quant_config.json").read_bytes())
    wanted = dict.fromkeys(alone(0), fp8) | dict.fromkeys(alone(1), fp4)
    assert made == {"quantized_layers": wanted}


def test_a_name_that_means_nothing_yet_is_reported(tmp_path: Path):
    """One that experts have where they are joined, of experts that are not."""
    result = converted(tmp_path, ALONE, {"ignore": [STACK.format(0), "lm_head"]})
    assert texts_now(result, "ignore") == [STACK.format(0), "lm_head"]
    (note,) = notes(result)
    assert f"`{STACK.format(0)}` left as written" in note


@pytest.mark.parametrize("place", ["modules_to_not_convert", "llm_int8_skip_modules"])
@pytest.mark.parametrize(
    ("texts", "layout", "left"),
    [
        (["down_proj"], "sglang", "`down_proj` left as written"),
        (["gate_proj", "up_proj"], "kn", "`gate_proj` and 1 more left as written"),
        (["gate_proj", "up_proj"], "fused", ""),  # which `up_proj` ends
        ([f"{STACK.format(0)}.{e}" for e in range(3)], "fused", "and 2 more left as written"),
        (["model.layers.0"], "fused", ""),
        ([r"model.layers.0.mlp.experts.\d+"], "fused", "left as written"),
    ],
)
def test_transformers_takes_ends_of_names_and_all_that_is_in_a_module(
    place: str, texts: list[str], layout: str, left: str, tmp_path: Path
):
    result = converted(tmp_path, ALONE, {"quant_method": "fp8", place: texts}, layout=layout)
    assert texts_now(result, place) == texts
    assert [left in note for note in notes(result)] == [True] * bool(left)


def test_a_suffix_that_half_a_new_name_has_is_reported(tmp_path: Path):
    result = converted(tmp_path, ALONE, {"modules_to_not_convert": ["up_proj"]})
    (note,) = notes(result)
    assert "names only some experts of a stack" in note


@pytest.mark.parametrize(
    ("texts", "left"),
    [
        (["down"], "`down` left as written"),
        (["0.mlp.experts.1."], "names only some experts"),
        (["experts.0.down", "experts.1.down", "experts.2"], "names only some experts"),
        (["layers.0.mlp"], ""),
        (["s.0.", "s.1.", "s.2."], ""),  # `layers.0.` as well
    ],
)
def test_awq_takes_parts_of_names(texts: list[str], left: str, tmp_path: Path):
    quantization = {"quant_method": "awq", "modules_to_not_convert": texts}
    result = converted(tmp_path, ALONE, quantization, layout="sglang")
    assert texts_now(result, "modules_to_not_convert") == texts
    assert [left in note for note in notes(result)[:1]] == [True] * bool(left)


def test_the_name_of_a_renamed_block_is_left_and_reported(tmp_path: Path):
    """Step 3's experts are in `moe` on the Hub, in `mlp.experts` where they are joined."""
    lists = {"modules_to_not_convert": ["model.layers.3.moe"]}
    result = converted(tmp_path, STEP, lists, {"model_type": "step3p5"})
    assert texts_now(result, "modules_to_not_convert") == ["model.layers.3.moe"]
    assert "`model.layers.3.moe` left as written" in notes(result)[0]


def test_ends_of_names_without_the_word_experts(tmp_path: Path):
    lists = {"llm_int8_skip_modules": ["input_linear", "output_linear"]}
    result = converted(tmp_path, GRANITE, lists, {"model_type": "granitemoe"})
    assert texts_now(result, "llm_int8_skip_modules") == ["input_linear", "output_linear"]
    assert "`input_linear` and 1 more left as written" in notes(result)[0]


def test_a_glob_with_a_class(tmp_path: Path):
    lists = {"exclude_modules": ["model.layers.[!1].block_sparse_moe.input_*"]}
    result = converted(tmp_path, GRANITE, lists, {"model_type": "granitemoe"})
    assert texts_now(result, "exclude_modules") == lists["exclude_modules"]
    assert "left as written" in notes(result)[0]


def test_a_text_where_a_list_is_usual(tmp_path: Path):
    """It is one of a list of one, if it stays one."""
    result = converted(tmp_path, FUSED, {"targets": f"{STACK.format(0)}.gate_up_proj"}, layout="kn")
    assert now(result)["targets"] == f"{STACK.format(0)}.gate_up_kn"


@pytest.mark.parametrize(
    ("text", "model_type", "quantization", "told"),
    [
        # understood, but of no new name
        (ALONE, "", {"ignore": [r"re:^(?!.*self_attn).*\d+\.(gate|up|down)_proj$"]}, "(?!.*self"),
        (ALONE, "", {"dynamic": {r"-:^(?!.*self_attn).*experts\.\d+": {}}}, "(?!.*self"),
        (STEP, "step3p5", {"ignore": [r"re:.*moe\.(?!gate\b).*"]}, "moe"),
        # a text would have to be a list
        (STEP, "step3p5", {"targets": r"re:.*\.moe\..*"}, "moe"),
        # to its reader names alone, and of no rule that is known
        (STEP, "step3p5", {"targets": ["*.moe.*"]}, "moe"),
        (STEP, "step3p5", {"unheard_of": [["moe.gate_proj"]]}, "moe.gate_proj"),
        (STEP, "step3p5", {"unheard_of": ["gate_proj"]}, "gate_proj"),
        (STEP, "step3p5", {"ignore": ["model.layers.3.moe"]}, "layers.3.moe"),
        (STEP, "step3p5", {"modules_to_not_convert": [["moe.gate_proj"]]}, "moe.gate_proj"),
        (
            STEP,
            "step3p5",
            {"quant_method": "compressed-tensors", "ignore": ["*.moe.*"]},
            "*.moe.*",
        ),
        # a part of no name, which transformers takes for a pattern
        (
            STEP,
            "step3p5",
            {"quant_method": "awq", "modules_to_not_convert": [r".*\.moe\..*"]},
            "moe",
        ),
        # other names than the checkpoint's
        (MIXTRAL, "mixtral", {"ignore": [r"re:model\.layers\.\d+\.mlp\.experts\..*"]}, "experts"),
        (MIXTRAL, "mixtral", {"ignore": ["model.layers.0.mlp.experts.0.w1"]}, "experts"),
        (KIMI, "kimi_k25", {"ignore": [r"re:model\.layers\.\d+\.mlp\.experts\.\d+.*"]}, "experts"),
        (KIMI, "kimi_k25", {"ignore": [r"re:model\.layers\..*\.(gate|up)_proj"]}, "(gate|up)"),
        (KIMI, "kimi_k25", {"ignore": alone(0)}, "experts.0.down_proj"),
    ],
)
def test_what_is_not_understood_is_reported(
    text: str, model_type: str, quantization: dict[str, object], told: str, tmp_path: Path
):
    config = {"model_type": model_type, "n_routed_experts": 3} if model_type else None
    if config and model_type != "kimi_k25":
        config.pop("n_routed_experts")
    result = converted(tmp_path, text, quantization, config)
    assert now(result) == quantization
    (note,) = notes(result)
    assert told in note
    assert "left as written" in note


@pytest.mark.parametrize(
    "quantization",
    [
        {"ignore": ["lm_head", "re:.*self_attn.*", r"re:.*\.gate$", "re:visual.*"]},
        {"modules_to_not_convert": ["lm_head", "gate", "model.layers.0.self_attn", r".*norm"]},
        {"quant_method": "awq", "modules_to_not_convert": ["visual", "mlp.gate."]},
        {"exclude_modules": ["*self_attn*", "lm_head", "model.layers.[01].mlp.gate"]},
        {"config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float"}}}},
        {"unheard_of": ["q_proj", "k.v"], "meta": {"uri": "https://a.b/c.d", "of": ["x:1.2"]}},
        {"dynamic": {"-:.*self_attn.*": {}}},
    ],
)
def test_what_is_about_other_modules_is_not_reported(
    quantization: dict[str, object], tmp_path: Path
):
    result = converted(tmp_path, ALONE, quantization)
    assert now(result) == quantization
    assert notes(result) == []


@pytest.mark.parametrize("text", [r"re:.*\.mlp$", r"re:.*layers\.0$"])
def test_a_module_around_experts_that_is_not_called_so_is_not_theirs(text: str, tmp_path: Path):
    """Its reader asks for single modules; a router is in it, too."""
    result = converted(tmp_path, JET, {"ignore": [text]}, {"model_type": "jetmoe"}, layout="sglang")
    assert texts_now(result, "ignore") == [text]
    assert notes(result) == []


def test_what_patterns_mean_together_is_of_the_budget(tmp_path: Path):
    """Each means all of the experts, of each of the stacks."""
    many = "\n".join(
        f"{STACK.format(n)}.{{0-255}}.{p}_proj.weight BF16 1,1"
        for n in range(20)
        for p in PROJECTIONS
    )
    texts = [f"re:.*experts.*(a{n})?" for n in range(3000)]
    config = {"model_type": "qwen3_moe", "num_experts": 256}
    src = phantom(tmp_path / "src", rows(many), config | {"quantization_config": {"ignore": texts}})
    started = time.process_time()
    plan = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan
    assert time.process_time() - started < 10
    assert any("and 2,999 more left as written" in note for note in plan.notes)
