"""A site's node in this process, at work against a stand-in coordinator; its fixtures are imported by name."""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager

import pytest
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedpeft.deploy import flower, keys
from fedpeft.deploy.settings import Site, SiteSettings
from fedpeft.deploy.site import link, node
from support.fleet import GrpcStandIn, HttpStandIn, replied


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    for name, value in {"FIRST_PAUSE_S": 0.001, "LONGEST_PAUSE_S": 0.02, "POLL_S": 0.02, "NOTE_S": 0.0}.items():
        monkeypatch.setattr(node, name, value)
    monkeypatch.setattr(flower, "HEARTBEAT_S", 0.05)


@pytest.fixture
def site(tmp_path):
    keys.site_keys(tmp_path)
    return Site(tmp_path, SiteSettings(name="clinic", server="localhost:1"))


def key_of(site):
    return load_ssh_private_key((site.path / "site.key").read_bytes(), None)


@contextmanager
def at_work(site, state, kind=GrpcStandIn, ask=replied, wrap=lambda made: made, registers=False):
    """A node that takes part meanwhile."""
    state.keys = [flower.public_bytes(key_of(site))]
    server = kind(state)
    site.settings.server = f"127.0.0.1:{server.port}"
    made = {GrpcStandIn: link.GrpcLink, HttpStandIn: link.HttpLink}[kind](site.settings.server, key_of(site), None)
    working = node.Node(site, wrap(made), ask, registers)
    thread = threading.Thread(target=working.run, daemon=True)
    thread.start()
    try:
        yield working
    finally:
        working.leave()
        thread.join(10)
        server.close()
        assert not thread.is_alive()


def until(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.005)


def exchange(site, state, text, seconds=20.0):
    """One message from here to there and back."""
    name = state.send(text)
    until(lambda: name in state.done(), seconds)
    assert state.text(name) == text[::-1] and state.confirmed.count(name) >= 1
    until(lambda: not list((site.path / "owed").glob("*")))
    return name
