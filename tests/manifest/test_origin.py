"""Origin and index of a set: one test for each rule; the root vouches for the broken one."""

import json
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.checkpoint.origin import origin_bytes, parse_origin
from moeconv.errors import (
    BadHeader,
    BadIndex,
    BadJson,
    BadManifest,
    Damaged,
    DuplicateKey,
    MissingShard,
    MoeconvError,
    UnsafePath,
)
from tests.badinput.checks import within
from tests.manifest.broken import refused_everywhere, reported
from tests.manifest.samples import (
    DATA,
    INDEX_NAME,
    ORIGIN_NAME,
    Edit,
    dump,
    replace_named,
    tiny_set,
)

ORIGIN = tiny_set()[ORIGIN_NAME]
INDEX = tiny_set()[INDEX_NAME]
HEAD, _, PAYLOAD = ORIGIN.partition(b"\n")


def _headed(edit: Edit) -> bytes:
    doc = json.loads(HEAD)
    edit(doc)
    return dump(doc) + b"\n" + PAYLOAD


def _refused(made: Path, raw: bytes, kind: type[MoeconvError], *facts: str) -> None:
    replace_named(made, ORIGIN_NAME, raw)
    refused_everywhere(made, kind, *facts)


# --- the origin --------------------------------------------------------------------------------
def test_bytes_come_back_as_they_were():
    assert origin_bytes(parse_origin(ORIGIN)) == ORIGIN


def test_an_origin_that_is_not_the_one_the_root_names(made: Path):
    (made / ORIGIN_NAME).write_bytes(ORIGIN[:-1] + b"?")
    refused_everywhere(made, Damaged, ORIGIN_NAME, "digest")


def test_an_origin_that_is_not_there(made: Path):
    (made / ORIGIN_NAME).unlink()
    refused_everywhere(made, MissingShard, ORIGIN_NAME, "is missing")


