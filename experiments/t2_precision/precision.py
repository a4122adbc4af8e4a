"""What rounding leaves of a directional derivative: jvp and central differences over float32, bf16 and 4-bit weights.

    c_k = <grad loss(w), v_k>        by jvp, and by [loss(w + mu v_k) - loss(w - mu v_k)] / 2mu for several mu
    reference                        grad of the same (rounded) weights, all else in float32, by reverse mode

Says, for each backbone: cos of reverse mode's own gradient to the reference; cos of the vector of K scalars to the true
ones; how many of them are exactly 0 (two equal losses); and cos of the estimate (1/K) sum c_k v_k to the gradient,
beside what true scalars along the same directions give. Cost: about a minute of one core.

    python experiments/t2_precision/precision.py --data ../shared/data/sst2/train.parquet --out experiments/t2_precision
"""

import argparse
import json
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from spryfl import Experiment, adapters, job, models, noise, optimizers, packing, tasks, tree
from spryfl.estimators import backprop, central_difference, forward

MUS = (1e-2, 1e-3, 1e-4)
ADAPTER = {"kind": "lora", "r": 1, "alpha": 1.0}  # the paper's: query and value, 9,216 values
LENGTH = 64


def main() -> None:
    """Trains a little in float32, then measures at that point over each backbone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--directions", type=int, default=16)
    parser.add_argument("--batches", type=int, default=1, help="probe batches of 16 rows")
    parser.add_argument("--steps", type=int, default=40, help="AdamW steps of 16 rows before the probe, rate 5e-3")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = job.read(Experiment(data={"name": asked.data, "train_rows": 2000, "test_rows": 100, "max_length": LENGTH}))
    with tempfile.TemporaryDirectory() as where:
        made = backbones(Path(where))
        start = _opened(str(made["float32"]), corpus.labels)
        rows = start.task.encode(start.tokenizer, corpus.train, LENGTH)
        order = list(tasks.shuffled(range(len(rows.labels)), 16, 0, 0, asked.steps + asked.batches))
        at = trained(start, rows, order[: asked.steps])
        probes = [tasks.collate(rows, chosen) for chosen in order[asked.steps :]]
        out = {}
        for name, reference in REFERENCES.items():
            exact, rough = (_opened(str(made[one]), corpus.labels) for one in (reference, name))
            out[name] = measured(exact, rough, at, probes, asked.directions)
            print(json.dumps({name: out[name]}), flush=True)
    facts = {"directions": asked.directions, "batches": asked.batches, "steps": asked.steps, "values": _values(at)}
    rows_ = [{"backbone": name, **flat(one)} for name, one in out.items()]
    told = {"facts": {**facts, "torch": torch.__version__}, "rows": rows_}
    (asked.out / "table.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


# Each backbone, and the one of the same weights with everything else in float32.
REFERENCES = {"float32": "float32", "bf16": "bf16 weights", "4bit": "4bit", "4bit, bf16": "4bit of bf16 weights"}


def backbones(where: Path) -> dict[str, Path]:
    """MiniLM's folder in float32, in bf16, with bf16's weights in float32, and each of them in 4 bits."""
    source, _ = models.resolve("minilm")
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    whole = AutoModelForSequenceClassification.from_pretrained(source, num_labels=2, dtype=torch.float32)
    out = {}
    for name, dtype in (("float32", None), ("bf16", torch.bfloat16), ("bf16 weights", torch.float32)):
        if dtype:
            whole.to(dtype)
        whole.save_pretrained(where / name)
        tokenizer.save_pretrained(where / name)
        out[name] = where / name
    for name, of in (("4bit", "float32"), ("4bit, bf16", "bf16"), ("4bit of bf16 weights", "bf16 weights")):
        packing.pack(str(out[of]), where / name, "4bit")
        out[name] = where / name
    return out


def _opened(folder: str, labels: tuple[str, ...]) -> models.Model:
    base, tokenizer = models.load(folder, labels)
    return models.prepare(base, tokenizer, labels, adapters.build(ADAPTER), source=folder)


def trained(model: models.Model, rows: tasks.Rows, order: list[list[int]]) -> dict[str, torch.Tensor]:
    """Values after some AdamW steps by backprop: at the very start of LoRA half of the gradient is zero."""
    loss_fn, optimizer, estimate = models.loss_fn(model, {}), optimizers.adamw(lr=5e-3), backprop()
    params = dict(model.params)
    state = optimizer.init(params)
    for step, chosen in enumerate(order):
        grads = estimate(loss_fn, params, tasks.collate(rows, chosen), step).dense
        params, state = optimizer.step(params, grads, state, 1 - step / len(order))
    return params


def measured(exact: models.Model, rough: models.Model, at: dict, probes: list, count: int) -> dict[str, dict]:
    """Means over the probe batches."""
    head = {name for unit in exact.units if unit.head for name in unit.params}
    fixed, inside = tree.select(at, head), tree.without(at, head)
    ways = {"jvp": forward(directions=count)}
    ways |= {f"mu {mu:g}": central_difference(directions=count, mu=mu) for mu in MUS}
    found: dict[str, list[dict[str, float]]] = {}
    for number, batch in enumerate(probes):
        truth = backprop()(models.loss_fn(exact, fixed), inside, batch, 0).dense
        loss_fn = models.loss_fn(rough, fixed)
        found.setdefault("reverse", []).append({"gradient": cosine(backprop()(loss_fn, inside, batch, 0).dense, truth)})
        for name, estimate in ways.items():
            terms = estimate(loss_fn, inside, batch, number).terms
            given = torch.tensor([count * term.coefficient for term in terms], dtype=torch.float64)
            along = [noise.direction(term.seed, inside, term.distribution) for term in terms]
            true = torch.tensor([dot(truth, v) for v in along], dtype=torch.float64)
            ideal = {key: sum(c * v[key] for c, v in zip(true.tolist(), along, strict=True)) for key in inside}
            found.setdefault(name, []).append(
                {
                    "scalars": float(torch.nn.functional.cosine_similarity(given, true, dim=0)),
                    "zero": float((given == 0).double().mean()),
                    "gradient": cosine(noise.expand(terms, inside), truth),
                    "ideal": cosine(ideal, truth),
                }
            )
    return {name: {key: sum(one[key] for one in all_) / len(all_) for key in all_[0]} for name, all_ in found.items()}


def flat(found: dict[str, dict[str, float]]) -> dict[str, float]:
    """Names of ways and of cosines joined: `jvp scalars`."""
    return {f"{way} {key}": value for way, all_ in found.items() for key, value in all_.items()}


def dot(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """<one, other> in float64."""
    return sum(float((one[key].double() * other[key].double()).sum()) for key in one)


def cosine(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of the angle between them; 0 where one has no length."""
    size = (dot(one, one) * dot(other, other)) ** 0.5
    return dot(one, other) / size if size else 0.0


def _values(params: dict[str, torch.Tensor]) -> int:
    return sum(value.numel() for value in params.values())


if __name__ == "__main__":
    main()
