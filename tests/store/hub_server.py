"""A server that speaks the Hub's protocol to the real client, and counts what it is asked."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_test"  # noqa: S105 - of this server only


class HubServer(ThreadingHTTPServer):
    """One repository, `org/name`, whose large files are on a host of another name.

    fault: changes what it does with requests. private: answers only to `TOKEN`.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.fault = ""
        self.private = False
        self.stopping = threading.Event()
        self.lock = threading.Lock()
        self.requests: Counter[str] = Counter()  # all of them by file; `listing` is one
        self.sent: Counter[str] = Counter()  # bytes of bodies, by file
        self.tokens_elsewhere = 0  # requests to the other host that carry a token
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.elsewhere = f"http://localhost:{self.server_port}"

    def handle_error(self, *request: object) -> None:
        """Ignore a client that closes the connection once it has what it asked for."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*request)


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        server, path = self.server, self.path.partition("?")[0]
        listing = re.fullmatch(r"/api/models/org/name(?:/revision/(.+))?", path)
        resolved = re.fullmatch(rf"/org/name/resolve/(?:main|{COMMIT})/(.+)", path)
        stored = re.fullmatch(r"/stored/(.+)", path)
        name = next((m[1] for m in (resolved, stored) if m), "listing" if listing else path)
        if path.startswith(("/api/models/", "/org/", "/stored/")):  # the client may ask for more
            with server.lock:
                server.requests[name] += 1
        if server.fault == "only lists" and not listing:
            self._refuse(503, "")
        elif stored and server.fault == "places expire" and server.requests[name] > 2:
            server.fault = ""
            self._refuse(403, "")
        elif stored and server.fault == "stalls":
            server.stopping.wait()
        elif stored:
            server.tokens_elsewhere += "Authorization" in self.headers
            self._serve(name)
        elif server.fault == "busy":
            self._refuse(503, "")
        elif server.fault == "GatedRepo":
            self._refuse(403, "GatedRepo")
        elif server.private and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "RepoNotFound")
        elif listing:
            self._list(listing[1] or "main")
        elif path == f"/api/models/org/name/tree/{COMMIT}":  # how a snapshot is listed
            self._send(200, json.dumps([*map(self._entry, server.files)]).encode())
        elif resolved and name in server.files:
            self._resolve(name)
        else:
            self._refuse(404, "RepoNotFound")

    def _list(self, revision: str) -> None:
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
            return
        files = [{"rfilename": n, "size": len(d)} for n, d in self.server.files.items()]
        document: dict[str, Any] = {"id": "org/name", "sha": COMMIT, "siblings": files}
        self._send(200, json.dumps(document).encode())

    def _entry(self, name: str) -> dict[str, Any]:
        data = self.server.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": sha256(data).hexdigest()}

    def _resolve(self, name: str) -> None:
        data = self.server.files[name]
        facts = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data).hexdigest()}"'}
        if not name.endswith(".safetensors"):  # small files are sent from here
            self._serve(name, facts)
            return
        facts |= {"X-Linked-Size": str(len(data)), "X-Linked-ETag": facts["ETag"]}
        self._send(302, b"", facts | {"Location": f"{self.server.elsewhere}/stored/{name}"})

    def _serve(self, name: str, facts: dict[str, str] | None = None) -> None:
        data = self.server.files[name]
        if self.server.fault == "pointer":
            self._send(200, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or self.server.fault == "no ranges":
            self._send(200, data, facts, name)
            return
        first, last = int(asked[1]), int(asked[2] or len(data) - 1)
        part = data[first : last + 1]
        place = f"bytes {first}-{first + len(part) - 1}/{len(data)}"
        self._send(206, part, {**(facts or {}), "Content-Range": place}, name)

    def _send(
        self, status: int, body: bytes, facts: dict[str, str] | None = None, name: str = ""
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for key, value in (facts or {}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if name.endswith(".safetensors") and self.server.fault == "stops midway":
            body = body[: len(body) // 2]
            self.close_connection = True
        with self.server.lock:
            self.server.sent[name] += len(body)
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"", {"X-Error-Code": code} if code else None)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@contextmanager
def serving(files: dict[str, bytes]) -> Iterator[HubServer]:
    """The server, in a thread, until the end of the block."""
    server = HubServer(files)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.stopping.set()
        server.shutdown()
        server.server_close()
        thread.join()


def files_of(root: Path) -> dict[str, bytes]:
    """What a directory holds, by relative name."""
    found = sorted(path for path in root.rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in found}


def client_environment(server: HubServer, home: Path) -> dict[str, str]:
    """Variables with which the real client asks this server, and no other."""
    return {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1,localhost",
    }
