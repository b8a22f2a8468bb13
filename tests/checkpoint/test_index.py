"""The index: what it names must be there, be a plain name, and be all there is."""

import json
from pathlib import Path

import pytest

import moeconv
from moeconv.errors import (
    BadIndex,
    BadJson,
    DuplicateKey,
    DuplicateTensor,
    HeaderTooLong,
    LfsPointer,
    MissingShard,
    TensorNotInFile,
    TensorNotInIndex,
    UnsafePath,
)
from tests.badinput.builders import (
    INDEX,
    STACK,
    Tensors,
    index_doc,
    qwen,
    shard_bytes,
    two_files,
    write,
)
from tests.badinput.checks import refused

FILES = two_files(qwen())
FIRST, SECOND = FILES
NAME = f"{STACK}.3.down_proj.weight"  # in the second file


def _mapped(**changes: str) -> dict[str, object]:
    """A true index with some entries of the map changed."""
    doc = index_doc(FILES)
    doc["weight_map"] = {**doc["weight_map"], **changes}  # type: ignore[dict-item]
    return doc


# --- index and files disagree ------------------------------------------------------------------
def test_a_tensor_in_the_index_but_in_no_file(src: Path, out: Path):
    write(src, FILES, index=_mapped(**{"model.ghost": FIRST}))
    refused(TensorNotInFile, INDEX, "`model.ghost`", FIRST, "no file", src=src, out=out)


def test_a_tensor_in_another_file_than_the_index_says(src: Path, out: Path):
    write(src, FILES, index=_mapped(**{NAME: FIRST}))
    refused(TensorNotInFile, INDEX, f"`{NAME}`", FIRST, f"in `{SECOND}`", src=src, out=out)


def test_a_tensor_in_a_file_but_not_in_the_index(src: Path, out: Path):
    doc = index_doc(FILES)
    del doc["weight_map"][NAME]  # type: ignore[attr-defined]
    write(src, FILES, index=doc)
    refused(TensorNotInIndex, INDEX, f"`{NAME}`", SECOND, src=src, out=out)


def test_an_index_that_names_an_absent_file(src: Path, out: Path):
    write(src, FILES)
    (src / SECOND).unlink()
    refused(MissingShard, INDEX, f"`{SECOND}`", "download", src=src, out=out)


def test_a_directory_where_a_file_should_be(src: Path, out: Path):
    write(src, FILES)
    (src / SECOND).unlink()
    (src / SECOND).mkdir()
    refused(UnsafePath, f"`{SECOND}`", "not a regular file", src=src, out=out)


def test_all_disagreements_are_reported_at_once(src: Path, out: Path):
    write(src, FILES, index=_mapped(**{"ghost.1": FIRST, "ghost.2": SECOND}))
    problem = refused(TensorNotInFile, "ghost.1", "ghost.2", src=src, out=out)
    assert len(problem.also) == 1


def test_the_number_of_disagreements_is_reported(src: Path, out: Path):
    ghosts = {f"ghost.{n}": FIRST for n in range(500)}
    write(src, FILES, index=_mapped(**ghosts))
    refused(TensorNotInFile, "500", src=src, out=out)


@pytest.mark.parametrize("named", [FIRST, SECOND])
def test_a_tensor_in_two_files_of_which_the_index_names_one(src: Path, out: Path, named: str):
    twice: Tensors = {NAME: qwen()[NAME]}
    files = {FIRST: {**FILES[FIRST], **twice}, SECOND: FILES[SECOND]}
    write(src, files, index=_mapped(**{NAME: named}))
    problem = refused(DuplicateTensor, f"`{NAME}`", FIRST, SECOND, src=src, out=out)
    assert "there is no index" not in str(problem)


def test_a_tensor_in_two_files_without_an_index(src: Path, out: Path):
    twice: Tensors = {NAME: qwen()[NAME]}
    files = {FIRST: {**FILES[FIRST], **twice}, SECOND: FILES[SECOND]}
    write(src, files, index=False)
    refused(DuplicateTensor, f"`{NAME}`", FIRST, SECOND, "--exclude", src=src, out=out)


def test_several_files_without_an_index_are_fine(src: Path, out: Path):
    write(src, FILES, index=False)
    moeconv.fuse(src, out)
    assert moeconv.verify(out, level="source", source=src).ok


def test_two_indexes_of_which_none_has_the_usual_name(src: Path, out: Path):
    write(src, FILES)
    raw = (src / INDEX).read_bytes()
    (src / INDEX).unlink()
    for name in ("a", "b"):
        (src / f"{name}.safetensors.index.json").write_bytes(raw)
    refused(BadIndex, "2 index files", "`a.safetensors.index.json`", str(src), src=src, out=out)


