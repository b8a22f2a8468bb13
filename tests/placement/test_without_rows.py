"""Maps that leave layers out, have no rows at all, or are within an engine's file of options."""

from __future__ import annotations

from pathlib import Path

import pytest

import moeconv
from moeconv.core.strict_json import Json
from moeconv.errors import BadPlacementFile, UsageProblem
from moeconv.placement.formats import parse_map
from moeconv.placement.model import MoeLayers
from moeconv.placement.resolve import resolve
from tests.badinput.builders import STACK, Tensors, qwen, write
from tests.cli.run import moeconv as command
from tests.helpers import read_tensors

ROW = [0, 1, 2, 3, 5, 4, 5, 6, 7, 3]
LAYERS = MoeLayers(8, (0, 1, 2), (3,), 3)
OPTIONS: dict[str, Json] = {
    "num_slots": 10,
    "initial_global_assignments": {str(n): list(ROW) for n in range(3)},
    "layer_updates_per_iter": 0,
}


@pytest.mark.parametrize("path", ["moe_config.load_balancer", "moe_load_balancer"])
def test_options_within_the_engines_own_file(path: str) -> None:
    doc: Json = OPTIONS
    for member in reversed(path.split(".")):
        doc = {"backend": "WIDEEP", member: doc}
    assert parse_map(doc, where="x") == parse_map(OPTIONS, where="x")


def test_options_elsewhere_are_not_a_map() -> None:
    with pytest.raises(BadPlacementFile, match="not a placement map"):
        parse_map({"other": OPTIONS}, where="x")


def test_slots_without_rows_have_the_engines_default() -> None:
    raw = parse_map({"num_slots": 10, "layer_updates_per_iter": 1}, where="x")
    found, assumed = resolve(raw, LAYERS, ep_size=2)
    # TensorRT-LLM: (rank * E // EP + slot) % E
    assert found.physical_to_logical == ((0, 1, 2, 3, 4, 4, 5, 6, 7, 0),) * 4
    assert found.layers == (0, 1, 2, 3)
    assert "default" in assumed


def test_they_need_the_number_of_ranks(tmp_path: Path) -> None:
    raw = parse_map({"num_slots": 10}, where="x")
    with pytest.raises(UsageProblem, match="--ep"):
        resolve(raw, LAYERS)
    (tmp_path / "online.yaml").write_text("num_slots: 10\n")
    done = command("placement", "show", tmp_path / "online.yaml")
    assert done.code == 2
    assert "--source" in done.err


@pytest.mark.parametrize("slots", [0, -1, "10", 10**9])
def test_a_wrong_number_of_slots(slots: Json) -> None:
    with pytest.raises(BadPlacementFile, match="not a placement map"):
        parse_map({"num_slots": slots}, where="x")


# --- layers that a map leaves out ---------------------------------------------------------------
def _with_mtp(root: Path, experts: int) -> Path:
    """One layer of 8 experts, and layer 1 of `experts`, which the map does not have."""
    other: Tensors = {
        name.replace("layers.0", "layers.1"): spec
        for name, spec in qwen(experts).items()
        if STACK in name or name.endswith("mlp.gate.weight")
    }
    config = {
        "model_type": "deepseek_v3",
        "num_hidden_layers": 1,
        "num_nextn_predict_layers": 1,
    }
    return write(root, {**qwen(8), **other}, config=config, index=False)


def _slots(out: Path) -> dict[str, int]:
    """The slots on rank 0 by layer."""
    tensors = {name: shape for name, (_, shape, _) in read_tensors(out).items()}
    return {n.split(".")[2]: s[0] for n, s in tensors.items() if n.endswith("experts.down_proj")}


def _rank_0(out: Path, tmp: Path) -> dict[str, int]:
    tmp.mkdir()
    for path in out.glob("rank-00000-*.safetensors"):
        (tmp / path.name).write_bytes(path.read_bytes())
    return _slots(tmp)


@pytest.mark.parametrize("options", [{}, {"redundant": 2}])
def test_a_layer_that_a_map_leaves_out_has_as_many_slots(
    tmp_path: Path, options: dict[str, int]
) -> None:
    src = _with_mtp(tmp_path / "src", 8)
    result = moeconv.shard(
        src, tmp_path / "out", ep_size=2, placement='{"initial_global_assignments": {"0": '
        f"{ROW}}}}}", **options
    )  # fmt: skip
    assert _rank_0(tmp_path / "out", tmp_path / "rank") == {"0": 5, "1": 5}
    assert any("trivial: 5 slots" in note for note in result.plan.notes)
    moeconv.merge(tmp_path / "out", tmp_path / "back")
    assert read_tensors(tmp_path / "back") == read_tensors(src)
