"""Digests, runs and rows are held against each other by every verb, not by `verify` alone."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import moeconv
from moeconv.engine import add_digests as filling
from moeconv.engine.manifest_writer import virtual_parts
from moeconv.errors import BadPlacement, Damaged, NoExperts, NotVirtual, UsageProblem
from moeconv.manifest.model import Run
from moeconv.plan.model import CopyTile, OutputFile, OutputTensor
from moeconv.plan.shard import refuse_permuted
from moeconv.store.local import LocalStore
from moeconv.verification.structure import check_structure
from moeconv.verification.virtual import virtual_problems
from tests.badinput.builders import config, fused, qwen, write
from tests.badinput.checks import refused, untouched
from tests.helpers import tree_sha256
from tests.manifest.samples import edit_root

STACK = "model.layers.0.mlp.experts"


@pytest.fixture
def src(tmp_path: Path) -> Path:
    """Four experts in two layers."""
    return write(tmp_path / "src", qwen(layers=2), config=config(num_hidden_layers=2))


def silently_damaged(path: Path) -> None:
    """Another last byte; size and time are as before."""
    facts = path.stat()
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def filled(src: Path, out: Path) -> Path:
    """A virtual set with digests."""
    moeconv.shard(src, out, ep_size=2, virtual=True, layout="per-expert")
    assert moeconv.verify(out, level="source", source=src, fill=True).ok
    return out


def test_conversions_of_a_filled_virtual_output_mind_its_digests(src: Path, tmp_path: Path):
    out = filled(src, tmp_path / "v")
    silently_damaged(src / "model.safetensors")
    assert not moeconv.verify(out).ok
    refused_only_for_real = [lambda to: moeconv.merge(out, to), lambda to: moeconv.fuse(out, to)]
    for verb in refused_only_for_real:
        with untouched(out, src), pytest.raises(Damaged):
            verb(tmp_path / "to")
        assert not (tmp_path / "to").exists()


def test_a_virtual_output_of_a_filled_one_carries_its_digests(src: Path, tmp_path: Path):
    out = filled(src, tmp_path / "v")
    moeconv.shard(out, tmp_path / "again", ep_size=4, virtual=True)
    assert moeconv.verify(tmp_path / "again").ok
    assert moeconv.fingerprint(tmp_path / "again") == moeconv.fingerprint(src)


def test_runs_that_would_transpose_values_are_found(tmp_path: Path):
    """The proof plans anew and must refuse what the writer would not have written."""
    source = write(tmp_path / "vl", fused((4, 24, 16), (4, 8, 24)), config=config("qwen3_vl_moe"))
    plan = moeconv.shard(source, tmp_path / "n", ep_size=2, dry_run=True).plan
    with pytest.raises(NotVirtual):
        refuse_permuted(plan.files)
    out = tmp_path / "v"
    moeconv.shard(source, out, ep_size=2, virtual=True, layout="hub")
    manifest, _ = check_structure(LocalStore(out))
    assert manifest is not None
    stacks = tuple(replace(s, layout="fused") for s in manifest.root.stacks)
    turned = replace(manifest, root=replace(manifest.root, stacks=stacks))
    detection = moeconv.open_source(source).detection.checked()
    assert virtual_problems(detection, manifest) == []
    (problem,) = virtual_problems(detection, turned)
    assert isinstance(problem, Damaged)
    assert "runs cannot be right" in str(problem)


def test_rows_that_were_exchanged_are_refused_by_every_verb(src: Path, tmp_path: Path):
    out = tmp_path / "out"
    moeconv.shard(src, out, ep_size=2, redundant=2)

    def exchange(doc: Any) -> None:
        doc["stacks"][0]["physical_to_logical"] = [1, 0, 3, 2, 1, 0][:6]

    edit_root(out, exchange)
    for verb in (
        lambda: moeconv.merge(out, tmp_path / "m"),
        lambda: moeconv.shard(out, tmp_path / "m", ep_size=4),
        lambda: moeconv.fingerprint(out),
        lambda: moeconv.open_source(out),
    ):
        with untouched(out), pytest.raises(Damaged, match="fingerprint"):
            verb()


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupted_fill_harms_nothing(
    src: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
):
    """Wherever it stops, the set is whole again after one more `--fill`."""
    out, other = tmp_path / "v", tmp_path / "w"
    for place in (out, other):
        moeconv.shard(src, place, ep_size=2, virtual=True)
    calls = 0
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        return real(self, target)

    def write_(place: Path, name: str, raw: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            (place / name).write_bytes(raw[: len(raw) // 2])
            raise KeyboardInterrupt
        plain(place, name, raw)

    plain = filling._write
    monkeypatch.setattr(filling, "_write", write_)
    monkeypatch.setattr(Path, "replace", replace)
    try:
        moeconv.verify(out, level="source", source=src, fill=True)
    except KeyboardInterrupt:
        assert calls == at
    monkeypatch.undo()
    assert moeconv.verify(out, level="source", source=src, fill=True).ok
    assert moeconv.verify(out).ok
    moeconv.verify(other, level="source", source=src, fill=True)
    assert tree_sha256(out) == tree_sha256(other)


def test_runs_of_two_files_are_not_joined():
    """Where one file's run ends at the offset at which the next file's begins."""
    tensor = OutputTensor("a", "U8", (100,), 0, 100, 2, None)

    def runs(second: int) -> tuple[Run, ...]:
        tiles = (CopyTile(0, 50, 0, 0, 0, 100), CopyTile(50, 50, 0, 1, second, 150))
        file = OutputFile("", b"", 100, (tensor,), tiles, rank=0)
        (part,) = virtual_parts((file,), (), {})
        return part.tensors[0].runs

    assert runs(0) == (Run(0, 100, 100),)
    assert runs(1) == (Run(0, 100, 50), Run(1, 150, 50))


# --- words and choices -------------------------------------------------------------------------
def test_no_experts_is_reported_as_by_fuse(tmp_path: Path):
    src = write(tmp_path / "src", {"a.weight": ("BF16", (4, 4))}, config=config())
    out = tmp_path / "out"
    refused(NoExperts, "no routed experts", src=src, out=out, verb=moeconv.shard, ep_size=2)


def test_another_kind_of_stacks_gets_no_more_copies_than_it_can_hold(tmp_path: Path):
    tensors = qwen(8, layers=3) | {
        name.replace("model.layers.0", "vision.layers.0"): spec
        for name, spec in qwen(2).items()
        if ".layers." in name
    }
    src = write(tmp_path / "src", tensors, config={"model_type": "qwen3_moe"})
    moeconv.shard(src, tmp_path / "out", ep_size=2, redundant=6)
    root = json.loads((tmp_path / "out" / "moeconv.json").read_bytes().partition(b"\n")[0])
    slots = {s["name"]: len(s["physical_to_logical"]) for s in root["stacks"]}
    assert slots["vision.layers.0.mlp.experts"] == 2
    assert slots[STACK] == 14


def test_a_mapping_does_not_let_main_stacks_go_unshared(src: Path, tmp_path: Path):
    facts = ("4 experts", "ep 3")
    out = tmp_path / "out"
    refused(BadPlacement, *facts, src=src, out=out, verb=moeconv.shard, ep_size=3, placement={})


def test_a_misspelt_rule(src: Path, tmp_path: Path):
    facts = ("`round-robbin`", "round-robin")
    refused(
        UsageProblem,
        *facts,
        src=src,
        out=tmp_path / "out",
        verb=moeconv.shard,
        ep_size=2,
        placement="round-robbin",
    )


def test_names_reach_the_screen_escaped(tmp_path: Path):
    odd = {n.replace("model.", "mo\x1b[31mdel."): s for n, s in qwen().items()}
    src = write(tmp_path / "src", odd, config=config())
    refused(
        BadPlacement,
        r"mo\x1b[31mdel",
        src=src,
        out=tmp_path / "out",
        verb=moeconv.shard,
        ep_size=1,
        redundant=4,
    )


def test_tensor_files_beside_the_index_are_not_copied_into_a_virtual_output(tmp_path: Path):
    src = write(
        tmp_path / "src",
        {
            "model-1.safetensors": qwen(),
            "model-2.safetensors": {"model.norm.weight": ("BF16", (8,))},
        },
        config=config(),
    )
    (src / "consolidated.safetensors").write_bytes((src / "model-1.safetensors").read_bytes())
    out = tmp_path / "out"
    refused(
        NotVirtual,
        "consolidated.safetensors",
        "--exclude",
        src=src,
        out=out,
        verb=moeconv.shard,
        ep_size=2,
        virtual=True,
    )
    moeconv.shard(src, out, ep_size=2, virtual=True, exclude=("consolidated.safetensors",))
    assert not list(out.glob("*.safetensors"))
