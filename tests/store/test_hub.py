"""HubStore against a server that speaks the Hub's protocol to the real client."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from moeconv.errors import DiskFull, DownloadFailed, LfsPointer, NotLocal, UnsafePath, UsageProblem
from moeconv.store import hub
from moeconv.store.hub import START_BYTES, HubStore
from moeconv.store.local import LocalStore
from tests.store.hub_server import COMMIT, TOKEN, HubServer, serving

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
    "inner/notes.txt": b"notes",
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


def _read(store: HubStore, name: str, offset: int, nbytes: int) -> bytes:
    file = store.file(name)
    assert file is not None
    assert file.name == name
    return file.read(offset, nbytes)


def _read_header(store: HubStore, name: str) -> bytes:
    length = int.from_bytes(_read(store, name, 0, 8), "little")
    return _read(store, name, 0, 8 + length)


def test_one_listing_gives_names_and_sizes(server: HubServer) -> None:
    store = HubStore(ADDRESS)
    assert store.names() == ["config.json", "inner/notes.txt", SHORT, LONG]
    assert store.names(exclude=("*.json", "inner/*")) == [SHORT, LONG]
    file = store.file(LONG)
    assert file is not None
    assert file.size == len(FILES[LONG])
    assert store.file("none") is None
    assert store.root is None
    with pytest.raises(NotLocal, match="not a local file"):
        _ = file.path
    assert server.requests == {"listing": 1}


def test_names_are_those_of_the_same_directory(server: HubServer, tmp_path: Path) -> None:
    for name, data in FILES.items():
        (tmp_path / "same" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "same" / name).write_bytes(data)
    local, hub_ = LocalStore(tmp_path / "same"), HubStore(ADDRESS)
    assert hub_.names() == local.names()
    for exclude in (("inner/*",), ("*.json",), ("*/*",), ("*",)):
        assert hub_.names(exclude=exclude) == local.names(exclude=exclude)
    # git's and the client's own folders are never copied; a listing of the Hub has none
    assert hub_.entries() == [e for e in local.entries() if e != ".cache/"]


@pytest.mark.parametrize(("name", "ranges"), [(SHORT, 1), (LONG, 2)])
def test_a_header_costs_two_ranges_and_a_mebibyte_at_most(
    server: HubServer, name: str, ranges: int
) -> None:
    header = _read_header(HubStore(ADDRESS), name)
    assert header == FILES[name][: len(header)]
    assert server.requests == {"listing": 1, name: 1 + ranges}  # and one redirect
    assert server.sent[name] <= len(header) + START_BYTES


def test_a_range_inside_a_file(server: HubServer) -> None:
    store, size = HubStore(f"{ADDRESS}@{COMMIT}"), len(FILES[LONG])
    assert _read(store, LONG, START_BYTES - 3, 9) == FILES[LONG][START_BYTES - 3 :][:9]
    assert _read(store, LONG, size - 4, 4) == FILES[LONG][-4:]
    with pytest.raises(DownloadFailed, match="too early"):
        _read(store, LONG, size - 4, 5)


def test_a_token_is_sent_to_the_hub_alone(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.private = True
    assert "does not exist or is private" in _refused().message
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert _read_header(HubStore(ADDRESS), LONG)
    assert server.tokens_elsewhere == 0


def test_a_snapshot_is_used_once_it_is_complete(server: HubServer, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub/models--org--name/snapshots" / COMMIT
    wanted = [name for name in FILES if not name.startswith(".cache")]
    for name in wanted:
        assert HubStore(ADDRESS).snapshot() is None
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).write_bytes(FILES[name])
    assert HubStore(ADDRESS).snapshot() == snapshot
    assert server.requests == {"listing": len(wanted) + 1}


def test_a_snapshot_that_may_lack_files_is_not_used_without_a_network(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    for name in ("config.json", SHORT):  # as transformers fetches them, one by one
        hf_hub_download("org/name", name)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DownloadFailed, match="may lack files") as caught:
        HubStore(ADDRESS).snapshot()
    assert str(tmp_path) in str(caught.value.fix)


def test_an_incomplete_download_is_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    monkeypatch.setattr("time.sleep", lambda _: None)  # between the client's retries
    hf_hub_download("org/name", SHORT)
    store = HubStore(ADDRESS)
    assert store.snapshot() is None
    server.fault = "only lists"
    with pytest.raises(DownloadFailed, match=r"not fetched completely|cannot be read"):
        store.download()


def test_a_place_that_expired_is_asked_for_again(server: HubServer) -> None:
    server.fault = "places expire"
    assert _read_header(HubStore(ADDRESS), LONG) == FILES[LONG][: 8 + START_BYTES + 5000]


def test_an_empty_file_needs_no_request(server: HubServer) -> None:
    server.files["empty.json"] = b""
    assert _read(HubStore(ADDRESS), "empty.json", 0, 0) == b""
    assert server.requests == {"listing": 1}


def test_an_empty_repository(server: HubServer) -> None:
    server.files.clear()
    assert "lists no files" in str(_refused().cause)


def test_without_a_network_a_snapshot_in_the_cache_is_used(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert HubStore(ADDRESS).download().name == COMMIT
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    found = HubStore(ADDRESS).snapshot()
    assert found == tmp_path / "hub/models--org--name/snapshots" / COMMIT


def _refused(address: str = ADDRESS, name: str = SHORT) -> DownloadFailed:
    with pytest.raises(DownloadFailed) as caught:
        _read(HubStore(address), name, 0, 50)
    error = caught.value
    assert error.cause
    assert error.fix
    return error


def test_a_missing_repository(server: HubServer) -> None:
    server.private = True
    error = _refused()
    assert "does not exist or is private" in error.message
    assert "HF_TOKEN" in str(error.fix)


def test_a_gated_repository(server: HubServer) -> None:
    server.fault = "GatedRepo"
    assert "gated" in _refused().message


def test_a_missing_revision(server: HubServer) -> None:
    assert "does not have the revision `v9`" in _refused(f"{ADDRESS}@v9").message


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
    assert _read(HubStore(ADDRESS), SHORT, 0, 50) == FILES[SHORT][:50]
    with pytest.raises(DownloadFailed, match="does not serve a part"):
        _read(HubStore(ADDRESS), SHORT, 2 * START_BYTES, 50)


def test_a_pointer_instead_of_the_file(server: HubServer) -> None:
    server.fault = "pointer"
    with pytest.raises(LfsPointer):
        _read(HubStore(ADDRESS), SHORT, 0, 50)


def test_no_network(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "cannot be reached" in _refused().message
    with pytest.raises(DownloadFailed, match="cannot be reached"):
        HubStore(ADDRESS).snapshot()


def test_a_full_disk_is_not_the_network(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device", "/cache/blob")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(DiskFull, match="blob"):
        HubStore(ADDRESS).download()


def test_a_name_that_leads_out(server: HubServer) -> None:
    server.files["../up.json"] = b"{}"
    store = HubStore(ADDRESS)
    assert store.snapshot() is None
    with pytest.raises(UnsafePath):
        store.file("../up.json")
    with pytest.raises(UnsafePath):
        store.download()


@pytest.mark.parametrize("address", ["hf://name", "hf://a/b/c", "hf:///name", "hf://a/@main"])
def test_not_an_address(address: str) -> None:
    with pytest.raises(UsageProblem):
        HubStore(address)


def test_the_client_is_imported_when_it_is_needed() -> None:
    check = "import sys, moeconv.store.hub; sys.exit('huggingface_hub' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
