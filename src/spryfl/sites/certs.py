"""Certificates and keys for a federation that is being tried out: a CA, the server's certificate, a key pair a site.

    ca.crt                    everyone: by it a site knows that it talks to the right SuperLink
    server.pem, server.key    the SuperLink's machine alone
    node0, node0.pub, ...     node<i> at site i alone; the .pub files are registered at the SuperLink

ECDSA on P-384 throughout, as SuperNode authentication wants it (RFC 5656, OpenSSH's format); certificates by RFC 5280.
The CA signs one certificate and its private key is then forgotten: nobody can sign a second server with it. Cost:
milliseconds.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

CA, SERVER, SERVER_KEY = "ca.crt", "server.pem", "server.key"
DAYS = 90
LOOPBACK = ("localhost", "127.0.0.1", "::1")  # the SuperLink's own processes talk to it by these
_SKEW = datetime.timedelta(minutes=5)  # a site's clock may be late
_LABEL = r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)"
_NAME = re.compile(rf"({_LABEL}\.)*(?!\d+$){_LABEL}")  # a last part of digits alone is a mistyped address
_TEXT = """\
Made by `spryfl flower certs` for trying out. Where each file belongs:

{ca}        every machine: by it a site, and `flwr`, know that they talk to this SuperLink. Not secret.
{server}    the SuperLink's machine: its certificate, for {hosts}. Not secret.
{key}    the SuperLink's machine alone. SECRET: whoever has it can pose as the SuperLink.
node<i>       site i alone, {nodes}. SECRET: whoever has it can pose as that site.
node<i>.pub   the SuperLink's machine, to be registered there. Not secret.

Better than carrying node<i> over a network: make it at the site (ssh-keygen -t ecdsa -b 384 -f node0 -N "") and carry
node0.pub alone. The certificates are good until {until}; the CA's private key was not kept, so then make new
ones, and give {ca} to every machine again. For a federation that stays, take certificates from the authority of your
organisation.
"""


def make(folder: Path, nodes: int, hosts: Sequence[str], days: int = DAYS) -> list[Path]:
    """Writes a CA, a server certificate and `nodes` key pairs into a new folder; private keys for your eyes alone.

    Args:
        folder: a folder that is not there yet. It appears whole or not at all.
        nodes: how many sites get a key pair.
        hosts: names and IP addresses by which sites reach the SuperLink. Loopback's are always among them.
        days: how long the certificates are good.

    Returns:
        the files, in the order of their names.

    Raises:
        ValueError: the folder is there, a host is no name and no address, or a number is below 1.

    Example:
        certs.make(Path("tls"), nodes=2, hosts=["superlink.example.org", "192.0.2.7"])
    """
    names = _names(hosts)
    if nodes < 1 or days < 1:
        raise ValueError(f"certs: {nodes} nodes and {days} days; at least 1 of each.")
    if folder.exists():
        raise ValueError(
            f"{folder} is there already, and nothing in it was touched: sites may use its keys. Give another folder."
        )
    beside = folder.with_name(f"{folder.name}.part-{os.getpid()}")
    shown = f"node0 to node{nodes - 1}" if nodes > 1 else "node0"
    try:
        beside.mkdir(parents=True, mode=0o700)
        until = _write(beside, nodes, names, days)
        said = _TEXT.format(ca=CA, server=SERVER, key=SERVER_KEY, hosts=", ".join(names), nodes=shown, until=until)
        (beside / "README.txt").write_text(said, encoding="utf-8")
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return sorted(folder.iterdir())


def _write(folder: Path, nodes: int, names: Sequence[str], days: int) -> str:
    """All keys and certificates; the last day on which the certificates are good."""
    ca, server = _key(), _key()
    start = datetime.datetime.now(datetime.UTC) - _SKEW
    span = start, start + datetime.timedelta(days=days)
    root = _authority(ca, span)
    _public(folder / CA, root.public_bytes(serialization.Encoding.PEM))
    _public(folder / SERVER, _server(server, root, ca, names, span).public_bytes(serialization.Encoding.PEM))
    _secret(folder / SERVER_KEY, server, serialization.PrivateFormat.PKCS8)
    for i in range(nodes):
        own = _key()
        _secret(folder / f"node{i}", own, serialization.PrivateFormat.OpenSSH)
        text = own.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        _public(folder / f"node{i}.pub", text + f" node{i}\n".encode())
    return span[1].date().isoformat()


def _names(hosts: Iterable[str]) -> tuple[str, ...]:
    """The hosts given, each a name or an address, and loopback's."""
    for host in hosts:
        if not (_address(host) or _NAME.fullmatch(host)):
            raise ValueError(
                f'certs: host "{host}" is neither a host name nor an IP address. Give what the sites will type, but '
                f"without a port: superlink.example.org, or 192.0.2.7."
            )
    return tuple(dict.fromkeys((*hosts, *LOOPBACK)))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP384R1())


Span = tuple[datetime.datetime, datetime.datetime]


def _builder(subject: str, issuer: str, key: ec.EllipticCurvePrivateKey, span: Span) -> x509.CertificateBuilder:
    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    return (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(span[0])
        .not_valid_after(span[1])
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


_ISSUER = "spryfl, for trying out"


def _authority(key: ec.EllipticCurvePrivateKey, span: Span) -> x509.Certificate:
    return (
        _builder(_ISSUER, _ISSUER, key, span)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    root: x509.Certificate,
    ca: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    span: Span,
) -> x509.Certificate:
    found = [(host, _address(host)) for host in names]
    hosts = [x509.IPAddress(address) if address else x509.DNSName(host) for host, address in found]
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key())
    return (
        _builder(names[0][:64], _ISSUER, key, span)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(hosts), critical=False)
        .add_extension(above, critical=False)
        .sign(ca, hashes.SHA384())
    )


def _usage(**given: bool) -> x509.KeyUsage:
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
    return x509.KeyUsage(**{name: given.get(name, False) for name in every})


def _secret(path: Path, key: ec.EllipticCurvePrivateKey, form: serialization.PrivateFormat) -> None:
    """A private key, readable by its owner from the first byte on."""
    text = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)


def _public(path: Path, data: bytes) -> None:
    path.write_bytes(data)
