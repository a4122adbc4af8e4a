"""One experiment in process and in Flower's simulation, where one machine plays every client: the same bits.

Run it: python examples/flower/simulation.py FOLDER [DATA], DATA as for `spryfl run --data`.
"""

import sys
from pathlib import Path

from federation import SITES, prepare

from spryfl.sites import processes, typed


def main(folder: str, data: str = "docstrings") -> None:
    where, app, port = Path(folder).resolve(), Path("app"), processes.free_ports(2)
    config = str(prepare(where, data))

    def call(*words: str) -> None:
        print("$", typed.line(words), processes.call(words, app, where), sep="\n", flush=True)

    call("spryfl", "run", "--config", config, "--name", "in-process")
    call("spryfl", "flower", "init", str(app), "--config", config, "--superlink", f"127.0.0.1:{port}", "--insecure")
    with processes.running(typed.simulator(port + 1), app, where, processes.answers(port + 1)):
        call(*typed.run(app, typed.SIMULATION, clients=SITES))
        processes.finished(typed.SIMULATION, app, where)
    call("spryfl", "flower", "same", "runs/in-process", "runs/simulation")


if __name__ == "__main__":
    main(*sys.argv[1:])
