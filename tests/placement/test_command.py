"""`moeconv placement`: what it shows, writes and refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from moeconv.placement.formats import FORMATS
from tests.badinput import builders
from tests.badinput.checks import untouched
from tests.cli.run import moeconv

A, B, C, D = [0, 1, 2, 3], [3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]
SGLANG = json.dumps({"physical_to_logical_map": [A, B, C, D]})
VLLM = json.dumps([B, C, D])


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts in layers 1 to 3 of 4, and in layer 4 of MTP."""
    tensors = builders.without(builders.qwen(layers=5), "layers.0.") | builders.dense(0)
    folder = tmp_path_factory.mktemp("placement") / "src"
    return builders.write(folder, tensors, config=builders.config(num_hidden_layers=4))


def test_help_lists_every_format():
    """By hand, as the table of formats takes longer to import than the help to print."""
    *names, last = FORMATS
    assert f"{', '.join(names)} or {last}." in moeconv("placement", "convert", "--help").out


def test_show_reports_what_was_assumed(src: Path):
    done = moeconv("placement", "show", SGLANG, "--source", src, "--ep", "2")
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        "format: sglang, 4 rows, by row\n"
        "slots: 4 (4 experts, 0 redundant)\n"
        "assumed: 4 rows: one for each hidden layer; rows 1-3 are the MoE layers, the dense ones "
        "were ignored; one for each MoE layer and MTP layer would fit too, but is not what sglang "
        "writes\n"
        "layers: 3 layers, not all alike\n"
        "layer 1 on 2 ranks of 2 slots:\n"
        "rank  experts\n"
        "0     3 2\n"
        "1     1 0\n"
    )


def test_show_needs_no_checkpoint():
    done = moeconv("placement", "show", "[0, 1, 2, 3, 1, 0]")
    assert done.code == 0
    assert "slots: 6 (4 experts, 2 redundant)" in done.out
    assert "`--source SRC` gives the exact number" in done.out


def test_show_as_json(src: Path):
    done = moeconv("placement", "show", VLLM, "--source", src, "--ep", "2", "--json")
    doc = json.loads(done.out)
    assert doc.pop("assumed").startswith("3 rows: one for each MoE layer")
    assert doc == {
        "type": "placement", "format": "vllm", "layers": [1, 2, 3], "experts": 4, "slots": 4,
        "redundant": 0, "ep": 2, "ok": True, "map": [B, C, D],
    }  # fmt: skip


def test_show_fails_with_all_problems(src: Path):
    bad = json.dumps([B, [0, 1, 2, 2], [0, 1, 2, 9]])
    done = moeconv("placement", "show", bad, "--source", src, "--ep", "2")
    assert done.code == 2
    assert "format: vllm" in done.out
    for fact in (
        "error[bad-placement]",
        "layer 2: expert 3 is in no slot",
        "layer 2: expert 2 is twice on rank 1",
        "layer 3: slot 3 holds expert 9",
    ):
        assert fact in done.err
    done = moeconv("placement", "show", bad, "--source", src, "--ep", "2", "--json")
    assert json.loads(done.out)["ok"] is False
    assert json.loads(done.err)["code"] == "bad-placement"


def test_convert_writes_what_the_other_system_counts(src: Path, tmp_path: Path):
    out = tmp_path / "map.json"
    with untouched(src):
        done = moeconv("placement", "convert", VLLM, "--to", "sglang", "-o", out, "--source", src)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert done.err == "vllm, 3 rows: one for each MoE layer, which are layers 1-3\n"
    assert json.loads(out.read_bytes()) == {"physical_to_logical_map": [A, B, C, D]}
    assert [p.name for p in tmp_path.iterdir()] == ["map.json"]


def test_convert_from_torch_and_to_every_format_and_back(src: Path, tmp_path: Path):
    first = tmp_path / "first.pt"
    torch.save({"physical_to_logical_map": torch.tensor([A, B, C, D])}, first)
    given: Path = first
    for name in ("trtllm", "ascend", "eplb", "vllm", "sglang"):
        out = tmp_path / (f"{name}.yaml" if name == "trtllm" else f"{name}.json")
        done = moeconv("placement", "convert", given, "--to", name, "-o", out, "--source", src,
                       "--ep", "2", "-q")  # fmt: skip
        assert (done.code, done.out, done.err) == (0, f"{out}\n", "")
        given = out
    assert json.loads(given.read_bytes()) == {"physical_to_logical_map": [A, B, C, D]}


