"""Checks before a long run, on any machine of a federation: each says ok, note or wrong, and what to do.

    versions    of this side, beside those that the app folder was made with
    noise       the fingerprint: equal where directions are equal to the bit
    model       the hash of the base model's weights
    data        the site's file: can it be read as the experiment's task needs it
    key         the site's private key: kind, format, who may read it
    superlink   name, port, certificate, health

A wrong version of spryfl or Flower, other noise and other weights are wrong; another torch alone is a note: values then
agree to rounding, not to the bit. Cost: the model is loaded once; no message leaves but a GET of /health.
"""

from __future__ import annotations

import datetime
import http.client
import socket
import ssl
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from spryfl import data as data_
from spryfl import tasks, trace
from spryfl.config import Experiment
from spryfl.data import columns, tables
from spryfl.data import labels as labelling
from spryfl.sites import folder as folders
from spryfl.sites import hashes, typed

OK, NOTE, WRONG = "ok", "note", "wrong"
_WAIT = 10.0  # seconds for a connection
_SOON = datetime.timedelta(days=14)


class Check(NamedTuple):
    """One finding."""

    what: str
    state: str
    said: str
    do: str = ""


def examine(
    folder: Path | None = None,
    superlink: str = "",
    root_certificates: Path | None = None,
    key: Path | None = None,
    data: Path | None = None,
    insecure: bool = False,
) -> Iterator[Check]:
    """All checks that what was given allows, one after the other."""
    opened = folders.read(folder) if folder else None
    made_with = opened.made_with if opened else {}
    yield from versions(folders.versions(), made_with)
    yield noise(trace.fingerprint(), made_with.get("noise", ""))
    if opened:
        yield model(hashes.weights(opened.experiment), made_with.get("model", ""), opened.experiment.model.name)
    if data:
        yield rows(data, opened.experiment if opened else Experiment(), opened.labels if opened else ())
    if key:
        yield secret(key)
    if superlink:
        yield from reach(superlink, root_certificates, insecure)


def versions(here: Mapping[str, str], there: Mapping[str, str]) -> Iterator[Check]:
    """Each package of this side beside the one that the app folder was made with."""
    for name, own in here.items():
        wanted = there.get(name, own)
        if not own:
            extra = 'pip install "spryfl[flower]"' if name == "flwr" else f"pip install {name}=={wanted}"
            yield Check(name, WRONG, "not installed", f"Install it: {extra}")
        elif _same(name, own, wanted):
            yield Check(name, OK, own + ("" if name in there or not there else ", not noted in the app folder"))
        elif name in ("spryfl", "flwr"):
            yield Check(name, WRONG, f"{own} here, {wanted} there", f"Install the same: pip install {name}=={wanted}")
        else:
            said = f"{own} here, {wanted} there: results may agree to rounding only"
            yield Check(name, NOTE, said, f"For equal bits: {name} {wanted}.")


def _same(name: str, own: str, other: str) -> bool:
    """Flower speaks with itself within a minor version; a build's suffix (+cpu) does not count."""
    if name == "flwr":
        return own.split(".")[:2] == other.split(".")[:2]
    return own.split("+")[0] == other.split("+")[0]


def noise(own: str, wanted: str) -> Check:
    """Whether directions made here are those made elsewhere."""
    if wanted and own != wanted:
        return Check(
            "noise",
            WRONG,
            f"fingerprint {own} here, {wanted} there: directions differ, so scalars mean nothing elsewhere",
            'Install the same torch, or use distribution "rademacher" or exchange = "weights".',
        )
    return Check("noise", OK, f"fingerprint {own}" + (", as in the app folder" if wanted else ""))


def model(own: str, wanted: str, name: str) -> Check:
    """Whether the base model's weights are those that the experiment was made with."""
    if not own:
        return Check("model", WRONG, f"{name} is not on this machine", "Get it before the run, or give a local folder.")
    if wanted and own != wanted:
        said = f"weights of {name} have the hash {own} here, {wanted} there"
        return Check("model", WRONG, said, "Use the same files: the same revision of the hub, or a copied folder.")
    return Check("model", OK, f"{name}, hash {own}" + (", as in the app folder" if wanted else ""))


def rows(path: Path, experiment: Experiment, labels: Sequence[str] = ()) -> Check:
    """Whether a site's file can be read as the experiment needs it. What it says of the rows stays here."""
    d, needs = experiment.data, tasks.build(experiment.task).needs
    named = {"text": d.text, "pair": d.pair, "label": d.label}
    try:
        found = data_.read_labelled(path, labels or _classes(path, experiment), **named, needs=needs)
    except (ValueError, OSError) as error:
        do = "Change the file, or data.text, data.pair, data.label of the experiment, for all sites."
        return Check("data", WRONG, str(error), do)
    counted = Counter(found.label)
    shown = ", ".join(f"{name} {counted[i]}" for i, name in enumerate(labels)) if needs.label else ""
    said = f"{len(found.text)} rows of {path}" + (f"; {shown}" if shown else "")
    if needs.label and not labels:
        return Check("data", NOTE, f"{said}; its classes could not be compared", "Give the app folder.")
    return Check("data", OK, said)


