"""Three sites whose files differ in size and classes, and an experiment for them; the scripts beside this share it."""

import csv
from pathlib import Path

from spryfl import data, partition

SITES = 3
EXPERIMENT = """
threads = 1
data = {{ name = "{data}", group = "site", max_length = 64 }}
partition = {{ clients = {sites} }}
method = {{ name = "spry", estimator.directions = 2 }}
train = {{ rounds = {rounds}, cohort = {sites}, steps = 5, eval_every = {rounds} }}
"""


def prepare(folder: Path, name: str = "docstrings", rows: int = 300, rounds: int = 2) -> Path:
    """Writes site0.csv to site2.csv; all their rows in all/; the experiment.

    The SuperLink's own folder, server/, names the classes and has the test rows, and no row of a site.
    """
    corpus = data.load(name, train_rows=rows, test_rows=rows // 3)
    train, names = corpus.train, corpus.labels
    parts = partition.dirichlet(alpha=1.0)(train.label, None, 6, 0)
    held = [parts[0] + parts[1] + parts[2], parts[3] + parts[4], parts[5]]
    sites = [[(train.text[i], names[train.label[i]], f"site{k}") for i in rows] for k, rows in enumerate(held)]
    classes = [(f"an example of {name}", name, "server") for name in names]
    test = [(text, names[label], "test") for text, label in zip(corpus.test.text, corpus.test.label, strict=True)]
    for where, own in (("all", [row for site in sites for row in site]), ("server", classes)):
        write(folder / where / "train.csv", own)
        write(folder / where / "test.csv", test)
    for k, site in enumerate(sites):
        write(folder / f"site{k}.csv", site)
    text = EXPERIMENT.format(data=folder / "all", sites=SITES, rounds=rounds)
    (folder / "experiment.toml").write_text(text, encoding="utf-8")
    return folder / "experiment.toml"


def write(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("text", "label", "site"), *rows])