def test_convert_as_json(src: Path, tmp_path: Path):
    out = tmp_path / "map.yaml"
    done = moeconv("placement", "convert", SGLANG, "--to", "trtllm", "-o", out, "--source", src,
                   "--json")  # fmt: skip
    doc = json.loads(done.out)
    assert (doc["format"], doc["source_format"], doc["output"]) == ("trtllm", "sglang", str(out))
    assert doc["layers"] == [1, 2, 3]


def refused(code: int, word: str, *arguments: str | Path, out: Path) -> None:
    with untouched(out.parent):
        done = moeconv("placement", "convert", *arguments, "-o", out)
    assert (done.code, done.out) == (code, "")
    assert f"error[{word}]" in done.err


def test_convert_never_replaces_a_file(src: Path, tmp_path: Path):
    out = tmp_path / "map.json"
    out.write_text("mine")
    refused(6, "would-overwrite", VLLM, "--to", "sglang", "--source", src, out=out)
    out.unlink()
    out.symlink_to("nowhere")
    refused(6, "would-overwrite", VLLM, "--to", "sglang", "--source", src, out=out)


def test_convert_writes_nothing_into_the_source(src: Path):
    out = src / "map.json"
    refused(2, "output-overlaps-source", VLLM, "--to", "sglang", "--source", src, out=out)


def test_convert_refuses_before_it_writes(src: Path, tmp_path: Path):
    out = tmp_path / "map.json"
    source = ("--source", src)
    refused(2, "bad-placement", VLLM, "--to", "slime", *source, out=out)
    refused(2, "bad-placement", VLLM, "--to", "ascend", *source, out=out)
    refused(2, "bad-placement", VLLM, "--to", "eplb", "--ep", "3", *source, out=out)
    refused(2, "bad-placement", json.dumps([A, B]), "--to", "eplb", *source, out=out)
    refused(4, "bad-placement-file", '{"logical_count": []}', "--to", "eplb", *source, out=out)
    refused(4, "bad-json", "[", "--to", "eplb", *source, out=out)
    refused(3, "io", VLLM, "--to", "eplb", *source, out=tmp_path / "absent" / "map.json")


def test_an_expert_twice_on_a_rank_only_where_allowed(src: Path, tmp_path: Path):
    out = tmp_path / "map.json"
    twice = json.dumps([0, 0, 1, 1, 2, 3])
    given = (twice, "--to", "vllm", "--source", src, "--ep", "2")
    refused(2, "bad-placement", *given, out=out)
    done = moeconv("placement", "convert", *given, "-o", out, "--allow-duplicates")
    assert done.code == 0
    assert json.loads(out.read_bytes()) == [[0, 0, 1, 1, 2, 3]] * 3


def test_a_map_for_other_devices_is_refused(src: Path, tmp_path: Path):
    out = tmp_path / "ascend.json"
    moeconv("placement", "convert", VLLM, "--to", "ascend", "--ep", "2", "--source", src, "-o", out)
    done = moeconv("placement", "show", out, "--ep", "4")
    assert done.code == 2
    assert "the map is for 2 devices, not for ep 4" in done.err
    assert moeconv("placement", "show", out).code == 0


def test_fewer_slots_than_experts_are_not_a_negative_number():
    done = moeconv("placement", "show", "[[0, 5]]", "--ep", "2")
    assert done.code == 2
    assert "slots: 2 (6 experts, too few)" in done.out
    assert not re.search(r"-[0-9]+ redundant|[^0-9]0 slots", done.out + done.err)
    told = moeconv("placement", "show", "[[0, 5]]", "--ep", "2", "--json").out
    doc, _ = json.JSONDecoder().raw_decode(told)
    assert doc["redundant"] is None
    empty = moeconv("placement", "show", "[[]]")
    assert (empty.code, "redundant" in empty.err, "has no slots" in empty.err) == (4, False, True)
