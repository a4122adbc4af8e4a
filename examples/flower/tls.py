"""A SuperLink and three SuperNodes with TLS and node keys, each with a file of its own: the same bits as in process.

A fourth node, whose key nobody registered, is turned away. Run it: python examples/flower/tls.py FOLDER [DATA]
"""

import contextlib
import sys
from pathlib import Path

from federation import SITES, prepare

from spryfl.sites import processes, typed


def main(folder: str, data: str = "docstrings") -> None:
    where, app, port = Path(folder).resolve(), Path("app"), processes.free_ports(3 + SITES)
    config = str(prepare(where, data))
    made = typed.federation(app, f"localhost:{port}", Path("tls"))
    files = [where / f"site{i}.csv" for i in range(SITES)]
    nodes = [typed.supernode(made, i, typed.node(i, file), port + 2 + i) for i, file in enumerate(files)]

    def call(*words: str) -> None:
        print("$", typed.line(words), processes.call(words, app, where), sep="\n", flush=True)

    call("spryfl", "run", "--config", config, "--name", "in-process")
    own = ("--set", f"data.name={where / 'server'}", "--superlink", made.address, "--tls", str(made.tls))
    call("spryfl", "flower", "init", str(app), "--config", config, *own)
    call("spryfl", "flower", "certs", str(made.tls), "--nodes", str(SITES + 1), "--host", made.host)
    with contextlib.ExitStack() as started:
        started.enter_context(processes.running(typed.superlink(made), app, where, processes.answers(port)))
        for i, words in enumerate(nodes):
            call(*typed.register(made, i))
            started.enter_context(processes.running(words, app, where, processes.answers(port + 2 + i)))
        call(*typed.doctor(made, 0, files[0]))  # as site 0 would ask before it starts
        stranger = typed.supernode(made, SITES, typed.node(SITES, files[0]), port + 2 + SITES)
        try:
            processes.call([*stranger, "--max-retries", "1"], app, where, seconds=300)
        except processes.FailedError as error:
            print("turned away:", next(line for line in str(error).splitlines() if "[code:" in line))
        else:
            raise SystemExit("a node whose key nobody registered was let in")
        call(*typed.run(app, typed.SITES))
        processes.finished(typed.SITES, app, where)
    call("spryfl", "flower", "same", "runs/in-process", "runs/sites")


if __name__ == "__main__":
    main(*sys.argv[1:])
