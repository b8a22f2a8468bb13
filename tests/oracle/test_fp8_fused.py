"""Fused fp8 as transformers itself writes it: one number for an expert's gate and up, or for each.

Its experts have activation scales `[E]`, and where a matrix has one scale, grids of one block:
`[E, 2, 1]` in memory, `[E, 1, 1]` where it quantised gate and up as one matrix.
"""

from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import moeconv
from tests.helpers import tree_sha256
from tests.oracle.tiny import tiny_model
from tests.oracle.torchbytes import bits, file_bits, file_tensors, model_bits

pytestmark = pytest.mark.usefixtures("keeps_fp8")
STACK = "model.layers.1.mlp.experts"
SCHEMES = [("static", (8, 8)), ("dynamic", None), ("static", None)]


def saved(
    root: Path, scheme: str, block: tuple[int, int] | None, model_type: str = "qwen3_moe"
) -> PreTrainedModel:
    """A tiny model that transformers quantised and saved in its own layout; no two scales alike."""
    plain = tiny_model(model_type)
    plain.save_pretrained(root / "plain")
    config = transformers.FineGrainedFP8Config(activation_scheme=scheme, weight_block_size=block)
    model = type(plain).from_pretrained(root / "plain", quantization_config=config)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.named_parameters()):
        if ".experts." in name and "scale" in name:
            parameter.data = torch.rand(parameter.shape, generator=generator) + 0.5
    model.save_pretrained(root / "src", save_original_format=False)
    return model


@pytest.mark.parametrize(("scheme", "block"), SCHEMES)
def test_it_is_there_already(scheme: str, block: tuple[int, int] | None, tmp_path: Path):
    saved(tmp_path, scheme, block)
    plan = moeconv.fuse(tmp_path / "src", tmp_path / "out").plan
    assert any("already `fused`" in note for note in plan.notes)
    assert file_bits(tmp_path / "out") == file_bits(tmp_path / "src")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


@pytest.mark.parametrize(("scheme", "block"), SCHEMES)
def test_saved_half_apart(scheme: str, block: tuple[int, int] | None, tmp_path: Path):
    """By default transformers takes its weights apart again, and leaves their scales fused."""
    model = saved(tmp_path, scheme, block)
    halves = tmp_path / "halves"
    model.save_pretrained(halves, max_shard_size=20_000)
    names = file_tensors(halves).keys()
    assert {f"{STACK}.0.up_proj.weight", f"{STACK}.gate_up_proj_scale_inv"} <= names
    moeconv.fuse(halves, tmp_path / "fused")
    assert file_bits(tmp_path / "fused") == file_bits(tmp_path / "src")
    moeconv.unfuse(halves, tmp_path / "alone")
    moeconv.unfuse(tmp_path / "src", tmp_path / "from-src")
    assert file_bits(tmp_path / "alone") == file_bits(tmp_path / "from-src")
    moeconv.shard(halves, tmp_path / "ranks", ep_size=2, redundant=2, layout="sglang")
    moeconv.merge(tmp_path / "ranks", tmp_path / "ranks-back")
    assert tree_sha256(tmp_path / "ranks-back") == tree_sha256(halves)
    prints = {moeconv.fingerprint(root) for root in (halves, tmp_path / "src", tmp_path / "ranks")}
    for name in ("fused", "alone"):
        out = tmp_path / name
        assert moeconv.verify(out, level="structure").problems == ()
        assert moeconv.verify(out, level="source", source=halves).problems == ()
        moeconv.unfuse(out, tmp_path / f"{name}-back")
        assert tree_sha256(tmp_path / f"{name}-back") == tree_sha256(halves)
        prints.add(moeconv.fingerprint(out))
    assert len(prints) == 1
    assert {d.mark for d in moeconv.diff(halves, tmp_path / "src")} == {"="}


@pytest.mark.parametrize(
    "model_type", ["mixtral", "minimax_m2", "deepseek_v3", "deepseek_v4", "jamba"]
)
def test_half_apart_in_other_families(model_type: str, tmp_path: Path):
    """Where transformers renames experts on loading, it renames their fused scales back, too."""
    model = saved(tmp_path, "static", None, model_type)
    model.save_pretrained(tmp_path / "halves")
    plan = moeconv.unfuse(tmp_path / "halves", tmp_path / "alone").plan
    assert {s.origin_layout for s in plan.stacks} == {"half-apart"}
    moeconv.unfuse(tmp_path / "src", tmp_path / "whole", layout="per-expert")
    alone, whole = (
        sorted(b for n, b in file_bits(tmp_path / root).items() if ".experts." in n)
        for root in ("alone", "whole")
    )
    assert alone == whole  # but for the names of the blocks around them
    moeconv.unfuse(tmp_path / "alone", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "halves")


