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

YEARS = 5
LOOPBACK = ("localhost", "127.0.0.1")
PRIVATE, PUBLIC = 0o600, 0o644


def certificates(folder: Path, host: str) -> None:
    """Write ca.key, ca.crt, server.key and server.crt; the server's certificate is for `host` and for loopback."""
    authority, own = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedpeft coordinator's authority")])
    usage = x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    root = (
        _certificate(issuer, issuer, authority.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .sign(authority, hashes.SHA256())
    )
    names = list(dict.fromkeys([host, *LOOPBACK]))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:64])])
    server = (
        _certificate(subject, issuer, own.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_general(name) for name in names]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        .sign(authority, hashes.SHA256())
    )
    write_mode(folder / "ca.key", _pem(authority), PRIVATE)
    write_mode(folder / "ca.crt", root.public_bytes(serialization.Encoding.PEM), PUBLIC)
    write_mode(folder / "server.key", _pem(own), PRIVATE)
    write_mode(folder / "server.crt", server.public_bytes(serialization.Encoding.PEM), PUBLIC)


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


def _certificate(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
    identifier = x509.SubjectKeyIdentifier.from_public_key(key)  # Python 3.13 takes no chain without key identifiers
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)  # clocks of sites may be behind
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + datetime.timedelta(days=365 * YEARS))
        .add_extension(identifier, critical=False)
    )


def _general(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
