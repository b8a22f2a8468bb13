"""Files that somebody added to a set: what a program would load is a problem, the rest is named."""

import json
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.core.digest import digest
from tests.badinput.builders import qwen, shard_bytes
from tests.cli.run import moeconv as command
from tests.verification.forged import resign

LOADED = [
    ("out", "pytorch_model.bin"),
    ("out", "sub/model.safetensors"),
    ("out", "modeling_x.py"),
    ("out", "sub/deep/x.PT"),
    ("out", "other.safetensors.index.json"),
    ("out", "adapter_config.json"),
    ("out", "moeconv/x.pkl"),
    ("out", "params.json"),
    ("out", "quant_model_description.json"),
    ("out", "vocab.txt"),
    ("ranks", "Chat_Template.jinja"),
    ("ranks", "additional_chat_templates/tools.jinja"),
    ("ranks", "model.safetensors.index.json"),
    ("ranks", "pytorch_model.bin.index.json"),
    ("ranks", "rank-9.safetensors"),
]
HARMLESS = ["README.md", ".gitattributes", ".DS_Store", "notes/todo.txt", "moeconv/.x.partial"]


@pytest.mark.parametrize(("kind", "name"), LOADED)
def test_what_a_program_would_load(kind: str, name: str, request: pytest.FixtureRequest, src: Path):
    out: Path = request.getfixturevalue(kind)
    path = out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(shard_bytes(qwen()))
    for more in ({"level": "structure"}, {}, {"level": "source", "source": src}):
        (problem,) = moeconv.verify(out, **more).problems  # type: ignore[arg-type]
        assert f"`{name}` does not belong to the output" in str(problem)
    path.unlink()
    assert moeconv.verify(out).ok


def test_a_link_to_a_folder(out: Path, tmp_path: Path):
    """What is there is not looked at: it may be another thing tomorrow."""
    (tmp_path / "elsewhere").mkdir()
    (out / "original").symlink_to(tmp_path / "elsewhere")
    (problem,) = moeconv.verify(out, level="structure").problems
    assert "`original` does not belong to the output" in str(problem)


@pytest.mark.parametrize("kind", ["out", "ranks"])
def test_a_header_with_more_than_an_output_has(kind: str, request: pytest.FixtureRequest):
    """Programs choose by it how they read the tensors."""
    out: Path = request.getfixturevalue(kind)
    data = max(out.glob("*.safetensors"))
    raw = data.read_bytes()
    at = 8 + int.from_bytes(raw[:8], "little")
    text = raw[8:at].replace(b'"format":"pt"', b'"format":"tf"')
    data.write_bytes(raw[:8] + text + raw[at:])

    def part(doc: Any) -> None:
        for file in doc.get("files", [doc]):
            if file["file"] == data.name:
                file["header"]["digest"] = digest(raw[:8] + text)

    resign(out, part=part)
    (problem,) = moeconv.verify(out).problems
    assert "`__metadata__` is not" in str(problem)


def test_an_index_with_more_than_an_output_has(out: Path):
    path = out / "model.safetensors.index.json"
    doc = json.loads(path.read_bytes())
    doc["metadata"]["format"] = "mlx"
    path.write_text(json.dumps(doc))
    resign(out)
    (problem,) = moeconv.verify(out).problems
    assert "it has more than the tensors" in str(problem)


def test_what_nobody_loads_is_named(out: Path):
    for name in HARMLESS:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    done = command("verify", out)
    assert done.code == 0
    assert all(f"`{name}` is not part of this output" in done.err for name in HARMLESS)
    doc = json.loads(command("verify", out, "--json").out)
    assert doc["ok"]
    assert len(doc["warnings"]) == len(HARMLESS)


def test_many_are_counted_not_listed(out: Path):
    for number in range(500):
        (out / f"{number}.bin").touch()
        (out / f"{number}.txt").touch()
    report = moeconv.verify(out)
    assert len(report.problems) == 20
    assert "480 more" in str(report.problems[-1])
    assert len(report.warnings) == 21
    assert "480 more" in report.warnings[-1]


def test_an_output_that_may_not_be_listed(out: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(out))

    monkeypatch.setattr("moeconv.store.local.files_below", refuse)
    (problem,) = moeconv.verify(out, level="structure").problems
    assert "cannot list" in str(problem)
