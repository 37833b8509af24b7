"""The Hugging Face hub's HTTP API as far as an upload of small files needs it: a thread, and repos in a dict."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 34


@dataclass
class Hub:
    """What the server has been given.

    Attributes:
        repos: whether each is private.
        files: content by repo and path.
        calls: method and path of every request.
        broken: answer 403 to commits.
    """

    url: str = ""
    repos: dict[str, bool] = field(default_factory=dict)
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    broken: bool = False

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON of a request."""
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if path == "/api/repos/create":
            asked = json.loads(body)
            return self._create(
                f"{asked.get('organization') or 'ada'}/{asked['name']}",
                asked.get("visibility") == "private" or asked.get("private", False),
            )
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if "/preupload/" in path:
            return 200, {
                "files": [
                    {"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for one in json.loads(body)["files"]
                ]
            }
        if "/commit/" in path:
            return (403, {"error": "no right to write"}) if self.broken else self._commit(name, body)
        if method == "GET" and name in self.repos:
            return 200, {"id": name, "private": self.repos[name], "sha": "0" * 40, "siblings": []}
        return 404, {"error": "not found"}

    def _create(self, name: str, private: bool) -> tuple[int, Any]:
        there = name in self.repos
        self.repos.setdefault(name, private)
        return (409 if there else 200), {"url": f"{self.url}/{name}", "id": name}

    def _commit(self, name: str, body: bytes) -> tuple[int, Any]:
        files = self.files.setdefault(name, {})
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
        url = f"{self.url}/{name}/commit/{'1' * 40}"
        return 200, {"success": True, "commitOid": "1" * 40, "commitUrl": url, "hookOutput": ""}


@contextmanager
def running() -> Iterator[Hub]:
    """A hub on the loopback that wants `TOKEN`."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def respond(self) -> None:
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b"".join(iter(self._chunk, b""))
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.calls.append(f"{self.command} {self.path}")
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            status, answer = hub.answer(self.command, self.path, body) if known else (401, {"error": "who are you?"})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _chunk(self) -> bytes:
            data = self.rfile.read(int(self.rfile.readline(), 16))
            self.rfile.readline()
            return data

        do_GET = do_POST = do_PUT = do_HEAD = respond

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
