"""Commands on `hf://` addresses: what they ask of a server that speaks the Hub's protocol."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from tests.cli.run import Done, environment, moeconv
from tests.helpers import read_header, tree_sha256, write_checkpoint
from tests.store.hub_server import (
    COMMIT,
    TOKEN,
    HubServer,
    client_environment,
    files_of,
    serving,
)

pytest.importorskip("huggingface_hub")

ADDRESS: Final = "hf://org/name"
_MIB: Final = 1 << 20
_EXPERTS, _SHARDS = 4, 6
# every second shard has a header of more than a mebibyte, and all have more data than that
_PADDING: Final = (0, _MIB + 100_000)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six shards of a small Qwen3-MoE, with sidecars."""
    shards = []
    tensors = {}
    for layer in range(_SHARDS):
        names = [
            f"model.layers.{layer}.mlp.experts.{e}.{p}_proj.weight"
            for e in range(_EXPERTS)
            for p in ("gate", "up", "down")
        ]
        for name in names:
            shape = (512, 256) if "down" not in name else (256, 512)
            tensors[name] = ("BF16", shape, os.urandom(512 * 256 * 2))
        router = f"model.layers.{layer}.mlp.gate.weight"
        tensors[router] = ("BF16", (_EXPERTS, 256), os.urandom(_EXPERTS * 256 * 2))
        shards.append([*names, router])
    config = {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_experts": _EXPERTS,
        "num_hidden_layers": _SHARDS,
        "moe_intermediate_size": 512,
        "hidden_size": 256,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
    root = tmp_path_factory.mktemp("hub") / "src"
    write_checkpoint(root, tensors, config, shards=shards, padding=_PADDING)
    (root / "tokenizer.json").write_bytes(b"{}" + b" " * 3 * _MIB)
    (root / "inner").mkdir()
    (root / "inner/README.md").write_text("a sidecar in a folder\n")
    return root


@pytest.fixture
def server(source: Path) -> Iterator[HubServer]:
    with serving(files_of(source)) as running:
        yield running


def run(server: HubServer, home: Path, *arguments: str | Path, **more: str) -> Done:
    return moeconv(*arguments, **client_environment(server, home), **more)


def _shards(source: Path) -> list[str]:
    return sorted(path.name for path in source.glob("*.safetensors"))


def _check_only_headers(server: HubServer, source: Path) -> None:
    """At most two ranges and a redirect a shard; config and index once; no other file."""
    asked = dict(server.requests)
    assert asked.pop("listing") == 1
    for name in _shards(source):
        header = read_header(source / name)[0]
        ranges = 1 if header <= _MIB else 2
        assert asked.pop(name) == 1 + ranges
        assert server.sent[name] <= header + _MIB
    assert asked == {"config.json": 1, "model.safetensors.index.json": 1}


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", ADDRESS),
        ("inspect", f"{ADDRESS}@{COMMIT}", "--json"),
        ("fuse", "-n", ADDRESS, "-o", "out"),
        ("shard", "-n", "--ep", "2", ADDRESS, "-o", "out"),
        ("shard", "-n", "--ep", "2", "--virtual", ADDRESS, "-o", "out"),
        ("placement", "show", str([[3, 2, 1, 0]] * _SHARDS), "--ep", "2", "--source", ADDRESS),
    ],
    ids=" ".join,
)
def test_only_headers_are_fetched(
    server: HubServer, source: Path, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    placed = [str(tmp_path / a) if a == "out" else a for a in arguments]
    done = run(server, tmp_path / "home", *placed)
    assert done.code == 0, done.err
    _check_only_headers(server, source)
    assert not (tmp_path / "out").exists()


def test_what_is_shown_is_what_the_directory_shows(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    remote = json.loads(run(server, tmp_path, "inspect", ADDRESS, "--json").out)
    local = json.loads(moeconv("inspect", source, "--json").out)
    assert remote.pop("path") == ADDRESS
    local.pop("path")
    assert remote == local


def test_a_plan_is_that_of_the_directory(server: HubServer, source: Path, tmp_path: Path) -> None:
    plans = [
        json.loads(run(server, tmp_path, "fuse", "-n", src, "-o", tmp_path / "o", "--json").out)
        for src in (ADDRESS, source)
    ]
    for plan in plans:
        assert plan.pop("source")["files"] == _SHARDS
        plan.pop("disk")  # what is free, and what a file system may clone
    assert plans[0] == plans[1]


def test_a_conversion_of_a_repository_is_that_of_its_files(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    assert run(server, home, "fuse", ADDRESS, "-o", tmp_path / "remote").code == 0
    assert moeconv("fuse", source, "-o", tmp_path / "local").code == 0
    assert tree_sha256(tmp_path / "remote") == tree_sha256(tmp_path / "local")
    fetched = dict(server.requests)
    # the snapshot is complete now: it is used as it is, also without a network
    done = run(server, home, "inspect", ADDRESS)
    assert done.code == 0
    assert f"snapshots/{COMMIT}" in done.out
    assert server.requests == fetched | {"listing": fetched["listing"] + 1}
    offline = run(server, home, "inspect", ADDRESS, HF_HUB_OFFLINE="1")
    assert (offline.code, offline.out) == (0, done.out)


def test_an_output_on_the_hub_is_read_by_its_manifest(
    server: HubServer, source: Path, tmp_path: Path
) -> None:
    assert moeconv("fuse", source, "-o", tmp_path / "fused").code == 0
    server.files = files_of(tmp_path / "fused")
    remote = json.loads(run(server, tmp_path / "home", "inspect", ADDRESS, "--json").out)
    local = json.loads(moeconv("inspect", tmp_path / "fused", "--json").out)
    assert remote.pop("path") == ADDRESS
    local.pop("path")
    assert remote == local


def _refused(server: HubServer, home: Path, code: str, *arguments: str, **more: str) -> str:
    done = run(server, home, "inspect", *(arguments or (ADDRESS,)), **more)
    assert done.err.startswith(f"error[{code}]: "), done.err
    assert "Traceback" not in done.err
    assert "  cause: " in done.err
    assert "  fix: " in done.err
    return done.err


def test_a_private_repository_needs_a_token(server: HubServer, tmp_path: Path) -> None:
    server.private = True
    assert "is private" in _refused(server, tmp_path, "download-failed")
    assert run(server, tmp_path, "inspect", ADDRESS, HF_TOKEN=TOKEN).code == 0
    assert server.tokens_elsewhere == 0


def test_names_that_cannot_be_used(server: HubServer, tmp_path: Path) -> None:
    for name in ("../evil.json", "/abs.json", "a:b.json"):
        server.files[name] = b"{}"
        assert f"`{name}`" in _refused(server, tmp_path, "unsafe-path")
        del server.files[name]
    server.files["a:b.json"] = b"{}"
    exclude = ("--exclude", "a:b.json")
    done = run(server, tmp_path, "fuse", "-n", ADDRESS, "-o", tmp_path / "o", *exclude)
    assert done.code == 0, done.err


def test_a_missing_revision(server: HubServer, tmp_path: Path) -> None:
    assert "`v9`" in _refused(server, tmp_path, "download-failed", f"{ADDRESS}@v9")


def test_a_server_that_stops_midway(server: HubServer, tmp_path: Path) -> None:
    server.fault = "stops midway"
    assert "too early" in _refused(server, tmp_path, "download-failed")


def test_pointers_instead_of_shards(server: HubServer, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 123456\n"
    for name in [n for n in server.files if n.endswith(".safetensors")]:
        server.files[name] = pointer
    assert "Git-LFS pointer" in _refused(server, tmp_path, "lfs-pointer")


@pytest.mark.parametrize("arguments", [("inspect",), ("fuse", "-o", "out")], ids=" ".join)
def test_an_interrupt_does_not_wait_for_a_server(
    server: HubServer, tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    server.fault = "stalls"
    env = environment(**client_environment(server, tmp_path))
    command = [sys.executable, "-m", "moeconv", *arguments, ADDRESS]
    with subprocess.Popen(
        command, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
    ) as process:
        while not any(name.endswith(".safetensors") for name in server.requests):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        assert "interrupted" in process.communicate(timeout=30)[1]
    assert process.returncode == 130


def test_no_server(server: HubServer, tmp_path: Path) -> None:
    error = _refused(server, tmp_path, "download-failed", HF_HUB_OFFLINE="1")
    assert "unset `HF_HUB_OFFLINE`" in error
