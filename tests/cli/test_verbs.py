"""What each verb shows: data on stdout, talk on stderr, one document with --json."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.run import moeconv, on_screen


def test_fuse_prints_the_path_to_stdout_and_messages_to_stderr(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = moeconv("fuse", source, "-o", out)
    assert (done.code, done.out) == (0, f"{out}\n")
    assert "117 tensors" in done.err
    assert "fuse: " in done.err  # the heartbeat of a run that is not on a screen
    assert "\r" not in done.err


def test_quiet_says_nothing_but_the_path(source: Path, tmp_path: Path) -> None:
    done = moeconv("fuse", source, "-o", tmp_path / "out", "-q")
    assert (done.code, done.out, done.err) == (0, f"{tmp_path / 'out'}\n", "")


def test_fuse_as_json(source: Path, tmp_path: Path) -> None:
    done = moeconv("fuse", source, "-o", tmp_path / "out", "--json")
    doc = json.loads(done.out)
    assert doc["type"] == "result"
    assert (
        doc["output"]["bytes"] == doc["source"]["bytes"] == sum(f["bytes"] for f in doc["ledger"])
    )
    assert {f["fate"] for f in doc["ledger"]} == {"copied", "fused"}
    assert doc["fingerprint"] == moeconv("fingerprint", source, "-q").out.strip()


def test_dry_run_touches_nothing_and_prints_the_plan(source: Path, tmp_path: Path) -> None:
    done = moeconv("fuse", source, "-o", tmp_path / "out", "-n", "--max-shard-size", "1MB")
    assert done.code == 0
    assert "model-00001-of-00003.safetensors" in done.out
    assert not (tmp_path / "out").exists()


def test_dry_run_fails_where_the_run_would(source: Path, fused: Path) -> None:
    done = moeconv("fuse", source, "-o", fused, "-n")
    assert done.code == 6
    assert "error[would-overwrite]" in done.err


def test_overwrite_replaces_what_we_made(source: Path, fused: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(fused, out)
    (out / "model-00001-of-00001.safetensors").write_bytes(b"")
    assert moeconv("fuse", source, "-o", out, "--overwrite").code == 0
    assert moeconv("verify", out).code == 0


def test_unfuse_restores_the_tree(source: Path, fused: Path, tmp_path: Path) -> None:
    assert moeconv("unfuse", fused, "-o", tmp_path / "back").code == 0
    names = sorted(p.name for p in source.iterdir())
    assert names == sorted(p.name for p in (tmp_path / "back").iterdir())
    assert all((source / n).read_bytes() == (tmp_path / "back" / n).read_bytes() for n in names)


def test_verify_says_yes_and_no(source: Path, fused: Path, tmp_path: Path) -> None:
    for arguments in (["--level", "structure"], [], ["--source", source]):
        done = moeconv("verify", fused, *arguments)
        assert done.code == 0
        assert done.out.startswith("ok: ")
    broken = tmp_path / "broken"
    shutil.copytree(fused, broken)
    file = broken / "model-00001-of-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = moeconv("verify", broken, "--json")
    report = json.loads(done.out)
    assert done.code == 1
    assert not report["ok"]
    assert report["problems"][0]["code"] == "damaged"
    assert moeconv("verify", broken, "--level", "structure").code == 0
    assert moeconv("verify", broken, "--source", source).code == 1


def test_verify_needs_a_source_for_level_source(fused: Path) -> None:
    assert moeconv("verify", fused, "--level", "source").code == 2


def test_verify_of_a_foreign_checkpoint_is_not_an_answer(source: Path) -> None:
    assert moeconv("verify", source).code == 5


def test_diff_across_layouts(source: Path, fused: Path, tmp_path: Path) -> None:
    done = moeconv("diff", source, fused)
    assert (done.code, done.out) == (0, "")
    other = tmp_path / "other"
    shutil.copytree(source, other)
    file = other / "model-00003-of-00003.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    done = moeconv("diff", other, fused)
    assert done.code == 1
    assert done.out.count("\n") == 1
    assert done.out.startswith("* model.")


def test_inspect_shows_stacks(source: Path) -> None:
    done = moeconv("inspect", source)
    assert done.code == 0
    assert "model.layers.{0-1}.mlp.experts" in done.out
    assert "per-expert" in done.out


def test_inspect_as_json(source: Path) -> None:
    doc = json.loads(moeconv("inspect", source, "--json").out)
    assert [s["experts"] for s in doc["stacks"]] == [16, 16]
    assert doc["problems"] == []


def test_inspect_lists_tensors_in_natural_order(source: Path) -> None:
    done = moeconv("inspect", source, "--tensors", "*.0.mlp.experts.*.gate_proj.weight")
    names = [line.split()[0] for line in done.out.splitlines()[1:]]
    assert [int(n.split(".")[5]) for n in names] == list(range(16))


def test_inspect_survives_damaged_experts(source: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(source, broken)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 17}))
    done = moeconv("inspect", broken)
    assert done.code == 1
    assert "117 tensors" in done.out
    assert "error[config-mismatch]" in done.err


def test_single_file_source(source: Path, tmp_path: Path) -> None:
    fused = tmp_path / "fused"
    assert moeconv("fuse", source, "-o", fused, "-q").code == 0
    lone = fused / "model-00001-of-00001.safetensors"
    assert moeconv("inspect", lone).code == 0


def test_recipes(tmp_path: Path) -> None:
    listed = moeconv("recipes", "list")
    assert "deepseek_v3" in listed.out
    assert moeconv("recipes") == listed
    shown = moeconv("recipes", "show", "mixtral").out
    (tmp_path / "mine.toml").write_text(shown)
    assert moeconv("recipes", "check", tmp_path / "mine.toml").out == "ok: mixtral\n"
    (tmp_path / "bad.toml").write_text(shown.replace("unfuse =", "unfuze ="))
    done = moeconv("recipes", "check", tmp_path / "bad.toml")
    assert done.code == 2
    assert "did you mean `unfuse`?" in done.err


def test_recipe_file_makes_an_unknown_family_known(source: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed"
    shutil.copytree(source, renamed)
    config = json.loads((renamed / "config.json").read_text())
    (renamed / "config.json").write_text(json.dumps(config | {"model_type": "new_moe"}))
    done = moeconv("fuse", renamed, "-o", tmp_path / "out")
    assert done.code == 5
    assert "error[unknown-family]" in done.err
    done = moeconv("fuse", renamed, "-o", tmp_path / "out", "--recipe", "qwen3_moe")
    assert done.code == 0


def test_a_screen_gets_one_bar(source: Path, tmp_path: Path) -> None:
    code, shown = on_screen("fuse", source, "-o", tmp_path / "out")
    assert code == 0
    assert "100%" in shown
    assert "MB/s" in shown or "GB/s" in shown or "kB/s" in shown


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_any_width_keeps_every_word(source: Path, columns: int) -> None:
    code, shown = on_screen("inspect", source, columns=columns)
    assert code == 0
    assert "per-expert" in shown.replace("\r\n", "")
    assert "117 tensors" in shown


def test_a_model_without_experts_is_reported(tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    plain = tmp_path / "plain"
    plain.mkdir()
    save_file({"a.weight": np.zeros((2, 2), np.float32)}, plain / "model.safetensors")
    (plain / "config.json").write_text('{"model_type": "llama"}')
    assert "no routed experts" in moeconv("inspect", plain).out
    assert moeconv("fuse", plain, "-o", tmp_path / "out").code == 5
