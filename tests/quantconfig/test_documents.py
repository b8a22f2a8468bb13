"""Documents beside config.json that name experts: rewritten like it, or reported as they are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import moeconv
from tests.badinput.builders import STACK, qwen, write
from tests.helpers import tree_sha256

MODULES = [f"{STACK}.{e}.{p}_proj" for e in range(8) for p in ("gate", "up", "down")]


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write(tmp_path / "src", qwen(8), index=False)


@pytest.mark.parametrize(
    "name",
    ["hf_quant_config.json", "quantization_config.json", "quantize_config.json",
     "quant_config.json"],
)  # fmt: skip
def test_lists_of_modules_get_the_new_names(src: Path, tmp_path: Path, name: str) -> None:
    (src / name).write_text(json.dumps({"quant_method": "modelopt", "ignore": MODULES}))
    result = moeconv.fuse(src, tmp_path / "out")
    assert json.loads((tmp_path / "out" / name).read_text())["ignore"] == [STACK]
    assert any(note.startswith(f"{name}, `ignore`") for note in result.plan.notes)
    assert moeconv.verify(tmp_path / "out", source=src).ok
    moeconv.unfuse(tmp_path / "out", tmp_path / "back")
    assert tree_sha256(tmp_path / "back") == tree_sha256(src)


@pytest.mark.parametrize("name", ["quant_model_description.json", "adapter_config.json"])
def test_other_documents_with_old_names_are_reported(src: Path, tmp_path: Path, name: str) -> None:
    raw = json.dumps({f"{module}.weight": "W8A8_DYNAMIC" for module in MODULES})
    (src / name).write_text(raw)
    result = moeconv.fuse(src, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == raw
    assert [note for note in result.plan.notes if note.startswith(name)]
    # nothing has another name where the layout stays
    kept = moeconv.unfuse(src, tmp_path / "same")
    assert not [note for note in kept.plan.notes if note.startswith(name)]


def test_documents_without_experts_are_not_reported(src: Path, tmp_path: Path) -> None:
    (src / "adapter_config.json").write_text('{"target_modules": ["q_proj"]}')
    result = moeconv.fuse(src, tmp_path / "out")
    assert not [note for note in result.plan.notes if note.startswith("adapter_config")]


@pytest.mark.parametrize("name", ["hf_quant_config.json", "quant_model_description.json"])
def test_a_pointer_instead_of_a_document_is_copied(src: Path, tmp_path: Path, name: str) -> None:
    raw = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (src / name).write_text(raw)
    moeconv.fuse(src, tmp_path / "out")
    assert (tmp_path / "out" / name).read_text() == raw
