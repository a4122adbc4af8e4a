"""The exchange over Flower's Grid: one message a client, a deadline, and a check of all that comes back.

Answers are polled for here, as Flower's own loop looks every three seconds. An exchange ends with the last answer or at
its deadline; what comes later is dropped, and counted in a later round. Cost: the messages' bytes in memory, those of a
cohort at a time.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import Message

from spryfl import wire
from spryfl.engines.flower_check import Expected, RefusedError, read
from spryfl.engines.flower_letters import letter, opened, size
from spryfl.engines.flower_nodes import Late, Nodes, why
from spryfl.train import Answers, Exchange
from spryfl.types import Instruction, Update

log = logging.getLogger("flwr")  # Flower shows it, and carries it to whoever follows the run

# Seconds of the messages of a round at their clients, added up: until the process was there, of its imports, of the
# model and the rows, of the steps.
PARTS = ("start", "import", "load", "step")
_ROUND = "train.round"
_POLL = {True: 0.02, False: 0.25}  # seconds between looks: in a simulation, over a network
_PATIENCE = 2.0  # deadlines until Flower drops a message: what comes after one is late, and counted


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
            self.fail(told, why(reply))
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
