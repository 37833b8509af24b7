"""Hosts and ports as people write them: bare inside, with brackets around IPv6 where a port follows.

host      fl.example, xn--mnchen-3ya.example, 192.0.2.7, 2001:db8::7
endpoint  fl.example:9092, [2001:db8::7]:9092
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from urllib.parse import urlsplit

from fedpeft.errors import InputError

LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
PROXIES = ("grpc_proxy", "https_proxy", "http_proxy")  # in the order in which gRPC looks at them
DIRECT = ("no_grpc_proxy", "no_proxy")


def parse_host(text: str, key: str) -> str:
    """A name or address by which others reach a machine; umlauts become what DNS knows.

    >>> parse_host("[::1]", "--host"), parse_host("München.example", "--host")
    ('::1', 'xn--mnchen-3ya.example')

    Raises:
        InputError: empty, with a scheme, port or path, an address that nobody can reach, or no name at all.
    """
    advice = "a name or address alone, such as fl.example, 192.0.2.7 or 2001:db8::7"
    bare = text.strip()
    if "://" in bare or "/" in bare:
        raise InputError(f"{key}: '{text}' is a URL; give {advice}.")
    bare = bare.removeprefix("[").removesuffix("]") if bare.startswith("[") else bare
    try:
        address = ipaddress.ip_address(bare)
    except ValueError:
        return _parse_name(bare, text, key, advice)
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise InputError(f"{key}: '{text}' is no address at which one machine is reached by others; give {advice}.")
    return str(address)


def _parse_name(bare: str, text: str, key: str, advice: str) -> str:
    host, colon, port = bare.rpartition(":")
    if colon and port.isdigit():
        raise InputError(
            f"{key}: '{text}' has a port; give {advice}. The port has an option of its own: --port {port} "
            f"with {key} {host}."
        )
    try:
        name = bare.removesuffix(".").encode("idna").decode().lower()
    except UnicodeError as error:
        raise InputError(f"{key}: '{text}' is no host name ({error}); give {advice}.") from error
    labels = name.split(".")
    if len(name) > 253 or not all(LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise InputError(f"{key}: '{text}' is no host name; give {advice}.")
    return name


def parse_listen(text: str, key: str) -> str:
    """An address of this machine that a port is bound to; 0.0.0.0 and :: stand for all of them.

    Raises:
        InputError: it is no IP address.
    """
    bare = text.strip()
    try:
        return str(ipaddress.ip_address(bare[1:-1] if bare.startswith("[") and bare.endswith("]") else bare))
    except ValueError as error:
        raise InputError(
            f"{key}: '{text}' is no IP address. 0.0.0.0 is every address of this machine, :: the same "
            "with IPv6, 127.0.0.1 this machine alone."
        ) from error


def parse_endpoint(text: str, key: str) -> tuple[str, int]:
    """Host and port of HOST:PORT or [IPV6]:PORT.

    >>> parse_endpoint("[::1]:9092", "--server")
    ('::1', 9092)

    Raises:
        InputError: a scheme, a missing or impossible port, or an IPv6 address without brackets.
    """
    host, colon, port = text.strip().rpartition(":")
    shape = "HOST:PORT, such as fl.example:9092 or [2001:db8::7]:9092"
    if "://" in text or "/" in text:
        raise InputError(f"{key}: '{text}' is a URL; give {shape}.")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise InputError(f"{key}: '{text}': an IPv6 address needs brackets before its port; give {shape}.")
    if not colon or not host or not (port.isascii() and port.isdigit()) or not 0 < int(port) < 65536:
        raise InputError(f"{key}: '{text}' is not {shape}.")
    return parse_host(host, key), int(port)


def join(host: str, port: int) -> str:
    """The endpoint of a bare host.

    >>> join("::1", 9092), join("fl.example", 9092)
    ('[::1]:9092', 'fl.example:9092')
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def own_address(listen: str) -> str:
    """The address at which this machine itself reaches a port that is bound to `listen`."""
    address = ipaddress.ip_address(listen)
    if not address.is_unspecified:
        return listen
    return "127.0.0.1" if address.version == 4 else "::1"


def proxy_of(host: str) -> str | None:
    """The proxy of the environment through which gRPC goes to this host, as `NAME=URL` without its password; or None.

    gRPC reads the lower-case names only, and `no_proxy` by endings of names.
    """
    direct = next((os.environ[name] for name in DIRECT if os.environ.get(name)), "")
    if any(
        host == (ending := entry.strip().removeprefix("*").removeprefix(".")) or (ending and host.endswith(ending))
        for entry in direct.split(",")
    ):
        return None
    name = next((name for name in PROXIES if os.environ.get(name)), None)
    if name is None:
        return None
    url = urlsplit(os.environ[name])
    return f"{name}={url.scheme}://{url.netloc.rpartition('@')[2]}"


def answers(host: str, port: int) -> bool:
    """Whether something listens there."""
    try:
        with socket.create_connection((host, port), timeout=1):
            return True
    except OSError:
        return False
