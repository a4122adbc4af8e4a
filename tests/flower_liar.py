"""A client app whose clients lie in round 2 of an experiment that is called after a lie of flower_cases.py."""

from __future__ import annotations

import json

from flower_cases import LIES, lying
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from spryfl.engines.flower import client_app as honest
from spryfl.engines.flower_letters import opened

client_app = ClientApp()
LIARS = {
    "lie-nan": "not finite",
    "lie-shapes": "other shapes",
    "lie-round": "answers round 1",
    "lie-bytes": "more than the",
}


@client_app.query("hello")
def _hello(message: Message, context: Context) -> Message:
    return honest(message, context)


@client_app.train("round")
def _round(message: Message, context: Context) -> Message:
    _, note = opened(message.content)
    given = json.loads(context.run_config["experiment"])
    name = (given if isinstance(given, list) else [given])[note["which"]]["name"]
    return (lying(LIES[LIARS[name]]) if name in LIARS else honest)(message, context)
