"""A site looks at its coordinator before it takes part: certificate, registration, clocks."""

from __future__ import annotations

import datetime
import socket
import ssl
from pathlib import Path
from typing import Any

import grpc
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fedpeft.deploy.settings import Site
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


def known(site: Site) -> bool:
    """Whether the coordinator knows the site's key. It counts as connected for an instant, so not while it runs."""
    from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest

    with _channel(site) as channel:
        stub = FleetStub(channel)
        key = _key(site)
        request = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30)
        try:
            answer = stub.ActivateNode(request, metadata=_signed(key, 0), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED and "timestamp" in str(error.details()):
                raise RunError("the clocks differ too much; the coordinator refuses the signature") from error
            if "2004" in str(error.details()):
                return False
            raise RunError(f"{error.code()}: {error.details()}") from error
        # At once, or the coordinator would ask a site that is not there.
        stub.DeactivateNode(DeactivateNodeRequest(node_id=answer.node_id), metadata=_signed(key, 0), timeout=TIMEOUT_S)
        return True


def clock_behind_s(site: Site) -> float:
    """Seconds that this clock is behind the coordinator's, down to 1 s; from -5 to 0 reads as 0.

    Flower tells nobody its time, but refuses signatures from the future: how far ahead one may be dated is how far this
    clock is behind.

    Raises:
        RunError: it is ahead by more than 5 s, or behind by more than 300 s.
    """
    key = _key(site)
    with _channel(site) as channel:
        stub = FleetStub(channel)
        if not _in_time(stub, key, 0):
            raise RunError(
                "more than 300 s behind the coordinator's or 5 s ahead of it; the coordinator refuses this "
                "site's signatures. Set the clock (NTP)."
            )
        low, high = 0.0, SPAN_S
        while high - low > 0.5:
            middle = (low + high) / 2
            low, high = (middle, high) if _in_time(stub, key, middle) else (low, middle)
    return max(0.0, low - 5.0)


def _in_time(stub: Any, key: Any, shift_s: float) -> bool:
    """Whether a signature dated `shift_s` from now is taken. The request is for no node, so it does nothing."""
    request = SendNodeHeartbeatRequest(node=Node(node_id=0), heartbeat_interval=30)
    try:
        stub.SendNodeHeartbeat(request, metadata=_signed(key, shift_s), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        if "timestamp" in str(error.details()):
            return False
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:  # for what comes after the timestamp: no such node
            return True
        raise RunError(f"{error.code()}: {error.details()}") from error
    return True


def _channel(site: Site) -> grpc.Channel:
    credentials = grpc.ssl_channel_credentials((site.path / "ca.crt").read_bytes())
    return grpc.secure_channel(site.settings.server, credentials)


def _key(site: Site) -> Any:
    return load_ssh_private_key((site.path / "site.key").read_bytes(), None)


def _signed(key: Any, shift_s: float) -> list[tuple[str, str | bytes]]:
    from flwr import __version__

    moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=shift_s)
    stamp = moment.isoformat()
    return [
        ("flwr-public-key-bin", public_key_to_bytes(key.public_key())),
        ("flwr-timestamp", stamp),
        ("flwr-signature-bin", sign_message(key, stamp.encode("ascii"))),
        ("flwr-package-name", "flwr"),
        ("flwr-package-version", __version__),
        ("flwr-component-name", "SuperNode"),
    ]
