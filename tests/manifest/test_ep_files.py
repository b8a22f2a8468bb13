"""Files of expert-parallel sets and sources of virtual ones: missing, damaged, exchanged."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.api.open import open_source
from moeconv.core.digest import digest
from moeconv.errors import (
    BadManifest,
    Damaged,
    IoFailed,
    MissingShard,
    MoeconvError,
    NotVirtual,
    SourceChanged,
    SourceMissing,
    TruncatedFile,
    UnsafePath,
)
from tests.badinput.checks import holds, untouched, within
from tests.manifest.broken import reported
from tests.manifest.epsamples import (
    COMMON,
    COMMON_FILE,
    RANK_0_FILE,
    RANK_1,
    RANK_1_FILE,
    SOURCE_FILE,
    fresh,
)
from tests.manifest.samples import edit_part, edit_root


def _opened(made: Path, kind: type[MoeconvError], *facts: str) -> None:
    with within(10), pytest.raises(MoeconvError) as caught:
        open_source(made)
    holds(caught.value, kind, *facts)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A set for two ranks with nothing wrong."""
    return fresh(tmp_path, "fused")


@pytest.fixture
def virtual(tmp_path: Path) -> Path:
    """A virtual set; its source is beside it."""
    return fresh(tmp_path, "virtual")


# --- files -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [COMMON_FILE, RANK_1_FILE])
def test_a_data_file_is_missing(made: Path, name: str):
    (made / name).unlink()
    reported(made, MissingShard, name)
    _opened(made, MissingShard, name)


@pytest.mark.parametrize("name", [COMMON, RANK_1])
def test_a_part_is_missing(made: Path, name: str):
    (made / name).unlink()
    reported(made, MissingShard, name)
    _opened(made, MissingShard, name)


@pytest.mark.parametrize("name", [COMMON, RANK_1])
def test_a_part_is_of_another_output(made: Path, name: str):
    raw = (made / name).read_bytes()
    (made / name).write_bytes(raw.replace(b"BF16", b"BF32"))
    reported(made, Damaged, name, "digest")
    _opened(made, Damaged, name, "digest")


def test_the_files_of_two_ranks_are_exchanged(made: Path):
    one, other = (made / name for name in (RANK_0_FILE, RANK_1_FILE))
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second)
    one.write_bytes(second)
    other.write_bytes(first)
    # a rank's headers are like another's: only the digests of the data tell
    report = moeconv.verify(made, jobs=1)
    assert not report.ok
    assert RANK_0_FILE in str(report.problems[0])


def test_a_data_file_is_cut_short(made: Path):
    path = made / RANK_1_FILE
    path.write_bytes(path.read_bytes()[:-1])
    reported(made, TruncatedFile, RANK_1_FILE)


def test_a_part_that_is_a_link_out(made: Path):
    shutil.move(made / RANK_1, made.with_name("part.json"))
    (made / RANK_1).symlink_to(made.with_name("part.json"))
    reported(made, UnsafePath, RANK_1)
    _opened(made, UnsafePath, RANK_1)


def test_a_file_that_no_part_names(made: Path):
    stray = "rank-00002-of-00002-00001-of-00001.safetensors"
    shutil.copy(made / RANK_1_FILE, made / stray)
    reported(made, Damaged, stray)


def test_one_rank_has_another_dtype(made: Path):
    # header, part and root agree: only its fellows show that this rank is wrong
    path = made / RANK_1_FILE
    raw = path.read_bytes()
    head = raw[:4096].replace(b'"BF16"', b'"F16" ')
    path.write_bytes(head + raw[4096:])

    def edit(doc: Any) -> None:
        (file,) = doc["files"]
        file["header"]["digest"] = digest(head)
        for tensor in file["tensors"]:
            tensor["dtype"] = "F16"

    edit_part(made, edit, RANK_1)
    reported(made, BadManifest, "F16", "BF16")


# --- sources -----------------------------------------------------------------------------------
def _source(virtual: Path) -> Path:
    return virtual.with_name("source")


def test_a_source_that_was_touched(virtual: Path):
    os.utime(_source(virtual) / SOURCE_FILE, ns=(0, 10**18))
    reported(virtual, SourceChanged, SOURCE_FILE)
    _opened(virtual, SourceChanged, SOURCE_FILE)


def test_a_source_with_another_header(virtual: Path):
    path = _source(virtual) / SOURCE_FILE
    facts, raw = path.stat(), path.read_bytes()
    path.write_bytes(raw.replace(b'"F32"', b'"I32"'))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    reported(virtual, SourceChanged, SOURCE_FILE)
    _opened(virtual, SourceChanged, SOURCE_FILE)


def test_a_source_file_that_is_gone(virtual: Path):
    path = _source(virtual) / SOURCE_FILE
    path.rename(path.with_name("other.safetensors"))
    reported(virtual, SourceChanged)
    _opened(virtual, SourceChanged)


