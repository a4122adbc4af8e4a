"""The exchange over Flower's Grid: one message a client, a deadline, and a check of all that comes back.

Clients are seated on nodes: where nodes hold data of their own, client i is the node whose partition-id is i; otherwise
any node can play any client, and client i sits on node i modulo their number. Answers are polled for here, as Flower's
own loop looks every three seconds. Cost: the messages' bytes in memory, those of a cohort at a time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flwr.app import Message
from flwr.serverapp import Grid

from spryfl import wire
from spryfl.engines.flower_check import Expected, RefusedError, read
from spryfl.engines.flower_letters import Note, letter, opened, size
from spryfl.train import Answers, Exchange
from spryfl.types import Instruction, Update

log = logging.getLogger("flwr")  # Flower shows it, and carries it to whoever follows the run

# Seconds of the messages of a round at their clients, added up: until the process was there, of its imports, of the
# model and the rows, of the steps.
PARTS = ("start", "import", "load", "step")
_HELLO, _ROUND = "query.hello", "train.round"
_POLL = {True: 0.02, False: 0.25}  # seconds between looks: in a simulation, over a network
_PATIENCE = 2.0  # deadlines until Flower drops a message: what comes after one is late, and counted


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
    note: Note  # what every message carries
    deadline: float  # seconds; 0 = none
    greeting: float = 60.0  # seconds that a new node has for its first answer
    said: dict[int, Note] = field(default_factory=dict)  # node -> its answer to the first message
    late: dict[str, Late] = field(default_factory=dict)  # message -> what it was
    bytes_down: int = 0  # of greetings, as Flower counts
    bytes_up: int = 0

    def there(self) -> list[int]:
        """The nodes that are connected and usable; new ones are greeted first."""
        now = sorted(self.grid.get_node_ids())
        if self.simulated:
            return now
        new = [node for node in now if node not in self.said]
        for node, note in greeted(self, new).items():
            self.said[node] = note
            log.info("node %d: %s", node, note.get("error") or _introduced(note))
        return [node for node in now if "error" not in self.said.get(node, {"error": ""})]

    def seats(self) -> dict[int, int]:
        """client -> the node that plays it; a client without one is left out."""
        nodes = self.there()
        own = [node for node in nodes if self.said.get(node, {}).get("own")]
        if own:
            return {int(self.said[node]["partition-id"]): node for node in sorted(own, key=list(self.said).index)}
        order = sorted(nodes, key=lambda node: (self.said.get(node, {}).get("partition-id", math.inf), node))
        return {client: order[client % len(order)] for client in range(self.clients)} if order else {}

    def of(self, client: int) -> Note:
        """What the newest node with that client's data said."""
        return next(n for n in reversed(list(self.said.values())) if n.get("own") and n["partition-id"] == client)


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
        if here and len(nodes.seats() if _own(nodes, here) else here) >= needed:
            return
        if time.monotonic() > until:
            connected = len(list(nodes.grid.get_node_ids()))
            raise ValueError(
                f"{len(here)} of {needed} nodes have answered after {wait:g} s, and {connected} are connected. Start the "
                f"others (flower-supernode), or set flower.wait or flower.nodes."
            )
        time.sleep(0.5)


def _own(nodes: Nodes, here: Sequence[int]) -> bool:
    return any(nodes.said.get(node, {}).get("own") for node in here)


def _usual(nodes: Nodes, here: Sequence[int]) -> int:
    if _own(nodes, here):
        return nodes.clients
    return max((int(nodes.said.get(node, {}).get("num-partitions", 1)) for node in here), default=1)


def greeted(nodes: Nodes, new: Sequence[int]) -> dict[int, Note]:
    """What nodes say of themselves; one that does not answer is asked again at the next occasion."""
    sent = {node: Message(letter(b"", nodes.note), node, _HELLO) for node in new}
    nodes.bytes_down += sum(size(message) for message in sent.values())
    replies, _ = asked(nodes, sent, nodes.greeting)
    nodes.bytes_up += sum(size(reply) for reply in replies.values())
    out = {}
    for node, reply in replies.items():
        try:
            out[node] = _accepted(opened(reply.content)[1], nodes) if reply.has_content() else {"error": _why(reply)}
        except ValueError as error:
            out[node] = {"error": str(error)}
    return out


def _accepted(said: Note, nodes: Nodes) -> Note:
    """A node's account of itself, its types checked, or what is wrong with it."""
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
    if said.get("model", "") != nodes.note.get("model", ""):
        return {"error": f"its frozen model is another (hash {said.get('model')}, here {nodes.note.get('model')})."}
    if said.get("own") and said.get("examples", 0) < 1:
        return {"error": "it holds no examples"}
    return said


