"""results.json from run folders: what each run began and ended with, beside the best constant answer to the same rows.

    python experiments/tasks/collect.py runs/tasks/*/*-seed*

Constant: one class for all rows, or no answer to any question, whichever scores best on the test rows. Cost: the model
is loaded for its tokenizer, and the test rows become tokens once more; some seconds a run.
"""

import json
import sys
import tomllib
from pathlib import Path
from typing import Any

from spryfl import job, report, tasks
from spryfl.config import parse
from spryfl.tasks.question_answering import Span


def main() -> None:
    """A line a run."""
    lines = [line(path) for path in map(Path, sys.argv[1:]) if (path / "config.toml").is_file()]
    lines.sort(key=lambda one: (one["data"], one["row"], one["seed"]))
    Path(__file__).with_name("results.json").write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")


def line(folder: Path) -> dict[str, Any]:
    """What the page shows of one run."""
    experiment = parse(tomllib.loads((folder / "config.toml").read_text(encoding="utf-8")))
    run, task = report.read(folder), tasks.build(experiment.task)
    scored = report.scored(run)
    corpus = job.read(experiment)
    truths = job.encode(experiment, corpus, job.load_model(experiment, corpus.labels))[1].labels
    classes = range(len(corpus.labels))
    alike = [[float(i == c) for i in classes] for c in classes]
    fits = [Span(0, 0, 0, 0.0, 1.0)] if experiment.task["kind"] == "question_answering" else alike
    best = max((task.score([one] * len(truths), truths) for one in fits), key=lambda score: score[task.metric])
    label, _, seed = folder.name.rpartition("-seed")
    return {
        "data": Path(experiment.data.name).name,
        "row": label,
        "seed": int(seed),
        "state": run.facts["state"],
        "rounds": scored[-1]["round"],
        "tokens": experiment.data.max_length,
        "test": len(truths),
        "constant": said(best, best),
        "before": said(scored[0], best),
        "after": said(scored[-1], best),
        "loss": f"{scored[0]['test_loss']:.3f} to {scored[-1]['test_loss']:.3f}",
        "seconds": scored[-1]["seconds"],
    }


def said(scores: dict[str, Any], metrics: dict[str, float]) -> str:
    """The task's metrics in one cell."""
    return ", ".join(f"{name} {scores[name]:.4f}" for name in metrics)


if __name__ == "__main__":
    main()
