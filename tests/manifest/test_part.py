"""Parts: one test for each rule; the root vouches for every broken part."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.core.digest import digest, fingerprint
from moeconv.errors import BadJson, BadManifest, Damaged, DuplicateKey, MissingExpert, MissingShard
from moeconv.manifest.model import MAX_EXPERTS, Manifest
from moeconv.manifest.part_reader import parse_part
from moeconv.manifest.reader import parse_root
from moeconv.manifest.writer import part_bytes
from tests.badinput.checks import within
from tests.manifest.broken import refused_everywhere, reported
from tests.manifest.samples import (
    DATA,
    PART,
    PART_NAME,
    ROOT,
    Edit,
    body_of,
    dump,
    edit_part,
    edit_root,
    replace_named,
    signed,
)


def _refused(made: Path, edit: Edit, *facts: str) -> None:
    edit_part(made, edit)
    refused_everywhere(made, BadManifest, DATA, *facts)


def _expert(doc: Any) -> Any:
    return next(t for t in doc["tensors"] if "expert" in t)


def test_bytes_come_back_as_they_were():
    assert part_bytes(parse_part(PART, parse_root(ROOT), where="p")) == PART


def test_a_part_that_is_not_the_one_the_root_names(made: Path):
    (made / PART_NAME).write_bytes(PART.replace(b'"BF16"', b'"FP16"'))
    refused_everywhere(made, Damaged, PART_NAME, "digest")


def test_long_lists_of_experts_in_tensors_that_are_wrong():
    """Each takes from what all may name without digests, though it is read twice."""
    root = parse_root(ROOT)
    huge = replace(root.stacks[0], experts=MAX_EXPERTS)
    root = replace(root, stacks=(huge, *root.stacks[1:]), unread=True)
    doc = json.loads(PART)
    bad = _expert(doc) | {"digests": [], "start": 1, "stop": 0}
    bad["expert"] |= {"stack": 0, "experts": [0, MAX_EXPERTS]}
    doc["tensors"] = [bad] * 500
    began = time.process_time()
    with pytest.raises(BadManifest, match="is before `start`"):
        parse_part(dump(doc), root, where="p")
    assert time.process_time() - began < 4


@pytest.mark.parametrize("raw", [PART[:-1], PART + b"\n", b"", PART[:100]])
def test_a_part_of_another_size(made: Path, raw: bytes):
    (made / PART_NAME).write_bytes(raw)
    refused_everywhere(made, Damaged, PART_NAME)


def test_a_part_that_is_not_there(made: Path):
    (made / PART_NAME).unlink()
    refused_everywhere(made, MissingShard, PART_NAME, "is missing")


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xef\xbb\xbf" + PART,
        PART.replace(b'"start":', b'"start":0.5,"x":', 1),
        PART.replace(b'"start":', b'"start":NaN,"x":', 1),
        PART.replace(b'"start":', b'"start":1e400,"x":', 1),
        PART.replace(b'"start":', b'"start":99999999999999999999,"x":', 1),
    ],
)
def test_a_part_that_is_not_strict_json(made: Path, raw: bytes):
    replace_named(made, PART_NAME, raw)
    refused_everywhere(made, BadJson, DATA)


@pytest.mark.parametrize("key", ["file", "start", "component", "size"])
def test_a_duplicate_key(made: Path, key: str):
    mark = f'"{key}":'.encode()
    replace_named(made, PART_NAME, PART.replace(mark, mark + b"0," + mark, 1))
    refused_everywhere(made, DuplicateKey, DATA, f"`{key}`")


@pytest.mark.parametrize("raw", [b"[]", b"null", b"1"])
def test_a_part_that_is_not_an_object(made: Path, raw: bytes):
    replace_named(made, PART_NAME, raw)
    refused_everywhere(made, BadManifest, DATA, "must be an object")


@pytest.mark.parametrize("member", ["file", "size", "header", "tensors"])
def test_a_missing_member(made: Path, member: str):
    _refused(made, lambda doc: doc.pop(member), member)


@pytest.mark.parametrize("member", ["name", "dtype", "shape", "start", "stop", "digests"])
def test_a_tensor_that_lacks_a_member(made: Path, member: str):
    _refused(made, lambda doc: doc["tensors"][0].pop(member), f"tensors[0].{member}: is missing")


@pytest.mark.parametrize(
    "member", ["stack", "experts", "projections", "component", "axes", "matrix"]
)
def test_an_expert_that_lacks_a_member(made: Path, member: str):
    _refused(made, lambda doc: _expert(doc)["expert"].pop(member), f"expert.{member}: is missing")


@pytest.mark.parametrize("place", ["top", "header", "tensor", "expert"])
def test_an_unknown_key(made: Path, place: str):
    def edit(doc: Any) -> None:
        tensor = _expert(doc)
        holder = {"top": doc, "header": doc["header"], "tensor": tensor, "expert": tensor["expert"]}
        holder[place]["sizee"] = 1

    _refused(made, edit, "sizee: unknown key")


def test_an_unknown_key_that_would_act_on_a_terminal(made: Path):
    _refused(made, lambda doc: doc.update({"\x1b[2J": 1}), "unknown key")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/b", "", "..", "x\0", "a\\b"])
def test_a_file_that_is_a_path(made: Path, name: str):
    _refused(made, lambda doc: doc.update(file=name), "file: ")


@pytest.mark.parametrize("value", [-1, 2**53, True, "8", None])
@pytest.mark.parametrize("key", ["start", "stop"])
def test_an_invalid_offset(made: Path, key: str, value: object):
    _refused(made, lambda doc: doc["tensors"][0].update({key: value}), f"tensors[0].{key}: must")


@pytest.mark.parametrize("shape", [[-1], [2**53], [True], ["2"], [[2]], 2, [2.5], None])
def test_an_invalid_shape(made: Path, shape: object):
    edit_part(made, lambda doc: doc["tensors"][0].update(shape=shape))
    report = moeconv.verify(made)
    assert not report.ok
    assert report.problems[0].code in ("bad-manifest", "bad-json")


def test_a_stop_before_its_start(made: Path):
    def edit(doc: Any) -> None:
        first = doc["tensors"][0]
        first["start"], first["stop"] = first["stop"], first["start"]

    _refused(made, edit, "tensors[0].stop: is before `start`")


@pytest.mark.parametrize("digests", [[], ["0" * 32] * 2, ["x"], [0], "0" * 32, ["F" * 32]])
def test_invalid_digests(made: Path, digests: object):
    _refused(made, lambda doc: doc["tensors"][0].update(digests=digests), "tensors[0].digests")


def test_too_few_digests_of_an_expert_tensor(made: Path):
    _refused(made, lambda doc: _expert(doc)["digests"].pop(), "digests: must be", "one for each")


def test_a_stack_that_the_root_does_not_have(made: Path):
    _refused(made, lambda doc: _expert(doc)["expert"].update(stack=2), "only 2 stacks")


@pytest.mark.parametrize("experts", [[0, 3], [1, 1], [1, 0], [0], [0, 1, 2], [-1, 1], []])
def test_experts_that_the_stack_does_not_have(made: Path, experts: object):
    _refused(made, lambda doc: _expert(doc)["expert"].update(experts=experts), "experts: must")


def test_few_words_do_not_make_long_lists():
    # a million experts, said ten thousand times in a part of two megabytes
    root = json.loads(body_of(ROOT))
    root["stacks"][0]["experts"] = 2**20
    part = json.loads(PART)
    tensor = _expert(part)
    tensor["expert"] |= {"experts": [0, 2**20], "stack": 0}
    part["tensors"] = [tensor] * 10_000
    with within(10), pytest.raises(BadManifest, match="one for each logical matrix"):
        parse_part(dump(part), parse_root(signed(dump(root))), where="p")


@pytest.mark.parametrize("projections", [[], ["gate", "gate"], [1], "gate"])
def test_invalid_projections(made: Path, projections: object):
    def edit(doc: Any) -> None:
        _expert(doc)["expert"]["projections"] = projections

    _refused(made, edit, "projections: must")


def test_all_problems_are_reported_at_once(made: Path):
    def edit(doc: Any) -> None:
        doc["tensors"][0]["start"] = "x"
        doc["tensors"][1]["digests"] = []
        doc["sizee"] = 1

    _refused(made, edit, "3 places", "tensors[0].start", "tensors[1].digests", "sizee")


# --- well-formed, but not true -----------------------------------------------------------------
def _untrue(made: Path, edit: Edit, *facts: str) -> None:
    edit_part(made, edit)
    reported(made, Damaged, *facts)


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "F16"}, {"name": "model.other"}, {"start": 1, "stop": 1}, {"shape": [8]}],
    ids=["dtype", "name", "offsets", "shape"],
)
def test_a_tensor_that_the_header_has_otherwise(made: Path, changes: dict[str, object]):
    _untrue(made, lambda doc: doc["tensors"][0].update(changes), PART_NAME)


def test_all_tensors_that_the_header_has_otherwise_are_named_at_once(made: Path):
    names: list[str] = []

    def edit(doc: Any) -> None:
        for tensor in doc["tensors"][:2]:
            names.append(tensor["name"])
            tensor["dtype"] = "F16"

    edit_part(made, edit)
    reported(made, Damaged, PART_NAME, ", ".join(f"`{name}`" for name in names))


def test_a_tensor_too_few(made: Path):
    _untrue(made, lambda doc: doc["tensors"].pop(0), PART_NAME, "than the header")


def test_a_tensor_twice(made: Path):
    _untrue(made, lambda doc: doc["tensors"].insert(0, doc["tensors"][0]), PART_NAME)


def test_a_header_digest_that_is_not_the_file_s(made: Path):
    edit_part(made, lambda doc: doc["header"].update(digest="0" * 32))
    refused_everywhere(made, Damaged, DATA, "header")


@pytest.mark.parametrize("size", [0, 7, 8, 9, 2**53 - 1])
def test_a_header_size_that_is_not_the_file_s(made: Path, size: int):
    edit_part(made, lambda doc: doc["header"].update(size=size))
    refused_everywhere(made, Damaged, DATA)


@pytest.mark.parametrize("size", [0, 4096, 10**15])
def test_a_size_that_is_not_the_file_s(made: Path, size: int):
    edit_part(made, lambda doc: doc.update(size=size))
    report = moeconv.verify(made, level="structure")
    assert not report.ok
    assert any(f"{size:,}" in str(problem) for problem in report.problems)


def test_a_part_that_describes_another_file(made: Path):
    _untrue(made, lambda doc: doc.update(file="config.json"), "config.json")


def test_two_parts_for_one_file(made: Path):
    (made / "moeconv" / "again.json").write_bytes(PART)

    def edit(doc: Any) -> None:
        entry = {"name": "moeconv/again.json", "size": len(PART), "digest": digest(PART)}
        doc["parts"].append(entry)

    edit_root(made, edit)
    report = moeconv.verify(made)
    assert not report.ok


def test_a_digest_that_is_not_the_data_s(made: Path):
    edit_part(made, lambda doc: doc["tensors"][0].update(digests=["0" * 32]))
    report = moeconv.verify(made, level="structure")
    assert [p.code for p in report.problems] == ["damaged"]  # the fingerprint gives it away


def test_two_experts_whose_digests_are_exchanged(made: Path):
    _untrue(made, lambda doc: _expert(doc)["digests"].reverse(), "fingerprint")


def test_an_expert_tensor_that_claims_to_belong_to_no_expert(made: Path):
    def edit(doc: Any) -> None:
        tensor = _expert(doc)
        del tensor["expert"]
        tensor["digests"] = tensor["digests"][:1]

    edit_part(made, edit)
    edit_root(made, lambda doc: doc.update(fingerprint=_fingerprint(made)))
    reported(made, MissingExpert, "model.layers.")


def test_one_stack_s_tensor_that_claims_to_be_the_other_s(made: Path):
    def edit(doc: Any) -> None:
        _expert(doc)["expert"]["stack"] ^= 1

    edit_part(made, edit)
    reported(made, MissingExpert, "model.layers.", "duplicated")


@pytest.mark.parametrize(
    "changes",
    [{"axes": "E K (G O)"}, {"axes": "nonsense"}, {"component": "bias"}, {"matrix": [1, 2, 3]}],
    ids=["other-axes", "no-axes", "component", "matrix"],
)
def test_an_expert_entry_that_the_recipe_contradicts(made: Path, changes: dict[str, object]):
    # other readers go by the part alone: what it says must be what the tensors are
    def edit(doc: Any) -> None:
        _expert(doc)["expert"].update(changes)

    edit_part(made, edit)
    edit_root(made, lambda doc: doc.update(fingerprint=_fingerprint(made)))
    assert not moeconv.verify(made).ok


def _fingerprint(made: Path) -> str:
    """The fingerprint that a clever forger would put into the root."""
    root = parse_root((made / "moeconv.json").read_bytes())
    part = parse_part((made / PART_NAME).read_bytes(), root, where="p")
    return fingerprint(Manifest(root, (part,)).fingerprint_lines())
