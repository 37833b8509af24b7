"""The server behind `fedpeft watch`: the page of run folders and coordinators, for this machine only.

    GET /TOKEN/            the page;  ?client=TEXT shows the clients whose name contains it
    GET /TOKEN/parts.json  its parts by name, which the page polls; 304 where none has changed
    GET /TOKEN/state.json  the state of all runs, as `fedpeft watch --json` prints it

It reads and never writes. The token keeps other users of the machine out, the check of Host pages of other sites whose
name leads here (DNS rebinding), and the content policy whatever a client's name might be made to run.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import re
import secrets
import sys
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fedpeft import folders
from fedpeft.cli.fleet import Fleet
from fedpeft.errors import InputError
from fedpeft.record import live, live_page

log = logging.getLogger("fedpeft")
ADDRESS = "127.0.0.1"
HOSTS = re.compile(r"(localhost|127\.0\.0\.1)(:[0-9]{1,5})?", re.IGNORECASE)  # any port: a tunnel has another one
METHODS = ("GET", "HEAD")
PATIENCE_S = 10.0  # for a request to be sent, and an answer to be taken
Answer = tuple[bytes, str, str]  # content, its type, its tag


class Watched:
    """Runs, and coordinators with theirs, read when they are asked for; one request at a time reads and draws."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.fleets = [Fleet(path) for path in paths if Fleet.is_at(path)]
        self.runs = [path for path in paths if not Fleet.is_at(path)]
        self.followers: list[live.Follower] = []
        self._follow_all()
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str], Answer] = {}
        self._version: list[tuple[Any, ...]] = []

    def states(self) -> dict[str, Any]:
        """`runs`, as far as their records go now, and `coordinators`, where there are any."""
        with self._lock:
            self._look_again()
            return self._tell_all([follower.state(follower.run()) for follower in self.followers])

    def _tell_all(self, states: list[dict[str, Any]]) -> dict[str, Any]:
        fleets = [fleet.state() for fleet in self.fleets]
        return {"runs": states, **({"coordinators": fleets} if fleets else {})}

    def _follow_all(self) -> None:
        """Follow the runs that there are now; what was read of those that go on is kept."""
        wanted = [*self.runs, *(run for fleet in self.fleets for run in fleet.runs())]
        if [follower.path for follower in self.followers] == [folders.real(path, "RUN") for path in wanted]:
            return
        known = {(follower.path, follower.label): follower for follower in self.followers}
        made = live.follow(wanted)
        self.followers = [known.get((follower.path, follower.label), follower) for follower in made]

    def answer(self, name: str, wanted: str) -> Answer:
        """What is at one of the addresses: made again only if a run has changed, or other clients are wanted."""
        with self._lock:
            self._look_again()
            if (name, wanted) not in self._known:
                if len(self._known) >= len(KINDS):  # what was wanted before
                    self._known.clear()
                content = self._draw(name, wanted)
                self._known[name, wanted] = content, KINDS[name], f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            return self._known[name, wanted]

    def _look_again(self) -> None:
        self._follow_all()
        version = [
            *((follower.label, *follower.look()) for follower in self.followers),
            *((json.dumps(fleet.state()),) for fleet in self.fleets),
        ]
        if version != self._version:
            self._known.clear()
            self._version = version

    def _draw(self, name: str, wanted: str) -> bytes:
        runs = [follower.run() for follower in self.followers]
        states = [follower.state(run) for follower, run in zip(self.followers, runs, strict=True)]
        if name == "state.json":
            return json.dumps(self._tell_all(states), allow_nan=False).encode()
        parts = live_page.parts(states, runs, wanted, [fleet.state() for fleet in self.fleets])
        if name == "parts.json":
            return json.dumps(parts).encode()
        return live_page.page(states, parts, wanted).encode()


KINDS = {  # last part of an address -> what is there
    "": "text/html; charset=utf-8",
    "parts.json": "application/json",
    "state.json": "application/json",
}


class Server(ThreadingHTTPServer):
    """Serves `watched` on the loopback interface.

    Args:
        port: 0 takes a free one.

    Raises:
        InputError: the port cannot be had.
    """

    # A browser that still reads must not hold up the end.
    daemon_threads = True

    def __init__(self, watched: Watched, port: int = 0) -> None:
        self.watched, self.token = watched, secrets.token_urlsafe(16)
        self._said: set[str] = set()
        try:
            super().__init__((ADDRESS, port), Handler)
        except OSError as error:
            raise InputError(
                f"--port {port}: cannot be had on {ADDRESS}: {error.strerror}. Leave it out for a free port."
            ) from error

    @property
    def url(self) -> str:
        """Of the page."""
        return f"http://{ADDRESS}:{self.server_address[1]}/{self.token}/"

    def say(self, problem: str) -> None:
        """Warn, once: a page that polls meets the same problem again and again."""
        if problem not in self._said:
            self._said.add(problem)
            log.warning("%s", problem)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no error of ours."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            log.exception("fedpeft watch could not answer")


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server: Server
    timeout = PATIENCE_S
    server_version, sys_version = "fedpeft", ""

    def parse_request(self) -> bool:
        """Refuse, before anything else is done, other methods than those that read, and other hosts than this one."""
        if not super().parse_request():
            return False
        # All of them: of two, programs on the way may go by the other one.
        hosts = self.headers.get_all("Host", [])
        if self.command not in METHODS:
            self.send_error(HTTPStatus.METHOD_NOT_ALLOWED, explain=f"Only {' and '.join(METHODS)} are answered.")
        elif len(hosts) != 1 or not HOSTS.fullmatch(hosts[0]):
            self.send_error(HTTPStatus.FORBIDDEN, explain="Only requests to localhost or 127.0.0.1 are answered.")
        else:
            return True
        return False

    def do_GET(self) -> None:
        """Answer with one of the addresses."""
        path, _, query = self.path.partition("?")
        token, _, name = path.removeprefix("/").partition("/")
        # In constant time, or it could be guessed sign by sign.
        known = hmac.compare_digest(token.encode(), self.server.token.encode())
        if not known or name not in KINDS or path != f"/{token}/{name}":
            self.send_error(HTTPStatus.NOT_FOUND, explain="The address of the page is the one that was printed.")
            return
        wanted = parse_qs(query).get("client", [""])[0][: live_page.LONGEST_NAME]
        try:
            content, kind, tag = self.server.watched.answer(name, wanted)
        except Exception as error:  # of a record that makes no sense: said here and there, and the server goes on
            self.server.say(f"the page cannot be drawn: {type(error).__name__}: {error}")
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain="fedpeft watch says why where it was started.")
            return
        if self.headers.get("If-None-Match") == tag:
            self.send_response(HTTPStatus.NOT_MODIFIED)
            self.send_header("ETag", tag)
            self.end_headers()
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", tag)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def end_headers(self) -> None:
        """Every answer, an error too, says what a browser may do with it."""
        for name, value in headers().items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing: a page that polls would fill the terminal."""


def headers() -> dict[str, str]:
    """The page runs its own script and has its own style, known by their hashes, and asks nobody but this server."""
    script, style = (_hash_source(text) for text in (live_page.asset("watch.js"), live_page.style()))
    policy = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "img-src": "data:",
        "connect-src": "'self'",
        "form-action": "'self'",
        "base-uri": "'none'",
        "frame-ancestors": "'none'",
    }
    return {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _hash_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
