"""Hosts and ports as people write them, the proxies of the environment, and certificates that every Python takes."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading

import pytest
import yaml

from fedpeft.deploy import address, keys, settings
from fedpeft.deploy.coordinator import daemon, face, server
from fedpeft.deploy.coordinator.daemon import superlink_options
from fedpeft.deploy.site import site
from fedpeft.errors import InputError


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("fl.example", "fl.example"),
        ("FL.Example.", "fl.example"),
        ("localhost", "localhost"),
        ("a_b.example", "a_b.example"),
        ("münchen.example", "xn--mnchen-3ya.example"),
        ("192.0.2.7", "192.0.2.7"),
        ("::1", "::1"),
        ("[::1]", "::1"),
        ("2001:0db8::0007", "2001:db8::7"),
        (" fl.example ", "fl.example"),
        ("[fl.example]", "fl.example"),
    ],
)
def test_a_host_has_one_form(given, host):
    assert address.parse_host(given, "--host") == host


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("", "no host name"),
        ("  ", "no host name"),
        ("https://fl.example", "URL"),
        ("fl.example/x", "URL"),
        ("fl.example:9092", "--port 9092"),
        ("*.example", "no host name"),
        ("a b", "no host name"),
        ("fl..example", "no host name"),
        ("-a.example", "no host name"),
        ("x" * 64 + ".example", "no host name"),
        ("a." * 130 + "b", "no host name"),
        ("0.0.0.0", "no address"),
        ("::", "no address"),
        ("224.0.0.1", "no address"),
        ("fe80::1%eth0", "no address"),
        ("300.1.1.1", "no host name"),
        ("1.2.3", "no host name"),
        ("fl.exa\nmple", "no host name"),
    ],
)
def test_what_is_no_host_is_refused_with_a_sentence(given, said, tmp_path):
    with pytest.raises(InputError, match="--host") as raised:
        server.init(tmp_path / "c", given, 9092, 9093, "0.0.0.0")
    assert said in str(raised.value)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("given", "endpoint"),
    [
        ("fl.example:9092", "fl.example:9092"),
        ("[::1]:80", "[::1]:80"),
        ("Zürich.example:1", "xn--zrich-kva.example:1"),
        ("127.0.0.1:65535", "127.0.0.1:65535"),
    ],
)
def test_an_endpoint_is_read_back_as_it_is_written(given, endpoint):
    host, port = address.parse_endpoint(given, "--server")
    assert address.join(host, port) == endpoint
    assert address.parse_endpoint(endpoint, "--server") == (host, port)


@pytest.mark.parametrize(
    "given",
    [
        "fl.example",
        ":9092",
        "fl.example:",
        "fl.example:0",
        "fl.example:65536",
        "::1:9092",
        "https://fl.example:9092",
        "fl.example:https",
        "fl.example:٣",
        "[::1]",
        "[::1:9092",
        "",
    ],
)
def test_what_is_no_endpoint_is_refused_with_a_sentence(given, tmp_path):
    with pytest.raises(InputError, match="--server"):
        site.init(tmp_path / "s", "s", given, None, None, "tiny-vit")
    assert not (tmp_path / "s").exists()


def test_a_coordinator_with_ipv6_prints_and_binds_addresses_with_brackets(tmp_path):
    made = server.init(tmp_path / "c", "[::1]", 9092, 9093, "[::]")
    assert made["fleet"] == "[::1]:9092"
    options = superlink_options(settings.server(tmp_path / "c"), insecure=False)
    assert "--host=127.0.0.1" in options  # sites reach the face, and nothing of Flower's
    assert daemon.ports(settings.server(tmp_path / "c")) == [("127.0.0.1", 9093), ("::1", 9092)]


def test_the_fleet_port_is_open_at_an_address_of_ipv6(tmp_path):
    with socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        port = probe.getsockname()[1]
    server.init(tmp_path / "c", "[::1]", port, 9093, "[::1]")

    async def serve() -> None:
        opened = face.grpc_server(None, settings.server(tmp_path / "c"), insecure=True)
        await opened.start()
        socket.create_connection(("::1", port), timeout=5).close()
        await opened.stop(None)

    asyncio.run(serve())


@pytest.mark.parametrize(
    ("listen", "own"), [("0.0.0.0", "127.0.0.1"), ("::", "::1"), ("192.0.2.9", "192.0.2.9"), ("::1", "::1")]
)
def test_the_coordinator_looks_for_its_port_where_it_is_bound(listen, own):
    assert address.own_address(listen) == own


@pytest.mark.parametrize("given", ["fl.example", "", "*", "https://0.0.0.0", "0.0.0.0:9092"])
def test_an_address_to_listen_at_is_an_ip_address(given, tmp_path):
    with pytest.raises(InputError, match="--listen"):
        server.init(tmp_path / "c", "localhost", 9092, 9093, given)


def test_an_edited_folder_is_checked_as_the_command_is(tmp_path):
    server.init(tmp_path / "c", "localhost", 9092, 9093, "0.0.0.0")
    file = tmp_path / "c" / "server.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), "host": "https://fl.example"}))
    with pytest.raises(InputError, match=r"server\.host.*URL"):
        settings.server(tmp_path / "c")


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"https_proxy": "http://anna:secret@proxy.example:3128"}, "https_proxy=http://proxy.example:3128"),
        ({"http_proxy": "http://b:1", "grpc_proxy": "http://a:1"}, "grpc_proxy=http://a:1"),
        ({"https_proxy": "http://p:1", "no_proxy": "other.example, .fl.example"}, None),
        ({"https_proxy": "http://p:1", "no_proxy": "site.fl.example.org"}, "https_proxy=http://p:1"),
        ({"https_proxy": "http://p:1", "no_proxy": ""}, "https_proxy=http://p:1"),
        ({"HTTPS_PROXY": "http://p:1"}, None),
    ],
)
def test_the_proxy_that_grpc_takes_is_named_without_its_password(environment, found, monkeypatch):
    for name in (*address.PROXIES, *address.DIRECT, "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert address.proxy_of("site.fl.example") == found


def test_names_that_go_past_a_proxy_stay_in_the_environment_of_flower(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "fl.example")
    monkeypatch.setenv("NO_PROXY", "old.example")
    made = settings.environment(tmp_path)
    assert made["no_proxy"] == made["NO_PROXY"] == "fl.example,old.example,127.0.0.1,localhost"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "münchen.example"])
def test_a_certificate_is_taken_by_a_strict_client(host, tmp_path):
    server.init(tmp_path / "c", host, 9092, 9093, "0.0.0.0")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "c" / "server.crt", tmp_path / "c" / "server.key")
    one, other = socket.socketpair()

    def answer() -> None:
        with context.wrap_socket(other, server_side=True):
            pass

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    client = ssl.create_default_context(cafile=str(tmp_path / "c" / "ca.crt"))
    client.verify_flags |= ssl.VERIFY_X509_STRICT  # what Python does from 3.13 on
    with client.wrap_socket(one, server_hostname=address.parse_host(host, "host")) as stream:
        assert stream.version() == "TLSv1.3"
    thread.join(5)


def test_a_certificate_for_another_host_is_not_taken(tmp_path):
    keys_folder = tmp_path / "c"
    keys_folder.mkdir()
    keys.certificates(keys_folder, "fl.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(keys_folder / "server.crt", keys_folder / "server.key")
    listening = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(listening.accept()[0], server_side=True)

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    client = ssl.create_default_context(cafile=str(keys_folder / "ca.crt"))
    with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
        client.wrap_socket(socket.create_connection(listening.getsockname()), server_hostname="other.example")
    thread.join(5)
    listening.close()
