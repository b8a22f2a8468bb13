"""Every tiny model of transformers, in both of its forms: found, planned and accounted for."""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.errors import ExpertOutOfRange, NoExperts, NoPerExpertForm, UnknownFamily
from tests.phantoms import Shape, phantom

FAMILIES = Path(__file__).resolve().parents[1] / "data" / "families"
MODEL_TYPES = sorted(path.stem for path in FAMILIES.glob("*.json"))
# No fused form: every expert stays a module of its own
ALONE = {"switch_transformers", "nllb-moe"}
# No routed experts: vectors of an embedding, picked by product keys; a dense language model; heads
# of which the caller says which one an image is for
NONE = {"doge": NoExperts, "cosmos3_omni": NoExperts, "vitpose_backbone": UnknownFamily}
# transformers 5.23 makes gate and up for the zero experts too, down only for the real ones; no
# published checkpoint has that, and loading one fails there
HALVES = {"longcat_flash"}


def family(model_type: str) -> dict[str, Any]:
    """What the tiny model of transformers has, as written in tests/data/families."""
    doc: dict[str, Any] = json.loads((FAMILIES / f"{model_type}.json").read_bytes())
    return {**doc, "config": doc["config"] or {"model_type": model_type}}


def shapes(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    return {name: (dtype, tuple(shape)) for name, (dtype, shape) in tensors.items()}


def routed(name: str) -> bool:
    """Whether a tensor is a routed expert's, told by hand and not by recipes."""
    return bool(
        re.search(r"(?<!self_attention)\.experts\.(?!e_score|router|post_expert_norm)", name)
        or re.search(r"(block_sparse_moe|layers\.\d+\.mlp)\.(in|out)put_linear\.weight", name)
        or re.search(r"\.moe\.(gate|up|down)_proj\.weight", name)
    )


@pytest.mark.parametrize("form", ["original", "fused"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_found_planned_and_accounted_for(model_type: str, form: str, tmp_path: Path):
    doc = family(model_type)
    tensors = shapes(doc[form])
    if not any(map(routed, tensors)) and model_type not in NONE:
        tensors = shapes(doc["original"])
    src = phantom(tmp_path / "src", tensors, doc["config"])
    if model_type in NONE:
        with pytest.raises(NONE[model_type]):
            moeconv.fuse(src, tmp_path / "out", dry_run=True)
        return
    if model_type in HALVES:
        if form == "original":
            with pytest.raises(ExpertOutOfRange):
                moeconv.fuse(src, tmp_path / "out", dry_run=True)
        return
    plan = moeconv.fuse(src, tmp_path / "out", dry_run=True).plan
    assert not any("named like fused experts" in note for note in plan.notes)
    held = {entry.source for entry in plan.ledger if entry.verb != "copied"}
    made = {t.name for f in plan.files for t in f.tensors}
    experts = {name for name in tensors if routed(name)}
    already = {t.name for f in plan.files for t in f.tensors if t.expert}
    assert experts == held | (already & tensors.keys() & experts)
    assert made >= tensors.keys() - experts
    if model_type not in ALONE:
        assert not any(re.search(r"experts\.(expert_)?\d", name) for name in made)
    sizes = sum(f.nbytes for f in plan.ledger)
    assert plan.tensor_bytes == sizes == sum(t.nbytes for f in plan.files for t in f.tensors)


@pytest.mark.parametrize("model_type", [m for m in MODEL_TYPES if m not in NONE.keys() | HALVES])
def test_each_expert_alone(model_type: str, tmp_path: Path):
    """Whatever the family publishes, it can be split into single matrices."""
    doc = family(model_type)
    src = phantom(tmp_path / "src", shapes(doc["fused"]), doc["config"])
    with contextlib.suppress(NoPerExpertForm):
        moeconv.unfuse(src, tmp_path / "out", dry_run=True)
    plan = moeconv.unfuse(src, tmp_path / "out", layout="per-expert", dry_run=True).plan
    experts = sum(s.experts for s in plan.stacks)
    held = [t.expert for f in plan.files for t in f.tensors if t.expert]
    alone = [e for e in held if e.component == "weight"]
    assert experts
    assert len(alone) in {2 * experts, 3 * experts}
    assert {len(e.experts) * len(e.projections) for e in held} == {1}
