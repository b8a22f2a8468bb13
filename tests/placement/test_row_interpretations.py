"""Rows without a key whose count fits two interpretations are refused until the user says which."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeconv.api import shard
from moeconv.core.strict_json import Json
from moeconv.errors import BadPlacement, UsageProblem
from moeconv.placement.ascend import ASCEND
from moeconv.placement.base import RawMap
from moeconv.placement.files import read_map
from moeconv.placement.formats import parse_map
from moeconv.placement.model import MoeLayers
from moeconv.placement.resolve import resolve
from moeconv.placement.trtllm import TRTLLM
from tests.badinput.builders import write
from tests.badinput.checks import holds
from tests.cli.run import moeconv
from tests.placement.maps import SMALL, A, B, C, D, by_id

# GLM-4.5-Air: 46 layers, the first is dense; one more of MTP
GLM = MoeLayers(128, tuple(range(1, 46)), (46,), 46)
ROWS = [list(row) for row in (A, B, C, D)]


def bare(*rows: tuple[int, ...]) -> RawMap:
    return parse_map([list(row) for row in rows], where="map")


def placed(raw: RawMap, layers: MoeLayers, way: str | None) -> dict[int, tuple[int, ...]]:
    found, _ = resolve(raw, layers, map_layers=way)
    return dict(zip(found.layers, found.physical_to_logical, strict=True))


def test_the_refusal_names_both_interpretations_and_their_counts():
    with pytest.raises(BadPlacement) as caught:
        resolve(bare(*[(0,)] * 46), GLM)
    facts = ("46 rows", "each MoE layer and MTP layer", "each hidden layer", "row 0 or row 1",
             "46 hidden layers", "45 MoE layers", "1 MTP layer",
             "`--map-layers moe`", "`--map-layers all`")  # fmt: skip
    holds(caught.value, BadPlacement, *facts)


def test_interpretations_that_differ_in_rows_of_mtp_only():
    """Layer 3 of 4 is dense, so the three with experts have the same rows in both readings."""
    layers = MoeLayers(4, (0, 1, 2), (4,), 4)
    with pytest.raises(BadPlacement, match="layer 4 would have row 3 or no row"):
        resolve(bare(A, B, C, D), layers)
    assert placed(bare(A, B, C, D), layers, "moe") == {0: A, 1: B, 2: C, 4: D}
    assert placed(bare(A, B, C, D), layers, "all") == {0: A, 1: B, 2: C}


def test_the_user_says_which():
    assert placed(bare(A, B, C, D), SMALL, "moe") == {1: A, 2: B, 3: C, 4: D}
    assert placed(bare(A, B, C, D), SMALL, "all") == {1: B, 2: C, 3: D}


@pytest.mark.parametrize("way", ["moe", "all"])
def test_what_is_stated_must_be_what_fits(way: str):
    rows, other = (A, B, C), "all" if way == "moe" else "moe"
    if way == "all":
        rows = (A, B, C, D, A)  # one more than all layers that have experts
    assert placed(bare(*rows), SMALL, way)
    with pytest.raises(BadPlacement) as caught:
        resolve(bare(*rows), SMALL, map_layers=other)
    holds(caught.value, BadPlacement, f"`--map-layers {other}`", f"{len(rows)} rows")


def test_interpretations_of_one_outcome_are_one():
    layers = MoeLayers(4, (0, 1, 2), (3,), 3)
    for way in (None, "moe", "all"):
        assert placed(bare(A, B, C), layers, way) == {0: A, 1: B, 2: C}
        assert placed(bare(A, B, C, D), layers, way) == {0: A, 1: B, 2: C, 3: D}


@pytest.mark.parametrize(
    ("doc", "way", "other"),
    [
        ({"physical_to_logical_map": ROWS}, "all", "moe"),
        ({"phy2log": ROWS}, "moe", "all"),
    ],
)
def test_a_key_decides(doc: Json, way: str, other: str):
    raw = parse_map(doc, where="map")
    assert placed(raw, SMALL, None) == placed(raw, SMALL, way)
    with pytest.raises(BadPlacement) as caught:
        resolve(raw, SMALL, map_layers=other)
    holds(caught.value, BadPlacement, f"`--map-layers {other}`")


@pytest.mark.parametrize(("name", "way", "other"), [(TRTLLM, "all", "moe"), (ASCEND, "moe", "all")])
def test_ids_are_what_their_format_says(name: str, way: str, other: str):
    raw = by_id(name, 0, 1, 2, 3)
    assert placed(raw, SMALL, None) == placed(raw, SMALL, way)
    with pytest.raises(BadPlacement):
        resolve(raw, SMALL, map_layers=other)


def test_another_word_is_refused():
    with pytest.raises(UsageProblem) as caught:
        resolve(bare(A, B, C), SMALL, map_layers="dense")
    holds(caught.value, UsageProblem, "`dense`", "`--map-layers moe`")


@given(st.sets(st.integers(0, 6), min_size=1), st.integers(0, 3), st.integers(1, 10))
def test_rows_without_a_key_have_one_meaning_or_none(moe: set[int], beyond: int, count: int):
    """Held against all that a map of so many rows could mean, listed without our own reader."""
    hidden = 7
    layers = MoeLayers(2, tuple(sorted(moe)), tuple(range(hidden, hidden + beyond)), hidden)
    raw = bare(*((0, 1) * (n + 1) for n in range(count)))
    meanings = []
    for ids in (layers.moe, layers.all_moe):
        if len(ids) == count:
            meanings.append({n: place for place, n in enumerate(ids)})
        if (hidden if ids == layers.moe else hidden + beyond) == count:
            meanings.append({n: n for n in ids})
    different = [m for n, m in enumerate(meanings) if m not in meanings[:n]]
    try:
        found = {n: len(row) // 2 - 1 for n, row in placed(raw, layers, None).items()}
    except BadPlacement:
        assert len(different) != 1
    else:
        assert [found] == different


# --- from files, by every door -----------------------------------------------------------------
def checkpoint(src: Path) -> Path:
    """A dense layer, three with experts, one of MTP: four rows are of either."""
    shapes = {"gate_proj": [4, 8], "up_proj": [4, 8], "down_proj": [8, 4]}
    tensors = {f"model.layers.{n}.input_layernorm.weight": ("F32", [8]) for n in range(5)}
    tensors |= {
        f"model.layers.{n}.mlp.experts.{e}.{p}.weight": ("F32", shape)
        for n in range(1, 5)
        for e in range(4)
        for p, shape in shapes.items()
    }
    config = {"model_type": "deepseek_v3", "n_routed_experts": 4, "moe_intermediate_size": 4,
              "hidden_size": 8, "num_hidden_layers": 4, "num_nextn_predict_layers": 1}  # fmt: skip
    write(src, tensors, config=config)
    return src


def maps(folder: Path) -> list[str]:
    """The same rows as inline JSON, JSON, YAML, a bare tensor, a list in torch's, and NumPy's."""
    np.save(folder / "m.npy", np.array(ROWS))
    torch.save(torch.tensor(ROWS), folder / "m.pt")
    torch.save(ROWS, folder / "l.pth")
    (folder / "m.json").write_text(json.dumps(ROWS))
    (folder / "m.yaml").write_text(json.dumps(ROWS))
    names = ("m.npy", "m.pt", "l.pth", "m.json", "m.yaml")
    return [json.dumps(ROWS), *(str(folder / name) for name in names)]


def test_no_file_without_a_key_is_taken_by_its_number(tmp_path: Path):
    src = checkpoint(tmp_path / "src")
    for which in maps(tmp_path):
        assert not read_map(which).keyed
        with pytest.raises(BadPlacement) as caught:
            shard.shard(src, tmp_path / "out", ep_size=2, placement=which, dry_run=True)
        holds(caught.value, BadPlacement, "fit two interpretations")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("way", "rows"), [("moe", ROWS), ("all", [*ROWS[1:], [0, 1, 2, 3]])])
def test_shard_follows_the_flag(tmp_path: Path, way: str, rows: list[list[int]]):
    out = tmp_path / "out"
    done = moeconv(
        "shard", str(checkpoint(tmp_path / "src")), "-o", str(out), "--ep", "2",
        "--placement", maps(tmp_path)[1], "--map-layers", way,
    )  # fmt: skip
    assert done.code == 0, done.err
    root = json.loads(io.BytesIO((out / "moeconv.json").read_bytes()).readline())
    assert [stack["physical_to_logical"] for stack in root["stacks"]] == rows


def test_placement_show_and_convert_ask_too(tmp_path: Path):
    src, which = str(checkpoint(tmp_path / "src")), maps(tmp_path)[1]
    assert moeconv("placement", "show", which).code == 0
    asking = ("placement", "show", which), ("placement", "convert", which, "--to", "sglang")
    for words, more in zip(asking, ((), ("-o", str(tmp_path / "n"))), strict=True):
        asked = moeconv(*words, *more, "--source", src)
        assert (asked.code, "fit two interpretations" in asked.err) == (2, True)
        assert moeconv(*words, *more, "--source", src, "--map-layers", "all").code == 0
    assert json.loads((tmp_path / "n").read_text())["physical_to_logical_map"] == ROWS


def test_the_flag_without_a_map_is_refused(tmp_path: Path):
    src = checkpoint(tmp_path / "src")
    for placement in ("trivial", "round-robin", {}):
        with pytest.raises(UsageProblem) as caught:
            shard.shard(src, tmp_path / "out", ep_size=2, placement=placement, map_layers="moe")
        holds(caught.value, UsageProblem, "`--map-layers`")
    refused = moeconv("placement", "show", json.dumps(ROWS), "--map-layers", "moe")
    assert (refused.code, "`--source SRC`" in refused.err) == (2, True)
