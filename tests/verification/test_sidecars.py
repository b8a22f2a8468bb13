"""`verify --source` and what is no tensor: sidecars, the origin, the index, SRC itself."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.errors import Damaged, UsageProblem
from tests.badinput.builders import config, qwen, write
from tests.manifest.samples import edit_root
from tests.verification.forged import flip, keep_in_origin, resign
from tests.verification.test_recipes import against

LISTED = {"ignored_layers": ["model.layers.0.mlp.experts.0.gate_proj", "lm_head"]}


# --- sidecars ----------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["out", "ranks"])
def test_a_config_that_src_does_not_have(kind: str, src: Path, request: pytest.FixtureRequest):
    """Though the origin keeps SRC's own, as it would where the config had been rewritten."""
    out: Path = request.getfixturevalue(kind)
    old = (out / "config.json").read_bytes()
    (out / "config.json").write_bytes(old.replace(b'"hidden_size"', b'"rope": 1, "hidden_size"'))
    keep_in_origin(out, "config.json", old)
    resign(out)
    assert moeconv.verify(out).ok
    assert "`config.json` is not the same" in against(out, src)


def test_an_origin_that_keeps_another_config(out: Path, src: Path):
    """A restore would write that one."""
    keep_in_origin(out, "config.json", b"{}")
    resign(out)
    assert "a restore would write those" in against(out, src)
    keep_in_origin(out, "tokenizer.json", b"{}")  # which no conversion ever rewrites
    resign(out)
    assert "`tokenizer.json` is not the same" in against(out, src)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json"])
def test_a_rewritten_list_is_compared_with_what_it_should_be(name: str, tmp_path: Path):
    quantised = {"quant_method": "fp8", "modules_to_not_convert": [
        *(f"model.layers.0.mlp.experts.{e}.{p}_proj" for e in range(4) for p in ("gate", "up")),
    ]}  # fmt: skip
    more = {"quantization_config": quantised} if name == "config.json" else {}
    src = write(tmp_path / "src", qwen(), config=config(**more))
    if not more:
        listed = {"quantization": {"exclude_modules": quantised["modules_to_not_convert"]}}
        (src / name).write_text(json.dumps(listed))
    out, ranks = tmp_path / "out", tmp_path / "ranks"
    moeconv.fuse(src, out, layout="stacked")
    moeconv.shard(out, ranks, ep_size=2)
    for made, source in ((out, src), (ranks, src), (ranks, out)):
        assert (made / name).read_bytes() != (src / name).read_bytes()
        assert moeconv.verify(made, level="source", source=source).problems == ()
    raw = (out / name).read_bytes()
    (out / name).write_bytes(raw.replace(b"gate_proj", b"down_proj"))
    resign(out)
    assert moeconv.verify(out).ok
    assert "the experts' modules renamed" in against(out, src)
    (out / name).write_bytes((src / name).read_bytes())  # not rewritten at all
    resign(out)
    assert f"`{name}` is not the same" in against(out, src)


def test_a_sidecar_that_src_does_not_have(out: Path, src: Path):
    (out / "notes.txt").write_text("mine")

    def root(doc: Any) -> None:
        doc["sidecars"].append({"name": "notes.txt", "size": 0, "digest": ""})

    resign(out, root=root)
    assert moeconv.verify(out).ok
    assert "it is absent from SRC" in against(out, src)


def test_a_foreign_output_may_have_a_readme_more_but_no_code(src: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(src, copy)
    (copy / "README.md").write_text("mine")
    report = moeconv.verify(copy, level="source", source=src)
    assert report.ok
    assert report.warnings == ("`README.md` is in OUT only",)
    (copy / "modeling_x.py").write_text("import os")
    assert "`modeling_x.py` is not the same" in against(copy, src)


def test_an_origin_of_another_source(out: Path, src: Path, tmp_path: Path):
    """The same tensors in the same layout, from files of other headers."""
    other = tmp_path / "other"
    shutil.copytree(src, other)
    path = other / "model.safetensors"
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    padded = (size + 8).to_bytes(8, "little") + raw[8 : 8 + size] + b" " * 8 + raw[8 + size :]
    path.write_bytes(padded)
    assert {d.mark for d in moeconv.diff(src, other)} == {"="}
    assert "would write other files than SRC's" in against(out, other)


# --- SRC that is OUT ---------------------------------------------------------------------------
def _link(out: Path, to: Path) -> None:
    to.symlink_to(out)


def _hard(out: Path, to: Path) -> None:
    shutil.copytree(out, to, copy_function=os.link)


def _linked_files(out: Path, to: Path) -> None:
    """The data file alone is the same; header, index and documents are copies."""
    shutil.copytree(out, to)
    for path in to.glob("*.safetensors"):
        path.unlink()
        os.link(out / path.name, path)


def _virtual(out: Path, to: Path) -> None:
    moeconv.shard(out, to, ep_size=2, virtual=True)


def _single(out: Path, to: Path) -> None:
    to.symlink_to(next(out.glob("*.safetensors")))


@pytest.mark.parametrize("make", [_link, _hard, _linked_files, _virtual, _single])
def test_a_source_that_is_out_itself(make: Callable[[Path, Path], None], src: Path, tmp_path: Path):
    out, to = tmp_path / "later", tmp_path / "to"
    moeconv.fuse(src, out, digests="later")
    flip(next(out.glob("*.safetensors")))
    make(out, to)
    for fill in (False, True):
        with pytest.raises(UsageProblem, match="OUT itself"):
            moeconv.verify(out, level="source", source=to, fill=fill)
    assert not moeconv.verify(out).ok


@pytest.mark.parametrize("name", ["", ".", "..", "moeconv", "../later/x/.."])
def test_a_source_in_or_around_out(name: str, src: Path, tmp_path: Path):
    out = tmp_path / "later"
    moeconv.fuse(src, out, digests="later")
    (out / "x").mkdir()
    with pytest.raises(UsageProblem, match="OUT itself"):
        moeconv.verify(out, level="source", source=out / name)


def test_a_virtual_output_and_its_source_share_their_bytes(src: Path, out: Path, tmp_path: Path):
    for number, source in enumerate((src, out)):
        made = tmp_path / f"v{number}"
        layout = "per-expert" if source is src else None
        moeconv.shard(source, made, ep_size=2, virtual=True, layout=layout)
        assert moeconv.verify(made, level="source", source=source).problems == ()


# --- the index ---------------------------------------------------------------------------------
def test_an_index_that_no_loader_follows(out: Path):
    other = "other.safetensors.index.json"
    shutil.copy(out / "model.safetensors.index.json", out / other)
    edit_root(out, lambda doc: doc["index"].update(name=other))
    for level in ("structure", "digest"):
        stated = "\n".join(map(str, moeconv.verify(out, level=level).problems))
        assert f"its index is `{other}`" in stated
        assert "`model.safetensors.index.json` does not belong" in stated


def test_an_index_among_the_sidecars_of_a_sharded_output(ranks: Path):
    name = "model.safetensors.index.json"
    (ranks / name).write_text("{}")

    def root(doc: Any) -> None:
        doc["sidecars"].append({"name": name, "size": 0, "digest": ""})

    resign(ranks, root=root)
    (problem,) = moeconv.verify(ranks).problems
    assert isinstance(problem, Damaged)
    assert "an expert-parallel output has none" in str(problem)
