"""Keys and certificates: the coordinator's own authority and server certificate, and the key pair of a site.

The authority signs one server certificate; sites trust the authority alone. A site's key never leaves it: only the
public half goes to the coordinator. Private files are readable by their owner only.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpeft.errors import InputError
from fedpeft.files import write_bytes

DAYS, AUTHORITY_DAYS = 5 * 365, 20 * 365  # of a server's certificate and of its authority's
ISSUER = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft coordinator's authority")])
LOOPBACK = ("localhost", "127.0.0.1", "::1")
PRIVATE, PUBLIC = 0o600, 0o644
NOT_FOR = (  # an authority's key
    *("content_commitment", "key_encipherment", "data_encipherment"),
    *("key_agreement", "encipher_only", "decipher_only"),
)


def certificates(folder: Path, host: str) -> None:
    """Write ca.key, ca.crt, server.key and server.crt; the server's certificate is for `host` and for loopback."""
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    write_mode(folder / "ca.key", _encode_key(authority), PRIVATE)
    write_mode(folder / "ca.crt", _of_authority(authority), PUBLIC)
    write_mode(folder / "server.key", _encode_key(own), PRIVATE)
    write_mode(folder / "server.crt", _of_server(own, authority, host), PUBLIC)


def renew(folder: Path, host: str) -> bool:
    """Write server.crt anew, with the same keys, by the same authority.

    Returns:
        Whether ca.crt would end before it, and was written anew too; the old one is good until it ends.
    """
    authority, own = (_read_private(folder / name) for name in ("ca.key", "server.key"))
    older = days_left(folder / "ca.crt") < DAYS
    if older:
        write_mode(folder / "ca.crt", _of_authority(authority), PUBLIC)
    write_mode(folder / "server.crt", _of_server(own, authority, host), PUBLIC)
    return older


def days_left(path: Path) -> float:
    """Days until a certificate ends; below zero, since it has.

    Raises:
        InputError: the file is no certificate.
    """
    try:
        ends = x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except ValueError as error:
        raise InputError(f"{path}: no certificate: {error}") from error
    return (ends - datetime.datetime.now(datetime.UTC)) / datetime.timedelta(days=1)


def _read_private(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path}: no private key: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: no EC key.")
    return key


def _of_authority(key: ec.EllipticCurvePrivateKey) -> bytes:
    usage = x509.KeyUsage(digital_signature=True, key_cert_sign=True, crl_sign=True, **dict.fromkeys(NOT_FOR, False))
    return (
        _build_certificate(ISSUER, key.public_key(), AUTHORITY_DAYS)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def _of_server(key: ec.EllipticCurvePrivateKey, authority: ec.EllipticCurvePrivateKey, host: str) -> bytes:
    names = list(dict.fromkeys([host, *LOOPBACK]))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    return (
        _build_certificate(subject, key.public_key(), DAYS)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_to_general_name(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )


def site_keys(folder: Path) -> str:
    """Write the key pair of a site, `site.key` and `site.pub`, in OpenSSH's format; the public key as one line."""
    key = ec.generate_private_key(ec.SECP384R1())
    public = line(key.public_key())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    write_mode(folder / "site.key", private, PRIVATE)
    write_mode(folder / "site.pub", f"{public}\n".encode(), PUBLIC)
    return public


def public_key(text: str) -> ec.EllipticCurvePublicKey:
    """The key of a site from the line that it sent, or from a file with that line.

    Raises:
        InputError: it is no public EC key in OpenSSH's format.
    """
    path = Path(text)
    try:
        given = path.read_text() if len(text) < 256 and path.is_file() else text
        key = serialization.load_ssh_public_key(given.strip().encode())
    except (ValueError, UnsupportedAlgorithm, OSError) as error:
        raise InputError(
            f"PUBLIC_KEY: {text[:60]!r} is neither a file nor a line of site.pub, 'ecdsa-sha2-nistp384 "
            f"AAAA...': {error}"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError("PUBLIC_KEY: an ECDSA key of a NIST curve is needed (ecdsa-sha2-nistp384).")
    return key


def line(key: ec.EllipticCurvePublicKey) -> str:
    """A public key as the one line of site.pub."""
    return key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode()


def pem(text: str) -> bytes:
    """The same key as Flower keeps it."""
    return public_key(text).public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def write_mode(path: Path, data: bytes, mode: int) -> None:
    """Write a file that has its mode from the first byte on."""
    # By the mask and not afterwards: a key must not be readable even for an instant.
    mask = os.umask(0o777 & ~mode)
    try:
        write_bytes(path, data)
    finally:
        os.umask(mask)


def _build_certificate(subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)  # Python 3.13 takes no chain without key identifiers
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # clocks of sites may be behind
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ISSUER)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=days + 1))
        .add_extension(identifier, critical=False)
    )


def _to_general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _encode_key(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
