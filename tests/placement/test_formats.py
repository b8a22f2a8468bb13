"""Maps of other systems: bytes as they write them, and the layers that rows are of."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moeconv.core.strict_json import Json
from moeconv.errors import BadPlacement, BadPlacementFile, MoeconvError
from moeconv.placement.ascend import ASCEND
from moeconv.placement.eplb import EPLB
from moeconv.placement.formats import FORMATS, parse_map, write_map
from moeconv.placement.model import MoeLayers, Placement, check
from moeconv.placement.resolve import ep_size_of, resolve
from moeconv.placement.sglang import SGLANG
from moeconv.placement.trtllm import TRTLLM
from moeconv.placement.vllm import VLLM
from tests.badinput.checks import holds
from tests.placement.maps import (
    PLAIN,
    SMALL,
    A,
    B,
    C,
    Case,
    D,
    by_row,
    cases,
    placed,
)


def decoded(name: str, data: bytes) -> Json:
    """What a reader of the format would see; YAML's integer keys are texts in JSON."""
    if name != TRTLLM:
        return json.loads(data)
    doc = yaml.safe_load(data)
    return {**doc, "initial_global_assignments": {
        str(k): v for k, v in doc["initial_global_assignments"].items()
    }}  # fmt: skip


def again(name: str, data: bytes, layers: MoeLayers) -> tuple[Placement, str]:
    """The placement that a written map is read as."""
    bare = EPLB if name == EPLB else VLLM
    raw = parse_map(decoded(name, data), where="map", bare=bare)
    return resolve(raw, layers, map_layers=None if raw.keyed else "moe")


def malformed(doc: Json, *facts: str) -> str:
    """The refusal of a document, which says all `facts`."""
    with pytest.raises(BadPlacementFile) as caught:
        parse_map(doc, where="map.json")
    return str(holds(caught.value, BadPlacementFile, *facts))


# --- round trips -------------------------------------------------------------------------------
@given(cases(), st.sampled_from(tuple(FORMATS)))
def test_every_format_reads_back_what_it_wrote(case: Case, name: str):
    data = write_map(name, case.placement, case.layers, ep_size=case.ep_size)
    found, assumed = again(name, data, case.layers)
    assert found == case.placement
    assert assumed
    assert "\n" not in assumed
    assert data == write_map(name, found, case.layers, ep_size=case.ep_size)


@given(cases(), st.sampled_from(tuple(FORMATS)), st.sampled_from(tuple(FORMATS)))
def test_every_format_to_every_other_and_back(case: Case, first: str, second: str):
    data = write_map(first, case.placement, case.layers, ep_size=case.ep_size)
    middle, _ = again(first, data, case.layers)
    there = write_map(second, middle, case.layers, ep_size=case.ep_size)
    back, _ = again(second, there, case.layers)
    assert write_map(first, back, case.layers, ep_size=case.ep_size) == data


@given(cases(), st.sampled_from(tuple(FORMATS)))
def test_rows_stay_with_their_layers(case: Case, name: str):
    """Held against the documents themselves, without our reader."""
    doc = decoded(name, write_map(name, case.placement, case.layers, ep_size=case.ep_size))
    rows = {n: list(case.placement.row(n) or ()) for n in case.placement.layers}
    if name == SGLANG:
        assert [doc["physical_to_logical_map"][n] for n in rows] == list(rows.values())
    elif name == TRTLLM:
        assert doc["initial_global_assignments"] == {str(n): row for n, row in rows.items()}
    elif name == ASCEND:
        joined = [
            [expert for device in layer["device_list"] for expert in device["device_expert"]]
            for layer in doc["layer_list"]
        ]
        assert joined == list(rows.values())
    else:
        assert (doc["phy2log"] if name == EPLB else doc) == list(rows.values())