def _classes(path: Path, experiment: Experiment) -> tuple[str, ...]:
    """The classes that a file itself names."""
    d, needs = experiment.data, tasks.build(experiment.task).needs
    table = tables.read(path)
    chosen, _ = columns.choose(table, columns.Columns(d.text, d.pair, d.label, ""), needs)
    return labelling.names(table, chosen.label) if needs.label else (columns.ALL,)


def secret(path: Path) -> Check:
    """Whether a private key is one that SuperNode authentication takes, and nobody else can read it."""
    again = "Make one: ssh-keygen -t ecdsa -b 384 -f node0 -N '' and register node0.pub at the SuperLink."
    try:
        found = load_ssh_private_key(path.read_bytes(), None)
        mode = stat.S_IMODE(path.stat().st_mode)
    except (OSError, ValueError, TypeError) as error:
        return Check(
            "key", WRONG, f"{path} cannot be read as an OpenSSH private key without a password: {error}", again
        )
    if not isinstance(found, ec.EllipticCurvePrivateKey) or found.curve.name != "secp384r1":
        return Check("key", WRONG, f"{path} is not ECDSA on P-384", again)
    if mode & 0o077:
        return Check("key", WRONG, f"{path} can be read by others (mode {mode:o})", f"chmod 600 {path}")
    return Check("key", OK, f"{path}, ECDSA P-384, readable by you alone")


def reach(superlink: str, root_certificates: Path | None, insecure: bool) -> Iterator[Check]:
    """Name, port, TLS and health of a SuperLink, up to the first that is wrong."""
    made = typed.federation(Path(), superlink, None if insecure else Path())
    if insecure and root_certificates:
        raise ValueError("--root-certificates has no effect with --insecure. Remove one of them.")
    try:
        with socket.create_connection((made.host, made.port), timeout=_WAIT) as plain:
            yield Check("superlink", OK, f"{superlink} answers")
            if not insecure:
                yield (trust := certificate(plain, made.host, root_certificates))
                if trust.state == WRONG:
                    return
    except OSError as error:
        do = "Is it running? Is the port open on its machine and in the firewalls between?"
        yield Check("superlink", WRONG, f"{superlink} cannot be reached: {error.strerror or error}", do)
        return
    yield health(made, root_certificates, insecure)


def certificate(plain: socket.socket, host: str, root_certificates: Path | None) -> Check:
    """The handshake as a site makes it: signed by the CA, for this name, and for how long."""
    try:
        with _context(root_certificates).wrap_socket(plain, server_hostname=host) as safe:
            found = safe.getpeercert() or {}
            version = safe.version()
    except ssl.SSLCertVerificationError as error:
        do = "Use the ca.crt of this SuperLink, and a name that its certificate has (spryfl flower certs --host)."
        return Check("certificate", WRONG, f"not trusted: {error.verify_message}", do)
    except (ssl.SSLError, OSError) as error:
        do = "Was the SuperLink started with --insecure? Then it does not speak TLS."
        return Check("certificate", WRONG, f"no TLS: {error}", do)
    until = datetime.datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), datetime.UTC)
    said = f"{version}, trusted, good until {until.date()}"
    if until - datetime.datetime.now(datetime.UTC) < _SOON:
        return Check("certificate", NOTE, said, "It ends soon: make a new one before a long run.")
    return Check("certificate", OK, said)


def health(made: typed.Federation, root_certificates: Path | None, insecure: bool) -> Check:
    """Whether what answers is a SuperLink that is well."""
    open_: http.client.HTTPConnection
    if insecure:
        open_ = http.client.HTTPConnection(made.host, made.port, timeout=_WAIT)
    else:
        open_ = http.client.HTTPSConnection(made.host, made.port, timeout=_WAIT, context=_context(root_certificates))
    try:
        open_.request("GET", "/health")
        status = open_.getresponse().status
    except (OSError, http.client.HTTPException) as error:
        return Check("health", WRONG, f"no answer to GET /health: {error}", "Is this the SuperLink's port?")
    finally:
        open_.close()
    if status != 200:
        return Check("health", WRONG, f"GET /health answers {status}", "Is this the SuperLink's port? See its log.")
    return Check("health", OK, "the SuperLink says it is well")


def _context(root_certificates: Path | None) -> ssl.SSLContext:
    """As strict as a site: the CA given, or the system's."""
    if root_certificates and not root_certificates.is_file():
        raise ValueError(
            f"--root-certificates {root_certificates}: there is no such file. Give the SuperLink's ca.crt."
        )
    return ssl.create_default_context(cafile=str(root_certificates) if root_certificates else None)
