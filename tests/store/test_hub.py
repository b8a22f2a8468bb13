"""HubStore against a server that speaks the Hub's protocol to the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeconv.errors import DownloadFailed, LfsPointer, UnsafePath, UsageProblem
from moeconv.store import hub
from moeconv.store.hub import START_BYTES, HubStore
from tests.store.hub_server import COMMIT, HubServer, serving

pytest.importorskip("huggingface_hub")

ADDRESS = "hf://org/name"
SHORT, LONG = "model-1.safetensors", "model-2.safetensors"


def _shard(header_bytes: int, data_bytes: int) -> bytes:
    header = b"{" + b" " * (header_bytes - 2) + b"}"
    return len(header).to_bytes(8, "little") + header + b"\7" * data_bytes


FILES = {
    "config.json": json.dumps({"model_type": "any"}).encode(),
    SHORT: _shard(1000, 3 * START_BYTES),
    LONG: _shard(START_BYTES + 5000, 3 * START_BYTES),
    ".cache/left.json": b"{}",
}


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with serving(dict(FILES)) as running:
        # the client reads its environment once, when it is imported
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            running.url + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", running.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(hub, "_RETRIES", 0)
        yield running


def _read_header(store: HubStore, name: str) -> bytes:
    length = int.from_bytes(store.read(name, 0, 50)[:8], "little")
    return store.read(name, 0, 8 + length)


def test_one_listing_gives_names_and_sizes(server: HubServer) -> None:
    store = HubStore(ADDRESS)
    assert store.names() == ["config.json", SHORT, LONG]
    assert store.names(exclude=("*.json",)) == [SHORT, LONG]
    facts = store.stat(LONG)
    assert facts is not None
    assert facts.size == len(FILES[LONG])
    assert store.stat("none") is None
    assert store.local_path(LONG) is None
    assert server.requests == {"listing": 1}


@pytest.mark.parametrize(("name", "most"), [(SHORT, 1), (LONG, 2)])
def test_a_header_costs_two_requests_and_a_mebibyte_at_most(
    server: HubServer, name: str, most: int
) -> None:
    header = _read_header(HubStore(ADDRESS), name)
    assert header == FILES[name][: len(header)]
    assert server.requests == {"listing": 1, name: most}
    assert server.sent[name] <= len(header) + START_BYTES


def test_a_range_inside_a_file(server: HubServer) -> None:
    store, size = HubStore(f"{ADDRESS}@{COMMIT}"), len(FILES[LONG])
    assert store.read(LONG, START_BYTES - 3, 9) == FILES[LONG][START_BYTES - 3 :][:9]
    assert store.read(LONG, size - 4, 100) == FILES[LONG][-4:]
    assert store.read(LONG, size + 1, 5) == b""


def test_a_cached_file_is_read_without_requests(server: HubServer, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--org--name/snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot / SHORT).write_bytes(FILES[SHORT])
    store = HubStore(ADDRESS)
    assert store.read(SHORT, 5, 100) == FILES[SHORT][5:105]
    assert store.local_path(SHORT) == snapshot / SHORT
    assert server.requests == {"listing": 1}


def _refused(address: str = ADDRESS, name: str = SHORT) -> DownloadFailed:
    with pytest.raises(DownloadFailed) as caught:
        HubStore(address).read(name, 0, 50)
    error = caught.value
    assert error.cause
    assert error.fix
    return error


def test_a_private_or_missing_repository(server: HubServer) -> None:
    server.fault = "RepoNotFound"
    error = _refused()
    assert "does not exist or is private" in error.message
    assert "HF_TOKEN" in str(error.fix)


def test_a_gated_repository(server: HubServer) -> None:
    server.fault = "GatedRepo"
    assert "gated" in _refused().message


def test_a_missing_revision(server: HubServer) -> None:
    assert "does not have the revision `v9`" in _refused(f"{ADDRESS}@v9").message


def test_a_missing_file(server: HubServer) -> None:
    assert "does not have `none`" in _refused(name="none").message


def test_a_server_that_stops_midway(server: HubServer) -> None:
    server.fault = "stops midway"
    error = _refused()
    assert "too early" in error.message
    assert f"{START_BYTES:,}" in str(error.cause)


def test_a_server_that_is_busy(server: HubServer) -> None:
    server.fault = "busy"
    assert "503" in str(_refused().cause)


def test_a_server_without_ranges_is_not_read_to_the_end(server: HubServer) -> None:
    server.fault = "no ranges"
    assert HubStore(ADDRESS).read(SHORT, 0, 50) == FILES[SHORT][:50]
    with pytest.raises(DownloadFailed, match="does not serve a part"):
        HubStore(ADDRESS).read(SHORT, 2 * START_BYTES, 50)


def test_a_pointer_instead_of_the_file(server: HubServer) -> None:
    server.fault = "pointer"
    with pytest.raises(LfsPointer):
        HubStore(ADDRESS).read(SHORT, 0, 50)


def test_no_network(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in _refused().message


def test_a_name_that_leads_out(server: HubServer) -> None:
    server.files["../up.json"] = b"{}"
    with pytest.raises(UnsafePath):
        HubStore(ADDRESS).names()


@pytest.mark.parametrize("address", ["hf://name", "hf://a/b/c", "hf:///name", "hf://a/@main"])
def test_not_an_address(address: str) -> None:
    with pytest.raises(UsageProblem):
        HubStore(address)


def test_the_client_is_imported_when_it_is_needed() -> None:
    check = "import sys, moeconv.store.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