@pytest.mark.parametrize(("scheme", "block"), SCHEMES)
@pytest.mark.parametrize("model_type", ["granitemoe", "step3p7", "inkling2"])
def test_weights_under_the_hubs_names_and_scales_under_others(
    model_type: str, scheme: str, block: tuple[int, int] | None, tmp_path: Path
):
    """Where the Hub's layout is fused itself, or stacked, transformers renames weights only."""
    model = saved(tmp_path, scheme, block, model_type)
    model.save_pretrained(tmp_path / "halves")
    plan = moeconv.fuse(tmp_path / "halves", tmp_path / "out").plan
    assert {s.origin_layout for s in plan.stacks} == {"half-apart"}
    made, whole = (
        sorted(b for n, b in file_bits(tmp_path / root).items() if ".experts." in n)
        for root in ("out", "src")
    )
    assert made == whole
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "halves")


def test_blocks_of_transposed_weights_are_transposed(tmp_path: Path):
    """Llama 4: the block is one of the tensor as it lies, [K, O]."""
    saved(tmp_path, "dynamic", (8, 8), "llama4_text")
    moeconv.unfuse(tmp_path / "src", tmp_path / "out")
    whole, alone = file_tensors(tmp_path / "src"), file_tensors(tmp_path / "out")
    scales = [n for n in whole if n.endswith("experts.gate_up_proj_scale_inv")]
    assert scales
    for name in scales:
        stack = name.removesuffix(".gate_up_proj_scale_inv")
        for e, grid in enumerate(whole[name]):
            for half, rows in zip(("gate", "up"), grid.T.chunk(2), strict=True):
                assert bits(alone[f"{stack}.{e}.{half}_proj.weight_scale_inv"]) == bits(rows)
            down = whole[f"{stack}.down_proj_scale_inv"][e].T
            assert bits(alone[f"{stack}.{e}.down_proj.weight_scale_inv"]) == bits(down)
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


@pytest.mark.parametrize(("scheme", "block"), SCHEMES)
def test_every_expert_gets_its_scales(scheme: str, block: tuple[int, int] | None, tmp_path: Path):
    model = saved(tmp_path, scheme, block)
    moeconv.unfuse(tmp_path / "src", tmp_path / "out")
    whole, alone = file_tensors(tmp_path / "src"), file_tensors(tmp_path / "out")
    width = model.config.moe_intermediate_size
    for e in range(model.config.num_experts):
        for name, half in (("gate", slice(None, width)), ("up", slice(width, None))):
            one = f"{STACK}.{e}.{name}_proj"
            assert bits(alone[f"{one}.weight"]) == bits(whole[f"{STACK}.gate_up_proj"][e, half])
            grid = whole[f"{STACK}.gate_up_proj_scale_inv"][e]
            rows = grid if block is None else grid.chunk(2)[name == "up"]
            assert bits(alone[f"{one}.weight_scale_inv"]) == bits(rows)
            if scheme == "static":
                both = whole[f"{STACK}.gate_up_proj_activation_scale"][e]
                assert bits(alone[f"{one}.activation_scale"]) == bits(both)
        one = f"{STACK}.{e}.down_proj"
        for part in ("", "_scale_inv", *(["_activation_scale"] if scheme == "static" else [])):
            name = {"": "weight", "_scale_inv": "weight_scale_inv"}.get(part, "activation_scale")
            assert bits(alone[f"{one}.{name}"]) == bits(whole[f"{STACK}.down_proj{part}"][e])
    assert moeconv.verify(tmp_path / "out", level="source", source=tmp_path / "src").ok
    assert moeconv.fingerprint(tmp_path / "out") == moeconv.fingerprint(tmp_path / "src")
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


@pytest.mark.parametrize(("scheme", "block"), SCHEMES)
@pytest.mark.parametrize("layout", ["fused", "per-expert", "sglang"])
def test_by_ranks_and_back(scheme: str, block: tuple[int, int] | None, layout: str, tmp_path: Path):
    saved(tmp_path, scheme, block)
    moeconv.shard(tmp_path / "src", tmp_path / "out", ep_size=4, redundant=4, layout=layout)
    report = moeconv.verify(tmp_path / "out", level="source", source=tmp_path / "src")
    assert report.problems == ()
    moeconv.merge(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(tmp_path / "src")


def test_a_scale_for_each_matrix_loads_as_it_did_per_expert(tmp_path: Path):
    """transformers can't load its own `[E, 1, 1]` again: what it holds is `[E, 2, 1]`."""
    model = saved(tmp_path, "dynamic", None)
    moeconv.unfuse(tmp_path / "src", tmp_path / "alone")
    foreign = tmp_path / "foreign"  # the same tensors without our manifest: per expert from abroad
    foreign.mkdir()
    for path in (tmp_path / "alone").glob("*.*"):
        if path.name != "moeconv.json":
            (foreign / path.name).write_bytes(path.read_bytes())
    moeconv.fuse(foreign, tmp_path / "out")
    scale = file_tensors(tmp_path / "out")[f"{STACK}.gate_up_proj_scale_inv"]
    assert scale.shape == (model.config.num_experts, 2, 1)
    # in attention, a scale is `[1, 1]` on disk and a number in memory: not ours to mend
    one, other = (
        type(model).from_pretrained(root, ignore_mismatched_sizes=True)
        for root in (foreign, tmp_path / "out")
    )
    before, after = (
        {n: b for n, b in model_bits(m).items() if ".experts." in n} for m in (one, other)
    )
    assert before == after
    assert before[f"{STACK}.gate_up_proj_scale_inv"] == bits(scale)
