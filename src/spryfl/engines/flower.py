"""Flower as the engine: the same experiment in its simulation and in its deployment, state and adapter bit for bit.

    [tool.flwr.app.components]
    serverapp = "spryfl.engines.flower:server_app"
    clientapp = "spryfl.engines.flower:client_app"

Run configuration (`flwr run . -c "..."`): `experiment`, the whole experiment as one JSON text, or a list of them, one
run after the other; `folder`, the run folder (of a list: that of the run folders); `resume`, whether to go on with what
is there. Node configuration (`flower-supernode --node-config "..."`): `partition-id`, which client this node is;
`num-partitions`; `data`, a file of its own, that stays there; `model`, where the model lies there; `device`;
`threads`; `counts`, whether the counts of its classes may leave it.

The server writes the run folder that `spryfl run` writes. A run that was cut off goes on from the last round's state
with `resume=true`. Nothing heavy is imported here: a client's process lives for one message, and says what that costs.
"""

from __future__ import annotations

import logging
import os
import time
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from spryfl.engines.flower_letters import letter, opened

if TYPE_CHECKING:
    from collections.abc import Callable

    from spryfl.engines.flower_letters import Note

__all__ = ["client_app", "server_app"]

log = logging.getLogger("flwr")
server_app = ServerApp()
client_app = ClientApp()

_born: list[float] = []  # seconds this process took until here, until a message has said so


def _age() -> float:
    """Seconds since this process began; 0 where the system does not say."""
    try:
        with open("/proc/self/stat", encoding="ascii") as file:
            ticks = int(file.read().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return 0.0


_born.append(_age())


@server_app.main()
def _main(grid: Grid, context: Context) -> None:
    from spryfl.engines.flower_server import serve

    serve(grid, context)


@client_app.query("hello")
def _hello(message: Message, context: Context) -> Message:
    return _reply(message, context, lambda body, note: _said(note, context))


@client_app.train("round")
def _round(message: Message, context: Context) -> Message:
    return _reply(message, context, lambda body, note: _answered(body, note, context))


def _said(note: Note, context: Context) -> Any:
    from spryfl.engines import flower_client

    return letter(b"", flower_client.hello(note, context))


def _answered(body: bytes, note: Note, context: Context) -> Any:
    clock = {"start": 0.0 if note.get("shared") or not _born else _born.pop()}
    since = time.perf_counter()
    from spryfl.engines import flower_client

    clock["import"] = time.perf_counter() - since
    return flower_client.answered(body, note, context, clock)


def _reply(message: Message, context: Context, act: Callable[[bytes, Note], Any]) -> Message:
    """What comes of a message. What goes wrong is said, but not what might quote the data that a site holds."""
    try:
        body, note = opened(message.content)
        return Message(act(body, note), reply_to=message)
    except Exception as error:
        log.exception("this client fails")
        plain = isinstance(error, FloatingPointError) or type(error).__name__ in ("DataError", "LostError")
        told = plain or "data" not in context.node_config
        why = str(error) if told else f"{type(error).__name__}; the log of that node says more"
        return Message(letter(b"", {"error": why}), reply_to=message)
