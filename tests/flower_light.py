"""A client app that opens no model: it moves every value by a hundredth for each client before it. Quick to start."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from spryfl.engines.flower_letters import letter, opened

EXAMPLES = 24
client_app = ClientApp()


def moved(told):
    """The answer to an instruction."""
    from spryfl.types import Passes, Update

    params = {name: told.params[name] + 0.01 * (told.client + 1) for name in told.names}
    return Update(told.round, told.client, params, EXAMPLES, 0.5, Passes(1), 0, 0.1)


@client_app.query("hello")
def _hello(message: Message, context: Context) -> Message:
    _, note = opened(message.content)
    said = {key: context.node_config[key] for key in ("partition-id", "num-partitions")}
    return Message(letter(b"", {"own": False, "model": note["model"], **said}), reply_to=message)


@client_app.train("round")
def _round(message: Message, context: Context) -> Message:
    from spryfl import wire

    body, _ = opened(message.content)
    return Message(letter(wire.encode(moved(wire.decode(body))), {"step": 0.1}), reply_to=message)
