"""The exchange in this process: clients one after the other, every message through its bytes as on a network.

Cost: one client's memory at a time, whatever the size of the cohort; some milliseconds a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from spryfl import client, wire
from spryfl.methods import Built
from spryfl.train import Answers, Exchange
from spryfl.types import Instruction, Update

Lost = Callable[[int, int], bool]  # (round, client) -> the client never answers


def simulation(method: Built, local: Callable[[int], client.Local], lost: Lost) -> Exchange:
    """An `exchange(instructions) -> answers` that runs `client.run` here; a failed client is absent."""

    def exchange(told: Sequence[Instruction]) -> Answers:
        updates, failed, down, up = [], {}, 0, 0
        for one in told:
            message = wire.encode(one)
            down += len(message)
            if lost(one.round, one.client):
                failed[one.client] = "did not answer (simulated)"
                continue
            try:
                received = cast(Instruction, wire.decode(message))
                done = client.run(received, method.estimator, method.local, local(one.client), method.head_lr)
                answer = wire.encode(done)
            except FloatingPointError as error:
                failed[one.client] = str(error)
                continue
            up += len(answer)
            updates.append(cast(Update, wire.decode(answer)))
        return Answers(updates, failed, down, up)

    return exchange
