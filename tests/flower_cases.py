"""What tests of Flower share: a small experiment, its runs over a Grid and in process, what must be equal, lies."""

from __future__ import annotations

import json

import torch
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from grids import RUN, HereGrid

from spryfl import api, job, journal, train, wire
from spryfl.config import parse
from spryfl.engines import flower_server
from spryfl.engines.flower import client_app
from spryfl.engines.flower_letters import letter, opened
from spryfl.train import TIMED

ROUNDS = 3


def settings(tiny, reviews, **changes):
    """A small experiment as plain values, changed: `settings(tiny, reviews, method="fedavg", train={...})`."""
    base = {
        "model": {"name": str(tiny)},
        "data": {"name": str(reviews), "train_rows": 60, "test_rows": 20},
        "partition": {"clients": 5, "held_out": 0.2, "split": "iid"},
        "train": {"rounds": ROUNDS, "cohort": 3, "steps": 2, "eval_every": 2},
        "flower": {"wait": 5.0},
        "threads": 1,
    }
    return {**base, **{k: {**base.get(k, {}), **v} if isinstance(v, dict) else v for k, v in changes.items()}}


def over_flower(given, folder, nodes=None, resume=False, **how):
    """Runs an experiment over a Grid; the Grid."""
    nodes = nodes or {11: {"partition-id": 1}, 12: {"partition-id": 0}}
    config = {"experiment": json.dumps(given), "folder": str(folder), "resume": resume}
    grid = HereGrid(nodes, config, **how)
    flower_server.serve(grid, Context(RUN, 1, {}, RecordDict(), config))
    return grid


def in_process(given, folder, lost=None, answer=None):
    """The same experiment in process; `lost(round, client)` are absent, `answer(told)` is what the others say."""
    made = api.prepared(parse(given))
    begun, state, progress = job.begin(made, folder)
    carry = plain = job.exchange(made, state)
    if answer:

        def plain(told):
            return train.Answers([answer(one) for one in told], {}, 0, 0)

    if lost:

        def carry(told):
            answers = plain([one for one in told if not lost(one.round, one.client)])
            gone = {one.client: "absent" for one in told if lost(one.round, one.client)}
            return answers._replace(failed={**answers.failed, **gone})

    list(job.run(made, begun, state, progress, carry))
    return folder


def records(folder, leave=()):
    return [{k: v for k, v in record.items() if k not in (*TIMED, *leave)} for record in lines(folder)]


def lines(folder):
    return [json.loads(line) for line in (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()]


def facts(folder):
    return [record["engine"] for record in lines(folder) if "engine" in record]


def assert_same(one, other, leave=()):
    """Equal records, states and adapters, bit for bit."""
    assert records(one, leave) == records(other, leave)
    (a, _), (b, _) = (journal.load(journal.open_folder(folder)) for folder in (one, other))
    assert a.round == b.round
    for mine, theirs in [(a.params, b.params), *((a.optimizer[slot], b.optimizer[slot]) for slot in b.optimizer)]:
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    adapters = [sorted((folder / "adapter").rglob("*.safetensors")) for folder in (one, other)]
    assert adapters[1]
    for x, y in zip(*adapters, strict=True):
        assert x.read_bytes() == y.read_bytes()


BYTES = ("bytes_up", "bytes_down")


def lying(change, client=None, round_=2):
    """A client app that changes what one client answers in one round: `change(update)` is an update, or bytes."""
    app = ClientApp()

    @app.query("hello")
    def hello(message: Message, context: Context) -> Message:
        return client_app(message, context)

    @app.train("round")
    def answer(message: Message, context: Context) -> Message:
        reply = client_app(message, context)
        body, note = opened(reply.content)
        update = wire.decode(body)
        if update.round != round_ or (client is not None and update.client != client):
            return reply
        said = change(update)
        data = said if isinstance(said, bytes) else wire.encode(said)
        return Message(letter(data, note), reply_to=message)

    return app


def _every(update, change):
    return update._replace(params={name: change(value) for name, value in update.params.items()})


def _nan(value):
    value = value.clone()
    value.flatten()[-1] = float("nan")
    return value


def swapped(update):
    """The same values under the names of the next layer, which are another client's."""
    layers = {f"layer.{i}.": f"layer.{(i + 1) % 3}." for i in range(3)}
    named = {name: next((to for at, to in layers.items() if at in name), "") for name in update.params}
    at = {name: next((at for at in layers if at in name), "layer") for name in update.params}
    return update._replace(
        params={name.replace(at[name], named[name] or "layer"): v for name, v in update.params.items()}
    )


def _relabelled(update, **header):
    """A container whose header says something else of the same bytes."""
    head, tensors = wire.unpack(wire.encode(update))
    return wire.pack({**head, **header}, tensors)


_TRACE = wire.Trace(torch.zeros(1), ((((), "gaussian", 1),),), (0,), torch.zeros(0, dtype=torch.int64))
LIES = {
    "not finite": lambda u: _every(u, _nan),
    "other shapes": lambda u: _every(u, lambda v: v.flatten()),
    "of another type": lambda u: _every(u, lambda v: v.double()),
    "other names": lambda u: u._replace(params=dict(list(u.params.items())[1:])),
    "answers as client": lambda u: u._replace(client=(u.client + 1) % 5),
    "answers round 1": lambda u: u._replace(round=1),
    "more than the": lambda u: wire.encode(u) * 10,
    "claims 1000000 examples": lambda u: u._replace(examples=10**6),
    "scalars of 1 steps": lambda u: u._replace(trace=_TRACE),
    "scalars, not values": lambda u: u._replace(trace=_TRACE._replace(steps=(0, 0), scalars=torch.zeros(2))),
    "no update (ValueError": lambda u: b"\x80\x04garbage" * 20,
    "checksum": lambda u: wire.encode(u)[:-1] + b"x",
    "there are": lambda u: _relabelled(u, tensors=[["0", "float32", [10**12]]]),
    "numbers of another type": lambda u: u._replace(examples="many"),
    "account of its work": lambda u: u._replace(passes=wire.Passes(-1e9, 0, 0)),
    "below 0, or not finite": lambda u: u._replace(held_out=-4),
}  # fmt: skip
