"""The commands to type for a federation, as lists of words: what `init` prints, what the examples and the guide run.

    simulation   one machine, one SuperLink that runs every client itself
    sites        a SuperLink, and a SuperNode a site; TLS and node keys, or plain HTTP on loopback

Flower 1.41: one port for everything, HTTP(S). Costs nothing.
"""

from __future__ import annotations

import ipaddress
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from spryfl.sites import certs

HOME = ".flwr"  # of FLWR_HOME in the app folder; Flower leaves it out of what it sends
SIMULATION, SITES = "simulation", "sites"  # names of connections in its config.toml
PORT = 8000  # of the SuperLink
NODE_PORT = 9094  # of a SuperNode's own processes, on loopback
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_KEEP = "--disable-runtime-dependency-installation"  # the apps are installed; nothing is fetched for a run


class Federation(NamedTuple):
    """Where a federation's parts are.

    >>> superlink(Federation(Path("app"), "127.0.0.1:8000", None))[:2]
    ['flower-superlink', '--insecure']
    """

    app: Path  # the app folder
    address: str  # host:port of the SuperLink, as the sites type it
    tls: Path | None  # folder of certificates and keys; None: plain HTTP on loopback

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def federation(app: Path, address: str, tls: Path | None) -> Federation:
    """A federation, checked: a ValueError for an address that is none, and for plain HTTP off this machine."""
    host, _, port = address.rpartition(":")
    if not host.strip("[]") or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f'superlink "{address}" is not of the form host:port, for example superlink.example.org:{PORT}.'
        )
    made = Federation(app, address, tls)
    if tls is None and not loopback(made.host):
        raise ValueError(
            f"--insecure is plain HTTP: anyone between the machines could read and change what travels. It is for "
            f"loopback alone, and {made.host} is not. Leave --insecure away (TLS, node keys), or give 127.0.0.1:{port}."
        )
    return made


def loopback(host: str) -> bool:
    """Whether a host is this machine, by its name alone: nothing is looked up."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def environment(app: Path) -> dict[str, str]:
    """The environment of all of them: Flower's home in the app folder, nothing sent to anyone else."""
    return {"FLWR_HOME": str((app / HOME).resolve()), **QUIET}


def simulator(port: int) -> list[str]:
    """The SuperLink that runs simulations, on loopback."""
    where = ["--host", "127.0.0.1", "--port", str(port)]
    return ["flower-superlink", "--insecure", "--simulation", *where, _KEEP]


def superlink(made: Federation) -> list[str]:
    """The SuperLink of a federation of sites. Its data base keeps the registered keys over a restart."""
    trust = ["--insecure"]
    if made.tls:
        pairs = (("ca-cert", certs.CA), ("cert", certs.SERVER), ("key", certs.SERVER_KEY))
        trust = [word for what, name in pairs for word in (f"--ssl-{what}file", str(made.tls / name))]
        trust += ["--enable-supernode-auth", "--database", str(made.app / HOME / "superlink.db")]
    host = "127.0.0.1" if loopback(made.host) else "0.0.0.0"
    return ["flower-superlink", *trust, "--host", host, "--port", str(made.port), _KEEP]


def register(made: Federation, node: int) -> list[str]:
    """Admits a site's key, at the SuperLink's machine."""
    return ["flwr", "supernode", "register", str(_tls(made) / f"node{node}.pub"), SITES]


def supernode(made: Federation, node: int, config: str, port: int = NODE_PORT) -> list[str]:
    """A site's process.

    Args:
        made: the federation.
        node: the number of its key.
        config: what the site says of itself: key=value, a text in quotes.
        port: of its own processes, on loopback; another one for each site of one machine.
    """
    trust = ["--insecure"]
    if made.tls:
        own = str(made.tls / f"node{node}")
        trust = ["--root-certificates", str(made.tls / certs.CA), "--auth-supernode-private-key", own]
    where = ["--superlink", made.address, "--host", "127.0.0.1", "--port", str(port)]
    return ["flower-supernode", *trust, *where, "--node-config", config]


def node(number: int, data: Path | str) -> str:
    """What a site says of itself: which client it is, and where its data are, which stay there."""
    return f'partition-id={number} data="{data}"'


def doctor(made: Federation, number: int, data: Path | str) -> list[str]:
    """The checks at a site, before its node is started."""
    words = ["spryfl", "flower", "doctor", str(made.app), "--superlink", made.address, "--data", str(data)]
    if made.tls is None:
        return [*words, "--insecure"]
    return [*words, "--root-certificates", str(made.tls / certs.CA), "--key", str(made.tls / f"node{number}")]


def run(app: Path, connection: str, folder: str = "", clients: int = 0, resume: bool = False) -> list[str]:
    """Starts the experiment.

    Args:
        app: the app folder.
        connection: simulation or sites.
        folder: the run folder; where the SuperLink was started, unless it is a full path. "": runs/<connection>.
        clients: how many a simulation has.
        resume: go on with that folder's run.
    """
    told = f'folder="{folder or f"runs/{connection}"}"' + (" resume=true" if resume else "")
    simulated = ["--federation-config", f"num-supernodes={clients} client-resources-num-cpus=1"] if clients else []
    return ["flwr", "run", str(app), connection, "--stream", "--run-config", told, *simulated]


def listing(connection: str) -> list[str]:
    """Asks how the newest run stands: `flwr run` ends with 0 even where the run failed."""
    return ["flwr", "list", connection, "--format", "json", "--limit", "1"]


def line(words: Iterable[str]) -> str:
    """A command as a shell reads it."""
    return shlex.join(words)


def _tls(made: Federation) -> Path:
    if made.tls is None:
        raise ValueError("plain HTTP has no keys to register.")
    return made.tls
