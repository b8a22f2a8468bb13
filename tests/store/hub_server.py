"""A server that speaks the Hub's protocol to the real client, and counts what it is asked."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(ThreadingHTTPServer):
    """One repository, `org/name`. `fault` changes what it does with requests."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = files
        self.fault = ""
        self.requests: Counter[str] = Counter()  # bodies served, by file; `listing` is one
        self.sent: Counter[str] = Counter()  # bytes, by file
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        fault, path = self.server.fault, self.path.partition("?")[0]
        if fault == "busy":
            self._refuse(503, "")
        elif fault in ("RepoNotFound", "GatedRepo"):
            self._refuse(401 if fault == "RepoNotFound" else 403, fault)
        elif found := re.fullmatch(r"/api/models/org/name(?:/revision/(.+))?", path):
            self._list(found[1] or "main")
        elif found := re.fullmatch(rf"/org/name/resolve/{COMMIT}/(.+)", path):
            self.send_response(302)  # large files are on another host
            self.send_header("Location", f"{self.server.url}/cdn/{found[1]}")
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif found := re.fullmatch(r"/cdn/(.+)", path):
            self._serve(found[1])
        else:
            self._refuse(404, "RepoNotFound")

    def _list(self, revision: str) -> None:
        self.server.requests["listing"] += 1
        if revision not in ("main", COMMIT):
            self._refuse(404, "RevisionNotFound")
            return
        files = [{"rfilename": n, "size": len(d)} for n, d in self.server.files.items()]
        document: dict[str, Any] = {"id": "org/name", "sha": COMMIT, "siblings": files}
        self._send(200, json.dumps(document).encode())

    def _serve(self, name: str) -> None:
        server, data = self.server, self.server.files[name]
        server.requests[name] += 1
        if server.fault == "pointer":
            self._send(200, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None or server.fault == "no ranges":
            self._send(200, data, name)
            return
        first, last = int(asked[1]), int(asked[2])
        part = data[first : last + 1]
        self._send(206, part, name, f"bytes {first}-{first + len(part) - 1}/{len(data)}")

    def _send(self, status: int, body: bytes, name: str = "", content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        if name and self.server.fault == "stops midway":
            body = body[: len(body) // 2]
            self.close_connection = True
        self.server.sent[name] += len(body)
        self.wfile.write(body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

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
        server.shutdown()
        server.server_close()
        thread.join()
