"""The exchange in this process: clients one after the other, every message through its bytes as on a network.

Clients that hold the values of the same round hold the same bits, so one copy serves all of them. Cost: one client's
memory at a time, whatever the size of the cohort; some milliseconds a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from spryfl import client, ledger, wire
from spryfl.choices import Built
from spryfl.ledger import Held
from spryfl.train import Answers, Exchange
from spryfl.types import Instruction, Update

Lost = Callable[[int, int], bool]  # (round, client) -> the client never answers


def simulation(
    method: Built,
    local: Callable[[int], client.Local],
    lost: Lost,
    head: frozenset[str] = frozenset(),
    held: Held | None = None,
) -> Exchange:
    """An `exchange(instructions) -> answers` that runs `client.run` here; a failed client is absent.

    Args:
        method: the method's functions.
        local: a client's own side by its number.
        lost: which clients never answer.
        head: names of the head's values.
        held: what the clients hold that were brought up to date last, where a run goes on.
    """
    memory = [held]

    def answer(message: bytes) -> bytes:
        told = cast(Instruction, wire.decode(message))
        params, kept = ledger.restored(told, memory[0], method, head)
        if method.follows:
            memory[0] = kept
        return wire.encode(client.run(told._replace(params=params), method, local(told.client)))

    def exchange(told: Sequence[Instruction]) -> Answers:
        updates, failed, down, up = [], {}, 0, 0
        for one in told:
            message = wire.encode(one)
            down += len(message)
            if lost(one.round, one.client):
                failed[one.client] = "did not answer (simulated)"
                continue
            try:
                done = answer(message)
            except FloatingPointError as error:
                failed[one.client] = str(error)
                continue
            up += len(done)
            updates.append(cast(Update, wire.decode(done)))
        return Answers(updates, failed, down, up)

    return exchange
