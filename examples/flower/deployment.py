"""A SuperLink and three SuperNodes on loopback, each with a file of its own: the same bits as in process.

Plain HTTP and no keys, so for loopback alone. Run it: python examples/flower/deployment.py FOLDER [DATA]
"""

import contextlib
import sys
from pathlib import Path

from federation import SITES, prepare

from spryfl.sites import processes, typed


def main(folder: str, data: str = "docstrings") -> None:
    where, app, port = Path(folder).resolve(), Path("app"), processes.free_ports(2 + SITES)
    config = str(prepare(where, data))
    made = typed.federation(app, f"127.0.0.1:{port}", None)

    def call(*words: str) -> None:
        print("$", typed.line(words), processes.call(words, app, where), sep="\n", flush=True)

    call("spryfl", "run", "--config", config, "--name", "in-process")
    own = ("--set", f"data.name={where / 'server'}", "--superlink", made.address, "--insecure")
    call("spryfl", "flower", "init", str(app), "--config", config, *own)
    with contextlib.ExitStack() as started:
        started.enter_context(processes.running(typed.superlink(made), app, where, processes.answers(port)))
        for i in range(SITES):
            words = typed.supernode(made, i, typed.node(i, where / f"site{i}.csv"), at := port + 2 + i)
            started.enter_context(processes.running(words, app, where, processes.answers(at)))
        call(*typed.run(app, typed.SITES))
        processes.finished(typed.SITES, app, where)
    call("spryfl", "flower", "same", "runs/in-process", "runs/sites")


if __name__ == "__main__":
    main(*sys.argv[1:])
