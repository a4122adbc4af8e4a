"""Flower's Grid without its processes: a message goes to the client app in this process and comes back when due."""

from __future__ import annotations

import uuid
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import InMemoryGrid

from spryfl.engines.flower import client_app

RUN = 7


def travelled(message: Message) -> Message:
    """The same message through its bytes."""
    objects = {name: one.deflate() for name, one in get_all_nested_objects(message).items()}
    made = inflate_object_from_contents(message.object_id, objects)
    made.metadata.__dict__["_message_id"] = message.metadata.message_id
    return made


class HereGrid(Grid):
    """Nodes by number with their configurations; `app` answers for all of them.

    `delay(message)` says after how many further messages an answer can be had. `forgetful` nodes keep nothing.
    """

    def __init__(self, nodes, run_config, app=client_app, delay=lambda message: 0, forgetful=False):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = RUN, 1, 1
        self.contexts = {
            i: Context(RUN, i, dict(config), RecordDict(), dict(run_config)) for i, config in nodes.items()
        }
        self.app, self.delay, self.forgetful = app, delay, forgetful
        self.replies: dict[str, tuple[int, Message]] = {}
        self.sent: list[Message] = []

    def get_node_ids(self):
        return list(self.contexts)

    def push_messages(self, messages):
        return [self._pushed(message) for message in messages]

    def _pushed(self, message: Message) -> str:
        name = str(uuid.uuid4())
        message.metadata.__dict__["_message_id"] = name
        self.sent.append(message)
        context = self.contexts[message.metadata.dst_node_id]
        if self.forgetful:
            context.state = RecordDict()
        due = len(self.sent) + self.delay(message)
        self.replies[name] = (due, travelled(self.app(travelled(message), context)))
        return name

    def pull_messages(self, message_ids):
        due = [name for name in message_ids if name in self.replies and self.replies[name][0] <= len(self.sent)]
        return [self.replies.pop(name)[1] for name in due]

    def send_and_receive(self, messages: Any, *, timeout: float | None = None):
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any):
        raise NotImplementedError

    def set_run(self, run: Any) -> None:
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError


class InMemoryHere(HereGrid, InMemoryGrid):
    """The same, taken for the Grid of a simulation."""
