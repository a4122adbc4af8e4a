"""Who is connected, what each node says of itself, and which client it plays.

Where nodes hold data of their own, client i is the node whose partition-id is i; else any node can play any client, and
client i sits on node i modulo their number. Of two nodes with one partition-id the newer counts: the other may be left
by a restart. Nobody waits for a greeting but the start of a run; a node that comes later takes part once it has
answered. Cost: one small message a node, and none in a simulation.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from spryfl.engines.flower_letters import Note, letter, opened, size

log = logging.getLogger("flwr")  # Flower shows it, and carries it to whoever follows the run

_HELLO = "query.hello"
_FINAL = (1, 2, 7)  # Flower's errors of an app that does not load, that raises, that is not trusted


class Late(NamedTuple):
    """A message that was not answered in time."""

    round: int
    client: int


@dataclass
class Nodes:
    """Who is there, and what each said of itself."""

    grid: Grid
    clients: int
    simulated: bool
    note: Note  # what every instruction carries
    greeting: Note  # what a first message carries
    deadline: float  # seconds; 0 = none
    said: dict[int, Note] = field(default_factory=dict)  # node -> its answer to the first message, oldest first
    greeted: dict[str, int] = field(default_factory=dict)  # first message -> a node that has not answered it
    late: dict[str, Late] = field(default_factory=dict)  # message -> what it was
    bytes_down: int = 0  # of greetings, as Flower counts
    bytes_up: int = 0

    def there(self) -> list[int]:
        """The nodes that are connected and can take part; new ones are greeted."""
        now = sorted(self.grid.get_node_ids())
        if self.simulated:
            return now
        for node in now:
            if node not in self.said and node not in self.greeted.values():
                self._greet(node)
        self._listen()
        return [node for node in now if node in self.said and "error" not in self.said[node]]

    def _greet(self, node: int) -> None:
        message = Message(letter(b"", self.greeting), node, _HELLO)
        self.greeted |= {name: node for name in self.grid.push_messages([message]) if name}
        self.bytes_down += size(message)

    def _listen(self) -> None:
        """Takes down what nodes answered to their first message."""
        for reply in list(self.grid.pull_messages(list(self.greeted))) if self.greeted else []:
            node = self.greeted.pop(reply.metadata.reply_to_message_id)
            if reply.has_error() and reply.error.code not in _FINAL:
                continue  # it went away; should it come back, it is greeted again
            self.bytes_up += size(reply)
            self.said[node] = said = _accepted(reply, self)
            log.info("node %d: %s", node, said.get("error") or _introduced(said))

    def seats(self) -> dict[int, int]:
        """client -> the node that plays it; a client without one is left out."""
        here = self.there()
        if self.simulated:
            return {client: here[client % len(here)] for client in range(self.clients)} if here else {}
        newest = {self.said[node].get("partition-id", -1 - node): node for node in self.said if node in here}
        if self.own():
            return {number: node for number, node in newest.items() if self.said[node].get("own")}
        order = [newest[number] for number in sorted(newest, key=lambda number: (number < 0, abs(number)))]
        return {client: order[client % len(order)] for client in range(self.clients)} if order else {}

    def own(self) -> bool:
        """Whether the clients are nodes with data of their own."""
        return any(said.get("own") and "error" not in said for said in self.said.values())


def _introduced(note: Note) -> str:
    own = f"data of its own, {note.get('examples')} examples" if note.get("own") else "no data of its own"
    return f"partition-id {note.get('partition-id', 'none')}, {own}"


def gathered(nodes: Nodes, wanted: int, wait: float) -> None:
    """Waits for the nodes of a run.

    Args:
        nodes: who is there.
        wanted: how many; 0 = as many as the first says, or one a client where they hold data, or one.
        wait: seconds.

    Raises:
        ValueError: too few came, or one of them cannot take part: it says why.
    """
    until = time.monotonic() + wait
    while True:
        here = nodes.there()
        wrong = [f"node {node}: {said['error']}" for node, said in nodes.said.items() if "error" in said]
        if wrong:
            raise ValueError("a node cannot take part. " + " ".join(wrong))
        needed = wanted or _usual(nodes, here)
        if here and len(nodes.seats() if nodes.own() else here) >= needed:
            return
        if time.monotonic() > until:
            connected = len(list(nodes.grid.get_node_ids()))
            raise ValueError(
                f"{len(here)} of {needed} nodes have answered after {wait:g} s, and {connected} are connected. "
                f"Start the others (flower-supernode), or set flower.wait or flower.nodes."
            )
        time.sleep(0.5)


def _usual(nodes: Nodes, here: Sequence[int]) -> int:
    if nodes.own():
        return nodes.clients
    return max((int(nodes.said.get(node, {}).get("num-partitions", 1)) for node in here), default=1)


def _accepted(reply: Message, nodes: Nodes) -> Note:
    """A node's account of itself, its types checked, or what is wrong with it."""
    if reply.has_error():
        return {"error": why(reply)}
    try:
        said = opened(reply.content)[1]
    except ValueError as error:
        return {"error": str(error)}
    text = [key for key in ("error", "model", "fingerprint") if not isinstance(said.get(key, ""), str)]
    whole = [key for key in ("partition-id", "num-partitions", "examples") if type(said.get(key, 0)) is not int]
    if text or whole:
        return {"error": f"says of itself what cannot be ({', '.join(text + whole)})"}
    if "error" in said:
        return {"error": said["error"][:500]}
    number = said.get("partition-id", -1)
    if said.get("own") and not 0 <= number < nodes.clients:
        return {
            "error": f"it holds data of its own, and its partition-id is {number if number >= 0 else 'missing'}. Start "
            f'it with --node-config "partition-id=N data=...", N from 0 to {nodes.clients - 1}, each once.'
        }
    if said.get("model", "") != nodes.greeting.get("model", ""):
        return {"error": f"its frozen model is another (hash {said.get('model')}, here {nodes.greeting.get('model')})."}
    if said.get("own") and said.get("examples", 0) < 1:
        return {"error": "it holds no examples"}
    return said


def why(reply: Message) -> str:
    """What Flower says in a client's place, on one line."""
    reason = " ".join((reply.error.reason or "").split())[:200]
    return f"Flower's error {reply.error.code}: {reason or 'no reason given'}"