def asked(nodes: Nodes, sent: Mapping[int, Message], deadline: float) -> tuple[dict[int, Message], dict[int, str]]:
    """(what was answered in time, message ids of what was not), by the keys of `sent`."""
    waiting: dict[str, int] = {}
    for key, message in sent.items():
        waiting |= {name: key for name in nodes.grid.push_messages([message]) if name}
    until = time.monotonic() + (deadline or math.inf)
    replies: dict[int, Message] = {}
    while waiting:
        for reply in nodes.grid.pull_messages(list(waiting)):
            if (name := reply.metadata.reply_to_message_id) in waiting:
                replies[waiting.pop(name)] = reply
        if time.monotonic() > until:
            break
        if waiting:
            time.sleep(_POLL[nodes.simulated])
    return replies, {key: name for name, key in waiting.items()}


def _overdue(nodes: Nodes) -> int:
    """How many answers to earlier messages have come since: they are dropped."""
    came = list(nodes.grid.pull_messages(list(nodes.late))) if nodes.late else []
    count = 0
    for reply in came:
        was = nodes.late.pop(reply.metadata.reply_to_message_id, None)
        if was is not None and reply.has_content():
            count += 1
            log.warning("round %d: client %d answered after the deadline; dropped", was.round, was.client)
    return count


def _why(reply: Message) -> str:
    """What Flower says in a client's place, on one line."""
    reason = " ".join((reply.error.reason or "").split())[:200]
    return f"Flower's error {reply.error.code}: {reason or 'no reason given'}"


def carried(nodes: Nodes, lost: Callable[[int, int], bool], expected: Callable[[], Expected]) -> Exchange:
    """An `exchange(instructions) -> answers` over the Grid.

    Args:
        nodes: who is there.
        lost: simulated dropout, as in process.
        expected: what is known of answers, asked anew each round.
    """

    def exchange(told: Sequence[Instruction]) -> Answers:
        since = time.perf_counter()
        seats, sheet = nodes.seats(), Sheet(nodes, expected())
        sent = {one.client: message for one in told if (message := sheet.message(one, seats, lost))}
        replies, waiting = asked(nodes, sent, nodes.deadline)
        for one in told:
            if one.client in replies:
                sheet.take(one, replies[one.client], sent[one.client])
            elif one.client in waiting:
                nodes.late[waiting[one.client]] = Late(one.round, one.client)
                sheet.fail(one, f"did not answer within {nodes.deadline:g} s")
            elif one.client in sent:
                sheet.fail(one, "could not be reached")
        sheet.facts |= {"late": _overdue(nodes), "exchange": time.perf_counter() - since}
        return Answers(sheet.updates, sheet.failed, sheet.down, sheet.up, lost=frozenset(sheet.lost), facts=sheet.facts)

    return exchange


@dataclass
class Sheet:
    """The account of one exchange."""

    nodes: Nodes
    expected: Expected
    updates: list[Update] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    down: int = 0
    up: int = 0
    facts: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(
            ("messages", "flower_bytes_down", "flower_bytes_up", "late", "refused", *PARTS), 0
        )
    )

    def message(self, told: Instruction, seats: Mapping[int, int], lost: Callable[[int, int], bool]) -> Message | None:
        """The instruction as a message to its client's node; None where nobody is to hear it."""
        data = wire.encode(told)
        if told.client not in seats:
            self.fail(told, "its node is not connected")
            return None
        self.down += len(data)
        if lost(told.round, told.client):
            self.failed[told.client] = "did not answer (simulated)"
            return None
        node, content = seats[told.client], letter(data, self.nodes.note)
        ttl = _PATIENCE * self.nodes.deadline or None
        message = Message(content, node, _ROUND, ttl=ttl, group_id=str(told.round))
        self.facts["messages"] += 1
        self.facts["flower_bytes_down"] += size(message)
        return message

    def take(self, told: Instruction, reply: Message, sent: Message) -> None:
        """Reads one reply."""
        if reply.has_error():
            self.fail(told, _why(reply))
            return
        self.facts["flower_bytes_up"] += size(reply)
        try:
            if reply.metadata.src_node_id != sent.metadata.dst_node_id:
                raise RefusedError("answered from another node")
            data, note = opened(reply.content)
            self.up += len(data)
            if note.get("lost") is True:
                self.lost.append(told.client)
            elif "error" in note:
                self.fail(told, str(note["error"])[:300])
            else:
                self.updates.append(read(data, told, self.expected))
                self._account(note)
        except ValueError as error:
            self.facts["refused"] += 1
            self.fail(told, str(error))

    def _account(self, note: Mapping[str, Any]) -> None:
        for part in PARTS:
            value = note.get(part, 0.0)
            self.facts[part] += value if isinstance(value, float) and math.isfinite(value) and value >= 0 else 0.0

    def fail(self, told: Instruction, why: str) -> None:
        self.failed[told.client] = why
        log.warning("round %d: client %d is left out: %s", told.round, told.client, why)
