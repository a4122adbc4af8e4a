"""An engine of one's own: clients in two processes beside the server's, nothing but bytes between them.

    exchange(instructions) -> Answers(updates, failed, bytes down, bytes up)

The run ends in the bits of the engine in this process, which the script checks. Methods whose values come by replay
(exchange = "scalars") ask a client to remember them: see `ledger.restored` in engines/simulate.py.
Run it: python examples/own_engine.py [MODEL DATA]
"""

import multiprocessing
import sys
import tomllib
from functools import cache
from typing import cast

import torch

from spryfl import api, client, config, job, train, wire
from spryfl.types import Instruction, Update


@cache  # a process opens data and model once
def prepared(toml: str) -> job.Job:
    return api.prepared(config.parse(tomllib.loads(toml)))


def answer(toml: str, message: bytes) -> bytes:
    """A client's side of one round, wherever it is."""
    made, told = prepared(toml), cast(Instruction, wire.decode(message))
    return wire.encode(client.run(told, made.plan.method, job.local(made)(told.client)))


def exchange_over(pool, toml: str) -> train.Exchange:
    def exchange(told) -> train.Answers:
        sent = {one.client: wire.encode(one) for one in told}
        waiting = {who: pool.apply_async(answer, (toml, message)) for who, message in sent.items()}
        came, failed = [], {}
        for who, one in waiting.items():
            try:
                came.append(one.get(timeout=600))
            except Exception as error:  # a client that fails is absent, and the reason is kept
                failed[who] = repr(error)
        updates = [cast(Update, wire.decode(text)) for text in came]
        return train.Answers(updates, failed, sum(map(len, sent.values())), sum(map(len, came)))

    return exchange


def main(model: str = "minilm", data: str = "docstrings") -> None:
    small = {"data": {"name": data, "train_rows": 48, "test_rows": 20}, "model": {"name": model}, "threads": 1}
    short = {"partition": {"clients": 4}, "train": {"rounds": 2, "cohort": 2, "steps": 2}, "method": "spry"}
    made, ends = api.prepared(config.parse({**small, **short})), []
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        for carry in (None, exchange_over(pool, made.experiment.toml())):
            rounds = list(job.run(made, *job.begin(made, None), carry))
            print([f"round {record['round']}: {record['bytes_up']} bytes up" for record, _ in rounds])
            ends.append(rounds[-1][1].params)
    print("the same bits:", all(torch.equal(value, ends[1][name]) for name, value in ends[0].items()))


if __name__ == "__main__":
    main(*sys.argv[1:])
