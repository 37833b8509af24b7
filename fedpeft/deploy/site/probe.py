"""A site looks at its coordinator before it takes part: certificate, registration, clocks."""

from __future__ import annotations

import socket
import ssl
from contextlib import closing
from pathlib import Path

from fedpeft.deploy import flower
from fedpeft.deploy.settings import Site
from fedpeft.deploy.site.link import Failure, Link, connect
from fedpeft.errors import RunError

TIMEOUT_S = 10.0
SPAN_S = 310.0  # Flower takes signatures that are at most so old


def tls_of(host: str, port: int, ca: Path) -> tuple[str | None, str | None]:
    """Version of TLS, and the protocol agreed on (ALPN), with a server whose certificate the authority signed.

    Raises:
        OSError: nothing answers, or its certificate is not good for this host.
    """
    context = ssl.create_default_context(cafile=str(ca))
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, port), timeout=TIMEOUT_S) as raw,
        context.wrap_socket(raw, server_hostname=host) as stream,
    ):
        return stream.version(), stream.selected_alpn_protocol()


def require_known(site: Site) -> None:
    """Raise RunError unless the coordinator knows the site's key. The site counts as connected for an instant."""
    with closing(connect(site)) as link:
        key = flower.public_bytes(link.key)
        try:
            request = flower.request("ActivateNode", None, public_key=key, heartbeat_interval=flower.HEARTBEAT_S)
            node = link.call("ActivateNode", request, TIMEOUT_S).node_id
            # At once, or the coordinator would ask a site that is not there.
            link.call("DeactivateNode", flower.request("DeactivateNode", None, node_id=node), TIMEOUT_S)
        except Failure as failure:
            raise RunError(failure.sentence(site.settings.server)) from failure


def clock_behind_s(site: Site) -> float:
    """Seconds that this clock is behind the coordinator's, down to 1 s; from -5 to 0 reads as 0.

    Flower tells nobody its time, but refuses signatures from the future: how far ahead one may be dated is how far this
    clock is behind.

    Raises:
        RunError: it is ahead by more than 5 s, or behind by more than 300 s.
    """
    with closing(connect(site)) as link:
        if not _in_time(link, site, 0):
            raise RunError(
                "more than 300 s behind the coordinator's or 5 s ahead of it; the coordinator refuses this "
                "site's signatures. Set the clock (NTP)."
            )
        low, high = 0.0, SPAN_S
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (middle, high) if _in_time(link, site, middle) else (low, middle)
    return max(0.0, low - 5.0)


def _in_time(link: Link, site: Site, shift_s: float) -> bool:
    """Whether a signature dated `shift_s` from now is taken. With keys nobody registers so: it does nothing."""
    request = flower.request("RegisterNode", None, public_key=flower.public_bytes(link.key))
    try:
        link.call("RegisterNode", request, TIMEOUT_S, shift_s)
    except Failure as failure:
        if not failure.stranger and not failure.number:
            raise RunError(failure.sentence(site.settings.server)) from failure
        return not failure.stranger
    return True