# --- bytes -------------------------------------------------------------------------------------
GOLDEN = {
    SGLANG: """\
{"physical_to_logical_map": [
  [0, 1, 2, 3],
  [3, 2, 1, 0],
  [1, 0, 3, 2]
]}
""",
    VLLM: """\
[
  [3, 2, 1, 0],
  [1, 0, 3, 2]
]
""",
    TRTLLM: """\
initial_global_assignments:
  1: [3, 2, 1, 0]
  2: [1, 0, 3, 2]
num_slots: 4
layer_updates_per_iter: 0
""",
    ASCEND: """\
{"moe_layer_count": 2, "layer_list": [
  {"layer_id": 0, "device_count": 2, "device_list": \
[{"device_id": 0, "device_expert": [3, 2]}, {"device_id": 1, "device_expert": [1, 0]}]},
  {"layer_id": 1, "device_count": 2, "device_list": \
[{"device_id": 0, "device_expert": [1, 0]}, {"device_id": 1, "device_expert": [3, 2]}]}
]}
""",
    EPLB: """\
{"phy2log": [
  [3, 2, 1, 0],
  [1, 0, 3, 2]
]}
""",
}


@pytest.mark.parametrize("name", FORMATS)
def test_written_bytes(name: str):
    assert write_map(name, placed(PLAIN, B, C), PLAIN, ep_size=2).decode() == GOLDEN[name]


def test_sglang_is_given_exactly_one_key():
    for placement in (placed(SMALL, A, B, C), placed(SMALL, A, B, C, D)):
        doc = json.loads(write_map(SGLANG, placement, SMALL, ep_size=None))
        assert list(doc) == ["physical_to_logical_map"]
        assert len(doc["physical_to_logical_map"]) == 1 + len(placement.layers)


def test_ascend_needs_the_number_of_devices():
    with pytest.raises(BadPlacement) as caught:
        write_map(ASCEND, placed(PLAIN, A, B), PLAIN, ep_size=None)
    holds(caught.value, BadPlacement, "`--ep N`")


def test_an_unknown_format_names_the_known_ones():
    with pytest.raises(BadPlacement) as caught:
        write_map("slime", placed(PLAIN, A, B), PLAIN, ep_size=2)
    holds(caught.value, BadPlacement, "`slime`", "sglang, vllm, trtllm, ascend, eplb")


@pytest.mark.parametrize("name", FORMATS)
def test_what_does_not_fit_is_not_written(name: str):
    with pytest.raises(BadPlacement):
        write_map(name, placed(SMALL, A, B), SMALL, ep_size=2)
    with pytest.raises(BadPlacement):
        write_map(name, placed(PLAIN, A, (0, 1, 2, 2)), PLAIN, ep_size=2)


def test_the_devices_of_a_map_are_its_ep_size():
    raw = parse_map(json.loads(GOLDEN[ASCEND]), where="map")
    assert ep_size_of(raw, None) == ep_size_of(raw, 2) == 2
    with pytest.raises(BadPlacement) as caught:
        ep_size_of(raw, 4)
    holds(caught.value, BadPlacement, "2 devices", "ep 4")
    assert ep_size_of(by_row(VLLM, A), None) is None
    assert ep_size_of(by_row(VLLM, A), 4) == 4


# --- documents ---------------------------------------------------------------------------------
def test_sglang_refuses_other_keys():
    for key in ("logical_count", "x-note", "phy2log"):
        malformed({"physical_to_logical_map": [[0]], key: 1}, key, "sglang refuses it")


def test_a_load_record_is_not_a_placement():
    malformed({"rank": 0, "logical_count": [[1, 2]]}, "load record", "logical_count")


def test_eplb_may_have_its_other_tables():
    raw = parse_map({"phy2log": [[0, 1]], "log2phy": None, "logcnt": [[1, 1]]}, where="map")
    assert (raw.format, raw.rows, raw.count) == (EPLB, ((0, (0, 1)),), 1)
    malformed({"phy2log": [[0, 1]], "logcount": []}, "did you mean `logcnt`?")


def test_trtllm_slots_must_be_those_of_the_rows():
    doc: Json = {"initial_global_assignments": {"3": [0, 1], "4": [0, 1, 2]}, "num_slots": 2}
    malformed(doc, "initial_global_assignments.4", "has 3 slots, but `num_slots` is 2")


def test_trtllm_keys_are_layer_ids():
    doc: Json = {"initial_global_assignments": {"03": [0], "-1": [0], "x": [0]}}
    assert malformed(doc, "3 problems").count("is not a layer id") == 3
    malformed({"initial_global_assignments": {}}, "rows by layer id")
    malformed({"initial_global_assignments": [[0]]}, "rows by layer id")
    malformed({"initial_global_assignments": {"1": [0]}, "num_slot": 1}, "did you mean `num_slots`")