@pytest.mark.parametrize(
    "length", [0, 1, len(HEAD), len(HEAD) + 1, len(ORIGIN) // 2, len(ORIGIN) - 1]
)
def test_an_origin_that_is_cut(made: Path, length: int):
    replace_named(made, ORIGIN_NAME, ORIGIN[:length])
    report = moeconv.verify(made)
    assert [p.code for p in report.problems] == ["bad-manifest" if length > 1 else "bad-json"]


def test_bytes_after_the_origin(made: Path):
    announced, held = f"{len(PAYLOAD):,}", f"{len(PAYLOAD) + 1:,}"
    _refused(made, ORIGIN + b"\n", BadManifest, ORIGIN_NAME, announced, held)


@pytest.mark.parametrize("head", [b"[]", b"{}", b"null", b'{"files":{}}', b'{"files":[1]}'])
def test_an_invalid_head(made: Path, head: bytes):
    _refused(made, head + b"\n" + PAYLOAD, BadManifest, ORIGIN_NAME)


@pytest.mark.parametrize(
    "head", [HEAD.replace(b'"size":', b'"size":0.5,"x":'), b"{", b"\xef\xbb\xbf" + HEAD, b"\xff"]
)
def test_a_head_that_is_not_strict_json(made: Path, head: bytes):
    _refused(made, head + b"\n" + PAYLOAD, BadJson, ORIGIN_NAME)


def test_a_duplicate_key(made: Path):
    _refused(
        made,
        ORIGIN.replace(b'"size":', b'"size":1,"size":', 1),
        DuplicateKey,
        ORIGIN_NAME,
        "`size`",
    )


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../b", "", "..", "a\\b"])
def test_a_file_name_that_is_a_path(made: Path, name: str):
    _refused(made, _headed(lambda doc: doc["files"][0].update(name=name)), BadManifest, ORIGIN_NAME)


@pytest.mark.parametrize("size", [-1, 2**53, True, "1", None])
@pytest.mark.parametrize("key", ["size", "header"])
def test_an_invalid_size(made: Path, key: str, size: object):
    raw = _headed(lambda doc: doc["files"][0].update({key: size}))
    _refused(made, raw, BadManifest, ORIGIN_NAME, key)


def test_an_unknown_key_of_the_head(made: Path):
    _refused(made, _headed(lambda doc: doc.update(sizee=1)), BadManifest, "sizee: unknown key")


def test_an_unknown_key_of_a_file(made: Path):
    raw = _headed(lambda doc: doc["files"][0].update(sizee=1))
    _refused(made, raw, BadManifest, "sizee: unknown key")


def test_a_file_of_another_size_than_its_header_says(made: Path):
    def edit(doc: Any) -> None:
        doc["files"][0]["size"] -= 1

    replace_named(made, ORIGIN_NAME, _headed(edit))
    report = moeconv.verify(made)
    assert [p.code for p in report.problems] == ["truncated-shard"]


def test_a_header_whose_length_is_not_that_of_its_bytes(made: Path):
    # written back as it stands, it would make a file that nobody can read
    raw = HEAD + b"\n" + bytes([PAYLOAD[0] ^ 1]) + PAYLOAD[1:]
    replace_named(made, ORIGIN_NAME, raw)
    reported(made, BadHeader, "model.safetensors")


def test_one_file_twice(made: Path):
    def twice(doc: Any) -> None:
        doc["files"].append(doc["files"][0])

    # the headers stand first: the second copy goes where the index would begin
    size = json.loads(HEAD)["files"][0]["header"]
    head = _headed(twice).partition(b"\n")[0]
    raw = head + b"\n" + PAYLOAD[:size] + PAYLOAD
    _refused(made, raw, BadManifest, ORIGIN_NAME, "`model.safetensors`")


def test_an_origin_of_another_model(made: Path):
    # well-formed and signed, but it has tensors that the set cannot fill
    raw = ORIGIN.replace(b"embed_tokens", b"embed_tokenz")
    replace_named(made, ORIGIN_NAME, raw)
    with pytest.raises(BadManifest, match="embed_tokenz"):
        moeconv.unfuse(made, made.with_name("out"))


def test_an_origin_with_fewer_tensors_than_the_output(made: Path):
    # what is restored must be all there was: a tensor left over is a tensor lost
    head = json.loads(HEAD)
    doc = json.loads(PAYLOAD[8:])
    lost = doc.pop("model.embed_tokens.weight")
    size = lost["data_offsets"][1]
    for name in doc:
        doc[name]["data_offsets"] = [at - size for at in doc[name]["data_offsets"]]
    text = dump(doc)
    head["files"][0] |= {"header": len(text) + 8, "size": head["files"][0]["size"] - size}
    head["files"][0]["size"] += len(text) + 8 - len(PAYLOAD)
    raw = dump(head) + b"\n" + len(text).to_bytes(8, "little") + text
    replace_named(made, ORIGIN_NAME, raw)
    with pytest.raises(MoeconvError) as caught:
        moeconv.unfuse(made, made.with_name("out"))
    assert "embed_tokens" in str(caught.value)
    assert caught.value.exit_code != 70


# --- the index ---------------------------------------------------------------------------------
def test_an_index_that_is_not_the_one_the_root_names(made: Path):
    (made / INDEX_NAME).write_bytes(INDEX.replace(b"weight_map", b"weight_mop"))
    refused_everywhere(made, Damaged, INDEX_NAME, "digest")


def test_an_index_that_is_not_there(made: Path):
    (made / INDEX_NAME).unlink()
    refused_everywhere(made, MissingShard, INDEX_NAME, "is missing")


def test_an_index_that_names_a_path(made: Path):
    replace_named(made, INDEX_NAME, INDEX.replace(DATA.encode(), b"../x"))
    refused_everywhere(made, UnsafePath, INDEX_NAME, "`../x`")


@pytest.mark.parametrize("raw", [b"{}", b"[]"])
def test_an_invalid_index(made: Path, raw: bytes):
    replace_named(made, INDEX_NAME, raw)
    refused_everywhere(made, BadIndex, INDEX_NAME, "weight_map")


def test_an_index_that_is_not_json(made: Path):
    replace_named(made, INDEX_NAME, b"{")
    refused_everywhere(made, BadJson, INDEX_NAME)


def test_an_index_of_other_tensors(made: Path):
    replace_named(made, INDEX_NAME, INDEX.replace(b"embed_tokens", b"embed_tokenz"))
    reported(made, Damaged, INDEX_NAME, "does not list")


def test_an_index_with_a_wrong_total(made: Path):
    doc = json.loads(INDEX)
    doc["metadata"]["total_size"] += 1
    replace_named(made, INDEX_NAME, dump(doc))
    reported(made, Damaged, INDEX_NAME)


@pytest.mark.parametrize(
    ("raw", "fact"),
    [
        (b'{"weight_map":' + b"[" * 500_000, "too many lists"),
        (b'{"weight_map":' + b"[" * 30_000 + b" " * 250_000, "nested"),
    ],
)
def test_an_index_without_a_map_of_any_sane_size(made: Path, raw: bytes, fact: str):
    with within(5):
        replace_named(made, INDEX_NAME, raw)
        refused_everywhere(made, BadJson, INDEX_NAME, fact)
