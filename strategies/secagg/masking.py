"""Arithmetic of secure aggregation: fixed-point values, masks, key agreement, secret sharing.

Fixed point. With L = 2^(bits-1) - 1 and step = clip / L, a change x is sent as q = round(min(max(x, -clip), clip) /
step), |q| <= L, to the nearest integer. Sums are taken modulo 2^32 and read as signed integers, so the sum of n values
is exact if n L < 2^31, that is n (2^bits - 2) < 2^32: `max_bits` is the largest such `bits`, and there is no overflow
at any input. What is left of the 32 bits tells a damaged sum: almost surely one of its values is outside of +-n L.

Error of the mean over clients, per coordinate: at most step / 2 beside what clipping cuts off (each client's own error
is). Rounding is to the nearest and not stochastic: half the worst error, and the sum is the same in every run of one
seed; the bias, at most step / 2, is near float32's own resolution at the default of 22 bits.

Masks are ChaCha20 key streams, keys come from X25519 and HKDF-SHA256, shares travel under ChaCha20-Poly1305. Secrets
are shared over the prime field of 2^521 - 1 (Shamir 1979). All randomness is the operating system's.

    >>> max_bits(5), max_bits(1024), max_bits(1025)
    (29, 22, 21)
    >>> shares = split(b"secret", threshold=2, holders=3)
    >>> combine(shares[1:], 2, length=6), combine([shares[2], shares[0]], 2, length=6)
    (b'secret', b'secret')
"""

from __future__ import annotations

import os
import secrets
from typing import Any

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

WORD = np.dtype("<u4")
MODULUS = 2**32
PRIME = 2**521 - 1
KEY_BYTES, NONCE_BYTES, SHARE_BYTES = 32, 12, 68  # a share is two bytes of x and 66 of y
SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + 16  # two shares, and the tag of the authenticated encryption
Words = np.ndarray[Any, np.dtype[np.uint32]]
Floats = np.ndarray[Any, np.dtype[np.float64]]


def max_bits(clients: int) -> int:
    """The most bits of one value with which the sum over `clients` cannot overflow."""
    return ((MODULUS - 1) // clients + 2).bit_length() - 1


def levels(bits: int) -> int:
    """L, the integer that stands for +clip."""
    return (1 << (bits - 1)) - 1


def quantise(change: Floats, clip: float, bits: int) -> tuple[Words, int]:
    """Fixed-point values of `change` modulo 2^32, and how many coordinates were clipped."""
    scaled = np.clip(change, -clip, clip) / clip * levels(bits)
    # By way of int64: a negative float has no defined value as an unsigned word.
    return np.rint(scaled).astype(np.int64).astype(WORD), int((np.abs(change) > clip).sum())


def dequantise(total: Words, clients: int, clip: float, bits: int) -> Floats:
    """The mean of the changes whose fixed-point values add up to `total`.

    Raises:
        ValueError: no sum of that many values can be `total`.
    """
    # Widened before `abs`, which has no int32 for -2^31.
    signed = total.astype(WORD).view("<i4").astype(np.int64)
    most = clients * levels(bits)
    outside = int((np.abs(signed) > most).sum())
    if outside:
        raise ValueError(f"{outside} of {signed.size} sums are outside of +-{most}")
    return np.multiply(signed, clip / levels(bits) / clients, dtype=np.float64)


def stream(key: bytes, size: int) -> Words:
    """`size` pseudorandom words. A key is used for one stream only, so the nonce may be zero."""
    cipher = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None)
    return np.frombuffer(cipher.encryptor().update(bytes(WORD.itemsize * size)), dtype=WORD)


def keypair() -> tuple[bytes, bytes]:
    """A new secret key and its public key."""
    secret = os.urandom(KEY_BYTES)
    return secret, public_of(secret)


def public_of(secret: bytes) -> bytes:
    """The public key (X25519, 32 bytes) of a secret one."""
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def agree(secret: bytes, public: bytes, purpose: str) -> bytes:
    """The key that the owners of two key pairs have in common for one purpose.

    Raises:
        ValueError: `public` is not a public key.
    """
    shared = X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=f"fedpeft secagg {purpose}".encode()).derive(shared)


def seal(key: bytes, content: bytes, label: str) -> bytes:
    """Authenticated encryption; `label` says from whom to whom and when, and must be the same at the other end."""
    # One key seals more than one message, so the nonce must be new.
    nonce = os.urandom(NONCE_BYTES)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, content, label.encode())


def unseal(key: bytes, sealed: bytes, label: str) -> bytes:
    """The inverse of `seal`.

    Raises:
        ValueError: another key or label, or changed on the way.
    """
    try:
        return ChaCha20Poly1305(key).decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], label.encode())
    except InvalidTag:
        raise ValueError("it does not open: another key or label, or it was changed on the way") from None


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Shares of a secret (at most 65 bytes), any `threshold` of which give it back; fewer tell nothing."""
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = []
    for x in range(1, holders + 1):
        y = 0
        # Horner's rule; the secret is the value at zero, so no holder may have x = 0.
        for coefficient in reversed(coefficients):
            y = (y * x + coefficient) % PRIME
        shares.append(x.to_bytes(2) + y.to_bytes(SHARE_BYTES - 2))
    return shares


def combine(shares: list[bytes], threshold: int, length: int = KEY_BYTES) -> bytes:
    """The secret of `length` bytes, by Lagrange interpolation at zero of the first `threshold` different shares.

    Raises:
        ValueError: too few shares, or not of one secret (found out only if the result does not fit).
    """
    points: dict[int, int] = {}
    for share in shares:
        points.setdefault(int.from_bytes(share[:2]), int.from_bytes(share[2:]))
    if len(points) < threshold:
        raise ValueError(f"{len(points)} of the {threshold} shares that it takes")
    chosen = list(points.items())[:threshold]
    total = 0
    for x, y in chosen:
        top, bottom = 1, 1
        for other, _ in chosen:
            if other != x:
                top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
        total += y * top * pow(bottom, -1, PRIME)
    value = total % PRIME
    # The prime has 521 bits: shares of different secrets give a number that almost surely does not fit.
    if value >= 256**length:
        raise ValueError("the shares are not of one secret")
    return value.to_bytes(length)