@pytest.mark.parametrize("total", [None, 0, 1, "many", 1.5, [], 10**18])
def test_a_wrong_total_size_is_a_warning(src: Path, out: Path, total: object):
    doc = index_doc(FILES)
    doc["metadata"] = {"total_size": total}
    write(src, FILES, index=doc)
    done = moeconv.fuse(src, out)
    assert any("total_size" in said for said in done.source.checkpoint.warnings)
    assert moeconv.verify(out).ok


@pytest.mark.parametrize("value", [None, [], "x", 1])
def test_an_index_without_metadata_is_fine(src: Path, out: Path, value: object):
    doc = index_doc(FILES)
    doc["metadata"] = value
    write(src, FILES, index=doc)
    moeconv.fuse(src, out)


# --- paths -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "../src/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "a/../b",
        "./b",
        "./model-00001-of-00002.safetensors",
        "a\\b",
        "..\\x",
        "C:x",
        "",
        ".",
        "..",
        "x\0y",
        "x\n",
        "\x1b[2J",
        "\u202egnp.x",
        "x" * 256,
        "nul",
        "CON.safetensors",
    ],
)
def test_a_path_in_the_weight_map(src: Path, out: Path, path: str):
    write(src, FILES, index=_mapped(**{NAME: path}))
    refused(UnsafePath, INDEX, "weight_map", src=src, out=out)


def test_every_path_in_the_weight_map_is_reported(src: Path, out: Path):
    write(src, FILES, index=_mapped(a="../x", b="/etc/passwd", c="../x"))
    problem = refused(UnsafePath, "`../x`", "`/etc/passwd`", src=src, out=out)
    assert len(problem.also) == 1


# --- JSON --------------------------------------------------------------------------------------
def _text(src: Path, raw: bytes) -> None:
    write(src, FILES)
    (src / INDEX).write_bytes(raw)


def test_one_tensor_twice_in_the_index(src: Path, out: Path):
    raw = json.dumps(index_doc(FILES)).encode()
    again = f'"{NAME}": "{FIRST}", "{NAME}":'.encode()
    _text(src, raw.replace(f'"{NAME}":'.encode(), again))
    refused(DuplicateKey, INDEX, f"`{NAME}`", src=src, out=out)


def test_weight_map_twice(src: Path, out: Path):
    _text(src, b'{"weight_map": {}, "weight_map": {}}')
    refused(DuplicateKey, INDEX, "`weight_map`", src=src, out=out)


@pytest.mark.parametrize(
    "value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"99999999999999999999"]
)
def test_an_invalid_number_in_the_index(src: Path, out: Path, value: bytes):
    raw = json.dumps(index_doc(FILES)).encode()
    start = raw.index(b'"total_size": ') + 14
    _text(src, raw[:start] + value + raw[raw.index(b"}", start) :])
    refused(BadJson, INDEX, src=src, out=out)


@pytest.mark.parametrize("raw", [b"", b"{", b"not json", b"\xff\xfe{}", b"\xef\xbb\xbf{}"])
def test_an_index_that_is_not_json(src: Path, out: Path, raw: bytes):
    _text(src, raw)
    refused(BadJson, INDEX, src=src, out=out)


@pytest.mark.parametrize("raw", [b"[]", b"{}", b'{"weight_map": []}', b'{"weight_map": null}'])
def test_an_index_without_a_weight_map(src: Path, out: Path, raw: bytes):
    _text(src, raw)
    refused(BadIndex, INDEX, "weight_map", src=src, out=out)


@pytest.mark.parametrize("file", [None, 1, ["x"], {}, "\ud800"])
def test_an_entry_of_the_weight_map_that_is_not_a_text(src: Path, out: Path, file: str):
    write(src, FILES, index=_mapped(**{NAME: file}))
    refused(BadIndex, INDEX, f"`{NAME}`", src=src, out=out)


def test_a_lone_surrogate_in_a_tensor_s_name(src: Path, out: Path):
    write(src, FILES, index=_mapped(**{"a\ud800": FIRST}))
    refused(BadIndex, INDEX, r"`a\ud800`", src=src, out=out)


def test_an_index_that_is_a_git_lfs_pointer(src: Path, out: Path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 9\n"
    _text(src, pointer.encode())
    refused(LfsPointer, INDEX, "git lfs pull", src=src, out=out)


def test_an_index_that_names_itself(src: Path, out: Path):
    write(src, FILES, index=_mapped(x=INDEX))
    refused(HeaderTooLong, INDEX, src=src, out=out)


def test_an_index_of_nothing_beside_shards(src: Path, out: Path):
    # every shard would be taken for a sidecar
    write(src, {"model.safetensors": qwen()}, index={"weight_map": {}})
    (src / "x.safetensors").write_bytes(shard_bytes({"a": ("F32", (1,))}))
    refused(BadIndex, INDEX, src=src, out=out)