def ascend(**layer: Json) -> Json:
    """A map of one layer on two devices, with members changed."""
    devices: Json = [{"device_id": d, "device_expert": [d]} for d in range(2)]
    entry: Json = {"layer_id": 0, "device_count": 2, "device_list": devices, **layer}
    return {"moe_layer_count": 1, "layer_list": [entry]}


def device(number: int, *experts: int) -> Json:
    return {"device_id": number, "device_expert": list(experts)}


def test_ascend_slots_are_devices_in_order():
    raw = parse_map(ascend(device_list=[device(1, 0, 3), device(0, 2, 1)]), where="map")
    assert raw.rows == ((0, (2, 1, 0, 3)),)
    assert raw.devices == 2


def test_ascend_devices_must_be_whole_and_alike():
    malformed(ascend(device_count=3), "device_count: is 3, but the list has 2 devices")
    malformed(ascend(device_list=[device(0, 1), device(2, 0)]), "the device ids 0 to 1")
    malformed(ascend(device_list=[device(0, 1), device(0, 0)]), "device_id: 0 appears twice")
    malformed(ascend(device_list=[device(0, 1), device(1, 0, 1)]), "has 2 slots")
    malformed(ascend(device_list=[device(0, 1), {"device_id": 1}]), "device_expert: must be a list")


def test_ascend_layers_must_be_whole():
    one = ascend()
    assert isinstance(one, dict)
    two = [*one["layer_list"], *one["layer_list"]]  # type: ignore[misc]
    malformed({**one, "moe_layer_count": 3}, "is 3, but the list has 1 layer")
    malformed({"moe_layer_count": 2, "layer_list": two}, "layer_id: 0 appears twice")
    malformed({"moe_layer_count": 0, "layer_list": []}, "has no layers")
    three = {"layer_id": 1, "device_count": 1, "device_list": [device(0, 0, 1)]}
    doc: Json = {"moe_layer_count": 2, "layer_list": [two[0], three]}
    malformed(doc, "layer_list[1].device_count: is 1, but 2 in other layers")


@pytest.mark.parametrize(
    ("doc", "fact"),
    [
        ([], "has no rows"),
        ({}, "has none of the keys"),
        ("rows", "neither an object nor a list of rows, but a string"),
        (None, "but null"),
        ([[0, 1], 2], "[1]: must be a list of expert ids, not an integer"),
        ([[0, 1.0]], "[0][1]: must be an integer, not a float"),
        ([[0, True]], "must be an integer, not true or false"),
        ([[[0]]], "must be an integer, not a list"),
        (["a", "b", "c"], "must be an integer, not a string (and 2 others)"),
        ({"physical_to_logical_map": 3}, "must be a list of rows, not an integer"),
        ({"phy2log": []}, "has no rows"),
    ],
)
def test_what_is_not_a_map(doc: Json, fact: str):
    malformed(doc, fact)


def test_all_problems_of_a_document_at_once_but_no_flood():
    malformed([[0.5], ["x"], 3], "3 problems")
    text = malformed([[0.5]] * 50, "50 problems", "and 30 more")
    assert len(text.splitlines()) == 24


LEAVES = st.none() | st.booleans() | st.integers(-2, 9) | st.floats(allow_nan=False) | st.text()
KEYS = st.sampled_from(
    ["physical_to_logical_map", "phy2log", "initial_global_assignments", "num_slots",
     "moe_layer_count", "layer_list", "layer_id", "device_count", "device_list", "device_id",
     "device_expert", "logical_count", "0", "3"]
)  # fmt: skip
DOCUMENTS = st.recursive(
    LEAVES | st.lists(st.integers(0, 4), max_size=5),
    lambda below: (
        st.lists(below, max_size=4) | st.dictionaries(KEYS | st.text(), below, max_size=4)
    ),
    max_leaves=30,
)


def holds_words(problem: MoeconvError) -> None:
    """Nothing raw, and a way out."""
    assert all(line.isprintable() for line in str(problem).splitlines())
    assert problem.fix


@given(DOCUMENTS, cases())
def test_any_document_is_a_map_or_refused_in_our_words(doc: Json, case: Case):
    try:
        raw = parse_map(doc, where="map")
        found, _ = resolve(raw, case.layers)
        check(found, case.layers, ep_size=case.ep_size)
    except (BadPlacement, BadPlacementFile) as problem:
        holds_words(problem)
