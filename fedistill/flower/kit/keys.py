"""Keys and certificates of a deployment, all on elliptic curves.

All use P-256. The certificates with ECDSA are a tenth of an RSA-4096 pair, and so is the TLS
handshake that a site pays for each new connection; a site's public key travels in every request.
A site's key is in the OpenSSH format, which is what a SuperNode of flwr 1.41 reads; its public half
is what ``flwr supernode register`` takes.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey

Authority = tuple["EllipticCurvePrivateKey", "x509.Certificate"]
"""A private key and the certificate that belongs to it."""

AUTHORITY_DAYS = 3650
SERVER_DAYS = 397
"""Longer-lived server certificates are refused by some TLS libraries."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""The SuperLink's own processes, its command line and the proxy before it connect to these."""


def authority(name: str) -> Authority:
    """A new certificate authority for one federation, valid for ten years.

    Args:
        name: what the certificate calls it.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = _subject(name)
    certificate = (
        _dated(x509.CertificateBuilder(), AUTHORITY_DAYS)
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        # pathlen 0: it signs servers, and can never make another authority.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    return key, certificate


def server_certificate(
    authority: Authority, hosts: Sequence[str], days: int = SERVER_DAYS
) -> Authority:
    """A new key and a certificate for the server, signed by the authority.

    Args:
        authority: key and certificate of :func:`authority`.
        hosts: DNS names and IP addresses that sites use; those of the loopback are added.
        days: how long it is valid.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID

    signer, issuer = authority
    key = ec.generate_private_key(ec.SECP256R1())
    names = tuple(dict.fromkeys([*hosts, *LOOPBACK]))
    certificate = (
        _dated(x509.CertificateBuilder(), days)
        .subject_name(_subject(names[0]))
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .add_extension(x509.SubjectAlternativeName([_name(name) for name in names]), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage("digital_signature"), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        # Python 3.13 refuses a certificate that does not say which key signed it.
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
        )
        .sign(signer, hashes.SHA256())
    )
    return key, certificate


def node_key() -> tuple[bytes, bytes]:
    """A new key of a site: the private and the public half, both in the OpenSSH format."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    return private, public + b"\n"


def key_pem(key: EllipticCurvePrivateKey) -> bytes:
    """The private key as PEM, without a passphrase: services start unattended."""
    from cryptography.hazmat.primitives import serialization

    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.PEM)


def fingerprint(certificate: x509.Certificate) -> str:
    """The SHA-256 of a certificate as ``openssl x509 -fingerprint -sha256`` prints it."""
    from cryptography.hazmat.primitives import hashes

    return certificate.fingerprint(hashes.SHA256()).hex(":").upper()


def _dated(builder: x509.CertificateBuilder, days: int) -> x509.CertificateBuilder:
    from cryptography import x509

    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    return (
        builder.serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a site's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=days - 1))  # `days` long in all
    )


def _subject(name: str) -> x509.Name:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "fedistill"),
            x509.NameAttribute(NameOID.COMMON_NAME, name[:64]),  # the longest that X.509 allows
        ]
    )


def _name(host: str) -> x509.GeneralName:
    from cryptography import x509

    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(host))
    return x509.DNSName(host)


def _usage(*names: str) -> x509.KeyUsage:
    from cryptography import x509

    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{usage: usage in names for usage in every})
