"""Mean and spread over seeds of runs named NAME-SEED, as a table in Markdown.

python experiments/table.py FOLDER NAME [NAME ...]
"""

import sys
from pathlib import Path
from statistics import mean, stdev

from spryfl import report

PASSES = ("value_passes", "tangent_passes", "backward_passes")
HEAD = (
    "runs",
    "seeds",
    "state",
    "rounds",
    "metric",
    "each",
    "MB up",
    "MB down",
    "passes: value + tangent + backward",
)
HEAD += ("peak MB of a step", "seconds")


def spread(values: list[float], digits: int = 4) -> str:
    sd = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{sd}"


def row(folder: Path, name: str) -> str:
    runs = [report.read(path) for path in sorted(folder.glob(f"{name}-[0-9]*")) if (path / "records.jsonl").is_file()]
    last = [run.records[-1] for run in runs]
    final = [report.scored(run)[-1][report.metric(run)] for run in runs]
    cells = [
        name,
        " ".join(path.name.rpartition("-")[2] for path in sorted(folder.glob(f"{name}-[0-9]*"))),
        ", ".join(sorted({run.facts["state"] for run in runs})),
        str(last[0]["round"]),
        spread(final),
        " ".join(f"{value:.4f}" for value in final),
        f"{mean(r['bytes_up'] for r in last) / 1e6:.2f}",
        f"{mean(r['bytes_down'] for r in last) / 1e6:.2f}",
        " + ".join(f"{mean(r[k] for r in last):.0f}" for k in PASSES),
        f"{max(r.get('peak_bytes', 0) for run in runs for r in run.records) / 1e6:.1f}",
        f"{mean(r['seconds'] for r in last):.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(folder: str, *names: str) -> None:
    print(f"| {' | '.join(HEAD)} |\n{'| --- ' * len(HEAD)}|")
    for name in names:
        print(row(Path(folder), name))


if __name__ == "__main__":
    main(*sys.argv[1:])
