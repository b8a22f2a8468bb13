"""`moeconv.json`: one test for each rule; where content is wrong, the digest line is right."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.core.digest import digest
from moeconv.errors import BadJson, BadManifest, Damaged, DuplicateKey, UnsupportedVersion
from moeconv.manifest.reader import parse_root
from moeconv.manifest.writer import root_bytes
from tests.badinput.checks import within
from tests.manifest.broken import refused_everywhere, reported
from tests.manifest.samples import (
    DATA,
    PART_NAME,
    ROOT,
    ROOT_BODY,
    ROOT_NAME,
    Edit,
    edit_part,
    edit_root,
    signed,
)


def _refused(made: Path, edit: Edit, *facts: str) -> None:
    edit_root(made, edit)
    refused_everywhere(made, BadManifest, ROOT_NAME, *facts)


def _put(made: Path, raw: bytes) -> Path:
    (made / ROOT_NAME).write_bytes(raw)
    return made


# --- the frame ---------------------------------------------------------------------------------
def test_the_valid_output_passes(made: Path):
    assert moeconv.verify(made).ok


def test_bytes_come_back_as_they_were():
    assert root_bytes(parse_root(ROOT)) == ROOT


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\n",
        b"{}",
        ROOT[:-1],
        ROOT[:-2],
        ROOT[1:],
        ROOT + b"\n",
        ROOT + b"x",
        b" " + ROOT,
        ROOT.replace(b"\n", b"\r\n"),
        ROOT_BODY + b"\n" + b"0" * 32 + b"\n",
        ROOT_BODY + b"\n" + digest(ROOT_BODY).upper().encode() + b"\n",
        ROOT_BODY + b"\n" + digest(ROOT_BODY + b"\n").encode() + b"\n",
        ROOT_BODY + digest(ROOT_BODY).encode() + b"\n",
        ROOT_BODY[:-1] + b" }\n" + digest(ROOT_BODY).encode() + b"\n",
    ],
)
def test_a_wrong_last_line(made: Path, raw: bytes):
    refused_everywhere(_put(made, raw), Damaged, ROOT_NAME, "digest")


def test_any_flipped_bit_of_the_root():
    # pure, so there is time for every byte
    chance = random.Random(1)
    for position in range(len(ROOT)):
        flipped = bytearray(ROOT)
        flipped[position] ^= 1 << chance.randrange(8)
        with pytest.raises(Damaged):
            parse_root(bytes(flipped))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"{}{}",
        b"\xef\xbb\xbf" + ROOT_BODY,
        ROOT_BODY.decode().encode("utf-16"),
        ROOT_BODY.replace(b'"minor":1', b'"minor":NaN'),
        ROOT_BODY.replace(b'"minor":1', b'"minor":0.0'),
        ROOT_BODY.replace(b'"minor":1', b'"minor":1e400'),
        ROOT_BODY.replace(b'"minor":1', b'"minor":18446744073709551616'),
        ROOT_BODY.replace(b'"minor":1', b'"minor":' + b"9" * 5000),
        ROOT_BODY.replace(b'"minor":1', b'"minor":' + b"[" * 100_000),
        ROOT_BODY.replace(b'"moeconv.manifest"', b'"\xff"'),
    ],
    ids=["empty", "cut", "two", "bom", "utf-16", "nan", "float", "1e400", "2^64", "5000 digits",
         "nesting", "latin-1"],
)  # fmt: skip
def test_a_body_that_is_not_strict_json(made: Path, body: bytes):
    refused_everywhere(_put(made, signed(body)), BadJson, ROOT_NAME)


@pytest.mark.parametrize("key", ["format", "minor", "size", "width"])
def test_a_duplicate_key(made: Path, key: str):
    start = ROOT_BODY.index(f'"{key}":'.encode())
    body = ROOT_BODY[:start] + f'"{key}":1,'.encode() + ROOT_BODY[start:]
    refused_everywhere(_put(made, signed(body)), DuplicateKey, ROOT_NAME, f"`{key}`")


@pytest.mark.parametrize("body", [b"[]", b"null", b"1", b'"moeconv.manifest"'])
def test_a_body_that_is_not_an_object(made: Path, body: bytes):
    refused_everywhere(_put(made, signed(body)), BadManifest, ROOT_NAME, "must be an object")


# --- version -----------------------------------------------------------------------------------
@pytest.mark.parametrize("major", [2, 99])
def test_a_newer_major_version(made: Path, major: int):
    def edit(doc: Any) -> None:
        doc["version"] = {"major": major, "minor": 3}
        doc["something"] = "new"

    edit_root(made, edit)
    refused_everywhere(made, UnsupportedVersion, ROOT_NAME, f"{major}.3", "reads 1.x", "newer")


def test_a_required_feature_that_is_unknown(made: Path):
    edit_root(made, lambda doc: doc["requires"].append("compressed"))
    refused_everywhere(made, UnsupportedVersion, ROOT_NAME, "compressed", "newer")


def test_a_required_feature_that_would_act_on_a_terminal(made: Path):
    edit_root(made, lambda doc: doc["requires"].append("\x1b[2J"))
    refused_everywhere(made, UnsupportedVersion, r"\x1b[2J")


@pytest.mark.parametrize("version", [None, {}, {"minor": 0}, {"major": "1", "minor": 0}, "1.0", []])
def test_an_invalid_version(made: Path, version: object):
    # a newer moeconv would not help: this is no version at all
    def edit(doc: Any) -> None:
        doc["version"] = version

    _refused(made, edit, "version")


def test_a_version_below_the_first(made: Path):
    def edit(doc: Any) -> None:
        doc["version"] = {"major": 0, "minor": 0}

    edit_root(made, edit)
    problem = reported(made, UnsupportedVersion, "0.0")
    assert "newer" not in (problem.fix or "")


def test_another_format(made: Path):
    _refused(made, lambda doc: doc.update(format="other.manifest"), "format: must be")


@pytest.mark.parametrize("place", ["top", "stacks", "parts", "index", "version", "totals"])
def test_an_unknown_key(made: Path, place: str):
    def edit(doc: Any) -> None:
        holder = doc if place == "top" else doc[place]
        holder = holder[0] if isinstance(holder, list) else holder
        holder["sizee"] = 1

    _refused(made, edit, "sizee: unknown key")


def test_an_annotation_is_fine(made: Path):
    def edit(doc: Any) -> None:
        doc["x-note"] = "copied by hand"
        doc["parts"][0]["x-note"] = 1

    edit_root(made, edit)
    assert moeconv.verify(made).ok


def test_a_newer_minor_version_with_unknown_keys_is_fine(made: Path):
    edit_part(made, lambda doc: doc["tensors"][0].update(slots=[1, 2]))

    def edit(doc: Any) -> None:
        doc["version"]["minor"] = 7
        doc["placement"] = {"ranks": 8}
        doc["stacks"][0]["slots"] = 2

    edit_root(made, edit)
    assert moeconv.verify(made).ok


@pytest.mark.parametrize("place", ["x\x1b[2J", "\u202e", "\n"])
def test_an_unknown_key_that_would_act_on_a_terminal(made: Path, place: str):
    _refused(made, lambda doc: doc.update({place: 1}), "unknown key")


# --- members -----------------------------------------------------------------------------------
MEMBERS = sorted(json.loads(ROOT_BODY))


@pytest.mark.parametrize("member", [m for m in MEMBERS if m not in ("version", "requires")])
def test_a_missing_member(made: Path, member: str):
    _refused(made, lambda doc: doc.pop(member), member)


def test_missing_requirements(made: Path):
    _refused(made, lambda doc: doc.pop("requires"), "requires: is missing")


@pytest.mark.parametrize("member", [m for m in MEMBERS if m not in ("version", "requires")])
@pytest.mark.parametrize("value", [True, 1, "\ud800", [1], {"a": 1}], ids=str)
def test_a_member_of_another_kind(made: Path, member: str, value: object):
    _refused(made, lambda doc: doc.update({member: value}), member)


@pytest.mark.parametrize(
    "key", ["name", "recipe", "layout", "origin_layout", "experts", "width", "hidden"]
)
def test_a_stack_that_lacks_a_member(made: Path, key: str):
    _refused(made, lambda doc: doc["stacks"][1].pop(key), f"stacks[1].{key}: is missing")


@pytest.mark.parametrize("key", ["experts", "width", "hidden"])
@pytest.mark.parametrize("value", [-1, 2**53, 2**63 - 1, True, "2", None])
def test_an_invalid_size_of_a_stack(made: Path, key: str, value: object):
    _refused(made, lambda doc: doc["stacks"][0].update({key: value}), f"stacks[0].{key}: must")


def test_a_stack_without_experts(made: Path):
    _refused(made, lambda doc: doc["stacks"][0].update(experts=0), "stacks[0].experts: must")


def test_a_stack_of_a_recipe_that_is_not_there(made: Path):
    _refused(made, lambda doc: doc["stacks"][0].update(recipe="other"), "`other` is not among")


def test_a_stack_of_a_layout_that_its_recipe_does_not_have(made: Path):
    _refused(made, lambda doc: doc["stacks"][0].update(layout="other"), "`other`")


def test_an_origin_layout_that_the_recipe_does_not_have(made: Path):
    _refused(made, lambda doc: doc["stacks"][0].update(origin_layout="other"), "`other`")


def test_two_stacks_of_one_name(made: Path):
    def edit(doc: Any) -> None:
        doc["stacks"][1]["name"] = doc["stacks"][0]["name"]

    edit_root(made, edit)
    assert not moeconv.verify(made).ok


@pytest.mark.parametrize("toml", ["", "name =", 'name = "qwen3_moe"'])
def test_an_invalid_recipe(made: Path, toml: str):
    # it is the set that is wrong, not a recipe of the user's
    _refused(made, lambda doc: doc["recipes"][0].update(toml=toml), "recipe")


def test_a_recipe_beyond_its_limit(made: Path):
    _refused(made, lambda doc: doc["recipes"][0].update(toml="#" * 2_000_000), "recipes[0].toml")


@pytest.mark.parametrize("place", ["parts", "sidecars", "index", "origin"])
@pytest.mark.parametrize(
    "name",
    [
        "../x", "/etc/passwd", "a/../b", "a//b", "a\\b", "", ".", "x\0", "x\n", "c:x", "nul", "x/",
        "./x", "y" * 256, "\u202ex",
    ],
)  # fmt: skip
def test_a_name_that_is_a_path(made: Path, place: str, name: str):
    def edit(doc: Any) -> None:
        holder = doc[place][0] if isinstance(doc[place], list) else doc[place]
        holder["name"] = name

    _refused(made, edit, place, "name: ")


@pytest.mark.parametrize("place", ["parts", "sidecars", "index", "origin"])
@pytest.mark.parametrize(
    "value", ["", "0" * 31, "0" * 33, "F" * 32, "g" * 32, "xxh3:" + "0" * 32, 0]
)
def test_an_invalid_digest(made: Path, place: str, value: object):
    def edit(doc: Any) -> None:
        holder = doc[place][0] if isinstance(doc[place], list) else doc[place]
        holder["digest"] = value

    _refused(made, edit, place, "digest: ")


def test_an_invalid_fingerprint(made: Path):
    _refused(made, lambda doc: doc.update(fingerprint="x"), "fingerprint: ")


def test_one_file_named_twice(made: Path):
    _refused(made, lambda doc: doc["sidecars"].append(doc["sidecars"][0]), "named more than once")


def test_a_sidecar_that_is_a_data_file(made: Path):
    # unfuse would copy it as a sidecar and write it as a shard
    raw = (made / DATA).read_bytes()

    def edit(doc: Any) -> None:
        doc["sidecars"].append({"name": DATA, "size": len(raw), "digest": digest(raw)})

    _refused(made, edit, DATA)


def test_a_part_outside_its_directory(made: Path):
    raw = (made / PART_NAME).read_bytes()
    (made / "part.json").write_bytes(raw)
    _refused(made, lambda doc: doc["parts"][0].update(name="part.json"), "parts[0].name")


@pytest.mark.parametrize("value", [2**53 - 1, 2**40])
@pytest.mark.parametrize("place", ["parts", "index", "origin"])
def test_a_size_beyond_all_memory(made: Path, place: str, value: int):
    # nothing of that size may be asked for before anybody looked at the file
    def edit(doc: Any) -> None:
        holder = doc[place][0] if isinstance(doc[place], list) else doc[place]
        holder["size"] = value

    edit_root(made, edit)
    refused_everywhere(made, Damaged)


def test_a_stack_of_more_experts_than_anybody_can_count(made: Path):
    # 9e15 addresses must not be looked for one by one
    edit_root(made, lambda doc: doc["stacks"][0].update(experts=2**53 - 1))
    with within(2):
        assert not moeconv.verify(made, level="structure").ok


@pytest.mark.parametrize("key", ["tensors", "bytes"])
def test_wrong_totals(made: Path, key: str):
    edit_root(made, lambda doc: doc["totals"].update({key: 12345}))
    reported(made, Damaged, ROOT_NAME, "12,345")


def test_a_wrong_fingerprint(made: Path):
    edit_root(made, lambda doc: doc.update(fingerprint="0" * 32))
    reported(made, Damaged, ROOT_NAME, "fingerprint")


def test_all_problems_are_reported_at_once(made: Path):
    def edit(doc: Any) -> None:
        doc["stacks"][0]["experts"] = "two"
        doc["parts"][0]["name"] = "../x"
        doc["sizee"] = 1
        del doc["generator"]

    _refused(made, edit, "4 places", "stacks[0].experts", "parts[0].name", "sizee", "generator")