@pytest.mark.parametrize("name", ["more.safetensors", "a.safetensors", "[a-z]*.safetensors"])
def test_a_file_beside_those_of_the_source_is_not_part_of_it(virtual: Path, name: str):
    shutil.copy(_source(virtual) / SOURCE_FILE, _source(virtual) / name)
    assert moeconv.verify(virtual, level="structure", jobs=1).ok


def test_a_virtual_output_of_one_file_among_others(virtual: Path, tmp_path: Path):
    shutil.copy(_source(virtual) / SOURCE_FILE, _source(virtual) / "other.safetensors")
    for number, (src, exclude) in enumerate(
        [(_source(virtual) / SOURCE_FILE, ()), (_source(virtual), ("other*",))]
    ):
        out = tmp_path / f"set{number}"
        moeconv.shard(
            src, out, ep_size=1, layout="per-expert", virtual=True, exclude=exclude,
            recipe=tmp_path / "tiny.toml", jobs=1,
        )  # fmt: skip
        assert moeconv.verify(out, level="structure", jobs=1).ok


def test_an_index_that_comes_into_the_source_does_not_matter(virtual: Path):
    index = {"metadata": {}, "weight_map": {"x": "more.safetensors"}}
    (_source(virtual) / "model.safetensors.index.json").write_text(json.dumps(index))
    (_source(virtual) / "config.json").write_text("not even JSON")
    (_source(virtual) / "more.safetensors").symlink_to("/dev/null")
    assert moeconv.verify(virtual, level="structure", jobs=1).ok
    assert moeconv.open_source(virtual).detection.problems == ()


def test_a_source_last_changed_before_1970(virtual: Path, tmp_path: Path):
    os.utime(_source(virtual) / SOURCE_FILE, ns=(0, -1))
    _not_virtual(_source(virtual), tmp_path, SOURCE_FILE, "1970")


def test_a_source_whose_path_is_not_a_text(virtual: Path, tmp_path: Path):
    place = _source(virtual).rename(tmp_path / os.fsdecode(b"\xff"))
    _not_virtual(place, tmp_path, "not UTF-8")


def _not_virtual(source: Path, tmp_path: Path, *facts: str) -> None:
    out = tmp_path / "out"
    recipe = tmp_path / "tiny.toml"
    with untouched(out), pytest.raises(NotVirtual) as caught:
        moeconv.shard(source, out, ep_size=1, virtual=True, recipe=recipe, jobs=1)
    holds(caught.value, NotVirtual, *facts)


def test_a_source_directory_that_is_gone(virtual: Path):
    shutil.rmtree(_source(virtual))
    reported(virtual, SourceMissing, "source")
    _opened(virtual, SourceMissing, "source")


def test_a_source_that_is_a_file(virtual: Path):
    shutil.rmtree(_source(virtual))
    _source(virtual).write_bytes(b"")
    with within(10):
        report = moeconv.verify(virtual, level="structure", jobs=1)
    assert not report.ok


def test_a_virtual_output_of_itself(virtual: Path):
    edit_root(virtual, lambda doc: doc["source"].update(directory=str(virtual)))
    reported(virtual, SourceChanged, "itself a virtual output")
    _opened(virtual, SourceChanged, "itself a virtual output")


@pytest.mark.parametrize("directory", ["/\0", "/\ud800", "/x\x1b[2J", "/" + "d" * 5000])
def test_a_source_directory_that_is_not_a_name(virtual: Path, directory: str):
    edit_root(virtual, lambda doc: doc["source"].update(directory=directory))
    with within(10):
        (problem,) = moeconv.verify(virtual, level="structure", jobs=1).problems
    assert isinstance(problem, BadManifest | IoFailed)
    assert all(line.isprintable() for line in str(problem).splitlines())


def test_the_source_is_never_fetched(virtual: Path, monkeypatch: pytest.MonkeyPatch):
    def connect(*_: object) -> None:
        pytest.fail("a manifest must not make anybody connect")

    monkeypatch.setattr("moeconv.store.hub.HubStore.__init__", connect)
    edit_root(virtual, lambda doc: doc["source"].update(directory="hf://org/name"))
    reported(virtual, BadManifest, "source.directory")


def test_bytes_changed_under_the_same_header(virtual: Path):
    # size, time and header are all that structure knows; with digests the data is known, too
    source = _source(virtual)
    recipe = virtual.with_name("tiny.toml")
    filled = moeconv.verify(
        virtual, level="source", source=source, recipe=recipe, fill=True, jobs=1
    )
    assert filled.ok, filled.problems
    root = json.loads((virtual / "moeconv.json").read_bytes().split(b"\n")[0])
    assert root["fingerprint"] == filled.fingerprint
    path = source / SOURCE_FILE
    facts, raw = path.stat(), path.read_bytes()
    path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert moeconv.verify(virtual, level="structure", jobs=1).ok
    report = moeconv.verify(virtual, jobs=1)
    assert [p.code for p in report.problems] == ["damaged"]
    assert "mtp.layers.0.mlp.experts.2.down.weight" in str(report.problems[0])
